"""The wire: Modal's two gRPC services, with every call refused that has no handler, and every field no handler knows.

A handler is a method named after its call, marked with `@rpc(<fields>)`: the paths of the fields it understands. A call
without a handler is answered UNIMPLEMENTED, one with another field set INVALID_ARGUMENT; both are kept in `refused`,
which a test asserts to be empty.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message  # type: ignore[import-untyped]
from grpclib import GRPCError, Status

Handler = TypeVar("Handler", bound=Callable[..., Any])


def rpc(*fields: str) -> Callable[[Handler], Handler]:
    """Marks a handler. `a` allows a whole field, `a.b` one field of the message in `a`."""

    def mark(handler: Handler) -> Handler:
        handler.known_fields = frozenset(fields)  # type: ignore[attr-defined]
        return handler

    return mark


def unknown_fields(message: Message, known: frozenset[str], prefix: str = "") -> Iterator[str]:
    """The paths of the fields set in `message` that are not in `known`."""
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        if path in known or (isinstance(value, Message) and not value.ByteSize()):
            continue
        if not any(name.startswith(f"{path}.") for name in known) or field.message_type is None:
            yield path
            continue
        for each in [value] if isinstance(value, Message) else value:
            yield from unknown_fields(each, known, f"{path}.")


@dataclass
class Call:
    """One call that arrived."""

    name: str
    request: Message
    metadata: dict[str, str]


@dataclass
class Fault:
    """What happens to the next calls of one name."""

    error: GRPCError | None
    seconds: float
    after: bool
    """Whether the call takes effect before it fails: an answer that was lost."""
    times: int
    is_over: bool = False


class Wire:
    """What both services share: the calls that came, those that were refused, and the faults asked for."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.refused: list[str] = []
        self.known: set[str] = set()
        self._faults: dict[str, list[Fault]] = {}
        self._lock = threading.Lock()

    def fail(
        self,
        name: str,
        status: Status | None = Status.UNAVAILABLE,
        message: str = "asked to fail",
        *,
        times: int = 1,
        seconds: float = 0.0,
        after: bool = False,
    ) -> None:
        """Makes the next `times` calls of `name` fail, or with `status=None` only late: `heal` ends that, too."""
        if name not in self.known:
            raise ValueError(f"the double has no call {name}")
        error = GRPCError(status, message) if status else None
        with self._lock:
            self._faults.setdefault(name, []).append(Fault(error, seconds, after, times))

    def heal(self) -> None:
        """No faults any more."""
        with self._lock:
            for fault in itertools.chain(*self._faults.values()):
                fault.is_over = True
            self._faults.clear()

    def fault(self, name: str) -> Fault | None:
        with self._lock:
            for fault in self._faults.get(name, []):
                if fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def named(self, name: str) -> list[Any]:
        """The requests of one call, in the order they came."""
        return [call.request for call in self.calls if call.name == name]


def service(base: type[Any], handlers: Any, wire: Wire) -> Any:
    """An instance of the generated service `base` whose calls go to the methods of `handlers`."""
    methods: dict[str, Callable[..., Any]] = {}
    for name in base.__abstractmethods__:
        handler = getattr(handlers, name, None)
        if handler is not None:
            wire.known.add(name)
        methods[name] = _answer(name, handler, handlers, wire)
    return type(f"Double{base.__name__}", (base,), methods)()


def _answer(name: str, handler: Any, handlers: Any, wire: Wire) -> Callable[..., Any]:
    async def answer(self: Any, stream: Any) -> None:
        request = await stream.recv_message()
        wire.calls.append(Call(name, request, {key: str(value) for key, value in stream.metadata.items()}))
        if handler is None:
            wire.refused.append(name)
            raise GRPCError(Status.UNIMPLEMENTED, f"the double has no {name}")
        if unknown := sorted(set(unknown_fields(request, handler.known_fields))):
            wire.refused.append(f"{name}: {', '.join(unknown)}")
            raise GRPCError(Status.INVALID_ARGUMENT, f"the double does not know {', '.join(unknown)} of {name}")
        handlers.admit(name, stream.metadata)
        fault = wire.fault(name)
        if fault is not None:
            until = time.monotonic() + fault.seconds
            while (left := until - time.monotonic()) > 0 and not fault.is_over:  # noqa: ASYNC110 - another thread says so
                await asyncio.sleep(min(left, 0.05))
            if fault.error and not fault.after:
                raise fault.error
        result = handler(request)
        if inspect.isasyncgen(result):
            async for message in result:
                await stream.send_message(message)
            return
        message = await result if inspect.isawaitable(result) else result
        if fault is not None and fault.error:
            raise fault.error
        await stream.send_message(message)

    return answer
