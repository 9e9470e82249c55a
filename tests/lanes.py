"""Run the tests in lanes, print the minutes of each, and fail when an area is over its budget.

`python -m tests.lanes fast | test | all`. What a lane needs is set up here and ended here: packages (as root), one
Docker engine, host images. A lane that cannot run is an error, never a skip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "molecule" / "image"
BUDGET_MIN = {"foundation": 14.0}
NOT_SLOW = "not slow"

# Debian's package → a program that it brings; what is on the PATH already is not installed again.
PACKAGES = {
    "docker.io": "dockerd",
    "mmdebstrap": "mmdebstrap",
    "iptables": "iptables",
    "openssh-client": "ssh",
    "gcc": "gcc",
    "libc6-dev": "/usr/include/stdio.h",
    "postgresql": "pg_ctlcluster",
    "redis-server": "redis-server",
    "chromium": "chromium",
    "util-linux": "nsenter",
    "sshpass": "sshpass",
    "iputils-ping": "ping",
    "e2fsprogs": "chattr",
    "fonts-noto-cjk": "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
}


@dataclass(frozen=True)
class Lane:
    """A set of tests that need the same things. `marks` is pytest's -m expression."""

    name: str
    paths: tuple[str, ...]
    marks: str
    area: str = "foundation"
    jobs: int = 1
    hosts: bool = False


@dataclass
class Result:
    lane: Lane
    minutes: float
    code: int
    counts: dict[str, int] = field(default_factory=dict)


PLAIN = "not hosts and not browser and not postgresql"
LANES = (
    Lane("fast", ("tests/house", "tests/unit", "tests/api"), PLAIN, jobs=2),
    Lane("postgresql", ("tests",), "postgresql and not hosts and not browser"),
    Lane("services", ("tests/integration",), PLAIN),
    Lane("browser", ("tests/browser",), "browser"),
    Lane("hosts", ("tests/integration",), "hosts", hosts=True),
    Lane("roles", ("tests/roles",), "hosts", hosts=True),
    Lane("rental", ("tests/e2e",), "hosts", hosts=True),
)


def main(argv: list[str]) -> int:
    what = argv[0] if argv else "test"
    if what == "fast":
        return report([run(LANES[0], NOT_SLOW, Path(scratch)) for scratch in [temporary()]])
    if what not in ("test", "all"):
        print("usage: python -m tests.lanes fast | test | all", file=sys.stderr)
        return 2
    refuse_without_hosts()
    install_packages()
    with docker_engine(), TemporaryDirectory() as scratch:
        images = subprocess.Popen([sys.executable, "-m", "tests.images"], cwd=ROOT)
        results = []
        for lane in LANES:
            if lane.hosts and images.wait() != 0:
                print("The host images could not be built; see above.", file=sys.stderr)
                return 1
            results.append(run(lane, NOT_SLOW if what == "test" else "", Path(scratch)))
    return report(results, budget=what == "test")


def temporary() -> str:
    folder = ROOT / ".cache" / "lanes"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def refuse_without_hosts() -> None:
    if os.geteuid() == 0 or subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        return
    sys.exit("make test needs root or Docker, for real hosts. Without either: make test-fast (unit, API, SQLite).")


def install_packages() -> None:
    missing = [name for name, program in PACKAGES.items() if not is_there(program)]
    if not missing:
        return
    if os.geteuid() != 0:
        sys.exit(f"make test needs these packages: apt-get install {' '.join(missing)}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=quiet)
    subprocess.run(
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
        check=True,
        env=quiet,
        stdout=subprocess.DEVNULL,
    )


def is_there(program: str) -> bool:
    return Path(program).exists() if program.startswith("/") else shutil.which(program) is not None


@contextmanager
def docker_engine() -> Iterator[None]:
    """A Docker engine for as long as the lanes run; one that was there before is left alone."""
    started = subprocess.run([IMAGES / "dockerd", "start"], check=True, stdout=subprocess.PIPE, text=True).stdout
    try:
        yield
    finally:
        if started.strip() == "started":
            subprocess.run([IMAGES / "dockerd", "stop"], check=True)


def run(lane: Lane, also: str, scratch: Path) -> Result:
    marks = f"({lane.marks}) and {also}" if also else lane.marks
    outcome = scratch / f"{lane.name}.xml"
    paths = [path for path in lane.paths if (ROOT / path).exists()]
    argv = [sys.executable, "-m", "pytest", "-q", "-m", marks, f"--junit-xml={outcome}", *paths]
    if lane.jobs > 1:
        argv += ["-n", str(lane.jobs), "--dist", "worksteal"]
    print(f"── {lane.name} " + "─" * (70 - len(lane.name)), flush=True)
    began = time.monotonic()
    code = subprocess.run(argv, cwd=ROOT).returncode
    return Result(lane, (time.monotonic() - began) / 60, code, counts_of(outcome))


def counts_of(outcome: Path) -> dict[str, int]:
    if not outcome.exists():
        return {}
    suite = ElementTree.parse(outcome).getroot().find("testsuite")  # noqa: S314 - our own pytest wrote it
    if suite is None:
        return {}
    return {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}


def report(results: list[Result], *, budget: bool = False) -> int:
    print("── minutes " + "─" * 62)
    for result in results:
        verdict = "ok" if result.code == 0 else f"failed ({result.code})"
        print(f"{result.lane.name:<12}{result.minutes:6.1f}  {result.counts.get('tests', 0):5} tests  {verdict}")
    over = [line for line in over_budget(results) if budget]
    for line in over:
        print(line)
    total = {name: sum(r.counts.get(name, 0) for r in results) for name in ("tests", "failures", "errors", "skipped")}
    failed = total["failures"] + total["errors"] + sum(r.code != 0 and not failures_of(r) for r in results) + len(over)
    passed = total["tests"] - total["failures"] - total["errors"] - total["skipped"]
    print(f"{passed} passed, {failed} failed, {total['skipped']} skipped", flush=True)
    return 1 if failed else 0


def failures_of(result: Result) -> int:
    return result.counts.get("failures", 0) + result.counts.get("errors", 0)


def over_budget(results: list[Result]) -> list[str]:
    lines = []
    for area, minutes in BUDGET_MIN.items():
        spent = sum(result.minutes for result in results if result.lane.area == area)
        if spent > minutes:
            lines.append(f"{area}: {spent:.1f} minutes, over its budget of {minutes:.0f}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
