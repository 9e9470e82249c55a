"""Settings: read once from the environment, checked, handed over. Nothing else reads the environment.

The secrets are files in the instance folder, made 0600 by `python -m portal init`; a missing, short or sample one is a
refusal to start, never a default. docs/operator.md lists every setting; a test compares the two.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import urlsplit

import limits

MIN_SECRET_BYTES = 32
LOOPBACK = ("localhost", "127.0.0.1", "::1")
USUAL_PORTS = {"https": 443, "http": 80}  # of an address that names none
UNIX_SOCKET = "unix"  # among TRUSTED_PROXIES: who connects to the socket file has no address
ENVIRONMENT = re.compile(r"[a-z][a-z0-9-]{0,31}")  # as the export's schema has it
WEBHOOKS = {  # kind → the path of its call, so that its token goes nowhere else, and an example
    "github": (
        re.compile(r"(/api/v3)?/repos/[^/]+/[^/]+/dispatches"),
        "https://api.github.com/repos/OWNER/NAME/dispatches",
    ),
    "gitlab": (
        re.compile(r"(/[^/]+)*/api/v4/projects/[^/]+/trigger/pipeline"),
        "https://gitlab.example.org/api/v4/projects/ID/trigger/pipeline",
    ),
}
SIGNED = "signed"  # the kind of a receiver of one's own, wherever it is
TOKEN = re.compile(r"[\x21-\x7e]{8,}")  # what fits into a header
SAMPLES = ("changeme", "change-me", "secret", "example", "password", "sample")


class SettingsError(ValueError):
    """A setting is missing or wrong. The message names the setting, the reason and the way out."""


def runs_for(cores: int) -> int:
    """How many runs a worker executes at a time: one over one host keeps a core busy for half of its time.

    At least four, so that one that hangs until its limit does not hold up the others; at most eight, of 150 MB each.
    """
    return min(8, max(4, 2 * cores))


@dataclass(frozen=True)
class Settings:
    """Everything the portal can be told from outside.

    `instance_dir` holds the database of the embedded default, the secrets, the CA and the portal's SSH key.
    `public_url` is the address that hosts and browsers use. Durations are in seconds.
    """

    instance_dir: Path
    database_url: str
    public_url: str
    bind: str
    redis_url: str | None = None
    trusted_proxies: str = ""  # whose X-Forwarded-… headers count: addresses, networks, unix
    access_token_s: int = 15 * 60
    refresh_token_s: int = 14 * 24 * 3600
    report_interval_s: float = 15.0
    offline_after_s: float = 60.0  # two missed reports and some slack
    sweep_interval_s: float = 1.0
    run_lock_s: float = 30.0  # a worker renews its lock at a third of this
    run_timeout_s: int = 3600
    runs_at_once: int = field(default_factory=lambda: runs_for(len(os.sched_getaffinity(0))))
    log_quota_bytes: int = 256 * 1024 * 1024
    lease_log_quota_bytes: int = 2 * 1024 * 1024 * 1024  # of all attempts of all its tasks
    log_retain_s: int = 30 * 24 * 3600  # from the end of the lease on
    default_retain_s: int = 24 * 3600
    workers: int = 1
    host_ca_file: str | None = None  # whom hosts trust for PUBLIC_URL: a file, `system`, or the portal's own CA
    served_certificate_file: str | None = None  # what a proxy in front shows, in PEM; without one the portal's own
    people_limit: str = "1200 per minute"  # requests from one address to one route; agents are not counted
    prometheus_url: str | None = None  # without it charts say so, and live values come from the agents
    prometheus_user: str | None = None
    prometheus_password: str = field(default="", repr=False)
    prometheus_token: str = field(default="", repr=False)
    alertmanager_url: str | None = None  # without it silences are the portal's alone, and lost deliveries stay lost
    alertmanager_user: str | None = None
    alertmanager_password: str = field(default="", repr=False)
    monitoring_silent_s: float = 360.0  # the Watchdog comes, or is fetched, every minute
    network_environment: str = "production"  # of which the export is; a stack of another one refuses it
    network_webhook_url: str | None = None  # the pipeline that is called when the network changes; without: it asks
    network_webhook_kind: str = SIGNED  # who is called: a receiver of one's own, github, gitlab
    network_webhook_secret: str = field(default="", repr=False)
    network_webhook_token: str = field(default="", repr=False)  # lets us in at GitHub or GitLab
    network_webhook_ref: str = "main"  # the branch that GitLab runs
    metrics_allow: str = ""  # addresses and networks that read /metrics without a token
    secret_key: str = field(default="", repr=False)
    jwt_secret_key: str = field(default="", repr=False)
    encryption_key: str = field(default="", repr=False)

    @property
    def is_secure(self) -> bool:
        """Whether browsers reach the portal over TLS, so that cookies may demand it."""
        return urlsplit(self.public_url).scheme == "https"

    @property
    def public_port(self) -> int:
        """The port that hosts and browsers call."""
        parts = urlsplit(self.public_url)
        return parts.port or USUAL_PORTS[parts.scheme]

    @property
    def ca_file(self) -> Path:
        return self.instance_dir / "ca" / "ca.pem"

    @property
    def ca_for_hosts(self) -> Path | None:
        """The authority that hosts are told to trust for PUBLIC_URL; None: those of their own system."""
        if self.host_ca_file is None:
            return self.ca_file
        return None if self.host_ca_file == "system" else Path(self.host_ca_file)

    @property
    def certificate_file(self) -> Path:
        return self.instance_dir / "ca" / "portal.pem"

    @property
    def certificate_key_file(self) -> Path:
        return self.instance_dir / "ca" / "portal.key"

    @property
    def served_certificate(self) -> Path | None:
        """The certificate that browsers and hosts are shown; None where a proxy has one that nobody has named."""
        if self.served_certificate_file is not None:
            return Path(self.served_certificate_file)
        return self.certificate_file if self.is_secure and not self.trusted_proxies else None

    @property
    def signing_key_file(self) -> Path:
        """Ed25519, signs reclaim reports; the public half lies beside it as `.pub.pem`."""
        return self.instance_dir / "secrets" / "report_signing_key.pem"

    @property
    def ssh_key_file(self) -> Path:
        """The portal's own key for hosts; the public half lies beside it as `.pub`."""
        return self.instance_dir / "secrets" / "ssh_ed25519"

    @property
    def runs_dir(self) -> Path:
        return self.instance_dir / "runs"


RANGES = {
    "access_token_s": (1, 24 * 3600),
    "refresh_token_s": (60, 366 * 24 * 3600),
    "report_interval_s": (1, 300),  # what the protocol takes; agents would refuse all of the desired state
    "offline_after_s": (1, 24 * 3600),
    "sweep_interval_s": (0.05, 60),
    "run_lock_s": (1, 3600),
    "run_timeout_s": (1, 7 * 24 * 3600),
    "runs_at_once": (1, 256),
    "log_quota_bytes": (1, 2**53 - 1),
    "lease_log_quota_bytes": (1, 2**53 - 1),
    "log_retain_s": (3600, 10 * 366 * 24 * 3600),
    "monitoring_silent_s": (10, 24 * 3600),
    "default_retain_s": (0, 90 * 24 * 3600),  # as for each lease
    "workers": (1, 256),
}

SECRET_FILES = ("secret_key", "jwt_secret_key", "encryption_key")


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this process. Raises SettingsError for the first one that is wrong."""
    instance = Path(environ.get("INSTANCE_DIR") or "instance").absolute()
    given: dict[str, object] = {}
    for entry in fields(Settings):
        text = environ.get(entry.name.upper(), "").strip()
        if entry.name not in ("instance_dir", *SECRET_FILES) and text:
            given[entry.name] = _parse(entry.name, str(entry.type), text)
    for name in SECRET_FILES:
        given[name] = _secret(name, environ.get(name.upper()), instance / "secrets" / name)
    given.setdefault("database_url", f"sqlite:///{instance / 'remotegpu.db'}")
    given.setdefault("public_url", "https://127.0.0.1:8443")
    _check_public_url(str(given["public_url"]))
    given.setdefault("bind", _bind_for(str(given["public_url"]), behind_proxy="trusted_proxies" in given))
    settings = Settings(instance_dir=instance, **given)  # type: ignore[arg-type]  # parsed by the type of each field
    _check_ranges(settings)
    if settings.ca_for_hosts not in (None, settings.ca_file) and not Path(str(settings.host_ca_file)).is_file():
        raise SettingsError(f"HOST_CA_FILE: there is no file {settings.host_ca_file}; name one in PEM, or `system`")
    _check_proxies(settings)
    _check_monitoring(settings)
    _check_network(settings)
    return settings


def _bind_for(public_url: str, *, behind_proxy: bool) -> str:
    """Loopback for an address that only this machine has, else every interface: hosts must get in.

    At the port that they call; behind a proxy, which has that port, at one that needs no rights.
    """
    parts = urlsplit(public_url)
    interface = "127.0.0.1" if parts.hostname in LOOPBACK else "0.0.0.0"  # noqa: S104 - said so in the guide
    return f"{interface}:{parts.port or (8443 if behind_proxy else USUAL_PORTS[parts.scheme])}"


def _parse(name: str, kind: str, text: str) -> object:
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
    except ValueError:
        raise SettingsError(f"{name.upper()}: {text!r} is not a number") from None
    return text


def _secret(name: str, given: str | None, file: Path) -> str:
    if given is None and not file.exists():
        raise SettingsError(
            f"{name.upper()}: not set and {file} does not exist; run `python -m portal init` to make it"
        )
    value = given if given is not None else file.read_text().strip()
    if len(value) < MIN_SECRET_BYTES:
        raise SettingsError(f"{name.upper()}: shorter than {MIN_SECRET_BYTES} characters; run `python -m portal init`")
    if any(sample in value.lower() for sample in SAMPLES) or len(set(value)) < 8:
        raise SettingsError(f"{name.upper()}: looks like a sample; run `python -m portal init` for a random one")
    return value


def _check_ranges(settings: Settings) -> None:
    for name, (least, most) in RANGES.items():
        value = getattr(settings, name)
        if not least <= value <= most:  # so asked, a value that is no number at all is refused as well
            raise SettingsError(f"{name.upper()}: {value} is not between {least} and {most}")
    if settings.access_token_s > settings.refresh_token_s:
        raise SettingsError(
            f"ACCESS_TOKEN_S: {settings.access_token_s} is longer than REFRESH_TOKEN_S, {settings.refresh_token_s}; "
            "an access token must not outlive its sign-in"
        )
    try:
        limits.parse_many(settings.people_limit)
    except ValueError:
        raise SettingsError(f"PEOPLE_LIMIT: {settings.people_limit!r} is not a limit such as 1200 per minute") from None


def _check_public_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_address = parts.port != 0 and parts.scheme in USUAL_PORTS and bool(parts.hostname)
    except ValueError:  # a port beyond 65535, half a bracket
        is_address = False
    if not is_address or parts.path not in ("", "/") or parts.query:
        raise SettingsError(f"PUBLIC_URL: {url!r} is not an address such as https://portal.example.org:8443")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise SettingsError(f"PUBLIC_URL: {url!r} is plain http; agents refuse that except on loopback; use https")


def _check_proxies(settings: Settings) -> None:
    try:
        networks(settings.trusted_proxies, but=UNIX_SOCKET)
    except ValueError as error:
        raise SettingsError(
            f"TRUSTED_PROXIES: {error}; write the addresses of the proxies in front, or their networks, with commas "
            f"between them, or {UNIX_SOCKET} for one that comes over a socket file"
        ) from None


def _check_monitoring(settings: Settings) -> None:
    for name in ("prometheus", "alertmanager"):
        parts = urlsplit(getattr(settings, f"{name}_url") or "http://none")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or "@" in parts.netloc:
            raise SettingsError(  # it may hold a password, so it is not repeated
                f"{name.upper()}_URL: is not an address such as http://127.0.0.1:9090; "
                f"user and password go into {name.upper()}_USER and {name.upper()}_PASSWORD"
            )
    try:
        networks(settings.metrics_allow)
    except ValueError as error:
        raise SettingsError(f"METRICS_ALLOW: {error}; write addresses or networks with commas between them") from None


def _check_network(settings: Settings) -> None:
    if not ENVIRONMENT.fullmatch(settings.network_environment):
        raise SettingsError(
            f"NETWORK_ENVIRONMENT: {settings.network_environment!r} is no word such as production: a-z, 0-9 and '-', "
            "a letter first, at most 32"
        )
    _check_webhook(settings)


def _check_webhook(settings: Settings) -> None:
    kind, url = settings.network_webhook_kind, settings.network_webhook_url
    if kind not in (SIGNED, *WEBHOOKS):
        raise SettingsError(f"NETWORK_WEBHOOK_KIND: {kind!r} is none of {', '.join((SIGNED, *WEBHOOKS))}")
    if kind == SIGNED and settings.network_webhook_token:
        raise SettingsError("NETWORK_WEBHOOK_TOKEN: is for github and gitlab; say which in NETWORK_WEBHOOK_KIND")
    if url is None:
        if kind != SIGNED:
            raise SettingsError(f"NETWORK_WEBHOOK_URL: not set, so {kind} cannot be called; {WEBHOOKS[kind][1]}")
        return
    parts = urlsplit(url)
    is_plain = parts.scheme == "http" and parts.hostname in LOOPBACK
    if (parts.scheme != "https" and not is_plain) or not parts.hostname or "@" in parts.netloc or parts.fragment:
        raise SettingsError(  # a token may be part of it, so it is not repeated
            "NETWORK_WEBHOOK_URL: is not an address such as https://ci.example.org/hooks/network; "
            "plain http is for loopback"
        )
    if len(settings.network_webhook_secret) < MIN_SECRET_BYTES:
        raise SettingsError(
            f"NETWORK_WEBHOOK_SECRET: shorter than {MIN_SECRET_BYTES} characters; make one with `openssl rand -hex 32` "
            "and give the same to a receiver of your own, which checks the signature with it"
        )
    if kind == SIGNED:
        return
    path, example = WEBHOOKS[kind]
    if parts.query or not path.fullmatch(parts.path):
        raise SettingsError(f"NETWORK_WEBHOOK_URL: is not one of {kind}, such as {example}")
    if not TOKEN.fullmatch(settings.network_webhook_token):
        raise SettingsError(
            f"NETWORK_WEBHOOK_TOKEN: {kind} wants one, a single word; docs/network.md says how to get it"
        )


def networks(text: str, *, but: str | None = None) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """`10.0.0.5, fd00::/8` as networks, without the word `but`. Raises ValueError that names the one which is none."""
    return tuple(ipaddress.ip_network(word) for word in words(text) if word != but)


def words(text: str) -> list[str]:
    """What stands between the commas."""
    return [part.strip() for part in text.split(",") if part.strip()]
