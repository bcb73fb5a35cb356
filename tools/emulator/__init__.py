"""A local control plane for self-hosted environments; see README.md, limits first."""

from .agents import (
    Call,
    Step,
    ToolResult,
    call,
    custom,
    delegate,
    end,
    error,
    repeat_output,
    say,
    shell_agent,
    sleep,
    tools,
)
from .clock import Clock
from .emulator import Emulator
from .faults import Cut, Fault
from .requests import RequestRecord
from .switches import Switches
from .troubles import Execution
from .webhooks import Delivery, WebhookFault

__all__ = [
    "Call",
    "Clock",
    "Cut",
    "Delivery",
    "Emulator",
    "Execution",
    "Fault",
    "RequestRecord",
    "Step",
    "Switches",
    "ToolResult",
    "WebhookFault",
    "call",
    "custom",
    "delegate",
    "end",
    "error",
    "repeat_output",
    "say",
    "shell_agent",
    "sleep",
    "tools",
]
