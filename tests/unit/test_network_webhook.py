"""The call to the pipeline: once for a burst, signed, again until it is taken, and never in anybody's way."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from portal.db import atomic, connection, utcnow
from portal.integrations import pipeline
from portal.models import NetworkState
from portal.services import network, network_webhook
from portal.settings import Settings, SettingsError, load
from tests.support.network import zone
from tests.support.one_answer import Answer, answering, saying, trickling
from tests.support.waiting import until

SECRET = "0123456789abcdef" * 4
SOON = timedelta(seconds=6)


@pytest.fixture
def told(settings: Settings, database: Any) -> Any:
    """A pipeline that answers as the test says; yields what it heard."""

    @contextmanager
    def called(answer: Answer) -> Iterator[list[bytes]]:
        with answering(answer, after=b"}") as (url, heard):
            object.__setattr__(settings, "network_webhook_url", f"{url}/hooks/network?ref=main")
            object.__setattr__(settings, "network_webhook_secret", SECRET)
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
    ],
)
def test_a_setting_that_would_send_it_elsewhere_or_unsigned_is_a_refusal_to_start(
    tmp_path: Any, given: dict[str, str], named: str
) -> None:
    secrets = dict.fromkeys(("SECRET_KEY", "JWT_SECRET_KEY", "ENCRYPTION_KEY"), "test " + "0123456789abcdef" * 3)
    environ = {"INSTANCE_DIR": str(tmp_path), "NETWORK_WEBHOOK_SECRET": SECRET, **secrets, **given}
    with pytest.raises(SettingsError, match=named) as refused:
        load(environ)
    assert "user:secret" not in str(refused.value)
    fine = {**environ, "NETWORK_ENVIRONMENT": "staging", "NETWORK_WEBHOOK_SECRET": SECRET}
    loaded = load({**fine, "NETWORK_WEBHOOK_URL": "http://127.0.0.1:1/hook"})
    assert SECRET not in repr(loaded)
