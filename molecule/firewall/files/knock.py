"""Which ports answer somebody outside: `knock.py ADDRESS... -- PORT...` prints them in JSON, by address.

A port is a number, or a word like 53/udp: that one answers whoever says something.
"""

from __future__ import annotations

import concurrent.futures
import json
import socket
import sys


def answers(address: str, port: str) -> bool:
    number, _, protocol = port.partition("/")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    with socket.socket(family, kind) as asking:
        asking.settimeout(1.5)
        try:
            asking.connect((address, int(number)))
            if protocol == "udp":
                asking.send(b"who is there?")
                asking.recv(100)
        except OSError:
            return False
    return True


def main() -> None:
    middle = sys.argv.index("--")
    addresses, ports = sys.argv[1:middle], sys.argv[middle + 1 :]
    ends = [(address, port) for address in addresses for port in ports]
    with concurrent.futures.ThreadPoolExecutor(len(ends)) as pool:
        heard = dict(zip(ends, pool.map(lambda end: answers(*end), ends), strict=True))
    said = {port: int(port) if port.isdecimal() else port for port in ports}
    print(json.dumps({each: [said[port] for port in ports if heard[each, port]] for each in addresses}))  # noqa: T201


if __name__ == "__main__":
    main()
