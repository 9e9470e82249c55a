"""The call to the pipeline: once for a burst, signed, again until it is taken, and never in anybody's way."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote_plus

import pytest
import yaml

from portal.db import atomic, connection, utcnow
from portal.integrations import pipeline
from portal.models import NetworkState
from portal.services import network, network_webhook
from portal.settings import Settings, SettingsError, load
from tests.support.network import zone
from tests.support.one_answer import Answer, answering, saying, trickling
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
SECRET = "0123456789abcdef" * 4
SOON = timedelta(seconds=6)


@pytest.fixture
def told(settings: Settings, database: Any) -> Any:
    """A pipeline that answers as the test says; yields what it heard."""

    @contextmanager
    def called(
        answer: Answer, *, after: bytes = b"}", path: str = "/hooks/network?ref=main", **given: str
    ) -> Iterator[list[bytes]]:
        with answering(answer, after=after) as (url, heard):
            for name, value in {"url": url + path, "secret": SECRET, **given}.items():
                object.__setattr__(settings, f"network_webhook_{name}", value)
            yield heard

    return called


def request(heard: list[bytes]) -> tuple[str, dict[str, str], bytes]:
    """Request line, headers, body."""
    head, _, body = b"".join(heard).partition(b"\r\n\r\n")
    line, *headers = head.decode().split("\r\n")
    return line, dict(header.split(": ", 1) for header in headers), body


def test_a_burst_is_one_call_after_its_last_change(told: Any) -> None:
    for name in ("a.example", "b.example", "c.example"):
        zone(name)
    last = network.state()
    assert not network_webhook.call(last.changed_at + timedelta(seconds=4))
    with told(saying("202 Accepted", "")) as heard:
        assert network_webhook.call(last.changed_at + SOON)
    line, _, body = request(heard)
    assert line == "POST /hooks/network?ref=main HTTP/1.1"
    assert json.loads(body)["generation"] == last.generation == 3
    assert not network_webhook.call(utcnow() + timedelta(days=1)), "nothing has changed since"
    row = network.state()
    assert (row.told_generation, row.failures, row.untold_since) == (3, 0, None)


def test_a_burst_that_does_not_end_is_told_of_after_a_minute(database: Any) -> None:
    zone("a.example")
    first = network.state()
    NetworkState.update(changed_at=first.changed_at + timedelta(seconds=59)).execute()
    assert not network_webhook.is_due(network.state(), first.untold_since + timedelta(seconds=59))
    assert network_webhook.is_due(network.state(), first.untold_since + timedelta(seconds=60))


def test_only_who_has_the_secret_can_have_signed_it(told: Any) -> None:
    zone()
    with told(saying("200 OK", {})) as heard:
        assert network_webhook.call(utcnow() + SOON)
    _, headers, body = request(heard)
    stamp = headers["X-RemoteGPU-Timestamp"]
    expected = hmac.new(SECRET.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    assert headers["X-RemoteGPU-Signature"] == f"sha256={expected}"
    assert abs(int(stamp) - time.time()) < 60
    assert SECRET not in b"".join(heard).decode()


TOKEN = "github_pat_marker/of+the=token"
GITHUB = {"kind": "github", "path": "/repos/acme/network/dispatches", "token": TOKEN}
GITLAB = {"kind": "gitlab", "path": "/api/v4/projects/17/trigger/pipeline", "token": TOKEN, "ref": "live"}


def test_github_is_called_as_it_documents_a_repository_dispatch(told: Any) -> None:
    zone()
    with told(saying("204 No Content", ""), after=b"}}", **GITHUB) as heard:
        assert network_webhook.call(utcnow() + SOON)
    line, headers, body = request(heard)
    assert line == "POST /repos/acme/network/dispatches HTTP/1.1"
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert headers["Accept"] == "application/vnd.github+json"
    assert headers["X-GitHub-Api-Version"] == "2022-11-28"
    assert headers["Content-Type"] == "application/json"
    assert headers["User-Agent"], "GitHub refuses who does not say who asks"
    sent = json.loads(body)
    assert sent.keys() == {"event_type", "client_payload"}
    (named,) = yaml.safe_load((ROOT / "pulumi/ci/github-actions.yml").read_text())[True]["repository_dispatch"]["types"]
    assert sent["event_type"] == named, "what the workflow runs for"
    assert sent["client_payload"]["generation"] == 1
    assert len(sent["client_payload"]) <= 10, "GitHub takes no more"
    assert is_signed(headers, body)


def test_gitlab_is_called_as_it_documents_a_pipeline_trigger(told: Any) -> None:
    zone()
    with told(saying("201 Created", {"id": 1}), after=b"&ref=live", **GITLAB) as heard:
        assert network_webhook.call(utcnow() + SOON)
    line, headers, body = request(heard)
    assert line == "POST /api/v4/projects/17/trigger/pipeline HTTP/1.1"
    assert headers["Content-Type"] == "application/x-www-form-urlencoded"
    assert parse_qs(body.decode()) == {"token": [TOKEN], "ref": ["live"]}, "and no variable, which projects may refuse"
    assert "Authorization" not in headers
    assert is_signed(headers, body)


@pytest.mark.parametrize(("given", "after"), [(GITHUB, b"}}"), (GITLAB, b"&ref=live")], ids=["github", "gitlab"])
def test_what_the_pipeline_repeats_of_the_token_reaches_nobody(
    told: Any, given: dict[str, str], after: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    zone()
    echo = f"bad credentials: {TOKEN} {quote_plus(TOKEN)} {SECRET}"
    with told(saying("401 Unauthorized", echo), after=after, **given):
        assert not network_webhook.call(utcnow() + SOON)
    assert network.state().last_error == "The pipeline refuses: 401 bad credentials: *** *** ***."
    assert TOKEN not in caplog.text


def is_signed(headers: dict[str, str], body: bytes) -> bool:
    said = headers["X-RemoteGPU-Timestamp"].encode() + b"." + body
    return headers["X-RemoteGPU-Signature"] == "sha256=" + hmac.new(SECRET.encode(), said, hashlib.sha256).hexdigest()


@pytest.mark.parametrize("status", ["500 Internal Server Error", "404 Not Found", "301 Moved Permanently"])
def test_what_is_not_taken_is_tried_again_with_longer_pauses(told: Any, status: str) -> None:
    zone()
    now, pauses = utcnow() + SOON, []
    for _ in range(3):
        with told(saying(status, "no such hook", Location="http://127.0.0.1:1/")):
            assert not network_webhook.call(now)
        row = network.state()
        pauses.append((row.next_try_at - now).total_seconds())
        assert not network_webhook.call(row.next_try_at - timedelta(seconds=1))
        now = row.next_try_at
    assert pauses == [10, 20, 40]
    assert (row.failures, row.told_generation) == (3, 0)
    assert row.last_error.startswith(f"The pipeline refuses: {status.split()[0]} no such hook")
    with told(saying("200 OK", {})):
        assert network_webhook.call(now)
    assert (network.state().failures, network.state().last_error) == (0, None)


def test_pauses_do_not_grow_without_end(told: Any) -> None:
    zone()
    NetworkState.update(failures=1000).execute()
    now = utcnow() + SOON
    with told(saying("500 Oops", "")):
        network_webhook.call(now)
    assert network.state().next_try_at - now == timedelta(hours=1)


def test_a_pipeline_that_hangs_holds_up_neither_the_sweep_nor_the_database(
    told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline.of
    monkeypatch.setattr(pipeline, "of", lambda settings: replace(real(settings), deadline_s=0.4))
    zone()
    NetworkState.update(changed_at=utcnow() - SOON).execute()
    with told(trickling(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")) as heard:
        assert network_webhook.start()
        assert not network_webhook.start(), "one call at a time, and it has not ended"
        until(lambda: heard, "the pipeline to hear the call")
        with atomic():
            network.changed()  # whoever changes the network does not wait for it

        def is_over() -> bool:
            with connection():
                return bool(network.state().failures)

        until(is_over, "the call to be given up", timeout_s=30)
    assert "no answer within" in network.state().last_error


def test_of_two_workers_one_calls(database: Any) -> None:
    zone()
    now = utcnow() + SOON
    row = network.state()
    assert network_webhook._claim(row, now)
    assert not network_webhook._claim(row, now), "the other one has read the same row"
    assert not network_webhook.is_due(network.state(), now + timedelta(seconds=59))
    assert network_webhook.is_due(network.state(), now + timedelta(seconds=60)), "it may have died over it"


def test_what_changes_while_it_is_called_is_told_of_again(told: Any) -> None:
    zone()

    def change_and_take(connection_: Any) -> None:
        with connection(), atomic():
            network.changed()
        saying("200 OK", {})(connection_)

    with told(change_and_take):
        assert network_webhook.call(utcnow() + SOON)
    row = network.state()
    assert (row.told_generation, row.generation) == (1, 2)
    assert row.untold_since is not None
    assert network_webhook.is_due(row, utcnow() + SOON)


def test_a_frozen_network_calls_nobody(database: Any) -> None:
    zone()
    NetworkState.update(frozen_reason="restored").execute()
    assert not network_webhook.is_due(network.state(), utcnow() + timedelta(days=1))


def test_without_a_pipeline_nothing_is_called_and_nothing_fails(database: Any) -> None:
    zone()
    assert not network_webhook.start()
    assert not network_webhook.call(utcnow() + SOON)
    assert network.state().failures == 0


AT_GITHUB = {
    "NETWORK_WEBHOOK_KIND": "github",
    "NETWORK_WEBHOOK_URL": "https://api.github.com/repos/acme/network/dispatches",
    "NETWORK_WEBHOOK_TOKEN": TOKEN,
}


def environ_of(folder: Path, **given: str) -> dict[str, str]:
    secrets = dict.fromkeys(("SECRET_KEY", "JWT_SECRET_KEY", "ENCRYPTION_KEY"), "test " + "0123456789abcdef" * 3)
    return {"INSTANCE_DIR": str(folder), "NETWORK_WEBHOOK_SECRET": SECRET, **secrets, **given}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"NETWORK_WEBHOOK_URL": "http://ci.example.org/hook"}, "NETWORK_WEBHOOK_URL"),
        ({"NETWORK_WEBHOOK_URL": "https://user:secret@ci.example.org/hook"}, "NETWORK_WEBHOOK_URL"),
        ({"NETWORK_WEBHOOK_URL": "file:///etc/passwd"}, "NETWORK_WEBHOOK_URL"),
        ({"NETWORK_WEBHOOK_URL": "https:///hook"}, "NETWORK_WEBHOOK_URL"),
        (
            {"NETWORK_WEBHOOK_URL": "https://ci.example.org/hook", "NETWORK_WEBHOOK_SECRET": "short"},
            "NETWORK_WEBHOOK_SECRET",
        ),
        ({"NETWORK_ENVIRONMENT": "Production!"}, "NETWORK_ENVIRONMENT"),
        ({"NETWORK_WEBHOOK_KIND": "jenkins"}, "NETWORK_WEBHOOK_KIND"),
        ({"NETWORK_WEBHOOK_KIND": "github"}, "NETWORK_WEBHOOK_URL"),
        ({"NETWORK_WEBHOOK_TOKEN": TOKEN}, "NETWORK_WEBHOOK_TOKEN"),
        ({**AT_GITHUB, "NETWORK_WEBHOOK_TOKEN": ""}, "NETWORK_WEBHOOK_TOKEN"),
        ({**AT_GITHUB, "NETWORK_WEBHOOK_TOKEN": "user:secret\r\nX-Evil: 1"}, "NETWORK_WEBHOOK_TOKEN"),
        ({**AT_GITHUB, "NETWORK_WEBHOOK_URL": "https://github.com/acme/network"}, "NETWORK_WEBHOOK_URL"),
        ({**AT_GITHUB, "NETWORK_WEBHOOK_KIND": "gitlab"}, "NETWORK_WEBHOOK_URL"),
    ],
)
def test_a_setting_that_would_send_it_elsewhere_or_unsigned_is_a_refusal_to_start(
    tmp_path: Any, given: dict[str, str], named: str
) -> None:
    with pytest.raises(SettingsError, match=f"^{named}:") as refused:
        load(environ_of(tmp_path, **given))
    assert "user:secret" not in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [
        {"NETWORK_WEBHOOK_URL": "http://127.0.0.1:1/hook"},
        AT_GITHUB,
        {**AT_GITHUB, "NETWORK_WEBHOOK_URL": "https://git.example.org/api/v3/repos/acme/network/dispatches"},
        {
            **AT_GITHUB,
            "NETWORK_WEBHOOK_KIND": "gitlab",
            "NETWORK_WEBHOOK_URL": "https://git.example.org/api/v4/projects/acme%2Fnetwork/trigger/pipeline",
        },
    ],
)
def test_each_kind_of_pipeline_can_be_set_and_no_secret_is_in_what_is_printed(
    tmp_path: Path, given: dict[str, str]
) -> None:
    loaded = load(environ_of(tmp_path, NETWORK_ENVIRONMENT="staging", **given))
    called = pipeline.of(loaded)
    assert called is not None
    assert SECRET not in repr(loaded) + repr(called)
    assert TOKEN not in repr(loaded) + repr(called)


def test_the_guides_way_to_check_a_call_believes_ours_and_no_other(told: Any) -> None:
    """The lines that operators copy are the ones that run here."""
    guide = (ROOT / "docs" / "network.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    place: dict[str, Any] = {"hmac": hmac, "hashlib": hashlib, "time": time, "Mapping": Mapping}
    exec(lines, place)  # noqa: S102 - of our own guide
    is_ours = place["is_from_the_portal"]
    zone()
    with told(saying("200 OK", {})) as heard:
        assert network_webhook.call(utcnow() + SOON)
    _, headers, body = request(heard)
    assert is_ours(headers, body, SECRET)
    assert not is_ours(headers, body + b" ", SECRET)
    assert not is_ours(headers, body, SECRET[::-1])
    old = str(int(headers["X-RemoteGPU-Timestamp"]) - 400)
    resigned = {"X-RemoteGPU-Timestamp": old, "X-RemoteGPU-Signature": pipeline.signature(SECRET, old, body)}
    assert not is_ours(resigned, body, SECRET), "an old call, sent again"
