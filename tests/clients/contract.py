"""What every client must be able to do with the emulator. One subclass per client, which knows its command.

A client is a program with the modes `run`, `poll` and `item` (see typescript/client.mjs), started with the variables
that `ant beta:worker poll --on-work` sets. None of them knows that it talks to an emulator.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tools.emulator import Emulator, RequestRecord, Step, call, end, repeat_output, tools

EXIT_SECONDS = 60
WAIT_SECONDS = 60
SKILL = {
    "SKILL.md": "---\nname: greeter\ndescription: greets\n---\n",
    "bin/greet": "#!/bin/sh\necho hello from the skill\n",
}


class Client:
    """The base of each client's tests."""

    fatal_retries = 3
    """How often a client asks in all when the answer is a 409, which the core of every SDK repeats twice."""

    @pytest.fixture
    def command(self) -> list[str]:
        raise NotImplementedError

    @pytest.fixture
    def emulator(self, tmp_path: Path) -> Iterator[Emulator]:
        with Emulator() as emulator:
            emulator.memory_root = str(tmp_path / "mnt")
            yield emulator

    @pytest.fixture
    def workdir(self, tmp_path: Path) -> Path:
        workdir = tmp_path / "work"
        workdir.mkdir()
        return workdir

    def test_run_serves_a_session(self, emulator: Emulator, command: list[str], workdir: Path, tmp_path: Path) -> None:
        """With a skill and a memory store, on the sessions token."""
        skill_id = emulator.add_skill("greeter", SKILL)
        store_id = emulator.add_memory_store("notes", {"/a.md": "one\n", "/gone.md": "x", "/stays.md": "y"})
        session_id = emulator.create_session(skills=[skill_id], resources=[store_id])
        mount = tmp_path / "mnt" / "notes"
        edit = f"cat {mount}/a.md && echo two >> {mount}/a.md && echo new > {mount}/b.md && rm {mount}/gone.md"
        script: list[Step] = [tools(call("bash", command=f"skills/greeter/bin/greet && {edit}")), repeat_output, end()]
        emulator.set_script(session_id, script)
        emulator.say(session_id, "go")
        with started(emulator, [*command, "run"], workdir) as process:
            stopped(emulator, session_id)
            assert ended(process) == ""

        assert emulator.events(session_id, "agent.message")[0]["content"][0]["text"].rstrip() == (
            "hello from the skill\none"
        )
        assert emulator.memories(store_id) == {"/a.md": "one\ntwo\n", "/b.md": "new\n", "/stays.md": "y"}
        assert not mount.exists()
        on_token = [record for record in emulator.requests if record.operation not in ("work.poll", "work.ack")]
        assert {record.credential for record in on_token} == {"sessions_token"}
        assert {record.status for record in emulator.requests} == {200}
        assert helpers(emulator) == {"environments-work-poller", "environments-worker", "session-tool-runner"}

    def test_run_opens_the_stream_before_it_lists(self, emulator: Emulator, command: list[str], workdir: Path) -> None:
        session_id = emulator.create_session()
        emulator.say(session_id, "!echo hello > greeting")
        with started(emulator, [*command, "run"], workdir):
            stopped(emulator, session_id)
        assert (workdir / "greeting").read_text() == "hello\n"
        asked = [record.operation for record in emulator.requests]
        order = [
            asked.index(name) for name in ("work.poll", "work.ack", "sessions.get", "events.stream", "events.list")
        ]
        assert order == sorted(order)
        beats = [record for record in emulator.requests if record.operation == "work.heartbeat"]
        assert beats[0].query["expected_last_heartbeat"] == ["NO_HEARTBEAT"]
        polls = [record for record in emulator.requests if record.operation == "work.poll"]
        assert polls[0].query["block_ms"] == ["999"]
        assert len({record.worker_id for record in polls} - {None}) == 1

    def test_a_held_call_waits_for_its_verdict(self, emulator: Emulator, command: list[str], workdir: Path) -> None:
        session_id = emulator.create_session()
        held = [call("bash", command=f"touch {name}", permission="ask") for name in ("allowed", "denied")]
        emulator.set_script(session_id, [tools(*held), end()])
        emulator.say(session_id, "go")
        first, second = emulator.pending_calls(session_id)
        with started(emulator, [*command, "run"], workdir):
            emulator.wait_until(lambda: asked(emulator, "events.list"), WAIT_SECONDS)
            emulator.send(session_id, verdict(second, "deny"), verdict(first, "allow"))
            stopped(emulator, session_id)
        assert [path.name for path in workdir.iterdir()] == ["allowed"]
        assert [event["tool_use_id"] for event in emulator.events(session_id, "user.tool_result")] == [first]

    def test_poll_drains_the_queue(self, emulator: Emulator, command: list[str], workdir: Path) -> None:
        sessions = [emulator.create_session() for _ in range(3)]
        with started(emulator, [*command, "poll"], workdir) as process:
            output, _ = process.communicate(timeout=EXIT_SECONDS)
        assert process.returncode == 0
        assert output.split() == sessions
        asked = [record.operation for record in emulator.requests]
        assert asked == ["work.poll", "work.ack", "work.stop"] * 3 + ["work.poll"]
        assert [emulator.work(each)["state"] for each in sessions] == ["stopped"] * 3
        assert helpers(emulator) == {"environments-work-poller"}

    def test_item_serves_what_it_is_handed(self, emulator: Emulator, command: list[str], workdir: Path) -> None:
        """On the secret alone: the environment key is not there."""
        session_id = emulator.create_session()
        emulator.say(session_id, "!echo hello > greeting")
        secret = claimed(emulator)
        handed = {"ANTHROPIC_SESSION_ID": session_id, "ANTHROPIC_WORK_ID": session_id, "ANTHROPIC_WORK_SECRET": secret}
        with started(emulator, [*command, "item"], workdir, handed, has_key=False) as process:
            process.communicate(timeout=EXIT_SECONDS)
        assert process.returncode == 0
        assert (workdir / "greeting").read_text() == "hello\n"
        assert emulator.work(session_id)["state"] == "stopped"

    def test_a_conflict_is_repeated_twice_and_swallowed(self, command: list[str], workdir: Path) -> None:
        """An operator's forced stop: the worker learns of it with its next beat, and its own stop is a 409."""
        with Emulator(lease_ttl=2) as emulator:
            session_id = emulator.create_session()
            with started(emulator, [*command, "run"], workdir) as process:
                emulator.wait_until(lambda: emulator.work(session_id)["state"] == "active", WAIT_SECONDS)
                emulator.stop_work(session_id, force=True)
                emulator.wait_until(lambda: len(asked(emulator, "work.stop")) == self.fatal_retries, WAIT_SECONDS)
                another = emulator.create_session()
                emulator.say(another, "!true")
                stopped(emulator, another)
                ended(process)
        stops = [record.status for record in asked(emulator, "work.stop") if session_id in record.path]
        assert stops == [409] * self.fatal_retries

    def test_a_burst_of_errors_is_outlived(self, emulator: Emulator, command: list[str], workdir: Path) -> None:
        """Two retries are in the core of every SDK: the third try of each call gets through, and once."""
        session_id = emulator.create_session()
        emulator.say(session_id, "!echo hello >> greeting")
        for operation in ("work.ack", "sessions.get", "events.send"):
            emulator.fault(operation, "fail", 2, status=503)
        with started(emulator, [*command, "run"], workdir) as process:
            stopped(emulator, session_id)
            ended(process)
        for operation in ("work.ack", "sessions.get", "events.send"):
            assert [record.status for record in asked(emulator, operation)] == [503, 503, 200], operation
        assert (workdir / "greeting").read_text() == "hello\n"
        assert len(emulator.events(session_id, "user.tool_result")) == 1


def asked(emulator: Emulator, operation: str) -> list[RequestRecord]:
    return [record for record in emulator.requests if record.operation == operation]


def helpers(emulator: Emulator) -> set[str]:
    """Who asked. A client may name several parts of itself in one request."""
    return {name.strip() for record in emulator.requests for name in (record.helper or "none").split(",")}


def verdict(call_id: str, result: str) -> dict[str, str]:
    return {"type": "user.tool_confirmation", "tool_use_id": call_id, "result": result}


def claimed(emulator: Emulator) -> str:
    """Poll and ack as a dispatcher does; the secret of the item."""
    headers = {"authorization": f"Bearer {emulator.environment_key}"}
    work = f"{emulator.url}/v1/environments/{emulator.environment_id}/work"
    item = httpx2.get(f"{work}/poll", headers=headers).json()
    httpx2.post(f"{work}/{item['id']}/ack", headers=headers)
    secret: str = item["secret"]
    return secret


def stopped(emulator: Emulator, session_id: str) -> None:
    emulator.wait_until(lambda: emulator.work(session_id)["state"] == "stopped", WAIT_SECONDS)


def ended(process: subprocess.Popen[str]) -> str:
    """Ask the client to leave; what it printed."""
    process.terminate()
    output, _ = process.communicate(timeout=EXIT_SECONDS)
    assert process.returncode == 0
    return output


@contextlib.contextmanager
def started(
    emulator: Emulator, command: list[str], workdir: Path, more: dict[str, str] | None = None, *, has_key: bool = True
) -> Iterator[subprocess.Popen[str]]:
    """The client in `workdir`, killed at the end if it is still there. Its log is shown by a test that fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANTHROPIC_")}
    environment |= {"ANTHROPIC_BASE_URL": emulator.url, "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id}
    if has_key:
        environment["ANTHROPIC_ENVIRONMENT_KEY"] = emulator.environment_key
    environment |= more or {}
    process = subprocess.Popen(command, cwd=workdir, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
