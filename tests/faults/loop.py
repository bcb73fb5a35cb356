"""One event loop in virtual time, and processes on it that can be killed between any two steps, or suspended.

Nothing waits for real: when no callback is ready, the clock jumps to the next timer. Every callback carries the context
it was made in, and a context belongs to at most one `Process`. So a process is killed or held without its help, as by
SIGKILL and SIGSTOP: its callbacks are no longer run, and no cleanup of its own happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import inspect
import itertools
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")
EPOCH = 1_800_000_000.0  # the wall clock when a schedule begins
MAX_CALLBACKS = 3_000_000  # of one schedule; more is a loop without end
_FIRST_PID = 4_200_000  # above every real one
_REAPING_ROUNDS = 50
_STEP_SECONDS = 1e-6  # what a round of the loop takes: code that waits for a remainder of 0.0 must not wait for ever


class RanAway(Exception):
    """A schedule takes too many steps, or waits for something that can never happen."""


class Process:
    """What dies and is suspended as a whole: one dispatcher, or one runner."""

    def __init__(self, loop: VirtualLoop, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self.context = contextvars.copy_context()
        self.context.run(CURRENT.set, self)
        self.is_dead = False
        self.died_at: float | None = None
        self.is_held = False
        self.is_reaped = False
        """The schedule is over: the process runs its cleanup, which nobody looks at any more."""
        self.was_told_to_leave = False
        self.steps = 0
        self._at_step: dict[int, Callable[[], None]] = {}
        self.on_death: list[Callable[[], None]] = []
        self.signals: dict[int, tuple[Callable[..., object], tuple[Any, ...]]] = {}
        self.tasks: list[asyncio.Task[Any]] = []
        self._loop = loop
        self._waiting: list[asyncio.Handle] = []

    def spawn(self, main: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        return self._loop.create_task(main, context=self.context)

    def after(self, steps: int, do: Callable[[], None]) -> None:
        """Something that happens to it, so many steps of its own from now."""
        if steps <= 0:
            do()
        else:
            self._at_step[self.steps + steps] = do

    def die(self) -> None:
        if not self.is_dead:
            self.is_dead, self.died_at = True, self._loop.time()
            for callback in self.on_death:
                callback()

    def is_alive_at(self, moment: float) -> bool:
        return self.died_at is None or self.died_at > moment

    def signal(self, number: int) -> None:
        if number not in self.signals:
            self.die()  # as a process does that has not come to say what it wants of signals
        elif not self.is_dead:
            self.was_told_to_leave = True
            handler, arguments = self.signals[number]
            self._loop.call_soon(handler, *arguments, context=self.context)

    def hold(self) -> None:
        self.is_held = True

    def go_on(self) -> None:
        self.is_held = False
        if not self.is_dead:
            self._release()

    def take(self, handle: asyncio.Handle) -> bool:
        """Whether the loop may run this callback now. Counts it."""
        if self.is_reaped:
            return True
        if not self.is_dead and (do := self._at_step.pop(self.steps, None)):
            do()
        if self.is_dead or self.is_held:
            self._waiting.append(handle)
            return False
        self.steps += 1
        return True

    async def reap(self) -> None:
        """Ends every task of the process, so that nothing of a schedule is left behind."""
        self.die()
        self.is_reaped = True
        self._release()
        for number in range(_REAPING_ROUNDS):
            alive = [task for task in self.tasks if not task.done()]
            if not alive:
                break
            for task in alive:
                # One that was never begun is first begun, or its coroutine would be one that nobody awaited. What
                # closes a generator does not say whether it was.
                coroutine = task.get_coro()
                is_begun = number > 0
                if inspect.iscoroutine(coroutine):
                    is_begun = inspect.getcoroutinestate(coroutine) != inspect.CORO_CREATED
                if is_begun:
                    task.cancel()
            await asyncio.wait(alive, timeout=5.0)
        for task in self.tasks:
            if task.done() and not task.cancelled():
                task.exception()  # looked at, so that nobody warns of it

    def _release(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._loop.put_back(waiting)


CURRENT: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class OrderedTask(asyncio.Task[Any]):
    """A task whose hash is its number: sets of tasks have the same order in every run."""

    _numbers = itertools.count()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._number = next(OrderedTask._numbers)
        super().__init__(*arguments, **options)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs what is ready; when nothing is, it is at once the time of the next timer."""

    _ready: Any
    _scheduled: Any

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._callbacks = 0
        self._pids = itertools.count(_FIRST_PID)
        OrderedTask._numbers = itertools.count()
        self.processes: list[Process] = []
        self.set_task_factory(_make_task)

    def time(self) -> float:
        return self._now

    def process(self, name: str) -> Process:
        made = Process(self, name, next(self._pids))
        self.processes.append(made)
        return made

    def put_back(self, handles: list[asyncio.Handle]) -> None:
        self._ready.extend(handles)

    def call_soon_threadsafe(self, callback: Any, *arguments: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        return self.call_soon(callback, *arguments, context=context)  # there is one thread

    def run_in_executor(self, executor: Any, func: Any, *arguments: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """On the spot: the clock would not wait for another thread."""
        done: asyncio.Future[Any] = self.create_future()
        done.set_result(func(*arguments))
        return done

    def add_signal_handler(self, sig: int, callback: Any, *arguments: Any) -> None:  # type: ignore[override]
        process = CURRENT.get()
        assert process is not None
        process.signals[int(sig)] = (callback, arguments)

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled
        self._now += _STEP_SECONDS
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not ready:
            if not scheduled:
                raise RanAway("everybody waits, and nothing will happen any more")
            self._now = max(self._now, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self._now:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            ready.append(handle)
        self._callbacks += len(ready)
        if self._callbacks > MAX_CALLBACKS:
            raise RanAway(f"more than {MAX_CALLBACKS} steps in {self._now:.0f} s")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(CURRENT)
            if process is None or process.take(handle):
                handle._run()


def _make_task(loop: asyncio.AbstractEventLoop, main: Any, **options: Any) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = OrderedTask(main, loop=loop, **options)
    context = options.get("context")
    process = CURRENT.get() if context is None else context.get(CURRENT)
    if process is not None:
        process.tasks.append(task)
        if len(process.tasks) > 256:
            process.tasks[:] = [each for each in process.tasks if not each.done()]
    return task


@contextlib.contextmanager
def virtual_time(loop: VirtualLoop) -> Iterator[None]:
    """The standard library's clocks follow the loop's, on this thread. A process has a pid of its own."""
    here = threading.get_ident()

    def on_this_thread(real: Callable[..., Any], virtual: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (virtual if threading.get_ident() == here else real)(*arguments)

    real_pid = os.getpid()

    def pid() -> int:
        process = CURRENT.get()
        return process.pid if process else real_pid

    with contextlib.ExitStack() as patches:
        for module, name, virtual in (
            (time, "monotonic", lambda: loop._now),
            (time, "clock_gettime", lambda _clock: loop._now),
            (time, "time", lambda: EPOCH + loop._now),
            (os, "getpid", pid),
        ):
            patches.enter_context(mock.patch.object(module, name, on_this_thread(getattr(module, name), virtual)))
        yield
