"""What got lost between Alertmanager and the portal is fetched: the portal asks which alerts there are now.

Alertmanager does not say that a silenced alert is over, forgets what it could not deliver, and leaves some out of a
large delivery. So it is asked once a minute, where it is configured. Absence is not an end by itself: an alert that it
does not know any more is over only if Prometheus evidently reaches it (the Watchdog is there) and it was not just
started. Deliveries themselves are in alerts.py.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from datetime import datetime, timedelta

from portal.db import connection, utcnow
from portal.errors import Error
from portal.integrations import alertmanager
from portal.integrations.alertmanager import Known
from portal.models import Alert
from portal.models.states import ALERT_OPEN
from portal.services import alerts, config
from portal.services.actors import SYSTEM
from portal.services.alerts import Notice

LOG = logging.getLogger(__name__)

SETTLED = timedelta(minutes=5)  # after its start Prometheus has told Alertmanager everything again
GRACE = timedelta(minutes=2)  # heard of so recently, an alert may be newer than the answer
FRESH = timedelta(minutes=6)  # a Watchdog that Prometheus has not renewed for longer is a leftover


_running: threading.Thread | None = None


def start() -> bool:
    """Reconcile beside the sweep, which an Alertmanager that hangs must not hold up; returns whether it was started.

    One at a time in a process: the sweep calls this from one thread.
    """
    global _running
    if config.current().alertmanager_url is None or (_running is not None and _running.is_alive()):
        return False
    _running = threading.Thread(target=_reconcile_alone, name="alerts relay", daemon=True)
    _running.start()
    return True


def _reconcile_alone() -> None:
    try:
        reconcile()
    except Exception:
        LOG.exception("alerts were not compared with Alertmanager; it is tried again in a minute")


def reconcile(now: datetime | None = None) -> int:
    """Bring open alerts into line with Alertmanager; returns how many changed. Nothing is configured: nothing is done.

    An Alertmanager that does not answer changes nothing; that it is silent is told by alerts_own.py.
    """
    outside = alertmanager.of(config.current())
    if outside is None:
        return 0
    now = now or utcnow()
    try:
        known, started_at = outside.alerts(), outside.started_at()
    except Error as error:
        LOG.info("alerts are not compared: %s", error.message)
        return 0
    with connection():  # only now: an Alertmanager that hangs holds none
        return compare(known, started_at, now)


def compare(known: Sequence[Known], started_at: datetime, now: datetime) -> int:
    """Open what fires and was not heard of; end what is not there any more. `known` was asked just before `now`."""
    lives = any(entry.labels.get("alertname") == alerts.WATCHDOG and now - entry.updated_at < FRESH for entry in known)
    if lives:
        alerts.note_watchdog(now)
    changed = sum(_take_in(entry, now) for entry in known)
    alerts.forget_truncated()
    if lives and now - started_at > SETTLED:
        changed += _end_missing({entry.fingerprint for entry in known}, now)
    return changed


def _take_in(entry: Known, now: datetime) -> bool:
    """What is silenced or inhibited there is nothing new to tell; what is open here is known."""
    if entry.labels.get("alertname") == alerts.WATCHDOG or entry.is_suppressed:
        return False
    notice = Notice(entry.fingerprint, entry.labels, entry.annotations, entry.starts_at, is_certain=True)
    _alert, what = alerts.hear(notice, by=SYSTEM, now=now)
    return what != "unchanged"


def _end_missing(known: set[str], now: datetime) -> int:
    ours = Alert.select().where(
        Alert.source == "alertmanager", Alert.state << ALERT_OPEN, Alert.last_heard_at < now - GRACE
    )
    gone = [alert for alert in ours if alert.fingerprint not in known]
    return sum(alerts.end(alert, reason="Alertmanager does not know it any more.", now=now) for alert in gone)
