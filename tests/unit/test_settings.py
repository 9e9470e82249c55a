"""Settings are read once, and a wrong one is a refusal that names it, the reason and the way out."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import fields
from pathlib import Path

import pytest

from portal.integrations import protocol
from portal.services import leases
from portal.settings import RANGES, SECRET_FILES, Settings, SettingsError, load, runs_for

PORTAL = Path(__file__).parents[2] / "portal"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"INSTANCE_DIR": str(tmp_path), **{name.upper(): secrets.token_urlsafe(48) for name in SECRET_FILES}}


def test_the_embedded_default_needs_no_other_server(environ: dict[str, str], tmp_path: Path) -> None:
    settings = load(environ)
    assert settings.database_url == f"sqlite:///{tmp_path}/remotegpu.db"
    assert (settings.redis_url, settings.bind) == (None, "127.0.0.1:8443")


@pytest.mark.parametrize(
    ("public_url", "bind"),
    [
        ("https://portal.example.org", "0.0.0.0:443"),
        ("https://portal.example.org:8443", "0.0.0.0:8443"),
        ("http://localhost", "127.0.0.1:80"),
        ("https://10.0.0.5:9443", "0.0.0.0:9443"),
        ("https://localhost:9000", "127.0.0.1:9000"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
    ],
)
def test_the_web_process_listens_where_the_public_address_needs_it(
    environ: dict[str, str], public_url: str, bind: str
) -> None:
    assert load({**environ, "PUBLIC_URL": public_url}).bind == bind
    assert load({**environ, "PUBLIC_URL": public_url, "BIND": "127.0.0.1:1"}).bind == "127.0.0.1:1"


def test_the_port_of_the_public_address_is_the_proxys_where_there_is_one(environ: dict[str, str]) -> None:
    behind = {**environ, "PUBLIC_URL": "https://portal.example.org", "TRUSTED_PROXIES": "127.0.0.1"}
    settings = load(behind)
    assert (settings.bind, settings.public_port) == ("0.0.0.0:8443", 443)


@pytest.mark.parametrize(
    "url",
    ["portal.example.org", "ftp://portal.example.org", "https://", "https://portal:0", "https://portal:70000",
     "https://portal:x", "https://[::1", "https://portal.example.org/sub", "https://portal.example.org?a=1"],
)  # fmt: skip
def test_a_public_address_that_is_none_is_a_refusal_to_start(environ: dict[str, str], url: str) -> None:
    with pytest.raises(SettingsError, match=r"^PUBLIC_URL: .* is not an address such as"):
        load({**environ, "PUBLIC_URL": url})


@pytest.mark.parametrize("name", SECRET_FILES)
@pytest.mark.parametrize("value", ["", "short", "a" * 64, "please-changeme-please-changeme-please", "secret-" * 9])
def test_a_missing_short_or_sample_secret_is_a_refusal_to_start(environ: dict[str, str], name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{name.upper()}: .*portal init"):
        load({**environ, name.upper(): value})


@pytest.mark.parametrize("name", SECRET_FILES)
def test_a_secret_that_was_never_made_is_a_refusal_to_start(environ: dict[str, str], name: str) -> None:
    del environ[name.upper()]
    with pytest.raises(SettingsError, match=r"not set and .* does not exist; run `python -m portal init`"):
        load(environ)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("PUBLIC_URL", "portal.example.org", "is not an address"),
        ("PUBLIC_URL", "http://portal.example.org", "plain http"),
        ("PUBLIC_URL", "https://portal.example.org/path", "is not an address"),
        ("RUN_TIMEOUT_S", "an hour", "is not a number"),
        ("OFFLINE_AFTER_S", "soon", "is not a number"),
        ("REPORT_INTERVAL_S", "0", "is not between 1 and 300"),
        ("REPORT_INTERVAL_S", "301", "is not between 1 and 300"),
        ("OFFLINE_AFTER_S", "nan", "is not between"),
        ("RUN_LOCK_S", "inf", "is not between"),
        ("SWEEP_INTERVAL_S", "0", "is not between"),
        ("DEFAULT_RETAIN_S", "-1", "is not between"),
        ("WORKERS", "0", "is not between"),
        ("RUNS_AT_ONCE", "0", "is not between"),
        ("LEASE_LOG_QUOTA_BYTES", "0", "is not between"),
        ("ACCESS_TOKEN_S", "86400", "longer than REFRESH_TOKEN_S, 3600"),
        ("PEOPLE_LIMIT", "many", "is not a limit such as"),
        ("TRUSTED_PROXIES", "1", "write the addresses of the proxies"),
        ("TRUSTED_PROXIES", "127.0.0.1, nginx", "'nginx' does not appear to be"),
        ("PROMETHEUS_URL", "127.0.0.1:9090", "is not an address"),
        ("PROMETHEUS_URL", "http://user:word@127.0.0.1:9090", "PROMETHEUS_PASSWORD"),
        ("METRICS_ALLOW", "127.0.0.1, everybody", "'everybody'"),
        ("METRICS_ALLOW", "10.0.0.1/8", "has host bits set"),
    ],
)
def test_a_wrong_setting_is_named_with_the_reason(environ: dict[str, str], name: str, value: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: .*{reason}"):
        load({**environ, "REFRESH_TOKEN_S": "3600", name: value})


@pytest.mark.parametrize(("cores", "runs"), [(1, 4), (2, 4), (3, 6), (4, 8), (64, 8)])
def test_a_worker_executes_as_many_runs_as_the_cores_take(cores: int, runs: int) -> None:
    assert runs_for(cores) == runs


def test_the_operator_may_say_how_many_runs_there_are_at_once(environ: dict[str, str]) -> None:
    assert load(environ).runs_at_once == runs_for(len(os.sched_getaffinity(0)))
    assert load({**environ, "RUNS_AT_ONCE": "20"}).runs_at_once == 20


def test_the_operator_may_say_how_much_output_is_kept_of_a_lease(environ: dict[str, str]) -> None:
    assert load(environ).lease_log_quota_bytes == 2 * 1024**3
    assert load({**environ, "LEASE_LOG_QUOTA_BYTES": "1000"}).lease_log_quota_bytes == 1000


def test_every_number_has_a_range_and_the_defaults_lie_in_it(environ: dict[str, str]) -> None:
    assert load(environ)
    assert set(RANGES) == {entry.name for entry in fields(Settings) if entry.type in ("int", "float")}


def test_what_agents_are_told_is_what_the_protocol_takes() -> None:
    told = protocol.schema()["definitions"]["desired"]["properties"]
    for name in ("report_interval_s", "log_quota_bytes"):
        assert RANGES[name] == (told[name]["minimum"], told[name]["maximum"])
    assert RANGES["default_retain_s"] == (0, leases.MAX_RETAIN_S)


@pytest.mark.parametrize("name", [entry.name for entry in fields(Settings)])
def test_every_setting_is_read_by_something(name: str) -> None:
    """What nobody obeys must not be offered: neither by name nor, as in a loop over several, by a text."""
    used = re.compile(rf"""\.{name}\b|["']{name}["']|f"\{{.*\}}_{name.rpartition("_")[2]}\b""")
    places = [file for file in PORTAL.rglob("*.py") if used.search(file.read_text())]
    own = len(re.findall(rf"self\.{name}\b", (PORTAL / "settings.py").read_text()))
    assert own or [file for file in places if file.name != "settings.py"], f"nothing reads {name.upper()}"


def test_settings_show_no_secret(environ: dict[str, str]) -> None:
    settings: Settings = load({**environ, "PROMETHEUS_PASSWORD": "pw-1", "PROMETHEUS_TOKEN": "pw-2"})
    assert "pw-" not in repr(settings)
    assert all(environ[name.upper()] not in repr(settings) for name in SECRET_FILES)


def test_hosts_trust_the_portals_own_authority_unless_told_otherwise(environ: dict[str, str], tmp_path: Path) -> None:
    site = tmp_path / "site.pem"
    site.write_text("-----BEGIN CERTIFICATE-----")
    assert load(environ).ca_for_hosts == tmp_path / "ca" / "ca.pem"
    assert load({**environ, "HOST_CA_FILE": "system"}).ca_for_hosts is None
    assert load({**environ, "HOST_CA_FILE": str(site)}).ca_for_hosts == site


def test_an_authority_for_hosts_that_is_not_there_is_refused(environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="HOST_CA_FILE: there is no file"):
        load({**environ, "HOST_CA_FILE": str(tmp_path / "none.pem")})
