"""Alertmanager's API, the part that the portal asks of it: which alerts it knows, and silences.

Only what is needed of the answers is read, into values of our own. What follows from it is in services/alerts_relay.py
and services/alerts_silences.py. Deliveries come the other way, to api/alerts.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from portal.errors import Error, Unavailable
from portal.integrations.exchange import NoAnswer, TooLong, basic, exchange
from portal.settings import Settings

DEADLINE_S = 5.0
COMMENT_LENGTH = 1000


class Unreachable(Unavailable):
    """It does not answer, or what it answers makes no sense."""

    code = "alertmanager_unreachable"


class Refused(Error):
    """It answers, and will not."""

    status = 502
    code = "alertmanager_refused"


@dataclass(frozen=True)
class Known:
    """An alert that Alertmanager holds now. `is_suppressed`: silenced or inhibited there."""

    fingerprint: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    starts_at: datetime
    updated_at: datetime
    is_suppressed: bool


@dataclass(frozen=True)
class Alertmanager:
    """One Alertmanager, or the address in front of several. Every call raises Unreachable, by its deadline."""

    url: str
    user: str | None = None
    password: str = field(default="", repr=False)
    deadline_s: float = DEADLINE_S

    def started_at(self) -> datetime:
        """When it was started: it keeps no alerts over a restart."""
        with _sense():
            return _moment(self._ask("GET", "status")["uptime"])

    def alerts(self) -> list[Known]:
        """Every alert that fires, silenced ones too."""
        with _sense():
            return [_known(entry) for entry in self._ask("GET", "alerts")]

    def silence(self, labels: Mapping[str, str], *, until: datetime, by: str, reason: str) -> str:
        """Silence the alert with exactly these labels; returns the silence's id. Raises Refused."""
        body = {
            "matchers": [
                {"name": name, "value": value, "isRegex": False, "isEqual": True}
                for name, value in sorted(labels.items())
            ],
            "startsAt": _told(datetime.now(UTC)),
            "endsAt": _told(until),
            "createdBy": by,
            "comment": reason[:COMMENT_LENGTH],
        }
        with _sense():
            return str(self._ask("POST", "silences", body)["silenceID"])

    def end_silence(self, silence_id: str) -> None:
        """End it now. One that is over or unknown there is no error: nothing is silenced by it."""
        try:
            self._ask("DELETE", f"silence/{silence_id}")
        except Refused as refusal:
            if refusal.details.get("answered") not in (404, 500):  # 0.25 says 500 for one that has expired
                raise

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self.user is not None:
            headers["Authorization"] = basic(self.user, self.password)
        url = f"{self.url.rstrip('/')}/api/v2/{path}"
        told = None if body is None else json.dumps(body).encode()
        try:
            status, content = exchange(method, url, body=told, headers=headers, deadline_s=self.deadline_s)
        except NoAnswer as error:
            raise Unreachable(f"Alertmanager does not answer: {error}.") from None
        except TooLong:
            raise Unreachable("Alertmanager answers with more than 64 MiB.") from None
        if not 200 <= status < 300:
            said = content[:300].decode(errors="replace").strip()
            raise Refused(f"Alertmanager refuses: {status} {said}.", answered=status)
        with _sense():
            return json.loads(content) if content.strip() else None


@contextmanager
def _sense() -> Iterator[None]:
    """What cannot be read is as good as no answer. Raises Unreachable."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise Unreachable(f"Alertmanager's answer makes no sense: {error!r}.") from None


def of(settings: Settings) -> Alertmanager | None:
    """The one that the settings name, if they name one."""
    if settings.alertmanager_url is None:
        return None
    return Alertmanager(settings.alertmanager_url, settings.alertmanager_user, settings.alertmanager_password)


def _known(entry: Mapping[str, Any]) -> Known:
    return Known(
        fingerprint=str(entry["fingerprint"]),
        labels={str(name): str(value) for name, value in entry["labels"].items()},
        annotations={str(name): str(value) for name, value in entry["annotations"].items()},
        starts_at=_moment(entry["startsAt"]),
        updated_at=_moment(entry["updatedAt"]),
        is_suppressed=entry["status"]["state"] == "suppressed",
    )


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _told(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
