"""Operators whom a playbook lets in or out between two baselines: a cleaning gives nobody back what was taken away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent import baseline, verify
from remotegpu_agent.cleaning import restored
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.observe import accounts, files, operators

PORTAL, ADA, OLD = (f"ssh-ed25519 AAAA{name}" for name in ("portal", "ada", "old"))
FOREIGN, EVIL = "ssh-rsa AAAAcloud from the image", "ssh-ed25519 AAAAevil"


class Host:
    """A home with keys, the list of those that we have brought, and who may use sudo; as it was, and as it is."""

    def __init__(self, folder: Path) -> None:
        self.keys = folder / "ops/.ssh/authorized_keys"
        self.list, self.sudo = folder / "operator_keys", folder / "remotegpu-operators"
        self.keys.parent.mkdir(parents=True)
        self.opens(PORTAL, FOREIGN, ADA, OLD)
        self.lists(f"{PORTAL} portal", ADA, OLD)
        self.lets("ada", "ops")
        self.passwd = {"ops": [f"ops:x:1000:1000::{folder}/ops:/bin/bash"]}
        self.sections: dict[str, Any] = {
            "accounts": {"/etc/passwd": self.passwd},
            "ssh_keys": files.snapshot([str(self.keys.parent)], keep=lambda _path: True),
            "sudoers": files.snapshot([str(self.sudo)], keep=lambda _path: True),
        }

    def opens(self, *lines: str) -> None:
        self.keys.write_text("".join(f"{line}\n" for line in lines))

    def lists(self, *keys: str) -> None:
        self.list.write_text("".join(f"ops {key}\n" for key in keys))

    def lets(self, *names: str) -> None:
        self.sudo.write_text("# ours\n" + "".join(f"{name} ALL=(ALL:ALL) NOPASSWD: ALL\n" for name in names))

    def clean(self, section: str) -> list[str]:
        """What a cleaning says of a section, and puts back."""
        scope = Scope(17, "lease17", 20017, 20017, "/home/lease17", self.sections)
        found = list(restored.look_for_changes(section)(scope))
        assert bool(found) == bool(self.verified(section)), "verification finds what cleaning finds"
        list(restored.put_back(scope, found))
        assert list(restored.look_for_changes(section)(scope)) == []
        assert self.verified(section) == []
        return [finding.text for finding in found]

    def verified(self, section: str) -> list[str]:
        return list(verify._files(section)(verify.Asked(17, "lease17", 20017, self.sections)))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    users = [accounts.User("ops", 1000, 1000, str(tmp_path / "ops"), "/bin/bash")]
    monkeypatch.setattr(accounts, "users", lambda _lines=None: users)
    monkeypatch.setattr(operators, "LIST", str(made.list))
    monkeypatch.setattr(operators, "SUDO", str(made.sudo))
    monkeypatch.setitem(baseline.FILE_ROOTS, "sudoers", (str(made.sudo),))
    return made


def test_a_key_that_an_operator_has_taken_away_does_not_come_back(host: Host) -> None:
    host.lists(f"{PORTAL} portal", ADA)
    host.opens(PORTAL, FOREIGN, ADA)
    assert host.clean("ssh_keys") == []
    assert host.keys.read_text().splitlines() == [PORTAL, FOREIGN, ADA]


def test_a_key_that_somebody_else_has_taken_away_comes_back_and_one_that_was_added_goes(host: Host) -> None:
    host.lists(f"{PORTAL} portal", ADA)
    host.opens(FOREIGN, ADA, EVIL)
    [told] = host.clean("ssh_keys")
    assert "keys added: SHA256:" in told
    assert host.keys.read_text().splitlines() == [PORTAL, FOREIGN, ADA]
    host.keys.unlink()
    assert len(host.clean("ssh_keys")) == 1
    assert host.keys.read_text().splitlines() == [PORTAL, ADA], "nothing comes back that the list does not name"


def test_a_key_is_let_in_by_the_baseline_alone_whatever_the_list_says(host: Host) -> None:
    host.lists(f"{PORTAL} portal", ADA, OLD, EVIL)
    host.opens(PORTAL, FOREIGN, ADA, OLD, EVIL)
    assert len(host.clean("ssh_keys")) == 1
    assert host.keys.read_text().splitlines() == [PORTAL, FOREIGN, ADA, OLD]


def test_a_key_of_one_login_opens_no_other(host: Host) -> None:
    host.list.write_text(f"ops {PORTAL} portal\nops {ADA}\nbob {OLD}\n")
    host.opens(PORTAL, FOREIGN, ADA)
    assert host.clean("ssh_keys") == []


def test_a_host_without_the_list_is_put_back_whole(host: Host) -> None:
    host.list.unlink()
    host.opens(PORTAL)
    assert len(host.clean("ssh_keys")) == 1
    assert host.keys.read_text().splitlines() == [PORTAL, FOREIGN, ADA, OLD]


def test_sudo_that_was_taken_away_stays_away_and_what_was_added_goes(host: Host) -> None:
    host.lets("ops")
    assert host.clean("sudoers") == []
    host.lets("ops", "lease17")
    host.sudo.chmod(0o666)
    assert len(host.clean("sudoers")) == 1
    assert "lease17" not in host.sudo.read_text()
    assert "ada" not in host.sudo.read_text()
    assert host.sudo.stat().st_mode & 0o777 == host.sections["sudoers"][str(host.sudo)]["mode"]


def test_an_operator_who_was_added_is_named_and_left_and_a_tenants_other_account_is_not(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.list.write_text(f"ops {PORTAL} portal\nbob {ADA}\nlease18 {EVIL}\n")
    ids = {"ops": 1000, "bob": 1001, "mallory": 1002, "lease18": 20018}
    users = [accounts.User(name, uid, uid, f"/home/{name}", "/bin/sh") for name, uid in ids.items()]
    monkeypatch.setattr(accounts, "users", lambda lines=None: users[:1] if lines else users)
    monkeypatch.setattr(accounts, "lines", lambda path: {name: [name] for name in ids} if path == "/etc/passwd" else {})
    here = Scope(17, "lease17", 20017, 20017, "/home/lease17", host.sections)
    assert {name for name, uid in ids.items() if here.is_tenants(uid)} == {"mallory", "lease18"}
    assert not here.owns(1001)
    assert restored._good_lines("/etc/passwd", "bob", {}, []) is None
    assert restored._good_lines("/etc/passwd", "mallory", {}, []) == []
    told = {finding.subject[1]: finding.text for finding in restored._changed_lines(here, "/etc/passwd")}
    assert told["mallory"] == "/etc/passwd: the entry of mallory is not in the baseline"
    assert "an operator's by the list of their keys" in told["bob"], "so the host is not proven clean by it"
