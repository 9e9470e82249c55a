"""What the portal may tell this host, as frozen values; and how a moment is written.

The words are those of `agent/protocol/protocol.schema.json`, which the tests hold this file against. Reading is
strict: an unknown field is an error, since a misspelt order must not be half obeyed. Here is no network and no disk.
"""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TypeVar, cast

VERSION = 1
LOGIN = re.compile(r"lease[0-9]{1,10}\Z")
KEY_LINE = re.compile(r"[a-z0-9@.-]{3,64} [A-Za-z0-9+/]+={0,3}(?: [^\x00-\x1f\x7f]*)?\Z")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z\Z")
UIDS = range(20000, 60000)  # of leases, on every host
PROTOCOLS = ("tcp", "udp")
MOST_GRACE_S = 300  # a reboot of the host waits that long for a task; older portals took an hour

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

T = TypeVar("T")


class ProtocolError(Exception):
    """The message is not one that this agent understands; says which field and why."""


def parse_time(text: object, where: str = "time") -> datetime:
    """The moment as an aware UTC datetime."""
    if not isinstance(text, str) or not TIME.match(text):
        raise ProtocolError(f"{where}: {text!r} is not a time in UTC such as 2026-01-31T12:00:00Z")
    try:
        return datetime.fromisoformat(_six_digits(text[:-1])).replace(tzinfo=timezone.utc)
    except ValueError as error:
        raise ProtocolError(f"{where}: {error}") from error


def format_time(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).isoformat().replace("+00:00", "Z")


def now() -> datetime:
    return datetime.now(timezone.utc)


def _six_digits(text: str) -> str:
    """Python 3.10 reads fractions of three or six digits only."""
    whole, dot, fraction = text.partition(".")
    return f"{whole}.{fraction:0<6}" if dot else whole


@dataclass(frozen=True)
class Key:
    fingerprint: str
    line: str


@dataclass(frozen=True)
class DesiredLease:
    lease_id: int
    login: str
    uid: int
    is_open: bool
    ends_at: datetime
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class DesiredAttempt:
    attempt_id: int
    task_id: int
    lease_id: int
    is_wanted: bool  # False: to be stopped
    command: str
    env: Mapping[str, str]
    workdir: str | None
    time_limit_s: int | None
    stop_grace_s: int
    gpu_uuids: tuple[str, ...] | None


@dataclass(frozen=True)
class DesiredOpening:
    """One hole in this host's firewall."""

    opening_id: int
    lease_id: int | None  # None: the machine's own, whoever has leased it
    protocol: str
    first_port: int
    last_port: int
    source: Network
    ends_at: datetime | None  # None only for the machine's own


@dataclass(frozen=True)
class DesiredForward:
    """One port of this gateway that leads to a machine behind it."""

    forward_id: int
    lease_id: int
    protocol: str
    public_port: int
    source: Network
    target_address: Address
    target_port: int
    ends_at: datetime


@dataclass(frozen=True)
class Command:
    command_id: int
    kind: str
    args: Mapping[str, Any]


@dataclass(frozen=True)
class Desired:
    machine_id: int
    epoch: str
    generation: int
    leases: tuple[DesiredLease, ...]
    attempts: tuple[DesiredAttempt, ...]
    commands: tuple[Command, ...]
    report_interval_s: float
    log_quota_bytes: int
    openings: tuple[DesiredOpening, ...] = ()
    forwards: tuple[DesiredForward, ...] = ()


COMMANDS: dict[str, dict[str, type[object]]] = {
    "baseline": {"machine_id": int},
    "clean": {"lease_id": int, "machine_id": int, "login": str, "uid": int, "baseline": dict},
    "rotate_credential": {"machine_id": int, "credential": str, "credential_id": int},
    "thaw": {"machine_id": int, "epoch": str, "generation": int, "retained": list},
}


def read_desired(value: object) -> Desired:
    """The whole desired state, checked. Raises ProtocolError."""
    fields = Fields(value, "desired")
    desired = Desired(
        machine_id=fields.take("machine_id", int),
        epoch=fields.take("epoch", str),
        generation=fields.take("generation", int),
        leases=tuple(_read_lease(item, f"leases[{i}]") for i, item in enumerate(fields.take("leases", list))),
        attempts=tuple(_read_attempt(item, f"attempts[{i}]") for i, item in enumerate(fields.take("attempts", list))),
        commands=tuple(_read_command(item, f"commands[{i}]") for i, item in enumerate(fields.take("commands", list))),
        report_interval_s=fields.take_number("report_interval_s"),
        log_quota_bytes=fields.take("log_quota_bytes", int),
        openings=tuple(
            _read_opening(item, f"openings[{i}]") for i, item in enumerate(fields.take_list_if_there("openings"))
        ),
        forwards=tuple(
            _read_forward(item, f"forwards[{i}]") for i, item in enumerate(fields.take_list_if_there("forwards"))
        ),
    )
    fields.finish()
    return desired


def _read_lease(value: object, where: str) -> DesiredLease:
    fields = Fields(value, where)
    lease = DesiredLease(
        lease_id=fields.take("lease_id", int),
        login=fields.take("login", str),
        uid=fields.take("uid", int),
        is_open=fields.take_choice("state", ("open", "closed")) == "open",
        ends_at=parse_time(fields.take("ends_at", str), f"{where}.ends_at"),
        keys=tuple(_read_key(item, f"{where}.keys[{i}]") for i, item in enumerate(fields.take("keys", list))),
    )
    fields.finish()
    check_login(lease.login, lease.uid, where)
    return lease


def check_login(login: str, uid: int, where: str) -> None:
    """Refuse names and numbers that could be somebody else's. Raises ProtocolError."""
    if not LOGIN.match(login):
        raise ProtocolError(f"{where}.login: {login!r} is not a lease's login such as lease17")
    if uid not in UIDS:
        raise ProtocolError(f"{where}.uid: {uid} is outside {UIDS.start} to {UIDS.stop - 1}")


def _read_key(value: object, where: str) -> Key:
    fields = Fields(value, where)
    key = Key(fingerprint=fields.take("fingerprint", str), line=fields.take("line", str))
    fields.finish()
    if not KEY_LINE.match(key.line):
        raise ProtocolError(f"{where}.line: not one public key without options on one line")
    return key


def _read_attempt(value: object, where: str) -> DesiredAttempt:
    fields = Fields(value, where)
    attempt = DesiredAttempt(
        attempt_id=fields.take("attempt_id", int),
        task_id=fields.take("task_id", int),
        lease_id=fields.take("lease_id", int),
        is_wanted=fields.take_choice("state", ("run", "stop")) == "run",
        command=fields.take("command", str),
        env=fields.take("env", dict),
        workdir=fields.take_optional("workdir", str),
        time_limit_s=fields.take_optional("time_limit_s", int),
        stop_grace_s=min(fields.take("stop_grace_s", int), MOST_GRACE_S),
        gpu_uuids=_strings(fields.take_optional("gpu_uuids", list), f"{where}.gpu_uuids"),
    )
    fields.finish()
    if not all(isinstance(text, str) for text in attempt.env.values()):
        raise ProtocolError(f"{where}.env: every value must be a string")
    return attempt


def _read_opening(value: object, where: str) -> DesiredOpening:
    fields = Fields(value, where)
    first, last = _ports(fields.take("ports", list), f"{where}.ports")
    ends_at = fields.take_optional("ends_at", str)
    opening = DesiredOpening(
        opening_id=fields.take("id", int),
        lease_id=fields.take_optional("lease", int),
        protocol=fields.take_choice("protocol", PROTOCOLS),
        first_port=first,
        last_port=last,
        source=_network(fields.take("source", str), f"{where}.source"),
        ends_at=parse_time(ends_at, f"{where}.ends_at") if ends_at is not None else None,
    )
    fields.finish()
    if opening.lease_id is not None and opening.ends_at is None:
        raise ProtocolError(f"{where}.ends_at: what a lease opens has an end")
    return opening


def _read_forward(value: object, where: str) -> DesiredForward:
    fields = Fields(value, where)
    forward = DesiredForward(
        forward_id=fields.take("id", int),
        lease_id=fields.take("lease", int),
        protocol=fields.take_choice("protocol", PROTOCOLS),
        public_port=_port(fields.take("public_port", int), f"{where}.public_port"),
        source=_network(fields.take("source", str), f"{where}.source"),
        target_address=_address(fields.take("target_address", str), f"{where}.target_address"),
        target_port=_port(fields.take("target_port", int), f"{where}.target_port"),
        ends_at=parse_time(fields.take("ends_at", str), f"{where}.ends_at"),
    )
    fields.finish()
    if forward.source.version != forward.target_address.version:
        raise ProtocolError(f"{where}.target_address: {forward.target_address} is not of the family of its source")
    return forward


def _ports(value: list[object], where: str) -> tuple[int, int]:
    if len(value) != 2:
        raise ProtocolError(f"{where}: not the first and the last port")
    first, last = (_port(each, where) for each in value)
    if first > last:
        raise ProtocolError(f"{where}: {first} comes after {last}")
    return first, last


def _port(value: object, where: str) -> int:
    if type(value) is not int or not 1 <= value <= 65535:
        raise ProtocolError(f"{where}: {value!r} is not a port")
    return value


def _network(text: str, where: str) -> Network:
    _refuse_interface(text, where)
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ProtocolError(f"{where}: {error}") from error
    if str(network) != text:
        raise ProtocolError(f"{where}: {text!r} is not written as {network}")
    return network


def _address(text: str, where: str) -> Address:
    _refuse_interface(text, where)
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise ProtocolError(f"{where}: {error}") from error


def _refuse_interface(text: str, where: str) -> None:
    """Behind a % Python takes any text for an interface's name, and nft would be told it."""
    if "%" in text:
        raise ProtocolError(f"{where}: {text!r} names an interface")


def _strings(value: list[object] | None, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not all(isinstance(item, str) for item in value):
        raise ProtocolError(f"{where}: every item must be a string")
    return tuple(cast(list[str], value))


def _read_command(value: object, where: str) -> Command:
    fields = Fields(value, where)
    command = Command(fields.take("command_id", int), fields.take("kind", str), fields.take("args", dict))
    fields.finish()
    if command.kind not in COMMANDS:
        raise ProtocolError(f"{where}.kind: {command.kind!r} is none of {', '.join(COMMANDS)}")
    check_args(command.kind, command.args, where)
    return command


def check_args(kind: str, args: object, where: str) -> None:
    """The arguments of a command have exactly the names and types of its kind. Raises ProtocolError."""
    fields = Fields(args, f"{where}.args")
    for name, wanted in COMMANDS[kind].items():
        fields.take(name, wanted)
    fields.finish()
    if kind == "clean":
        values = cast(Mapping[str, Any], args)
        check_login(values["login"], values["uid"], f"{where}.args")
    if kind == "thaw" and not all(type(lease_id) is int for lease_id in cast(Mapping[str, Any], args)["retained"]):
        raise ProtocolError(f"{where}.args.retained: every item must be the id of a lease")


class Fields:
    """Takes the fields of one JSON object by name and type, and knows which were left over."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ProtocolError(f"{where}: not a JSON object")
        self._left = dict(value)
        self._where = where

    def take(self, name: str, wanted: type[T]) -> T:
        if name not in self._left:
            raise ProtocolError(f"{self._where}.{name}: missing")
        value = self._left.pop(name)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ProtocolError(f"{self._where}.{name}: {type(value).__name__} where {wanted.__name__} is expected")
        return value

    def take_list_if_there(self, name: str) -> list[Any]:
        """A list that peers of before do not send."""
        return self.take(name, list) if name in self._left else []

    def take_optional(self, name: str, wanted: type[T]) -> T | None:
        if name in self._left and self._left[name] is None:
            del self._left[name]
            return None
        return self.take(name, wanted)

    def take_number(self, name: str) -> float:
        if isinstance(self._left.get(name), int) and not isinstance(self._left[name], bool):
            return float(self.take(name, int))
        return self.take(name, float)

    def take_choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.take(name, str)
        if value not in choices:
            raise ProtocolError(f"{self._where}.{name}: {value!r} is none of {', '.join(choices)}")
        return value

    def finish(self) -> None:
        if self._left:
            raise ProtocolError(f"{self._where}: unknown field {', '.join(sorted(self._left))}")
