"""Speaking with the portal: HTTPS with its own authority, one connection an instance, JSON in and out.

What is said is decided elsewhere. A redirect is an error, and no proxy is used but a configured one: a name in the
environment must not lead a credential elsewhere.
"""

import http.client
import json
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from remotegpu_agent import __version__
from remotegpu_agent.config import Config, check_url

CONNECT_S = 10.0
ANSWER_S = 30.0
LARGEST_ANSWER_BYTES = 32 * 1024 * 1024
LARGEST_MESSAGE_BYTES = 16 * 1024 * 1024  # more it refuses, and hangs up before it was told all


class PortalError(Exception):
    """The portal could not be reached or did not answer as it must; trying again may help."""


class Refused(PortalError):
    """The portal does not accept our credential, or a token for one (401, 403; 409 where no other try can help)."""


class TooLarge(PortalError):
    """The message is larger than the portal, or a proxy before it, takes; it never will be taken as it is."""


class NotYours(PortalError):
    """The report names things of another machine, or that the portal does not know; nothing of it was taken."""

    def __init__(self, text: str, items: dict[str, list[Any]]) -> None:
        super().__init__(text)
        self.items = items


@dataclass(frozen=True)
class Endpoint:
    """Where the portal is and whom we believe that it is."""

    url: str
    ca_file: Path | None
    proxy_url: str | None

    @classmethod
    def of(cls, config: Config) -> "Endpoint":
        return cls(config.portal_url, config.ca_file, config.proxy_url)


class Portal:
    """One connection, kept open between calls. Not for two threads at once."""

    def __init__(self, endpoint: Endpoint) -> None:
        check_url(endpoint.url, "portal_url")
        self._endpoint = endpoint
        self._context: ssl.SSLContext | None = None
        self._connection: http.client.HTTPConnection | None = None

    def call(self, path: str, message: dict[str, Any], *, credential: str, wait_s: float = 0) -> dict[str, Any]:
        """POST a message, answer the answer. Raises PortalError; Refused when the credential is not accepted."""
        body = json.dumps(message, separators=(",", ":")).encode()
        if len(body) > LARGEST_MESSAGE_BYTES:
            raise TooLarge(f"{path}: the portal takes {LARGEST_MESSAGE_BYTES} bytes, this message has {len(body)}")
        headers = {
            "Authorization": f"Bearer {credential}",
            "Content-Type": "application/json",
            "User-Agent": f"remotegpu-agent/{__version__}",
        }
        is_reused = self._connection is not None
        try:
            status, data = self._exchange(path, body, headers, ANSWER_S + wait_s)
        except (http.client.BadStatusLine, ConnectionError) as error:
            self.close()
            if not is_reused:
                raise PortalError(f"{self._endpoint.url}: {error or type(error).__name__}") from error
            return self.call(
                path, message, credential=credential, wait_s=wait_s
            )  # the portal closed an idle connection
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise PortalError(f"{self._endpoint.url}: {_reason(error)}") from error
        return self._read(path, status, data)

    def _exchange(self, path: str, body: bytes, headers: dict[str, str], timeout_s: float) -> tuple[int, bytes]:
        connection = self._connect()
        if connection.sock is not None:
            connection.sock.settimeout(timeout_s)
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        data = response.read(LARGEST_ANSWER_BYTES + 1)
        if len(data) > LARGEST_ANSWER_BYTES or response.will_close:
            self.close()
        return response.status, data

    def _connect(self) -> http.client.HTTPConnection:
        if self._connection is not None:
            return self._connection
        self._connection = self._new_connection()
        self._connection.connect()
        sock = self._connection.sock
        # A host that vanished without a word (power, cable) must not hold us for the kernel's two hours.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        return self._connection

    def _new_connection(self) -> http.client.HTTPConnection:
        parts = urlsplit(self._endpoint.url)
        host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
        first_host, first_port = host, port
        if self._endpoint.proxy_url:
            proxy = urlsplit(self._endpoint.proxy_url)
            first_host, first_port = str(proxy.hostname), proxy.port or 3128
        connection: http.client.HTTPConnection
        if parts.scheme == "http":
            connection = http.client.HTTPConnection(first_host, first_port, timeout=CONNECT_S)
        else:
            connection = http.client.HTTPSConnection(first_host, first_port, timeout=CONNECT_S, context=self._tls())
        if self._endpoint.proxy_url:
            connection.set_tunnel(host, port)
        return connection

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self._endpoint.ca_file is None:
                context.load_default_certs()
            else:
                context.load_verify_locations(self._endpoint.ca_file)
            self._context = context
        return self._context

    def _read(self, path: str, status: int, data: bytes) -> dict[str, Any]:
        if status != 200:
            problem = _problem(data)
            said = f"{path}: {status} {str(problem.get('detail') or problem.get('title') or '')[:300]}"
            if status in (401, 403) or (status == 409 and problem.get("code") in ("already_enrolled", "retired")):
                raise Refused(said)
            if status == 413:
                raise TooLarge(said)
            if status == 409 and problem.get("code") == "not_yours":
                raise NotYours(said, dict(problem["info"]["items"]))
            raise PortalError(said)
        try:
            answer = json.loads(data)
        except ValueError as error:
            raise PortalError(f"{path}: the answer is not JSON ({error})") from error
        if not isinstance(answer, dict) or answer.get("protocol") != 1:
            raise PortalError(f"{path}: the answer is not one of protocol 1; is portal_url the portal's address?")
        return answer

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted ({error.verify_message}); is ca_file the portal's authority?"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__


def _problem(data: bytes) -> dict[str, Any]:
    """A problem+json body; empty for bodies of others, which are not echoed."""
    try:
        problem = json.loads(data)
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}
