"""Telling the engine: one adapter each cloud, and the only place where an SDK is imported.

An adapter hands values from shapes/ to the Args classes of its SDK and decides nothing. It is imported when the stack
has its cloud, and not before: one costs up to two seconds and 170 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn, Protocol, cast

from remotegpu_network.desired import Resource

if TYPE_CHECKING:
    import pulumi


class Adapter(Protocol):
    """What a module here offers. The answer: logical name → resource, of the zones and groups made."""

    def declare(self, wanted: Iterable[Resource]) -> Mapping[str, pulumi.CustomResource]: ...


def declare(wanted: Iterable[Resource]) -> dict[str, pulumi.CustomResource]:
    """All resources, a cloud after the other."""
    by_cloud: dict[str, list[Resource]] = {}
    for each in wanted:
        by_cloud.setdefault(each.cloud, []).append(each)
    made: dict[str, pulumi.CustomResource] = {}
    for cloud, resources in by_cloud.items():
        adapter = cast(Adapter, import_module(f"{__name__}.{cloud}"))
        made.update(adapter.declare(resources))
    return made


def unknown_shape(each: Resource) -> NoReturn:
    """Raises TypeError: a shape was added to desired.py and forgotten here."""
    raise TypeError(f"{each.logical}: no adapter for {type(each.shape).__name__}")
