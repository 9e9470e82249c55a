"""What a tenant leaves in file systems of his own, by the kernel of whoever runs the test."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from remotegpu_agent.cleaning import data, schedules
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Finding, Step
from remotegpu_agent.observe import special
from tests.unit.agent.test_cleaning import mine

__all__ = ["mine"]


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Mounts a file system in user space there, whose server is dead."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("only root can mount one, where the kernel has FUSE")
    libc = ctypes.CDLL(None, use_errno=True)
    mounted: list[Path] = []

    def mount(where: Path) -> None:
        where.mkdir(parents=True)
        server = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
        if libc.mount(b"left", os.fsencode(where), b"fuse", 0, options) != 0:
            pytest.skip(f"nothing can be mounted here: {os.strerror(ctypes.get_errno())}")
        mounted.append(where)
        os.close(server)

    yield mount
    for where in mounted:
        libc.umount2(os.fsencode(where), 2)


@pytest.mark.parametrize("inner", ["", "user", "user/left.wants"])
def test_a_dead_file_system_among_user_units_is_named_and_goes_with_them(
    dead: Callable[[Path], None], mine: Scope, inner: str
) -> None:
    """`fusermount3` is every user's: else each tenant could have the machine quarantined by one kill."""
    here = replace(mine)
    here.__dict__.update(uids=frozenset({20017}), subordinate_uids=())
    where = Path(mine.home, ".config/systemd", inner)
    dead(where)
    with pytest.raises(OSError, match="not connected"):
        where.stat()
    step = Step("user_units", schedules.look_for_user_units, schedules.end_user_units)
    before = step.first_look(here)
    assert str(where) in before["found"]
    assert f"{mine.home}/.config" in {each.path for each in special.walk()}, "and hides nothing else"
    report = step.run(here, before)
    assert (report["result"], report["acted"][0]) == ("passed", f"unmounted {where}")
    assert not Path(mine.home, ".config/systemd").exists()


def test_a_dead_file_system_is_let_go_though_somebody_or_another_mount_holds_it(
    dead: Callable[[Path], None], mine: Scope
) -> None:
    where = Path(mine.home, "left")
    dead(where)
    holder = os.open(where, os.O_PATH)
    assert list(data.unmount(mine, [Finding(str(where), "")])) == [f"unmounted {where}"]
    os.close(holder)
    assert list(where.iterdir()) == []
