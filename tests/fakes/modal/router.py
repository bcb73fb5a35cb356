"""The command router: commands in running sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from grpclib import GRPCError, Status
from modal_proto import task_command_router_pb2 as router

from .machine import ERR, OUT, Process
from .state import Sandbox, State
from .wire import rpc


class Router:
    """Answers to what Modal's client asks of the machine a sandbox runs on."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._tasks: set[asyncio.Task[None]] = set()

    def admit(self, name: str, metadata: Mapping[str, Any]) -> None:
        """A router's caller has the token that the control plane gave out for this sandbox, and only for it."""
        bearer = str(metadata.get("authorization", "")).removeprefix("Bearer ")
        if not any(bearer in sandbox.access_tokens for sandbox in self.state.sandboxes.values()):
            raise GRPCError(Status.UNAUTHENTICATED, "the token is not one of ours")

    def _sandbox(self, task_id: str) -> Sandbox:
        for sandbox in self.state.sandboxes.values():
            if sandbox.task_id == task_id:
                if not sandbox.running:
                    raise GRPCError(Status.NOT_FOUND, "the sandbox has ended")
                return sandbox
        raise GRPCError(Status.NOT_FOUND, f"no task {task_id}")

    def _process(self, request: Any) -> Process:
        for sandbox in self.state.sandboxes.values():
            if sandbox.task_id == request.task_id and request.exec_id in sandbox.executions:
                return sandbox.executions[request.exec_id]
        raise GRPCError(Status.NOT_FOUND, f"no command {request.exec_id}")

    @rpc("task_id", "exec_id", "command_args", "stdout_config", "stderr_config", "timeout_secs", "workdir",
         "secret_sources")  # fmt: skip
    async def TaskExecStart(self, request: Any) -> Any:
        sandbox = self._sandbox(request.task_id)
        if request.exec_id in sandbox.executions:  # the client sends again what may have been lost
            return router.TaskExecStartResponse()
        environment = sandbox.environment | self.state.environment((), request.secret_sources)
        workdir = request.workdir or sandbox.definition.workdir or "/"
        try:
            process = await sandbox.machine.start(list(request.command_args), environment, workdir)
        except OSError as error:
            raise GRPCError(Status.NOT_FOUND, f"the command cannot be run: {error}") from None
        sandbox.executions[request.exec_id] = process
        if request.timeout_secs:
            task = asyncio.create_task(self._limit(process, request.timeout_secs))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return router.TaskExecStartResponse()

    async def _limit(self, process: Process, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await process.ended.wait()

    @rpc("task_id", "exec_id", "offset", "file_descriptor")
    async def TaskExecStdioRead(self, request: Any) -> AsyncIterator[Any]:
        descriptor = OUT if request.file_descriptor == router.TASK_EXEC_STDIO_FILE_DESCRIPTOR_STDOUT else ERR
        async for data in self._process(request).read(descriptor, request.offset):
            yield router.TaskExecStdioReadResponse(data=data)

    @rpc("task_id", "exec_id", "offset", "data", "eof")
    async def TaskExecStdinWrite(self, request: Any) -> Any:
        await self._process(request).feed(request.offset, request.data, request.eof)
        return router.TaskExecStdinWriteResponse()

    @rpc("task_id", "exec_id")
    def TaskExecPoll(self, request: Any) -> Any:
        process = self._process(request)
        return (
            router.TaskExecPollResponse(**_status(process))
            if process.code is not None
            else router.TaskExecPollResponse()
        )

    @rpc("task_id", "exec_id")
    async def TaskExecWait(self, request: Any) -> Any:
        process = self._process(request)
        await process.ended.wait()
        return router.TaskExecWaitResponse(**_status(process))

    @rpc("task_id", "offset", "file_descriptor")
    async def SandboxStdioReadV2(self, request: Any) -> AsyncIterator[Any]:
        entry = self._sandbox(request.task_id).entry
        assert entry is not None
        descriptor = OUT if request.file_descriptor == router.SANDBOX_STDIO_FILE_DESCRIPTOR_STDOUT else ERR
        offset = request.offset
        async for data in entry.read(descriptor, offset):
            yield router.SandboxStdioReadV2Response(data=data, starting_offset=offset)
            offset += len(data)


def _status(process: Process) -> dict[str, int]:
    code = process.code or 0
    return {"signal": -code} if code < 0 else {"code": code}
