"""`python -m tools.emulator` as a process."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx2
import pytest

from tests.emulator.support import bearer

COMMAND = [sys.executable, "-W", "error", "-m", "tools.emulator"]
SECONDS = 60.0


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    arguments = ["--port", "0", "--environment-id", "env_test", "--environment-key", "sk-ant-oat01-test"]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ready_line_service_and_a_clean_end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert list(ready) == ["url", "environment_id", "environment_key", "api_key", "webhook_key", "agent_id"]
    assert (ready["environment_id"], ready["environment_key"]) == ("env_test", "sk-ant-oat01-test")
    assert ready["url"].startswith("http://127.0.0.1:")

    with httpx2.Client(base_url=ready["url"]) as http:
        path = "/v1/environments/env_test/work/poll"
        assert http.get(path, headers=bearer("sk-ant-oat01-test")).json() is None
        assert http.get(f"/v1/agents/{ready['agent_id']}", headers=bearer(ready["api_key"])).status_code == 200
        process.send_signal(number)
        rest, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, rest, errors) == (0, "", "")


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run([*COMMAND, "--port", port], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 1
    assert done.stderr == f"cannot listen on 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--host", "0.0.0.0"], "add --allow-remote"),  # noqa: S104 - refused is the point
        (["--port", "70000"], "between 0 and 65535"),
        (["--lease-ttl", "0"], "between 1 and 86400 seconds"),
        (["--webhook-key", "secret"], "whsec_<base64>"),
        (["--webhook-url", "example.com"], "not an http or https URL"),
        (["--verbose"], "unrecognized arguments"),
    ],
)
def test_a_bad_argument_is_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tools.emulator.__main__ import main

    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # else later tests start deaf children
