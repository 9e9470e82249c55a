"""What the agent reads and sends, held against the schema that both sides share."""

from __future__ import annotations

import copy
import json
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import fastjsonschema
import pytest

from remotegpu_agent import facts, metrics, protocol
from remotegpu_agent.protocol import ProtocolError, format_time, parse_time, read_desired

SCHEMA = json.loads((Path(protocol.__file__).parents[1] / "protocol" / "protocol.schema.json").read_text())
BASELINE = {
    "schema": 1,
    "taken_at": "2026-01-01T00:00:00Z",
    "boot_id": "b",
    "agent_version": "0.1.0",
    "sections": {"users": []},
}
COMMANDS = [
    {"command_id": 1, "kind": "baseline", "args": {"machine_id": 7}},
    {
        "command_id": 2,
        "kind": "clean",
        "args": {"lease_id": 17, "machine_id": 7, "login": "lease17", "uid": 20017, "baseline": BASELINE},
    },
    {"command_id": 3, "kind": "rotate_credential", "args": {"machine_id": 7, "credential": "c", "credential_id": 2}},
    {"command_id": 4, "kind": "thaw", "args": {"machine_id": 7, "epoch": "e", "generation": 4, "retained": [9]}},
]
DESIRED: dict[str, Any] = {
    "machine_id": 7,
    "epoch": "e",
    "generation": 4,
    "leases": [
        {
            "lease_id": 17,
            "login": "lease17",
            "uid": 20017,
            "state": "open",
            "ends_at": "2026-05-01T10:00:00.250Z",
            "keys": [{"fingerprint": "SHA256:x", "line": "ssh-ed25519 AAAAC3Nz a key of mine"}],
        }
    ],
    "attempts": [
        {
            "attempt_id": 5,
            "task_id": 3,
            "lease_id": 17,
            "state": "run",
            "command": "true",
            "env": {"A": "b"},
            "workdir": None,
            "time_limit_s": None,
            "stop_grace_s": 30,
            "gpu_uuids": ["GPU-1"],
        }
    ],
    "commands": COMMANDS,
    "openings": [
        {
            "id": 12,
            "lease": 17,
            "protocol": "tcp",
            "ports": [8888, 8890],
            "source": "203.0.113.0/24",
            "ends_at": "2026-05-01T10:00:00Z",
        }
    ],
    "forwards": [
        {
            "id": 5,
            "lease": 17,
            "protocol": "udp",
            "public_port": 20017,
            "source": "::/0",
            "target_address": "2001:db8::17",
            "target_port": 22,
            "ends_at": "2026-05-01T10:00:00Z",
        }
    ],
    "report_interval_s": 15,
    "log_quota_bytes": 1000,
}


def conforms(name: str, value: Any) -> Any:
    return fastjsonschema.compile({"definitions": SCHEMA["definitions"], "$ref": f"#/definitions/{name}"})(value)


def test_everything_that_the_schema_allows_is_understood() -> None:
    conforms("desired", DESIRED)
    desired = read_desired(copy.deepcopy(DESIRED))
    assert desired.leases[0].ends_at == datetime(2026, 5, 1, 10, 0, 0, 250_000, tzinfo=timezone.utc)
    assert desired.attempts[0].gpu_uuids == ("GPU-1",)
    assert [command.kind for command in desired.commands] == list(protocol.COMMANDS)


def test_no_task_holds_up_the_reboot_of_its_host_for_more_than_five_minutes() -> None:
    desired = copy.deepcopy(DESIRED)
    desired["attempts"][0]["stop_grace_s"] = 3600
    conforms("desired", desired)
    assert read_desired(desired).attempts[0].stop_grace_s == 300


def test_the_agent_knows_every_field_and_command_of_the_schema() -> None:
    definitions = SCHEMA["definitions"]
    kinds = {
        each["properties"]["kind"]["const"]: each["properties"]["args"] for each in definitions["command"]["oneOf"]
    }
    assert {kind: set(args["required"]) for kind, args in kinds.items()} == {
        kind: set(args) for kind, args in protocol.COMMANDS.items()
    }
    for name, example in (
        ("desired", DESIRED),
        ("desired_lease", DESIRED["leases"][0]),
        ("desired_attempt", DESIRED["attempts"][0]),
        ("desired_opening", DESIRED["openings"][0]),
        ("desired_forward", DESIRED["forwards"][0]),
    ):
        assert set(definitions[name]["properties"]) == set(example)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where each field of the desired state lies, bodies of environment and baseline left out."""
    if isinstance(value, dict):
        if at and at[-1] in ("env", "baseline"):
            return []
        return [(*at, name) for name in value] + [
            found for name, each in value.items() for found in paths(each, (*at, name))
        ]
    if isinstance(value, list):
        return [found for i, each in enumerate(value) for found in paths(each, (*at, i))]
    return []


@pytest.mark.parametrize("path", paths(DESIRED), ids=lambda path: ".".join(map(str, path)))
def test_a_field_that_is_missing_misspelt_or_of_another_kind_is_refused_by_name(path: tuple[Any, ...]) -> None:
    *parents, name = path
    may_be_absent = path in (("openings",), ("forwards",))  # portals of before do not send them
    for spoil in (_misspell, _replace) if may_be_absent else (_remove, _misspell, _replace):
        value = copy.deepcopy(DESIRED)
        holder = value
        for part in parents:
            holder = holder[part]
        spoil(holder, name)
        with pytest.raises(ProtocolError, match=re.escape(str(name))):
            read_desired(value)


def _remove(holder: dict[str, Any], name: str) -> None:
    del holder[name]


def _misspell(holder: dict[str, Any], name: str) -> None:
    holder[name + "x"] = 1


def _replace(holder: dict[str, Any], name: str) -> None:
    holder[name] = object()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("login", "root"),
        ("login", "lease17\nroot"),
        ("login", "lease17; id"),
        ("uid", 0),
        ("uid", 1000),
        ("uid", True),
        ("uid", 60000),
        ("ends_at", "2026-05-01T10:00:00"),
        ("ends_at", "2026-05-01T10:00:00+02:00"),
        ("state", "OPEN"),
    ],
)
def test_a_lease_that_could_be_somebody_else_is_refused(field: str, value: Any) -> None:
    spoilt = copy.deepcopy(DESIRED)
    spoilt["leases"][0][field] = value
    with pytest.raises(ProtocolError, match=field):
        read_desired(spoilt)


@pytest.mark.parametrize(
    "line",
    [
        'command="id" ssh-ed25519 AAAA',
        "ssh-ed25519 AAAA\nssh-ed25519 BBBB",
        "ssh-ed25519 AAAA comment\r",
        "ssh-ed25519",
        "",
        "ssh-ed25519  AAAA",
        "ssh-ed25519 AA AA\0",
    ],
)
def test_a_key_with_options_or_a_second_line_is_refused(line: str) -> None:
    spoilt = copy.deepcopy(DESIRED)
    spoilt["leases"][0]["keys"][0]["line"] = line
    with pytest.raises(ProtocolError, match="not one public key"):
        read_desired(spoilt)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ports", [8890, 8888]),
        ("ports", [8888]),
        ("ports", [0, 80]),
        ("ports", [80, 65536]),
        ("ports", [True, 80]),
        ("protocol", "icmp"),
        ("source", "203.0.113.7/24"),
        ("source", "203.0.113.0/255.255.255.0"),
        ("source", "203.0.113.7"),
        ("source", "2001:DB8::/64"),
        ("source", "0.0.0.0/0 accept"),
        ("source", "fe80::1%eth0/128"),
        ("ends_at", None),
    ],
)
def test_an_opening_that_says_two_things_is_refused(field: str, value: Any) -> None:
    spoilt = copy.deepcopy(DESIRED)
    spoilt["openings"][0][field] = value
    with pytest.raises(ProtocolError, match=field):
        read_desired(spoilt)


def test_only_what_is_the_machines_own_may_be_open_without_an_end() -> None:
    own = copy.deepcopy(DESIRED)
    own["openings"][0] |= {"lease": None, "ends_at": None}
    conforms("desired", own)
    (opening,) = read_desired(own).openings
    assert (opening.lease_id, opening.ends_at) == (None, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_address", "192.0.2.1"),
        ("target_address", "host"),
        ("target_address", "fd00::7%eth0"),
        ("target_port", 0),
        ("public_port", 65536),
    ],
)
def test_a_forward_that_leads_nowhere_is_refused(field: str, value: Any) -> None:
    spoilt = copy.deepcopy(DESIRED)
    spoilt["forwards"][0][field] = value
    with pytest.raises(ProtocolError, match=field):
        read_desired(spoilt)


def test_a_portal_that_knows_no_openings_is_understood() -> None:
    older = {name: value for name, value in DESIRED.items() if name not in ("openings", "forwards")}
    assert (read_desired(older).openings, read_desired(older).forwards) == ((), ())


def test_times_keep_their_fractions_and_are_utc() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 600, tzinfo=timezone(timedelta(hours=8)))
    assert format_time(moment) == "2026-01-01T19:04:05.000600Z"
    assert parse_time(format_time(moment)) == moment
    for text in ("2026-01-02T03:04:05.6Z", "2026-01-02T03:04:05.60Z", "2026-01-02T03:04:05Z"):
        conforms("time", text)
        assert parse_time(text).second == 5


def test_facts_and_metrics_are_what_the_schema_says() -> None:
    conforms("facts", facts.collect())
    first = metrics.sample()
    conforms("metrics", first)
    conforms("metrics", metrics.sample())
