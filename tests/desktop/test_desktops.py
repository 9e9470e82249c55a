"""A lease's desktop, as real clients of another machine see it: xtigervncviewer and xfreerdp under an X server here.

They sign in through an SSH forward with the lease's key, type into a terminal, and the picture shows what was typed.
Nobody else gets in, and when the lease ends nothing is left, whatever was open at that moment.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.desktop.conftest import DesktopHost, converge
from tests.desktop.screen import HEIGHT, WIDTH, Screen, screen
from tests.support.cleaned_host import LOGIN, findings, make_key
from tests.support.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]

GREEN, BLUE, RED = (20, 180, 60), (30, 60, 200), (200, 40, 40)
SIZE = f"{WIDTH}x{HEIGHT}"
LEFTOVERS = (
    "ps -eo user:20,comm | grep -E '^lease|sesexec|chansrv|Xorg|Xtigervnc|Xvnc|xfce'",
    "ls -A /tmp/.X11-unix",
    "ls -d /tmp/.X[0-9]*-lock /run/xrdp/sockdir/*[0-9]* /run/user/2* 2>/dev/null",
    "loginctl list-sessions --no-legend | grep lease",
    "ss -Hltn 'sport >= :5900 and sport <= :6100'",
)


@pytest.fixture
def leased(desk: DesktopHost) -> Iterator[DesktopHost]:
    """The host with a lease that was just opened; whatever the test leaves is cleaned away."""
    desk.let_in()
    yield desk
    desk.cleaned.clean()


@pytest.fixture
def stranger(leased: DesktopHost) -> Iterator[str]:
    """The login of another tenant's lease on the same host, as the agent has made it."""
    name = "lease16"
    options = "--uid 20016 --groups remotegpu-leases --create-home --shell /bin/bash"
    leased.host.run(f"useradd {options} --password '*' {name}")
    yield name
    leased.host.run(
        f"rm -f /etc/remotegpu/authorized_keys/{name}; loginctl terminate-user {name}; pkill -KILL -u {name};"
        f" find /tmp -depth -user {name} -delete; userdel --force --remove {name} 2>/dev/null; ! id {name} 2>/dev/null"
    )


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Screen]:
    with screen(tmp_path / "screen") as made:
        yield made


def see_by_vnc(shown: Screen, port: int, password: str) -> Any:
    return shown.start(
        ["xtigervncviewer", "-Shared", "-FullScreen", "-RemoteResize=0", "-AutoSelect=0", "-QualityLevel=9",
         "-ReconnectOnError=0", "-AlertOnFatalError=0", f"127.0.0.1::{port}"],
        environ={"VNC_PASSWORD": password},
    )  # fmt: skip


def see_by_rdp(shown: Screen, port: int, login: str, password: str, fingerprint: str) -> Any:
    """With the certificate pinned: no other machine can stand in between."""
    return shown.start(
        [shutil.which("xfreerdp") or "xfreerdp3", f"/v:127.0.0.1:{port}", f"/u:{login}", f"/p:{password}",
         f"/size:{SIZE}", "/bpp:32", f"/cert:fingerprint:sha256:{fingerprint}", "/log-level:INFO"],
    )  # fmt: skip


def test_by_vnc_a_tenant_types_into_a_terminal_and_sees_it(leased: DesktopHost, shown: Screen) -> None:
    given = leased.desktop("vnc", "--size", SIZE)
    with leased.forward(given["port"]) as port:
        see_by_vnc(shown, port, given["password"])
        leased.paint(shown, GREEN)
        assert_gone_with_the_lease(leased)


def test_by_rdp_a_tenant_types_into_a_terminal_and_sees_it(leased: DesktopHost, shown: Screen) -> None:
    given = leased.desktop("rdp")
    with leased.forward(given["port"]) as port:
        see_by_rdp(shown, port, given["login"], given["password"], given["certificate_sha256"])
        leased.paint(shown, BLUE)
        assert "Xorg" in leased.running()
        assert_gone_with_the_lease(leased)


def assert_gone_with_the_lease(desk: DesktopHost) -> None:
    """The lease ends under an open desktop: everything is found, removed and verified by other means."""
    cleaned = desk.cleaned.clean()
    assert findings(cleaned["steps"]) == []
    assert findings(desk.cleaned.verify()["checks"]) == []
    assert desk.host.run("\n".join(LEFTOVERS), check=False).stdout == ""


def test_the_wrong_password_and_other_tenants_get_no_vnc_desktop(
    leased: DesktopHost, stranger: str, tmp_path: Path
) -> None:
    given = leased.desktop("vnc", "--size", SIZE)
    with leased.forward(given["port"]) as port, screen(tmp_path / "wrong") as shown:
        client = see_by_vnc(shown, port, "-" + given["password"][1:])
        until(lambda: client.poll() is not None, "a refusal", timeout_s=60, also=shown.said)
        assert "uthentication fail" in shown.said()
    # Another tenant's key opens that tenant's login alone; through it one comes to the desktop's door, and no further.
    strange = make_key(tmp_path / "strange")
    leased.host.put(f"/etc/remotegpu/authorized_keys/{stranger}", strange.with_suffix(".pub").read_text())
    refused = leased.host.ssh(LOGIN, strange, "true")
    assert (refused.returncode, "Permission denied" in refused.stderr) == (255, True)
    strangers = leased.desktop("vnc", "--size", SIZE, user=stranger, key=strange)
    assert strangers["port"] != given["port"]
    with leased.forward(given["port"], user=stranger, key=strange) as port, screen(tmp_path / "strange-vnc") as shown:
        client = see_by_vnc(shown, port, strangers["password"])
        until(lambda: client.poll() is not None, "a refusal", timeout_s=60, also=shown.said)
        assert "uthentication fail" in shown.said()
    assert leased.answers_outside(given["port"]) == []


def test_the_wrong_password_and_other_tenants_get_no_rdp_desktop(
    leased: DesktopHost, stranger: str, tmp_path: Path
) -> None:
    given = leased.desktop("rdp")
    strangers = json.loads(
        leased.host.run(["runuser", "-u", stranger, "--", "remotegpu-desktop", "--json", "rdp"]).stdout
    )
    leased.host.run(["chage", "-E", "0", stranger])  # as the agent does when a lease ends
    leased.host.set_password("installer", "of-a-login")
    for login, password, what in (
        (LOGIN, "-" + given["password"][1:], "the wrong password"),
        (LOGIN, strangers["password"], "another tenant's password"),
        (stranger, strangers["password"], "a lease that has ended"),
        ("installer", "of-a-login", "somebody of the site"),
    ):
        before = len(refusals(leased))
        with leased.forward(given["port"]) as port, screen(tmp_path / what) as shown:
            see_by_rdp(shown, port, login, password, given["certificate_sha256"])
            until(_more_than(before, leased), f"xrdp to refuse {what}", timeout_s=90, also=shown.said)
    assert leased.host.run("ps -eo comm | grep -E 'Xorg|Xvnc|Xtigervnc|xfce4' || true").stdout == ""
    assert leased.answers_outside(given["port"]) == []


def _more_than(before: int, desk: DesktopHost) -> Callable[[], bool]:
    return lambda: len(refusals(desk)) > before


def test_a_user_has_one_kind_of_desktop_at_a_time(leased: DesktopHost) -> None:
    leased.desktop("rdp")
    refused = leased.host.ssh(LOGIN, leased.key, "remotegpu-desktop", "vnc")
    assert (refused.returncode, "one desktop at a time" in refused.stderr) == (1, True)
    assert leased.desktop("stop")["kind"] is None
    assert leased.desktop("vnc")["kind"] == "vnc"
    refused = leased.host.ssh(LOGIN, leased.key, "remotegpu-desktop", "rdp")
    assert (refused.returncode, "one desktop at a time" in refused.stderr) == (1, True)


@pytest.mark.slow
def test_where_nvidias_driver_is_xvnc_draws_what_comes_by_rdp(desk: DesktopHost, tmp_path: Path, shown: Screen) -> None:
    sign = "/usr/share/X11/xorg.conf.d/nvidia-drm-outputclass.conf"  # of Debian's and NVIDIA's own packages
    desk.host.put(sign, "# NVIDIA's driver is here\n")
    try:
        converge(desk.host, desk.folder / "operator", tmp_path)
        desk.let_in()
        given = desk.desktop("rdp")
        with desk.forward(given["port"]) as port:
            see_by_rdp(shown, port, given["login"], given["password"], given["certificate_sha256"])
            desk.paint(shown, RED)
            assert "Xorg" not in desk.running()
            assert {"Xvnc", "Xtigervnc"} & set(desk.running())
    finally:
        desk.host.run(["rm", sign])
        desk.cleaned.clean()
        converge(desk.host, desk.folder / "operator", tmp_path)


def refusals(desk: DesktopHost) -> list[str]:
    """What the session manager has refused, by its own words: a password, or an account that has ended."""
    said = desk.host.run("journalctl -u xrdp -u xrdp-sesman -o cat --no-pager").stdout
    return re.findall(r"pam_(?:authenticate|acct_mgmt) failed", said)
