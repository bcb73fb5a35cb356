"""The job: what may reach a sandbox, and that the runner reads exactly that."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from anthropic.types.beta.environments import BetaSelfHostedWork

from shared.errors import JobRefused
from shared.jobs import Job
from shared.runner_job import RunnerJob, parse_job
from shared.settings import Settings

KEY = "sk-ant-oat01-hush"
TOKEN = "sk-ant-req-token"


def settings(**more: str) -> Settings:
    return Settings.from_env({"ANTHROPIC_ENVIRONMENT_ID": "env_1", "ANTHROPIC_ENVIRONMENT_KEY": KEY, **more})


def secret_of(payload: object, *, padded: bool = False) -> str:
    encoded = base64.urlsafe_b64encode(json.dumps(payload).encode()).decode()
    return encoded if padded else encoded.rstrip("=")


def item(**changes: Any) -> BetaSelfHostedWork:
    values = {
        "id": "sesn_1",
        "environment_id": "env_1",
        "secret": secret_of({"sessions_token": TOKEN}),
        "data": {"type": "session", "id": "sesn_1"},
    }
    return BetaSelfHostedWork.construct(**(values | changes))


def test_the_runner_accepts_what_the_host_writes() -> None:
    told = {
        "SANDBOX_TOOLS": "tools:make",
        "SANDBOX_TOOL_NAMES": "deploy, ticket",
        "SANDBOX_MAX_IDLE_SECONDS": "90",
        "SANDBOX_MAX_WAIT_SECONDS": "0",
    }
    job = Job.from_item(item(), settings(**told))
    read = parse_job(json.loads(job.to_stdin()))
    assert read == RunnerJob(
        session_id="sesn_1",
        work_id="sesn_1",
        environment_id="env_1",
        base_url="https://api.anthropic.com",
        secret=job.secret,
        environment_key=None,
        max_idle_seconds=90.0,
        tools="tools:make",
        max_wait_seconds=0.0,
        tool_names=frozenset({"deploy", "ticket"}),
    )
    assert read.token == TOKEN


def test_the_names_are_the_sdks_own() -> None:
    names = set(json.loads(Job.from_item(item(), settings()).to_stdin()))
    assert names == {
        "ANTHROPIC_SESSION_ID",
        "ANTHROPIC_WORK_ID",
        "ANTHROPIC_ENVIRONMENT_ID",
        "ANTHROPIC_BASE_URL",
        "ANTHROPIC_WORK_SECRET",
        "SANDBOX_MAX_IDLE_SECONDS",
        "SANDBOX_MAX_WAIT_SECONDS",
    }


@pytest.mark.parametrize("allowed", ["true", "false"])
def test_the_environment_key_stays_out_of_a_job_with_a_secret(allowed: str) -> None:
    job = Job.from_item(item(), settings(ALLOW_ENVIRONMENT_KEY_IN_SANDBOX=allowed))
    assert KEY.encode() not in job.to_stdin()


def test_nothing_but_the_token_of_a_secret_is_passed_on() -> None:
    bundle = {"sessions_token": TOKEN, "ingress_token": "other", "sources": [{"token": "third"}]}
    job = Job.from_item(item(secret=secret_of(bundle, padded=True)), settings())
    passed = json.loads(job.to_stdin())["ANTHROPIC_WORK_SECRET"]
    assert json.loads(base64.urlsafe_b64decode(passed + "=" * (-len(passed) % 4))) == {"sessions_token": TOKEN}


UNUSABLE = [
    None,
    "",
    "this-is-not-base64-json",
    "\u00e4\u00f6",
    secret_of([]),
    secret_of({"sessions_token": None}),
    secret_of({"sessions_token": ""}),
    secret_of({"token": TOKEN}),
]


@pytest.mark.parametrize("secret", UNUSABLE)
def test_an_item_without_a_usable_secret_is_refused(secret: str | None) -> None:
    with pytest.raises(JobRefused, match="ALLOW_ENVIRONMENT_KEY_IN_SANDBOX"):
        Job.from_item(item(secret=secret), settings())


@pytest.mark.parametrize("secret", UNUSABLE)
def test_unless_the_operator_has_accepted_the_key_in_the_sandbox(secret: str | None) -> None:
    job = Job.from_item(item(secret=secret), settings(ALLOW_ENVIRONMENT_KEY_IN_SANDBOX="true"))
    read = parse_job(json.loads(job.to_stdin()))
    assert (read.secret, read.token) == (None, KEY)


@pytest.mark.parametrize(
    "bad",
    ["", "../other", "a/b", "a b", "a\n", "-rf", "_x", ".hidden", "a\x00", "\u00e4", "x" * 129, None, 7, {"id": 1}],
)
def test_a_malformed_id_is_refused_not_escaped(bad: object) -> None:
    with pytest.raises(JobRefused, match="session id"):
        Job.from_item(item(data={"type": "session", "id": bad}), settings())
    with pytest.raises(JobRefused, match="work id"):
        Job.from_item(item(id=bad), settings())


@pytest.mark.parametrize("other", ["env_2", "", None])
def test_an_item_of_another_environment_is_refused(other: str | None) -> None:
    with pytest.raises(JobRefused, match="another environment"):
        Job.from_item(item(environment_id=other), settings())


def test_a_refusal_quotes_nothing() -> None:
    with pytest.raises(JobRefused) as raised:
        Job.from_item(item(secret="c2VjcmV0LXRleHQ"), settings())
    assert "c2VjcmV0" not in str(raised.value)


def test_a_job_does_not_print_its_credentials() -> None:
    with_token = Job.from_item(item(), settings())
    with_key = Job.from_item(item(secret=None), settings(ALLOW_ENVIRONMENT_KEY_IN_SANDBOX="true"))
    assert str(with_token.secret) not in repr(with_token)
    assert KEY not in repr(with_key)
