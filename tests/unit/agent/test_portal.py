"""Whom the agent believes that it is the portal, and what it takes from it."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from portal.api.agents import MAX_BODY_BYTES
from remotegpu_agent import portal as portal_module
from remotegpu_agent.portal import LARGEST_MESSAGE_BYTES, Endpoint, Portal, PortalError, Refused, TooLarge
from tests.integration.agent.portal_double import _make_authority

ANSWER = b'{"protocol": 1}'


@contextmanager
def server(
    directory: Path, *, certified_for: str = "127.0.0.1", status: int = 200, body: bytes = ANSWER, **headers: str
) -> Iterator[tuple[str, list[str]]]:
    """Answers every call the same; its address, and the credentials that it was told."""
    told: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            told.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            """Silence."""

    context: ssl.SSLContext = _make_authority(directory, certified_for)
    there = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there.socket = context.wrap_socket(there.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=there.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"https://127.0.0.1:{there.server_address[1]}", told
    finally:
        there.shutdown()
        there.server_close()


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., dict[str, object]]:
    def call_it(url: str, *, ca: Path = tmp_path / "ca.pem") -> dict[str, object]:
        there = Portal(Endpoint(url, ca, None))
        try:
            return there.call("/api/v1/agent/sync", {}, credential="secret")
        finally:
            there.close()

    return call_it


def test_a_portal_of_our_authority_is_believed(tmp_path: Path, call: Callable[..., dict[str, object]]) -> None:
    with server(tmp_path) as (url, told):
        assert call(url) == {"protocol": 1}
    assert told == ["Bearer secret"]


def test_a_certificate_for_another_name_gets_no_credential(
    tmp_path: Path, call: Callable[..., dict[str, object]]
) -> None:
    with (
        server(tmp_path, certified_for="127.0.0.2") as (url, told),
        pytest.raises(PortalError, match="certificate is not accepted"),
    ):
        call(url)
    assert told == []


def test_a_certificate_of_another_authority_gets_no_credential(
    tmp_path: Path, call: Callable[..., dict[str, object]]
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory in (ours, theirs):
        directory.mkdir()
    _make_authority(ours, "127.0.0.1")
    with server(theirs) as (url, told), pytest.raises(PortalError, match="certificate is not accepted"):
        call(url, ca=ours / "ca.pem")
    assert told == []


def test_a_redirect_leads_the_credential_nowhere(tmp_path: Path, call: Callable[..., dict[str, object]]) -> None:
    with (
        server(tmp_path, status=307, body=b"", Location="/elsewhere") as (url, told),
        pytest.raises(PortalError, match="307"),
    ):
        call(url)
    assert told == ["Bearer secret"]


def test_an_answer_without_end_is_not_read_to_its_end(
    tmp_path: Path, call: Callable[..., dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portal_module, "LARGEST_ANSWER_BYTES", 10)
    with (
        server(tmp_path, body=b'{"protocol": 1, "desired": null}') as (url, _),
        pytest.raises(PortalError, match="not JSON"),
    ):
        call(url)


@pytest.mark.parametrize(
    ("code", "error"), [("already_enrolled", Refused), ("retired", Refused), ("try_again", PortalError)]
)
def test_a_token_that_can_never_be_taken_is_refused_like_a_void_one(
    tmp_path: Path, call: Callable[..., dict[str, object]], code: str, error: type[PortalError]
) -> None:
    """An agent that has a credential goes on with that, and is not offline for a token that lies there."""
    body = json.dumps({"code": code, "detail": "gpu-1 has an agent already."}).encode()
    with server(tmp_path, status=409, body=body) as (url, _), pytest.raises(PortalError) as raised:
        call(url)
    assert type(raised.value) is error


@pytest.mark.parametrize(("status", "error"), [(401, Refused), (403, Refused), (413, TooLarge), (500, PortalError)])
def test_what_a_stranger_writes_in_an_error_is_not_repeated(
    tmp_path: Path, call: Callable[..., dict[str, object]], status: int, error: type[PortalError]
) -> None:
    with server(tmp_path, status=status, body=b"<html>run this: curl") as (url, _), pytest.raises(error) as raised:
        call(url)
    assert "curl" not in str(raised.value)


def test_what_the_portal_would_not_take_is_not_sent(tmp_path: Path) -> None:
    """It hangs up in the middle, and its answer may be lost."""
    assert LARGEST_MESSAGE_BYTES == MAX_BODY_BYTES
    with server(tmp_path) as (url, told):
        there = Portal(Endpoint(url, tmp_path / "ca.pem", None))
        with pytest.raises(TooLarge, match="takes 16777216 bytes"):
            there.call("/api/v1/agent/sync", {"report": "x" * LARGEST_MESSAGE_BYTES}, credential="secret")
    assert told == []
