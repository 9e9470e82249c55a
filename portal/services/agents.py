"""Agents: how one is let in, and what its credential is worth: token, enrolment, first use, rotation, end.

A credential is bound to one machine: with it one speaks for that machine and for no other. Only SHA-256 sums are kept;
tokens and credentials are 256 random bits. What an agent says, and is told, is in sync.py.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from portal import db
from portal.db import utcnow
from portal.errors import Conflict, NotSignedIn
from portal.integrations.wake import Heard, wake
from portal.models import AgentCredential, Command, EnrollToken, Machine
from portal.services import audit, commands, events, machines, provisioning, vault
from portal.services.actors import Actor, of_agent
from portal.services.memory import Memory

TOKEN_LIFE = timedelta(hours=2)  # longer than a provisioning run may take


@dataclass(frozen=True, slots=True)
class Agent:
    """Who called: the agent of this machine, with this credential."""

    machine_id: int
    credential_id: int


@dataclass(frozen=True)
class Enrolled:
    """`credential` is seen this once."""

    machine: Machine
    credential_id: int
    credential: str


_agents: Memory[str, Agent] = Memory()


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


# Token


def new_enroll_token(machine: Machine, *, by: Actor) -> str:
    """A token with which the agent of this machine can enrol once. It ends those that were given out before."""
    token = secrets.token_urlsafe(32)
    now = utcnow()
    with db.atomic():
        machines.lock(machine)
        _expire_tokens(machine)
        EnrollToken.create(machine=machine, token_sha256=_sha256(token), created_at=now, expires_at=now + TOKEN_LIFE)
        audit.record("agent.invited", machine, by=by, until=now + TOKEN_LIFE)
    return token


def _expire_tokens(machine: Machine) -> None:
    unused = (EnrollToken.machine == machine) & EnrollToken.used_at.is_null() & (EnrollToken.expires_at > utcnow())
    EnrollToken.update(expires_at=utcnow()).where(unused).execute()


# Enrolment


def invitation_of(token: str) -> EnrollToken:
    """What a token stands for, used or not. Raises NotSignedIn if we never gave it out."""
    row: EnrollToken | None = EnrollToken.get_or_none(EnrollToken.token_sha256 == _sha256(token))
    if row is None:
        raise _refused()
    return row


def enroll(row: EnrollToken, request: Mapping[str, Any], *, address: str | None = None) -> Enrolled:
    """Let an agent in: its token is used up, and it gets a credential of its own.

    Which machine it is, the token says; nothing that the host says about itself does. Raises NotSignedIn for a token
    that is used or over, Conflict when the machine has got a credential since the token was made.
    """
    try:
        with db.atomic():
            machine = machines.lock(row.machine)
            _use(row)
            _check_not_enrolled_since(row, machine)
            return _let_in(machine, request, address=address)
    except (NotSignedIn, Conflict) as error:
        with db.atomic():
            by = of_agent(row.machine, address=address)
            audit.record("agent.enrol_refused", row.machine, by=by, outcome="refused", reason=error.message)
        raise


def _refused() -> NotSignedIn:
    return NotSignedIn(
        "This enrolment token is unknown, used or over. Provision the machine again for a new one.",
        code="token_refused",
    )


def _use(row: EnrollToken) -> None:
    """One wins: the row is changed only while nobody has used it."""
    now = utcnow()
    unused = (EnrollToken.id == row.id) & EnrollToken.used_at.is_null() & (EnrollToken.expires_at > now)
    if EnrollToken.update(used_at=now).where(unused).execute() != 1:
        raise _refused()


def _check_not_enrolled_since(row: EnrollToken, machine: Machine) -> None:
    if machine.state == "retired":
        raise Conflict(f"{machine.name} is retired.", code="retired")
    newer = AgentCredential.select().where(
        AgentCredential.machine == machine,
        AgentCredential.state << machines.ALIVE,
        AgentCredential.created_at >= row.created_at,
    )
    if newer.exists():
        raise Conflict(
            f"{machine.name} has an agent already. Provision the machine again to let in a new one.",
            code="already_enrolled",
        )


def _let_in(machine: Machine, request: Mapping[str, Any], *, address: str | None) -> Enrolled:
    by = of_agent(machine, address=address)
    commands.cancel_all(machine, "rotate_credential", by=by, reason="The agent was enrolled again.")
    pending = (AgentCredential.machine == machine) & (AgentCredential.state == "pending")
    AgentCredential.update(state="ended", ended_at=utcnow()).where(pending).execute()
    row, secret = _new_credential(machine)
    facts = request["facts"]
    audit.record(
        "agent.enrolled",
        machine,
        by=by,
        version=request["agent_version"],
        hostname=facts["hostname"],
        host_id=facts["machine_id"],
        host_id_before=(machine.facts or {}).get("machine_id"),
    )
    provisioning.enrolled(machine, facts)
    provisioning.seen_gpus(machine, request["gpu"]["gpus"])
    events.write("agent.enrolled", machine_id=machine.id)
    return Enrolled(machine, row.id, secret)


def _new_credential(machine: Machine) -> tuple[AgentCredential, str]:
    secret = secrets.token_urlsafe(32)
    return AgentCredential.create(machine=machine, token_sha256=_sha256(secret), state="pending"), secret


# Use


def authenticate(secret: str) -> Agent:
    """Whose credential this is. Its first use ends the one before it. Raises NotSignedIn."""
    digest = _sha256(secret)
    agent = _agents.find(digest)
    if agent is None:
        with db.connection():
            agent = _agents.read(digest, lambda: _look_up(digest))
    return agent


def _look_up(digest: str) -> Agent:
    row: AgentCredential | None = (
        AgentCredential.select(AgentCredential, Machine)
        .join(Machine)
        .where(AgentCredential.token_sha256 == digest, Machine.state != "retired")
        .first()
    )
    if row is None or row.state == "ended" or (row.state == "pending" and not _take_into_use(row)):
        raise _not_accepted()
    return Agent(row.machine_id, row.id)


def refuse_ended(agent: Agent) -> None:
    """Raises NotSignedIn if the credential has ended since it was authenticated."""
    alive = (AgentCredential.id == agent.credential_id) & (AgentCredential.state << machines.ALIVE)
    if not AgentCredential.select().where(alive).exists():
        raise _not_accepted()


def _not_accepted() -> NotSignedIn:
    return NotSignedIn(
        "This credential is unknown or has ended. Provision the machine again.", code="credential_refused"
    )


def _take_into_use(row: AgentCredential) -> bool:
    """From now on this one, and no other. False if it was ended at this moment."""
    now = utcnow()
    with db.atomic():
        machines.lock(row.machine)
        state = AgentCredential.select(AgentCredential.state).where(AgentCredential.id == row.id).scalar()
        if state != "pending":
            return bool(state == "current")  # a parallel call was first
        older = (
            (AgentCredential.machine == row.machine_id)
            & (AgentCredential.state << machines.ALIVE)
            & (AgentCredential.id < row.id)
        )
        AgentCredential.update(state="ended", ended_at=now).where(older).execute()
        AgentCredential.update(state="current", used_at=now).where(AgentCredential.id == row.id).execute()
        audit.record("agent.credential_current", row.machine, by=of_agent(row.machine), credential_id=row.id)
        _tell_ended(row.machine_id)
    return True


def _tell_ended(machine_id: int) -> None:
    """Every process forgets the machine's credentials: this one now, the others when they hear of it."""
    events.write("credential.ended", machine_id=machine_id)
    _forget(machine_id)


def _forget(machine_id: int) -> None:
    _agents.drop_where(lambda agent: agent.machine_id == machine_id)


def _on_event(heard: Heard) -> None:
    if heard.topic == "credential.ended" and heard.machine_id is not None:
        _forget(heard.machine_id)


wake.on_event(_on_event)


# Rotation


def rotate(machine: Machine, *, by: Actor) -> Command:
    """Give the agent a new credential. The old one is worth nothing once the new one was used.

    While one is on its way, asking again answers that one: the agent may have taken it already.
    """
    with db.atomic():
        machine = machines.lock(machine)
        queued: Command | None = commands.queued(machine, "rotate_credential").first()
        if queued is not None:
            return queued
        row, secret = _new_credential(machine)
        audit.record("agent.credential_rotating", machine, by=by, credential_id=row.id)
        sealed = vault.encrypt(secret)
        return commands.queue(machine, "rotate_credential", by=by, credential_id=row.id, sealed=sealed)


@commands.when_ended("rotate_credential")
def rotation_finished(command: Command) -> None:
    """The agent has kept the new credential, or says that it could not: then the old one stays."""
    if command.state == "failed":
        by = of_agent(command.machine)
        unused = (AgentCredential.id == command.args["credential_id"]) & (AgentCredential.state == "pending")
        AgentCredential.update(state="ended", ended_at=utcnow()).where(unused).execute()
        audit.record("agent.rotation_failed", command.machine, by=by, outcome="failed", reason=command.message)
        _tell_ended(command.machine_id)


# End


def end_credentials(machine: Machine, *, by: Actor) -> None:
    """Nobody speaks for this machine any more, until an agent is enrolled anew."""
    with db.atomic():
        commands.cancel_all(machine, "rotate_credential", by=by, reason="The machine's credentials have ended.")
        _expire_tokens(machine)
        alive = (AgentCredential.machine == machine) & (AgentCredential.state << machines.ALIVE)
        ended = AgentCredential.update(state="ended", ended_at=utcnow()).where(alive).execute()
        audit.record("agent.credentials_ended", machine, by=by, count=ended)
        _tell_ended(machine.id)
