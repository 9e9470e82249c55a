/* Stands in for guacd: whoever connects and says "6.select,…;" is told which arguments it would take. It is no guacd. */
#include <arpa/inet.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void leave(int number) {
    (void)number;
    _exit(0);
}

int main(int argc, char **argv) {
    const char answer[] = "4.args,13.VERSION_1_5_0,8.hostname,4.port;";
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(argc > 1 ? atoi(argv[1]) : 4822)};
    int on = 1, door = socket(AF_INET, SOCK_STREAM, 0);
    signal(SIGTERM, leave); /* PID 1 of a container: the default is to ignore it */
    setsockopt(door, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(door, (struct sockaddr *)&here, sizeof here) || listen(door, 8)) return 1;
    for (;;) {
        char said[256] = {0};
        int guest = accept(door, 0, 0);
        if (guest < 0) continue;
        if (read(guest, said, sizeof said - 1) > 0 && !strncmp(said, "6.select,", 9) && write(guest, answer, sizeof answer - 1) < 0) return 1;
        close(guest);
    }
}
