"""The always-on poller: no webhook, no public address. `python -m _shared.worker` in a copied folder.

It polls and sweeps until SIGTERM or Ctrl-C, then claims nothing more and lets launches under way finish.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import logging
import os
import random
import signal
import sys
import time

from . import log
from .dispatcher import Dispatcher, open_client
from .errors import SettingsError
from .settings import Settings

SWEEP_SECONDS = 60.0
POLL_PAUSE_SECONDS = (1.0, 3.0)  # between two empty polls, at random, as the SDK's own poller
SHUTDOWN_SECONDS = 20.0

_log = logging.getLogger(__name__)


async def run(
    dispatcher: Dispatcher,
    *,
    stop: asyncio.Event,
    poll: bool = True,
    sweep_seconds: float = SWEEP_SECONDS,
    pause_seconds: tuple[float, float] = POLL_PAUSE_SECONDS,
) -> None:
    """Sweeps each minute, and polls in between unless webhooks do the waking, until `stop` is set.

    Neither waits for the other: a sweep can take minutes, and new work must not.
    """
    sweeping: asyncio.Task[None] | None = None
    swept_at = float("-inf")
    try:
        while not stop.is_set():
            if sweeping is not None and sweeping.done():
                sweeping.result()
                sweeping = None
            if sweeping is None and time.monotonic() - swept_at >= sweep_seconds:
                swept_at = time.monotonic()
                sweeping = asyncio.create_task(dispatcher.sweep())
            elif poll:
                dispatcher.wake()
            pause = random.uniform(*pause_seconds)  # noqa: S311 - spreads load, guards nothing
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)
    finally:
        if sweeping is not None:
            sweeping.cancel()
            await asyncio.gather(sweeping, return_exceptions=True)


def stop_on_signals() -> asyncio.Event:
    """An event that SIGTERM and Ctrl-C set."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def serve() -> None:
    """Runs the folder's provider (`sandbox.open_provider`) until told to stop. Raises `SettingsError`."""
    sandbox = importlib.import_module("sandbox")
    settings = Settings.from_env(os.environ, *sandbox.SETTINGS)
    provider = sandbox.open_provider(os.environ, settings)
    dispatcher = Dispatcher(client=open_client(settings), settings=settings, provider=provider)
    stop = stop_on_signals()
    _log.info(log.line("polling", provider=provider.name))
    try:
        await run(dispatcher, stop=stop)
    finally:
        await dispatcher.close(SHUTDOWN_SECONDS)
        if close := getattr(provider, "close", None):
            await close()
    _log.info(log.line("stopped", provider=provider.name))


def main() -> int:
    """The command line. Exit codes: 0 told to stop, 2 a setting is wrong."""
    argparse.ArgumentParser(
        prog="python -m _shared.worker",
        description="Polls the environment's queue and serves each session in a sandbox of this folder's provider. "
        "Settings come from the environment: see README.md.",
    ).parse_args()
    log.configure()
    sys.path.insert(0, os.getcwd())  # the folder's own modules, when started from elsewhere on the path
    try:
        asyncio.run(serve())
    except SettingsError as error:
        _log.error(log.line("settings", reason=error.args[0]))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
