"""What a tenant leaves in the kernel's keyrings, by the kernel of whoever runs the test."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from remotegpu_agent import verify
from remotegpu_agent.cleaning import keys
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Step
from tests.support.waiting import until
from tests.unit.agent.test_cleaning import SCOPE

# All hosts share one kernel, and its keys: no lease has this uid, so nobody else comes to these.
UID = 61_000 + os.getpid() % 4_000
ALL_FOR_HIM_AND_READ_FOR_OTHERS = 0x3F3F0003
NO_WRITING_FOR_HIM = 0x2B2B0000

PLANT = """
import ctypes, os, sys
add_key, keyctl = {"x86_64": (248, 250), "aarch64": (217, 219)}[os.uname().machine]
libc = ctypes.CDLL(None, use_errno=True)
ring, permissions, of_ring = (int(word) for word in sys.argv[1:])
if ring == 0:  # the one that stays for days
    ring = libc.syscall(keyctl, 22, -1, -2, 0, 0)
key = libc.syscall(add_key, b"user", b"left\\nbehind", b"a tenant's words", 16, ring)
done = key > 0 and libc.syscall(keyctl, 5, key, permissions, 0, 0) == 0
if of_ring:
    done = done and libc.syscall(keyctl, 5, ring, of_ring, 0, 0) == 0
sys.exit(0 if done else ctypes.get_errno())
"""


@pytest.fixture
def here() -> Iterator[Scope]:
    if os.geteuid() != 0 or not Path("/proc/keys").exists():
        pytest.skip("only root can leave a key as somebody else, on a kernel that keeps keys")
    scope = replace(SCOPE, uid=UID, gid=UID)
    scope.__dict__.update(uids=frozenset({UID}), subordinate_uids=())
    yield scope
    keys._clear(UID)  # of a test that failed, too: the key would be this machine's


def plant(ring: int, permissions: int, of_ring: int = 0) -> None:
    argv = ["/usr/bin/python3", "-I", "-c", PLANT, str(ring), str(permissions), str(of_ring)]
    done = subprocess.run(argv, user=UID, group=UID, extra_groups=[], cwd="/", check=False)
    if done.returncode in (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP):
        pytest.skip(f"nobody may keep a key here: {os.strerror(done.returncode)}")
    assert done.returncode == 0, os.strerror(done.returncode)


@pytest.mark.parametrize(
    ("ring", "of_ring"),
    [
        pytest.param(-4, 0, id="the user's"),
        pytest.param(-4, NO_WRITING_FOR_HIM, id="the user's, locked"),
        pytest.param(-5, 0, id="his sessions'"),
        pytest.param(0, 0, id="the one that stays for days"),
    ],
)
def test_a_key_that_others_may_read_is_named_by_both_and_goes(here: Scope, ring: int, of_ring: int) -> None:
    plant(ring, ALL_FOR_HIM_AND_READ_FOR_OTHERS, of_ring)
    asked = verify.Asked(17, "lease17", UID, {})
    found = [finding.text for finding in keys.look_for_keys(here)]
    said = list(verify._kernel_keys(asked))
    assert len(found) == len(said) == 1
    assert found[0].split()[2] == said[0].split()[2]
    step = Step("kernel_keys", keys.look_for_keys, keys.clear_keyrings, acts_anyway=True).run(here, None)
    assert (step["result"], step["acted"]) == ("passed", [f"cleared the keyrings of uid {UID}"])
    until(lambda: not list(verify._kernel_keys(asked)), "the kernel to forget it", timeout_s=10)


def test_what_only_he_could_read_goes_without_a_word(here: Scope) -> None:
    plant(-4, 0x3F3F0000)
    step = Step("kernel_keys", keys.look_for_keys, keys.clear_keyrings, acts_anyway=True)
    assert step.first_look(here) == {"count": 0, "found": []}
    assert step.run(here, None)["acted"] == []
    until(lambda: kept(UID) == 0, "the kernel to forget it", timeout_s=10)


def kept(uid: int) -> int:
    """Keys of the user beside the keyrings that the kernel has made for him."""
    code = f"import re; print(len(re.findall(r' {uid} +\\d+ user +left', open('/proc/keys').read())))"
    argv = ["/usr/bin/python3", "-I", "-c", code]
    said = subprocess.run(argv, user=uid, group=uid, extra_groups=[], cwd="/", check=True, capture_output=True)
    return int(said.stdout)
