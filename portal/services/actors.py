"""Who does it: the actor that every write names, for the audit trail."""

from __future__ import annotations

from dataclasses import dataclass

from portal.models import Machine, User

STAFF = ("admin", "operator")  # the roles of people who run the house; the third is the customer's


@dataclass(frozen=True)
class Actor:
    """`kind` is user, token, agent or system. `user` is there for the first two."""

    kind: str
    name: str
    id: int | None = None
    role: str | None = None
    address: str | None = None
    request: str | None = None
    user: User | None = None

    @property
    def is_staff(self) -> bool:
        return self.kind == "system" or self.role in STAFF


SYSTEM = Actor(kind="system", name="system")


def of_user(user: User, *, address: str | None = None, request: str | None = None, kind: str = "user") -> Actor:
    return Actor(kind, user.username, user.id, user.role, address, request, user)


def of_agent(machine: Machine, *, address: str | None = None) -> Actor:
    return Actor("agent", machine.name, machine.id, None, address)
