"""The container toolkit's role where no test host runs: repository, packages, and its part of daemon.json."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.rendering import FACTS, evaluate, render

ROLE = "nvidia_container_toolkit"
SUITES = ("bookworm", "trixie", "jammy", "noble")


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(("architecture", "debian"), [("x86_64", "amd64"), ("aarch64", "arm64")])
def test_one_repository_serves_every_distribution(suite: str, architecture: str, debian: str) -> None:
    text = render(
        ROLE,
        "nvidia-container-toolkit.sources.j2",
        suite,
        ansible_managed="managed",
        ansible_facts={**FACTS, "architecture": architecture},
    )
    fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    assert fields == {
        "Types": "deb",
        "URIs": f"https://nvidia.github.io/libnvidia-container/stable/deb/{debian}/",
        "Suites": "/",
        "Signed-By": "/etc/apt/keyrings/nvidia-container-toolkit.asc",
    }


@pytest.mark.parametrize(
    ("module", "is_the_driver"),
    [
        ("updates/dkms/nvidia.ko", True),  # NVIDIA's packages
        ("updates/dkms/nvidia.ko.zst", True),
        ("kernel/nvidia-580-server-open/nvidia.ko", True),  # Ubuntu's signed modules
        ("updates/dkms/nvidia-current.ko", True),  # Debian's, by its DKMS's names
        ("updates/dkms/nvidia-current-open.ko", True),
        ("updates/dkms/nvidia-current-open.ko.xz", True),
        ("updates/dkms/nvidia-tesla-535.ko.xz", True),
        ("updates/dkms/nvidia-tesla.ko", True),
        ("updates/dkms/nvidia-legacy-390xx.ko", True),
        ("kernel/drivers/platform/x86/nvidia-wmi-ec-backlight.ko.xz", False),
        ("kernel/drivers/video/fbdev/nvidia/nvidiafb.ko.xz", False),
        ("updates/dkms/nvidia-fs.ko", False),
    ],
)
def test_containers_are_told_of_a_driver_by_whichever_name_its_module_has(
    tmp_path: Path, module: str, is_the_driver: bool
) -> None:
    text = render(ROLE, "cdi-refresh.conf.j2", "trixie", ansible_managed="managed")
    said = [line.removeprefix("ExecCondition=") for line in text.splitlines() if line.startswith("ExecCondition=")]
    assert said[0] == "", "the toolkit's own is taken away"
    index = tmp_path / "modules.dep"
    index.write_text(f"kernel/fs/fuse/fuse.ko.xz:\n{module}: kernel/fs/fuse/fuse.ko.xz\n")
    asked = shlex.split(said[1].replace("/lib/modules/%v/modules.dep", str(index)))
    assert (subprocess.run(asked, check=False).returncode == 0) is is_the_driver


@pytest.mark.parametrize(
    ("said", "cdi"),
    [
        ("Docker version 20.10.24+dfsg1, build 297e128", False),
        ("Docker version 24.0.7, build 24.0.7-0ubuntu2", False),
        ("Docker version 26.1.5+dfsg1, build a72d7cd", True),
        ("Docker version 29.1.3, build f52814d", True),
        ("", False),
    ],
)
def test_docker_is_told_of_cdi_where_it_knows_it(said: str, cdi: bool) -> None:
    part = evaluate(
        "{{ __nvidia_container_toolkit_daemon_config }}",
        ROLE,
        "trixie",
        __nvidia_container_toolkit_engine={"stdout": said},
    )
    assert part["runtimes"] == {"nvidia": {"path": "nvidia-container-runtime", "args": []}}
    assert part.get("features") == ({"cdi": True} if cdi else None)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("deb https://nvidia.github.io/libnvidia-container/stable/deb/$(ARCH) /", True),
        ("deb [signed-by=/x] https://nvidia.github.io/nvidia-docker/ubuntu18.04/$(ARCH) /", True),
        ("URIs: https://nvidia.github.io/nvidia-container-runtime/stable", True),
        ("#deb https://nvidia.github.io/libnvidia-container/experimental/deb/$(ARCH) /", False),
        ("deb https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/ /", False),
    ],
)
def test_files_of_older_instructions_are_found(line: str, found: bool) -> None:
    pattern = evaluate("{{ __nvidia_container_toolkit_names_repository }}", ROLE, "noble")
    assert bool(re.match(pattern, line)) is found


def test_a_package_of_another_release_is_missing() -> None:
    missing = evaluate(
        "{{ __nvidia_container_toolkit_missing }}",
        ROLE,
        "noble",
        nvidia_container_toolkit_version="1.18.2-1",
        __nvidia_container_toolkit_dpkg={
            "stdout": "hi  nvidia-container-toolkit=1.18.2-1\nhi  nvidia-container-toolkit-base=1.18.1-1\n"
            "ii  libnvidia-container-tools=1.18.2-1\nrc  libnvidia-container1=1.18.2-1"
        },
    )
    assert missing == ["nvidia-container-toolkit-base=1.18.2-1", "libnvidia-container1=1.18.2-1"]
