"""Pulumi's own engine, where it is on the PATH, before the provider double: asked as the engine double is.

No cloud is reached, nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.network.cloud import Cloud
from tests.network.engine import PROGRAM, TOKEN

PROVIDERS = ("cloudflare", "aws", "alicloud", "tencentcloud")  # one double plays all: a URN says which type is meant
BASE = {"remotegpu:environment": "production", "remotegpu:clouds": ["cloudflare"]}


class Ran(NamedTuple):
    """Exit status, all that it said, and what of that came on its standard output."""

    code: int
    told: str
    printed: str


class RealEngine:
    """A stack of its own, in a folder of its own; the state is a file there."""

    def __init__(self, folder: Path, port: int, cloud: Cloud) -> None:
        self.folder, self.cloud, self.program = folder, cloud, folder / "pulumi"
        shutil.copytree(
            PROGRAM, self.program, ignore=shutil.ignore_patterns("__pycache__", "Pulumi.*.yaml", "*.json.tmp")
        )
        (folder / "state").mkdir()
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PULUMI_HOME": str(folder / "home"),
            "PULUMI_BACKEND_URL": f"file://{folder / 'state'}",
            "PULUMI_CONFIG_PASSPHRASE": "a passphrase of the test",
            "PULUMI_SKIP_UPDATE_CHECK": "true",
            "PULUMI_SKIP_CONFIRMATIONS": "true",
            "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION": "true",
            "PULUMI_DISABLE_REGISTRY_RESOLVE": "true",
            "PULUMI_DEBUG_PROVIDERS": ",".join(f"{name}:{port}" for name in PROVIDERS),
        }
        self.given: dict[str, Any] = {}
        self.pulumi("stack", "init", "test")
        self.pulumi("config", "set", "--secret", "cloudflare:apiToken", TOKEN)

    def pulumi(self, *argv: str) -> str:
        done = self.run(*argv)
        assert done.code == 0, done.told
        return done.told

    def run(self, *argv: str) -> Ran:
        done = subprocess.run(
            ["pulumi", *argv, "--non-interactive"],
            cwd=self.program,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Ran(done.returncode, done.stdout + done.stderr, done.stdout)

    def up(self, export: Mapping[str, Any], **config: Any) -> Ran:
        """As the double's: the settings are those of this run, on top of what every stack has."""
        self.configure(export, **config)
        return self.run("up", "--yes", "--skip-preview")

    def preview(self, export: Mapping[str, Any], **config: Any) -> Ran:
        self.configure(export, **config)
        return self.run("preview")

    def configure(self, export: Mapping[str, Any], **config: Any) -> None:
        (self.program / "export.json").write_text(json.dumps(export))
        given = {key.replace("__", ":").replace("_", "-"): value for key, value in config.items()}
        for key in self.given.keys() - given.keys() - BASE.keys():
            self.pulumi("config", "rm", key)
        self.given = given
        for key, value in {**BASE, **given}.items():
            self.pulumi("config", "set", key, value if isinstance(value, str) else json.dumps(value))
