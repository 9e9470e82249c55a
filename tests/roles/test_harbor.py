"""The role harbor, as far as it can be told without Harbor: its settings against the bundle's own sample."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.support.rendering import DISTRIBUTIONS, ROLES, render

SAMPLE = ROLES.parent / "molecule" / "harbor" / "files" / "harbor.yml.tmpl"
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


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_every_setting_is_one_that_the_sample_knows(suite: str) -> None:
    known = set(re.findall(r"(?m)^#? ?([a-z_]+):", SAMPLE.read_text()))
    assert set(settings(suite)) <= known
    of_the_sample = yaml.safe_load(SAMPLE.read_text())
    assert set(of_the_sample["database"]) == set(settings(suite)["database"])
    assert set(of_the_sample["https"]) == set(settings(suite)["https"])


def test_a_password_of_any_kind_arrives_as_it_is() -> None:
    assert settings()["harbor_admin_password"] == GIVEN["harbor_admin_password"]


def test_the_version_is_the_bundles() -> None:
    assert settings(__harbor_version="2.14.1")["_version"] == "2.14.1"


def test_it_asks_nobody_outside_unless_told_to() -> None:
    assert settings()["trivy"]["offline_scan"] is True
    assert settings(harbor_trivy_enabled=True)["trivy"]["skip_update"] is False


def test_hosts_are_told_the_address_with_its_port() -> None:
    assert settings(harbor_https_port=8555)["external_url"] == "https://registry.example.org:8555"
