"""The double itself: what it refuses, and that it keeps Modal's rules as its client knows them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modal
import modal.exception
import pytest
from grpclib import Status
from modal_proto import api_pb2 as api

from tests.fakes.modal import ModalDouble
from tests.fakes.modal.wire import unknown_fields
from tests.providers.modal_support import needs_bubblewrap, until

pytestmark = needs_bubblewrap


@pytest.fixture
def double() -> Iterator[ModalDouble]:
    with ModalDouble() as double:
        yield double


@pytest.fixture
async def made(double: ModalDouble) -> Any:
    """A running sandbox that does nothing."""
    return await create(double, "one")


async def create(double: ModalDouble, name: str, *command: str, **options: Any) -> Any:
    app = await modal.App.lookup.aio("app", create_if_missing=True, client=double.client)
    image = modal.Image.from_id(double.add_image({}), double.client)
    return await modal.Sandbox.create.aio(
        *(command or ("sleep", "600")), app=app, name=name, image=image, client=double.client, **options
    )


async def test_a_call_without_a_handler_is_refused_and_kept(double: ModalDouble, made: Any) -> None:
    with pytest.raises(modal.exception.UnimplementedError):
        await made.snapshot_filesystem.aio()
    assert double.wire.refused == ["TaskSnapshotFilesystem"]


async def test_a_field_that_no_handler_knows_is_refused_and_kept(double: ModalDouble) -> None:
    with pytest.raises(modal.exception.InvalidError, match=r"does not know definition\.cloud_provider_str"):
        await create(double, "one", cloud="aws")
    assert double.wire.refused == ["SandboxCreateV2: definition.cloud_provider_str"]
    assert double.state.sandboxes == {}


def test_fields_are_known_by_path() -> None:
    request = api.SandboxCreateV2Request(app_id="a", definition=api.Sandbox(name="n", workdir="/"))
    assert list(unknown_fields(request, frozenset({"app_id", "definition.name"}))) == ["definition.workdir"]
    assert list(unknown_fields(request, frozenset({"definition"}))) == ["app_id"]


def test_a_fault_of_a_call_it_does_not_have_is_refused(double: ModalDouble) -> None:
    with pytest.raises(ValueError, match="NoSuchCall"):
        double.wire.fail("NoSuchCall")


async def test_a_name_is_taken_while_its_sandbox_runs(double: ModalDouble, made: Any) -> None:
    with pytest.raises(modal.exception.AlreadyExistsError):
        await create(double, "one")
    await made.terminate.aio(wait=True)
    assert (await create(double, "one")).object_id != made.object_id
    assert await made.poll.aio() == 137


async def test_commands_are_real_and_their_ends_too(double: ModalDouble, made: Any) -> None:
    process = await made.exec.aio("sh", "-c", "cat; echo err >&2; exit 3")
    process.stdin.write(b"from stdin")
    process.stdin.write_eof()
    await process.stdin.drain.aio()
    assert (await process.stdout.read.aio(), await process.stderr.read.aio()) == ("from stdin", "err\n")
    assert await process.wait.aio() == 3
    assert await (await made.exec.aio("sh", "-c", "kill -9 $$")).wait.aio() == 128 + 9
    with pytest.raises(modal.exception.NotFoundError):
        await made.exec.aio("/no/such/program")


async def test_a_write_that_is_repeated_arrives_once(double: ModalDouble, made: Any) -> None:
    double.wire.fail("TaskExecStdinWrite", Status.UNAVAILABLE, after=True)  # the answer is lost: the client repeats it
    process = await made.exec.aio("cat")
    process.stdin.write(b"once")
    process.stdin.write_eof()
    await process.stdin.drain.aio()
    assert await process.stdout.read.aio() == "once"
    assert len(double.wire.named("TaskExecStdinWrite")) == 2


async def test_two_sandboxes_see_neither_each_others_processes_nor_this_machines(
    double: ModalDouble, made: Any
) -> None:
    other = await create(double, "other", "sleep", "601")
    process = await other.exec.aio("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    seen = await process.stdout.read.aio()
    assert "sleep 601" in seen
    assert "sleep 600" not in seen
    assert "pytest" not in seen


async def test_nothing_is_left_of_a_sandbox_that_ended(double: ModalDouble, made: Any) -> None:
    await made.exec.aio("sh", "-c", "setsid sleep 7654321 & wait")
    await until(lambda: _processes("7654321"))
    await made.terminate.aio(wait=True)
    await until(lambda: not _processes("7654321"))


def _processes(marker: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path.parent.name] if marker in path.read_text(errors="replace") else []
        except OSError:
            continue
    return found


@pytest.mark.parametrize("options", [{"timeout": 40}, {"timeout": 4000, "idle_timeout": 40}], ids=["lifetime", "idle"])
async def test_a_sandbox_ends_when_its_time_is_over(double: ModalDouble, options: dict[str, int]) -> None:
    double.control.time_scale = 40.0
    sandbox = await create(double, "one", **options)
    await sandbox.wait.aio(raise_on_termination=False) if "idle_timeout" in options else await _times_out(sandbox)
    assert await sandbox.poll.aio() == (137 if "idle_timeout" in options else 124)


async def _times_out(sandbox: Any) -> None:
    with pytest.raises(modal.exception.SandboxTimeoutError):
        await sandbox.wait.aio()


async def test_nobody_runs_commands_with_another_sandboxs_token(double: ModalDouble, made: Any) -> None:
    (sandbox,) = double.running()
    await made.exec.aio("true")
    sandbox.access_tokens[:] = ["another"]
    with pytest.raises(modal.exception.AuthError):
        await made.exec.aio("true")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda image: image.pip_install("anthropic==0.0.1"), "not what is tested here"),
        (lambda image: image.pip_install("no-such-package==1.0"), "No matching distribution"),
        (lambda image: image.run_commands("sh -c 'exit 7'"), "ended with 7"),
        (lambda image: image.dockerfile_commands("STOPSIGNAL 9"), "build step STOPSIGNAL"),
    ],
)
async def test_a_build_step_that_fails_fails_the_build(double: ModalDouble, step: Any, words: str) -> None:
    app = await modal.App.lookup.aio("app", create_if_missing=True, client=double.client)
    with pytest.raises(modal.exception.ImageBuildError, match=words):
        await step(modal.Image.debian_slim(python_version="3.12")).build.aio(app)


async def test_what_was_asked_to_be_late_is_late_and_holds_up_nobody_else(double: ModalDouble, made: Any) -> None:
    double.wire.fail("SandboxGetFromNameV2", None, seconds=30.0)
    waiting = asyncio.create_task(modal.Sandbox.from_name.aio("app", "one", client=double.client))
    await until(lambda: double.wire.named("SandboxGetFromNameV2"))
    assert await made.poll.aio() is None
    assert not waiting.done()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
