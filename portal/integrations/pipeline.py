"""The call to the CI pipeline: the network has changed, come and apply it.

GitHub and GitLab are called as they document it, and let in who has a token; a receiver of one's own gets the message
as JSON. Every call is signed, so that a receiver, or a relay before GitHub or GitLab, believes nobody else:

    X-RemoteGPU-Timestamp: 1764129600
    X-RemoteGPU-Signature: sha256=HMAC-SHA256(secret, timestamp + "." + body)

Only the address that the settings name is called; no redirection is followed (exchange.py). When it is called is in
services/network_webhook.py.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import quote_plus, urlencode, urlsplit

from portal.integrations.exchange import NoAnswer, TooLong, exchange
from portal.settings import Settings

DEADLINE_S = 10.0
SAID = 200  # characters of an answer that are told to operators
EVENT_TYPE = "remotegpu-network"  # what pulumi/ci/github-actions.yml runs for


class NotTaken(Exception):
    """The pipeline was not reached, or did not take the call; the text says why, and holds no secret."""


@dataclass(frozen=True)
class Pipeline:
    """`kind` is one of KINDS. A token is for GitHub and GitLab, `ref`, a branch, for GitLab alone."""

    url: str = field(repr=False)  # a token may be part of it
    secret: str = field(repr=False)
    kind: str = "signed"
    token: str = field(default="", repr=False)
    ref: str = "main"
    deadline_s: float = DEADLINE_S

    def call(self, message: Mapping[str, Any], *, now: datetime) -> None:
        """Raises NotTaken unless it is answered with 2xx within the deadline."""
        headers, body = KINDS[self.kind](self, message)
        stamp = str(int(now.timestamp()))
        headers |= {
            "User-Agent": "RemoteGPU",
            "X-RemoteGPU-Timestamp": stamp,
            "X-RemoteGPU-Signature": signature(self.secret, stamp, body),
        }
        try:
            status, answer = exchange("POST", self.url, body=body, headers=headers, deadline_s=self.deadline_s)
        except NoAnswer as error:
            raise NotTaken(f"The pipeline does not answer: {self._without_secrets(str(error))}.") from None
        except TooLong:
            raise NotTaken("The pipeline answers without end.") from None
        if not 200 <= status < 300:
            said = " ".join(self._without_secrets(answer.decode(errors="replace")).split())
            raise NotTaken(f"The pipeline refuses: {status} {said[:SAID]}.")

    def _without_secrets(self, text: str) -> str:
        """What the other side repeats of the call is shown to operators, and kept."""
        for each in (self.token, quote_plus(self.token), self.secret, urlsplit(self.url).query):
            if each:
                text = text.replace(each, "***")
        return text


def _to_receiver(_: Pipeline, message: Mapping[str, Any]) -> tuple[dict[str, str], bytes]:
    return {"Content-Type": "application/json"}, _json(message)


def _to_github(pipeline: Pipeline, message: Mapping[str, Any]) -> tuple[dict[str, str], bytes]:
    """A repository dispatch: answered with 204, and the workflow of the default branch runs."""
    headers = {
        "Accept": "application/vnd.github+json",
        "Authorization": f"Bearer {pipeline.token}",
        "Content-Type": "application/json",
        "X-GitHub-Api-Version": "2022-11-28",
    }
    return headers, _json({"event_type": EVENT_TYPE, "client_payload": dict(message)})


def _to_gitlab(pipeline: Pipeline, _: Mapping[str, Any]) -> tuple[dict[str, str], bytes]:
    """A pipeline trigger: answered with 201. Without variables, since projects that restrict those refuse the call."""
    form = {"token": pipeline.token, "ref": pipeline.ref}
    return {"Content-Type": "application/x-www-form-urlencoded"}, urlencode(form).encode()


KINDS: Mapping[str, Callable[[Pipeline, Mapping[str, Any]], tuple[dict[str, str], bytes]]] = {
    "signed": _to_receiver,
    "github": _to_github,
    "gitlab": _to_gitlab,
}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def signature(secret: str, stamp: str, body: bytes) -> str:
    """What the receiver computes as well, and compares in constant time. Calls older than minutes it should refuse."""
    return "sha256=" + hmac.new(secret.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def of(settings: Settings) -> Pipeline | None:
    """The one that the settings name, if they name one."""
    if settings.network_webhook_url is None:
        return None
    return Pipeline(
        settings.network_webhook_url,
        settings.network_webhook_secret,
        settings.network_webhook_kind,
        settings.network_webhook_token,
        settings.network_webhook_ref,
    )
