"""The network for those who run the house and for their pipeline: `admin/network*`.

The export is read, and what was applied is told, by programs with a token of the scope `network`. Zones, groups,
records and forwards are here too; openings are in openings.py.
"""

from __future__ import annotations

from typing import Any

import marshmallow as ma
from flask import Response, request

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import actor, requires
from portal.api.paging import PageArgs, page_of, page_schema
from portal.models import AppliedNetwork, DnsRecord, DnsZone, Machine, NetworkState, SecurityGroup
from portal.models.states import APPLY_OUTCOMES, DNS_CLOUDS, GROUP_CLOUDS, RECORD_PURPOSES, RECORD_TYPES
from portal.services import (
    leases,
    machines,
    network,
    network_applied,
    network_drift,
    network_export,
    network_forwards,
    network_machines,
    network_names,
    network_posts,
    network_requests,
    network_zones,
)
from portal.services.actors import STAFF

bp = Blueprint("network", __name__, url_prefix="/api/v1/admin/network", description="Names, groups and openings")


# For the pipeline


@bp.get("")
@requires(*STAFF, scope="network")
@bp.response(200, content_type="application/json")
@bp.alt_response(304, description="The export is still the one that If-None-Match names")
def get_export() -> Response:
    """The export: one document, sealed, the same bytes for as long as nothing changes; `ETag` is its checksum"""
    export = network_export.current()
    answer = Response(network_export.text_of(export), mimetype="application/json")
    answer.set_etag(export.checksum)
    answer.headers["Cache-Control"] = "no-cache"  # kept, but asked for again each time
    answer.headers["X-RemoteGPU-Generation"] = str(export.generation)
    return answer.make_conditional(request)  # type: ignore[return-value]  # werkzeug's base class


class StackArgs(Schema):
    stack = ma.fields.String(required=True, validate=ma.validate.Length(1, 100), metadata={"example": "production-aws"})


class StackDocumentArgs(StackArgs):
    checksum = ma.fields.String(
        load_default=None,
        validate=ma.validate.Length(max=80),
        metadata={"description": "That of its own outputs: the stack knows of an apply that it could not tell"},
    )


@bp.get("/applied")
@requires(*STAFF, scope="network")
@bp.arguments(StackDocumentArgs, location="query")
@bp.response(200, content_type="application/json")
def get_applied(args: dict[str, Any]) -> Response:
    """The export that this stack has applied last, with the `ETag` that it had there; 404 where it is not known"""
    checksum = args["checksum"]
    export = network_applied.newest_export(args["stack"]) if checksum is None else network_export.get(checksum)
    answer = Response(network_export.text_of(export), mimetype="application/json")
    answer.set_etag(export.checksum)
    return answer


class AppliedArgs(StackArgs):
    outcome = ma.fields.String(load_default="applied", validate=ma.validate.OneOf(APPLY_OUTCOMES))
    reason = ma.fields.String(allow_none=True, load_default=None, validate=ma.validate.Length(max=1000))


class StackNetworkIn(Schema):
    """The output `network` of a stack: what was applied, in numbers."""

    environment = ma.fields.String(validate=ma.validate.Length(max=32))
    generation = ma.fields.Integer(strict=True, validate=ma.validate.Range(0, 2**31 - 1))
    checksum = ma.fields.String(validate=ma.validate.Length(max=80))
    clouds = ma.fields.List(ma.fields.String(validate=ma.validate.Length(max=16)), validate=ma.validate.Length(max=16))
    counts = ma.fields.Dict(keys=ma.fields.String(), values=ma.fields.Integer())
    own = ma.fields.Dict(keys=ma.fields.String(), values=ma.fields.Integer())
    resources = ma.fields.Dict(keys=ma.fields.String(), values=ma.fields.Integer())
    left_out = ma.fields.Dict(keys=ma.fields.String(), values=ma.fields.Integer())


class OutputsIn(Schema):
    """As `pulumi stack output --json` prints them."""

    network = ma.fields.Nested(StackNetworkIn)
    groups = ma.fields.Dict(keys=ma.fields.String(), values=ma.fields.String(allow_none=True))


class AppliedOut(Schema):
    id = ma.fields.Integer(required=True)
    stack = ma.fields.String(required=True)
    environment = ma.fields.String(required=True)
    clouds = ma.fields.List(ma.fields.String(), required=True)
    generation = ma.fields.Integer(required=True)
    checksum = ma.fields.String(allow_none=True)
    counts = ma.fields.Dict(keys=ma.fields.String(), required=True)
    is_known = ma.fields.Function(
        lambda row: row.export_id is not None, metadata={"type": "boolean", "description": "It was an export of ours"}
    )
    outcome = ma.fields.String(required=True)
    is_gone = ma.fields.Boolean(required=True, metadata={"description": "A person's word: it was taken down"})
    reason = ma.fields.String(allow_none=True)
    at = ma.fields.AwareDateTime(required=True)


@bp.post("/applied")
@requires(*STAFF, scope="network")
@bp.arguments(OutputsIn)
@bp.arguments(AppliedArgs, location="query")
@bp.response(200, AppliedOut)
def post_applied(body: dict[str, Any], args: dict[str, Any]) -> AppliedNetwork:
    """A stack was applied: its outputs open and close the grants of leases. Posting them again changes nothing"""
    return network_posts.take(args["stack"], body, outcome=args["outcome"], reason=args["reason"], by=actor())


# For people


class StateOut(Schema):
    environment = ma.fields.String(required=True)
    generation = ma.fields.Integer(required=True)
    changed_at = ma.fields.AwareDateTime(required=True)
    behind_since = ma.fields.AwareDateTime(allow_none=True, metadata={"description": "A stack has to apply since then"})
    frozen_reason = ma.fields.String(allow_none=True)
    frozen_at = ma.fields.AwareDateTime(allow_none=True)
    webhook_told_generation = ma.fields.Integer(attribute="told_generation", required=True)
    webhook_told_at = ma.fields.AwareDateTime(attribute="told_at", allow_none=True)
    webhook_failures = ma.fields.Integer(attribute="failures", required=True)
    webhook_error = ma.fields.String(attribute="last_error", allow_none=True)
    stacks = ma.fields.List(
        ma.fields.Nested(AppliedOut), required=True, metadata={"description": "The last apply of each"}
    )


@bp.get("/state")
@requires(*STAFF, scope="network")
@bp.response(200, StateOut)
def get_state() -> dict[str, Any]:
    """Where the network stands: generation, what each stack has applied, and whether the pipeline could be called"""
    return _state_of(network.state())


def _state_of(row: NetworkState) -> dict[str, Any]:
    environment = network_export.environment()
    return {**row.__data__, "environment": environment, "stacks": network_applied.newest_of_each()}


class ThawIn(Schema):
    reason = ma.fields.String(required=True, validate=ma.validate.Length(1, 1000))


@bp.post("/thaw")
@requires(*STAFF)
@bp.arguments(ThawIn)
@bp.response(200, StateOut)
def thaw(body: dict[str, Any]) -> dict[str, Any]:
    """After a restoration: I have compared, the stacks may be given exports again"""
    return _state_of(network.thaw(by=actor(), **body))


class StackGoneIn(Schema):
    stack = ma.fields.String(required=True, validate=ma.validate.Length(1, 100), metadata={"example": "production-aws"})
    reason = ma.fields.String(required=True, validate=ma.validate.Length(1, 1000))
    although_wanted = ma.fields.Boolean(
        load_default=False, metadata={"description": "What is wanted in its clouds waits for another stack"}
    )


@bp.post("/stacks/gone")
@requires(*STAFF)
@bp.arguments(StackGoneIn)
@bp.response(200, AppliedOut)
def forget_stack(body: dict[str, Any]) -> AppliedNetwork:
    """A stack was taken down with all that it made: nobody waits for it any more"""
    return network_posts.forget(by=actor(), **body)


class DriftArgs(PageArgs):
    state = ma.fields.String(validate=ma.validate.OneOf(network_drift.STATES))


class NetworkEntryOut(Schema):
    kind = ma.fields.String(required=True)
    cloud = ma.fields.String(required=True)
    key = ma.fields.String(required=True)
    label = ma.fields.String(required=True)
    state = ma.fields.String(required=True)
    desired = ma.fields.Raw(allow_none=True)
    applied = ma.fields.Raw(allow_none=True)
    applied_at = ma.fields.AwareDateTime(attribute="since", allow_none=True)
    asked_by = ma.fields.String(allow_none=True)
    asked_at = ma.fields.AwareDateTime(allow_none=True)


class LeftOutEntryOut(Schema):
    key = ma.fields.String(required=True)
    reason = ma.fields.String(required=True)


@bp.get("/drift")
@requires(*STAFF, scope="network")
@bp.arguments(DriftArgs, location="query")
@bp.response(200, page_schema(NetworkEntryOut))
def list_drift(args: dict[str, Any]) -> dict[str, Any]:
    """Desired and applied side by side, by cloud and key, with who asked for it"""
    entries = network_drift.compare(only=args.get("state")).entries
    start = (args["page"] - 1) * args["page_size"]
    page = entries[start : start + args["page_size"]]
    asked = network_drift.who_asked(page)
    items = [
        {**vars(each), "label": each.label, "asked_by": asked[each.key].by, "asked_at": asked[each.key].at}
        for each in page
    ]
    return {"items": items, "page": args["page"], "page_size": args["page_size"], "total": len(entries)}


class DriftCountsOut(Schema):
    counts = ma.fields.Dict(keys=ma.fields.String(), values=ma.fields.Integer(), required=True)
    left_out = ma.fields.List(ma.fields.Nested(LeftOutEntryOut), required=True)


@bp.get("/drift/counts")
@requires(*STAFF, scope="network")
@bp.response(200, DriftCountsOut)
def count_drift() -> dict[str, Any]:
    """How many are in which state, and what is left out because no stack would take it"""
    found = network_drift.compare()
    return {"counts": found.counts, "left_out": found.left_out}


@bp.get("/applies")
@requires(*STAFF, scope="network")
@bp.arguments(PageArgs, location="query")
@bp.response(200, page_schema(AppliedOut))
def list_applies(args: dict[str, Any]) -> dict[str, Any]:
    """What the stacks have told, newest first"""
    return page_of(network_applied.search(), args)


# Zones


class ZoneEdit(Schema):
    external_id = ma.fields.String(allow_none=True, validate=ma.validate.Length(max=64))
    serves_machines = ma.fields.Boolean(metadata={"description": "It holds the names of the machines"})
    serves_leases = ma.fields.Boolean(metadata={"description": "It holds the names of leases, while they are active"})
    ttl_s = ma.fields.Integer(strict=True, allow_none=True)


class ZoneIn(ZoneEdit):
    name = ma.fields.String(required=True, validate=ma.validate.Length(1, 253), metadata={"example": "gpu.example.org"})
    cloud = ma.fields.String(required=True, validate=ma.validate.OneOf(DNS_CLOUDS))


class ZoneOut(Schema):
    id = ma.fields.Integer(required=True)
    key = ma.fields.String(required=True)
    name = ma.fields.String(required=True)
    cloud = ma.fields.String(required=True)
    external_id = ma.fields.String(allow_none=True)
    serves_machines = ma.fields.Boolean(required=True)
    serves_leases = ma.fields.Boolean(required=True)
    ttl_s = ma.fields.Integer(allow_none=True)
    created_at = ma.fields.AwareDateTime(required=True)


@bp.get("/zones")
@requires(*STAFF)
@bp.arguments(PageArgs, location="query")
@bp.response(200, page_schema(ZoneOut))
def list_zones(args: dict[str, Any]) -> dict[str, Any]:
    """Zones, by name"""
    return page_of(network_zones.list_zones(), args)


@bp.post("/zones")
@requires(*STAFF)
@bp.arguments(ZoneIn)
@bp.response(201, ZoneOut)
def create_zone(body: dict[str, Any]) -> DnsZone:
    """Write a zone down; it must be there in the cloud, or a stack makes it"""
    return network_zones.create_zone(by=actor(), **body)


@bp.get("/zones/<int:zone_id>")
@requires(*STAFF)
@bp.response(200, ZoneOut)
def get_zone(zone_id: int) -> DnsZone:
    return network_zones.get_zone(zone_id)


@bp.patch("/zones/<int:zone_id>")
@requires(*STAFF)
@bp.arguments(ZoneEdit)
@bp.response(200, ZoneOut)
def edit_zone(body: dict[str, Any], zone_id: int) -> DnsZone:
    return network_zones.edit_zone(network_zones.get_zone(zone_id), by=actor(), **body)


@bp.delete("/zones/<int:zone_id>")
@requires(*STAFF)
@bp.response(204)
def delete_zone(zone_id: int) -> None:
    """Only one that holds nothing; in the cloud it stays"""
    network_zones.delete_zone(network_zones.get_zone(zone_id), by=actor())


# Security groups


class SecurityGroupEdit(Schema):
    name = ma.fields.String(validate=ma.validate.Length(1, 200))
    vpc = ma.fields.String(allow_none=True, validate=ma.validate.Length(max=64))
    external_id = ma.fields.String(allow_none=True, validate=ma.validate.Length(max=64))


class SecurityGroupIn(SecurityGroupEdit):
    name = ma.fields.String(required=True, validate=ma.validate.Length(1, 200))
    cloud = ma.fields.String(required=True, validate=ma.validate.OneOf(GROUP_CLOUDS))
    region = ma.fields.String(required=True, validate=ma.validate.Length(1, 40), metadata={"example": "eu-central-1"})


class SecurityGroupOut(Schema):
    id = ma.fields.Integer(required=True)
    key = ma.fields.String(required=True)
    name = ma.fields.String(required=True)
    cloud = ma.fields.String(required=True)
    region = ma.fields.String(required=True)
    vpc = ma.fields.String(allow_none=True)
    external_id = ma.fields.String(allow_none=True)
    created_at = ma.fields.AwareDateTime(required=True)


@bp.get("/groups")
@requires(*STAFF)
@bp.arguments(PageArgs, location="query")
@bp.response(200, page_schema(SecurityGroupOut))
def list_groups(args: dict[str, Any]) -> dict[str, Any]:
    """Security groups, by name"""
    return page_of(network_zones.list_groups(), args)


@bp.post("/groups")
@requires(*STAFF)
@bp.arguments(SecurityGroupIn)
@bp.response(201, SecurityGroupOut)
def create_group(body: dict[str, Any]) -> SecurityGroup:
    """Write a security group down; without an id the stack makes it"""
    return network_zones.create_group(by=actor(), **body)


@bp.get("/groups/<int:group_id>")
@requires(*STAFF)
@bp.response(200, SecurityGroupOut)
def get_group(group_id: int) -> SecurityGroup:
    return network_zones.get_group(group_id)


@bp.patch("/groups/<int:group_id>")
@requires(*STAFF)
@bp.arguments(SecurityGroupEdit)
@bp.response(200, SecurityGroupOut)
def edit_group(body: dict[str, Any], group_id: int) -> SecurityGroup:
    return network_zones.edit_group(network_zones.get_group(group_id), by=actor(), **body)


@bp.delete("/groups/<int:group_id>")
@requires(*STAFF)
@bp.response(204)
def delete_group(group_id: int) -> None:
    network_zones.delete_group(network_zones.get_group(group_id), by=actor())


# Records


class RecordEdit(Schema):
    name = ma.fields.String(validate=ma.validate.Length(1, 1000), metadata={"example": "jupyter.gpu.example.org"})
    values = ma.fields.List(
        ma.fields.Raw(),
        validate=ma.validate.Length(1, network_names.MOST_VALUES),
        metadata={
            "description": "Text for A, AAAA, CNAME and TXT, an object for MX, SRV and CAA",
            "example": ["192.0.2.7"],
        },
    )
    ttl_s = ma.fields.Integer(strict=True, allow_none=True)
    proxied = ma.fields.Boolean()
    purpose = ma.fields.String(validate=ma.validate.OneOf(RECORD_PURPOSES))


class RecordIn(RecordEdit):
    zone_id = ma.fields.Integer(required=True, strict=True)
    machine_id = ma.fields.Integer(strict=True, allow_none=True, metadata={"description": "Gone with this machine"})
    lease_id = ma.fields.Integer(strict=True, allow_none=True, metadata={"description": "Gone with this lease"})
    name = ma.fields.String(required=True, validate=ma.validate.Length(1, 1000))
    type = ma.fields.String(required=True, validate=ma.validate.OneOf(RECORD_TYPES))
    values = ma.fields.List(ma.fields.Raw(), required=True, validate=ma.validate.Length(1, network_names.MOST_VALUES))


class RecordOut(Schema):
    id = ma.fields.Integer(required=True)
    key = ma.fields.String(required=True)
    zone_id = ma.fields.Integer(required=True)
    machine_id = ma.fields.Integer(allow_none=True)
    lease_id = ma.fields.Integer(allow_none=True)
    name = ma.fields.String(required=True)
    type = ma.fields.String(required=True)
    values = ma.fields.List(ma.fields.Raw(), required=True)
    ttl_s = ma.fields.Integer(allow_none=True)
    proxied = ma.fields.Boolean(required=True)
    purpose = ma.fields.String(required=True)
    requested_by_id = ma.fields.Integer(allow_none=True)
    created_at = ma.fields.AwareDateTime(required=True)


class RecordArgs(PageArgs):
    zone_id = ma.fields.Integer()
    machine_id = ma.fields.Integer()
    lease_id = ma.fields.Integer()
    keyword = ma.fields.String(validate=ma.validate.Length(max=253))


@bp.get("/records")
@requires(*STAFF)
@bp.arguments(RecordArgs, location="query")
@bp.response(200, page_schema(RecordOut))
def list_records(args: dict[str, Any]) -> dict[str, Any]:
    """Records that somebody wants, by name; the names that machines and leases have by themselves are not among them"""
    filters = {name: args.get(name) for name in ("zone_id", "machine_id", "lease_id", "keyword")}
    return page_of(network_names.search(**filters), args)


@bp.post("/records")
@requires(*STAFF)
@bp.arguments(RecordIn)
@bp.response(201, RecordOut)
def create_record(body: dict[str, Any]) -> DnsRecord:
    """Want a record, for a machine, for as long as a lease is active, or by itself"""
    machine_id, lease_id = body.pop("machine_id", None), body.pop("lease_id", None)
    return network_requests.want_record(
        network_zones.get_zone(body.pop("zone_id")),
        machine=None if machine_id is None else machines.get(machine_id),
        lease=None if lease_id is None else leases.get(lease_id),
        by=actor(),
        **body,
    )


@bp.get("/records/<int:record_id>")
@requires(*STAFF)
@bp.response(200, RecordOut)
def get_record(record_id: int) -> DnsRecord:
    return network_names.get(record_id)


@bp.patch("/records/<int:record_id>")
@requires(*STAFF)
@bp.arguments(RecordEdit)
@bp.response(200, RecordOut)
def edit_record(body: dict[str, Any], record_id: int) -> DnsRecord:
    """Other values or another name; to the stacks it stays the same record"""
    return network_requests.edit_record(network_names.get(record_id), by=actor(), **body)


@bp.delete("/records/<int:record_id>")
@requires(*STAFF)
@bp.response(204)
def remove_record(record_id: int) -> None:
    network_requests.remove_record(network_names.get(record_id), by=actor())


# Machines and gateways


class PlaceIn(Schema):
    gateway_id = ma.fields.Integer(strict=True, allow_none=True, metadata={"description": "The gateway in front of it"})
    security_group_id = ma.fields.Integer(strict=True, allow_none=True)
    forward_ports = ma.fields.String(
        allow_none=True,
        validate=ma.validate.Length(max=11),
        metadata={"description": "Makes it a gateway", "example": "20000-20999"},
    )


class PlaceOut(PlaceIn):
    id = ma.fields.Integer(required=True)
    name = ma.fields.String(required=True)
    address = ma.fields.String(required=True)
    public_address = ma.fields.String(allow_none=True)


@bp.get("/gateways")
@requires(*STAFF)
@bp.arguments(PageArgs, location="query")
@bp.response(200, page_schema(PlaceOut))
def list_gateways(args: dict[str, Any]) -> dict[str, Any]:
    """Gateways, by name"""
    return page_of(network_machines.gateways(), args)


@bp.get("/machines/<int:machine_id>")
@requires(*STAFF)
@bp.response(200, PlaceOut)
def get_place(machine_id: int) -> Machine:
    """Where a machine stands in the network"""
    return machines.get(machine_id)


@bp.patch("/machines/<int:machine_id>")
@requires(*STAFF)
@bp.arguments(PlaceIn)
@bp.response(200, PlaceOut)
def place(body: dict[str, Any], machine_id: int) -> Machine:
    """Put it behind a gateway or a security group, or make it a gateway; not while it is leased"""
    return network_machines.place(machines.get(machine_id), by=actor(), **body)


class ForwardOut(Schema):
    id = ma.fields.Integer(required=True)
    gateway_id = ma.fields.Integer(required=True)
    machine_id = ma.fields.Integer(required=True)
    lease_id = ma.fields.Integer(required=True)
    protocol = ma.fields.String(required=True)
    public_port = ma.fields.Integer(required=True)
    source = ma.fields.String(required=True)
    target_port = ma.fields.Integer(required=True)
    created_at = ma.fields.AwareDateTime(required=True)
    closed_at = ma.fields.AwareDateTime(allow_none=True, metadata={"description": "Wanted no longer since then"})
    observed = ma.fields.String(required=True)
    observed_at = ma.fields.AwareDateTime(allow_none=True)
    error = ma.fields.String(allow_none=True)


class ForwardArgs(PageArgs):
    gateway_id = ma.fields.Integer()


@bp.get("/forwards")
@requires(*STAFF)
@bp.arguments(ForwardArgs, location="query")
@bp.response(200, page_schema(ForwardOut))
def list_forwards(args: dict[str, Any]) -> dict[str, Any]:
    """Ports of gateways that are taken"""
    return page_of(network_forwards.search(gateway_id=args.get("gateway_id")), args)
