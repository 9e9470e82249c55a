"""The same sentences as in test_engine.py through Pulumi's own engine, where it is on the PATH; and its provider
double.

The provider is a double: no cloud is reached, nothing is downloaded. Without the engine the summary of `make test`
says that the lane did not run; the provider double itself is tried everywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import struct_pb2
from pulumi.runtime.proto import provider_pb2, provider_pb2_grpc

from remotegpu_network import desired
from tests.network.cloud import Cloud
from tests.network.engine import PROGRAM, TOKEN
from tests.network.export import ZONE_ID, name, sealed
from tests.network.provider import attached

ADDRESS = name("m1.address", "gpu-01", "A", "203.0.113.1", machine="m1")


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
            "PULUMI_DEBUG_PROVIDERS": f"cloudflare:{port}",
        }
        self.pulumi("stack", "init", "test")
        self.pulumi("config", "set", "remotegpu:environment", "production")
        self.pulumi("config", "set", "remotegpu:clouds", '["cloudflare"]')
        self.pulumi("config", "set", "--secret", "cloudflare:apiToken", TOKEN)

    def pulumi(self, *argv: str) -> str:
        done = subprocess.run(
            ["pulumi", *argv, "--non-interactive"],
            cwd=self.program,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def up(self, export: dict[str, Any], *argv: str) -> None:
        (self.program / "export.json").write_text(json.dumps(export))
        self.pulumi("up", "--yes", *argv)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[RealEngine]:
    cloud = Cloud()
    with attached(cloud) as port:
        yield RealEngine(tmp_path, port, cloud)


@pytest.mark.engine
def test_a_second_run_plans_nothing(engine: RealEngine) -> None:
    engine.up(sealed(ADDRESS))
    engine.up(sealed(ADDRESS), "--expect-no-changes")
    assert engine.cloud.calls == ["create DnsRecord gpu-01.gpu.example.org A"]


@pytest.mark.engine
def test_renaming_a_machine_deletes_no_record(engine: RealEngine) -> None:
    engine.up(sealed(ADDRESS))
    engine.up(sealed(ADDRESS, machines={"m1": "the big one"}), "--expect-no-changes")
    engine.up(sealed(name("m1.a", "big", "A", "203.0.113.1", machine="m1", previous_keys=["m1.address"])))
    assert not any(call.startswith("delete") for call in engine.cloud.calls)


@pytest.mark.engine
def test_an_a_record_that_becomes_a_cname_is_deleted_first(engine: RealEngine) -> None:
    engine.up(sealed(ADDRESS))
    engine.up(sealed(name("m1.address", "gpu-01", "CNAME", "edge.example.org", machine="m1")))
    assert [call.split()[0] for call in engine.cloud.calls] == ["create", "delete", "create"]


@pytest.mark.engine
def test_secrets_are_in_neither_state_nor_outputs(engine: RealEngine) -> None:
    engine.up(sealed(ADDRESS))
    assert TOKEN not in engine.pulumi("stack", "output", "--json") + engine.pulumi("stack", "export")


def test_the_provider_double_answers_as_an_engine_asks() -> None:
    cloud = Cloud()
    urn = f"urn:pulumi:test::remotegpu::{desired.CLOUDFLARE_RECORD}::m1.address"
    inputs = struct_pb2.Struct()
    inputs.update({"zoneId": ZONE_ID, "name": "a.example.org", "type": "A", "content": "203.0.113.1"})
    cname = struct_pb2.Struct()
    cname.update({"zoneId": ZONE_ID, "name": "a.example.org", "type": "CNAME", "content": "b.example.org"})
    with attached(cloud) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        provider = provider_pb2_grpc.ResourceProviderStub(channel)
        assert provider.Create(provider_pb2.CreateRequest(urn=urn, properties=inputs, preview=True)).id == ""
        made = provider.Create(provider_pb2.CreateRequest(urn=urn, properties=inputs))
        assert provider.Read(provider_pb2.ReadRequest(id=f"{ZONE_ID}/{made.id}", urn=urn)).properties == inputs
        same = provider.Diff(provider_pb2.DiffRequest(id=made.id, urn=urn, olds=inputs, old_inputs=inputs, news=inputs))
        assert same.changes == provider_pb2.DiffResponse.DIFF_NONE
        other = provider.Diff(provider_pb2.DiffRequest(id=made.id, urn=urn, olds=inputs, old_inputs=inputs, news=cname))
        assert (list(other.diffs), list(other.replaces)) == (["content", "type"], ["type"])
        with pytest.raises(grpc.RpcError, match="81053"):
            provider.Create(provider_pb2.CreateRequest(urn=urn, properties=cname))
        provider.Delete(provider_pb2.DeleteRequest(id=made.id, urn=urn))
    assert cloud.things == {}
