#!/usr/bin/python
"""Which TCP ports of a host answer, asked from here.

A connect scan without root: every port gets one connection attempt, many at a time. Refused and unanswered are both
closed; what could not be asked at all (no route, no permission) is `unreachable`, and is for the caller to judge. Here
is no opinion about which ports may be open.

Addresses that the caller names have to be asked. Those that the host says it has (`own`) are asked as far as there is a
way to them from here: a controller without IPv6, or an address of another network, proves nothing against a host.
"""

from __future__ import annotations

import errno
import json
import re
import resource
import selectors
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: port_scan
short_description: Which TCP ports of a host answer
description:
  - Tries to connect to every port of every address, from the machine that runs the module.
options:
  addresses:
    description: Host names or IP addresses. A name is scanned at every address that it has.
    type: list
    elements: str
    required: true
  own:
    description:
      - What C(ip -json address show scope global) says on the host. Its further addresses are scanned as well.
      - Without it only O(addresses) are scanned.
    type: str
  first:
    description: The first port.
    type: int
    default: 1
  last:
    description: The last port.
    type: int
    default: 65535
  timeout:
    description: Seconds to wait for an answer before a port counts as closed.
    type: float
    default: 1.3
author: [RemoteGPU]
"""

RETURN = r"""
scans:
  description: For each address the ports that are open, and how many were closed or could not be asked.
  returned: always
  type: list
  elements: dict
no_way:
  description: The host's own addresses to which nothing leads from here.
  returned: always
  type: list
  elements: str
"""

UNREACHABLE = {
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.EADDRNOTAVAIL,
    errno.EACCES,
    errno.EPERM,
    errno.EAFNOSUPPORT,
    errno.EINVAL,
}
IN_FLIGHT_LIMIT = 16_000
KEPT_BACK = 64  # descriptors that somebody else in this process may need
OF_DOCKER = re.compile(r"docker0\Z|br-[0-9a-f]{12}\Z")  # their addresses are the host's towards its containers only
NOT_IN_USE = ("deprecated", "tentative", "dadfailed")


@dataclass
class Scan:
    """What an address answered."""

    address: str
    open: list[int] = field(default_factory=list)
    closed: int = 0
    unreachable: int = 0
    seconds: float = 0.0

    def note(self, port: int, error: int) -> None:
        if error == 0:
            self.open.append(port)
        elif error in UNREACHABLE:
            self.unreachable += 1
        else:
            self.closed += 1


def addresses_of(name: str) -> list[str]:
    """Every IP address of a name, IPv4 first. Raises OSError when it has none."""
    found = {info[4][0] for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    return sorted((str(each) for each in found), key=lambda each: (":" in each, each))


def own_addresses(said: str) -> list[str]:
    """The addresses in `ip -json address`, without those of Docker's bridges. Raises ValueError when it is none."""
    try:
        return [
            str(address["local"])
            for interface in json.loads(said)
            if interface and not OF_DOCKER.match(interface["ifname"])  # ip leaves {} where it has left something out
            for address in interface["addr_info"]
            if address and not any(address.get(flag) for flag in NOT_IN_USE)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the host does not say which addresses it has: {said[:200] or 'no answer'}") from error


def room_for_sockets() -> int:
    """How many connections may be tried at a time; raises the soft limit as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = IN_FLIGHT_LIMIT + KEPT_BACK if hard == resource.RLIM_INFINITY else min(hard, IN_FLIGHT_LIMIT + KEPT_BACK)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(1, wanted - KEPT_BACK)


def scan(address: str, ports: Iterable[int], timeout_s: float, room: int) -> Scan:
    """Ask each port once."""
    result = Scan(address)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    started = time.monotonic()
    waiting: dict[int, tuple[socket.socket, int, float]] = {}  # in the order in which they were begun
    todo: Iterator[int] = iter(ports)
    more = True
    with selectors.DefaultSelector() as selector:
        while more or waiting:
            while more and len(waiting) < room:
                port = next(todo, None)
                if port is None:
                    more = False
                    break
                attempt = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                error = attempt.connect_ex((address, port))
                if error != errno.EINPROGRESS:
                    attempt.close()
                    result.note(port, error)
                    continue
                waiting[attempt.fileno()] = (attempt, port, time.monotonic() + timeout_s)
                selector.register(attempt, selectors.EVENT_WRITE)
                if len(waiting) % 256 == 0:
                    break  # read answers in between, or the first ones wait for the last
            _collect(selector, waiting, result, block=not more or len(waiting) >= room)
    result.open.sort()
    result.seconds = round(time.monotonic() - started, 2)
    return result


def _collect(
    selector: selectors.BaseSelector, waiting: dict[int, tuple[socket.socket, int, float]], result: Scan, *, block: bool
) -> None:
    """Take what has been answered, and give up on what is over time."""
    oldest = next(iter(waiting.values()), None)
    pause = max(0.0, oldest[2] - time.monotonic()) if block and oldest else 0.0
    for key, _ in selector.select(pause):
        attempt, port, _ = waiting.pop(key.fd)
        result.note(port, attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        selector.unregister(attempt)
        attempt.close()
    now = time.monotonic()
    for number in [number for number, (_, _, end) in waiting.items() if end <= now]:
        attempt, port, _ = waiting.pop(number)
        result.note(port, errno.ETIMEDOUT)
        selector.unregister(attempt)
        attempt.close()


def scan_all(addresses: Sequence[str], ports: Sequence[int], timeout_s: float) -> list[Scan]:
    """All at the same time: most of a scan is waiting for answers that do not come."""
    room = max(1, room_for_sockets() // len(addresses))
    with ThreadPoolExecutor(len(addresses)) as pool:
        return list(pool.map(lambda address: scan(address, ports, timeout_s, room), addresses))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "addresses": {"type": "list", "elements": "str", "required": True},
            "own": {"type": "str"},
            "first": {"type": "int", "default": 1},
            "last": {"type": "int", "default": 65535},
            "timeout": {"type": "float", "default": 1.3},
        },
        supports_check_mode=True,
    )
    wanted: dict[str, Any] = module.params
    if not 1 <= wanted["first"] <= wanted["last"] <= 65535:
        module.fail_json(
            msg=f"first ({wanted['first']}) and last ({wanted['last']}) must be ports from 1 to 65535, in this order"
        )
    try:
        named = {address: None for name in wanted["addresses"] for address in addresses_of(name)}
        own = [] if wanted["own"] is None else own_addresses(wanted["own"])
    except OSError as error:
        module.fail_json(msg=f"{', '.join(wanted['addresses'])}: one has no address: {error}")
    except ValueError as error:
        module.fail_json(msg=str(error))
    addresses = list(named | dict.fromkeys(own))
    scans = scan_all(addresses, range(wanted["first"], wanted["last"] + 1), wanted["timeout"])
    asked = [each for each in scans if each.address in named or each.open or not each.unreachable]
    no_way = [each.address for each in scans if each not in asked]
    module.exit_json(changed=False, scans=[vars(each) for each in asked], no_way=no_way)


if __name__ == "__main__":
    main()
