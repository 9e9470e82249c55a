"""What the agent tells of its leases, as far as that needs no host."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest

from remotegpu_agent import systemd
from remotegpu_agent.config import Config
from remotegpu_agent.loop import Agent
from remotegpu_agent.plan import Host, HostLease
from remotegpu_agent.portal import TooLarge
from remotegpu_agent.protocol import Desired, DesiredAttempt
from remotegpu_agent.state import Held

OVER = datetime(2026, 3, 1, 12, 0, tzinfo=timezone.utc)


def test_a_frozen_host_tells_of_all_that_it_has_not_cleaned(tmp_path: Path) -> None:
    """A portal that was restored may have forgotten a lease that lies closed here, with its data."""
    config = Config("https://portal.test", state_dir=tmp_path / "state", run_dir=tmp_path, tasks_dir=tmp_path / "tasks")
    agent = Agent(config)
    closed = HostLease(17, "lease17", 20017, exists=True, is_closed=True, ends_at=OVER)
    host = Host(leases={17: closed})
    agent._describe(Held("epoch", 5, None), host)
    assert agent._observed == [], "of no interest otherwise"
    agent._describe(Held("epoch", 5, None, "the portal is older"), host)
    assert [(lease["login"], lease["state"]) for lease in agent._observed] == [("lease17", "closed")]


def test_after_a_thaw_an_order_with_the_id_of_another_tasks_attempt_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A customer of a restored portal may have ordered it before the thaw."""
    config = Config("https://portal.test", state_dir=tmp_path, run_dir=tmp_path, tasks_dir=tmp_path / "tasks")
    units = tmp_path / "units"
    units.mkdir()
    monkeypatch.setattr(systemd, "TRANSIENT_DIR", units)
    orders = {each: DesiredAttempt(each, 3, 17, True, "true", {}, None, None, 30, None) for each in (5, 6)}
    before = Agent(config)
    for order in orders.values():
        before.tasks.end_unstarted(order, "failed", "why")
        (units / f"remotegpu-task-{order.attempt_id}.service").touch()
    agent = Agent(config)  # to which both run
    named = (replace(orders[5], task_id=4), orders[6])
    agent._forget_what_the_portal_lost(Held("e", 5, Desired(1, "e", 5, (), named, (), 15.0, 1000)), retained=[])
    assert {each: there.is_disowned for each, there in agent.tasks.observe().items()} == {5: True, 6: False}
    assert [each["attempt_id"] for each in agent.tasks.reports()] == [6]


def test_a_report_names_the_order_at_work_and_nothing_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A portal that was rolled back to before it knew of this must not refuse all that a quiet host says."""
    agent = Agent(Config("https://portal.test", state_dir=tmp_path, run_dir=tmp_path, tasks_dir=tmp_path / "tasks"))
    monkeypatch.setattr(agent.gpu, "ask", lambda **_wait: None)
    assert "command_at_work" not in agent._report(is_full=True)
    at_work = {"command_id": 3, "progress": 7}
    monkeypatch.setattr(agent.commands, "at_work", lambda _epoch: at_work)
    assert agent._report(is_full=True)["command_at_work"] == at_work
    assert "command_at_work" not in agent._report(is_full=False)


def test_a_result_that_no_report_can_carry_does_not_silence_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes with every report until the portal has it: the next one is without its evidence, and is sent at once."""
    agent = Agent(Config("https://portal.test", state_dir=tmp_path, run_dir=tmp_path, tasks_dir=tmp_path / "tasks"))
    monkeypatch.setattr(agent.gpu, "ask", lambda **_wait: None)
    monkeypatch.setattr(agent, "_wait_and_drop", lambda _wait_s: pytest.fail("waited"))
    agent.state.begin("e")
    agent._has_looked.set()
    step = {"id": "home", "result": "failed", "before": ["left"] * 20_000, "acted": [], "after": None}
    record = {"epoch": "e", "command_id": 3, "kind": "clean", "starts": 1}
    agent.commands._keep(agent.commands._path("e", 3), record, (True, None, {"passed": False, "steps": [step]}))
    sent = []

    def sync(_portal: object, *, report: dict[str, object], wait_s: float) -> bool:
        sent.append(report)
        if len(sent) == 1:
            raise TooLarge("413")
        agent._stopping.set()
        return False

    monkeypatch.setattr(agent, "_sync", sync)
    agent._report_forever()
    results = [report["command_results"][0]["result"]["steps"][0] for report in sent]
    assert [(each["result"], each["before"] is None) for each in results] == [("failed", False), ("failed", True)]
    assert sent[1]["metrics"] is not None, "and all the rest goes on"


@pytest.mark.timeout(20)
def test_what_a_task_has_written_since_the_last_look_waits_for_no_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what came between that look and the wait: it is compared with what was looked at, not with what is there."""
    agent = Agent(Config("https://portal.test", state_dir=tmp_path, run_dir=tmp_path, tasks_dir=tmp_path / "tasks"))
    monkeypatch.setattr(agent.tasks, "unfinished", lambda: [object()])
    monkeypatch.setattr(agent.tasks, "drop_excess", lambda **_quota: None)
    monkeypatch.setattr(agent.tasks, "news", lambda: ((17, "running", 4096),))
    agent._wait_for_news(((17, "running", 0),), until=time.monotonic() + 60)


def test_the_end_of_the_last_task_is_told_though_none_is_left_to_be_looked_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come between two looks; who then waits as if nothing ran tells of it seconds later."""
    agent = Agent(Config("https://portal.test", state_dir=tmp_path, run_dir=tmp_path, tasks_dir=tmp_path / "tasks"))
    news: tuple[object, ...] = ((17, "running", 0),)

    def ends_now() -> list[object]:
        nonlocal news
        news = ((17, "succeeded", 0),)
        return []

    monkeypatch.setattr(agent.tasks, "unfinished", ends_now)
    monkeypatch.setattr(agent.tasks, "drop_excess", lambda **_quota: None)
    monkeypatch.setattr(agent.tasks, "news", lambda: news)
    monkeypatch.setattr(agent._telling, "wait", lambda _wait_s: pytest.fail("waited"))
    agent._wait_for_news(((17, "running", 0),), until=time.monotonic() + 60)
