"""providers/cloudflare-worker in real workerd, from a copy of the folder alone: over HTTP, those journeys of
tests.contract that need no shell, and what only this provider can get wrong.

One `wrangler dev` and one emulator serve all journeys of a test process. Its lease is short, so that the alarms which
keep sessions alive come often; its webhooks are signed with the second key, as during a rotation.
"""

from __future__ import annotations

import base64
import gzip
import hmac
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.providers.workers_dev import WAIT_SECONDS, Seen, WorkersDev, settings_for, workspace
from tests.world import HEALABLE_SECONDS, LAPSE_SECONDS, RECLAIM_SECONDS
from tools import typescript
from tools.emulator import Emulator, Step, Switches, call, custom, end, repeat_output, tools

NAME = "cloudflare-worker"
FILES_KEY = "a-password-of-our-choice"
LEASE_SECONDS = 20
MILLISECONDS = 250  # a launch takes fewer where nothing else is going on
FREE_PLAN_BYTES = 3 * 1024 * 1024  # of the compressed bundle
STARTING_SECONDS = 151.0  # past the wait before an item without a claim is looked at


def new_key() -> str:
    """A webhook signing key as the Console shows it: URL-safe base64 without padding."""
    return f"whsec_{base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip('=')}"


def key_bytes(key: str) -> bytes:
    encoded = key.removeprefix("whsec_").rstrip("=").replace("+", "-").replace("/", "_")
    return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))


FIRST_KEY = new_key()

pytestmark = pytest.mark.timeout(300)  # the first test of a process may install


@pytest.fixture(scope="module")
def folder() -> Path:
    return workspace(NAME)


@pytest.fixture(scope="module")
def shared_emulator() -> Iterator[Emulator]:
    with Emulator(lease_ttl=LEASE_SECONDS) as emulator:
        yield emulator


@pytest.fixture(scope="module")
def dev(folder: Path, shared_emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkersDev]:
    emulator = shared_emulator
    settings = {
        "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
        "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
        "ANTHROPIC_BASE_URL": emulator.url,
        "ANTHROPIC_WEBHOOK_SIGNING_KEY": FIRST_KEY,
        "ANTHROPIC_WEBHOOK_SIGNING_KEY_NEXT": emulator.webhook_key,
        "SANDBOX_MAX_IDLE_SECONDS": "0.2",
        "SANDBOX_MAX_WAIT_SECONDS": "60",
        "SANDBOX_MAX_LIVE": "150",
        "FILES_KEY": FILES_KEY,
    }
    dev = WorkersDev(folder, tmp_path_factory.mktemp("dev"), settings)
    dev.start()
    emulator.set_webhook_url(f"{dev.url}/webhook")
    try:
        yield dev
    finally:
        dev.stop()


@pytest.fixture
def emulator(dev: WorkersDev, shared_emulator: Emulator) -> Iterator[Emulator]:
    yield shared_emulator
    shared_emulator.clear_faults()
    shared_emulator.switch(**asdict(Switches()))


def start(emulator: Emulator, *steps: Step, **options: object) -> Seen:
    """A session whose agent does `steps`, not yet spoken to."""
    seen = Seen(emulator, emulator.create_session(**options))  # type: ignore[arg-type]
    emulator.set_script(seen.session, list(steps))
    return seen


def ask(emulator: Emulator, *steps: Step, **options: object) -> Seen:
    seen = start(emulator, *steps, **options)
    emulator.say(seen.session, "go")
    return seen


def answer_theirs(emulator: Emulator, session: str, text: str = "done") -> None:
    """The other client's tool has run."""
    (left,) = emulator.pending_calls(session)
    content = [{"type": "text", "text": text}]
    emulator.send(session, {"type": "user.custom_tool_result", "custom_tool_use_id": left, "content": content})


def write(path: str, content: str) -> Step:
    return tools(call("write", file_path=path, content=content))


def read(path: str) -> Step:
    return tools(call("read", file_path=path))


# --- the folder ------------------------------------------------------------------------------------------------------


def test_a_copy_of_the_folder_can_be_deployed(folder: Path, tmp_path: Path) -> None:
    argv = [typescript.program(folder, "wrangler"), "deploy", "--dry-run", "--outdir", str(tmp_path)]
    done = subprocess.run(argv, cwd=folder, env=typescript.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "env.SESSIONS (SessionObject)" in done.stdout
    assert len(gzip.compress((tmp_path / "index.js").read_bytes())) < FREE_PLAN_BYTES


def test_its_unit_tests_pass_in_workerd(folder: Path, shared_emulator: Emulator) -> None:
    argv = [typescript.program(folder, "vitest"), "run"]
    environ = typescript.environment() | {"EMULATOR_URL": shared_emulator.url}
    done = subprocess.run(argv, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


OFFICIAL_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("write", {"file_path": "a.txt", "content": "one\ntwo\nthree\n"}),
    ("write", {"file_path": "dir/b.ts", "content": "ü one\r\ntwo"}),
    ("write", {"file_path": "dir/deep/c.tsx", "content": ""}),
    ("write", {"file_path": ".hidden/d.ts", "content": "one"}),
    ("write", {"file_path": "node_modules/m.ts", "content": "one"}),
    ("write", {"file_path": "[x].md", "content": "x" * 2001 + "one"}),
    ("write", {"file_path": "large", "content": "line of some length\n" * 20_000}),
    ("write", {"file_path": "nul", "content": "one\n\0one"}),
    ("write", {"file_path": "dir", "content": ""}),
    ("write", {"file_path": ".dot", "content": ""}),
    ("write", {"file_path": "dir/.dot.ts", "content": ""}),
    ("write", {"file_path": "../out", "content": ""}),
    ("write", {"file_path": "", "content": ""}),
    *(
        ("read", {"file_path": path})
        for path in ("a.txt", "./dir//b.ts", "dir", "none", "/etc/passwd", "large", "a.txt/x", "")
    ),
    *(("read", {"file_path": "a.txt", "view_range": [a, b]}) for a in (-1, 0, 1, 2, 4, 9) for b in (-1, 0, 1, 3, 9)),
    *(
        ("read", {"file_path": "large", "view_range": [a, b]})
        for a, b in ((1, 2), (19_999, -1), (20_001, -1), (5, 4), (1, -1))
    ),
    ("read", {"file_path": "a.txt", "view_range": []}),
    ("read", {"file_path": "a.txt", "view_range": [1]}),
    ("edit", {"file_path": "a.txt", "old_string": "o", "new_string": "0"}),
    ("edit", {"file_path": "a.txt", "old_string": "o", "new_string": "$&", "replace_all": True}),
    ("edit", {"file_path": "a.txt", "old_string": "tw", "new_string": "$1"}),
    ("edit", {"file_path": "a.txt", "old_string": "absent", "new_string": ""}),
    ("edit", {"file_path": "a.txt", "old_string": "", "new_string": ""}),
    ("edit", {"file_path": "large", "old_string": "line", "new_string": ""}),
    ("edit", {"file_path": "none", "old_string": "x", "new_string": ""}),
    ("edit", {"file_path": "dir", "old_string": "x", "new_string": ""}),
    ("read", {"file_path": "a.txt"}),
    *(
        ("glob", {"pattern": pattern})
        for pattern in (
            *(
                "*",
                "**",
                "**/*",
                "*.ts",
                "**/*.ts",
                "dir/*",
                "dir/**",
                "dir/**/*.tsx",
                "*.{txt,md}",
                "{dir,x}/*.ts",
                "?.txt",
            ),
            *(
                "[ab].txt",
                "[!b].txt",
                "[[]x].md",
                "dir",
                "none/*",
                "",
                "/etc/*",
                "../*",
                "a.txt",
                "./a.txt",
                "**/c.*",
                ".*",
                "**/.*",
                ".hidden/*",
                ".hidden/**",
                "?dot",
                "[.]dot",
                "**/?dot.ts",
                "d*/*",
            ),
        )
    ),
    ("glob", {"pattern": "*", "path": "dir"}),
    ("glob", {"pattern": "*", "path": "/etc"}),
    *(
        ("grep", {"pattern": pattern})
        for pattern in ("one", "^tw", "e$", "[ü]", "absent", "", "(one|two)", r"\bone\b", "^o.e")
    ),
    ("grep", {"pattern": "one", "path": "dir"}),
    ("grep", {"pattern": "th", "path": "a.txt"}),
    ("grep", {"pattern": "one", "path": "none"}),
    ("grep", {"pattern": "one", "path": "/etc"}),
]


def test_the_toolset_is_the_official_one_in_schema_and_words(folder: Path) -> None:
    """Each call on both: the SDK's own toolset on a disk, ours on its SQLite."""
    script = Path(__file__).with_name("official_toolset.mts")
    argv = [str(typescript.node()), "--experimental-strip-types", "--no-warnings", str(script)]
    environ = typescript.environment() | {"PATH": str(typescript.node().parent)}  # without ripgrep, as in many images
    given = json.dumps(OFFICIAL_CALLS)
    done = subprocess.run(argv, cwd=folder, env=environ, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *differences, last = done.stdout.splitlines()
    assert differences == []
    assert json.loads(last) == {"calls": len(OFFICIAL_CALLS)}


# --- the main job ----------------------------------------------------------------------------------------------------


def test_a_session_is_served_from_first_message_to_idle_exit(emulator: Emulator) -> None:
    seen = ask(emulator, write("greeting.txt", "hello"), read("greeting.txt"), repeat_output, end())
    assert seen.wait_idle() == "hello"
    seen.wait_stopped()
    assert seen.results() == [(False, "wrote 5 bytes to greeting.txt"), (False, "hello")]
    assert (seen.claims(), len(seen.requests("work.ack"))) == (1, 1)
    assert [record.status for record in seen.requests("work.stop")] == [200]


def test_nothing_of_a_session_is_asked_with_the_environment_key(emulator: Emulator) -> None:
    seen = ask(emulator, write("a", "1"), end())
    seen.wait_stopped()
    asked = [record for record in emulator.requests if seen.session in record.path]
    assert {record.credential for record in asked} == {"sessions_token"}
    assert "session-tool-runner" in {record.helper for record in asked}


def test_the_next_message_finds_the_files(emulator: Emulator) -> None:
    seen = ask(emulator, write("file.txt", "kept"), end(), read("file.txt"), repeat_output, end())
    seen.wait_stopped()
    emulator.say(seen.session, "again")
    assert seen.wait_idle() == "kept"
    assert seen.claims() == 2


def test_two_messages_in_one_run_need_one_claim(emulator: Emulator) -> None:
    seen = ask(emulator, tools(custom("theirs")), end(), write("a", "1"), end())
    seen.wait_until(lambda: len(seen.requests("events.stream")) == 1)
    emulator.say(seen.session, "again")  # while the first turn is under way
    answer_theirs(emulator, seen.session)
    seen.wait_until(lambda: (False, "wrote 1 bytes to a") in seen.results())
    seen.wait_stopped()
    assert seen.claims() == 1


def test_another_sessions_files_are_not_there(emulator: Emulator) -> None:
    ask(emulator, write("secret.txt", "mine"), end()).wait_stopped()
    other = ask(emulator, tools(call("glob", pattern="**")), repeat_output, end())
    assert other.wait_idle() == "no matches"


def test_a_message_during_the_exit_is_served(emulator: Emulator) -> None:
    emulator.fault("work.stop", "delay", seconds=1)  # carried out, and the runner still waits for the answer
    seen = ask(emulator, write("a", "1"), end(), read("a"), repeat_output, end())
    seen.wait_stopped()
    emulator.say(seen.session, "again")
    assert seen.wait_idle() == "1"
    assert seen.claims() == 2


def test_a_lost_webhook_is_made_up_for_by_the_sweep(emulator: Emulator, dev: WorkersDev) -> None:
    emulator.webhooks_paused = True
    try:
        seen = ask(emulator, write("a", "1"), end())
        dev.sweep()
        seen.wait_stopped()
    finally:
        emulator.webhooks_paused = False
    assert seen.results() == [(False, "wrote 1 bytes to a")]


def test_a_webhook_is_answered_before_the_queue_is(emulator: Emulator) -> None:
    emulator.fault("work.poll", "delay_request", count=1, seconds=1.5)
    seen = ask(emulator, write("a", "1"), end())
    seen.wait_until(lambda: any(d.session_id == seen.session for d in emulator.deliveries))
    first = next(delivery for delivery in emulator.deliveries if delivery.session_id == seen.session)
    assert first.is_ok
    assert seen.state == "queued"
    seen.wait_stopped()


# --- a host that dies ------------------------------------------------------------------------------------------------


def test_killed_while_a_result_is_on_its_way_it_goes_on_and_runs_nothing_twice(
    emulator: Emulator, dev: WorkersDev
) -> None:
    """The change and its result are one transaction: what was not posted is posted, by another runner's memory."""
    seen = start(emulator, write("a", "1"), tools(call("edit", file_path="a", old_string="1", new_string="11")), end())
    emulator.fault("events.send", "drop", count=None, after=1)
    since = len(dev.log)
    emulator.say(seen.session, "go")
    dev.until_logged('"event":"tool".*"name":"edit"', since)
    dev.kill()
    emulator.clear_faults()
    dev.start()
    seen.wait_stopped()
    assert seen.results() == [(False, "wrote 1 bytes to a"), (False, "edited a (1 replacement(s))")]
    assert seen.claims() == 1, "a second NO_HEARTBEAT"
    assert '"event":"resumed"' in dev.log[since:]


def lost_hand_outs(emulator: Emulator) -> int:
    """Those that were carried out: a fault counts its hit before that, which may be another time of the clock."""
    return sum((each.operation, each.fault) == ("work.poll", "lose_response") for each in emulator.requests)


def test_killed_between_the_hand_out_and_the_ack_the_item_is_offered_again(emulator: Emulator, dev: WorkersDev) -> None:
    before = lost_hand_outs(emulator)
    emulator.fault("work.poll", "lose_response")
    seen = ask(emulator, write("a", "1"), end())
    emulator.wait_until(lambda: lost_hand_outs(emulator) > before, WAIT_SECONDS)
    dev.kill()
    emulator.advance(RECLAIM_SECONDS)
    dev.start()
    dev.sweep()
    seen.wait_stopped()
    assert (seen.claims(), seen.results()) == (1, [(False, "wrote 1 bytes to a")])


def test_killed_for_longer_than_the_lease_the_session_goes_on(emulator: Emulator, dev: WorkersDev) -> None:
    seen = start(emulator, write("a", "1"), read("a"), repeat_output, end())
    emulator.fault("events.send", "drop", count=None)
    since = len(dev.log)
    emulator.say(seen.session, "go")
    dev.until_logged('"event":"tool".*"name":"write"', since)
    dev.kill()
    emulator.clear_faults()
    emulator.advance(LAPSE_SECONDS)
    assert seen.state == "stopped"
    dev.start()
    assert seen.wait_idle() == "1"
    assert seen.results() == [(False, "wrote 1 bytes to a"), (False, "1")]


def test_a_session_whose_object_is_gone_is_healed(emulator: Emulator, dev: WorkersDev) -> None:
    """A runner that nobody here knows claimed the item and died."""
    emulator.webhooks_paused = True
    seen = start(emulator, read("a"), repeat_output, end())
    emulator.say(seen.session, "go")
    emulator.claim_and_die(seen.session)
    emulator.webhooks_paused = False
    emulator.advance(LAPSE_SECONDS)
    emulator.advance(HEALABLE_SECONDS)
    dev.sweep()
    assert "lost" in seen.wait_idle()
    assert [is_error for is_error, _ in seen.results()] == [True]


def test_an_item_acked_and_never_claimed_is_freed(emulator: Emulator, dev: WorkersDev) -> None:
    emulator.switch(never_beaten="frozen")
    emulator.fault("work.heartbeat", "fail", count=None, status=400)  # the claim is refused: the runner leaves
    seen = ask(emulator, write("a", "1"), end())
    seen.wait_until(lambda: seen.state == "starting" and len(seen.requests("work.heartbeat")) == 1)
    emulator.clear_faults()
    emulator.advance(STARTING_SECONDS)
    dev.sweep()
    assert seen.state == "stopped"
    emulator.advance(HEALABLE_SECONDS)
    dev.sweep()
    seen.wait_idle()
    assert "lost" in seen.results()[0][1]


# --- leases ----------------------------------------------------------------------------------------------------------


def test_an_operators_graceful_stop_ends_the_item(emulator: Emulator) -> None:
    seen = ask(emulator, tools(custom("theirs")), end())
    seen.wait_until(lambda: seen.claims() == 1)
    assert emulator.stop_work(seen.session)["state"] == "stopping"
    seen.wait_stopped()


def test_a_message_after_an_operators_forced_stop_is_served_by_a_new_runner(
    emulator: Emulator, dev: WorkersDev
) -> None:
    """The item is queued again while the old runner believes that it holds it: the newcomer asks, and it makes room."""
    since = len(dev.log)
    seen = ask(emulator, tools(custom("theirs")), end(), write("a", "1"), end())
    seen.wait_until(lambda: seen.claims() == 1 and len(seen.requests("events.stream")) == 1)
    emulator.stop_work(seen.session, force=True)
    emulator.send(seen.session, {"type": "user.interrupt"})
    emulator.say(seen.session, "again")
    seen.wait_until(lambda: seen.results() == [(False, "wrote 1 bytes to a")])
    seen.wait_until(lambda: seen.claims() == 2)
    dev.until_logged(f'"event":"exit","session":"{seen.session}","code":(143|76|0)', since)
    seen.wait_stopped()
    assert seen.results() == [(False, "wrote 1 bytes to a")]


def test_a_session_without_a_message_is_not_waited_for(emulator: Emulator, dev: WorkersDev) -> None:
    seen = start(emulator, write("a", "1"), end())
    dev.sweep()
    seen.wait_stopped()
    emulator.say(seen.session, "go")
    seen.wait_until(lambda: seen.results() == [(False, "wrote 1 bytes to a")])
    assert seen.claims() == 2


def test_a_held_call_waits_for_its_verdict(emulator: Emulator) -> None:
    seen = ask(emulator, tools(call("write", file_path="a", content="1", permission="ask")), end())
    seen.wait_until(lambda: len(seen.requests("events.stream")) == 1)
    (held,) = emulator.pending_calls(seen.session)
    assert seen.results() == []
    emulator.send(seen.session, {"type": "user.tool_confirmation", "tool_use_id": held, "result": "allow"})
    seen.wait_stopped()
    assert seen.results() == [(False, "wrote 1 bytes to a")]


def test_a_tool_nobody_here_owns_is_left_to_its_owner(emulator: Emulator) -> None:
    seen = ask(emulator, tools(custom("theirs", x=1), call("write", file_path="a", content="1")), repeat_output, end())
    seen.wait_until(lambda: len(seen.results()) == 1)
    answer_theirs(emulator, seen.session, "theirs answered")
    assert sorted(seen.wait_idle().splitlines()) == ["theirs answered", "wrote 1 bytes to a"]


def test_an_interrupted_call_is_not_run(emulator: Emulator, dev: WorkersDev) -> None:
    emulator.webhooks_paused = True
    seen = ask(emulator, write("a", "1"), end(), tools(call("glob", pattern="*")), repeat_output, end())
    emulator.send(seen.session, {"type": "user.interrupt"})
    emulator.webhooks_paused = False
    emulator.say(seen.session, "again")
    dev.sweep()
    seen.wait_stopped()
    said = [event["content"][0]["text"] for event in emulator.events(seen.session, "agent.message")]
    assert said[-1] == "no matches"


def test_an_item_without_a_secret_is_refused(emulator: Emulator, dev: WorkersDev) -> None:
    emulator.switch(secret="null")
    since = len(dev.log)
    seen = ask(emulator, write("a", "1"), end())
    dev.until_logged(f"action=refused work={seen.session} .*no usable secret.*ALLOW_ENVIRONMENT_KEY_IN_SANDBOX", since)
    assert seen.state == "queued"
    emulator.delete_session(seen.session)


def test_with_other_settings_it_serves_items_without_a_secret_and_brings_files(folder: Path, tmp_path: Path) -> None:
    """ALLOW_ENVIRONMENT_KEY_IN_SANDBOX, SANDBOX_STAGE_FILES. One `wrangler dev` shows both."""
    more = {"ALLOW_ENVIRONMENT_KEY_IN_SANDBOX": "true", "SANDBOX_STAGE_FILES": "true"}
    with Emulator() as emulator, WorkersDev(folder, tmp_path, settings_for(emulator, **more)) as dev:
        emulator.set_webhook_url(f"{dev.url}/webhook")
        emulator.switch(secret="null")
        notes = f"{emulator.memory_root}/notes/a.md"
        store = emulator.add_memory_store("notes", {"/a.md": "one\n"})
        seen = ask(emulator, write("a", "1"), read(notes), end(), resources=[store])
        seen.wait_stopped()
        outside = f'path "{notes}" is outside the session\'s working directory'
        assert seen.results() == [(False, "wrote 1 bytes to a"), (True, outside)]
        assert {record.credential for record in seen.requests("events.send")} == {"environment_key"}
        assert emulator.environment_key not in dev.log

        emulator.switch(secret="present", sessions_token_may_read_skills=False)
        skill = emulator.add_skill("greeter", SKILL, "zip")
        paths = ("skills/greeter/bin/greet", "inputs/ERRORS.txt")
        steps = [step for path in paths for step in (read(path), repeat_output)]
        seen = ask(emulator, *steps, end(), skills=[skill], metadata={"input:a": "http://files.example/a"})
        seen.wait_stopped()
        assert seen.results() == [(False, "echo hello\n"), (False, "a: it is not https\n")]
        dev.until_logged(f"action=stage session={seen.session} reason=.2 files of skills, 1 of inputs", 0)
        assert "is left out" not in dev.log


def test_a_healthcheck_is_stopped(emulator: Emulator, dev: WorkersDev) -> None:
    since = len(dev.log)
    emulator.add_healthcheck()
    dev.sweep()
    dev.until_logged("action=healthcheck", since)


# --- what the server may be like, and what may go wrong on the way ----------------------------------------------------

SWITCHES = [
    {"work_id": "work_"},
    {"secret": "extra_keys"},
    {"lease_lapse": "requeue"},
    {"ack_on_claimed": 409},
    {"stop_reply": 204},
    {"token_after_stop": "401"},
    {"repeated_secret": "fresh_only"},
    {"created_at_after_requeue": "new"},
    {"duplicate_tool_result": 200},
    {"unprocessed_input_at_stop": "strand"},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: "-".join(map(str, *switch.items())))
def test_whatever_the_server_is_like_both_messages_are_served(emulator: Emulator, switch: dict[str, object]) -> None:
    emulator.switch(**switch)
    seen = ask(emulator, write("a", "1"), end(), read("a"), repeat_output, end())
    seen.wait_stopped()
    emulator.say(seen.session, "again")
    assert seen.wait_idle() == "1"
    assert seen.claims() == 2
    seen.wait_stopped()


FAULTS = [
    ("work.poll", "fail", {"status": 503}),
    ("work.poll", "drop", {}),
    ("work.ack", "lose_response", {}),
    ("sessions.get", "fail", {"status": 500, "count": 2}),
    ("events.stream", "drop", {"count": 2}),
    ("events.list", "fail", {"status": 502, "count": 3}),
    ("events.send", "lose_response", {}),
    ("events.send", "duplicate", {}),
    ("events.send", "fail", {"status": 503, "count": 2}),
    ("work.stop", "lose_response", {}),
    ("work.stop", "fail", {"status": 500}),
]


@pytest.mark.parametrize(("operation", "kind", "how"), FAULTS, ids=[f"{o}-{k}" for o, k, _ in FAULTS])
def test_whatever_goes_wrong_on_the_way_the_turn_is_served_once(
    emulator: Emulator, operation: str, kind: str, how: dict[str, int]
) -> None:
    fault = emulator.fault(operation, kind, **how)  # type: ignore[arg-type]
    seen = ask(emulator, write("a", "1"), tools(call("edit", file_path="a", old_string="1", new_string="11")), end())
    seen.wait_stopped()
    assert fault.hits == how.get("count", 1)
    assert seen.results() == [(False, "wrote 1 bytes to a"), (False, "edited a (1 replacement(s))")]
    assert seen.claims() == 1


def test_an_ack_that_fails_leaves_the_item_to_be_offered_again(emulator: Emulator, dev: WorkersDev) -> None:
    fault = emulator.fault("work.ack", "fail", status=500)
    seen = ask(emulator, write("a", "1"), end())
    seen.wait_until(lambda: [beat.status for beat in seen.requests("work.heartbeat")] == [412])
    emulator.advance(RECLAIM_SECONDS)
    dev.sweep()
    seen.wait_stopped()
    assert (fault.hits, seen.claims(), seen.results()) == (1, 1, [(False, "wrote 1 bytes to a")])


def test_lost_beats_do_not_end_a_runner(emulator: Emulator) -> None:
    """The beat was recorded and not answered: the next one is a 412, and the lease is still ours (R2)."""
    seen = ask(emulator, tools(custom("theirs")), write("a", "1"), end())
    seen.wait_until(lambda: seen.claims() == 1)
    emulator.fault("work.heartbeat", "lose_response", count=None)  # whoever else still beats
    seen.wait_until(lambda: any(beat.fault for beat in seen.requests("work.heartbeat")))
    emulator.clear_faults()
    seen.wait_until(lambda: any(beat.status == 412 for beat in seen.requests("work.heartbeat")))
    answer_theirs(emulator, seen.session)
    seen.wait_stopped()
    assert (seen.results()[-1], seen.claims()) == ((False, "wrote 1 bytes to a"), 1)


def test_a_stream_cut_in_the_middle_is_opened_again(emulator: Emulator) -> None:
    seen = start(emulator, write("a", "1"), read("a"), repeat_output, end())
    emulator.cut_stream(seen.session, after_events=3)
    emulator.say(seen.session, "go")
    assert seen.wait_idle() == "1"
    seen.wait_stopped()


# --- what a session brings along -------------------------------------------------------------------------------------

SKILL = {"SKILL.md": "---\nname: greeter\ndescription: greets\n---\n", "bin/greet": "echo hello\n"}


@pytest.mark.parametrize("archive", ["zip", "tar"])
def test_skills_are_in_the_workdir(emulator: Emulator, archive: str) -> None:
    skill = emulator.add_skill("greeter", SKILL, archive)  # type: ignore[arg-type]
    seen = ask(emulator, read("skills/greeter/bin/greet"), repeat_output, end(), skills=[skill])
    assert seen.wait_idle() == "echo hello\n"


def test_a_skill_that_cannot_be_had_is_left_out(emulator: Emulator, dev: WorkersDev) -> None:
    emulator.switch(sessions_token_may_read_skills=False)
    skill = emulator.add_skill("refused", SKILL)
    since = len(dev.log)
    seen = ask(emulator, tools(call("glob", pattern="**")), repeat_output, end(), skills=[skill])
    assert seen.wait_idle() == "no matches"
    dev.until_logged(f"action=skill session={seen.session} .*{skill} is left out", since)


def test_memory_is_mounted_shared_and_kept_in_step(emulator: Emulator) -> None:
    store = emulator.add_memory_store("notes", {"/a.md": "one\n", "/deep/b.md": "two\n"})
    root = f"{emulator.memory_root}/notes"
    edit = call("edit", file_path=f"{root}/a.md", old_string="one", new_string="1")
    seen = start(
        emulator,
        tools(call("grep", pattern=".", path=root)),
        repeat_output,
        tools(edit, call("write", file_path=f"{root}/new.md", content="new\n")),
        end(),
        read(f"{root}/a.md"),
        repeat_output,
        end(),
        resources=[store],
    )
    emulator.say(seen.session, "go")
    seen.wait_stopped()
    first = emulator.events(seen.session, "agent.message")[0]["content"][0]["text"]
    assert first.splitlines() == [f"{root}/a.md:1:one", f"{root}/deep/b.md:1:two"]
    assert emulator.memories(store) == {"/a.md": "1\n", "/deep/b.md": "two\n", "/new.md": "new\n"}

    emulator.write_memory(store, "/a.md", "theirs\n")
    emulator.write_memory(store, "/new.md", None)
    emulator.say(seen.session, "again")
    assert seen.wait_idle() == "theirs\n"
    seen.wait_stopped()
    assert emulator.memories(store) == {"/a.md": "theirs\n", "/deep/b.md": "two\n"}


def test_a_read_only_memory_is_not_written(emulator: Emulator) -> None:
    store = emulator.add_memory_store("fixed", {"/a.md": "one\n"}, "read_only")
    path = f"{emulator.memory_root}/fixed/a.md"
    seen = ask(emulator, write(path, "two"), repeat_output, end(), resources=[store])
    assert "is inside read-only directory" in seen.wait_idle()
    seen.wait_stopped()
    assert emulator.memories(store) == {"/a.md": "one\n"}


def test_memory_that_cannot_be_had_is_told_to_the_agent(emulator: Emulator) -> None:
    """A session must not run without the memory that its prompt names."""
    store = emulator.add_memory_store("broken", {"/a.md": "one\n"})
    emulator.fault("memories.list", "fail", count=None, status=403)
    seen = start(emulator, write("a", "1"), repeat_output, end(), resources=[store])
    emulator.say(seen.session, "go")
    seen.wait_until(lambda: len(seen.results()) == 1)
    assert "could not be set up" in seen.results()[0][1]
    emulator.clear_faults()
    seen.wait_stopped()


# --- strangers, and a hostile agent ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "headers", "body", "status"),
    [
        ("GET", {}, b"", 405),
        ("PUT", {}, b"{}", 405),
        ("POST", {}, b"{}", 401),
        ("POST", {"webhook-signature": "v1,AAAA"}, b"{}", 401),
        ("POST", {"signed": "no"}, b"{}", 401),
        ("POST", {"signed": "no", "webhook-signature": "v1"}, b"{}", 401),
        ("POST", {"signed": "no", "webhook-signature": "v1,%%%"}, b"{}", 401),
        ("POST", {"signed": "no", "webhook-timestamp": "NaN"}, b"{}", 401),
        ("POST", {"signed": "no"}, b"\xff\xfe", 401),
        ("POST", {"signed": "no"}, b"[" * 60_000, 401),
        ("POST", {"signed": "no"}, b"x" * 70_000, 413),
    ],
)
def test_a_stranger_is_refused_at_once(
    emulator: Emulator, dev: WorkersDev, method: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    if headers.pop("signed", None):
        stamp = {"webhook-id": "whe_1", "webhook-timestamp": str(int(time.time())), "webhook-signature": "v1,AAAA"}
        headers = stamp | headers

    def polls() -> int:
        return sum(record.operation == "work.poll" for record in emulator.requests)

    for _ in range(5):  # an earlier test's session may be polled for meanwhile; a stranger would be each time
        before = polls()
        assert dev.request(method, "/webhook", headers=headers, content=body).status_code == status
        if polls() == before:
            return
    pytest.fail("the Worker polls for a stranger")


@pytest.mark.parametrize(
    ("key", "age", "status"), [("first", 0, 200), ("next", 0, 200), ("next", 400, 401), ("old", 0, 401)]
)
def test_both_keys_of_a_rotation_sign_and_an_old_signature_does_not(
    emulator: Emulator, dev: WorkersDev, key: str, age: int, status: int
) -> None:
    keys = {"first": FIRST_KEY, "next": emulator.webhook_key, "old": new_key()}
    body = b'{"id": "whe_1", "type": "event", "data": {"type": "session.status_idled", "id": "sesn_1"}}'
    moment = str(int(time.time()) - age)
    mac = hmac.new(key_bytes(keys[key]), b"whe_1." + moment.encode() + b"." + body, "sha256")
    signature = f"v1,{base64.b64encode(mac.digest()).decode()}"
    headers = {"webhook-id": "whe_1", "webhook-timestamp": moment, "webhook-signature": signature}
    assert dev.request("POST", "/webhook", headers=headers, content=body).status_code == status


def test_files_are_listed_and_downloaded_with_the_key_only(emulator: Emulator, dev: WorkersDev) -> None:
    seen = ask(emulator, write("dir/ü <b>.html", "<script>1</script>"), end())
    seen.wait_stopped()
    route, key = f"/sessions/{seen.session}/files", {"authorization": f"Bearer {FILES_KEY}"}
    (listed,) = dev.request("GET", route, headers=key).json()["files"]
    assert (listed["path"], listed["size"]) == ("/workspace/dir/ü <b>.html", 18)
    file = dev.request("GET", f"{route}/workspace/dir/%C3%BC%20%3Cb%3E.html", headers=key)
    assert file.text == "<script>1</script>"
    assert (file.headers["content-type"], file.headers["content-disposition"]) == (
        "application/octet-stream",
        "attachment",
    )

    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": FILES_KEY}):
        assert dev.request("GET", route, headers=headers).status_code == 401
        assert dev.request("GET", f"{route}/workspace/dir/x", headers=headers).status_code == 401
    for path in ("/workspace/none", "/workspace/dir", "/workspace/dir/..%2f..%2fx", "/%zz", "/%00"):
        assert dev.request("GET", route + path, headers=key).status_code == 404
    for session in ("sesn_nobody", "..%2f..", "%00", "x" * 200):
        assert dev.request("GET", f"/sessions/{session}/files", headers=key).status_code == 404
    assert dev.request("DELETE", route, headers=key).status_code == 405


HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("read", {}),
    ("read", {"file_path": ["a"]}),
    ("read", {"file_path": "../../../etc/passwd"}),
    ("read", {"file_path": "/etc/passwd"}),
    ("read", {"file_path": "a\u0000b"}),
    ("read", {"file_path": "x" * 10_000}),
    ("read", {"file_path": "f", "view_range": [1, {}]}),
    ("write", {"file_path": "/workspace/../state", "content": "x"}),
    ("write", {"file_path": "/mnt/memory/other/a", "content": "x"}),
    ("write", {"file_path": "f", "content": {"not": "text"}}),
    ("write", {"file_path": ".", "content": "x"}),
    ("edit", {"file_path": "f", "old_string": "", "new_string": "x"}),
    ("glob", {"pattern": "/**"}),
    ("glob", {"pattern": "{" * 500}),
    ("glob", {"pattern": "{a,b}" * 20}),
    ("grep", {"pattern": "(" * 500}),
    ("grep", {"pattern": "(?=x)"}),
    ("grep", {"pattern": "(x{1000}){1000}"}),
    ("bash", {"command": "cat /proc/self/environ"}),
]


def test_hostile_input_gets_an_answer_each_and_harms_nobody(emulator: Emulator) -> None:
    steps = [write("f", "1"), *(tools(call(name, **given)) for name, given in HOSTILE), read("f"), repeat_output, end()]
    seen = ask(emulator, *steps)
    assert seen.wait_idle() == "1"
    answers = seen.results()
    assert len(answers) == len(HOSTILE) + 2
    # An odd glob is no mistake: it matches nothing.
    wrong = [given for given, (is_error, text) in zip(HOSTILE, answers[1:-1], strict=True) if not is_error]
    assert [name for name, _ in wrong] == ["glob"]


def test_no_log_line_has_a_secret(emulator: Emulator, dev: WorkersDev) -> None:
    seen = ask(emulator, write("a", "private words of the agent"), end())
    seen.wait_stopped()
    for secret in (emulator.environment_key, emulator.webhook_key, FILES_KEY, "sk-ant-", "private words"):
        assert secret not in dev.log


# --- load ------------------------------------------------------------------------------------------------------------


def test_two_hundred_sessions_at_once(emulator: Emulator, dev: WorkersDev) -> None:
    """More than may run at once (SANDBOX_MAX_LIVE is 150 here): those that end make room."""
    all_seen = [start(emulator, write("a", str(n % 10)), repeat_output, end()) for n in range(200)]
    for seen in all_seen:
        emulator.say(seen.session, "go")
    for seen in all_seen:
        assert seen.wait_idle() == "wrote 1 bytes to a"
    for seen in all_seen:
        seen.wait_stopped()
    claims = [r for r in emulator.requests if r.query.get("expected_last_heartbeat") == ["NO_HEARTBEAT"]]
    assert sum(any(seen.session in claim.path for seen in all_seen) for claim in claims) == 200
    launched = re.findall(r"action=launched .* ms=(\d+)", dev.log)
    assert min(map(int, launched)) < MILLISECONDS
