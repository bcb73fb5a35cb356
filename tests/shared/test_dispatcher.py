"""The dispatcher against the emulator: reserve, launch, never ack, and give back what is not launched (P8, R7, R8).

Nothing here starts a runner: the provider is a fake, and what a runner would do next is not the dispatcher's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import httpx2
import pytest
from anthropic import AsyncAnthropic

from shared.dispatcher import RECLAIM_SECONDS as WINDOW
from shared.dispatcher import Dispatcher, open_client
from shared.errors import LaunchFailed
from shared.fleet import RELEASES_PER_SWEEP, Fleet
from shared.launching import LAUNCH_SECONDS
from shared.provider import SandboxInfo, Started
from tests.shared.conftest import MakeDispatcher
from tests.shared.support import (
    READY,
    RECLAIM_SECONDS,
    Detour,
    FakeProvider,
    Gate,
    HangingList,
    claim,
    count,
    failed,
    polls,
    settings_for,
)
from tools.emulator import Emulator, Switches

SLOTS = "SANDBOX_LAUNCH_CONCURRENCY"


def handed_out(emulator: Emulator) -> int:
    pending: int = emulator.stats()["pending"]
    return pending


def info(session: str, *, running: bool = True, idle_seconds: float = 0) -> SandboxInfo:
    used = time.time() - idle_seconds
    return SandboxInfo(session, f"box-{session}", used, used, running)


async def settle(client: AsyncAnthropic, emulator: Emulator) -> None:
    """A few round trips: what the dispatcher was about to ask, it has asked."""
    for _ in range(5):
        await client.beta.environments.work.stats(emulator.environment_id)


# --- drain -----------------------------------------------------------------------------------------------------------


async def test_every_item_is_launched_and_none_is_acked(emulator: Emulator, make_dispatcher: MakeDispatcher) -> None:
    sessions = [emulator.create_session() for _ in range(4)]
    provider = FakeProvider()
    await make_dispatcher(provider).drain()
    assert sorted(provider.started) == sorted(sessions)
    assert {emulator.work(session)["state"] for session in sessions} == {"queued"}
    assert count(emulator, "work.ack") == count(emulator, "work.stop") == 0


async def test_every_poll_asks_for_one_reclaim_window(emulator: Emulator, make_dispatcher: MakeDispatcher) -> None:
    emulator.create_session()
    await make_dispatcher(FakeProvider()).drain()
    records = [record for record in emulator.requests if record.operation == "work.poll"]
    assert [record.query["reclaim_older_than_ms"] for record in records] == [[f"{WINDOW * 1000:.0f}"]] * 2
    assert len({record.worker_id for record in records}) == 1
    assert records[0].worker_id is not None


async def test_an_item_is_not_launched_twice_within_its_window(
    emulator: Emulator, make_dispatcher: MakeDispatcher
) -> None:
    emulator.create_session()
    provider = FakeProvider()
    dispatcher = make_dispatcher(provider)
    await dispatcher.drain()
    emulator.advance(WINDOW - 5)
    await dispatcher.drain()
    assert len(provider.started) == 1
    emulator.advance(6)
    await dispatcher.drain()
    assert len(provider.started) == 2


async def test_a_signal_after_the_last_empty_poll_makes_one_more(
    emulator: Emulator, detour: Detour, make_dispatcher: MakeDispatcher
) -> None:
    provider = FakeProvider()
    dispatcher = make_dispatcher(provider)
    late: list[str] = []

    def work_arrives(request: httpx2.Request, _: httpx2.Response) -> None:
        if not late:  # the queue has said that it is empty, and the drain does not know it yet
            late.append(emulator.create_session())
            dispatcher.wake()

    detour.changes.append(work_arrives)
    await dispatcher.drain()
    assert provider.started == late


async def test_many_signals_make_one_drain(emulator: Emulator, make_dispatcher: MakeDispatcher) -> None:
    dispatcher = make_dispatcher(FakeProvider())
    for _ in range(100):
        dispatcher.wake()
    await dispatcher.drain()
    assert polls(emulator) == 1


async def test_drains_that_wait_for_one_another_all_end(emulator: Emulator, make_dispatcher: MakeDispatcher) -> None:
    """The first waiter of a drain that ended may have begun the next one before the second waiter looks."""
    dispatcher = make_dispatcher(FakeProvider())

    async def twice() -> None:
        await dispatcher.drain()
        await dispatcher.drain()

    await asyncio.gather(*(twice() for _ in range(5)))


async def test_a_poll_does_not_wait_for_the_launches_and_close_does(
    emulator: Emulator, make_dispatcher: MakeDispatcher
) -> None:
    emulator.create_session()
    gate = Gate()
    dispatcher = make_dispatcher(FakeProvider(gate))
    await dispatcher.poll()
    await gate.entered.get()
    closing = asyncio.create_task(dispatcher.close(30))
    gate.opened.set()
    await closing
    assert gate.inside == 0
    assert polls(emulator) == 2  # the item, and an empty queue


async def test_launches_run_side_by_side(emulator: Emulator, make_dispatcher: MakeDispatcher) -> None:
    sessions = [emulator.create_session() for _ in range(6)]
    gate = Gate()
    dispatcher = make_dispatcher(FakeProvider(gate))
    dispatcher.wake()
    assert {await gate.entered.get() for _ in sessions} == set(sessions)  # all of them, and none has ended
    gate.opened.set()
    await dispatcher.drain()


async def test_with_all_slots_busy_nothing_more_is_reserved(
    emulator: Emulator, client: AsyncAnthropic, make_dispatcher: MakeDispatcher
) -> None:
    sessions = [emulator.create_session() for _ in range(5)]
    gate = Gate()
    provider = FakeProvider(gate)
    dispatcher = make_dispatcher(provider, settings={SLOTS: "2"})
    dispatcher.wake()
    for _ in range(2):
        await gate.entered.get()
    await settle(client, emulator)
    assert (handed_out(emulator), polls(emulator)) == (2, 2)
    gate.opened.set()
    await dispatcher.drain()
    assert provider.started == sessions  # first come, first served
    assert gate.most_inside == 2


async def test_an_item_handed_out_again_during_its_launch_is_launched_once(
    emulator: Emulator, make_dispatcher: MakeDispatcher
) -> None:
    session = emulator.create_session()
    gate = Gate()
    provider = FakeProvider(gate)
    dispatcher = make_dispatcher(provider, settings={SLOTS: "2"})
    dispatcher.wake()
    await gate.entered.get()
    emulator.advance(RECLAIM_SECONDS)
    other = emulator.create_session()
    dispatcher.wake()
    assert await gate.entered.get() == other  # the slot that the repeated item took is free again
    gate.opened.set()
    await dispatcher.drain()
    assert provider.started == [session, other]


# --- items that cannot be launched -----------------------------------------------------------------------------------


def _elsewhere(item: dict[str, Any]) -> None:
    item["environment_id"] = "env_another"


def _malformed(item: dict[str, Any]) -> None:
    item["data"]["id"] = "../../etc"


def _no_string(item: dict[str, Any]) -> None:
    item["data"]["id"] = {"a": [1]}


def _no_data(item: dict[str, Any]) -> None:
    item["data"] = None


def _no_secret(item: dict[str, Any]) -> None:
    item["secret"] = None


def _undecodable(item: dict[str, Any]) -> None:
    item["secret"] = "this-is-not-base64-json"


def _new_kind(item: dict[str, Any]) -> None:
    item["data"]["type"] = "invented_tomorrow"


REFUSED = [_elsewhere, _malformed, _no_string, _no_data, _new_kind, _no_secret, _undecodable]


async def test_bad_items_delay_no_other_and_are_left_alone(
    emulator: Emulator, detour: Detour, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [emulator.create_session() for _ in REFUSED]
    good = emulator.create_session()
    for session, change in zip(bad, REFUSED, strict=True):
        detour.change_item(session, change)
    provider = FakeProvider()
    await make_dispatcher(provider, settings={SLOTS: "1"}).drain()
    assert provider.started == [good]
    assert count(emulator, "work.ack") == count(emulator, "work.stop") == 0
    refusals = [record for record in caplog.records if "action=refused" in record.getMessage()]
    assert {record.levelno for record in refusals} == {logging.ERROR}
    assert len(refusals) == len(REFUSED)


async def test_a_healthcheck_is_stopped_and_never_launched(
    emulator: Emulator, make_dispatcher: MakeDispatcher, client: AsyncAnthropic
) -> None:
    check = emulator.add_healthcheck()["id"]
    good = emulator.create_session()
    provider = FakeProvider()
    dispatcher = make_dispatcher(provider)
    await dispatcher.drain()
    assert provider.started == [good]
    items = await client.beta.environments.work.list(emulator.environment_id)
    assert {item.id: item.state for item in items.data} == {check: "stopped", good: "queued"}
    emulator.advance(RECLAIM_SECONDS)
    await dispatcher.sweep()  # and is no session to heal


async def test_a_healthcheck_in_its_other_spelling(
    emulator: Emulator, detour: Detour, make_dispatcher: MakeDispatcher
) -> None:
    check, good = emulator.create_session(), emulator.create_session()
    detour.change_item(check, lambda item: item["data"].update(type="health_check"))
    provider = FakeProvider()
    await make_dispatcher(provider).drain()
    assert provider.started == [good]
    assert emulator.work(check)["state"] == "stopped"
    assert emulator.work(good)["state"] == "queued"


async def test_a_healthcheck_that_cannot_be_stopped_is_only_logged(
    emulator: Emulator, detour: Detour, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    check = emulator.create_session()
    detour.change_item(check, lambda item: item["data"].update(type="healthcheck"))
    detour.changes.append(
        lambda request, _: httpx2.Response(403, json={}) if request.url.path.endswith("/ack") else None
    )
    await make_dispatcher(FakeProvider()).drain()
    assert "action=healthcheck" in caplog.text


async def test_the_key_goes_into_a_sandbox_only_when_the_operator_says_so(make_dispatcher: MakeDispatcher) -> None:
    with Emulator(switches=Switches(secret="null")) as emulator:
        emulator.create_session()
        careful, bold = FakeProvider(), FakeProvider()
        await make_dispatcher(careful, on=emulator).drain()
        assert careful.jobs == []
        emulator.advance(RECLAIM_SECONDS)
        await make_dispatcher(bold, on=emulator, settings={"ALLOW_ENVIRONMENT_KEY_IN_SANDBOX": "true"}).drain()
        (job,) = bold.jobs
        assert job["ANTHROPIC_ENVIRONMENT_KEY"] == emulator.environment_key
        assert "ANTHROPIC_WORK_SECRET" not in job


async def test_a_sandbox_gets_the_token_and_not_the_key(make_dispatcher: MakeDispatcher) -> None:
    with Emulator(switches=Switches(secret="extra_keys")) as emulator:
        emulator.create_session()
        provider = FakeProvider()
        await make_dispatcher(provider, on=emulator, settings={"ALLOW_ENVIRONMENT_KEY_IN_SANDBOX": "true"}).drain()
        assert "ANTHROPIC_WORK_SECRET" in provider.jobs[0]
        assert emulator.environment_key not in json.dumps(provider.jobs)


# --- launches that fail ----------------------------------------------------------------------------------------------


class Flaky:
    """A `start` that fails so many times first."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.left = error, times

    async def __call__(self, _job: dict[str, str]) -> Started:
        if self.left:
            self.left -= 1
            raise self.error
        return READY


async def test_a_retriable_failure_is_retried(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    session = emulator.create_session()
    provider = FakeProvider(Flaky(failed(), times=3))
    await make_dispatcher(provider, retry_pauses=(0.0,)).drain()
    assert provider.started == [session] * 4
    assert caplog.text.count("action=launch_failed") == 3
    assert (
        f"action=launched provider=fake session={session} work={session} sandbox=box-{session} attempt=4" in caplog.text
    )


@pytest.mark.parametrize("retriable", [True, False])
async def test_a_failed_launch_leaves_the_item_to_be_served_later(
    emulator: Emulator, make_dispatcher: MakeDispatcher, retriable: bool
) -> None:
    session = emulator.create_session()
    provider = FakeProvider(Flaky(failed(retriable=retriable), times=10**9))
    dispatcher = make_dispatcher(provider, launch_seconds=4.0, retry_pauses=(0.05,))
    await dispatcher.drain()
    assert (len(provider.started) > 1) is retriable
    assert emulator.work(session)["state"] == "queued"
    assert count(emulator, "work.ack") == count(emulator, "work.stop") == 0
    provider.start = Gate()
    provider.start.opened.set()
    provider.jobs.clear()
    emulator.advance(RECLAIM_SECONDS)
    await dispatcher.drain()
    assert provider.started == [session]


async def test_a_launch_that_hangs_is_cancelled_when_its_budget_is_spent(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    session = emulator.create_session()
    gate = Gate()
    await make_dispatcher(FakeProvider(gate), launch_seconds=0.2).drain()
    assert await gate.entered.get() == session
    assert gate.inside == 0
    assert "no runner was ready in time" in caplog.text
    assert emulator.work(session)["state"] == "queued"


def test_a_launch_ends_before_its_item_is_offered_again() -> None:
    assert LAUNCH_SECONDS < WINDOW


@pytest.mark.parametrize("error", [KeyError("sk-ant-oat01-x"), TimeoutError(), OSError("vendor"), RuntimeError()])
async def test_an_error_that_no_table_maps_is_loud_and_its_launch_only(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    unlucky, lucky = emulator.create_session(), emulator.create_session()
    provider = FakeProvider()
    provider.broken[unlucky] = error
    await make_dispatcher(provider, settings={SLOTS: "1"}).drain()
    assert provider.started == [lucky]
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert f"action=launch_failed session={unlucky} work={unlucky} error={type(error).__name__}" in record.getMessage()
    assert "sk-ant" not in record.getMessage()


async def test_a_runner_that_is_not_needed_is_a_success(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    emulator.create_session()

    async def served(_job: dict[str, str]) -> Started:
        return Started("not_needed")

    await make_dispatcher(FakeProvider(served)).drain()
    assert "action=served_already" in caplog.text


# --- a control plane that does not answer as hoped --------------------------------------------------------------------


async def test_a_burst_of_server_errors_is_outlived(
    emulator: Emulator, detour: Detour, make_dispatcher: MakeDispatcher
) -> None:
    detour.answer_polls(httpx2.Response(503), httpx2.Response(500))
    provider = FakeProvider()
    dispatcher = make_dispatcher(provider, retry_pauses=(0.0,))
    first, second = emulator.create_session(), emulator.create_session()
    emulator.create_session()
    await dispatcher.drain()
    assert len(provider.started) == 1  # two answers with an item were lost: those wait for their window
    emulator.advance(RECLAIM_SECONDS)
    await dispatcher.drain()
    assert {first, second} <= set(provider.started)


@pytest.mark.parametrize(
    ("answer", "asked"),
    [
        (httpx2.Response(429, headers={"retry-after": "30"}), 1),
        (httpx2.Response(503), 3),
        (httpx2.Response(200, json={}), 1),
        (httpx2.Response(204), 1),
        (httpx2.Response(200, text="<html>", headers={"content-type": "text/html"}), 3),
        (httpx2.Response(200, content=b"", headers={"content-type": "application/json"}), 3),
        (httpx2.Response(200, json=[1]), 1),
    ],
    ids=["429", "503", "no id", "204", "a page", "no JSON", "a list"],
)
async def test_a_poll_without_a_usable_answer_ends_the_drain(
    emulator: Emulator, detour: Detour, make_dispatcher: MakeDispatcher, answer: httpx2.Response, asked: int
) -> None:
    detour.changes.append(lambda request, _: answer if request.url.path.endswith("/work/poll") else None)
    provider = FakeProvider()
    dispatcher = make_dispatcher(provider, retry_pauses=(0.0,))
    await dispatcher.drain()
    assert polls(emulator) == asked
    detour.changes.clear()
    session = emulator.create_session()
    await dispatcher.drain()
    assert provider.started == [session]


async def test_a_drain_ends_however_much_there_is_to_do(
    emulator: Emulator, detour: Detour, make_dispatcher: MakeDispatcher
) -> None:
    session = emulator.create_session()
    handed_out: list[httpx2.Response] = []

    def endless(request: httpx2.Request, response: httpx2.Response) -> httpx2.Response | None:
        if not request.url.path.endswith("/work/poll"):
            return None
        handed_out.append(response)
        return httpx2.Response(200, json=handed_out[0].json())

    detour.changes.append(endless)
    provider = FakeProvider()
    await asyncio.wait_for(make_dispatcher(provider, drain_seconds=0.2).drain(), 60)
    assert session in provider.started


async def test_an_item_whose_hand_out_was_lost_is_launched_in_the_next_window(
    emulator: Emulator, make_dispatcher: MakeDispatcher
) -> None:
    session = emulator.create_session()
    emulator.fault("work.poll", "lose_response")
    provider = FakeProvider()
    dispatcher = make_dispatcher(provider, retry_pauses=(0.0,))
    await dispatcher.drain()
    assert provider.started == []
    emulator.advance(RECLAIM_SECONDS)
    await dispatcher.drain()
    assert provider.started == [session]


@pytest.mark.parametrize("wrong", ["ANTHROPIC_ENVIRONMENT_KEY", "ANTHROPIC_ENVIRONMENT_ID"])
async def test_a_refused_key_says_what_to_check(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    another, _ = emulator.create_environment()
    value = {"ANTHROPIC_ENVIRONMENT_KEY": "sk-ant-oat01-revoked", "ANTHROPIC_ENVIRONMENT_ID": another}[wrong]
    settings = settings_for(emulator, **{wrong: value})
    dispatcher = Dispatcher(client=open_client(settings), settings=settings, provider=FakeProvider())
    await dispatcher.drain()
    await dispatcher.close(0)
    assert polls(emulator) == 1
    assert "check ANTHROPIC_ENVIRONMENT_KEY" in caplog.text
    assert "revoked" not in caplog.text


# --- SANDBOX_MAX_LIVE ------------------------------------------------------------------------------------------------


async def test_no_more_sandboxes_run_than_allowed(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = [emulator.create_session() for _ in range(4)]
    provider = FakeProvider()
    provider.infos = [info("sesn_before"), info("sesn_asleep", running=False)]
    dispatcher = make_dispatcher(provider, settings={"SANDBOX_MAX_LIVE": "3"})
    await dispatcher.drain()
    await dispatcher.drain()
    assert provider.started == sessions[:2]
    assert handed_out(emulator) == 2  # what waits, waits in the queue
    assert caplog.text.count("action=full") == 1


async def test_a_sandbox_is_counted_once_while_it_is_launched_and_after(
    emulator: Emulator, make_dispatcher: MakeDispatcher
) -> None:
    provider = FakeProvider()

    async def appears(job: dict[str, str]) -> Started:
        provider.infos.append(info(job["ANTHROPIC_SESSION_ID"]))
        return READY

    provider.start = appears
    sessions = [emulator.create_session() for _ in range(2)]
    dispatcher = make_dispatcher(provider, settings={"SANDBOX_MAX_LIVE": "2"})
    await dispatcher.sweep()
    await dispatcher.sweep()
    assert provider.started == sessions


async def test_a_session_whose_sandbox_runs_already_takes_no_second_place(
    emulator: Emulator, make_dispatcher: MakeDispatcher
) -> None:
    first, second = emulator.create_session(), emulator.create_session()
    provider = FakeProvider()
    provider.infos = [info(first)]
    await make_dispatcher(provider, settings={"SANDBOX_MAX_LIVE": "2"}).drain()
    assert provider.started == [first, second]


@pytest.mark.parametrize("make_provider", [FakeProvider, HangingList], ids=["fails", "hangs"])
async def test_a_provider_that_does_not_say_what_runs_gets_no_more(
    emulator: Emulator,
    make_dispatcher: MakeDispatcher,
    make_provider: type[FakeProvider],
    caplog: pytest.LogCaptureFixture,
) -> None:
    provider = make_provider()
    provider.broken["sandboxes"] = failed()
    emulator.create_session()
    dispatcher = make_dispatcher(provider, call_seconds=0.1)
    await dispatcher.sweep()
    assert (provider.started, polls(emulator)) == ([], 0)
    assert "action=list" in caplog.text


async def test_a_list_that_goes_on_failing_is_told_of_now_and_then(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    provider = FakeProvider()

    async def lines_of(fleet: Fleet, *troubles: LaunchFailed | None) -> int:
        caplog.clear()
        for trouble in troubles:
            provider.broken = {"sandboxes": trouble} if trouble else {}
            assert (await fleet.list() is None) == (trouble is not None)
        return caplog.text.count("action=list")

    down, slow = LaunchFailed("it is down", retriable=True), LaunchFailed("it is slow", retriable=True)
    patient, loud = (
        Fleet(provider, make_dispatcher(provider)._settings, repeat_seconds=seconds) for seconds in (60, 0)
    )
    assert await lines_of(patient, down, down, down) == 1
    assert await lines_of(patient, down, slow, slow) == 1  # another trouble
    assert await lines_of(patient, slow, None, slow) == 1  # the same one again, after it was over
    assert await lines_of(loud, down, down, down) == 3


async def test_and_gets_them_when_it_says_so_again(emulator: Emulator, make_dispatcher: MakeDispatcher) -> None:
    session = emulator.create_session()
    provider = FakeProvider()
    provider.broken["sandboxes"] = failed()
    dispatcher = make_dispatcher(provider)
    await dispatcher.drain()
    provider.broken.clear()
    await dispatcher.drain()
    assert provider.started == [session]


async def test_an_unmapped_error_of_the_list_is_loud_even_when_nobody_waits(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    session = emulator.create_session()
    provider = FakeProvider()
    provider.broken["sandboxes"] = KeyError("new in the vendor's SDK")
    dispatcher = make_dispatcher(provider)
    dispatcher.wake()
    with pytest.raises(KeyError):
        await dispatcher.drain()
    assert "action=drain error=KeyError" in caplog.text
    provider.broken.clear()
    await dispatcher.drain()
    assert provider.started == [session]


# --- sweep: renew and clean up ---------------------------------------------------------------------------------------


async def test_the_sandboxes_of_working_runners_are_renewed_and_no_others(
    emulator: Emulator, client: AsyncAnthropic, make_dispatcher: MakeDispatcher
) -> None:
    working, other, gone = (emulator.create_session() for _ in range(3))
    provider = FakeProvider()
    dispatcher = make_dispatcher(provider)
    await dispatcher.drain()
    await claim(client, emulator, working)
    await claim(client, emulator, gone)
    provider.infos = [info(working), info(other), info(gone, running=False), info("sesn_old")]
    await dispatcher.sweep()
    assert provider.renewed == [f"box-{working}"]


async def test_a_renewal_that_fails_in_any_way_is_not_the_sweeps_end(
    emulator: Emulator, client: AsyncAnthropic, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = [emulator.create_session() for _ in range(3)]
    provider = FakeProvider()
    dispatcher = make_dispatcher(provider)
    await dispatcher.drain()
    for session in sessions:
        await claim(client, emulator, session)
    provider.infos = [info(session) for session in sessions]
    provider.broken = {f"box-{sessions[0]}": failed(), f"box-{sessions[1]}": KeyError("unmapped")}
    await dispatcher.sweep()
    assert provider.renewed == [f"box-{sessions[2]}"]
    assert "action=renew provider=fake" in caplog.text
    assert "action=sweep error=KeyError" in caplog.text


async def test_what_nobody_used_for_long_is_deleted_and_nothing_else(
    emulator: Emulator, client: AsyncAnthropic, make_dispatcher: MakeDispatcher
) -> None:
    wanted, working = emulator.create_session(), emulator.create_session()
    provider = FakeProvider()
    provider.broken[wanted] = failed(retriable=False)  # so it stays queued
    dispatcher = make_dispatcher(provider, settings={"SANDBOX_RETENTION_SECONDS": "3600"})
    await dispatcher.drain()
    await claim(client, emulator, working)
    provider.infos = [
        info("sesn_old", running=False, idle_seconds=3700),
        info("sesn_fresh", running=False, idle_seconds=3500),
        info("sesn_running", running=True, idle_seconds=3700),
        info(wanted, running=False, idle_seconds=3700),
        info(working, running=False, idle_seconds=3700),
    ]
    await dispatcher.sweep()
    assert provider.released == ["box-sesn_old"]


async def test_what_ran_when_it_was_listed_is_not_deleted_when_it_has_just_ended(emulator: Emulator) -> None:
    provider = FakeProvider()
    provider.infos = [info("sesn_running", running=True, idle_seconds=10**7)]
    fleet = Fleet(provider, settings_for(emulator))
    listed = await fleet.list()
    assert listed is not None
    provider.infos = []
    await fleet.list()  # of a drain in the same sweep
    await fleet.clean_up([], listed, ())
    assert provider.released == []


async def test_a_sweep_deletes_only_so_many(emulator: Emulator) -> None:
    provider = FakeProvider()
    provider.infos = [info(f"sesn_{n}", running=False, idle_seconds=10**7) for n in range(RELEASES_PER_SWEEP + 1)]
    fleet = Fleet(provider, settings_for(emulator))
    await fleet.clean_up([], await fleet.list() or [], ())
    assert len(provider.released) == RELEASES_PER_SWEEP


async def test_one_sandbox_that_cannot_be_deleted_keeps_no_other(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    provider = FakeProvider()
    provider.infos = [info(f"sesn_{n}", running=False, idle_seconds=10**7) for n in range(4)]
    provider.broken = {"box-sesn_0": failed(), "box-sesn_1": KeyError("unmapped")}
    await make_dispatcher(provider).sweep()
    assert provider.released == ["box-sesn_2", "box-sesn_3"]
    assert "action=released session=sesn_2 sandbox=box-sesn_2" in caplog.text


class HangingRelease(FakeProvider):
    """A provider that never says that its first sandbox is deleted."""

    async def release(self, sandbox_id: str) -> None:
        if sandbox_id == self.infos[0].sandbox_id:
            await asyncio.Event().wait()
        await super().release(sandbox_id)


async def test_one_sandbox_that_is_never_deleted_holds_up_no_sweep(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    provider = HangingRelease()
    provider.infos = [info(f"sesn_{n}", running=False, idle_seconds=10**7) for n in range(2)]
    await make_dispatcher(provider, call_seconds=0.1).sweep()
    assert provider.released == ["box-sesn_1"]
    assert "action=release provider=fake session=sesn_0" in caplog.text
    assert "no answer in time" in caplog.text


async def test_nothing_is_deleted_while_the_api_does_not_say_what_is_wanted(
    emulator: Emulator, detour: Detour, make_dispatcher: MakeDispatcher
) -> None:
    provider = FakeProvider()
    provider.infos = [info("sesn_old", running=False, idle_seconds=10**7)]
    dispatcher = make_dispatcher(provider)
    detour.changes.append(
        lambda request, _: httpx2.Response(403, json={}) if request.url.path.endswith("/work") else None
    )
    await dispatcher.sweep()
    assert provider.released == []


async def test_a_provider_tidies_up_at_the_end_of_a_sweep_and_cannot_hold_it_up(
    emulator: Emulator, make_dispatcher: MakeDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    class Tidy(FakeProvider):
        async def tidy(self) -> None:
            self.seen = (list(self.started), list(self.released))
            self._check("tidy")
            await asyncio.Event().wait()

    session = emulator.create_session()
    emulator.say(session, "!true")
    provider = Tidy()
    provider.infos = [info("sesn_old", running=False, idle_seconds=10**7)]
    dispatcher = make_dispatcher(provider, call_seconds=0.2)
    await dispatcher.sweep()
    assert provider.seen == ([session], ["box-sesn_old"])
    assert "action=tidy provider=fake error=TimeoutError" in caplog.text
    provider.broken["tidy"] = failed()
    await dispatcher.sweep()
    assert "action=tidy provider=fake error=LaunchFailed" in caplog.text


# --- close -----------------------------------------------------------------------------------------------------------


async def test_close_gives_back_what_is_under_way(
    emulator: Emulator, client: AsyncAnthropic, make_dispatcher: MakeDispatcher
) -> None:
    session, queued = emulator.create_session(), emulator.create_session()
    gate = Gate()
    dispatcher = make_dispatcher(FakeProvider(gate), settings={SLOTS: "1"})
    waiting = asyncio.create_task(dispatcher.drain())
    await gate.entered.get()
    await dispatcher.close(0)
    await waiting
    assert gate.inside == 0
    await settle(client, emulator)
    assert polls(emulator) == 1  # the slot that came free was not filled again
    assert {emulator.work(each)["state"] for each in (session, queued)} == {"queued"}


async def test_close_lets_a_launch_finish_within_its_grace(emulator: Emulator, make_dispatcher: MakeDispatcher) -> None:
    emulator.create_session()
    emulator.create_session()
    gate = Gate()
    provider = FakeProvider(gate)
    dispatcher = make_dispatcher(provider, settings={SLOTS: "1"})
    dispatcher.wake()
    await gate.entered.get()
    closing = asyncio.create_task(dispatcher.close(30))
    await asyncio.sleep(0)
    dispatcher.wake()
    gate.opened.set()
    await closing
    assert (len(provider.started), polls(emulator)) == (1, 1)


async def test_after_close_nothing_is_asked(emulator: Emulator, make_dispatcher: MakeDispatcher) -> None:
    emulator.create_session()
    provider = FakeProvider()
    dispatcher = make_dispatcher(provider)
    await dispatcher.close(0)
    dispatcher.wake()
    await dispatcher.drain()
    assert polls(emulator) == provider.listed == 0


async def test_close_gives_up_a_poll_that_hangs(make_dispatcher: MakeDispatcher, emulator: Emulator) -> None:
    asked = asyncio.Event()

    async def never_answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        asked.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(never_answers, "127.0.0.1")
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        settings = settings_for(emulator, ANTHROPIC_BASE_URL=url)
        dispatcher = Dispatcher(client=open_client(settings), settings=settings, provider=FakeProvider())
        draining = asyncio.create_task(dispatcher.drain())
        await asked.wait()
        await dispatcher.close(0)
        await draining


async def test_a_drain_whose_caller_is_cancelled_goes_on(emulator: Emulator, make_dispatcher: MakeDispatcher) -> None:
    session = emulator.create_session()
    gate = Gate()
    provider = FakeProvider(gate)
    dispatcher = make_dispatcher(provider)
    caller = asyncio.create_task(dispatcher.drain())
    await gate.entered.get()
    caller.cancel()
    await asyncio.wait([caller])
    gate.opened.set()
    await dispatcher.drain()
    assert provider.started == [session]
