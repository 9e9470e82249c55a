"""The private directory of one attempt at a run: made fresh, 0700, and gone afterwards.

A directory that is used twice leaks: what run A was told stays on disk, and run B takes it. So each attempt has its
own, named after its mark, and `sweep` removes those that a killed worker left behind. All secrets of a run lie here as
files (0600) and nowhere else: not in an argument, not in an environment.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portal.integrations import ssh_masters
from portal.models import Run
from portal.services import inventory, runs
from portal.services.inventory import RunFiles
from portal.settings import Settings

LOG = logging.getLogger(__name__)

PROJECT = Path(__file__).parents[2]  # playbooks/, roles/, inventory/ and ansible.cfg lie here
FENCE = 0.6  # of the lock's time: the executor ends by itself before another worker may take the run


@dataclass(frozen=True)
class Prepared:
    """What was prepared: the hosts of the run by name, and the values that must not appear in its output."""

    hosts: tuple[str, ...]
    secrets: tuple[str, ...]


def path_of(settings: Settings, mark: str) -> Path:
    return settings.runs_dir / mark.replace(":", "-")


def make(settings: Settings, mark: str) -> Path:
    """The empty directory. Raises FileExistsError: it is never used a second time."""
    settings.runs_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = path_of(settings, mark)
    path.mkdir(mode=0o700)
    return path


def fill(path: Path, run: Run, settings: Settings, project: Path) -> Prepared:
    """Write everything that the executor reads. Raises Invalid if no host is left to run on."""
    machines = runs.machines_of(run)
    document = inventory.document(machines, for_run=RunFiles(run, path))
    job = {
        "mark": run.child["mark"],
        "fence_s": settings.run_lock_s * FENCE,
        "playbook": str(project / "playbooks" / f"{run.playbook}.yml"),
        "project_dir": str(project),
        "inventory": str(path / "inventory" / "run.remotegpu.yml"),
        "limit": inventory.limit_to(document, run),
        "tags": ",".join(run.tags),
        "check": bool(run.options.get("check")),
    }
    write(path / "job.json", job)
    write(path / "env" / "settings", {"pexpect_timeout": 0.5})
    write(path / "env" / "envvars", _environment(path, project))
    write(path / "inventory" / "document.json", document)
    write(path / "inventory" / "run.remotegpu.yml", {"plugin": "portal", "document": "document.json"})
    if (project / "inventory" / "group_vars").is_dir():
        (path / "inventory" / "group_vars").symlink_to(project / "inventory" / "group_vars")
    (path / "verdicts").mkdir()
    return Prepared(tuple(machine.name for machine in machines), inventory.secrets_in(document))


def _environment(path: Path, project: Path) -> dict[str, str]:
    return {
        "ANSIBLE_CONFIG": str(project / "ansible.cfg"),
        "ANSIBLE_HOST_KEY_CHECKING": "True",  # ansible-runner switches it off unless it is told otherwise
        "ANSIBLE_LOCAL_TEMP": str(path / "tmp"),
        "ANSIBLE_NOCOLOR": "1",
        "REMOTEGPU_DRIFT_OUTPUT": str(path / "verdicts"),
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(ssh_masters.make(path)),
    }


def write(file: Path, content: Any) -> None:
    """A new file with `content` as JSON (which is YAML, too), for its owner only."""
    file.parent.mkdir(mode=0o700, exist_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        json.dump(content, stream)


def verdicts(path: Path) -> dict[str, Any] | None:
    """Host → verdict, as verify.yml wrote them; None if it wrote none."""
    found = {}
    for file in sorted((path / "verdicts").glob("*.json")):
        try:
            found[file.stem] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found[file.stem] = {"passed": False, "reason": "the verdict is no JSON"}
    return found or None


def remove(path: Path) -> None:
    """Close the SSH connections that belong to it, then delete it."""
    ssh_masters.end(path)
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        LOG.error("%s could not be removed; secrets of a run may lie there", path)


def sweep(settings: Settings) -> int:
    """Remove the directories of runs that nobody holds any more; returns how many."""
    # In this order: a directory is made after its run was claimed, so one that we see has its row already.
    there = list(settings.runs_dir.glob("*")) if settings.runs_dir.is_dir() else []
    held = {path_of(settings, mark) for mark in runs.held_marks()} if there else set()
    for path in (orphans := [path for path in there if path not in held]):
        remove(path)
    return len(orphans)
