"""The agent's one file, as a host unpacks it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.agents import PROGRAM


def test_it_is_compiled_once_where_it_is_unpacked(tmp_path: Path) -> None:
    """NVIDIA's binding is large: the process that compiled it would keep 15 MB more for as long as it runs."""
    argv = ["/usr/bin/python3", "-I", str(PROGRAM), "--version"]
    subprocess.run(argv, env={**os.environ, "SHIV_ROOT": str(tmp_path)}, check=True, capture_output=True, timeout=120)
    compiled = {file.name.partition(".")[0] for file in tmp_path.glob("*/site-packages/**/*.pyc")}
    sources = {file.stem for file in tmp_path.glob("*/site-packages/**/*.py")}
    assert "pynvml" in sources
    assert compiled == sources
