"""The site, once a module; the faults of a round, once when the first of them is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.hosts import Host
from tests.hosts.docker import boot, unique
from tests.hosts.fixtures import operator_key
from tests.hosts.owner import keeps_hosts
from tests.site.disk import LOOP_DEVICES
from tests.site.faults import FAULTS, Fault
from tests.site.site import CONTROL_SUITE, GPU_SUITES, STAND_INS, Site, exporter_archive

__all__ = ["operator_key"]


@pytest.fixture(scope="module")
def site(
    operator_key: Path,
    tmp_path_factory: pytest.TempPathFactory,
    record_testsuite_property: Callable[[str, object], None],
) -> Iterator[Site]:
    """A control plane and two GPU hosts, from nothing, with a customer at work on one of them."""
    folder = tmp_path_factory.mktemp("site")
    archive, which = exporter_archive(folder)
    for sentence in (which, *STAND_INS):
        record_testsuite_property("stand-in", sentence)
    with ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        wanted = [("control", CONTROL_SUITE), *(("cards", suite) for suite in GPU_SUITES)]
        booting = [pool.submit(booted, kind, suite, operator_key) for kind, suite in wanted]
        hosts = []
        for one in booting:
            hosts.append(one.result())
            stack.callback(gone, hosts[-1])
        made = Site(folder, hosts[0], dict(zip(GPU_SUITES, hosts[1:], strict=True)), operator_key)
        made.describe(archive)
        made.converge()
        made.open()
        yield made


def booted(kind: str, suite: str, operator_key: Path) -> Host:
    gpus, options = (2, LOOP_DEVICES) if kind == "cards" else (0, ())
    host = boot(unique(f"site-{kind}-{suite}"), suite, kind=kind, gpus=gpus, options=options)
    host.authorize("ops", operator_key.with_suffix(".pub").read_text())
    return host


def gone(host: Host) -> None:
    if not keeps_hosts():
        host.destroy()


class Rounds:
    """Tells the chosen faults of a round beside each other; each outcome is kept for its own test."""

    def __init__(self, site: Site, chosen: list[Fault]) -> None:
        self._site, self._chosen = site, chosen
        self._outcomes: dict[str, Future[None]] = {}

    def outcome(self, fault: Fault) -> None:
        """Return when this fault's story has ended well; raises what went wrong in it."""
        if fault.name not in self._outcomes:
            together = [each for each in self._chosen if each.round == fault.round]
            self._site.sign_in_again()
            self._site.task_at_work()
            with ThreadPoolExecutor(len(together)) as pool:
                for each in together:
                    self._outcomes[each.name] = pool.submit(each.tell, self._site)
        self._outcomes[fault.name].result()


@pytest.fixture(scope="module")
def rounds(site: Site, request: pytest.FixtureRequest) -> Rounds:
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    asked = [spec.params["fault"] for spec in specs if spec is not None and "fault" in spec.params]
    return Rounds(site, [fault for fault in FAULTS if fault in asked])
