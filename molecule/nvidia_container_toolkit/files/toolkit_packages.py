#!/usr/bin/python3
"""The four packages of a release of the container toolkit, as a JSON list for apt_repository.

What the role and Docker deal with is there: the runtime, which hands on to runc and marks the container's environment;
the refresh units of 1.18 and later, which watch a folder that stands for the driver's and look for its module as the
real ones do; nvidia-ctk for `cdi generate`.
"""

from __future__ import annotations

import json
import sys

RUNTIME = """#!/bin/sh
# As the real one does with the bundle's config.json: change it, then let runc do the work.
for word; do
    [ "$previous" = --bundle ] && bundle=$word
    previous=$word
done
if [ -n "$bundle" ]; then
    python3 - "$bundle/config.json" <<'END'
import json, sys
with open(sys.argv[1]) as file:
    config = json.load(file)
config["process"]["env"].append("THROUGH=nvidia-container-runtime")
with open(sys.argv[1], "w") as file:
    json.dump(config, file)
END
fi
exec runc "$@"
"""
CTK = """#!/bin/sh
# nvidia-ctk cdi generate --output=FILE
[ -e /opt/fake-root/proc/driver/nvidia/version ] || exit 1
mkdir -p /var/run/cdi
cat /opt/fake-root/proc/driver/nvidia/version >/var/run/cdi/nvidia.yaml
"""
REFRESH_SERVICE = """[Unit]
Description=Refresh NVIDIA CDI specification file
ConditionPathExists=/opt/fake-root/proc/driver/nvidia/version

[Service]
Type=oneshot
ExecCondition=/usr/bin/grep -qE '/(nvidia|nvidia-current)\\\\.ko' /lib/modules/%v/modules.dep
ExecStart=/usr/bin/nvidia-ctk cdi generate --output=/var/run/cdi/nvidia.yaml

[Install]
WantedBy=multi-user.target
"""
REFRESH_PATH = """[Unit]
Description=Trigger CDI refresh on NVIDIA driver install / uninstall events

[Path]
PathChanged=/opt/fake-root/proc/driver/nvidia

[Install]
WantedBy=multi-user.target
"""


def main(release: str) -> None:
    packages = [
        {"name": "nvidia-container-toolkit", "fields": {"Depends": f"nvidia-container-toolkit-base (= {release})"}},
        {
            "name": "nvidia-container-toolkit-base",
            "programs": {"/usr/bin/nvidia-container-runtime": RUNTIME, "/usr/bin/nvidia-ctk": CTK},
            "files": {
                "/lib/systemd/system/nvidia-cdi-refresh.service": REFRESH_SERVICE,
                "/lib/systemd/system/nvidia-cdi-refresh.path": REFRESH_PATH,
            },
            "postinst": "systemctl daemon-reload",
        },
        {"name": "libnvidia-container-tools", "fields": {"Depends": f"libnvidia-container1 (= {release})"}},
        {"name": "libnvidia-container1"},
    ]
    sys.stdout.write(json.dumps([{"version": release, **package} for package in packages]))


if __name__ == "__main__":
    main(*sys.argv[1:])
