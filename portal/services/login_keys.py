"""The portal's own SSH key on the hosts, and how it is replaced without a moment in which no key opens a door.

Told in order: what a host is let in by, begin, prepare a host, proven, forget the old one. A rotation is on as long as
the file of the previous key is there: until then every host that has not proven the new one is offered both. Hosts are
changed by the role rotate_credentials, which proves by sign-ins that the new key opens and the old one does not.

The baseline follows, or the next cleaning would put the old key back and take the new one away: it holds both keys
from before the host is touched, and the new one alone once that is proven. Only lines of our own key are changed in it.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peewee

from portal.db import atomic, db, utcnow
from portal.errors import Conflict
from portal.integrations import login_key_files as files
from portal.models import Baseline, LoginKey, Machine, Run
from portal.services import audit, config, events, machines, reports, runs
from portal.services.actors import SYSTEM

PLAYBOOK = "rotate_credentials"
COMMENT = files.COMMENT


class CannotRotate(Conflict):
    """Not on this machine, and not now."""

    code = "cannot_rotate"


# What a host is let in by


def file() -> Path:
    """The key that is used."""
    return config.current().ssh_key_file


def is_rotating() -> bool:
    """Whether some host may still know the previous key alone."""
    return files.previous(file()).exists()


def fingerprint() -> str | None:
    """Of the key that is used."""
    line = files.find_line(file())
    return None if line is None else machines.fingerprint(line)


def is_proven(machine: Machine) -> bool:
    """Whether the key of now opens it, and no other of ours."""
    row: LoginKey | None = LoginKey.get_or_none(LoginKey.machine == machine)
    return row is not None and row.fingerprint == fingerprint()


@dataclass(frozen=True)
class Ways:
    """By which keys each machine is entered: asked once, for as many machines as there are.

    `proven` are the ids of the machines that the key of now opens, and no other of ours; `had_a_key` of those that had
    one before. Both are empty while no rotation is on.
    """

    line: str | None
    previous: Path | None
    previous_line: str | None
    proven: frozenset[int]
    had_a_key: frozenset[int]

    def fallback_file(self, machine: Machine) -> Path | None:
        """The previous key, for a host that has not proven the new one; it is tried after that."""
        return None if machine.id in self.proven else self.previous

    def wanted_lines(self, machine: Machine, *, purpose: str) -> list[str]:
        """What a playbook is to leave in authorized_keys: while a rotation is on, what its baseline was taken with.

        Only the rotation itself moves a host to the new key, and a provisioning run, which ends with a new baseline.
        """
        stays = purpose != "provision" and self.fallback_file(machine) is not None and machine.id in self.had_a_key
        line = self.previous_line if stays else self.line
        return [] if line is None else [line]


def ways() -> Ways:
    """As it is now."""
    line = files.find_line(file())
    if not is_rotating():
        return Ways(line, None, None, frozenset(), frozenset())
    previous = files.previous(file())
    proven = frozenset(row.machine_id for row in _proven())
    had_a_key = frozenset(row.machine_id for row in _had_a_key())
    return Ways(line, previous, files.find_line(previous), proven, had_a_key)


def _proven() -> peewee.ModelSelect[LoginKey]:
    return LoginKey.select(LoginKey.machine).where(LoginKey.fingerprint == fingerprint())


def _had_a_key() -> peewee.ModelSelect[Baseline]:
    """Before the first baseline the first contact's credential lets us in."""
    return Baseline.select(Baseline.machine).distinct()


def search_pending() -> peewee.ModelSelect[Machine]:
    """The machines that have to prove the key of now before the previous one can be forgotten, by name."""
    wanted = (Machine.state != "retired") & (Machine.id << _had_a_key()) & Machine.id.not_in(_proven())
    return Machine.select().where(wanted).order_by(Machine.name)


def overview() -> dict[str, Any]:
    """The key, whether it is being rotated, and by name who has not proven it."""
    rotating = is_rotating()
    pending = [machine.name for machine in search_pending()] if rotating else []
    return {"fingerprint": fingerprint(), "is_rotating": rotating, "pending": pending}


# Begin


def begin(run: Run) -> None:
    """The first run of a rotation makes the new key; one that follows goes on with it."""
    before = fingerprint()
    if files.replace(file()):
        with atomic():
            audit.record("login_key.rotating", run, by=SYSTEM, before=before, fingerprint=fingerprint())
            events.write("login_key.rotating", resource_id=run.id)


# Prepare a host


def prepare(machine: Machine) -> None:
    """Let its baseline hold both keys, so that a cleaning that comes in between locks nobody out.

    Raises CannotRotate while the machine is cleaned: that cleaning goes by the baseline of before.
    """
    with atomic():
        machine = machines.lock(machine)
        if machine.state == "reclaiming":
            raise CannotRotate(f"{machine.name} is being cleaned; its credentials are rotated after that.")
        if not is_proven(machine):
            _let_baseline_hold(machine, [files.previous(file()), file()])


def mend(machine: Machine) -> None:
    """A baseline of an older backup may hold a key that we have not any more: let it hold those that we have."""
    with atomic():
        fallback = ways().fallback_file(machine)
        _let_baseline_hold(machine, [*([fallback] if fallback else []), file()])


def _let_baseline_hold(machine: Machine, keys: Sequence[Path]) -> None:
    baseline = machines.find_baseline(machine)
    lines = [line for line in map(files.find_line, keys) if line is not None]
    content = with_our_lines(baseline.content, lines) if baseline and lines else None
    if baseline is None or content is None or content == baseline.content:
        return
    digest = reports.digest(content)
    Baseline.create(machine=machine, digest=digest, content=content, taken_at=baseline.taken_at)
    audit.record(
        "baseline.login_key_replaced",
        machine,
        by=SYSTEM,
        before=baseline.digest,
        baseline=digest,
        fingerprints=[machines.fingerprint(line) for line in lines],
    )


def with_our_lines(content: Mapping[str, Any], lines: Sequence[str]) -> dict[str, Any] | None:
    """The baseline with these lines wherever it has one of ours; None if it has none.

    In the place where authorized_key leaves them: those that stay in theirs, new ones at the end.
    """
    changed = copy.deepcopy(dict(content))
    found = False
    for path, entry in changed["sections"].get("ssh_keys", {}).items():
        if not path.endswith("/.ssh/authorized_keys") or "content" not in entry:
            continue
        before = zlib.decompress(base64.b64decode(entry["content"])).decode("utf-8", "surrogateescape").splitlines()
        if not any(_is_ours(line, lines) for line in before):
            continue
        found = True
        kept = [line for line in before if not _is_ours(line, lines) or line in lines]
        after = "".join(f"{line}\n" for line in [*kept, *(line for line in lines if line not in kept)])
        data = after.encode("utf-8", "surrogateescape")
        entry["sha256"] = hashlib.sha256(data).hexdigest()
        entry["content"] = base64.b64encode(zlib.compress(data, 9)).decode()
    return changed if found else None


def _is_ours(line: str, ours: Sequence[str]) -> bool:
    """By the key, or by the name that every key of ours carries: one of a lost past has no file any more."""
    words = line.split()
    return line.endswith(f" {COMMENT}") or any(our.split()[1] in words for our in ours)


# Proven


@runs.when_played(PLAYBOOK)
def rotated(run: Run) -> None:
    """What the role has proven, by sign-ins, is written down; the previous key goes with the last host."""
    ours = fingerprint()
    for machine in runs.machines_of(run):
        verdict = (run.verdicts or {}).get(machine.name) or {}
        if verdict.get("login_key") == ours and verdict.get("old_key_refused") is True:
            _prove(machine)
    forget_previous()


def _prove(machine: Machine) -> None:
    with atomic():
        machine = machines.lock(machine)
        if machine.state == "reclaiming":
            return  # what is put back there may be the old key: the next run proves it again
        _let_baseline_hold(machine, [file()])
        _note(machine)


def _note(machine: Machine) -> None:
    row = {"fingerprint": fingerprint(), "proven_at": utcnow()}
    LoginKey.insert(machine=machine.id, **row).on_conflict(conflict_target=[LoginKey.machine], update=row).execute()
    audit.record("machine.login_key_proven", machine, by=SYSTEM, fingerprint=row["fingerprint"])
    events.write("machine.login_key_proven", machine_id=machine.id)


def baseline_taken(machine: Machine, content: Mapping[str, Any]) -> None:
    """A machine that was provisioned while a rotation is on has proven the new key if its baseline knows no other."""
    line = files.find_line(file())
    if is_rotating() and line is not None and with_our_lines(content, [line]) == content:
        _note(machine)


# Forget the old one


def forget_previous() -> bool:
    """Once every machine has proven the new key nobody needs the previous one; returns whether it went now."""
    if not is_rotating() or search_pending().exists():
        return False
    line = files.find_line(files.previous(file()))
    with atomic():
        ended = None if line is None else machines.fingerprint(line)
        audit.record("login_key.ended", None, by=SYSTEM, fingerprint=ended)
        events.write("login_key.ended")
        db.after_commit(lambda: files.forget_previous(file()))
    return True
