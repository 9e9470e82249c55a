"""AWS: names in Route 53, security groups of EC2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import pulumi_aws as sdk

import pulumi
from remotegpu_network.clouds import unknown_shape
from remotegpu_network.clouds.options import options, parent_id
from remotegpu_network.desired import Resource, ZoneShape
from remotegpu_network.shapes import aws, route53

EVERYWHERE = "us-east-1"  # Route 53 is in no region; the provider wants one


def declare(wanted: Iterable[Resource]) -> Mapping[str, pulumi.CustomResource]:
    """Credentials are those of the environment or of `aws:profile`; one provider each region."""
    provider_in = cache(_provider)
    made: dict[str, pulumi.CustomResource] = {}
    for each in wanted:
        provider = provider_in(each.region)
        if isinstance(each.shape, ZoneShape):
            zone = sdk.route53.ZoneArgs(name=each.shape.name, comment="RemoteGPU")
            made[each.logical] = sdk.route53.Zone(each.logical, zone, options(each, provider))
        elif isinstance(each.shape, route53.Record):
            _record(each, each.shape, parent_id(each, made), provider)
        elif isinstance(each.shape, aws.SecurityGroup):
            made[each.logical] = _group(each, each.shape, provider)
        elif isinstance(each.shape, aws.SecurityGroupRule):
            _rule(each, each.shape, parent_id(each, made), provider)
        else:
            unknown_shape(each)
    return made


def _provider(region: str) -> sdk.Provider:
    profile = pulumi.Config("aws").get("profile")
    return sdk.Provider(f"aws-{region or 'route53'}", sdk.ProviderArgs(region=region or EVERYWHERE, profile=profile))


def _record(each: Resource, shape: route53.Record, zone_id: pulumi.Input[str], provider: sdk.Provider) -> None:
    sdk.route53.Record(
        each.logical,
        sdk.route53.RecordArgs(
            zone_id=zone_id, name=shape.name, type=shape.type, ttl=shape.ttl, records=list(shape.records)
        ),
        options(each, provider),
    )


def _group(each: Resource, shape: aws.SecurityGroup, provider: sdk.Provider) -> sdk.ec2.SecurityGroup:
    return sdk.ec2.SecurityGroup(
        each.logical,
        sdk.ec2.SecurityGroupArgs(
            name_prefix=shape.name_prefix, description=shape.description, vpc_id=shape.vpc_id, tags=dict(shape.tags)
        ),
        options(each, provider),
    )


def _rule(each: Resource, shape: aws.SecurityGroupRule, group_id: pulumi.Input[str], provider: sdk.Provider) -> None:
    if shape.ingress:
        sdk.vpc.SecurityGroupIngressRule(
            each.logical,
            sdk.vpc.SecurityGroupIngressRuleArgs(
                security_group_id=group_id,
                ip_protocol=shape.ip_protocol,
                from_port=shape.from_port,
                to_port=shape.to_port,
                description=shape.description,
                cidr_ipv4=shape.cidr_ipv4,
                cidr_ipv6=shape.cidr_ipv6,
                prefix_list_id=shape.prefix_list_id,
                referenced_security_group_id=shape.referenced_security_group_id,
            ),
            options(each, provider),
        )
        return
    sdk.vpc.SecurityGroupEgressRule(
        each.logical,
        sdk.vpc.SecurityGroupEgressRuleArgs(
            security_group_id=group_id,
            ip_protocol=shape.ip_protocol,
            description=shape.description,
            cidr_ipv4=shape.cidr_ipv4,
            cidr_ipv6=shape.cidr_ipv6,
        ),
        options(each, provider),
    )
