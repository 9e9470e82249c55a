"""An engine double: it speaks the engine's gRPC, runs the unmodified program in a child process, and keeps state.

What it does as the real one: same, update, replace (old deleted first if asked for), import of what is there and then
what makes it what is wanted (pulumi/pulumi#19339), delete what is no more named, last and in reverse; aliases; protect;
unknown ids in a preview; secrets marked as such. What it refuses: a URN twice, a resource without a named provider, and
whatever remotegpu_network/policy.py refuses.
"""

# ruff: noqa: ARG002 - the methods and their arguments are those of gRPC

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import grpc
from google.protobuf import empty_pb2, json_format, struct_pb2
from pulumi.runtime.proto import engine_pb2, engine_pb2_grpc, resource_pb2, resource_pb2_grpc

from remotegpu_network import policy
from tests.network.cloud import Cloud, CloudError

PROGRAM = Path(__file__).parents[2] / "pulumi"
CHILD = Path(__file__).with_name("child.py")
SIGNATURE = "4dabf18193072939515e22adb298388d"
SECRET = "1b47061264138c4ac30d75fd1eb44270"
UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
ROOT_TYPE = "pulumi:pulumi:Stack"
FEATURES = [
    resource_pb2.RESOURCE_MONITOR_FEATURE_SECRETS,
    resource_pb2.RESOURCE_MONITOR_FEATURE_RESOURCE_REFERENCES,
    resource_pb2.RESOURCE_MONITOR_FEATURE_ALIAS_SPECS,
]


@dataclass
class Kept:
    """A resource in the state."""

    type: str
    name: str
    id: str
    inputs: dict[str, Any]
    protect: bool
    import_id: str = ""


@dataclass
class Outcome:
    """What one run did: `operations` as (operation, name), without what stayed the same."""

    code: int
    told: str
    operations: list[tuple[str, str]]
    outputs: dict[str, Any]
    same: int
    seen: dict[str, resource_pb2.RegisterResourceRequest]


@dataclass
class Engine:
    """State and cloud outlive the runs. `export` and the settings are given to each."""

    folder: Path
    host: Host | None = None
    program: Path = PROGRAM
    stack: str = "test"
    cloud: Cloud = field(default_factory=Cloud)
    state: dict[str, Kept] = field(default_factory=dict)

    def up(self, export: Mapping[str, Any], **config: Any) -> Outcome:
        return self._run(export, config, preview=False)

    def preview(self, export: Mapping[str, Any], **config: Any) -> Outcome:
        return self._run(export, config, preview=True)

    def _run(self, export: Mapping[str, Any], config: dict[str, Any], *, preview: bool) -> Outcome:
        file = self.folder / "export.json"
        file.write_text(json.dumps(export, ensure_ascii=False))
        run = Run(self, preview)
        with serving(run) as address:
            told = {
                "remotegpu:environment": "production",
                "remotegpu:clouds": ["cloudflare"],
                "cloudflare:apiToken": TOKEN,
            }
            told |= {
                "remotegpu:export": str(file),
                **{key.replace("__", ":").replace("_", "-"): v for key, v in config.items()},
            }
            told = {key: value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}
            argv = [address, address, self.stack, str(preview), "16"]
            config_of = {"PULUMI_CONFIG": json.dumps(told), "PULUMI_CONFIG_SECRET_KEYS": json.dumps(SECRETS)}
            code, words = (self.host or run_once)(self.program, argv, config_of)
        if code == 0:
            try:
                run.finish()
            except CloudError as error:
                run.problems.append(str(error))
        said = "\n".join([words, *run.log, *run.problems])
        return Outcome(code or bool(run.problems), said, run.operations, run.outputs, run.same, run.seen)


Host = Callable[[Path, list[str], dict[str, str]], tuple[int, str]]


def run_once(program: Path, argv: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """The program in a process of its own: exit status, and what it said."""
    done = subprocess.run(
        [sys.executable, str(CHILD), *argv],
        cwd=program,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


@contextmanager
def language_host(folder: Path) -> Iterator[Host]:
    """The same many times over, forked from a process that has imported the libraries already."""
    serving = subprocess.Popen(
        [sys.executable, str(CHILD), "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(program: Path, argv: list[str], environment: dict[str, str]) -> tuple[int, str]:
        told = folder / "told"
        request = {"folder": str(program), "argv": argv, "environment": environment, "told": str(told)}
        assert serving.stdin is not None
        assert serving.stdout is not None
        print(json.dumps(request), file=serving.stdin, flush=True)
        return int(serving.stdout.readline()), told.read_text()

    try:
        yield run
    finally:
        serving.communicate()


TOKEN = "marker-of-a-secret-token"
SECRETS = [
    "cloudflare:apiToken",
    "alicloud:accessKey",
    "alicloud:secretKey",
    "tencentcloud:secretId",
    "tencentcloud:secretKey",
]


class Run(resource_pb2_grpc.ResourceMonitorServicer, engine_pb2_grpc.EngineServicer):
    """One preview or apply. A preview works on copies and answers no ids for what is not there yet."""

    def __init__(self, engine: Engine, preview: bool) -> None:
        self.engine, self.preview = engine, preview
        self.seen: dict[str, resource_pb2.RegisterResourceRequest] = {}
        self.operations: list[tuple[str, str]] = []
        self.outputs: dict[str, Any] = {}
        self.log: list[str] = []
        self.problems: list[str] = []
        self.same = 0
        self._later: list[Kept] = []
        self._taken: set[str] = set()
        self._lock = Lock()
        self._root = ""

    # -- the monitor

    def GetDeploymentInfo(self, request: Any, context: Any) -> Any:
        return resource_pb2.DeploymentInfo(supportedFeatures=FEATURES)

    def SupportsFeature(self, request: Any, context: Any) -> Any:
        return resource_pb2.SupportsFeatureResponse(
            hasSupport=request.id in ("secrets", "resourceReferences", "aliasSpecs")
        )

    def RegisterPackage(self, request: Any, context: Any) -> Any:
        return resource_pb2.RegisterPackageResponse(ref=request.name)

    def Invoke(self, request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{request.tok}: a run of the stack asks no cloud")

    def RegisterResource(self, request: Any, context: Any) -> Any:
        urn = f"urn:pulumi:{self.engine.stack}::remotegpu::{request.type}::{request.name}"
        with self._lock:
            if urn in self.seen:
                context.abort(grpc.StatusCode.ALREADY_EXISTS, f"Duplicate resource URN '{urn}'")
            self.seen[urn] = request
            if request.type == ROOT_TYPE:
                return resource_pb2.RegisterResourceResponse(urn=urn)
            inputs = plain(json_format.MessageToDict(request.object))
            try:
                id_ = self._register(urn, request, inputs)
            except CloudError as error:
                self.problems.append(f"{request.name}: {error}")
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        outputs = struct_pb2.Struct()
        outputs.CopyFrom(request.object)
        if not id_ and "zone" in request.name:  # computed by the cloud, and so not known yet
            outputs["zoneId"] = UNKNOWN
        elif id_:
            outputs["zoneId"] = id_ if request.name.startswith("zone.") else inputs.get("zoneId", id_)
        return resource_pb2.RegisterResourceResponse(urn=urn, id=id_, object=outputs)

    def RegisterResourceOutputs(self, request: Any, context: Any) -> Any:
        if request.urn == self._root or ROOT_TYPE in request.urn:
            self.outputs = json_format.MessageToDict(request.outputs)
        return empty_pb2.Empty()

    def SignalAndWaitForShutdown(self, request: Any, context: Any) -> Any:
        return empty_pb2.Empty()

    # -- the engine

    def Log(self, request: Any, context: Any) -> Any:
        if request.severity >= engine_pb2.WARNING:
            self.log.append(request.message)
        return empty_pb2.Empty()

    def GetRootResource(self, request: Any, context: Any) -> Any:
        return engine_pb2.GetRootResourceResponse(urn=self._root)

    def SetRootResource(self, request: Any, context: Any) -> Any:
        self._root = request.urn
        return engine_pb2.SetRootResourceResponse()

    def RequirePulumiVersion(self, request: Any, context: Any) -> Any:
        return engine_pb2.RequirePulumiVersionResponse()

    # -- what is done

    def _register(self, urn: str, request: Any, inputs: dict[str, Any]) -> str:
        is_provider = request.type.startswith("pulumi:providers:")
        if not is_provider and not request.provider:
            raise CloudError(f"Default provider for '{request.type.split(':')[0]}' disabled")
        if problems := policy.problems(request.type, inputs):
            raise CloudError("; ".join(problems))
        old = self._find(urn, request)
        if request.importId and (old is None or (old.import_id or old.id) != request.importId):
            self._later += [old] if old is not None else []
            old = self._import(request)
        if old is None:
            return self._new(urn, request, inputs)
        if old.inputs == inputs:
            self.same += 1
            id_ = old.id
        elif not is_provider and self.engine.cloud.replaces(request.type, old.inputs, inputs):
            id_ = self._replace(request, old, inputs)
        else:
            self.operations.append(("update", request.name))
            id_ = old.id
            if not self.preview and not is_provider:
                self.engine.cloud.update(old.id, inputs)
        self._keep(urn, request, id_, inputs)
        return id_

    def _find(self, urn: str, request: Any) -> Kept | None:
        prefix = urn[: -len(request.name)]
        for each in (urn, *(prefix + alias.spec.name for alias in request.aliases)):
            if each in self.engine.state and each not in self._taken:
                self._taken.add(each)
                found = self.engine.state[each]
                if each != urn and not self.preview:
                    del self.engine.state[each]
                return found
        return None

    def _import(self, request: Any) -> Kept:
        """As it is in the cloud: what differs from it is the next step's business."""
        self.operations.append(("import", request.name))
        kind, there = self.engine.cloud.read(request.importId)
        if kind != request.type:
            raise CloudError(f"{request.importId} is no {request.type}")
        id_ = request.importId.rpartition("/")[2]
        return Kept(kind, request.name, id_, dict(there), request.protect)

    def _new(self, urn: str, request: Any, inputs: dict[str, Any]) -> str:
        self.operations.append(("create", request.name))
        if self.preview:
            return ""
        provider = request.type.startswith("pulumi:providers:")
        id_ = f"provider-{request.name}" if provider else self.engine.cloud.create(request.type, inputs)
        self._keep(urn, request, id_, inputs)
        return id_

    def _replace(self, request: Any, old: Kept, inputs: dict[str, Any]) -> str:
        if old.protect:
            raise CloudError(f"{old.name} is protected and cannot be replaced")
        order = ["delete", "create"] if request.deleteBeforeReplace else ["create", "delete later"]
        self.operations += [(f"replace: {step}", request.name) for step in order]
        if self.preview:
            return ""
        if request.deleteBeforeReplace:
            self.engine.cloud.delete(old.id)
            return self.engine.cloud.create(request.type, inputs)
        self._later.append(old)
        return self.engine.cloud.create(request.type, inputs)

    def _keep(self, urn: str, request: Any, id_: str, inputs: dict[str, Any]) -> None:
        if not self.preview:
            kept = Kept(request.type, request.name, id_, inputs, request.protect, request.importId)
            self.engine.state[urn] = kept

    def finish(self) -> None:
        """Deletes come last: what was replaced, then what the program named no more. Raises CloudError."""
        for old in self._later:
            self.engine.cloud.delete(old.id)
        gone = [urn for urn in self.engine.state if urn not in self.seen and urn not in self._taken]
        for urn in reversed(gone):
            kept = self.engine.state[urn]
            self.operations.append(("delete", kept.name))
            if kept.protect:
                raise CloudError(f"{kept.name} is protected and cannot be deleted")
            if not self.preview:
                if not kept.type.startswith("pulumi:providers:"):
                    self.engine.cloud.delete(kept.id)
                del self.engine.state[urn]


def plain(value: Any) -> Any:
    """Without the wrapping of secrets; what was one says so, and its value is not kept."""
    if isinstance(value, dict):
        if value.get(SIGNATURE) == SECRET:
            return "[secret]"
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@contextmanager
def serving(run: Run) -> Iterator[str]:
    """The address on which `run` answers, for as long as it is needed."""
    server = grpc.server(ThreadPoolExecutor(16))
    resource_pb2_grpc.add_ResourceMonitorServicer_to_server(run, server)
    engine_pb2_grpc.add_EngineServicer_to_server(run, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
