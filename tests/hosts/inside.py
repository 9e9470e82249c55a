"""Run a program inside a container as `docker exec` does, at a twentieth of its cost: tests look at hosts all the time.

The kernel's own doors are used: the namespaces and control groups of the container's first process, its capabilities,
and the environment that the engine gave it. Root of this machine may do so; for everybody else, and for a container
that does not run, there is `docker exec`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # the engine's, where an image names none
# It is put into the container's groups before it crosses over; of cgroup v2 one that has others below it takes none.
CROSS = """
for group in $GROUPS_INSIDE; do
    { echo $$ >"$group/cgroup.procs" || echo $$ >"$group/init.scope/cgroup.procs"; } 2>/dev/null
done
unset GROUPS_INSIDE PWD
exec "$@"
"""
# In there a shell waits for the program: nsenter would stop with it when a host that goes down stops all, for ever. By
# `env`, which starts a program: the shell is not among the host's processes, and its own `kill` would meet ours.
WAIT = 'env -- "$@"; exit $?'


@dataclass(frozen=True)
class Inside:
    """A running container's first process, and what a program started beside it gets."""

    container: str
    pid: int
    environ: dict[str, str]
    capabilities: str  # as setpriv takes it
    groups: tuple[str, ...]  # its control groups, as folders

    @classmethod
    def of(cls, container: str) -> Inside | None:
        """None where `docker exec` must do, or say what is wrong. `container` is the whole id."""
        if os.geteuid() != 0:
            return None
        asked = subprocess.run(["docker", "inspect", "--type=container", container], capture_output=True, check=False)
        if asked.returncode != 0:
            return None
        found = json.loads(asked.stdout)[0]
        pid = int(found["State"]["Pid"])
        if not found["State"]["Running"] or not _is_of(pid, container):
            return None
        named = dict(entry.split("=", 1) for entry in found["Config"]["Env"])
        environ = {"PATH": DEFAULT_PATH, "HOSTNAME": found["Config"]["Hostname"], **named, "HOME": "/root"}
        return cls(container, pid, environ, _capabilities(pid), _groups(pid, container))

    @property
    def is_there(self) -> bool:
        """Whether it still is that process: after a restart the container has another one."""
        return _is_of(self.pid, self.container)

    def run(self, command: Sequence[str], *, stdin: bytes | None, timeout_s: float) -> tuple[int, bytes, bytes]:
        """Exit status as a shell tells it, output, errors. Raises subprocess.TimeoutExpired.

        It has ended when `command` has, though what that left in the background may still hold its output.
        """
        drop = ["setpriv", f"--bounding-set=-all,{self.capabilities}", "--inh-caps=-all"]
        cross = ["sh", "-c", CROSS, "sh", *drop, "nsenter", f"--target={self.pid}", "--all", "--no-fork", "--wd"]
        cross += ["--", "sh", "-c", WAIT, "sh"]
        environ = {**self.environ, "GROUPS_INSIDE": " ".join(self.groups)}
        given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            done = subprocess.run(
                [*cross, *command], cwd="/", env=environ, stdout=output, stderr=errors, timeout=timeout_s, **given
            )
            output.seek(0)
            errors.seek(0)
            code = done.returncode if done.returncode >= 0 else 128 - done.returncode
            return code, output.read(), errors.read()


def _is_of(pid: int, container: str) -> bool:
    try:
        return container in Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return False


def _capabilities(pid: int) -> str:
    (line,) = (each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("CapBnd:"))
    bits = int(line.split()[1], 16)
    return ",".join(f"+cap_{number}" for number in range(64) if bits >> number & 1)


def _groups(pid: int, container: str) -> tuple[str, ...]:
    """The container's own groups, in which `docker exec` puts a process too, not those that its systemd made."""
    groups = []
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own = path[: path.index(container) + len(container)] if container in path else None
        if own is None:
            continue
        name = controllers.removeprefix("name=")
        folders = [CGROUPS / name, CGROUPS / "unified", CGROUPS] if not name else [CGROUPS / name]
        places = [folder / own.lstrip("/") for folder in folders]
        groups += [str(place) for place in places if place.is_dir()][:1]
    return tuple(groups)
