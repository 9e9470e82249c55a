"""Commands: one-off operations for the agent of one machine, from a closed list. Told in order: queue, send, finish.

A command names its machine, and a cleaning its lease; it is executed once and its result is kept once. What a result
means is told where the order came from: that module has its function called with `@commands.when_ended(kind)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import peewee

from portal import db
from portal.db import utcnow
from portal.errors import Conflict, Error, NotFound
from portal.integrations import protocol
from portal.models import Command, Lease, Machine, Reclaim
from portal.models.states import LEASE_OPEN
from portal.services import audit, events, machines, vault
from portal.services.actors import Actor, of_agent
from portal.services.hearers import Hearers
from portal.services.transitions import move

RESULTS = {"baseline": "baseline", "clean": "clean_result"}  # kind → what its result must look like

when_ended: Hearers[Command] = Hearers()
"""By kind: the agent has answered, so the command is done or failed and has its result."""


class NoBaseline(Conflict):
    code = "no_baseline"


def queue(machine: Machine, kind: str, lease: Lease | None = None, *, by: Actor, **args: Any) -> Command:
    """Have the agent of `machine` do `kind` once: baseline, clean (names a lease), rotate_credential or thaw.

    `args` are those of the protocol, without what is joined when it is sent (ids and the baseline). A value under
    `sealed` is encrypted text. Raises NoBaseline for a cleaning that could not compare with anything.
    """
    with db.atomic():
        machines.lock(machine)
        if kind == "clean":
            if lease is None:
                raise ValueError("a cleaning names its lease")
            if machines.find_baseline(machine) is None:
                raise NoBaseline(f"{machine.name} has no baseline to be cleaned against; provision it again.")
            args = {"login": lease.login, "uid": lease.uid} | args
        command = Command.create(machine=machine, kind=kind, lease_id=None if lease is None else lease.id, args=args)
        audit.record("command.queued", command, by=by, kind=kind, machine_id=machine.id, lease_id=command.lease_id)
        events.desired_changed(machine.id)
    return command


def cancel(command: Command, *, by: Actor, reason: str) -> None:
    """Do not send it any more. Raises WrongState when it has ended by now."""
    with db.atomic():
        machines.lock(command.machine)
        move(
            command, leave="queued", enter="cancelled", message=reason, ended_at=utcnow(), args=_without_secret(command)
        )
        audit.record("command.cancelled", command, by=by, reason=reason)
        events.desired_changed(command.machine_id)


def cancel_all(machine: Machine, kind: str, *, by: Actor, reason: str) -> None:
    """Send none of this kind any more: an order that outlives its occasion would be carried out at the next one."""
    for command in list(queued(machine, kind)):
        cancel(command, by=by, reason=reason)


def queued(machine: Machine | int, kind: str) -> peewee.ModelSelect[Command]:
    """Those of this kind that the agent has not answered."""
    return Command.select().where(Command.machine == machine, Command.kind == kind, Command.state == "queued")


def to_send(machine: Machine) -> list[dict[str, Any]]:
    """The commands that the agent shall carry out, oldest first, as the protocol writes them."""
    orders = Command.select().where(Command.machine == machine, Command.state == "queued").order_by(Command.id)
    return [
        {"command_id": command.id, "kind": command.kind, "args": _args(command, machine)}
        for command in orders
        if not _is_overtaken(command, machine)
    ]


def _is_overtaken(command: Command, machine: Machine) -> bool:
    """A cleaning must never meet another lease, however it came to be queued."""
    if command.kind != "clean":
        return False
    open_leases = Lease.select().where(
        Lease.machine == machine, Lease.state << LEASE_OPEN, Lease.id != command.lease_id
    )
    return bool(open_leases.exists())


def _args(command: Command, machine: Machine) -> dict[str, Any]:
    args = {"machine_id": machine.id, **command.args}
    if command.kind == "clean":
        baseline = machines.find_baseline(machine)
        host_id = Lease.get_by_id(command.lease_id).host_id
        args |= {"lease_id": host_id, "baseline": None if baseline is None else baseline.content}
    if command.kind == "rotate_credential":
        args["credential"] = vault.decrypt(args.pop("sealed"))
    if command.kind == "thaw":
        # As they are now, not when it was queued.
        args |= {"epoch": machine.epoch, "generation": machine.generation, "retained": _retained(machine)}
    return args


def _retained(machine: Machine) -> list[int]:
    """The leases that have ended and can still be continued, by the ids under which the host knows them."""
    waiting = Reclaim.select().where(Reclaim.machine == machine, Reclaim.state == "waiting")
    return [reclaim.lease.host_id for reclaim in waiting]


def get(machine: Machine, command_id: int) -> Command:
    """The command, if it is this machine's. Raises NotFound."""
    command: Command | None = Command.get_or_none(Command.id == command_id, Command.machine == machine)
    if command is None:
        raise NotFound(f"{machine.name} was never given a command {command_id}.")
    return command


def note_progress(machine: Machine, command_id: int, progress: int) -> None:
    """The agent says how far it has come with an order; what it says of any other but one of this machine's is nothing.

    Kept where the result will be, and only when it has moved: what stands still has no newer time.
    """
    mine = (Command.id == command_id) & (Command.machine == machine) & (Command.state == "queued")
    command = Command.get_or_none(mine)
    if command is not None and (command.result or {}).get("progress") != progress:
        with db.atomic():
            Command.update(result={"progress": progress, "moved_at": utcnow().isoformat()}).where(mine).execute()


def moved_at(command: Command) -> datetime | None:
    """When the order that is being carried out was last seen to move; None if it never was."""
    seen = command.result if command.state == "queued" else None
    return datetime.fromisoformat(seen["moved_at"]) if seen else None


def finished(machine: Machine, reported: Mapping[str, Any]) -> None:
    """Keep what the agent says of a command, once. A second report of the same is no news and changes nothing.

    Raises NotFound if the command is not this machine's.
    """
    command = get(machine, int(reported["command_id"]))
    if command.state != "queued":
        return
    ok, message, result = reported["ok"], reported["message"], reported["result"]
    complaint = _complaint(command.kind, result) if ok else None
    if complaint is not None:
        ok, message = False, complaint
    with db.atomic():
        machine = machines.lock(machine)
        if get(machine, command.id).state != "queued":
            return  # the same report was sent on two connections
        move(
            command,
            leave="queued",
            enter="done" if ok else "failed",
            message=message,
            result=result,
            ended_at=utcnow(),
            args=_without_secret(command),
        )
        by = of_agent(machine)
        audit.record(f"command.{command.state}", command, by=by, kind=command.kind, message=message)
        events.write("command.ended", machine_id=machine.id, resource_id=command.id, state=command.state)
        events.desired_changed(machine.id)
        _hand_over(command, by=by)


def _complaint(kind: str, result: Any) -> str | None:
    """Why a result that claims success cannot be believed; None when it can."""
    definition = RESULTS.get(kind)
    if definition is None:
        return None
    try:
        protocol.check(result, definition)
    except Error as error:
        return f"The agent's result is not a {definition}: {error.message}"
    return None


def _without_secret(command: Command) -> dict[str, Any]:
    return {name: value for name, value in command.args.items() if name != "sealed"}


def _hand_over(command: Command, *, by: Actor) -> None:
    """Tell who waits for it. If that module refuses, this is noted, and the result is kept all the same."""
    try:
        with db.atomic():
            when_ended.by_kind[command.kind](command)
    except Error as error:
        audit.record("command.result_unused", command, by=by, outcome="refused", reason=error.message, code=error.code)
