"""The parts of a lease that need no host: stamps, versions, and what is said of it."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from remotegpu_agent import files, killing, leases, sessions, systemd
from remotegpu_agent.clock import Clock
from remotegpu_agent.config import Config
from remotegpu_agent.journal import Journal
from remotegpu_agent.leases import Leases, expiry_stamp, parse_openssh_version
from remotegpu_agent.observe.tools import ToolFailed
from remotegpu_agent.openings import Openings
from remotegpu_agent.protocol import DesiredLease, Key
from remotegpu_agent.state import Held
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
    openings = Openings(Held, Clock(tmp_path))
    text = Leases(config, Journal(tmp_path / "journal.jsonl"), lambda *_: None, openings).render_keys(lease)
    assert text == (
        'expiry-time="20260701102959Z" ssh-ed25519 AAAA a\nexpiry-time="20260701102959Z" ssh-ed25519 BBBB b\n'
    )


@pytest.mark.usefixtures("shanghai")
def test_the_timer_is_set_in_utc_whatever_the_host_thinks() -> None:
    assert calendar(END) == "2026-07-01 10:30:00 UTC"
    assert calendar(END.astimezone(timezone(timedelta(hours=-5)))) == "2026-07-01 10:30:00 UTC"
    assert calendar(END.replace(microsecond=250_000)) == "2026-07-01 10:30:00.250000 UTC"


@pytest.fixture
def there(tmp_path: Path) -> Leases:
    """A host with lease 17 on it, which is open."""
    config = Config("https://portal.example", state_dir=tmp_path / "state", keys_dir=tmp_path / "keys")
    for directory in (config.state_dir, config.keys_dir):
        directory.mkdir()
    (config.keys_dir / "lease17").write_text("ssh-ed25519 AAAA a\n")
    openings = Openings(Held, Clock(config.state_dir), tmp_path / "firewall.json")
    leases_there = Leases(config, Journal(config.state_dir / "journal.jsonl"), lambda *_: None, openings)
    leases_there._note(DesiredLease(17, "lease17", 20017, True, END, ()), closed_at=None)
    return leases_there


def test_a_removed_key_is_refused_first_and_its_sessions_are_ended_however_often_that_is_cut_short(
    there: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = DesiredLease(17, "lease17", 20017, True, END, (Key("SHA256:a", "AAAA a"), Key("SHA256:b", "BBBB b")))
    left = replace(both, keys=both.keys[1:])
    seen: list[str] = []

    def end_all_but(login: str, fingerprints: list[str]) -> int:
        seen.append(there._keys_file(login).read_text())
        assert fingerprints == ["SHA256:b"]
        if len(seen) == 1:
            raise KeyboardInterrupt
        return 1

    monkeypatch.setattr(sessions, "end_all_but", end_all_but)
    there.write_keys(both)
    assert seen == [], "who adds a key ends nothing"
    with pytest.raises(KeyboardInterrupt):
        there.write_keys(left)
    assert "AAAA" not in seen[0]
    assert there._keys_file("lease17").read_text() != there.render_keys(left), "so that the plan has it written again"
    there.write_keys(left)
    assert len(seen) == 2
    assert there._keys_file("lease17").read_text() == there.render_keys(left)


@pytest.fixture
def full(there: Leases, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leases]:
    """Its tenant has filled the disk; `KILLED` tells who was killed."""
    config = there._config
    there.reserve.keep()
    monkeypatch.setattr(leases, "stop_containers", lambda _lease_id: None)
    monkeypatch.setattr(leases, "_settle_user_manager", lambda _uid: None)
    monkeypatch.setattr(systemd, "find_timer", lambda _unit: None)

    def kill(login: str, _uid: int, **_: float) -> set[int]:
        KILLED.append(login)
        return set()

    monkeypatch.setattr(killing, "end_all", kill)

    def no_room(*_: object, **__: object) -> None:
        if any(config.reserve_dir.iterdir()):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(leases, "write_atomic", no_room)
    monkeypatch.setattr(files, "write_atomic", no_room)
    yield there
    KILLED.clear()


KILLED: list[str] = []


def test_a_tenant_that_has_filled_the_disk_is_ended_all_the_same(full: Leases, tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match="No space left on device"):
        full.close(17, "its end has come")
    assert KILLED, "no process may go on because nothing can be noted"
    assert (tmp_path / "keys" / "lease17").read_text() == "", "nobody gets in"
    full.close(17, "its end has come")  # what was kept in reserve is there for the next try


def test_at_a_leases_end_the_firewall_is_asked_when_its_processes_are_dead(
    full: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """firewalld may take seconds to answer; what it lets in leads to nobody by then."""
    dead_by_then: list[list[str]] = []
    monkeypatch.setattr(Openings, "settle", lambda *_, **__: dead_by_then.append(list(KILLED)))
    with pytest.raises(ToolFailed):
        full.close(17, "its end has come")
    assert dead_by_then == [["lease17"]]


def test_a_key_that_is_removed_is_out_of_the_file_though_the_disk_is_full(full: Leases, tmp_path: Path) -> None:
    lease = DesiredLease(17, "lease17", 20017, True, END, (Key("SHA256:b", "ssh-ed25519 BBBB b"),))
    with pytest.raises(OSError, match="No space left"):  # the register cannot be written, and it is tried again
        full.write_keys(lease)
    assert (tmp_path / "keys" / "lease17").read_text() == full.render_keys(lease)
