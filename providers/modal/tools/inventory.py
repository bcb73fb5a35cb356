"""An example of custom tools with a package and a secret of their own: they ask a service of yours.

SANDBOX_TOOLS=/opt/tools/inventory.py:tools and SANDBOX_TOOL_SECRETS=inventory, a Modal Secret with INVENTORY_URL and
INVENTORY_TOKEN; `requirements.txt` beside this file names the package. Whatever is in this folder can be read by the
agent, and so can what the tools say.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import httpx2
import yaml
from anthropic.lib.tools import beta_async_tool

_SECONDS = 20.0
# Taken out of the environment when the runner loads this file: the agent's shell, which comes later, inherits what is
# left, and can look into neither the runner nor its parent.
_URL = os.environ.pop("INVENTORY_URL", "")
_TOKEN = os.environ.pop("INVENTORY_TOKEN", "")


def tools(context: Any) -> Sequence[Any]:
    """The tools of one session."""

    @beta_async_tool
    async def stock(item: str) -> str:
        """How many of an item are in stock, as YAML."""
        async with httpx2.AsyncClient(timeout=_SECONDS) as client:
            answer = await client.get(f"{_URL}/stock/{item}", headers={"authorization": f"Bearer {_TOKEN}"})
        answer.raise_for_status()
        return str(yaml.safe_dump(answer.json(), sort_keys=True))

    return [stock]
