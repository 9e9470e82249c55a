"""A portal for the agent's tests: speaks the protocol over HTTPS, keeps what it is told, and wants what a test says.

Every request and every answer is checked against the schema; what breaks it is in `complaints`, which the fixtures
expect to be empty. The end-to-end test holds the agent against the real portal. Here is no rule of the portal's but
the protocol's: generations, the held call, acknowledgements.
"""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import fastjsonschema
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

SCHEMA = json.loads((Path(__file__).parents[3] / "agent" / "protocol" / "protocol.schema.json").read_text())
MACHINE_ID = 7


def validator(definition: str) -> Callable[[Any], Any]:
    """A function that raises when its argument is not what the protocol calls by this name."""
    check: Callable[[Any], Any] = fastjsonschema.compile(
        {"definitions": SCHEMA["definitions"], "$ref": f"#/definitions/{definition}"}
    )
    return check


CHECKS = {
    name: validator(name) for name in ("enroll_request", "enroll_response", "sync_request", "sync_response", "desired")
}


class Portal:
    """`start()`, `want(...)`, look at what came, `stop()`; a stopped one is a portal that is down."""

    def __init__(self, address: str, directory: Path) -> None:
        self.address = address
        self.port = 0
        self.token = "token-" + uuid.uuid4().hex
        self.credential = "credential-" + uuid.uuid4().hex
        self.next_credential: str | None = None
        self.epoch = uuid.uuid4().hex
        self.generation = 1
        self.leases: list[dict[str, Any]] = []
        self.attempts: list[dict[str, Any]] = []
        self.commands: list[dict[str, Any]] = []
        self.openings: list[dict[str, Any]] = []
        self.forwards: list[dict[str, Any]] = []
        self.report_interval_s = 2.0
        self.log_quota_bytes = 64 * 1024 * 1024
        self.reports: list[dict[str, Any]] = []
        self.logs: dict[int, bytearray] = {}
        self.ended_logs: set[int] = set()
        self.states: dict[int, dict[str, Any]] = {}
        self.results: dict[int, dict[str, Any]] = {}
        self.journal: dict[str, dict[str, Any]] = {}
        self.received = Counter[str]()
        self.refused = Counter[str]()
        self.complaints: list[str] = []
        self.facts: dict[str, Any] | None = None
        self.metrics: dict[str, Any] | None = None
        self.gpu: dict[str, Any] | None = None
        self.acknowledges = True
        self._changed = threading.Condition()
        self._server: _Server | None = None
        self._tls = _make_authority(directory, address)
        self.ca_pem = (directory / "ca.pem").read_text()

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.port}"

    # -- up and down --------------------------------------------------------------------------------------------------

    def start(self) -> Portal:
        portal = self

        class Handler(_Handler):
            double = portal

        self._server = _Server((self.address, self.port), Handler)
        self._server.tls = self._tls
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Down: connections die, new ones are refused."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.drop_all()
        with self._changed:
            self._changed.notify_all()

    # -- what is wanted -----------------------------------------------------------------------------------------------

    def change(self, **fields: Any) -> int:
        """Set fields of the desired state (leases, attempts, commands, …); answers the new generation."""
        with self._changed:
            for name, value in fields.items():
                setattr(self, name, value)
            self.generation += 1
            self._changed.notify_all()
            return self.generation

    def order(self, kind: str, **args: Any) -> int:
        """A command; answers its id."""
        command_id = max([command["command_id"] for command in self.commands], default=0) + max(self.results, default=0)
        command = {"command_id": command_id + 1, "kind": kind, "args": {"machine_id": MACHINE_ID, **args}}
        self.change(commands=[*self.commands, command])
        return command_id + 1

    def desired(self) -> dict[str, Any]:
        return {
            "machine_id": MACHINE_ID,
            "epoch": self.epoch,
            "generation": self.generation,
            "leases": self.leases,
            "attempts": self.attempts,
            "commands": self.commands,
            "openings": self.openings,
            "forwards": self.forwards,
            "report_interval_s": self.report_interval_s,
            "log_quota_bytes": self.log_quota_bytes,
        }

    # -- what came ----------------------------------------------------------------------------------------------------

    def lease(self, lease_id: int) -> dict[str, Any] | None:
        """The lease as the newest report has it."""
        if not self.reports:
            return None
        return next((lease for lease in self.reports[-1]["leases"] if lease["lease_id"] == lease_id), None)

    def opening(self, opening_id: int) -> dict[str, Any] | None:
        """The opening as the newest report has it."""
        seen = self.reports[-1]["openings"] if self.reports else []
        return next((opening for opening in seen if opening["id"] == opening_id), None)

    def log_of(self, attempt_id: int) -> bytes:
        return bytes(self.logs.get(attempt_id, b""))

    def events(self, **fields: Any) -> list[str]:
        return [
            record["event"]
            for record in self.journal.values()
            if all(record[name] == value for name, value in fields.items())
        ]

    # -- the protocol -------------------------------------------------------------------------------------------------

    def enroll(self, credential: str, message: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if credential != self.token:
            return 401, {"title": "Unauthorized", "detail": "the token is void"}
        self.token = ""
        self.facts, self.gpu = message["facts"], message["gpu"]
        names = {"machine_id": MACHINE_ID, "credential_id": 1, "credential": self.credential, "epoch": self.epoch}
        return 200, {"protocol": 1, **names}

    def sync(self, credential: str, message: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if credential == self.next_credential:
            self.credential, self.next_credential = credential, None
        if credential != self.credential:
            self.refused[credential] += 1
            return 401, {"title": "Unauthorized", "detail": "the credential has ended"}
        acks: dict[str, Any] = {"attempts": [], "command_results": [], "journal": []}
        if message["report"] is not None:
            acks = self._take(message["report"])
        with self._changed:
            if message["wait_s"]:
                self._changed.wait_for(lambda: self._differs(message) or self._server is None, message["wait_s"])
            desired = self.desired() if self._differs(message) else None
            return 200, {
                "protocol": 1,
                "now": format_time(datetime.now(timezone.utc)),
                "epoch": self.epoch,
                "generation": self.generation,
                "desired": desired,
                "acks": acks,
            }

    def _differs(self, message: dict[str, Any]) -> bool:
        return (message["epoch"], message["generation"]) != (self.epoch, self.generation)

    def _take(self, report: dict[str, Any]) -> dict[str, Any]:
        with self._changed:
            self.reports.append(report)
            for name in ("facts", "metrics", "gpu"):
                if report[name] is not None:
                    setattr(self, name, report[name])
            if not self.acknowledges or report["frozen"]:
                return {"attempts": [], "command_results": [], "journal": []}
            for piece in report["logs"]:
                self._take_log(piece)
            for attempt in report["attempts"]:
                self.states[attempt["attempt_id"]] = attempt
            for result in report["command_results"]:
                self.received[f"result {result['command_id']}"] += 1
                self.results[result["command_id"]] = result
            for record in report["journal"]:
                self.received[record["id"]] += 1
                self.journal[record["id"]] = record
            return {
                "attempts": [self._ack(attempt) for attempt in report["attempts"]],
                "command_results": [result["command_id"] for result in report["command_results"]],
                "journal": [record["id"] for record in report["journal"]],
            }

    def _take_log(self, piece: dict[str, Any]) -> None:
        held = self.logs.setdefault(piece["attempt_id"], bytearray())
        data = base64.b64decode(piece["data"], validate=True)
        if piece["offset"] > len(held):
            self.complaints.append(f"log {piece['attempt_id']}: a hole before {piece['offset']}, held {len(held)}")
            return
        held[piece["offset"] :] = data if piece["offset"] + len(data) >= len(held) else held[piece["offset"] :]
        if piece["end"]:
            self.ended_logs.add(piece["attempt_id"])

    def _ack(self, attempt: dict[str, Any]) -> dict[str, Any]:
        attempt_id = attempt["attempt_id"]
        return {
            "attempt_id": attempt_id,
            "state": attempt["state"],
            "log_offset": len(self.logs.get(attempt_id, b"")),
            "log_complete": attempt_id in self.ended_logs,
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    tls: ssl.SSLContext

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._open: set[Any] = set()

    def get_request(self) -> tuple[Any, Any]:
        sock, address = super().get_request()
        wrapped = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        self._open.add(wrapped)
        return wrapped, address

    def drop_all(self) -> None:
        for sock in self._open:
            sock.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Agents that vanish are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    double: Portal
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        credential = self.headers.get("Authorization", "").removeprefix("Bearer ")
        word = self.path.rpartition("/")[2]
        status, answer = self._answer(word, credential, body)
        if status == 200:
            CHECKS[f"{word}_response"](answer)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if status == 200 else "application/problem+json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, word: str, credential: str, body: Any) -> tuple[int, dict[str, Any]]:
        if word == "sync" and credential == "doctor":
            return 401, {"title": "Unauthorized"}
        try:
            CHECKS[f"{word}_request"](body)
        except fastjsonschema.JsonSchemaException as error:
            self.double.complaints.append(str(error))
            return 422, {"title": "Unprocessable", "detail": str(error)}
        return self.double.enroll(credential, body) if word == "enroll" else self.double.sync(credential, body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: pytest shows what matters."""


def format_time(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).isoformat().replace("+00:00", "Z")


def in_seconds(seconds: float) -> str:
    return format_time(datetime.fromtimestamp(time.time() + seconds, timezone.utc))


def _make_authority(directory: Path, address: str) -> ssl.SSLContext:
    """A CA and a certificate for the address, as the portal makes them at its first start."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    ca = _certificate(ca_name, ca_name, ca_key.public_key(), ca_key, x509.BasicConstraints(ca=True, path_length=0))
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
    leaf = _certificate(name, ca_name, key.public_key(), ca_key, names)
    pem = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "ca.pem").write_bytes(ca.public_bytes(pem))
    (directory / "leaf.pem").write_bytes(leaf.public_bytes(pem) + key.private_bytes(pem, *plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "leaf.pem")
    return context


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
    return builder.add_extension(extension, critical=True).sign(signer, hashes.SHA256())
