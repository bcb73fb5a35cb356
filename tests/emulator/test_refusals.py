"""What the emulator does not know it refuses by name, always in the documented envelope."""

from __future__ import annotations

import socket
from typing import Any

import httpx2
import pytest
from anthropic import AsyncAnthropic, NotFoundError

from tests.emulator.support import bearer, error_of, work_path
from tools.emulator import Emulator, requests

MESSAGE = {"type": "user.message", "content": [{"type": "text", "text": "hi"}]}


def test_the_envelope_and_the_request_id(emulator: Emulator, http: httpx2.Client) -> None:
    response = http.get("/v1/agents/agent_gone", headers=bearer(emulator.api_key))
    assert response.json() == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "agent agent_gone not found"},
        "request_id": response.headers["request-id"],
    }
    assert response.headers["request-id"].startswith("req_")
    assert emulator.requests[-1].request_id == response.headers["request-id"]


async def test_the_sdk_reads_the_envelope(owner: AsyncAnthropic) -> None:
    with pytest.raises(NotFoundError) as refusal:
        await owner.beta.agents.retrieve("agent_gone")
    assert refusal.value.type == "not_found_error"
    assert refusal.value.api_message == "agent agent_gone not found"
    assert refusal.value.request_id


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/messages", 404),
        ("GET", "/v1/agents/", 404),
        ("PUT", "/v1/agents", 405),
        ("DELETE", "/v1/environments/env_1", 405),
    ],
)
def test_an_unknown_route_is_named(
    emulator: Emulator, http: httpx2.Client, method: str, path: str, status: int
) -> None:
    response = http.request(method, path, headers=bearer(emulator.api_key))
    assert response.status_code == status
    assert error_of(response)["message"] == f"{method} {path} is not an endpoint of this emulator"
    assert emulator.requests[-1].operation is None


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("block_ms=0", "block_ms: Input should be greater than or equal to 1"),
        ("block_ms=1000", "block_ms: Input should be less than or equal to 999"),
        ("block_ms=soon", "block_ms: Input should be a valid integer"),
        ("reclaim_older_than_ms=-1", "reclaim_older_than_ms: "),
        (f"reclaim_older_than_ms={10**20}", "reclaim_older_than_ms: "),
        ("reclaim_older_than_ms=1&reclaim_older_than_ms=2", "reclaim_older_than_ms: given more than once"),
        ("worker=1", "worker: not a query field this emulator knows"),
        ("beta=false", "beta: not a query field this emulator knows"),
    ],
)
def test_poll_parameters(emulator: Emulator, http: httpx2.Client, query: str, complaint: str) -> None:
    emulator.create_session()
    path = work_path(emulator, f"/poll?{query}")
    response = http.get(path, headers=bearer(emulator.environment_key))
    assert response.status_code == 400
    assert error_of(response)["message"].startswith(complaint)
    assert emulator.stats()["depth"] == 1


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("/v1/sessions/{id}/events/stream?event_deltas[]=user.message", "event_deltas[].0: "),
        ("/v1/sessions/{id}/events?limit=1001", "limit: "),
        ("/v1/sessions/{id}/events?order=random", "order: "),
        ("/v1/sessions/{id}/events?page=sevt_gone", "page: not a cursor of this list"),
        ("/v1/sessions/{id}/events?created_at[gt]=yesterday", "created_at[gt]: "),
        ("/v1/sessions/{id}/events?created_at[gt]=2026-01-01T00:00:00", "created_at[gt]: "),
        ("/v1/sessions/{id}?expand=all", "expand: "),
        ("/v1/sessions?deployment_id=d", "deployment_id: "),
    ],
)
def test_session_parameters(emulator: Emulator, http: httpx2.Client, path: str, complaint: str) -> None:
    response = http.get(path.format(id=emulator.create_session()), headers=bearer(emulator.api_key))
    assert response.status_code == 400
    assert error_of(response)["message"].startswith(complaint)


@pytest.mark.parametrize(
    ("path", "body", "complaint"),
    [
        ("/v1/sessions", {"agent": "a"}, "environment_id: Field required"),
        ("/v1/sessions", {"agent": "a", "environment_id": "e", "budget": {}}, "budget: not a body field"),
        ("/v1/sessions", {"agent": "a", "environment_id": "e", "initial_events": [MESSAGE] * 51}, "initial_events: "),
        ("/v1/agents", {"name": "a", "model": "m", "multiagent": {}}, "multiagent: not a body field"),
        ("/v1/agents", {"name": "a", "model": "m", "tools": [{"type": "mcp_toolset"}]}, "tools: 'mcp_toolset'"),
        ("/v1/environments", {"name": "a", "config": {"type": "cloud"}}, "config.type: "),
        ("/v1/environments", {"name": "", "config": {"type": "self_hosted"}}, "name: "),
    ],
)
def test_bodies(emulator: Emulator, http: httpx2.Client, path: str, body: Any, complaint: str) -> None:
    response = http.post(path, json=body, headers=bearer(emulator.api_key))
    assert response.status_code == 400
    assert error_of(response)["message"].startswith(complaint)


@pytest.mark.parametrize(("content", "complaint"), [("{", "body: not JSON"), ("[]", "body: not a JSON object")])
def test_a_body_that_is_no_object(emulator: Emulator, http: httpx2.Client, content: str, complaint: str) -> None:
    response = http.post("/v1/agents", content=content, headers=bearer(emulator.api_key))
    assert (response.status_code, error_of(response)["message"]) == (400, complaint)


def test_stop_takes_an_empty_body_and_refuses_an_unknown_field(emulator: Emulator, http: httpx2.Client) -> None:
    path = work_path(emulator, f"/{emulator.create_session()}/stop")
    headers = bearer(emulator.environment_key)
    assert http.post(path, json={"now": True}, headers=headers).status_code == 400
    assert http.post(path, headers=headers).json()["state"] == "stopped"


def test_a_session_needs_an_agent_and_an_environment_that_exist(emulator: Emulator, http: httpx2.Client) -> None:
    headers = bearer(emulator.api_key)
    for agent, environment in ((emulator.agent_id, "env_gone"), ("agent_gone", emulator.environment_id)):
        response = http.post("/v1/sessions", json={"agent": agent, "environment_id": environment}, headers=headers)
        assert response.status_code == 404
    second = {"type": "agent", "id": emulator.agent_id, "version": 2}
    body = {"agent": second, "environment_id": emulator.environment_id}
    assert http.post("/v1/sessions", json=body, headers=headers).status_code == 404


@pytest.mark.parametrize("path", ["/v1/sessions", "/_emulator/clock"])
def test_a_body_that_is_too_large_is_refused_before_all_of_it_is_here(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """As it says itself, or as it is counted."""
    monkeypatch.setattr(requests, "MAX_BODY_BYTES", 1000)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {emulator.api_key}\r\n"
    head += f"Anthropic-Beta: {requests.BETA}\r\nContent-Type: application/json\r\n"
    for more in (f"Content-Length: {10**9}\r\n\r\n", f"Transfer-Encoding: chunked\r\n\r\n7d0\r\n{'a' * 2000}\r\n"):
        with socket.create_connection(("127.0.0.1", httpx2.URL(emulator.url).port), timeout=60.0) as connection:
            connection.sendall((head + more).encode())
            answer = connection.recv(65536).decode()
            while "larger than" not in answer and (rest := connection.recv(65536)):
                answer += rest.decode()
        assert answer.startswith("HTTP/1.1 400")
        assert "body: larger than 1000 bytes" in answer
