"""Plays the portal for Prometheus and Alertmanager, on loopback: targets, rules, metrics and the door for alerts.

`state.json` beside the program says what it answers, read again each time: `status` (of the targets), `targets`, and
the two tokens. What Alertmanager delivers is appended to `alerts.jsonl`.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HOME = Path(__file__).parent


class Portal(BaseHTTPRequestHandler):
    """Answers with the right token only."""

    def do_GET(self) -> None:
        """What Prometheus asks."""
        state = json.loads((HOME / "state.json").read_text())
        if self.path == "/exporter":  # a host's: whoever brings the portal's token there has given it away
            given_away = "Authorization" in self.headers
            return self._answer(400 if given_away else 200, "text/plain; version=0.0.4", "exporter_is_played 1\n")
        if self.headers["Authorization"] != f"Bearer {state['prometheus_token']}":
            return self._answer(401, "text/plain", "not the token")
        if self.path == "/api/v1/prometheus/targets":
            return self._answer(state["status"], "application/json", json.dumps(state["targets"]))
        if self.path == "/api/v1/prometheus/rules":
            return self._answer(200, "application/yaml", state.get("rules", "groups: []\n"))
        if self.path == "/metrics":
            return self._answer(200, "text/plain; version=0.0.4", "portal_is_played 1\n")
        return self._answer(404, "text/plain", "not here")

    def do_POST(self) -> None:
        """What Alertmanager delivers."""
        state = json.loads((HOME / "state.json").read_text())
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {state['alerts_token']}":
            return self._answer(401, "text/plain", "not the token")
        if self.path != "/api/v1/alerts/webhook":
            return self._answer(404, "text/plain", "not here")
        with (HOME / "alerts.jsonl").open("ab") as kept:
            kept.write(body.replace(b"\n", b" ") + b"\n")
        return self._answer(200, "application/json", "{}")

    def _answer(self, status: int, kind: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Portal).serve_forever()
