"""The role harbor, as far as it can be told without Harbor: its settings against Harbor's own sample."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.support.rendering import DISTRIBUTIONS, ROLES, evaluate, render

STAND_IN = ROLES.parent / "molecule" / "harbor" / "files" / "harbor.yml.tmpl"
# Every key that the sample of Harbor 2.14.0 sets, read off make/harbor.yml.tmpl of github.com/goharbor/harbor and the
# form of that very version, make/photon/prepare/migrations/version_2_14_0/harbor.yml.jinja. The installer takes some of
# them without a fallback, and reads past what it does not know.
SAMPLE_OF_2_14 = {
    "_version", "hostname", "harbor_admin_password", "data_volume",
    "http.port", "https.port", "https.certificate", "https.private_key",
    "database.password", "database.max_idle_conns", "database.max_open_conns",
    "database.conn_max_lifetime", "database.conn_max_idle_time",
    "trivy.ignore_unfixed", "trivy.skip_update", "trivy.skip_java_db_update", "trivy.offline_scan",
    "trivy.security_check", "trivy.insecure", "trivy.timeout",
    "jobservice.max_job_workers", "jobservice.max_job_duration_hours", "jobservice.job_loggers",
    "jobservice.logger_sweeper_duration",
    "notification.webhook_job_max_retry", "notification.webhook_job_http_client_timeout",
    "log.level", "log.local.rotate_count", "log.local.rotate_size", "log.local.location",
    "proxy.http_proxy", "proxy.https_proxy", "proxy.no_proxy", "proxy.components",
    "upload_purging.enabled", "upload_purging.age", "upload_purging.interval", "upload_purging.dryrun",
    "cache.enabled", "cache.expire_hours",
}  # fmt: skip
COMMENTED_OUT_IN_IT = {"external_url"}
GIVEN = {
    "harbor_hostname": "registry.example.org",
    "harbor_bundle_sha256": "0" * 64,
    "harbor_admin_password": 'it\'s: #1 "k8Rz"',
    "harbor_database_password": "k8Rz4QpWx91",
    "__harbor_version": "2.12.0",
}


def settings(suite: str = "trixie", **given: Any) -> dict[str, Any]:
    document = yaml.safe_load(render("harbor", "harbor.yml.j2", suite, **{**GIVEN, **given}))
    assert isinstance(document, dict)
    return document


def paths(settings: dict[str, Any], above: str = "") -> set[str]:
    """Every key of it, those of mappings inside by their whole path: {"log": {"level": …}} is log.level."""
    found: set[str] = set()
    for key, value in settings.items():
        found |= paths(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}"}
    return found


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_it_sets_what_harbors_own_sample_sets_and_its_address(suite: str) -> None:
    assert paths(settings(suite)) == SAMPLE_OF_2_14 | COMMENTED_OUT_IN_IT


def test_the_sample_in_the_stand_in_for_its_bundle_has_no_key_that_a_real_one_lacks() -> None:
    of_the_stand_in = yaml.safe_load(STAND_IN.read_text())
    assert paths(of_the_stand_in) <= SAMPLE_OF_2_14


def test_a_password_of_any_kind_arrives_as_it_is() -> None:
    assert settings()["harbor_admin_password"] == GIVEN["harbor_admin_password"]


def test_the_version_is_the_bundles() -> None:
    assert settings(__harbor_version="2.14.1")["_version"] == "2.14.1"


def test_it_asks_nobody_outside_unless_told_to() -> None:
    assert settings()["trivy"]["offline_scan"] is True
    assert settings(harbor_trivy_enabled=True)["trivy"]["skip_update"] is False


def test_hosts_are_told_the_address_with_its_port() -> None:
    assert settings(harbor_https_port=8555)["external_url"] == "https://registry.example.org:8555"


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("dpkg", "source", "package", "program"),
    [
        ("", "distribution", "docker-compose", "/usr/bin/docker-compose"),
        ("rc ", "distribution", "docker-compose", "/usr/bin/docker-compose"),  # it was there once
        ("ii ", "distribution", "docker-compose-plugin", "/usr/bin/docker compose"),  # and stays, says the role docker
        ("hi ", "docker", "docker-compose-plugin", "/usr/bin/docker compose"),
        ("", "docker", "docker-compose-plugin", "/usr/bin/docker compose"),  # a dry run only announces it
    ],
)
def test_it_is_started_by_the_compose_that_can_be_beside_the_engine(
    suite: str, dpkg: str, source: str, package: str, program: str
) -> None:
    given: dict[str, Any] = {"__harbor_engine": {"stdout": dpkg}, "docker_source": source, **GIVEN}
    packages = evaluate("{{ __harbor_packages }}", "harbor", suite, **given)
    assert packages == [package, "openssl"]
    replaced = evaluate("{{ __docker_replaced }}", "docker", suite)
    assert source != "docker" or not set(packages) & set(replaced), "the role docker would remove it again"
    unit = render("harbor", "remotegpu-harbor.service.j2", suite, ansible_managed="managed", **given)
    assert f"\nExecStart={program} up --detach --remove-orphans\nExecStop={program} stop\n" in unit
