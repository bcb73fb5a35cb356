"""The whole control plane as one object: every operation takes the time, nothing here does I/O.

`tick` must run before each operation: it brings leases and scripted sleeps up to date, each at its own instant, so that
a clock that jumps an hour leaves the same history as one that walked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from ..agents import Step
from ..clock import stamp
from ..errors import Invalid, NotFound
from ..params import (
    MOST_METADATA,
    AgentCreateBody,
    AgentReference,
    CustomToolResult,
    EnvironmentCreateBody,
    Inbound,
    MemoryStoreResource,
    SessionCreateBody,
    SessionUpdateBody,
    ToolConfirmation,
    UserInterrupt,
    UserMessage,
    UserToolResult,
)
from ..switches import Switches
from .answers import refuse_when_stranded
from .catalog import Agent, Environment
from .ids import new_id
from .inbound import check
from .memory import MemoryStores
from .narration import Notify
from .sessions import Event, Session
from .skills import Skills
from .turns import Turns
from .work import WorkItem, WorkQueue, merge


class World:
    def __init__(self, switches: Switches, lease_ttl: timedelta, notify: Notify, now: datetime) -> None:
        self._switches = switches
        self._lease_ttl = lease_ttl
        self._notify = notify
        self._started_at = now
        self._turns = Turns(notify, switches)
        self.environments: dict[str, Environment] = {}
        self.agents: dict[str, Agent] = {}
        self.sessions: dict[str, Session] = {}
        self.skills = Skills()
        self.memory = MemoryStores()
        self.default_script: Sequence[Step] = ()
        self.changes = 0
        """Grows whenever something a client could see has changed."""
        self.stirred: dict[str, None] = {}
        """The ids of sessions with new events and of environments with work to hand out; whoever looks empties it."""

    # Time

    def next_due(self) -> datetime | None:
        """When `tick` has something to do next, if nothing else happens before."""
        moments = [at for at, _, _ in self._lapses()]
        if (sleeper := self._turns.next_sleeper()) is not None:
            moments.append(sleeper[0])
        return min(moments, default=None)

    def tick(self, now: datetime) -> None:
        while (due := self.next_due()) is not None and due <= now:
            for at, queue, item in self._lapses():
                if at == due:
                    queue.lapse(item, due)
            if (sleeper := self._turns.next_sleeper()) is not None and sleeper[0] == due:
                self._turns.resume(sleeper[1], due)
            self.changes += 1

    def _lapses(self) -> list[tuple[datetime, WorkQueue, WorkItem]]:
        queues = [environment.queue for environment in self.environments.values()]
        return [(lapse[0], queue, lapse[1]) for queue in queues if (lapse := queue.next_lapse())]

    # Environments and agents

    def create_environment(
        self, body: EnvironmentCreateBody, now: datetime, environment_id: str | None = None
    ) -> Environment:
        environment_id = environment_id or new_id("env")
        queue = WorkQueue(environment_id, self._switches, self._lease_ttl, self._started_at, self.stirred)
        environment = Environment(environment_id, body.name, now, now, queue, body.description, dict(body.metadata))
        self.environments[environment_id] = environment
        return environment

    def environment(self, environment_id: str) -> Environment:
        if environment_id not in self.environments:
            raise NotFound(f"environment {environment_id} not found")
        return self.environments[environment_id]

    def queue(self, environment_id: str) -> WorkQueue:
        return self.environment(environment_id).queue

    def create_agent(self, body: AgentCreateBody, now: datetime) -> Agent:
        agent = Agent.create(body, now)
        self.agents[agent.id] = agent
        return agent

    def agent(self, agent_id: str) -> Agent:
        if agent_id not in self.agents:
            raise NotFound(f"agent {agent_id} not found")
        return self.agents[agent_id]

    def _pick_agent(self, reference: str | AgentReference) -> Agent:
        if isinstance(reference, str):
            return self.agent(reference)
        if reference.version not in (None, 1):
            raise NotFound(f"agent {reference.id} has no version {reference.version}")
        return self.agent(reference.id)

    # Sessions

    def session(self, session_id: str) -> Session:
        if session_id not in self.sessions:
            raise NotFound(f"session {session_id} not found")
        return self.sessions[session_id]

    def create_session(self, body: SessionCreateBody, now: datetime) -> Session:
        """A new session is idle and its work item is queued at once (recorded)."""
        environment = self.environment(body.environment_id)
        if environment.archived_at is not None:
            raise Invalid(f"environment {environment.id} is archived", {"error_code": "environment_archived"})
        stores = [resource for resource in body.resources if isinstance(resource, MemoryStoreResource)]
        if len(stores) != len(body.resources):
            raise Invalid(
                f"environment {environment.id} is self_hosted: resources are not supported but for memory stores"
            )
        resources = self.memory.attach(stores)
        agent = self._pick_agent(body.agent)
        session = Session(
            id=new_id("sesn"),
            environment_id=environment.id,
            agent=agent.snapshot(),
            created_at=now,
            updated_at=now,
            title=body.title,
            metadata=dict(body.metadata),
            vault_ids=list(body.vault_ids),
            resources=resources,
            stirred=self.stirred,
        )
        session.script.extend(self.default_script)
        self.sessions[session.id] = session
        environment.queue.enqueue(session.id, now)
        if body.initial_events:
            self.send(session.id, body.initial_events, now)
        self.changes += 1
        return session

    def update_session(self, session_id: str, body: SessionUpdateBody, now: datetime) -> Session:
        session = self.session(session_id)
        changed: dict[str, object] = {}
        if body.metadata:
            merge(session.metadata, body.metadata, MOST_METADATA)
            changed["metadata"] = dict(session.metadata)
        if "title" in body.model_fields_set and body.title != session.title:
            session.title = changed["title"] = body.title
        if changed:
            session.updated_at = now
            session.emit("session.updated", now, **changed)
            self._notify("session.updated", session.id, now)
            self.changes += 1
        return session

    def archive_session(self, session_id: str, now: datetime) -> Session:
        """An archived session is terminated; its work item stays for a worker to find and stop (SDK)."""
        session = self.session(session_id)
        if session.archived_at is None:
            session.archived_at = session.updated_at = now
            session.status = "terminated"
            session.turn = None
            session.emit("session.status_terminated", now)
            self._notify("session.status_terminated", session.id, now)
            self.changes += 1
        return session

    def delete_session(self, session_id: str, now: datetime) -> None:
        """The work item goes too: a worker that still holds it gets 404 (inferred)."""
        session = self.session(session_id)
        session.turn = None
        session.status = "terminated"
        session.emit("session.deleted", now)
        self.queue(session.environment_id).remove(session.id)
        del self.sessions[session_id]
        self._notify("session.deleted", session_id, now)
        self.changes += 1

    def archive_thread(self, session_id: str, thread_id: str, now: datetime) -> None:
        session = self.session(session_id)
        if thread_id == session.thread_id:
            raise Invalid(f"thread {thread_id} is the primary thread of session {session_id}: archive the session")
        self._turns.archive_thread(session, session.thread(thread_id), now)
        self.changes += 1

    # Events

    def send(self, session_id: str, inbound: Sequence[Inbound], now: datetime) -> list[Event]:
        """Take all events or none. Anything that gives a worker something to do queues a session without live work."""
        session = self.session(session_id)
        check(session, inbound, self._switches)
        item = self.queue(session.environment_id).of_session(session_id)
        refuse_when_stranded(session, item, inbound, self._switches)
        self.changes += 1
        sent = [self._take(session, each, now) for each in inbound]
        self._queue_again(session, inbound, now)
        return sent

    def _take(self, session: Session, inbound: Inbound, now: datetime) -> Event:
        event = {"id": new_id("sevt"), **inbound.model_dump()}
        match inbound:
            case UserMessage():
                sent = session.queue(event)
                self._turns.start_next(session, now)
                return sent
            case UserInterrupt(session_thread_id=thread_id):
                self._turns.interrupt(session, event, thread_id, now)
            case ToolConfirmation():
                self._turns.confirm(session, event | {"session_thread_id": None}, now)
            case UserToolResult(tool_use_id=call_id) | CustomToolResult(custom_tool_use_id=call_id):
                if call_id not in session.pending_ids() and call_id not in session.left_open:
                    return event | {"session_thread_id": None, "processed_at": stamp(now)}  # ignored, and not kept
                self._turns.take_result(session, event | {"session_thread_id": None}, call_id, now)
        return next(logged for logged in reversed(session.log) if logged["id"] == event["id"])

    def _queue_again(self, session: Session, inbound: Iterable[Inbound], now: datetime) -> None:
        answers_count = self._switches.result_on_stopped_item == "queues"
        if answers_count or any(isinstance(each, UserMessage | UserInterrupt) for each in inbound):
            self.queue(session.environment_id).enqueue(session.id, now)

    # Work

    def hand_out(self, environment_id: str, reclaim_after: timedelta, now: datetime) -> WorkItem | None:
        item = self.queue(environment_id).hand_out(now, reclaim_after)
        if item is not None:
            self.changes += 1
        return item

    def stopped(self, item: WorkItem, now: datetime) -> None:
        """After a stop: queue the session again when messages still wait for their turn (open fact, a switch)."""
        self.changes += 1
        if item.is_live or self._switches.unprocessed_input_at_stop == "strand":
            return
        session = self.sessions.get(item.session_id)
        if session is not None and session.inbox and session.status != "terminated":
            self.queue(item.environment_id).enqueue(session.id, now)
