"""The vendor's command line, `ant beta:worker`, where ANT is the path of one (see conftest.py).

CI has none (README.md); test_go.py drives the SDK that it is made of.
Passed with ant 1.20.0, which is built on Go SDK 1.60.0: older than the sessions token, and it downloads skills under
the older beta.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.contract import SKILL, asked, claimed, ended, started, stopped
from tools.emulator import Emulator, call, end, repeat_output, tools

ON_WORK = """#!/bin/sh
cat > work.json
exec "$ANT" beta:worker run --max-idle 200ms
"""


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


@pytest.fixture
def ant() -> list[str]:
    return [os.environ["ANT"], "beta:worker"]


@pytest.fixture
def session_id(emulator: Emulator) -> str:
    """One that wants its skill greeted and a file written."""
    skill_id = emulator.add_skill("greeter", SKILL)
    session_id = emulator.create_session(skills=[skill_id])
    command = "skills/greeter/bin/greet | tee greeting"
    emulator.set_script(session_id, [tools(call("bash", command=command)), repeat_output, end()])
    emulator.say(session_id, "go")
    return session_id


def check(emulator: Emulator, session_id: str, workdir: Path) -> None:
    assert (workdir / "greeting").read_text() == "hello from the skill\n"
    said = emulator.events(session_id, "agent.message")[0]["content"][0]["text"]
    assert said.rstrip() == "hello from the skill"
    refused = [record for record in emulator.requests if record.status != 200]
    # Of this version, poller and worker both stop the item: the later of them gets a 409, repeats it and swallows it.
    assert {(record.operation, record.status) for record in refused} <= {("work.stop", 409)}
    assert asked(emulator, "work.stop")[0].status == 200
    versions = [record.path.split("/")[-1] for record in asked(emulator, "skills.version")]
    assert all(version.isdigit() for version in versions)
    assert len(asked(emulator, "skills.versions")) == len(versions) == 1  # it finds out what `latest` is by the list


def test_poll(emulator: Emulator, session_id: str, ant: list[str], tmp_path: Path) -> None:
    with started(emulator, [*ant, "poll", "--max-idle", "200ms"], tmp_path) as process:
        stopped(emulator, session_id)
        assert ended(process) == ""
    check(emulator, session_id, tmp_path)


def test_poll_on_work(emulator: Emulator, session_id: str, ant: list[str], tmp_path: Path) -> None:
    """The script gets the item on its standard input and what `run` needs in its environment."""
    script = tmp_path / "on-work"
    script.write_text(ON_WORK)
    script.chmod(0o755)
    with started(emulator, [*ant, "poll", "--on-work", str(script)], tmp_path) as process:
        stopped(emulator, session_id)
        ended(process)
    assert session_id in (tmp_path / "work.json").read_text()
    check(emulator, session_id, tmp_path)


def test_run(emulator: Emulator, session_id: str, ant: list[str], tmp_path: Path) -> None:
    claimed(emulator)
    handed = {"ANTHROPIC_SESSION_ID": session_id, "ANTHROPIC_WORK_ID": session_id}
    with started(emulator, [*ant, "run", "--max-idle", "200ms"], tmp_path, handed) as process:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert emulator.work(session_id)["state"] == "stopped"
    check(emulator, session_id, tmp_path)
