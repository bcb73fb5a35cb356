"""Many sessions cost no more, each, than a few: streams, the queue, and the benchmark in small."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from tools import bench
from tools.emulator import Clock, Emulator, Switches
from tools.emulator.engine import Engine
from tools.emulator.state.work import WorkQueue

LARGEST_GROWTH = 2.0
"""On a machine that runs other tests beside. Before the queue had its indexes this was above 3."""


def engine() -> Engine:
    return Engine(Clock(), Switches(), timedelta(seconds=300), lambda *_: None)


async def test_what_concerns_one_session_wakes_no_other() -> None:
    it = engine()
    it.open(asyncio.get_running_loop())
    with it.listen("sesn_a") as a, it.listen("sesn_b") as b, it.listen() as everything:
        with it.transact():
            it.world.stirred["sesn_a"] = None
            it.world.changes += 1
        await asyncio.wait_for(a.wait(), 1)
        await asyncio.wait_for(everything.wait(), 1)
        assert not b.is_set()
        it.clock.advance(1)
        await asyncio.wait_for(b.wait(), 1)


async def test_a_listener_that_left_is_forgotten() -> None:
    it = engine()
    with it.listen("sesn_a"), it.listen("sesn_a"), it.listen():
        pass
    assert it._listeners == {}


def test_workers_that_poll_no_more_are_forgotten() -> None:
    clock = Clock()
    queue = WorkQueue("env_1", Switches(), timedelta(seconds=300), clock.now())
    for worker in range(50):
        queue.note_poll(f"worker {worker}", clock.now())
        clock.advance(9)
    assert list(queue.workers(clock.now())) == ["worker 47", "worker 48", "worker 49"]
    assert len(queue._polled) <= 5


def test_an_item_that_is_gone_is_neither_handed_out_nor_lapses() -> None:
    emulator = Emulator()
    kept, gone, claimed = (emulator.create_session() for _ in range(3))
    emulator.claim_and_die(claimed)
    emulator.delete_session(gone)
    emulator.delete_session(claimed)
    emulator.advance(400)
    item = emulator._world.hand_out(emulator.environment_id, timedelta(seconds=5), emulator.now())
    assert item is not None
    assert item.session_id == kept
    assert emulator._world.hand_out(emulator.environment_id, timedelta(seconds=5), emulator.now()) is None


@pytest.mark.timeout(90)
def test_two_hundred_sessions_beside_three_thousand() -> None:
    bench.run(bench.WARM_UP_SESSIONS)
    few = bench.run(60)
    many = bench.run(200, beside=3000)
    assert few.problems() + many.problems() == []
    assert many.sessions == 200
    assert many.requests >= 200 * 7  # poll, ack, heartbeat, session, events, stream, result, stop
    assert bench.cpu_growth(few, many) < LARGEST_GROWTH
    assert bench.memory_growth(few, many) < LARGEST_GROWTH
