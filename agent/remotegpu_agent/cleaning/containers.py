"""Containers, volumes, images and networks of the lease, by their label and by nothing else.

Somebody else's survives, whatever it is called. One that is not in the baseline and carries no label of this lease is
named and left for an operator: it is not proven to be nobody's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Finding, Look, NotApplicable
from remotegpu_agent.observe import docker
from remotegpu_agent.observe.docker import Thing

STRANGE = (
    "is not in the baseline and has no label of this lease: remove it if it may go; one of an operator's own is made "
    "again when the machine is ready, and a new baseline taken"
)


def look_for(kind: str, listed: Callable[[], list[Thing]]) -> Look:
    """The look for one kind of thing; `kind` is its name in the baseline."""

    def look(scope: Scope) -> Iterator[Finding]:
        known = scope.sections["docker"]
        if not docker.is_installed():
            if known is None:
                raise NotApplicable("no container engine on this host")
            raise docker.DockerFailed("the container engine of the baseline does not answer")
        for thing in listed():
            if thing.lease == str(scope.lease_id):
                yield Finding(thing, str(thing))
            elif thing.id not in (known or {}).get(kind, []):
                yield Finding(None, f"{thing} {STRANGE}")

    return look


def remove_those_of_the_lease(_scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Remove what carries the lease's label, running or not."""
    for finding in found:
        if finding.subject is None:
            continue
        try:
            docker.remove(finding.subject)
            yield f"removed {finding.subject}"
        except docker.DockerFailed as error:
            yield str(error)
