"""My SSH keys: `customer/keys`."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import actor, current_user, requires
from portal.api.paging import PageArgs, page_of, page_schema
from portal.api.people import one_line
from portal.models import SshKey
from portal.services import keys

bp = Blueprint("keys", __name__, url_prefix="/api/v1/customer/keys", description="The SSH keys that open my machines")


class KeyIn(Schema):
    name = ma.fields.String(required=True, validate=one_line(64))
    key = ma.fields.String(
        required=True,
        validate=ma.validate.Length(1, keys.MAX_LINE),
        metadata={"description": "One public key line, as in id_ed25519.pub"},
    )


class PresenceOut(Schema):
    machine_id = ma.fields.Integer(required=True, attribute="machine.id")
    machine = ma.fields.String(required=True, attribute="machine.name")
    present = ma.fields.Boolean(
        required=True, allow_none=True, metadata={"description": "Whether the host has the key; null until it has said"}
    )


class KeyOut(Schema):
    id = ma.fields.Integer(required=True)
    name = ma.fields.String(required=True)
    type = ma.fields.String(required=True)
    bits = ma.fields.Integer(required=True)
    fingerprint = ma.fields.String(required=True)
    line = ma.fields.String(required=True)
    created_at = ma.fields.AwareDateTime(required=True)
    machines = ma.fields.List(ma.fields.Nested(PresenceOut), required=True)


@bp.get("")
@requires("customer", scope="read")
@bp.arguments(PageArgs, location="query")
@bp.response(200, page_schema(KeyOut))
def list_keys(args: dict[str, Any]) -> dict[str, Any]:
    """My keys, newest first, and on which of my machines each has arrived"""
    presence = keys.presence_of(current_user())
    return page_of(keys.list_of(current_user()), args, lambda key: _with_machines(key, presence))


@bp.post("")
@requires("customer")
@bp.arguments(KeyIn)
@bp.response(201, KeyOut)
def add_key(body: dict[str, Any]) -> SshKey:
    """Add a public key; it reaches my leased machines within a second"""
    key = keys.add(current_user(), name=body["name"], line=body["key"], by=actor())
    return _with_machines(key, keys.presence_of(current_user()))


@bp.get("/<int:key_id>")
@requires("customer", scope="read")
@bp.response(200, KeyOut)
def get_key(key_id: int) -> SshKey:
    """One of my keys"""
    return _with_machines(keys.get_of(current_user(), key_id), keys.presence_of(current_user()))


@bp.delete("/<int:key_id>")
@requires("customer")
@bp.response(204)
def remove_key(key_id: int) -> None:
    """Remove a key; the hosts refuse it within a second"""
    keys.remove(keys.get_of(current_user(), key_id), by=actor())


def _with_machines(key: SshKey, presence: dict[str, list[keys.Presence]]) -> SshKey:
    key.machines = presence.get(key.fingerprint, [])  # type: ignore[attr-defined]  # read by KeyOut
    return key
