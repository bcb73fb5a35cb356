"""What all tests share: the TLS context of the HTTP clients in a test process.

The machine's certificates take 20 ms of a processor to read, thousands of clients are opened here, and nearly all of
them speak plain HTTP to a neighbour. What the library makes of the same arguments is therefore made once.
"""

from __future__ import annotations

import functools
import importlib

for _library in ("httpx", "httpx2"):  # the second is the SDK's
    _transports = vars(importlib.import_module(f"{_library}._transports.default"))
    _transports["create_ssl_context"] = functools.cache(_transports["create_ssl_context"])
