"""Locks that one process of all holds at a time, until it lets go or its time is up: rows, conditional in SQL."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import peewee

from portal.db import atomic, shared_now
from portal.models import NamedLock


@contextmanager
def held(name: str, *, life_s: float) -> Iterator[bool]:
    """Try to hold the lock `name` for the block, at most `life_s`; yields whether we do. Never waits."""
    token = str(uuid.uuid4())
    got = _take(name, token, life_s)
    try:
        yield got
    finally:
        if got:
            with atomic():
                NamedLock.delete().where((NamedLock.name == name) & (NamedLock.token == token)).execute()


def _take(name: str, token: str, life_s: float) -> bool:
    now = shared_now()
    mine = {"token": token, "expires_at": now + timedelta(seconds=life_s)}
    with atomic():
        if NamedLock.update(**mine).where((NamedLock.name == name) & (NamedLock.expires_at < now)).execute():
            return True
    try:
        with atomic():
            NamedLock.create(name=name, **mine)
    except peewee.IntegrityError:
        return False
    return True
