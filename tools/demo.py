"""`make demo`: one session from its first message to its end, on this machine, without an account.

The control plane is the emulator, the host is `providers/local` in a process of its own, as a person would start it,
and in the sandbox the real SDK runs the agent's tools. What is printed is read from the emulator while it happens.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from anthropic import Anthropic

from tools.emulator import Emulator, call, end, repeat_output, tools
from tools.narrator import Narrator

FOLDER = Path(__file__).resolve().parent.parent / "providers" / "local"
PATIENCE_SECONDS = 45.0
IDLE_SECONDS = 2  # the runner waits this long for a next message, so that the demo also shows it leave
NOTE = "written by the first message"
FIRST = "Write a note, read it back, and tell me where you are."
SECOND = "!cat note.txt"


class DemoFailed(Exception):
    """What went wrong, for a person."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    root = Path(tempfile.mkdtemp(prefix="sandboxes-demo-"))
    emulator = Emulator(port=options.port)
    host: subprocess.Popen[str] | None = None
    try:
        emulator.start()
        host = _start_host(emulator, root)
        _serve_two_messages(emulator, Narrator(emulator))
        if options.keep:
            _keep(emulator)
    except DemoFailed as error:
        print(f"\nThe demo failed: {error}\n{_tail(root / 'host.log')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; cleaning up.")
    finally:
        _stop(host)
        emulator.stop()
        shutil.rmtree(root, ignore_errors=True)
    print("\nEverything has been stopped and removed.")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--keep", action="store_true", help="leave it running afterwards, for messages of your own")
    parser.add_argument("--port", type=int, default=0, metavar="PORT", help="the control plane's port (0: a free one)")
    return parser.parse_args(arguments)


def _start_host(emulator: Emulator, root: Path) -> subprocess.Popen[str]:
    """Starts the provider's own server and registers its webhook."""
    print("Everything below runs on this machine: no account, no key, no network.\n")
    print(f"  control plane  {emulator.url}  (the emulator; environment {emulator.environment_id})", flush=True)
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(root),
        "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
        "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
        "ANTHROPIC_BASE_URL": emulator.url,
        "ANTHROPIC_WEBHOOK_SIGNING_KEY": emulator.webhook_key,
        "LOCAL_ROOT": str(root / "sessions"),
        "SANDBOX_MAX_IDLE_SECONDS": str(IDLE_SECONDS),
        # A laptop without bubblewrap shall still see the demo. The line below says so when it comes to that.
        "ALLOW_UNISOLATED_TOOLS": "true",
    }
    with (root / "host.log").open("w") as log:
        host = subprocess.Popen(
            [sys.executable, "main.py", "--host", "127.0.0.1", "--port", "0", "--no-poll"],
            cwd=FOLDER,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    ready = host.stdout.readline() if host.stdout else ""
    if not ready.startswith("listening on "):
        _stop(host)
        raise DemoFailed("providers/local did not start:")
    url = ready.removeprefix("listening on ").strip() + "/webhook"
    emulator.set_webhook_url(url)
    print(f"  host           {url}  (providers/local, a process of its own)")
    print(f"  sandboxes      {_isolation(root / 'host.log')}\n", flush=True)
    return host


def _isolation(log: Path) -> str:
    if "action=isolation" in log.read_text():
        return "plain processes of yours, NOT isolated (no working bubblewrap here; the demo allows it for itself)"
    return "bubblewrap: own file system, own processes, no privileges"


def _serve_two_messages(emulator: Emulator, narrator: Narrator) -> None:
    client = Anthropic(api_key=emulator.api_key, base_url=emulator.url)
    session = client.beta.sessions.create(agent=emulator.agent_id, environment_id=emulator.environment_id).id
    emulator.set_script(
        session,
        [
            tools(call("write", file_path="note.txt", content=f"{NOTE}\n")),
            tools(call("read", file_path="note.txt")),
            tools(call("bash", command="echo I am $(id -un) in $(pwd), and this is $(uname -sr)")),
            repeat_output,
            end(),
        ],
    )
    for text in (FIRST, SECOND):
        narrator.begin(session, text)
        client.beta.sessions.events.send(
            session, events=[{"type": "user.message", "content": [{"type": "text", "text": text}]}]
        )
        _follow(narrator, until_idle=True)
        _follow(narrator, until_idle=False)
    client.close()
    if NOTE not in narrator.last_answer:
        raise DemoFailed("the second message did not find the first one's file.")
    print("\nThe second message found the file of the first: same sandbox, new runner.")
    narrator.print_timeline()


def _follow(narrator: Narrator, *, until_idle: bool) -> None:
    what = "the end of the turn" if until_idle else "the runner's exit"
    try:
        narrator.follow((lambda: narrator.idle) if until_idle else (lambda: narrator.stopped), PATIENCE_SECONDS)
    except TimeoutError:
        raise DemoFailed(f"{what} did not come within {PATIENCE_SECONDS:g} s. The host's log ends:") from None


def _keep(emulator: Emulator) -> None:
    session = emulator.create_session(title="yours")
    print("\nLeft running. This line sends a message of your own (Ctrl-C here ends everything):")
    print(f"\n{_line_to_send(emulator, session)}\n", flush=True)
    narrator = Narrator(emulator)
    narrator.begin(session, None)
    narrator.follow(lambda: False, None)


def _line_to_send(emulator: Emulator, session: str) -> str:
    """With the SDK, which is here anyway; curl may not be. The key in it is the emulator's, made for this run."""
    client = f'Anthropic(api_key="{emulator.api_key}", base_url="{emulator.url}")'
    message = '{"type": "user.message", "content": [{"type": "text", "text": "!uname -a"}]}'
    code = f'from anthropic import Anthropic; {client}.beta.sessions.events.send("{session}", events=[{message}])'
    return f"{shlex.quote(sys.executable)} -c '{code}'"


def _stop(host: subprocess.Popen[str] | None) -> None:
    """Ends the host as a person would; it ends its sandboxes."""
    if host is None:
        return
    host.terminate()
    try:
        host.wait(30)
    except subprocess.TimeoutExpired:
        host.kill()
        host.wait()
    if host.stdout is not None:
        host.stdout.close()


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text().splitlines()[-lines:]) if log.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
