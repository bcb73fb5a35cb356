"""`modal deploy` of this very folder with Modal's own command line; the functions run by Modal's own entry point."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from grpclib import Status
from starlette.requests import Request

from tests.fakes.modal import ModalDouble
from tests.providers.modal_support import MODAL, needs_bubblewrap
from tests.test_copy_out import copy_out
from tools.emulator import Emulator

PATIENCE_SECONDS = 60.0
CLI_SECONDS = 180.0  # Modal's command line, which builds an image
CLI = Path(sys.executable).with_name("modal")

pytestmark = needs_bubblewrap


class Workspace:
    """A double with the command line pointed at it."""

    def __init__(self, double: ModalDouble, emulator: Emulator, directory: Path) -> None:
        self.double = double
        self.emulator = emulator
        self._directory = directory
        self.printed = ""

    def cli(self, *arguments: str, folder: Path = MODAL.path, cli: Path = CLI) -> subprocess.CompletedProcess[str]:
        """Modal's command line, in a shell without anything of ours."""
        environ = {key: value for key, value in os.environ.items() if key in {"HOME", "LANG"}}
        environ |= {"PATH": f"{cli.parent}:/usr/bin:/bin", "COLUMNS": "200", **self.double.environ}
        return subprocess.run(
            [str(cli), *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=CLI_SECONDS
        )

    def settings(self) -> dict[str, str]:
        emulator = self.emulator
        return {
            "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
            "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
            "ANTHROPIC_BASE_URL": emulator.url,
            "ANTHROPIC_WEBHOOK_SIGNING_KEY": emulator.webhook_key,
            "SANDBOX_MAX_IDLE_SECONDS": "1",
        }

    def create_secret(self, **settings: str) -> None:
        """As README.md says: the settings in a file, and one line."""
        file = self._directory / ".env"
        file.write_text("".join(f"{name}={value}\n" for name, value in (self.settings() | settings).items()))
        done = self.cli("secret", "create", "sandboxes", "--from-dotenv", str(file), "--force")
        assert done.returncode == 0, done.stdout + done.stderr

    def deploy(self, folder: Path = MODAL.path, cli: Path = CLI) -> str:
        done = self.cli("deploy", "app.py", folder=folder, cli=cli)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def webhook_url(self) -> str:
        return f"{self.double.control.web_url}/webhook"

    def post(self, body: bytes, headers: dict[str, str], method: str = "POST") -> int:
        url = urlsplit(self.webhook_url)
        connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=PATIENCE_SECONDS)
        with contextlib.closing(connection):
            connection.request(method, url.path, body, headers)
            return connection.getresponse().status

    def signed(self, session: str) -> tuple[bytes, dict[str, str]]:
        """A webhook, signed as Anthropic does."""
        body = json.dumps(
            {
                "type": "event",
                "id": "whe_1",
                "created_at": "2026-11-23T12:00:00Z",
                "data": {
                    "type": "session.status_run_started",
                    "id": session,
                    "organization_id": "o",
                    "workspace_id": "w",
                },
            }
        ).encode()
        now = str(int(time.time()))
        key = base64.b64decode(self.emulator.webhook_key.removeprefix("whsec_"))
        digest = hmac.new(key, b".".join([b"whe_1", now.encode(), body]), hashlib.sha256).digest()
        signature = f"v1,{base64.b64encode(digest).decode()}"
        return body, {"webhook-id": "whe_1", "webhook-timestamp": now, "webhook-signature": signature}

    def polls(self) -> int:
        """How many were answered."""
        return [(each.operation, each.status) for each in self.emulator.requests].count(("work.poll", 200))

    def until_logged(self, function: str, text: str) -> None:
        """Waits for a line in a function's log: what it answers may be here before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self.double.log(function):
            assert time.monotonic() < deadline, f"{text} was not logged:\n{self.double.log(function)}"
            time.sleep(0.02)

    def said(self, session: str) -> str:
        self.emulator.wait_idle(session, PATIENCE_SECONDS)
        return str(self.emulator.events(session, "agent.message")[-1]["content"][0]["text"])


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    """One in which nothing was done yet."""
    with ModalDouble() as double, Emulator() as emulator:
        yield Workspace(double, emulator, tmp_path)
        assert double.wire.refused == []


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """One in which the folder is deployed, with the README's two lines; the tests of this file share it."""
    with ModalDouble() as double, Emulator() as emulator:
        workspace = Workspace(double, emulator, tmp_path_factory.mktemp("modal"))
        workspace.create_secret()
        workspace.printed = workspace.deploy()
        yield workspace
        assert double.wire.refused == []


def test_a_signed_webhook_is_served_and_so_is_the_next_turn_in_the_same_sandbox(deployed: Workspace) -> None:
    assert f"{deployed.webhook_url} " in deployed.printed
    emulator, made = deployed.emulator, len(deployed.double.state.sandboxes)
    session = emulator.create_session()
    emulator.say(session, "!echo kept > file.txt; echo $(pwd) as $(id -un)")
    assert deployed.post(*deployed.signed(session)) == 200
    assert deployed.said(session) == "/workspace as agent"
    emulator.wait_for(session, "stopped", PATIENCE_SECONDS)
    emulator.set_webhook_url(deployed.webhook_url)  # from here on the control plane itself sends them
    emulator.say(session, "!cat file.txt")
    assert deployed.said(session) == "kept"
    emulator.set_webhook_url(None)
    assert len(deployed.double.state.sandboxes) == made + 1
    assert any(delivery.is_ok for delivery in emulator.deliveries)
    deployed.until_logged("webhook", f"action=webhook session={session}")
    deployed.until_logged("dispatch", f"action=launched provider=modal session={session}")


def test_the_sweep_finds_what_no_webhook_told(deployed: Workspace) -> None:
    session = deployed.emulator.create_session()
    deployed.emulator.say(session, "!echo found")
    deployed.double.fire("dispatch")  # without arguments, as the schedule does
    assert deployed.said(session) == "found"
    (schedule,) = [each.schedule for each in deployed.double.state.functions.values() if each.HasField("schedule")]
    assert schedule.period.minutes == 1


def test_a_stranger_gets_nothing_and_starts_nothing(deployed: Workspace) -> None:
    polls, calls = deployed.polls(), len(deployed.double.wire.named("FunctionMap"))
    body, headers = deployed.signed("sesn_1")
    forged = {**headers, "webhook-signature": "v1,AAAA"}
    stale = {**headers, "webhook-timestamp": "1"}
    assert deployed.post(b"{}", {}) == 401
    assert [deployed.post(body, each) for each in (forged, stale)] == [401, 401]
    assert deployed.post(b"x" * 100_000, headers) == 413
    assert [deployed.post(body, headers, method) for method in ("GET", "PUT", "DELETE")] == [405] * 3
    assert deployed.polls() == polls
    assert len(deployed.double.wire.named("FunctionMap")) == calls


def test_signals_during_a_drain_are_one_more_poll_and_one_container(deployed: Workspace) -> None:
    """R8: a webhook that comes while the drain is under way is neither lost nor a drain of its own."""
    double, emulator = deployed.double, deployed.emulator
    first = emulator.create_session()
    polls = deployed.polls()
    deployed.post(b"{}", {})  # the function's container is there
    double.wire.fail("SandboxCreateV2", status=None, seconds=3600.0)  # the first launch takes its time
    emulator.say(first, "!echo one")
    assert deployed.post(*deployed.signed(first)) == 200
    # The queue was polled once more, and was empty: without a new signal nobody looks again.
    emulator.wait_until(lambda: deployed.polls() - polls >= 2, PATIENCE_SECONDS)
    second = emulator.create_session()
    emulator.say(second, "!echo two")
    assert [deployed.post(*deployed.signed(second)) for _ in range(5)] == [200] * 5
    emulator.wait_until(lambda: emulator.work(second)["started_at"] is not None, PATIENCE_SECONDS)
    assert first not in {sandbox.definition.name for sandbox in double.running()}  # it is still being made
    double.wire.heal()
    assert (deployed.said(second), deployed.said(first)) == ("two", "one")
    dispatch = double.control.function_id("dispatch")
    assert len([each for each in double.control.containers if each.function_id == dispatch and each.is_alive]) == 1
    assert deployed.polls() - polls <= 2 + 6  # a hit for each item, and one empty poll for each signal at most


def test_a_sweep_that_takes_longer_than_a_minute_is_not_doubled(deployed: Workspace) -> None:
    double, emulator = deployed.double, deployed.emulator
    deployed.double.fire("dispatch")  # its container is there
    emulator.fault("work.list", "delay", 1, seconds=4.0)
    lists = [record.operation for record in emulator.requests].count("work.list")

    async def twice() -> None:
        await asyncio.gather(*(double.control.run_until_done("dispatch") for _ in range(2)))

    double.run(twice())
    assert [record.operation for record in emulator.requests].count("work.list") == lists + 1


def test_a_drain_that_cannot_be_started_is_the_next_sweeps(deployed: Workspace) -> None:
    deployed.double.wire.fail("FunctionMap", Status.RESOURCE_EXHAUSTED, "no room")
    session = deployed.emulator.create_session()
    deployed.emulator.say(session, "!echo swept")
    assert deployed.post(*deployed.signed(session)) == 200
    deployed.until_logged("webhook", "action=wake error=ResourceExhaustedError")
    deployed.double.fire("dispatch")
    assert deployed.said(session) == "swept"


def test_a_changed_secret_needs_no_deployment(deployed: Workspace) -> None:
    deployed.create_secret(ANTHROPIC_ENVIRONMENT_KEY="sk-ant-oat01-of-yesterday")
    deployed.double.run(deployed.double.control.scale_down())  # as after twenty idle seconds
    session = deployed.emulator.create_session()
    deployed.emulator.say(session, "!echo changed")
    deployed.double.fire("dispatch")
    assert "the environment key is not accepted" in deployed.double.log("dispatch")
    deployed.create_secret()
    deployed.double.run(deployed.double.control.scale_down())
    deployed.double.fire("dispatch")
    assert deployed.said(session) == "changed"
    functions = deployed.double.state.functions.values()
    assert {each.autoscaler_settings.scaledown_window for each in functions} == {20}
    assert {each.autoscaler_settings.max_containers for each in functions if each.HasField("schedule")} == {1}


def test_modal_is_sent_no_credential_but_a_runners_job_on_its_stdin(deployed: Workspace) -> None:
    """R11."""
    session = deployed.emulator.create_session()
    deployed.emulator.say(session, "!echo served")
    deployed.double.fire("dispatch")
    assert deployed.said(session) == "served"
    told = b"".join(request.data for request in deployed.double.wire.named("TaskExecStdinWrite"))
    assert b"ANTHROPIC_WORK_SECRET" in told
    allowed = {
        "TaskExecStdinWrite",
        "SecretGetOrCreate",
        "MountPutFile",
    }  # the source of log.py knows what keys look like
    sent = [call for call in deployed.double.wire.calls if call.name not in allowed]
    everything = b"".join(call.request.SerializeToString() for call in sent)
    assert session.encode() in everything
    for secret in ("sk-ant-", deployed.emulator.webhook_key, "ANTHROPIC_WORK_SECRET", "sessions_token"):
        assert secret.encode() not in everything


def test_a_copy_of_the_folder_alone_is_deployed_and_serves(workspace: Workspace, tmp_path: Path) -> None:
    """With the command line, the client and the packages of its own lock."""
    copy = copy_out(MODAL.path, tmp_path)
    workspace.double.control.python = str(copy.python)
    workspace.create_secret()
    workspace.deploy(copy.folder, cli=copy.python.with_name("modal"))
    session = workspace.emulator.create_session()
    workspace.emulator.say(session, "!echo the answer is $((6 * 7))")
    assert workspace.post(*workspace.signed(session)) == 200
    assert workspace.said(session) == "the answer is 42"


def test_a_poller_on_a_machine_of_ones_own_serves_too(workspace: Workspace, tmp_path: Path) -> None:
    """`python -m _shared.worker`: it builds the image by itself, and needs no deployment and no webhook."""
    log = tmp_path / "log"
    with log.open("w") as output:
        poller = subprocess.Popen(
            [sys.executable, "-m", "_shared.worker"],
            cwd=MODAL.path,
            env={"PATH": os.environ["PATH"], **workspace.double.environ, **workspace.settings()},
            stdout=output,
            stderr=output,
        )
    try:
        session = workspace.emulator.create_session()
        workspace.emulator.say(session, "!echo polled")
        assert workspace.said(session) == "polled"
        poller.terminate()
        assert poller.wait(PATIENCE_SECONDS) == 0
    finally:
        poller.kill()
        poller.wait()
        sys.stderr.write(log.read_text())  # pytest shows it when the test fails


def test_a_missing_secret_or_setting_is_named(workspace: Workspace) -> None:
    done = workspace.cli("deploy", "app.py")
    assert done.returncode == 1
    assert "Secret 'sandboxes' not found" in done.stdout + done.stderr
    workspace.create_secret(ANTHROPIC_ENVIRONMENT_ID="", ANTHROPIC_ENVIRONMENT_KEY="")
    workspace.deploy()
    workspace.double.fire("dispatch")
    log = workspace.double.log("dispatch")
    assert "ANTHROPIC_ENVIRONMENT_ID is not set" in log
    assert "ANTHROPIC_ENVIRONMENT_KEY is not set" in log


async def test_without_a_signing_key_every_request_is_a_503_and_the_log_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = MODAL.module("app")
    monkeypatch.setattr(app.log, "configure", lambda: None)  # the logging of this process is pytest's
    for name in ("ANTHROPIC_WEBHOOK_SIGNING_KEY", "ANTHROPIC_WEBHOOK_SECRET", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANTHROPIC_ENVIRONMENT_ID", "env_1")
    monkeypatch.setenv("ANTHROPIC_ENVIRONMENT_KEY", "a-key")

    async def nothing() -> dict[str, object]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    app._verifier.cache_clear()
    try:
        for _ in range(2):
            request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, nothing)
            assert (await app.webhook.local(request)).status_code == 503
    finally:
        app._verifier.cache_clear()
    (said,) = (record.getMessage() for record in caplog.records)
    assert "ANTHROPIC_WEBHOOK_SIGNING_KEY is not set" in said


def test_an_image_that_could_not_run_the_runner_is_not_deployed(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(MODAL.path, folder, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
    (folder / "_shared" / "runner_session.py").write_text("import no_such_package\n")
    workspace.create_secret()
    done = workspace.cli("deploy", "app.py", folder=folder)
    assert done.returncode == 1
    assert "the anthropic package cannot be loaded" in done.stdout + done.stderr
    assert workspace.double.state.published == {}


def test_the_readmes_lines_clean_up(workspace: Workspace) -> None:
    workspace.create_secret()
    workspace.deploy()
    session = workspace.emulator.create_session()
    workspace.emulator.say(session, "!echo served > file.txt")
    workspace.double.fire("dispatch")
    workspace.said(session)
    readme = (
        (MODAL.path / "README.md").read_text(encoding="utf-8").partition("\n## Clean up\n")[2].partition("\n## ")[0]
    )
    lines = re.findall(r"^    \.venv/bin/modal (.+)$", readme, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        done = workspace.cli(*line.split(), "--yes")
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    state = workspace.double.state
    assert (workspace.double.running(), state.apps, state.secret_ids, state.volumes) == ([], {}, {}, {})
