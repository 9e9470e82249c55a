"""The vault: what goes in comes out, and nothing else does."""

from __future__ import annotations

import dataclasses

import pytest

from portal.errors import Unavailable
from portal.services import vault


@pytest.fixture
def unlocked(settings):
    vault.unlock(settings)
    return settings


@pytest.mark.parametrize("secret", ["", "p", "pass word", "密码\n", "x" * 10000])
def test_what_is_sealed_can_be_read_again(unlocked, secret):
    sealed = vault.encrypt(secret)
    assert vault.decrypt(sealed) == secret
    assert len(secret) < 8 or secret not in sealed  # a letter may be there by chance


def test_the_same_secret_never_looks_the_same(unlocked):
    assert vault.encrypt("a") != vault.encrypt("a")


def test_another_key_reads_nothing(unlocked):
    sealed = vault.encrypt("a")
    vault.unlock(dataclasses.replace(unlocked, encryption_key="another key, 32 characters long!"))
    with pytest.raises(Unavailable, match="ENCRYPTION_KEY"):
        vault.decrypt(sealed)


def test_a_changed_byte_is_noticed(unlocked):
    sealed = vault.encrypt("secret")
    changed = sealed[:20] + ("A" if sealed[20] != "A" else "B") + sealed[21:]
    with pytest.raises(Unavailable):
        vault.decrypt(changed)


def test_a_process_that_never_unlocked_says_so(monkeypatch):
    monkeypatch.setattr(vault, "_fernet", None)
    with pytest.raises(RuntimeError, match="unlock"):
        vault.encrypt("a")
