# shellcheck shell=bash disable=SC2034 # the variables are for those who read this file
# What `build` and `prepared` share: where their cache lies, and how they say that they cannot go on.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/remotegpu
image=remotegpu-testhost
suites='bookworm trixie'

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 1
}

check_suite() {
    [[ " $suites " == *" $1 "* ]] || fail "no such suite: '$1'; there are: $suites"
}

# One hash over everything given on standard input.
hash_of() { sha256sum | cut -c1-16; }

# Whether the image exists and was made from the inputs with that hash.
is_current() { [ "$(docker image inspect --format '{{index .Config.Labels "remotegpu.inputs"}}' "$1" 2>/dev/null)" = "$2" ]; }

# Two builds of one suite at the same moment: the second waits and finds the first one's image.
lock() {
    mkdir -p "$cache"
    exec 9>"$cache/$1.lock"
    flock 9
}

# Images whose name a newer one has taken; those that a host still runs from stay until a later build.
forget_replaced() { docker image prune --force --filter label=remotegpu.inputs >/dev/null; }

# derive NAME BASE INPUTS FOLDER: image:NAME, made from image:BASE by the script `make` in that folder, which sees the folder as /make. No systemd runs in there,
# and policy-rc.d keeps packages from starting anything without it.
derive() {
    local name=$1 base=$2 inputs=$3 folder=$4 container=remotegpu-make-$1
    docker rm --force --volumes "$container" >/dev/null 2>&1 || true # of a build that was killed
    docker run --name "$container" --volume "$folder:/make:ro" "$image:$base" bash -euc '
        printf "#!/bin/sh\nexit 101\n" >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq
        source /make/make
        rm -f /usr/sbin/policy-rc.d /var/cache/apt/archives/*.deb /etc/ssh/ssh_host_*
        : >/etc/machine-id' || { docker rm --force --volumes "$container" >/dev/null && fail "$image:$name was not made"; }
    docker commit --change "LABEL remotegpu.inputs=$inputs" --change 'CMD ["/usr/local/sbin/testhost-init"]' "$container" "$image:$name" >/dev/null
    docker rm --force --volumes "$container" >/dev/null
    forget_replaced
}
