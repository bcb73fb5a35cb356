"""R5's journal: what is written, what is believed of it, and which call it is that a tool runs for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from anthropic.lib.tools import ToolError, beta_async_tool

from shared.runner_events import EventLog
from shared.runner_journal import NAME, Journal
from shared.runner_tools import BEGUN_BEFORE, TURN_INTERRUPTED
from tests.runner.support import Bench


def use(call_id: str, name: str = "bash", permission: str = "allow", **tool_input: Any) -> Any:
    return SimpleNamespace(
        id=call_id,
        type="agent.tool_use",
        name=name,
        input=tool_input,
        evaluated_permission=permission,
        session_thread_id=None,
    )


def test_what_is_begun_is_known_to_the_next(tmp_path: Path) -> None:
    journal = Journal(tmp_path / ".sandbox")
    assert "a" not in journal
    assert journal.begin("a")
    assert journal.begin("b")
    following = Journal(tmp_path / ".sandbox")
    assert "a" in following
    assert "b" in following


def test_an_entry_is_on_the_disk_before_its_call_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(os, "fdatasync", lambda _: written.append((tmp_path / ".sandbox" / NAME).read_bytes()))
    assert Journal(tmp_path / ".sandbox").begin("a")
    assert written[0].rstrip() == b'{"begun": ["a"]}'


def test_the_file_stays_small_and_keeps_the_latest(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    for number in range(60):
        assert journal.begin(f"sevt_{number:0100}")
    assert (tmp_path / "j" / "calls.json").stat().st_size == 4096
    assert f"sevt_{0:0100}" in journal
    following = Journal(tmp_path / "j")
    assert f"sevt_{59:0100}" in following
    assert f"sevt_{0:0100}" not in following


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"begun": {"a": 1}}',
        b'{"begun": [["a"], 1, "a b", ""]}',
        b"[" * 4096,
        b'{"begun": ["' + b"a" * 5000 + b'"]}',
        json.dumps({"begun": ["a"] * 100}).encode(),
        b"\xff\xfe",
    ],
)
def test_what_we_did_not_write_is_not_believed_and_written_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "calls.json").write_bytes(content)
    journal = Journal(tmp_path)
    assert "a" not in journal
    assert journal.begin("b")
    assert "b" in Journal(tmp_path)


def test_no_link_is_followed_and_no_pipe_waited_for(tmp_path: Path) -> None:
    real = tmp_path / "real"
    Journal(real).begin("a")
    before = (real / "calls.json").read_bytes()
    (tmp_path / "link").symlink_to(real)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "calls.json").symlink_to(real / "calls.json")
    piped = tmp_path / "piped"
    piped.mkdir()
    os.mkfifo(piped / "calls.json")
    (tmp_path / "file").write_text("not a directory")
    for directory in (tmp_path / "link", linked, piped, tmp_path / "file"):
        journal = Journal(directory)
        assert "a" not in journal
        assert not journal.begin("b")
        assert "b" in journal  # in this process at least
    assert (real / "calls.json").read_bytes() == before


def test_what_the_agent_removes_is_there_again_with_the_next_call(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.begin("a")
    (tmp_path / "j" / "calls.json").unlink()
    (tmp_path / "j").rmdir()
    assert journal.begin("b")
    assert "a" in Journal(tmp_path / "j")


class Runs(Bench):
    """A guard that knows a log and a journal, and counts."""

    def __init__(self, directory: Path) -> None:
        self.journal = Journal(directory)
        super().__init__(self.journal)
        self.count = 0

        @beta_async_tool(name="bash")
        async def bash(command: str) -> str:
            """Counts."""
            self.count += 1
            return command

        @beta_async_tool(name="read")
        async def read(file_path: str) -> str:
            """Counts."""
            self.count += 1
            return file_path

        self.bash, self.read = bash, read


async def test_a_call_is_written_down_by_the_id_of_its_event_before_it_runs(tmp_path: Path) -> None:
    bench = Runs(tmp_path)
    for event in (use("1", command="x"), use("2", command="y"), use("3", command="x")):
        bench.log.note(event)
    await bench.guard.run(bench.bash, {"command": "x"})
    assert [entry in Journal(tmp_path) for entry in "123"] == [True, False, False]
    await bench.guard.run(bench.bash, {"command": "y"})
    await bench.guard.run(bench.bash, {"command": "x"})  # the same once more is the next of that kind
    assert [entry in Journal(tmp_path) for entry in "123"] == [True, True, True]
    assert bench.count == 3


async def test_a_call_that_was_begun_is_not_run_again_unless_it_only_looks(tmp_path: Path) -> None:
    Journal(tmp_path).begin("1")
    bench = Runs(tmp_path)
    bench.log.note(use("1", command="x"))
    bench.log.note(use("2", "read", file_path="x"))
    with pytest.raises(ToolError, match=BEGUN_BEFORE):
        await bench.guard.run(bench.bash, {"command": "x"})
    assert bench.count == 0
    await bench.guard.run(bench.read, {"file_path": "x"})
    await bench.guard.run(bench.read, {"file_path": "x"})
    assert bench.count == 2
    assert "2" not in bench.journal


async def test_a_call_whose_turn_was_interrupted_while_it_queued_is_not_run(tmp_path: Path) -> None:
    bench = Runs(tmp_path)
    bench.log.note(use("1", command="x"))
    interrupt = SimpleNamespace(id="2", type="user.interrupt", processed_at="now", session_thread_id=None)
    bench.log.note(interrupt)
    with pytest.raises(ToolError, match=TURN_INTERRUPTED):
        await bench.guard.run(bench.bash, {"command": "x"})
    bench.log.note(use("3", command="x"))
    assert await bench.guard.run(bench.bash, {"command": "x"}) == "x"
    assert "3" in bench.journal


async def test_a_storage_that_takes_no_entry_does_not_lose_the_session(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    bench = Runs(tmp_path / "file")
    bench.log.note(use("1", command="x"))
    assert await bench.guard.run(bench.bash, {"command": "x"}) == "x"
    assert [line["error"] for line in bench.lines if "error" in line] == ["the journal cannot be written"]


def test_events_that_come_twice_count_once_and_in_the_order_of_their_release() -> None:
    log = EventLog()
    verdict = SimpleNamespace(
        id="3", type="user.tool_confirmation", tool_use_id="1", result="allow", processed_at="now"
    )
    answer = SimpleNamespace(id="4", type="user.tool_result", tool_use_id="2", processed_at="now")
    for _ in range(2):
        for event in (use("1", permission="ask"), use("2"), use("0", permission="deny"), verdict):
            log.note(event)
    assert list(log.open) == ["2", "1"]
    log.note(answer)
    log.note(use("2"))
    assert list(log.open) == ["1"]
