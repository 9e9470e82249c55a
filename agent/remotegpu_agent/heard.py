"""Whether the portal hears the agent that systemd runs now: what an upgrade and a rotation wait for.

Judged by what that very process has written down: a report of it was taken, it is of the version of this program, and
it uses the credential that was asked for. What another process wrote before it has another pid, and counts for nothing.
"""

import time
from dataclasses import dataclass
from typing import Any

from remotegpu_agent import __version__
from remotegpu_agent.config import Config
from remotegpu_agent.credential import Credential
from remotegpu_agent.files import find_json
from remotegpu_agent.systemd import ToolFailed, show

UNIT = "remotegpu-agent.service"
LOOK_S = 0.5


@dataclass(frozen=True)
class Seen:
    """What systemd says of the service, what its process wrote down, and the credential that the portal took last."""

    pid: int
    running: dict[str, Any]
    credential_id: int | None


def missing(seen: Seen, *, version: str, credential_id: int | None = None) -> str | None:
    """What is missing until the portal hears this version (with this credential); None when nothing is."""
    if not seen.pid:
        return f"{UNIT} does not run"
    if seen.running.get("pid") != seen.pid:
        return f"process {seen.pid} of {UNIT} has written nothing down yet"
    if seen.running.get("version") != version:
        return f"{UNIT} runs {seen.running.get('version')}, and this program is {version}"
    if seen.running.get("reported_at") is None:
        return f"the portal has taken no report of process {seen.pid} ({version})"
    if credential_id is not None and seen.credential_id != credential_id:
        return f"the portal was not called with credential {credential_id}"
    return None


def wait(config: Config, *, within_s: float, credential_id: int | None = None) -> str | None:
    """Look until nothing is missing, or the time is up; what is missing then."""
    ends_at = time.monotonic() + within_s
    while True:
        try:
            why = missing(look(config), version=__version__, credential_id=credential_id)
        except (ToolFailed, ValueError) as error:
            why = str(error)
        if why is None or time.monotonic() >= ends_at:
            return why
        time.sleep(LOOK_S)


def look(config: Config) -> Seen:
    """Once. Raises ToolFailed, ValueError."""
    pid = show(UNIT, "MainPID").get("MainPID", "0")
    running = find_json(config.run_dir / "status.json") or {}
    return Seen(int(pid), running, Credential(config.credential_file).used_id)
