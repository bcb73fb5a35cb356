"""The command's flags for trouble and scenarios, as a process where it matters."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.emulator.support import bearer
from tools.emulator import AdminClient, Emulator
from tools.emulator.flags import make_trouble, parser

COMMAND = [sys.executable, "-W", "error", "-m", "tools.emulator", "--port", "0"]
SECONDS = 60.0


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process and its ready line."""
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def test_the_flags_make_the_trouble_they_spell() -> None:
    emulator = Emulator()
    options = parser().parse_args(
        [
            *("--switch", "lease_lapse=requeue", "--switch", "environment_key_may_answer=false"),
            *("--fault", "work.ack=lose_response,count=2,after=1", "--fault", "*=fail,status=503,count=none"),
            *("--cut-stream", "4", "--webhook-fault", "delay,seconds=30", "--skew", "-90"),
        ]
    )
    make_trouble(emulator, options)
    assert (emulator.switches.lease_lapse, emulator.switches.environment_key_may_answer) == ("requeue", False)
    assert emulator.clock.skew.total_seconds() == -90
    told = [fault.shown() for fault in emulator.faults()]
    assert len({fault.pop("id") for fault in told}) == 4
    shown = [{name: value for name, value in fault.items() if value} for fault in told]
    assert shown == [
        {"on": "request", "operation": "work.ack", "kind": "lose_response", "count": 2, "status": 500, "after": 1},
        {"on": "request", "operation": "*", "kind": "fail", "status": 503},
        {"on": "stream", "after_events": 4, "count": 1},
        {"on": "webhook", "kind": "delay", "count": 1, "seconds": 30.0},
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--switch", "gravity=1"], "not NAME=VALUE; the names are credentials"),
        (["--fault", "work.acks=drop"], "operation: 'work.acks' is not one of"),
        (["--fault", "work.ack"], "is not NAME=VALUE in OPERATION=KIND"),
        (["--fault", "work.ack=explode"], "kind: Input should be"),
        (["--fault", "work.ack=drop,often=2"], "often: not a fault field"),
        (["--webhook-fault", "delay"], "seconds: delay needs a positive number"),
        (["--fault", "work.ack=delay,seconds=nan"], "seconds: nan is not a number of seconds within ten years"),
        (["--fault", "work.ack=delay,seconds=1e300"], "within ten years"),
        (["--webhook-fault", "delay,seconds=inf"], "within ten years"),
        (["--skew", "1e30"], "skew: 1e+30 is not a number of seconds within ten years"),
        (["--skew", "nan"], "skew: nan is not"),
        (["--environment-id", "a b/c"], "letters, digits, _ and - only"),
        (["--scenario", "load", "--set", "a=[1"], "its value is not YAML"),
        (["--cut-stream", "-1"], "after_events"),
        (["--scenario", "gone"], "no such file, and not one of fix_a_failing_test"),
        (["--scenario", "load", "--set", "crowds=3"], "crowds: not among its vars"),
        (["--set", "sessions=3"], "belong to a --scenario"),
        (["--exit-when-done"], "belong to a --scenario"),
    ],
)
def test_a_bad_argument_is_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tools.emulator.__main__ import main

    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_trouble_and_the_admin_api_of_a_process() -> None:
    with running("--fault", "work.poll=fail,status=529") as (process, ready), AdminClient(ready["url"]) as admin:
        state = admin.state()
        assert {name: state[name] for name in ready} == ready
        path = f"/v1/environments/{ready['environment_id']}/work/poll"
        with httpx2.Client(base_url=ready["url"], headers=bearer(ready["environment_key"])) as http:
            assert [http.get(path).status_code for _ in range(2)] == [529, 200]
        assert admin.requests()[0].fault == "fail"
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0


STORY = """
about: Needs no worker.
sessions:
  main:
    script: [{say: hello}, end]
plot:
  - say: {session: main, text: go}
  - check: {session: main, said: SAID}
"""


@pytest.mark.parametrize(("said", "code"), [("hello", 0), ("goodbye", 1)])
def test_a_scenario_ends_the_process_with_its_verdict(tmp_path: Path, said: str, code: int) -> None:
    story = tmp_path / "story.yaml"
    story.write_text(STORY.replace("SAID", said))
    with running("--scenario", str(story), "--exit-when-done") as (process, ready):
        assert process.stdout is not None
        assert process.stderr is not None
        verdict = json.loads(process.stdout.read())  # one line more, up to the end
        assert (process.wait(SECONDS), process.stderr.read()) == (code, "")
    (session_id,) = ready["sessions"]["main"]
    assert (verdict["scenario"], verdict["passed"]) == ("story", code == 0)
    assert all(session_id in failure for failure in verdict["failures"])
    assert len(verdict["failures"]) == code


def test_after_a_scenario_the_emulator_stays(tmp_path: Path) -> None:
    story = tmp_path / "story.yaml"
    story.write_text(STORY.replace("SAID", "hello"))
    with running("--scenario", str(story)) as (process, ready):
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["passed"] is True
        with AdminClient(ready["url"]) as admin:
            assert admin.events(ready["sessions"]["main"][0], "agent.message")
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
