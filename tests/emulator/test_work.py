"""The work endpoints: hand-out, acknowledgement, lease, stop, statistics, and their switches."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from datetime import timedelta
from typing import Any, Literal

import httpx2
import pytest
from anthropic import AsyncAnthropic
from anthropic.types.beta.environments import BetaHeartbeatPreconditionFailedError

from tests.emulator.support import at, bearer, claim, client_of, error_of, work_path
from tools.emulator import Emulator, Switches, call, end, tools

State = Literal["queued", "starting", "active", "stopping", "stopped"]


class Api:
    """The work endpoints as plain requests with the environment key (the API key where only that will do)."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._http = httpx2.Client(base_url=emulator.url, headers=bearer(emulator.environment_key))

    def poll(self, **query: int) -> Any:
        return self._request("GET", "/poll", query).json()

    def ack(self, work_id: str) -> httpx2.Response:
        return self._request("POST", f"/{work_id}/ack", {})

    def beat(self, work_id: str, expected: str | None = None, **query: Any) -> httpx2.Response:
        if expected is not None:
            query["expected_last_heartbeat"] = expected
        return self._request("POST", f"/{work_id}/heartbeat", query)

    def stop(self, work_id: str, *, force: bool = False) -> httpx2.Response:
        return self._http.post(work_path(self._emulator, f"/{work_id}/stop"), json={"force": force})

    def _request(self, method: str, rest: str, query: dict[str, Any]) -> httpx2.Response:
        return self._http.request(method, work_path(self._emulator, rest), params=query)

    def close(self) -> None:
        self._http.close()


@pytest.fixture
def api(emulator: Emulator) -> Any:
    api = Api(emulator)
    yield api
    api.close()


def bring_to(emulator: Emulator, api: Api, state: State) -> str:
    """A session whose work item is in `state`."""
    session_id = emulator.create_session()
    steps = {"queued": 0, "starting": 1, "active": 2, "stopping": 3, "stopped": 4}[state]
    if steps >= 1:
        api.poll()
        api.ack(session_id)
    if steps >= 2:
        api.beat(session_id, "NO_HEARTBEAT")
    if steps >= 3:
        api.stop(session_id, force=state == "stopped")
    assert emulator.work(session_id)["state"] == state
    return session_id


# Poll


def test_an_empty_poll_is_null(api: Api, http: httpx2.Client, emulator: Emulator) -> None:
    response = http.get(work_path(emulator, "/poll"), headers=bearer(emulator.environment_key))
    assert (response.status_code, response.content) == (200, b"null")


def test_items_come_first_in_first_out_and_once(emulator: Emulator, api: Api) -> None:
    first, second = emulator.create_session(), emulator.create_session()
    assert [api.poll()["id"], api.poll()["id"], api.poll()] == [first, second, None]


async def test_a_poll_blocks_until_work_arrives(emulator: Emulator, runner: AsyncAnthropic) -> None:
    async with asyncio.TaskGroup() as group:
        work = runner.beta.environments.work
        poll = group.create_task(work.poll(emulator.environment_id, block_ms=999, anthropic_worker_id="one"))
        await asyncio.to_thread(emulator.wait_until, lambda: emulator.stats()["workers_polling"] == 1)
        assert not poll.done()
        session_id = emulator.create_session()
    item = poll.result()
    assert item is not None
    assert item.id == session_id


def test_a_blocking_poll_ends_empty_after_its_time(api: Api) -> None:
    took = []
    for _ in range(5):
        started = time.monotonic()
        assert api.poll(block_ms=150) is None
        took.append(time.monotonic() - started)
    assert 0.15 <= min(took) < 0.9  # a busy machine may be late; not each time


def test_an_item_not_acknowledged_is_offered_again(emulator: Emulator, api: Api) -> None:
    session_id = emulator.create_session()
    first = api.poll()
    assert first["state"] == "queued"
    assert first["started_at"] is not None
    assert api.poll() is None
    emulator.advance(5)
    assert api.poll(reclaim_older_than_ms=60_000) is None
    again = api.poll()
    assert again["id"] == session_id
    assert again["secret"] != first["secret"]
    api.ack(session_id)
    assert api.poll(reclaim_older_than_ms=0) is None


def test_the_secret_is_unpadded_base64_of_a_token(emulator: Emulator, api: Api) -> None:
    emulator.create_session()
    secret = api.poll()["secret"]
    assert "=" not in secret
    payload = json.loads(base64.urlsafe_b64decode(secret + "=" * (-len(secret) % 4)))
    assert list(payload) == ["sessions_token"]
    assert payload["sessions_token"].startswith("sk-ant-req-")


@pytest.mark.parametrize("secret", ["null", "undecodable", "extra_keys"])
async def test_the_sdk_copes_with_every_secret(secret: Any) -> None:
    from anthropic.lib.environments._worker import _sessions_token_from_secret

    with Emulator(switches=Switches(secret=secret)) as emulator:
        emulator.create_session()
        async with client_of(emulator, emulator.environment_key) as client:
            item = await client.beta.environments.work.poll(emulator.environment_id)
    assert item is not None
    assert (item.secret is None) == (secret == "null")
    assert (_sessions_token_from_secret(item.secret) is not None) == (secret == "extra_keys")


async def test_a_work_id_may_differ_from_the_session_id() -> None:
    with Emulator(switches=Switches(work_id="work_")) as emulator:
        session_id = emulator.create_session()
        async with client_of(emulator, emulator.environment_key) as client:
            item = await claim(client, emulator.environment_id)
            assert item.id.startswith("work_")
            assert item.data.id == session_id
            await client.beta.environments.work.stop(item.id, environment_id=item.environment_id, force=True)
            emulator.say(session_id, "again")
            assert (await claim(client, emulator.environment_id)).id == item.id


# Ack


def test_ack_starts_the_item_and_may_be_repeated(emulator: Emulator, api: Api) -> None:
    session_id = bring_to(emulator, api, "starting")
    first = emulator.work(session_id)
    again = api.ack(session_id)
    assert (again.status_code, again.json()) == (200, first)


def test_ack_of_a_stopped_item_is_404(emulator: Emulator, api: Api) -> None:
    assert api.ack(bring_to(emulator, api, "stopped")).status_code == 404


# Heartbeat


def test_a_beat_chain(emulator: Emulator, api: Api) -> None:
    session_id = bring_to(emulator, api, "starting")
    first = api.beat(session_id, "NO_HEARTBEAT").json()
    assert first == {
        "type": "work_heartbeat",
        "last_heartbeat": emulator.work(session_id)["latest_heartbeat_at"],
        "lease_extended": True,
        "state": "active",
        "ttl_seconds": 300,
    }
    second = api.beat(session_id, first["last_heartbeat"]).json()
    assert second["last_heartbeat"] > first["last_heartbeat"]
    assert api.beat(session_id).json()["last_heartbeat"] > second["last_heartbeat"]  # unconditional


async def test_a_beat_that_does_not_match_is_412_with_the_lease(emulator: Emulator, runner: AsyncAnthropic) -> None:
    session_id = emulator.create_session()
    await claim(runner, emulator.environment_id)
    with pytest.raises(BetaHeartbeatPreconditionFailedError) as refusal:
        await runner.beta.environments.work.heartbeat(
            session_id, environment_id=emulator.environment_id, expected_last_heartbeat="NO_HEARTBEAT"
        )
    assert refusal.value.details.to_dict() == {
        "error_code": "heartbeat_precondition_failed",
        "current_state": {
            "state": "active",
            "last_heartbeat": emulator.work(session_id)["latest_heartbeat_at"],
            "lease_extended": False,
            "ttl_seconds": 300,
        },
    }


@pytest.mark.parametrize("state", ["stopping", "stopped"])
def test_nothing_is_compared_once_a_stop_is_asked_for(emulator: Emulator, api: Api, state: State) -> None:
    session_id = bring_to(emulator, api, state)
    before = emulator.work(session_id)["latest_heartbeat_at"]
    reply = api.beat(session_id, "whatever")
    assert reply.status_code == 200
    assert (reply.json()["state"], reply.json()["lease_extended"]) == (state, False)
    assert reply.json()["last_heartbeat"] == before == emulator.work(session_id)["latest_heartbeat_at"]


def test_a_beat_on_an_item_stopped_before_any_beat_has_none_to_tell(emulator: Emulator, api: Api) -> None:
    session_id = emulator.create_session()
    api.stop(session_id)
    assert api.beat(session_id).json()["last_heartbeat"] == ""


@pytest.mark.parametrize("status", [412, 404, 409])
def test_a_beat_on_a_queued_item(status: Any) -> None:
    with Emulator(switches=Switches(heartbeat_on_queued=status)) as emulator:
        session_id = emulator.create_session()
        api = Api(emulator)
        reply = api.beat(session_id, "NO_HEARTBEAT")
        api.close()
    assert reply.status_code == status
    if status == 412:
        assert error_of(reply)["details"]["current_state"]["last_heartbeat"] is None


def test_a_beat_may_ask_for_another_ttl(emulator: Emulator, api: Api) -> None:
    session_id = bring_to(emulator, api, "starting")
    assert api.beat(session_id, desired_ttl_seconds=30).json()["ttl_seconds"] == 30
    emulator.advance(91)
    assert emulator.work(session_id)["state"] == "stopped"


# Lease


def test_an_item_acknowledged_and_never_beaten_lapses_too(emulator: Emulator, api: Api) -> None:
    session_id = bring_to(emulator, api, "starting")
    acknowledged = at(emulator.work(session_id)["acknowledged_at"])
    emulator.advance(361)
    work = emulator.work(session_id)
    assert work["state"] == "stopped"
    assert timedelta(seconds=300) <= at(work["stopped_at"]) - acknowledged <= timedelta(seconds=360)


def test_a_lapse_may_queue_the_item_again(emulator: Emulator) -> None:
    with Emulator(switches=Switches(lease_lapse="requeue")) as other:
        api = Api(other)
        session_id = bring_to(other, api, "active")
        other.advance(361)
        assert other.work(session_id)["state"] == "queued"
        assert api.poll()["id"] == session_id
        api.close()


def test_a_lease_may_never_lapse() -> None:
    with Emulator(switches=Switches(lease_lapse="never")) as other:
        api = Api(other)
        active, stopping = bring_to(other, api, "active"), bring_to(other, api, "active")
        api.stop(stopping)
        other.advance(86400)
        assert [other.work(each)["state"] for each in (active, stopping)] == ["active", "stopping"]
        api.close()


def test_an_hour_at_once_leaves_the_history_of_an_hour(emulator: Emulator, api: Api) -> None:
    session_id = bring_to(emulator, api, "active")
    beat = at(emulator.work(session_id)["latest_heartbeat_at"])
    emulator.advance(3600)
    assert at(emulator.work(session_id)["stopped_at"]) - beat <= timedelta(seconds=360)


def test_a_lease_lapses_without_anybody_asking() -> None:
    with Emulator(lease_ttl=1) as emulator:
        api = Api(emulator)
        session_id = bring_to(emulator, api, "active")
        api.close()
        item = emulator._world.queue(emulator.environment_id).get(session_id)
        emulator.wait_until(lambda: item.state == "stopped", timeout=60)


# Stop


@pytest.mark.parametrize("state", ["queued", "starting"])
def test_a_graceful_stop_of_an_item_without_a_beat_is_complete(emulator: Emulator, api: Api, state: State) -> None:
    reply = api.stop(bring_to(emulator, api, state))
    assert reply.status_code == 200
    assert reply.json()["state"] == "stopped"
    assert reply.json()["stopped_at"] == reply.json()["stop_requested_at"]


def test_a_stop_in_two_steps(emulator: Emulator, api: Api) -> None:
    session_id = bring_to(emulator, api, "active")
    graceful = api.stop(session_id)
    assert (graceful.status_code, graceful.json()["state"], graceful.json()["secret"]) == (200, "stopping", None)
    forced = api.stop(session_id, force=True).json()
    assert forced["state"] == "stopped"
    assert forced["stop_requested_at"] == graceful.json()["stop_requested_at"] < forced["stopped_at"]
    assert api.stop(session_id, force=True).status_code == 409


@pytest.mark.parametrize(("policy", "state"), [("requeue", "queued"), ("strand", "stopped")])
def test_a_stop_with_a_message_waiting(policy: Any, state: str) -> None:
    with Emulator(switches=Switches(unprocessed_input_at_stop=policy)) as emulator:
        api = Api(emulator)
        session_id = bring_to(emulator, api, "active")
        emulator.say(session_id, "!first")
        emulator.say(session_id, "!second")  # waits: the first call is open
        assert api.stop(session_id, force=True).json()["state"] == "stopped"
        api.close()
        assert emulator.work(session_id)["state"] == state


def test_a_stop_with_only_an_open_call_queues_nothing(emulator: Emulator, api: Api) -> None:
    session_id = bring_to(emulator, api, "active")
    emulator.say(session_id, "!first")
    api.stop(session_id, force=True)
    assert emulator.work(session_id)["state"] == "stopped"


@pytest.mark.parametrize(("policy", "state"), [("queues", "queued"), ("ignored", "stopped")])
def test_a_result_for_a_session_whose_item_is_stopped(policy: Any, state: str) -> None:
    with Emulator(switches=Switches(result_on_stopped_item=policy)) as emulator:
        session_id = emulator.create_session()
        emulator.set_script(session_id, [tools(call("bash", command="true")), end()])
        emulator.say(session_id, "go")
        emulator.stop_work(session_id, force=True)
        (call_id,) = emulator.pending_calls(session_id)
        emulator.send(session_id, {"type": "user.tool_result", "tool_use_id": call_id, "is_error": True})
        assert emulator.work(session_id)["state"] == state


# List, get, update, statistics


async def test_list_newest_first_by_pages(emulator: Emulator, runner: AsyncAnthropic) -> None:
    ids = [emulator.create_session() for _ in range(5)]
    pages = runner.beta.environments.work.list(emulator.environment_id, limit=2)
    assert [item.id async for item in pages] == ids[::-1]


async def test_get_and_merge_metadata(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id = emulator.create_session()
    work = owner.beta.environments.work
    await work.update(session_id, environment_id=emulator.environment_id, metadata={"a": "1", "b": "2"})
    await work.update(session_id, environment_id=emulator.environment_id, metadata={"a": None, "c": "3"})
    item = await work.retrieve(session_id, environment_id=emulator.environment_id)
    assert item.metadata == {"b": "2", "c": "3"}
    assert item.to_dict() | {"actor": None} == emulator.work(session_id)


async def test_statistics(emulator: Emulator, runner: AsyncAnthropic) -> None:
    work = runner.beta.environments.work
    sessions = [emulator.create_session() for _ in range(3)]
    await claim(runner, emulator.environment_id)
    for worker_id in ("one", "two", "two"):
        await work.poll(emulator.environment_id, anthropic_worker_id=worker_id, reclaim_older_than_ms=60_000)
    stats = await work.stats(emulator.environment_id)
    assert (stats.depth, stats.pending, stats.workers_polling) == (0, 2, 2)
    assert stats.oldest_queued_at == emulator.work(sessions[1])["created_at"]
    emulator.advance(31)
    assert (await work.stats(emulator.environment_id)).workers_polling == 0


@pytest.mark.parametrize("operation", ["ack", "heartbeat", "stop"])
def test_an_unknown_item_is_404(emulator: Emulator, http: httpx2.Client, operation: str) -> None:
    path = work_path(emulator, f"/sesn_gone/{operation}")
    response = http.post(path, headers=bearer(emulator.environment_key))
    assert response.status_code == 404
    assert "sesn_gone" in error_of(response)["message"]


def test_the_item_of_a_deleted_session_is_gone(emulator: Emulator, api: Api) -> None:
    session_id = bring_to(emulator, api, "active")
    emulator.delete_session(session_id)
    assert api.beat(session_id).status_code == 404
