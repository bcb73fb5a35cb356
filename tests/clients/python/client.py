"""The Python SDK's own poller and worker, as their documentation starts them. `python client.py run|poll|item`.

run:  an EnvironmentWorker, until SIGTERM.
poll: the work poller, until the queue is empty; prints each session's id.
item: the one item that the environment variables name, as after `poll --on-work`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

from anthropic import AsyncAnthropic

MAX_IDLE_SECONDS = 0.2


async def main(mode: str) -> None:
    async with AsyncAnthropic(auth_token="none") as client:
        work = client.beta.environments.work
        if mode == "item":
            await work.worker(max_idle=MAX_IDLE_SECONDS).handle_item()
            return
        environment_id = os.environ["ANTHROPIC_ENVIRONMENT_ID"]
        environment_key = os.environ["ANTHROPIC_ENVIRONMENT_KEY"]
        if mode == "poll":
            async for item in work.poller(environment_id=environment_id, environment_key=environment_key, drain=True):
                sys.stdout.write(f"{item.data.id}\n")
            return
        worker = work.worker(environment_id=environment_id, environment_key=environment_key, max_idle=MAX_IDLE_SECONDS)
        running = asyncio.create_task(worker.run())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await running


asyncio.run(main(sys.argv[1]))
