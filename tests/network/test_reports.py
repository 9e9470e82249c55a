"""What has gone wrong for others, report by report (P1 to P25 of docs/network.md), as values that are right here.

Those that need the program to run are in test_monitor.py and test_engine.py.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pulumi
from remotegpu_network import __main__ as command
from remotegpu_network import adopt, desired, gate, openings, plan, policy
from remotegpu_network.document import BadDocument
from remotegpu_network.plan import What
from remotegpu_network.records import Caa, Srv
from remotegpu_network.shapes import alicloud, alidns, aws, cloudflare, dnspod, route53, tencent
from tests.network.export import ZONE_ID, group, name, only, opening, parsed, resources, sealed, stack, zone

PACK = Path(__file__).parents[2] / "pulumi" / "policy" / "__main__.py"


def shape(*rows: dict[str, Any], **fields: Any) -> Any:
    return only(*rows, **fields).shape


def refused(*rows: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(BadDocument) as error:
        resources(*rows, **fields)
    return str(error.value)


def rules(*rows: dict[str, Any], **fields: Any) -> list[Any]:
    shapes = [each.shape for each in resources(*rows, **fields)]
    return [each for each in shapes if isinstance(each, aws.SecurityGroupRule) and each.ingress]


@pytest.mark.parametrize(
    ("in_zone", "what"), [("cf", What.REPLACE), ("r53", What.CHANGE), ("ali", What.CHANGE), ("pod", What.CHANGE)]
)
def test_p1_an_address_that_becomes_a_cname_is_the_same_resource_deleted_first(in_zone: str, what: What) -> None:
    """All but Cloudflare's provider change a record's type in place; were one to replace it, it is deleted first."""
    before = resources(name("m1.address", "gpu-01", "A", "203.0.113.1", in_zone=in_zone))
    after = resources(name("m1.address", "gpu-01", "CNAME", "edge.example.org", in_zone=in_zone))
    (change,) = plan.compare(before, after).changes
    assert change.resource.delete_first
    assert change.what is what
    assert (before[0].logical, after[0].logical) == ("m1.address", "m1.address")


def test_p2_proxied_means_automatic_ttl_and_anything_else_is_refused() -> None:
    assert shape(name("n", "www", "A", "8.8.8.8", proxied=True)).ttl == 1
    assert "without a ttl of its own" in refused(name("n", "www", "A", "8.8.8.8", proxied=True, ttl_s=300))
    assert shape(name("n", "www", "A", "8.8.8.8", ttl_s=60)).ttl == 60
    assert shape(name("n", "www", "A", "8.8.8.8")).ttl == 1
    assert "Cloudflare takes 60 s and more" in refused(name("n", "www", "A", "8.8.8.8", ttl_s=59))
    assert shape(name("n", "www", "A", "8.8.8.8", ttl_s=86400)).ttl == 86400
    assert "ttl_s must be smaller than or equal to 86400" in refused(name("n", "www", "A", "8.8.8.8", ttl_s=86401))


def test_p3_a_record_that_is_there_is_offered_for_import_and_one_in_the_way_is_named() -> None:
    wanted = resources(
        name("n1", "a", "A", "203.0.113.1"),
        name("n2", "b", "A", "203.0.113.2"),
        name("n3", "t", "TXT", "v=spf1 -all"),
        name("n4", "c", "CNAME", "x.example.org"),
    )
    listing = [
        {"id": "r1", "name": "a.gpu.example.org", "type": "A", "content": "203.0.113.1"},
        {"id": "r2", "name": "b.gpu.example.org", "type": "A", "content": "203.0.113.99"},
        {"id": "r3", "name": "t.gpu.example.org", "type": "TXT", "content": "v=spf1 -all"},
        {"id": "r4", "name": "c.gpu.example.org", "type": "A", "content": "203.0.113.3"},
    ]
    found = adopt.cloudflare_listing(wanted, listing, ZONE_ID)
    assert found.adopt == {"n1": f"{ZONE_ID}/r1", "n3": f"{ZONE_ID}/r3"}
    assert [sentence.split(":")[0] for sentence in found.taken] == ["n2", "n4"]
    adopted = resources(name("n1", "a", "A", "203.0.113.1"), settings=stack(adopt=found.adopt))
    assert adopted[0].adopt == f"{ZONE_ID}/r1"
    assert plan.compare([], adopted).changes[0].what is What.ADOPT


def test_p3_a_record_is_found_in_whatever_form_its_content_is_listed() -> None:
    srv = {"priority": 1, "weight": 2, "port": 22, "target": "xn--gre-6ka8i.example.org"}
    wanted = resources(
        name("n1", "a", "AAAA", "2001:db8::1"),
        name("n2", "b", "CNAME", "größe.example.org"),
        name("n3", "@", "MX", {"priority": 5, "target": "xn--gre-6ka8i.example.org"}),
        name("n4", "_ssh._tcp", "SRV", srv),
    )
    listing = [
        {"id": "r1", "name": "a.gpu.example.org", "type": "AAAA", "content": "2001:0DB8:0::1"},
        {"id": "r2", "name": "B.gpu.example.org.", "type": "CNAME", "content": "xn--gre-6ka8i.example.org"},
        {"id": "r3", "name": "gpu.example.org", "type": "MX", "content": "Größe.example.org.", "priority": 5},
        {"id": "r4", "name": "_ssh._tcp.gpu.example.org", "type": "SRV",
         "data": {**srv, "target": "größe.example.org."}},
    ]  # fmt: skip
    found = adopt.cloudflare_listing(wanted, listing, ZONE_ID)
    assert found.adopt == {f"n{i}": f"{ZONE_ID}/r{i}" for i in (1, 2, 3, 4)}
    assert (found.taken, found.unread) == ([], [])
    other = [{**listing[0], "content": "2001:db8::2"}, {**listing[2], "content": "not a name"}]
    assert adopt.cloudflare_listing(wanted, other, ZONE_ID).adopt == {}


@pytest.mark.parametrize(
    ("row", "logical", "there"),
    [
        (name("n", "x", "A", "203.0.113.1", in_zone="r53"), "n", "Z0123456789ABCDEFGHIJ_x.gpu.example.com_A"),
        (name("n", "x", "A", "203.0.113.1", in_zone="ali"), "n", "7890"),
        (name("n", "x", "A", "203.0.113.1", in_zone="pod"), "n", "gpu.example.net#123"),
        (opening("o", "203.0.113.0/24"), "g-aws.in.tcp.22.203.0.113.0-24", "sgr-0123"),
        (opening("o", "203.0.113.0/24", to="g-ten"), "g-ten.rules", "sg-0123"),
    ],
)
def test_p3_what_is_there_in_every_cloud_is_adopted_by_the_id_in_the_setting(
    row: dict[str, Any], logical: str, there: str
) -> None:
    made = {each.logical: each.adopt for each in resources(row, settings=stack(adopt={logical: there}))}
    assert {key: id_ for key, id_ in made.items() if id_} == {logical: there}


def test_p3_what_the_import_changes_is_told_before() -> None:
    wanted = resources(name("n1", "a", "A", "203.0.113.1"), name("n2", "b", "A", "203.0.113.2", ttl_s=300))
    row = {"type": "A", "ttl": 3600, "proxied": True, "comment": "by hand", "tags": ["team:a"]}
    listing = [
        {**row, "id": "r1", "name": "a.gpu.example.org", "content": "203.0.113.1"},
        {"id": "r2", "name": "b.gpu.example.org", "type": "A", "content": "203.0.113.2", "ttl": 300,
         "proxied": False, "comment": "RemoteGPU n2", "tags": []},
    ]  # fmt: skip
    found = adopt.cloudflare_listing(wanted, listing, ZONE_ID)
    assert found.adopt == {"n1": f"{ZONE_ID}/r1", "n2": f"{ZONE_ID}/r2"}
    assert found.changed == [
        "n1: ttl 3600 becomes 1",
        "n1: proxied True becomes False",
        "n1: comment 'by hand' becomes 'RemoteGPU n1'",
        "n1: its tags team:a go",
    ]


def test_p3_one_odd_record_of_the_zone_is_named_and_the_others_are_read() -> None:
    listing = [
        {"id": "r0", "name": "a..gpu.example.org", "type": "TXT", "content": "odd"},
        {"id": "r1", "name": "a.gpu.example.org", "type": "A", "content": "203.0.113.1"},
    ]
    found = adopt.cloudflare_listing(resources(name("n1", "a", "A", "203.0.113.1")), listing, ZONE_ID)
    assert found.adopt == {"n1": f"{ZONE_ID}/r1"}
    (sentence,) = found.unread
    assert "TXT 'a..gpu.example.org' of the zone is passed over" in sentence


@pytest.mark.parametrize(
    "answer",
    [
        {"success": False, "errors": [{"code": 9109}], "result": None},
        {"result": [{"id": "r1"}]},
        {"result": [], "result_info": {"page": 1, "total_pages": 2}},
        "text",
    ],
)
def test_p3_what_is_no_whole_listing_is_refused_with_a_sentence(answer: Any) -> None:
    with pytest.raises(BadDocument, match="The listing"):
        adopt.rows_of(answer)


def test_p3_an_id_of_something_else_is_stopped_before_it_is_overwritten() -> None:
    urn = "urn:pulumi:prod::remotegpu::cloudflare:index/dnsRecord:DnsRecord::n1"
    imported = {"op": "import", "urn": urn}
    same = {"op": "update", "urn": urn, "diffReasons": ["comment", "ttl"]}
    assert gate.problems({"steps": [imported, same]}, stack()) == []
    assert gate.problems({"steps": [{**same, "diffReasons": ["content"]}]}, stack()) == [], "a change like any other"
    (problem,) = gate.problems({"steps": [imported, {**same, "diffReasons": ["comment", "content", "name"]}]}, stack())
    assert problem.startswith("n1 would be imported and its content, name changed")
    replaced = [{"op": "replace", "urn": urn, "diffReasons": ["zoneId"]}, {"op": "create-replacement", "urn": urn}]
    (problem,) = gate.problems({"steps": [imported, *replaced]}, stack())
    assert "zoneId" in problem


def test_p18_a_group_is_not_adopted_since_it_would_be_replaced() -> None:
    with pytest.raises(BadDocument, match="enter sg-1 as its id instead"):
        resources(opening("o", "203.0.113.0/24"), settings=stack(adopt={"group.g-aws": "sg-1"}))


def test_p4_a_provider_that_wants_to_replace_everything_is_stopped_before_the_apply() -> None:
    urn = "urn:pulumi:prod::remotegpu::cloudflare:index/dnsRecord:DnsRecord::n{}"
    steps = [
        {"op": op, "urn": urn.format(i)}
        for i in range(30)
        for op in ("create-replacement", "replace", "delete-replaced")
    ]
    (problem,) = gate.problems({"steps": steps}, stack())
    assert "30 resources would be replaced (30 × cloudflare:index/dnsRecord:DnsRecord)" in problem
    assert gate.problems({"steps": steps[:60]}, stack()) == []


def test_p4_a_zone_is_never_deleted_or_replaced_by_an_apply() -> None:
    step = {"op": "delete", "urn": "urn:pulumi:prod::remotegpu::aws:route53/zone:Zone::zone.r53"}
    assert gate.problems({"steps": [step]}, stack()) == [
        "The zone zone.r53 would be deleted or replaced: that takes every name in it."
    ]
    assert gate.problems({}, stack()) == ["The preview has no steps: it did not run to its end."]


def test_p5_a_record_of_cloudflare_has_content_and_only_caa_data_has_a_value() -> None:
    assert "value" not in cloudflare.Record.__dataclass_fields__
    inputs = {
        "name": "a.example.org",
        "type": "A",
        "ttl": 1,
        "proxied": False,
        "value": "203.0.113.1",
        "content": "203.0.113.1",
    }
    assert any("`content`" in problem for problem in policy.problems(desired.CLOUDFLARE_RECORD, inputs))


@pytest.mark.parametrize(
    ("at", "whole"),
    [
        ("www", "www.gpu.example.org"),
        ("@", "gpu.example.org"),
        ("*", "*.gpu.example.org"),
        ("WWW", "www.gpu.example.org"),
    ],
)
def test_p6_the_name_is_whole_at_the_apex_and_for_a_wildcard_too(at: str, whole: str) -> None:
    assert shape(name("n", at, "A", "203.0.113.1")).name == whole
    assert shape(name("n", at, "A", "203.0.113.1", in_zone="r53")).name == whole.replace("org", "com")


@pytest.mark.parametrize(("at", "relative"), [("www", "www"), ("@", "@"), ("*", "*"), ("a.b", "a.b")])
def test_p6_alidns_and_dnspod_want_what_stands_before_the_zone(at: str, relative: str) -> None:
    assert shape(name("n", at, "A", "203.0.113.1", in_zone="ali")).rr == relative
    assert shape(name("n", at, "A", "203.0.113.1", in_zone="pod")).sub_domain == relative


def test_p7_caa_is_data_with_whole_numbers_and_no_content() -> None:
    made = shape(name("n", "@", "CAA", {"flags": 0, "tag": "issue", "value": "letsencrypt.org"}))
    assert (made.content, made.priority, made.caa) == (None, None, Caa(0, "issue", "letsencrypt.org"))
    aws_made = shape(
        name("n", "@", "CAA", {"flags": 128, "tag": "iodef", "value": "mailto:a@example.org"}, in_zone="r53")
    )
    assert aws_made.records == ('128 iodef "mailto:a@example.org"',)


def test_p8_srv_has_service_and_protocol_in_its_name_and_four_parts_of_data() -> None:
    value = {"priority": 5, "weight": 6, "port": 22, "target": "gpu-01.example.org"}
    made = shape(name("n", "_ssh._tcp", "SRV", value))
    assert (made.name, made.content, made.priority, made.srv) == (
        "_ssh._tcp.gpu.example.org", None, 5, Srv(5, 6, 22, "gpu-01.example.org"),
    )  # fmt: skip
    assert "_service._tcp.NAME" in refused(name("n", "ssh", "SRV", value))
    assert shape(name("n", "_ssh._tcp", "SRV", value, in_zone="ali")).value == "5 6 22 gpu-01.example.org"
    assert shape(name("n", "_ssh._tcp", "SRV", value, in_zone="pod")).value == "5 6 22 gpu-01.example.org."
    assert shape(name("n", "_ssh._tcp", "SRV", value, in_zone="r53")).records == ("5 6 22 gpu-01.example.org.",)


def test_p9_a_name_in_unicode_and_in_punycode_is_one_and_zones_match_in_both() -> None:
    rows = [zone("cf", name="größe.example.org"), zone("cf", name="xn--gre-6ka8i.example.org")]
    names = ["机器.größe.example.org.", "XN--M7R540B.xn--gre-6ka8i.EXAMPLE.org."]
    made = [only(row, name("n", at, "A", "203.0.113.1")) for row in rows for at in names]
    assert {each.shape.name for each in made if isinstance(each.shape, cloudflare.Record)} == {
        "xn--m7r540b.xn--gre-6ka8i.example.org"
    }
    assert plan.compare(made[:1], made[3:]).changes == ()


def test_p9_two_forms_of_one_zone_are_a_double() -> None:
    told = refused(zone("cf", name="größe.example.org"), zone("cf", key="cf2", name="xn--gre-6ka8i.example.org"))
    assert "stands twice" in told


@pytest.mark.parametrize("address", ["10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1"])
def test_p10_no_proxy_in_front_of_an_address_that_cloudflare_cannot_reach(address: str) -> None:
    assert "cannot reach" in refused(name("n", "x", "A", address, proxied=True))
    assert shape(name("n", "x", "A", address)).content == address


def test_p10_no_proxy_for_ula_text_mail_ssh_and_private_targets() -> None:
    assert "cannot reach" in refused(name("n", "x", "AAAA", "fd00::1", proxied=True))
    assert "TXT cannot be proxied" in refused(name("n", "x", "TXT", "x", proxied=True))
    assert "MX cannot be proxied" in refused(
        name("n", "x", "MX", {"priority": 1, "target": "m.example.org"}, proxied=True)
    )
    assert "for SSH" in refused(name("n", "x", "A", "8.8.8.8", proxied=True, purpose="ssh"))
    inside = name("n1", "inside", "A", "10.0.0.1")
    assert "a private address" in refused(inside, name("n2", "x", "CNAME", "inside.gpu.example.org", proxied=True))
    assert "only Cloudflare has a proxy" in refused(name("n", "x", "A", "8.8.8.8", proxied=True, in_zone="r53"))


@pytest.mark.parametrize(
    ("in_zone", "written"),
    [("cf", r'"say \"hi\" \\o/"'), ("r53", r"say \"hi\" \\o/"), ("ali", r'say "hi" \o/'), ("pod", r'say "hi" \o/')],
)
def test_p11_one_rule_of_quoting_a_cloud(in_zone: str, written: str) -> None:
    made = shape(name("n", "t", "TXT", r'say "hi" \o/', in_zone=in_zone))
    found = getattr(made, "content", None) or getattr(made, "value", None) or made.records[0]
    assert found == written


@pytest.mark.parametrize("in_zone", ["cf", "r53", "ali", "pod"])
def test_p12_renaming_a_machine_or_the_name_itself_deletes_no_record(in_zone: str) -> None:
    before = resources(name("m1.address", "gpu-01", "A", "203.0.113.1", in_zone=in_zone, machine="m1"))
    renamed = resources(
        name("m1.address", "gpu-01", "A", "203.0.113.1", in_zone=in_zone, machine="m1"), machines={"m1": "big-one"}
    )
    assert plan.compare(before, renamed).changes == ()
    moved = resources(name("m1.address", "big-one", "A", "203.0.113.1", in_zone=in_zone, machine="m1"))
    assert plan.compare(before, moved).count(What.DELETE) == 0
    assert plan.compare(before, moved).count(What.CREATE) == 0


def test_p12_another_key_for_the_same_slot_comes_with_an_alias_and_deletes_nothing() -> None:
    mx = [{"priority": 1, "target": "a.example.org"}, {"priority": 2, "target": "b.example.org"}]
    before = resources(name("old", "@", "MX", *mx))
    after = resources(name("new", "@", "MX", *mx, previous_keys=["old"]))
    assert [each.aliases for each in after] == [(each.logical,) for each in before]
    assert {change.what for change in plan.compare(before, after).changes} == {What.CHANGE}  # the comment has the key
    without = resources(name("new", "@", "MX", *mx))
    assert plan.compare(before, without).count(What.DELETE) == 2


@pytest.mark.parametrize(("length", "chunks"), [(254, 1), (255, 1), (256, 2), (510, 2), (511, 3)])
def test_p13_a_long_key_is_one_item_in_chunks_of_255(length: int, chunks: int) -> None:
    (record,) = shape(name("n", "k._domainkey", "TXT", "x" * length, in_zone="r53")).records
    assert [len(chunk) for chunk in record.split('""')] == [255] * (length // 255) + [length % 255] * (length % 255 > 0)
    assert len(record.split('""')) == chunks


def test_p14_alidns_has_no_dot_at_the_end_and_no_value_twice() -> None:
    made = resources(
        name(
            "n", "x", "MX", *({"priority": 5, "target": t} for t in ("m.example.org.", "M.example.org")), in_zone="ali"
        )
    )
    assert [each.shape for each in made] == [alidns.Record("x", "MX", "m.example.org", 600, 5, "RemoteGPU n")]
    assert shape(name("n", "x", "CNAME", "y.example.org.", in_zone="ali")).value == "y.example.org"
    assert "AliDNS takes 1 to 10" in refused(
        name("n", "x", "MX", {"priority": 20, "target": "m.example.org"}, in_zone="ali")
    )
    assert "AliDNS takes 600 s and more" in refused(name("n", "x", "A", "203.0.113.1", in_zone="ali", ttl_s=60))


def test_dnspod_targets_have_a_dot_and_the_line_is_named() -> None:
    made = shape(name("n", "x", "MX", {"priority": 20, "target": "m.example.org"}, in_zone="pod"))
    assert made == dnspod.Record("x", "MX", "m.example.org.", 600, 20, "RemoteGPU n")
    assert dnspod.LINE == "默认"


def test_p15_rules_are_resources_of_their_own_and_never_inside_the_group() -> None:
    assert not {"ingress", "egress"} & set(aws.SecurityGroup.__dataclass_fields__)
    inputs = {"namePrefix": "x-", "description": "x", "ingress": []}
    assert policy.problems(desired.AWS_GROUP, inputs) == [
        "no_inline_rules: rules inside the group: they are resources of their own"
    ]


def test_p16_what_machines_may_reach_is_said_once_and_can_be_left_to_aws() -> None:
    made = resources(group("g-aws"))
    assert [(each.logical, each.shape.cidr_ipv4, each.shape.cidr_ipv6) for each in made[1:]] == [  # type: ignore[union-attr]
        ("g-aws.out.all.ipv4", "0.0.0.0/0", None),
        ("g-aws.out.all.ipv6", None, "::/0"),
    ]
    assert len(resources(group("g-aws"), settings=stack(aws_egress=False))) == 1
    assert resources(group("g-aws", id="sg-0123")) == []  # not our group: only what is opened in it


def test_p17_a_second_source_is_a_second_rule_and_leaves_the_first_alone() -> None:
    before = resources(opening("o1", "10.0.0.0/8"))
    plan_ = plan.compare(before, resources(opening("o1", "10.0.0.0/8"), opening("o2", "192.0.2.0/24")))
    assert [(c.what, c.resource.logical) for c in plan_.changes] == [(What.CREATE, "g-aws.in.tcp.22.192.0.2.0-24")]


def test_p18_nothing_that_changes_is_in_what_replaces_a_group() -> None:
    before, after = resources(group("g-aws")), resources(group("g-aws", name="Other machines"))
    (change,) = plan.compare(before, after).changes
    assert (change.what, [field for field, _, _ in change.differences]) == (What.CHANGE, ["tags"])
    made = before[0].shape
    assert isinstance(made, aws.SecurityGroup)
    assert (made.name_prefix, made.description) == ("remotegpu-g-aws-", "RemoteGPU g-aws")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("GPU 机器", "GPU"), ("Größe d'été > 5", "Groe dete 5"), ("a\u2019b", "ab"), ("x" * 300, "x" * 255),
        ("机器", ""),
        ("a_b:c/(d)#,@[e]+=&;{}!$*", "a_b:c/(d)#,@[e]+=&;{}!$*"), ("ＧＰＵ\u3000one", "GPU one"), ("a\n\tb", "a b"),
    ],
)  # fmt: skip
def test_p19_a_description_has_only_letters_that_aws_takes(text: str, plain: str) -> None:
    assert aws.description(text) == plain


def test_p19_a_reason_in_chinese_leaves_a_description_that_aws_takes() -> None:
    (rule,) = rules(opening("o1", "0.0.0.0/0", 443, reason="客户漫游 (roaming) > office's"))
    assert rule.description == "RemoteGPU world: (roaming) offices"
    (rule,) = rules(opening("o1", "0.0.0.0/0", 443, reason="客户漫游"))
    assert rule.description == "RemoteGPU world:"
    assert aws.tag("GPU 机器 <1>") == "GPU 机器 1"


def test_p20_rules_are_counted_before_families_apart_groups_in_both() -> None:
    many = [opening(f"a{i}", f"10.0.{i}.0/24") for i in range(59)] + [
        opening(f"b{i}", f"2001:db8:{i:x}::/48") for i in range(59)
    ]
    assert len(rules(*many, opening("s", "sg-1"))) == 119
    told = refused(*many, opening("s", "sg-1"), opening("p", "pl-1"))
    assert "61 IPv4 rules, but AWS takes 60" in told
    assert "prefix list" in told
    assert len(rules(*many, opening("s", "sg-1"), opening("p", "pl-1"), settings=stack(aws_rules_per_group=61))) == 120


@pytest.mark.parametrize(
    ("to", "most", "setting", "told"),
    [
        ("g-ten", 100, "tencent_rules_per_group", "101 rules, but Tencent Cloud takes 100"),
        ("g-ali", 200, "alicloud_rules_per_group", "201 rules, but Alibaba Cloud takes 200"),
    ],
)
def test_p20_the_other_clouds_count_both_families_together(to: str, most: int, setting: str, told: str) -> None:
    many = [opening(f"a{i}", f"10.0.{i}.0/24", to=to) for i in range(most // 2)]
    many += [opening(f"b{i}", f"2001:db8:{i:x}::/48", to=to) for i in range(most // 2)]
    assert resources(*many)
    one_more = opening("one", "192.0.2.0/24", to=to)
    assert told in refused(*many, one_more)
    assert f"remotegpu:{setting.replace('_', '-')}" in refused(*many, one_more)
    assert resources(*many, one_more, settings=stack(**{setting: most + 1}))


@pytest.mark.parametrize(
    ("token", "inputs", "at_most", "told"),
    [
        (desired.TENCENT_RULES, [{"ingresses": [{}] * 2, "egresses": [{}] * 2}], 2, None),
        (desired.TENCENT_RULES, [{"ingresses": [{}] * 3}], 2, "more than 2 inbound rules in one group (at r0)"),
        (desired.ALICLOUD_RULE, [{"cidrIp": f"10.0.{i}.0/24"} for i in range(3)], 3, None),
        (
            desired.ALICLOUD_RULE,
            [{"cidrIp": f"10.0.{i}.0/24"} for i in range(3)],
            2,
            "more than 2 rules in one group (at r2)",
        ),
    ],
)
def test_p20_the_policy_counts_as_each_cloud_does(
    token: str, inputs: list[dict[str, Any]], at_most: int, told: str | None
) -> None:
    rows = [(token, f"r{i}", {"securityGroupId": "sg-1", **each}) for i, each in enumerate(inputs)]
    limits = stack(tencent_rules_per_group=at_most, alicloud_rules_per_group=at_most)
    assert policy.stack_problems(rows, limits) == ([told] if told else [])


def test_p21_networks_are_written_as_the_cloud_answers_them() -> None:
    assert [rule.cidr_ipv6 for rule in rules(opening("o", "2001:0DB8:0:0::/48"))] == ["2001:db8::/48"]
    with pytest.raises(openings.BadOpening, match="host bits"):
        openings.source("2001:db8::1/48")
    for text in ("2001:0db8::/48", "2001:db8::1/48", "fe80::1%eth0/128"):
        assert list(policy.networks_are_canonical(desired.AWS_INGRESS, {"cidrIpv6": text})), text
    assert not list(policy.networks_are_canonical(desired.AWS_INGRESS, {"cidrIpv6": "2001:db8::/48"}))


def test_p22_a_group_of_another_account_keeps_its_account_and_one_of_our_own_does_not() -> None:
    wanted = opening("o", "123456789012/sg-0abc")
    assert rules(wanted)[0].referenced_security_group_id == "123456789012/sg-0abc"
    own = rules(wanted, settings=stack(aws_account="123456789012"))
    assert own[0].referenced_security_group_id == "sg-0abc"


@pytest.mark.parametrize(
    ("source", "to", "fields", "told"),
    [
        ("123456789012/sg-0abc", "g-aws", {}, True),
        ("123456789012/sg-0abc", "g-aws", {"aws_account": "210987654321"}, False),
        ("123456789012/sg-0abc", "g-aws", {"clouds": ("cloudflare",)}, False),
        ("sg-0abc", "g-aws", {}, False),
        ("10.0.0.0/8", "g-aws", {}, False),
    ],
)
def test_p22_a_stack_that_does_not_know_its_own_account_says_so_where_a_rule_might_flip(
    source: str, to: str, fields: dict[str, Any], told: bool
) -> None:
    notes = desired.resources(parsed(opening("o", source, to=to)), stack(**fields)).notes
    assert [note.startswith("remotegpu:aws-account is not set") and source in note for note in notes] == [True] * told


def test_p22_the_command_and_the_stack_name_the_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = tmp_path / "export.json"
    export.write_text(json.dumps(sealed(opening("o", "123456789012/sg-0abc"))))
    for word in ("check", "plan"):
        assert command.main([word, str(export)]) == 0
        assert "note: remotegpu:aws-account is not set" in capsys.readouterr().err


def test_p23_a_rule_set_spells_out_protocol_and_port_and_keeps_its_order() -> None:
    rows = [
        opening("o1", "10.0.0.0/8", (80, 90), to="g-ten"),
        opening("o2", "192.0.2.0/24", None, to="g-ten"),
        opening("o3", "10.0.0.0/8", None, to="g-ten", protocol="icmp"),
    ]
    one, other = resources(*rows), resources(*reversed(rows))
    assert one[-1].shape == other[-1].shape
    made = one[-1].shape
    assert isinstance(made, tencent.RuleSet)
    assert [(rule.protocol, rule.port) for rule in made.ingresses] == [
        ("ALL", "all"),
        ("ICMP", "all"),
        ("TCP", "80-90"),
    ]
    assert all(rule.protocol and rule.port for rule in made.egresses)


def test_p24_protocol_numbers_are_names_and_none_of_them_is_everything() -> None:
    made = [rules(opening("o", "10.0.0.0/8", 22, protocol=text))[0] for text in ("6", "tcp", "TCP", "17")]
    assert [(rule.ip_protocol, rule.from_port, rule.to_port) for rule in made] == [("tcp", 22, 22)] * 3 + [
        ("udp", 22, 22)
    ]
    everything = rules(opening("o", "10.0.0.0/8", None, protocol="-1"))[0]
    assert (everything.ip_protocol, everything.from_port, everything.to_port) == ("-1", None, None)
    assert not any(each.token.startswith("aws-native") for each in resources(opening("o", "10.0.0.0/8")))


VALUES: dict[str, Any] = {
    "A": "203.0.113.1",
    "AAAA": "2001:DB8:0::1",
    "CNAME": "Größe.example.org.",
    "TXT": "v=spf1 -all",
    "MX": {"priority": 5, "target": "m.example.org"},
    "SRV": {"priority": 5, "weight": 6, "port": 22, "target": "h.example.org"},
    "CAA": {"flags": 128, "tag": "issue", "value": "letsencrypt.org"},
}
WRITTEN = {  # by zone, in the order of VALUES
    "cf": ["203.0.113.1", "2001:db8::1", "xn--gre-6ka8i.example.org", '"v=spf1 -all"', "m.example.org", None, None],
    "r53": ["203.0.113.1", "2001:db8::1", "xn--gre-6ka8i.example.org.", "v=spf1 -all", "5 m.example.org.",
            "5 6 22 h.example.org.", '128 issue "letsencrypt.org"'],
    "ali": ["203.0.113.1", "2001:db8::1", "xn--gre-6ka8i.example.org", "v=spf1 -all", "m.example.org",
            "5 6 22 h.example.org", '128 issue "letsencrypt.org"'],
    "pod": ["203.0.113.1", "2001:db8::1", "xn--gre-6ka8i.example.org.", "v=spf1 -all", "m.example.org.",
            "5 6 22 h.example.org.", '128 issue "letsencrypt.org"'],
}  # fmt: skip


@pytest.mark.parametrize("in_zone", WRITTEN)
def test_every_type_is_written_as_each_cloud_wants_it(in_zone: str) -> None:
    made = [shape(name("n", "_a._tcp" if kind == "SRV" else "x", kind, value, in_zone=in_zone))
            for kind, value in VALUES.items()]  # fmt: skip
    assert [each.type for each in made] == list(VALUES)
    field = {"cf": "content", "r53": "records"}.get(in_zone, "value")
    found = [getattr(each, field) for each in made]
    assert found == ([(text,) for text in WRITTEN["r53"]] if in_zone == "r53" else WRITTEN[in_zone])


def test_alibaba_rules_say_intranet_and_ports_only_where_there_are_any() -> None:
    rows = [
        opening("o1", "10.0.0.0/8", to="g-ali"),
        opening("o2", "2001:db8::/32", None, to="g-ali"),
        opening("o3", "sg-9", to="g-ali"),
    ]
    made = [each.shape for each in resources(*rows)[1:]]
    assert made == [
        alicloud.SecurityGroupRule("all", "-1/-1", "RemoteGPU o2", ipv6_cidr_ip="2001:db8::/32"),
        alicloud.SecurityGroupRule("tcp", "22/22", "RemoteGPU o1", cidr_ip="10.0.0.0/8"),
        alicloud.SecurityGroupRule("tcp", "22/22", "RemoteGPU o3", source_security_group_id="sg-9"),
    ]
    assert alicloud.VPC_NIC == "intranet"


def test_route53_holds_all_values_of_a_name_in_one_resource_in_a_stable_order() -> None:
    one = only(name("n", "x", "A", "203.0.113.2", "203.0.113.1", in_zone="r53"))
    other = only(name("n", "x", "A", "203.0.113.1", "203.0.113.2", in_zone="r53"))
    assert one.shape == other.shape == route53.Record("x.gpu.example.com", "A", 300, ("203.0.113.1", "203.0.113.2"))


def test_a_zone_without_an_id_is_told_before_anything_is_declared() -> None:
    told = refused(zone("cf", id=None), name("n", "x", "A", "203.0.113.1"))
    assert "has no id" in told
    made = resources(
        zone("cf", id=None), name("n", "x", "A", "203.0.113.1"), settings=stack(managed_zones={"cf": "acc"})
    )
    assert [(each.logical, each.protect, each.within) for each in made] == [
        ("zone.cf", True, None),
        ("n", False, "zone.cf"),
    ]


def test_a_stack_of_another_environment_refuses_the_export() -> None:
    assert refused(settings=stack(environment="staging")) == "an export of production, but the stack is of staging"


def test_a_stack_of_one_cloud_leaves_the_rest_to_others_and_says_so() -> None:
    rows = [
        name("n1", "x", "A", "203.0.113.1"),
        name("n2", "x", "A", "203.0.113.1", in_zone="r53"),
        opening("o", "10.0.0.0/8"),
    ]
    found = desired.resources(parsed(*rows), stack(clouds=("cloudflare",)))
    assert [each.logical for each in found.resources] == ["n1"]
    assert found.left_out == {"aws": 2}


@pytest.mark.parametrize(
    ("token", "key4", "key6"),
    [
        (desired.AWS_INGRESS, "cidrIpv4", "cidrIpv6"),
        (desired.ALICLOUD_RULE, "cidrIp", "ipv6CidrIp"),
        (desired.TENCENT_RULES, "cidrBlock", "ipv6CidrBlock"),
    ],
)
def test_the_policy_knows_the_same_world_as_the_document(token: str, key4: str, key6: str) -> None:
    def told(key: str, network: str, description: str = "RemoteGPU o1") -> list[str]:
        rule = {key: network, "description": description}
        inputs = {"ingresses": [rule]} if token == desired.TENCENT_RULES else rule
        return list(policy.the_world_has_a_reason(token, inputs))

    for key, networks in ((key4, ("0.0.0.0/0", "128.0.0.0/1", "0.0.0.0/7")), (key6, ("::/0", "8000::/1", "2000::/15"))):
        for network in networks:
            assert told(key, network) == [f"{network} is open to the world without a reason"]
            assert told(key, network, f"{aws.WORLD} roaming") == []
    assert told(key4, "10.0.0.0/8") == told(key6, "2001::/16") == []
    assert told(key4, "0.0.0.1/0") == [], "what is no network is told by the check of networks"


def test_the_policy_pack_has_every_check_and_refuses_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PACK.parent)
    made = {each.name: each for each in runpy.run_path(PACK.name)["policies"]()}
    assert set(made) == {check.__name__.replace("_", "-") for check in policy.CHECKS} | {"stack"}
    told: list[str] = []
    inputs = {"name": "www", "type": "A", "ttl": 1, "proxied": False, "content": "203.0.113.1"}
    args = SimpleNamespace(resource_type=desired.CLOUDFLARE_RECORD, props=inputs)
    made["names-are-whole"].validate(args, lambda problem, _urn=None: told.append(problem))
    assert told == ["name 'www' is not a full one"]


@pytest.mark.parametrize(("quota", "refused"), [("2", True), ("3", False)])
def test_the_policy_pack_counts_rules_to_the_number_of_the_stack(
    monkeypatch: pytest.MonkeyPatch, quota: str, refused: bool
) -> None:
    monkeypatch.chdir(PACK.parent)
    (pack,) = (each for each in runpy.run_path(PACK.name)["policies"]() if each.name == "stack")
    told: list[str] = []
    rules = [
        SimpleNamespace(
            resource_type=desired.AWS_INGRESS, name=f"r{i}",
            props={"securityGroupId": "sg-1", "fromPort": i, "toPort": i, "cidrIpv4": "10.0.0.1/32"},
        )
        for i in (1, 2, 3)
    ]  # fmt: skip
    config = {"remotegpu:environment": "production", "remotegpu:clouds": '["aws"]'}
    monkeypatch.setenv("PULUMI_CONFIG", json.dumps({**config, "remotegpu:aws-rules-per-group": quota}))
    for key, value in pulumi.runtime.get_config_env().items():  # as the pack's server does before it asks
        pulumi.runtime.set_config(key, value)
    pack.validate(SimpleNamespace(resources=rules), lambda problem, _urn=None: told.append(problem))
    assert told == (["more than 2 IPv4 rules in one group (at r3)"] if refused else [])
