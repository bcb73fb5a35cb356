"""The real `vercel build` of this folder, run by Vercel's own Python runtime: from a signed webhook to a served
session, against the Sandbox double, with a real Redis behind Upstash's REST interface."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.clients.toolchains import INSTALL_SECONDS
from tests.fakes.upstash import Upstash, needs_redis
from tests.fakes.vercel import FakeVercel
from tests.fakes.vercel.api import TOKEN
from tests.providers.vercel_build import DURATION_SECONDS, Instance, Platform, built, config
from tests.providers.vercel_support import SNAPSHOT, VERCEL, needs_machines, start_vercel
from tests.world import RECLAIM_SECONDS
from tools.emulator import Emulator

pytestmark = [
    pytest.mark.timeout(INSTALL_SECONDS),  # the first run installs and builds
    needs_machines,
    needs_redis,
    # Instances are frozen and killed here, and what was connected to them may be collected unclosed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CRON_SECRET = "a-cron-secret"
PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module")
def build() -> Path:
    return built()


@dataclass
class Deployment:
    """The function with everything it talks to."""

    emulator: Emulator
    fake: FakeVercel
    upstash: Upstash
    platform: Platform
    start: Callable[[], Awaitable[object]]

    async def answer(self, session: str) -> str:
        await asyncio.to_thread(self.emulator.wait_idle, session, PATIENCE_SECONDS)
        return str(self.emulator.events(session, "agent.message")[-1]["content"][0]["text"])

    async def get(self, path: str, bearer: str = "guessed") -> httpx.Response:
        async with httpx.AsyncClient() as client:
            return await client.get(f"{self.platform.url}{path}", headers={"authorization": f"Bearer {bearer}"})

    def say(self, text: str, session: str | None = None) -> str:
        session = session or str(self.emulator.create_session())
        self.emulator.say(session, text)
        return session


@pytest.fixture
def services(tmp_path: Path) -> Iterator[tuple[Emulator, FakeVercel, Upstash, Platform]]:
    with (
        Emulator() as emulator,
        start_vercel(tmp_path / "vercel") as fake,
        Upstash(tmp_path / "redis") as upstash,
        Platform(TOKEN) as platform,
    ):
        yield emulator, fake, upstash, platform
        assert fake.refused == []


@pytest.fixture
async def deployment(
    build: Path, services: tuple[Emulator, FakeVercel, Upstash, Platform], tmp_path: Path
) -> AsyncIterator[Deployment]:
    emulator, fake, upstash, platform = services
    environ = {
        "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
        "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
        "ANTHROPIC_BASE_URL": emulator.url,
        "ANTHROPIC_WEBHOOK_SIGNING_KEY": emulator.webhook_key,
        "SANDBOX_MAX_IDLE_SECONDS": "1",
        "VERCEL_SNAPSHOT_ID": SNAPSHOT,
        "VERCEL_SANDBOX_API_URL": fake.url,
        "CRON_SECRET": CRON_SECRET,
        **upstash.environ(),
    }
    async with AsyncExitStack() as stack:

        async def start() -> Instance:
            directory = tmp_path / f"instance-{len(platform.instances)}"
            directory.mkdir()
            instance = Instance(build, directory, environ)
            await instance.start()
            stack.push_async_callback(instance.stop)
            platform.instances.insert(0, instance)
            return instance

        await start()
        yield Deployment(emulator, fake, upstash, platform, start)


def test_the_build_keeps_the_crons_the_duration_and_what_the_function_reads(build: Path) -> None:
    made = config(build)
    assert made["crons"] == [{"path": "/cron", "schedule": "* * * * *"}]
    assert (made["runtime"], made["maxDuration"]) == ("python3.12", DURATION_SECONDS)
    files = set(made["filePathMap"])
    vendored = {f"_shared/{path.name}" for path in (VERCEL.path / "_shared").glob("*.py")}
    modules = {path.name for path in VERCEL.path.glob("*.py")} - {"bake.py"}
    assert modules | {"uv.lock"} | vendored <= files
    assert not [name for name in files if name.startswith((".env", ".venv", ".git"))]


def test_the_hobby_plans_configuration_differs_in_the_schedule_only() -> None:
    every_minute, daily = (
        json.loads((VERCEL.path / name).read_text()) for name in ("vercel.json", "vercel.hobby.json")
    )
    assert daily.pop("crons") == [{"path": "/cron", "schedule": "0 4 * * *"}]
    del every_minute["crons"]
    assert daily == every_minute


async def test_a_signed_webhook_becomes_a_served_session_and_the_next_message_finds_its_sandbox(
    deployment: Deployment,
) -> None:
    emulator, fake = deployment.emulator, deployment.fake
    emulator.set_webhook_url(f"{deployment.platform.url}/webhook")
    session = deployment.say("!echo one > file.txt; cat file.txt; pwd; id -un")
    assert await deployment.answer(session) == "one\n/workspace\nagent"
    await asyncio.to_thread(emulator.wait_for, session, "stopped", PATIENCE_SECONDS)
    deployment.say("!cat file.txt", session)
    assert await deployment.answer(session) == "one"
    assert (len(fake.sandboxes), fake.boots) == (1, 1)
    assert all(delivery.is_ok for delivery in emulator.deliveries)
    # R11: what the job holds has reached Vercel on the runner's standard input only.
    secrets = [emulator.environment_key, "sk-ant-req-", "ANTHROPIC_WORK_SECRET", "sessions_token"]
    for sent in fake.requests:
        text = sent.body.decode(errors="replace") + sent.path
        text += base64.b64decode(json.loads(sent.body).get("data", "")).decode() if sent.operation == "stdin" else ""
        assert sent.operation == "stdin" or not [secret for secret in secrets if secret in text], sent
    assert emulator.environment_key not in str([sent.body for sent in fake.requests])
    said = deployment.platform.instances[0].said
    assert "action=launched provider=vercel" in said
    assert "action=runner" in said
    assert "sk-ant-" not in said


async def test_the_cron_recovers_a_lost_webhook(deployment: Deployment) -> None:
    session = deployment.say("!echo recovered")
    assert (await deployment.get("/cron")).status_code == 401
    assert (await deployment.get("/cron", CRON_SECRET)).status_code == 202
    assert await deployment.answer(session) == "recovered"


async def test_an_instance_that_is_frozen_right_after_its_answer_loses_nothing(deployment: Deployment) -> None:
    emulator, fake = deployment.emulator, deployment.fake
    frozen = deployment.platform.instances[0]
    fake.delays["create"] = 1.5
    emulator.set_webhook_url(f"{deployment.platform.url}/webhook")
    session = deployment.say("!echo served once >> file.txt; cat file.txt")
    await until(lambda: fake.count("create") == 1)
    await until(lambda: emulator.deliveries)
    assert emulator.deliveries[0].is_ok  # it was answered while the sandbox was made
    frozen.freeze()
    emulator.set_webhook_url(None)
    fake.delays.clear()
    await deployment.start()
    emulator.advance(RECLAIM_SECONDS)
    await until_served(deployment, session)
    assert await deployment.answer(session) == "served once"
    await asyncio.to_thread(emulator.wait_for, session, "stopped", PATIENCE_SECONDS)
    frozen.thaw()  # what it then does is harmless: the lease is another runner's, or the session is over
    deployment.say("!cat file.txt", session)
    await until_served(deployment, session)
    assert await deployment.answer(session) == "served once"
    assert len(fake.sandboxes) == 1


async def until_served(deployment: Deployment, session: str) -> None:
    """Sweeps as the cron does, but more often, until the turn is over."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not deployment.emulator.is_in(session, "idle"):
        assert time.monotonic() < deadline, "the session is not served"
        await deployment.get("/cron", CRON_SECRET)
        await asyncio.sleep(1.0)


async def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.02)
