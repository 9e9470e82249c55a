"""Which ports answer somebody outside: `knock.py ADDRESS... -- PORT...` prints them in JSON, by address."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import sys


def answers(end: tuple[str, int]) -> bool:
    try:
        socket.create_connection(end, timeout=1.5).close()
    except OSError:
        return False
    return True


def main() -> None:
    middle = sys.argv.index("--")
    addresses, ports = sys.argv[1:middle], [int(each) for each in sys.argv[middle + 1 :]]
    ends = [(address, port) for address in addresses for port in ports]
    with concurrent.futures.ThreadPoolExecutor(len(ends)) as pool:
        heard = dict(zip(ends, pool.map(answers, ends), strict=True))
    print(json.dumps({address: [port for port in ports if heard[address, port]] for address in addresses}))  # noqa: T201


if __name__ == "__main__":
    main()
