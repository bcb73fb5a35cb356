"""A hostile agent in every provider's sandbox: `RedTeam` is the suite for sandboxes that run commands, `FileRedTeam`
for those without a shell; `attempts.py` has the tables, `stated/` what each provider says of itself."""

from tests.redteam.file_suite import FileRedTeam
from tests.redteam.suite import RedTeam

__all__ = ["FileRedTeam", "RedTeam"]
