"""Mocks that are strict: a URN twice, a resource without a provider, and what the policy refuses are errors; options
are kept.

Pulumi's own mocks take anything and show no options (docs/network.md, the engine double beside it runs the whole
program).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

from pulumi.runtime.mocks import MockCallArgs, MockMonitor, MockResourceArgs, Mocks

import pulumi
from remotegpu_network import clouds, desired, policy
from remotegpu_network.settings import Settings
from tests.network.export import parsed


class Answers(Mocks):
    """Ids are known when the stack is applied, and not in a preview."""

    def __init__(self, preview: bool) -> None:
        self.preview = preview

    def new_resource(self, args: MockResourceArgs) -> tuple[str | None, dict[str, Any]]:
        return (None if self.preview else f"{args.name}-id"), args.inputs

    def call(self, args: MockCallArgs) -> tuple[dict[str, Any], None]:
        raise AssertionError(f"{args.token}: a run of the stack asks no cloud")


class StrictMonitor(MockMonitor):
    """`requests`: URN → what was registered. `inputs`: the same in plain values. `problems`: what is refused."""

    def __init__(self, mocks: Mocks) -> None:
        super().__init__(mocks)
        self.requests: dict[str, Any] = {}
        self.inputs: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []
        self._lock = Lock()

    def RegisterResource(self, request: Any) -> Any:
        urn = self.make_urn(request.parent, request.type, request.name)
        if request.type == "pulumi:pulumi:Stack":
            return super().RegisterResource(request)
        with self._lock:  # resources are registered by several threads
            if urn in self.requests:
                self.problems.append(f"{urn} twice")
            self.requests[urn] = request
        if not request.type.startswith("pulumi:providers:") and not request.provider:
            self.problems.append(f"{urn} without a provider of its own")
        answer = super().RegisterResource(request)
        inputs = self.resources[urn].state
        self.problems += [f"{urn}: {problem}" for problem in policy.problems(request.type, inputs)]
        self.inputs[request.name] = inputs
        return answer

    def options(self, name: str) -> Any:
        (request,) = (request for request in self.requests.values() if request.name == name)
        return request


def watched(program: Callable[[], object], *, preview: bool = False) -> StrictMonitor:
    """What the program hands to the engine. Raises AssertionError for what is refused."""
    monitor = StrictMonitor(Answers(preview))
    pulumi.runtime.set_mocks(Answers(preview), project="remotegpu", stack="test", preview=preview, monitor=monitor)

    @pulumi.runtime.test
    def run() -> None:
        program()

    run()
    assert not monitor.problems, monitor.problems
    return monitor


def declared(rows: Sequence[dict[str, Any]], settings: Settings, *, preview: bool = False) -> StrictMonitor:
    """What the adapters hand to the engine for this export."""
    wanted = desired.resources(parsed(*rows), settings).resources
    monitor = watched(lambda: clouds.declare(wanted), preview=preview)
    assert not policy.stack_problems(
        ((request.type, request.name, monitor.inputs[request.name]) for request in monitor.requests.values()),
        settings,
    )
    return monitor
