"""A local control plane for self-hosted environments; see README.md, limits first."""

from .agents import Call, Step, ToolResult, call, custom, end, error, repeat_output, say, shell_agent, sleep, tools
from .clock import Clock
from .emulator import Emulator
from .requests import RequestRecord
from .switches import Switches
from .webhooks import Delivery

__all__ = [
    "Call",
    "Clock",
    "Delivery",
    "Emulator",
    "RequestRecord",
    "Step",
    "Switches",
    "ToolResult",
    "call",
    "custom",
    "end",
    "error",
    "repeat_output",
    "say",
    "shell_agent",
    "sleep",
    "tools",
]
