#!/usr/bin/python
"""The rules of ufw that carry our comment: what is wanted is added, what is not wanted any more is deleted.

What others have added stays. Works while ufw is switched off as well; it is switched on in tasks/. What Docker
publishes, which ufw never sees, is in templates/chains.j2.
"""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Iterable
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: ufw_rules
short_description: Exactly our rules, beside those of others
description:
  - Compares the rules that carry our comment with those that are wanted, and adds and deletes.
options:
  open:
    description: "What is open: port, protocol (tcp if absent), sources (everywhere if absent or empty), comment."
    type: list
    elements: dict
    required: true
author: [RemoteGPU]
"""

RETURN = r"""
added:
  description: Commands that added a rule.
  returned: always
  type: list
  elements: str
deleted:
  description: Commands that deleted a rule.
  returned: always
  type: list
  elements: str
foreign:
  description: Rules without our comment, as ufw writes them.
  returned: always
  type: list
  elements: str
"""

MARK = "remotegpu"


def wanted_rules(openings: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Each rule as ufw writes it in `ufw show added`, with its comment."""
    wanted: dict[str, str] = {}
    for opening in openings:
        port, protocol = opening["port"], opening.get("protocol") or "tcp"
        said = opening.get("comment") or ""
        comment = f"{MARK}: {said}" if said else MARK
        sources = opening.get("sources") or []
        for source in sources:
            wanted.setdefault(f"allow from {_canonical(source)} to any port {port} proto {protocol}", comment)
        if not sources:
            wanted.setdefault(f"allow {port}/{protocol}", comment)
    return wanted


def _canonical(source: str) -> str:
    """As ufw stores it: host bits gone, no length behind a single address."""
    network = ipaddress.ip_network(source, strict=False)
    return str(network.network_address if network.num_addresses == 1 else network)


def present_rules(shown: str) -> dict[str, str]:
    """What `ufw show added` lists, with the comment of each or an empty text."""
    present: dict[str, str] = {}
    for line in shown.splitlines():
        if not line.startswith("ufw "):
            continue
        rule, _, comment = line.removeprefix("ufw ").partition(" comment ")
        present[rule] = comment.strip("'")
    return present


def is_ours(comment: str) -> bool:
    return comment == MARK or comment.startswith(f"{MARK}: ")


def plan(wanted: dict[str, str], present: dict[str, str]) -> tuple[list[list[str]], list[list[str]]]:
    """Arguments of ufw that add, then those that delete. A rule that somebody else has added is left to them."""
    ours = {rule: comment for rule, comment in present.items() if is_ours(comment)}
    foreign = present.keys() - ours.keys()
    add = [
        [*shlex.split(rule), "comment", comment]
        for rule, comment in wanted.items()
        if rule not in foreign and ours.get(rule) != comment
    ]
    delete = [["--force", "delete", *shlex.split(rule)] for rule in ours if rule not in wanted]
    return add, delete


def main() -> None:
    module = AnsibleModule(
        argument_spec={"open": {"type": "list", "elements": "dict", "required": True}}, supports_check_mode=True
    )
    module.run_command_environ_update = {"LC_ALL": "C"}
    ufw = module.get_bin_path("ufw", required=not module.check_mode, opt_dirs=["/usr/sbin", "/sbin"])
    shown = module.run_command([ufw, "show", "added"], check_rc=True)[1] if ufw else ""
    present = present_rules(shown)
    add, delete = plan(wanted_rules(module.params["open"]), present)
    if not module.check_mode:
        for arguments in (*add, *delete):
            module.run_command([ufw, *arguments], check_rc=True)
    module.exit_json(
        changed=bool(add or delete),
        added=[shlex.join(each) for each in add],
        deleted=[shlex.join(each) for each in delete],
        foreign=[rule for rule, comment in present.items() if not is_ours(comment)],
    )


if __name__ == "__main__":
    main()
