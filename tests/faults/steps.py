"""A schedule: what happens when. Its `repr` is the Python that makes it again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tests.faults.wire import Kind

OWN_TOOL = "deploy"
"""The custom tool behind SANDBOX_TOOLS, and the only name in SANDBOX_TOOL_NAMES."""


@dataclass(frozen=True)
class Use:
    """One tool call of the agent. `run`, `ask` and `own`, a custom tool of ours, take so many seconds in a sandbox."""

    kind: Literal["run", "ask", "deny", "own", "custom"] = "run"
    seconds: float = 5.0


SKILL_NAME = "house-style"
SKILL_FILE = f"skills/{SKILL_NAME}/SKILL.md"

Turn = tuple[tuple[Use, ...], ...]
"""The model requests of a turn, each with the calls it makes at once."""


@dataclass(frozen=True)
class Step:
    at: float
    """Seconds from the beginning."""


@dataclass(frozen=True)
class Create(Step):
    session: int
    turns: tuple[Turn, ...] = ()
    """What the agent does about each message."""
    has_skill: bool = False


@dataclass(frozen=True)
class Message(Step):
    session: int


@dataclass(frozen=True)
class Interrupt(Step):
    session: int


@dataclass(frozen=True)
class Archive(Step):
    session: int


@dataclass(frozen=True)
class Delete(Step):
    session: int


@dataclass(frozen=True)
class OperatorStop(Step):
    session: int
    force: bool = False


@dataclass(frozen=True)
class Webhooks(Step):
    """What becomes of the next webhooks."""

    kind: Literal["lose", "delay", "duplicate", "reorder"]
    count: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class KillDispatcher(Step):
    """SIGKILL after so many more of its steps; another one takes its place."""

    host: int
    steps: int = 0
    down_seconds: float = 10.0


@dataclass(frozen=True)
class KillRunner(Step):
    """SIGKILL of the runners of a session, those that start in the next minute included, at their Nth step."""

    session: int
    steps: int = 0


@dataclass(frozen=True)
class Terminate(Step):
    """The platform ends the sandbox: SIGTERM, and 30 s later it is gone, files and all unless `keeps_files`. Now, or at
    the Nth step of each runner that is there or starts in the next minute."""

    session: int
    keeps_files: bool = True
    steps: int | None = None


@dataclass(frozen=True)
class Vanish(Step):
    """The sandbox is gone, runner, files and all."""

    session: int


@dataclass(frozen=True)
class Suspend(Step):
    session: int
    seconds: float = 400.0


@dataclass(frozen=True)
class Provider(Step):
    """Trouble with the provider's next calls of a kind. `half_done`: it is done, and the answer says that it failed;
    `lie`: the other way round; `slow_boot`: the runner starts that much later, whoever has given it up; `forget`: the
    session's sandbox is not found, and another one is made."""

    call: Literal["acquire", "start", "list", "release"]
    kind: Literal["slow", "slow_boot", "fail", "fail_for_good", "half_done", "lie", "forget"]
    count: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class LoseStore(Step):
    """The provider forgets which sandbox is whose, or (`restored`) remembers what was true at the last `SaveStore`."""

    restored: bool = False


@dataclass(frozen=True)
class SaveStore(Step):
    """A back-up of the provider's store is made."""


@dataclass(frozen=True)
class Wire(Step):
    """Trouble with the next requests of a kind."""

    operation: str
    kind: Kind
    count: int = 1
    who: Literal["runner", "dispatcher", "anybody"] = "anybody"
    seconds: float = 0.0
    status: int = 500


@dataclass(frozen=True)
class CutStream(Step):
    session: int


@dataclass(frozen=True)
class Skew(Step):
    """From now on the server's clock is off by so much, as its clients see it."""

    seconds: float


@dataclass(frozen=True)
class RotateKey(Step):
    """The environment key is replaced, and the hosts are restarted with the new one within so many seconds."""

    seconds: float = 20.0


@dataclass(frozen=True)
class Schedule:
    seed: int
    hosts: int = 2
    switches: tuple[tuple[str, str | int | bool], ...] = ()
    steps: tuple[Step, ...] = field(default=())

    def switch(self, name: str) -> str | int | bool | None:
        return dict(self.switches).get(name)

    @property
    def has_skills(self) -> bool:
        return any(isinstance(step, Create) and step.has_skill for step in self.steps)

    def with_steps(self, steps: tuple[Step, ...]) -> Schedule:
        return Schedule(self.seed, self.hosts, self.switches, steps)

    def __str__(self) -> str:
        steps = "".join(f"        {step!r},\n" for step in self.steps)
        return (
            f"Schedule(\n    seed={self.seed},\n    hosts={self.hosts},\n    switches={self.switches!r},\n"
            f"    steps=(\n{steps}    ),\n)"
        )
