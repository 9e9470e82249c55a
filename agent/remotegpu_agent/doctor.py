"""What may be wrong with this host and how to mend it, in plain sentences. Looks, and changes nothing."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from remotegpu_agent import forwards, nft
from remotegpu_agent.clock import Clock
from remotegpu_agent.config import CONFIG_FILE, Config, ConfigError, load
from remotegpu_agent.files import find_json
from remotegpu_agent.leases import GUARD_LINK, Leases, end_survives_reboot
from remotegpu_agent.observe import docker
from remotegpu_agent.observe.tools import ToolFailed, run
from remotegpu_agent.openings import Openings, find_firewall
from remotegpu_agent.protocol import now
from remotegpu_agent.state import Held

LEAST_FREE_BYTES = 2 * 1024**3
LEAST_FREE_INODES = 10_000
MOST_CLOCK_OFFSET_S = 5.0


@dataclass(frozen=True)
class Finding:
    subject: str
    is_fine: bool | None  # None: could not be checked
    text: str


def examine(path: Path = CONFIG_FILE) -> Iterator[Finding]:
    """One finding a subject, each with its way out."""
    try:
        config = load(path)
    except ConfigError as error:
        yield Finding(
            "configuration", False, f"{error}. The gpu_agent role writes it: run playbooks/gpu_hosts.yml for this host"
        )
        return
    if not config.portal_url:
        yield Finding(
            "configuration",
            False,
            f"{path} is missing or its portal_url empty: set gpu_agent_portal_url and run playbooks/gpu_hosts.yml",
        )
        return
    yield Finding("configuration", True, str(path))
    yield _authority(config)
    yield _portal(config)
    yield _enrolment(config)
    yield from _service(config)
    yield _gateway() if forwards.is_gateway() else _nvml(config)
    yield from _disk(config)
    yield _docker()
    yield _sshd(config)
    yield _firewall()


def _authority(config: Config) -> Finding:
    if config.ca_file is None:
        return Finding("portal's authority", True, "none given: the host's own list of authorities is used")
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(config.ca_file)
    except (OSError, ssl.SSLError) as error:
        return Finding(
            "portal's authority", False, f"{config.ca_file}: {error}. Run playbooks/gpu_hosts.yml for this host"
        )
    return Finding("portal's authority", True, str(config.ca_file))


def _portal(config: Config) -> Finding:
    from remotegpu_agent.portal import Endpoint, Portal, PortalError, Refused

    portal = Portal(Endpoint.of(config))
    try:
        portal.call("/api/v1/agent/sync", {}, credential="doctor")
    except Refused:
        return Finding("portal", True, f"{config.portal_url} answers, with a certificate of its authority")
    except PortalError as error:
        return Finding(
            "portal", False, f"{error}. Check PUBLIC_URL of the portal, name resolution and firewalls on the way"
        )
    finally:
        portal.close()
    return Finding("portal", False, f"{config.portal_url} accepts any credential: this is not the portal")


def _enrolment(config: Config) -> Finding:
    if config.credential_file.exists():
        return Finding("enrolment", True, f"machine {find_json(config.credential_file)['machine_id']}")
    if config.enroll_token_file.exists():
        text = "a token lies there but is not used up: is remotegpu-agent.service running? Is the token still valid?"
    else:
        text = "neither credential nor token: let the portal provision this machine"
    return Finding("enrolment", False, text)


def _service(config: Config) -> Iterator[Finding]:
    try:
        state = run(["systemctl", "is-active", "remotegpu-agent.service"], ok=(0, 3, 4)).strip()
    except ToolFailed as error:
        yield Finding("service", None, str(error))
        return
    status = find_json(config.run_dir / "status.json") or {}
    text = f"remotegpu-agent.service is {state}, last contact {status.get('last_contact_at') or 'never'}"
    yield Finding(
        "service", state == "active", text if state == "active" else f"{text}; see 'journalctl -u remotegpu-agent'"
    )
    offset_s = status.get("clock_offset_s")
    if offset_s is None:
        yield Finding("clock", None, "unknown before the first contact")
    else:
        text = f"{abs(offset_s):.1f} s {'behind' if offset_s > 0 else 'ahead of'} the portal"
        is_fine = abs(offset_s) <= MOST_CLOCK_OFFSET_S
        yield Finding(
            "clock", is_fine, text if is_fine else f"{text}: leases end by this clock; repair time synchronisation"
        )
    text = (
        "leases are guarded across a reboot"
        if end_survives_reboot()
        else f"{GUARD_LINK} is missing: run 'systemctl enable remotegpu-lease-guard'"
    )
    yield Finding("lease guard", end_survives_reboot(), text)


def _gateway() -> Finding:
    try:
        if not nft.is_loaded(forwards.TABLE):
            return Finding("gateway", False, "its table is missing: systemctl reload remotegpu-gateway")
        seen = forwards.look(at=now())
    except ToolFailed as error:
        return Finding("gateway", None, str(error))
    halves = seen.led.keys() ^ seen.passed.keys()
    text = f"{len(seen.led)} ports are forwarded"
    return Finding("gateway", not halves, f"{text}; {len(halves)} of them lead nowhere" if halves else text)


def _nvml(config: Config) -> Finding:
    from remotegpu_agent.gpu import GpuProbe

    probe = GpuProbe([config.program, "nvml-child"])
    probe.start()
    probe.ask(wait_s=10)
    report = probe.report()
    probe.stop()
    if report["state"] == "ok":
        lost = [gpu["uuid"] for gpu in report["gpus"] if gpu["state"] != "ok"]
        text = f"{len(report['gpus'])} GPUs, driver {report['driver_version']}"
        return Finding("GPUs", not lost, f"{text}; not well: {', '.join(lost)}" if lost else text)
    way_out = {
        "driver_not_loaded": "load or install the driver (nvidia_driver role)",
        "mismatch": "the driver was upgraded under us: reboot; running programs may be fine",
        "no_library": "no driver is installed; fine on a host without GPUs",
        "stale": "the driver hangs: reboot the host",
    }.get(report["state"], "see the kernel's log for NVRM")
    return Finding(
        "GPUs", None if report["state"] == "no_library" else False, f"{report['state']}: {report['message']}; {way_out}"
    )


def _disk(config: Config) -> Iterator[Finding]:
    folders = [path for path in (config.state_dir, config.tasks_dir, config.keys_dir) if path.exists()]
    free = min(shutil.disk_usage(path).free for path in folders)
    text = f"{free / 1024**3:.1f} GiB free for state and logs"
    yield Finding(
        "disk", free >= LEAST_FREE_BYTES, text if free >= LEAST_FREE_BYTES else f"{text}: make room below /var/lib"
    )
    yield names_left(min(_inodes(path) for path in folders))


def _inodes(path: Path) -> int:
    """How many more files there can be; as many as one likes where the file system has no such limit."""
    found = os.statvfs(path)
    return found.f_ffree if found.f_files else sys.maxsize


def names_left(count: int) -> Finding:
    """ "No space left on device" has two reasons, and with the disk half empty nobody thinks of this one."""
    if count >= LEAST_FREE_INODES:
        return Finding("inodes", True, "there is room for more files")
    way_out = "find who left so many with 'du --inodes -xS / | sort -n | tail'"
    return Finding("inodes", False, f"only {count} more files can be made, whatever 'df' says is free: {way_out}")


def _docker() -> Finding:
    if not docker.is_installed():
        return Finding("Docker", None, "not installed")
    try:
        docker.call("GET", "/_ping", timeout_s=5)
    except (docker.DockerFailed, ValueError) as error:
        # /_ping answers with plain text, which is an answer all the same.
        if isinstance(error, docker.DockerFailed):
            return Finding("Docker", False, f"{error}; see 'journalctl -u docker'")
    return Finding("Docker", True, "answers")


def _firewall() -> Finding:
    try:
        firewall = find_firewall()
        if firewall is None:
            why = "not RemoteGPU's: nothing can be opened for a lease. Run playbooks/gpu_hosts.yml for this host"
            return Finding("firewall", None, why)
        if not nft.is_loaded(firewall.table):
            return Finding("firewall", False, f"the table inet {firewall.table} is gone: nft -f {firewall.rules}")
    except ToolFailed as error:
        return Finding("firewall", False, str(error))
    return Finding("firewall", True, f"{firewall.backend}; openings are in the table inet {firewall.table}")


def _sshd(config: Config) -> Finding:
    from remotegpu_agent.journal import Journal

    openings = Openings(Held, Clock(config.state_dir))
    entries = Leases(config, Journal(config.state_dir / "journal.jsonl"), lambda *_: None, openings).entries()
    login = next((entry.login for entry in entries if os.path.isdir(config.home_dir / entry.login)), None)
    if login is None:
        return Finding("sshd", None, "no lease's login here to ask for")
    try:
        shown = run(["sshd", "-T", "-C", f"user={login},host=localhost,addr=127.0.0.1"])
    except ToolFailed as error:
        return Finding("sshd", False, str(error))
    found = re.search(r"^authorizedkeysfile (.*)$", shown, re.MULTILINE)
    wanted = str(config.keys_dir / "%u")
    if found and found[1].strip() == wanted:
        return Finding("sshd", True, f"reads {login}'s keys from {wanted} only")
    return Finding(
        "sshd",
        False,
        f"reads {login}'s keys from {found[1] if found else '?'}: the ssh_hardening role's drop-in is not in effect",
    )
