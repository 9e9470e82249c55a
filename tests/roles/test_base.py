"""The keys that the base role brings, as it decides about them: what is ours, what has to go, whom it names."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.roles.rendering import DISTRIBUTIONS, Role
from tests.support.rendering import ROLES

ADA = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAdaAdaAdaAdaAdaAdaAdaAdaAdaAdaAdaAdaAdaAda1"
PORTAL = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPortalPortalPortalPortalPortalPortalPor1"
FOREIGN = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIForeignForeignForeignForeignForeignFo1"


def facts() -> dict[str, str]:
    """What tasks/keys.yml decides, by name."""
    tasks = yaml.safe_load((ROLES / "base/tasks/keys.yml").read_text())
    return {name: text for task in tasks for name, text in task.get("ansible.builtin.set_fact", {}).items()}


def base(**said: Any) -> Role:
    (named,) = [
        task
        for task in yaml.safe_load((ROLES / "base/tasks/operator_keys.yml").read_text())
        if "__base_keyed" in task.get("vars", {})
    ]
    role = Role("base", __base_login="ops", **said)
    role.variables["__base_keyed"] = role.expression(named["vars"]["__base_keyed"])
    return role


def gone(role: Role, recorded: list[str]) -> list[list[str]]:
    wanted = [line for line in role.template("operator_keys.j2").split("\n") if line]
    said = {"__base_listed": wanted, "__base_look": {"stdout_lines": [f"listed {each}" for each in recorded]}}
    return list(role.expression(facts()["__base_gone"], **said))


def test_our_list_names_each_key_by_login_type_and_key_without_the_comment() -> None:
    role = base(
        base_operator_keys=[f"{PORTAL} portal"],
        base_users=[{"name": "ada", "keys": [ADA]}, {"name": "bob", "sudo": True}],
    )
    assert role.lines("operator_keys.j2") == [f"ops {PORTAL}", f"ada {ADA}"]


def test_another_comment_is_the_same_key() -> None:
    assert gone(base(base_operator_keys=[f"{PORTAL} a new name"]), [f"ops {PORTAL}"]) == []


def test_a_key_goes_from_the_login_that_lost_it_and_from_no_other() -> None:
    role = base(base_operator_keys=[PORTAL], base_users=[{"name": "bob", "keys": [ADA]}])
    recorded = [f"ops {PORTAL}", f"ops {ADA}", f"ada {ADA}", f"bob {ADA}"]
    assert gone(role, recorded) == [["ada", *ADA.split()], ["ops", *ADA.split()]]


def test_where_nothing_is_recorded_nothing_is_ours_and_nothing_goes() -> None:
    assert gone(base(base_operator_keys=[]), []) == []


def test_the_list_is_written_before_a_key_is_placed_and_shortened_after_one_has_gone() -> None:
    """A run that is cut off in between must not leave a key of ours that the next run takes for somebody else's."""
    names = [task["name"] for task in yaml.safe_load((ROLES / "base/tasks/keys.yml").read_text())]
    order = [
        "Ensure our list names every key that we bring",
        "Ensure operators' keys open their logins",
        "Take away what is not wanted any more",
    ]
    assert [name for name in names if name in order] == order
    gone_names = [task["name"] for task in yaml.safe_load((ROLES / "base/tasks/keys_gone.yml").read_text())]
    assert gone_names.index("Disarm the way back") < gone_names.index("Ensure our list names no other key")


def test_keys_of_somebody_else_are_named_and_ours_are_not() -> None:
    tasks = yaml.safe_load((ROLES / "base/tasks/keys.yml").read_text())
    (named,) = [task for task in tasks if task["name"] == "Name the keys of somebody else"]
    role = base(base_operator_keys=[PORTAL])
    lines = ["# a comment", "", f"{PORTAL} portal", f'from="*" {FOREIGN} mallory@example.org']
    look = {"stdout_lines": [f"listed ops {PORTAL}", *(f"opens ops {line}" for line in lines), f"opens ada {ADA}"]}
    said = {"__base_listed": [f"ops {PORTAL}"], "__base_recorded": [f"ops {PORTAL}"], "__base_look": look}
    known = role.expression(named["vars"]["__base_known"], **said)
    foreign = role.expression(named["vars"]["__base_foreign"], __base_known=known, **said)
    assert foreign == ['from="*" ssh-ed25519 …' + FOREIGN[-8:] + " mallory@example.org"]


def test_an_operator_without_keys_is_no_trouble() -> None:
    tasks = yaml.safe_load((ROLES / "base/tasks/assert.yml").read_text())
    (asked,) = [task for task in tasks if "__base_odd_keys" in task.get("vars", {})]
    role = base(base_users=[{"name": "bob"}, {"name": "ada", "keys": ["no key"]}])
    every = role.expression(asked["vars"]["__base_all_keys"])
    assert role.expression(asked["vars"]["__base_odd_keys"], __base_all_keys=every) == ["no key"]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_login_rules_by_a_line_of_its_own_once_on_every_distribution(distribution: str) -> None:
    role = Role("base", distribution, __base_sudoers=["ops", "ada", "ops"])
    assert role.lines("sudoers.j2") == ["ada ALL=(ALL:ALL) NOPASSWD: ALL", "ops ALL=(ALL:ALL) NOPASSWD: ALL"]
    assert distribution.replace(" ", "_") in role.value("__base_supported")
    assert {"openssh-server", "sudo", "python3-apt"} <= set(role.value("__base_packages"))
    assert role.value("__base_time_sync_service") == "systemd-timesyncd.service"
