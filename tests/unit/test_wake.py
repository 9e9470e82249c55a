"""Waking: who waits hears of a commit at once, misses none whatever order they come in, and holds no connection."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import peewee
import psycopg2
import pytest

from portal import db
from portal.db import utcnow
from portal.integrations import wake as wake_module
from portal.integrations.wake import Wake, wake
from portal.models import Event
from portal.services import events

ROOT = Path(__file__).parents[2]


def write(topic: str = "task.log", **about: Any) -> None:
    with db.atomic():
        events.write(topic, **about)


def wait_until(is_so: Callable[[], bool], *, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not become so in time"
        time.sleep(0.005)


def in_a_thread(act: Callable[[], Any]) -> threading.Thread:
    def run() -> None:
        try:
            act()
        finally:
            db.db.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_who_waits_is_woken_by_a_commit(database: Any) -> None:
    with wake.listen(("task.log", 7)) as ear:
        other = in_a_thread(lambda: write(resource_id=7, tenant_id=1, attempt_id=3))
        assert ear.wait(10)
        other.join()
        (heard,) = ear.take()
    assert (heard.topic, heard.resource_id, heard.tenant_id, heard.data) == ("task.log", 7, 1, {"attempt_id": 3})


def test_an_event_of_something_else_wakes_nobody_and_the_wait_ends_in_time(database: Any) -> None:
    with wake.listen(("task.log", 7)) as ear:
        in_a_thread(lambda: write(resource_id=8)).join()
        began = time.monotonic()
        assert not ear.wait(0.4)
        assert 0.4 <= time.monotonic() - began < 5
        assert ear.take() == []


def test_what_was_committed_before_the_ear_was_opened_is_seen_by_looking(database: Any) -> None:
    write("machine.generation", machine_id=1)
    with wake.listen(("machine.generation", 1)) as ear:
        ear.wait(0.3)
        assert Event.select().where(Event.machine_id == 1).count() == 1


def test_nothing_is_heard_before_its_commit_nor_after_a_rollback(database: Any) -> None:
    may_commit = threading.Event()

    def write_slowly() -> None:
        with db.atomic():
            events.write("task.log", resource_id=7)
            may_commit.wait(10)

    def write_and_fail() -> None:
        with suppress(ZeroDivisionError), db.atomic():
            events.write("task.log", resource_id=7)
            raise ZeroDivisionError

    with wake.listen(("task.log", 7)) as ear:
        in_a_thread(write_and_fail).join()
        slow = in_a_thread(write_slowly)
        assert not ear.wait(0.3)
        may_commit.set()
        slow.join()
        assert ear.wait(10)
        assert len(ear.take()) == 1


@pytest.mark.parametrize("database_url", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True)
def test_an_event_that_commits_after_a_later_one_is_heard_too(database: Any, settings: Any) -> None:
    early = psycopg2.connect(settings.database_url)
    insert = "INSERT INTO event (at, topic, resource_id, data) VALUES (%s, 'task.log', 7, '{}') RETURNING id"
    with early.cursor() as cursor:
        cursor.execute(insert, (utcnow(),))
        (early_id,) = cursor.fetchone()
    with wake.listen(("task.log", 7)) as ear:
        write(resource_id=7)
        assert ear.wait(10)
        (later,) = ear.take()
        assert later.id > early_id
        early.commit()
        assert ear.wait(10)
        assert [heard.id for heard in ear.take()] == [early_id]
    early.close()


def test_each_event_is_delivered_once_however_often_the_table_is_read(database: Any) -> None:
    with wake.listen(wake_module.EVERYTHING) as ear:
        for number in range(20):
            write(resource_id=number)
        looks = wake.looks
        wait_until(lambda: wake.looks > looks + 4)
        assert [heard.resource_id for heard in ear.take()] == list(range(20))


def test_nobody_looks_while_nobody_waits(database: Any) -> None:
    with wake.listen(("task.log", 7)) as ear:
        ear.wait(0.2)
    wait_until(lambda: wake._poller is None)
    looks = wake.looks
    assert wake.waiting() == 0
    assert looks > 0
    assert not wake.would_have_told(time.monotonic() - 10)
    with wake.listen(("task.log", 7)):
        wait_until(lambda: wake.looks > looks)


def test_who_waits_holds_no_connection(database: Any) -> None:
    db.db.connect(reuse_if_open=True)
    with wake.listen(("task.log", 7)) as ear:
        ear.wait(0.01)
        assert db.db.is_closed()


def test_a_table_that_cannot_be_read_for_a_moment_ends_nothing(database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Wake()
    reads = iter([peewee.OperationalError("gone"), OSError("gone")])
    real = own._read

    def read() -> Any:
        for error in reads:
            raise error
        return real()

    monkeypatch.setattr(own, "_read", read)
    with own.listen(("task.log", 7)) as ear:
        in_a_thread(lambda: write(resource_id=7)).join()
        assert ear.wait(10)
    own.stop()


def test_many_threads_each_hear_their_own(database: Any) -> None:
    def hear(number: int) -> list[int | None]:
        with wake.listen(("task.log", number)) as ear:
            ear.wait(10)
            return [heard.resource_id for heard in ear.take()]

    with ThreadPoolExecutor(30) as pool:
        calls = [pool.submit(hear, number) for number in range(30)]
        wait_until(lambda: wake.waiting() == 30)
        for number in range(30):
            write(resource_id=number)
        assert [call.result() for call in calls] == [[number] for number in range(30)]


def test_a_child_process_listens_with_a_poller_of_its_own(database: Any) -> None:
    with wake.listen(("task.log", 7)) as ear:
        ear.wait(0.1)
        database.close_all() if hasattr(database, "close_all") else database.close()
        child = os.fork()
        if child == 0:
            with wake.listen(("task.log", 8)) as own:
                os._exit(0 if own.wait(15) else 1)
        deadline = time.monotonic() + 20
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            write(resource_id=8)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert os.waitstatus_to_exitcode(ended[1]) == 0


UNDER_GEVENT = """
from gevent import monkey
monkey.patch_all()
import sys, gevent, time
from psycogreen.gevent import patch_psycopg
patch_psycopg()
from portal import db
from portal.integrations.wake import wake
from portal.services import events

db.connect(sys.argv[1])
woken = {}

def wait(number):
    with wake.listen(("task.log", number)) as ear:
        if ear.wait(10):
            woken[number] = time.monotonic()

greenlets = [gevent.spawn(wait, number) for number in range(500)]
while wake.waiting() < 500:
    gevent.sleep(0.01)
changed = time.monotonic()
with db.atomic():
    events.write("task.log", resource_id=123)
greenlets[123].join(5)
print(set(woken) == {123}, woken[123] - changed < 2)
with db.atomic():
    for number in range(500):
        events.write("task.log", resource_id=number)
gevent.joinall(greenlets, timeout=10)
print(len(woken))
"""


def test_hundreds_of_greenlets_wait_in_one_process(database: Any, settings: Any) -> None:
    """In a process of its own, since gevent changes the whole process."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNDER_GEVENT, settings.database_url],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.stdout.split() == ["True", "True", "500"], ran.stderr
