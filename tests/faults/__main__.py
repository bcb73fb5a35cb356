"""`python -m tests.faults --n 10000 --seed 7`: plays so many schedules, and shrinks the first that fails."""

from __future__ import annotations

import argparse
import sys
import time

from tests.faults.generate import generate
from tests.faults.play import Outcome, label, play
from tests.faults.shrink import shrink
from tests.faults.steps import Schedule

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
    parser.add_argument("--n", type=int, default=1000, help="how many schedules")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--only", type=int, help="the one schedule with this seed, and its story")
    parser.add_argument("--keep-going", action="store_true", help="play all of them, say what each breaks, shrink none")
    options = parser.parse_args()
    if options.only is not None:
        outcome = play(generate(options.only))
        sys.stdout.write("\n".join((str(outcome.schedule), *outcome.story, "", *outcome.violations)) + "\n")
        return 1 if outcome.violations else 0
    began, failed, excused = time.perf_counter(), 0, 0
    for number in range(options.n):
        outcome = play(generate(options.seed * SEEDS_APART + number))
        excused += bool(outcome.excused)
        if outcome.violations and not options.keep_going:
            sys.stdout.write("\n" + report(outcome) + "\n")
            return 1
        if outcome.violations:
            failed += 1
            sys.stdout.write(f"\nseed {outcome.schedule.seed}: " + "\n    ".join(outcome.violations) + "\n")
        seconds = time.perf_counter() - began
        counts = f"{number + 1} of {options.n} schedules, {failed} failed, {excused} excused (not_yet.py)"
        progress = f"\r{counts}, {seconds / (number + 1):.3f} s each"
        sys.stdout.write(progress)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
