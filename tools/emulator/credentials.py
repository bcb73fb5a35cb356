"""Who may call what: the kinds of credential, the matrix of endpoints, and the secret of a work item.

The matrix follows the SDK's per-endpoint notes where they exist, then the documentation. What both leave open (an API
key on poll, ack and heartbeat; a token on list and stats) is refused, so that nothing comes to depend on it.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from .errors import Forbidden, Unauthenticated
from .state import WorkItem, World
from .state.ids import new_sessions_token
from .switches import Switches

TOKEN_OUTLIVES_ITEM = timedelta(hours=1)


class Kind(StrEnum):
    API_KEY = "api_key"
    ENVIRONMENT_KEY = "environment_key"
    SESSIONS_TOKEN = "sessions_token"  # noqa: S105 - the kind, not a token


API = frozenset({Kind.API_KEY})
WORKER = frozenset({Kind.ENVIRONMENT_KEY, Kind.SESSIONS_TOKEN})
ANY = API | WORKER
STORES = API | {Kind.SESSIONS_TOKEN}

MATRIX: dict[str, frozenset[Kind]] = {
    "work.poll": frozenset({Kind.ENVIRONMENT_KEY}),
    "work.list": frozenset({Kind.ENVIRONMENT_KEY}),
    "work.stats": frozenset({Kind.API_KEY, Kind.ENVIRONMENT_KEY}),
    "work.get": API,
    "work.update": API,
    "work.ack": WORKER,
    "work.heartbeat": WORKER,
    "work.stop": ANY,
    "sessions.get": ANY,
    "events.list": ANY,
    "events.stream": ANY,
    "events.send": ANY,
    "skills.get": ANY,
    "skills.versions": ANY,
    "skills.version": ANY,
    "skills.content": ANY,
    "memories.list": STORES,
    "memories.get": STORES,
    "memories.create": STORES,
    "memories.update": STORES,
    "memories.delete": STORES,
}
"""Operations that are not listed take the API key only (inferred: workers have no business there)."""

ANSWERS = frozenset({"user.interrupt", "user.tool_result", "user.custom_tool_result", "user.tool_confirmation"})


@dataclass(frozen=True)
class Credential:
    """A credential this control plane issued, with the one environment and session it is good for, if any."""

    kind: Kind
    environment_id: str | None = None
    session_id: str | None = None
    handed_out_at: datetime | None = None


class Credentials:
    def __init__(self, api_key: str, switches: Switches) -> None:
        self._switches = switches
        self._known: dict[str, Credential] = {api_key: Credential(Kind.API_KEY)}
        self._handed_out: dict[tuple[str, datetime], str] = {}

    def add_environment_key(self, key: str, environment_id: str) -> None:
        self._known[key] = Credential(Kind.ENVIRONMENT_KEY, environment_id)

    def secret_for(self, item: WorkItem, now: datetime) -> str | None:
        """The secret of a hand-out. What a repeated hand-out does to the older token is open: a switch."""
        match self._switches.secret:
            case "null":
                return None
            case "undecodable":
                return "this-is-not-base64-json"
            case "extra_keys":
                extra = {"ingress_token": "emulator-ingress", "sources": [{"type": "none"}]}
            case _:
                extra = {}
        token = self._token_for(item)
        self._known[token] = Credential(Kind.SESSIONS_TOKEN, item.environment_id, item.session_id, now)
        payload = json.dumps({"sessions_token": token, **extra})
        return base64.urlsafe_b64encode(payload.encode()).decode().rstrip("=")

    def _token_for(self, item: WorkItem) -> str:
        """A token for this hand-out; `queued_at` tells repetitions from the hand-out after a re-queue."""
        hand_out = (item.id, item.queued_at)
        before = self._handed_out.get(hand_out)
        if before is not None and self._switches.repeated_secret == "same":  # noqa: S105 - a switch
            return before
        if before is not None and self._switches.repeated_secret == "fresh_only":  # noqa: S105 - a switch
            del self._known[before]
        self._handed_out[hand_out] = token = new_sessions_token()
        return token

    def kind_of(self, value: str | None) -> str:
        """For the request log."""
        if value is None:
            return "none"
        known = self._known.get(value)
        return known.kind.value if known else "unknown"

    def identify(self, value: str | None) -> Credential:
        known = self._known.get(value) if value else None
        if known is None:
            raise Unauthenticated
        return known

    def authorise(self, credential: Credential, operation: str, path: dict[str, str], world: World) -> None:
        """Raise Forbidden or Unauthenticated unless the credential is good for this operation on this object."""
        if self._switches.credentials == "strict" and credential.kind not in MATRIX.get(operation, API):
            raise Forbidden(f"{operation} does not accept {_ARTICLE[credential.kind]}")
        is_token = credential.kind is Kind.SESSIONS_TOKEN
        if is_token and operation.startswith("skills.") and not self._switches.sessions_token_may_read_skills:
            raise Forbidden(f"{operation} does not accept {_ARTICLE[credential.kind]}")
        if credential.kind is Kind.API_KEY:
            return
        environment_id, session_id = _subject(path, world)
        if environment_id not in (None, credential.environment_id):
            raise Forbidden("Token not authorized for this environment")
        if credential.kind is Kind.SESSIONS_TOKEN and session_id not in (None, credential.session_id):
            raise Forbidden("Token not authorized for this session")

    def check_age(self, credential: Credential, world: World, now: datetime) -> None:
        """Refuse the token of a claim that has ended: after an hour, or at once (open fact, a switch)."""
        if credential.handed_out_at is None or credential.environment_id not in world.environments:
            return
        item = world.queue(credential.environment_id).of_session(credential.session_id or "")
        ended = item.last_stopped_at if item else None
        if ended is None or ended < credential.handed_out_at:
            return
        if self._switches.token_after_stop == "401" or now - ended > TOKEN_OUTLIVES_ITEM:  # noqa: S105 - a switch
            raise Unauthenticated

    def check_events(self, credential: Credential, types: set[str]) -> None:
        is_key = credential.kind is Kind.ENVIRONMENT_KEY
        if is_key and not self._switches.environment_key_may_answer and types & ANSWERS:
            raise Forbidden(f"the environment key may not send {', '.join(sorted(types & ANSWERS))}")


_ARTICLE = {
    Kind.API_KEY: "an API key",
    Kind.ENVIRONMENT_KEY: "an environment key",
    Kind.SESSIONS_TOKEN: "a sessions token",
}


def _subject(path: dict[str, str], world: World) -> tuple[str | None, str | None]:
    """The environment and the session that a path names, as far as they exist."""
    if "session_id" in path:
        session = world.sessions.get(path["session_id"])
        return (session.environment_id if session else None), path["session_id"]
    environment_id = path.get("environment_id")
    if "work_id" in path and environment_id in world.environments:
        queue = world.environments[environment_id].queue
        item = queue.find(path["work_id"])
        return environment_id, item.session_id if item else None
    return environment_id, None
