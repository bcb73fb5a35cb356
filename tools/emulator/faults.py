"""What goes wrong on the way between the emulator and its clients: armed by count, met in the order of arming."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, get_args

from starlette.requests import Request
from starlette.responses import Response

from .clock import span
from .engine import Engine
from .state.ids import new_id

Kind = Literal["delay", "delay_request", "drop", "fail", "lose_response", "duplicate"]
ANY_OPERATION = "*"
_PING = "event: ping"


@dataclass
class Fault:
    """What happens to `count` requests of one operation (`*`: of any), after the next `after` have passed unharmed.

    `delay`: carried out at once, answered `seconds` later. `delay_request`: carried out `seconds` later. `drop`: never
    carried out, the connection ends without an answer. `fail`: never carried out, answered with `status`.
    `lose_response`: carried out, the connection ends without an answer. `duplicate`: carried out twice, as when
    something on the way repeats the request; the client gets the second answer.
    """

    operation: str
    kind: Kind
    count: int | None = 1
    """None: until `clear_faults`."""
    status: int = 500
    seconds: float = 0.0
    """Of the emulator's clock, so `advance` shortens the wait."""
    after: int = 0
    hits: int = 0
    """How many requests have met it."""
    id: str = field(default_factory=lambda: new_id("fault"))
    """What `disarm` wants."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: {self.kind!r} is not one of {', '.join(get_args(Kind))}")
        if self.count is not None and self.count < 1:
            raise ValueError("count: at least 1, or none for as long as the emulator runs")
        if self.kind == "fail" and not 400 <= self.status <= 599:
            raise ValueError(f"status: {self.status} is no failure (400 to 599)")
        if self.kind.startswith("delay") and self.seconds <= 0:
            raise ValueError(f"seconds: {self.kind} needs a positive number")
        span(self.seconds)
        if self.after < 0:
            raise ValueError("after: not negative")

    @property
    def is_over(self) -> bool:
        return self.count is not None and self.hits >= self.count

    def shown(self) -> dict[str, Any]:
        return {"on": "request", **asdict(self)}


@dataclass(frozen=True)
class Encounter:
    """A request has met a fault, at this time: the delays count from here."""

    fault: Fault
    at: datetime


@dataclass(eq=False)
class OpenStream:
    """One event stream that a client reads."""

    session_id: str
    client: tuple[str, int]
    sent: int = 0


@dataclass(eq=False)
class Cut:
    """The connection of an event stream breaks once it has carried `after_events` events from here on; pings are none.

    0 breaks an open stream at once and a new one right after its headers. Of several streams the first to get there.
    """

    session_id: str | None = None
    after_events: int = 0
    count: int = 1
    hits: int = 0
    id: str = field(default_factory=lambda: new_id("fault"))
    _sent_before: dict[OpenStream, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.after_events < 0 or self.count < 1:
            raise ValueError("after_events is at least 0 and count at least 1")

    def wants(self, stream: OpenStream) -> bool:
        is_its = self.session_id in (None, stream.session_id)
        return is_its and stream.sent - self._sent_before.get(stream, 0) >= self.after_events

    def shown(self) -> dict[str, Any]:
        after = {"session_id": self.session_id, "after_events": self.after_events}
        return {"on": "stream", **after, "count": self.count, "hits": self.hits, "id": self.id}

    def starts_at(self, streams: Collection[OpenStream]) -> None:
        self._sent_before = {stream: stream.sent for stream in streams}


class Faults:
    """The armed faults. Arming is safe from any thread; requests and streams pass on the event loop."""

    def __init__(self, engine: Engine, operations: Collection[str]) -> None:
        self._engine = engine
        self._operations = operations
        self._lock = threading.Lock()
        self._armed: list[Fault] = []
        self._cuts: list[Cut] = []
        self._streams: list[OpenStream] = []
        self.hang_up: Callable[[tuple[str, int]], None] = lambda _: None
        """Ends the connection of a client; the server's, on its loop."""

    def arm(self, fault: Fault) -> Fault:
        """ValueError for an operation that no route has."""
        if fault.operation != ANY_OPERATION and fault.operation not in self._operations:
            raise ValueError(f"operation: {fault.operation!r} is not one of *, {', '.join(sorted(self._operations))}")
        with self._lock:
            self._armed.append(fault)
        return fault

    def arm_cut(self, cut: Cut) -> Cut:
        with self._lock:
            cut.starts_at(self._streams)
            self._cuts.append(cut)
        self._engine.on_loop(self._break_streams)
        return cut

    def armed(self) -> list[Fault | Cut]:
        """What has not had all its hits."""
        with self._lock:
            return [*self._armed, *self._cuts]

    def disarm(self, fault_id: str) -> bool:
        """Whether there was one of this id."""
        with self._lock:
            before = len(self._armed) + len(self._cuts)
            self._armed = [fault for fault in self._armed if fault.id != fault_id]
            self._cuts = [cut for cut in self._cuts if cut.id != fault_id]
            return len(self._armed) + len(self._cuts) < before

    def clear(self) -> None:
        with self._lock:
            self._armed.clear()
            self._cuts.clear()

    # Requests

    def meet(self, operation: str) -> Encounter | None:
        """The fault that a request of this operation meets. The later ones do not count it."""
        encounter = self._meet(operation, self._engine.clock.now())
        if encounter is not None:
            self._engine.ring()
        return encounter

    def _meet(self, operation: str, now: datetime) -> Encounter | None:
        with self._lock:
            for fault in self._armed:
                if fault.operation not in (operation, ANY_OPERATION):
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.hits += 1
                if fault.is_over:
                    self._armed.remove(fault)
                return Encounter(fault, now)
        return None

    async def carry_out(
        self,
        met: Encounter | None,
        request: Request,
        serve: Callable[[], Awaitable[Response]],
        refuse: Callable[[int], Response],
    ) -> Response:
        """Serve the request as the fault has it. `refuse` is told 0 for a request that is never answered."""
        if met is None:
            return await serve()
        due = met.at + timedelta(seconds=met.fault.seconds)
        match met.fault.kind:
            case "drop":
                return await self._hang_up(request, refuse(0))
            case "fail":
                return refuse(met.fault.status)
            case "delay_request":
                await self._engine.wait_for_instant(due)
            case "delay":
                response = await serve()
                await self._engine.wait_for_instant(due)
                return response
            case "lose_response":
                return await self._hang_up(request, await serve())
            case "duplicate":
                await serve()
        return await serve()

    async def _hang_up(self, request: Request, unheard: Response) -> Response:
        self.hang_up(client_of(request))
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return unheard

    # Streams

    async def pass_on(self, stream: OpenStream, frames: AsyncIterator[str]) -> AsyncIterator[str]:
        """The frames of an event stream until a cut."""
        with self._lock:
            self._streams.append(stream)
        try:
            if self._is_broken(stream):
                return
            async for frame in frames:
                stream.sent += not frame.startswith(_PING)  # before the client can know of it
                yield frame
                if self._is_broken(stream):
                    return
        finally:
            with self._lock:
                self._streams.remove(stream)

    def _break_streams(self) -> None:
        for stream in list(self._streams):
            self._is_broken(stream)

    def _is_broken(self, stream: OpenStream) -> bool:
        with self._lock:
            cut = next((cut for cut in self._cuts if cut.wants(stream)), None)
            if cut is None:
                return False
            cut.hits += 1
            if cut.hits >= cut.count:
                self._cuts.remove(cut)
        self.hang_up(stream.client)
        self._engine.ring()
        return True


def client_of(request: Request) -> tuple[str, int]:
    assert request.client is not None  # noqa: S101 - it came over TCP
    return request.client.host, request.client.port
