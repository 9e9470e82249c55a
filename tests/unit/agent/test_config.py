"""Settings and the credential: refused early and clearly, and no call without TLS."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent import credential as credential_module
from remotegpu_agent.config import Config, ConfigError, load, parse
from remotegpu_agent.credential import Credential
from remotegpu_agent.portal import Endpoint, Portal, PortalError, Refused


def test_the_address_of_the_portal_is_all_that_must_be_given(tmp_path: Path) -> None:
    path = tmp_path / "agent.json"
    path.write_text(json.dumps({"portal_url": "https://portal.example:8443", "ca_file": None, "machine_id": 3}))
    config = load(path)
    assert (config.portal_url, config.ca_file, config.machine_id) == ("https://portal.example:8443", None, 3)
    assert config.state_dir == Path("/var/lib/remotegpu-agent")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "portal_url is missing"),
        ({"portal_url": "https://x", "portal": 1}, "unknown field portal"),
        ({"portal_url": 3}, "portal_url must be a string"),
        ({"portal_url": "http://portal.example"}, "plain http is allowed on loopback only; use https://portal.example"),
        ({"portal_url": "http://127.0.0.1.example"}, "plain http"),
        ({"portal_url": "ftp://x"}, "is not an address"),
        ({"portal_url": "https://"}, "is not an address"),
        ({"portal_url": "https://x/api"}, "without a path"),
        ({"portal_url": "https://x", "ca_file": 1}, "ca_file must be a string"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(value: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(value)
    assert said in str(caught.value)


def test_a_host_that_knows_no_portal_yet_can_be_asked_and_ends_its_leases(tmp_path: Path) -> None:
    assert load(tmp_path / "agent.json") == parse({"portal_url": ""})


def test_settings_that_are_no_object_say_what_to_write(tmp_path: Path) -> None:
    path = tmp_path / "agent.json"
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"write at least .*portal_url"):
        load(path)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[::1]:1", "http://localhost:1"])
def test_plain_http_is_for_loopback(url: str) -> None:
    assert parse({"portal_url": url}).portal_url == url
    with pytest.raises(PortalError):
        Portal(Endpoint(url, None, None)).call("/", {}, credential="x")


def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    connection = Portal(Endpoint("https://portal.example", None, None))._new_connection()
    assert (connection.host, connection.port) == ("portal.example", 443)
    configured = Portal(Endpoint("https://portal.example", None, "http://proxy.example:8080"))._new_connection()
    assert (configured.host, configured.port) == ("proxy.example", 8080)


@pytest.fixture
def credential(tmp_path: Path) -> Credential:
    found = Credential(tmp_path / "credential.json")
    found.keep({"machine_id": 7, "credential_id": 1, "credential": "first", "epoch": "e", "protocol": 1})
    return found


def test_a_rotation_drops_the_old_one_after_a_call_with_the_new_one(credential: Credential, tmp_path: Path) -> None:
    credential.rotate("second", 2)
    used: list[str] = []
    credential.call(lambda secret: used.append(secret) or {})  # type: ignore[func-returns-value]  # notes and answers
    credential.call(lambda secret: used.append(secret) or {})  # type: ignore[func-returns-value]  # notes and answers
    assert used == ["second", "second"]
    assert "first" not in (tmp_path / "credential.json").read_text()
    assert (tmp_path / "credential.json").stat().st_mode & 0o777 == 0o600


def test_an_answer_counts_though_the_disk_has_no_room_to_forget_the_old_one(
    credential: Credential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credential.rotate("second", 2)

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(credential_module, "write_json", no_room)
        assert credential.call(lambda secret: {"used": secret}) == {"used": "second"}
    credential.call(lambda secret: {"used": secret})
    assert "first" not in (tmp_path / "credential.json").read_text()


def test_until_the_portal_knows_the_new_one_the_old_one_serves(credential: Credential, tmp_path: Path) -> None:
    credential.rotate("second", 2)
    used: list[str] = []

    def only_first(secret: str) -> dict[str, Any]:
        used.append(secret)
        if secret != "first":
            raise Refused("not yet")
        return {"answer": 1}

    assert credential.call(only_first) == {"answer": 1}
    assert used == ["second", "first"]
    again = Credential(tmp_path / "credential.json")
    assert again.call(only_first) == {"answer": 1}


def test_without_an_old_one_a_refusal_is_a_refusal(credential: Credential) -> None:
    def refuse(_: str) -> dict[str, Any]:
        raise Refused("ended")

    with pytest.raises(Refused):
        credential.call(refuse)
    assert Config("https://x").credential_file == Path("/var/lib/remotegpu-agent/credential.json")
