"""Serves one work item that another poller has taken, and stays until it is served: `ant beta:worker poll --on-work`.

That poller writes the item to our standard input and stops the item when we end, so we end when its runner has. The
item is acked by then: when no runner can be started, nobody offers it again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping

from anthropic.types.beta.environments import BetaSelfHostedWork

from _shared import log
from _shared.dispatcher import open_client
from _shared.errors import LaunchFailed, SettingsError
from _shared.launching import Launcher
from _shared.settings import Settings
from sandbox import DockerProvider, open_provider

EXIT_SERVED = 0
EXIT_NOT_SERVED = 1
EXIT_SETTINGS = 2
EXIT_BAD_ITEM = 64
EXIT_TOLD_TO_STOP = 143
ENGINE_SECONDS = 60.0  # an Engine that is away for longer has ended the runner
PAUSE_SECONDS = 1.0  # between two questions

_log = logging.getLogger(__name__)


async def serve(item: BetaSelfHostedWork, settings: Settings, provider: DockerProvider) -> int:
    """The exit code. When it is cancelled the runner hands over first."""
    client = open_client(settings)
    try:
        if not await Launcher(client, settings, provider).launch(item):
            return EXIT_NOT_SERVED
        await until_served(provider, item.data.id)
        return EXIT_SERVED
    except asyncio.CancelledError:
        await provider.stop(item.data.id)
        return EXIT_TOLD_TO_STOP
    finally:
        await client.close()
        await provider.close()


async def until_served(provider: DockerProvider, session_id: str) -> None:
    """Asks again when the Engine was away: the end of a connection is not the end of a runner. Raises `LaunchFailed`
    when it stays away."""
    deadline = None
    while True:
        try:
            if not await provider.has_runner(session_id):
                return
            deadline = None
            await provider.until_runners_end(session_id)
        except LaunchFailed as error:
            now = asyncio.get_running_loop().time()
            deadline = deadline or now + ENGINE_SECONDS
            if now > deadline:
                raise
            _log.warning(log.line("wait", provider=provider.name, session=session_id, reason=error.args[0]))
        await asyncio.sleep(PAUSE_SECONDS)


def read_item(raw: bytes) -> BetaSelfHostedWork:
    """Raises `ValueError`."""
    try:
        return BetaSelfHostedWork.model_validate(json.loads(raw))
    except (ValueError, RecursionError):
        raise ValueError("the work item on standard input cannot be read") from None


async def run(raw: bytes, environ: Mapping[str, str]) -> int:
    """What the command does."""
    try:
        settings = Settings.from_env(environ)
        item, provider = read_item(raw), open_provider(environ, settings)
    except SettingsError as error:
        _log.error(log.line("settings", reason=error.args[0]))
        return EXIT_SETTINGS
    except ValueError as error:
        _log.error(log.line("refused", reason=str(error)))
        return EXIT_BAD_ITEM
    serving = asyncio.create_task(serve(item, settings, provider))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    try:
        return await serving
    except LaunchFailed as error:
        _log.error(log.line("failed", provider=provider.name, session=item.data.id, reason=error.args[0]))
        return EXIT_NOT_SERVED


if __name__ == "__main__":
    description = (__doc__ or "").split("\n\n")[0]
    epilog = "The work item is read from standard input, the settings from the environment (README, Settings)."
    argparse.ArgumentParser(prog="on-work", description=description, epilog=epilog).parse_known_args()
    log.configure()
    sys.exit(asyncio.run(run(sys.stdin.buffer.read(), os.environ)))
