"""The host: a webhook server that also polls and sweeps. `python main.py`, or any ASGI server with `main:app`."""

import sys

from _shared.server import Server
from sandbox import SETTINGS, open_provider

server = Server(open_provider, SETTINGS)
app = server.app()

if __name__ == "__main__":
    sys.exit(server.main())
