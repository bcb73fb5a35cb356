"""The scripted model: a turn is a list of steps, so a run is exact and costs nothing.

A step may also be a function that takes the results of the last tool calls and returns the next step, or several: a
script can repeat what a tool printed. One user message consumes steps up to `end()` (or the end of the list). The
shell-like agent is written with these steps too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .clock import span

Permission = Literal["allow", "ask", "deny"]


@dataclass(frozen=True)
class Say:
    text: str


@dataclass(frozen=True)
class Call:
    """One tool call; a custom one is answered by the client that owns it, not by a sandbox."""

    name: str
    input: dict[str, Any]
    permission: Permission = "allow"
    is_custom: bool = False


@dataclass(frozen=True)
class Tools:
    """Calls of one model request; the turn goes on when all of them are resolved."""

    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Sleep:
    """The model thinks for so many seconds of the emulator's clock; the session stays `running`."""

    seconds: float

    def __post_init__(self) -> None:
        span(self.seconds)


@dataclass(frozen=True)
class Error:
    """The model request fails for good: a `session.error`, then idle with `retries_exhausted`."""

    message: str


@dataclass(frozen=True)
class Delegate:
    """A sub-agent gets the message, works through its steps in a thread of its own, and its last words come back.

    The caller waits; what comes back are the results of one call named after the sub-agent.
    """

    agent_name: str
    message: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class End:
    """The turn is over; what follows in the list is for the next user message."""


@dataclass(frozen=True)
class ToolResult:
    """How one call ended. A denied call is an error nobody posted."""

    tool_use_id: str
    name: str
    content: list[dict[str, Any]]
    is_error: bool

    @property
    def text(self) -> str:
        return "\n".join(block["text"] for block in self.content if block["type"] == "text")


Results = Sequence[ToolResult]
Step = Say | Tools | Call | Sleep | Error | Delegate | End | Callable[[Results], "Step | Sequence[Step]"]


def say(text: str) -> Say:
    return Say(text)


def call(name: str, *, permission: Permission = "allow", **arguments: Any) -> Call:
    return Call(name, arguments, permission)


def custom(name: str, **arguments: Any) -> Call:
    return Call(name, arguments, is_custom=True)


def tools(*calls: Call) -> Tools:
    if not calls:
        raise ValueError("tools() needs at least one call")
    return Tools(calls)


def delegate(agent_name: str, message: str, *steps: Step) -> Delegate:
    return Delegate(agent_name, message, steps)


def sleep(seconds: float) -> Sleep:
    return Sleep(seconds)


def error(message: str = "The scripted model request failed.") -> Error:
    return Error(message)


def end() -> End:
    return End()


def repeat_output(results: Results) -> Step:
    """Say what the last calls printed."""
    return Say("\n".join(f"Error: {result.text}" if result.is_error else result.text for result in results))


def shell_agent(text: str) -> list[Step]:
    """`!CMD` runs CMD with bash and repeats its output; lines that all begin with `!` run one after the other."""
    if not text.startswith("!"):
        return [Say("I run shell commands only: send !CMD, for example !uname -a."), End()]
    lines = [line for line in text.splitlines() if line.strip()]
    commands = [line[1:] for line in lines] if all(line.startswith("!") for line in lines) else [text[1:]]
    steps: list[Step] = []
    for command in commands:
        steps += [tools(call("bash", command=command.strip())), repeat_output]
    return [*steps, End()]
