"""Scenarios: the shipped ones with the SDK's own worker and real tools, and what a file of one's own may say."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.emulator.support import client_of, result, serving, worker_for
from tools.emulator import Emulator, Player, Report, load_scenario, perform
from tools.emulator.scenario import shipped

QUICKLY: dict[str, dict[str, Any]] = {"long_build": {"step_seconds": 0.02}, "load": {"sessions": 2, "rounds": 2}}


async def performed(emulator: Emulator, name: str | Path, workdir: Path, **variables: Any) -> Report:
    """With one worker, as anybody would run it."""
    player = Player(emulator, load_scenario(name, variables))
    player.prepare()
    async with (
        client_of(emulator, emulator.api_key) as client,
        serving(worker_for(emulator, client, workdir, max_idle=0.2)),
    ):
        return await asyncio.to_thread(player.play)


@pytest.mark.parametrize("name", shipped())
async def test_a_shipped_scenario_passes(emulator: Emulator, tmp_path: Path, name: str) -> None:
    report = await performed(emulator, name, tmp_path, **QUICKLY.get(name, {}))
    assert report.failures == []


async def test_the_failing_test_is_really_fixed(emulator: Emulator, tmp_path: Path) -> None:
    await performed(emulator, "fix_a_failing_test", tmp_path)
    assert (tmp_path / "prices.py").read_text() == "def total(prices):\n    return sum(prices)\n"


async def test_a_sandbox_that_loses_files_does_not_pass(emulator: Emulator, tmp_path: Path) -> None:
    """The first turn leaves its file elsewhere, so that the second one's expectation is not met."""
    text = (Path(__file__).parents[2] / "tools/emulator/scenarios/two_messages_at_once.yaml").read_text()
    broken = tmp_path / "broken.yaml"
    broken.write_text(text.replace("echo first >> turns", "echo first > /dev/null"))
    report = await performed(emulator, broken, tmp_path)
    (failure,) = report.failures
    assert not report.has_passed
    assert failure.startswith("plot.1 (wait): sesn_")
    assert "does not equal 'first\\nsecond', got 'second'" in failure


# Steps of a plot, without a worker


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "story.yaml"
    path.write_text("about: A test.\n" + text)
    return path


def told(emulator: Emulator, tmp_path: Path, text: str, **variables: Any) -> Report:
    return perform(emulator, load_scenario(written(tmp_path, text), variables))


ONE = (
    "sessions:\n  main:\n    script: [{ask: {bash: {command: ls}}}, {custom: {weather: {city: Berlin}}}, end]\nplot:\n"
)


def test_confirm_and_answer(tmp_path: Path) -> None:
    emulator = Emulator()
    story = (
        ONE
        + """
  - say: {session: main, text: go}
  - confirm: {session: main, result: deny}
  - answer: {session: main, text: sunny}
  - wait: {session: main, until: idle}
  - stop: {session: main, force: true}
  - check: {session: main, work: stopped, status: idle, results: 0}
"""
    )
    assert told(emulator, tmp_path, story).failures == []
    (session_id,) = emulator.session_ids()
    (answer,) = emulator.events(session_id, "user.custom_tool_result")
    assert answer["content"] == [{"type": "text", "text": "sunny"}]


def test_trouble_in_a_plot(tmp_path: Path) -> None:
    emulator = Emulator()
    story = """
sessions: {main: {}}
plot:
  - fault: {operation: work.ack, kind: drop, count: 2}
  - cut_stream: {session: main, after_events: 3}
  - webhook_fault: {kind: lose}
  - skew: 60
  - switch: {lease_lapse: requeue}
  - healthcheck: {}
  - repeat: {times: 2, steps: [{advance: 10}, {say: {session: main, text: "{{ n }}"}}]}
"""
    before = emulator.now()
    assert told(emulator, tmp_path, story).failures == []
    assert [fault.shown()["on"] for fault in emulator.faults()] == ["request", "stream", "webhook"]
    assert emulator.clock.skew.total_seconds() == 60
    assert emulator.switches.lease_lapse == "requeue"
    assert emulator.stats()["depth"] == 2
    assert (emulator.now() - before).total_seconds() >= 20
    texts = [event["content"][0]["text"] for event in emulator.events(emulator.session_ids()[0], "user.message")]
    assert texts == ["1", "2"]


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        ("check: {session: main, work: active}", "plot.0 (check): work of sesn_"),
        ("check: {session: main, said: hello}", "did not say 'hello'"),
        ("refused: {session: main, text: hello}", "plot.0 (refused): the message was taken"),
        ("wait: {session: main, until: active, timeout: 0.05}", "was not active within 0.05 s"),
        ("fault: {operation: work.acks, kind: drop}", "plot.0 (fault): operation: 'work.acks'"),
    ],
)
def test_a_step_that_goes_wrong_is_the_end_of_it(tmp_path: Path, step: str, complaint: str) -> None:
    emulator = Emulator()
    story = f"sessions: {{main: {{}}}}\nplot:\n  - {step}\n  - say: {{session: main, text: unheard}}\n"
    (failure,) = told(emulator, tmp_path, story).failures
    assert complaint in failure
    assert "unheard" not in str(emulator.events(emulator.session_ids()[0]))


def test_an_expectation_nobody_waits_for_is_in_the_report(tmp_path: Path) -> None:
    emulator = Emulator()
    emulator.default_script = ()
    path = written(tmp_path, "script: [{bash: ls}, {expect: {contains: x}}, end]\n")
    player = Player(emulator, load_scenario(path))
    player.prepare()
    session_id = emulator.create_session()
    emulator.say(session_id, "go")
    emulator.send(session_id, result(emulator.pending_calls(session_id)[0], "y"))
    assert player.play().failures == [f"{session_id}: does not contain 'x', got 'y'"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("plot: [{shout: x}]", "plot.0: 'shout' is not one of say, "),
        ("plot: [{say: {session: main, text: x}}]", "plot.0 (say): no session main in none"),
        ("plot: [{wait: {session: main, until: soon}}]", "plot.0.wait: until: Input should be"),
        ("sessions: {main: {script: [{say: []}]}}", "sessions.main.script.0.say: not a text"),
        ("sessions: {main: {scripts: []}}", "sessions.main.scripts: not a scenario field"),
        ("switches: {gravity: 1}", "gravity: not a switch"),
        ("script: [{say: '{{ who }}'}]", "who: in double braces, but not among its vars"),
        ("actors: []", "actors: not a scenario field"),
        ("plot: [", "not YAML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_place(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"^scenario .*story\.yaml: ") as refusal:
        load_scenario(written(tmp_path, text))
    assert complaint in str(refusal.value)


def test_names_and_variables_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file, and not one of fix_a_failing_test"):
        load_scenario("gone")
    with pytest.raises(ValueError, match=r"steps: not among its vars \(step_seconds\)"):
        load_scenario("long_build", {"steps": 1})
