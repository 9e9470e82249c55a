"""Visits a page again and again until told to stop: `visitors.py ADDRESS NAME CA_FILE STOP_FILE`; prints what it met.

Two kinds: one that connects anew each time, and one that keeps its connection as browsers and agents do. An answer
that is not 200 or a connection that breaks is counted, with its words; a kept connection that was closed between two
requests is opened again, as every client does.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from pathlib import Path

PAUSE_S = 0.05  # without one they would take half of the machine from what is being upgraded


def visit(address: str, name: str, ca_file: str, stop: Path, *, keeps: bool, met: Counter[str]) -> None:
    context = ssl.create_default_context(cafile=ca_file)
    connection: http.client.HTTPSConnection | None = None
    while not stop.exists():
        is_fresh = connection is None
        try:
            connection = connection or connect(address, name, context)
            connection.request("GET", "/healthz", headers={"Host": name})
            answer = connection.getresponse()
            body = answer.read()
            met[f"{answer.status} {json.loads(body).get('release', 'one') if answer.status == 200 else body[:80]}"] += 1
            if not keeps or answer.will_close:
                connection.close()
                connection = None
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as error:
            if is_fresh:
                met[repr(error)] += 1
            connection = None
        except (OSError, http.client.HTTPException) as error:
            met[repr(error)] += 1
            connection = None
        stop.with_suffix(".at-work").touch()
        time.sleep(PAUSE_S)


def connect(address: str, name: str, context: ssl.SSLContext) -> http.client.HTTPSConnection:
    connection = http.client.HTTPSConnection(name, 443, timeout=10, context=context)
    plain = socket.create_connection((address, 443), timeout=10)
    connection.sock = context.wrap_socket(plain, server_hostname=name)
    return connection


def main(address: str, name: str, ca_file: str, stop_file: str) -> None:
    met: Counter[str] = Counter()
    stop = Path(stop_file)
    threads = [
        threading.Thread(target=visit, args=(address, name, ca_file, stop), kwargs={"keeps": keeps, "met": met})
        for keeps in (True, False)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.stdout.write(json.dumps(met))


if __name__ == "__main__":
    main(*sys.argv[1:])
