"""Passwords: the policy, the real hash, and the random ones."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from argon2 import extract_parameters
from argon2.low_level import Type

from portal.services import passwords


def test_the_portal_hashes_with_argon2id_and_real_work():
    """The module as the portal loads it, not as the tests have lightened it."""
    real = importlib.util.module_from_spec(passwords.__spec__)
    passwords.__spec__.loader.exec_module(real)
    given = extract_parameters(real.hash_of("correct horse battery"))
    assert given.type is Type.ID
    assert given.memory_cost >= 64 * 1024
    assert given.time_cost >= 3
    assert given.salt_len >= 16


def test_a_hash_matches_its_password_and_no_other():
    kept = passwords.hash_of("correct horse battery")
    assert passwords.matches("correct horse battery", kept)
    assert not passwords.matches("Correct horse battery", kept)
    assert passwords.hash_of("correct horse battery") != kept


def test_a_damaged_hash_matches_nothing():
    for damaged in ("", "-", "$argon2id$", "plain"):
        assert not passwords.matches("plain", damaged)


@pytest.mark.parametrize(
    ("password", "why"),
    [
        ("short", "at least 12"),
        ("x" * 201, "at most 200"),
        ("abababababababab", "5 different"),
        ("hello Olga, hello", "user name"),
        ("", "at least 12"),
    ],
)
def test_the_policy_says_what_is_wrong(password, why):
    assert any(why in problem for problem in passwords.problems_of(password, username="olga"))


def test_random_passwords_pass_the_policy_and_differ():
    made = {passwords.random_password() for _ in range(200)}
    assert len(made) == 200
    assert all(not passwords.problems_of(password, username="olga") for password in made)
    assert not any(set("il1o0") & set(password) for password in made)


UNDER_GEVENT = """
from gevent import monkey; monkey.patch_all()
import time
import gevent
from portal.services import passwords
ticks = []
def tick():
    while True:
        ticks.append(time.monotonic())
        gevent.sleep(0.001)
gevent.spawn(tick)
gevent.sleep(0.01)
before = len(ticks)
kept = passwords.hash_of("correct horse battery")
print(len(ticks) - before, passwords.matches("correct horse battery", kept), passwords.matches("no", kept))
"""


def test_under_gevent_the_other_greenlets_go_on_while_a_password_is_hashed():
    told = subprocess.run([sys.executable, "-c", UNDER_GEVENT], capture_output=True, text=True, check=True)
    ticks, right, wrong = told.stdout.split()
    assert int(ticks) >= 3, told.stdout
    assert (right, wrong) == ("True", "False")
