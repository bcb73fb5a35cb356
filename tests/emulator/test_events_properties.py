"""Whatever a script does and whoever answers: rules of every history, and lists and stores that agree with a model."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import httpx2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.emulator.support import at, bearer, custom_result, result
from tools.emulator import Emulator, Step, call, custom, delegate, end, error, say, sleep, tools
from tools.emulator.errors import Conflict, EmulatorError, Invalid, NotFound
from tools.emulator.state.memory import MemoryStore

PROFILE = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

calls = st.one_of(
    st.builds(lambda permission: call("bash", permission=permission), st.sampled_from(["allow", "ask", "deny"])),
    st.just(custom("ticket")),
)
plain: st.SearchStrategy[Step] = st.one_of(
    st.lists(calls, min_size=1, max_size=3).map(lambda each: tools(*each)),
    st.just(say("x")),
    st.just(sleep(5)),
    st.just(error()),
)
steps = st.one_of(
    plain, st.lists(plain, max_size=3).map(lambda each: delegate("helper", "Help.", *each)), st.just(end())
)
deeds = st.sampled_from(
    ["say", "result", "custom", "allow", "deny", "interrupt", "interrupt_thread", "archive", "wait"]
)


def do(emulator: Emulator, session_id: str, deed: str, pick: int) -> None:
    pending = emulator.pending_calls(session_id) or ["sevt_none"]
    call_id = pending[pick % len(pending)]
    threads = [event["session_thread_id"] for event in emulator.events(session_id, "session.thread_created")]
    thread_id = threads[pick % len(threads)] if threads else "sthr_none"
    match deed:
        case "say":
            emulator.say(session_id, "go")
        case "result":
            emulator.send(session_id, result(call_id))
        case "custom":
            emulator.send(session_id, custom_result(call_id))
        case "allow" | "deny":
            emulator.send(session_id, {"type": "user.tool_confirmation", "tool_use_id": call_id, "result": deed})
        case "interrupt":
            emulator.send(session_id, {"type": "user.interrupt"})
        case "interrupt_thread":
            emulator.send(session_id, {"type": "user.interrupt", "session_thread_id": thread_id})
        case "archive":
            with emulator._engine.transact() as now:
                emulator._world.archive_thread(session_id, thread_id, now)
        case "wait":
            emulator.advance(6)


@PROFILE
@given(st.lists(steps, max_size=8), st.lists(st.tuples(deeds, st.integers(0, 5)), max_size=14))
def test_every_history_keeps_the_rules(script: list[Step], history: list[tuple[str, int]]) -> None:
    emulator = Emulator()
    session_id = emulator.create_session()
    emulator.set_script(session_id, script)
    emulator.say(session_id, "go")
    for deed, pick in history:
        before = emulator.events(session_id)
        try:
            do(emulator, session_id, deed, pick)
        except (Invalid, NotFound):
            assert emulator.events(session_id) == before  # refused whole
        check_log(emulator, session_id)
        check_threads(emulator, session_id)


def check_log(emulator: Emulator, session_id: str) -> None:
    events = emulator.events(session_id)
    logged = [event for event in events if event["processed_at"] is not None]
    assert events[: len(logged)] == logged  # what waits for its turn comes last
    stamps = [at(event["processed_at"]) for event in logged]
    assert all(earlier < later for earlier, later in itertools.pairwise(stamps))
    assert len({event["id"] for event in events}) == len(events)

    types = [event["type"] for event in logged]
    for index, type_ in enumerate(types):
        if type_ == "session.status_idle":
            assert types[index - 2 : index] == ["session.thread_status_idle", "session.usage"]
            assert logged[index - 2]["stop_reason"] == logged[index]["stop_reason"]
        if type_ == "session.status_running":
            assert types[index + 1] == "session.thread_status_running"
    starts = [event["id"] for event in logged if event["type"] == "span.model_request_start"]
    ends = [event["model_request_start_id"] for event in logged if event["type"] == "span.model_request_end"]
    assert ends == starts[: len(ends)]
    assert len(starts) - len(ends) <= 1

    answers = [
        event.get("tool_use_id") or event.get("custom_tool_use_id") for event in logged if "result" in event["type"]
    ]
    assert len(set(answers)) == len(answers)
    status = emulator.session(session_id)["status"]
    last = next((event for event in reversed(logged) if event["type"].startswith("session.status_")), None)
    assert last is not None
    assert status == {"session.status_idle": "idle", "session.status_running": "running"}[last["type"]]
    waits = last.get("stop_reason", {}).get("type") == "requires_action"
    assert waits == bool(emulator.pending_calls(session_id))
    if waits:
        assert last["stop_reason"]["event_ids"] == emulator.pending_calls(session_id)


def check_threads(emulator: Emulator, session_id: str) -> None:
    shown = {event["id"]: event for event in emulator.events(session_id)}
    session = emulator._world.session(session_id)
    for thread in session.threads.values():
        stamps = [at(event["processed_at"]) for event in thread.log]
        assert all(earlier < later for earlier, later in itertools.pairwise(stamps))
        for event in thread.log:
            if event["type"].startswith(("agent.tool_use", "agent.custom", "session.thread_status", "user.")):
                assert shown[event["id"]] == {**event, "session_thread_id": thread.id}
            else:
                assert event["id"] not in shown or event["type"] == "session.error" or "result" in event["type"]
        mine = {event["id"] for event in thread.log}
        pending = mine & set(emulator.pending_calls(session_id))
        assert not (pending and thread.status == "terminated")
    working = [thread for thread in session.threads.values() if thread.status == "running"]
    assert len(working) <= 1


def test_the_lists_of_events_agree_with_their_model() -> None:
    """Any filter, order and page size gives what picking from the whole history gives."""
    with Emulator() as emulator, httpx2.Client(base_url=emulator.url) as http:
        session_id = emulator.create_session()
        emulator.set_script(session_id, [say("a"), end(), error(), end(), tools(call("bash")), end()])
        for _ in range(4):
            emulator.say(session_id, "go")
            emulator.advance(10)
        whole = emulator.events(session_id)
        types = sorted({event["type"] for event in whole})
        bounds = st.none() | st.sampled_from([event["processed_at"] for event in whole if event["processed_at"]])
        headers = bearer(emulator.api_key) | {"anthropic-beta": "managed-agents-2026-04-01"}

        @settings(PROFILE, max_examples=40)
        @given(
            st.none() | st.lists(st.sampled_from(types), min_size=1, max_size=3),
            st.sampled_from(["asc", "desc"]),
            st.integers(1, 9),
            bounds,
            bounds,
        )
        def lists(wanted: list[str] | None, order: str, limit: int, after: str | None, until: str | None) -> None:
            params: dict[str, Any] = {"order": order, "limit": limit}
            params |= {"types[]": wanted} if wanted else {}
            params |= {"created_at[gt]": after} if after else {}
            params |= {"created_at[lte]": until} if until else {}
            got: list[Any] = []
            while True:
                reply = http.get(f"/v1/sessions/{session_id}/events", params=params, headers=headers).json()
                assert len(reply["data"]) <= limit
                got += reply["data"]
                if reply["next_page"] is None:
                    break
                params["page"] = reply["next_page"]
            expected = [
                event
                for event in whole
                if (not wanted or event["type"] in wanted)
                and (not (after or until) or event["processed_at"])
                and (not after or event["processed_at"] > after)
                and (not until or event["processed_at"] <= until)
            ]
            assert got == (expected if order == "asc" else expected[::-1])

        lists()


paths = st.sampled_from(["/a", "/b", "/dir/a", "/dir/deep/b"])
contents = st.sampled_from(["", "one", "two", "é"])
memory_deeds = st.lists(
    st.tuples(st.sampled_from(["create", "change", "rename", "delete"]), paths, paths, contents, contents), max_size=20
)


@PROFILE
@given(memory_deeds)
def test_a_store_agrees_with_a_dictionary(history: list[tuple[str, str, str, str, str]]) -> None:
    """Every change under a precondition on what its author believes; a 409 exactly when that is wrong or in the way."""
    now = Emulator().now()
    store = MemoryStore("memstore_1", "s", now, now)
    model: dict[str, str] = {}
    for deed, path, other, content, believed in history:
        memory_id = next((memory.id for memory in store.memories.values() if memory.path == path), "mem_none")
        sha256 = hashlib.sha256(believed.encode()).hexdigest()
        expected: type[EmulatorError] | None = None
        if deed == "create":
            expected = Conflict if path in model else None
        elif path not in model:
            expected = NotFound
        elif model[path] != believed or (deed == "rename" and other != path and other in model):
            expected = Conflict
        try:
            match deed:
                case "create":
                    store.create(path, content, now)
                case "change":
                    store.change(memory_id, now, content, None, sha256)
                case "rename":
                    store.change(memory_id, now, None, other, sha256)
                case "delete":
                    store.delete(memory_id, sha256)
            raised = None
        except EmulatorError as refusal:
            raised = type(refusal)
        assert raised is expected
        if expected is None:
            if deed == "rename":
                model[other] = model.pop(path)
            elif deed == "delete":
                del model[path]
            else:
                model[path] = content
        assert {memory.path: memory.content for memory in store.memories.values()} == model
        whole = store.listing("/", 0)
        assert [item if isinstance(item, str) else item.path for item in whole] == sorted(model)
        top = [item if isinstance(item, str) else item.path for item in store.listing("/", 1)]
        assert top == sorted({path if path.count("/") == 1 else f"/{path.split('/')[1]}/" for path in model})
