"""The portal's own SSH key: replaced, and never a moment without a way in, whatever comes in between."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from portal.db import atomic
from portal.integrations import login_key_files as files
from portal.models import AuditEntry, Baseline, LoginKey, Machine, Run
from portal.services import frozen, inventory, login_keys, machines, runs
from portal.services.actors import SYSTEM
from portal.services.inventory import RunFiles
from portal.services.runs import Outcome
from portal.settings import Settings
from tests.support.rental import finish_run
from tests.support.runs import make_machine

THEIRS = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f ada@example.org"
OPTIONS = f'from="192.0.2.0/24" {THEIRS}'
KEYS_FILE = "/home/ops/.ssh/authorized_keys"


@pytest.fixture
def key(database: Any, settings: Settings) -> Path:
    settings.ssh_key_file.parent.mkdir(parents=True, exist_ok=True)
    files.ensure(settings.ssh_key_file)
    return settings.ssh_key_file


def line(file: Path) -> str:
    found = files.find_line(file)
    assert found is not None
    return found


def entry(*lines: str) -> dict[str, Any]:
    data = "".join(f"{each}\n" for each in lines).encode()
    packed = base64.b64encode(zlib.compress(data, 9)).decode()
    return {
        "type": "file",
        "mode": 0o600,
        "uid": 1000,
        "gid": 1000,
        "sha256": hashlib.sha256(data).hexdigest(),
        "content": packed,
    }


def content(*lines: str) -> dict[str, Any]:
    keys = {KEYS_FILE: entry(*lines), "/root/.ssh": {"type": "directory", "mode": 0o700, "uid": 0, "gid": 0}}
    return {"schema": 1, "taken_at": "2026-03-01T12:00:00Z", "sections": {"accounts": {}, "ssh_keys": keys}}


def lines_of(machine: Machine) -> list[str]:
    """What the newest baseline would put back."""
    baseline = machines.find_baseline(machine)
    assert baseline is not None
    found = baseline.content["sections"]["ssh_keys"][KEYS_FILE]
    data = zlib.decompress(base64.b64decode(found["content"]))
    assert hashlib.sha256(data).hexdigest() == found["sha256"]
    return data.decode().splitlines()


def provisioned(name: str, *lines: str) -> Machine:
    machine = make_machine(name)
    Baseline.create(
        machine=machine, digest="0" * 64, content=content(*lines), taken_at=datetime(2026, 3, 1, 12, tzinfo=UTC)
    )
    return machine


def rotation_of(*hosts: Machine) -> Run:
    return runs.queue("rotate_credentials", list(hosts), by=SYSTEM)


def told(run: Run, folder: Path) -> dict[str, Any]:
    """What the playbook is told, as the worker writes it down."""
    return inventory.document(runs.machines_of(run), for_run=RunFiles(run, folder))


def proof() -> dict[str, Any]:
    """What the role writes for a host on which everything was proven."""
    return {"login_key": login_keys.fingerprint(), "old_key_refused": True, "agent_credential": 5}


def test_a_host_is_offered_both_keys_until_it_has_proven_the_new_one(key: Path, tmp_path: Path) -> None:
    old = line(key)
    first, second = provisioned("gpu-1", old), provisioned("gpu-2", old)
    run = rotation_of(first, second)
    hosts = {host["name"]: host for host in told(run, tmp_path)["hosts"]}
    new = line(key)
    assert new != old
    for host in hosts.values():
        assert (host["private_key_file"], host["fallback_key_file"]) == (str(key), str(files.previous(key)))
        assert host["vars"]["remotegpu_rotate_old_key_file"] == str(files.previous(key))
        assert host["vars"]["remotegpu_operator_keys"] == [old], "only the rotation itself moves it"
    finish_run(run, "failed", {"gpu-1": proof()})
    after = {
        host["name"]: host for host in inventory.document([first, second], for_run=RunFiles(run, tmp_path))["hosts"]
    }
    assert after["gpu-1"]["fallback_key_file"] is None
    assert after["gpu-1"]["vars"]["remotegpu_operator_keys"] == [new]
    assert after["gpu-2"]["fallback_key_file"] == str(files.previous(key))
    assert after["gpu-2"]["vars"]["remotegpu_operator_keys"] == [old]
    assert login_keys.overview() == {"fingerprint": login_keys.fingerprint(), "is_rotating": True, "pending": ["gpu-2"]}


def test_the_next_run_goes_on_with_the_same_key_and_the_old_one_goes_with_the_last_host(
    key: Path, tmp_path: Path
) -> None:
    old = line(key)
    first, second = provisioned("gpu-1", old), provisioned("gpu-2", old)
    run = rotation_of(first, second)
    told(run, tmp_path)
    new = line(key)
    finish_run(run, "failed", {"gpu-1": proof()})
    assert files.previous(key).exists(), "gpu-2 may know no other"
    again = rotation_of(second)
    told(again, tmp_path)
    assert line(key) == new
    finish_run(again, verdicts={"gpu-2": proof()})
    assert not files.previous(key).exists()
    assert line(key) == new
    ended = AuditEntry.get(AuditEntry.action == "login_key.ended")
    assert ended.detail["fingerprint"] == machines.fingerprint(old)


def test_a_machine_that_is_retired_keeps_no_old_key_alive(key: Path, tmp_path: Path) -> None:
    first, gone = provisioned("gpu-1", line(key)), provisioned("gpu-2", line(key))
    run = rotation_of(first, gone)
    told(run, tmp_path)
    finish_run(run, "failed", {"gpu-1": proof()})
    assert not login_keys.forget_previous()
    Machine.update(state="retired").where(Machine.id == gone.id).execute()
    assert login_keys.forget_previous()
    assert not login_keys.is_rotating()


@pytest.mark.parametrize(
    "said",
    [None, {"login_key": "SHA256:another", "old_key_refused": True}, {"login_key": "ours", "old_key_refused": False}],
)
def test_what_is_not_proven_of_this_very_key_does_not_count(
    key: Path, tmp_path: Path, said: dict[str, Any] | None
) -> None:
    machine = provisioned("gpu-1", line(key))
    run = rotation_of(machine)
    told(run, tmp_path)
    if said and said["login_key"] == "ours":
        said = {**said, "login_key": login_keys.fingerprint()}
    finish_run(run, verdicts={} if said is None else {"gpu-1": said})
    assert not login_keys.is_proven(machine)
    assert login_keys.is_rotating()


def test_a_cleaning_puts_back_a_key_that_opens_at_every_moment(key: Path, tmp_path: Path) -> None:
    """The baseline holds the login's keys: the old one alone would come back, and the new one go."""
    old = line(key)
    machine = provisioned("gpu-1", OPTIONS, old, THEIRS)
    run = rotation_of(machine)
    told(run, tmp_path)
    new = line(key)
    assert lines_of(machine) == [OPTIONS, old, THEIRS, new], "both, before the host is touched"
    finish_run(run, verdicts={"gpu-1": proof()})
    assert lines_of(machine) == [OPTIONS, THEIRS, new], "and those of others as they were"
    assert [row.content["taken_at"] for row in Baseline.select()] == ["2026-03-01T12:00:00Z"] * 3


def test_what_a_cleaning_may_have_put_back_since_is_not_taken_for_proven(key: Path, tmp_path: Path) -> None:
    old = line(key)
    machine = provisioned("gpu-1", old)
    run = rotation_of(machine)
    told(run, tmp_path)
    Machine.update(state="reclaiming").where(Machine.id == machine.id).execute()
    finish_run(run, verdicts={"gpu-1": proof()})
    assert lines_of(machine) == [old, line(key)]
    assert login_keys.overview()["pending"] == ["gpu-1"]


def test_a_machine_that_is_being_cleaned_is_left_out_and_named(key: Path, tmp_path: Path) -> None:
    old = line(key)
    machine = provisioned("gpu-1", old)
    Machine.update(state="reclaiming").where(Machine.id == machine.id).execute()
    document = told(rotation_of(machine), tmp_path)
    assert document["hosts"] == []
    assert document["left_out"][0]["name"] == "gpu-1"
    assert lines_of(machine) == [old]


def test_a_baseline_from_an_older_backup_gets_the_keys_that_we_have(key: Path) -> None:
    lost = line(key)
    machine = provisioned("gpu-1", THEIRS, lost)
    key.unlink()
    files.ensure(key)  # rotated after the backup, and the old key is long gone
    with atomic():
        login_keys.mend(machine)
    assert lines_of(machine) == [THEIRS, line(key)]


def test_a_portal_without_its_key_takes_nothing_out_of_a_baseline(key: Path) -> None:
    ours = line(key)
    machine = provisioned("gpu-1", ours)
    key.unlink()
    with atomic():
        login_keys.mend(machine)
    assert lines_of(machine) == [ours]


def test_a_restored_portal_mends_the_baselines_of_its_hosts(key: Path) -> None:
    from portal.models import AgentCredential

    lost = line(key)
    machine = provisioned("gpu-1", lost)
    AgentCredential.create(machine=machine, token_sha256="a" * 64, state="current")
    key.unlink()
    files.ensure(key)
    with atomic():
        frozen.freeze_all("restored")
    assert lines_of(machine) == [line(key)]


def test_a_machine_provisioned_meanwhile_has_proven_it_if_its_baseline_knows_no_other(key: Path) -> None:
    old = line(key)
    fresh, stale, waiting = make_machine("gpu-1"), make_machine("gpu-2"), provisioned("gpu-3", old)
    files.replace(key)
    with atomic():
        login_keys.baseline_taken(fresh, content(THEIRS, line(key)))
        login_keys.baseline_taken(stale, content(old))
    assert [row.machine_id for row in LoginKey.select()] == [fresh.id]
    assert login_keys.overview()["pending"] == [waiting.name]


def test_a_key_that_is_rotated_never_only_looks(key: Path) -> None:
    machine = provisioned("gpu-1", line(key))
    with pytest.raises(Exception, match="cannot only look"):
        runs.queue("rotate_credentials", [machine], by=SYSTEM, check=True)


# The files


def test_ssh_takes_the_key_that_we_make_and_its_public_half_is_the_one_we_tell(tmp_path: Path) -> None:
    key = tmp_path / "key"
    files.ensure(key)
    shown = subprocess.run(["ssh-keygen", "-y", "-f", key], check=True, capture_output=True, text=True).stdout
    assert shown.split()[:2] == line(key).split()[:2]
    assert key.with_name("key.pub").read_text().strip() == line(key)
    assert key.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("call", ["unlink", "link", "replace"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_replacement_that_is_cut_off_leaves_a_key_that_opens_and_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """The power goes before the first or the second such step."""
    key = tmp_path / "key"
    files.ensure(key)
    old = line(key)
    left = [number]

    def cut(_event: str, real: Any, *arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as power:
        if call == "link":
            real_link = files.os.link
            power.setattr(files.os, "link", lambda *a, **o: cut("link", real_link, *a, **o))
        else:
            real = getattr(Path, call)
            power.setattr(Path, call, lambda *a, **o: cut(call, real, *a, **o))
        try:
            files.replace(key)
        except KeyboardInterrupt:
            assert old in (line(key), files.find_line(files.previous(key))), "the way in is still there"
            public = key.with_name("key.pub")
            assert not public.exists() or public.read_text().strip() == line(key), "ssh believes it"
    files.replace(key)
    assert line(key) != old
    assert line(files.previous(key)) == old
    assert not files.replace(key), "one at a time"


def test_the_run_that_fails_at_the_agent_keeps_what_was_proven_of_the_key(key: Path, tmp_path: Path) -> None:
    machine = provisioned("gpu-1", line(key))
    run = rotation_of(machine)
    told(run, tmp_path)
    taken = runs.claim("token", lock_s=60)
    assert taken is not None
    verdicts = {"gpu-1": {**proof(), "agent_credential": None}}
    runs.finish(taken, "token", Outcome("failed", exit_code=2, reason="silent agent", verdicts=verdicts))
    assert login_keys.is_proven(machine)
    assert not login_keys.is_rotating()
