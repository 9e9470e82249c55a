"""Names and what stands at them, with dnspython as the second opinion."""

from __future__ import annotations

import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_network import names, records
from remotegpu_network.records import BadRecord, Caa, Mx, Srv

LABEL = st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?\Z").filter(lambda label: label[2:4] != "--")
HOST = st.lists(LABEL, min_size=1, max_size=4).map(".".join).filter(lambda name: not name.rpartition(".")[2].isdigit())
UINT16 = st.integers(0, 65535)
TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=900)


def as_dnspython(kind: str, text: str) -> dns.rdata.Rdata:
    return dns.rdata.from_text(dns.rdataclass.IN, dns.rdatatype.from_text(kind), text, dns.name.root, relativize=False)


def agree(kind: str, value: records.Value) -> dns.rdata.Rdata:
    """dnspython reads what we write, and would write the same."""
    written = records.presentation(value, kind)
    read = as_dnspython(kind, written)
    assert read.to_text() == written
    return read


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_taken_as_dnspython_writes_it_or_leads_nowhere(address: object) -> None:
    try:
        value = records.parse("A", str(address))
    except BadRecord:
        with pytest.raises(BadRecord, match=r"leads nobody|is reserved"):
            records.parse("A", str(address))
    else:
        agree("A", value)


@given(st.ip_addresses(v=6), st.booleans())
def test_an_ipv6_address_is_shortened_from_every_form(address: object, upper: bool) -> None:
    long = address.exploded  # type: ignore[attr-defined]
    try:
        value = records.parse("AAAA", long.upper() if upper else long)
    except BadRecord:
        return
    assert agree("AAAA", value).to_text() == str(address)


@pytest.mark.parametrize(
    "text", ["999.1.1.1", "1.2.3", "01.2.3.4", "1.2.3.4 ", "1.2.3.4/32", "::1", "0x7f.1", "", "１.2.3.4"]
)
def test_what_is_no_ipv4_address_is_refused(text: str) -> None:
    with pytest.raises(BadRecord, match="no IPv4 address"):
        records.parse("A", text)


@pytest.mark.parametrize("text", ["0.0.0.0", "127.0.0.1", "224.0.0.1", "169.254.1.1", "255.255.255.255", "240.0.0.1"])
def test_an_address_that_leads_nobody_to_a_machine_is_refused(text: str) -> None:
    with pytest.raises(BadRecord):
        records.parse("A", text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("fe80::1%eth0", "interface"), ("::ffff:203.0.113.1", "A record with 203.0.113.1"), ("::1", "leads nobody"),
        ("ff02::1", "leads nobody"), ("fe80::1", "leads nobody"), ("2001:db8::/64", "no IPv6"), ("1.2.3.4", "no IPv6"),
    ],
)  # fmt: skip
def test_an_ipv6_address_that_no_record_may_hold_is_refused(text: str, why: str) -> None:
    with pytest.raises(BadRecord, match=why):
        records.parse("AAAA", text)


@given(HOST, UINT16)
def test_mx_is_read_by_dnspython_as_we_mean_it(host: str, priority: int) -> None:
    value = records.parse("MX", {"priority": priority, "target": host.upper() + "."})
    assert value == Mx(priority, host)
    read = agree("MX", value)
    assert (read.preference, read.exchange.to_text()) == (priority, host + ".")  # type: ignore[attr-defined]


@given(HOST, UINT16, UINT16, UINT16)
def test_srv_is_read_by_dnspython_as_we_mean_it(host: str, priority: int, weight: int, port: int) -> None:
    value = records.parse("SRV", {"priority": priority, "weight": weight, "port": port, "target": host})
    assert value == Srv(priority, weight, port, host)
    read = agree("SRV", value)
    assert (read.priority, read.weight, read.port) == (priority, weight, port)  # type: ignore[attr-defined]


@given(st.sampled_from([0, 128]), st.sampled_from(["issue", "issuewild", "ISSUE"]), TEXT)
def test_caa_is_read_by_dnspython_as_we_mean_it(flags: int, tag: str, content: str) -> None:
    value = records.parse("CAA", {"flags": flags, "tag": tag, "value": content})
    assert value == Caa(flags, tag.lower(), content)
    read = agree("CAA", value)
    assert (read.flags, read.tag, read.value) == (flags, tag.lower().encode(), content.encode())  # type: ignore[attr-defined]


def test_caa_iodef_is_a_place_to_write_to() -> None:
    records.parse("CAA", {"flags": 0, "tag": "iodef", "value": "mailto:security@example.org"})
    with pytest.raises(BadRecord, match="mailto:"):
        records.parse("CAA", {"flags": 0, "tag": "iodef", "value": "security@example.org"})


@given(TEXT)
def test_a_text_of_any_length_is_one_record_in_chunks_that_dnspython_joins_again(text: str) -> None:
    read = as_dnspython("TXT", records.presentation(records.parse("TXT", text), "TXT"))
    assert b"".join(read.strings).decode() == text  # type: ignore[attr-defined]
    assert all(len(chunk) <= 255 for chunk in read.strings)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["zwei\nZeilen", "größe", "a\x00b", "x" * 2049])
def test_a_text_that_no_cloud_keeps_as_it_is_is_refused(text: str) -> None:
    with pytest.raises(BadRecord):
        records.parse("TXT", text)


@given(HOST)
def test_a_cname_is_read_by_dnspython_as_we_mean_it(host: str) -> None:
    agree("CNAME", records.parse("CNAME", host))


@pytest.mark.parametrize("target", ["203.0.113.1", "*.example.org", "a b", "x..y", "-a.org", "a-.org", ".", "x y"])
def test_what_is_no_target_is_refused(target: str) -> None:
    with pytest.raises((BadRecord, names.BadName)):
        records.parse("CNAME", target)


@given(
    st.lists(
        st.text(st.characters(categories=["L", "N"], max_codepoint=0xFFFF), min_size=1, max_size=20),
        min_size=1,
        max_size=3,
    )
)
def test_a_name_in_any_script_becomes_one_that_stays_what_it_is(labels: list[str]) -> None:
    try:
        name = names.canonical(".".join(labels))
    except names.BadName:
        return
    assert name.isascii()
    assert name == name.lower()
    assert names.canonical(name) == name == names.canonical(name + ".") == names.canonical(name.upper())
    assert dns.name.from_text(name).to_text(omit_final_dot=True) == name


def test_unicode_and_punycode_are_one_name() -> None:
    forms = [
        "Größe.Example.org",
        "größe.example.org.",
        "xn--gre-6ka8i.example.org",
        "XN--GRE-6KA8I.EXAMPLE.ORG",
        "gro\u0308ße.example。org",
    ]
    assert {names.canonical(form) for form in forms} == {"xn--gre-6ka8i.example.org"}
    assert names.readable("xn--gre-6ka8i.example.org") == "größe.example.org"
    assert names.canonical("机器.example.org") == dns.name.from_unicode("机器.example.org").to_text(omit_final_dot=True)


@pytest.mark.parametrize(
    "text",
    ["", ".", "a..b", "a.-b", "*", "a.*.b", "x" * 64 + ".org", ".".join(["x" * 63] * 4), "xn--a-ecp.ru.xn--",
     "a b.org", "a/b", "☃.org"],
)  # fmt: skip
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(names.BadName):
        names.canonical(text)


def test_a_wildcard_and_an_underscore_stay() -> None:
    assert names.canonical("*.GPU.example.org") == "*.gpu.example.org"
    assert names.canonical("_acme-challenge.example.org") == "_acme-challenge.example.org"
    records.check_owner("TXT", "_acme-challenge.example.org")
    with pytest.raises(BadRecord, match="no underscores"):
        records.check_owner("A", "gpu_01.example.org")


def test_an_srv_record_names_service_and_protocol() -> None:
    records.check_owner("SRV", "_ssh._tcp.example.org")
    for wrong in ("ssh.example.org", "_ssh.example.org", "_ssh._icmp.example.org", "_ssh._tcp"):
        with pytest.raises(BadRecord, match=r"_service\._tcp\.NAME"):
            records.check_owner("SRV", wrong)
