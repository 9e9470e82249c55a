"""A provider double: what a real engine asks of a provider, answered from the cloud in memory. Attached, never
installed."""

# ruff: noqa: ARG002 - the methods and their arguments are those of gRPC

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import empty_pb2, json_format, struct_pb2
from pulumi.runtime.proto import plugin_pb2, provider_pb2, provider_pb2_grpc

from tests.network.cloud import FORCES_NEW, Cloud, CloudError
from tests.network.engine import plain


class Provider(provider_pb2_grpc.ResourceProviderServicer):
    """Of any cloud: which type is meant, the URN says."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud

    def Handshake(self, request: Any, context: Any) -> Any:
        return provider_pb2.ProviderHandshakeResponse(accept_secrets=True, accept_resources=True, accept_outputs=True)

    def Attach(self, request: Any, context: Any) -> Any:
        return empty_pb2.Empty()

    def GetPluginInfo(self, request: Any, context: Any) -> Any:
        return plugin_pb2.PluginInfo(version="6.23.1")

    def CheckConfig(self, request: Any, context: Any) -> Any:
        return provider_pb2.CheckResponse(inputs=request.news)

    def DiffConfig(self, request: Any, context: Any) -> Any:
        return provider_pb2.DiffResponse(changes=provider_pb2.DiffResponse.DIFF_NONE)

    def Configure(self, request: Any, context: Any) -> Any:
        return provider_pb2.ConfigureResponse(acceptSecrets=True, supportsPreview=True, acceptResources=True)

    def Check(self, request: Any, context: Any) -> Any:
        return provider_pb2.CheckResponse(inputs=request.news)

    def Diff(self, request: Any, context: Any) -> Any:
        old, new = _plain(request.old_inputs or request.olds), _plain(request.news)
        changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        replaces = [key for key in changed if key in FORCES_NEW.get(_type(request.urn), ())]
        kind = provider_pb2.DiffResponse.DIFF_SOME if changed else provider_pb2.DiffResponse.DIFF_NONE
        return provider_pb2.DiffResponse(changes=kind, diffs=changed, replaces=replaces)

    def Create(self, request: Any, context: Any) -> Any:
        if request.preview:
            return provider_pb2.CreateResponse(properties=request.properties)
        id_ = self._ask(context, self.cloud.create, _type(request.urn), _plain(request.properties))
        return provider_pb2.CreateResponse(id=id_, properties=request.properties)

    def Read(self, request: Any, context: Any) -> Any:
        id_ = request.id.rpartition("/")[2]
        _, inputs = self._ask(context, self.cloud.read, id_)
        there = struct_pb2.Struct()
        there.update(inputs)
        return provider_pb2.ReadResponse(id=id_, properties=there, inputs=there)

    def Update(self, request: Any, context: Any) -> Any:
        if not request.preview:
            self._ask(context, self.cloud.update, request.id, _plain(request.news))
        return provider_pb2.UpdateResponse(properties=request.news)

    def Delete(self, request: Any, context: Any) -> Any:
        self._ask(context, self.cloud.delete, request.id)
        return empty_pb2.Empty()

    def Cancel(self, request: Any, context: Any) -> Any:
        return empty_pb2.Empty()

    def _ask(self, context: Any, call: Any, *argv: Any) -> Any:
        try:
            return call(*argv)
        except CloudError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))


def _type(urn: str) -> str:
    return urn.split("::", 3)[2].rpartition("$")[2]


def _plain(properties: Any) -> dict[str, Any]:
    found: dict[str, Any] = plain(json_format.MessageToDict(properties))
    return {key: value for key, value in found.items() if not key.startswith("__")}


@contextmanager
def attached(cloud: Cloud) -> Iterator[int]:
    """The port on which the provider answers, for as long as it is needed."""
    server = grpc.server(ThreadPoolExecutor(8))
    provider_pb2_grpc.add_ResourceProviderServicer_to_server(Provider(cloud), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()
