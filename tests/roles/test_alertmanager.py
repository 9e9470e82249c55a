"""The role alertmanager, as far as it can be told without a host: where it listens, and who is told of what."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.support.rendering import DISTRIBUTIONS, render

GIVEN = {"alertmanager_portal_url": "https://portal.example.org/", "alertmanager_portal_token": "rgt_0123456789abcdef"}


def config(suite: str = "trixie", **given: Any) -> dict[str, Any]:
    document = yaml.safe_load(render("alertmanager", "alertmanager.yml.j2", suite, **{**GIVEN, **given}))
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_it_listens_on_loopback_and_for_no_cluster(suite: str) -> None:
    line = render("alertmanager", "default.j2", suite).splitlines()[-1]
    assert line == 'ARGS="--web.listen-address=127.0.0.1:9093 --cluster.listen-address="'


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_the_portal_is_told_of_every_alert_and_its_end(suite: str) -> None:
    document = config(suite)
    (portal,) = document["receivers"]
    (webhook,) = portal["webhook_configs"]
    assert document["route"]["receiver"] == portal["name"] == "portal"
    assert webhook == {
        "url": "https://portal.example.org/api/v1/alerts/webhook",
        "send_resolved": True,
        "max_alerts": 500,
        "http_config": {"authorization": {"type": "Bearer", "credentials_file": "/etc/prometheus/alertmanager.token"}},
    }
    assert "rgt_" not in str(document)


def test_a_further_route_does_not_take_an_alert_from_the_portal() -> None:
    document = config(
        alertmanager_routes_extra=[{"receiver": "pager", "matchers": ['severity="critical"']}],
        alertmanager_receivers_extra=[{"name": "pager", "webhook_configs": [{"url_file": "/etc/pager"}]}],
    )
    assert document["route"]["routes"][0] == {"receiver": "portal", "continue": True}
    assert [receiver["name"] for receiver in document["receivers"]] == ["portal", "pager"]


def test_the_portals_own_authority_can_be_trusted() -> None:
    document = config(alertmanager_portal_ca_pem="-----BEGIN CERTIFICATE-----")
    assert document["receivers"][0]["webhook_configs"][0]["http_config"] == {
        "authorization": {"type": "Bearer", "credentials_file": "/etc/prometheus/alertmanager.token"},
        "tls_config": {"ca_file": "/etc/prometheus/alertmanager-portal-ca.pem"},
    }
