#!/bin/sh
# shellcheck disable=SC2094 # words that are names of files in the folder, and of commands as well
# The way back: `arm SECONDS` remembers which firewall is at work on this host and what it does, and has it made so again (`back`) by a timer after so many
# seconds, or by the next boot, whichever comes first; `disarm` takes that away once the new one is proven. Lies here while a change is under way.
# What others have in the kernel's tables is touched only where firewalld has flushed it.
set -u
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
before=/var/lib/remotegpu-firewall.before
this=/var/lib/remotegpu-firewall-way-back
timer=remotegpu-firewall-rollback
at_boot=remotegpu-rollback-firewall.service # no name that `files` knows
systemd=/etc/systemd/system
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

# Armed already: by a run that was cut off. What it remembers was proven, what is at work now was not.
arm() {
    set -e
    if ! [ -e $systemd/$at_boot ] || ! [ -d $before ]; then
        keep
        ready_for_boot
    fi
    stop $timer.timer $timer.service $at_boot
    systemd-run --quiet --unit=$timer --on-active="$1" --timer-property=AccuracySec=1s --collect /bin/sh $this back "$1"
}

# The timer last: who is cut off in between leaves it armed.
disarm() {
    rm -f $systemd/multi-user.target.wants/$at_boot $systemd/$at_boot
    stop $timer.timer
    rm -rf $before $this
}

stop() { systemctl stop "$@" 2>/dev/null || true; }

# Behind all who load rules, and before Docker writes its own. By hand: `systemctl enable` would make systemd reload, which takes the GPU from containers.
# On the disk at once: whoever is locked out may take the power away.
ready_for_boot() {
    umask 022
    cat >$systemd/$at_boot <<EOF
[Unit]
Description=RemoteGPU firewall: the one of before, since nobody has proven the new one
After=remotegpu-firewall.service remotegpu-gateway.service ufw.service firewalld.service nftables.service netfilter-persistent.service
Before=docker.service

[Service]
Type=oneshot
ExecStart=/bin/sh $this back
EOF
    mkdir -p $systemd/multi-user.target.wants
    ln -sf ../$at_boot $systemd/multi-user.target.wants/$at_boot
    sync $this $before $before/* $systemd/$at_boot $systemd/multi-user.target.wants
}

keep() {
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
# does after the way back was taken would stay, with nobody left who can get in. After a boot nothing is under way, and once is enough.
back() {
    cd $before || exit 1
    for pause in ${1:+"$1" "$1"} ''; do
        leave_the_new
        bring_the_files
        return_to_the_old
        if [ -n "$pause" ]; then sleep "$pause"; fi
    done
    if [ -z "${1:-}" ]; then start_the_units; fi
    cd /
    disarm
}

# This boot has begun with the units of the new one. Not waited for: some come behind Docker, and Docker waits for this.
start_the_units() {
    while read -r unit state; do
        if [ "$state" = enabled ]; then systemctl --no-block start "$unit.service"; fi
    done <enabled
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
