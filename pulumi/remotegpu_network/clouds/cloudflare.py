"""Cloudflare's DNS."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pulumi_cloudflare as sdk

import pulumi
from remotegpu_network.clouds import unknown_shape
from remotegpu_network.clouds.options import options, parent_id
from remotegpu_network.desired import Resource, ZoneShape
from remotegpu_network.shapes import cloudflare


def declare(wanted: Iterable[Resource]) -> Mapping[str, pulumi.CustomResource]:
    """The token: `cloudflare:apiToken`, or CLOUDFLARE_API_TOKEN where the apply runs."""
    token = pulumi.Config("cloudflare").get_secret("apiToken")
    provider = sdk.Provider("cloudflare", sdk.ProviderArgs(api_token=token))
    zones: dict[str, sdk.Zone] = {}
    for each in wanted:
        if isinstance(each.shape, ZoneShape):
            zones[each.logical] = _zone(each, each.shape, provider)
        elif isinstance(each.shape, cloudflare.Record):
            _record(each, each.shape, parent_id(each, zones), provider)
        else:
            unknown_shape(each)
    return zones


def _zone(each: Resource, shape: ZoneShape, provider: sdk.Provider) -> sdk.Zone:
    account = sdk.ZoneAccountArgs(id=shape.account)
    return sdk.Zone(each.logical, sdk.ZoneArgs(account=account, name=shape.name), options(each, provider))


def _record(each: Resource, shape: cloudflare.Record, zone_id: pulumi.Input[str], provider: sdk.Provider) -> None:
    sdk.DnsRecord(
        each.logical,
        sdk.DnsRecordArgs(
            zone_id=zone_id,
            name=shape.name,
            type=shape.type,
            ttl=shape.ttl,
            proxied=shape.proxied,
            comment=shape.comment,
            content=shape.content,
            priority=shape.priority,
            data=_data(shape),
        ),
        options(each, provider),
    )


def _data(shape: cloudflare.Record) -> sdk.DnsRecordDataArgs | None:
    if shape.caa is not None:
        return sdk.DnsRecordDataArgs(flags=shape.caa.flags, tag=shape.caa.tag, value=shape.caa.value)
    if shape.srv is not None:
        return sdk.DnsRecordDataArgs(
            priority=shape.srv.priority, weight=shape.srv.weight, port=shape.srv.port, target=shape.srv.target
        )
    return None
