"""A client of the admin API: the names of `Emulator`, for an emulator in another process.

Plain values in, wire objects and the emulator's own records out. A refusal is an `AdminError` in the emulator's words.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Self

import httpx2

from .admin_params import MAX_WAIT_SECONDS
from .requests import BETA, RequestRecord
from .troubles import Execution
from .watch import WAIT_SECONDS, Awaited
from .webhooks import Delivery

Json = dict[str, Any]
TIMEOUT_SECONDS = 30.0


class AdminError(Exception):
    """The emulator refused the request."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class AdminClient:
    """Safe to share between threads; close it, or use it as a context manager."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx2.Client(base_url=url, timeout=TIMEOUT_SECONDS, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The whole

    def state(self) -> Json:
        """Ids and keys, as the ready line has them, and where the emulator stands."""
        return self._get("/state")

    def now(self) -> datetime:
        return datetime.fromisoformat(self.state()["now"])

    def advance(self, seconds: float) -> None:
        self._post("/clock", advance=seconds)

    def skew(self, seconds: float) -> None:
        self._post("/clock", skew=seconds)

    @property
    def switches(self) -> Json:
        values: Json = self._get("/switches")["values"]
        return values

    def switch(self, **values: Any) -> None:
        self._post("/switches", **values)

    # Faults

    def fault(
        self,
        operation: str,
        kind: str,
        count: int | None = 1,
        *,
        status: int = 500,
        seconds: float = 0.0,
        after: int = 0,
    ) -> Json:
        values = {"count": count, "status": status, "seconds": seconds, "after": after}
        return self._post("/faults", operation=operation, kind=kind, **values)

    def cut_stream(self, session_id: str | None = None, after_events: int = 0, count: int = 1) -> Json:
        return self._post("/stream-cuts", session_id=session_id, after_events=after_events, count=count)

    def webhook_fault(self, kind: str, count: int = 1, *, seconds: float = 0.0) -> Json:
        return self._post("/webhook-faults", kind=kind, count=count, seconds=seconds)

    def faults(self) -> list[Json]:
        """What is armed and has not had all its hits."""
        data: list[Json] = self._get("/faults")["data"]
        return data

    def disarm(self, fault_id: str) -> None:
        self._request("DELETE", f"/faults/{fault_id}")

    def clear_faults(self) -> None:
        self._request("DELETE", "/faults")

    # Webhooks

    def webhooks(self) -> Json:
        """url, paused, disabled_reason."""
        return self._get("/webhooks")

    def set_webhook_url(self, url: str | None) -> None:
        self._post("/webhooks", url=url)

    def enable_webhooks(self) -> None:
        self._post("/webhooks", enabled=True)

    def pause_webhooks(self, is_paused: bool = True) -> None:
        self._post("/webhooks", paused=is_paused)

    # What happened

    def requests(self, since: int = 0) -> list[RequestRecord]:
        """The request log from this index on."""
        return [RequestRecord(**_with_time(each)) for each in self._get("/requests", since=since)["data"]]

    def deliveries(self, since: int = 0) -> list[Delivery]:
        return [Delivery(**_with_time(each)) for each in self._get("/deliveries", since=since)["data"]]

    def executions(self, since: int = 0) -> list[Execution]:
        return [Execution(**_with_time(each)) for each in self._get("/executions", since=since)["data"]]

    def report_execution(
        self, call: str, runner: str, session_id: str | None = None, lease_epoch: int | None = None
    ) -> Execution:
        reply = self._post("/executions", call=call, runner=runner, session_id=session_id, lease_epoch=lease_epoch)
        return Execution(**_with_time(reply))

    def failed_expectations(self) -> list[str]:
        failures: list[str] = self.state()["failed_expectations"]
        return failures

    # Sessions and work

    def create_environment(self, name: str = "another") -> tuple[str, str]:
        reply = self._post("/environments", name=name)
        return reply["environment_id"], reply["environment_key"]

    def create_session(self, title: str | None = None, environment_id: str | None = None) -> str:
        state = self.state()
        body = {"agent": state["agent_id"], "environment_id": environment_id or state["environment_id"], "title": title}
        session_id: str = self._public("/v1/sessions", body, state["api_key"])["id"]
        return session_id

    def send(self, session_id: str, *events: Json) -> list[Json]:
        path = f"/v1/sessions/{session_id}/events"
        sent: list[Json] = self._public(path, {"events": list(events)}, self.state()["api_key"])["data"]
        return sent

    def say(self, session_id: str, text: str) -> Json:
        return self.send(session_id, {"type": "user.message", "content": [{"type": "text", "text": text}]})[0]

    def set_script(self, session_id: str, steps: Sequence[Any]) -> None:
        """Steps as data: what a YAML scenario has."""
        self._post(f"/sessions/{session_id}/script", steps=list(steps))

    def set_default_script(self, steps: Sequence[Any]) -> None:
        self._post("/script", steps=list(steps))

    def session(self, session_id: str) -> Json:
        session: Json = self._get(f"/sessions/{session_id}")["session"]
        return session

    def work(self, session_id: str) -> Json:
        work: Json = self._get(f"/sessions/{session_id}")["work"]
        return work

    def events(self, session_id: str, *types: str) -> list[Json]:
        events: list[Json] = self._get(f"/sessions/{session_id}")["events"]
        return [event for event in events if not types or event["type"] in types]

    def pending_calls(self, session_id: str) -> list[str]:
        calls: list[str] = self._get(f"/sessions/{session_id}")["pending_calls"]
        return calls

    def stop_work(self, session_id: str, force: bool = False) -> Json:
        return self._post(f"/sessions/{session_id}/stop", force=force)

    def add_healthcheck(self, environment_id: str | None = None) -> Json:
        return self._post("/healthchecks", environment_id=environment_id)

    def wait_for(self, session_id: str, state: Awaited, timeout: float = WAIT_SECONDS) -> None:
        """TimeoutError unless the session, or its item, gets there in so many seconds (at most 600)."""
        seconds = min(timeout, MAX_WAIT_SECONDS)
        reply = self._get(f"/sessions/{session_id}/wait", until=state, timeout=seconds)
        if not reply["is_met"]:
            raise TimeoutError(f"session {session_id} was not {state} within {seconds} s")

    def wait_idle(self, session_id: str, timeout: float = WAIT_SECONDS) -> None:
        self.wait_for(session_id, "idle", timeout)

    # Transport

    def _get(self, path: str, **query: Any) -> Json:
        return self._request("GET", path, params=query, timeout=TIMEOUT_SECONDS + query.get("timeout", 0.0))

    def _post(self, path: str, **body: Any) -> Json:
        return self._request("POST", path, json=body)

    def _request(self, method: str, path: str, **arguments: Any) -> Json:
        return _reply(self._http.request(method, f"/_emulator{path}", **arguments))

    def _public(self, path: str, body: Json, api_key: str) -> Json:
        headers = {"authorization": f"Bearer {api_key}", "anthropic-beta": BETA}
        return _reply(self._http.post(path, json=body, headers=headers))


def _reply(response: httpx2.Response) -> Json:
    reply: Json = response.json()
    if response.status_code != 200:
        raise AdminError(response.status_code, reply["error"]["message"])
    return reply


def _with_time(record: Json) -> Json:
    return {**record, "at": datetime.fromisoformat(record["at"])}
