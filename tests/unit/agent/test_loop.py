"""What the agent tells of its leases, as far as that needs no host."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import pytest

from remotegpu_agent.config import Config
from remotegpu_agent.loop import Agent
from remotegpu_agent.plan import Host, HostLease
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
