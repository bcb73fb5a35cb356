"""The double of Vercel refuses what it does not know, and keeps to what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.vercel import FakeVercel
from tests.fakes.vercel.api import PROJECT, TEAM, TOKEN


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeVercel]:
    with FakeVercel(tmp_path / "vercel") as fake:
        yield fake


def ask(fake: FakeVercel, method: str, path: str, *, token: str = TOKEN, **options: Any) -> tuple[int, str]:
    query = {"teamId": TEAM, **options.pop("query", {})}
    headers = {"authorization": f"Bearer {token}"}
    reply = httpx.request(method, f"{fake.url}{path}", params=query, headers=headers, **options)
    return reply.status_code, reply.json().get("error", {}).get("code", "")


def test_a_field_it_does_not_know_is_refused_and_kept(fake: FakeVercel) -> None:
    body = {"projectId": PROJECT, "name": "one", "surprise": True}
    assert ask(fake, "POST", "/v3/sandboxes", json=body) == (400, "bad_request")
    assert fake.refused == ["POST /api/v3/sandboxes: surprise"]
    assert fake.sandboxes == {}


def test_a_parameter_and_a_route_it_does_not_know_are_refused(fake: FakeVercel) -> None:
    assert ask(fake, "GET", "/v2/sandboxes", query={"project": PROJECT, "surprise": "1"})[0] == 400
    assert ask(fake, "POST", "/v2/sandboxes/one/fork") == (404, "no_such_route")
    assert len(fake.refused) == 2


def test_strangers_and_other_projects_are_refused(fake: FakeVercel) -> None:
    assert ask(fake, "GET", "/v2/sandboxes", token="guessed", query={"project": PROJECT}) == (403, "forbidden")
    assert ask(fake, "GET", "/v2/sandboxes", query={"project": "prj_other"}) == (403, "forbidden")


def test_a_fault_is_met_once_and_can_be_taken_back(fake: FakeVercel) -> None:
    fake.fail("list", 503)
    fake.fail("get", 503)
    assert [ask(fake, "GET", "/v2/sandboxes", query={"project": PROJECT})[0] for _ in range(2)] == [503, 200]
    fake.calm()
    assert ask(fake, "GET", "/v2/sandboxes/none", query={"projectId": PROJECT}) == (404, "not_found")
