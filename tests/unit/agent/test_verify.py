"""What verification makes of what it sees on a host, without one."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent import baseline, gpu_child, verify
from remotegpu_agent.observe import files, gpus, special
from remotegpu_agent.observe.tools import run

MIB = 1024**2
ASKED = verify.Asked(17, "lease17", 20017, {"gpu_holders": ["exporter.service"]})
IDLE = {"index": 0, "uuid": "GPU-1", "errors": [], "state": "ok"} | dict.fromkeys(gpu_child.FIELDS)
IDLE |= {"memory_used_bytes": 15 * MIB, "processes": []}


def reported(*gpu: dict[str, Any], state: str = "ok", message: str | None = None) -> dict[str, Any]:
    return {"state": state, "message": message, "gpus": list(gpu)}


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str | None]]:
    """Result and reason of the check of GPU memory, where the driver says that."""
    monkeypatch.setattr(verify, "_GPU_SETTLES_S", 0)

    def judge(report: dict[str, Any], asked: verify.Asked = ASKED) -> tuple[str, str | None]:
        monkeypatch.setattr(gpus, "ask", lambda: report)
        check = verify._checked("gpu_memory", verify._gpu_memory, asked)
        return check["result"], check["reason"]

    return judge


Judged = Callable[..., tuple[str, str | None]]


def test_an_idle_gpu_passes_with_the_little_that_its_driver_uses(judged: Judged) -> None:
    assert judged(reported(IDLE)) == ("passed", None)
    assert judged(reported(IDLE | {"memory_used_bytes": 64 * MIB})) == ("passed", None)


def test_memory_that_is_in_use_fails_also_where_no_process_is_listed(judged: Judged) -> None:
    assert judged(reported(IDLE, IDLE | {"index": 1, "uuid": "GPU-2", "memory_used_bytes": 65 * MIB})) == (
        "failed",
        "65 MiB of GPU 1 (GPU-2) are in use",
    )


def test_a_process_that_is_listed_fails_by_name_also_where_its_memory_is_unknown(judged: Judged) -> None:
    listed = [{"pid": os.getpid(), "memory_bytes": None, "uid": 0}]
    result, reason = judged(reported(IDLE | {"processes": listed}))
    assert result == "failed"
    assert reason is not None
    assert reason.startswith(f"process {os.getpid()} (")
    assert reason.endswith(") runs on GPU 0 (GPU-1)")


def test_what_a_service_of_the_baseline_uses_is_no_tenants(judged: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_unit_and_command", lambda _pid: ("exporter.service", "/usr/bin/exporter"))
    listed = [{"pid": 4711, "memory_bytes": 500 * MIB, "uid": 0}]
    assert judged(reported(IDLE | {"processes": listed, "memory_used_bytes": 520 * MIB})) == ("passed", None)
    more = judged(reported(IDLE | {"processes": listed, "memory_used_bytes": 600 * MIB}))
    assert more == ("failed", "100 MiB of GPU 0 (GPU-1) are in use")


@pytest.mark.parametrize("silent", ["memory_used_bytes", "processes"])
def test_a_gpu_that_does_not_tell_is_not_clean(judged: Judged, silent: str) -> None:
    errors = [{"field": silent, "code": 15, "message": "GPU is lost"}]
    assert judged(reported(IDLE | {silent: None, "errors": errors})) == (
        "failed",
        "GPU 0 (GPU-1) does not tell what it is used for: GPU is lost",
    )
    unnamed = reported(IDLE, message="1 of 2 GPUs do not tell their UUID")
    assert judged(unnamed) == ("failed", "1 of 2 GPUs do not tell their UUID")


@pytest.mark.parametrize("state", ["no_library", "driver_not_loaded", "mismatch", "error", "stale"])
def test_a_driver_that_does_not_answer_passes_only_where_there_never_was_a_gpu(
    judged: Judged, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, without = reported(state=state, message="it hangs"), verify.Asked(17, "lease17", 20017, {"gpu_holders": []})
    said = ("failed", f"the driver tells of no GPU ({state}): it hangs")
    monkeypatch.setattr(gpus, "are_there", lambda: True)
    assert judged(silent, without) == said
    monkeypatch.setattr(gpus, "are_there", lambda: False)
    assert judged(silent) == said, "a service of the baseline held one"
    assert judged(silent, without) == ("not_applicable", "this host has no GPU")


def test_a_look_that_is_early_is_repeated_until_the_driver_has_freed_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = iter([reported(IDLE | {"memory_used_bytes": 900 * MIB}), reported(IDLE)])
    monkeypatch.setattr(gpus, "ask", lambda: next(looks))
    assert verify._gpu_memory(ASKED) == []


# --- files of accounts


def test_a_file_of_accounts_that_all_may_write_is_named_and_so_is_its_copy(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("shadow", "shadow-")]
    for path in paths:
        Path(path).touch()
    rights = {"is_file": True, "mode": 0o640, "uid": os.getuid(), "gid": os.getgid(), "has_acl": False}
    asked = verify.Asked(None, None, None, {"account_files": {paths[0]: rights}})
    for mode, named in ((0o640, []), (0o666, paths)):
        for path in paths:
            Path(path).chmod(mode)
        said = list(verify._rights(asked, paths[0]))
        assert said == [f"{path} has another owner or mode than in the baseline" for path in named]


# --- programs that lend power


def change_mode(program: Path) -> None:
    program.chmod(0o2755)


def change_content(program: Path) -> None:
    """Of the same length, and as mighty as before."""
    program.write_bytes(b"#!/bin/si\n")
    program.chmod(0o4755)


def change_nothing(program: Path) -> None:
    program.touch()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_nothing, []),
        (change_mode, ["{} lends other power than in the baseline"]),
        (change_content, ["{} has another content than in the baseline"]),
    ],
)
@pytest.mark.parametrize("is_large", [False, True])
def test_a_program_that_lends_power_is_compared_in_mode_and_content(
    change: Callable[[Path], None], said: list[str], is_large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"#!/bin/sh\n")
    program.chmod(0o4755)
    if is_large:
        monkeypatch.setattr(files, "_DIGEST_LIMIT_BYTES", 5)
    known = {str(program): {**(files.look_at(str(program)) or {}), "capabilities": None}}
    change(program)
    if is_large and change is change_content:
        program.write_bytes(b"#!/bin/sh, and more\n")
        program.chmod(0o4755)
    found = list(
        verify._programs_that_lend(verify.Asked(None, None, None, {"special_files": known}), {str(program)}, set())
    )
    assert found == [text.format(program) for text in said]


PACKAGED = "/usr/bin/passwd"  # of Debian's package passwd, set-uid


def test_a_program_that_an_upgrade_has_brought_is_no_tenants(tmp_path: Path) -> None:
    """By the package's own digests, which `dpkg` tells; one that is in no package has nobody to speak for it."""
    other = tmp_path / "other"
    shutil.copy(PACKAGED, other)
    other.chmod(0o4755)
    paths = {PACKAGED, str(other)}
    known = {path: {**(files.look_at(path) or {}), "capabilities": None, "sha256": "0" * 64} for path in paths}
    asked = verify.Asked(None, None, None, {"special_files": known})
    assert list(verify._programs_that_lend(asked, paths, set())) == [
        f"{other} has another content than in the baseline"
    ]
    known[PACKAGED]["mode"] = 0o755
    assert f"{PACKAGED} lends other power than in the baseline" in verify._programs_that_lend(asked, paths, set())


def test_a_file_is_its_packages_whichever_way_it_is_spelt() -> None:
    """Debian 12 brings /lib/modules, Debian 13 /usr/lib/modules; dpkg knows a path by its package's word alone."""
    assert list(verify._who_brought([PACKAGED.removeprefix("/usr")])) == [("passwd", PACKAGED)]


def test_the_content_of_a_program_that_a_tenant_left_is_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "left"
    program.touch(0o755)
    program.chmod(0o4755)
    monkeypatch.setattr(verify, "run", lambda argv, **_: pytest.fail(f"started {argv}"))
    found = list(
        verify._programs_that_lend(verify.Asked(None, None, None, {"special_files": {}}), {str(program)}, set())
    )
    assert found == [f"{program} lends power and is not in the baseline"]


def test_a_store_is_entered_where_others_can_enter_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = programs_in_a_store(tmp_path)
    monkeypatch.setattr(special, "STORES", (str(tmp_path / "store"),))
    monkeypatch.setattr(
        verify, "run", lambda argv, **how: f"{tmp_path}\n" if argv[0] == "findmnt" else run(argv, **how)
    )
    assert sorted(verify._find_everywhere("-type", "f")) == programs[:2]
    (tmp_path / "store").chmod(0o710)
    assert list(verify._find_everywhere("-type", "f")) == programs[:1]
    place = tmp_path / "store" / "open"
    monkeypatch.setattr(verify, "run", lambda argv, **how: f"{place}\n" if argv[0] == "findmnt" else run(argv, **how))
    assert list(verify._find_everywhere("-type", "f")) == [], "what is mounted there is as far away"
    (tmp_path / "store").chmod(0o711)
    assert list(verify._find_everywhere("-type", "f")) == programs[1:2]


def programs_in_a_store(folder: Path) -> list[str]:
    """One beside the store, one in an open folder of it, and one where only root comes."""
    paths = [folder / "beside", folder / "store" / "open" / "left", folder / "store" / "shut" / "layer"]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o755)
    (folder / "store").chmod(0o711)
    (folder / "store" / "open").chmod(0o755)
    (folder / "store" / "shut").chmod(0o710)
    return [str(path) for path in paths]


# --- what any lease may write to


def test_what_any_lease_may_write_is_named_and_what_the_baseline_knows_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(special, "_others_reach", lambda path: Path(path).parent.name != "private")
    (tmp_path / "data").mkdir()
    (tmp_path / "private").mkdir()
    paths = [tmp_path / name for name in ("data/his", "private/his", "program", "fine")]
    for path in paths:
        path.touch()
        path.chmod(0o644 if path.name == "fine" else 0o666)
    (tmp_path / "data").chmod(0o777)
    monkeypatch.setattr(
        verify, "run", lambda argv, **how: f"{tmp_path}\n" if argv[0] == "findmnt" else run(argv, **how)
    )
    monkeypatch.setattr(special, "STORES", (str(tmp_path / "none"),))
    sections = {"special_files": {}, "accounts": {"/etc/group": {}}, "open_files": {str(tmp_path / "data"): 0o777}}
    assert list(verify._special_files(verify.Asked(None, None, None, sections))) == [
        f"{tmp_path}/program may be written by any lease"
    ]


def test_what_was_put_among_a_packages_units_is_named_whichever_way_the_package_spells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(tmp_path / name) for name in (r"cr\x2don.service", "his.service", "left.service")]
    for path in paths:
        Path(path).touch()
    cron, his, left = paths
    said = f"diversion by x from: {left}\ncron, systemd: {cron}\n"
    monkeypatch.setattr(baseline, "LOADED_BY_ITSELF", (str(tmp_path),))
    asked_dpkg: list[str] = []

    def answer(argv: list[str], **how: Any) -> str:
        asked_dpkg.extend(argv if argv[0] == "dpkg" else [])
        return said if argv[0] == "dpkg" else run(argv, **how)

    monkeypatch.setattr(verify, "run", answer)
    before = {path: files.look_at(path) for path in (his, f"{tmp_path}/gone.service", cron)}
    before[f"{tmp_path}/gone.service"] = before[his]
    asked = verify.Asked(None, None, None, {"unpackaged": before})
    assert list(verify._unpackaged(asked)) == [
        f"{tmp_path}/gone.service is missing",
        f"{left} is not in the baseline",
    ]
    assert cron.replace("\\", "\\\\") in asked_dpkg, "to dpkg a backslash begins a pattern"
    assert list(verify._unpackaged(replace(asked, sections={}))) == [], "an older baseline does not tell"


# --- upgrades


def test_a_setting_that_an_upgrade_has_brought_is_no_tenants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / name for name in ("upgraded", "his", "new")]
    for path in paths[:2]:
        path.write_text("first")
    before = {str(path): files.look_at(str(path)) for path in paths[:2]}
    for path in paths:
        path.write_text("second")
    digest = hashlib.md5(b"second", usedforsecurity=False).hexdigest()
    said = "Conffiles:\n" + "".join(f" {path} {digest}\n" for path in paths[:2])
    monkeypatch.setattr(verify, "run", lambda argv, **how: said if argv[0] == "dpkg-query" else run(argv, **how))
    monkeypatch.setitem(baseline.FILE_ROOTS, "hosts", tuple(map(str, paths)))
    sections = {
        "hosts": before,
        "conffiles": {str(paths[0]): True, str(paths[1]): False},
        "accounts": {"/etc/passwd": {}},
    }
    check = verify._files("hosts")
    assert list(check(verify.Asked(None, None, None, sections))) == [
        f"{paths[1]} has another sha256 than in the baseline",
        f"{paths[2]} is not in the baseline",
    ]
    del sections["conffiles"]
    assert len(list(check(verify.Asked(None, None, None, sections)))) == 3, "an older baseline tells of no upgrade"


def test_a_daemon_that_runs_on_after_its_upgrade_is_no_new_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {"1": "/usr/bin/passwd (deleted)", "2": "/usr/bin/left (deleted)"}
    lines = [
        f'tcp LISTEN 0 128 0.0.0.0:{port} 0.0.0.0:* users:(("x",pid={pid},fd=3))' for port, pid in ((22, 1), (23, 2))
    ]
    answers = {"ss": lambda _: "\n".join(lines), "readlink": lambda argv: programs[argv[1].split("/")[2]] + "\n"}
    monkeypatch.setattr(
        verify, "run", lambda argv, **how: answers[argv[0]](argv) if argv[0] in answers else run(argv, **how)
    )
    known = [
        {"protocol": "tcp", "address": "0.0.0.0", "port": port, "program": program}
        for port, program in ((22, PACKAGED), (23, "/usr/bin/left"))
    ]
    assert list(verify._listening_ports(verify.Asked(None, None, None, {"listening_ports": known}))) == [
        "tcp port 23 on 0.0.0.0 is open: /usr/bin/left (deleted) listens"
    ]
