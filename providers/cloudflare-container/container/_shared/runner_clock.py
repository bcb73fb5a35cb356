"""The clock leases are measured by: it goes on while the machine is suspended, as the server's does."""

from __future__ import annotations

import time


def now() -> float:
    """Seconds since boot, suspended time included where the system counts it (Linux)."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
