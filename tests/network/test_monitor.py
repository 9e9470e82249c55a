"""What each adapter hands to its SDK: the inputs as the cloud is told them, and the options."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.network.export import ZONE_ID, group, name, opening, stack, zone
from tests.network.monitor import declared

# The SDKs warn about classes that nobody uses here.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PULUMI = Path(__file__).parents[2] / "pulumi"
SRV = {"priority": 1, "weight": 2, "port": 22, "target": "gpu-01.example.org"}
CAA = {"flags": 0, "tag": "issue", "value": "letsencrypt.org"}


def test_cloudflare_is_told_whole_names_data_and_no_value() -> None:
    rows = [
        name("a", "@", "A", "8.8.8.8"),
        name("s", "_ssh._tcp", "SRV", SRV),
        name("c", "@", "CAA", CAA),
        name("m", "@", "MX", {"priority": 5, "target": "mail.example.org"}),
        name("w", "www", "CNAME", "gpu.example.org", proxied=True),
    ]
    seen = declared(rows, stack(clouds=("cloudflare",)))
    common = {"zoneId": ZONE_ID, "ttl": 1.0, "proxied": False}
    assert {key: seen.inputs[key] for key in "ascmw"} == {
        "a": {**common, "name": "gpu.example.org", "type": "A", "content": "8.8.8.8", "comment": "RemoteGPU a"},
        "s": {
            **common, "name": "_ssh._tcp.gpu.example.org", "type": "SRV", "priority": 1.0, "comment": "RemoteGPU s",
            "data": {"priority": 1.0, "weight": 2.0, "port": 22.0, "target": "gpu-01.example.org"},
        },
        "c": {**common, "name": "gpu.example.org", "type": "CAA", "data": {**CAA, "flags": 0.0},
              "comment": "RemoteGPU c"},
        "m": {
            **common, "name": "gpu.example.org", "type": "MX", "priority": 5.0, "content": "mail.example.org",
            "comment": "RemoteGPU m",
        },
        "w": {
            **common, "name": "www.gpu.example.org", "type": "CNAME", "content": "gpu.example.org", "proxied": True,
            "comment": "RemoteGPU w",
        },
    }  # fmt: skip
    assert all(seen.options(key).deleteBeforeReplace for key in "ascmw")


def test_the_options_say_alias_adoption_and_protection() -> None:
    rows = [name("new", "x", "A", "203.0.113.1", previous_keys=["old"]), name("b", "y", "A", "203.0.113.2")]
    seen = declared(rows, stack(clouds=("cloudflare",), adopt={"b": f"{ZONE_ID}/r1"}, protect=frozenset({"b"})))
    assert [alias.spec.name for alias in seen.options("new").aliases if alias.spec.name] == ["old"]
    assert (seen.options("b").importId, seen.options("b").protect) == (f"{ZONE_ID}/r1", True)
    assert (seen.options("new").importId, seen.options("new").protect) == ("", False)


@pytest.mark.parametrize(
    ("key", "made"), [("cf", "zone.cf"), ("r53", "zone.r53"), ("ali", "zone.ali"), ("pod", "zone.pod")]
)
def test_a_zone_that_the_stack_makes_is_protected_and_its_records_wait_for_it(key: str, made: str) -> None:
    rows = [zone(key, id=None), name("n", "x", "A", "203.0.113.1", in_zone=key)]
    seen = declared(rows, stack(managed_zones={key: "account"}))
    assert seen.options(made).protect
    assert any(dependency.endswith(f"::{made}") for dependency in seen.options("n").dependencies)


@pytest.mark.parametrize("key", ["cf", "r53"])
def test_p25_a_preview_goes_through_with_a_zone_whose_id_is_not_known(key: str) -> None:
    rows = [zone(key, id=None), name("n", "x", "A", "203.0.113.1", in_zone=key)]
    seen = declared(rows, stack(managed_zones={key: "account"}), preview=True)
    assert {"n", f"zone.{key}"} <= set(seen.inputs)


def test_aws_is_told_one_peer_a_rule_and_records_as_one_set() -> None:
    rows = [
        name("n", "k", "TXT", "x" * 300, in_zone="r53"),
        opening("o1", "203.0.113.0/24"),
        opening("o2", "2001:db8::/32", None),
        opening("o3", "sg-1", 443),
    ]
    seen = declared(rows, stack(clouds=("aws",)))
    assert seen.inputs["n"] == {
        "zoneId": "Z0123456789ABCDEFGHIJ", "name": "k.gpu.example.com", "type": "TXT", "ttl": 300.0,
        "records": ["x" * 255 + '""' + "x" * 45],
    }  # fmt: skip
    assert seen.inputs["group.g-aws"] == {
        "namePrefix": "remotegpu-g-aws-", "description": "RemoteGPU g-aws", "vpcId": "vpc-1",
        "tags": {"Name": "GPU 机器", "managed-by": "remotegpu"},
    }  # fmt: skip
    of_group = {"securityGroupId": "group.g-aws-id"}
    assert seen.inputs["g-aws.in.tcp.22.203.0.113.0-24"] == {
        **of_group, "ipProtocol": "tcp", "fromPort": 22.0, "toPort": 22.0, "cidrIpv4": "203.0.113.0/24",
        "description": "RemoteGPU o1",
    }  # fmt: skip
    assert seen.inputs["g-aws.in.all.2001_db8__-32"] == {
        **of_group, "ipProtocol": "-1", "cidrIpv6": "2001:db8::/32", "description": "RemoteGPU o2",
    }  # fmt: skip
    assert seen.inputs["g-aws.in.tcp.443.sg-1"]["referencedSecurityGroupId"] == "sg-1"
    assert seen.inputs["g-aws.out.all.ipv6"] == {
        **of_group, "ipProtocol": "-1", "cidrIpv6": "::/0", "description": "RemoteGPU egress",
    }  # fmt: skip


def test_each_region_of_aws_has_a_provider_of_its_own() -> None:
    other = group("g-aws", key="g2", region="us-west-2")
    rows = [group("g-aws"), other, opening("o1", "203.0.113.0/24"), opening("o2", "203.0.113.0/24", to="g2")]
    seen = declared(rows, stack(clouds=("aws",)))
    assert {key: value["region"] for key, value in seen.inputs.items() if key.startswith("aws-")} == {
        "aws-eu-central-1": "eu-central-1",
        "aws-us-west-2": "us-west-2",
    }
    assert "aws-us-west-2" in seen.options("g2.in.tcp.22.203.0.113.0-24").provider


def test_alibaba_is_told_intranet_a_policy_and_the_name_before_the_zone() -> None:
    rows = [
        name("n", "x", "MX", {"priority": 5, "target": "m.example.org"}, in_zone="ali"),
        opening("o", "203.0.113.0/24", to="g-ali"),
    ]
    seen = declared(rows, stack(clouds=("alicloud",)))
    assert seen.inputs["n"] == {
        "domainName": "gpu.example.cn", "rr": "x", "type": "MX", "value": "m.example.org", "ttl": 600.0,
        "line": "default", "priority": 5.0, "remark": "RemoteGPU n",
    }  # fmt: skip
    assert seen.inputs["g-ali.in.tcp.22.203.0.113.0-24"] == {
        "securityGroupId": "group.g-ali-id", "type": "ingress", "ipProtocol": "tcp", "portRange": "22/22",
        "nicType": "intranet", "policy": "accept", "priority": 1.0, "cidrIp": "203.0.113.0/24",
        "description": "RemoteGPU o",
    }  # fmt: skip
    assert seen.inputs["group.g-ali"]["securityGroupName"] == "remotegpu-g-ali"


def test_tencent_is_told_its_line_and_a_whole_set_of_rules() -> None:
    rows = [
        name("n", "@", "CNAME", "m.example.org", in_zone="pod", name="x.gpu.example.net"),
        opening("o", "203.0.113.0/24", to="g-ten"),
    ]
    seen = declared(rows, stack(clouds=("tencent",)))
    assert seen.inputs["n"] == {
        "domain": "gpu.example.net", "subDomain": "x", "recordType": "CNAME", "recordLine": "默认",
        "value": "m.example.org.", "ttl": 600.0, "remark": "RemoteGPU n",
    }  # fmt: skip
    rules = seen.inputs["g-ten.rules"]
    assert rules["ingresses"] == [
        {
            "action": "ACCEPT",
            "protocol": "TCP",
            "port": "22",
            "cidrBlock": "203.0.113.0/24",
            "description": "RemoteGPU o",
        }
    ]
    assert [rule["protocol"] for rule in rules["egresses"]] == ["ALL", "ALL"]


@pytest.mark.parametrize(
    ("key", "cloud", "sdk"),
    [
        ("cf", "cloudflare", "pulumi_cloudflare"),
        ("r53", "aws", "pulumi_aws"),
        ("ali", "alicloud", "pulumi_alicloud"),
        ("pod", "tencent", "tencentcloud_iac_pulumi"),
    ],
)
def test_a_stack_imports_no_sdk_but_its_own(key: str, cloud: str, sdk: str) -> None:
    program = (
        "import sys; SDKS = ('pulumi_', 'tencentcloud_')\n"
        "from remotegpu_network import stack as _\n"
        "from tests.network.export import name, stack\n"
        "from tests.network.monitor import declared\n"
        "def sdks(): return {each.partition('.')[0] for each in sys.modules if each.startswith(SDKS)}\n"
        "before = sdks()\n"
        f"declared([name('n', 'x', 'A', '203.0.113.1', in_zone='{key}')], stack(clouds=('{cloud}',)))\n"
        "print(*before, '|', *sdks())"
    )
    path = {"PYTHONPATH": f"{PULUMI}:{PULUMI.parent}"}
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env={**os.environ, **path}, capture_output=True, text=True
    )
    assert told.stdout == f"| {sdk}\n", told.stderr


def test_mypy_reads_the_arguments_of_the_sdks_and_finds_no_fault_in_the_stacks(tmp_path: Path) -> None:
    """Each mistake in `wrong.py` is reported, else the strict check would check nothing; and nothing else is."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import pulumi_aws, pulumi_alicloud, pulumi_cloudflare, tencentcloud_iac_pulumi.dnspod as dnspod\n"
        "pulumi_cloudflare.DnsRecordArgs(name='a', type='A', zone_id='z')\n"
        "pulumi_aws.vpc.SecurityGroupIngressRuleArgs(security_group_id='s')\n"
        "pulumi_alicloud.ecs.SecurityGroupRuleArgs(ip_protocol='tcp', security_group_id='s')\n"
        "dnspod.RecordArgs(domain='d', record_line='l', record_type='A')\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(tmp_path), "--no-error-summary",
         "remotegpu_network", "policy", str(wrong)],
        cwd=PULUMI, capture_output=True, text=True,
    )  # fmt: skip
    faults = [line for line in found.stdout.splitlines() if ": note:" not in line]
    assert [line.partition(' "')[0] for line in faults] == [
        f"{wrong}:{line}: error: Missing named argument" for line in (2, 3, 4, 5)
    ], found.stdout
