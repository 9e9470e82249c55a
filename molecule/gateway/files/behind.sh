#!/bin/sh
# A GPU host behind the gateway: its own network, one cable, and the gateway as its way to everybody.
set -eu
ip netns del behind 2>/dev/null || true
ip netns add behind
ip link add inside type veth peer name eth0 netns behind
sysctl -q -w net.ipv6.conf.inside.disable_ipv6=0 # a test host has it off for interfaces that come later
ip netns exec behind sysctl -q -w net.ipv6.conf.eth0.disable_ipv6=0
ip addr add 10.99.0.1/24 dev inside
ip addr add fd99::1/64 dev inside nodad
ip link set inside up
ip -n behind link set lo up
ip -n behind addr add 10.99.0.2/24 dev eth0
ip -n behind addr add fd99::2/64 dev eth0 nodad
ip -n behind link set eth0 up
ip -n behind -4 route add default via 10.99.0.1
ip -n behind -6 route add default via fd99::1
exec ip netns exec behind /usr/local/sbin/greeter serve 22
