"""The Modal provider's sandboxes: how they are made, kept, ended and cleaned up. Only the runner is a stand-in."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Any

import modal
import modal.exception
import pytest
from grpclib import Status
from modal_proto import api_pb2 as api

from tests.fakes.modal import ModalDouble
from tests.providers.modal_support import MODAL, Sandboxes, needs_bubblewrap, until

LaunchFailed = MODAL.shared("errors").LaunchFailed
SettingsError = MODAL.shared("errors").SettingsError

pytestmark = needs_bubblewrap
SHORT: Any = {"SANDBOX_LIFETIME_SECONDS": "600"}


@pytest.fixture
def double() -> Iterator[ModalDouble]:
    with ModalDouble() as double:
        yield double
        assert double.wire.refused == []


@pytest.fixture
def sandboxes(double: ModalDouble) -> Sandboxes:
    return Sandboxes(double)


# --- what a sandbox is -----------------------------------------------------------------------------------------------


async def test_a_session_has_files_of_its_own_and_sees_no_others(sandboxes: Sandboxes) -> None:
    await sandboxes.run("sesn_other", "echo theirs > secret-of-the-other")
    found, mounted, owner = await sandboxes.run(
        "sesn_1", "find / -name 'secret-of-the-other' 2>/dev/null; ls -A /workspace /workspace/..", "pwd", "id -un"
    )
    assert "secret-of-the-other" not in found
    assert (mounted.strip(), owner.strip()) == ("/workspace", "agent")
    (request, _) = sandboxes.double.wire.named("SandboxCreateV2")
    (mount,) = request.definition.volume_mounts
    assert (mount.mount_path, mount.sub_path) == ("/workspace", "/env_1/sesn_other")
    (volume,) = sandboxes.double.wire.named("VolumeGetOrCreate")[:1]
    assert volume.version == api.VOLUME_FS_VERSION_V2


@pytest.mark.skipif(
    os.geteuid() != 0 and not os.environ.get("CI"),
    reason="needs root: started by an ordinary user, the double's machine has one user only",
)
async def test_the_agent_is_nobody_who_could_reach_the_host_side(sandboxes: Sandboxes) -> None:
    capabilities, parent, files, signal = await sandboxes.run(
        "sesn_1",
        "grep -E 'Cap(Prm|Eff|Amb)' /proc/self/status",
        "for f in environ mem fd/0; do cat /proc/1/$f > /dev/null 2>&1 && echo read 1 $f;"
        " cat /proc/$(ps -o ppid= -p $PPID | tr -d ' ')/$f > /dev/null 2>&1 && echo read launcher $f; done; true",
        "for f in /opt/sandbox/x /run/sandbox/ends /run/sandbox/runner.log /run/sandbox/feed /etc/passwd; do"
        " (: >> $f) 2>/dev/null && echo $f; done; true",
        "for p in $(ls /run/sandbox/runs); do kill -9 $p 2>/dev/null && echo killed $p; done; true",
    )
    assert capabilities.count("0000000000000000") == 3
    assert (parent, files, signal) == ("", "", "")


async def test_files_are_put_in_first_and_nothing_of_the_agents_is_followed(
    sandboxes: Sandboxes, double: ModalDouble
) -> None:
    await sandboxes.run("sesn_1", "ln -s /run/sandbox/ends link; mkfifo pipe; mkdir -p sub")
    files = {"link": b"new", "pipe": b"new", "sub/deep/file.bin": bytes(range(256)) * 100}
    (said,) = await sandboxes.run("sesn_1", "cat link pipe; sha256sum < sub/deep/file.bin | wc -c", files=files)
    assert said == "newnew68\n"
    for name in ("/tmp/x", "../tmp/x", "sub/../../tmp/x"):
        with pytest.raises(LaunchFailed, match="files could not be written") as failed:
            await sandboxes.begin("sesn_1", files={name: b""})
        assert not failed.value.retriable


async def test_what_a_runner_says_is_in_the_sandboxs_own_output_for_people(sandboxes: Sandboxes) -> None:
    sandbox, run = await sandboxes.begin("sesn_1", "echo said")
    entry = sandboxes.double.running()[0].entry
    assert entry is not None
    await until(lambda: run.encode() in entry.output[1])
    assert b'{"event": "ready"}\n' in entry.output[1]
    assert run in await sandbox.tail(1)


async def test_what_a_runner_leaves_behind_ends_with_it(sandboxes: Sandboxes) -> None:
    await sandboxes.run("sesn_1", "setsid sleep 300 & (setsid sleep 300 &); true")
    (sandbox,) = sandboxes.double.running()
    await until(sandbox.is_idle)
    (left,) = await sandboxes.run("sesn_1", "pgrep -c sleep; true")
    assert left == "0\n"


async def test_the_settings_reach_modal(double: ModalDouble) -> None:
    double.state.proxies["fixed"] = "pr-1"
    settings = {"ANTHROPIC_BASE_URL": "https://api.example.com:8443", "SANDBOX_KEEP_WARM_SECONDS": "77"}
    sandboxes = Sandboxes(
        double,
        settings,
        SANDBOX_CPU="1.5,3",
        SANDBOX_MEMORY_MB="256",
        SANDBOX_REGIONS="eu-west, us-east",
        SANDBOX_ALLOWED_HOSTS="*.example.org,packages.example.com",
        SANDBOX_PROXY="fixed",
        SANDBOX_LIFETIME_SECONDS="3600",
    )
    await sandboxes.provider.acquire("sesn_1")
    (request,) = double.wire.named("SandboxCreateV2")
    asked = request.definition
    assert (asked.resources.milli_cpu, asked.resources.milli_cpu_max) == (1500, 3000)
    assert (asked.resources.memory_mb, asked.resources.memory_mb_max) == (256, 256)
    assert list(asked.scheduler_placement.regions) == ["eu-west", "us-east"]
    assert asked.network_access.network_access_type == api.NetworkAccess.NetworkAccessType.ALLOWLIST
    assert list(asked.network_access.allowed_domains) == ["*.example.org", "api.example.com", "packages.example.com"]
    assert (asked.proxy_id, asked.timeout_secs, asked.idle_timeout_secs) == ("pr-1", 3600, 77)
    assert list(asked.entrypoint_args)[-2:] == ["wait", "3480"]  # two minutes before Modal's own limit
    assert {tag.tag_name: tag.tag_value for tag in request.tags} == {"environment": "env_1", "session": "sesn_1"}


async def test_without_settings_only_the_api_may_be_reached_and_the_defaults_are_asked_for(
    sandboxes: Sandboxes,
) -> None:
    await sandboxes.provider.acquire("sesn_1")
    (request,) = sandboxes.double.wire.named("SandboxCreateV2")
    asked = request.definition
    assert asked.network_access.network_access_type == api.NetworkAccess.NetworkAccessType.ALLOWLIST
    assert list(asked.network_access.allowed_domains) == ["api.anthropic.com"]
    assert (asked.resources.milli_cpu, asked.resources.milli_cpu_max) == (500, 2000)
    assert (asked.resources.memory_mb, asked.resources.memory_mb_max) == (512, 2048)
    assert (asked.timeout_secs, asked.idle_timeout_secs, asked.proxy_id) == (86_400, 300, "")


async def test_a_star_opens_the_network(double: ModalDouble) -> None:
    await Sandboxes(double, SANDBOX_ALLOWED_HOSTS="*").provider.acquire("sesn_1")
    (request,) = double.wire.named("SandboxCreateV2")
    assert request.definition.network_access.network_access_type == api.NetworkAccess.NetworkAccessType.OPEN


async def test_a_sandbox_with_a_gpu_is_made_found_listed_and_released(double: ModalDouble) -> None:
    """Modal's client makes those through its older calls."""
    sandboxes = Sandboxes(double, SANDBOX_GPU="T4")
    assert await sandboxes.run("sesn_1", "echo on a GPU") == ["on a GPU\n"]
    (request,) = double.wire.named("SandboxCreate")
    assert request.definition.resources.gpu_config.gpu_type == "T4"
    again = await sandboxes.provider.acquire("sesn_1")
    (info,) = await sandboxes.infos()
    assert (info.sandbox_id, again.created) == (again.id, False)
    await sandboxes.provider.release(info.sandbox_id)
    assert await sandboxes.infos() == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SANDBOX_CPU", "4,2", "a limit that is not below it"),
        ("SANDBOX_CPU", "0", "a number above 0"),
        ("SANDBOX_MEMORY_MB", "lots", "expected a number"),
        ("SANDBOX_MEMORY_MB", "0.4", "whole numbers of MiB"),
        ("SANDBOX_MEMORY_MB", "512,1000.5", "whole numbers of MiB"),
        ("SANDBOX_REGIONS", ",", "expected names"),
        ("SANDBOX_TOOL_SECRETS", " , ", "expected names"),
        ("SANDBOX_LIFETIME_SECONDS", "100000", "expected 600 to 86400 seconds"),
    ],
)
def test_an_unusable_setting_is_named(double: ModalDouble, name: str, value: str, words: str) -> None:
    with pytest.raises(SettingsError, match=name) as refused:
        Sandboxes(double, None, **{name: value})
    assert words in str(refused.value)


# --- how long it stays -----------------------------------------------------------------------------------------------


async def test_an_idle_sandbox_ends_and_the_next_one_has_its_files(double: ModalDouble) -> None:
    double.control.time_scale = 10.0
    sandboxes = Sandboxes(double, {"SANDBOX_KEEP_WARM_SECONDS": "20"})
    first, _ = await sandboxes.begin("sesn_1", "echo kept > file.txt", linger=True)
    await asyncio.sleep(3.0)  # longer than the idle timeout: a running runner keeps it off
    assert len(double.running()) == 1
    await sandboxes.run("sesn_1", "pkill -TERM -o -u agent -f local_runner; true")
    await until(lambda: not double.running())
    assert await sandboxes.run("sesn_1", "cat file.txt") == ["kept\n"]
    assert double.running()[0].id != first.id


async def test_an_idle_sandbox_that_is_short_of_time_is_replaced(double: ModalDouble) -> None:
    # 100 s until the hand-over: enough for who needs ten, and not for who needs 101 and makes longer ones.
    content = Sandboxes(double, **SHORT, handover_seconds=500.0, renew_seconds=10.0)
    hurried = Sandboxes(double, **SHORT, handover_seconds=120.0, renew_seconds=101.0)
    first = await content.provider.acquire("sesn_1")
    assert (await content.provider.acquire("sesn_1")).id == first.id
    latest = await hurried.provider.acquire("sesn_1")
    assert latest.id != first.id
    assert latest.created
    assert [each.id for each in double.running()] == [latest.id]


async def test_a_runner_hands_over_before_the_lifetime_is_up_and_the_sandbox_ends_by_itself(
    double: ModalDouble,
) -> None:
    sandboxes = Sandboxes(double, **SHORT, handover_seconds=590.0, renew_seconds=0.0)  # the hand-over is after 10 s
    await sandboxes.begin("sesn_1", "true", linger=True)
    (sandbox,) = sandboxes.double.running()
    await until(lambda: not sandboxes.double.running())
    assert (sandboxes.directory("sesn_1") / "handed-over").exists()  # it was asked, and had the time
    assert sandbox.result is not None
    assert sandbox.result.status == api.GenericResult.GENERIC_STATUS_SUCCESS  # its own end, not Modal's limit


async def test_two_hosts_at_once_make_one_sandbox(double: ModalDouble) -> None:
    """Name conflict: the loser of the race finds the winner's."""
    one, other = Sandboxes(double), Sandboxes(double)
    double.wire.fail("SandboxGetFromNameV2", Status.NOT_FOUND, "not yet", times=2)  # both look before either creates
    found = await asyncio.gather(one.provider.acquire("sesn_1"), other.provider.acquire("sesn_1"))
    assert found[0].id == found[1].id
    assert sorted(each.created for each in found) == [False, True]
    assert len(double.wire.named("SandboxCreateV2")) == 2
    assert len(double.state.sandboxes) == 1


# --- what the sweep sees ---------------------------------------------------------------------------------------------


async def test_sessions_of_which_only_files_are_left_are_listed_with_their_last_use(double: ModalDouble) -> None:
    sandboxes = Sandboxes(double, {"SANDBOX_RETENTION_SECONDS": "3600"})
    for session in ("sesn_new", "sesn_old", "sesn_used"):
        directory = sandboxes.provider and await sandboxes.run(session, "mkdir -p .sandbox; touch .sandbox/calls.json")
        assert directory == [""]
        double.evict(double.running()[0])
    now, day_ago = time.time(), time.time() - 86_400
    for session in ("sesn_old", "sesn_used"):
        os.utime(sandboxes.directory(session) / ".sandbox/calls.json", (day_ago, day_ago))
        os.utime(sandboxes.directory(session), (day_ago, day_ago))
    os.utime(sandboxes.directory("sesn_used") / ".sandbox/calls.json", (now, now))  # a call was begun there since
    infos = {info.session_id: info for info in await sandboxes.infos()}
    assert not any(info.running for info in infos.values())
    assert infos["sesn_new"].last_used_at > now - 60
    assert infos["sesn_used"].last_used_at > now - 60
    assert infos["sesn_old"].last_used_at < now - 80_000
    await sandboxes.provider.release(infos["sesn_old"].sandbox_id)
    assert not sandboxes.directory("sesn_old").exists()
    assert sandboxes.directory("sesn_used").exists()


async def test_another_environments_sandboxes_are_not_ours(double: ModalDouble) -> None:
    ours, theirs = Sandboxes(double), Sandboxes(double, {"ANTHROPIC_ENVIRONMENT_ID": "env_2"})
    await ours.provider.acquire("sesn_1")
    await theirs.provider.acquire("sesn_2")
    assert [info.session_id for info in await ours.infos()] == ["sesn_1"]


async def test_a_list_asks_for_each_sandboxs_session_once(sandboxes: Sandboxes) -> None:
    await sandboxes.provider.acquire("sesn_1")
    other = Sandboxes(sandboxes.double)
    for _ in range(3):
        assert len(await other.infos()) == 1
    assert len(sandboxes.double.wire.named("SandboxTagsGetV2")) == 1


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "status", "words", "retriable"),
    [
        ("SandboxCreateV2", Status.RESOURCE_EXHAUSTED, "limit for this workspace", True),
        ("SandboxCreateV2", Status.INVALID_ARGUMENT, "what the SANDBOX_", False),
        ("SandboxCreateV2", Status.PERMISSION_DENIED, "may not do this", False),
        ("SandboxGetFromNameV2", Status.UNAUTHENTICATED, "does not accept the token", False),
        ("SandboxGetFromNameV2", Status.UNAVAILABLE, "unavailable", True),
        ("TaskExecStart", Status.NOT_FOUND, "as soon as they are made", True),
    ],
)
async def test_what_modal_answers_is_said_in_our_words(
    sandboxes: Sandboxes, call: str, status: Status, words: str, retriable: bool
) -> None:
    sandboxes.double.wire.fail(call, status, "a-secret-of-the-request", times=100)
    with pytest.raises(LaunchFailed, match=words) as failed:
        await sandboxes.provider.acquire("sesn_1")
    assert failed.value.retriable is retriable
    assert "a-secret-of-the-request" not in str(failed.value)
    sandboxes.double.wire.heal()
    assert await sandboxes.run("sesn_1", "echo well again") == ["well again\n"]


async def test_what_modal_refuses_is_in_the_log_in_its_words_without_secrets(
    sandboxes: Sandboxes, caplog: pytest.LogCaptureFixture
) -> None:
    words = "Invalid region 'moon' for sk-ant-oat01-hush-hush-hush-hush\nand more"
    sandboxes.double.wire.fail("SandboxCreateV2", Status.INVALID_ARGUMENT, words)
    with pytest.raises(LaunchFailed, match="see the log"):
        await sandboxes.provider.acquire("sesn_1")
    (said,) = (record.getMessage() for record in caplog.records if "action=refused" in record.getMessage())
    assert "provider=modal error=InvalidError" in said
    assert "Invalid region 'moon'" in said
    assert "hush" not in said
    assert "and more" not in said


async def test_an_answer_that_was_lost_makes_no_second_sandbox(sandboxes: Sandboxes) -> None:
    sandboxes.double.wire.fail("SandboxCreateV2", Status.UNAVAILABLE, after=True)
    await sandboxes.provider.acquire("sesn_1")
    assert len(sandboxes.double.state.sandboxes) == 1


async def test_modals_limit_of_sandboxes_is_a_launch_that_may_be_tried_again(sandboxes: Sandboxes) -> None:
    sandboxes.double.control.most_sandboxes = 1
    await sandboxes.provider.acquire("sesn_1")
    with pytest.raises(LaunchFailed, match="limit") as failed:
        await sandboxes.provider.acquire("sesn_2")
    assert failed.value.retriable
    await sandboxes.provider.release("sesn_1")
    assert (await sandboxes.provider.acquire("sesn_2")).created


async def test_a_token_of_nobody_is_refused_at_once(double: ModalDouble) -> None:
    sandboxes = Sandboxes(double)
    double.control.accepts_token = False
    with pytest.raises(LaunchFailed, match="token") as failed:
        await sandboxes.infos()
    assert not failed.value.retriable


async def test_an_image_that_cannot_be_built_is_said(double: ModalDouble) -> None:
    sandboxes = Sandboxes(double)
    sandboxes.provider._image = modal.Image.debian_slim(python_version="3.12").run_commands("exit 7")
    with pytest.raises(LaunchFailed, match="image cannot be built") as failed:
        await sandboxes.provider.acquire("sesn_1")
    assert not failed.value.retriable


async def test_a_host_of_ones_own_builds_the_image_once_whatever_a_launch_waits(double: ModalDouble) -> None:
    provider = MODAL.sandbox.open_provider({}, Sandboxes(double).settings, client=double.client)
    double.wire.fail("ImageGetOrCreate", None, seconds=1.0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await provider.acquire("sesn_1")
    assert (await provider.acquire("sesn_1")).created
    assert (await provider.acquire("sesn_2")).created
    built = double.state.images[double.running()[0].definition.image_id]
    assert "RUN " + MODAL.module("image").CHECK in built.commands
    layers = [request.SerializeToString(deterministic=True) for request in double.wire.named("ImageGetOrCreate")]
    assert len(layers) == len(set(layers)), "a layer was built twice"


async def test_an_error_that_nobody_listed_is_not_hidden(sandboxes: Sandboxes) -> None:
    class Unheard(modal.exception.Error):
        pass

    async def raises(session_id: str) -> Any:
        raise Unheard

    sandboxes.provider._find = raises
    with pytest.raises(Unheard):
        await sandboxes.provider.acquire("sesn_1")


@pytest.mark.parametrize("session", ["", "x" * 65, "a/b", "ap-" + "a" * 22, "sesn 1"])
async def test_a_session_that_cannot_be_a_name_is_refused(sandboxes: Sandboxes, session: str) -> None:
    with pytest.raises(LaunchFailed, match="session id") as failed:
        await sandboxes.provider.acquire(session)
    assert not failed.value.retriable
    await sandboxes.provider.release(session)
    assert sandboxes.double.wire.named("VolumeRemoveFile2") == []


def test_the_pins_of_the_image_are_those_of_the_folder() -> None:
    pins = (MODAL.path / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{package}"' in pins for package in MODAL.module("image").PACKAGES)


def test_the_costs_in_the_readme_are_right(double: ModalDouble) -> None:
    readme = " ".join((MODAL.path / "README.md").read_text(encoding="utf-8").split())
    sandboxes = Sandboxes(double)
    own, shared = sandboxes.provider._own, sandboxes.settings
    seconds = 300 + shared.max_idle_seconds + shared.keep_warm_seconds
    cores, gib = own.cpu.request, own.memory_mb.request / 1024
    assert f"300 + 60 + 300 = {seconds:g} seconds: {seconds * cores:g} core-seconds" in readme
    assert f"and {seconds * gib:g} GiB-seconds" in readme
    assert f"`SANDBOX_KEEP_WARM_SECONDS=10` makes that {seconds - 290:g} seconds" in readme
    host = 1440 * (2 + MODAL.module("app").IDLE_SECONDS)
    assert f"1440 x 22 = {host} seconds a day" in readme
    assert f"{host * 0.125:g} core-seconds and {host * 0.125:g} GiB-seconds" in readme
