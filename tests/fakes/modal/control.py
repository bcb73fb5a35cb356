"""The control plane: apps, secrets, volumes, files, images and sandboxes. `functions.py` adds the functions."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import re
import shlex
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from google.protobuf.empty_pb2 import Empty  # type: ignore[import-untyped]
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as api

from .machine import AGENT_ID, OUT, Machine, path_variable
from .state import Image, Sandbox, State, Volume, new_id, token
from .wire import rpc

TOKEN_ID, TOKEN_SECRET = "ak-double", "as-double"
BUILDER = "2025.06"
_CREATING = {
    api.OBJECT_CREATION_TYPE_CREATE_IF_MISSING,
    api.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS,
    api.OBJECT_CREATION_TYPE_CREATE_OVERWRITE_IF_EXISTS,
    api.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP,
    api.OBJECT_CREATION_TYPE_EPHEMERAL,
}
# Steps of a build that need what this machine has not, or has already: they are read, and not run.
_NOT_RUN = ("apt-get ", "useradd ", "install -d ", "python -m compileall ", "echo ", "rm ", "pip install uv")
_SANDBOX = (
    "definition.entrypoint_args", "definition.image_id", "definition.mount_ids", "definition.resources",
    "definition.timeout_secs", "definition.idle_timeout_secs", "definition.workdir", "definition.volume_mounts",
    "definition.open_ports", "definition.network_access", "definition.name", "definition.scheduler_placement",
    "definition.proxy_id", "definition.secret_ids",
)  # fmt: skip
_TIMED_OUT = api.GenericResult.GENERIC_STATUS_TIMEOUT
_TERMINATED = api.GenericResult.GENERIC_STATUS_TERMINATED
_IDLE_LOOK_SECONDS = 0.1


class Control:
    """Answers to what Modal's client and command line ask of the control plane."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.url = ""
        self.accepts_token = True
        self.most_sandboxes: int | None = None
        self.time_scale = 1.0
        """How many of a sandbox's seconds pass in one of ours."""
        self._tasks: set[asyncio.Task[Any]] = set()

    def admit(self, name: str, metadata: Mapping[str, Any]) -> None:
        """Refuses a caller without our token. Containers have none of their own."""
        if metadata.get("x-modal-client-type") == str(api.CLIENT_TYPE_CONTAINER):
            return
        given = (metadata.get("x-modal-token-id"), metadata.get("x-modal-token-secret"))
        if given != (TOKEN_ID, TOKEN_SECRET) or not self.accepts_token:
            raise GRPCError(Status.UNAUTHENTICATED, "Token missing or invalid")

    def spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for sandbox in self.state.sandboxes.values():
            await sandbox.machine.kill()

    # --- workspace and apps ------------------------------------------------------------------------------------------

    @rpc()
    def ClientHello(self, request: Any) -> Any:
        return api.ClientHelloResponse()

    @rpc()
    def AuthTokenGet(self, request: Any) -> Any:
        return api.AuthTokenGetResponse(token=token())

    @rpc("object_creation_type", "deployment_name")
    def EnvironmentGetOrCreate(self, request: Any) -> Any:
        settings = api.EnvironmentSettings(image_builder_version=BUILDER, webhook_suffix="")
        metadata = api.EnvironmentMetadata(name="main", settings=settings)
        return api.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata)

    @rpc("app_name", "environment_name", "object_creation_type")
    def AppGetOrCreate(self, request: Any) -> Any:
        if request.app_name not in self.state.apps and request.object_creation_type not in _CREATING:
            raise GRPCError(Status.NOT_FOUND, f"App {request.app_name!r} not found")
        return api.AppGetOrCreateResponse(app_id=self.state.apps.setdefault(request.app_name, new_id("ap")))

    @rpc("name", "environment_name")
    def AppGetByDeploymentName(self, request: Any) -> Any:
        return api.AppGetByDeploymentNameResponse(app_id=self.state.apps.get(request.name, ""))

    @rpc("client_id", "description", "environment_name", "app_state", "tags")
    def AppCreate(self, request: Any) -> Any:
        app_id = self.state.apps[request.description] = new_id("ap")
        return api.AppCreateResponse(app_id=app_id, app_page_url="http://127.0.0.1/apps", app_logs_url="")

    @rpc("app_id")
    def AppGetLayout(self, request: Any) -> Any:
        ids = {function.function_name: each for each, function in self.state.functions.items()}
        return api.AppGetLayoutResponse(app_layout=api.AppLayout(function_ids=ids))

    @rpc("app_id", "name", "app_state", "function_ids", "definition_ids", "client_version", "commit_info", "tags",
         "deployment_tag", "deployment_type")  # fmt: skip
    def AppPublish(self, request: Any) -> Any:
        self.state.published[request.name] = request
        return api.AppPublishResponse(url=f"http://127.0.0.1/apps/{request.name}", deployed_at=time.time())

    @rpc("app_id")
    def AppHeartbeat(self, request: Any) -> Any:
        return Empty()

    @rpc("app_id", "reason", "exception")
    def AppClientDisconnect(self, request: Any) -> Any:
        return Empty()

    @rpc("app_id", "source")
    async def AppStop(self, request: Any) -> Any:
        self.state.apps = {name: app_id for name, app_id in self.state.apps.items() if app_id != request.app_id}
        self.state.functions.clear()
        for sandbox in self.state.sandboxes.values():
            if sandbox.running and sandbox.app_id == request.app_id:
                await self.end(sandbox)
        return Empty()

    # --- secrets, proxies, volumes -----------------------------------------------------------------------------------

    @rpc("deployment_name", "environment_name", "object_creation_type", "env_dict", "app_id", "required_keys")
    def SecretGetOrCreate(self, request: Any) -> Any:
        known = self.state.secret_ids.get(request.deployment_name)
        kind = request.object_creation_type
        if known is not None and kind == api.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise GRPCError(Status.ALREADY_EXISTS, f"Secret {request.deployment_name!r} exists")
        if known is None and kind not in _CREATING:
            raise GRPCError(Status.NOT_FOUND, f"Secret {request.deployment_name!r} not found")
        if known is None:
            known = new_id("st")
            self.state.secret_ids[request.deployment_name or known] = known
        if kind in _CREATING:
            self.state.secrets[known] = dict(request.env_dict)
        if missing := set(request.required_keys) - self.state.secrets[known].keys():
            raise GRPCError(Status.NOT_FOUND, f"Secret is missing {', '.join(sorted(missing))}")
        return api.SecretGetOrCreateResponse(secret_id=known)

    @rpc("secret_id")
    def SecretDelete(self, request: Any) -> Any:
        del self.state.secrets[request.secret_id]
        self.state.secret_ids = {
            name: each for name, each in self.state.secret_ids.items() if each != request.secret_id
        }
        return Empty()

    @rpc("name", "environment_name")
    def ProxyGet(self, request: Any) -> Any:
        if request.name not in self.state.proxies:
            raise GRPCError(Status.NOT_FOUND, f"Proxy {request.name!r} not found")
        return api.ProxyGetResponse(proxy=api.Proxy(name=request.name, proxy_id=self.state.proxies[request.name]))

    @rpc("deployment_name", "environment_name", "object_creation_type", "version", "app_id")
    def VolumeGetOrCreate(self, request: Any) -> Any:
        named = [each for each in self.state.volumes.values() if each.name == request.deployment_name]
        if not named and request.object_creation_type not in _CREATING:
            raise GRPCError(Status.NOT_FOUND, f"Volume {request.deployment_name!r} not found")
        if not named:
            volume_id = new_id("vo")
            root = self.state.directory / "volumes" / volume_id
            root.mkdir(parents=True)
            named = [Volume(volume_id, request.deployment_name, root, request.version or 1)]
            self.state.volumes[volume_id] = named[0]
        metadata = api.VolumeMetadata(version=named[0].version, name=named[0].name)  # type: ignore[arg-type]
        return api.VolumeGetOrCreateResponse(volume_id=named[0].id, version=named[0].version, metadata=metadata)  # type: ignore[arg-type]

    @rpc("volume_id", "path", "recursive")
    async def VolumeListFiles2(self, request: Any) -> AsyncIterator[Any]:
        root = self.state.volumes[request.volume_id].root
        directory = _below(root, request.path)
        if not directory.is_dir():
            raise GRPCError(Status.NOT_FOUND, "no such directory")
        entries = []
        for path in sorted(directory.rglob("*") if request.recursive else directory.iterdir()):
            kind = api.FileEntry.DIRECTORY if path.is_dir() else api.FileEntry.FILE
            status = path.lstat()
            name = str(path.relative_to(root))
            entries.append(api.FileEntry(path=name, type=kind, mtime=int(status.st_mtime), size=status.st_size))
        yield api.VolumeListFiles2Response(entries=entries)

    @rpc("volume_id", "path", "recursive")
    async def VolumeRemoveFile2(self, request: Any) -> Any:
        target = _below(self.state.volumes[request.volume_id].root, request.path)
        if not target.exists():
            raise GRPCError(Status.NOT_FOUND, "no such file")
        if target.is_dir() and not request.recursive:
            raise GRPCError(Status.INVALID_ARGUMENT, "is a directory")
        await asyncio.to_thread(shutil.rmtree, target)
        return Empty()

    @rpc("volume_id", "environment_name")
    def VolumeDelete(self, request: Any) -> Any:
        shutil.rmtree(self.state.volumes.pop(request.volume_id).root)
        return Empty()

    @rpc("volume_id")
    def VolumeCommit(self, request: Any) -> Any:
        return api.VolumeCommitResponse()

    # --- files and images --------------------------------------------------------------------------------------------

    @rpc("sha256_hex_hashes")
    def MountBatchedCheckExistence(self, request: Any) -> Any:
        missing = [each for each in request.sha256_hex_hashes if each not in self.state.files]
        return api.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    @rpc("sha256_hex", "data")
    def MountPutFile(self, request: Any) -> Any:
        self.state.files[request.sha256_hex] = request.data
        return api.MountPutFileResponse(exists=True)

    @rpc(
        "deployment_name",
        "namespace",
        "environment_name",
        "object_creation_type",
        "files",
        "app_id",
        "earliest_checked_at",
    )
    def MountGetOrCreate(self, request: Any) -> Any:
        if request.deployment_name:  # Modal's own files: its client, a standalone Python
            mount_id = f"mo-{request.deployment_name}"
            self.state.mounts.setdefault(mount_id, [])
        else:
            mount_id = new_id("mo")
            self.state.mounts[mount_id] = list(request.files)
        metadata = api.MountHandleMetadata(content_checksum_sha256_hex=mount_id.encode().hex())
        return api.MountGetOrCreateResponse(mount_id=mount_id, handle_metadata=metadata)

    def unpack(self, mount_id: str, root: Path) -> None:
        """Writes a mount's files below `root`."""
        for file in self.state.mounts[mount_id]:
            path = _below(root, file.filename)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(self.state.files[file.sha256_hex])
            path.chmod(0o755 if file.mode & 0o111 else 0o644)

    @rpc("image.base_images", "image.dockerfile_commands", "image.context_files", "image.context_mount_id",
         "image.secret_ids", "image.gpu_config", "image.image_registry_config", "image.build_args", "app_id",
         "existing_image_id", "namespace", "builder_version", "force_build")  # fmt: skip
    async def ImageGetOrCreate(self, request: Any) -> Any:
        image = await self._build(request.image)
        self.state.images[image.id] = image
        status = api.GenericResult.GENERIC_STATUS_FAILURE if image.error else api.GenericResult.GENERIC_STATUS_SUCCESS
        result = api.GenericResult(status=status, exception=image.error)
        return api.ImageGetOrCreateResponse(image_id=image.id, result=result, metadata=_image_metadata())

    @rpc("image_id")
    def ImageFromId(self, request: Any) -> Any:
        if request.image_id not in self.state.images:
            raise GRPCError(Status.NOT_FOUND, "no such image")
        return api.ImageFromIdResponse(image_id=request.image_id, metadata=_image_metadata())

    async def _build(self, definition: Any) -> Image:
        image = Image(new_id("im"), self.state.directory / "images" / new_id("layer"), [])
        image.root.mkdir(parents=True)
        for base in definition.base_images:
            below = self.state.images[base.image_id]
            shutil.copytree(below.root, image.root, dirs_exist_ok=True)
            image.commands += below.commands
            image.error = below.error
        for command in definition.dockerfile_commands:
            if image.error:
                break
            image.commands.append(command)
            word, _, rest = command.partition(" ")
            if word == "COPY" and definition.context_mount_id in self.state.mounts:
                source, target = rest.split()[-2:]
                if source == ".":
                    self.unpack(definition.context_mount_id, _below(image.root, target))
            elif word == "RUN":
                pins = [line for file in definition.context_files for line in file.data.decode().split()]
                image.error = await self._run(image, rest, pins)
            elif word not in ("FROM", "ENV", "COPY", "WORKDIR", "ARG", "SHELL", "ENTRYPOINT", "CMD"):
                image.error = f"the double does not know the build step {word}"
        return image

    async def _run(self, image: Image, command: str, pins: list[str]) -> str:
        """Runs one build step, in a machine with the image's files. Returns why it failed, or nothing."""
        if "pip install" in command:
            return _not_installed([*shlex.split(command), *pins])
        if command.strip().startswith(_NOT_RUN):
            return ""
        workspace = self.state.directory / "builds" / image.id
        workspace.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            os.chown(workspace, AGENT_ID, AGENT_ID)
        else:  # the machine's user is the agent's already, and may not become somebody else
            command = re.sub(r"^setpriv( --\S+( \d+)?)+ ", "", command)
        machine = Machine(self.state.directory / "machines" / image.id, _files(image), {"/workspace": workspace})
        await machine.boot()
        try:
            process = await machine.start(["/bin/sh", "-c", f"{command} 2>&1"], {"PATH": path_variable()}, "/")
            output = b"".join([part async for part in process.read(OUT, 0)])
            await process.ended.wait()
        finally:
            await machine.kill()
        return "" if process.code == 0 else f"{command} ended with {process.code}: {output.decode(errors='replace')}"

    # --- sandboxes ---------------------------------------------------------------------------------------------------

    @rpc("app_id", "tags", "secret_sources", *_SANDBOX)
    async def SandboxCreateV2(self, request: Any) -> Any:
        sandbox = await self._create(request, version=2)
        metadata = api.SandboxHandleMetadata(app_id=sandbox.app_id)
        return api.SandboxCreateV2Response(sandbox_id=sandbox.id, task_id=sandbox.task_id, metadata=metadata)

    @rpc("app_id", "environment_name", "tags", *_SANDBOX)
    async def SandboxCreate(self, request: Any) -> Any:
        sandbox = await self._create(request, version=1)
        return api.SandboxCreateResponse(
            sandbox_id=sandbox.id, metadata=api.SandboxHandleMetadata(app_id=sandbox.app_id)
        )

    async def _create(self, request: Any, *, version: int) -> Sandbox:
        definition, state = request.definition, self.state
        running = [each for each in state.sandboxes.values() if each.running]
        if any(each.definition.name == definition.name != "" and each.app_id == request.app_id for each in running):
            raise GRPCError(Status.ALREADY_EXISTS, f"Sandbox with name {definition.name} already exists")
        if self.most_sandboxes is not None and len(running) >= self.most_sandboxes:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "the workspace's limit of sandboxes is reached")
        mounts = {}
        for mount in definition.volume_mounts:
            mounts[mount.mount_path] = _below(state.volumes[mount.volume_id].root, mount.sub_path)
            mounts[mount.mount_path].mkdir(parents=True, exist_ok=True)
        sandbox_id = new_id("sb", length=22 if version == 1 else 26)
        machine = Machine(state.directory / "machines" / sandbox_id, _files(state.images[definition.image_id]), mounts)
        environment = {"PATH": path_variable(), "MODAL_SANDBOX_ID": sandbox_id, "MODAL_REGION": "double-1"}
        environment |= state.environment(definition.secret_ids, getattr(request, "secret_sources", ()))
        tags = {tag.tag_name: tag.tag_value for tag in request.tags}
        task_id = new_id("ta", "V" if version == 2 else "")
        sandbox = Sandbox(sandbox_id, task_id, request.app_id, definition, tags, machine, environment, version)
        state.sandboxes[sandbox_id] = sandbox  # before any await: the name is the lock
        await machine.boot()
        sandbox.entry = await machine.start(list(definition.entrypoint_args), environment, definition.workdir or "/")
        self.spawn(self._live(sandbox))
        return sandbox

    async def _live(self, sandbox: Sandbox) -> None:
        """Ends a sandbox with its command, at its time limit, or when it was idle for its idle timeout."""
        assert sandbox.entry is not None
        ends_at = time.monotonic() + sandbox.definition.timeout_secs / self.time_scale
        idle_seconds = sandbox.definition.idle_timeout_secs / self.time_scale
        while sandbox.running:
            if not sandbox.is_idle():
                sandbox.active_at = time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_IDLE_LOOK_SECONDS):
                    await sandbox.entry.ended.wait()
            if sandbox.entry.ended.is_set():
                failed = sandbox.entry.code != 0
                status = (
                    api.GenericResult.GENERIC_STATUS_FAILURE if failed else api.GenericResult.GENERIC_STATUS_SUCCESS
                )
                await self.end(sandbox, status, sandbox.entry.code or 0)
            elif time.monotonic() > ends_at:
                await self.end(sandbox, _TIMED_OUT)
            elif idle_seconds and sandbox.is_idle() and time.monotonic() - sandbox.active_at > idle_seconds:
                await self.end(sandbox, _TERMINATED)

    async def end(self, sandbox: Sandbox, status: Any = _TERMINATED, code: int = 0) -> None:
        """Ends a sandbox: no signal, no time to leave."""
        if sandbox.result is None:
            sandbox.result = api.GenericResult(status=status, exitcode=code & 255)
            sandbox.ended.set()
        await sandbox.machine.kill()

    @rpc("sandbox_name", "app_name", "environment_name", "include_terminated")
    def SandboxGetFromNameV2(self, request: Any) -> Any:
        return self._from_name(request, version=2)

    @rpc("sandbox_name", "app_name", "environment_name", "include_terminated")
    def SandboxGetFromName(self, request: Any) -> Any:
        return self._from_name(request, version=1)

    def _from_name(self, request: Any, *, version: int) -> Any:
        for sandbox in self.state.sandboxes.values():
            fits = sandbox.version == version and sandbox.app_id == self.state.apps.get(request.app_name)
            if fits and sandbox.definition.name == request.sandbox_name and sandbox.running:
                metadata = api.SandboxHandleMetadata(app_id=sandbox.app_id)
                return api.SandboxGetFromNameResponse(sandbox_id=sandbox.id, metadata=metadata)
        raise GRPCError(Status.NOT_FOUND, f"Sandbox with name {request.sandbox_name} not found")

    def _sandbox(self, sandbox_id: str) -> Sandbox:
        if sandbox_id not in self.state.sandboxes:
            raise GRPCError(Status.NOT_FOUND, f"Sandbox {sandbox_id} not found")
        return self.state.sandboxes[sandbox_id]

    @rpc("sandbox_id", "timeout")
    async def SandboxWaitV2(self, request: Any) -> Any:
        sandbox = self._sandbox(request.sandbox_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(request.timeout):
                await sandbox.ended.wait()
        metadata = api.SandboxHandleMetadata(result=sandbox.result, app_id=sandbox.app_id)
        return api.SandboxWaitResponse(result=sandbox.result, metadata=metadata)

    SandboxWait = SandboxWaitV2

    @rpc("sandbox_id")
    async def SandboxTerminateV2(self, request: Any) -> Any:
        await self.end(self._sandbox(request.sandbox_id))
        return api.SandboxTerminateResponse()

    SandboxTerminate = SandboxTerminateV2

    @rpc("sandbox_id")
    def SandboxGetTaskIdV2(self, request: Any) -> Any:
        return api.SandboxGetTaskIdResponse(task_id=self._sandbox(request.sandbox_id).task_id)

    @rpc("sandbox_id", "timeout", "wait_until_ready")
    def SandboxGetTaskId(self, request: Any) -> Any:
        return api.SandboxGetTaskIdResponse(task_id=self._sandbox(request.sandbox_id).task_id)

    @rpc("sandbox_id", "task_id")
    def SandboxGetCommandRouterAccess(self, request: Any) -> Any:
        sandbox = self._sandbox(request.sandbox_id)
        if not sandbox.running:
            raise GRPCError(Status.FAILED_PRECONDITION, "the sandbox has ended")
        sandbox.access_tokens.append(token())
        return api.SandboxGetCommandRouterAccessResponse(jwt=sandbox.access_tokens[-1], url=self.url)

    @rpc("task_id")
    def TaskGetCommandRouterAccess(self, request: Any) -> Any:
        sandbox = next(each for each in self.state.sandboxes.values() if each.task_id == request.task_id)
        if not sandbox.running:
            raise GRPCError(Status.FAILED_PRECONDITION, "the sandbox has ended")
        sandbox.access_tokens.append(token())
        return api.TaskGetCommandRouterAccessResponse(jwt=sandbox.access_tokens[-1], url=self.url)

    @rpc("app_id", "before_timestamp", "environment_name", "include_finished", "tags")
    def SandboxListV2(self, request: Any) -> Any:
        wanted = {tag.tag_name: tag.tag_value for tag in request.tags}
        newest_first = sorted(self.state.sandboxes.values(), key=lambda each: -each.created_at)
        found = [
            api.SandboxInfo(id=each.id, created_at=each.created_at, name=each.definition.name, app_id=each.app_id)
            for each in newest_first
            if each.app_id == request.app_id
            and (each.running or request.include_finished)
            and wanted.items() <= each.tags.items()
            and (not request.before_timestamp or each.created_at < request.before_timestamp)
        ]
        return api.SandboxListResponse(sandboxes=found)

    @rpc("sandbox_id")
    def SandboxTagsGetV2(self, request: Any) -> Any:
        tags = self._sandbox(request.sandbox_id).tags
        pairs = [api.SandboxTag(tag_name=name, tag_value=value) for name, value in tags.items()]
        return api.SandboxTagsGetResponse(tags=pairs)

    SandboxTagsGet = SandboxTagsGetV2


def _below(root: Path, path: str) -> Path:
    inside = PurePosixPath("/", path)
    if ".." in inside.parts:
        raise GRPCError(Status.INVALID_ARGUMENT, "the path leads out of its root")
    return root / inside.relative_to("/")


def _files(image: Image) -> dict[str, Path]:
    """What of an image is put into a machine: everything that was copied into it."""
    return {f"/{path.relative_to(image.root)}": path for top in image.root.iterdir() for path in top.iterdir()}


def _image_metadata() -> Any:
    return api.ImageMetadata(python_version_info="Python 3.12.8", image_builder_version=BUILDER)


def _not_installed(words: list[str]) -> str:
    """The packages are those of the test's environment: what an image pins must be what is in it."""
    for word in words:
        name, is_pin, version = word.partition("==")
        if is_pin:
            try:
                installed = importlib.metadata.version(name.partition("[")[0])
            except importlib.metadata.PackageNotFoundError:
                return f"No matching distribution found for {word}"
            if installed != version:
                return f"{word} is not what is tested here: {installed}"
    return ""
