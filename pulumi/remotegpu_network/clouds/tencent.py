"""Tencent Cloud: names in DNSPod, security groups of CVM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import tencentcloud_iac_pulumi as sdk
from tencentcloud_iac_pulumi import dnspod as sdk_dnspod
from tencentcloud_iac_pulumi import security as sdk_security

import pulumi
from remotegpu_network.clouds import unknown_shape
from remotegpu_network.clouds.options import options, parent_id
from remotegpu_network.desired import Resource, ZoneShape
from remotegpu_network.shapes import dnspod, tencent

EVERYWHERE = "ap-guangzhou"  # DNSPod is in no region; the provider wants one


def declare(wanted: Iterable[Resource]) -> Mapping[str, pulumi.CustomResource]:
    """Credentials: `tencentcloud:secretId` and `tencentcloud:secretKey`, or the environment; one provider each
    region."""
    provider_in = cache(_provider)
    made: dict[str, pulumi.CustomResource] = {}
    for each in wanted:
        provider = provider_in(each.region)
        if isinstance(each.shape, ZoneShape):
            domain = sdk_dnspod.DomainInstanceArgs(domain=each.shape.name, remark="RemoteGPU")
            made[each.logical] = sdk_dnspod.DomainInstance(each.logical, domain, options(each, provider))
        elif isinstance(each.shape, dnspod.Record):
            _record(each, each.shape, made.get(each.within or ""), provider)
        elif isinstance(each.shape, tencent.SecurityGroup):
            group = sdk_security.GroupArgs(name=each.shape.name, description=each.shape.description)
            made[each.logical] = sdk_security.Group(each.logical, group, options(each, provider))
        elif isinstance(each.shape, tencent.RuleSet):
            _rules(each, each.shape, parent_id(each, made), provider)
        else:
            unknown_shape(each)
    return made


def _provider(region: str) -> sdk.Provider:
    config = pulumi.Config("tencentcloud")
    return sdk.Provider(
        f"tencent-{region or 'dnspod'}",
        sdk.ProviderArgs(
            region=region or EVERYWHERE,
            secret_id=config.get_secret("secretId"),
            secret_key=config.get_secret("secretKey"),
        ),
    )


def _record(each: Resource, shape: dnspod.Record, parent: pulumi.Resource | None, provider: sdk.Provider) -> None:
    domain: pulumi.Input[str] = parent.domain if isinstance(parent, sdk_dnspod.DomainInstance) else each.parent or ""
    sdk_dnspod.Record(
        each.logical,
        sdk_dnspod.RecordArgs(
            domain=domain,
            sub_domain=shape.sub_domain,
            record_type=shape.type,
            record_line=dnspod.LINE,
            value=shape.value,
            ttl=shape.ttl,
            mx=shape.mx,
            remark=shape.remark,
        ),
        options(each, provider),
    )


def _rules(each: Resource, shape: tencent.RuleSet, group: pulumi.Input[str], provider: sdk.Provider) -> None:
    sdk_security.GroupRuleSet(
        each.logical,
        sdk_security.GroupRuleSetArgs(
            security_group_id=group,
            ingresses=[_ingress(rule) for rule in shape.ingresses],
            egresses=[_egress(rule) for rule in shape.egresses],
        ),
        options(each, provider),
    )


def _ingress(rule: tencent.SecurityGroupRule) -> sdk_security.GroupRuleSetIngressArgs:
    return sdk_security.GroupRuleSetIngressArgs(
        action=tencent.ACCEPT,
        protocol=rule.protocol,
        port=rule.port,
        description=rule.description,
        cidr_block=rule.cidr_block,
        ipv6_cidr_block=rule.ipv6_cidr_block,
        source_security_id=rule.source_security_id,
    )


def _egress(rule: tencent.SecurityGroupRule) -> sdk_security.GroupRuleSetEgressArgs:
    return sdk_security.GroupRuleSetEgressArgs(
        action=tencent.ACCEPT,
        protocol=rule.protocol,
        port=rule.port,
        description=rule.description,
        cidr_block=rule.cidr_block,
        ipv6_cidr_block=rule.ipv6_cidr_block,
    )
