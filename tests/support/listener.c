/* Greets whoever knocks, on every address of both families: `listener tcp/80 udp/81`. Says "listening" when it does. */
#include <arpa/inet.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 16
static const char greeting[] = "here\n";

static int open_socket(const char *what) {
    int on = 1, is_udp = strncmp(what, "udp/", 4) == 0;
    struct sockaddr_in6 at = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(what + 4)), .sin6_addr = in6addr_any};
    int fd = socket(AF_INET6, is_udp ? SOCK_DGRAM : SOCK_STREAM, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) || (!is_udp && listen(fd, 64))) {
        perror(what);
        exit(1);
    }
    return fd;
}

static void greet(int fd, int is_udp) {
    if (is_udp) {
        char word[64];
        struct sockaddr_in6 from;
        socklen_t length = sizeof from;
        if (recvfrom(fd, word, sizeof word, 0, (struct sockaddr *)&from, &length) >= 0)
            sendto(fd, greeting, sizeof greeting - 1, 0, (struct sockaddr *)&from, length);
        return;
    }
    int caller = accept(fd, NULL, NULL);
    if (caller >= 0) {
        send(caller, greeting, sizeof greeting - 1, MSG_NOSIGNAL);
        close(caller);
    }
}

int main(int count, char **what) {
    struct pollfd sockets[MOST];
    if (count < 2 || count > MOST) {
        fprintf(stderr, "usage: listener tcp/PORT udp/PORT ...\n");
        return 2;
    }
    for (int i = 1; i < count; i++)
        sockets[i - 1] = (struct pollfd){.fd = open_socket(what[i]), .events = POLLIN};
    puts("listening");
    fflush(stdout);
    while (poll(sockets, count - 1, -1) > 0)
        for (int i = 1; i < count; i++)
            if (sockets[i - 1].revents)
                greet(sockets[i - 1].fd, strncmp(what[i], "udp/", 4) == 0);
    return 1;
}
