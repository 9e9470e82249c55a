"""The ways in which a tenant leaves a host dirty: how each is planted, how it is seen, and who must name it.

One table for every test of cleaning: the agent's own, and the rental from end to end. Each way is planted and looked at
past everything that is under test, by plain commands on the host. Below the table are the leftovers that no cleaning
inside the host can remove. What removes and what verifies is in the agent; here is neither.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hosts import Host

# What the host must have installed before its baseline is taken.
PACKAGES = ("at", "cron", "nftables", "iptables")


@dataclass(frozen=True)
class Tenant:
    """Who leaves the dirt: the lease's login on one host, and a key that the dirt lets in again."""

    login: str
    uid: int
    lease_id: int
    key: Path

    @classmethod
    def of(cls, host: Host, login: str) -> Tenant:
        """The lease's login on this host; `lease17` is lease 17's."""
        key = Path(tempfile.mkdtemp(prefix="remotegpu-dirt-")) / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "left", "-f", key], check=True)
        uid = int(host.run(["id", "-u", login]).stdout)
        return cls(login=login, uid=uid, lease_id=int(login.removeprefix("lease")), key=key)

    @property
    def home(self) -> str:
        return f"/home/{self.login}"


Do = Callable[[Host, Tenant], Any]


@dataclass(frozen=True)
class Way:
    """One way to dirty a host. The cleaning step and the check of this id must say the text that `mark` answers with.

    Ask for the mark while the dirt is there: it may be the number of a process. `step` is given where the cleaning step
    has another id than the check.
    """

    name: str
    plant: Do
    seen: Callable[[Host, Tenant], bool]
    id: str
    mark: Callable[[Host, Tenant], str]
    step: str = ""

    @property
    def step_id(self) -> str:
        """The cleaning step that is to find it."""
        return self.step or self.id


def is_named(items: Sequence[Mapping[str, Any]], name: str, mark: str) -> bool:
    """Whether a step's or a check's evidence says the mark, in what it found (a step: before it acted).

    A way that was gone before it could be marked is named by nothing.
    """
    item = next(item for item in items if item["id"] == name)
    evidence = item["before"] if "before" in item else item["evidence"]
    return mark != "" and any(mark in found for found in (evidence or {}).get("found", []))


# --- the door


def _open_the_door(host: Host, tenant: Tenant) -> None:
    host.run(["chage", "--expiredate", "-1", tenant.login])
    host.put(f"/etc/remotegpu/authorized_keys/{tenant.login}", tenant.key.with_suffix(".pub").read_text())


def _connect(host: Host, tenant: Tenant) -> None:
    background = ["-f", "-oServerAliveInterval=5"]
    argv = host.ssh_argv(tenant.login, tenant.key, "exec sleep 90001", options=background)
    subprocess.run(
        argv, check=True, timeout=30, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


# --- what runs


def _as_tenant(command: str) -> Do:
    return lambda host, tenant: host.run(command.format(**_words(tenant)), user=tenant.login)


def _as_root(command: str) -> Do:
    return lambda host, tenant: host.run(command.format(**_words(tenant)))


def _words(tenant: Tenant) -> dict[str, Any]:
    return {"login": tenant.login, "uid": tenant.uid, "home": tenant.home, "lease": tenant.lease_id}


def _runs(argument: str) -> Callable[[Host, Tenant], bool]:
    return lambda host, tenant: bool(_pid_of(argument)(host, tenant))


def _pid_of(argument: str) -> Callable[[Host, Tenant], str]:
    """The process of the tenant with that argument, as the reports name it."""

    def pid(host: Host, tenant: Tenant) -> str:
        found = host.run(["pgrep", "-n", "-u", tenant.login, "-f", argument], check=False).stdout.split()
        return f"process {found[0]} " if found else ""

    return pid


_BY_UID = "systemctl --user --machine={login}@ "


# --- files, and what is said about them


def _file(path: str, content: str = "left by a tenant\n", *, mode: str = "0644", owner: str = "root:root") -> Do:
    def plant(host: Host, tenant: Tenant) -> None:
        words = _words(tenant)
        host.put(path.format(**words), content.format(**words), mode=mode, owner=owner.format(**words))

    return plant


def _appended(path: str, line: str) -> Do:
    return lambda host, tenant: host.run(
        ["sh", "-c", 'printf "%s\\n" "$1" >>"$2"', "-", line.format(**_words(tenant)), path]
    )


def _exists(path: str) -> Callable[[Host, Tenant], bool]:
    return lambda host, tenant: host.run(["test", "-e", path.format(**_words(tenant))], check=False).ok


def _holds(path: str, text: str) -> Callable[[Host, Tenant], bool]:
    return lambda host, tenant: (
        text.format(**_words(tenant)) in host.run(["cat", "--", path.format(**_words(tenant))]).stdout
    )


def _says(command: str, pattern: str) -> Callable[[Host, Tenant], bool]:
    """Whether a command's output holds the pattern."""

    def seen(host: Host, tenant: Tenant) -> bool:
        words = _words(tenant)
        return bool(re.search(pattern.format(**words), host.run(command.format(**words), check=False).stdout))

    return seen


def _text(text: str) -> Callable[[Host, Tenant], str]:
    return lambda _host, tenant: text.format(**_words(tenant))


def _plant_key(host: Host, tenant: Tenant) -> None:
    _appended("/home/ops/.ssh/authorized_keys", tenant.key.with_suffix(".pub").read_text().strip())(host, tenant)


# --- IPC


def _last_id(kind: str, words: str) -> Callable[[Host, Tenant], str]:
    """The System V object of the tenant, as the reports name it."""

    def mark(host: Host, tenant: Tenant) -> str:
        rows = [line.split() for line in host.read(f"/proc/sysvipc/{kind}").splitlines()]
        column = rows[0].index("uid")
        its = [row[1] for row in rows[1:] if row[column] == str(tenant.uid)]
        return f"{words} {its[0]} " if its else ""

    return mark


def _has_ipc(kind: str) -> Callable[[Host, Tenant], bool]:
    return lambda host, tenant: bool(_last_id(kind, kind)(host, tenant))


# --- containers: no registry is asked, the image is made of the host's own `sleep`

IMPORT_IMAGE = (
    'tar -chP $(command -v sleep) $(ldd $(command -v sleep) | grep -o "/[^ ]*") 2>/dev/null'
    " | docker import {options} - {tag} >/dev/null"
)


def _import_image(host: Host, tenant: Tenant) -> None:
    label = f"--change 'LABEL remotegpu.lease={tenant.lease_id}'"
    host.run(IMPORT_IMAGE.format(options=label, tag="left:image"))


def _docker(what: str) -> Callable[[Host, Tenant], bool]:
    return lambda host, _tenant: host.run(f"docker {what} inspect left-{what}", check=False).ok


def _open_a_port(host: Host, _tenant: Tenant) -> None:
    """As the agent opens one; the set's key is what the firewall role says, or the port alone."""
    keyed = "inet_proto" in host.run("nft list set inet remotegpu openings").stdout
    element = "tcp . 31340 . 192.0.2.0/24" if keyed else "31340"
    host.run(f"nft add element inet remotegpu openings {{ {element} timeout 1d }}")


# --- the GPUs

_HOLDS_A_GPU = (
    "touch /dev/nvidia-left; chmod 666 /dev/nvidia-left; setsid -f setpriv --reuid {uid} --regid {uid} --clear-groups"
    " sleep {seconds} </dev/nvidia-left >/dev/null 2>&1"
)


def _hold_a_gpu(seconds: int) -> Do:
    return lambda host, tenant: host.run(_HOLDS_A_GPU.format(uid=tenant.uid, seconds=seconds))


def _use_gpu_memory(host: Host, tenant: Tenant) -> None:
    """The driver lists a process of the tenant with 2 GiB. Its scenario lies in /etc, where cleaning puts it back: then
    the memory is free, as it is once a real process has died.
    """
    _hold_a_gpu(90011)(host, tenant)
    pid = int(host.run(["pgrep", "-n", "-u", str(tenant.uid), "-f", "sleep 90011"]).stdout)
    host.gpu.show(host.gpu.scenario.using(0, {pid: 2 << 30}))


# --- whom the host trusts

AN_AUTHORITY = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout /dev/null -days 3650"
    " -subj /CN=left 2>/dev/null"
)
_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"

# --- the table

WAYS: tuple[Way, ...] = (
    Way("login", _open_the_door, _says("getent shadow {login}", r":::$|:-1:"),
        "access", _text("authorized_keys/{login}")),
    Way("open connection", _connect, _says("ps -eo args", r"sshd(-session)?: {login}"),
        "connections", _text("{login}")),
    Way("daemonised process", _as_tenant("setsid -f sleep 90002 >/dev/null 2>&1"), _runs("sleep 90002"),
        "processes", _pid_of("sleep 90002")),
    Way("process that ignores TERM",
        _as_tenant("setsid -f sh -c 'trap \"\" TERM HUP INT; sleep 90003; sleep 90003' >/dev/null 2>&1"),
        _runs("^sh -c trap"), "processes", _pid_of("^sh -c trap")),
    Way("cron", _as_tenant("echo '0 0 1 1 * true' | crontab -"), _exists("/var/spool/cron/crontabs/{login}"),
        "cron", _text("/var/spool/cron/crontabs/{login}")),
    Way("cron of root", _file("/etc/cron.d/left", "0 0 1 1 * root true\n"), _exists("/etc/cron.d/left"),
        "cron", _text("/etc/cron.d/left")),
    Way("at", _as_tenant("echo true | at -M now + 900 days 2>/dev/null"), _says("atq", r"{login}"),
        "at_jobs", _text("/var/spool/cron/atjobs/")),
    Way("linger", _as_root("loginctl enable-linger {login}"), _exists("/var/lib/systemd/linger/{login}"),
        "linger", _text("/var/lib/systemd/linger/{login}")),
    Way("user unit",
        _as_root("install -d -o {login} -g {login} {home}/.config {home}/.config/systemd {home}/.config/systemd/user"
                 " && printf '[Service]\\nExecStart=/bin/sleep 90004\\n' >{home}/.config/systemd/user/left.service"
                 " && timeout 20 sh -c 'until " + _BY_UID + "daemon-reload; do sleep 0.1; done' 2>/dev/null"
                 " && " + _BY_UID + "start left.service"),
        _runs("sleep 90004"), "user_units", _text("{home}/.config/systemd/user/left.service")),
    Way("runtime folder", _as_tenant("echo left >/run/user/{uid}/left"), _exists("/run/user/{uid}/left"),
        "runtime_folder", _text("/run/user/{uid}")),
    Way("temporary file", _as_tenant("mkdir -p /tmp/left/deep && echo left >/tmp/left/deep/file"),
        _exists("/tmp/left/deep/file"), "temporary_files", _text("/tmp/left")),
    Way("temporary file that lasts", _as_tenant("echo left >/var/tmp/left"), _exists("/var/tmp/left"),
        "temporary_files", _text("/var/tmp/left")),
    Way("shared memory file", _as_tenant("echo left >/dev/shm/left"), _exists("/dev/shm/left"),
        "temporary_files", _text("/dev/shm/left")),
    Way("SysV shared memory", _as_tenant("ipcmk -M 4096"), _has_ipc("shm"),
        "sysv_ipc", _last_id("shm", "shared memory")),
    Way("SysV semaphores", _as_tenant("ipcmk -S 1"), _has_ipc("sem"),
        "sysv_ipc", _last_id("sem", "semaphores")),
    Way("SysV message queue", _as_tenant("ipcmk -Q"), _has_ipc("msg"),
        "sysv_ipc", _last_id("msg", "message queue")),
    Way("POSIX queue", _as_tenant("touch /dev/mqueue/left"), _exists("/dev/mqueue/left"),
        "posix_queues", _text("left")),
    Way("home", _as_tenant("mkdir -p {home}/models && echo weights >{home}/models/left"), _exists("{home}/models/left"),
        "home", _text("{home}")),
    Way("image", _import_image, _says("docker image ls", r"left +image"), "images", _text("left:image")),
    Way("volume", _as_root("docker volume create --label remotegpu.lease={lease} left-volume"), _docker("volume"),
        "volumes", _text("left-volume")),
    Way("network", _as_root("docker network create --label remotegpu.lease={lease} left-network"), _docker("network"),
        "networks", _text("left-network")),
    Way("container",
        _as_root("docker run -d --restart always --label remotegpu.lease={lease} --name left-container"
                 " -v left-volume:/data --network left-network left:image $(command -v sleep) 90005"),
        _docker("container"), "containers", _text("left-container")),
    Way("planted key", _plant_key, _holds("/home/ops/.ssh/authorized_keys", " left"),
        "ssh_keys", _text("/home/ops/.ssh/authorized_keys")),
    Way("set-uid file", _as_root("install -m 4755 /bin/sleep /usr/lib/left-setuid"), _exists("/usr/lib/left-setuid"),
        "special_files", _text("/usr/lib/left-setuid")),
    Way("set-uid file among tasks", _as_root("install -D -m 4755 /bin/sleep /var/lib/remotegpu-tasks/990003/left"),
        _exists("/var/lib/remotegpu-tasks/990003/left"),
        "special_files", _text("/var/lib/remotegpu-tasks/990003/left")),
    Way("file of no task", _as_root("install -D -m 0755 /bin/sleep /var/lib/remotegpu-tasks/.left/sleep"),
        _exists("/var/lib/remotegpu-tasks/.left"), "tasks", _text("/var/lib/remotegpu-tasks/.left")),
    Way("container engine's store that others may enter",
        _as_root("chmod 755 /var/lib/docker"),
        _says("stat -c %a /var/lib/docker", "755"), "special_files", _text("/var/lib/docker is open")),
    Way("set-uid file in an open folder of a store",
        _as_root("install -D -m 4755 /bin/sleep /var/lib/containerd/left/sleep && chmod 711 /var/lib/containerd"),
        _says("stat -c %a /var/lib/containerd", "711"), "special_files", _text("/var/lib/containerd is open")),
    Way("mount below /sys", _as_root("mount -t tmpfs -o mode=755 left /sys/kernel/debug"),
        _says("findmnt -n /sys/kernel/debug", "tmpfs"), "mounts", _text("/sys/kernel/debug")),
    Way("mount that hides a process", _as_root("mount --bind /proc/1 /proc/$(pgrep -o -x cron)"),
        _says("findmnt -rn -o TARGET", r"/proc/[0-9]"), "mounts", _text("proc is mounted on /proc/")),
    Way("packaged program that all may write", _as_root("chmod o+w /usr/bin/tac"),
        _says("stat -c %a /usr/bin/tac", "7$"), "special_files", _text("/usr/bin/tac")),
    Way("system folder that all may write", _as_root("chmod 777 /usr/lib/systemd/system"),
        _says("stat -c %a /usr/lib/systemd/system", "777"), "special_files", _text("/usr/lib/systemd/system ")),
    Way("temporary folder without its protection", _as_root("chmod 777 /var/tmp"),
        _says("stat -c %a /var/tmp", "^777"), "special_files", _text("/var/tmp ")),
    Way("file that every lease may write", _as_root("install -m 0664 -g remotegpu-leases /dev/null /srv/left.sh"),
        _says("stat -c %G /srv/left.sh", "remotegpu-leases"), "special_files", _text("/srv/left.sh")),
    Way("device elsewhere", _as_root("mknod -m 666 /var/lib/.left b 8 0"), _exists("/var/lib/.left"),
        "special_files", _text("/var/lib/.left")),
    Way("device that all may read", _as_root("rm -f /dev/left && mknod -m 604 /dev/left b 8 0"),
        _says("stat -c %a /dev/left", "604"), "special_files", _text("/dev/left")),
    Way("capability file",
        _as_root("install -m 0755 /bin/sleep /usr/lib/left-capable && python3 -c 'import os; os.setxattr("
                 '"/usr/lib/left-capable", "security.capability",'
                 ' bytes.fromhex("0100000200200000000000000000000000000000"))\''),
        _exists("/usr/lib/left-capable"), "special_files", _text("/usr/lib/left-capable")),
    Way("set-uid bit on a program", _as_root("chmod u+s /usr/bin/find"), _says("stat -c %a /usr/bin/find", "^4"),
        "special_files", _text("/usr/bin/find")),
    Way("added user", _as_root("useradd --create-home --uid 4242 mallory"), _exists("/home/mallory"),
        "users", _text("mallory")),
    Way("added group", _as_root("groupadd --gid 4343 mischief"), _says("getent group", "mischief"),
        "groups", _text("mischief")),
    Way("membership", _as_root("usermod -aG sudo {login}"), _says("id {login}", "sudo"),
        "groups", _text("sudo")),
    Way("passwords that all may write", _as_root("chmod 666 /etc/shadow"), _says("stat -c %a /etc/shadow", "666"),
        "users", _text("/etc/shadow has")),
    Way("accounts that the tenant owns", _as_root("chown {login} /etc/passwd"),
        _says("stat -c %U /etc/passwd", "{login}"), "users", _text("/etc/passwd has")),
    Way("old passwords of groups that all may read", _as_root("chmod 644 /etc/gshadow-"),
        _says("stat -c %a /etc/gshadow-", "644"), "groups", _text("/etc/gshadow- has")),
    Way("LD_PRELOAD in a profile", _file("/etc/profile.d/left.sh", "export LD_PRELOAD=/usr/local/lib/left.so\n"),
        _exists("/etc/profile.d/left.sh"), "shell_profiles", _text("/etc/profile.d/left.sh")),
    Way("LD_PRELOAD of every service", _as_root("systemctl set-environment LD_PRELOAD=/usr/local/lib/left.so"),
        _says("systemctl show-environment", "LD_PRELOAD=/usr/local/lib/left.so"),
        "system_units", _text("LD_PRELOAD")),
    Way("local program", _as_root("cp $(ldd /bin/sleep | grep -o '/[^ ]*libc.so.6') /usr/local/lib/left.so"),
        _exists("/usr/local/lib/left.so"), "local_programs", _text("/usr/local/lib/left.so")),
    Way("ld.so.preload", _file("/etc/ld.so.preload", "/usr/local/lib/left.so\n"), _exists("/etc/ld.so.preload"),
        "loader", _text("/etc/ld.so.preload")),
    Way("sudoers", _file("/etc/sudoers.d/left", "{login} ALL=(ALL) NOPASSWD:ALL\n", mode="0440"),
        _exists("/etc/sudoers.d/left"), "sudoers", _text("/etc/sudoers.d/left")),
    Way("PAM", _as_root("sed -i '1i auth sufficient pam_permit.so' /etc/pam.d/common-auth"),
        _holds("/etc/pam.d/common-auth", "sufficient pam_permit.so"), "pam", _text("/etc/pam.d/common-auth")),
    Way("shell profile", _appended("/etc/bash.bashrc", "# left"), _holds("/etc/bash.bashrc", "# left"),
        "shell_profiles", _text("/etc/bash.bashrc")),
    Way("another user's profile", _appended("/home/ops/.bashrc", "# left"), _holds("/home/ops/.bashrc", "# left"),
        "shell_profiles", _text("/home/ops/.bashrc")),
    Way("another user's aliases", _file("/home/ops/.bash_aliases", "alias sudo=true\n", owner="ops:ops"),
        _exists("/home/ops/.bash_aliases"), "shell_profiles", _text("/home/ops/.bash_aliases")),
    Way("firewall rule", _as_root("nft insert rule inet remotegpu input tcp dport 31337 accept"),
        _says("nft list ruleset", "dport 31337"), "firewall", _text("31337")),
    Way("opening", _open_a_port, _says("nft list set inet remotegpu openings", "31340"),
        "firewall", _text("set openings")),
    Way("firewall table", _as_root("nft add table inet left"), _says("nft list tables", "inet left"),
        "firewall", _text("table inet left")),
    Way("iptables rule", _as_root("iptables -I FORWARD -p tcp --dport 31338 -j ACCEPT"),
        _says("nft list ruleset", "dport 31338"), "firewall", _text("31338")),
    Way("systemd unit",
        _as_root("printf '[Service]\\nExecStart=/bin/sleep 90006\\nRestart=always\\n"
                 "[Install]\\nWantedBy=multi-user.target\\n'"
                 " >/etc/systemd/system/left.service && systemctl enable --now left.service 2>/dev/null"),
        _says("systemctl is-active left", "^active"),
        "system_units", _text("/etc/systemd/system/left.service")),
    Way("unit among those of packages",
        _file("/usr/lib/systemd/system/left-packaged.service", "[Service]\nExecStart=/bin/true\n"),
        _exists("/usr/lib/systemd/system/left-packaged.service"),
        "system_units", _text("/usr/lib/systemd/system/left-packaged.service")),
    Way("drop-in for a package's unit",
        _as_root("mkdir -p /usr/lib/systemd/system/cron.service.d && printf '[Service]\nUser=root\n'"
                 " >/usr/lib/systemd/system/cron.service.d/left.conf"),
        _exists("/usr/lib/systemd/system/cron.service.d/left.conf"),
        "system_units", _text("/usr/lib/systemd/system/cron.service.d/left.conf")),
    Way("generator", _file("/usr/lib/systemd/system-generators/left", "#!/bin/sh\n", mode="0755"),
        _exists("/usr/lib/systemd/system-generators/left"),
        "system_units", _text("/usr/lib/systemd/system-generators/left")),
    Way("transient unit", _as_root("systemd-run --quiet --unit left-transient sleep 90007"),
        _says("systemctl is-active left-transient", "^active"), "system_units", _text("left-transient")),
    Way("transient unit that is called like ours", _as_root("systemd-run --quiet --unit remotegpu-left sleep 90012"),
        _says("systemctl is-active remotegpu-left", "^active"), "system_units", _text("remotegpu-left")),
    Way("sysctl of the next boot", _file("/usr/lib/sysctl.d/left.conf", "# left\n"),
        _exists("/usr/lib/sysctl.d/left.conf"), "system_units", _text("/usr/lib/sysctl.d/left.conf")),
    Way("binary format of the next boot", _file("/usr/lib/binfmt.d/left.conf", "# left\n"),
        _exists("/usr/lib/binfmt.d/left.conf"), "system_units", _text("/usr/lib/binfmt.d/left.conf")),
    Way("line that every Python runs", _file("/usr/lib/python3/dist-packages/left.pth", "# left\n"),
        _exists("/usr/lib/python3/dist-packages/left.pth"),
        "system_units", _text("/usr/lib/python3/dist-packages/left.pth")),
    Way("line that root's Python runs",
        _as_root("d=/root/.local/lib/python3.99/site-packages; mkdir -p $d && echo '# left' >$d/left.pth"),
        _exists("/root/.local/lib/python3.99/site-packages/left.pth"),
        "system_units", _text("/root/.local/lib/python3.99/site-packages/left.pth")),
    Way("task unit", _as_root("systemd-run --quiet --unit remotegpu-task-990001 --uid {login} sleep 90008"),
        _runs("sleep 90008"), "tasks", _text("remotegpu-task-990001.service")),
    Way("task folder", _as_root("install -d -g {login} -m 0750 /var/lib/remotegpu-tasks/990002"),
        _exists("/var/lib/remotegpu-tasks/990002"), "tasks", _text("/var/lib/remotegpu-tasks/990002")),
    Way("hosts file", _appended("/etc/hosts", "192.0.2.66 portal"), _holds("/etc/hosts", "192.0.2.66"),
        "hosts", _text("/etc/hosts")),
    Way("sshd settings", _file("/etc/ssh/sshd_config.d/00-left.conf", "PermitEmptyPasswords yes\n"),
        _exists("/etc/ssh/sshd_config.d/00-left.conf"), "sshd", _text("/etc/ssh/sshd_config.d/00-left.conf")),
    Way("message of the day", _file("/etc/update-motd.d/99-left", "#!/bin/sh\n", mode="0755"),
        _exists("/etc/update-motd.d/99-left"), "etc", _text("/etc/update-motd.d/99-left")),
    Way("firewall of the next boot", _file("/etc/remotegpu/left.nft", "accept\n"), _exists("/etc/remotegpu/left.nft"),
        "etc", _text("/etc/remotegpu/left.nft")),
    Way("token for another enrolment", _file("/etc/remotegpu/enroll-token", mode="0600"),
        _exists("/etc/remotegpu/enroll-token"), "etc", _text("/etc/remotegpu/enroll-token")),
    Way("authority of his own",
        _as_root(f"{AN_AUTHORITY} >/usr/local/share/ca-certificates/left.crt && update-ca-certificates >/dev/null"),
        _exists("/etc/ssl/certs/left.pem"), "etc", _text("/usr/local/share/ca-certificates/left.crt")),
    Way("authority in the bundle", _as_root(f"(echo '# left'; {AN_AUTHORITY}) >>{_BUNDLE}"),
        _holds(_BUNDLE, "# left\n-----BEGIN"), "etc", _text(f"{_BUNDLE} trusts")),
    Way("authority under a hash", _as_root(f"{AN_AUTHORITY} >/etc/ssl/certs/0badf00d.0"),
        _says("openssl x509 -noout -subject -in /etc/ssl/certs/0badf00d.0", "left"),
        "etc", _text("/etc/ssl/certs/0badf00d.0")),
    Way("OpenSSL's authorities elsewhere", _as_root("ln -sfn /srv /usr/lib/ssl/certs"),
        _says("readlink /usr/lib/ssl/certs", "^/srv$"), "etc", _text("/usr/lib/ssl/certs has")),
    Way("mount", _as_root("mkdir -p {home}/mount && mount -t tmpfs none {home}/mount"),
        _says("findmnt -n {home}/mount", "tmpfs"), "mounts", _text("{home}/mount")),
    Way("listening port", _as_tenant("setsid -f python3 -m http.server 31339 --directory /tmp/left >/dev/null 2>&1"),
        _says("timeout 10 sh -c 'until ss -Hltn | grep :31339; do sleep 0.1; done'", ":31339"),
        "listening_ports", _text("port 31339 ")),
    Way("outgoing connection",
        _as_tenant("timeout 20 sh -c 'until ss -Hltn | grep -q :31339; do sleep 0.1; done';"
                   " setsid -f python3 -c 'import socket, time; c = socket.create_connection((\"127.0.0.1\", 31339));"
                   " time.sleep(90010)' >/dev/null 2>&1"),
        _says("timeout 10 sh -c 'until ss -Htn state established | grep :31339; do sleep 0.1; done'", ":31339"),
        "connections", _text(":31339")),
    Way("GPU held", _hold_a_gpu(90009), _runs("sleep 90009"), "gpu_holders", _pid_of("sleep 90009")),
    Way("GPU memory", _use_gpu_memory, _says("nvidia-smi --query-compute-apps=pid --format=csv,noheader", r"\d"),
        "gpu_memory", _pid_of("sleep 90011"), step="gpu_holders"),
    Way("mail", _as_root("install -o {login} -m 0600 /dev/null /var/mail/{login}"), _exists("/var/mail/{login}"),
        "records", _text("/var/mail/{login}")),
    Way("core dump",
        _as_root("install -d /var/lib/systemd/coredump && touch"
                 " /var/lib/systemd/coredump/core.left.{uid}.00000000000000000000000000000000.1.1.zst"),
        _says("ls /var/lib/systemd/coredump", "core.left"), "records", _text("core.left")),
    Way("file elsewhere", _as_root("install -o {uid} -m 0600 /dev/null /srv/left"), _exists("/srv/left"),
        "owned_files", _text("/srv/left")),
)  # fmt: skip


def plant_all(host: Host, tenant: Tenant) -> None:
    """Plant every way, in the order of the table: a later one may stand on an earlier one."""
    for way in WAYS:
        way.plant(host, tenant)


# --- what no cleaning inside the host removes


@contextlib.contextmanager
def immutable(host: Host, path: str) -> Iterator[None]:
    """Make a file of the host immutable from outside of it, where root inside may not undo it; cleared in the end."""
    graph = subprocess.run(
        ["docker", "inspect", "--format={{json .GraphDriver.Data}}", host.id],
        check=True,
        capture_output=True,
        text=True,
    )
    outside = Path(json.loads(graph.stdout)["UpperDir"]) / path.lstrip("/")
    subprocess.run(["chattr", "+i", str(outside)], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(outside)], check=True)


@contextlib.contextmanager
def replaced_program(host: Host, path: str) -> Iterator[None]:
    """Another content in a program that lends power, with everything else as it was; the right one in the end."""
    kept = "/root/kept.tar"  # by itself it would lend power in another place
    host.run(f'mode=$(stat -c %a {path}) && tar -cPf {kept} {path} && cat /bin/sleep >{path} && chmod "$mode" {path}')
    try:
        yield
    finally:
        host.run(f"tar -xpPf {kept} && rm {kept}")


_LISTEN = """
import socket, sys
with socket.create_server(("0.0.0.0", int(sys.argv[1]))) as server:
    print("listening", flush=True)
    while True:
        connection, _ = server.accept()
        connection.close()
"""

# Answers a SYN by itself, below netfilter: the kernel knows of no listener, and its rules never see the packet.
_ANSWER = """
import socket, struct, sys
port = int(sys.argv[1])
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
raw.bind(("eth0", 0x0800))
def checksum(data):
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
print("listening", flush=True)
while True:
    frame = raw.recv(65535)
    ip = frame[14:]
    size = (ip[0] & 15) * 4
    if ip[9] != 6:
        continue
    source, target, sequence, _ack, _offset, flags = struct.unpack("!HHIIBB", ip[size:size + 14])
    if target != port or flags & 0x12 != 0x02:
        continue
    tcp = struct.pack("!HHIIBBHHH", port, source, 1, (sequence + 1) & 0xffffffff, 5 << 4, 0x12, 64240, 0, 0)
    pseudo = ip[16:20] + ip[12:16] + struct.pack("!BBH", 0, 6, len(tcp))
    tcp = tcp[:16] + struct.pack("!H", checksum(pseudo + tcp)) + tcp[18:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + ip[16:20] + ip[12:16]
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    raw.send(frame[6:12] + frame[0:6] + b"\\x08\\x00" + head + tcp)
"""


def is_open(address: str, port: int) -> bool:
    """Whether somebody answers there, seen from this machine."""
    try:
        with socket.create_connection((address, port), timeout=1):
            return True
    except OSError:
        return False


def hidden_listener(host: Host, port: int) -> contextlib.AbstractContextManager[None]:
    """A listener that no process list of the host shows: it runs outside, and only in the host's network."""
    return _inside_its_net(host, _LISTEN, port)


def port_open_from_outside(host: Host, port: int) -> contextlib.AbstractContextManager[None]:
    """A port that is open from outside while the host itself has neither process nor socket nor rule for it.

    It needs the host's firewall to drop what comes to that port, or the kernel's own refusal is heard as well.
    """
    return _inside_its_net(host, _ANSWER, port)


@contextlib.contextmanager
def _inside_its_net(host: Host, program: str, port: int) -> Iterator[None]:
    inspected = subprocess.run(
        ["docker", "inspect", "--format={{.State.Pid}}", host.id], check=True, capture_output=True, text=True
    )
    argv = ["nsenter", f"--net=/proc/{inspected.stdout.strip()}/ns/net", sys.executable, "-I", "-c", program, str(port)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n", "the listener did not start"
            yield
        finally:
            process.kill()
