"""Would the stacks take it? Asked of their own code, before it is written down and before it is given out.

Callers bring rows as the export writes them; here is no table. What a stack may set otherwise (the shortest ttl of a
plan) is as by default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from portal.integrations.network_format import desired, document, names, records, settings

Row = Mapping[str, Any]
SOME_ACCOUNT = "0" * 32  # of zones: whether a stack makes them is its own matter


def problems(
    *,
    zones: Iterable[Row] = (),
    names: Iterable[Row] = (),
    groups: Iterable[Row] = (),
    openings: Iterable[Row] = (),
    **limits: Any,
) -> list[str]:
    """Everything that a stack with all clouds would refuse of these rows; `limits` are settings of the stack."""
    rows = {"zones": list(zones), "names": list(names), "groups": list(groups), "openings": list(openings)}
    machines = sorted({row["machine"] for row in (*rows["names"], *rows["openings"])} - {None})
    body = {
        "environment": "trial", "generation": 0, "generated_at": "2000-01-01T00:00:00Z",
        "machines": [{"key": key, "name": key} for key in machines], **rows,
    }  # fmt: skip
    try:
        desired.resources(document.parse(document.seal(body)), _stack(rows["zones"], **limits))
    except document.BadDocument as error:
        return list(error.problems)
    return []


def _stack(zones: Iterable[Row], **limits: Any) -> settings.Settings:
    made = {row["key"]: SOME_ACCOUNT for row in zones}
    return settings.Settings(environment="trial", clouds=settings.CLOUDS, managed_zones=made, **limits)


class Zones:
    """The zones that there are, and whether a row of `names` may stand in one, whatever stands beside it."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._zones = {row["key"]: document.zone_of(row) for row in rows}
        self._by_name = document.by_cloud_and_name(self._zones.values())
        self._stack = _stack({"key": key} for key in self._zones)

    def entry(self, row: Row) -> document.Name:
        """Raises Unfit with the stacks' own words."""
        zone = self._zones[row["zone"]]
        try:
            found = document.name_of(row)
        except (names.BadName, records.BadRecord) as error:
            raise Unfit(str(error)) from None
        for problem in document.misplaced(found, zone, self._by_name):
            raise Unfit(problem)
        if (problem := desired.unfit_record(found, zone, self._stack)) is not None:
            raise Unfit(problem)
        return found

    def fitting(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those that no stack would refuse."""
        return [row for row in rows if self.fault_of(row) is None]

    def fault_of(self, row: Row) -> str | None:
        """What keeps it from being a record; None if nothing does."""
        try:
            self.entry(row)
        except Unfit as unfit:
            return str(unfit)
        return None


class Unfit(ValueError):
    """No stack would take this row. The message says why."""
