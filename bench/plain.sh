#!/bin/sh
# What an administrator would type on a bare Debian 13 to make it the host that playbooks/gpu_hosts.yml makes, with the
# files at hand: /root/plain.tar lies there already. The bench compares both hosts afterwards.
set -eu
export DEBIAN_FRONTEND=noninteractive

apt-get -qq update
apt-get -qq install --no-install-recommends >/dev/null \
    ca-certificates conntrack cron curl dbus-user-session iproute2 libpam-systemd openssh-server openssh-sftp-server procps psmisc \
    python3 python3-apt rsync sudo tzdata systemd-timesyncd \
    nftables docker.io docker-cli iptables apparmor prometheus-node-exporter unattended-upgrades

groupadd --system remotegpu-leases
mkdir -p /opt/remotegpu /etc/remotegpu/authorized_keys
mkdir -p -m 0700 /var/lib/remotegpu-agent /var/lib/remotegpu-agent/shiv
tar -x -p -C / -f /root/plain.tar
rm /root/plain.tar
ln -sf /usr/share/zoneinfo/Etc/UTC /etc/localtime

sshd -t
systemctl daemon-reload
systemctl restart cron
systemctl reload ssh
systemctl -q enable --now remotegpu-firewall
systemctl restart docker prometheus-node-exporter
systemctl -q enable remotegpu-lease-guard
systemctl -q enable --now remotegpu-agent
until remotegpu-agent status --json | grep -q '"enrolled": *true'; do sleep 0.2; done
