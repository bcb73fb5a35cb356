"""A page in the place of an answer: the SDK does not notice, our clients do."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import AsyncAnthropic

from shared.dispatcher import open_client
from shared.runner_claim import open_api
from shared.runner_job import parse_job
from shared.runner_pages import RefusePages
from shared.settings import Settings

PAGE = httpx2.Response(200, html="<h1>Please log in</h1>")
TEXT = httpx2.Response(200, text="upstream is being restarted")
JSON = {"content-type": "application/json"}
HALVES = {
    "empty": b"",
    "cut": b'{"id": "work_1", "sta',
}
CALLS: dict[str, Callable[[AsyncAnthropic], Awaitable[Any]]] = {
    "poll": lambda client: client.beta.environments.work.poll("env_1"),
    "work list": lambda client: client.beta.environments.work.list("env_1"),
    "heartbeat": lambda client: client.beta.environments.work.heartbeat("work_1", environment_id="env_1"),
    "session": lambda client: client.beta.sessions.retrieve("sesn_1"),
    "events": lambda client: client.beta.sessions.events.list("sesn_1"),
}


def client(answer: httpx2.Response, *middleware: Any) -> AsyncAnthropic:
    http_client = httpx2.AsyncClient(transport=httpx2.MockTransport(lambda request: answer))
    return AsyncAnthropic(auth_token="token", http_client=http_client, middleware=middleware, max_retries=0)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("answer", [PAGE, TEXT], ids=["page", "text"])
async def test_a_page_is_an_error_of_the_connection(name: str, answer: httpx2.Response) -> None:
    with pytest.raises(anthropic.APIConnectionError):
        await CALLS[name](client(answer, RefusePages()))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("half", HALVES)
async def test_half_an_answer_is_an_error_of_the_connection(name: str, half: str) -> None:
    with pytest.raises(anthropic.APIConnectionError):
        await CALLS[name](client(httpx2.Response(200, headers=JSON, content=HALVES[half]), RefusePages()))


async def test_the_sdk_alone_takes_it_for_an_answer_or_fails_with_what_nobody_expects() -> None:
    """Why it is there. When this fails, the SDK has learnt it, and `RefusePages` may go."""
    assert await CALLS["session"](client(PAGE)) == "<h1>Please log in</h1>"
    with pytest.raises(AttributeError):
        await CALLS["work list"](client(PAGE))
    with pytest.raises(json.JSONDecodeError):
        await CALLS["heartbeat"](client(httpx2.Response(200, headers=JSON, content=b"")))


async def test_answers_pass() -> None:
    nothing = httpx2.Response(200, headers=JSON, content=b"null")
    assert await CALLS["poll"](client(nothing, RefusePages())) is None
    stopped = client(httpx2.Response(204), RefusePages())
    await stopped.beta.environments.work.stop("work_1", environment_id="env_1")
    with pytest.raises(anthropic.NotFoundError):
        await CALLS["session"](client(httpx2.Response(404, html="no such page"), RefusePages()))
    frames = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=b"event: ping\ndata: {}\n\n")
    stream = await client(frames, RefusePages()).beta.sessions.events.stream("sesn_1")
    assert [event async for event in stream] == []


def test_the_hosts_and_the_runners_clients_have_it() -> None:
    settings = Settings.from_env({"ANTHROPIC_ENVIRONMENT_ID": "env_1", "ANTHROPIC_ENVIRONMENT_KEY": "key"})
    names = ("ANTHROPIC_SESSION_ID", "ANTHROPIC_WORK_ID", "ANTHROPIC_ENVIRONMENT_ID", "ANTHROPIC_ENVIRONMENT_KEY")
    for each in (open_client(settings), open_api(parse_job(dict.fromkeys(names, "x")))):
        assert [type(middleware) for middleware in each.middleware] == [RefusePages]
