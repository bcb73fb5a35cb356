"""Makes a failing schedule small: steps, switches and hosts are left out while it still fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.faults.steps import Schedule


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool], attempts: int = 400) -> Schedule:
    """The smallest schedule found with so many attempts. `fails` must hold for `schedule`."""
    left = attempts

    def still_fails(candidate: Schedule) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and fails(candidate)

    size = max(1, len(schedule.steps) // 2)
    while size >= 1 and left > 0:
        start, has_shrunk = 0, False
        while start < len(schedule.steps):
            candidate = schedule.with_steps(schedule.steps[:start] + schedule.steps[start + size :])
            if still_fails(candidate):
                schedule, has_shrunk = candidate, True
            else:
                start += size
        if not has_shrunk or size > 1:
            size = size // 2 if size > 1 else (1 if has_shrunk else 0)
    for switch in schedule.switches:
        candidate = replace(schedule, switches=tuple(each for each in schedule.switches if each != switch))
        if still_fails(candidate):
            schedule = candidate
    for hosts in range(1, schedule.hosts):
        candidate = replace(schedule, hosts=hosts)
        if still_fails(candidate):
            return candidate
    return schedule
