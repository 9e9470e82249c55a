"""What only Pulumi's own engine can show, where it is on the PATH; and the provider double, which is tried everywhere.

What both engines must do is in test_both_engines.py. Without the engine the summary of `make test` says that the lane
did not run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import struct_pb2
from pulumi.runtime.proto import provider_pb2, provider_pb2_grpc

from remotegpu_network import desired, gate, guard
from tests.network.cloud import Cloud
from tests.network.engine import TOKEN
from tests.network.export import ZONE_ID, name, sealed, stack
from tests.network.provider import attached
from tests.network.real_engine import RealEngine

ADDRESS = name("m1.address", "gpu-01", "A", "203.0.113.1", machine="m1")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[RealEngine]:
    cloud = Cloud()
    with attached(cloud) as port:
        yield RealEngine(tmp_path, port, cloud)


@pytest.mark.engine
def test_secrets_are_in_neither_state_nor_outputs(engine: RealEngine) -> None:
    done = engine.up(sealed(ADDRESS))
    assert done.code == 0, done.told
    assert TOKEN not in done.told + engine.pulumi("stack", "output", "--json") + engine.pulumi("stack", "export")


@pytest.mark.engine
def test_what_the_pipelines_read_of_the_engine_is_as_the_engine_writes_it(engine: RealEngine) -> None:
    """With the options of network.sh."""
    assert engine.up(sealed(ADDRESS)).code == 0
    before = guard.baseline(engine.run("stack", "output", "--json").printed, stack())
    assert (before.generation, before.counts["names"]) == (7, 1)
    assert gate.pending(json.loads(engine.run("stack", "export").printed)) == []
    engine.configure(sealed(name("m1.address", "gpu-01", "CNAME", "edge.example.org", machine="m1"), generation=8))
    preview = json.loads(engine.run("preview", "--refresh", "--json").printed)
    assert gate.problems(preview, stack()) == []
    (told,) = gate.problems(preview, stack(replaces_at_most=0))
    assert told.startswith(f"1 resources would be replaced (1 × {desired.CLOUDFLARE_RECORD})")


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
