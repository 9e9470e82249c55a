"""docker-compose.yml says what the roles say: addresses, limits, settings and rules, from the roles' own variables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.rendering import evaluate, render, variables_of

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def value(role: str, name: str) -> Any:
    return evaluate("{{ " + name + " }}", role, "trixie")


def test_the_five_servers_are_there() -> None:
    assert set(SERVICES) == {"postgresql", "redis", "prometheus", "grafana", "guacd"}


@pytest.mark.parametrize(
    ("service", "role", "host", "port", "inside"),
    [
        ("postgresql", "postgresql", "postgresql_listen_addresses", "postgresql_port", 5432),
        ("redis", "redis", "redis_listen_addresses", "redis_port", 6379),
        ("guacd", "guacd", "guacd_listen_address", "guacd_port", 4822),
    ],
)
def test_a_published_port_is_the_roles(service: str, role: str, host: str, port: str, inside: int) -> None:
    addresses = value(role, host)
    (address,) = addresses if isinstance(addresses, list) else [addresses]
    assert SERVICES[service]["ports"] == [f"{address}:{value(role, port)}:{inside}"]


def test_what_shares_the_hosts_network_listens_where_the_role_says() -> None:
    arguments = re.search(r'ARGS="(.*)"', render("prometheus", "default.j2", "trixie"))
    assert arguments is not None
    assert set(arguments[1].split()) <= set(SERVICES["prometheus"]["command"])
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_SERVER_HTTP_ADDR"] == value("grafana", "grafana_listen_address")
    assert environment["GF_SERVER_HTTP_PORT"] == str(value("grafana", "grafana_port"))
    shared = {name for name, service in SERVICES.items() if service.get("network_mode") == "host"}
    assert shared == {"prometheus", "grafana"}


def test_the_database_is_set_as_by_the_role() -> None:
    command = SERVICES["postgresql"]["command"]
    told = dict(setting.split("=", 1) for setting in command if "=" in setting)
    by_role = {name: str(each) for name, each in value("postgresql", "__postgresql_fixed").items()}
    assert told.items() <= by_role.items()
    assert {"max_connections", "password_encryption"} <= set(told)
    environment = SERVICES["postgresql"]["environment"]
    assert environment["POSTGRES_DB"] == value("postgresql", "postgresql_database")
    assert environment["POSTGRES_USER"] == value("postgresql", "postgresql_user")
    assert SERVICES["postgresql"]["image"] == f"postgres:{variables_of('postgresql', 'trixie')['__postgresql_version']}"


def test_redis_evicts_nothing_and_lets_nobody_be_the_administrator() -> None:
    script = SERVICES["redis"]["entrypoint"][-1]
    by_role = render("redis", "redis.conf.j2", "trixie")
    for name in ("maxmemory-policy", "appendonly", "appendfsync"):
        setting = re.search(rf"(?m)^{name} (.+)$", by_role)
        assert setting is not None
        assert f"--{name} {setting[1]}" in script
    rule = render("redis", "users.acl.j2", "trixie", redis_password="x" * 32).split()
    assert " ".join(rule[4:]) in script.replace("$$", "$")


def test_prometheus_asks_what_the_role_would_let_it_ask() -> None:
    by_role = yaml.safe_load(
        render(
            "prometheus",
            "prometheus.yml.j2",
            "trixie",
            prometheus_portal_url="https://127.0.0.1:8443",
            prometheus_portal_ca_pem="-----BEGIN CERTIFICATE-----",
        )
    )
    assert yaml.safe_load((ROOT / "docker-compose.prometheus.yml").read_text()) == by_role
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["prometheus"]["volumes"])
    files = {by_role["scrape_configs"][1]["authorization"]["credentials_file"], "/etc/prometheus/portal-ca.pem"}
    assert files <= set(mounts.values())
    assert mounts["./roles/prometheus/files"] == value("prometheus", "__prometheus_rules_dir")


def test_grafana_shows_what_the_role_would_show() -> None:
    by_role = yaml.safe_load(render("grafana", "datasource.yml.j2", "trixie"))
    assert yaml.safe_load((ROOT / "docker-compose.grafana.yml").read_text()) == by_role
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["grafana"]["volumes"])
    assert mounts["./build/dashboards"] == value("grafana", "__grafana_dashboards_dir")
    environment, settings = SERVICES["grafana"]["environment"], value("grafana", "__grafana_configuration")
    for section, name in (
        ("users", "allow_sign_up"),
        ("auth.anonymous", "enabled"),
        ("analytics", "reporting_enabled"),
    ):
        key = f"GF_{section.replace('.', '_').upper()}_{name.upper()}"
        assert environment[key] == str(settings[section][name]).lower()


def test_guacd_has_the_same_walls_as_by_the_role() -> None:
    unit = render("guacd", "remotegpu-guacd.service.j2", "trixie", guacd_image="guacamole/guacd:1.5.5")
    guacd = SERVICES["guacd"]
    assert guacd["image"] in unit
    assert f"--memory {guacd['mem_limit']} --pids-limit {guacd['pids_limit']}" in unit
    assert guacd["read_only"] is ("--read-only" in unit)
    assert [f"--tmpfs {each}" in unit for each in guacd["tmpfs"]] == [True, True]
    assert (guacd["cap_drop"], "--cap-drop ALL" in unit) == (["ALL"], True)
    assert (guacd["security_opt"], "no-new-privileges" in unit) == (["no-new-privileges:true"], True)


def test_every_secret_has_to_be_given() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    assert set(re.findall(r"(?<!\$)\$\{(\w+)", text)) == asked, "no secret has a value of its own"
    example = (ROOT / "docker-compose.example.env").read_text()
    assert set(re.findall(r"(?m)^(\w+)=$", example)) == asked
    assert not re.search(r"(?m)^\w+=.+$", example)


def test_every_image_has_a_version() -> None:
    tags = [service["image"].partition(":")[2] for service in SERVICES.values()]
    assert all(re.match(r"v?\d", tag) for tag in tags)
