"""Scripts as data, and what `expect` finds."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.emulator.support import idles, result
from tools.emulator import Emulator, ToolResult, call, custom, end, error, expect, repeat_output, say, sleep, tools
from tools.emulator.agents import Error, delegate
from tools.emulator.scripts_yaml import FAILED, steps_of


def test_every_step_can_be_spelled() -> None:
    data = yaml.safe_load("""
- say: hello
- bash: ls
- call: {read: {file_path: a}}
- ask: {bash: {command: rm a}}
- deny: {bash: {command: rm b}}
- custom: {weather: {city: Berlin}}
- tools: [{bash: one}, {ask: {bash: {command: two}}}, {custom: {weather: {}}}]
- expect: {contains: x, is_error: false, call: 0}
- sleep: 1.5
- error: overloaded
- delegate: {agent: helper, message: do it, steps: [{bash: inner}]}
- repeat: {times: 2, steps: [{bash: "echo {{ n }}"}, {say: "{{ n }}"}]}
- repeat_output
- end
""")
    assert steps_of(data) == [
        say("hello"),
        tools(call("bash", command="ls")),
        tools(call("read", file_path="a")),
        tools(call("bash", permission="ask", command="rm a")),
        tools(call("bash", permission="deny", command="rm b")),
        tools(custom("weather", city="Berlin")),
        tools(call("bash", command="one"), call("bash", permission="ask", command="two"), custom("weather")),
        expect(contains="x", is_error=False, call=0),
        sleep(1.5),
        error("overloaded"),
        delegate("helper", "do it", tools(call("bash", command="inner"))),
        tools(call("bash", command="echo 1")),
        say("1"),
        tools(call("bash", command="echo 2")),
        say("2"),
        repeat_output,
        end(),
    ]


def nested(times: Any, steps: list[Any]) -> dict[str, Any]:
    """More than anybody could wait for, when it is carried out."""
    return {"repeat": {"times": 100_000, "steps": [{"repeat": {"times": times, "steps": steps}}]}}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("end", "steps: not a list"),
        (["stop"], "steps.0: 'stop' is not one name with its value"),
        ([{"say": "a", "bash": "b"}], "steps.0: "),
        ([{"shout": {"a": {}}}], "steps.0: 'shout' is not a step"),
        ([{"bash": ""}], "steps.0.bash: not a text"),
        ([{"sleep": "long"}], "steps.0.sleep: not a number"),
        ([{"sleep": True}], "steps.0.sleep: not a number"),
        ([{"tools": []}], "steps.0.tools: not a list of calls"),
        ([{"tools": [{"say": "a"}]}], "steps.0.tools.0: 'say' is not a step"),
        ([{"call": {"read": "a"}}], "steps.0.call.read: not the arguments"),
        ([{"expect": {"contain": "a"}}], "steps.0.expect.contain: not one of contains, "),
        ([{"expect": {"is_error": "no"}}], "steps.0.expect.is_error: not a bool"),
        ([{"expect": {"matches": "("}}], "steps.0.expect.matches: "),
        ([{"repeat": {"times": 0, "steps": []}}], "steps.0.repeat.times: "),
        ([{"sleep": float("nan")}], "steps.0.sleep: nan is not a number of seconds within ten years"),
        ([nested("{{ n }}", ["end"])], "steps.0.repeat: becomes more than"),
        ([nested(100_000, [])], "steps.0.repeat: becomes more than"),
        (
            [nested(1, [{"delegate": {"agent": "a", "message": "b", "steps": [nested(100_000, ["end"])]}}])],
            "steps.0.repeat: becomes more than",
        ),
        ([{"repeat": {"steps": []}}], "steps.0.repeat: needs times and steps"),
        ([{"delegate": {"agent": "a"}}], "steps.0.delegate: needs agent, message and steps"),
    ],
)
def test_what_is_no_step_is_named_with_its_place(data: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"^steps") as refusal:
        steps_of(data)
    assert str(refusal.value).startswith(complaint)


def returned(*texts: str, is_error: bool = False) -> list[ToolResult]:
    return [ToolResult("sevt_1", "bash", [{"type": "text", "text": text}], is_error) for text in texts]


@pytest.mark.parametrize(
    ("expectation", "problem"),
    [
        (expect(contains="b", lacks="z", matches=r"^a\nb$", equals=" a\nb\n", is_error=False), None),
        (expect(call=1, equals="b"), None),
        (expect(contains="c"), "does not contain 'c', got 'a\\nb'"),
        (expect(lacks="b"), "contains 'b'"),
        (expect(matches="^b$"), "does not match '^b$'"),
        (expect(equals="a"), "does not equal 'a'"),
        (expect(is_error=True), "is_error is not true"),
        (expect(call=0, contains="b"), "does not contain 'b', got 'a'"),
        (expect(call=2), "there is no call 2 among the last 2"),
    ],
)
def test_what_an_expectation_finds(expectation: Any, problem: str | None) -> None:
    steps = expectation(returned("a", "b"))
    if problem is None:
        assert steps == []
        return
    (step,) = steps
    assert isinstance(step, Error)
    assert step.message.startswith(FAILED + problem)


def test_one_error_among_the_calls_is_found() -> None:
    mixed = [*returned("fine"), *returned("broken", is_error=True)]
    assert expect(is_error=False, call=0)(mixed) == []
    assert expect(is_error=False)(mixed) != []
    assert expect(contains="x")([]) == [error(FAILED + "no tool has returned anything yet")]


def test_an_expectation_that_is_not_met_ends_the_turn_and_is_told() -> None:
    emulator = Emulator()
    session_id = emulator.create_session()
    emulator.set_script(session_id, [tools(call("bash", command="date")), expect(equals="noon"), end()])
    emulator.say(session_id, "go")
    emulator.send(session_id, result(emulator.pending_calls(session_id)[0], "midnight"))
    assert idles(emulator, session_id)[-1] == {"type": "retries_exhausted"}
    assert emulator.failed_expectations() == [f"{session_id}: does not equal 'noon', got 'midnight'"]
    other = emulator.create_session()
    emulator.set_script(other, [error("overloaded")])
    emulator.say(other, "go")
    assert len(emulator.failed_expectations()) == 1
