"""`python -m tools.emulator`: serve until Ctrl-C or SIGTERM, with one JSON line on stdout when ready."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence

from .emulator import Emulator
from .flags import make_trouble, parser
from .scenario import Player, Report, load
from .server import LOOPBACK

_SIGNALS = {signal.SIGINT, signal.SIGTERM}
CANNOT_START = 1
SCENARIO_FAILED = 1


class _Stage:
    """A scenario on a thread of its own; its end is a line on stdout."""

    def __init__(self, player: Player, ends_the_process: bool) -> None:
        self._player = player
        self._ends_the_process = ends_the_process
        self.report: Report | None = None

    def start(self) -> None:
        threading.Thread(target=self._play, name="scenario", daemon=True).start()

    def _play(self) -> None:
        self.report = report = self._player.play()
        line = {"scenario": report.scenario, "passed": report.has_passed, "failures": report.failures}
        print(json.dumps(line), flush=True)
        if self._ends_the_process:
            os.kill(os.getpid(), signal.SIGTERM)  # for the sigwait below; no other thread takes it


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser()
    options = flags.parse_args(arguments)
    if options.host not in LOOPBACK and not options.allow_remote:
        flags.error(f"--host {options.host}: other machines could reach it; add --allow-remote if you mean that")
    if options.scenario is None and (options.set or options.exit_when_done):
        flags.error("--set and --exit-when-done belong to a --scenario")
    # Blocked before any thread exists, so that every thread inherits it and only `sigwait` sees the signals. Put back
    # because whoever calls this in a process of their own would start deaf children.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return _serve(flags, options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _serve(flags: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    stage: _Stage | None = None
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
        sessions: dict[str, list[str]] | None = None
        if options.scenario is not None:
            player = Player(emulator, load(options.scenario, dict(options.set)))
            player.prepare()
            sessions = player.sessions
            stage = _Stage(player, options.exit_when_done)
        make_trouble(emulator, options)
    except ValueError as error:
        flags.error(str(error))
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
    print(json.dumps(ready if sessions is None else {**ready, "sessions": sessions}), flush=True)
    if stage is not None:
        stage.start()
    signal.sigwait(_SIGNALS)
    emulator.stop()
    return SCENARIO_FAILED if stage and stage.report and not stage.report.has_passed else 0


if __name__ == "__main__":
    sys.exit(main())
