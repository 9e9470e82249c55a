"""The unmodified program in a child process, before an engine that keeps state and a cloud that refuses.

Told in its operations; what the real engine must do alike is in test_both_engines.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pulumi.runtime.proto import resource_pb2

from tests.network.engine import SECRETS, TOKEN, UNKNOWN, Engine, Host, language_host
from tests.network.export import ADDRESS, REFUSED, ZONE_ID, name, opening, sealed, zone


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with language_host(tmp_path_factory.mktemp("host")) as run:
        yield run


@pytest.fixture
def engine(tmp_path: Path, host: Host) -> Engine:
    return Engine(tmp_path, host)


def test_a_second_run_plans_nothing(engine: Engine) -> None:
    caa = name("n", "@", "CAA", {"flags": 0, "tag": "issue", "value": "letsencrypt.org"})
    srv = name("s", "_ssh._tcp", "SRV", {"priority": 1, "weight": 2, "port": 22, "target": "gpu-01.gpu.example.org"})
    text = name("t", "@", "TXT", 'say "hi"', "x" * 300)
    first = engine.up(sealed(ADDRESS, caa, srv, text))
    assert (first.code, len(first.operations)) == (0, 6), first.told
    second = engine.up(sealed(ADDRESS, caa, srv, text, generation=8))
    assert (second.operations, second.same) == ([], 6), second.told


def test_renaming_a_machine_deletes_no_record(engine: Engine) -> None:
    engine.up(sealed(ADDRESS))
    renamed = engine.up(sealed(ADDRESS, machines={"m1": "the big one"}))
    assert (renamed.code, renamed.operations) == (0, [])
    moved = engine.up(sealed(name("m1.address", "the-big-one", "A", "203.0.113.1", machine="m1")))
    assert moved.operations == [("update", "m1.address")]
    other_key = name("m1.a", "the-big-one", "A", "203.0.113.1", machine="m1", previous_keys=["m1.address"])
    assert engine.up(sealed(other_key)).operations == [("update", "m1.a")]
    assert not any(call.startswith("delete") for call in engine.cloud.calls)


def test_an_a_record_that_becomes_a_cname_is_deleted_first(engine: Engine) -> None:
    engine.up(sealed(ADDRESS))
    done = engine.up(sealed(name("m1.address", "gpu-01", "CNAME", "edge.example.org", machine="m1")))
    assert (done.code, done.operations) == (0, [("replace: delete", "m1.address"), ("replace: create", "m1.address")])
    assert engine.cloud.calls[-2:] == [
        "delete DnsRecord gpu-01.gpu.example.org A",
        "create DnsRecord gpu-01.gpu.example.org CNAME",
    ]


def test_secrets_are_never_in_outputs_state_or_words(engine: Engine) -> None:
    done = engine.up(sealed(ADDRESS))
    assert done.code == 0
    provider = next(request for request in done.seen.values() if request.type == "pulumi:providers:cloudflare")
    assert TOKEN in str(provider.object)  # it does reach the provider
    assert (
        engine.state["urn:pulumi:test::remotegpu::pulumi:providers:cloudflare::cloudflare"].inputs["apiToken"]
        == "[secret]"
    )
    assert TOKEN not in json.dumps(done.outputs) + done.told + str([kept.inputs for kept in engine.state.values()])
    assert done.outputs["network"]["counts"] == {"machines": 1, "zones": 4, "groups": 0, "names": 1, "openings": 0}
    assert done.outputs["network"]["generation"] == 7


def test_the_secrets_of_every_cloud_reach_its_provider_and_nothing_else(engine: Engine) -> None:
    """Not every SDK marks them as secrets by itself: that the adapter does is all there is."""
    rows = [name(f"n-{key}", "x", "A", "203.0.113.1", in_zone=key) for key in ("cf", "r53", "ali", "pod")]
    clouds = {"remotegpu__clouds": ["cloudflare", "aws", "alicloud", "tencent"]}
    markers = {key: f"marker-of-{key.replace(':', '-')}" for key in SECRETS} | {"cloudflare:apiToken": TOKEN}
    given = {key.replace(":", "__"): marker for key, marker in markers.items()}
    done = engine.up(sealed(*rows), **clouds, **given)
    assert done.code == 0, done.told
    providers = {request.type.rpartition(":")[2]: request for request in done.seen.values() if is_provider(request)}
    for key, marker in markers.items():
        cloud, name_of_it = key.split(":")
        assert marker in str(providers[cloud].object[name_of_it]), key
        (kept,) = (kept for kept in engine.state.values() if kept.type == f"pulumi:providers:{cloud}")
        assert kept.inputs[name_of_it] == "[secret]", key
    elsewhere = json.dumps(done.outputs) + done.told + str([kept.inputs for kept in engine.state.values()])
    assert [key for key, marker in markers.items() if marker in elsewhere] == []


def is_provider(request: resource_pb2.RegisterResourceRequest) -> bool:
    return request.type.startswith("pulumi:providers:")


def test_p25_a_preview_does_not_know_the_id_of_a_zone_that_is_not_there_yet(engine: Engine) -> None:
    rows = [zone("cf", id=None), ADDRESS]
    managed = {"remotegpu__managed_zones": {"cf": "account"}}
    planned = engine.preview(sealed(*rows), **managed)
    assert (planned.code, [name for _, name in planned.operations]) == (0, ["cloudflare", "zone.cf", "m1.address"]), (
        planned.told
    )
    record = next(request for request in planned.seen.values() if request.name == "m1.address")
    assert record.object["zoneId"] == UNKNOWN
    assert (engine.state, engine.cloud.things) == ({}, {})
    done = engine.up(sealed(*rows), **managed)
    assert [name for _, name in done.operations] == ["cloudflare", "zone.cf", "m1.address"]
    assert engine.preview(sealed(*rows), **managed).operations == []


def test_a_record_that_is_there_is_adopted_and_not_made_again(engine: Engine) -> None:
    there = {
        "zoneId": ZONE_ID,
        "name": "gpu-01.gpu.example.org",
        "type": "A",
        "ttl": 1,
        "proxied": False,
        "content": "203.0.113.1",
    }
    record = engine.cloud.create("cloudflare:index/dnsRecord:DnsRecord", {**there, "comment": "by hand"})
    refused = engine.up(sealed(ADDRESS))
    assert (refused.code != 0, "81058" in refused.told) == (True, True)
    adopt = {"remotegpu__adopt": {"m1.address": f"{ZONE_ID}/{record}"}}
    planned = engine.preview(sealed(ADDRESS), **adopt)
    assert planned.operations[-2:] == [("import", "m1.address"), ("update", "m1.address")], planned.told
    adopted = engine.up(sealed(ADDRESS), **adopt)
    assert adopted.operations[-2:] == planned.operations[-2:], adopted.told
    assert engine.cloud.calls[1:] == ["update DnsRecord gpu-01.gpu.example.org A"], "it is never deleted"
    assert engine.cloud.things[record][1]["comment"] == "RemoteGPU m1.address"
    assert engine.up(sealed(ADDRESS, generation=8), **adopt).operations == [], "it is imported once"
    assert engine.up(sealed(ADDRESS, generation=9)).operations == [], "the line may go"


def test_a_record_that_is_there_as_wanted_is_adopted_and_nothing_else(engine: Engine) -> None:
    engine.up(sealed(ADDRESS))
    ((record, _),) = engine.cloud.things.items()
    engine.state.clear()
    adopted = engine.up(sealed(ADDRESS), remotegpu__adopt={"m1.address": f"{ZONE_ID}/{record}"})
    assert adopted.operations == [("create", "cloudflare"), ("import", "m1.address")], adopted.told
    assert engine.cloud.calls == ["create DnsRecord gpu-01.gpu.example.org A"]


@pytest.mark.parametrize(("export", "why"), REFUSED)
def test_what_must_not_be_applied_is_told_and_nothing_is_declared(
    engine: Engine, export: dict[str, object], why: str
) -> None:
    done = engine.up(export)
    assert (done.code, why in done.told, [request.type for request in done.seen.values()]) == (
        32, True, ["pulumi:pulumi:Stack"],
    ), done.told  # fmt: skip
    assert "Traceback" not in done.told


def test_four_clouds_in_one_stack(engine: Engine) -> None:
    rows = [name(f"n-{key}", "x", "A", "203.0.113.1", in_zone=key) for key in ("cf", "r53", "ali", "pod")]
    rows += [opening(f"o-{key}", "198.51.100.0/24", to=key) for key in ("g-aws", "g-ali", "g-ten")]
    clouds = {"remotegpu__clouds": ["cloudflare", "aws", "alicloud", "tencent"]}
    planned = engine.preview(sealed(*rows), **clouds)
    assert planned.code == 0, planned.told
    rules = [request.object for request in planned.seen.values() if "securityGroupId" in request.object]
    assert [rule["securityGroupId"] for rule in rules] == [UNKNOWN] * 5, "their groups are not there yet"
    assert (engine.state, engine.cloud.things) == ({}, {})
    first = engine.up(sealed(*rows), **clouds)
    assert (first.code, sorted(first.operations)) == (0, sorted(planned.operations)), first.told
    assert len(engine.cloud.things) == 12  # 4 records, 3 groups, 2 rules, a set of rules, 2 ways out
    assert engine.up(sealed(*rows), **clouds).operations == []
    one_more = opening("o2", "192.0.2.0/24", to="g-aws")
    assert engine.up(sealed(*rows, one_more), **clouds).operations == [("create", "g-aws.in.tcp.22.192.0.2.0-24")]
    closed = engine.up(sealed(*rows), **clouds)
    assert closed.operations == [("delete", "g-aws.in.tcp.22.192.0.2.0-24")]
    assert set(first.outputs["groups"]) == {"group.g-aws", "group.g-ali", "group.g-ten"}
