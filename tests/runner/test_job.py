"""R11: how the job comes in and disappears. Every refusal names the setting and quotes no value."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from shared.jobs import Job
from shared.runner_job import MAX_JOB_BYTES, BadJob, parse_job, read_job, sessions_token
from shared.settings import Settings
from tests.runner.support import poll
from tools.emulator import Emulator

TOKEN = "sk-ant-req-sesame"


def secret_of(payload: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(payload).encode()).decode().rstrip("=")


JOB = {
    "ANTHROPIC_SESSION_ID": "sesn_1",
    "ANTHROPIC_WORK_ID": "work_1",
    "ANTHROPIC_ENVIRONMENT_ID": "env_1",
    "ANTHROPIC_WORK_SECRET": secret_of({"sessions_token": TOKEN}),
}


class Untouchable(io.BytesIO):
    """A stdin that somebody else has left open: reading it would never end."""

    def read(self, *_: Any) -> bytes:
        raise AssertionError("stdin was read")

    readline = read


async def test_the_runner_takes_exactly_what_the_host_sends(emulator: Emulator) -> None:
    """The whole contract between `Job.to_stdin` and `read_job`."""
    emulator.create_session()
    settings = Settings.from_env(
        {
            "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
            "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
            "ANTHROPIC_BASE_URL": "https://api.example",
            "SANDBOX_MAX_IDLE_SECONDS": "12.5",
            "SANDBOX_MAX_WAIT_SECONDS": "900",
            "SANDBOX_TOOLS": "mine:tools",
            "SANDBOX_TOOL_NAMES": "deploy,ticket",
        }
    )
    sent = Job.from_item(await poll(emulator), settings)
    taken = read_job(None, io.BytesIO(sent.to_stdin()), {})
    for name in ("session_id", "work_id", "environment_id", "base_url", "secret", "tools"):
        assert getattr(taken, name) == getattr(sent, name)
    assert (taken.max_idle_seconds, taken.max_wait_seconds) == (12.5, 900)
    assert taken.token.startswith("sk-ant-req-")
    assert taken.environment_key is None
    assert taken.tool_names == {"deploy", "ticket"}
    own = {"SANDBOX_MAX_IDLE_SECONDS", "SANDBOX_MAX_WAIT_SECONDS", "SANDBOX_TOOLS", "SANDBOX_TOOL_NAMES"}
    assert set(json.loads(sent.to_stdin())) <= {*JOB, "ANTHROPIC_BASE_URL", *own}


def test_the_environment_is_emptied_of_every_anthropic_variable() -> None:
    environ = {**JOB, "ANTHROPIC_API_KEY": "k", "ANTHROPIC_CUSTOM_HEADERS": "a: b", "SANDBOX_TOOLS": "m:f", "PATH": "/"}
    read_job(None, io.BytesIO(json.dumps(JOB).encode()), environ)
    assert environ == {"PATH": "/"}


def test_the_sdks_environment_contract_is_enough_and_leaves_stdin_alone() -> None:
    """`ant ... --on-work` writes the work item there; a shell leaves it open for ever."""
    job = read_job(None, Untouchable(), {**JOB, "SANDBOX_MAX_IDLE_SECONDS": "7"})
    assert (job.session_id, job.token, job.max_idle_seconds) == ("sesn_1", TOKEN, 7)
    assert job.base_url == "https://api.anthropic.com"
    key_only = {name: value for name, value in JOB.items() if name != "ANTHROPIC_WORK_SECRET"}
    assert read_job(None, None, {**key_only, "ANTHROPIC_ENVIRONMENT_KEY": "key"}).token == "key"


def test_what_the_image_sets_is_the_default_of_what_the_job_says() -> None:
    environ = {"SANDBOX_TOOLS": "image:tools", "SANDBOX_MAX_IDLE_SECONDS": "5"}
    stdin = io.BytesIO(json.dumps({**JOB, "SANDBOX_MAX_IDLE_SECONDS": "6"}).encode())
    job = read_job(None, stdin, environ)
    assert (job.tools, job.max_idle_seconds) == ("image:tools", 6)
    stale = {"ANTHROPIC_WORK_SECRET": secret_of({"sessions_token": "another"}), "ANTHROPIC_SESSION_ID": "another"}
    assert read_job(None, io.BytesIO(json.dumps(JOB).encode()), stale).token == TOKEN


@pytest.mark.parametrize("indent", [None, 2])
def test_stdin_may_stay_open_behind_the_job(indent: int | None) -> None:
    """Some starters can write to a command's stdin and not close it."""
    reading, writing = os.pipe()
    with open(reading, "rb") as stdin, open(writing, "wb") as starter:
        starter.write(json.dumps({**JOB, "SANDBOX_TOOLS": "{}\n}"}, indent=indent).encode() + b"\n")
        starter.flush()
        assert read_job(None, stdin, {}).session_id == "sesn_1"


def test_the_job_file_is_read_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "job"
    path.write_text(json.dumps(JOB))
    path.chmod(0o400)
    assert read_job(path, Untouchable(), {}).session_id == "sesn_1"
    assert not path.exists()


def test_a_job_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(json.dumps(JOB))
    (tmp_path / "job").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadJob, match="symbolic links"):
        read_job(tmp_path / "job", None, {})
    assert (tmp_path / "elsewhere").exists()


def test_a_job_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadJob, match="No such file"):
        read_job(tmp_path / "missing", None, {})
    with pytest.raises(BadJob, match="directory"):
        read_job(tmp_path, None, {})


BAD: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{sk-ant-req-sesame", "the job is not valid JSON"),
    "not UTF-8": (b"\xff\xfe\xfd", "the job is not valid JSON"),
    "nested without end": (b"[" * 100_000, "the job is not valid JSON"),
    "too large": (b" " * 10 + b"x" * MAX_JOB_BYTES, "larger than 262144 bytes"),
    "a list": ([TOKEN], "not a JSON object of texts"),
    "a number in it": ({**JOB, "ANTHROPIC_WORK_ID": 7}, "not a JSON object of texts"),
    "empty": (b"", "lacks ANTHROPIC_SESSION_ID, ANTHROPIC_WORK_ID, ANTHROPIC_ENVIRONMENT_ID"),
    "blank": (b"\n", "lacks ANTHROPIC_SESSION_ID"),
    "one name missing": ({**JOB, "ANTHROPIC_WORK_ID": ""}, "lacks ANTHROPIC_WORK_ID:"),
    "no credential": ({**JOB, "ANTHROPIC_WORK_SECRET": ""}, "ANTHROPIC_WORK_SECRET must hold a sessions_token"),
    "a bare token": ({**JOB, "ANTHROPIC_WORK_SECRET": TOKEN}, "ANTHROPIC_WORK_SECRET must hold"),
    "a token no header can carry": (
        {**JOB, "ANTHROPIC_WORK_SECRET": secret_of({"sessions_token": f"{TOKEN}\r\nx: y"})},
        "fits no HTTP header",
    ),
    "a URL without a scheme": ({**JOB, "ANTHROPIC_BASE_URL": f"{TOKEN}.example"}, "ANTHROPIC_BASE_URL"),
    **{
        f"{name}={seconds}": ({**JOB, name: seconds}, name)
        for name in ("SANDBOX_MAX_IDLE_SECONDS", "SANDBOX_MAX_WAIT_SECONDS")
        for seconds in (TOKEN, "nan", "inf", "-1")
    },
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_job_names_the_setting_and_quotes_no_value(case: str) -> None:
    content, expected = BAD[case]
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(BadJob) as caught:
        read_job(None, io.BytesIO(raw), {})
    assert expected in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    "secret", [None, "", "!", "é", secret_of([]), secret_of({}), secret_of({"sessions_token": 1}), "W" * 90_000]
)
def test_an_undecodable_secret_holds_no_token(secret: str | None) -> None:
    assert sessions_token(secret) is None


def test_a_secret_is_read_with_and_without_padding() -> None:
    padded = base64.urlsafe_b64encode(json.dumps({"sessions_token": "??>>", "more": 1}).encode()).decode()
    assert sessions_token(padded) == sessions_token(padded.rstrip("=")) == "??>>"


def test_no_repr_shows_a_credential() -> None:
    job = parse_job({**JOB, "ANTHROPIC_ENVIRONMENT_KEY": "sk-ant-oat01-key"})
    for credential in (TOKEN, JOB["ANTHROPIC_WORK_SECRET"], "sk-ant-oat01-key"):
        assert credential not in repr(job)
        assert os.fsencode(credential) not in repr(job).encode()
