"""Alibaba Cloud: names in AliDNS, security groups of ECS."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import pulumi_alicloud as sdk

import pulumi
from remotegpu_network.clouds import unknown_shape
from remotegpu_network.clouds.options import options, parent_id
from remotegpu_network.desired import Resource, ZoneShape
from remotegpu_network.shapes import alicloud, alidns

EVERYWHERE = "cn-hangzhou"  # AliDNS is in no region; the provider wants one


def declare(wanted: Iterable[Resource]) -> Mapping[str, pulumi.CustomResource]:
    """Credentials: `alicloud:accessKey` and `alicloud:secretKey`, or the environment; one provider each region."""
    provider_in = cache(_provider)
    made: dict[str, pulumi.CustomResource] = {}
    for each in wanted:
        provider = provider_in(each.region)
        if isinstance(each.shape, ZoneShape):
            domain = sdk.dns.AlidnsDomainArgs(domain_name=each.shape.name, remark="RemoteGPU")
            made[each.logical] = sdk.dns.AlidnsDomain(each.logical, domain, options(each, provider))
        elif isinstance(each.shape, alidns.Record):
            _record(each, each.shape, made.get(each.within or ""), provider)
        elif isinstance(each.shape, alicloud.SecurityGroup):
            made[each.logical] = _group(each, each.shape, provider)
        elif isinstance(each.shape, alicloud.SecurityGroupRule):
            _rule(each, each.shape, parent_id(each, made), provider)
        else:
            unknown_shape(each)
    return made


def _provider(region: str) -> sdk.Provider:
    config = pulumi.Config("alicloud")
    return sdk.Provider(
        f"alicloud-{region or 'alidns'}",
        sdk.ProviderArgs(
            region=region or EVERYWHERE,
            access_key=config.get_secret("accessKey"),
            secret_key=config.get_secret("secretKey"),
        ),
    )


def _record(each: Resource, shape: alidns.Record, parent: pulumi.Resource | None, provider: sdk.Provider) -> None:
    domain: pulumi.Input[str] = parent.domain_name if isinstance(parent, sdk.dns.AlidnsDomain) else each.parent or ""
    sdk.dns.AlidnsRecord(
        each.logical,
        sdk.dns.AlidnsRecordArgs(
            domain_name=domain,
            rr=shape.rr,
            type=shape.type,
            value=shape.value,
            ttl=shape.ttl,
            line="default",
            priority=shape.priority,
            remark=shape.remark,
        ),
        options(each, provider),
    )


def _group(each: Resource, shape: alicloud.SecurityGroup, provider: sdk.Provider) -> sdk.ecs.SecurityGroup:
    return sdk.ecs.SecurityGroup(
        each.logical,
        sdk.ecs.SecurityGroupArgs(
            security_group_name=shape.name, description=shape.description, vpc_id=shape.vpc_id, tags=dict(shape.tags)
        ),
        options(each, provider),
    )


def _rule(each: Resource, shape: alicloud.SecurityGroupRule, group: pulumi.Input[str], provider: sdk.Provider) -> None:
    sdk.ecs.SecurityGroupRule(
        each.logical,
        sdk.ecs.SecurityGroupRuleArgs(
            type="ingress",
            security_group_id=group,
            ip_protocol=shape.ip_protocol,
            port_range=shape.port_range,
            nic_type=alicloud.VPC_NIC,
            policy="accept",
            priority=alicloud.PRIORITY,
            description=shape.description,
            cidr_ip=shape.cidr_ip,
            ipv6_cidr_ip=shape.ipv6_cidr_ip,
            source_security_group_id=shape.source_security_group_id,
        ),
        options(each, provider),
    )
