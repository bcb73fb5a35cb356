"""`ant` comes from no package registry, so CI has none: its tests are collected where ANT is the path of one."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("ANT") else ["test_ant.py"]
