"""The role portal, as far as it can be told without a host: settings, the front door, and the archive it unpacks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.template import trust_as_template

from tests.roles.rendering import Role
from tests.support.rendering import FACTS, evaluate, render
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
SUITES = ("bookworm", "trixie", "noble")
URL = "https://portal.example.org"
OWN = {"certificate": "/etc/ssl/site.pem", "key": "/etc/ssl/site.key"}


def environment(**given: Any) -> dict[str, str]:
    text = render("portal", "portal.env.j2", "noble", **{"portal_public_url": URL, **given})
    return dict(re.findall(r"(?m)^([A-Z_]+)='(.*)'$", text))


def site(suite: str, url: str = URL) -> str:
    return render("portal", "site.conf.j2", suite, portal_public_url=url, __portal_certificate=OWN)


@pytest.mark.parametrize(("said", "goes"), [("true", True), ("false", False), (True, True), (False, False)])
def test_it_goes_back_when_it_is_told_to_in_the_inventory_or_on_the_command_line(said: str | bool, goes: bool) -> None:
    assert evaluate("{{ __portal_goes_back }}", "portal", "noble", portal_rollback=said) is goes


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


@pytest.mark.parametrize(
    ("tls", "file"),
    [
        ("self_signed", "/var/lib/remotegpu/ca/portal.pem"),
        ("own", "/etc/remotegpu-portal/own.pem"),
        ("acme", "/etc/remotegpu-portal/served.pem"),
    ],
)
def test_the_portal_is_told_which_certificate_is_shown(tls: str, file: str) -> None:
    assert environment(portal_tls=tls)["SERVED_CERTIFICATE_FILE"] == file


def test_a_certificate_that_was_renewed_is_laid_where_the_portal_may_read_it(tmp_path: Path) -> None:
    """What certbot is told to run, at the first one and at each that follows: it names their folder."""
    (asked, *_) = yaml.safe_load((ROOT / "roles" / "portal" / "tasks" / "acme.yml").read_text())
    served = tmp_path / "served.pem"
    hook = evaluate(asked["vars"]["__portal_acme_hook"], "portal", "trixie", __portal_etc=str(tmp_path))
    (tmp_path / "fullchain.pem").write_text("a chain")
    (tmp_path / "systemctl").write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/called\n')
    (tmp_path / "systemctl").chmod(0o755)
    environ = {"RENEWED_LINEAGE": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["sh", "-c", hook], env=environ, check=True, umask=0o077)
    assert (served.read_text(), served.stat().st_mode & 0o777) == ("a chain", 0o644)
    assert (tmp_path / "called").read_text() == "reload nginx.service\n"


def test_a_renewal_after_it_was_given_up_does_not_write_over_what_is_shown_by_now() -> None:
    files = evaluate("{{ __portal_certificates }}", "portal", "trixie", portal_public_url=URL)
    assert len({files[tls]["readable"] for tls in ("self_signed", "own", "acme")}) == 3


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


def wanted(**given: Any) -> str:
    """What tells one state of web and worker from another: where it differs they are started anew."""
    tasks = yaml.safe_load((ROOT / "roles" / "portal" / "tasks" / "deploy.yml").read_text())
    [task] = [task for task in tasks if "__portal_wanted" in task.get("ansible.builtin.set_fact", {})]
    seen = {
        name: render("portal", re.findall(r"'([^']+[.]j2)'", text)[0], "noble", portal_public_url=URL, **given)
        for name, text in task["vars"].items()
    }
    role = Role("portal", **{"__portal_release": "/opt/one", **given, **seen})
    return str(role.expression(task["ansible.builtin.set_fact"]["__portal_wanted"]))


@pytest.mark.parametrize(
    "change",
    [
        {"portal_worker_memory": "8G"},
        {"portal_web_memory": "8G"},
        {"portal_settings": {"A": "b"}},
        {"__portal_release": "2"},
    ],
)
def test_a_change_of_what_web_or_worker_run_with_is_taken_over(change: dict[str, Any]) -> None:
    assert wanted() == wanted()
    assert wanted(**change) != wanted()


ONE, TWO, THREE = (f"/opt/remotegpu-portal/releases/{name}" for name in ("one", "two", "three"))


def decided(name: str, *, serves: str, current: str, previous: str, back: bool) -> str:
    """What release.yml decides by where the slot that serves and the two links lead; the archive is release three."""
    tasks = yaml.safe_load((ROOT / "roles" / "portal" / "tasks" / "release.yml").read_text())
    [task] = [task for task in tasks if "__portal_release" in task.get("ansible.builtin.set_fact", {})]
    links = [{"stat": {"lnk_source": link} if link else {}} for link in (current, previous, serves)]
    given = {name: trust_as_template(text) for name, text in task["vars"].items()}
    given |= {
        "portal_rollback": back,
        "__portal_links": {"results": links},
        "__portal_files": {"results": [{"stat": {"checksum": "three"}}]},
    }
    return str(evaluate(task["ansible.builtin.set_fact"][name], "portal", "trixie", **given))


@pytest.mark.parametrize(
    ("serves", "current", "previous", "back"),
    [
        pytest.param(TWO, TWO, ONE, ONE, id="after an upgrade"),
        pytest.param(ONE, ONE, ONE, ONE, id="after a way back"),
        pytest.param(TWO, TWO, "", "", id="after the first release"),
        pytest.param(ONE, TWO, ONE, ONE, id="a way back was cut off"),
        pytest.param(THREE, TWO, ONE, TWO, id="an upgrade was cut off before previous"),
        pytest.param(THREE, TWO, TWO, TWO, id="an upgrade was cut off before current"),
        pytest.param(TWO, ONE, "", ONE, id="the first upgrade was cut off"),
    ],
)
def test_the_way_back_leads_to_the_last_release_that_was_whole(
    serves: str, current: str, previous: str, back: str
) -> None:
    assert decided("__portal_release", serves=serves, current=current, previous=previous, back=True) == back


@pytest.mark.parametrize(
    ("serves", "current", "previous", "replaces"),
    [
        pytest.param("", "", "", "", id="nothing is there"),
        pytest.param(TWO, TWO, ONE, TWO, id="an upgrade"),
        pytest.param(THREE, TWO, ONE, TWO, id="an upgrade that was cut off"),
        pytest.param(ONE, TWO, ONE, ONE, id="an upgrade after a way back that was cut off"),
        pytest.param(THREE, "", "", "", id="the first release that was cut off"),
    ],
)
def test_a_new_release_takes_the_place_of_the_last_that_was_whole(
    serves: str, current: str, previous: str, replaces: str
) -> None:
    links = {"serves": serves, "current": current, "previous": previous}
    assert decided("__portal_replaces", **links, back=False) == replaces
    assert decided("__portal_release", **links, back=False) == THREE


@pytest.mark.parametrize(
    ("nginx", "file", "active"),
    [
        (
            {"x_served_by": "unix:/run/remotegpu-portal/green.sock"},
            "server unix:/run/remotegpu-portal/blue.sock",
            "green",
        ),
        (
            {"x_served_by": "unix:/run/remotegpu-portal/blue.sock"},
            "server unix:/run/remotegpu-portal/green.sock",
            "blue",
        ),
        ({"status": -1}, "server unix:/run/remotegpu-portal/green.sock", "green"),
        ({"x_served_by": "remotegpu_portal"}, "server unix:/run/remotegpu-portal/green.sock", "green"),
        ({"status": -1}, "", "blue"),
    ],
)
def test_the_slot_that_serves_is_the_one_that_nginx_names(nginx: dict[str, Any], file: str, active: str) -> None:
    tasks = yaml.safe_load((ROOT / "roles" / "portal" / "tasks" / "serving.yml").read_text())
    [task] = [task for task in tasks if "ansible.builtin.set_fact" in task]
    told = Role("portal", __portal_led=nginx, __portal_upstream={"stdout": file})
    given = {"__told": [told.expression(text) for text in task["vars"]["__told"]]}
    assert told.expression(task["ansible.builtin.set_fact"]["__portal_active"], **given) == active


# -- tasks of the role, run on this machine in folders of the test


def run_tasks(file: str, folder: Path, *, is_refused: bool = False, **variables: Any) -> str:
    """Run a tasks file of the role; returns what Ansible said. `systemctl` only writes down what it was called with."""
    systemctl = folder / "bin" / "systemctl"
    systemctl.parent.mkdir(exist_ok=True)
    systemctl.write_text(f'#!/bin/sh\necho "$@" >>{folder}/systemctl\n')
    systemctl.chmod(0o755)
    tasks = [{"ansible.builtin.include_role": {"name": "portal", "tasks_from": file}}]
    (folder / "play.yml").write_text(yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]))
    given = {"portal_public_url": URL, "ansible_python_interpreter": sys.executable, **variables}
    (folder / "given.json").write_text(
        json.dumps(given)
    )  # as extra variables: nothing of the role's own wins over these
    environ = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "ANSIBLE_ROLES_PATH": str(ROOT / "roles"),
    }
    argv = ["ansible-playbook", "--inventory", "localhost,", "--connection", "local", "-e", "@given.json", "play.yml"]
    run = subprocess.run(argv, cwd=folder, env=environ, capture_output=True, text=True)
    assert (run.returncode == 2) if is_refused else (run.returncode == 0), run.stdout + run.stderr
    return run.stdout


# -- what is looked at before anything is done


def openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys (`ours`, the same behind a passphrase, `another`), and certificates of the first, each with its fault."""
    folder = tmp_path_factory.mktemp("pairs")
    for name in ("ours", "another"):
        openssl(folder, "ecparam", "-genkey", "-name", "prime256v1", "-out", f"{name}.key")
    openssl(folder, "pkey", "-in", "ours.key", "-aes256", "-passout", "pass:secret", "-out", "locked.key")
    openssl(folder, "req", "-new", "-key", "ours.key", "-subj", "/CN=portal.example.org", "-out", "request")
    for name, days, names in (
        ("good", "2", "DNS:portal.example.org"),
        ("address", "2", "IP:192.0.2.10"),
        ("ended", "-1", "DNS:portal.example.org"),
        ("elsewhere", "2", "DNS:elsewhere.example.org"),
        ("nameless", "2", ""),
    ):
        (folder / "names").write_text(f"subjectAltName={names}\n" if names else "basicConstraints=CA:FALSE\n")
        words = ("-in", "request", "-signkey", "ours.key", "-days", days, "-extfile", "names", "-out", f"{name}.pem")
        openssl(folder, "x509", "-req", *words)
    (folder / "none.pem").write_text("no certificate")
    return folder


def looked_at(folder: Path, *, is_refused: bool = False, **given: Any) -> str:
    """What the role says before it does anything, on a host that it knows and with a release at hand."""
    (folder / "release.tar.gz").touch()
    facts = {**FACTS, "distribution": "Debian", "distribution_major_version": "13", "distribution_version": "13.1"}
    told = {"portal_archive": str(folder / "release.tar.gz"), "ansible_facts": facts, **given}
    return " ".join(run_tasks("assert", folder, is_refused=is_refused, **told).split())


def own(pairs: Path, certificate: str, key: str = "ours") -> dict[str, str]:
    """Variables that name a certificate and a key of the site's own."""
    files = {"portal_tls_certificate": f"{certificate}.pem", "portal_tls_key": f"{key}.key"}
    return {"portal_tls": "own", **{name: str(pairs / file) for name, file in files.items()}}


@pytest.mark.parametrize(("certificate", "url"), [("good", URL), ("address", "https://192.0.2.10:8443")])
def test_a_certificate_of_the_sites_own_is_taken(tmp_path: Path, pairs: Path, certificate: str, url: str) -> None:
    assert "failed=0" in looked_at(tmp_path, portal_public_url=url, **own(pairs, certificate))


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        ("good", "another", "do not belong together"),
        ("good", "locked", "a key has to be without a passphrase"),
        ("none", "ours", "are not both read by openssl"),
        ("missing", "ours", "are PEM files on the machine that runs Ansible"),
        ("ended", "ours", "(portal_tls_certificate) has ended (notAfter="),
        ("elsewhere", "ours", "is not for portal.example.org: it names DNS:elsewhere.example.org"),
        ("nameless", "ours", "is not for portal.example.org: it names no address at all"),
    ],
)
def test_a_certificate_that_nobody_could_trust_takes_nothings_place(
    tmp_path: Path, pairs: Path, certificate: str, key: str, said: str
) -> None:
    assert said in looked_at(tmp_path, is_refused=True, **own(pairs, certificate, key))


def test_the_way_back_asks_for_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    """Whoever takes it may have a bare checkout: no release, no wheels, no certificate."""
    lacking = {"portal_archive": "/nowhere.tar.gz", "portal_wheelhouse": "/nowhere.tar", **own(tmp_path, "missing")}
    assert "There is no file /nowhere.tar.gz" in looked_at(tmp_path, is_refused=True, **lacking)
    assert "failed=0" in looked_at(tmp_path, portal_rollback="true", **lacking)


@pytest.mark.parametrize("other", ["grafana", "guacd", "harbor"])
def test_nor_do_the_roles_beside_it_which_ask_whatever_the_tag(other: str) -> None:
    asked = (ROOT / "roles" / other / "tasks" / "assert.yml").read_text()
    assert not re.search(r"is ansible[.]builtin[.]file|delegate_to: localhost", asked)


def test_the_database_is_kept_with_the_settings_of_now_before_anything_touches_it_and_a_failure_is_undone() -> None:
    """Their password may be another than that of before, which the server does not take any more."""
    tasks = yaml.safe_load((ROOT / "roles" / "portal" / "tasks" / "switch.yml").read_text())
    [switch] = [task for task in tasks if "block" in task]
    order = [
        "Give it its settings",
        "Keep the database as it is before a release that may change it",
        "Bring the database to the schema of this release",
    ]
    assert [task["name"] for task in switch["block"] if task["name"] in order] == order
    assert "Bring the settings of before back" in {task["name"] for task in switch["rescue"]}


# -- what is no longer asked for goes


def test_an_environment_goes_with_the_last_release_that_stands_on_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for number, environment_of in enumerate(["old", "shared", "shared", "new"]):
        release, venv = home / "releases" / str(number), home / "venvs" / environment_of
        release.mkdir(parents=True)
        venv.mkdir(parents=True, exist_ok=True)
        (release / ".venv").symlink_to(venv)
        later = time.time_ns() + 10_000_000
        until(lambda: time.time_ns() > later, "the next to be younger", every_s=0.01)  # noqa: B023 - asked at once
    (home / "venvs" / "half-made").mkdir()
    (home / "current").symlink_to(home / "releases" / "3")
    (home / "previous").symlink_to(home / "releases" / "1")
    given = {
        "__portal_home": str(home),
        "__portal_instance": str(tmp_path / "instance"),
        "__portal_etc": str(tmp_path / "etc"),
    }
    run_tasks("forget", tmp_path, portal_releases_kept=2, **given)
    assert sorted(path.name for path in (home / "releases").iterdir()) == ["1", "2", "3"]
    assert sorted(path.name for path in (home / "venvs").iterdir()) == ["new", "shared"]
    assert "changed=0" in run_tasks("forget", tmp_path, portal_releases_kept=2, **given)


@pytest.mark.parametrize("then", [{"portal_acme_ca_pem": ""}, {"portal_tls": "self_signed"}])
def test_the_renewal_stops_to_trust_an_authority_that_is_no_longer_named(tmp_path: Path, then: dict[str, str]) -> None:
    etc, dropin = tmp_path / "etc", tmp_path / "certbot.service.d" / "remotegpu.conf"
    etc.mkdir()
    asked = {"portal_tls": "acme", "portal_acme_ca_pem": "-----BEGIN CERTIFICATE-----"}
    given = {"__portal_etc": str(etc), "__portal_certbot_dropin": str(dropin)}
    run_tasks("acme_trust", tmp_path, **given, **asked)
    assert f"REQUESTS_CA_BUNDLE={etc}/acme-ca.pem" in dropin.read_text()
    assert (etc / "acme-ca.pem").read_text() == "-----BEGIN CERTIFICATE-----\n"
    run_tasks("acme_trust", tmp_path, **given, **{**asked, **then})
    assert not dropin.exists()
    assert not list(etc.iterdir())
    assert (tmp_path / "systemctl").read_text().count("daemon-reload") == 2
    assert "changed=0" in run_tasks("acme_trust", tmp_path, **given, **{**asked, **then})


def test_the_sites_own_key_does_not_outlive_its_use(tmp_path: Path) -> None:
    etc = tmp_path / "etc"
    (etc / "tls").mkdir(parents=True)
    (etc / "tls" / "portal.key").write_text("key")
    for name in ("tls/portal.pem", "own.pem", "served.pem"):
        (etc / name).write_text("certificate")
    given = {"__portal_home": str(tmp_path), "__portal_instance": str(tmp_path), "__portal_etc": str(etc)}
    run_tasks("forget", tmp_path, portal_tls="own", **given)
    assert sorted(path.name for path in etc.rglob("*")) == ["own.pem", "portal.key", "portal.pem", "tls"]
    run_tasks("forget", tmp_path, portal_tls="self_signed", **given)
    assert [path.name for path in etc.rglob("*")] == ["tls"]


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
        "pulumi/remotegpu_network/network.schema.json",
        "ansible.cfg",
        "requirements.txt",
        "build/remotegpu-agent.pyz",
    } <= set(members)
    assert not [name for name in members if name.startswith(("tests/", "instance/", ".git")) or "__pycache__" in name]
    assert {(member.uid, member.gid, member.mtime) for member in members.values()} == {(0, 0, 315532800)}
    assert not [member.name for member in members.values() if member.mode & 0o022]


@pytest.mark.slow  # it needs what `make setup` builds
def test_what_the_archive_holds_reads_the_network_by_the_rules_of_the_stacks(tmp_path: Path) -> None:
    built()
    subprocess.run(["tar", "-xf", ROOT / "build" / "remotegpu-portal.tar.gz", "-C", tmp_path], check=True)
    program = (
        "from portal.integrations.network_format import PACKAGE, document, names; import remotegpu_network;"
        "print(PACKAGE, remotegpu_network.__file__, names.canonical('Größe.example'), document.VERSION)"
    )
    told = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    package, file, name, version = told.stdout.split()
    assert Path(file).parent == Path(package) == tmp_path / "pulumi" / "remotegpu_network"
    assert (name, version) == ("xn--gre-6ka8i.example", "1")


def built() -> str:
    told = subprocess.run([ROOT / "portal" / "build"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return told.split()[1]
