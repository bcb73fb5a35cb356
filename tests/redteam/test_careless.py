"""The control: the attempts, made where nothing defends. One that fails here proves nothing anywhere else."""

from __future__ import annotations

import os
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


class TestCareless(RedTeam):
    core = SharedCore()
    isolated = False

    def make_provider(self, root: Path, settings: Any, **options: Any) -> MemoryProvider:
        return MemoryProvider(root, runner=RUNNER)

    def stated(self) -> dict[str, Statement]:
        stated = dict.fromkeys(NAMES, Statement("not_defended"))
        stated |= dict.fromkeys(OF_THE_SDK, Statement("defended"))
        if os.geteuid() != 0:
            stated |= dict.fromkeys(OF_THE_KERNEL, Statement("not_tried"))
        return stated
