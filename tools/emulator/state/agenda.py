"""What is due first, without looking at everything: a heap with one entry for each thing that has a moment. Pure.

Moments move: a lease is extended, a turn is interrupted. An entry is therefore only a promise to look again, never
later than the true moment, and what `first` finds is compared with the truth. So nothing needs to be taken out.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from datetime import datetime
from typing import Generic, TypeVar

T = TypeVar("T")


class Agenda(Generic[T]):
    """`due_of` says when a thing is due (None: not at all), `id_of` what it is called."""

    def __init__(self, due_of: Callable[[T], datetime | None], id_of: Callable[[T], str]) -> None:
        self._due_of = due_of
        self._id_of = id_of
        self._heap: list[tuple[datetime, int, T]] = []
        self._entered: dict[str, datetime] = {}
        self._numbers = itertools.count()

    def note(self, thing: T) -> None:
        """To be called whenever the thing's moment may have come nearer."""
        due = self._due_of(thing)
        entered = self._entered.get(self._id_of(thing))
        if due is not None and (entered is None or due < entered):
            self._enter(due, thing)

    def first(self) -> tuple[datetime, T] | None:
        """What is due first, and when."""
        while self._heap:
            entered, _, thing = self._heap[0]
            due = self._due_of(thing)
            if due == entered:
                return due, thing
            heapq.heappop(self._heap)
            if self._entered.get(self._id_of(thing)) == entered:
                del self._entered[self._id_of(thing)]
                if due is not None:
                    self._enter(due, thing)
        return None

    def _enter(self, due: datetime, thing: T) -> None:
        self._entered[self._id_of(thing)] = due
        heapq.heappush(self._heap, (due, next(self._numbers), thing))
