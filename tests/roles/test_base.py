"""The keys that the base role brings, as it decides about them: what is ours, what has to go, whom it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from tests.roles.rendering import DISTRIBUTIONS, Role
from tests.support.rendering import ROLES

ADA = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAdaAdaAdaAdaAdaAdaAdaAdaAdaAdaAdaAdaAdaAda1"
PORTAL = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPortalPortalPortalPortalPortalPortalPor1"
FOREIGN = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIForeignForeignForeignForeignForeignFo1"


def base(**said: Any) -> Role:
    (named,) = [
        task
        for task in yaml.safe_load((ROLES / "base/tasks/operator_keys.yml").read_text())
        if "__base_keyed" in task.get("vars", {})
    ]
    role = Role("base", __base_login="ops", **said)
    of_login = role.expression(named["vars"]["__of_login"])
    role.variables["__base_keyed"] = role.expression(named["vars"]["__base_keyed"], __of_login=of_login)
    return role


@dataclass(frozen=True)
class Decided:
    """What tasks/keys.yml makes of a list that it finds on the host: which keys go, and what the list says then."""

    gone: list[str]
    kept: list[str]
    meanwhile: list[str]  # until they are gone


def decide(role: Role, recorded: list[str], opens: Sequence[str] = ()) -> Decided:
    tasks = yaml.safe_load((ROLES / "base/tasks/keys.yml").read_text())
    look = [*(f"listed {each}" for each in recorded), *(f"opens {each}" for each in opens)]
    said: dict[str, Any] = {"__base_look": {"stdout_lines": look}}
    said["__base_listed"] = sorted({*role.lines("operator_keys.j2")} - {"None"})  # for nothing at all
    for task in tasks[1:]:
        if facts := task.get("ansible.builtin.set_fact"):
            own = {name: role.expression(text, **said) for name, text in task.get("vars", {}).items()}
            said |= {name: role.expression(text, **own, **said) for name, text in facts.items()}
        if task["name"] == "Ensure our list names every key that we bring":
            said["__base_going"] = role.expression(task["vars"]["__base_going"], **said)
            said["__base_lines"] = role.expression(task["vars"]["__base_lines"], **said)
    return Decided([" ".join(each) for each in said["__base_gone"]], said["__base_kept"], said["__base_lines"])


def gone(role: Role, recorded: list[str]) -> list[str]:
    return decide(role, recorded).gone


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
    assert gone(role, recorded) == [f"ada {ADA}", f"ops {ADA}"]


def test_an_operators_own_run_leaves_the_portal_its_way_in() -> None:
    recorded = [f"ops {ADA}", f"ops {PORTAL} portal"]
    assert decide(base(), recorded) == Decided([], recorded, recorded)
    assert decide(base(base_operator_keys=[ADA]), recorded) == Decided([], recorded, recorded)
    replaced = [f"ops {FOREIGN}", f"ops {PORTAL} portal"]
    assert decide(base(base_operator_keys=[FOREIGN]), recorded) == Decided(
        [f"ops {ADA}"], replaced, sorted([*replaced, f"ops {ADA}"])
    )


def test_the_portals_run_leaves_an_operator_his_and_replaces_its_own() -> None:
    recorded = [f"ops {ADA}", f"ops {PORTAL} portal"]
    role = base(remotegpu_operator_keys=[f"{FOREIGN} the portal's next one"])
    replaced = [f"ops {ADA}", f"ops {FOREIGN} portal"]
    assert decide(role, recorded) == Decided([f"ops {PORTAL}"], replaced, sorted([*replaced, f"ops {PORTAL} portal"]))


def test_a_key_that_both_have_listed_stays_until_neither_does() -> None:
    both = [f"ops {PORTAL}", f"ops {PORTAL} portal"]
    role = base(base_operator_keys=[PORTAL], remotegpu_operator_keys=[PORTAL])
    assert decide(role, []) == Decided([], both, both)
    assert decide(base(base_operator_keys=[ADA]), both).gone == [], "it is the portal's as well"
    assert decide(base(base_operator_keys=[ADA]), both).kept == [f"ops {ADA}", f"ops {PORTAL} portal"]


def test_a_list_of_before_the_mark_gets_it_from_the_portals_next_run() -> None:
    marked = [f"ops {PORTAL} portal"]
    assert decide(base(remotegpu_operator_keys=[PORTAL]), [f"ops {PORTAL}"]) == Decided([], marked, marked)


def test_lists_that_only_add_take_nobodys_key_away_but_the_one_that_is_refused() -> None:
    """So a key is rotated by a run that knows of this key alone."""
    recorded = [f"ada {ADA}", f"ops {ADA}", f"ops {PORTAL} portal"]
    adding = base(base_operator_keys=[FOREIGN], base_keys_exclusive=False)
    more = sorted([*recorded, f"ops {FOREIGN}"])
    assert decide(adding, recorded) == Decided([], more, more)
    refusing = base(base_operator_keys=[FOREIGN], base_keys_exclusive=False, base_refused_keys=[f"{ADA} ada@work"])
    left = [f"ada {ADA}", f"ops {FOREIGN}", f"ops {PORTAL} portal"]
    assert decide(refusing, more) == Decided([f"ops {ADA}"], left, more)


def test_a_key_that_is_refused_goes_whoever_has_put_it_there() -> None:
    role = base(base_refused_keys=[FOREIGN])
    opens = [f"ops {ADA} ada", f"ops no-pty {FOREIGN} an installer", f"ada {PORTAL}"]
    assert decide(role, [], opens) == Decided([f"ops {FOREIGN}"], [], [])
    assert decide(role, [], [f"ops # {FOREIGN}", f"ada {FOREIGN}"]).gone == [], "it opens this login no more"
    assert decide(role, [f"ops {FOREIGN} portal"], opens).gone == [f"ops {FOREIGN}"]


def test_a_key_that_is_refused_is_not_let_in_by_a_list_that_still_names_it() -> None:
    users = [{"name": "ops", "keys": [FOREIGN, PORTAL]}, {"name": "ada", "keys": [FOREIGN]}]
    named = f"{FOREIGN} with a comment"
    role = base(base_operator_keys=[named, ADA], base_users=users, base_refused_keys=[f"{FOREIGN} leaked"])
    placed = {each["name"]: each["keys"] for each in role.value("__base_keyed") if not each.get("by")}
    assert placed == {"ops": [ADA, PORTAL], "ada": [FOREIGN]}, "ada's login is hers"
    kept = [f"ada {FOREIGN}", f"ops {ADA}", f"ops {PORTAL}"]
    assert decide(role, []) == Decided([], kept, kept)
    assert decide(role, kept, [f"ops {FOREIGN} somebody"]).gone == [f"ops {FOREIGN}"]
    assert decide(role, kept) == Decided([], kept, kept), "and a second run finds nothing to do"
    of_portal = base(remotegpu_operator_keys=[PORTAL], base_refused_keys=[PORTAL])
    assert [each["keys"] for each in of_portal.value("__base_keyed")] == [[], []]


def test_a_way_back_that_a_run_left_armed_is_proven_needless_though_no_key_has_to_go() -> None:
    """Or it brings back the keys of before over those that are listed now."""
    tasks = yaml.safe_load((ROLES / "base/tasks/keys.yml").read_text())
    (taking,) = [task for task in tasks if task["name"] == "Take away what is not wanted any more"]
    role = base(base_operator_keys=[ADA])
    when = "{{ " + taking["when"] + " }}"
    assert role.expression(when, __base_gone=[], __base_look={"stdout_lines": [f"listed ops {ADA}", "armed"]})
    assert not role.expression(when, __base_gone=[], __base_look={"stdout_lines": [f"listed ops {ADA}"]})


def test_a_key_that_is_rotated_from_a_shell_is_an_operators_though_the_inventory_tells_the_portals() -> None:
    shell = Role("rotate_credentials", remotegpu_operator_keys=[PORTAL])
    assert shell.value("rotate_credentials_portal_keys") == []
    run_of_the_portal = Role(
        "rotate_credentials", remotegpu_operator_keys=[PORTAL], remotegpu_rotate_key_file="/secrets/ssh_ed25519"
    )
    assert run_of_the_portal.value("rotate_credentials_portal_keys") == [PORTAL]


def test_where_nothing_is_recorded_nothing_is_ours_and_nothing_goes() -> None:
    assert decide(base(), []) == Decided([], [], [])


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
    look = {
        "stdout_lines": [f"listed ops {PORTAL} portal", *(f"opens ops {line}" for line in lines), f"opens ada {ADA}"]
    }
    ours = [f"ops {PORTAL} portal"]
    said = {"__base_listed": ours, "__base_recorded": ours, "__base_look": look}
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
