"""AWS as moto knows it: the rules that we hand over are taken, and what it refuses we refuse before.

moto is weak on DNS and on the letters of descriptions; those are held by policy.py and dnspython.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from moto import mock_aws

from remotegpu_network.shapes import aws, route53
from tests.network.export import name, opening, resources, stack


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[boto3.Session]:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "testing")
    with mock_aws():
        yield boto3.Session(region_name="eu-central-1")


def permission(rule: aws.SecurityGroupRule) -> dict[str, Any]:
    made: dict[str, Any] = {"IpProtocol": rule.ip_protocol}
    if rule.from_port is not None:
        made |= {"FromPort": rule.from_port, "ToPort": rule.to_port}
    if rule.cidr_ipv4:
        return {**made, "IpRanges": [{"CidrIp": rule.cidr_ipv4, "Description": rule.description}]}
    if rule.cidr_ipv6:
        return {**made, "Ipv6Ranges": [{"CidrIpv6": rule.cidr_ipv6, "Description": rule.description}]}
    return {**made, "UserIdGroupPairs": [{"GroupId": rule.referenced_security_group_id}]}


def rules(*rows: dict[str, Any], **fields: Any) -> list[aws.SecurityGroupRule]:
    shapes = [each.shape for each in resources(*rows, **fields)]
    return [shape for shape in shapes if isinstance(shape, aws.SecurityGroupRule) and shape.ingress]


@pytest.fixture
def ec2(session: boto3.Session) -> Any:
    return session.client("ec2")


@pytest.fixture
def security_group(ec2: Any) -> str:
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    made: str = ec2.create_security_group(GroupName="remotegpu-g", Description="RemoteGPU g", VpcId=vpc)["GroupId"]
    return made


def test_every_rule_of_overlapping_openings_is_taken_once(ec2: Any, security_group: str) -> None:
    rows = [
        opening("o1", "203.0.113.0/24"),
        opening("o2", "203.0.113.0/24"),
        opening("o3", "203.0.113.128/25"),
        opening("o4", "203.0.113.0/24", (20, 25)),
        opening("o5", "2001:db8::/32", None),
        opening("o6", "203.0.113.0/24", None, protocol="icmp"),
        opening("o7", security_group, 443),
    ]
    for rule in rules(*rows):
        ec2.authorize_security_group_ingress(GroupId=security_group, IpPermissions=[permission(rule)])
    found = ec2.describe_security_groups(GroupIds=[security_group])["SecurityGroups"][0]["IpPermissions"]
    assert sorted(
        (each["IpProtocol"], each.get("FromPort"), each.get("ToPort")) for each in found if "FromPort" in each
    ) == [
        ("icmp", -1, -1),
        ("tcp", 20, 25),
        ("tcp", 443, 443),
    ]
    of_ipv6 = [(each["IpProtocol"], net["CidrIpv6"]) for each in found for net in each.get("Ipv6Ranges", [])]
    assert of_ipv6 == [("-1", "2001:db8::/32")]


def test_moto_refuses_the_double_that_merging_avoids(ec2: Any, security_group: str) -> None:
    (rule,) = rules(opening("o1", "203.0.113.0/24"), opening("o2", "203.0.113.0/24"))
    ec2.authorize_security_group_ingress(GroupId=security_group, IpPermissions=[permission(rule)])
    with pytest.raises(ClientError, match=r"InvalidPermission\.Duplicate"):
        ec2.authorize_security_group_ingress(GroupId=security_group, IpPermissions=[permission(rule)])


def test_the_quota_that_we_count_is_the_one_that_moto_counts(ec2: Any, security_group: str) -> None:
    made = rules(*(opening(f"o{i}", f"10.{i}.0.0/16") for i in range(61)), settings=stack(aws_rules_per_group=61))
    for rule in made[:60]:
        ec2.authorize_security_group_ingress(GroupId=security_group, IpPermissions=[permission(rule)])
    with pytest.raises(ClientError, match="RulesPerSecurityGroupLimitExceeded"):
        ec2.authorize_security_group_ingress(GroupId=security_group, IpPermissions=[permission(made[60])])


def test_route53_takes_the_records_and_nothing_outside_the_zone(session: boto3.Session) -> None:
    client = session.client("route53")
    zone = client.create_hosted_zone(Name="gpu.example.com", CallerReference="1")["HostedZone"]["Id"]
    rows = [
        name("a", "*", "A", "203.0.113.2", "203.0.113.1", in_zone="r53"),
        name("t", "k", "TXT", "x" * 300, in_zone="r53"),
        name("m", "@", "MX", {"priority": 1, "target": "m.example.org"}, in_zone="r53"),
    ]
    for each in resources(*rows):
        assert isinstance(each.shape, route53.Record)
        values = [f'"{value}"' if each.shape.type == "TXT" else value for value in each.shape.records]
        record = {
            "Name": each.shape.name, "Type": each.shape.type, "TTL": each.shape.ttl,
            "ResourceRecords": [{"Value": value} for value in values],
        }  # fmt: skip
        batch = {"Changes": [{"Action": "CREATE", "ResourceRecordSet": record}]}
        client.change_resource_record_sets(HostedZoneId=zone, ChangeBatch=batch)
    listed = client.list_resource_record_sets(HostedZoneId=zone)["ResourceRecordSets"]
    assert {row["Type"] for row in listed} >= {"A", "TXT", "MX"}
