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
from .client import AdminClient, AdminError
from .clock import Clock
from .emulator import Emulator
from .faults import Cut, Fault
from .requests import RequestRecord
from .scenario import Player, Report, Scenario, perform
from .scenario import load as load_scenario
from .scripts_yaml import expect
from .switches import Switches
from .troubles import Execution
from .webhook_faults import WebhookFault
from .webhooks import Delivery

__all__ = [
    "AdminClient",
    "AdminError",
    "Call",
    "Clock",
    "Cut",
    "Delivery",
    "Emulator",
    "Execution",
    "Fault",
    "Player",
    "Report",
    "RequestRecord",
    "Scenario",
    "Step",
    "Switches",
    "ToolResult",
    "WebhookFault",
    "call",
    "custom",
    "delegate",
    "end",
    "error",
    "expect",
    "load_scenario",
    "perform",
    "repeat_output",
    "say",
    "shell_agent",
    "sleep",
    "tools",
]
