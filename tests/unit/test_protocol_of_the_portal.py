"""The portal reads the protocol strictly, names what is wrong, and takes nothing that its tables could not hold."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import jsonschema
import pytest

from portal.errors import Invalid
from portal.integrations import protocol

DEFINITIONS = tuple(protocol.schema()["definitions"])
ENROLMENT = {
    "protocol": 1,
    "agent_version": "1",
    "boot_id": "b",
    "facts": {
        "hostname": "h", "machine_id": "m", "product_uuid": None, "os": "o", "kernel": "k", "architecture": "a",
        "cpu_model": None, "cpu_cores": None, "memory_total_bytes": None, "python": "3", "openssh": None,
    },
    "gpu": {
        "state": "ok", "message": None, "sampled_at": None, "driver_version": None, "nvml_version": None, "gpus": [],
    },
}  # fmt: skip


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_each_definition_can_be_checked_and_written_out_alone(definition: str) -> None:
    alone = protocol.standalone(definition)
    assert "$ref" not in json.dumps(alone)
    jsonschema.Draft7Validator.check_schema(alone)
    assert protocol.schema()["definitions"][definition].get("title", definition) == definition
    with pytest.raises(Invalid):
        protocol.check(object(), definition)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_every_object_refuses_what_it_does_not_know(definition: str) -> None:
    for part in objects_of(protocol.standalone(definition)):
        assert part.get("additionalProperties") is not None or not part.get("properties"), part


def objects_of(schema: Any) -> Any:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for value in schema.values():
            yield from objects_of(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from objects_of(value)


def test_every_whole_number_has_a_greatest_value() -> None:
    """A column has one; a number beyond it would fail the statement that writes the reports of many hosts."""

    def unbounded(schema: Any, path: str) -> Any:
        if isinstance(schema, dict):
            kinds = schema.get("type")
            if "integer" in (kinds if isinstance(kinds, list) else [kinds]) and "maximum" not in schema:
                yield path
            for key, value in schema.items():
                yield from unbounded(value, f"{path}.{key}")

    assert list(unbounded(protocol.schema(), "")) == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"protocol": 2}, "protocol"),
        ({"facts": {**ENROLMENT["facts"], "cpu_cores": -1}}, "facts.cpu_cores"),
        ({"facts": {**ENROLMENT["facts"], "hostname": None}}, "facts.hostname"),
        ({"gpu": {**ENROLMENT["gpu"], "state": "fine"}}, "gpu.state"),
        ({"gpu": {**ENROLMENT["gpu"], "sampled_at": "yesterday"}}, "gpu.sampled_at"),
    ],
)
def test_the_faulty_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as refused:
        protocol.read(json.dumps({**ENROLMENT, **change}).encode(), "enroll_request")
    assert list(refused.value.fields) == [field]


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_none_is_refused(constant: str) -> None:
    with pytest.raises(Invalid, match="unknown value is null"):
        protocol.read(f'{{"protocol": {constant}}}'.encode(), "enroll_request")


def test_text_that_no_column_takes_is_replaced_not_refused() -> None:
    facts = {**ENROLMENT["facts"], "os": "a\0b\ud83dc", "kernel": "😀\\u0000"}
    read = protocol.read(json.dumps({**ENROLMENT, "facts": facts}).encode(), "enroll_request")
    assert read["facts"]["os"] == "a\ufffdb\ufffdc"
    assert read["facts"]["kernel"] == "😀\\u0000"


def test_what_is_right_is_not_changed() -> None:
    assert protocol.read(json.dumps(ENROLMENT).encode(), "enroll_request") == ENROLMENT


def test_times_are_aware_and_come_back_as_they_went() -> None:
    moment = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)
    assert protocol.format_time(moment) == "2026-01-31T12:00:00.123456Z"
    assert protocol.parse_time(protocol.format_time(moment)) == moment
    assert protocol.parse_time("2026-01-31T12:00:00.5Z").microsecond == 500_000
    with pytest.raises(Invalid):
        protocol.parse_time("2026-02-30T12:00:00Z")
