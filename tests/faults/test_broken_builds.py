"""The suite is itself tested: builds with a known mistake are caught, and by the invariant that is there for it."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import anthropic
import pytest
from anthropic import AsyncAnthropic

from shared import dispatcher, runner_session, sandbox_runner
from shared.dispatcher import Dispatcher
from shared.fleet import Fleet
from shared.freeing import Freeing
from shared.healing import Healer
from shared.jobs import Job
from shared.launching import Launcher
from shared.runner_lease import LeaseMiddleware
from shared.runner_lock import Lock
from tests.faults.cloud import Cloud
from tests.faults.generate import EVERY_KILL, generate
from tests.faults.play import label, play
from tests.faults.steps import Schedule

SEEDS = 250  # a mistake that takes more schedules to show counts as not caught
Build = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def _replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as patches:
        for target, name, value in replacements:
            patches.enter_context(mock.patch.object(target, name, value))
        yield


async def _ack(api: AsyncAnthropic, work_id: str, environment_id: str) -> None:
    with contextlib.suppress(anthropic.APIError):
        await api.beta.environments.work.ack(work_id, environment_id=environment_id)


def early_ack() -> contextlib.AbstractContextManager[None]:
    """The dispatcher acks what it has polled, and then launches."""
    launch = Launcher.launch

    async def acked(self: Launcher, item: Any) -> bool:
        await _ack(self._client, item.id, item.environment_id)
        return await launch(self, item)

    return _replaced((Launcher, "launch", acked))


def tools_before_claim() -> contextlib.AbstractContextManager[None]:
    """The runner takes an ack for a claim; the SDK sends its first heartbeat beside the tools."""

    async def unclaimed(api: AsyncAnthropic, job: Any, lease: Any, **_options: Any) -> None:
        await _ack(api, job.work_id, job.environment_id)

    return _replaced((runner_session, "ack_and_claim", unclaimed))


def no_lock() -> contextlib.AbstractContextManager[None]:
    """Every newcomer believes that it is alone in its sandbox, and that an item handed out to it is its own."""

    async def always(_job: Any, lock: Lock) -> bool:
        lock.try_take()
        return True

    return _replaced((sandbox_runner, "take", always))


def unguarded_stop() -> contextlib.AbstractContextManager[None]:
    """The SDK's stop goes through, whatever the session waits for."""

    async def let_through(self: LeaseMiddleware, request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        self.stopped = response.status_code in (200, 204, 409)
        return response

    return _replaced((LeaseMiddleware, "_stop", let_through))


def heal_by_interrupt() -> contextlib.AbstractContextManager[None]:
    """A strand is ended with an interrupt, so that the agent never learns what was lost."""

    async def interrupt(self: Healer, item: Any) -> bool:
        if not await self._awaited(item.data.id):
            return False
        await self._client.beta.sessions.events.send(item.data.id, events=[{"type": "user.interrupt"}])
        return True

    return _replaced((Healer, "_heal", interrupt))


def planted_key() -> contextlib.AbstractContextManager[None]:
    """The job brings the environment key along."""
    from_item, to_stdin = Job.from_item, Job.to_stdin
    keys: dict[str, str] = {}

    def remembered(item: Any, settings: Any) -> Job:
        job = from_item(item, settings)
        keys[job.session_id] = settings.environment_key
        return job

    def with_key(self: Job) -> bytes:
        return to_stdin(self)[:-1] + f', "EXTRA": "{keys[self.session_id]}"}}'.encode()

    return _replaced((Job, "from_item", remembered), (Job, "to_stdin", with_key))


@contextlib.contextmanager
def key_in_the_environment() -> Iterator[None]:
    """What a sandbox is started with inherits the host's environment, environment key and all."""
    launch = Launcher.launch

    async def exported(self: Launcher, item: Any) -> bool:
        os.environ["ANTHROPIC_ENVIRONMENT_KEY"] = self._settings.environment_key
        return await launch(self, item)

    with _replaced((Launcher, "launch", exported)), mock.patch.dict(os.environ):
        yield


def no_freeing() -> contextlib.AbstractContextManager[None]:
    """An item that a server does not let go by itself is left to it."""
    return _replaced((Freeing, "is_due", lambda self, item, age: False))


def freeing_without_a_fence() -> contextlib.AbstractContextManager[None]:
    """A host stops what has not been beaten for a while without asking whether somebody beats it."""

    async def believed(self: Freeing, item: Any) -> bool:
        return True

    def soon(self: Freeing, item: Any, age: Callable[[Any], float]) -> bool:
        return item.state == "active" and age(item.latest_heartbeat_at) > 20.0

    return _replaced((Freeing, "_is_ours", believed), (Freeing, "is_due", soon))


def own_tools_unknown() -> contextlib.AbstractContextManager[None]:
    """The host takes the calls of our own custom tools for another client's."""
    init = Healer.__init__

    def forgetful(self: Healer, *arguments: Any) -> None:
        init(self, *arguments)
        self._own_tools = frozenset()

    return _replaced((Healer, "__init__", forgetful))


def no_healing() -> contextlib.AbstractContextManager[None]:
    """The sweep drains and cleans up, and heals nothing."""

    async def nothing(self: Healer, items: Any) -> int:
        return 0

    return _replaced((Healer, "heal", nothing))


def webhooks_only() -> contextlib.AbstractContextManager[None]:
    """Nothing sweeps: what a webhook does not tell is not known."""

    async def nothing(self: Dispatcher) -> None:
        return

    return _replaced((Dispatcher, "sweep", nothing))


def no_journal() -> contextlib.AbstractContextManager[None]:
    """What a runner before this one has begun is forgotten."""
    from shared.runner_journal import Journal

    return _replaced((Journal, "_read", lambda self: []))


def losers_kept() -> contextlib.AbstractContextManager[None]:
    """Whoever comes second with a new sandbox for a session leaves it there."""
    return _replaced((Cloud, "release_loser", lambda self, box: None))


def no_clean_up() -> contextlib.AbstractContextManager[None]:
    """Nobody releases a sandbox that nobody uses."""

    async def nothing(self: Fleet, *_arguments: Any) -> None:
        return

    return _replaced((Fleet, "clean_up", nothing))


def late_reclaim() -> contextlib.AbstractContextManager[None]:
    """What was handed out and not served is offered again, but only after ten minutes."""
    return _replaced((dispatcher, "RECLAIM_SECONDS", 600.0))


BUILDS: dict[Build, tuple[set[str], int | str | Schedule]] = {
    early_ack: ({"early ack"}, 0),
    tools_before_claim: ({"loser"}, 103),
    no_lock: ({"crowd"}, 30),
    unguarded_stop: ({"unguarded", "blind"}, 6),
    heal_by_interrupt: ({"interrupt"}, 6),
    planted_key: ({"planted"}, 0),
    key_in_the_environment: ({"planted"}, 0),
    no_freeing: ({"lost"}, 30),
    freeing_without_a_fence: ({"blind"}, 0),
    own_tools_unknown: ({"lost"}, 33),
    no_healing: ({"lost"}, 6),
    webhooks_only: ({"lost", "slow"}, 6),
    no_journal: ({"twice"}, "operator_stops_in_a_call"),
    losers_kept: ({"ownerless"}, 597),
    no_clean_up: ({"ownerless"}, 23),
    late_reclaim: ({"slow"}, EVERY_KILL[0].schedule(10)),
}
"""With the invariants that are there for it, and what breaks one, tried first: a seed, a kept schedule or another."""


def _schedule(name: int | str) -> Schedule:
    if isinstance(name, int):
        return generate(name)
    kept: Schedule = importlib.import_module(f"tests.faults.kept.{name}").SCHEDULE
    return kept


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_a_broken_build_is_caught(build: Build) -> None:
    expected, first = BUILDS[build]
    labels: set[str] = set()
    for each in (first, *range(SEEDS)):
        schedule = each if isinstance(each, Schedule) else _schedule(each)
        labels |= {label(violation) for violation in play(schedule, breakage=build).violations}
        if labels & expected:
            return
    pytest.fail(f"{SEEDS} schedules broke {labels or 'nothing'}")
