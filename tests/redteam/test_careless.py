"""The control: the attempts, made where nothing defends. One that fails here proves nothing anywhere else."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

from tests.fakes.memory_provider import MemoryProvider
from tests.redteam import RedTeam
from tests.redteam.attempts import NAMES
from tests.redteam.statements import Statement
from tests.world import SharedCore

RUNNER = Path(__file__).with_name("careless_runner.py")
# What defends here is not ours to take away: the SDK, or the kernel against whoever is not root.
OF_THE_SDK = ("file-tools", "output")
OF_THE_KERNEL = ("become-root", "mount", "namespaces", "kernel-settings", "devices", "sniffing", "redirect")
# A careless runner that is killed is healed like any other. It has no lock and no journal, to break or to keep.
OF_THE_HOST = ("kill", "freeze", "starve")
OF_THE_LOCK = ("lock", "stale-lock", "journal", "wreck")


class TestCareless(RedTeam):
    core = SharedCore()
    isolated = False

    def make_provider(self, root: Path, settings: Any, **options: Any) -> MemoryProvider:
        return MemoryProvider(root, runner=RUNNER)

    def stated(self) -> dict[str, Statement]:
        stated = dict.fromkeys(NAMES, Statement("not_defended"))
        stated |= dict.fromkeys(OF_THE_SDK, Statement("defended"))
        stated |= dict.fromkeys(OF_THE_HOST, Statement("defended"))
        stated |= dict.fromkeys(OF_THE_LOCK, Statement("not_tried"))
        if os.geteuid() != 0:
            stated |= dict.fromkeys(OF_THE_KERNEL, Statement("not_tried"))
        if not _dumps_core_beside():
            stated["core-dump"] = Statement("not_tried")
        return stated


def _dumps_core_beside() -> bool:
    """Whether this machine puts a core file into the working directory of what crashed."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    return not pattern.startswith(("|", "/")) and resource.getrlimit(resource.RLIMIT_CORE)[1] != 0
