"""`python -m tests.redteam`: writes SECURITY.md's table from the providers' statements; `--check` only compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.redteam.statements import StatementError
from tests.redteam.table import filled, table

SECURITY = Path(__file__).resolve().parents[2] / "SECURITY.md"


def main(argv: list[str], page: Path = SECURITY) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.redteam", description="SECURITY.md's table of attempts.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the table is old")
    options = parser.parse_args(argv)
    old = page.read_text(encoding="utf-8")
    try:
        new = filled(old, table())
    except (StatementError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if new == old:
        return 0
    if options.check:
        sys.stderr.write("SECURITY.md has an old table of attempts\nFix: make sync\n")
        return 1
    page.write_text(new, encoding="utf-8")
    sys.stdout.write("filled SECURITY.md\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
