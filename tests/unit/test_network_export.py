"""The export: sealed, accepted by the stacks, the same for all who ask, and never stopped by one faulty row."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import peewee
import pytest

from portal import backup
from portal.db import atomic, db, utcnow
from portal.errors import Conflict, Invalid
from portal.integrations.network_format import desired, document, settings
from portal.models import DnsRecord, DnsZone, Grant, Lease, Machine, NetworkExport, Opening, SecurityGroup, Tenant
from portal.models.states import DNS_CLOUDS
from portal.services import (
    leases,
    machines,
    network,
    network_applied,
    network_drift,
    network_export,
    network_names,
    network_requests,
    network_views,
    network_zones,
    retirement,
)
from portal.services.actors import SYSTEM
from portal.services.network import NetworkFrozen
from remotegpu_network import guard
from tests.factories import actor_of, make_lease, make_machine
from tests.support.network import ZONE_ID, applied, export, group, outputs, wish, zone
from tests.support.rental import Host, allocate, ready_host

ROOT = Path(__file__).parents[2]


def want(zone: DnsZone, name: str, kind: str, *values: Any, **fields: Any) -> DnsRecord:
    return network_requests.want_record(zone, name=name, type=kind, values=list(values), by=SYSTEM, **fields)


def keys(content: dict[str, Any], part: str = "names") -> list[str]:
    return [row["key"] for row in content[part]]


def changed() -> int:
    """Rows were made behind the services' back."""
    with atomic():
        return network.changed()


# The document


def test_an_empty_portal_exports_an_empty_document_that_says_so(database: Any) -> None:
    content = export()
    assert document.parse(content).counts == dict.fromkeys(document.COUNTED, 0)
    assert (content["environment"], content["generation"]) == ("production", 0)


def test_the_same_bytes_for_all_who_ask_until_something_changes(database: Any) -> None:
    first = network_export.text_of(network_export.current())
    assert network_export.text_of(network_export.current()) == first
    zone()
    second = network_export.current()
    assert network_export.text_of(second) != first
    assert second.generation == json.loads(first)["generation"] + 1
    assert NetworkExport.select().count() == 2


def test_every_kind_of_row_is_in_it_and_the_stacks_take_it(database: Any, tenant: Tenant) -> None:
    holds = zone(serves_machines=True, serves_leases=True, ttl_s=300)
    machine = make_machine("gpu-17", address="192.0.2.17", state="leased", security_group=group())
    lease = make_lease(machine, tenant, login="lease9")
    want(holds, "jupyter.gpu.example.org", "CNAME", "gpu-17.gpu.example.org", machine=machine)
    want(holds, "gpu.example.org", "TXT", "v=spf1 -all")
    network_requests.open_port(machine, wish(), by=SYSTEM, lease=lease)
    network_requests.open_port(machine, wish(22, "0.0.0.0/0", reason="SSH"), by=SYSTEM)
    content = export()
    parsed = document.parse(content)
    assert set(keys(content)) == {"n1", "n2", "l9.address", f"m{machine.id}.address"}
    assert {each.key: (each.machine, each.lease) for each in parsed.names} == {
        "n1": (f"m{machine.id}", None),
        "n2": (None, None),
        "l9.address": (f"m{machine.id}", "l9"),
        f"m{machine.id}.address": (f"m{machine.id}", None),
    }
    assert {(each.key, each.lease, each.reason) for each in parsed.openings} == {
        ("o1", "l9", None), ("o2", None, "SSH"),
    }  # fmt: skip
    by_themselves = [each for each in parsed.names if "address" in each.key]
    assert {(each.ttl_s, each.purpose, each.proxied) for each in by_themselves} == {(300, "ssh", False)}, "P10"


@pytest.mark.parametrize(
    ("address", "public", "rows"),
    [
        ("10.0.0.7", None, {"address": ("A", "10.0.0.7")}),
        ("10.0.0.7", "203.0.113.7", {"address": ("A", "203.0.113.7")}),
        ("fd00::7", "203.0.113.7", {"address": ("A", "203.0.113.7")}),
        ("2001:4860::7", "93.184.216.34", {"address": ("A", "93.184.216.34"), "address6": ("AAAA", "2001:4860::7")}),
        ("93.184.216.34", "2001:4860::7", {"address6": ("AAAA", "2001:4860::7"), "address": ("A", "93.184.216.34")}),
        ("gpu.inside.example", None, {"address": ("CNAME", "gpu.inside.example")}),
        ("93.184.216.34", "gpu.example.com", {"address": ("CNAME", "gpu.example.com")}),
    ],
)
def test_a_machines_name_leads_to_its_public_address(
    database: Any, address: str, public: str | None, rows: dict[str, tuple[str, str]]
) -> None:
    zone(serves_machines=True)
    machine = make_machine("gpu-7", address=address, public_address=public)
    changed()
    assert {row["key"]: (row["type"], row["values"][0]) for row in export()["names"]} == {
        f"m{machine.id}.{slot}": value for slot, value in rows.items()
    }


def test_a_machine_that_is_renamed_keeps_its_key(database: Any) -> None:
    zone(serves_machines=True)
    machine = make_machine("gpu-7")
    changed()
    before = export()
    machines.edit(machine, name="gpu-seven", by=SYSTEM)
    after = export()
    assert keys(after) == keys(before)
    assert [row["name"] for row in after["names"]] == ["gpu-seven.gpu.example.org"]


def test_one_faulty_row_is_left_out_and_named_and_the_others_stay(database: Any) -> None:
    holds = zone(serves_machines=True)
    good, loop = make_machine("gpu-1", address="192.0.2.1"), make_machine("gpu-2", address="127.0.0.1")
    taken = make_machine("web", address="192.0.2.3")
    want(holds, "web.gpu.example.org", "A", "192.0.2.99")
    network_export.current()
    row = network_export.current()
    assert set(keys(export())) == {"n1", f"m{good.id}.address"}
    assert {each["key"]: each["reason"] for each in row.left_out} == {
        f"m{loop.id}.address": "127.0.0.1 leads nobody to a machine",
        f"m{taken.id}.address": "n1 stands at web.gpu.example.org already.",
    }


def test_whatever_the_tables_hold_every_stack_takes_the_export(database: Any) -> None:
    """Rows that an older portal let in, or that were fit until something else changed."""
    clouds = {cloud: zone(f"{cloud}.example.org", cloud=cloud, external_id="Z1") for cloud in DNS_CLOUDS}
    zone("inner.cloudflare.example.org")
    bad_group = SecurityGroup.create(name="old", cloud="alicloud", region="cn-shanghai")
    behind = make_machine("gpu-1", address="10.0.0.1", security_group=bad_group)
    fine = make_machine("gpu-2", address="10.0.0.2", security_group=group())
    network_requests.open_port(fine, wish(), by=SYSTEM)
    Opening.create(machine=behind, protocol="tcp", first_port=1, last_port=1, source="192.0.2.0/24")

    def row(cloud: str, name: str, kind: str, *values: Any, **fields: Any) -> str:
        at = f"{name}.{cloud}.example.org".lstrip(".")
        made = DnsRecord.create(zone=clouds[cloud], name=at, type=kind, values=list(values), **fields)
        return str(made.key)

    good = {
        row("cloudflare", "good", "A", "10.0.0.9"),
        row("aws", "", "TXT", "text", ttl_s=30),
        row("tencent", "m", "MX", {"priority": 20, "target": "mail.example.org"}),
    }
    faults = {
        row("cloudflare", "a.inner", "A", "192.0.2.1"): "belongs to the zone inner.cloudflare.example.org",
        row("cloudflare", "p", "CNAME", "good.cloudflare.example.org", proxied=True): "which is a private address",
        row("cloudflare", "t", "A", "192.0.2.1", ttl_s=30): "ttl 30 s: Cloudflare takes 60 s and more",
        row("alicloud", "t", "A", "192.0.2.1", ttl_s=60): "ttl 60 s: AliDNS takes 600 s and more",
        row(
            "alicloud", "m", "MX", {"priority": 11, "target": "mail.example.org"}
        ): "MX priority 11: AliDNS takes 1 to 10",
        row("tencent", "t", "A", "192.0.2.1", ttl_s=599): "ttl 599 s: DNSPod takes 600 s and more",
        row("aws", "", "CNAME", "other.example.org"): "no CNAME at the apex",
        row("aws", "p", "A", "192.0.2.1", proxied=True): "only Cloudflare has a proxy",
        row("aws", "x", "A", "192.0.2.256"): "no IPv4 address",
        bad_group.key: "needs its VPC",
        "o2": "Its security group g1 is left out.",
    }
    changed()
    content = export()
    parsed = document.parse(content)
    stack = settings.Settings(environment="production", clouds=settings.CLOUDS)
    assert desired.resources(parsed, stack).resources
    assert set(keys(content)) == good
    assert (keys(content, "groups"), keys(content, "openings")) == (["g2"], ["o1"])
    left_out = {each["key"]: each["reason"] for each in network_export.current().left_out}
    assert set(left_out) == set(faults)
    assert {key for key, part in faults.items() if part not in left_out[key]} == set()
    assert not network_export.refresh(), "what is left out is no change that nobody counted"


def test_an_export_that_no_stack_would_take_is_refused_and_not_a_fault_of_the_portal(database: Any) -> None:
    make_machine("gpu\n1")  # no form lets it in
    changed()
    with pytest.raises(network_export.ExportUnfit, match="No stack would take the export"):
        network_export.current()
    assert NetworkExport.select().count() == 0


def test_a_retired_machine_is_in_no_export_and_its_records_are_not(database: Any) -> None:
    holds = zone(serves_machines=True)
    machine = make_machine("gpu-1")
    want(holds, "extra.gpu.example.org", "A", "192.0.2.1", machine=machine)
    assert len(export()["names"]) == 2
    retirement.retire(machine, by=SYSTEM, reason="old")
    content = export()
    assert (content["names"], content["machines"]) == ([], [])


def test_openings_behind_no_group_are_of_the_host_alone(database: Any) -> None:
    network_requests.open_port(make_machine(), wish(), by=SYSTEM)
    assert export()["openings"] == []
    assert Opening.select().count() == 1


def test_a_change_that_nobody_counted_is_found_and_counted_once(database: Any) -> None:
    zone(serves_machines=True)
    before = export()["generation"]
    assert not network_export.refresh()
    make_machine("gpu-9")
    assert export()["names"] == []
    assert network_export.refresh()
    assert len(export()["names"]) == 1
    assert export()["generation"] == before + 1
    assert not network_export.refresh()


def test_a_change_while_it_is_built_is_in_the_document_or_in_the_next(
    database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone(serves_machines=True)
    real, built = network_export.body, list[int]()

    def disturbed(now: Any) -> Any:
        found = real(now)
        built.append(len(found.rows["names"]))
        if not db.in_transaction():  # else everybody waits for this one
            make_machine()
            changed()
        return found

    monkeypatch.setattr(network_export, "body", disturbed)
    row = network_export.current()
    assert built == [0, 1, 2, 3], "built anew while something changes, and at last held"
    assert row.generation == network.state().generation
    monkeypatch.undo()
    assert len(export()["names"]) == 3


def test_a_machine_that_was_never_used_is_deleted_with_all_that_it_wanted(database: Any) -> None:
    machine = make_machine()
    network_requests.open_port(machine, wish(), by=SYSTEM)
    want(zone(), "a.gpu.example.org", "A", "192.0.2.1", machine=machine)
    retirement.delete(machine, by=SYSTEM)
    assert (Opening.select().count(), DnsRecord.select().count(), export()["names"]) == (0, 0, [])


def test_documents_that_a_stack_has_applied_are_kept_longer_than_others(
    database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_export, "KEEP_COUNT", 2)
    zone()
    applied()
    in_use = network_export.current()
    for _ in range(5):
        changed()
        network_export.current()
    assert network_export.prune() == 0, "a pipeline may still have them at hand"
    assert network_export.prune(utcnow() + timedelta(days=3)) == 3
    kept = [row.generation for row in NetworkExport.select().order_by(NetworkExport.generation)]
    assert kept == [in_use.generation, in_use.generation + 4, in_use.generation + 5]
    assert network_applied.newest_export("production") == in_use


def test_the_number_of_queries_does_not_grow_with_the_fleet(database: Any, tenant: Tenant) -> None:
    zone(serves_machines=True, serves_leases=True)
    own_group = group()

    def queries(count: int) -> int:
        for _ in range(count):
            machine = make_machine(state="leased", security_group=own_group)
            lease = make_lease(machine, tenant)
            Opening.create(
                machine=machine, lease=lease, protocol="tcp", first_port=1, last_port=1, source="192.0.2.0/24"
            )
        asked: list[str] = []
        real = peewee.Database.execute_sql
        with pytest.MonkeyPatch.context() as patch:

            def counting(self: Any, sql: str, *args: Any, **kwargs: Any) -> Any:
                asked.append(sql)
                return real(self, sql, *args, **kwargs)

            patch.setattr(peewee.Database, "execute_sql", counting)
            network_export.body(utcnow())
        return len(asked)

    assert queries(2) == queries(20) < 15


# Leases that have ended


@pytest.fixture
def leased(database: Any, tenant: Tenant) -> tuple[Host, Lease]:
    """A lease whose name the stack has made."""
    zone(serves_leases=True)
    host = ready_host("gpu-17", address="192.0.2.17")
    lease = allocate(host, tenant)
    applied()
    return host, lease


def test_a_lease_that_ended_is_named_until_the_stacks_have_nothing_of_it(leased: tuple[Host, Lease]) -> None:
    host, lease = leased
    assert (keys(export()), export()["ended"]) == ([f"l{lease.id}.address"], [])
    leases.end(lease, by=SYSTEM, reason="done")
    assert (keys(export()), export()["ended"]) == ([], [f"l{lease.id}"])
    assert not network_export.refresh()
    host.sees(lease, "closed")
    applied()
    assert leases.get(lease.id).state == "ended"
    assert not network_export.refresh(), "no stack makes anything of it, so none has to be called"
    changed()
    assert export()["ended"] == []


def test_a_lease_that_was_written_off_has_ended_too(leased: tuple[Host, Lease]) -> None:
    _, lease = leased
    leases.write_off(lease, by=SYSTEM, reason="the host has burnt down")
    assert leases.get(lease.id).state == "ended"
    assert export()["ended"] == [f"l{lease.id}"]
    changed()
    applied()
    changed()
    assert export()["ended"] == []


def test_a_lease_that_goes_on_under_its_key_has_not_ended(leased: tuple[Host, Lease], tenant: Tenant) -> None:
    _, lease = leased
    leases.write_off(lease, by=SYSTEM, reason="CI is gone")
    make_lease(lease.machine, tenant, continues=lease, login=lease.login)
    changed()
    assert export()["ended"] == []


def test_what_a_database_of_before_the_lease_gives_out_is_a_loss(leased: tuple[Host, Lease]) -> None:
    """The guard counts what was the lease's, since nothing says that it has ended."""
    _, lease = leased
    before = document.parse(export())
    leases.end(lease, by=SYSTEM, reason="done")
    stack = settings.Settings(environment="production", clouds=settings.CLOUDS, may_lose=0)
    guard.check(document.parse(export()), stack, guard.of_document(before, stack))
    Grant.delete().where(Grant.lease == lease).execute()
    Lease.delete().where(Lease.id == lease.id).execute()
    changed()
    with pytest.raises(guard.Refused, match="1 of 1 names"):
        guard.check(document.parse(export()), stack, guard.of_document(before, stack))


# Records


@pytest.mark.parametrize(
    ("name", "kind", "values", "field"),
    [
        ("bad_name.gpu.example.org", "A", ["192.0.2.1"], "name"),
        ("a..gpu.example.org", "A", ["192.0.2.1"], "name"),
        ("x" * 64 + ".gpu.example.org", "A", ["192.0.2.1"], "name"),
        ("xn--a.gpu.example.org", "A", ["192.0.2.1"], "name"),
        ("other.example.com", "A", ["192.0.2.1"], "name"),
        ("notgpu.example.org", "A", ["192.0.2.1"], "name"),
        ("www.gpu.example.org", "SRV", [{"priority": 1, "weight": 1, "port": 80, "target": "a.b"}], "name"),
        ("www.gpu.example.org", "A", ["192.0.2.256"], "values.0"),
        ("www.gpu.example.org", "A", ["192.0.2.1", "::1"], "values.1"),
        ("www.gpu.example.org", "A", [7], "values.0"),
        ("www.gpu.example.org", "AAAA", ["::ffff:192.0.2.1"], "values.0"),
        ("www.gpu.example.org", "MX", [{"priority": 10}], "values.0"),
        ("www.gpu.example.org", "MX", ["10 mail.example.org"], "values.0"),
        ("www.gpu.example.org", "CNAME", ["a.example.org", "b.example.org"], "name"),
        ("www.gpu.example.org", "TXT", ["two\nlines"], "values.0"),
        ("www.gpu.example.org", "A", [], "values"),
        ("www.gpu.example.org", "AAAA", ["fe80::1%eth0"], "values.0"),
        ("deep.inner.gpu.example.org", "A", ["192.0.2.1"], "name"),
    ],
)
def test_a_record_that_a_stack_would_refuse_is_refused_by_its_field(
    database: Any, name: str, kind: str, values: list[Any], field: str
) -> None:
    holds = zone()
    zone("inner.gpu.example.org")
    with pytest.raises(Invalid) as refused:
        want(holds, name, kind, *values)
    assert list(refused.value.fields) == [field]
    assert DnsRecord.select().count() == 0


def test_what_only_a_clouds_own_rules_forbid_is_refused_here_already(database: Any) -> None:
    holds = zone()
    with pytest.raises(Invalid, match="Cloudflare cannot reach"):
        want(holds, "www.gpu.example.org", "A", "10.0.0.1", proxied=True)
    with pytest.raises(Invalid):
        want(zone("gpu.example.com", cloud="aws"), "www.gpu.example.com", "A", "192.0.2.1", proxied=True)
    with pytest.raises(Invalid):
        want(network_zones.get_zone(2), "gpu.example.com", "CNAME", "other.example.org")


@pytest.mark.parametrize(
    ("name", "kind", "given", "kept"),
    [
        ("Größe.GPU.example.org.", "A", "192.0.2.1", ("xn--gre-6ka8i.gpu.example.org", "192.0.2.1")),
        ("a.gpu.example.org", "AAAA", "2001:DB8:0::1", ("a.gpu.example.org", "2001:db8::1")),
        ("a.gpu.example.org", "CNAME", "Other.Example.Org.", ("a.gpu.example.org", "other.example.org")),
        (
            "gpu.example.org", "MX", {"priority": 10, "target": "Mail.Example.Org."},
            ("gpu.example.org", {"priority": 10, "target": "mail.example.org"}),
        ),
        (
            "gpu.example.org", "CAA", {"flags": 0, "tag": "Issue", "value": "letsencrypt.org"},
            ("gpu.example.org", {"flags": 0, "tag": "issue", "value": "letsencrypt.org"}),
        ),
    ],
)  # fmt: skip
def test_a_record_is_kept_in_one_form(database: Any, name: str, kind: str, given: Any, kept: Any) -> None:
    record = want(zone(), name, kind, given)
    assert (record.name, record.values[0]) == kept
    assert document.parse(export()).names[0].name == kept[0]


def test_a_value_that_is_given_twice_stands_once(database: Any) -> None:
    assert want(zone(), "a.gpu.example.org", "AAAA", "2001:db8::1", "2001:DB8::1").values == ["2001:db8::1"]


def test_a_name_and_type_is_taken_once_and_free_again_when_removed(database: Any) -> None:
    holds = zone()
    record = want(holds, "a.gpu.example.org", "A", "192.0.2.1")
    for kind, values in (("A", ["192.0.2.2"]), ("CNAME", ["b.example.org"])):
        with pytest.raises((Conflict, Invalid)):
            want(holds, "A.gpu.example.org", kind, *values)
    network_requests.remove_record(record, by=SYSTEM)
    assert want(holds, "a.gpu.example.org", "CNAME", "b.example.org").key != record.key


def test_a_name_in_unicode_and_in_punycode_is_taken_as_one(database: Any) -> None:
    holds = zone()
    want(holds, "größe.gpu.example.org", "A", "192.0.2.1")
    for form in ("xn--gre-6ka8i.gpu.example.org", "GRÖẞE.gpu.example.org", "gro\u0308ße.gpu.example.org."):
        with pytest.raises((Conflict, Invalid), match=r"already"):
            want(holds, form, "A", "192.0.2.2")
    assert [record.name for record in DnsRecord.select()] == ["xn--gre-6ka8i.gpu.example.org"]


def test_an_edited_record_keeps_its_key_and_says_nothing_when_nothing_changes(database: Any) -> None:
    record = want(zone(), "a.gpu.example.org", "A", "192.0.2.1")
    generation = network.state().generation
    network_requests.edit_record(record, values=["192.0.2.1"], by=SYSTEM)
    assert network.state().generation == generation
    edited = network_requests.edit_record(record, name="b.gpu.example.org", values=["192.0.2.2"], by=SYSTEM)
    assert (edited.key, edited.name, network.state().generation) == ("n1", "b.gpu.example.org", generation + 1)


# Zones


def test_a_zone_is_there_once_in_a_cloud_whatever_its_spelling(database: Any) -> None:
    zone("größe.example")
    with pytest.raises(Conflict) as refused:
        zone("XN--GRE-6KA8I.example.")
    assert refused.value.code == "zone_exists"
    zone("größe.example", cloud="aws", external_id="Z1")
    for fields in ({"name": "*.example.org"}, {"name": "a b"}, {"external_id": "a/b"}, {"ttl_s": 5}, {"cloud": "gcp"}):
        with pytest.raises(Invalid) as invalid:
            zone(**fields)
        assert list(invalid.value.fields) == list(fields)


def test_one_zone_serves_machines_and_one_serves_leases(database: Any) -> None:
    zone(serves_machines=True, serves_leases=True)
    other = zone("gpu.example.com")
    for serves in ("serves_machines", "serves_leases"):
        with pytest.raises(Conflict) as refused:
            network_zones.edit_zone(other, by=SYSTEM, **{serves: True})
        assert refused.value.code == "zone_serves"


def test_a_zone_that_holds_names_is_not_deleted(database: Any) -> None:
    holds = zone(serves_leases=True)
    with pytest.raises(Conflict):
        network_zones.delete_zone(holds, by=SYSTEM)
    network_zones.edit_zone(holds, serves_leases=False, by=SYSTEM)
    record = want(holds, "a.gpu.example.org", "A", "192.0.2.1")
    with pytest.raises(Conflict):
        network_zones.delete_zone(holds, by=SYSTEM)
    network_requests.remove_record(record, by=SYSTEM)
    network_zones.delete_zone(holds, by=SYSTEM)
    assert DnsZone.select().count() == 0


@pytest.mark.parametrize(
    ("cloud", "ttl_s", "is_taken"),
    [
        ("cloudflare", 59, False),
        ("cloudflare", 60, True),
        ("aws", 30, True),
        ("alicloud", 599, False),
        ("alicloud", 600, True),
        ("tencent", 599, False),
        ("tencent", 600, True),
    ],
)
def test_a_zone_has_no_shorter_ttl_than_its_provider_takes(
    database: Any, cloud: str, ttl_s: int, is_taken: bool
) -> None:
    plain = zone("gpu.example.com", cloud=cloud, external_id="Z1")
    if is_taken:
        assert zone(cloud=cloud, ttl_s=ttl_s).ttl_s == ttl_s
        assert network_zones.edit_zone(plain, ttl_s=ttl_s, by=SYSTEM).ttl_s == ttl_s
        return
    attempts: list[Callable[[], object]] = [
        lambda: zone(cloud=cloud, ttl_s=ttl_s),
        lambda: network_zones.edit_zone(plain, ttl_s=ttl_s, by=SYSTEM),
    ]
    for attempt in attempts:
        with pytest.raises(Invalid, match=f"ttl {ttl_s} s") as refused:
            attempt()
        assert list(refused.value.fields) == ["ttl_s"]
    assert [each.ttl_s for each in DnsZone.select()] == [None]
    with pytest.raises(Invalid) as refused:
        want(plain, "a.gpu.example.com", "A", "192.0.2.1", ttl_s=ttl_s)
    assert list(refused.value.fields) == ["ttl_s"]


def test_a_zone_below_another_is_refused_while_names_lie_in_it(database: Any) -> None:
    holds = zone(serves_machines=True)
    record = want(holds, "deep.inner.gpu.example.org", "A", "192.0.2.1")
    machine = make_machine("inner")
    generation = network.state().generation
    with pytest.raises(Invalid) as refused:
        zone("inner.gpu.example.org")
    (told,) = refused.value.fields["name"]
    assert (f"{record.key}: " in told, f"m{machine.id}.address: " in told) == (True, True)
    assert (DnsZone.select().count(), network.state().generation) == (1, generation)
    assert len(export()["names"]) == 2
    zone("inner.gpu.example.org", cloud="aws", external_id="Z1")  # another provider's has nothing to do with it
    network_requests.remove_record(record, by=SYSTEM)
    machines.edit(machine, name="outer", by=SYSTEM)
    zone("inner.gpu.example.org")
    machines.edit(machine, name="inner", by=SYSTEM)  # the other way round: the export goes out without its name
    assert export()["names"] == []
    assert [each["key"] for each in network_export.current().left_out] == [f"m{machine.id}.address"]


# Security groups


@pytest.mark.parametrize("cloud", ["aws", "alicloud"])
def test_a_group_that_a_stack_makes_needs_its_network(database: Any, cloud: str) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: group(cloud=cloud, vpc=None),
        lambda: group(cloud=cloud, vpc=""),
        lambda: network_zones.edit_group(group(cloud=cloud), vpc=None, by=SYSTEM),
        lambda: network_zones.edit_group(
            group("b", cloud=cloud, vpc=None, external_id="sg-1"), external_id=None, by=SYSTEM
        ),
    ]
    for attempt in attempts:
        with pytest.raises(Invalid, match="needs its VPC") as refused:
            attempt()
        assert list(refused.value.fields) == ["vpc"]
    assert [(each.vpc, each.external_id) for each in SecurityGroup.select().order_by(SecurityGroup.id)] == [
        ("vpc-1", None), (None, "sg-1"),
    ]  # fmt: skip


@pytest.mark.parametrize("change", [{"vpc": "vpc-2"}, {"external_id": "sg-1"}])
def test_p18_a_group_with_machines_behind_it_is_not_replaced(database: Any, change: dict[str, str]) -> None:
    used = group()
    machine = make_machine(security_group=used)
    with pytest.raises(Conflict, match="1 machines stand behind gpus") as refused:
        network_zones.edit_group(used, by=SYSTEM, **change)
    assert refused.value.code == "group_in_use"
    assert network_zones.edit_group(used, name="gpu hosts", vpc="vpc-1", by=SYSTEM).name == "gpu hosts"
    Machine.update(security_group=None).where(Machine.id == machine.id).execute()
    edited = network_zones.edit_group(used, by=SYSTEM, **change)
    assert {name: getattr(edited, name) for name in change} == change


def test_what_replaces_no_group_in_the_cloud_is_changed_with_machines_behind_it(database: Any) -> None:
    there_before = group(vpc=None, external_id="sg-1")
    make_machine(security_group=there_before)
    assert network_zones.edit_group(there_before, vpc="vpc-1", by=SYSTEM).vpc == "vpc-1"
    never_made = SecurityGroup.create(name="old", cloud="aws", region="eu-central-1")
    make_machine(security_group=never_made)
    assert network_zones.edit_group(never_made, vpc="vpc-1", by=SYSTEM).vpc == "vpc-1"


def test_a_group_of_tencent_needs_none(database: Any) -> None:
    made = group(cloud="tencent", vpc=None)
    assert keys(export(), "groups") == [made.key]


# Applied, and drift


def test_desired_and_applied_are_told_apart_by_cloud_with_who_asked(database: Any, operator: Any) -> None:
    cloudflare, aws = zone(), zone("gpu.example.com", cloud="aws", external_id="Z1")
    same = want(cloudflare, "same.gpu.example.org", "A", "192.0.2.1")
    other = want(cloudflare, "other.gpu.example.org", "A", "192.0.2.2")
    gone = want(cloudflare, "gone.gpu.example.org", "A", "192.0.2.3")
    elsewhere = want(aws, "same.gpu.example.com", "A", "192.0.2.4")
    applied(clouds=("cloudflare",))
    network_requests.edit_record(other, values=["192.0.2.9"], by=SYSTEM)
    network_requests.remove_record(gone, by=SYSTEM)
    new = network_requests.want_record(
        cloudflare, name="new.gpu.example.org", type="A", values=["192.0.2.5"], by=actor_of(operator)
    )
    found = network_drift.compare()
    assert {each.key: each.state for each in found.entries} == {
        same.key: "applied", other.key: "to_change", gone.key: "to_remove", new.key: "to_make",
        elsewhere.key: "to_make",
    }  # fmt: skip
    assert found.counts == {"applied": 1, "to_change": 1, "to_remove": 1, "to_make": 2, "unknown": 0}
    assert network_drift.who_asked(found.entries)[new.key].by == "olga"
    assert [each.key for each in network_drift.compare(only="to_remove").entries] == [gone.key]


def test_what_a_stack_says_again_is_no_news(database: Any) -> None:
    zone()
    told = outputs()
    first, is_news = network_applied.note("production", told, by=SYSTEM)
    again, is_news_again = network_applied.note("production", told, by=SYSTEM)
    assert (first.id, is_news, is_news_again) == (again.id, True, False)


def test_the_same_apply_after_one_that_failed_ends_the_failure(database: Any) -> None:
    """A pipeline that was mended applies the same export again."""
    zone()
    told, why = outputs(), {"outcome": "failed", "reason": "The engine's apply failed."}
    assert network_applied.note("production", told, by=SYSTEM)[1]
    network_applied.note("other", told, by=SYSTEM)
    network_applied.note("production", told, by=SYSTEM, **why)
    failed = {stack.name: stack.failed is not None for stack in network_views.standing().stacks}
    assert failed == {"production": True, "other": False}
    assert [network_applied.note("production", told, by=SYSTEM)[1] for _ in range(2)] == [True, False]
    assert [stack.failed for stack in network_views.standing().stacks] == [None, None]


@pytest.mark.parametrize(
    ("stack", "change", "field"),
    [
        ("../etc", {}, "stack"),
        ("production", {"checksum": "x"}, "network.checksum"),
        ("production", {"environment": "staging"}, "network.environment"),
        ("production", {"clouds": ["gcp"]}, "network.clouds"),
        ("production", {"clouds": []}, "network.clouds"),
        ("production", {"generation": 2_000_000}, "network.generation"),
        ("production", {"resources": {"x" * 300_000: 1}}, "body"),
    ],
)
def test_what_a_stack_cannot_have_said_is_refused_by_its_field(
    database: Any, stack: str, change: dict[str, Any], field: str
) -> None:
    with pytest.raises(Invalid) as refused:
        network_applied.note(stack, outputs(**change), by=SYSTEM)
    assert list(refused.value.fields) == [field]


def test_a_stack_that_is_ahead_of_the_portal_is_caught_up_with(database: Any) -> None:
    zone()
    network_applied.note("production", outputs(generation=500, checksum="sha256:" + "1" * 64), by=SYSTEM)
    assert network.state().generation == 501


def test_since_when_a_stack_is_behind_is_known_until_all_have_applied(database: Any) -> None:
    zone()
    applied(stack="a")
    assert network.state().behind_since is None
    zone("gpu.example.com")
    since = network.state().behind_since
    zone("gpu.example.net")
    assert network.state().behind_since == since is not None
    applied(stack="b", clouds=("aws",))
    assert network.state().behind_since is not None, "a has still to apply it"
    applied(stack="a")
    assert network.state().behind_since is None


def test_a_stack_that_goes_on_does_not_hide_one_that_does_not(database: Any) -> None:
    zone()
    applied(stack="a")
    applied(stack="b", clouds=("aws",))
    zone("gpu.example.com")
    since = network.state().behind_since
    applied(stack="a")
    zone("gpu.example.net")
    applied(stack="a")
    assert network.state().behind_since == since is not None, "b has applied neither"


def test_nobody_waits_for_a_stack_whose_cloud_is_another_ones_now(database: Any) -> None:
    zone()
    applied(stack="of-before")
    zone("gpu.example.com")
    applied(stack="renamed")
    assert network.state().behind_since is None


# Restored from a backup


def test_a_restored_portal_gives_no_export_out_before_an_operator_has_compared(database: Any, tmp_path: Path) -> None:
    holds = zone(serves_machines=True)
    make_machine("gpu-1")
    changed()
    applied()
    file = tmp_path / "portal.backup"
    backup.backup(file)
    lost = want(holds, "lost.gpu.example.org", "A", "192.0.2.9")
    applied()
    generation = network.state().generation
    backup.restore(file, force=True)
    with pytest.raises(NetworkFrozen, match="restored from a backup"):
        network_export.current()
    assert network_drift.compare().entries, "what there is to compare can be seen"
    with pytest.raises(Invalid):
        network.thaw(by=SYSTEM, reason="")
    network.thaw(by=SYSTEM, reason="lost.gpu.example.org is not needed")
    content = export()
    assert content["generation"] > generation, "no stack refuses it as older than what it applied"
    assert lost.key not in keys(content)
    with pytest.raises(Conflict):
        network.thaw(by=SYSTEM, reason="again")


def test_a_portal_that_never_gave_one_out_has_nothing_to_compare(database: Any, tmp_path: Path) -> None:
    make_machine(gateway=make_machine(forward_ports="20000-20999", public_address="192.0.2.1"))
    file = tmp_path / "portal.backup"
    backup.backup(file)
    backup.restore(file, force=True)
    assert network_export.current().generation == network.state().generation
    assert Machine.select().where(Machine.gateway.is_null(False)).count() == 1


def test_a_gateway_that_comes_after_those_behind_it_is_restored(database: Any, tmp_path: Path) -> None:
    behind = make_machine()
    gateway = make_machine(forward_ports="20000-20999", public_address="192.0.2.1")
    Machine.update(gateway=gateway).where(Machine.id == behind.id).execute()
    file = tmp_path / "portal.backup"
    backup.backup(file)
    backup.restore(file, force=True)
    assert Machine.get_by_id(behind.id).gateway_id == gateway.id


# One meaning of valid


def test_the_portal_finds_the_stacks_rules_without_a_path_and_brings_no_engine() -> None:
    program = (
        "import sys; sys.path = [each for each in sys.path if not each.endswith('pulumi')];"
        "from portal.integrations import network_format as rules;"
        "print(rules.names.canonical('Größe.example'), 'pulumi.runtime' in sys.modules, 'policy' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["xn--gre-6ka8i.example", "False", "False"]


def test_a_zone_id_that_the_portal_takes_fits_the_schema(database: Any) -> None:
    zone(external_id=ZONE_ID)
    group(external_id="sg-0123456789abcdef0", vpc=None)
    assert document.parse(export()).zones["z1"].id == ZONE_ID
    assert network_names.find_zone(of="leases") is None
