"""A screen on this machine for a real client: what it shows is read pixel by pixel, what is typed goes to the client.

An X server without a monitor (Xvfb) that keeps its picture in a file; the clients are the distribution's own. Here is
nothing of hosts and nothing of what a picture should be.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.waiting import until

WIDTH, HEIGHT = 1024, 768
EVERY = 7  # of pixels in each direction: 16,000 of them say what half the screen is filled with
TOLERANCE = 12  # of 255: both protocols may send pictures with losses

Colour = tuple[int, int, int]


@dataclass
class Screen:
    """A running X server, its picture in a file, and the clients that show on it."""

    display: str
    picture: Path
    log: Path
    _clients: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, argv: Sequence[str], *, environ: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """A client that draws here. It ends with the screen at the latest."""
        with self.log.open("ab") as log:
            client = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**self._environ(), **(environ or {})}
            )
        self._clients.append(client)
        return client

    def share_of(self, colour: Colour) -> float:
        """How much of the picture is of this colour, 0 to 1."""
        pixels = list(self._pixels())
        return sum(all(abs(a - b) <= TOLERANCE for a, b in zip(p, colour, strict=True)) for p in pixels) / len(pixels)

    def type_line(self, text: str) -> None:
        """Click into the middle, as a person would, then type."""
        for argv in (
            ("mousemove", str(WIDTH // 2), str(HEIGHT // 2), "click", "1"),
            ("type", "--delay", "60", text),
            ("key", "Return"),
        ):
            subprocess.run(["xdotool", *argv], env=self._environ(), check=True, timeout=60)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        for client in self._clients:
            client.kill()
            client.wait()

    def _environ(self) -> dict[str, str]:
        return {**os.environ, "DISPLAY": self.display, "LC_ALL": "C.UTF-8", "HOME": str(self.log.parent)}

    def _pixels(self) -> Iterator[Colour]:
        """Samples of the picture: XWD, whose header is big-endian, and whose pixels here are 32 bits, B G R X."""
        data = self.picture.read_bytes()
        header = struct.unpack(">25I", data[:100])
        assert (header[1], header[4], header[5], header[11]) == (7, WIDTH, HEIGHT, 32)
        start, line = header[0] + 12 * header[19], header[12]
        for y in range(0, HEIGHT, EVERY):
            for at in range(start + y * line, start + y * line + 4 * WIDTH, 4 * EVERY):
                yield data[at + 2], data[at + 1], data[at]


@contextmanager
def screen(folder: Path) -> Iterator[Screen]:
    """A new one, empty; everything that draws on it ends with it."""
    folder.mkdir(parents=True, exist_ok=True)
    heard, told = os.pipe()
    size = f"{WIDTH}x{HEIGHT}x24"
    with (folder / "server.log").open("wb") as log:
        argv = ["Xvfb", "-displayfd", str(told), "-screen", "0", size, "-fbdir", str(folder), "-nolisten", "tcp"]
        server = subprocess.Popen(argv, pass_fds=(told,), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    os.close(told)
    try:
        with os.fdopen(heard) as ready:
            number = ready.readline().strip()
        assert number, (folder / "server.log").read_text()
        shown = Screen(f":{number}", folder / "Xvfb_screen0", folder / "clients.log")
        until(shown.picture.exists, "the picture of the screen")
        try:
            yield shown
        finally:
            shown.close()
    finally:
        server.terminate()
        server.wait()
