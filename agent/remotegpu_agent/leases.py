"""Leases on this host: the login, who may use it, and its end, which comes without anybody's help.

Told in the order of a lease's life: look, make the login, arm the end, let in, close. The register on disk is the
memory of what we made: a login that is not in it is somebody else's and is never touched, a UID in it is never used
twice. When and why is plan.py's; what a lease leaves behind is the cleaning's.
"""

import contextlib
import grp
import os
import pwd
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

from remotegpu_agent import killing, sessions, systemd
from remotegpu_agent.config import Config
from remotegpu_agent.files import Reserve, Table, find_text, is_full, write_atomic
from remotegpu_agent.journal import Journal
from remotegpu_agent.observe import docker
from remotegpu_agent.observe.tools import ToolFailed, run
from remotegpu_agent.openings import Openings
from remotegpu_agent.plan import HostLease, expiry_day
from remotegpu_agent.protocol import DesiredLease, format_time, now, parse_time

EPOCH_DAY = date(1970, 1, 1)
ZULU_SINCE = (9, 1)
GUARD_LINK = Path("/etc/systemd/system/multi-user.target.wants/remotegpu-lease-guard.service")
KILL_DEADLINE_S = 10.0
SESSIONS_GO_ON = "# Sessions of a key that was here are being ended.\n"


class CannotOpen(Exception):
    """This lease cannot be opened on this host; says what stands in the way and how to clear it."""


@dataclass(frozen=True)
class Entry:
    """One line of the register."""

    lease_id: int
    login: str
    uid: int
    ends_at: datetime
    closed_at: datetime | None
    key_fingerprints: tuple[str, ...]
    disowned: str | None  # why this lease can never be opened again here
    is_cleaned: bool  # nothing of it is left but its line, which keeps its UID taken

    @property
    def is_closed(self) -> bool:
        return self.closed_at is not None


class Leases:
    def __init__(
        self, config: Config, journal: Journal, stop_tasks: Callable[[int, str], None], openings: Openings
    ) -> None:
        """`stop_tasks(lease_id, reason)` ends the lease's task units at once; `openings` end with their lease."""
        self._config = config
        self._journal = journal
        self._stop_tasks = stop_tasks
        self._openings = openings
        self._register = Table(config.state_dir / "leases.json")
        self.reserve = Reserve(config.reserve_dir)

    # Look

    def entries(self) -> list[Entry]:
        """Every lease that was opened here and not cleaned since."""
        return [entry for entry in self._all_entries() if not entry.is_cleaned]

    def _all_entries(self) -> list[Entry]:
        return [_entry(int(lease_id), line) for lease_id, line in self._register.read().items()]

    def open_ends(self) -> dict[int, datetime]:
        """The leases that are open here, each with its end."""
        return {entry.lease_id: entry.ends_at for entry in self.entries() if not entry.is_closed}

    def find(self, lease_id: int) -> Entry | None:
        line = self._register.read().get(str(lease_id))
        return _entry(lease_id, line) if line else None

    def observe(self) -> dict[int, HostLease]:
        """What every lease in the register has on the host now."""
        entries = self.entries()
        if not entries:
            return {}
        expiries, processes = _account_expiries(), killing.count(entry.uid for entry in entries)
        return {entry.lease_id: self._observe(entry, expiries, processes[entry.uid]) for entry in entries}

    def _observe(self, entry: Entry, expiries: dict[str, date | None], processes: int) -> HostLease:
        return HostLease(
            lease_id=entry.lease_id,
            login=entry.login,
            uid=entry.uid,
            exists=entry.login in expiries,
            is_closed=entry.is_closed,
            ends_at=entry.ends_at,
            keys=find_text(self._keys_file(entry.login)) or "",
            expires_on=expiries.get(entry.login),
            armed_at=systemd.find_timer(timer_unit(entry.lease_id)),
            processes=processes,
        )

    def obstacle(self, lease: DesiredLease) -> str | None:
        """Why this lease cannot be opened here, with the way out; None when it can."""
        entry = self.find(lease.lease_id)
        if entry is not None and entry.disowned:
            return entry.disowned
        if entry is not None and (entry.login, entry.uid) != (lease.login, lease.uid):
            before = f"{entry.login} (UID {entry.uid})"
            return f"lease {lease.lease_id} was {before} here before: a lease keeps its login and UID"
        for other in self._all_entries():
            if other.lease_id != lease.lease_id and other.uid == lease.uid:
                return (
                    f"UID {lease.uid} was lease {other.lease_id}'s: a UID is never used twice on a host; choose another"
                )
        return self._stranger(lease, is_known=entry is not None)

    @staticmethod
    def _stranger(lease: DesiredLease, *, is_known: bool) -> str | None:
        with contextlib.suppress(KeyError):
            account = pwd.getpwnam(lease.login)
            if not is_known or account.pw_uid != lease.uid:
                return (
                    f"a login {lease.login} (UID {account.pw_uid}) exists that RemoteGPU did not make: "
                    f"remove it ('userdel {lease.login}') or verify the machine anew"
                )
        with contextlib.suppress(KeyError):
            account = pwd.getpwuid(lease.uid)
            if account.pw_name != lease.login:
                return f"UID {lease.uid} belongs to {account.pw_name}: choose another UID for the lease"
        with contextlib.suppress(KeyError):
            group = grp.getgrgid(lease.uid)
            if group.gr_name != lease.login:
                return f"group id {lease.uid} belongs to {group.gr_name}: choose another UID for the lease"
        return None

    # Make the login

    def make_login(self, lease: DesiredLease) -> None:
        """An account of its own, expired until the lease lets in. Raises CannotOpen, ToolFailed."""
        obstacle = self.obstacle(lease)
        if obstacle:
            raise CannotOpen(obstacle)
        # First the register: whatever happens next, this login is known to be ours.
        self._note(lease, closed_at=format_time(now()))
        group = self._config.leases_group
        run(["groupadd", "--force", "--system", group])
        with contextlib.suppress(KeyError):
            pwd.getpwnam(lease.login)
            return
        try:
            grp.getgrnam(lease.login)
        except KeyError:
            run(["groupadd", "--gid", str(lease.uid), lease.login])
        home = self._config.home_dir / lease.login
        # No password that could match, yet not "!", which sshd without PAM takes for locked. Expired until
        # the end is armed.
        account = {
            "--uid": str(lease.uid),
            "--gid": lease.login,
            "--groups": group,
            "--shell": "/bin/bash",
            "--home-dir": str(home),
            "--key": "HOME_MODE=0700",
            "--password": "*",
            "--expiredate": "1970-01-02",
            "--comment": f"RemoteGPU lease {lease.lease_id}",
        }
        # No further user ids: what runs as one of those would be counted and killed as nobody's.
        no_more = ["--key", "SUB_UID_COUNT=0", "--key", "SUB_GID_COUNT=0"]
        options = (part for option in account.items() for part in option)
        run(["useradd", "--create-home", *no_more, *options, lease.login])
        home.chmod(0o700)  # a home that was there already keeps the mode it had
        self._journal.record(
            "lease.login_made", lease_id=lease.lease_id, detail={"login": lease.login, "uid": lease.uid}
        )

    # Arm the end

    def arm_end(self, lease: DesiredLease) -> None:
        """The host will end this lease at `ends_at`, also after a reboot and without the agent. Raises ToolFailed."""
        before = self.find(lease.lease_id)
        self._note(lease, closed_at=None)
        self.arm_timer(lease.lease_id, lease.ends_at)
        if before is None or before.is_closed:
            self._journal.record(
                "lease.opened", lease_id=lease.lease_id, detail={"ends_at": format_time(lease.ends_at)}
            )
        elif before.ends_at != lease.ends_at:
            detail = {"before": format_time(before.ends_at), "ends_at": format_time(lease.ends_at)}
            self._journal.record("lease.end_moved", lease_id=lease.lease_id, detail=detail)

    def arm_timer(self, lease_id: int, ends_at: datetime) -> None:
        """Start the lease's end timer anew. Raises ToolFailed."""
        unit = timer_unit(lease_id)
        if systemd.find_timer(unit) is not None:
            systemd.stop(f"{unit}.timer", wait=True)
        argv = [self._config.program, "close-lease", str(lease_id)]
        systemd.start_timer(unit, ends_at, argv, description=f"RemoteGPU: end of lease {lease_id}")

    def _note(self, lease: DesiredLease, *, closed_at: str | None) -> None:
        with self._register.change() as register:
            line = register.setdefault(
                str(lease.lease_id), {"key_fingerprints": [], "disowned": None, "cleaned_at": None}
            )
            line.update(login=lease.login, uid=lease.uid, ends_at=format_time(lease.ends_at), closed_at=closed_at)

    # Let in

    def set_expiry(self, lease: DesiredLease) -> None:
        run(["chage", "--expiredate", str((expiry_day(lease.ends_at) - EPOCH_DAY).days), lease.login])

    def render_keys(self, lease: DesiredLease) -> str:
        """The whole keys file. Keys carry the end too: a host that cannot reach us still closes on the hour."""
        stamp = expiry_stamp(lease.ends_at, knows_zulu=openssh_version() >= ZULU_SINCE)
        return "".join(f'expiry-time="{stamp}" {key.line}\n' for key in lease.keys)

    def write_keys(self, lease: DesiredLease) -> None:
        """Let these keys in. A key that goes takes the sessions along that it had opened, and no others."""
        text, fingerprints = self.render_keys(lease), [key.fingerprint for key in lease.keys]
        before = self.find(lease.lease_id)
        ended = 0
        if before is not None and set(before.key_fingerprints) - set(fingerprints):
            # Refused from here on, but not yet the file that is wanted: should we die now, it is done once more.
            self._write_keys_file(lease.login, text + SESSIONS_GO_ON)
            ended = sessions.end_all_but(lease.login, fingerprints)
        self._write_keys_file(lease.login, text)
        with self._register.change() as register:
            register[str(lease.lease_id)]["key_fingerprints"] = fingerprints
        detail = {"fingerprints": fingerprints, "ended_sessions": ended}
        self._journal.record("lease.keys_written", lease_id=lease.lease_id, detail=detail)

    def _write_keys_file(self, login: str, text: str) -> None:
        self._config.keys_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        path = self._keys_file(login)
        try:
            write_atomic(path, text.encode(), mode=0o644)
        except OSError as error:
            if not is_full(error) or not path.exists():
                raise
            path.write_bytes(text.encode())  # in place: it opens to nobody before it opens to those who are left

    def _keys_file(self, login: str) -> Path:
        return self._config.keys_dir / login

    # Close

    def close(self, lease_id: int, reason: str) -> None:
        """Nobody in, nothing running. May be called again and by two at once. Raises ToolFailed when something
        resisted: all the rest is done by then, also where a tenant has filled the disk.
        """
        entry = self.find(lease_id)
        if entry is None:
            return
        started = time.monotonic()
        failures = [failure for failure in (*self._shut(entry), *self._end(entry, reason)) if failure]
        if not failures:
            failures = [failure for failure in [_attempt(lambda: self._note_closed(entry, reason, started))] if failure]
        if failures:
            self.reserve.give_up()  # its processes are dead: what failed for want of room has some at the next try
            raise ToolFailed("; ".join(failures))
        if systemd.find_timer(timer_unit(lease_id)) is not None:
            systemd.stop(f"{timer_unit(lease_id)}.timer")

    def _note_closed(self, entry: Entry, reason: str, started: float) -> None:
        with self._register.change() as register:
            line = register[str(entry.lease_id)]
            is_news = line["closed_at"] is None
            line.update(closed_at=line["closed_at"] or format_time(now()), key_fingerprints=[])
        if is_news:
            detail = {"reason": reason, "duration_s": round(time.monotonic() - started, 3)}
            self._journal.record("lease.closed", lease_id=entry.lease_id, detail=detail)

    def _shut(self, entry: Entry) -> Iterable[str | None]:
        """No new session from here on: the keys file first, since it needs no program to be started."""
        yield _attempt(lambda: self._write_keys_file(entry.login, ""))
        yield _attempt(lambda: self._expire(entry.login))

    @staticmethod
    def _expire(login: str) -> None:
        with contextlib.suppress(KeyError):
            pwd.getpwnam(login)
            run(["chage", "--expiredate", "0", login])

    def _end(self, entry: Entry, reason: str) -> Iterable[str | None]:
        """Everything that could start processes, then the processes and what they were reached by."""
        linger = Path("/var/lib/systemd/linger") / entry.login
        yield _attempt(lambda: linger.unlink(missing_ok=True))
        yield _attempt(lambda: self._stop_tasks(entry.lease_id, reason))
        killing.end_all(entry.login, entry.uid, deadline_s=1)  # at once: firewalld and Docker may take their time
        others = {lease_id: ends_at for lease_id, ends_at in self.open_ends().items() if lease_id != entry.lease_id}
        yield _attempt(lambda: self._openings.settle(others))
        yield _attempt(lambda: stop_containers(entry.lease_id))
        left = killing.end_all(entry.login, entry.uid, deadline_s=KILL_DEADLINE_S)
        yield _attempt(lambda: _settle_user_manager(entry.uid))
        yield f"processes {', '.join(map(str, sorted(left)[:20]))} cannot be killed; reboot the host" if left else None

    # After the end

    def disown(self, lease_id: int, why: str, *, is_cleaned: bool = False) -> None:
        """Never open this lease here again. Its UID stays taken."""
        with self._register.change() as register:
            if str(lease_id) in register:
                cleaned_at = format_time(now()) if is_cleaned else None
                register[str(lease_id)].update(disowned=why, cleaned_at=cleaned_at)


def _entry(lease_id: int, line: dict[str, Any]) -> Entry:
    return Entry(
        lease_id=lease_id,
        login=line["login"],
        uid=line["uid"],
        ends_at=parse_time(line["ends_at"]),
        closed_at=parse_time(line["closed_at"]) if line["closed_at"] else None,
        key_fingerprints=tuple(line["key_fingerprints"]),
        disowned=line["disowned"],
        is_cleaned=line["cleaned_at"] is not None,
    )


def _attempt(act: Callable[[], None]) -> str | None:
    """Do it, and let the rest of the closing go on when it fails."""
    try:
        act()
    except (ToolFailed, docker.DockerFailed, OSError) as error:
        return str(error) or type(error).__name__
    return None


def _settle_user_manager(uid: int) -> None:
    """The user's systemd was killed with the rest: without this it stays behind as a failed unit of the host."""
    unit = f"user@{uid}.service"
    systemd.stop(unit, wait=True)
    run(["systemctl", "reset-failed", unit], ok=(0, 1))


def timer_unit(lease_id: int) -> str:
    return f"remotegpu-lease-end-{lease_id}"


def end_survives_reboot() -> bool:
    """The guard that arms the ends again before sshd starts is enabled."""
    return GUARD_LINK.exists() or any(Path("/etc/systemd/system").glob("*.requires/remotegpu-lease-guard.service"))


def stop_containers(lease_id: int) -> None:
    """Stop the containers that carry the lease's label, and no others. Raises DockerFailed."""
    if not docker.is_installed():
        return
    try:
        containers = docker.containers()
    except docker.DockerFailed as error:
        # A daemon that is stopped leaves its socket behind. Containers outlive it only together with their shim.
        if isinstance(error.__cause__, ConnectionRefusedError) and not killing.is_running("containerd-shim"):
            return
        raise
    for container in containers:
        if container.lease == str(lease_id):
            # A restart policy would bring it back with the daemon.
            docker.call("POST", f"/containers/{container.id}/stop", timeout_s=10, t="0")


def expiry_stamp(ends_at: datetime, *, knows_zulu: bool) -> str:
    """`expiry-time` as this sshd reads it: UTC with Z, or the host's own time where Z would lock the key out (before
    9.1).
    """
    last = ends_at - timedelta(seconds=1)  # sshd accepts the key during the whole second that is named
    return last.strftime("%Y%m%d%H%M%SZ") if knows_zulu else last.astimezone().strftime("%Y%m%d%H%M%S")


_version_seen: tuple[tuple[int, float], tuple[int, int]] | None = None


def openssh_version() -> tuple[int, int]:
    """The running server's release; asked again when the program on disk changed. (0, 0) when it does not say."""
    global _version_seen
    try:
        found = os.stat("/usr/sbin/sshd")
    except OSError:
        return 0, 0
    stamp = (found.st_ino, found.st_mtime)
    if _version_seen is None or _version_seen[0] != stamp:
        _version_seen = (stamp, parse_openssh_version(openssh_banner()))
    return _version_seen[1]


def openssh_banner() -> str:
    """What `sshd -V` prints; before 9.3 it does so as part of an error."""
    try:
        done = subprocess.run(
            ["/usr/sbin/sshd", "-V"], capture_output=True, stdin=subprocess.DEVNULL, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"OpenSSH_\S+", (done.stderr + done.stdout).decode(errors="replace"))
    return found[0].rstrip(",") if found else ""


def parse_openssh_version(banner: str) -> tuple[int, int]:
    found = re.match(r"OpenSSH_(\d+)\.(\d+)", banner)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _account_expiries() -> dict[str, date | None]:
    """Every account's first refused day, from the shadow file (Python's own reader is gone from 3.13 on)."""
    found: dict[str, date | None] = {}
    for line in (find_text(Path("/etc/shadow")) or "").splitlines():
        parts = line.split(":")
        if len(parts) > 7:
            found[parts[0]] = EPOCH_DAY + timedelta(days=int(parts[7])) if parts[7].isdigit() else None
    return found
