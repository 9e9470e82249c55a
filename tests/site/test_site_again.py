"""A site that stands is played again: what is right stays untouched, and a dry run has nothing to tell."""

from __future__ import annotations

import pytest

from tests.site.site import Site

pytestmark = [pytest.mark.hosts, pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.mark.parametrize("options", [(), ("--check", "--diff")], ids=["a-second-run", "a-dry-run"])
def test_a_site_that_stands_is_left_as_it_is(site: Site, options: tuple[str, ...]) -> None:
    """Under a customer at work, with the hosts onboarded by the portal since the first run."""
    task = site.task_at_work()
    site.converge(*options)
    names = {site.control.name, *(host.name for host in site.hosts.values())}
    told = {name: (counts["changed"], counts["failed"], counts["unreachable"]) for name, counts in site.recap.items()}
    assert told == dict.fromkeys(names, (0, 0, 0)), changes(site.output)
    assert site.worker.client.get(f"customer/tasks/{task}")["state"] == "running"


def changes(output: str) -> str:
    """The tasks that changed something, and where."""
    lines, task = [], ""
    for line in output.splitlines():
        task = line if line.startswith(("TASK ", "RUNNING HANDLER ")) else task
        if line.startswith(("changed: ", "fatal: ", "failed: ")):
            lines.append(f"{task} {line[:200]}")
    return "\n".join(lines)
