"""The export: whole or refused, and every fault is named."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_network import document
from remotegpu_network.document import BadDocument
from tests.network.export import body, group, name, opening, parsed, sealed, zone

MACHINE = name("m1.address", "gpu-01", "A", "203.0.113.7", machine="m1", purpose="ssh")


def problems(*rows: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(BadDocument) as refused:
        parsed(*rows, **fields)
    return str(refused.value)


def test_what_was_sealed_is_read_as_it_was() -> None:
    text = json.dumps(sealed(MACHINE, opening("o1", "198.51.100.0/24")), ensure_ascii=False, indent=2)
    read = document.read(text.encode())
    assert [entry.key for entry in read.names] == ["m1.address"]
    assert [wanted.key for wanted in read.openings] == ["o1"]
    assert read.counts == {"machines": 1, "zones": 4, "groups": 1, "names": 1, "openings": 1}


def test_the_schema_is_one_that_other_readers_understand() -> None:
    schema = json.loads(document.SCHEMA_FILE.read_bytes())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(sealed(MACHINE, opening("o1", "198.51.100.0/24")))


@given(st.data())
def test_no_single_changed_byte_goes_unnoticed(data: st.DataObject) -> None:
    text = bytearray(json.dumps(sealed(MACHINE, opening("o1", "198.51.100.0/24"))).encode())
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.integers(32, 126).filter(lambda byte: byte != text[place]))
    before = json.loads(bytes(text))
    text[place] = other
    try:
        same = json.loads(bytes(text)) == before  # a space for a space's like
    except ValueError:
        same = False
    if not same:
        with pytest.raises(BadDocument):
            document.read(bytes(text))


@pytest.mark.parametrize("cut", [1, 100, 1000])
def test_a_document_that_was_cut_off_is_refused(cut: int) -> None:
    text = json.dumps(sealed(MACHINE)).encode()
    with pytest.raises(BadDocument, match="cut off"):
        document.read(text[:-cut])


def test_a_list_that_lost_a_row_is_named_by_its_count() -> None:
    whole = sealed(MACHINE, name("n2", "www", "A", "203.0.113.8"))
    whole["names"].pop()
    with pytest.raises(BadDocument, match=r"counts\.names says 2, but there are 1"):
        document.parse(whole)


def test_a_version_of_tomorrow_is_told_as_such() -> None:
    with pytest.raises(BadDocument, match="version 2 of the export; this program reads version 1"):
        document.parse({**sealed(MACHINE), "version": 2})


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b'{"a":1,"a":2}', b"\xff\xfe", b'{"a": NaN}', b"<html>503</html>"]
)
def test_what_is_no_export_is_refused(text: bytes) -> None:
    with pytest.raises(BadDocument):
        document.read(text)


@pytest.mark.parametrize("fields", [{"machines": [{"key": "m1", "name": "\ud800"}]}, {"generation": 2**70}])
def test_what_has_no_form_in_bytes_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadDocument, match="none that an export can have"):
        document.read(json.dumps({**sealed(MACHINE), **fields}))


def test_the_checksum_is_that_of_plain_json_with_sorted_keys() -> None:
    whole = sealed(MACHINE, name("n2", "端口", "TXT", '\t"\x7fü \u2028 \\ /'))
    rest = {key: value for key, value in whole.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert whole["checksum"] == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_every_fault_is_named_at_once() -> None:
    told = problems(
        name("a", "x_y", "A", "203.0.113.1"),
        name("b", "b", "A", "203.0.113.999"),
        opening("o1", "10.0.0.1/8"),
        opening("o2", "0.0.0.0/0"),
    )
    assert "a: " in told
    assert "b: '203.0.113.999' is no IPv4 address" in told
    assert "o1: source '10.0.0.1/8': 10.0.0.1/8 has host bits set" in told
    assert "o2: 0.0.0.0/0 opens to the world, and that needs a reason" in told


def test_a_thousand_faults_are_told_in_twenty_lines() -> None:
    told = problems(*(name(f"n{i}", f"n{i}", "A", "nonsense") for i in range(1000)))
    assert len(told.splitlines()) == 21
    assert told.endswith("… and 980 more")


def test_an_opening_to_the_world_with_a_reason_is_taken() -> None:
    assert parsed(opening("o1", "0.0.0.0/0", 443, reason="customers roam")).openings[0].reason == "customers roam"


@pytest.mark.parametrize("half", ["0.0.0.0/1", "128.0.0.0/1", "2000::/3", "::/1"])
def test_half_of_the_world_needs_a_reason_too(half: str) -> None:
    assert "needs a reason" in problems(opening("o1", half))


def test_a_name_outside_its_zone_is_refused_and_a_look_alike_too() -> None:
    assert "is not in the zone gpu.example.org" in problems(name("n", "gpu-01.example.org.", "A", "203.0.113.1"))
    assert "is not in the zone gpu.example.org" in problems(name("n", "notgpu.example.org.", "A", "203.0.113.1"))


def test_a_name_of_a_delegated_zone_is_refused_in_the_zone_above() -> None:
    below = zone("cf", key="below", name="lab.gpu.example.org")
    told = problems(zone("cf"), below, name("n", "a.b.lab", "A", "203.0.113.1"))
    assert "belongs to the zone lab.gpu.example.org" in told
    parsed(zone("cf"), below, name("n", "a.b.lab", "A", "203.0.113.1", zone="below"))


def test_one_name_and_type_has_one_entry_in_whatever_form_it_is_written() -> None:
    told = problems(name("a", "Größe", "A", "203.0.113.1"), name("b", "xn--gre-6ka8i", "A", "203.0.113.2"))
    assert told == "b: a already says what A records xn--gre-6ka8i.gpu.example.org has"


def test_the_same_name_in_two_clouds_is_no_double() -> None:
    twin = zone("r53", name="gpu.example.org")
    parsed(zone("cf"), twin, name("a", "x", "A", "203.0.113.1"), name("b", "x", "A", "203.0.113.1", zone="r53"))


def test_nothing_stands_beside_a_cname() -> None:
    told = problems(name("a", "x", "AAAA", "2001:db8::1"), name("b", "x", "CNAME", "y.example.org"))
    assert told == "a, b: nothing can stand beside a CNAME at x.gpu.example.org"


def test_a_cname_at_the_apex_is_for_cloudflare_alone() -> None:
    parsed(name("a", "@", "CNAME", "y.example.org"))
    assert "no CNAME at the apex" in problems(name("a", "@", "CNAME", "y.example.org", in_zone="r53"))


def test_keys_are_unique_and_machines_are_known() -> None:
    assert "names: the key a stands twice" in problems(
        name("a", "x", "A", "203.0.113.1"), name("a", "y", "A", "203.0.113.1")
    )
    assert "a: machine m9 is not in the export" in problems(name("a", "x", "A", "203.0.113.1", machine="m9"))
    assert "o: group g9 is not in the export" in problems(opening("o", "10.0.0.0/8", to="g9"), group("g-aws"))
    assert "n: zone z9 is not in the export" in problems(name("n", "x", "A", "203.0.113.1", zone="z9"))


def test_a_value_said_twice_is_said_once() -> None:
    entry = parsed(name("a", "x", "AAAA", "2001:DB8::1", "2001:db8:0::1")).names[0]
    assert entry.values == ("2001:db8::1",)


@pytest.mark.parametrize("field", ["environment", "checksum", "counts", "names", "generation"])
def test_a_missing_field_is_named(field: str) -> None:
    broken = sealed(MACHINE)
    del broken[field]
    with pytest.raises(BadDocument, match=field):
        document.parse(broken)


def test_a_field_that_nobody_knows_is_refused() -> None:
    with pytest.raises(BadDocument, match="comment"):
        document.parse(document.seal({**body(MACHINE), "comment": "x"}))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("A", {"priority": 1, "target": "x.org"}),
        ("MX", "mail.example.org"),
        ("CAA", {"flags": 1, "tag": "issue", "value": "x"}),
    ],
)
def test_a_value_of_another_type_is_refused(kind: str, value: Any) -> None:
    assert problems(name("a", "x", kind, value))


def test_a_cname_has_one_target() -> None:
    assert problems(name("a", "x", "CNAME", "a.org", "b.org")) == "a: a CNAME has one target"
