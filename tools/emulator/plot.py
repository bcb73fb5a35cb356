"""What a scenario's plot may do, step by step, and how each step is done to an emulator.

A step is one name with its values, as `say: {session: main, text: Hello}`. `repeat: {times: N, steps: […]}` works as in
scripts. Everything is checked when the scenario is read; what a step finds wrong in the end is a `PlotError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from pydantic import ConfigDict, Field

from .admin_params import FaultBody, HealthcheckBody, WebhookFaultBody
from .emulator import Emulator
from .errors import EmulatorError, Invalid
from .params import Params, parse
from .scripts_yaml import one_of, repeated
from .watch import Awaited

WAIT_SECONDS = 60.0
Ids = Mapping[str, list[str]]
"""The ids of each named session; a name with copies has several."""


class PlotError(Exception):
    """The story went another way."""


class OfSession(Params):
    session: str


class Say(OfSession):
    """Several texts go in one request."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    text: str | list[str] = Field(min_length=1)


class Confirm(OfSession):
    result: Literal["allow", "deny"]


class Answer(OfSession):
    model_config = ConfigDict(coerce_numbers_to_str=True)
    text: str
    is_error: bool = False


class Wait(OfSession):
    until: Awaited
    timeout: float = Field(default=WAIT_SECONDS, gt=0)


class Stop(OfSession):
    force: bool = False


class CutStream(OfSession):
    after_events: int = 0
    count: int = 1


class Check(OfSession):
    work: str | None = None
    status: str | None = None
    said: str | None = None
    results: int | None = None


class Seconds(Params):
    seconds: float


class SwitchValues(Params):
    values: dict[str, Any]


def _say(emulator: Emulator, ids: list[str], values: Say) -> None:
    texts = values.text if isinstance(values.text, list) else [values.text]
    messages = [{"type": "user.message", "content": [{"type": "text", "text": text}]} for text in texts]
    for session_id in ids:
        emulator.send(session_id, *messages)


def _refused(emulator: Emulator, ids: list[str], values: Say) -> None:
    for session_id in ids:
        try:
            _say(emulator, [session_id], values)
        except Invalid:
            continue
        raise PlotError("the message was taken")


def _interrupt(emulator: Emulator, ids: list[str], values: OfSession) -> None:
    for session_id in ids:
        emulator.send(session_id, {"type": "user.interrupt"})


def _confirm(emulator: Emulator, ids: list[str], values: Confirm) -> None:
    for session_id in ids:
        asked = [e["id"] for e in emulator.events(session_id, "agent.tool_use") if e["evaluated_permission"] == "ask"]
        decided = {event["tool_use_id"] for event in emulator.events(session_id, "user.tool_confirmation")}
        for call_id in emulator.pending_calls(session_id):
            if call_id in asked and call_id not in decided:
                verdict = {"type": "user.tool_confirmation", "tool_use_id": call_id, "result": values.result}
                emulator.send(session_id, verdict)


def _answer(emulator: Emulator, ids: list[str], values: Answer) -> None:
    content = [{"type": "text", "text": values.text}]
    for session_id in ids:
        custom = {event["id"] for event in emulator.events(session_id, "agent.custom_tool_use")}
        for call_id in emulator.pending_calls(session_id):
            if call_id in custom:
                result = {"custom_tool_use_id": call_id, "content": content, "is_error": values.is_error}
                emulator.send(session_id, {"type": "user.custom_tool_result", **result})


def _wait(emulator: Emulator, ids: list[str], values: Wait) -> None:
    for session_id in ids:
        try:
            emulator.wait_until(partial(_is_over, emulator, session_id, values.until), values.timeout)
        except TimeoutError as error:
            raise PlotError(f"{session_id} was not {values.until} within {values.timeout} s") from error
        if not emulator.is_in(session_id, values.until):
            raise PlotError(emulator.failed_expectations()[0])


def _is_over(emulator: Emulator, session_id: str, state: Awaited) -> bool:
    """There, or never going to be: an expectation that is not met ends the turn without its `end_turn`."""
    failed = any(failure.startswith(session_id) for failure in emulator.failed_expectations())
    return failed or emulator.is_in(session_id, state)


def _stop(emulator: Emulator, ids: list[str], values: Stop) -> None:
    for session_id in ids:
        emulator.stop_work(session_id, values.force)


def _claim(emulator: Emulator, ids: list[str], values: OfSession) -> None:
    for session_id in ids:
        emulator.claim_and_die(session_id)


def _cut_stream(emulator: Emulator, ids: list[str], values: CutStream) -> None:
    for session_id in ids:
        emulator.cut_stream(session_id, values.after_events, values.count)


def _check(emulator: Emulator, ids: list[str], values: Check) -> None:
    for session_id in ids:
        messages = [event["content"][0]["text"] for event in emulator.events(session_id, "agent.message")]
        found = {
            "work": emulator.work(session_id)["state"],
            "status": emulator.session(session_id)["status"],
            "results": len(emulator.events(session_id, "user.tool_result")),
        }
        for name, value in found.items():
            wanted = getattr(values, name)
            if wanted is not None and wanted != value:
                raise PlotError(f"{name} of {session_id} is {value}, not {wanted}")
        if values.said is not None and not any(values.said in message for message in messages):
            raise PlotError(f"{session_id} did not say {values.said!r} but {messages!r}")


def _fault(emulator: Emulator, ids: list[str], values: FaultBody) -> None:
    rest = {"status": values.status, "seconds": values.seconds, "after": values.after}
    emulator.fault(values.operation, values.kind, values.count, **rest)  # type: ignore[arg-type]


_ACTIONS: dict[str, tuple[type[Params], Callable[[Emulator, list[str], Any], object]]] = {
    "say": (Say, _say),
    "refused": (Say, _refused),
    "interrupt": (OfSession, _interrupt),
    "confirm": (Confirm, _confirm),
    "answer": (Answer, _answer),
    "wait": (Wait, _wait),
    "check": (Check, _check),
    "stop": (Stop, _stop),
    "claim": (OfSession, _claim),
    "advance": (Seconds, lambda emulator, _, values: emulator.advance(values.seconds)),
    "skew": (Seconds, lambda emulator, _, values: emulator.skew(values.seconds)),
    "switch": (SwitchValues, lambda emulator, _, values: emulator.switch(**values.values)),
    "fault": (FaultBody, _fault),
    "cut_stream": (CutStream, _cut_stream),
    "webhook_fault": (
        WebhookFaultBody,
        lambda emulator, _, values: emulator.webhook_fault(values.kind, values.count, seconds=values.seconds),
    ),
    "healthcheck": (HealthcheckBody, lambda emulator, _, values: emulator.add_healthcheck(values.environment_id)),
}
_SCALARS = {"advance": "seconds", "skew": "seconds", "switch": "values", "interrupt": "session", "claim": "session"}
"""Steps that may be written with their one value alone: `advance: 361`, `interrupt: main`."""
NAMES = (*_ACTIONS, "repeat")


class Action:
    """One step of a plot, read and checked."""

    def __init__(self, where: str, name: str, values: Params) -> None:
        self.where = f"{where} ({name})"
        self._values = values
        self._do = _ACTIONS[name][1]

    @property
    def session(self) -> str | None:
        return self._values.session if isinstance(self._values, OfSession) else None

    def do(self, emulator: Emulator, ids: Ids) -> None:
        """PlotError with the place in the plot when it cannot be done or finds something wrong."""
        try:
            self._do(emulator, list(ids[self.session]) if self.session else [], self._values)
        except (PlotError, EmulatorError, ValueError) as error:
            raise PlotError(f"{self.where}: {error}") from error


def actions_of(data: Any, where: str) -> list[Action]:
    """The plot that `data` spells; ValueError names the first step that is none."""
    if not isinstance(data, list):
        raise ValueError(f"{where}: not a list of steps")
    return [action for index, each in enumerate(data) for action in _actions(each, f"{where}.{index}")]


def _actions(data: Any, where: str) -> list[Action]:
    name, value = one_of(data, where)
    if name == "repeat":
        return [action for body in repeated(value, where) for action in actions_of(body, f"{where}.repeat")]
    if name not in _ACTIONS:
        raise ValueError(f"{where}: {name!r} is not one of {', '.join(NAMES)}")
    if name in _SCALARS and not (isinstance(value, dict) and set(value) == {_SCALARS[name]}):
        value = {_SCALARS[name]: value}
    try:
        return [Action(where, name, parse(_ACTIONS[name][0], value or {}, name))]
    except Invalid as error:
        raise ValueError(f"{where}.{name}: {error.message}") from error
