"""What is due first, compared with looking at everything."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from tools.emulator.state.agenda import Agenda

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@dataclass
class Thing:
    name: str
    due: datetime | None = None


moments = st.none() | st.integers(0, 20).map(lambda minute: NOON + timedelta(minutes=minute))


@given(st.lists(st.tuples(st.integers(0, 4), moments, st.booleans())))
def test_the_first_is_the_first_however_moments_move(moves: list[tuple[int, datetime | None, bool]]) -> None:
    """A moment that came nearer is noted; one that went away or vanished is not."""
    things = [Thing(str(number)) for number in range(5)]
    agenda: Agenda[Thing] = Agenda(lambda thing: thing.due, lambda thing: thing.name)
    for number, due, is_asked in moves:
        thing = things[number]
        is_nearer = due is not None and (thing.due is None or due < thing.due)
        thing.due = due
        if is_nearer:
            agenda.note(thing)
        if is_asked:
            found = agenda.first()
            assert (found and found[0]) == min((thing.due for thing in things if thing.due), default=None)
            assert found is None or found[1].due == found[0]


def test_a_moment_that_moves_ten_thousand_times_is_one_entry() -> None:
    """As a lease that is extended with every beat."""
    thing = Thing("lease")
    agenda: Agenda[Thing] = Agenda(lambda thing: thing.due, lambda thing: thing.name)
    for minute in range(10_000):
        thing.due = NOON + timedelta(minutes=minute)
        agenda.note(thing)
    assert len(agenda._heap) == 1
    assert agenda.first() == (thing.due, thing)
