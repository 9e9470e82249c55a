"""docker-compose.yml says what the roles say: addresses, limits, settings and rules, from the roles' own variables.

What its head tells people to type is typed here, against servers of the test's own: tests pull no images.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests import postgresql
from tests.support import redis
from tests.support.make_run import OTHERS, make_run
from tests.support.rendering import evaluate, render, variables_of

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def value(role: str, name: str) -> Any:
    return evaluate("{{ " + name + " }}", role, "trixie")


def test_the_five_servers_are_there() -> None:
    assert set(SERVICES) == {"postgresql", "redis", "prometheus", "grafana", "guacd"}


def test_nothing_is_published_which_a_neighbour_would_reach_on_loopback_as_well() -> None:
    """Docker before 28 takes for its own what comes to 127.0.0.1 by the host's card, and here is no firewall."""
    assert [name for name, service in SERVICES.items() if "ports" in service] == []
    assert {service.get("network_mode") for service in SERVICES.values()} == {"host"}


def test_each_listens_where_the_role_says() -> None:
    (address,) = value("postgresql", "postgresql_listen_addresses")
    told = {f"--listen_addresses={address}", f"--port={value('postgresql', 'postgresql_port')}"}
    assert told <= set(SERVICES["postgresql"]["command"])
    (address,) = value("redis", "redis_listen_addresses")
    told_redis = f"exec redis-server --bind {address} --port {value('redis', 'redis_port')} "
    assert told_redis in SERVICES["redis"]["entrypoint"][-1]
    guacd = SERVICES["guacd"]["command"]
    assert guacd[1:5] == ["-b", value("guacd", "guacd_listen_address"), "-l", str(value("guacd", "guacd_port"))]
    arguments = re.search(r'ARGS="(.*)"', render("prometheus", "default.j2", "trixie"))
    assert arguments is not None
    assert set(arguments[1].split()) <= set(SERVICES["prometheus"]["command"])
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_SERVER_HTTP_ADDR"] == value("grafana", "grafana_listen_address")
    assert environment["GF_SERVER_HTTP_PORT"] == str(value("grafana", "grafana_port"))


def test_the_database_is_set_as_by_the_role() -> None:
    command = SERVICES["postgresql"]["command"]
    told = dict(setting.removeprefix("--").split("=", 1) for setting in command if "=" in setting)
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


# -- what the head says, word for word


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """This checkout as its user has it, but without what the instructions are to make."""
    folder = tmp_path / "checkout"
    (folder / "build").mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name not in {".git", ".env", "build", "instance", "secrets"}:
            (folder / path.name).symlink_to(path)
    (folder / "build" / "remotegpu-agent.pyz").symlink_to(ROOT / "build" / "remotegpu-agent.pyz")
    return folder


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """In place of the engine one that writes down what it was asked, and of sudo one that asks no password."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "docker").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/asked-of-docker\n')
    (folder / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    for program in folder.iterdir():
        program.chmod(0o755)
    return folder


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address of a PostgreSQL and of a Redis, in place of those in containers; they have no users yet."""
    with postgresql.server() as url, redis.server(tmp_path) as cache:
        yield url, cache.url


@pytest.mark.slow
@pytest.mark.postgresql
@pytest.mark.timeout(600)
def test_what_the_head_tells_to_type_gives_prometheus_a_token_that_the_portal_knows(
    checkout: Path, programs: Path, servers: tuple[str, str], tmp_path: Path
) -> None:
    database, cache = servers
    first, *steps, last = re.findall(r"(?m)^#   (\S.*)$", (ROOT / "docker-compose.yml").read_text())
    environ = {name: value for name, value in os.environ.items() if name not in OTHERS}
    environ["PATH"] = f"{programs}:{environ['PATH']}"

    def type_in(*lines: str) -> str:
        shell = ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]
        done = subprocess.run(shell, cwd=checkout, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    type_in(first)
    secrets = checkout / ".env"
    makes_one = re.search(r"(openssl .+) makes one", secrets.read_text())
    assert makes_one
    secrets.write_text(re.sub(r"(?m)=$", lambda _: "=" + type_in(makes_one[1]).strip(), secrets.read_text()))
    given = dict(re.findall(r"(?m)^(\w+)=(\S+)$", secrets.read_text()))
    postgresql.execute(database, f"CREATE ROLE remotegpu LOGIN PASSWORD '{given['POSTGRESQL_PASSWORD']}'")
    postgresql.execute(database, "CREATE DATABASE remotegpu OWNER remotegpu")
    subprocess.run(
        ["redis-cli", "-u", cache, "config", "set", "requirepass", given["REDIS_PASSWORD"]],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    here = [
        step.replace("127.0.0.1/remotegpu", f"{database.partition('@')[2]}/remotegpu")
        .replace("127.0.0.1/0", cache.removeprefix("redis://"))
        for step in steps
    ]  # fmt: skip
    addresses = type_in(*here, 'echo; echo "DATABASE_URL=$DATABASE_URL"; echo "REDIS_URL=$REDIS_URL"').split()[-2:]

    instance, token_file = checkout / "instance", checkout / "secrets" / "prometheus.token"
    assert (token_file.stat().st_uid, token_file.stat().st_mode & 0o777) == (65534, 0o400)
    assert list(instance.glob("*.db*")) == [], "something went to SQLite"
    assert list((checkout / "build" / "dashboards").glob("*.json")) != []
    asked = (tmp_path / "asked-of-docker").read_text().splitlines()
    assert asked == ["compose up --detach --wait postgresql redis", "compose up --detach"]

    assert last.startswith("make run PROMETHEUS_URL=http://127.0.0.1:9090")
    with make_run(instance, *addresses) as started:
        assert started.password is not None, "nobody can sign in"
        bearer = {"Authorization": f"Bearer {token_file.read_text().strip()}"}
        ca_file = str(checkout / "secrets" / "portal-ca.pem")
        for path in ("/metrics", "/api/v1/prometheus/targets"):
            url = started.portal.url + path
            assert requests.get(url, verify=ca_file, timeout=30).status_code == 401
            assert requests.get(url, verify=ca_file, timeout=30, headers=bearer).status_code == 200
