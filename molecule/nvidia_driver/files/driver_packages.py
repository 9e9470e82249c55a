#!/usr/bin/python3
"""The packages of one release of a driver, as a JSON list for apt_repository: `driver_packages KIND RELEASE [LESS…]`.

KIND is debian (names of Debian's non-free), nvidia (names of NVIDIA's repository, with a fabric manager) or subnet
(what that needs beside it on a board with NVLink 5, of a release of its own); what starts with LESS is left out. The
names, the versions and what depends on what are real, and so are the names of the modules' files, which are made where
DKMS would build them; inside is nothing else but units that sleep, and one that does at boot what the kernel does: load
the module that is on the disk.
"""

from __future__ import annotations

import json
import sys
from typing import Any

ROOT = "/opt/fake-root"
LOAD = """[Unit]
Description=Loads the fake driver, as the kernel does at boot
Before=nvidia-persistenced.service nvidia-fabricmanager.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/mkdir -p {0}/proc/driver/nvidia
ExecStart=/bin/sh -c 'printf "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  %%s  Release Build\\n" \
    "$(modinfo -b {0} -F version {1})" >{0}/proc/driver/nvidia/version'

[Install]
WantedBy=multi-user.target
"""
# Debian's, which come to this place by its alternatives.
SETTINGS = """install nvidia modprobe -i nvidia-current-open $CMDLINE_OPTS
install nvidia-uvm modprobe nvidia ; modprobe -i nvidia-current-open-uvm $CMDLINE_OPTS
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
    file = "nvidia-current-open" if kind == "debian" else "nvidia"
    module = {
        "files": {"/lib/systemd/system/fake-nvidia-load.service": LOAD.format(ROOT, file)},
        "postinst": f"/usr/local/sbin/kernel_module {ROOT} updates/dkms/{file}.ko name=nvidia version={release}\n"
        "systemctl daemon-reload; systemctl enable --quiet fake-nvidia-load.service",
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
                **depends("nvidia-open-kernel-support", version),
                **module,
            },
            {
                "name": "nvidia-open-kernel-support",
                "version": version,
                **depends("firmware-nvidia-gsp", version),
                "files": {f"{ROOT}/etc/modprobe.d/nvidia.conf": SETTINGS},
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
