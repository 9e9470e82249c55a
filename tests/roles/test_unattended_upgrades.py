"""The policy of unattended_upgrades: what it keeps still, in the words of every distribution's packages."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.rendering import evaluate, render

SUITES = ("bookworm", "trixie", "jammy", "noble")


def never(suite: str = "noble") -> list[str]:
    return list(evaluate("{{ __unattended_upgrades_never }}", "unattended_upgrades", suite))


@pytest.mark.parametrize("suite", SUITES)
def test_nothing_that_a_lease_stands_on_is_upgraded_by_itself(suite: str) -> None:
    guarded = evaluate("{{ __unattended_upgrades_guarded }}", "unattended_upgrades", suite)
    # unattended-upgrades takes them as re.match does: from the start of the name.
    assert [name for name in guarded if not any(re.match(expression, name) for expression in never(suite))] == []


@pytest.mark.parametrize(
    "name", ["openssl", "libc6", "linux-libc-dev", "openssh-server", "libssl3", "rsync", "python3"]
)
def test_security_updates_of_everything_else_come(name: str) -> None:
    assert not any(re.match(expression, name) for expression in never())


def test_apt_reads_the_policy_as_it_is_meant(tmp_path: Path) -> None:
    if shutil.which("apt-config") is None:
        pytest.fail("apt-config is missing: this test needs Debian or Ubuntu")
    text = render(
        "unattended_upgrades",
        "policy.j2",
        "noble",
        ansible_managed="managed",
        unattended_upgrades_never_extra=["site-"],
        unattended_upgrades_origins_extra=["origin=Site,codename=${distro_codename}"],
    )
    file = tmp_path / "52policy"
    file.write_text(text)
    read = subprocess.run(["apt-config", "-c", str(file), "dump"], check=True, capture_output=True, text=True).stdout
    assert 'Unattended-Upgrade::Package-Blacklist:: ".*nvidia";' in read
    assert 'Unattended-Upgrade::Package-Blacklist:: "site-";' in read
    assert 'Unattended-Upgrade::Origins-Pattern:: "origin=Site,codename=${distro_codename}";' in read
    assert 'Unattended-Upgrade::Automatic-Reboot "false";' in read


@pytest.mark.parametrize(
    ("expression", "taken"),
    [(".*nvidia", True), ("lib(cuda|nv)", True), ('x"; }; DPkg::Pre-Invoke {"id', False), ("a\nb", False), ("", False)],
)
def test_an_expression_cannot_leave_its_quotes(expression: str, taken: bool) -> None:
    plain = evaluate("{{ __unattended_upgrades_plain }}", "unattended_upgrades", "noble")
    assert bool(re.match(plain, expression)) is taken


@pytest.mark.parametrize(
    ("unit", "left_alone"),
    [
        ("remotegpu-agent.service", True),
        ("remotegpu-task-5.service", True),
        ("docker.service", True),
        ("containerd.service", True),
        ("xrdp.service", True),
        ("xrdp-sesman.service", True),
        ("nvidia-fabricmanager.service", True),
        ("ssh.service", False),
        ("cron.service", False),
    ],
)
def test_needrestart_leaves_alone_what_a_lease_stands_on(tmp_path: Path, unit: str, left_alone: bool) -> None:
    """As needrestart reads it: Perl, and a unit that some expression matches has the number of that one."""
    file = tmp_path / "remotegpu.conf"
    file.write_text(render("unattended_upgrades", "needrestart.conf.j2", "noble", ansible_managed="managed"))
    ask = (
        "our %nrconf; do $ARGV[0]; die $@ if $@;"
        "print grep { $ARGV[1] =~ /$_/ and not $nrconf{override_rc}{$_} } keys %{$nrconf{override_rc}}"
    )
    asked = subprocess.run(["perl", "-we", ask, str(file), unit], check=True, capture_output=True, text=True)
    assert bool(asked.stdout) is left_alone
    assert asked.stderr == ""


@pytest.mark.parametrize("role", ["desktop_xrdp", "desktop_vnc"])
@pytest.mark.parametrize("suite", SUITES)
def test_nothing_that_a_desktop_runs_by_is_upgraded_by_itself(suite: str, role: str) -> None:
    packages = evaluate("{{ __" + role + "_packages }}", role, suite, desktop_vnc_screen=False)
    moving = [name for name in packages if not any(re.match(expression, name) for expression in never(suite))]
    assert set(moving) <= {"openssl"}, "what has to move: it is everybody's"
