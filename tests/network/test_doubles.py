"""That the doubles are as strict as they say: a program with one fault is refused by both, and without it by neither.

What Pulumi's own engine does is in test_real_engine.py; that it is told to be as strict, here.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import yaml

from remotegpu_network import settings
from tests.network.engine import PROGRAM, Engine
from tests.network.export import ADDRESS, ZONE_ID, sealed
from tests.network.monitor import StrictMonitor, watched

# The SDKs warn about classes that nobody uses here.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PROLOGUE = f"""
import pulumi
import pulumi_cloudflare as sdk

own = sdk.Provider("cloudflare", sdk.ProviderArgs(api_token="token"))


def record(logical, provider=own, content="8.8.8.8", ttl=1):
    given = {{"zone_id": "{ZONE_ID}", "name": "a.example.org", "type": "A", "proxied": False}}
    args = sdk.DnsRecordArgs(ttl=ttl, content=content, **given)
    sdk.DnsRecord(logical, args, pulumi.ResourceOptions(provider=provider))


"""
SOUND = 'record("a")\nrecord("b", content="8.8.4.4")\n'
FAULTS = [
    pytest.param('record("a")\nrecord("a", content="8.8.4.4")\n', "Duplicate resource URN", " twice", id="a URN twice"),
    pytest.param(
        'record("a", provider=None)\n', "Default provider for 'cloudflare' disabled", " without a provider of its own",
        id="no provider",
    ),
    pytest.param('record("a", ttl=7)\n', "ttl 7", "ttl 7", id="what the policy refuses"),
]  # fmt: skip


def in_engine(folder: Path, program: str) -> tuple[int, str, int]:
    """Exit status, what was said, and how many things the cloud has then."""
    write(folder, program)
    engine = Engine(folder, program=folder)
    done = engine.up(sealed(ADDRESS))
    return done.code, done.told, len(engine.cloud.things)


def in_monitor(folder: Path, program: str) -> StrictMonitor:
    return watched(lambda: runpy.run_path(str(write(folder, program))))


def write(folder: Path, program: str) -> Path:
    file = folder / "__main__.py"
    file.write_text(PROLOGUE + program)
    return file


def test_neither_double_refuses_a_sound_program(tmp_path: Path) -> None:
    assert in_engine(tmp_path, SOUND)[::2] == (0, 2)
    assert {"a", "b"} <= set(in_monitor(tmp_path, SOUND).inputs)


@pytest.mark.parametrize(("program", "of_engine", "of_monitor"), FAULTS)
def test_a_fault_is_refused_by_the_engine_double(tmp_path: Path, program: str, of_engine: str, of_monitor: str) -> None:
    code, told, _ = in_engine(tmp_path, program)
    assert (code != 0, of_engine in told) == (True, True), told


@pytest.mark.parametrize(("program", "of_engine", "of_monitor"), FAULTS)
def test_a_fault_is_refused_by_the_strict_monitor(
    tmp_path: Path, program: str, of_engine: str, of_monitor: str
) -> None:
    with pytest.raises(AssertionError, match=of_monitor):
        in_monitor(tmp_path, program)


def test_the_real_engine_is_told_to_refuse_what_has_no_provider() -> None:
    project = yaml.safe_load((PROGRAM / "Pulumi.yaml").read_text())
    assert project["config"]["pulumi:disable-default-providers"] == {"value": ["*"]}
    assert project["name"] == settings.PROJECT, "another name is another URN of everything"
