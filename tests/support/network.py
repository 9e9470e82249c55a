"""The network around a rental: what an agent says of openings and forwards, and a stack of what it applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from portal.models import AppliedNetwork, DnsZone, Forward, Grant, Lease, Machine, Opening, SecurityGroup
from portal.services import (
    grants,
    leases,
    network_export,
    network_machines,
    network_openings,
    network_posts,
    network_zones,
)
from portal.services.actors import SYSTEM
from portal.services.network_openings import Wish
from tests.support.rental import Host

ZONE_ID = "023e105f4ecef8ad9ca31a8372d0c353"
OFFICE = "203.0.113.0/24"


def zone(name: str = "gpu.example.org", cloud: str = "cloudflare", **fields: Any) -> DnsZone:
    return network_zones.create_zone(**{"name": name, "cloud": cloud, "external_id": ZONE_ID, "by": SYSTEM, **fields})


def group(name: str = "gpus", **fields: Any) -> SecurityGroup:
    given = {"cloud": "aws", "region": "eu-central-1", "vpc": "vpc-1", "by": SYSTEM, **fields}
    return network_zones.create_group(name=name, **given)


def place(host: Host, **fields: Any) -> Machine:
    return network_machines.place(host.machine, by=SYSTEM, **fields)


def wish(port: int = 8888, source: str = OFFICE, **fields: Any) -> Wish:
    return network_openings.wish(**{"protocol": "tcp", "first_port": port, "source": source, **fields})


def seen(*rows: Opening | Forward, state: str = "open", error: str | None = None) -> list[dict[str, Any]]:
    """What an agent reports of these."""
    return [{"id": row.id, "state": state, "error": error} for row in rows]


def reports(
    host: Host, *, openings: Sequence[Mapping[str, Any]] = (), forwards: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Its agent has applied everything and says what it sees."""
    host.applies_everything()
    leases.holes_observed(host.machine, {"openings": list(openings), "forwards": list(forwards)})


def export() -> dict[str, Any]:
    """What the stacks are given now."""
    return network_export.content_of(network_export.current())


def outputs(
    document: Mapping[str, Any] | None = None, *, clouds: Sequence[str] = ("cloudflare",), **fields: Any
) -> dict[str, Any]:
    """As `pulumi stack output --json` prints them after this export was applied."""
    content = document or export()
    told = {name: content[name] for name in ("environment", "generation", "checksum", "counts")}
    return {"network": {**told, "clouds": list(clouds), "resources": {}, "left_out": {}, **fields}, "groups": {}}


def applied(
    document: Mapping[str, Any] | None = None, *, stack: str = "production", clouds: Sequence[str] = ("cloudflare",)
) -> AppliedNetwork:
    """A pipeline has applied it and tells so."""
    return network_posts.take(stack, outputs(document, clouds=clouds), by=SYSTEM)


def state_of(lease: Lease, kind: str) -> tuple[str, str] | None:
    """(desired, observed) of a grant; None where the lease opens nothing of the kind."""
    grant = grants.find(lease, kind)
    return None if grant is None else (grant.desired, grant.observed)


def states_of(lease: Lease) -> dict[str, tuple[str, str]]:
    rows = Grant.select().where(Grant.lease == lease).order_by(Grant.id)
    return {grant.kind: (grant.desired, grant.observed) for grant in rows}
