"""The suite for sandboxes without a shell: every attempt of `FILE_ATTEMPTS`, made by the agent through the real file
tools of the real runner, or by a stranger at the way out.

A subclass says how its host is started and which file of statements is about it. All attempts take one hostile session
of two turns and a neighbour. A verdict rests on evidence: what the tools answered, what the session's files are
afterwards, what the log says. Attempts to find something also look for a mark of the agent's own, and fail the test
when they do not find even that.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import pytest

from tests.redteam import statements
from tests.redteam.suite import Verdict, assert_true
from tools.emulator import Emulator, Step, call, end, say, tools

LIMIT_MB = 12  # of a session's files
FILE_LIMIT_MB = 8
_MOST_CHARACTERS = 300_000  # of a tool's result
_PATIENCE_SECONDS = 120.0  # for all attempts of a turn
_MB = 1024 * 1024


class FileHost(Protocol):
    """A deployment whose sandboxes have files and no shell, under attack."""

    emulator: Emulator
    secrets: tuple[str, ...]
    """What only the host knows: keys, and the settings' names."""

    def log(self) -> str: ...
    def get(self, session: str, path: str = "", *, key: str | None = "") -> tuple[int, dict[str, str], bytes]:
        """The way out: lists a session's files, or downloads one. With the host's key, another one, or none."""


class Result(NamedTuple):
    is_error: bool
    text: str


@dataclass
class Attack:
    """What a hostile agent knows, and what it has found out."""

    host: FileHost
    session: str
    neighbour: str
    memory: str
    """Where memory stores are mounted: `own` may be written, `fixed` read; `theirs` is another session's."""
    own_mark: str = field(default_factory=lambda: f"rt-{uuid.uuid4().hex}")
    mark: str = field(default_factory=lambda: f"rt-{uuid.uuid4().hex}")
    """What must not be found: the neighbour's."""

    def files(self) -> list[str]:
        status, _, body = self.host.get(self.session)
        assert status == 200, body
        return [file["path"] for file in json.loads(body)["files"]]


Judge = Callable[[Attack, list[Result]], Verdict]


@dataclass(frozen=True)
class Try:
    calls: Callable[[Attack], list[Any]]
    judge: Judge


def _refused(attack: Attack, results: list[Result]) -> Verdict:
    """Nothing was read, and nothing was written outside."""
    let_through = [result.text[:200] for result in results if not (result.is_error or result.text == "no matches")]
    outside = [path for path in attack.files() if not path.startswith(("/workspace/", f"{attack.memory}/own/"))]
    outside = [path for path in outside if not path.startswith(f"{attack.memory}/fixed/")]
    return Verdict(bool(let_through or outside), f"not refused: {let_through}; written outside: {outside}")


def _unseen(attack: Attack, results: list[Result]) -> Verdict:
    """The last call finds the agent's own mark; none finds a secret."""
    assert attack.own_mark in results[-1].text, f"not even its own file was found: {results[-1]}"
    texts = "\n".join(result.text for result in results)
    found = [secret for secret in (*attack.host.secrets, attack.mark, '"token"') if secret in texts]
    return Verdict(bool(found), f"{len(results)} calls; found: {found or 'nothing'}")


def _bounded(attack: Attack, results: list[Result]) -> Verdict:
    sizes = [len(result.text) for result in results]
    return Verdict(max(sizes) > _MOST_CHARACTERS, f"results of {sizes} characters")


def _answered(attack: Attack, results: list[Result]) -> Verdict:
    """Each call has an answer, or the turn would not have ended; the suite sees to it that the next turn is served."""
    return Verdict(False, f"{len(results)} answers, {sum(result.is_error for result in results)} of them errors")


def _is_limited(words: str) -> Judge:
    def judge(attack: Attack, results: list[Result]) -> Verdict:
        refusals = [result for result in results if result.is_error and words in result.text]
        return Verdict(not refusals, f"{len(refusals)} of {len(results)} were refused: {words}")

    return judge


def _unforged(attack: Attack, results: list[Result]) -> Verdict:
    assert f'"session":"{attack.session}"' in attack.host.log(), "this is no runner's log"
    forged = [line for line in attack.host.log().splitlines() if attack.own_mark in line]
    return Verdict(bool(forged), f"lines with the agent's words: {forged or 'none'}")


def _unchanged(attack: Attack, results: list[Result]) -> Verdict:
    _, _, body = attack.host.get(attack.session, f"{attack.memory}/fixed/a.md")
    return Verdict(body != b"one\n" or not all(result.is_error for result in results), f"it is {body!r}")


def _intact(attack: Attack, results: list[Result]) -> Verdict:
    verdict = _unseen(attack, results)
    there = "/workspace/own" in attack.files()
    return Verdict(verdict.broke or not there, f"{verdict.evidence}; its own file is there: {there}")


def _inert(attack: Attack, results: list[Result]) -> Verdict:
    status, headers, body = attack.host.get(attack.session, "/workspace/page.html")
    assert (status, body) == (200, b"<script>alert(1)</script>")
    is_inert = (
        headers.get("content-type") == "application/octet-stream"
        and headers.get("content-disposition") == "attachment"
        and headers.get("x-content-type-options") == "nosniff"
        and headers.get("content-security-policy") == "sandbox"
    )
    return Verdict(not is_inert, f"its headers: {headers}")


def _closed(attack: Attack, results: list[Result]) -> Verdict:
    paths = ["", "/workspace/own", "/workspace/%2e%2e/%2e%2e/state", "/%00", "/..%2f..%2f"]
    keys = [None, "wrong", "Bearer", " ", "x" * 5000]
    answers = {
        (session, path, key): attack.host.get(session, path, key=key)[0]
        for session in (attack.session, attack.neighbour, "..%2f..", "%00")
        for path in paths
        for key in keys
    }
    opened = [each for each, status in answers.items() if not 400 <= status < 500]
    with_key = [attack.host.get(attack.session, path)[0] for path in paths]
    assert with_key == [200, 200, 404, 404, 404], with_key
    return Verdict(bool(opened), f"{len(answers)} requests; let in: {opened or 'none'}")


_OUTSIDE = [
    *("/etc/passwd", "/proc/self/environ", "//etc//passwd", "/workspace/../etc/passwd", "/workspace0/a", "/", "/.."),
    *("../" * 12 + "proc/self/environ", "..", "a/../../b", "/workspace/./../../state", "/tmp/../tmp/x"),
]
_ODD = [
    *(
        "..\\..\\etc\\passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        "file:///etc/passwd",
        "~/.ssh/id_rsa",
        "\uff0e\uff0e/etc/passwd",
    ),
    *("/workspace\u0000/../etc/passwd", "a\u0000/../../b", "\u2024\u2024/x", "C:\\x", "$HOME/x", "`id`"),
]


def _all_tools(paths: list[str]) -> list[Any]:
    return [
        each
        for path in paths
        for each in (
            call("read", file_path=path),
            call("read", file_path=path, view_range=[1, 2]),
            call("edit", file_path=path, old_string="a", new_string="b"),
            call("glob", pattern="*", path=path),
            call("grep", pattern=".", path=path),
        )
    ]


def _finds_own(path: str = "") -> Any:
    return call("grep", pattern="rt-", path=path or "own")


_FILLING = ("disk", "names")
_SLOW = ["(a+)+$", "(a|aa)+$", "(.*a){20}b", "(x+x+)+y", "a{1000}{1000}", "(?=a)+", "[" * 900, "(" * 900, "\\1" * 300]

TRIES: dict[str, Try] = {
    "paths": Try(
        lambda a: [
            *_all_tools([*_OUTSIDE, *_ODD]),
            *(call("write", file_path=path, content="x") for path in _OUTSIDE),
            *(call("glob", pattern=pattern) for pattern in ("/etc/*", "../*", "{a,../*}", "**/../../*", "a/../../*")),
        ],
        _refused,
    ),
    "token": Try(
        lambda a: [
            *_all_tools(
                ["state", "/state", "/workspace/.env", ".dev.vars", "env.SESSIONS", "launch", "calls", "marks"]
            ),
            *(call("grep", pattern=pattern, path="/") for pattern in ("sk-ant", "whsec_", "token")),
            call("grep", pattern="."),
            call("glob", pattern="**"),
            call("bash", command="env; cat /proc/self/environ"),
            _finds_own(),
        ],
        _unseen,
    ),
    "queries": Try(
        lambda a: [
            *(
                each
                for evil in (
                    "x' OR '1'='1",
                    "x'; DROP TABLE nodes; --",
                    'x" UNION SELECT value, 1, 1, 1 FROM state; --',
                    "%",
                    "_",
                    "' || (SELECT value FROM state) || '",
                )
                for each in (
                    call("read", file_path=evil),
                    call("write", file_path=f"q/{evil}", content=evil),
                    call("glob", pattern=evil),
                    call("grep", pattern=evil.replace("(", "\\(").replace("|", "\\|")),
                    call("edit", file_path=f"q/{evil}", old_string=evil, new_string=evil * 2),
                )
            ),
            _finds_own(),
        ],
        _intact,
    ),
    "other-sessions": Try(
        lambda a: [
            *_all_tools(
                [
                    *(f"../{a.neighbour}/secret", f"/sessions/{a.neighbour}/files", f"/{a.neighbour}", "secret"),
                    *(f"/workspace/../{a.neighbour}", "/workspace/../../workspace/secret"),
                ]
            ),
            call("grep", pattern="rt-"),
            _finds_own(),
        ],
        _unseen,
    ),
    "other-memory": Try(
        lambda a: [
            *_all_tools([a.memory, f"{a.memory}/theirs/a.md", f"{a.memory}/own/../theirs/a.md", f"{a.memory}/ow"]),
            *_all_tools([f"{a.memory}/own2/a.md", f"{a.memory}/own0", f"{a.memory}/fixed/../../x"]),
            *(
                call("write", file_path=f"{a.memory}/{path}", content="x")
                for path in ("theirs/a.md", "new", "own/../theirs/b.md", "own2/x", "fixed/../y")
            ),
        ],
        _refused,
    ),
    "read-only-memory": Try(
        lambda a: [
            call("write", file_path=f"{a.memory}/fixed/a.md", content="mine"),
            call("write", file_path=f"{a.memory}/own/../fixed/a.md", content="mine"),
            call("write", file_path=f"{a.memory}/fixed//b.md", content="mine"),
            call("write", file_path=f"{a.memory}/fixed/deep/c.md", content="mine"),
            call("edit", file_path=f"{a.memory}/fixed/./a.md", old_string="one", new_string="mine"),
        ],
        _unchanged,
    ),
    "slow-patterns": Try(
        lambda a: [
            call("write", file_path="slow", content=f"{'a' * 1900}!\n" * 100),
            *(call("grep", pattern=pattern, path="slow") for pattern in _SLOW),
            *(call("glob", pattern=pattern) for pattern in ("{a,b}" * 100, "{" * 900, "*a" * 400 + "b", "**/" * 300)),
        ],
        _answered,
    ),
    "big-file": Try(
        lambda a: [call("write", file_path="big", content="x" * (FILE_LIMIT_MB * _MB + 1))],
        _is_limited("larger than"),
    ),
    "disk": Try(
        lambda a: (
            [call("write", file_path=f"disk/{n}", content="x" * (5 * _MB)) for n in range(3)]
            + [call("write", file_path=f"disk/{n}", content="") for n in range(3)]
        ),
        _is_limited("no space left"),
    ),
    "names": Try(
        lambda a: [
            call("write", file_path="n" * 256, content=""),
            call("write", file_path="d/" * 2100, content=""),
            *(call("write", file_path=f"{n}{'/d' * 1500}", content="x") for n in range(8)),
        ],
        _is_limited("no space left"),
    ),
    "output": Try(
        lambda a: [
            call("write", file_path="out", content=f"{'y' * 1000}\n" * 2000),
            call("read", file_path="out"),
            call("read", file_path="out", view_range=[1, -1]),
            call("grep", pattern="y"),
            call("glob", pattern="**"),
            call("write", file_path="out", content=""),
        ],
        _bounded,
    ),
    "shapes": Try(
        lambda a: [
            call("read"),
            call("read", file_path=["a"]),
            call("read", file_path="own", view_range=[1, {}]),
            call("read", file_path="own", view_range=[-(2**53), 2**53]),
            call("write", file_path="f", content={"not": "text"}),
            call("write", file_path={"toString": "x"}, content="x"),
            call("edit", file_path="own", old_string="", new_string="x"),
            call("edit", file_path="own", old_string=None, new_string=5),
            call("glob", pattern=[]),
            call("glob", pattern="*", path=7),
            call("grep", pattern={}),
            call("bash", command={"a": []}, restart="yes"),
            call("write", file_path="__proto__", content="x"),
            call("write", file_path="constructor/prototype", content="\U0001f600"),
        ],
        _answered,
    ),
    "wreck": Try(
        lambda a: [
            *(call("write", file_path=path, content="x") for path in (".", "/workspace", "/workspace/", "skills")),
            *(call("write", file_path=path, content="x") for path in ("skills/greeter", "inputs", f"{a.memory}/own")),
            *(call("write", file_path=path, content="\u0000\u0001") for path in ("skills/greeter/SKILL.md", "memory")),
        ],
        _answered,
    ),
    "forged-log": Try(
        lambda a: [
            call("write", file_path=f'x\n{{"event":"exit","code":0,"reason":"{a.own_mark}"}}', content=a.own_mark),
            call("read", file_path=f"\u001b[2J{a.own_mark}"),
            call("grep", pattern=f"({a.own_mark}"),
            call("bash", command=a.own_mark),
        ],
        _unforged,
    ),
    "download": Try(
        lambda a: [call("write", file_path="page.html", content="<script>alert(1)</script>")],
        _inert,
    ),
    "strangers": Try(lambda a: [call("write", file_path="open", content="x")], _closed),
}


class FileRedTeam:
    """Subclass as `class Test<Name>RedTeam(FileRedTeam)` in tests/providers/test_<name>_redteam.py, with a fixture
    `host`."""

    provider: ClassVar[str]
    """The name of the provider's file in tests/redteam/stated, without .toml."""

    def stated(self) -> dict[str, statements.Statement]:
        return statements.read(self.provider)

    @pytest.fixture
    def attack(self, host: FileHost) -> Attack:
        emulator = host.emulator
        stores = [
            emulator.add_memory_store("own", {"/a.md": "mine\n"}),
            emulator.add_memory_store("fixed", {"/a.md": "one\n"}, "read_only"),
        ]
        skill = emulator.add_skill("greeter", {"SKILL.md": "---\nname: greeter\n---\n"})
        session = emulator.create_session(resources=stores, skills=[skill])
        attack = Attack(host, session, emulator.create_session(), emulator.memory_root)
        theirs = emulator.add_memory_store("theirs", {"/a.md": attack.mark})
        attack.neighbour = emulator.create_session(resources=[theirs])
        return attack

    def test_the_statements_are_true(self, attack: Attack) -> None:
        emulator = attack.host.emulator
        tried = [name for name, each in self.stated().items() if each.outcome != "not_tried"]
        tried.sort(key=lambda name: name in _FILLING)  # after these nothing more can be written
        calls = {name: TRIES[name].calls(attack) for name in tried}
        own = tools(call("write", file_path="own", content=attack.own_mark))
        _script(emulator, attack.neighbour, tools(call("write", file_path="secret", content=attack.mark)))
        _script(emulator, attack.session, own, *(tools(*every) for every in calls.values()))
        for session in (attack.session, attack.neighbour):
            emulator.say(session, "go")
        for session in (attack.neighbour, attack.session):
            emulator.wait_idle(session, _PATIENCE_SECONDS)
        results = iter(_results(emulator, attack.session)[1:])
        answers = {name: [next(results) for _ in every] for name, every in calls.items()}
        assert next(results, None) is None
        self._go_on(attack)
        assert_true(self.stated(), {name: TRIES[name].judge(attack, answers[name]) for name in tried})

    def _go_on(self, attack: Attack) -> None:
        """After all that, the next message finds a runner, its skill, its memory and its file."""
        emulator, before = attack.host.emulator, len(_results(attack.host.emulator, attack.session))
        emulator.wait_for(attack.session, "stopped", _PATIENCE_SECONDS)
        paths = ("own", "skills/greeter/SKILL.md", f"{attack.memory}/own/a.md", f"{attack.memory}/fixed/a.md")
        _script(emulator, attack.session, *(tools(call("read", file_path=path)) for path in paths))
        emulator.say(attack.session, "go on")
        emulator.wait_idle(attack.session, _PATIENCE_SECONDS)
        found = _results(emulator, attack.session)[before:]
        assert found[0] == Result(False, attack.own_mark)
        assert [each.text for each in found[2:]] == ["mine\n", "one\n"]
        assert not found[1].is_error


def _script(emulator: Emulator, session: str, *steps: Step) -> None:
    emulator.set_script(session, [*steps, say("done"), end()])


def _results(emulator: Emulator, session: str) -> list[Result]:
    """In the order of the calls."""
    given = {event["tool_use_id"]: event for event in emulator.events(session, "user.tool_result")}
    return [
        Result(bool(given[use["id"]].get("is_error")), "".join(b.get("text", "") for b in given[use["id"]]["content"]))
        for use in emulator.events(session, "agent.tool_use")
    ]
