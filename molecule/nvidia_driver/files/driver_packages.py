#!/usr/bin/python3
"""The packages of one release of a driver, as a JSON list for apt_repository: `driver_packages KIND RELEASE [LESS…]`.

KIND is debian (names of Debian's non-free), nvidia (names of NVIDIA's repository, with a fabric manager) or subnet
(what that needs beside it on a board with NVLink 5, of a release of its own); what starts with LESS is left out. The
names, the versions and what depends on what are real; inside is nothing but a number where `modinfo` of the fake root
looks for it, units that sleep, and one that does at boot what the kernel does: load the module that is on the disk.
"""

from __future__ import annotations

import json
import sys
from typing import Any

ROOT = "/opt/fake-root"
ON_DISK = "/usr/share/fake-nvidia/on-disk"
LOAD = f"""[Unit]
Description=Loads the fake driver, as the kernel does at boot
Before=nvidia-persistenced.service nvidia-fabricmanager.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/mkdir -p {ROOT}/proc/driver/nvidia
ExecStart=/bin/sh -c 'printf "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  %%s  Release Build\\n" \
    "$(cat {ON_DISK})" >{ROOT}/proc/driver/nvidia/version'

[Install]
WantedBy=multi-user.target
"""
SLEEPER = """[Unit]
Description={0}

[Service]
ExecStart=/bin/sleep infinity

[Install]
WantedBy=multi-user.target
"""


def packages(kind: str, release: str) -> list[dict[str, Any]]:
    version = f"{release}-1"
    if kind == "subnet":
        return [{"name": "nvlsm", "version": version}]
    module = {
        "files": {ON_DISK: f"{release}\n", "/lib/systemd/system/fake-nvidia-load.service": LOAD},
        "postinst": "systemctl daemon-reload; systemctl enable --quiet fake-nvidia-load.service",
    }
    daemon = {
        name: {
            "files": {f"/lib/systemd/system/{name}.service": SLEEPER.format(name)},
            "postinst": "systemctl daemon-reload",
        }
        for name in ("nvidia-persistenced", "nvidia-fabricmanager")
    }
    if kind == "debian":
        libraries = [
            "firmware-nvidia-gsp",
            "libcuda1",
            "libnvcuvid1",
            "libnvidia-cfg1",
            "libnvidia-encode1",
            "libnvidia-ml1",
        ]
        libraries += ["libnvidia-ptxjitcompiler1"]
        return [
            {
                "name": "nvidia-open-kernel-dkms",
                "version": version,
                **depends("firmware-nvidia-gsp", version),
                **module,
            },
            {"name": "nvidia-smi", "version": version, **depends("libnvidia-ml1", version)},
            *({"name": name, "version": version} for name in libraries),
            {"name": "nvidia-persistenced", "version": version, **daemon["nvidia-persistenced"]},
        ]
    branch = release.split(".")[0]
    fabric_manager = "nvidia-fabricmanager" + (f"-{branch}" if int(branch) < 580 else "")
    return [
        {"name": f"nvidia-open-{branch}", "version": version, **depends("nvidia-kernel-open-dkms", version)},
        {"name": "nvidia-kernel-open-dkms", "version": version, **depends("libnvidia-compute", version), **module},
        {"name": "libnvidia-compute", "version": version},
        {"name": "nvidia-persistenced", "version": version, **daemon["nvidia-persistenced"]},
        {"name": fabric_manager, "version": version, **daemon["nvidia-fabricmanager"]},
    ]


def depends(name: str, version: str) -> dict[str, Any]:
    return {"fields": {"Depends": f"{name} (= {version})"}}


def main(kind: str, release: str, *without: str) -> None:
    others = [
        {"name": name, "version": "999-1"} for name in ("linux-headers-amd64", "linux-headers-arm64", "nvidia-modprobe")
    ]
    wanted = [package for package in packages(kind, release) if not package["name"].startswith(without or ("-",))]
    sys.stdout.write(json.dumps(wanted + others))


if __name__ == "__main__":
    main(*sys.argv[1:])
