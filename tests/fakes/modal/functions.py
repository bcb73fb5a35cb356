"""Deployed functions: Modal's own container entry point runs each of them in a process, with the files that were
uploaded for it; and the web addresses of those that have one.

A schedule is not kept: a test fires it (`ModalDouble.fire`).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from google.protobuf.empty_pb2 import Empty  # type: ignore[import-untyped]
from modal._serialization import deserialize_data_format, serialize_data_format
from modal_proto import api_pb2 as api

from .control import Control
from .machine import path_variable
from .state import State, new_id
from .wire import rpc

_POLL_SECONDS = 1.0  # an empty answer to a container that asks for work


@dataclass
class Call:
    """One call of a function."""

    id: str
    function_id: str
    item: api.FunctionGetInputsItem
    incoming: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    outgoing: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    result: Any = None


@dataclass
class Container:
    """A process of Modal's container entry point."""

    task_id: str
    function_id: str
    process: asyncio.subprocess.Process
    log: Path

    @property
    def is_alive(self) -> bool:
        return self.process.returncode is None


class Functions(Control):
    """The control plane, with functions."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.web_url = ""
        self.python = sys.executable
        """What the containers run: a Python with Modal's client and the image's packages."""
        self.calls: dict[str, Call] = {}
        self.containers: list[Container] = []
        self._inputs: dict[str, asyncio.Queue[Any]] = collections.defaultdict(asyncio.Queue)
        self._starting: set[str] = set()

    # --- deploying ---------------------------------------------------------------------------------------------------

    @rpc("app_id", "function_name", "function_type", "webhook_config", "function_schema", "existing_function_id",
         "supported_input_formats", "supported_output_formats")  # fmt: skip
    def FunctionPrecreate(self, request: Any) -> Any:
        function_id = request.existing_function_id or new_id("fu")
        web = request.webhook_config.type != api.WEBHOOK_TYPE_UNSPECIFIED
        metadata = self._metadata(request.function_name, web)
        return api.FunctionPrecreateResponse(function_id=function_id, handle_metadata=metadata)

    @rpc("app_id", "existing_function_id", "function")
    def FunctionCreate(self, request: Any) -> Any:
        function = request.function
        function_id = request.existing_function_id or new_id("fu")
        self.state.functions[function_id] = function
        ranked = api.FunctionData.RankedFunction(rank=0, function=function)
        data = api.FunctionData(function_name=function.function_name, ranked_functions=[ranked])
        metadata = self._metadata(function.function_name, function.webhook_config.type != 0)
        return api.FunctionCreateResponse(
            function_id=function_id, handle_metadata=metadata, function=function, function_data=data
        )

    def _metadata(self, name: str, web: bool) -> Any:
        kind = api.Function.FUNCTION_TYPE_FUNCTION
        url = f"{self.web_url}/{name}" if web else ""
        return api.FunctionHandleMetadata(function_name=name, function_type=kind, web_url=url, definition_id="de-1")

    def function_id(self, name: str) -> str:
        return next(each for each, function in self.state.functions.items() if function.function_name == name)

    # --- calling -----------------------------------------------------------------------------------------------------

    def call(self, function_id: str, given: Any, kind: Any) -> Call:
        """Puts one call into the function's queue, and sees to it that a container takes it."""
        call_id, input_id = new_id("fc"), new_id("in")
        item = api.FunctionGetInputsItem(
            input_id=input_id, input=given, function_call_id=call_id, function_call_invocation_type=kind
        )
        call = self.calls[call_id] = Call(call_id, function_id, item)
        self._inputs[function_id].put_nowait(item)
        self._see_to(function_id)
        return call

    def _see_to(self, function_id: str) -> None:
        alive = [each for each in self.containers if each.is_alive]
        if function_id not in self._starting and not any(each.function_id == function_id for each in alive):
            self._starting.add(function_id)
            self.spawn(self._start(function_id))

    @rpc(
        "function_id",
        "function_call_type",
        "function_call_invocation_type",
        "pipelined_inputs.input",
        "parent_input_id",
    )
    def FunctionMap(self, request: Any) -> Any:
        (item,) = request.pipelined_inputs
        call = self.call(request.function_id, item.input, request.function_call_invocation_type)
        answer = api.FunctionPutInputsResponseItem(idx=0, input_id=call.item.input_id, input_jwt="unsigned")
        return api.FunctionMapResponse(function_call_id=call.id, pipelined_inputs=[answer])

    # --- containers --------------------------------------------------------------------------------------------------

    async def _start(self, function_id: str) -> None:
        function, task_id = self.state.functions[function_id], new_id("ta")
        directory = self.state.directory / "containers" / task_id
        directory.mkdir(parents=True)
        for mount_id in function.mount_ids:
            self.unpack(mount_id, directory)
        layout = api.AppLayout(objects=[api.Object(object_id=each.object_id) for each in function.object_dependencies])
        for each, other in self.state.functions.items():
            layout.function_ids[other.function_name] = each
            metadata = self._metadata(other.function_name, other.webhook_config.type != 0)
            layout.objects.append(api.Object(object_id=each, function_handle_metadata=metadata))
        arguments = api.ContainerArguments(
            task_id=task_id, function_id=function_id, function_def=function, app_layout=layout, environment_name="main"
        )
        arguments.app_id = self.state.apps[function.app_name]
        (directory / "arguments").write_bytes(arguments.SerializeToString())
        environment = {
            "PATH": path_variable(),
            "PYTHONPATH": str(directory / "root"),
            "MODAL_SERVER_URL": self.url,
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(directory / "arguments"),
            "MODAL_TASK_ID": task_id,
            "MODAL_IS_REMOTE": "1",
            "MODAL_REGION": "double-1",
            **self.state.environment(function.secret_ids, ()),
        }
        log = directory / "log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(self.python, "-m", "modal._container_entrypoint"),
                cwd=directory / "root",
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.containers.append(Container(task_id, function_id, process, log))
        self._starting.discard(function_id)
        await process.wait()
        if not self._inputs[function_id].empty():
            self._see_to(function_id)

    @rpc()
    def ContainerHello(self, request: Any) -> Any:
        return Empty()

    @rpc("canceled_inputs_return_outputs", "canceled_inputs_return_outputs_v2")
    def ContainerHeartbeat(self, request: Any) -> Any:
        return api.ContainerHeartbeatResponse()

    @rpc("function_id", "input_concurrency", "batch_max_size", "batch_linger_ms")
    async def FunctionGetInputs(self, request: Any) -> Any:
        try:
            async with asyncio.timeout(_POLL_SECONDS):
                return api.FunctionGetInputsResponse(inputs=[await self._inputs[request.function_id].get()])
        except TimeoutError:
            return api.FunctionGetInputsResponse()

    @rpc("outputs", "requested_at")
    def FunctionPutOutputs(self, request: Any) -> Any:
        for output in request.outputs:
            call = next(each for each in self.calls.values() if each.item.input_id == output.input_id)
            call.result = output.result
            call.done.set()
            call.outgoing.put_nowait(None)
        return Empty()

    @rpc("function_call_id", "last_index", "attempt_token")
    async def FunctionCallGetDataIn(self, request: Any) -> AsyncIterator[Any]:
        call, index = self.calls[request.function_call_id], request.last_index
        while True:
            message = await call.incoming.get()
            index += 1
            data = serialize_data_format(message, api.DATA_FORMAT_ASGI)
            yield api.DataChunk(data_format=api.DATA_FORMAT_ASGI, data=data, index=index)

    @rpc("function_call_id", "data_chunks", "attempt_token")
    def FunctionCallPutDataOut(self, request: Any) -> Any:
        for chunk in request.data_chunks:
            message = deserialize_data_format(chunk.data, chunk.data_format, None)
            self.calls[request.function_call_id].outgoing.put_nowait(message)
        return Empty()

    @rpc("result", "termination_reason")
    def TaskResult(self, request: Any) -> Any:
        return Empty()

    async def scale_down(self) -> None:
        """Ends every container, as Modal does with idle ones."""
        for container in self.containers:
            if container.is_alive:
                with contextlib.suppress(ProcessLookupError):
                    container.process.kill()
                await container.process.wait()

    async def close(self) -> None:
        await self.scale_down()
        await super().close()

    # --- web addresses -----------------------------------------------------------------------------------------------

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """What Modal's proxy does: a request becomes a call, whose ASGI messages become the answer."""
        try:
            function_id = self.function_id(request.match_info["function"])
        except StopIteration:
            return web.Response(status=404, text="modal-http: no such function")
        headers = [(name.lower().encode(), value.encode()) for name, value in request.headers.items()]
        scope: dict[str, Any] = {"type": "http", "method": request.method, "path": "/" + request.match_info["path"]}
        scope |= {"http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1), "headers": headers}
        scope["query_string"] = request.query_string.encode()
        arguments = serialize_data_format(((scope,), {}), api.DATA_FORMAT_PICKLE)
        given = api.FunctionInput(args=arguments, data_format=api.DATA_FORMAT_PICKLE)
        call = self.call(function_id, given, api.FUNCTION_CALL_INVOCATION_TYPE_SYNC)
        call.incoming.put_nowait({"type": "http.request", "body": await request.read(), "more_body": False})
        answer: web.StreamResponse | None = None
        while message := await call.outgoing.get():
            if message["type"] == "http.response.start":
                pairs = [(name.decode(), value.decode()) for name, value in message["headers"]]
                answer = web.StreamResponse(status=message["status"], headers=dict(pairs))
                await answer.prepare(request)
            elif message["type"] == "http.response.body" and answer is not None:
                await answer.write(message.get("body", b""))
                if not message.get("more_body"):
                    break
        if answer is None:
            return web.Response(status=500, text="modal-http: internal error")
        await answer.write_eof()
        return answer

    async def run_until_done(self, name: str, arguments: tuple[Any, ...] = ()) -> Any:
        """Calls a function as a schedule would, and returns its result."""
        data = serialize_data_format((arguments, {}), api.DATA_FORMAT_PICKLE)
        given = api.FunctionInput(args=data, data_format=api.DATA_FORMAT_PICKLE)
        call = self.call(self.function_id(name), given, api.FUNCTION_CALL_INVOCATION_TYPE_ASYNC)
        await call.done.wait()
        return call.result
