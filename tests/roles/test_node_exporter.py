"""The node exporter's arguments as written, on every distribution: no test host runs Ubuntu."""

from __future__ import annotations

import shlex

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
