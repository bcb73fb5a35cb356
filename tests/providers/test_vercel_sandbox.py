"""What goes wrong between this provider and Vercel, with the real SDK against the double."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vercel import FakeVercel
from tests.fakes.vercel.machine import children
from tests.providers.vercel_support import IMAGE, SNAPSHOT, VERCEL, make_provider, needs_machines, start_vercel
from tests.runner.support import is_alive
from tests.world import PATIENCE_SECONDS, World
from tools.emulator import Emulator

SANDBOX, ERRORS, SHARED = VERCEL.sandbox, VERCEL.shared("errors"), VERCEL.shared("provider")
SESSION = "sesn_1"

pytestmark = needs_machines


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeVercel]:
    with start_vercel(tmp_path / "vercel", max_timeout_ms=1_000_000) as fake:
        yield fake
        assert fake.refused == []


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


@pytest.fixture
async def world(emulator: Emulator, fake: FakeVercel, tmp_path: Path) -> AsyncIterator[World]:
    def provider(root: Path, settings: Any, **options: Any) -> Any:
        return make_provider(fake, settings, **options)

    world = World(emulator, VERCEL, provider, tmp_path)
    yield world
    await world.close()


async def run(provider: Any, session_id: str, *argv: str) -> str:
    """What a command of root's prints in the session's sandbox."""
    sandbox = await provider.acquire(session_id)
    done = await sandbox._sandbox.run_process(argv[0], argv[1:], sudo=True, capture_output=True)
    return str(done.stdout)


class TestAcquire:
    async def test_a_name_that_another_instance_was_faster_with_is_found(self, world: World, fake: FakeVercel) -> None:
        one, other = world.host().provider, world.host().provider
        first = await one.acquire(SESSION)
        # The other one looked before it was made, and creates too late.
        fake.fail("get", 404, "not_found", times=2)
        second = await other.acquire(SESSION)
        assert (second.id, second.created) == (first.id, False)
        assert fake.count("create") == 2

    async def test_a_stopped_sandbox_is_resumed_with_its_files(self, world: World, fake: FakeVercel) -> None:
        provider = world.host().provider
        await run(provider, SESSION, "touch", "/workspace/kept")
        fake.end_session((await provider.acquire(SESSION)).id)
        assert await run(provider, SESSION, "ls", "/workspace") == "kept\n"
        assert fake.boots == 2

    async def test_one_whose_snapshot_has_expired_is_made_anew(
        self, world: World, fake: FakeVercel, caplog: pytest.LogCaptureFixture
    ) -> None:
        provider = world.host().provider
        await run(provider, SESSION, "touch", "/workspace/lost")
        fake.lose_snapshot((await provider.acquire(SESSION)).id)
        again = await provider.acquire(SESSION)
        assert again.created
        assert await run(provider, SESSION, "ls", "/workspace") == ""
        assert "action=expired" in caplog.text

    async def test_a_snapshot_that_is_not_there_is_no_crash(self, world: World, fake: FakeVercel) -> None:
        provider = world.host(options={"snapshot_id": "snap_deleted"}).provider
        with pytest.raises(ERRORS.LaunchFailed, match="VERCEL_SNAPSHOT_ID names a snapshot that does not") as caught:
            await provider.acquire(SESSION)
        assert not caught.value.retriable

    async def test_what_vercel_makes_no_sandbox_for_names_the_settings(self, world: World, fake: FakeVercel) -> None:
        provider = world.host(options={"sandbox_seconds": 7200.0}).provider  # the plan's is 1000
        with pytest.raises(ERRORS.LaunchFailed, match=r"VERCEL_SANDBOX_SECONDS .*\(400 bad_request\)") as caught:
            await provider.acquire(SESSION)
        assert not caught.value.retriable

    @pytest.mark.parametrize("days", ["3649.5", "100000000000"])
    async def test_files_that_are_kept_for_ever_are_kept_as_long_as_vercel_does(
        self, world: World, fake: FakeVercel, days: str
    ) -> None:
        provider = world.host(SANDBOX_RETENTION_SECONDS=str(float(days) * 86400)).provider
        await provider.acquire(SESSION)
        (create,) = (json.loads(sent.body) for sent in fake.requests if sent.operation == "create")
        assert create["snapshotExpiration"] == 3650 * 86_400_000

    async def test_it_has_time_for_a_launch_and_more_than_once(self, world: World, fake: FakeVercel) -> None:
        provider = world.host(options={"sandbox_seconds": 400.0}).provider
        sandbox = await provider.acquire(SESSION)
        session = fake.sandboxes[sandbox.id].current
        session.started_at -= 200_000
        began = time.monotonic()
        await provider.acquire(SESSION)
        assert session.left_ms / 1000 < 403
        assert session.left_ms / 1000 + (time.monotonic() - began) >= 400

    @pytest.mark.parametrize("stop_seconds", [0.0, 1.0])
    async def test_one_at_the_plans_limit_hands_over_and_starts_anew_with_its_files(
        self, world: World, fake: FakeVercel, stop_seconds: float
    ) -> None:
        fake.stop_seconds = stop_seconds
        provider = world.host(options={"sandbox_seconds": 400.0}).provider
        await run(provider, SESSION, "touch", "/workspace/kept")
        sandbox = await provider.acquire(SESSION)
        old = fake.sandboxes[sandbox.id].current
        old.started_at -= 900_000
        old.timeout_ms = fake.max_timeout_ms
        assert await run(provider, SESSION, "ls", "/workspace") == "kept\n"
        assert old.status == "stopped"
        assert fake.sandboxes[sandbox.id].current.left_ms / 1000 > 300

    async def test_a_message_for_a_sandbox_that_is_stopping_is_served_as_soon_as_it_has_stopped(
        self, world: World, fake: FakeVercel
    ) -> None:
        host = world.host()
        session = world.emulator.create_session()
        sandbox = await host.provider.acquire(session)
        fake.stop_seconds = 1.0
        await sandbox._sandbox.stop()
        assert await host.ask(session, "!echo served") == "served"  # without another poll
        assert fake.boots == 2

    @pytest.mark.parametrize("code", ["sandbox_stopping", "sandbox_snapshotting"])
    @pytest.mark.parametrize("operation", ["get", "extend", "exec"])
    async def test_a_stop_that_comes_between_two_calls_is_no_refusal(
        self, world: World, fake: FakeVercel, operation: str, code: str
    ) -> None:
        provider = world.host(options={"sandbox_seconds": 400.0}).provider
        sandbox = await provider.acquire(SESSION)
        fake.sandboxes[sandbox.id].current.started_at -= 100_000  # so that it is extended
        fake.fail(operation, 422, code, times=2)  # the SDK tries twice
        with pytest.raises(ERRORS.LaunchFailed, match="just stopping") as caught:
            await provider.acquire(SESSION)
        assert caught.value.retriable

    async def test_a_stop_that_takes_very_long_is_left_to_the_next_attempt(
        self, world: World, fake: FakeVercel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(SANDBOX, "STOP_SECONDS", 0.0)
        sandbox = await world.host().provider.acquire(SESSION)
        fake.stop_seconds = 60.0
        with pytest.raises(ERRORS.LaunchFailed, match="just stopping") as caught:
            await SANDBOX._stop(sandbox._sandbox)
        assert caught.value.retriable

    async def test_what_is_allowed_on_the_network_is_the_api_and_the_setting(
        self, world: World, fake: FakeVercel
    ) -> None:
        def allowed(name: str) -> list[str]:
            policy = fake.sandboxes[name].current.network_policy
            assert policy is not None
            return sorted(policy["allow"])

        sandbox = await world.host(options={"allowed_hosts": ()}).provider.acquire(SESSION)
        assert allowed(sandbox.id) == ["127.0.0.1"]
        await world.host(options={"allowed_hosts": ("*.example.com",)}).provider.acquire(SESSION)  # a later deployment
        assert allowed(sandbox.id) == ["*.example.com", "127.0.0.1"]
        assert fake.sandboxes[sandbox.id].network_policy == fake.sandboxes[sandbox.id].current.network_policy

    async def test_a_sandbox_of_an_older_deployment_gets_the_newer_runner_with_nothing_of_the_agents_alive(
        self, world: World, fake: FakeVercel
    ) -> None:
        provider = world.host(options={"allowed_hosts": ()}).provider
        sandbox = await provider.acquire(SESSION)
        disk = fake.sandboxes[sandbox.id].disk
        (disk / IMAGE.program[1:]).parent.rename(disk / "opt/sandboxes/runner-older")
        left = ["--reuid", "agent", "--regid", "agent", "--clear-groups", "--", "sleep", "600"]
        await sandbox._sandbox.create_process("/usr/bin/setpriv", left, sudo=True)
        (sleep,) = fake.running_commands(sandbox.id)
        await until(lambda: [name_of(pid) for pid in children(sleep.process.pid)] == ["sleep"])  # the agent's by now
        dead: list[bool] = []
        fake.fail("policy", then=lambda: dead.append(ends(sleep.process.pid)))
        again = await provider.acquire(SESSION)
        assert dead == [True]  # before the network was opened
        assert not again.created
        assert (disk / IMAGE.program[1:]).is_file()
        policies = [json.loads(sent.body) for sent in fake.requests if sent.operation == "policy"]
        assert policies == [{"mode": "allow-all"}, {"allow": {"127.0.0.1": []}}]  # open to install, closed at the end

    async def test_environments_of_one_project_do_not_meet(self, fake: FakeVercel, world: World) -> None:
        ours = world.host().provider
        theirs = world.host(ANTHROPIC_ENVIRONMENT_ID="env_other").provider
        one, other = await ours.acquire(SESSION), await theirs.acquire(SESSION)
        assert one.id != other.id
        assert [info.sandbox_id async for info in ours.sandboxes()] == [one.id]

    async def test_a_long_list_is_read_to_its_end(self, world: World, fake: FakeVercel) -> None:
        provider = world.host().provider
        await asyncio.gather(*(provider.acquire(f"sesn_{number}") for number in range(25)))
        assert len([info async for info in provider.sandboxes()]) == 25


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "retriable"),
        [(400, False), (401, False), (402, False), (403, False), (409, True), (422, False), (429, True), (503, True)],
    )
    async def test_an_answer_of_vercels_says_whether_to_try_again(
        self, world: World, fake: FakeVercel, status: int, retriable: bool
    ) -> None:
        fake.fail("get", status, "some_code")
        with pytest.raises(ERRORS.LaunchFailed, match=str(status)) as caught:
            await world.host().provider.acquire(SESSION)
        assert caught.value.retriable == retriable
        assert f"({status} some_code)" in str(caught.value)

    async def test_what_is_no_code_is_not_repeated(self, world: World, fake: FakeVercel) -> None:
        fake.fail("get", 403, "sk-ant-oat01-hush")
        with pytest.raises(ERRORS.LaunchFailed, match=r"\(403\)$"):
            await world.host().provider.acquire(SESSION)

    async def test_an_answer_that_no_table_lists_is_a_bug(self, world: World, fake: FakeVercel) -> None:
        fake.fail("get", 418)
        with pytest.raises(Exception, match="418") as caught:
            await world.host().provider.acquire(SESSION)
        assert type(caught.value).__name__ == "SandboxApiError"

    async def test_a_connection_that_ends_is_tried_again(self, world: World, fake: FakeVercel) -> None:
        fake.fail("create", hang_up=True)
        host = world.host()
        session = world.emulator.create_session()
        assert await host.ask(session, "!echo served") == "served"

    async def test_a_create_whose_answer_is_lost_makes_no_second_sandbox(self, world: World, fake: FakeVercel) -> None:
        fake.fail("create", hang_up=True, after=True)
        host = world.host()
        session = world.emulator.create_session()
        assert await host.ask(session, "!echo served") == "served"
        assert len(fake.sandboxes) == 1

    async def test_without_credentials_it_says_so(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("VERCEL_TOKEN", "VERCEL_OIDC_TOKEN"):
            monkeypatch.delenv(name, raising=False)  # the SDK's own look at the environment
        settings = world.host().provider._settings
        provider = SANDBOX.open_provider({"VERCEL_SNAPSHOT_ID": SNAPSHOT}, settings)
        with pytest.raises(ERRORS.LaunchFailed, match="no Vercel credentials") as caught:
            await provider.acquire(SESSION)
        assert not caught.value.retriable
        await provider.close()


class TestStart:
    async def test_a_sandbox_that_stops_just_before_the_exec_is_resumed_and_serves(
        self, world: World, fake: FakeVercel
    ) -> None:
        host = world.host()
        session = world.emulator.create_session()
        sandbox = await host.provider.acquire(session)
        stopping = fake.sandboxes[sandbox.id].current
        fake.fail("exec", times=1)  # the probe of the next acquire passes
        fake.fail("exec", then=stopping.end)  # the exec finds it stopped: 410
        assert await host.ask(session, "!echo served") == "served"
        assert fake.boots == 2

    async def test_one_that_stops_before_the_job_is_told_is_started_again(self, world: World, fake: FakeVercel) -> None:
        host = world.host()
        session = world.emulator.create_session()
        sandbox = await host.provider.acquire(session)
        fake.fail("stdin", then=fake.sandboxes[sandbox.id].current.end)
        assert await host.ask(session, "!echo served") == "served"
        assert len(fake.sandboxes) == 1

    async def test_a_job_whose_confirmation_is_lost_reaches_one_runner_once(
        self, world: World, fake: FakeVercel
    ) -> None:
        host = world.host()
        session = world.emulator.create_session()
        await host.provider.acquire(session)
        fake.fail("stdin", hang_up=True, after=True)
        assert await host.ask(session, "!echo served") == "served"
        assert host.claims() == 1

    async def test_a_runner_that_does_not_get_its_job_is_not_left(self, world: World, fake: FakeVercel) -> None:
        provider = world.host().provider
        sandbox = await provider.acquire(SESSION)
        fake.fail("stdin", 500, times=100)
        with pytest.raises(ERRORS.LaunchFailed, match="the job did not reach the runner"):
            await sandbox.start(SHARED.Launch(stdin=b"{}"))
        await until(lambda: not fake.running_commands(sandbox.id))

    async def test_files_arrive_as_the_agents_below_its_directory(self, world: World, fake: FakeVercel) -> None:
        provider = world.host().provider
        sandbox = await provider.acquire(SESSION)
        launch = SHARED.Launch(stdin=b"{}", files={"notes/one.txt": b"content"})
        with pytest.raises(ERRORS.LaunchFailed, match="exited with 64"):  # the job is none
            await sandbox.start(launch)
        assert await run(provider, SESSION, "cat", "/workspace/notes/one.txt") == "content"
        assert await run(provider, SESSION, "stat", "-c", "%U", "/workspace/notes/one.txt") == "agent\n"

    async def test_what_the_runner_says_first_is_in_the_log_and_in_its_tail(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        host = world.host()
        session = world.emulator.create_session()
        await host.ask(session, "!true")
        assert "action=runner provider=vercel" in caplog.text
        assert '{\\"event\\": \\"ready\\"}' in caplog.text
        await host.until_stopped(session)
        sandbox = await host.provider.acquire(session)
        assert '"event": "claimed"' in await sandbox.tail(10)

    async def test_the_agent_can_become_nobody_else(self, world: World) -> None:
        host = world.host()
        session = world.emulator.create_session()
        looked = await host.ask(
            session, "!id -un; grep NoNewPrivs /proc/self/status; touch /opt/sandboxes/x 2>&1; ls -ld /opt/sandboxes/*/"
        )
        assert "agent\n" in looked
        assert "NoNewPrivs:\t1" in looked
        assert "touch: cannot touch" in looked


class TestTime:
    async def test_a_sweep_extends_a_sandbox_while_a_runner_works(self, world: World, fake: FakeVercel) -> None:
        host = world.host()
        session = world.emulator.create_session()
        world.emulator.say(session, "!sleep 60")
        await host.dispatcher.drain()
        await host.until_called(session)
        (sandbox,) = fake.sandboxes.values()
        sandbox.current.started_at -= 250_000
        began = time.monotonic()
        await host.dispatcher.sweep()
        assert sandbox.current.left_ms / 1000 + (time.monotonic() - began) >= 300

    async def test_at_the_plans_limit_the_runner_hands_over_and_the_session_goes_on(
        self, world: World, fake: FakeVercel
    ) -> None:
        host = world.host()
        session = world.emulator.create_session()
        world.emulator.say(session, "!touch file.txt; sleep 60\n!echo went on")
        await host.dispatcher.drain()
        (sandbox,) = fake.sandboxes.values()
        await until((sandbox.disk / "workspace/file.txt").exists)
        old = sandbox.current
        old.started_at -= 900_000
        old.timeout_ms = fake.max_timeout_ms  # 100 seconds are left, and no more can be had
        await host.dispatcher.sweep()
        await host.until(lambda: host.results(session))
        assert "may have taken effect" in host.results(session)[0][1]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not world.emulator.is_in(session, "idle") and time.monotonic() < deadline:
            await host.dispatcher.sweep()
            await asyncio.sleep(0.2)
        assert host.said(session) == "went on"
        assert old.status == "stopped"
        assert len(fake.sandboxes) == 1

    async def test_an_unused_sandbox_is_stopped_and_one_with_a_runner_is_not(
        self, world: World, fake: FakeVercel
    ) -> None:
        host = world.host(SANDBOX_KEEP_WARM_SECONDS="100")
        session = world.emulator.create_session()
        world.emulator.say(session, "!sleep 60")
        await host.dispatcher.drain()
        await host.until_called(session)
        idle = await host.provider.acquire("sesn_idle")
        for sandbox in fake.sandboxes.values():
            sandbox.current.started_at -= 150_000
        await host.dispatcher.sweep()
        running = {info.session_id async for info in host.provider.sandboxes() if info.running}
        assert running == {session}
        assert fake.sandboxes[idle.id].current.status == "stopped"

    async def test_a_list_stops_nothing(self, world: World, fake: FakeVercel) -> None:
        provider = world.host(SANDBOX_KEEP_WARM_SECONDS="100").provider
        sandbox = await provider.acquire(SESSION)
        fake.sandboxes[sandbox.id].current.started_at -= 150_000
        assert [info.running async for info in provider.sandboxes()] == [True]
        assert fake.count("stop") == 0


class TestInjection:
    async def test_the_token_goes_to_the_firewall_and_not_to_the_sandbox(
        self, world: World, fake: FakeVercel, emulator: Emulator
    ) -> None:
        provider = world.host(options={"inject_credential": True}).provider
        sandbox = await provider.acquire(SESSION)
        job = {f"ANTHROPIC_{name}_ID": f"{name.lower()}_1" for name in ("SESSION", "ENVIRONMENT", "WORK")}
        secret = "eyJzZXNzaW9uc190b2tlbiI6ICJ0aGUtdG9rZW4ifQ=="  # {"sessions_token": "the-token"}
        stdin = await provider.firewall.brief(
            sandbox._sandbox, json.dumps(job | {"ANTHROPIC_WORK_SECRET": secret}).encode()
        )
        assert VERCEL.shared("runner_job").sessions_token(json.loads(stdin)["ANTHROPIC_WORK_SECRET"]) != "the-token"
        policy = fake.sandboxes[sandbox.id].current.network_policy
        assert policy is not None
        (rule,) = policy["allow"]["127.0.0.1"]
        assert rule["transform"] == [{"headers": {"authorization": "Bearer the-token"}}]
        pattern = rule["match"]["path"]["regex"]
        allowed = [
            "/v1/sessions/session_1",
            "/v1/sessions/session_1/events",
            "/v1/environments/environment_1/work/work_1/ack",
        ]
        refused = [
            "/v1/sessions/session_12",
            "/v1/sessions",
            "/v1/environments/environment_1/work/poll",
            "/v1/messages",
        ]
        assert [path for path in allowed + refused if re.search(pattern, path)] == allowed
        # Without the setting, the next deployment takes the rule away again.
        await world.host().provider.acquire(SESSION)
        policy = fake.sandboxes[sandbox.id].current.network_policy
        assert policy is not None
        assert policy["allow"]["127.0.0.1"] == []


def name_of(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def ends(parent: int) -> bool:
    """Whether its child is dead or dies of a signal already sent: the product waits for an answer meanwhile."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while lives := any(map(is_alive, children(parent))):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return not lives


async def until(true: Any) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.02)
