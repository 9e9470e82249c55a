"""One test host, told in the order of its life: boot, use, reboot, cut off, destroy.

A host is a container with systemd as PID 1 from an image of molecule/image/. It has an address of its own that
survives reboots, host keys of its own, `ops` (key only, sudo without a password) and `installer` (sudo with one).
What its fake GPUs do is in gpu.py; here is no pytest (fixtures.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hosts.gpu import FakeGpus, Scenario
from tests.hosts.inside import Inside
from tests.hosts.owner import CHECKOUT, find_owner, is_gone, user

SUITES = ("bookworm", "trixie")
IMAGE_DIR = Path(__file__).parents[2] / "molecule" / "image"
LABEL = "remotegpu-test"
OF_THIS_CHECKOUT = {f"{LABEL}.checkout": CHECKOUT}
BOOT_TIMEOUT_S = 90.0
ADDRESS_LOCK = Path(tempfile.gettempdir()) / f"remotegpu-test-addresses-{os.geteuid()}.lock"

# What a container needs to be a machine; what fails without each is told in molecule/image/README.md.
MACHINE_OPTIONS = (
    "--restart=always",  # `systemctl reboot` ends PID 1 and the engine starts it again
    "--stop-signal=SIGRTMIN+3",
    "--cgroupns=private",
    *(f"--cap-add={name}" for name in ("SYS_ADMIN", "NET_ADMIN", "SYS_NICE", "SYS_PTRACE", "SYSLOG")),
    "--security-opt=seccomp=unconfined",
    "--security-opt=apparmor=unconfined",
    "--tmpfs=/run:exec,mode=755",
    "--tmpfs=/run/lock",
    "--tmpfs=/tmp:exec,mode=1777",
    "--volume=/var/lib/docker",  # overlay on overlay is refused: the nested engine needs a real file system
)


@dataclass(frozen=True)
class Result:
    """What a command left: exit status, output and errors, decoded with replacement."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        return self.returncode == 0


class HostError(Exception):
    """A host did not do what was asked; the text carries what it said."""


def boot(
    name: str,
    suite: str,
    *,
    prepared: bool = False,
    kind: str | None = None,
    password: str | None = None,
    gpus: int = 2,
    labels: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Host:
    """A new running host. Builds the image and starts the engine where they are missing.

    `prepared` hosts have the packages that the roles install, nothing configured; so have those of a `kind`: desktop
    (molecule/image/desktop), control or cards (molecule/image/site). `password` is set for `installer`, `options` are
    more of the engine's. `gpus` are idle H100s with UUIDs of their own; with 0 there is no driver either. Raises
    HostError when the name is taken (`unique` makes one that is not) or systemd does not come up within 90 s; a host
    that failed to boot is removed, and so is what a killed run of this checkout has left.
    """
    if suite not in SUITES:
        raise ValueError(f"no such suite: {suite!r}; there are: {', '.join(SUITES)}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", name):
        raise ValueError(f"a host's name is 1 to 63 of a-z, 0-9 and '-', not {name!r}")
    image = _image(suite, kind or ("prepared" if prepared else None))
    remove_leftovers()
    whose = {f"{LABEL}.owner": find_owner() or ""}
    with _addresses_locked():
        addresses = _free_addresses(name)
        given = [*_create_options(name, suite, addresses, {**whose, **(labels or {})}), *options]
        container = _docker("create", *given, image)
    host = Host(name=name, id=container, suite=suite, address=addresses[0], address_v6=([*addresses, None])[1])
    try:
        _docker("start", container)
        host.wait_until_up()
        if password is not None:
            host.set_password("installer", password)
        if gpus == 0:
            host.gpu.unplug()
        elif gpus != 2:  # two of its own the host has from its first boot
            host.gpu.show(Scenario.h100(gpus))
    except BaseException:
        host.destroy()
        raise
    return host


def unique(name: str) -> str:
    """A name that no other run has, of this checkout or of another on this machine."""
    return f"{name}-{secrets.token_hex(3)}"


def remove_leftovers() -> list[str]:
    """Remove the hosts of this checkout whose run was killed before it could; returns their names."""
    filters = [f"--filter=label={key}={value}" for key, value in OF_THIS_CHECKOUT.items()]
    every = _docker("ps", "--all", f'--format={{{{.Names}}}}\t{{{{.Label "{LABEL}.owner"}}}}', *filters)
    owners = [line.partition("\t") for line in every.splitlines()]  # who has none in the last line has no tab either
    left = [name for name, _, whose in owners if whose and is_gone(whose)]
    for name in left:
        _remove(name)
    return left


def attach(name: str) -> Host:
    """The host with that name, booted earlier or by another process. Raises HostError when there is none."""
    _ensure_engine()
    found = json.loads(_docker("inspect", "--type=container", name))[0]
    labels = found["Config"]["Labels"]
    if labels.get(LABEL) != "1":
        raise HostError(f"the container {name!r} is not a test host")
    addresses = labels[f"{LABEL}.addresses"].split()
    return Host(
        name=name,
        id=found["Id"],
        suite=labels[f"{LABEL}.suite"],
        address=addresses[0],
        address_v6=([*addresses, None])[1],
    )


def list_hosts(labels: Mapping[str, str] | None = None) -> list[Host]:
    """All test hosts of this checkout, running or not, that carry these labels; sorted by name."""
    _ensure_engine()
    wanted = {LABEL: "1", **OF_THIS_CHECKOUT, **(labels or {})}
    filters = [f"--filter=label={key}={value}" for key, value in wanted.items()]
    return [attach(name) for name in sorted(_docker("ps", "--all", "--format={{.Names}}", *filters).split())]


@dataclass
class Host:
    """A running test host. `destroy` it, or let the fixtures do so."""

    name: str
    id: str
    suite: str
    address: str
    address_v6: str | None = None
    port: int = 22
    _work: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="remotegpu-host-")), repr=False)
    _inside: Inside | None = field(default=None, repr=False, compare=False)

    # -- look and touch, past SSH -----------------------------------------------------------------------------------

    def run(
        self,
        command: str | Sequence[str],
        *,
        check: bool = True,
        stdin: str | bytes | None = None,
        user: str = "root",
        timeout_s: float = 120.0,
    ) -> Result:
        """Run on the host, past SSH: a string by its shell, a list as it is. Raises HostError unless it exits 0."""
        argv = ["bash", "-c", command] if isinstance(command, str) else list(command)
        given = stdin.encode() if isinstance(stdin, str) else stdin
        inside = self._way_inside() if user == "root" else None
        if inside is not None:
            result = _ended(argv, lambda: inside.run(argv, stdin=given, timeout_s=timeout_s), timeout_s)
        else:
            options = ["--interactive"] if stdin is not None else []
            engine = ["docker", "exec", *options, "--user", user, self.id, *argv]
            result = _call(engine, stdin=given, timeout_s=timeout_s)
        if check and not result.ok:
            raise HostError(
                f"{self.name}: `{shlex.join(argv)}` exited {result.returncode}: {result.stderr}{result.stdout}"
            )
        return result

    def put(self, path: str, content: str | bytes, *, mode: str = "0644", owner: str = "root:root") -> None:
        """Write a file by rename, with the folders above it; a reader sees the old or the new content, never half."""
        script = (
            'mkdir -p -- "$(dirname -- "$1")" && cat >"$1.put" && chmod -- "$2" "$1.put" '
            '&& chown -- "$3" "$1.put" && mv -f -- "$1.put" "$1"'
        )
        self.run(["bash", "-c", script, "put", path, mode, owner], stdin=content)

    def read(self, path: str) -> str:
        return self.run(["cat", "--", path]).stdout

    def set_password(self, user: str, password: str) -> None:
        self.run(["chpasswd"], stdin=f"{user}:{password}\n")

    def authorize(self, user: str, public_key: str) -> None:
        """Let this key sign in as an existing user, as whoever installed the machine would have done it."""
        home = self.run(["getent", "passwd", user]).stdout.split(":")[5]
        self.run(["install", "-d", "-m", "0700", "-o", user, "-g", user, f"{home}/.ssh"])
        self.put(f"{home}/.ssh/authorized_keys", public_key.strip() + "\n", mode="0600", owner=f"{user}:{user}")

    @property
    def gpu(self) -> FakeGpus:
        return FakeGpus(self)

    def _way_inside(self) -> Inside | None:
        if self._inside is None or not self._inside.is_there:
            self._inside = Inside.of(self.id)
        return self._inside

    # -- the front door -----------------------------------------------------------------------------------------------

    @property
    def host_keys(self) -> list[str]:
        """The public host keys as `type base64`, Ed25519 first."""
        lines = self.run("cat /etc/ssh/ssh_host_ed25519_key.pub /etc/ssh/ssh_host_*_key.pub").stdout.splitlines()
        return list(dict.fromkeys(" ".join(line.split()[:2]) for line in lines))

    @property
    def known_hosts(self) -> str:
        """Lines for a known_hosts file: every key under every address."""
        names = ",".join(address for address in (self.address, self.address_v6) if address)
        return "".join(f"{names} {key}\n" for key in self.host_keys)

    def ssh_argv(self, user: str, key: Path | str, *arguments: str, options: Sequence[str] = ()) -> list[str]:
        """The command line of OpenSSH's own client, with this host's keys pinned and nothing read from ~/.ssh.

        `options` stand before the destination (`-N`, `-o…`), `arguments` after it.
        """
        pinned = self._work / "known_hosts"
        if not pinned.exists():
            pinned.write_text(self.known_hosts)
        fixed = {
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": str(pinned),
            "GlobalKnownHostsFile": "/dev/null",
            "UpdateHostKeys": "no",
            "ConnectTimeout": "10",
            "LogLevel": "ERROR",
        }
        settings = [f"-o{name}={value}" for name, value in fixed.items()]
        # A caller's option wins over ours: OpenSSH takes the first value it sees.
        command = ["ssh", "-F", "/dev/null", *options, *settings, "-i", str(key), "-p", str(self.port)]
        return [*command, f"{user}@{self.address}", *arguments]

    def ssh(
        self, user: str, key: Path | str, *arguments: str, options: Sequence[str] = (), timeout_s: float = 60.0
    ) -> Result:
        """Run a command through the front door; a refused sign-in is a Result with status 255, not an exception."""
        return _call(self.ssh_argv(user, key, *arguments, options=options), timeout_s=timeout_s)

    # -- reboot and network -------------------------------------------------------------------------------------------

    @property
    def boot_id(self) -> str:
        return self.read("/proc/sys/kernel/random/boot_id").strip()

    def reboot(self, *, wait: bool = True, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Reboot as `systemctl reboot` does; files, keys and addresses stay, /run, /tmp and processes go.

        With `wait` it returns when systemd is up again, else as soon as the old system is gone.
        """
        before = self.boot_id
        self.run(["systemctl", "--no-block", "reboot"])
        _wait_for(lambda: self._is_another_boot(before), timeout_s, f"{self.name} to boot again")
        if wait:
            self.wait_until_up(timeout_s=timeout_s)

    def power_off(self) -> None:
        """Shut down in order and stay off, until `power_on`."""
        _run_here(["docker", "stop", "--time=60", self.id])

    def power_on(self, *, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Boot again, as after `reboot`."""
        _run_here(["docker", "start", self.id])
        self.wait_until_up(timeout_s=timeout_s)

    def wait_until_up(self, *, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Until systemd says `running`. Raises HostError with the failed units when it says `degraded`."""
        _wait_for(self._is_up, timeout_s, f"systemd on {self.name} to be running", describe=self._console)
        self._introduce()

    def cut_network(self) -> None:
        """Pull the cable: the host keeps address and routes, and nothing comes in or goes out. A reboot plugs it in."""
        self._set_cable("down")

    def restore_network(self) -> None:
        self._set_cable("up")

    def destroy(self) -> None:
        """Remove the host with its volumes; gone already is fine."""
        shutil.rmtree(self._work, ignore_errors=True)
        _remove(self.id)

    def _introduce(self) -> None:
        """Say a word to this machine, which may still know another card under this address (ARP) and wait for it."""
        for gateway in (str(subnet.gateway) for subnet in _bridge()):
            self.run(["ping", "-c1", "-W1", gateway], check=False)

    def _is_another_boot(self, before: str) -> bool:
        # Without systemd it is the moment before PID 1 has given this boot its id.
        seen = self.run("test -d /run/systemd/system && cat /proc/sys/kernel/random/boot_id", check=False)
        return seen.ok and seen.stdout.strip() != before

    def _is_up(self) -> bool:
        state = self.run(["systemctl", "is-system-running"], check=False).stdout.strip()
        if state == "degraded":
            failed = self.run("systemctl --failed --no-legend --plain; journalctl -b -p warning -n 30 --no-pager")
            raise HostError(f"{self.name} is up with failed units:\n{failed.stdout}")
        return state == "running"

    def _console(self) -> str:
        return _call(["docker", "logs", "--tail=20", self.id], timeout_s=10).stdout

    def _set_cable(self, state: str) -> None:
        command = ["ip", "link", "set", self._cable(), state]
        if os.geteuid() != 0:  # whoever may use the engine may do it through a container
            helper = ["--rm", "--network=host", "--cap-add=NET_ADMIN", _image(self.suite)]
            command = ["docker", "run", *helper, *command]
        _run_here(command)

    def _cable(self) -> str:
        """This machine's end of the host's network cable."""
        index = self.read("/sys/class/net/eth0/iflink").strip()
        for path in Path("/sys/class/net").glob("veth*/ifindex"):
            if path.read_text().strip() == index:
                return path.parent.name
        raise HostError(f"{self.name} has no cable on this machine: is it running?")


def gateway_address() -> str:
    """The IPv4 address of this machine as the hosts see it: where a portal for them must listen."""
    return str(_bridge()[0].gateway)


# -- below: the engine ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subnet:
    network: ipaddress.IPv4Network | ipaddress.IPv6Network
    gateway: ipaddress.IPv4Address | ipaddress.IPv6Address


def _bridge() -> list[_Subnet]:
    """The networks of Docker's default bridge, IPv4 first.

    The default one on purpose: on any other Docker runs its own resolver inside the host, which shows as NAT rules and
    as a listener without a process.
    """
    _ensure_engine()
    subnets = []
    for entry in json.loads(_docker("network", "inspect", "bridge"))[0]["IPAM"]["Config"]:
        network = ipaddress.ip_network(entry["Subnet"])
        subnets.append(_Subnet(network, ipaddress.ip_address(entry.get("Gateway", network[1]))))
    return sorted(subnets, key=lambda subnet: subnet.network.version)


def _create_options(name: str, suite: str, addresses: Sequence[str], labels: Mapping[str, str]) -> list[str]:
    lengths = [subnet.network.prefixlen for subnet in _bridge()]
    with_length = [f"{address}/{length}" for address, length in zip(addresses, lengths, strict=True)]
    every_label = {
        LABEL: "1",
        f"{LABEL}.suite": suite,
        f"{LABEL}.addresses": " ".join(addresses),
        f"{LABEL}.address": addresses[0],
        **OF_THIS_CHECKOUT,
        **labels,
    }
    return [
        f"--name={name}",
        f"--hostname={name}",
        *MACHINE_OPTIONS,
        f"--env=TESTHOST_ADDRESSES={' '.join(with_length)}",
        *(f"--label={key}={value}" for key, value in every_label.items()),
    ]


def _free_addresses(name: str) -> list[str]:
    """An address in each of the bridge's networks that nobody has: from the half that Docker does not reach.

    Docker gives out the lowest free address and takes it back at every restart, so that a host could come back under
    another's. The search starts at a hash of the name: a host booted again tends to get the address it had.
    """
    label_of_each = f'--format={{{{.Label "{LABEL}.address"}}}}'
    taken = set(_docker("ps", "--all", f"--filter=label={LABEL}=1", label_of_each).split())
    v4, *others = [subnet.network for subnet in _bridge()]
    half = v4.num_addresses // 2
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    for step in range(half - 2):
        offset = half + 1 + (start + step) % (half - 2)
        if str(v4[offset]) not in taken:
            return [str(v4[offset]), *(str(network[0x1_0000 + offset]) for network in others)]
    raise HostError(f"no free address is left in {v4}")


@contextlib.contextmanager
def _addresses_locked() -> Iterator[None]:
    """One caller on this machine at a time chooses an address and creates the container that holds it."""
    with ADDRESS_LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove(name_or_id: str) -> None:
    """With its volumes: gigabytes of small files, on a disk that others use too. Gone already, or just being removed by
    another process, is fine."""
    result = _call(["docker", "rm", "--force", "--volumes", name_or_id], timeout_s=600)
    if not result.ok and "No such container" not in result.stderr and "already in progress" not in result.stderr:
        raise HostError(f"{name_or_id} is not removed: {result.stderr}")


def _ensure_engine() -> None:
    """An engine, and that it goes on while this process or its run needs it."""
    _run_here([str(IMAGE_DIR / "dockerd"), "start", str(user())])


def _image(suite: str, kind: str | None = None) -> str:
    _ensure_engine()
    program = {None: ["build"], "prepared": ["prepared"], "desktop": ["desktop"]}.get(kind, ["site", str(kind)])
    _run_here([str(IMAGE_DIR / program[0]), *program[1:], suite], timeout_s=900)
    return f"remotegpu-testhost:{suite}" + (f"-{kind}" if kind else "")


def _docker(*arguments: str) -> str:
    return _run_here(["docker", *arguments]).stdout.strip()


def _run_here(argv: Sequence[str], *, timeout_s: float = 120.0) -> Result:
    result = _call(argv, timeout_s=timeout_s)
    if not result.ok:
        raise HostError(f"`{shlex.join(argv)}` exited {result.returncode}: {result.stderr}{result.stdout}")
    return result


def _call(argv: Sequence[str], *, stdin: bytes | None = None, timeout_s: float) -> Result:
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}

    def run() -> tuple[int, bytes, bytes]:
        done = subprocess.run(argv, capture_output=True, timeout=timeout_s, check=False, **given)
        return done.returncode, done.stdout, done.stderr

    return _ended(argv, run, timeout_s)


def _ended(argv: Sequence[str], run: Callable[[], tuple[int, bytes, bytes]], timeout_s: float) -> Result:
    try:
        code, stdout, stderr = run()
    except subprocess.TimeoutExpired as error:
        raise HostError(f"`{shlex.join(argv)}` did not end within {timeout_s} s") from error
    return Result(code, stdout.decode(errors="replace"), stderr.decode(errors="replace"))


def _wait_for(
    condition: Callable[[], bool], timeout_s: float, what: str, *, describe: Callable[[], str] | None = None
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise HostError(f"waited {timeout_s} s in vain for {what}. {describe() if describe else ''}")
        time.sleep(0.1)
