"""The Python core's own tests of the host, against the TypeScript core: one set of rules, two languages.

Every test of the modules below runs here with the TypeScript classes in the place of the Python ones, unless
`NOT_HERE` says why not; most of those have one of their own below. So a new test over there is a new test here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
from anthropic import AsyncAnthropic

from shared.healing import LATEST_PER_SWEEP, LOOKS_PER_HINT
from tests.providers.workers_dev import workspace
from tests.shared import leaks, test_dispatcher, test_handler, test_healing, test_secrets, test_webhook
from tests.shared import typescript_core as ts
from tests.shared.conftest import MakeDispatcher
from tests.shared.support import HEALABLE_SECONDS, Detour, FakeProvider, Gate, claim, count, polls, settings_for
from tests.shared.test_handler import host
from tests.shared.test_healing import finish, make_world, world
from tools.emulator import Emulator

__all__ = ["host", "make_world", "world"]  # fixtures, which take the ones below

FOLDER = "cloudflare-worker"  # any folder with the whole core
MODULES = (test_dispatcher, test_handler, test_healing, test_webhook)
ORDINARY = (
    "action=launched provider=p session=sesn_01AbC work=work_01 sandbox=sb-eye attempt=1 ms=12",
    'action=launch_failed reason="https://api.example.com/v1/x?page=2&limit=10 answered 503"',
    '{"event": "tool", "name": "bash", "ms": 12, "is_error": false}',
    "a task-ants nest",
)
_CLOSE = "A platform ends its Workers as it likes: there is nothing to close."
_FLEET = "Who launches tells the dispatcher what runs (`LiveSessions`), and its sandboxes go by themselves (alarms)."
NOT_HERE = {
    "test_a_hint_is_forgotten_after_some_looks_and_there_are_only_so_many": "It looks into the healer.",
    "test_a_launch_ends_before_its_item_is_offered_again": "It compares two constants of Python's.",
    "test_a_launch_that_hangs_is_cancelled_when_its_budget_is_spent": "No promise can be cancelled.",
    "test_an_error_that_no_table_maps_is_loud_and_its_launch_only": "It looks for Python's exceptions.",
    "test_the_sdk_alone_does_not_take_a_url_safe_key": "It is about Python's SDK.",
    "test_a_refused_key_says_what_to_check": "It opens Python's client.",
    "test_many_signals_make_one_drain": "Each signal is a message to the other process.",
    "test_drains_that_wait_for_one_another_all_end": "It is about asyncio.",
    "test_a_provider_tidies_up_at_the_end_of_a_sweep_and_cannot_hold_it_up": "No provider there has anything to tidy.",
    **dict.fromkeys(
        (
            "test_a_poll_does_not_wait_for_the_launches_and_close_does",
            "test_close_gives_back_what_is_under_way",
            "test_close_lets_a_launch_finish_within_its_grace",
            "test_after_close_nothing_is_asked",
            "test_close_gives_up_a_poll_that_hangs",
            "test_a_drain_whose_caller_is_cancelled_goes_on",
        ),
        _CLOSE,
    ),
    **dict.fromkeys(
        (
            "test_a_provider_that_does_not_say_what_runs_gets_no_more",
            "test_a_list_that_goes_on_failing_is_told_of_now_and_then",
            "test_and_gets_them_when_it_says_so_again",
            "test_an_unmapped_error_of_the_list_is_loud_even_when_nobody_waits",
            "test_the_sandboxes_of_working_runners_are_renewed_and_no_others",
            "test_a_renewal_that_fails_in_any_way_is_not_the_sweeps_end",
            "test_what_nobody_used_for_long_is_deleted_and_nothing_else",
            "test_a_sweep_deletes_only_so_many",
            "test_what_ran_when_it_was_listed_is_not_deleted_when_it_has_just_ended",
            "test_one_sandbox_that_cannot_be_deleted_keeps_no_other",
            "test_one_sandbox_that_is_never_deleted_holds_up_no_sweep",
            "test_nothing_is_deleted_while_the_api_does_not_say_what_is_wanted",
        ),
        _FLEET,
    ),
}


def _tests(module: ModuleType) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name.startswith("test_") and callable(value)}


globals().update({name: test for module in MODULES for name, test in _tests(module).items() if name not in NOT_HERE})


@pytest.fixture(scope="module")
def core() -> Iterator[ts.Core]:
    core = ts.Core(workspace(FOLDER))
    yield core
    core.close()


@pytest.fixture(autouse=True)
async def _in_its_place(core: ts.Core, detour: Detour, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """The TypeScript core's classes under the names that the tests call."""
    monkeypatch.setattr(test_healing, "Healer", lambda _client, settings: ts.Healer(core, settings))
    for module in (test_handler, test_webhook):
        monkeypatch.setattr(module, "Verifier", partial(ts.Verifier, core))
    monkeypatch.setattr(test_handler, "handle", ts.handle)
    monkeypatch.setattr(test_webhook, "normalise_key", lambda key: core.call("normaliseKey", key=key))
    async with core.attached(detour):
        yield


@pytest.fixture
def make_dispatcher(emulator: Emulator, core: ts.Core) -> MakeDispatcher:
    def make(
        provider: FakeProvider, *, on: Emulator = emulator, settings: dict[str, str] | None = None, **more: Any
    ) -> Any:
        return ts.Dispatcher(core, settings_for(on, **(settings or {})), provider, **more)

    return make


def test_what_is_not_run_here_exists_and_has_a_reason() -> None:
    there = {name for module in MODULES for name in _tests(module)}
    assert NOT_HERE.keys() <= there
    assert all(NOT_HERE.values())


# --- what is different in TypeScript ---------------------------------------------------------------------------------


async def test_signals_during_a_poll_make_one_more(emulator: Emulator, core: ts.Core, make_dispatcher: Any) -> None:
    dispatcher = make_dispatcher(FakeProvider())
    core.call("wake", of=dispatcher.name, times=100)
    await dispatcher.drain()
    assert polls(emulator) <= 2


@pytest.mark.parametrize(
    ("meanwhile", "is_stopped", "end", "stops", "state"),
    [
        ((), True, "stopping", 1, "stopped"),
        (("stop",), True, "stopping", 0, "stopped"),
        (("stop", "say"), False, "stopping", 0, "queued"),
        (("stop", "say", "claim"), False, "lost", 0, "active"),
    ],
)
async def test_a_stop_that_the_server_asked_for_ends_nothing_that_came_after(
    emulator: Emulator,
    core: ts.Core,
    client: AsyncAnthropic,
    meanwhile: tuple[str, ...],
    is_stopped: bool,
    end: str,
    stops: int,
    state: str,
) -> None:
    session = emulator.create_session()
    item = await client.beta.environments.work.poll(emulator.environment_id)
    assert item is not None
    lease = core.new()
    core.call("lease", of=lease, item=item.to_dict(mode="json"), environ=ts.environ_of(settings_for(emulator)))
    await core.ask("ack", of=lease)
    assert await core.ask("beat", of=lease)
    emulator.stop_work(session)
    assert not await core.ask("beat", of=lease)  # it knows
    for step in meanwhile:
        if step == "claim":
            await claim(client, emulator, session)
        else:
            _ = emulator.stop_work(session, force=True) if step == "stop" else emulator.say(session, "go on")
    assert await core.ask("stop", of=lease) is is_stopped
    assert core.call("leaseEnd", of=lease) == end
    assert count(emulator, "work.stop") == stops
    assert emulator.work(session)["state"] == state


async def test_a_launch_that_hangs_is_given_up_when_its_budget_is_spent(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    session = emulator.create_session()
    gate = Gate()
    await make_dispatcher(FakeProvider(gate), launch_seconds=0.2).drain()
    assert await gate.entered.get() == session
    assert "no runner was ready in time" in caplog.text
    assert emulator.work(session)["state"] == "queued"
    gate.opened.set()


async def test_an_error_that_nobody_expects_is_loud_and_its_launch_only(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    unlucky, lucky = emulator.create_session(), emulator.create_session()
    provider = FakeProvider()
    provider.broken[unlucky] = KeyError("sk-ant-oat01-x")
    await make_dispatcher(provider, settings={"SANDBOX_LAUNCH_CONCURRENCY": "1"}).drain()
    assert provider.started == [lucky]
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert f"action=launch_failed session={unlucky} work={unlucky} error=KeyError" in record.getMessage()
    assert "sk-ant" not in record.getMessage()


@pytest.mark.parametrize("wrong", ["ANTHROPIC_ENVIRONMENT_KEY", "ANTHROPIC_ENVIRONMENT_ID"])
async def test_a_key_that_is_refused_says_what_to_check(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    another, _ = emulator.create_environment()
    value = {"ANTHROPIC_ENVIRONMENT_KEY": "sk-ant-oat01-revoked", "ANTHROPIC_ENVIRONMENT_ID": another}[wrong]
    await make_dispatcher(FakeProvider(), settings={wrong: value}).drain()
    assert polls(emulator) == 1
    assert "check ANTHROPIC_ENVIRONMENT_KEY" in caplog.text
    assert "revoked" not in caplog.text


async def test_the_oldest_hints_make_room(world: Any, core: ts.Core) -> None:
    """As many as a healer keeps, and as often as it looks: the same numbers as Python's."""
    emulator = world.emulator
    named = finish(emulator)
    emulator.advance(HEALABLE_SECONDS)
    for _ in range(LATEST_PER_SWEEP + 10):
        finish(emulator)
    emulator.advance(HEALABLE_SECONDS)
    healer = ts.Healer(core, settings_for(emulator))
    for hints, looks in ((999, LOOKS_PER_HINT), (1000, 0)):
        healer.hint(named)
        for number in range(hints):
            healer.hint(f"sesn_{number}")
        first = []
        for _ in range(LOOKS_PER_HINT + 1):
            asked = len(emulator.requests)
            items = await healer.list_work()
            assert items is not None
            await healer.heal(items)
            paths = [each.path for each in emulator.requests[asked:] if each.operation == "events.list"]
            first.append(named in paths[0])
        assert first == [True] * looks + [False] * (LOOKS_PER_HINT + 1 - looks)


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_no_line_shows_a_secret(core: ts.Core) -> None:
    for secret in leaks.SHAPELESS.values():
        core.call("hide", secret=secret)
    shown = {}
    for name, (secret, text) in test_secrets.TEXTS.items():
        lines = [
            core.call(
                "line", action="launch_failed", values={"session": "sesn_01AbC", "reason": text, "sandbox": text}
            ),
            core.call("redact", text=text),
        ]
        if found := [piece for each in lines for piece in leaks.found(secret, each)]:
            shown[name] = found
        assert lines[0].startswith("action=launch_failed session=sesn_01AbC sandbox=")
    assert shown == {}


def test_a_runners_line_does_not_show_its_own_token_whatever_it_looks_like(
    core: ts.Core, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for write in leaks.WRITTEN.values():
        token = "a-token of no shape/7Hq2"
        core.call("runnerLine", session="sesn_1", token=token, values={"error": write(token), "attempt": 1})
        line = caplog.messages[-1]
        assert leaks.found(token, line) == []
        assert json.loads(line).keys() == {"event", "session", "error", "attempt"}


@pytest.mark.parametrize("text", ["it is true", *ORDINARY])
def test_an_ordinary_text_stays_as_it_is(core: ts.Core, text: str) -> None:
    core.call("hide", secret="true")
    assert core.call("redact", text=text) == text
