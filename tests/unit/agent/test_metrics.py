"""What an agent says of its host's disks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from remotegpu_agent import metrics


def test_a_mounted_image_is_no_disk_that_runs_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"/": "ext4", "data": "xfs", "snap": "squashfs", "disc": "iso9660"}
    for name in kinds:
        (tmp_path / name.strip("/")).mkdir(exist_ok=True)
    mounted = [
        SimpleNamespace(device=f"/dev/{kind}", mountpoint=name if name == "/" else str(tmp_path / name), fstype=kind)
        for name, kind in kinds.items()
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_how: mounted)
    told = metrics.sample()["disks"]
    assert [disk["mount"] for disk in told] == ["/", str(tmp_path / "data")]
