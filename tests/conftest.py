"""What a test process pays once, and not for each test.

The machine's certificates take 20 ms of a processor to read, thousands of HTTP clients are opened here, and nearly all
of them speak plain HTTP to a neighbour: what the library makes of the same arguments is made once. The thousands of
modules that the tests import stay, so nobody looks for garbage among them, neither while they are loaded nor later.
"""

from __future__ import annotations

import functools
import gc
import importlib

gc.disable()

for _library in ("httpx", "httpx2"):  # the second is the SDK's
    _transports = vars(importlib.import_module(f"{_library}._transports.default"))
    _transports["create_ssl_context"] = functools.cache(_transports["create_ssl_context"])


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
