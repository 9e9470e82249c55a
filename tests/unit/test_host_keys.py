"""Scanning host keys: what is no address never reaches a program, and what is no key is never shown."""

from __future__ import annotations

import base64
import subprocess

import pytest

from portal.errors import Invalid
from portal.integrations import host_keys


def key(kind: str, inside: str | None = None) -> str:
    name = (inside or kind).encode()
    return base64.b64encode(len(name).to_bytes(4, "big") + name + b"\0\0\0\x04abcd").decode()


@pytest.mark.parametrize(
    "address",
    ["", " ", "-oProxyCommand=id", "a b", "a;id", "$(id)", "a\nb", "a/b", "{{ 7*7 }}", "host_name", "a..b", "x" * 254],
)
def test_what_is_no_address_is_refused_and_starts_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_a, **_k: pytest.fail("a program was started"))
    with pytest.raises(Invalid) as refusal:
        host_keys.scan(address, 22)
    assert list(refusal.value.fields) == ["address"]


@pytest.mark.parametrize("port", [0, -1, 65536, True])
def test_what_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(Invalid) as refusal:
        host_keys.scan("192.0.2.1", port)
    assert list(refusal.value.fields) == ["ssh_port"]


def test_keys_are_parsed_best_first() -> None:
    rsa, ed25519 = key("ssh-rsa"), key("ssh-ed25519")
    text = f"# host:22 SSH-2.0-x\n[host]:2222 ssh-rsa {rsa}\n[host]:2222 ssh-ed25519 {ed25519} comment\n"
    assert [found["line"] for found in host_keys.parse(text)] == [f"ssh-ed25519 {ed25519}", f"ssh-rsa {rsa}"]


@pytest.mark.parametrize(
    "line",
    [
        "host ssh-dss AAAA",
        "host ssh-ed25519 not!base64",
        f"host ssh-ed25519 {key('ssh-ed25519', inside='ssh-rsa')}",
        "host ssh-ed25519",
        "",
        "ssh-ed25519 AAAA",
    ],
)
def test_what_is_no_key_is_left_out(line: str) -> None:
    assert host_keys.parse(line) == []
