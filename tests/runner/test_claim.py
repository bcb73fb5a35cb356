"""R1: the order on the wire. R2: what a lost answer to the claim means."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anthropic
import pytest

from shared import runner_clock
from shared.runner_claim import ack_and_claim, beat, open_api
from shared.runner_events import EventLog
from shared.runner_job import EXIT_HANDED_OVER, EXIT_LEASE_LOST, EXIT_OK, parse_job
from shared.runner_lease import NO_HEARTBEAT, Lease, LeaseMiddleware
from tests.runner.proxy import Proxy
from tests.runner.support import in_process, job_values, operations, results, texts, until, wait_idle
from tools.emulator import Emulator, Switches


@pytest.fixture
def session_id(emulator: Emulator) -> str:
    """A session that wants one command run."""
    session_id = emulator.create_session()
    emulator.say(session_id, "!echo hello")
    return session_id


async def test_ack_then_one_claim_then_the_session(emulator: Emulator, session_id: str, tmp_path: Path) -> None:
    runner = await in_process(emulator, emulator.url, tmp_path)
    assert await runner.run() == (EXIT_OK, "the session is idle")
    done = operations(emulator)
    assert done[:2] == ["work.ack", "work.heartbeat"]
    assert done.index("sessions.get") in (2, 3)  # the SDK's own first beat runs beside it
    assert texts(emulator, session_id) == ["hello"]
    assert emulator.work(session_id)["state"] == "stopped"
    assert [line["event"] for line in runner.lines] == ["claimed", "tool"]


async def test_the_sdks_own_no_heartbeat_never_reaches_the_wire(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    await (await in_process(emulator, emulator.url, tmp_path)).run()
    beats = [record for record in emulator.requests if record.operation == "work.heartbeat"]
    assert [record.query["expected_last_heartbeat"] for record in beats].count(["NO_HEARTBEAT"]) == 1
    assert [record.status for record in beats] == [200, 200, 200]  # the claim, the SDK's, the fence before the stop


async def test_the_loser_of_the_claim_runs_nothing_and_stops_nothing(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    (tmp_path / "winner").mkdir()
    loser = await in_process(emulator, emulator.url, tmp_path)
    winner = await in_process(emulator, emulator.url, tmp_path / "winner", SANDBOX_MAX_IDLE_SECONDS="30")
    serving = winner.start()
    await wait_idle(emulator, session_id)
    assert await loser.run() == (EXIT_LEASE_LOST, "the claim was refused (412)")
    assert operations(emulator, "work.stop") == []
    assert results(emulator, session_id) == ["hello"]
    assert loser.lines == []
    winner.session.leave()
    await serving


@pytest.mark.parametrize("status", [409, 429, 500, 529])
async def test_an_ack_that_fails_decides_nothing(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path, status: int
) -> None:
    runner = await in_process(emulator, proxy.url, tmp_path)
    lost = proxy.lose("ack")  # acked all the same
    assert (await runner.run())[0] == EXIT_OK
    assert lost.times == 0

    emulator.say(session_id, "!echo more")
    runner = await in_process(emulator, proxy.url, tmp_path)
    proxy.spoil("ack", status)  # as a server does that has the ack of a runner which died before its claim
    assert (await runner.run())[0] == EXIT_OK
    assert texts(emulator, session_id) == ["hello", "more"]

    emulator.say(session_id, "!echo again")
    runner = await in_process(emulator, proxy.url, tmp_path)
    proxy.answer("ack", status)  # and here it was not, so the claim decides: the item is queued still
    assert (await runner.run())[0] == EXIT_LEASE_LOST
    assert emulator.work(session_id)["state"] == "queued"
    assert proxy.count("ack") == 3


@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize("operation", ["ack", "beat"])
async def test_a_refusal_ends_the_runner_without_a_stop(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path, operation: str, status: int
) -> None:
    runner = await in_process(emulator, proxy.url, tmp_path)
    proxy.answer(operation, status)
    what = "ack" if operation == "ack" else "claim"
    assert await runner.run() == (EXIT_LEASE_LOST, f"the {what} was refused ({status})")
    assert proxy.seen == (["ack"] if operation == "ack" else ["ack", "beat"])


async def test_a_claim_answered_with_stopping_ends_in_a_stop(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    runner = await in_process(emulator, proxy.url, tmp_path)
    stopping = {"last_heartbeat": "", "lease_extended": False, "state": "stopping", "ttl_seconds": 300}
    proxy.answer("beat", 200, body={"type": "work_heartbeat", **stopping})
    assert await runner.run() == (EXIT_OK, "stopped by the operator")
    assert proxy.seen == ["ack", "beat", "beat", "stop"]
    assert emulator.work(session_id)["state"] == "stopped"


async def test_a_claim_that_was_recorded_but_not_answered_is_ours_when_it_stands_still(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    runner = await in_process(emulator, proxy.url, tmp_path)
    proxy.lose("beat")
    assert await runner.run() == (EXIT_OK, "the session is idle")
    assert texts(emulator, session_id) == ["hello"]


@pytest.mark.parametrize("status", [None, 408, 409, 429])
async def test_a_claim_that_was_not_recorded_is_sent_again(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path, status: int | None
) -> None:
    runner = await in_process(emulator, proxy.url, tmp_path, settle_seconds=300)  # and without waiting
    _ = proxy.drop("beat") if status is None else proxy.answer("beat", status)
    assert await asyncio.wait_for(runner.run(), 60) == (EXIT_OK, "the session is idle")


@pytest.mark.parametrize("operation", ["ack", "beat", "list", "send", "stop"])
async def test_an_empty_answer_is_one_that_was_lost(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path, operation: str
) -> None:
    """The SDK fails on it with an error of the `json` module."""
    runner = await in_process(emulator, proxy.url, tmp_path)
    emptied = proxy.empty(operation)
    assert (await runner.run())[0] == EXIT_OK
    assert emptied.times == 0
    assert texts(emulator, session_id) == ["hello"]
    assert emulator.work(session_id)["state"] == "stopped"


async def test_an_unanswered_claim_is_another_runners_when_its_heartbeat_moves(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    runner = await in_process(emulator, proxy.url, tmp_path)
    winner, lease = parse_job(await job_values(emulator, emulator.url)), Lease(on_beat=lambda _: None)
    async with open_api(winner) as api:
        await ack_and_claim(api, winner, lease)
        proxy.drop("beat")  # the claim
        running = runner.start()
        await proxy.wait_count("beat", 2)  # and the first look
        looks_again = proxy.hold("beat")
        await looks_again.reached.wait()
        await beat(api, winner, str(lease.last_heartbeat))
        looks_again.released.set()
        reason = "the claim was not answered, and another runner beats the item"
        assert await running == (EXIT_LEASE_LOST, reason)
    assert operations(emulator, "work.stop") == []


async def test_a_control_plane_that_is_out_of_reach_is_not_asked_for_ever(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    runner = await in_process(emulator, proxy.url, tmp_path, settle_seconds=0.05)
    proxy.drop("ack")
    proxy.drop("beat", times=100)
    assert await runner.run() == (EXIT_LEASE_LOST, "the claim was not answered")
    assert emulator.work(session_id)["state"] == "queued"


async def test_sigterm_before_the_ack_asks_nothing(emulator: Emulator, proxy: Proxy, tmp_path: Path) -> None:
    emulator.create_session()
    runner = await in_process(emulator, proxy.url, tmp_path)
    runner.session.leave()
    assert (await runner.run())[0] == EXIT_HANDED_OVER
    assert proxy.seen == []


async def test_sigterm_while_the_claim_is_under_way_stops_what_it_claimed(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    runner = await in_process(emulator, proxy.url, tmp_path)
    held = proxy.hold("beat")
    running = runner.start()
    await held.reached.wait()
    runner.session.leave()
    held.released.set()
    assert (await running)[0] == EXIT_HANDED_OVER
    assert proxy.seen == ["ack", "beat", "beat", "stop"]
    assert emulator.work(session_id)["state"] == "stopped"
    assert results(emulator, session_id) == []


@contextlib.asynccontextmanager
async def claimed(
    emulator: Emulator, proxy: Proxy, now: Callable[[], float] = runner_clock.now
) -> AsyncIterator[tuple[Lease, Callable[[], Awaitable[Any]]]]:
    """A lease, and what sends the next beat of it as the SDK's worker would."""
    job, lease = parse_job(await job_values(emulator, proxy.url)), Lease(on_beat=lambda _: None, now=now)

    async def may_stop() -> bool:
        return False

    async with open_api(job) as api, open_api(job, LeaseMiddleware(lease, may_stop, EventLog())) as client:
        await ack_and_claim(api, job, lease)
        yield lease, lambda: beat(client, job, NO_HEARTBEAT)


@pytest.mark.parametrize("status", [None, 500, 503, 408])
async def test_a_beat_that_may_have_been_recorded_is_adopted_while_the_lease_lives(
    emulator: Emulator, proxy: Proxy, session_id: str, status: int | None
) -> None:
    async with claimed(emulator, proxy) as (lease, next_beat):
        _ = proxy.lose("beat") if status is None else proxy.spoil("beat", status)
        with pytest.raises(anthropic.APIError):
            await next_beat()
        assert (await next_beat()).state == "active"
        assert (await next_beat()).lease_extended
    beats = [record.status for record in emulator.requests if record.operation == "work.heartbeat"]
    assert beats == [200, 200, 412, 200]
    assert not lease.lost.is_set()


async def test_an_adopted_beat_counts_from_when_it_was_sent(emulator: Emulator, proxy: Proxy, session_id: str) -> None:
    time = 0.0
    async with claimed(emulator, proxy, now=lambda: time) as (lease, next_beat):
        for _ in range(2):
            proxy.lose("beat")
            with pytest.raises(anthropic.APIError):
                await next_beat()
            time += 10.0
        await next_beat()
        assert lease.age_seconds == 20.0


@pytest.mark.parametrize(
    ("is_in_doubt", "state", "age", "is_lost"),
    [(True, "active", 299, False), (True, "active", 300, True), (True, "queued", 1, True), (False, "active", 1, True)],
)
async def test_only_a_doubt_adopts_what_the_server_has_from_an_active_item_while_our_lease_lives(
    emulator: Emulator, proxy: Proxy, session_id: str, is_in_doubt: bool, state: str, age: float, is_lost: bool
) -> None:
    time = 0.0
    async with claimed(emulator, proxy, now=lambda: time) as (lease, next_beat):
        if is_in_doubt:
            proxy.drop("beat")
            with pytest.raises(anthropic.APIError):
                await next_beat()
        time = age
        current = {"state": state, "last_heartbeat": "somebody's", "lease_extended": False, "ttl_seconds": 300}
        proxy.answer("beat", 412, body={"type": "error", "error": {"details": {"current_state": current}}})
        with contextlib.suppress(anthropic.APIStatusError):
            await next_beat()
        assert lease.lost.is_set() is is_lost


@pytest.mark.parametrize("status", [408, 409, 429])
async def test_a_beat_that_is_put_off_is_no_lost_lease(
    emulator: Emulator, proxy: Proxy, session_id: str, status: int
) -> None:
    async with claimed(emulator, proxy) as (lease, next_beat):
        proxy.answer("beat", status)
        with pytest.raises(anthropic.APIStatusError):
            await next_beat()
        assert not lease.lost.is_set()
        assert (await next_beat()).lease_extended


async def test_a_beat_counts_from_when_it_was_sent(emulator: Emulator, proxy: Proxy, session_id: str) -> None:
    time = 0.0
    async with claimed(emulator, proxy, now=lambda: time) as (lease, next_beat):
        held = proxy.hold("beat")
        beating = asyncio.ensure_future(next_beat())
        await held.reached.wait()
        time = 5.0
        held.released.set()
        await beating
        assert lease.age_seconds == 5.0


@pytest.mark.parametrize("switches", [Switches(lease_lapse="requeue")])
async def test_a_412_without_a_doubt_is_a_lost_lease(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    """The lease was given to another runner; our next request is the fence before the stop."""
    runner = await in_process(emulator, proxy.url, tmp_path)
    start = proxy.hold("session")  # the SDK's own
    running = runner.start()
    await start.reached.wait()
    look = proxy.hold("session")  # the guard's before the stop
    start.released.set()
    await look.reached.wait()
    emulator.advance(400)
    look.released.set()
    assert await running == (EXIT_LEASE_LOST, "the lease was lost")
    assert emulator.work(session_id)["state"] == "queued"
    assert operations(emulator, "work.stop") == []


@pytest.mark.parametrize("switches", [Switches(lease_lapse="requeue")])
async def test_a_lost_beat_is_not_adopted_when_the_item_was_queued_again(
    emulator: Emulator, proxy: Proxy, session_id: str
) -> None:
    async with claimed(emulator, proxy) as (lease, next_beat):
        proxy.lose("beat")
        with pytest.raises(anthropic.APIError):
            await next_beat()
        emulator.advance(400)
        with pytest.raises(anthropic.APIStatusError):
            await next_beat()
        assert lease.lost.is_set()


@pytest.mark.parametrize("lease_ttl", [2.0])
async def test_a_lease_without_an_answer_for_its_whole_time_is_lost(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    """R5: by the runner's own clock. The SDK, which has seen no answer of its own, would wait for 90 s."""
    runner = await in_process(emulator, proxy.url, tmp_path, SANDBOX_MAX_IDLE_SECONDS="30")
    proxy.hold("beat").released.set()  # the claim passes
    proxy.drop("beat", times=1000)
    assert await runner.run() == (EXIT_LEASE_LOST, "the lease was lost")
    assert operations(emulator, "work.stop") == []
    assert proxy.count("session") == 1  # it does not ask whether it may stop: the next one waits


@pytest.mark.parametrize("switches", [Switches(lease_lapse="requeue")])
async def test_a_runner_that_is_told_to_leave_does_not_stop_what_another_one_serves(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    """Also where nothing is compared, because that one is to stop."""
    first = await in_process(emulator, proxy.url, tmp_path, SANDBOX_MAX_IDLE_SECONDS="30")
    running = first.start()
    await wait_idle(emulator, session_id)
    emulator.advance(400)
    job = parse_job(await job_values(emulator, emulator.url))
    async with open_api(job) as api:
        await ack_and_claim(api, job, Lease(on_beat=lambda _: None))
    emulator.stop_work(session_id)
    first.session.leave()
    assert await running == (EXIT_LEASE_LOST, "the lease was lost")
    assert proxy.count("stop") == 0


@pytest.mark.parametrize("status", [401, 404])
async def test_a_refused_beat_is_a_lost_lease(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path, status: int
) -> None:
    """The SDK stops the item on it; we cannot know whose it is (P10)."""
    runner = await in_process(emulator, proxy.url, tmp_path)
    answered = proxy.hold("send")
    running = runner.start()
    await answered.reached.wait()
    proxy.answer("beat", status, times=1000)
    answered.released.set()
    assert await running == (EXIT_LEASE_LOST, "the lease was lost")
    assert operations(emulator, "work.stop") == []


async def test_another_runners_item_is_not_stopped_because_it_is_stopping(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    """While an item is stopping the server compares nothing, so a claim is answered 200 whoever sends it."""
    (tmp_path / "winner").mkdir()
    loser = await in_process(emulator, proxy.url, tmp_path)
    winner = await in_process(emulator, emulator.url, tmp_path / "winner", SANDBOX_MAX_IDLE_SECONDS="30")
    serving = winner.start()
    await wait_idle(emulator, session_id)
    emulator.stop_work(session_id)
    assert await loser.run() == (EXIT_LEASE_LOST, "the item is another runner's, and about to be stopped")
    assert proxy.seen == ["ack", "beat"]
    winner.session.leave()
    await serving


@pytest.mark.parametrize("switches", [Switches(lease_lapse="requeue")])
@pytest.mark.parametrize("is_stopping", [False, True])
async def test_a_lease_that_went_to_another_runner_is_neither_adopted_nor_stopped(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path, is_stopping: bool
) -> None:
    (tmp_path / "next").mkdir()
    first = await in_process(emulator, proxy.url, tmp_path, SANDBOX_MAX_IDLE_SECONDS="5")
    running = first.start()
    await wait_idle(emulator, session_id)
    emulator.advance(400)
    second = await in_process(emulator, emulator.url, tmp_path / "next", SANDBOX_MAX_IDLE_SECONDS="30")
    serving = second.start()
    await until(emulator, lambda: emulator.work(session_id)["state"] == "active")
    if is_stopping:
        emulator.stop_work(session_id)
    assert await running == (EXIT_LEASE_LOST, "the lease was lost")
    assert proxy.count("stop") == 0
    second.session.leave()
    await serving
