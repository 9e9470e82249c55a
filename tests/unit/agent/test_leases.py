"""The parts of a lease that need no host: stamps, versions, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from remotegpu_agent import leases
from remotegpu_agent.config import Config
from remotegpu_agent.journal import Journal
from remotegpu_agent.leases import Leases, expiry_stamp, parse_openssh_version
from remotegpu_agent.protocol import DesiredLease, Key
from remotegpu_agent.systemd import calendar

END = datetime(2026, 7, 1, 10, 30, 0, tzinfo=timezone.utc)


@pytest.fixture
def shanghai(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("shanghai")
def test_a_new_sshd_reads_the_end_in_utc_and_an_old_one_in_the_hosts_time() -> None:
    # One second early: sshd accepts a key during the whole of the second that is named.
    assert expiry_stamp(END, knows_zulu=True) == "20260701102959Z"
    assert expiry_stamp(END, knows_zulu=False) == "20260701182959"


def test_a_fraction_of_a_second_never_lengthens_a_lease() -> None:
    assert expiry_stamp(END + timedelta(milliseconds=999), knows_zulu=True) == "20260701102959Z"


@pytest.mark.parametrize(
    ("banner", "version", "knows_zulu"),
    [
        ("OpenSSH_9.2p1", (9, 2), True),
        ("OpenSSH_10.0p2", (10, 0), True),
        ("OpenSSH_9.1p1", (9, 1), True),
        ("OpenSSH_8.9p1", (8, 9), False),
        ("OpenSSH_9.0p1", (9, 0), False),
        ("", (0, 0), False),
    ],
)
def test_the_form_of_the_stamp_goes_by_the_servers_version(
    banner: str, version: tuple[int, int], knows_zulu: bool
) -> None:
    assert parse_openssh_version(banner) == version
    assert (version >= leases.ZULU_SINCE) is knows_zulu


def test_every_key_line_carries_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "openssh_version", lambda: (9, 2))
    config = Config("https://portal.example", state_dir=tmp_path)
    keys = (Key("SHA256:a", "ssh-ed25519 AAAA a"), Key("SHA256:b", "ssh-ed25519 BBBB b"))
    lease = DesiredLease(17, "lease17", 20017, True, END, keys)
    text = Leases(config, Journal(tmp_path / "journal.jsonl"), lambda *_: None).render_keys(lease)
    assert text == (
        'expiry-time="20260701102959Z" ssh-ed25519 AAAA a\nexpiry-time="20260701102959Z" ssh-ed25519 BBBB b\n'
    )


@pytest.mark.usefixtures("shanghai")
def test_the_timer_is_set_in_utc_whatever_the_host_thinks() -> None:
    assert calendar(END) == "2026-07-01 10:30:00 UTC"
    assert calendar(END.astimezone(timezone(timedelta(hours=-5)))) == "2026-07-01 10:30:00 UTC"
    assert calendar(END.replace(microsecond=250_000)) == "2026-07-01 10:30:00.250000 UTC"
