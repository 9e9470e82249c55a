"""The role guacd, as far as it can be told without a host: the walls around the container, and what is refused."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.support.rendering import DISTRIBUTIONS, ROLES, evaluate, render

IMAGE = "guacamole/guacd:1.5.5"


def options(suite: str, **given: object) -> list[str]:
    unit = render("guacd", "remotegpu-guacd.service.j2", suite, guacd_image=IMAGE, **given).replace("\\\n", " ")
    started = re.search(r"(?m)^ExecStart=(.+)$", unit)
    assert started is not None
    return shlex.split(started[1])


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_nothing_of_the_machine_is_in_its_reach(suite: str) -> None:
    given = options(suite)
    assert given[:2] == ["/usr/bin/docker", "run"]
    assert given[-1] == IMAGE
    assert {"--read-only", "no-new-privileges", "ALL"} <= set(given)
    assert not {"--privileged", "--volume", "-v", "--network", "--cap-add", "--device"} & set(given)
    assert given[given.index("--pull") + 1] == "never", "it starts what was brought, and asks no registry at a boot"


def test_it_is_published_on_the_one_address() -> None:
    given = options("noble", guacd_listen_address="fd00::5", guacd_port=14822)
    assert given[given.index("--publish") + 1] == "[fd00::5]:14822:4822"


@pytest.mark.parametrize(
    ("image", "taken"),
    [
        (IMAGE, True),
        ("registry.example.org:5000/guacd:1.5.5", True),
        (f"guacamole/guacd@sha256:{'0' * 64}", True),
        ("guacamole/guacd", False),
        ("guacamole/guacd:latest", False),
        ("guacamole/guacd:1.5.5 --privileged", False),
    ],
)
def test_an_image_has_a_name_that_stays(image: str, taken: bool) -> None:
    text = (ROLES / "guacd" / "tasks" / "assert.yml").read_text()
    rules = [line.strip("- ") for line in text.splitlines() if line.strip().startswith("- guacd_image is")]
    assert len(rules) == 2
    assert all(evaluate("{{ " + rule + " }}", "guacd", "trixie", guacd_image=image) for rule in rules) is taken
