"""What a stack is told: which clouds are its own, where the export lies, and how much may vanish at once.

`Pulumi.<stack>.yaml` holds it; the program reads it from the engine, `make network-plan` from the file. Either may
hand over a text: the engine always does, and `pulumi config set` writes numbers as texts into the file. Secrets are
not among it: the adapters in clouds/ ask the engine for theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

PROJECT = "remotegpu"
CLOUDS = ("cloudflare", "aws", "alicloud", "tencent")
FIRST = "first"
ACCOUNT = re.compile(r"[0-9]{12}")


class BadSettings(ValueError):
    """A setting of the stack is missing or wrong. The message names it."""


@dataclass(frozen=True)
class Settings:
    """`export` and `applied` are files, relative to the project's folder; `applied` is `first` before anything was
    applied.

    `max_loss_percent`: how much of the names or of the openings may be gone since then; `may_lose` of them may always
    (the end of a lease in a small fleet is no fault). `managed_zones`: zones that the stack makes, with the account
    where Cloudflare wants one. `adopt`: logical name → id of what is in the cloud already.
    `protect`: logical names that no apply may delete. `aws_account`: the stack's own, twelve digits.
    `…_rules_per_group`: the clouds' quotas of a security group.
    """

    environment: str
    clouds: tuple[str, ...]
    export: str = "export.json"
    applied: str = FIRST
    max_loss_percent: float = 20.0
    may_lose: int = 2
    managed_zones: Mapping[str, str] = field(default_factory=dict)
    adopt: Mapping[str, str] = field(default_factory=dict)
    protect: frozenset[str] = frozenset()
    aws_account: str | None = None
    aws_egress: bool = True
    aws_rules_per_group: int = 60
    alicloud_rules_per_group: int = 200
    tencent_rules_per_group: int = 100
    alidns_ttl_s: int = 600
    dnspod_ttl_s: int = 600
    replaces_at_most: int = 20


def read(get: Callable[[str], Any]) -> Settings:
    """`get` answers what a key (dashes for underscores) is set to, typed or as a text, or None. Raises BadSettings."""
    values: dict[str, Any] = {}
    for each in fields(Settings):
        found = get(key_of(each.name))
        if found is not None:
            reader = _READERS[str(each.type)]
            values[each.name] = reader(each.name, found if reader is _text else _said(found))
    for needed in ("environment", "clouds"):
        if not values.get(needed):
            raise BadSettings(f"{PROJECT}:{needed} is not set")
    settings = Settings(**values)
    if unknown := set(settings.clouds) - set(CLOUDS):
        raise BadSettings(f"{PROJECT}:clouds names {', '.join(sorted(unknown))}; there are {', '.join(CLOUDS)}")
    if settings.aws_account is not None and not ACCOUNT.fullmatch(settings.aws_account):
        raise BadSettings(f"{PROJECT}:aws-account is {settings.aws_account!r}; it is twelve digits")
    if not 0 <= settings.max_loss_percent <= 100:
        raise BadSettings(f"{PROJECT}:max-loss-percent is {settings.max_loss_percent:g}; from 0 to 100")
    return settings


def key_of(name: str) -> str:
    return name.replace("_", "-")


def from_stack_file(file: Path) -> Settings:
    """The settings in a `Pulumi.<stack>.yaml`. Raises BadSettings."""
    import yaml  # comes with pulumi; the program itself needs none

    loaded = yaml.safe_load(file.read_text()) or {}
    config = loaded.get("config") or {}
    known = {key_of(each.name) for each in fields(Settings)}
    for key in config:
        name, _, rest = str(key).partition(":")
        if name == PROJECT and rest not in known:
            raise BadSettings(f"{file.name}: {key} is not known")
    return read(lambda key: config.get(f"{PROJECT}:{key}"))


def _said(value: Any) -> Any:
    """What a text says; a plain word is no JSON and says itself."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadSettings(f"{PROJECT}:{key_of(name)} is a text")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadSettings(f"{PROJECT}:{key_of(name)} is a number")
    return float(value)


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if not number.is_integer() or number < 0:
        raise BadSettings(f"{PROJECT}:{key_of(name)} is a whole number")
    return int(number)


def _yes_or_no(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadSettings(f"{PROJECT}:{key_of(name)} is true or false")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(each, str) for each in value):
        raise BadSettings(f"{PROJECT}:{key_of(name)} is a list of texts")
    return tuple(value)


def _pairs(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(each, str) for pair in value.items() for each in pair):
        raise BadSettings(f"{PROJECT}:{key_of(name)} maps texts to texts")
    return dict(value)


_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "str": _text,
    "str | None": _text,
    "float": _number,
    "int": _whole,
    "bool": _yes_or_no,
    "tuple[str, ...]": _texts,
    "frozenset[str]": lambda name, value: frozenset(_texts(name, value)),
    "Mapping[str, str]": _pairs,
}
