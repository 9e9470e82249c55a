"""The role grafana, as far as it can be told without Grafana: its settings, and dashboards from their short form.

Whether their queries answer: tests/integration/test_grafana_dashboards.py.
"""

from __future__ import annotations

import configparser
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from roles.grafana.filter_plugins.dashboard import grafana_dashboard, main
from tests.support.rendering import DISTRIBUTIONS, ROLES, render

PANEL = {"title": "Load", "queries": {"{{ host }}": 'node_load1{host=~"$host"}'}}


def dashboard(*panels: dict[str, Any], **more: Any) -> dict[str, Any]:
    made = json.loads(grafana_dashboard({"uid": "u", "title": "T", "panels": list(panels), **more}))
    assert isinstance(made, dict)
    return made


def ini(suite: str = "trixie", **given: Any) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(render("grafana", "grafana.ini.j2", suite, **given))
    return parser


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_it_listens_on_loopback_and_lets_nobody_in_by_themselves(suite: str) -> None:
    told = ini(suite, grafana_admin_password="k8Rz4QpWx91k8")
    assert (told["server"]["http_addr"], told["server"]["http_port"]) == ("127.0.0.1", "3000")
    assert told["users"]["allow_sign_up"] == told["auth.anonymous"]["enabled"] == "false"
    assert told["analytics"]["reporting_enabled"] == "false"
    assert told["security"]["admin_password"] == "$__file{/etc/grafana/admin.password}"


def test_cookies_demand_tls_where_people_come_over_it() -> None:
    assert ini()["security"]["cookie_secure"] == "false"
    assert ini(grafana_root_url="https://grafana.example.org/")["security"]["cookie_secure"] == "true"


def test_a_setting_of_the_site_wins_and_leaves_its_neighbours() -> None:
    told = ini(grafana_settings={"smtp": {"enabled": True}, "users": {"default_theme": "dark"}})
    assert told["smtp"]["enabled"] == "true"
    assert dict(told["users"]) == {"allow_sign_up": "false", "allow_org_create": "false", "default_theme": "dark"}


def test_gaps_stay_gaps() -> None:
    (panel,) = dashboard(PANEL)["panels"]
    assert panel["type"] == "timeseries"
    assert panel["fieldConfig"]["defaults"]["custom"]["spanNulls"] is False


def test_panels_stand_beside_each_other_and_begin_a_new_line_where_there_is_no_room() -> None:
    made = dashboard({**PANEL, "width": 16}, {**PANEL, "width": 8, "kind": "stat"}, PANEL)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in made["panels"]]
    assert places == [(0, 0), (16, 0), (0, 8)]
    assert [panel["id"] for panel in made["panels"]] == [1, 2, 3]


def test_every_query_goes_to_the_one_source() -> None:
    (panel,) = dashboard({"title": "N", "kind": "table", "queries": {"a": "up", "b": "up == 0"}})["panels"]
    assert {target["datasource"]["uid"] for target in panel["targets"]} == {"remotegpu-prometheus"}
    assert [(target["refId"], target["instant"], target["format"]) for target in panel["targets"]] == [
        ("A", True, "table"),
        ("B", True, "table"),
    ]


@pytest.mark.parametrize(
    "panel", [{**PANEL, "colour": "red"}, {**PANEL, "kind": "pie"}, {"title": "N", "queries": {"a": None}}]
)
def test_a_word_that_no_panel_has_is_refused(panel: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="panel '"):
        dashboard(panel)


def test_the_five_dashboards_have_names_that_links_can_keep(tmp_path: Path) -> None:
    main(tmp_path)
    made = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {name: each["uid"] for name, each in made.items()} == {
        name: f"remotegpu-{name}" for name in ("agents", "fleet", "gpu", "host", "portal")
    }
    assert {each["editable"] for each in made.values()} == {False}


def test_every_panel_says_its_unit_or_counts() -> None:
    """A ratio without its unit reads as 0.42, and a time as a number."""
    for path in (ROLES / "grafana" / "files" / "dashboards").glob("*.yml"):
        for panel in yaml.safe_load(path.read_text())["panels"]:
            for query in panel["queries"].values():
                ends = {"percentunit": "_ratio", "watt": "_watts", "celsius": "_celsius"}
                for unit, ending in ends.items():
                    bare = query.split("{")[0].endswith(ending)
                    assert not bare or panel.get("unit") == unit, f"{path.stem}: {panel['title']}"


def test_no_panel_draws_a_zero_where_nothing_is_known() -> None:
    """Green zeros while the portal is not heard would say that all is well."""
    drawn = {
        f"{path.stem}: {panel['title']}"
        for path in (ROLES / "grafana" / "files" / "dashboards").glob("*.yml")
        for panel in yaml.safe_load(path.read_text())["panels"]
        for query in panel["queries"].values()
        if "vector(" in query
    }
    assert drawn == set()
