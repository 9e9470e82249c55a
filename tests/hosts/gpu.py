"""What the fake GPUs of a host do: a scenario as a value, and the host's file that holds it.

    host.gpu.show(Scenario.two_h100())            # boot() does this, with UUIDs of the host's own
    host.gpu.show(host.gpu.scenario.lost(1))      # the running agent sees it at its next look
    host.gpu.unplug()                             # no driver library, no nvidia-smi

Values and keys are explained in molecule/image/gpu/nvml.c, which reads the file together with nvidia_smi.py.
"""

from __future__ import annotations

import configparser
import io
import os
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.hosts.docker import Host

EXAMPLE = Path(__file__).parents[2] / "molecule" / "image" / "gpu" / "two-h100.ini"
SCENARIO = "/etc/fake-gpu/scenario.ini"
LIBRARIES = "/usr/local/share/fake-gpu"
XID = 8  # NVML's type of a critical XID event


@dataclass(frozen=True)
class Scenario:
    """All that the fake driver knows, as sections of text. Every change answers with a new scenario."""

    sections: Mapping[str, Mapping[str, str]]

    @classmethod
    def h100(cls, count: int, *, seed: str | None = None) -> Scenario:
        """Idle H100s with UUIDs that no other scenario has, or that follow from the seed."""
        example = cls.parse(EXAMPLE.read_text())
        unique = seed or uuid.uuid4().hex
        gpus = {f"gpu{index}": {**example.sections["gpu0"], **_identity(index, unique)} for index in range(count)}
        return cls({"system": example.sections["system"], **gpus})

    @classmethod
    def two_h100(cls, *, seed: str | None = None) -> Scenario:
        return cls.h100(2, seed=seed)

    @classmethod
    def parse(cls, text: str) -> Scenario:
        parser = _parser()
        parser.read_string(text)
        return cls({name: dict(parser.items(name)) for name in parser.sections()})

    def render(self) -> str:
        parser = _parser()
        parser.read_dict(self.sections)
        text = io.StringIO()
        parser.write(text)
        return text.getvalue()

    def encode(self) -> bytes:
        """As bytes for a file; a lone byte of a name, which need not be UTF-8, is a surrogate in the text."""
        return self.render().encode(errors="surrogateescape")

    def write(self, path: Path) -> None:
        """Put it in place by rename: a reader sees the old scenario or this one."""
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(self.encode())
        os.replace(file.name, path)  # noqa: PTH105 - os.replace is what the sentence above promises

    # -- what is there ------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        return sum(name.startswith("gpu") for name in self.sections)

    @property
    def uuids(self) -> list[str]:
        return [self.sections[f"gpu{index}"]["uuid"] for index in range(self.count)]

    # -- what happens to it -------------------------------------------------------------------------------------------

    def having(self, section: str, **values: str) -> Scenario:
        """With these keys set; any value of nvml.c's language: `!GPU_IS_LOST`, `delay:2.5 31`, `hang`."""
        return replace(self, sections={**self.sections, section: {**self.sections.get(section, {}), **values}})

    def lacking(self, section: str, *keys: str) -> Scenario:
        """Without these keys: NOT_SUPPORTED."""
        rest = {key: value for key, value in self.sections[section].items() if key not in keys}
        return replace(self, sections={**self.sections, section: rest})

    def lost(self, gpu: int) -> Scenario:
        """Fallen off the bus: still counted, and every question about it fails. The others answer."""
        return self.failing(gpu, "GPU_IS_LOST")

    def failing(self, gpu: int, error: str) -> Scenario:
        """Every question about this GPU fails with an NVML error, named without its prefix."""
        return self.having(f"gpu{gpu}", state=f"!{error}")

    def recovered(self, gpu: int) -> Scenario:
        return self.lacking(f"gpu{gpu}", "state")

    def hang(self, gpu: int = 0) -> Scenario:
        """A hung driver: whoever asks this GPU, by library or nvidia-smi, never hears again and heeds no SIGTERM."""
        return self.having(f"gpu{gpu}", state="hang")

    def mismatch(self) -> Scenario:
        """New library, old kernel module: after an unattended upgrade, before the reboot."""
        return self.having("system", init="!LIB_RM_VERSION_MISMATCH")

    def without_driver(self) -> Scenario:
        return self.having("system", init="!DRIVER_NOT_LOADED")

    def using(self, gpu: int, processes: Mapping[int, int | None]) -> Scenario:
        """Compute processes by pid with their bytes, None where the driver does not know; memory_used follows."""
        listed = " ".join(f"{pid}:{'?' if used is None else used}" for pid, used in processes.items())
        total = sum(used or 0 for used in processes.values())
        return self.having(f"gpu{gpu}", compute_processes=listed, memory_used=str(total))

    def xid(self, gpu: int, number: int) -> Scenario:
        """One more XID event, delivered once to everybody who waits for them."""
        before = int(self.sections.get("events", {}).get("seq", "0"))
        return self.having("events", seq=str(before + 1), last=f"{gpu}:{XID}:{number}")


class FakeGpus:
    """The fake driver of one host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def scenario(self) -> Scenario:
        return Scenario.parse(self._host.read(SCENARIO))

    def show(self, scenario: Scenario) -> None:
        """From the next call on, library and nvidia-smi answer this; `/dev/nvidia*` follows."""
        self._host.put(SCENARIO, scenario.encode())
        self._host.run(["/usr/local/sbin/fake-gpu-init"])

    def plug(self, *, driver: str = "current") -> None:
        """Install the fake driver's user space: `current`, `old-driver`, which lacks the newer functions, or
        `early-535`, which lists processes in wider entries.

        A new file in the old one's place, as dpkg does it: a program that has loaded the library keeps what it has.
        """
        library = f"$(cat {LIBRARIES}/folder)/libnvidia-ml.so.1"
        self._host.run(f'install -m 0644 {LIBRARIES}/{driver}/libnvidia-ml.so.1 "{library}.dpkg-new"')
        self._host.run(f'mv "{library}.dpkg-new" "{library}"')
        self._host.run(f"install -m 0755 {LIBRARIES}/nvidia-smi /usr/local/bin/nvidia-smi")

    def unplug(self) -> None:
        """A machine without GPUs: no library, no nvidia-smi, no device nodes."""
        self.show(Scenario.h100(0))
        self._host.run(f'rm -f "$(cat {LIBRARIES}/folder)/libnvidia-ml.so.1" /usr/local/bin/nvidia-smi')


def _identity(index: int, seed: str) -> dict[str, str]:
    """What no two GPUs share."""
    return {
        "uuid": f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, f'{seed}/{index}')}",
        "serial": f"165{int(uuid.uuid5(uuid.NAMESPACE_OID, f'{seed}/{index}/serial')) % 10**10:010}",
        "minor_number": str(index),
        "pci_bus_id": f"00000000:{0x18 + 0x11 * index:02X}:00.0",
    }


def _parser() -> configparser.ConfigParser:
    return configparser.ConfigParser(interpolation=None, delimiters="=")
