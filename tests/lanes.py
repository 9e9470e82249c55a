"""Run the tests in lanes, print the minutes of each, and fail when an area is over its budget.

`python -m tests.lanes test | slow | all [LANE…]`: `slow` is what `test` leaves out, `all` is both; lanes that are named
run alone, without a budget. `fast` is that lane as it goes, `may` refuses where these cannot run. What a lane needs is
set up here and ended here: packages (as root), one Docker engine, host images. A lane that cannot run is an error,
never a skip.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Semaphore

from tests.hosts import owner

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "molecule" / "image"
BUDGET_MIN = {"foundation": 14.0, "portal": 6.0, "desktop": 4.0, "hosts": 9.0, "network": 2.0}
# What two cores have to do at once before they are held to those minutes, which are written for a machine that needs
# REFERENCE_S for it. A slower one has as many times the minutes, and says so; one that is too slow for that fails.
WORK = """
import json
rows = [{"name": f"row {n}", "at": n / 7, "tags": [n, n + 1, None]} for n in range(2000)]
for _ in range(240):
    rows = sorted(json.loads(json.dumps(rows)), key=lambda row: (row["name"][::-1], row["at"]))
    seen = {}
    for row in rows:
        seen.setdefault(row["name"][-2:], []).append(row["at"] * 2)
"""
REFERENCE_S = 1.2  # where test-fast took 87 s; machines of two cores have been half as fast
MOST_SLOWNESS = 2.0
MARKS = {"fast": "not slow", "test": "not slow", "slow": "slow", "all": ""}

# Debian's package → a program that it brings; what is on the PATH already is not installed again. `a|b`: either.
PACKAGES = {
    "docker.io": "dockerd",
    "mmdebstrap": "mmdebstrap",
    "iptables": "iptables",
    "nftables": "nft",
    "conntrack": "conntrack",
    "openssh-client": "ssh",
    "gcc": "gcc",
    "libc6-dev": "/usr/include/stdio.h",
    "postgresql": "pg_ctlcluster",
    "redis-server": "redis-server",
    "chromium": "chromium",
    "prometheus": "promtool",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "util-linux": "nsenter",
    "sshpass": "sshpass",
    "nmap": "nmap",
    "iputils-ping": "ping",
    "e2fsprogs": "chattr",
    "freerdp2-x11|freerdp3-x11": "xfreerdp|xfreerdp3",  # by release
    "tigervnc-viewer": "xtigervncviewer",
    "xvfb": "Xvfb",
    "xdotool": "xdotool",
    "fonts-noto-cjk": "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
}


@dataclass(frozen=True)
class Lane:
    """A set of tests that need the same things. `marks` is pytest's -m expression."""

    name: str
    paths: tuple[str, ...]
    marks: str
    jobs: int = 1
    hosts: bool = False
    sdks: bool = False  # of all clouds: 600 MB that nothing else needs
    site: bool = False  # its hosts start from images that are built after those of the others
    dist: str = "worksteal"
    slow: bool | None = None  # whether all of its tests are slow (True), or none (False)
    slow_first: bool = False  # with what is slow of it, it is the longest of all


@dataclass
class Result:
    lane: Lane
    minutes: float
    code: int
    counts: dict[str, int] = field(default_factory=dict)
    stand_ins: list[str] = field(default_factory=list)  # what was not the real thing, and what was in its place


PLAIN = "not hosts and not browser and not postgresql and not gpu and not engine"
# Its tests wait for children and deadlines a third of their time, so three share two cores.
FAST = Lane("fast", ("tests/house", "tests/unit", "tests/api"), PLAIN, jobs=3)
# The longest first; the site's mostly waits for alerts. More than three beside each other take longer: all of them want
# the same two cores.
LANES = (
    FAST,
    Lane("services", ("tests/integration", "tests/roles"), PLAIN),
    Lane("site", ("tests/site",), "hosts", hosts=True, site=True),
    Lane("rental", ("tests/e2e/test_rental.py",), "hosts and not postgresql", hosts=True),
    Lane("rental-postgresql", ("tests/e2e/test_rental.py",), "hosts and postgresql", hosts=True),
    Lane("operations", ("tests/e2e/test_operations.py", "tests/e2e/test_demo.py"), "hosts", hosts=True, slow=True),
    Lane("fresh", ("tests/e2e/test_fresh_machine.py",), "hosts", hosts=True),
    Lane("gateway", ("tests/gateway",), "hosts", hosts=True, slow=True),
    Lane("desktop", ("tests/desktop",), "hosts", hosts=True),
    Lane("agent", ("tests/integration",), "hosts", hosts=True),
    Lane("roles", ("tests/roles",), "hosts", jobs=2, hosts=True, slow_first=True),
    Lane("postgresql", ("tests/unit", "tests/api", "tests/integration"), "postgresql and not hosts", jobs=2),
    Lane("browser", ("tests/browser",), "browser", slow=False),
    Lane("network", ("tests/network",), PLAIN, jobs=2, sdks=True, dist="loadfile", slow=False),
)
# Only where there is a card to be read; elsewhere the closing lines say that it did not run.
CARDS = Lane("gpu", ("tests/gpu",), "gpu", slow=False)
# Only where Pulumi's engine is: no package brings it. Told of as the one for cards is.
ENGINE = Lane("network-engine", ("tests/network",), "engine", sdks=True, slow=False)
BESIDE_EACH_OTHER = 3


def main(argv: list[str]) -> int:
    what, *names = argv or ["test"]
    if what == "fast":
        began = time.monotonic()
        with TemporaryDirectory() as scratch:
            result = run(FAST, MARKS["fast"], Path(scratch), shown=True)
        return report([result], time.monotonic() - began)
    if what not in (*MARKS, "may"):
        print(f"usage: python -m tests.lanes {' | '.join(MARKS)} | may [LANE…]", file=sys.stderr)
        return 2
    lanes = lanes_of_this_machine("all" if what == "may" else what)
    if unknown := set(names) - {lane.name for lane in lanes}:
        known = ", ".join(lane.name for lane in lanes)
        print(f"{', '.join(sorted(unknown))}: no lane of `{what}` on this machine, which are {known}", file=sys.stderr)
        return 2
    refuse_without_hosts()
    refuse_without_packages()
    if what == "may":
        return 0
    install_packages()
    before = how_slow() if what == "test" and not names else None
    with docker_engine(), TemporaryDirectory() as scratch:
        began = time.monotonic()
        results = run_all([lane for lane in lanes if not names or lane.name in names], MARKS[what], Path(scratch))
        took_s = time.monotonic() - began
    slowness = max(1.0, (before + how_slow()) / 2) if before is not None else None
    return report(results, took_s, slowness=slowness, without_cards=why_without_cards())


def how_slow() -> float:
    """How many times as long as the machine of the budget this one takes for the same work, at this moment."""
    took = []
    for _ in range(3):
        began = time.monotonic()
        at_once = [subprocess.Popen([sys.executable, "-c", WORK]) for _ in range(2)]
        for each in at_once:
            each.wait()
        took.append(time.monotonic() - began)
    return statistics.median(took) / REFERENCE_S


def run_all(lanes: list[Lane], also: str, scratch: Path) -> list[Result]:
    """These lanes, in this order; the images are built meanwhile."""
    with ThreadPoolExecutor(BESIDE_EACH_OTHER + 3) as pool:
        images = pool.submit(build_images)
        images_of_site = pool.submit(build_images, "site", after=images) if any(lane.site for lane in lanes) else images
        sdks = pool.submit(install_sdks) if any(lane.sdks for lane in lanes) else images
        places = Semaphore(BESIDE_EACH_OTHER)
        waiting = []
        for lane in lanes:
            places.acquire()
            if lane.hosts:
                images.result()
            ready = sdks if lane.sdks else images_of_site if lane.site else images
            running = pool.submit(run, lane, also, scratch, ready=ready)
            running.add_done_callback(lambda _done: places.release())
            waiting.append(running)
        return [running.result() for running in waiting]


def lanes_of_this_machine(what: str) -> list[Lane]:
    lanes = (*LANES, *(() if why_without_cards() else (CARDS,)), *(() if why_without_engine() else (ENGINE,)))
    left_out = {"test": True, "slow": False}.get(what)
    chosen = [lane for lane in lanes if lane.slow is None or lane.slow is not left_out]
    return chosen if what == "test" else sorted(chosen, key=lambda lane: not lane.slow_first)


def install_sdks() -> None:
    """Raises CalledProcessError; what went wrong is on stderr."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*pip, "-r", "requirements-network.txt"], cwd=ROOT, check=True)


def build_images(*which: str, after: Future[None] | None = None) -> None:
    """Raises CalledProcessError; what went wrong is on stderr."""
    if after is not None:
        after.result()
    subprocess.run([sys.executable, "-m", "tests.images", *which], cwd=ROOT, check=True)


def refuse_without_hosts() -> None:
    if os.geteuid() == 0:
        return
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        return
    sys.exit("make test needs root or Docker, for real hosts. Without either: make test-fast (unit, API, SQLite).")


def refuse_without_packages() -> None:
    """Where nobody may install them; said by `may`, before minutes of set-up."""
    if os.geteuid() != 0 and (missing := missing_packages()):
        sys.exit(f"make test needs these packages: sudo apt-get install {' '.join(map(first_known, missing))}")


def missing_packages() -> list[str]:
    """As PACKAGES names them."""
    return [names for names, programs in PACKAGES.items() if not any(map(is_there, programs.split("|")))]


def install_packages() -> None:
    missing = missing_packages()
    if not missing:
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=quiet)
    subprocess.run(
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *map(first_known, missing)],
        check=True,
        env=quiet,
        stdout=subprocess.DEVNULL,
    )


def first_known(names: str) -> str:
    """Of the packages of a name like `a|b` the first that apt knows; the last, so that apt says what is wrong."""
    *others, last = names.split("|")
    return next(filter(is_known, others), last)


def is_known(package: str) -> bool:
    apt = shutil.which("apt-cache")
    return apt is not None and subprocess.run([apt, "show", package], capture_output=True).returncode == 0


def is_there(program: str) -> bool:
    """Also where root alone looks: a user of Debian has no sbin on the PATH."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
    return Path(program).exists() if program.startswith("/") else shutil.which(program, path=path) is not None


@contextmanager
def docker_engine() -> Iterator[None]:
    """A Docker engine for as long as the lanes run; it ends with them if nobody else on this machine needs it."""
    owner.begin_run()
    whose = str(owner.user())
    subprocess.run([IMAGES / "dockerd", "start", whose], check=True)
    try:
        yield
    finally:
        subprocess.run([IMAGES / "dockerd", "stop", whose], check=True)


def run(lane: Lane, also: str, scratch: Path, *, shown: bool = False, ready: Future[None] | None = None) -> Result:
    """Run one lane; its output is printed in one piece when it has ended, or as it comes if `shown`."""
    if (lane.hosts or lane.sdks) and ready is not None:
        ready.result()
    marks = f"({lane.marks}) and {also}" if also else lane.marks
    outcome, output = scratch / f"{lane.name}.xml", scratch / f"{lane.name}.txt"
    argv = [sys.executable, "-m", "pytest", "-q", "-m", marks, f"--junit-xml={outcome}", "--durations=5", *lane.paths]
    if lane.jobs > 1:
        argv += ["-n", str(lane.jobs), "--dist", lane.dist]
    began = time.monotonic()
    with output.open("wb") as file:
        code = subprocess.run(argv, cwd=ROOT, stdout=None if shown else file, stderr=subprocess.STDOUT).returncode
    print(f"── {lane.name} " + "─" * (70 - len(lane.name)) + "\n" + output.read_text(errors="replace"), flush=True)
    return Result(lane, (time.monotonic() - began) / 60, code, *told_by(outcome))


def told_by(outcome: Path) -> tuple[dict[str, int], list[str]]:
    """What pytest counted, and what its tests recorded as a stand-in for the real thing."""
    if not outcome.exists():
        return {}, []
    suite = ElementTree.parse(outcome).getroot().find("testsuite")  # noqa: S314 - our own pytest wrote it
    if suite is None:
        return {}, []
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    found = suite.iterfind(".//property[@name='stand-in']")  # of the whole lane, and of single tests
    return counts, list(dict.fromkeys(entry.get("value", "") for entry in found))


def why_without_cards() -> str | None:
    """Why no real card can be read here, as a sentence; None where one can."""
    if not Path("/dev/nvidia0").exists():
        return "this machine has no NVIDIA card (/dev/nvidia0)"
    return None if shutil.which("nvidia-smi") else "there is no nvidia-smi to compare its card with"


def why_without_engine() -> str | None:
    """Why pulumi/ cannot run in the real engine here, as a sentence; None where it can."""
    return None if shutil.which("pulumi") else "`pulumi` is not on the PATH"


def report(
    results: list[Result], took_s: float, *, slowness: float | None = None, without_cards: str | None = None
) -> int:
    """The minutes of each lane, and the closing line. Lanes run beside each other: the clock is held to the budget.

    Without `slowness` there is none.
    """
    took = took_s / 60
    if any(result.stand_ins for result in results):
        print("── stand-ins for what cannot be had here " + "─" * 32)
        print(*(sentence for result in results for sentence in result.stand_ins), sep="\n")
    print("── minutes " + "─" * 62)
    for result in results:
        verdict = "ok" if result.code == 0 else f"failed ({result.code})"
        print(f"{result.lane.name:<18}{result.minutes:6.1f}  {result.counts.get('tests', 0):5} tests  {verdict}")
    if without_cards:
        print(f"{CARDS.name:<18}     –  did not run: {without_cards}")
    if len(results) > 1 and (why := why_without_engine()):
        print(f"{ENGINE.name:<18}     –  did not run: {why}")
    written = sum(BUDGET_MIN.values())
    allowed = written * min(slowness or 1.0, MOST_SLOWNESS)
    print(f"{'in all':<18}{took:6.1f}  of {allowed:.0f} for {', '.join(BUDGET_MIN)}")
    if slowness is not None and slowness > 1:
        print(f"This machine takes {slowness:.1f} times as long as the one that the {written:.0f} minutes are for.")
    over = slowness is not None and took > allowed
    if over:
        print(f"Over the budget by {took - allowed:.1f} minutes: see the slowest tests of each lane above.")
    total = {name: sum(r.counts.get(name, 0) for r in results) for name in ("tests", "failures", "errors", "skipped")}
    broken = sum(result.code != 0 and not failures_of(result) for result in results)
    failed = total["failures"] + total["errors"] + broken + over
    passed = total["tests"] - total["failures"] - total["errors"] - total["skipped"]
    print(f"{passed} passed, {failed} failed, {total['skipped']} skipped", flush=True)
    return 1 if failed else 0


def failures_of(result: Result) -> int:
    return result.counts.get("failures", 0) + result.counts.get("errors", 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
