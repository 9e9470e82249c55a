"""The node exporter's arguments as written, on every distribution: no test host runs Ubuntu."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from tests.roles.rendering import DISTRIBUTIONS, Role

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


@every_distribution
@pytest.mark.parametrize(
    ("address", "where"), [("192.0.2.10", "192.0.2.10:9100"), ("2001:db8::7", "[2001:db8::7]:9100")]
)
def test_it_listens_where_it_is_told_and_nowhere_else(distribution: str, address: str, where: str) -> None:
    arguments = ["--collector.textfile.directory=/srv/metrics"]
    role = Role(
        "node_exporter",
        distribution,
        node_exporter_listen_address=address,
        node_exporter_port=9100,
        node_exporter_arguments=arguments,
    )
    (line,) = role.lines("default.j2")
    name, _, value = line.partition("=")
    assert name == "ARGS"
    assert shlex.split(value)[0].split() == [f"--web.listen-address={where}", *arguments]


@every_distribution
def test_the_distributions_own_package_service_and_file_are_meant(distribution: str) -> None:
    role = Role("node_exporter", distribution)
    assert role.value("__node_exporter_packages") == ["prometheus-node-exporter"]
    assert role.value("__node_exporter_service") == "prometheus-node-exporter.service"
    assert role.value("__node_exporter_arguments_file") == "/etc/default/prometheus-node-exporter"


@every_distribution
def test_it_never_gives_up_on_an_address_that_comes_late(distribution: str) -> None:
    role = Role("node_exporter", distribution)
    folder = f"/etc/systemd/system/{role.value('__node_exporter_service')}.d"
    assert role.value("__node_exporter_dropin") == f"{folder}/remotegpu.conf"
    assert role.lines("service.conf.j2") == [
        "[Unit]",
        "Wants=network-online.target",
        "After=network-online.target",
        "StartLimitIntervalSec=0",
        "[Service]",
        "Restart=always",
        "RestartSec=5",
    ]


@pytest.mark.parametrize(
    ("answer", "differs"),
    [
        ({"changed": False}, False),
        ({"changed": True}, True),
        ({"changed": False, "msg": "Destination directory does not exist"}, True),
    ],
)
def test_a_unit_that_is_not_there_yet_differs(answer: dict[str, Any], differs: bool) -> None:
    role = Role("node_exporter", __node_exporter_dropin_change=answer)
    assert role.value("__node_exporter_dropin_differs") is differs
