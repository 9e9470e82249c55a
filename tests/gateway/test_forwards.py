"""Customer, gateway, GPU host: who gets in by a forwarded port, from when until when, on IPv4 and IPv6.

Before: closed. During: open from the allowed source, under the customer's own address. After its end: closed, for those
who were in as well, with the portal down, and with the agent dead. What the rules do is in tests/roles.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent.protocol import now, parse_time
from tests.gateway.conftest import GREETING, SSH, Behind
from tests.gateway.place import ANOTHER, CUSTOMER, EVERYBODY, FAMILIES, PUBLIC, THEIRS, Place, staying
from tests.integration.agent.portal_double import in_seconds
from tests.support.scanning import Scanner
from tests.support.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.slow, pytest.mark.timeout(900)]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=["IPv4", "IPv6"])
on_trixie = pytest.mark.parametrize("converged", ["trixie"], indirect=True)
DOOR = {"tcp/22": "syn-ack"}  # of the gateway itself


@each_family
def test_before_the_gateways_own_door_is_all_that_answers(behind: Behind, family: int) -> None:
    customer = Scanner.on(behind.place.customer)
    assert customer.hear(PUBLIC[family], again=DOOR) == DOOR
    assert customer.hear(behind.place.inside(behind.place.gpu)[family], tcp="1-10000") == {}, "and nobody passes it"


@each_family
def test_a_customer_signs_in_by_the_forwarded_port_from_the_allowed_source_alone(behind: Behind, family: int) -> None:
    lease = behind.gpu.open_lease()
    forward = behind.forward(family, SSH, THEIRS[family])
    port = f"tcp/{forward['public_port']}"

    said = behind.sign_in(family, forward, lease, "echo $SSH_CONNECTION")
    assert said.split()[0] == CUSTOMER[family], "the host sees who it is"
    assert "timed out" in behind.sign_in(family, forward, lease, "true", source=ANOTHER[family])

    both = {**DOOR, port: "syn-ack"}
    assert heard(behind, family, source=CUSTOMER[family], again=both) == both
    assert heard(behind, family, source=ANOTHER[family], again=DOOR) == DOOR
    at_its_own_address = behind.place.inside(behind.place.gpu)[family]
    assert Scanner.on(behind.place.customer).hear(at_its_own_address, tcp="1-10000") == {}


def test_at_its_end_everybody_is_out_though_the_portal_is_down(behind: Behind) -> None:
    """Who says nothing is forgotten as well: else the kernel would keep the connection for days, and know it again when
    the port leads there once more.
    """
    forwards = {family: behind.forward(family, GREETING, THEIRS[family]) for family in FAMILIES}
    with ExitStack() as stack:
        inside = [stack.enter_context(staying(behind.place, *each)) for each in ports(forwards)]
        for each in ports(forwards):
            stack.enter_context(silent(behind.place, *each))
        assert all(flows(behind, each) for each in forwards.values()), "the gateway knows who is in"
        behind.end_soon(*forwards.values())
        behind.gateway.portal.stop()
        assert [each.communicate(timeout=60)[0].strip() for each in inside] == ["cut", "cut"]
        for family, forward in forwards.items():
            assert behind.place.ask(family, forward["public_port"]) == "silence"
            until(
                lambda f=forward: not flows(behind, f),
                "the gateway to forget who was in",
                also=behind.gateway.agent_log,
            )
    behind.gateway.portal.start()
    for forward in forwards.values():
        behind.wait_for(forward, "closed")


def test_at_its_end_everybody_is_out_though_the_agent_is_dead_as_well(behind: Behind) -> None:
    forwards = {family: behind.forward(family, GREETING, EVERYBODY[family]) for family in FAMILIES}
    with ExitStack() as stack:
        inside = [stack.enter_context(staying(behind.place, *each)) for each in ports(forwards)]
        behind.end_soon(*forwards.values(), seconds=10)
        behind.gateway.portal.stop()
        behind.gateway.host.run("systemctl kill --signal=KILL remotegpu-agent; systemctl stop remotegpu-agent")
        assert [each.communicate(timeout=60)[0].strip() for each in inside] == ["cut", "cut"]
    for each in ports(forwards):
        assert behind.place.ask(*each) == "silence"


@each_family
def test_closed_early_it_is_closed_at_once_and_the_next_lease_gets_the_port(behind: Behind, family: int) -> None:
    forward = behind.forward(family, GREETING, EVERYBODY[family])
    port = forward["public_port"]
    with staying(behind.place, family, port) as inside:
        behind.want()
        assert inside.communicate(timeout=30)[0].strip() == "cut"
    until(lambda: behind.seen(forward) is None, "the gateway to tell of it no more")
    assert behind.place.ask(family, port) == "silence"
    lease = behind.gpu.open_lease()
    again = behind.forward(family, SSH, THEIRS[family], port=port)
    assert behind.sign_in(family, again, lease, "id -un") == lease.login


@each_family
def test_an_end_that_is_moved_is_taken_over_and_nobody_is_cut(behind: Behind, family: int) -> None:
    forward = behind.forward(family, GREETING, EVERYBODY[family])
    with staying(behind.place, family, forward["public_port"], seconds=40) as inside:
        behind.end_soon(forward, seconds=20)
        behind.want(forward)
        assert inside.communicate(timeout=90)[0].strip() == f"you are {CUSTOMER[family]}"


@on_trixie
@each_family
def test_who_has_half_closed_is_answered_whole_and_who_is_idle_stays_while_the_agent_changes_things(
    behind: Behind, archive: int, family: int
) -> None:
    """Not a byte is lost, and nobody waits for one that does not come: whatever else is forwarded meanwhile, and though
    both have another end again and again.
    """
    to_archive, to_greeter = (behind.forward(family, to, THEIRS[family]) for to in (archive, GREETING))
    with (
        speaking(behind.place, "ask", family, to_archive["public_port"]) as asks,
        speaking(behind.place, "wait", family, to_greeter["public_port"]) as waits,
    ):
        assert (heard_line(asks), heard_line(waits)) == ("half", "in")
        for seconds in (300, 900, 400):
            behind.end_soon(to_archive, to_greeter, seconds=seconds)
            behind.forward(family, SSH, EVERYBODY[family])
        assert asks.communicate("\n", timeout=60)[0] == "whole\n"
        assert waits.communicate("\n", timeout=60)[0] == "still there?\n"


def test_after_a_flush_it_is_made_again_with_the_portal_down(behind: Behind) -> None:
    """By the distribution's own unit, which takes everything away."""
    forwards = [behind.forward(family, GREETING, THEIRS[family], seconds=60) for family in FAMILIES]
    behind.gateway.portal.stop()
    behind.gateway.host.run("systemctl start nftables && systemctl stop nftables")
    for family, forward in zip(FAMILIES, forwards, strict=True):
        port = forward["public_port"]
        until(
            lambda f=family, p=port: behind.place.ask(f, p) == f"you are {CUSTOMER[f]}",
            "it to lead again",
            timeout_s=90,
            also=behind.gateway.agent_log,
        )
        assert behind.place.ask(family, port, source=ANOTHER[family]) == "silence"
    left = behind.gateway.host.run("nft list map inet remotegpu_gateway forwards").stdout
    assert "expires" in left, "and it still ends"


def test_after_a_reboot_it_is_made_again_for_the_rest_of_its_time_with_the_portal_down(behind: Behind) -> None:
    over = behind.forward(4, GREETING, EVERYBODY[4])
    on = {family: behind.forward(family, GREETING, EVERYBODY[family]) for family in FAMILIES}
    behind.want({**over, "ends_at": in_seconds(10)}, *({**each, "ends_at": in_seconds(180)} for each in on.values()))
    behind.gateway.applied(behind.gateway.portal.generation, timeout_s=60)
    behind.gateway.portal.stop()
    behind.gateway.host.power_off()
    until(lambda: now() > parse_time(behind.gateway.portal.forwards[0]["ends_at"]), "its end to have come")
    behind.gateway.host.power_on()
    behind.place.plug()
    for family, port in ports(on):
        until(
            lambda f=family, p=port: behind.place.ask(f, p) == f"you are {CUSTOMER[f]}",
            "it to lead again",
            timeout_s=90,
            also=behind.gateway.agent_log,
        )
    assert behind.place.ask(4, over["public_port"]) == "silence"
    for family, port in ports(on):
        until(lambda f=family, p=port: behind.place.ask(f, p) == "silence", "the rest to be over", timeout_s=210)


def test_what_cannot_be_forwarded_is_told_and_keeps_nobody_out(behind: Behind) -> None:
    good = behind.forward(4, GREETING, EVERYBODY[4])
    astray = {**good, "id": 901, "public_port": 20900, "target_address": "192.0.2.1"}
    same_port = {**good, "id": 902}
    behind.want(good, astray, same_port)
    assert behind.wait_for(astray, "failed")["error"] == "192.0.2.1 is in none of this gateway's networks"
    assert "is forward" in behind.wait_for(same_port, "failed")["error"]
    assert behind.place.ask(4, good["public_port"]) == f"you are {CUSTOMER[4]}"
    assert behind.place.ask(4, 20900) == "silence"


def test_a_host_without_gpus_keeps_no_process_for_them(behind: Behind) -> None:
    assert behind.gateway.host.run("pgrep -f '[n]vml-child'", check=False).stdout == ""
    until(lambda: behind.gateway.portal.gpu, "a whole report")
    assert behind.gateway.portal.gpu is not None
    assert behind.gateway.portal.gpu["gpus"] == []
    said = behind.gateway.host.run("remotegpu-agent doctor", check=False).stdout
    assert "FAIL" not in said
    assert "0 ports are forwarded" in said


def heard(behind: Behind, family: int, *, source: str, again: dict[str, str]) -> dict[str, str]:
    """What of the pool, and of the gateway's own, answers somebody who comes from there."""
    ports, options = "20000-20999,22", f"-S {source} -e eth1"
    return Scanner.on(behind.place.customer).hear(PUBLIC[family], tcp=ports, again=again, options=options)


def ports(forwards: dict[int, dict[str, Any]]) -> list[tuple[int, int]]:
    """Family and public port of each."""
    return [(family, forward["public_port"]) for family, forward in forwards.items()]


@pytest.fixture
def archive(behind: Behind) -> Iterator[int]:
    """The port of the GPU host at which somebody answers a request that has ended."""
    port, program = 8889, Path(__file__).with_name("archive.py").read_text()
    for host in (behind.place.gpu, behind.place.customer):
        host.put("/usr/local/bin/archive", program, mode="0755")
    behind.place.gpu.run(f"systemd-run --unit=archive /usr/bin/python3 /usr/local/bin/archive serve {port}")
    openings = behind.gpu.open_ports(None, [f"tcp/{port}"], THEIRS.values())
    yield port
    behind.gpu.portal.change(openings=[])
    behind.gpu.wait_for_openings(openings, None)
    behind.place.gpu.run("systemctl stop archive")


@contextmanager
def speaking(place: Place, how: str, family: int, port: int) -> Iterator[subprocess.Popen[str]]:
    """A customer with archive.py, whose lines are read and written here."""
    program = ["python3", "/usr/local/bin/archive", how, PUBLIC[family], str(port), CUSTOMER[family]]
    argv = ["docker", "exec", "-i", place.customer.id, *program]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as customer:
        try:
            yield customer
        finally:
            customer.kill()


def heard_line(customer: subprocess.Popen[str]) -> str:
    assert customer.stdout is not None
    return customer.stdout.readline().strip()


@contextmanager
def silent(place: Place, family: int, port: int) -> Iterator[None]:
    """A customer who is in and says no more."""
    ends = f"('{PUBLIC[family]}', {port}), source_address=('{CUSTOMER[family]}', 0)"
    program = f"s = socket.create_connection({ends}); s.recv(9); print(1, flush=True); time.sleep(900)"
    argv = ["docker", "exec", place.customer.id, "python3", "-c", f"import socket, time; {program}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as inside:
        try:
            assert inside.stdout is not None
            assert inside.stdout.readline() == "1\n", "did not get in"
            yield
        finally:
            inside.kill()


def flows(behind: Behind, forward: dict[str, Any]) -> str:
    """The connections that the gateway knows of by this port."""
    family = "ipv6" if ":" in forward["source"] else "ipv4"
    return behind.gateway.host.run(
        f"conntrack -L -f {family} -p tcp --orig-port-dst {forward['public_port']} --state ESTABLISHED 2>&-"
    ).stdout
