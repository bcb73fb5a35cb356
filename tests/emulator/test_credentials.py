"""The credential matrix, cell by cell, and the scopes and switches around it."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from anthropic import AsyncAnthropic

from tests.emulator.support import bearer, claim, error_of, token_of, work_path
from tools.emulator import Emulator, Switches

API, KEY, TOKEN = "api_key", "environment_key", "sessions_token"

MATRIX = [
    ("GET", "{work}/poll", {KEY}),
    ("GET", "{work}/stats", {API, KEY}),
    ("GET", "{work}", {KEY}),
    ("GET", "{work}/{id}", {API}),
    ("POST", "{work}/{id}", {API}),
    ("POST", "{work}/{id}/ack", {KEY, TOKEN}),
    ("POST", "{work}/{id}/heartbeat", {KEY, TOKEN}),
    ("POST", "{work}/{id}/stop", {API, KEY, TOKEN}),
    ("GET", "/v1/sessions/{id}", {API, KEY, TOKEN}),
    ("GET", "/v1/sessions/{id}/events", {API, KEY, TOKEN}),
    ("POST", "/v1/sessions/{id}/events", {API, KEY, TOKEN}),
    ("POST", "/v1/sessions", {API}),
    ("GET", "/v1/sessions", {API}),
    ("POST", "/v1/agents", {API}),
    ("POST", "/v1/environments", {API}),
    ("DELETE", "/v1/sessions/{id}", {API}),
]


def handed_out(emulator: Emulator, http: httpx2.Client) -> tuple[str, str]:
    """A session and the token of its hand-out."""
    session_id = emulator.create_session()
    item = http.get(work_path(emulator, "/poll"), headers=bearer(emulator.environment_key)).json()
    assert item["id"] == session_id
    return session_id, token_of(item["secret"])


def credentials(emulator: Emulator, token: str) -> dict[str, str]:
    return {API: emulator.api_key, KEY: emulator.environment_key, TOKEN: token}


@pytest.mark.parametrize(("method", "path", "accepted"), MATRIX)
def test_the_matrix(emulator: Emulator, http: httpx2.Client, method: str, path: str, accepted: set[str]) -> None:
    for kind in (API, KEY, TOKEN):
        session_id, token = handed_out(emulator, http)
        target = path.format(work=work_path(emulator), id=session_id)
        response = http.request(method, target, headers=bearer(credentials(emulator, token)[kind]))
        # Accepted means that the credential is no obstacle: the request itself may lack a body or come too early.
        assert (response.status_code == 403) == (kind not in accepted), kind
        assert response.status_code != 401
        assert emulator.requests[-1].credential == kind


def test_lenient_takes_any_valid_credential() -> None:
    with (
        Emulator(switches=Switches(credentials="lenient")) as emulator,
        httpx2.Client(base_url=emulator.url) as http,
    ):
        session_id, token = handed_out(emulator, http)
        for credential in (emulator.api_key, emulator.environment_key, token):
            assert http.get(work_path(emulator, f"/{session_id}"), headers=bearer(credential)).status_code == 200


@pytest.mark.parametrize("headers", [{}, bearer("sk-ant-oat01-unknown"), {"x-api-key": "sk-ant-api03-unknown"}])
def test_no_or_unknown_credential_is_401(emulator: Emulator, http: httpx2.Client, headers: dict[str, str]) -> None:
    response = http.get(work_path(emulator, "/poll"), headers=headers)
    assert response.status_code == 401
    assert error_of(response) == {"type": "authentication_error", "message": "OAuth access token is invalid"}


@pytest.mark.parametrize("header", ["x-api-key", "authorization"])
def test_either_header_carries_either_key(emulator: Emulator, http: httpx2.Client, header: str) -> None:
    for path, key in (("/v1/agents", emulator.api_key), (work_path(emulator, "/poll"), emulator.environment_key)):
        value = key if header == "x-api-key" else f"Bearer {key}"
        assert http.get(path, headers={header: value}, params={"beta": "true"}).status_code == 200


def test_a_key_is_good_for_its_environment_only(emulator: Emulator, http: httpx2.Client) -> None:
    _, other_key = emulator.create_environment()
    session_id = emulator.create_session()
    for path in (work_path(emulator, "/poll"), f"/v1/sessions/{session_id}"):
        response = http.get(path, headers=bearer(other_key))
        assert response.status_code == 403
        assert error_of(response)["message"] == "Token not authorized for this environment"


def test_a_token_is_good_for_its_session_only(emulator: Emulator, http: httpx2.Client) -> None:
    _, token = handed_out(emulator, http)
    other = emulator.create_session()
    assert http.get(f"/v1/sessions/{other}", headers=bearer(token)).status_code == 403
    assert http.post(work_path(emulator, f"/{other}/ack"), headers=bearer(token)).status_code == 403


async def test_an_old_token_outlives_the_next_hand_out(emulator: Emulator, runner: AsyncAnthropic) -> None:
    emulator.create_session()
    first = await runner.beta.environments.work.poll(emulator.environment_id)
    emulator.advance(6)
    second = await claim(runner, emulator.environment_id)
    assert first is not None
    assert token_of(first.secret) != token_of(second.secret)
    async with AsyncAnthropic(base_url=emulator.url, auth_token=token_of(first.secret), max_retries=0) as client:
        assert (await client.beta.sessions.retrieve(first.id)).id == first.id


def test_a_token_outlives_its_item_by_an_hour(emulator: Emulator, http: httpx2.Client) -> None:
    session_id, token = handed_out(emulator, http)
    emulator.stop_work(session_id, force=True)
    path = f"/v1/sessions/{session_id}"
    emulator.advance(3590)
    assert http.get(path, headers=bearer(token)).status_code == 200
    emulator.advance(20)
    assert http.get(path, headers=bearer(token)).status_code == 401


def test_a_token_may_end_with_its_item() -> None:
    headers = {"anthropic-beta": "managed-agents-2026-04-01"}
    with (
        Emulator(switches=Switches(token_after_stop="401")) as emulator,
        httpx2.Client(base_url=emulator.url, headers=headers) as http,
    ):
        session_id, token = handed_out(emulator, http)
        path = f"/v1/sessions/{session_id}"
        assert http.get(path, headers=bearer(token)).status_code == 200
        emulator.stop_work(session_id, force=True)
        assert http.get(path, headers=bearer(token)).status_code == 401
        emulator.say(session_id, "again")
        fresh = http.get(work_path(emulator, "/poll"), headers=bearer(emulator.environment_key)).json()
        assert http.get(path, headers=bearer(token_of(fresh["secret"]))).status_code == 200
        assert http.get(path, headers=bearer(token)).status_code == 401


@pytest.mark.parametrize("may", [True, False])
def test_what_the_environment_key_may_send(may: Any) -> None:
    headers = {"anthropic-beta": "managed-agents-2026-04-01"}
    with (
        Emulator(switches=Switches(environment_key_may_answer=may)) as emulator,
        httpx2.Client(base_url=emulator.url, headers=headers) as http,
    ):
        session_id, token = handed_out(emulator, http)
        path, body = f"/v1/sessions/{session_id}/events", {"events": [{"type": "user.interrupt"}]}
        assert http.post(path, json=body, headers=bearer(token)).status_code == 200
        response = http.post(path, json=body, headers=bearer(emulator.environment_key))
        assert response.status_code == (200 if may else 403)
        message = {"type": "user.message", "content": [{"type": "text", "text": "hi"}]}
        response = http.post(path, json={"events": [message]}, headers=bearer(emulator.environment_key))
        assert response.status_code == 200
