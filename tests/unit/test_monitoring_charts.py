"""A gap has one cause, and the cause that is nearest to the GPU is the one that is told."""

from __future__ import annotations

import pytest

from portal.integrations.prometheus import MAX_POINTS, Series
from portal.services.monitoring_charts import CAUSES, FLEET_SPANS, SPANS, Facts, Grid, Span, cause_of, gaps_of
from portal.services.monitoring_measures import MEASURES
from portal.web import monitoring as pages

GPU = "8f1b"


def facts(**known: float) -> Facts:
    """At one moment; `answers`, `seen` and `mig` are of the one GPU."""
    of_gpu = ("answers", "seen", "mig")
    return Facts({(name, GPU if name in of_gpu else ""): [value] for name, value in known.items()})


@pytest.mark.parametrize(
    ("cause", "known"),
    [
        ("no_data", {}),
        ("no_data", {"portal": 1}),
        ("no_data", {"node": 0, "exporter": 0, "answered": 0}),  # the portal was not asked either
        ("no_data", {"node": 0, "exporter": 0, "answered": 0, "portal": 0}),
        ("host_down", {"node": 0, "answered": 1}),
        ("host_down", {"node": 0, "exporter": 0, "answered": 1, "portal": 0}),
        ("host_down", {"node": 0, "exporter": 0, "answered": 0, "portal": 1}),
        ("host_down", {"node": 0, "exporter": 0, "answered": 0, "agent": 0}),
        ("host_down", {"agent": 0}),
        ("exporter_failing", {"node": 0, "exporter": 1, "exit_code": 6, "answered": 0, "portal": 0}),
        ("exporter_failing", {"node": 1, "exporter": 0}),
        ("exporter_failing", {"node": 1, "exporter": 1, "exit_code": 6}),
        ("exporter_failing", {"node": 1, "exporter": 1, "exit_code": 0, "collected": 0}),
        ("exporter_failing", {"agent": 1, "trouble": 1}),
        ("exporter_failing", {"agent": 1, "exporter": 1, "exit_code": 15, "answers": 1}),
        ("gpu_gone", {"node": 1, "exporter": 1, "exit_code": 0, "collected": 1}),
        ("gpu_gone", {"agent": 1, "answers": 0}),
        ("gpu_gone", {"agent": 1, "exporter": 1, "exit_code": 15, "answers": 0}),
        ("mig", {"node": 1, "exporter": 1, "exit_code": 0, "seen": 1, "mig": 1}),
        ("mig", {"agent": 1, "answers": 1, "mig": 1}),
        ("not_reported", {"node": 1, "exporter": 1, "exit_code": 0, "seen": 1, "mig": 0}),
        ("not_reported", {"agent": 1, "answers": 1}),
    ],
)
def test_the_cause_of_a_gap(cause: str, known: dict[str, float]) -> None:
    assert cause_of(facts(**known), 0, GPU, MEASURES["utilization"]) == cause


@pytest.mark.parametrize(
    ("cause", "known"),
    [
        ("no_data", {}),
        ("no_data", {"node": 0, "answered": 0, "portal": 0}),
        ("host_down", {"node": 0, "answered": 1, "portal": 0}),
        ("host_down", {"node": 0, "agent": 0}),
        ("exporter_failing", {"node": 0, "agent": 1}),
        ("not_reported", {"node": 1, "agent": 1}),
    ],
)
def test_the_cause_of_a_gap_of_a_host(cause: str, known: dict[str, float]) -> None:
    assert cause_of(facts(**known), 0, None, MEASURES["cpu"]) == cause


def test_mig_takes_nothing_but_the_utilisation() -> None:
    divided = facts(agent=1, answers=1, mig=1)
    assert cause_of(divided, 0, GPU, MEASURES["temperature"]) == "not_reported"


def test_moments_with_one_cause_are_one_gap_and_zero_is_none() -> None:
    grid = Grid(0, 105, SPANS["1h"])
    known = Facts(
        {
            ("node", ""): [1, 0, 0, 1, 1, 1, 0, None],
            ("exporter", ""): [1, 0, 0, 1, 0, 1, 0, None],
            ("answered", ""): [1.0] * 8,
        }
    )
    values = [0.0, None, None, 1.0, None, 0.0, None, None]
    assert gaps_of(values, known, GPU, MEASURES["utilization"], grid) == [
        {"from": 15, "to": 30, "cause": "host_down"},
        {"from": 60, "to": 60, "cause": "exporter_failing"},
        {"from": 90, "to": 90, "cause": "host_down"},
        {"from": 105, "to": 105, "cause": "no_data"},
    ]


def test_values_stand_at_their_moments_and_the_rest_is_none() -> None:
    grid = Grid(1000, 1060, Span("t", 60, 15))
    series = Series({}, ((1015.0, 0.0), (1045.0, None), (1060.0, 1 / 3)))
    assert grid.times == [1000, 1015, 1030, 1045, 1060]
    assert grid.values(series) == [None, 0.0, None, None, 0.333333]


def test_a_chart_that_would_begin_after_its_end_is_empty() -> None:
    assert Grid(1060, 1000, SPANS["1h"]).times == []


@pytest.mark.parametrize(
    "span", [*SPANS.values(), *FLEET_SPANS.values()], ids=lambda span: f"{span.name}-{span.step_s}"
)
def test_every_span_has_enough_points_and_never_too_many(span: Span) -> None:
    points = span.length_s / span.step_s
    assert 50 < points < 1000 < MAX_POINTS
    assert span.window_s >= span.step_s, "a value between two points would be lost"


def test_the_names_of_spans_are_the_same_everywhere() -> None:
    assert list(SPANS) == list(FLEET_SPANS) == ["1h", "6h", "1d", "7d", "30d"]


def test_the_page_has_a_word_for_every_cause_measure_and_span() -> None:
    """The script draws what it has no word for as `undefined`."""
    assert (set(pages.CAUSE_WORDS), set(pages.MEASURE_WORDS)) == (set(CAUSES), set(MEASURES))
    assert list(pages.SPAN_WORDS) == list(SPANS)
