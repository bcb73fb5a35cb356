"""`python -m tools.emulator`: serve until Ctrl-C or SIGTERM, with one JSON line on stdout when ready."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence

from .emulator import Emulator
from .server import LOOPBACK

_SIGNALS = {signal.SIGINT, signal.SIGTERM}
USAGE_ERROR = 2
CANNOT_START = 1


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError("a port is between 0 and 65535")
    return port


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError("between 1 and 86400 seconds")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.emulator",
        description="A local control plane for self-hosted environments. Prints one JSON line when it is ready: url, "
        "environment_id, environment_key, api_key, webhook_key, agent_id. What is not given is made up.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8700, help="0 picks a free one (default: %(default)s)")
    parser.add_argument("--allow-remote", action="store_true", help="permit a --host other machines can reach")
    parser.add_argument("--environment-id", metavar="ID")
    parser.add_argument("--environment-key", metavar="KEY", help="what workers poll with")
    parser.add_argument("--api-key", metavar="KEY", help="what creates sessions")
    parser.add_argument("--webhook-url", metavar="URL", help="where webhooks go, http and loopback allowed")
    parser.add_argument("--webhook-key", metavar="KEY", help="whsec_<base64>, signs the webhooks")
    parser.add_argument(
        "--lease-ttl", type=_seconds, default=300.0, metavar="SECONDS", help="lease of a work item (default: 300)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.host not in LOOPBACK and not options.allow_remote:
        parser.error(f"--host {options.host}: other machines could reach it; add --allow-remote if you mean that")
    # Blocked before any thread exists, so that every thread inherits it and only sigwait below sees the signals.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        emulator = Emulator(
            host=options.host,
            port=options.port,
            environment_id=options.environment_id,
            environment_key=options.environment_key,
            api_key=options.api_key,
            webhook_url=options.webhook_url,
            webhook_key=options.webhook_key,
            lease_ttl=options.lease_ttl,
        )
    except ValueError as error:
        parser.error(str(error))
    try:
        emulator.start()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        print(f"cannot listen on {options.host}:{options.port}: {reason}", file=sys.stderr)
        return CANNOT_START
    ready = {
        "url": emulator.url,
        "environment_id": emulator.environment_id,
        "environment_key": emulator.environment_key,
        "api_key": emulator.api_key,
        "webhook_key": emulator.webhook_key,
        "agent_id": emulator.agent_id,
    }
    print(json.dumps(ready), flush=True)
    signal.sigwait(_SIGNALS)
    emulator.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
