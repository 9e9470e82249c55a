#!/usr/bin/python
"""Our chains in firewalld's direct.xml, in a table of iptables that is asked before Docker's.

What others have put into the file stays. firewalld loads it at each start and reload, after it has flushed what was
there; that is not done here. Docker hears of it and writes its own rules anew, its accepts before the jump to
DOCKER-USER (seen with 26.1): whoever must be asked first is not safe in the table `filter`.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: firewalld_direct
short_description: Exactly our direct chains, beside those of others
description:
  - Replaces the chains REMOTEGPU-* in direct.xml, and the jump to them.
options:
  path:
    description: The file.
    type: path
    default: /etc/firewalld/direct.xml
  ipv4:
    description: The chains and rules of IPv4, as iptables-save writes them.
    type: str
    required: true
  ipv6:
    description: The chains and rules of IPv6.
    type: str
    required: true
author: [RemoteGPU]
"""

RETURN = r"""
# Only whether it changed.
"""

PREFIX = "REMOTEGPU-"
TABLE = "mangle"
ASKED_BY = "FORWARD"
FIRST_ASKED = f"{PREFIX}FORWARD"


def our_elements(family: str, saved: str) -> Iterator[ElementTree.Element]:
    """The chains that the text declares, the rules in their order, and the jump by which they are asked."""
    rules: dict[str, list[str]] = {}
    for line in saved.splitlines():
        if declared := re.match(rf":({PREFIX}[A-Z]+) ", line):
            rules[declared[1]] = []
        elif added := re.match(rf"-A ({PREFIX}[A-Z]+) (.+)", line):
            rules[added[1]].append(shlex.join(shlex.split(added[2])))
    for chain in rules:
        yield ElementTree.Element("chain", {"ipv": family, "table": TABLE, "chain": chain})
    rules[ASKED_BY] = [f"-j {FIRST_ASKED}"]
    for chain, lines in rules.items():
        for priority, arguments in enumerate(lines):
            where = {"ipv": family, "table": TABLE, "chain": chain, "priority": str(priority)}
            rule = ElementTree.Element("rule", where)
            rule.text = arguments
            yield rule


def is_ours(element: ElementTree.Element) -> bool:
    """In whichever table: they were in `filter` once."""
    chain = element.get("chain", "")
    return chain.startswith(PREFIX) or (element.tag == "rule" and PREFIX in (element.text or ""))


def merged(old: str, ours: Iterable[ElementTree.Element]) -> str:
    """The file with our part replaced. Raises ElementTree.ParseError when it is no XML."""
    root = ElementTree.fromstring(old) if old.strip() else ElementTree.Element("direct")  # noqa: S314 - root's own file
    kept = [element for element in root if not is_ours(element)]
    known = {(each.get("ipv"), each.get("table"), each.get("chain")) for each in kept if each.tag == "chain"}
    new = [
        each
        for each in ours
        if each.tag != "chain" or (each.get("ipv"), each.get("table"), each.get("chain")) not in known
    ]
    root[:] = sorted([*kept, *new], key=lambda each: ("chain", "rule", "passthrough").index(each.tag))
    for element in root:
        element.tail = None
    root.text = None
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def said(text: str) -> list[tuple[str, tuple[tuple[str, str], ...], str]]:
    """What the file says, however it is written: firewalld writes it anew in its own way."""
    root = ElementTree.fromstring(text) if text.strip() else ()  # noqa: S314 - root's own file
    return sorted((each.tag, tuple(sorted(each.attrib.items())), (each.text or "").strip()) for each in root)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "default": "/etc/firewalld/direct.xml"},
            "ipv4": {"type": "str", "required": True},
            "ipv6": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    path = Path(module.params["path"])
    old = path.read_text() if path.exists() else ""
    ours = [*our_elements("ipv4", module.params["ipv4"]), *our_elements("ipv6", module.params["ipv6"])]
    try:
        new = merged(old, ours)
        changed = said(new) != said(old)
    except (ElementTree.ParseError, ValueError) as error:
        module.fail_json(msg=f"{path} cannot be read, and nothing was changed: {error}. Mend it or move it away.")
    if changed and not module.check_mode:
        handle, written = tempfile.mkstemp(dir=module.tmpdir)
        with os.fdopen(handle, "w") as file:
            file.write(new)
        Path(written).chmod(0o600)
        module.atomic_move(written, str(path))
    diff = {"before": old, "after": new if changed else old, "before_header": str(path)}
    module.exit_json(changed=changed, diff=diff)


if __name__ == "__main__":
    main()
