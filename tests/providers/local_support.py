"""What the tests of the local provider share."""

from __future__ import annotations

import os
import sys

import pytest

from tests.folders import load_folder

PROBLEM = load_folder("local").module("bubblewrap").problem(sys.executable)

# On CI nothing may be skipped: there the tests run, and fail with the reason.
needs_bubblewrap = pytest.mark.skipif(PROBLEM is not None and not os.environ.get("CI"), reason=str(PROBLEM))
