"""A hostile agent in every provider's sandbox: `RedTeam` is the suite, `attempts.py` the table, `stated/` what each
provider says of itself."""

from tests.redteam.suite import RedTeam

__all__ = ["RedTeam"]
