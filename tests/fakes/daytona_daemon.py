"""The first process of a sandbox of the Daytona double: what Daytona's own daemon does, as far as we use it.

Commands are real processes of an unprivileged user, in the sandbox's own file system and process table. As with the
real one, whatever a command string holds lies on the sandbox's disk (`cmd.sh`), input is echoed into the log on that
disk unless it was told not to, and the input of an asynchronous command is a FIFO there that never ends. Unlike
the real one, each command has a shell of its own. Standard library only.

It answers one JSON line for each JSON line on the socket it inherits: {"status": ..., "body": ...}.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import sys
import uuid
from pathlib import Path
from typing import Any

_LINE_BYTES = 64 << 20
_END_SECONDS = 1.0
_PR_SET_DUMPABLE = 4
Answer = tuple[int, Any]


class Command:
    def __init__(self, text: str, directory: Path, *, echo: bool) -> None:
        self.id = uuid.uuid4().hex
        self.text = text
        self.echo = echo
        self.directory = directory / self.id
        self.directory.mkdir(parents=True)
        self.pid = 0
        self.exit_code: int | None = None
        self.ended: asyncio.Future[int] | None = None
        self.input = -1

    def shown(self) -> dict[str, Any]:
        shown = {"id": self.id, "command": self.text}
        return shown if self.exit_code is None else shown | {"exitCode": self.exit_code}

    def output(self) -> dict[str, str]:
        out, err = ((self.directory / name).read_bytes().decode(errors="replace") for name in ("stdout", "stderr"))
        return {"output": out + err, "stdout": out, "stderr": err}


class Daemon:
    def __init__(self, home: Path) -> None:
        self._home = home
        self._sessions: dict[str, dict[str, Command]] = {}
        self._running: dict[int, Command] = {}

    async def answer(self, request: dict[str, Any]) -> Answer:
        """Carries out one request. The API in front of it has checked its fields."""
        do, arguments = request["do"], request["with"]
        if do.startswith("session.") and do != "session.create" and do != "session.list":
            if arguments["sessionId"] not in self._sessions:
                return 404, "session not found"
            session = self._sessions[arguments["sessionId"]]
            if "commandId" in arguments and arguments["commandId"] not in session:
                return 404, "command not found"
        answer: Answer = await getattr(self, "_" + do.replace(".", "_"))(arguments)
        return answer

    async def _execute(self, arguments: dict[str, Any]) -> Answer:
        command = Command(arguments["command"], self._home / ".daytona" / "executed", echo=False)
        self._start(command, arguments.get("cwd"), arguments.get("envs") or {}, stdin=None)
        assert command.ended is not None
        try:
            code = await asyncio.wait_for(asyncio.shield(command.ended), arguments.get("timeout") or None)
        except TimeoutError:
            os.killpg(command.pid, signal.SIGKILL)
            return 408, "command execution timeout"
        return 200, {"exitCode": code, "result": command.output()["output"]}

    async def _session_create(self, arguments: dict[str, Any]) -> Answer:
        if arguments["sessionId"] in self._sessions:
            return 409, "session already exists"
        self._sessions[arguments["sessionId"]] = {}
        return 201, None

    async def _session_list(self, arguments: dict[str, Any]) -> Answer:
        return 200, [self._shown(session) for session in self._sessions]

    async def _session_get(self, arguments: dict[str, Any]) -> Answer:
        return 200, self._shown(arguments["sessionId"])

    def _shown(self, session: str) -> dict[str, Any]:
        commands = [command.shown() for command in self._sessions[session].values()]
        return {"sessionId": session, "commands": commands}

    async def _session_delete(self, arguments: dict[str, Any]) -> Answer:
        for command in self._sessions.pop(arguments["sessionId"]).values():
            if command.exit_code is None and command.ended is not None:
                for number in (signal.SIGTERM, signal.SIGKILL):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(command.pid, number)
                    await asyncio.wait([command.ended], timeout=_END_SECONDS)
        return 204, None

    async def _session_exec(self, arguments: dict[str, Any]) -> Answer:
        asynchronous = bool(arguments.get("runAsync"))
        place = self._home / ".daytona" / "sessions" / arguments["sessionId"]
        command = Command(arguments["command"], place, echo=not arguments.get("suppressInputEcho"))
        self._sessions[arguments["sessionId"]][command.id] = command
        stdin = None
        if asynchronous:
            stdin = command.directory / "input.pipe"
            os.mkfifo(stdin, 0o644)
            command.input = os.open(stdin, os.O_RDWR | os.O_CLOEXEC)  # held open: its reader never sees an end
        self._start(command, None, {}, stdin)
        if asynchronous:
            return 202, {"cmdId": command.id}
        assert command.ended is not None
        code = await command.ended
        return 200, {"cmdId": command.id, "exitCode": code, **command.output()}

    async def _session_command(self, arguments: dict[str, Any]) -> Answer:
        return 200, self._sessions[arguments["sessionId"]][arguments["commandId"]].shown()

    async def _session_logs(self, arguments: dict[str, Any]) -> Answer:
        return 200, self._sessions[arguments["sessionId"]][arguments["commandId"]].output()

    async def _session_input(self, arguments: dict[str, Any]) -> Answer:
        command = self._sessions[arguments["sessionId"]][arguments["commandId"]]
        if command.exit_code is not None:
            return 410, f"command has already completed with exit code {command.exit_code}"
        if command.input < 0:
            return 500, "failed to open input pipe: no such file or directory"
        data = arguments["data"].encode()
        data += b"" if data.endswith(b"\n") else b"\n"
        await asyncio.to_thread(os.write, command.input, data)
        if command.echo:
            with (command.directory / "stdout").open("ab") as log:
                log.write(data)
        return 204, None

    async def _upload(self, arguments: dict[str, Any]) -> Answer:
        for path, content in arguments["files"]:
            try:
                _write(Path(path), base64.b64decode(content))
            except OSError as error:
                return 400, f"{path}: create: {error.strerror}"
        return 200, {}

    def _start(self, command: Command, cwd: str | None, envs: dict[str, str], stdin: Path | None) -> None:
        script = command.directory / "cmd.sh"
        script.write_text(command.text)
        script.chmod(0o600)
        where = shlex.quote(cwd or "/workspace")
        out, err = (
            os.open(command.directory / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT) for name in ("stdout", "stderr")
        )
        source = os.open(stdin or os.devnull, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(source, True)
        try:
            command.pid = os.posix_spawn(
                "/bin/bash",
                ["/bin/bash", "-c", f"cd {where} && . {shlex.quote(str(script))}"],
                {**os.environ, **envs},
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((source, out, err))],
                setsid=True,
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
            )
        finally:
            for descriptor in (source, out, err):
                os.close(descriptor)
        command.ended = asyncio.get_running_loop().create_future()
        self._running[command.pid] = command

    def reap(self) -> None:
        """Collects what has ended: commands, and whatever they left to the first process of the sandbox."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                command = self._running.pop(ended[0], None)
                if command is not None and command.ended is not None:
                    code = os.waitstatus_to_exitcode(ended[1])
                    command.exit_code = code if code >= 0 else 128 - code
                    command.ended.set_result(command.exit_code)
                    if command.input >= 0:
                        os.close(command.input)
                        command.input = -1


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


async def _serve(config: dict[str, Any]) -> None:
    daemon = Daemon(Path(os.environ["HOME"]))
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            if line := await reader.readline():
                status, body = await daemon.answer(json.loads(line))
                writer.write(json.dumps({"status": status, "body": body}).encode() + b"\n")
                await writer.drain()
        writer.close()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGCHLD, daemon.reap)
    loop.add_reader(config["life"], gone.set)  # the double is gone, so is its sandbox
    await asyncio.start_unix_server(serve, sock=socket.socket(fileno=config["listen"]), limit=_LINE_BYTES)
    await gone.wait()
    os._exit(0)  # and with it, as the first process, everything else


def main() -> None:
    config = json.loads(sys.argv[1])
    for name in ("listen", "life"):
        os.set_inheritable(config[name], False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if config["uid"]:
        os.setgroups([])
        os.setgid(config["uid"])
        os.setuid(config["uid"])
    # A change of user hides a process from its own user; the real one has not changed it.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    asyncio.run(_serve(config))


if __name__ == "__main__":
    main()
