#!/bin/sh
# shellcheck disable=SC2094 # words that are names of files in the folder, and of commands as well
# The way back: `keep` remembers which firewall is at work on this host and what it does, `back SECONDS` makes it so again. Lies in /run while a change
# is under way; a timer runs `back` if nobody takes it away. What others have in the kernel's tables is touched only where firewalld has flushed it.
set -u
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
before=/run/remotegpu-firewall.before
program=/usr/local/sbin/remotegpu-firewall
units='ufw firewalld nftables remotegpu-firewall remotegpu-firewall-docker remotegpu-gateway'
tables='remotegpu remotegpu_openings remotegpu_gateway'
forwarding='net.ipv4.ip_forward net.ipv6.conf.all.forwarding'

files() {
    for path in /etc/remotegpu/firewall.* /etc/remotegpu/openings.nft /etc/remotegpu/gateway.* /etc/sysctl.d/60-remotegpu-gateway.conf "$program" /etc/ufw /etc/default/ufw /etc/firewalld \
        /etc/systemd/system/remotegpu-firewall*.service /etc/systemd/system/remotegpu-gateway.service /etc/systemd/system/nftables.service \
        /etc/systemd/system/nftables.service.d/remotegpu*.conf /etc/systemd/system/netfilter-persistent.service.d/remotegpu.conf; do
        if [ -e "$path" ] || [ -L "$path" ]; then echo "$path"; fi
    done
}

sums_of_units() { files | grep '^/etc/systemd/' | xargs -r sha256sum 2>/dev/null; }
ufw_is_on() { grep -qs '^ENABLED=yes' /etc/ufw/ufw.conf; }
firewalld_is_on() { systemctl --quiet is-active firewalld.service; }
# Asked only where they may be: iptables makes an empty frame of tables by being asked.
chains_are_there() { [ -e "$program" ] && iptables -w -S REMOTEGPU-FORWARD >/dev/null 2>&1 && ! firewalld_is_on; }

# Where /etc/protocols is missing, nft tells the protocol of a `ct timeout` by a number, which it does not read.
remember() {
    if nft list table inet "$1" >"$1.listed" 2>/dev/null; then
        sed -e 's/^\([[:blank:]]*protocol\) 6$/\1 tcp/' -e 's/^\([[:blank:]]*protocol\) 17$/\1 udp/' "$1.listed" >"$1.nft"
    fi
    rm -f "$1.listed"
}

# What makes our tables what they were, whatever they are now, in one transaction.
our_tables() {
    for table in $tables; do
        printf 'table inet %s {\n}\ndelete table inet %s\n' $table $table
        if [ -e $table.nft ]; then cat $table.nft; fi
    done
}

keep() {
    set -e
    umask 077
    rm -rf $before
    mkdir $before
    cd $before
    files >names
    tar -cpPf files.tar --files-from names
    sums_of_units >units
    for unit in $units; do echo "$unit $(systemctl is-enabled "$unit.service" 2>/dev/null || true)"; done >enabled
    for table in $tables; do remember $table; done
    # A way back that nft cannot read is none: then nothing is changed.
    if command -v nft >/dev/null; then our_tables | nft -c -f -; fi
    for name in $forwarding; do sysctl "$name" 2>/dev/null || true; done >forwarding
    if [ -e /etc/firewalld ]; then
        for family in iptables ip6tables; do "$family-save" >"$family" 2>/dev/null || rm -f "$family"; done
    fi
    if ufw_is_on; then : >ufw; fi
    if firewalld_is_on; then : >firewalld; fi
    if chains_are_there; then : >chains; fi
}

# back SECONDS: three times, with so many seconds in between. On a slow host a step of the change may still be under way when the time comes; what it
# does after the way back was taken would stay, with nobody left who can get in.
back() {
    cd $before || exit 1
    for pause in "$1" "$1" ''; do
        leave_the_new
        bring_the_files
        return_to_the_old
        if [ -n "$pause" ]; then sleep "$pause"; fi
    done
}

leave_the_new() {
    if firewalld_is_on && ! [ -e firewalld ]; then
        systemctl disable --now firewalld.service
        for family in iptables ip6tables; do if [ -e $family ]; then "$family-restore" <"$family"; fi; done
    fi
    if ufw_is_on && ! [ -e ufw ]; then ufw disable; fi
    if chains_are_there && ! [ -e chains ]; then "$program" unload; fi
    command -v nft >/dev/null || return 0
    our_tables | nft -f -
    for name in $forwarding; do sysctl "$name" 2>/dev/null || true; done | cmp -s - forwarding || sysctl --quiet --load=forwarding
}

bring_the_files() {
    files | while read -r path; do rm -rf "$path"; done
    tar -xpPf files.tar
    sums_of_units | cmp -s - units || systemctl daemon-reload
    while read -r unit state; do
        if [ "$state" = "$(systemctl is-enabled "$unit.service" 2>/dev/null)" ]; then continue; fi
        case $state in
        enabled) systemctl unmask "$unit.service"; systemctl enable "$unit.service" ;;
        disabled) systemctl unmask "$unit.service"; systemctl disable "$unit.service" ;;
        esac
    done <enabled
}

return_to_the_old() {
    if [ -e firewalld ]; then
        if firewalld_is_on; then firewall-cmd --reload; else systemctl start firewalld.service; fi
    fi
    if [ -e ufw ]; then if ufw_is_on; then ufw --force enable; ufw reload; fi; fi
    if [ -e chains ]; then "$program" load; fi
}

"$@"
