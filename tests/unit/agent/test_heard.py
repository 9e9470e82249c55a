"""When the portal hears the agent: what an upgrade and a rotation go by."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from remotegpu_agent import __version__, cli, heard
from remotegpu_agent.config import Config
from remotegpu_agent.credential import Credential
from remotegpu_agent.files import write_json
from remotegpu_agent.heard import Seen, missing
from remotegpu_agent.loop import Agent

RUNNING = {"pid": 11, "version": "2", "reported_at": "2026-03-01T12:00:00Z"}


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (Seen(11, RUNNING, 5), None),
        (Seen(0, RUNNING, 5), "remotegpu-agent.service does not run"),
        (Seen(12, RUNNING, 5), "process 12 of remotegpu-agent.service has written nothing down yet"),
        (Seen(11, {}, 5), "process 11 of remotegpu-agent.service has written nothing down yet"),
        (Seen(11, RUNNING | {"version": "1"}, 5), "remotegpu-agent.service runs 1, and this program is 2"),
        (Seen(11, RUNNING | {"reported_at": None}, 5), "the portal has taken no report of process 11 (2)"),
        (Seen(11, RUNNING, None), "the portal was not called with credential 5"),
        (Seen(11, RUNNING, 4), "the portal was not called with credential 5"),
    ],
)
def test_only_a_report_of_the_process_of_now_counts(seen: Seen, why: str | None) -> None:
    assert missing(seen, version="2", credential_id=5) == why


def test_a_credential_on_trial_is_not_the_one_in_use(tmp_path: Path) -> None:
    credential = Credential(tmp_path / "credential.json")
    assert credential.used_id is None
    credential.keep({"machine_id": 7, "credential_id": 1, "credential": "first"})
    credential.rotate("second", 2)
    assert credential.used_id is None
    credential.call(lambda _secret: {})
    assert credential.used_id == 2


def test_the_agent_writes_down_that_it_was_heard_and_waiting_ends_with_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config("https://portal.test", state_dir=tmp_path / "state", run_dir=tmp_path, tasks_dir=tmp_path / "tasks")
    write_json(tmp_path / "status.json", {"pid": 1, "version": __version__, "reported_at": "2026-03-01T12:00:00Z"})
    agent = Agent(config)
    agent._write_status()
    monkeypatch.setattr(heard, "show", lambda *_: {"MainPID": str(pid_of(tmp_path))})
    assert "has taken no report" in str(heard.wait(config, within_s=0)), "what another process wrote is void"
    waiting = threading.Timer(0.1, agent._note_reported)
    waiting.start()
    assert heard.wait(config, within_s=20) is None
    waiting.join()


def pid_of(run_dir: Path) -> int:
    """Of whoever wrote the status last."""
    return int(heard.find_json(run_dir / "status.json")["pid"])


def test_the_command_says_what_is_missing_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_load", lambda: Config("https://portal.test"))
    monkeypatch.setattr(heard, "wait", lambda _config, **asked: f"asked for {asked}")
    assert cli.main(["heard", "--within", "3", "--credential", "8"]) == 1
    assert capsys.readouterr().err == ("not heard within 3 s: asked for {'within_s': 3.0, 'credential_id': 8}\n")
    monkeypatch.setattr(heard, "wait", lambda _config, **_: None)
    assert cli.main(["heard"]) == 0
    assert capsys.readouterr().out == f"the portal hears the agent {__version__}\n"
