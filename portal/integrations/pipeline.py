"""The call to the CI pipeline: the network has changed, come and apply it. Signed, so that nobody else can start one.

    X-RemoteGPU-Timestamp: 1764129600
    X-RemoteGPU-Signature: sha256=HMAC-SHA256(secret, timestamp + "." + body)

Only the address that the settings name is called; no redirection is followed (exchange.py). When it is called is in
services/network_webhook.py.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from portal.integrations.exchange import NoAnswer, TooLong, exchange
from portal.settings import Settings

DEADLINE_S = 10.0
SAID = 200  # characters of an answer that are told to operators


class NotTaken(Exception):
    """The pipeline was not reached, or did not take the call; the text says why."""


@dataclass(frozen=True)
class Pipeline:
    url: str = field(repr=False)  # a token may be part of it
    secret: str = field(repr=False)
    deadline_s: float = DEADLINE_S

    def call(self, message: Mapping[str, Any], *, now: datetime) -> None:
        """Raises NotTaken unless it is answered with 2xx within the deadline."""
        body = json.dumps(message, separators=(",", ":")).encode()
        stamp = str(int(now.timestamp()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "RemoteGPU",
            "X-RemoteGPU-Timestamp": stamp,
            "X-RemoteGPU-Signature": signature(self.secret, stamp, body),
        }
        try:
            status, answer = exchange("POST", self.url, body=body, headers=headers, deadline_s=self.deadline_s)
        except NoAnswer as error:
            raise NotTaken(f"The pipeline does not answer: {error}.") from None
        except TooLong:
            raise NotTaken("The pipeline answers without end.") from None
        if not 200 <= status < 300:
            said = " ".join(answer[:SAID].decode(errors="replace").split())
            raise NotTaken(f"The pipeline refuses: {status} {said}.")


def signature(secret: str, stamp: str, body: bytes) -> str:
    """What the receiver computes as well, and compares in constant time. Calls older than minutes it should refuse."""
    return "sha256=" + hmac.new(secret.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def of(settings: Settings) -> Pipeline | None:
    """The one that the settings name, if they name one."""
    if settings.network_webhook_url is None:
        return None
    return Pipeline(settings.network_webhook_url, settings.network_webhook_secret)
