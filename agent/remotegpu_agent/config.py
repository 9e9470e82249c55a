"""Where things are on this host, read once from /etc/remotegpu/agent.json and handed over.

Only `portal_url` must be given. Here is nothing secret: the token and the credential have files of their own.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from remotegpu_agent.files import find_json

CONFIG_FILE = Path("/etc/remotegpu/agent.json")
PATHS = ("ca_file", "enroll_token_file", "keys_dir", "state_dir", "tasks_dir", "run_dir", "home_dir")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ConfigError(Exception):
    """The configuration cannot work; says which field, why, and what to write."""


@dataclass(frozen=True)
class Config:
    portal_url: str
    ca_file: Path | None = Path("/etc/remotegpu/ca.pem")  # null: the host's own list of authorities
    machine_id: int | None = None  # the portal's number of this machine, for people who look; the credential decides
    enroll_token_file: Path = Path("/etc/remotegpu/enroll-token")
    keys_dir: Path = Path("/etc/remotegpu/authorized_keys")
    state_dir: Path = Path("/var/lib/remotegpu-agent")
    tasks_dir: Path = Path("/var/lib/remotegpu-tasks")
    run_dir: Path = Path("/run/remotegpu-agent")
    home_dir: Path = Path("/home")
    program: str = "/usr/local/bin/remotegpu-agent"
    leases_group: str = "remotegpu-leases"
    nvml_user: str = "nobody"
    proxy_url: str | None = (
        None  # http://host:port; without it the portal is called directly, whatever the environment says
    )

    @property
    def credential_file(self) -> Path:
        return self.state_dir / "credential.json"

    @property
    def reserve_dir(self) -> Path:
        return self.state_dir / "reserve"


def load(path: Path = CONFIG_FILE) -> Config:
    """Read and check. Without the file nobody has said yet which portal it is. Raises ConfigError."""
    try:
        value = find_json(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if value is None:
        return Config(portal_url="")
    if not isinstance(value, dict):
        raise ConfigError(f'{path}: not an object; write at least {{"portal_url": "https://portal.example:8443"}}')
    return parse(value, str(path))


def parse(value: dict[str, Any], where: str = "agent.json") -> Config:
    """Check the fields of a configuration. Raises ConfigError."""
    known = [field.name for field in fields(Config)]
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ConfigError(f"{where}: unknown field {', '.join(unknown)}; known are {', '.join(known)}")
    for name, given in value.items():
        if given is None and name in ("ca_file", "machine_id", "proxy_url"):
            continue
        if not isinstance(given, int if name == "machine_id" else str):
            raise ConfigError(f"{where}: {name} must be a {'number' if name == 'machine_id' else 'string'}")
    if "portal_url" not in value:
        raise ConfigError(f"{where}: portal_url is missing, for example https://portal.example:8443")
    if value["portal_url"]:  # empty: not yet. Leases end all the same, so whoever ends them must not fail here
        check_url(value["portal_url"], f"{where}: portal_url")
    return Config(**{name: Path(given) if name in PATHS and given else given for name, given in value.items()})  # type: ignore[arg-type]  # checked above


def check_url(url: str, where: str) -> None:
    """HTTPS, or plain HTTP to this very host. Raises ConfigError."""
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname in LOOPBACK:
        return
    if parts.scheme == "http":
        raise ConfigError(f"{where}: plain http is allowed on loopback only; use https://{parts.netloc}")
    if parts.scheme != "https" or not parts.hostname:
        raise ConfigError(f"{where}: {url!r} is not an address such as https://portal.example:8443")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigError(f"{where}: give scheme, host and port only, without a path")
