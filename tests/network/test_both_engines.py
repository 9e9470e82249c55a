"""What the program does to the clouds, through the engine double and, where `pulumi` is on the PATH, the real engine.

Both are asked alike, and judged by what the cloud in memory was told: what each says of its steps differs. What only
the double can show (operations, unknown ids) is in test_engine.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.network.cloud import Cloud
from tests.network.engine import Engine, Host, language_host
from tests.network.export import ADDRESS, REFUSED, ZONE_ID, name, opening, sealed, zone
from tests.network.provider import attached
from tests.network.real_engine import RealEngine

Either: TypeAlias = Engine | RealEngine
MADE = "create DnsRecord gpu-01.gpu.example.org A"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with language_host(tmp_path_factory.mktemp("host")) as run:
        yield run


@pytest.fixture(params=["double", pytest.param("real", marks=pytest.mark.engine)])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Either]:
    if request.param == "double":
        yield Engine(tmp_path, request.getfixturevalue("host"))
        return
    cloud = Cloud()
    with attached(cloud) as port:
        yield RealEngine(tmp_path, port, cloud)


def test_a_second_run_changes_nothing(engine: Either) -> None:
    caa = name("n", "@", "CAA", {"flags": 0, "tag": "issue", "value": "letsencrypt.org"})
    srv = name("s", "_ssh._tcp", "SRV", {"priority": 1, "weight": 2, "port": 22, "target": "gpu-01.gpu.example.org"})
    text = name("t", "@", "TXT", 'say "hi"', "x" * 300)
    first = engine.up(sealed(ADDRESS, caa, srv, text))
    assert (first.code, len(engine.cloud.calls)) == (0, 5), first.told
    again = engine.up(sealed(ADDRESS, caa, srv, text, generation=8))
    assert (again.code, len(engine.cloud.calls)) == (0, 5), again.told


def test_an_account_of_digits_is_a_text_to_the_program(engine: Either) -> None:
    done = engine.up(sealed(ADDRESS), remotegpu__aws_account="123456789012", remotegpu__may_lose="3")
    assert done.code == 0, done.told


def test_p22_the_program_warns_where_its_own_account_is_not_known(engine: Either) -> None:
    peer = opening("o1", "123456789012/sg-0abc")
    done = engine.up(sealed(peer), remotegpu__clouds=["aws"])
    assert (done.code, "remotegpu:aws-account is not set" in done.told) == (0, True), done.told


def test_a_reason_without_a_letter_of_aws_is_a_reason(engine: Either) -> None:
    wide = opening("o1", "0.0.0.0/0", 443, reason="客户漫游")
    done = engine.up(sealed(wide), remotegpu__clouds=["aws"])
    assert done.code == 0, done.told


def test_renaming_a_machine_deletes_no_record(engine: Either) -> None:
    engine.up(sealed(ADDRESS))
    engine.up(sealed(ADDRESS, machines={"m1": "the big one"}))
    assert engine.cloud.calls == [MADE]
    engine.up(sealed(name("m1.address", "the-big-one", "A", "203.0.113.1", machine="m1")))
    other_key = name("m1.a", "big", "A", "203.0.113.1", machine="m1", previous_keys=["m1.address"])
    done = engine.up(sealed(other_key))
    assert (done.code, [call.split()[0] for call in engine.cloud.calls]) == (0, ["create", "update", "update"])


def test_an_a_record_that_becomes_a_cname_is_deleted_first(engine: Either) -> None:
    engine.up(sealed(ADDRESS))
    done = engine.up(sealed(name("m1.address", "gpu-01", "CNAME", "edge.example.org", machine="m1")))
    assert done.code == 0, done.told
    assert engine.cloud.calls[1:] == [
        "delete DnsRecord gpu-01.gpu.example.org A",
        "create DnsRecord gpu-01.gpu.example.org CNAME",
    ]


def test_what_the_cloud_refuses_is_told(engine: Either) -> None:
    """Two records that take each other's place need the step that goes first."""
    engine.up(sealed(ADDRESS, name("m1.address6", "gpu-01", "AAAA", "2001:db8::1")))
    done = engine.up(sealed(name("m1.address", "gpu-01", "CNAME", "edge.example.org")))
    assert (done.code != 0, "81053" in done.told) == (True, True), done.told


def test_p25_a_preview_with_a_zone_that_is_not_there_yet_goes_through_and_makes_nothing(engine: Either) -> None:
    rows, managed = [zone("cf", id=None), ADDRESS], {"remotegpu__managed_zones": {"cf": "account"}}
    planned = engine.preview(sealed(*rows), **managed)
    assert (planned.code, engine.cloud.calls) == (0, []), planned.told
    done = engine.up(sealed(*rows), **managed)
    assert (done.code, engine.cloud.calls) == (0, ["create Zone", MADE]), done.told


def test_a_zone_is_protected(engine: Either) -> None:
    made = engine.up(sealed(zone("cf", id=None), ADDRESS), remotegpu__managed_zones={"cf": "account"})
    assert made.code == 0, made.told
    done = engine.up(sealed(zone("cf"), ADDRESS))
    assert (done.code != 0, "protect" in done.told) == (True, True), done.told
    assert not any(call.startswith("delete Zone") for call in engine.cloud.calls)


def test_a_record_that_is_there_is_adopted_and_made_what_is_wanted(engine: Either) -> None:
    there = {"zoneId": ZONE_ID, "name": "gpu-01.gpu.example.org", "type": "A", "ttl": 1, "proxied": False}
    there |= {"content": "203.0.113.1", "comment": "by hand"}
    record = engine.cloud.create("cloudflare:index/dnsRecord:DnsRecord", there)
    refused = engine.up(sealed(ADDRESS))
    assert (refused.code != 0, "81058" in refused.told) == (True, True), refused.told
    adopt = {"remotegpu__adopt": {"m1.address": f"{ZONE_ID}/{record}"}}
    adopted = engine.up(sealed(ADDRESS), **adopt)
    assert adopted.code == 0, adopted.told
    assert engine.cloud.calls[1:] == ["update DnsRecord gpu-01.gpu.example.org A"], "it is never deleted"
    assert engine.cloud.things[record][1]["comment"] == "RemoteGPU m1.address"
    for settings in (adopt, {}):  # it is imported once, and then the line may go
        assert engine.up(sealed(ADDRESS, generation=8), **settings).code == 0
    assert len(engine.cloud.calls) == 2


@pytest.mark.parametrize(("export", "why"), REFUSED)
def test_what_must_not_be_applied_is_told_and_changes_nothing(
    engine: Either, export: dict[str, object], why: str
) -> None:
    done = engine.up(export)
    assert (done.code != 0, why in done.told, engine.cloud.calls) == (True, True, []), done.told


def test_an_export_that_lost_most_of_the_fleet_changes_nothing(engine: Either, tmp_path: Path) -> None:
    many = sealed(*(name(f"n{i}", f"n{i}", "A", "203.0.113.1") for i in range(20)))
    engine.up(many)
    (tmp_path / "applied.json").write_text(json.dumps(many))
    few = sealed(*(name(f"n{i}", f"n{i}", "A", "203.0.113.1") for i in range(10)), generation=8)
    stopped = engine.up(few, remotegpu__applied=str(tmp_path / "applied.json"))
    assert (stopped.code != 0, "10 of 20 names are gone" in stopped.told) == (True, True), stopped.told
    assert len(engine.cloud.things) == 20
    meant = engine.up(few, remotegpu__applied=str(tmp_path / "applied.json"), remotegpu__max_loss_percent=50)
    assert (meant.code, len(engine.cloud.things)) == (0, 10)


def test_four_clouds_in_one_stack(engine: Either) -> None:
    rows = [name(f"n-{key}", "x", "A", "203.0.113.1", in_zone=key) for key in ("cf", "r53", "ali", "pod")]
    rows += [opening(f"o-{key}", "198.51.100.0/24", to=key) for key in ("g-aws", "g-ali", "g-ten")]
    clouds = {"remotegpu__clouds": ["cloudflare", "aws", "alicloud", "tencent"]}
    first = engine.up(sealed(*rows), **clouds)
    assert first.code == 0, first.told
    assert len(engine.cloud.things) == 12  # 4 records, 3 groups, 2 rules, a set of rules, 2 ways out
    engine.up(sealed(*rows, opening("o2", "192.0.2.0/24", to="g-aws")), **clouds)
    assert engine.cloud.calls[12:] == ["create SecurityGroupIngressRule"]
    engine.up(sealed(*rows), **clouds)
    assert engine.cloud.calls[13:] == ["delete SecurityGroupIngressRule"]
