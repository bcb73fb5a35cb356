"""`python -m tests.faults --n 10000 --seed 7`: plays kills at every await, every trouble in a call on every kind of
server, then so many random schedules, and shrinks the first that fails."""

from __future__ import annotations

import argparse
import sys
import time

from tests.faults.generate import every_kill, every_server, generate
from tests.faults.play import Outcome, label, play
from tests.faults.shrink import shrink
from tests.faults.steps import Schedule

LINES_APART = 100  # schedules between two lines of progress, where no terminal shows it
SEEDS_APART = 1_000_000
"""Schedule number i of `--seed s` has the seed s * SEEDS_APART + i."""


def report(outcome: Outcome) -> str:
    """A failed schedule, shrunk, in words and as Python."""
    labels = {label(violation) for violation in outcome.violations}

    def fails(candidate: Schedule) -> bool:
        return not labels.isdisjoint(label(violation) for violation in play(candidate).violations)

    small = play(shrink(outcome.schedule, fails))
    failed = [f"seed {outcome.schedule.seed} breaks:", *outcome.violations, ""]
    return "\n".join(
        [*failed, "shrunk to:", str(small.schedule), "which breaks:", *small.violations, "", "its story:", *small.story]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--n", type=int, default=1000, help="how many random schedules")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--only", type=int, help="the one schedule with this seed, and its story")
    parser.add_argument("--keep-going", action="store_true", help="play all of them, say what each breaks, shrink none")
    options = parser.parse_args()
    if options.only is not None:
        outcome = play(generate(options.only))
        sys.stdout.write("\n".join((str(outcome.schedule), *outcome.story, "", *outcome.violations)) + "\n")
        return 1 if outcome.violations else 0
    began, failed, excused = time.perf_counter(), 0, 0
    directed = [*every_kill(), *every_server()]
    total = options.n + len(directed)
    for number in range(total):
        random = number - len(directed)
        outcome = play(directed[number] if random < 0 else generate(options.seed * SEEDS_APART + random))
        excused += bool(outcome.excused)
        if outcome.violations and not options.keep_going:
            sys.stdout.write("\n" + report(outcome) + "\n")
            return 1
        if outcome.violations:
            failed += 1
            name = (
                f"seed {outcome.schedule.seed}"
                if random >= 0
                else f"{outcome.schedule.switches} {outcome.schedule.steps[3:]}"
            )
            sys.stdout.write(f"\n{name}: " + "\n    ".join(outcome.violations) + "\n")
        seconds = time.perf_counter() - began
        counts = f"{number + 1} of {total} schedules, {failed} failed, {excused} excused (not_yet.py)"
        progress = f"{counts}, {seconds / (number + 1):.3f} s each"
        if sys.stdout.isatty():
            sys.stdout.write(f"\r{progress}")
        elif (number + 1) % LINES_APART == 0 or number + 1 == total:
            sys.stdout.write(f"{progress}\n")
        sys.stdout.flush()
    sys.stdout.write("\n" if sys.stdout.isatty() else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
