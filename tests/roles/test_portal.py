"""The role portal, as far as it can be told without a host: settings, the front door, and the archive it unpacks."""

from __future__ import annotations

import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.rendering import evaluate, render

ROOT = Path(__file__).parents[2]
SUITES = ("bookworm", "trixie", "noble")
URL = "https://portal.example.org"
OWN = {"certificate": "/etc/ssl/site.pem", "key": "/etc/ssl/site.key"}


def environment(**given: Any) -> dict[str, str]:
    text = render("portal", "portal.env.j2", "noble", **{"portal_public_url": URL, **given})
    return dict(re.findall(r"(?m)^([A-Z_]+)='(.*)'$", text))


def site(suite: str, url: str = URL) -> str:
    return render("portal", "site.conf.j2", suite, portal_public_url=url, __portal_certificate=OWN)


def test_the_portal_believes_nginx_alone_and_lives_in_its_own_folder() -> None:
    told = environment(portal_settings={"TRUSTED_PROXIES": "0.0.0.0/0", "INSTANCE_DIR": "/tmp", "REPORT_INTERVAL_S": 5})
    assert told["TRUSTED_PROXIES"] == "unix"
    assert told["INSTANCE_DIR"] == "/var/lib/remotegpu"
    assert told["REPORT_INTERVAL_S"] == "5"
    assert "DATABASE_URL" not in told


@pytest.mark.parametrize(("tls", "told"), [("self_signed", None), ("own", "system"), ("acme", "system")])
def test_hosts_trust_their_system_where_the_certificate_is_not_the_portals_own(tls: str, told: str | None) -> None:
    assert environment(portal_tls=tls).get("HOST_CA_FILE") == told
    assert environment(portal_tls=tls, portal_settings={"HOST_CA_FILE": "/site.pem"})["HOST_CA_FILE"] == "/site.pem"


def test_a_shell_and_systemd_read_the_settings_alike(tmp_path: Path) -> None:
    """The command sources the file that systemd reads: nothing in it may mean something to a shell."""
    value = 'postgresql://u:p$HOME`id`"#;&%40@127.0.0.1:5432/remotegpu'
    file = tmp_path / "portal.env"
    file.write_text(render("portal", "portal.env.j2", "noble", portal_public_url=URL, portal_database_url=value))
    shell = ["sh", "-c", '. "$1" && printf %s "$DATABASE_URL"', "sh", file]
    assert subprocess.run(shell, capture_output=True, text=True, check=True).stdout == value


@pytest.mark.parametrize("suite", SUITES)
def test_http2_is_said_as_each_nginx_wants_it(suite: str) -> None:
    text = site(suite)
    assert ("http2 on;" in text) == (suite == "trixie")
    assert ("listen 443 ssl http2 default_server;" in text) == (suite != "trixie")


@pytest.mark.parametrize("suite", SUITES)
def test_a_client_cannot_say_where_it_comes_from_or_how_the_portal_is_called(suite: str) -> None:
    headers = set(re.findall(r"proxy_set_header (Host|X-Forwarded-\w+) (.+);", site(suite, f"{URL}:8443")))
    assert headers == {
        ("Host", "portal.example.org:8443"),
        ("X-Forwarded-Host", "portal.example.org:8443"),
        ("X-Forwarded-For", "$remote_addr"),
        ("X-Forwarded-Proto", "https"),
    }


def test_plain_http_leads_to_the_one_address() -> None:
    text = site("bookworm", f"{URL}:8443")
    assert "return 308 https://portal.example.org:8443$request_uri;" in text
    assert "listen 8443 ssl" in text


def test_programs_of_the_machine_find_their_five_routes_and_nothing_else() -> None:
    local = site("noble").split("listen 127.0.0.1:8081;")[1]
    assert re.findall(r"location (?:= )?(\S+) \{", local) == [
        "/healthz",
        "/metrics",
        "/api/v1/prometheus/targets",
        "/api/v1/prometheus/rules",
        "/api/v1/alerts/webhook",
        "/",
    ]


@pytest.mark.parametrize("url", ["https://[2001:db8::1]:8443", "https://192.0.2.10", URL])
def test_every_kind_of_address_makes_a_site(url: str) -> None:
    assert f"proxy_set_header Host {url.removeprefix('https://')};" in site("trixie", url)


@pytest.mark.parametrize("unit", ["remotegpu-web@.service", "remotegpu-worker.service"])
def test_no_secret_is_in_a_unit(unit: str) -> None:
    secret = {"portal_database_url": "postgresql://u:k8Rz4QpWx91k8Rz4@127.0.0.1/remotegpu"}
    text = render("portal", f"{unit}.j2", "noble", portal_public_url=URL, **secret)
    assert "k8Rz4QpWx91k8Rz4" not in text
    assert "EnvironmentFile=/etc/remotegpu-portal/portal.env" in text


def test_names_of_slots_and_release_come_from_one_place() -> None:
    assert evaluate("{{ __portal_home }}", "portal", "trixie") == "/opt/remotegpu-portal"
    upstream = render("portal", "upstream.conf.j2", "trixie", __portal_slot="green")
    assert "server unix:/run/remotegpu-portal/green.sock fail_timeout=0;" in upstream


@pytest.mark.slow  # it needs what `make setup` builds
def test_the_archive_is_the_same_for_the_same_tree_and_holds_what_runs() -> None:
    first, second = built(), built()
    assert first == second
    with tarfile.open(ROOT / "build" / "remotegpu-portal.tar.gz") as archive:
        members = {member.name: member for member in archive.getmembers()}
    assert {
        "portal/__main__.py",
        "portal/web/static/vendor/icons.svg",
        "portal/web/translations/zh_Hans_CN/LC_MESSAGES/messages.mo",
        "playbooks/gpu_hosts.yml",
        "inventory/plugins/portal.py",
        "agent/protocol/protocol.schema.json",
        "ansible.cfg",
        "requirements.txt",
        "build/remotegpu-agent.pyz",
    } <= set(members)
    assert not [name for name in members if name.startswith(("tests/", "instance/", ".git")) or "__pycache__" in name]
    assert {(member.uid, member.gid, member.mtime) for member in members.values()} == {(0, 0, 315532800)}
    assert not [member.name for member in members.values() if member.mode & 0o022]


def built() -> str:
    told = subprocess.run([ROOT / "portal" / "build"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return told.split()[1]
