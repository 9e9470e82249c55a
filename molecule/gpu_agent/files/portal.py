"""Plays the portal's two answers to an agent, on loopback: one enrolment with the right token, then nothing to do."""

from __future__ import annotations

import datetime
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, CREDENTIAL, EPOCH = "once-only", "its-own", "00000000-0000-4000-8000-000000000001"
SECOND_S = 1.0  # a held call is answered after this long: nothing changes here


class Portal(BaseHTTPRequestHandler):
    """Answers POST alone."""

    used = False

    def do_POST(self) -> None:
        """The two routes of the agent."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        given = self.headers["Authorization"].removeprefix("Bearer ")
        if self.path == "/api/v1/agent/enroll":
            if given != TOKEN or Portal.used:
                return self._answer(401, {"title": "the token is void"})
            Portal.used = True
            answer = {"protocol": 1, "machine_id": 7, "credential_id": 1, "credential": CREDENTIAL, "epoch": EPOCH}
            return self._answer(200, answer)
        if given != CREDENTIAL:
            return self._answer(401, {"title": "not the credential"})
        time.sleep(min(body["wait_s"], SECOND_S))
        acks: dict[str, list[int]] = {"attempts": [], "command_results": [], "journal": []}
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        empty = {"generation": body["generation"], "desired": None}
        return self._answer(200, {"protocol": 1, "now": now, "epoch": EPOCH, **empty, "acks": acks})

    def _answer(self, status: int, value: dict[str, object]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Portal).serve_forever()
