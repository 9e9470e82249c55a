"""The role postgresql, as far as it can be told without a host: settings by memory, who comes in, what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.rendering import DISTRIBUTIONS, evaluate, render

VERSIONS = {"bookworm": "15", "trixie": "17", "jammy": "14", "noble": "16"}


def settings(text: str) -> dict[str, str]:
    lines = [line.split(" = ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return {name: value.strip("'") for name, value in lines}


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_the_settings_lie_where_each_distribution_has_them(suite: str) -> None:
    assert evaluate("{{ __postgresql_etc }}", "postgresql", suite) == f"/etc/postgresql/{VERSIONS[suite]}/main"
    told = settings(render("postgresql", "remotegpu.conf.j2", suite))
    assert told["listen_addresses"] == "127.0.0.1"
    assert told["password_encryption"] == "scram-sha-256"


@pytest.mark.parametrize(
    ("memory_mb", "expected"),
    [
        (512, {"shared_buffers": "128MB", "effective_cache_size": "384MB", "work_mem": "4MB"}),
        (8192, {"shared_buffers": "2048MB", "effective_cache_size": "6144MB", "work_mem": "10MB"}),
        (262144, {"shared_buffers": "65536MB", "maintenance_work_mem": "2047MB", "work_mem": "327MB"}),
    ],
)
def test_memory_follows_the_machine(memory_mb: int, expected: dict[str, str]) -> None:
    told = settings(render("postgresql", "remotegpu.conf.j2", "noble", postgresql_memory_mb=memory_mb))
    assert expected.items() <= told.items()


def test_a_setting_of_the_site_wins_over_the_tuning_but_not_over_where_it_listens() -> None:
    mine = {"shared_buffers": "1GB", "listen_addresses": "*", "search_path": "it's"}
    text = render("postgresql", "remotegpu.conf.j2", "jammy", postgresql_settings=mine)
    assert settings(text)["shared_buffers"] == "1GB"
    assert settings(text)["listen_addresses"] == "127.0.0.1"
    assert "search_path = 'it''s'" in text


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_other_machines_come_in_over_tls_only(suite: str) -> None:
    text = render("postgresql", "pg_hba.conf.j2", suite, postgresql_allowed_sources=["192.0.2.10/32", "2001:db8::/64"])
    entries = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert [entry for entry in entries if entry[0] == "hostssl"] == [
        ["hostssl", "remotegpu", "remotegpu", "192.0.2.10/32", "scram-sha-256"],
        ["hostssl", "remotegpu", "remotegpu", "2001:db8::/64", "scram-sha-256"],
    ]
    assert {entry[3] for entry in entries if entry[0] == "host"} == {"127.0.0.1/32", "::1/128"}
    assert {entry[-1] for entry in entries if entry[1:3] != ["all", "postgres"]} == {"scram-sha-256"}


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_the_script_is_one_that_a_shell_can_read(suite: str, tmp_path: Path) -> None:
    script = tmp_path / "backup"
    script.write_text(render("postgresql", "backup.sh.j2", suite))
    subprocess.run(["sh", "-n", script], check=True)
