"""The pipeline is called when the network has changed: once for a burst, and again until it has taken the call.

For the sweep of a worker: no request waits for it, and nothing depends on it, since a pipeline may as well ask for the
export by itself. Several workers agree by the row of the network: whoever moves `next_try_at` calls.
"""

from __future__ import annotations

import logging
import threading
from datetime import datetime, timedelta
from typing import Any

import peewee

from portal.db import atomic, connection, utcnow
from portal.integrations import pipeline
from portal.integrations.pipeline import NotTaken
from portal.integrations.protocol import format_time
from portal.models import NetworkState
from portal.services import config, network

LOG = logging.getLogger(__name__)

QUIET = timedelta(seconds=5)  # after the last change of a burst
PATIENCE = timedelta(seconds=60)  # a burst that does not end is told of all the same
CLAIM = timedelta(seconds=60)  # longer than any call
FIRST_PAUSE = timedelta(seconds=10)
LONGEST_PAUSE = timedelta(hours=1)

_running: threading.Thread | None = None


def start() -> bool:
    """Call beside the sweep, which a pipeline that hangs must not hold up; returns whether a call was begun."""
    global _running
    if config.current().network_webhook_url is None or (_running is not None and _running.is_alive()):
        return False
    if not is_due(network.state(), utcnow()):
        return False
    _running = threading.Thread(target=_call_alone, name="network webhook", daemon=True)
    _running.start()
    return True


def is_due(row: NetworkState, now: datetime) -> bool:
    """Whether the pipeline is to be called now."""
    if row.generation == row.told_generation or row.frozen_reason is not None:
        return False
    if row.next_try_at is not None and row.next_try_at > now:
        return False
    is_quiet = row.changed_at <= now - QUIET
    return is_quiet or (row.untold_since is not None and row.untold_since <= now - PATIENCE)


def _call_alone() -> None:
    try:
        call()
    except Exception:
        LOG.exception("the pipeline was not called; it is tried again")


def call(now: datetime | None = None) -> bool:
    """Call if it is due and nobody else does; returns whether the pipeline took it."""
    now = now or utcnow()
    outside = pipeline.of(config.current())
    with connection():
        row = network.state()
        if outside is None or not is_due(row, now) or not _claim(row, now):
            return False
    message = {
        "event": "network.changed",
        "environment": config.current().network_environment,
        "generation": row.generation,
        "changed_at": format_time(row.changed_at),
    }
    try:
        outside.call(message, now=now)  # no connection is held meanwhile
    except NotTaken as refusal:
        with connection():
            _failed(row, str(refusal), now)
        return False
    with connection():
        _taken(row, now)
    return True


def _claim(row: NetworkState, now: datetime) -> bool:
    is_mine = NetworkState.id == network.ONLY
    before = row.next_try_at
    is_mine &= NetworkState.next_try_at.is_null() if before is None else NetworkState.next_try_at == before
    with atomic():
        return bool(NetworkState.update(next_try_at=now + CLAIM).where(is_mine).execute())


def _taken(row: NetworkState, now: datetime) -> None:
    """What changed while it was called is a burst of its own."""
    changes: dict[str, Any] = {
        "told_generation": row.generation,
        "told_at": now,
        "failures": 0,
        "next_try_at": None,
        "last_error": None,
        "untold_since": peewee.Case(None, [(NetworkState.generation > row.generation, NetworkState.changed_at)], None),
    }
    with atomic():
        NetworkState.update(changes).where(NetworkState.id == network.ONLY).execute()
    LOG.info("the pipeline was called for generation %s of the network", row.generation)


def _failed(row: NetworkState, why: str, now: datetime) -> None:
    pause = min(FIRST_PAUSE * 2 ** min(row.failures, 20), LONGEST_PAUSE)
    with atomic():
        changes = {"failures": NetworkState.failures + 1, "last_error": why, "next_try_at": now + pause}
        NetworkState.update(changes).where(NetworkState.id == network.ONLY).execute()
    LOG.warning("the pipeline was not called, for the %s. time: %s", row.failures + 1, why)
