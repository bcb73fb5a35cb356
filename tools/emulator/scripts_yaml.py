"""Scripts of the agent as plain data, as YAML and JSON carry them, and assertions on what its tools returned.

A list of steps: `{say: TEXT}`, `{bash: COMMAND}`, `{call: {TOOL: {ARGUMENT: VALUE}}}`, in its place `ask` or `deny` for
the permission or `custom` for a client's own tool, `{tools: [CALL, …]}` for calls in parallel, `{expect: {…}}`,
`{sleep: SECONDS}`, `{error: TEXT}`, `{repeat: {times: N, steps: […]}}` in which `{{ n }}` counts from 1,
`{delegate: {agent: NAME, message: TEXT, steps: […]}}`, and the bare words `end` and `repeat_output`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .agents import Call, Results, Step, ToolResult, delegate, end, error, repeat_output, say, sleep, tools
from .clock import span

FAILED = "expectation failed: "
MAX_REPETITIONS = 100_000
MAX_STEPS = 1_000_000
REPETITION = "n"
_EXCERPT = 300
_VARIABLE = re.compile(r"\{\{ *(\w+) *\}\}")
_PERMISSIONS = {"call": "allow", "ask": "ask", "deny": "deny"}


@dataclass(frozen=True)
class Expectation:
    """Looks at the results of the last calls. One that is not met ends the turn with a `session.error` that says so."""

    contains: str | None = None
    lacks: str | None = None
    matches: str | None = None
    equals: str | None = None
    is_error: bool | None = None
    call: int | None = None
    """Which of the last calls, from 0; without it all of their text together, and every one's `is_error`."""

    def __call__(self, results: Results) -> Sequence[Step]:
        problem = self._problem(results)
        return [error(FAILED + problem)] if problem else []

    def _problem(self, results: Results) -> str | None:
        if self.call is not None and not 0 <= self.call < len(results):
            return f"there is no call {self.call} among the last {len(results)}"
        looked_at: Sequence[ToolResult] = results if self.call is None else [results[self.call]]
        if not looked_at:
            return "no tool has returned anything yet"
        text = "\n".join(result.text for result in looked_at)
        got = f"got {text[:_EXCERPT]!r}"
        if self.is_error is not None and any(result.is_error != self.is_error for result in looked_at):
            return f"is_error is not {str(self.is_error).lower()}, {got}"
        if self.contains is not None and self.contains not in text:
            return f"does not contain {self.contains!r}, {got}"
        if self.lacks is not None and self.lacks in text:
            return f"contains {self.lacks!r}, {got}"
        if self.matches is not None and not re.search(self.matches, text):
            return f"does not match {self.matches!r}, {got}"
        if self.equals is not None and self.equals.strip() != text.strip():
            return f"does not equal {self.equals!r}, {got}"
        return None


def expect(
    *,
    contains: str | None = None,
    lacks: str | None = None,
    matches: str | None = None,
    equals: str | None = None,
    is_error: bool | None = None,
    call: int | None = None,
) -> Expectation:
    """A step for scripts in Python; `matches` is a regular expression that is searched for."""
    if matches is not None:
        re.compile(matches)
    return Expectation(contains, lacks, matches, equals, is_error, call)


def steps_of(data: Any, where: str = "steps") -> list[Step]:
    """The steps that `data` spells; ValueError names the first that is none."""
    if not isinstance(data, list):
        raise ValueError(f"{where}: not a list of steps")
    return [step for index, each in enumerate(data) for step in _steps(each, f"{where}.{index}")]


def _steps(data: Any, where: str) -> list[Step]:
    if data == "end":
        return [end()]
    if data == "repeat_output":
        return [repeat_output]
    name, value = one_of(data, where)
    match name:
        case "say":
            return [say(text_in(value, f"{where}.say"))]
        case "error":
            return [error(text_in(value, f"{where}.error"))]
        case "sleep":
            span(number_in(value, f"{where}.sleep"), f"{where}.sleep")
            return [sleep(value)]
        case "tools":
            if not isinstance(value, list) or not value:
                raise ValueError(f"{where}.tools: not a list of calls")
            return [tools(*(_call(each, f"{where}.tools.{index}") for index, each in enumerate(value)))]
        case "expect":
            return [_expectation(value, f"{where}.expect")]
        case "delegate":
            if not isinstance(value, dict) or set(value) != {"agent", "message", "steps"}:
                raise ValueError(f"{where}.delegate: needs agent, message and steps, nothing else")
            name, message = (text_in(value[key], f"{where}.delegate.{key}") for key in ("agent", "message"))
            return [delegate(name, message, *steps_of(value["steps"], f"{where}.delegate.steps"))]
        case "repeat":
            return [step for data in repeated(value, f"{where}.repeat") for step in steps_of(data, f"{where}.repeat")]
        case _:
            return [tools(_call(data, where))]


def _call(data: Any, where: str) -> Call:
    name, value = one_of(data, where)
    if name == "bash":
        return Call("bash", {"command": text_in(value, f"{where}.bash")})
    if name not in _PERMISSIONS and name != "custom":
        raise ValueError(f"{where}: {name!r} is not a step")
    tool, arguments = one_of(value, f"{where}.{name}")
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}.{name}.{tool}: not the arguments of a tool")
    if name == "custom":
        return Call(tool, arguments, is_custom=True)
    return Call(tool, arguments, _PERMISSIONS[name])  # type: ignore[arg-type]


def _expectation(data: Any, where: str) -> Expectation:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: not a mapping")
    types = {"contains": str, "lacks": str, "matches": str, "equals": str, "is_error": bool, "call": int}
    for name, value in data.items():
        if name not in types:
            raise ValueError(f"{where}.{name}: not one of {', '.join(types)}")
        if type(value) is not types[name]:
            raise ValueError(f"{where}.{name}: not a {types[name].__name__}")
    try:
        return expect(**data)
    except re.error as problem:
        raise ValueError(f"{where}.matches: {problem}") from problem


# What scripts and plots have in common


def one_of(data: Any, where: str) -> tuple[str, Any]:
    """The name and the value of a mapping with one entry."""
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError(f"{where}: {data!r} is not one name with its value")
    ((name, value),) = data.items()
    return str(name), value


def text_in(data: Any, where: str) -> str:
    """A number is a text too, as YAML writes it: `say: 5`, or a `{{ n }}`."""
    if isinstance(data, int | float) and not isinstance(data, bool):
        return str(data)
    if not isinstance(data, str) or not data:
        raise ValueError(f"{where}: not a text")
    return data


def number_in(data: Any, where: str) -> float:
    if isinstance(data, bool) or not isinstance(data, int | float):
        raise ValueError(f"{where}: not a number")
    return float(data)


def repeated(data: Any, where: str) -> list[Any]:
    """The bodies of a `repeat`, each with its own `{{ n }}`."""
    if not isinstance(data, dict) or set(data) != {"times", "steps"}:
        raise ValueError(f"{where}: needs times and steps, nothing else")
    times = data["times"]
    if type(times) is not int or not 1 <= times <= MAX_REPETITIONS:
        raise ValueError(f"{where}.times: not a whole number between 1 and {MAX_REPETITIONS}")
    if _size(data) > MAX_STEPS:
        raise ValueError(f"{where}: becomes more than {MAX_STEPS} steps")
    return [filled(data["steps"], {REPETITION: n}) for n in range(1, times + 1)]


def _size(data: Any, most: int = 1) -> int:
    """How many steps `data` becomes at most; `most`: what the `{{ n }}` around it counts to."""
    if isinstance(data, list):
        return max(1, sum(_size(each, most) for each in data))
    if not isinstance(data, dict):
        return 1
    if set(data) == {"times", "steps"}:
        times = data["times"] if type(data["times"]) is int else most
        return times * _size(data["steps"], max(times, most))
    return max(1, sum(_size(each, most) for each in data.values() if isinstance(each, dict | list)))


def filled(data: Any, variables: Mapping[str, Any]) -> Any:
    """`data` with every `{{ name }}` that is known put in; a text that is nothing else becomes the value itself."""
    if isinstance(data, dict):
        return {key: filled(value, variables) for key, value in data.items()}
    if isinstance(data, list):
        return [filled(value, variables) for value in data]
    if not isinstance(data, str):
        return data
    whole = _VARIABLE.fullmatch(data)
    if whole and whole[1] in variables:
        return variables[whole[1]]
    return _VARIABLE.sub(lambda found: str(variables.get(found[1], found[0])), data)


def unfilled(data: Any) -> set[str]:
    """The names in double braces that are still in `data`."""
    if isinstance(data, dict):
        return set().union(*map(unfilled, data.values()))
    if isinstance(data, list):
        return set().union(*map(unfilled, data))
    return set(_VARIABLE.findall(data)) if isinstance(data, str) else set()
