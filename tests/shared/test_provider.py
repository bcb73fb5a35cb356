"""`read_ready`: the one place that decides, from a runner's output, how its start ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from shared.errors import LaunchFailed
from shared.provider import Launch, Started, read_ready


async def lines(*given: bytes) -> AsyncIterator[bytes]:
    for line in given:
        yield line


def event(name: str, **values: object) -> bytes:
    return json.dumps({"event": name, **values}).encode() + b"\n"


async def failure_of(*given: bytes) -> LaunchFailed:
    with pytest.raises(LaunchFailed) as raised:
        await read_ready(lines(*given))
    return raised.value


async def test_ready_is_ready_and_nothing_more_is_read() -> None:
    left = lines(b"a warning of some library\n", event("ready"), event("exit", code=1))
    assert await read_ready(left) == Started("ready")
    assert [line async for line in left] == [event("exit", code=1)]


@pytest.mark.parametrize("code", [0, 76])
async def test_a_runner_that_found_another_one_is_not_needed(code: int) -> None:
    assert await read_ready(lines(event("exit", code=code, reason="served already"))) == Started("not_needed")


@pytest.mark.parametrize(("code", "retriable"), [(73, True), (143, True), (64, False), (69, False), (1, False)])
async def test_other_exits_fail_and_say_whether_to_try_again(code: int, retriable: bool) -> None:
    failure = await failure_of(event("exit", code=code, reason="the disk is full"))
    assert failure.retriable is retriable
    assert f"exited with {code}" in str(failure)
    assert "the disk is full" in str(failure)


@pytest.mark.parametrize("code", [None, "0", [], {}, 0.0])
async def test_an_exit_without_a_code_is_a_failure(code: object) -> None:
    assert (await failure_of(event("exit", code=code))).retriable is False


async def test_a_traceback_ends_in_the_error() -> None:
    traceback = [
        b"Traceback (most recent call last):\n",
        b'  File "x.py", line 1\n',
        b"ImportError: no anthropic\n",
        b"\n",
    ]
    failure = await failure_of(*traceback)
    assert failure.retriable is True
    assert str(failure) == "the runner ended before it was ready: ImportError: no anthropic"


async def test_no_output_at_all() -> None:
    assert "no output" in str(await failure_of())


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xfe\x00\n",
        b"ready\n",
        b'"ready"\n',
        b"[]\n",
        b"{}\n",
        b'{"event": ["ready"]}\n',
        b'{"event": "claimed"}\n',
        b"[" * 99999,
    ],
    ids=repr,
)
async def test_garbage_is_neither_ready_nor_an_accident(garbage: bytes) -> None:
    assert await read_ready(lines(garbage, event("ready"))) == Started("ready")
    await failure_of(garbage)


async def test_last_words_are_cut() -> None:
    assert len(str(await failure_of(b"x" * 100_000))) < 500
    assert len(str(await failure_of(event("exit", code=1, reason="y" * 100_000)))) < 500


async def test_a_line_longer_than_a_streams_limit_is_a_failed_launch() -> None:
    reader = asyncio.StreamReader(limit=1024)
    reader.feed_data(b"z" * 5000)
    with pytest.raises(LaunchFailed) as raised:
        await read_ready(aiter(reader))
    assert raised.value.retriable is True


def test_a_launch_does_not_print_its_job() -> None:
    assert "hush" not in repr(Launch(stdin=b"hush", files={"a": b"hush"}))
