"""A dashboard as a person writes it (title, panels, one query a line) into the JSON that Grafana provisions.

The short form lies in files/dashboards/*.yml: a list of panels; a panel has a title, a unit, a kind (`series` where
nothing is said, `stat`, `table`, `gauge`) and queries as `legend: PromQL`. Everything that Grafana wants besides is the
same on every panel and stands here once. `dashboard.py FOLDER` writes the JSON of all of them there, for a Grafana
without the role (docker-compose.yml).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

COLUMNS = 24
KINDS = {"series": "timeseries", "stat": "stat", "table": "table", "gauge": "gauge"}
SOURCE = {"type": "prometheus", "uid": "remotegpu-prometheus"}
HEIGHTS = {"stat": 4, "gauge": 6}
NOT_A_PANEL = ("title", "unit", "kind", "width", "queries", "max", "help", "thresholds")


def grafana_dashboard(spec: Mapping[str, Any]) -> str:
    """The JSON of a dashboard. Raises ValueError for a word that the short form does not know."""
    document = {
        "uid": spec["uid"],
        "title": spec["title"],
        "description": spec.get("help", ""),
        "tags": ["remotegpu"],
        "timezone": "browser",
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "30s",
        "time": {"from": spec.get("from", "now-6h"), "to": "now"},
        "templating": {"list": [_variable(name, query) for name, query in spec.get("variables", {}).items()]},
        "links": [{"type": "dashboards", "tags": ["remotegpu"], "asDropdown": True, "title": "RemoteGPU"}],
        "panels": list(_panels(spec["panels"])),
    }
    return json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _panels(specs: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """From left to right, and on the next line where the width is used up."""
    x, y, height = 0, 0, 0
    for number, spec in enumerate(specs, start=1):
        unknown = sorted(set(spec) - set(NOT_A_PANEL))
        kind = spec.get("kind", "series")
        if unknown or kind not in KINDS:
            raise ValueError(f"panel {spec.get('title')!r}: {unknown or kind} is nothing that a panel has")
        if not all(isinstance(query, str) for query in spec["queries"].values()):
            raise ValueError(f"panel {spec.get('title')!r}: a query is no text; a comma or colon in it wants quotes")
        width = spec.get("width", 12)
        if x + width > COLUMNS:
            x, y, height = 0, y + height, 0
        tall = HEIGHTS.get(kind, 8)
        yield _panel(number, kind, spec, {"x": x, "y": y, "w": width, "h": tall})
        x, height = x + width, max(height, tall)


def _panel(number: int, kind: str, spec: Mapping[str, Any], place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "unit": spec.get("unit", "short"),
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": _steps(spec.get("thresholds", {}))},
        # A gap is a gap: what was not measured is not drawn.
        "custom": {"spanNulls": False, "fillOpacity": 8} if kind == "series" else {},
    }
    if "max" in spec:
        defaults["max"] = spec["max"]
    return {
        "id": number,
        "type": KINDS[kind],
        "title": spec["title"],
        "description": spec.get("help", ""),
        "gridPos": place,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(kind),
        "targets": [_target(letter, legend, query, kind) for letter, (legend, query) in _lettered(spec["queries"])],
    }


def _options(kind: str) -> dict[str, Any]:
    if kind == "series":
        legend = {"displayMode": "table", "placement": "bottom", "calcs": ["mean", "max"]}
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    return {} if kind == "table" else {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "auto"}


def _target(letter: str, legend: str, query: str, kind: str) -> dict[str, Any]:
    at_once = kind != "series"
    table = {"format": "table"} if kind == "table" else {}
    return {
        "refId": letter,
        "datasource": SOURCE,
        "expr": query.strip(),
        "legendFormat": legend,
        "instant": at_once,
        "range": not at_once,
        **table,
    }


def _lettered(queries: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, str]]]:
    return zip("ABCDEFGHIJ", queries.items(), strict=False)


def _steps(thresholds: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"color": "green", "value": None}, *({"color": color, "value": at} for color, at in thresholds.items())]


def _variable(name: str, query: str) -> dict[str, Any]:
    """A choice at the top of the page: every value of a label, several at a time."""
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }


class FilterModule:
    """What Ansible finds here."""

    def filters(self) -> dict[str, Callable[..., str]]:
        return {"grafana_dashboard": grafana_dashboard}


def main(folder: Path) -> None:
    """Write every dashboard of the role into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for spec in sorted((Path(__file__).parents[1] / "files" / "dashboards").glob("*.yml")):
        (folder / f"{spec.stem}.json").write_text(grafana_dashboard(yaml.safe_load(spec.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
