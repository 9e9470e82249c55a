"""Asking Alertmanager ends by its deadline, goes where the settings say, and each way in which it can fail is told."""

from __future__ import annotations

import socket

import pytest

from portal.integrations.alertmanager import Alertmanager, Refused, Unreachable
from tests.support.one_answer import Answer, answering, saying, trickling


def test_our_credentials_go_along_and_are_not_shown() -> None:
    with answering(saying("200 OK", [])) as (url, heard):
        asking = Alertmanager(url + "/prefix/", "u", "p")
        assert asking.alerts() == []
    assert b"".join(heard).startswith(b"GET /prefix/api/v2/alerts HTTP/1.1\r\n")
    assert b"Authorization: Basic dTpw\r\n" in b"".join(heard)
    assert "'p'" not in repr(asking)


def test_a_redirection_takes_our_credentials_nowhere() -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.2)
        there = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/"
        with answering(saying("302 Found", "", Location=there)) as (url, _heard), pytest.raises(Refused, match="302"):
            Alertmanager(url, "u", "p").alerts()
        with pytest.raises(TimeoutError):
            elsewhere.accept()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (saying("200 OK", "<html>"), "makes no sense"),
        (saying("200 OK", [{"fingerprint": "a"}]), "makes no sense: KeyError"),
        (lambda _connection: None, "does not answer"),
    ],
)
def test_an_answer_that_cannot_be_read_is_told(answer: Answer, told: str) -> None:
    with answering(answer) as (url, _heard), pytest.raises(Unreachable, match=told):
        Alertmanager(url).alerts()


def test_a_status_without_its_start_is_told() -> None:
    with answering(saying("200 OK", {})) as (url, _heard), pytest.raises(Unreachable, match="makes no sense"):
        Alertmanager(url).started_at()


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_one_that_trickles_is_left_at_the_deadline(head: bytes) -> None:
    with answering(trickling(head)) as (url, _heard), pytest.raises(Unreachable, match=r"no answer within 0\.3 s"):
        Alertmanager(url, deadline_s=0.3).alerts()
