"""providers/cloudflare-container under `wrangler dev`, from a copy of the folder alone: real workerd, real containers
of the folder's own image. Over HTTP, the journeys of tests.contract, and what only this provider can get wrong.
The webhooks are signed with the second key, as during a rotation.

One `wrangler dev`, one image and one emulator serve all journeys of a test process.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.contract import CUSTOM_TOOLS
from tests.providers.containers_dev import ContainersDev, altered_copy, environment, remove_tags
from tests.providers.docker_support import docker, gateway, needs_docker
from tests.providers.workers_dev import WAIT_SECONDS, Seen, workspace
from tests.world import HEALABLE_SECONDS, LAPSE_SECONDS, RECLAIM_SECONDS
from tools import typescript
from tools.emulator import Emulator, Step, Switches, call, custom, end, repeat_output, tools
from tools.emulator.webhooks import signature, signing_key

NAME = "cloudflare-container"
TOOLS = "/opt/tools/my_tools.py"
FIRST_KEY, OLD_KEY = ("whsec_" + base64.b64encode(os.urandom(32)).decode() for _ in range(2))

pytestmark = [needs_docker, pytest.mark.timeout(400)]  # the first test of a process may install and build


@pytest.fixture(scope="module")
def folder() -> Path:
    return workspace(NAME)


@pytest.fixture(scope="module")
def shared_emulator() -> Iterator[Emulator]:
    with Emulator(host=gateway()) as emulator:  # where containers reach it
        yield emulator


def settings_for(emulator: Emulator) -> dict[str, str]:
    return {
        "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
        "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
        "ANTHROPIC_BASE_URL": emulator.url,
        "ANTHROPIC_WEBHOOK_SIGNING_KEY": FIRST_KEY,
        "ANTHROPIC_WEBHOOK_SIGNING_KEY_NEXT": emulator.webhook_key,
        "SANDBOX_MAX_IDLE_SECONDS": "1",
    }


@contextlib.contextmanager
def running(folder: Path, directory: Path, emulator: Emulator, **settings: str) -> Iterator[ContainersDev]:
    dev = ContainersDev(folder, directory, settings_for(emulator) | settings)
    try:
        dev.start()
        emulator.set_webhook_url(f"{dev.url}/webhook")
        yield dev
    finally:
        dev.stop()
        dev.remove_all()


@pytest.fixture(scope="module")
def dev(folder: Path, shared_emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainersDev]:
    """With a custom tool in the image, as the README says."""
    directory = tmp_path_factory.mktemp("dev")
    copy = altered_copy(folder, directory, "container/Dockerfile", "EXPOSE", f"COPY my_tools.py {TOOLS}\nEXPOSE")
    (copy / "container/my_tools.py").write_text(CUSTOM_TOOLS, encoding="utf-8")
    settings = {"SANDBOX_KEEP_WARM_SECONDS": "600", "FILES_MAX_MB": "8", "SANDBOX_TOOLS": f"{TOOLS}:tools"}
    settings |= {"SANDBOX_STAGE_FILES": "true", "SANDBOX_ALLOWED_HOSTS": "localhost, *.example.com"}
    with running(copy, directory, shared_emulator, **settings) as dev:
        yield dev


@pytest.fixture
def emulator(dev: ContainersDev, shared_emulator: Emulator) -> Iterator[Emulator]:
    yield shared_emulator
    shared_emulator.clear_faults()
    shared_emulator.switch(**asdict(Switches()))


class Talk(Seen):
    """A session, its container, and what is said in it."""

    def __init__(self, emulator: Emulator, dev: ContainersDev, *steps: Step, **brought: list[str]) -> None:
        super().__init__(emulator, emulator.create_session(**brought))  # type: ignore[arg-type]
        self.emulator = emulator
        self.dev = dev
        if steps:
            emulator.set_script(self.session, list(steps))

    def say(self, text: str) -> None:
        self.emulator.say(self.session, text)

    def ask(self, command: str) -> str:
        """What a command prints in the sandbox."""
        self.say(f"!{command}")
        return self.wait_idle()

    def until_logged(self, action: str) -> str:
        return self.dev.until_logged(f"action={action} .*session={self.session}.*")

    def container(self) -> str:
        """The name of the session's container, which the session has marked: `echo $session > session`."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            for name in self.dev.containers():
                if self.session in docker("exec", name, "cat", "/workspace/session", check=False):
                    return name
        raise AssertionError(f"none of {self.dev.containers()} has the session's files:\n{self.dev.log}")


@pytest.fixture
def talk(emulator: Emulator, dev: ContainersDev) -> Talk:
    return Talk(emulator, dev)


# --- the folder ------------------------------------------------------------------------------------------------------


def test_a_copy_of_the_folder_can_be_deployed(folder: Path, tmp_path: Path) -> None:
    argv = [typescript.program(folder, "wrangler"), "deploy", "--dry-run", "--outdir", str(tmp_path)]
    environ = typescript.environment() | environment(folder, tmp_path / "tags")
    done = subprocess.run(argv, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "env.SESSIONS (SessionObject)" in done.stdout
    assert (tmp_path / "index.js").is_file()
    remove_tags(tmp_path / "tags")


# --- the main job ----------------------------------------------------------------------------------------------------


def test_a_session_is_served_from_first_message_to_idle_exit(emulator: Emulator, dev: ContainersDev) -> None:
    talk = Talk(
        emulator,
        dev,
        tools(call("bash", command="cd / && x=hello")),
        end(),
        tools(call("bash", command="pwd; echo $x"), custom("weather", city="Ghent")),
        repeat_output,
        end(),
    )
    talk.say("go")
    talk.say("and on")  # before the first turn is over: the same runner, the same shell
    talk.wait_stopped()
    assert talk.wait_idle().splitlines() == ["/", "hello", "sunny in Ghent"]
    assert (talk.claims(), len(talk.requests("work.ack"))) == (1, 1)
    assert [record.status for record in talk.requests("work.stop")] == [200]
    asked = [each for each in emulator.requests if talk.session in each.path]
    asked = [each for each in asked if each.operation != "sessions.get"]  # the host looks too, for what it may bring
    assert {record.credential for record in asked} == {"sessions_token"}


def test_skills_and_memory_are_in_the_sandbox(emulator: Emulator, dev: ContainersDev) -> None:
    """The skill is one that the session's token may not read: the host brings it (R12)."""
    emulator.switch(sessions_token_may_read_skills=False)
    about = "---\nname: greeter\ndescription: greets\n---\n"
    skill = emulator.add_skill("greeter", {"SKILL.md": about, "greet": "hello\n"})
    store = emulator.add_memory_store("notes", {"/a.md": "one\n"})
    talk = Talk(emulator, dev, skills=[skill], resources=[store])
    note = f"{emulator.memory_root}/notes/a.md"
    assert talk.ask(f"cat skills/greeter/greet {note}; echo two > {note}").split() == ["hello", "one"]
    talk.wait_stopped()
    assert emulator.memories(store)["/a.md"] == "two\n"


def test_the_next_message_finds_the_warm_container(talk: Talk) -> None:
    talk.ask("echo kept > /tmp/outside_of_the_workspace")
    talk.wait_stopped()
    assert talk.ask("cat /tmp/outside_of_the_workspace") == "kept"
    assert talk.claims() == 2


def test_after_its_container_is_gone_a_session_finds_its_files(talk: Talk) -> None:
    talk.ask(
        f"echo {talk.session} > session; mkdir -p .hidden/deep; ln -s /etc/passwd link; echo run > tool;"
        " chmod 750 tool; mkfifo pipe; echo locked > locked; chmod 0 locked; touch 'ü name'; echo lost > /tmp/outside"
    )
    talk.until_logged("saved")
    docker("kill", talk.container())
    talk.until_logged("sandbox_lost")
    answer = talk.ask("ls -A; readlink link; stat -c %a tool; cat locked; test -p pipe && echo a pipe; ls /tmp")
    names = [".hidden", ".sandbox", "link", "locked", "pipe", "session", "tool", "ü name"]
    assert answer.splitlines() == [*names, "/etc/passwd", "750", "locked", "a pipe"]


def test_half_of_a_save_is_never_restored(talk: Talk) -> None:
    talk.ask(f"echo {talk.session} > session; echo whole > file.txt")
    talk.until_logged("saved")
    container = talk.container()
    docker("exec", f"{container}-proxy", "touch", "/cut")
    talk.ask("echo half > file.txt; head -c 4000000 /dev/urandom > noise")
    talk.until_logged("not_saved")
    docker("kill", container)
    talk.until_logged("sandbox_lost")
    whole, told, *names = talk.ask("cat file.txt inputs/ERRORS.txt; ls").splitlines()
    assert (whole, names) == ("whole", ["file.txt", "inputs", "session"])
    assert told.startswith("files: your container ended before your files were saved")


def test_more_than_is_kept_is_not_saved_and_the_log_says_so(talk: Talk) -> None:
    talk.ask(f"echo {talk.session} > session; head -c 9000000 /dev/urandom > noise")
    assert "the files take more than 8388608 bytes" in talk.until_logged("not_saved")
    talk.until_logged("files_lost")
    docker("kill", talk.container())
    talk.until_logged("sandbox_lost")
    told = "files: your files could not be saved: the files take more than 8388608 bytes"
    assert talk.ask("cat inputs/ERRORS.txt").startswith(told)


def test_an_unused_container_sleeps_and_unused_files_are_deleted(folder: Path, tmp_path: Path) -> None:
    short = {"SANDBOX_KEEP_WARM_SECONDS": "0", "SANDBOX_RETENTION_SECONDS": "1"}
    with Emulator(host=gateway()) as emulator, running(folder, tmp_path, emulator, **short) as dev:
        talk = Talk(emulator, dev)
        talk.ask("touch file.txt")
        talk.until_logged("saved")
        dev.until_no_containers()
        talk.until_logged("deleted")
        assert talk.ask("ls") == "(no output)"


def test_without_a_bucket_files_end_with_the_container_and_the_log_says_so(folder: Path, tmp_path: Path) -> None:
    bucket = '"r2_buckets": [{ "binding": "WORKSPACES", "bucket_name": "sandboxes-workspaces" }],'
    copy = altered_copy(folder, tmp_path, "wrangler.jsonc", bucket, "")
    settings = {"SANDBOX_KEEP_WARM_SECONDS": "0", "ALLOW_ENVIRONMENT_KEY_IN_SANDBOX": "true"}
    with Emulator(host=gateway()) as emulator, running(copy, tmp_path, emulator, **settings) as dev:
        emulator.switch(secret="null")  # so that the runner gets the environment key, as was asked for
        talk = Talk(emulator, dev)
        talk.ask("touch file.txt")
        assert "the files end with the container" in talk.until_logged("not_saved")
        dev.until_no_containers()
        told, *names = talk.ask("cat inputs/ERRORS.txt; ls").splitlines()
        assert "keeps no files between containers" in told
        assert names == ["inputs"]
        assert {record.credential for record in talk.requests("events.send")} == {"environment_key"}
        assert emulator.environment_key not in dev.log


def test_a_lost_webhook_is_made_up_for_by_the_sweep(emulator: Emulator, talk: Talk, dev: ContainersDev) -> None:
    emulator.webhooks_paused = True
    try:
        talk.say("!echo found")
        dev.sweep()
        assert talk.wait_idle() == "found"
    finally:
        emulator.webhooks_paused = False


def test_ten_sessions_at_once(emulator: Emulator, dev: ContainersDev) -> None:
    talks = [Talk(emulator, dev) for _ in range(10)]
    for number, talk in enumerate(talks):
        talk.say(f"!echo {number} > file.txt; sleep 1; cat file.txt; ls | wc -l")
    for number, talk in enumerate(talks):
        assert talk.wait_idle() == f"{number}\n1"  # its own file, and no other
        assert talk.claims() == 1


# --- what dies -------------------------------------------------------------------------------------------------------


def test_a_container_killed_in_a_tool_call_is_healed(emulator: Emulator, talk: Talk, dev: ContainersDev) -> None:
    talk.ask(f"echo {talk.session} > session; echo saved > file.txt")
    talk.until_logged("saved")
    emulator.set_script(
        talk.session, [tools(call("bash", command="echo half > file.txt; sleep 60")), repeat_output, end()]
    )
    talk.say("go")
    talk.wait_until(lambda: talk.claims() == 2 and len(emulator.pending_calls(talk.session)) == 1)
    docker("kill", talk.container())
    assert "137 with files that were not saved" in talk.until_logged("sandbox_lost")
    emulator.advance(LAPSE_SECONDS)
    emulator.advance(HEALABLE_SECONDS)
    dev.sweep()
    assert "lost" in talk.wait_idle()
    assert [is_error for is_error, _ in talk.results()] == [False, True]  # told once, and not run again
    talk.wait_stopped()  # by the runner that the answer has queued
    assert talk.ask("cat file.txt") == "saved"


def test_after_an_operators_forced_stop_a_newcomer_takes_over(
    emulator: Emulator, talk: Talk, dev: ContainersDev
) -> None:
    """R3: the item is queued again while the old runner believes that it holds it; both are in one container."""
    emulator.set_script(
        talk.session,
        [
            tools(call("bash", command="sleep 100")),
            end(),
            tools(call("bash", command="cat /proc/[0-9]*/comm | grep -cx sleep")),
            repeat_output,
            end(),
        ],
    )
    talk.say("go")
    talk.wait_until(lambda: talk.claims() == 1 and len(emulator.pending_calls(talk.session)) == 1)
    emulator.stop_work(talk.session, force=True)
    emulator.send(talk.session, {"type": "user.interrupt"})
    talk.say("again")
    talk.wait_until(lambda: talk.claims() == 2 and any(text.startswith("0") for _, text in talk.results()))
    talk.wait_stopped()


def test_a_container_told_to_end_hands_over_and_the_files_are_kept(emulator: Emulator, talk: Talk) -> None:
    """P9: SIGTERM, as in a roll-out. The turn goes on in another container."""
    begin = f"echo {talk.session} > session; echo half > file.txt; sleep 60"
    emulator.set_script(
        talk.session,
        [
            tools(call("bash", command=begin)),
            tools(call("bash", command="cat file.txt; ls /tmp")),
            repeat_output,
            end(),
        ],
    )
    talk.say("go")
    talk.wait_until(lambda: talk.claims() == 1 and len(emulator.pending_calls(talk.session)) == 1)
    docker("exec", talk.container(), "touch", "/tmp/of_the_first_container")
    docker("kill", "--signal", "TERM", talk.container())
    assert talk.wait_idle() == "half"
    (first, second) = talk.results()
    assert first[0]
    assert "may have taken effect" in first[1]
    assert second == (False, "half")
    assert talk.claims() == 2


def test_a_worker_killed_in_a_tool_call_finds_the_runner_and_saves_its_files(
    emulator: Emulator, talk: Talk, dev: ContainersDev
) -> None:
    """The container does not need the Worker; an object that lost its memory looks at what is there."""
    begin = f"echo {talk.session} > session; while ! test -e done; do sleep 0.1; done; echo over"
    talk.say(f"!{begin}")
    talk.wait_until(lambda: talk.claims() == 1 and len(emulator.pending_calls(talk.session)) == 1)
    container = talk.container()
    since = len(dev.log)
    dev.kill()
    dev.start()
    docker("exec", container, "touch", "/workspace/done")
    assert talk.wait_idle() == "over"
    dev.until_logged(f"action=saved session={talk.session}", since)
    assert talk.ask("ls /workspace").split() == ["done", "session"]
    assert talk.container() == container


# --- what a sandbox may know -----------------------------------------------------------------------------------------


def test_the_agent_finds_no_credential_and_cannot_speak_for_the_durable_object(talk: Talk, emulator: Emulator) -> None:
    """R11: nor can who looks at the container from outside."""
    look = (
        "env; for p in /proc/[0-9]*; do cat $p/environ $p/cmdline; ls -l $p/fd; done 2>/dev/null | tr '\\0' ' ';"
        " grep -rIls sk-ant- . /tmp /run /etc /opt /var/lib 2>/dev/null"
    )
    ask = (
        "import urllib.request, urllib.error\n"
        "for ask in ['GET /', 'GET /workspace?most=9', 'POST /runners', 'PUT /workspace']:\n"
        "    for key in ['', 'Bearer guess']:\n"
        "        method, path = ask.split()\n"
        "        request = urllib.request.Request('http://127.0.0.1:8080' + path, method=method, data=b'{}')\n"
        "        request.add_header('authorization', key)\n"
        "        try: print(urllib.request.urlopen(request).status)\n"
        "        except urllib.error.HTTPError as error: print(error.code)\n"
    )
    command = f"echo {talk.session} > session; {look}; kill -9 1; kill -STOP 1; python3 - <<'END'\n{ask}END"
    answer = talk.ask(command)
    assert answer.split()[-8:] == ["401"] * 8
    outside = docker("inspect", talk.container()) + docker("logs", talk.container())
    for word in ("sk-ant-", emulator.environment_key, "ANTHROPIC_"):
        assert word not in answer
        assert word not in outside


def test_an_item_without_a_secret_is_refused(emulator: Emulator, talk: Talk, dev: ContainersDev) -> None:
    emulator.switch(secret="null")
    since = len(dev.log)
    talk.say("!echo never")
    dev.until_logged(f"action=refused work={talk.session} .*no usable secret.*ALLOW_ENVIRONMENT_KEY_IN_SANDBOX", since)
    assert talk.state == "queued"
    emulator.delete_session(talk.session)


@pytest.mark.parametrize(("age", "statuses"), [(0, [200, 200, 401]), (400, [401, 401, 401])])
def test_both_keys_of_a_rotation_sign_and_an_old_signature_does_not(
    emulator: Emulator, dev: ContainersDev, age: int, statuses: list[int]
) -> None:
    body = '{"id": "whe_1", "type": "event", "data": {"type": "session.status_idled", "id": "sesn_1"}}'
    moment = int(time.time()) - age
    for key, status in zip([FIRST_KEY, emulator.webhook_key, OLD_KEY], statuses, strict=True):
        signed = signature(signing_key(key), "whe_1", moment, body)
        headers = {"webhook-id": "whe_1", "webhook-timestamp": str(moment), "webhook-signature": signed}
        assert dev.request("POST", "/webhook", headers=headers, content=body).status_code == status


def test_a_message_to_a_container_that_is_frozen_is_served_once_it_is_not(
    emulator: Emulator, talk: Talk, dev: ContainersDev
) -> None:
    """One that stays so is ended: cloudflare_container_session.mts, on its own clock."""
    talk.ask(f"echo {talk.session} > session; echo kept > /tmp/kept")
    talk.wait_stopped()
    dev.until_logged(f"action=saved session={talk.session}")  # a frozen save is waited for longer than we do
    container = talk.container()
    docker("pause", container)
    try:
        talk.say("!cat /tmp/kept")
        failed = f"action=launch_failed .*session={talk.session} .*"
        assert "the session's container does not answer" in dev.until_logged(failed)
    finally:
        docker("unpause", container)
    emulator.advance(RECLAIM_SECONDS)
    dev.sweep()
    assert talk.wait_idle() == "kept"


ASK = """
import http.client, ssl, sys
scheme, *hosts = sys.argv[1:]
if scheme == "http":
    connection = http.client.HTTPConnection("192.0.2.1", timeout=60)
else:
    connection = http.client.HTTPConnection("192.0.2.1", 443, timeout=60)
    connection.connect()
    name = hosts[0].partition(":")[0]
    connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=name)
for host in hosts:  # on one connection
    connection.request("GET", "/v1/x", headers={"Host": host})
    answer = connection.getresponse()
    print(answer.status, answer.read().decode().splitlines()[0])
"""


class _Elsewhere(http.server.BaseHTTPRequestHandler):
    """What an agent may reach. It says that it is found, and then that it is somewhere else."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(200 if self.asked == 1 else 302)
        self.send_header("location", self.path)
        self.send_header("content-length", "5")
        self.end_headers()
        self.wfile.write(b"found")

    def log_message(self, *_: object) -> None:
        """Silent."""


def test_a_sandbox_reaches_the_allowed_hosts_and_the_api_and_nothing_else(
    emulator: Emulator, talk: Talk, dev: ContainersDev
) -> None:
    """No name is resolved in there: the address stands for any, and the platform goes by the name that is asked for."""
    api = emulator.url.removeprefix("http://")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        allowed, denied = f"localhost:{server.server_port}", f"127.0.0.1:{server.server_port}"
        try:
            answer = talk.ask(
                f"cat > ask.py <<'END'\n{ASK}\nEND\n"
                f"ask() {{ python3 ask.py $@ || echo $1 failed; }}; ask http {allowed} {denied} {allowed} {api};"
                " ask http example.com notexample.com; ask https evil.example; ask https sub.example.com:1"
            )
        finally:
            server.shutdown()
    refused = "{} is not in SANDBOX_ALLOWED_HOSTS"
    found, another_host, moved, of_the_api, *others = answer.splitlines()
    assert (found, another_host) == ("200 found", f"403 {refused.format('127.0.0.1')}")
    assert moved == "302 found", "it was followed for the container, to wherever"
    assert of_the_api.startswith("404 ")
    assert others == [
        f"403 {refused.format('example.com')}",
        f"403 {refused.format('notexample.com')}",
        f"403 {refused.format('evil.example')}",
        "502 sub.example.com could not be reached",
    ]
    assert _Elsewhere.asked == 2
    assert "evil.example is not in" in dev.until_logged(f"action=egress_refused session={talk.session} .*evil.*")


def test_strangers_get_nothing(emulator: Emulator, dev: ContainersDev) -> None:
    emulator.set_webhook_url(None)
    dev.sweep()  # ends with the drain that an earlier test's webhook began
    polls = len([record for record in emulator.requests if record.operation == "work.poll"])
    assert dev.request("POST", "/webhook", content=b"{}").status_code == 401
    assert dev.request("GET", "/webhook").status_code == 405
    for path in ("/", "/runners", "/workspace", "/sessions/x"):
        assert dev.request("GET", path).status_code == 404
    assert len([record for record in emulator.requests if record.operation == "work.poll"]) == polls
    emulator.set_webhook_url(f"{dev.url}/webhook")
    for secret in (emulator.environment_key, emulator.webhook_key, "sk-ant-"):
        assert secret not in dev.log
