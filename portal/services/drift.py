"""Drift: what a provisioning run would change on a machine, by the last look in check mode.

Told in order: hear what was found, read. The looking is a run of drift.yml as any other, and what it finds is said by
its callback plugin (playbooks/callback_plugins/drift.py), which also keeps secrets out of it. A machine that was not
looked at, or not wholly, is `unknown`, with the reason and the time; what was known before is not worth repeating.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peewee

from portal.db import atomic, utcnow
from portal.models import Drift, Machine, Run
from portal.models.states import DRIFT
from portal.services import audit, events, machines, runs
from portal.services.actors import SYSTEM

PLAYBOOK = "drift"
LOOKED = ("succeeded", "failed")  # a run that was cancelled or lost has looked at nothing: what was known stays


# Hear what was found


@runs.when_played(PLAYBOOK)
def looked(run: Run) -> None:
    """Keep what the run has found of each of its machines; the run itself keeps the count alone."""
    if run.state not in LOOKED:
        return
    found = {machine: _found(run, machine.name) for machine in runs.machines_of(run)}
    for machine, verdict in found.items():
        _keep(machine, run, verdict)
    told = {machine.name: _in_short(verdict) for machine, verdict in found.items()}
    Run.update(verdicts=told).where(Run.id == run.id).execute()


def _found(run: Run, name: str) -> Mapping[str, Any]:
    """The verdict, if it is one; else that nobody knows, and why."""
    verdict = (run.verdicts or {}).get(name) or {}
    if verdict.get("state") in DRIFT and isinstance(verdict.get("changes"), list):
        return verdict
    why = verdict.get("reason") or run.reason or "The run ended without a word about it."
    return {"state": "unknown", "reason": why, "changes": []}


def _in_short(verdict: Mapping[str, Any]) -> dict[str, Any]:
    return {"state": verdict["state"], "reason": verdict.get("reason"), "changes": len(verdict["changes"])}


def _keep(machine: Machine, run: Run, verdict: Mapping[str, Any]) -> None:
    row = {
        "run": run.id,
        "state": verdict["state"],
        "reason": verdict.get("reason"),
        "changes": verdict["changes"],
        "looked_at": utcnow(),
    }
    with atomic():
        machines.lock(machine)
        Drift.insert(machine=machine.id, **row).on_conflict(conflict_target=[Drift.machine], update=row).execute()
        short = {**_in_short(verdict), "run_id": run.id}
        audit.record("machine.drift_looked_at", machine, by=SYSTEM, **short)
        events.write("machine.drift", machine_id=machine.id)


# Read


def find(machine: Machine) -> Drift | None:
    """What the last look found; None if nobody has looked yet."""
    row: Drift | None = Drift.get_or_none(Drift.machine == machine)
    return row


def search(*, state: str | None = None) -> peewee.ModelSelect[Machine]:
    """The machines that are not retired, by name, each with `.drift`: the last look, or None.

    `state` is one of DRIFT; a machine that nobody has looked at is unknown.
    """
    query = (
        Machine.select(Machine, Drift)
        .join(Drift, peewee.JOIN.LEFT_OUTER, attr="drift")
        .where(Machine.state != "retired")
        .order_by(Machine.name)
    )
    if state == "unknown":
        return query.where((Drift.state == "unknown") | Drift.state.is_null())
    return query if state is None else query.where(Drift.state == state)
