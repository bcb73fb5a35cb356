"""The runners and files of a container: what `sandbox_init.py` is asked to do. Standard library, GNU tar and gzip.

One file, since one lock holds it together: no runner starts while the files are packed or unpacked, and none is left
running behind the one that ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import queue
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from _shared import runner_process

RUNNER = [sys.executable, "-I", str(Path(__file__).with_name("_shared") / "sandbox_runner.py")]
# The platform's, which looks into TLS unless SANDBOX_ALLOWED_HOSTS opens the network.
PLATFORM_CA = Path("/etc/cloudflare/certs/cloudflare-containers-ca.crt")
SYSTEM_CAS = Path("/etc/ssl/certs/ca-certificates.crt")
# By these OpenSSL (Python, git), requests, pip, curl, Node and the AWS SDKs are told whom to trust.
CA_VARIABLES = (
    *("SSL_CERT_FILE", "GIT_SSL_CAINFO", "REQUESTS_CA_BUNDLE", "PIP_CERT", "CURL_CA_BUNDLE"),
    *("NODE_EXTRA_CA_CERTS", "AWS_CA_BUNDLE"),
)
GRACE_SECONDS = 30.0  # for a runner to hand over once it is told to; it takes up to 20 s
LINGER_SECONDS = 120.0  # after that, for the files to be saved
ARCHIVE_SECONDS = 300.0
CHUNK_BYTES = 1 << 16
_UNREAD_LINES = 10_000  # a Durable Object that stops reading is dropped rather than waited for
_KILL_ROUNDS = 200  # a process can fork while we look; each round kills what it sees
_PATIENT_ROUNDS = 5
_ROUND_SECONDS = 0.02
_REASON_CHARACTERS = 300

Output = queue.Queue[bytes | None]  # None: the end


class Refused(Exception):
    """A request that cannot be served now: its status and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Sandbox:
    """The container's runners and its files."""

    def __init__(
        self,
        workdir: Path,
        spool: Path,
        environ: Mapping[str, str],
        runner: list[str] | None = None,
        platform_ca: Path = PLATFORM_CA,
    ) -> None:
        self._workdir = workdir
        self._spool = spool
        self._runner = runner or RUNNER
        self._environ = environ
        self._platform_ca = platform_ca
        self._changed = threading.Condition()
        self._was_filled = False  # or is being: two archivers in one directory would leave a mix
        self._fresh = True
        self._stopping = False
        self._archiving = False
        self._runners: dict[int, subprocess.Popen[bytes]] = {}
        self._outputs: set[Output] = set()

    def state(self) -> dict[str, object]:
        with self._changed:
            return {"fresh": self._fresh, "stopping": self._stopping, "runners": len(self._runners)}

    def start(self, files: dict[str, bytes], job: bytes) -> Output:
        """Starts a runner, and returns where its output and that of the others is to be read. Raises `Refused`, and
        `OSError` for a file that cannot be written."""
        with self._changed:
            if self._fresh or self._stopping or self._archiving:
                why = "is stopping" if self._stopping else "has not got its files" if self._fresh else "is being saved"
                raise Refused(409, f"the sandbox {why}")
            _open_to_us(self._workdir)
            for name, content in files.items():
                _write(self._workdir, name, content)
            process = subprocess.Popen(
                self._runner,
                cwd=self._workdir,
                env={**self._environ, **self._trust()},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._runners[process.pid] = process
            output = self._follow()
        threading.Thread(target=self._attend, args=(process, job)).start()
        return output

    def follow(self) -> Output:
        """Where the output of the runners is to be read from now on."""
        with self._changed:
            return self._follow()

    def unfollow(self, output: Output) -> None:
        with self._changed:
            self._outputs.discard(output)

    def stop(self) -> None:
        """Lets the runners hand over. Returns when the container may end: the files were fetched, or nobody came."""
        with self._changed:
            self._stopping = True
            for pid in self._runners:
                runner_process.terminate(pid)
            self._changed.wait_for(lambda: not self._runners, GRACE_SECONDS)
            for pid in self._runners:
                runner_process.kill_tree(pid)
            has_files = not self._fresh
        if has_files:
            time.sleep(LINGER_SECONDS)  # who has saved the files ends the container

    @contextlib.contextmanager
    def archive(self, most: int) -> Iterator[tuple[IO[bytes], int, str]]:
        """The files as a compressed archive: its content, size in bytes and SHA-256. Raises `Refused`."""
        with self._without_runners(), self._spool_file() as file:
            # What its owner may not read, we may not either. Symbolic links are not followed.
            subprocess.run(["chmod", "-R", "u+rX", str(self._workdir)], check=False, stderr=subprocess.DEVNULL)
            digest, size = hashlib.sha256(), 0
            with _tar(["--create", "--sparse", "--file", "-", "."], self._workdir) as (_, tar):
                while chunk := tar.read(CHUNK_BYTES):
                    size += len(chunk)
                    if size > most:
                        raise Refused(413, f"the files take more than {most} bytes, compressed")
                    digest.update(chunk)
                    file.write(chunk)
            file.seek(0)
            yield file, size, digest.hexdigest()

    def restore(self, body: io.BufferedIOBase, size: int, sha256: str) -> None:
        """Unpacks an archive into a fresh container. After a failure the container is of no use. Raises `Refused`."""
        with self._changed:
            if self._was_filled:
                raise Refused(409, "the sandbox has files already, or half of them")
            self._was_filled = True
        if size:
            digest, left = hashlib.sha256(), size
            with _tar(["--extract", "--preserve-permissions", "--file", "-"], self._workdir) as (tar, _):
                while left and (chunk := body.read(min(left, CHUNK_BYTES))):
                    digest.update(chunk)
                    left -= len(chunk)
                    with contextlib.suppress(BrokenPipeError):  # it has said why
                        tar.write(chunk)
                with contextlib.suppress(BrokenPipeError):
                    tar.close()
            if left or digest.hexdigest() != sha256:
                raise Refused(422, "the archive is incomplete or not the one that was saved")
        with self._changed:
            self._fresh = False

    @contextlib.contextmanager
    def _without_runners(self) -> Iterator[None]:
        with self._changed:
            if self._fresh or self._runners or self._archiving:
                raise Refused(409, "there is a runner" if self._runners else "there is nothing to save now")
            self._archiving = True
        try:
            yield
        finally:
            with self._changed:
                self._archiving = False

    def _follow(self) -> Output:
        output: Output = queue.Queue(_UNREAD_LINES)
        if self._runners:
            self._outputs.add(output)
        else:
            output.put(None)
        return output

    def _attend(self, process: subprocess.Popen[bytes], job: bytes) -> None:
        """Sees a runner through, and tidies up behind it."""
        pump = threading.Thread(target=self._pump, args=(process,))
        pump.start()
        with contextlib.suppress(BrokenPipeError), _pipe(process.stdin) as stdin:  # it may have ended, and says why
            stdin.write(job)
        code = process.wait()
        try:
            self._kill_leftovers(process.pid)
            pump.join(1.0)  # with the leftovers gone, nobody writes any more
            self._say(json.dumps({"event": "ended", "code": code}).encode() + b"\n")
        finally:  # a runner that counts for ever is never saved behind, nor its container put to sleep
            self._ended(process.pid)

    def _ended(self, runner: int) -> None:
        with self._changed:
            del self._runners[runner]
            if not self._runners:
                for output in self._outputs:
                    _put(output, None)
                self._outputs.clear()
            self._changed.notify_all()

    def _pump(self, process: subprocess.Popen[bytes]) -> None:
        with _pipe(process.stdout) as stdout:
            while line := stdout.readline(CHUNK_BYTES):
                self._say(line)

    def _say(self, line: bytes) -> None:
        """To the container's log, which the platform keeps, and to who asked for it."""
        with contextlib.suppress(OSError):
            os.write(1, line)
        with self._changed:
            for output in list(self._outputs):
                if not _put(output, line):
                    self._outputs.discard(output)

    def _kill_leftovers(self, ended: int) -> None:
        """Ends every process below us that is not a living runner's, and collects those that nobody waits for."""
        for kill_round in range(_KILL_ROUNDS):
            with self._changed:
                runners = set(self._runners) - {ended}
            spared = runners | {pid for runner in runners for pid in runner_process.descendants(runner)}
            doomed = [pid for pid in runner_process.descendants(os.getpid()) if pid not in spared]
            if not doomed:
                break
            if kill_round >= _PATIENT_ROUNDS and not runners:
                doomed = [-1]  # everything but us at one stroke: a fork bomb cannot outrun it
            for pid in doomed:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_ROUND_SECONDS)  # the kernel takes them down; the next round looks again
        for pid in _zombies():
            with self._changed:
                if pid not in self._runners:  # of those, their own threads know
                    with contextlib.suppress(ChildProcessError):  # another runner's thread was faster
                        os.waitpid(pid, os.WNOHANG)

    def _trust(self) -> dict[str, str]:
        """Has the runner, and what the agent runs, trust the platform where it looks into their TLS connections."""
        if not self._platform_ca.is_file():
            return {}
        _open_to_us(self._spool)
        bundle = self._spool / "trusted.crt"
        usual = Path(self._environ.get("SSL_CERT_FILE", SYSTEM_CAS))
        known = usual.read_bytes() if usual.is_file() else b""
        fresh = self._spool / f"trusted.{os.urandom(8).hex()}"
        fresh.write_bytes(known.rstrip() + b"\n" + self._platform_ca.read_bytes())
        fresh.replace(bundle)
        return dict.fromkeys(CA_VARIABLES, str(bundle))

    def _spool_file(self) -> IO[bytes]:
        """A file without a name."""
        _open_to_us(self._spool)
        return tempfile.TemporaryFile(dir=self._spool)


def _put(output: Output, line: bytes | None) -> bool:
    try:
        output.put_nowait(line)
    except queue.Full:
        return False
    return True


def _open_to_us(directory: Path) -> None:
    """Undoes that the agent, who is the same user, has shut a directory."""
    directory.chmod(stat.S_IMODE(directory.stat().st_mode) | stat.S_IRWXU)


def _write(workdir: Path, name: str, content: bytes) -> None:
    """By rename: what the agent left in its place (a pipe, a link) is replaced, never opened."""
    path = workdir / name
    if ".." in path.parts or not path.is_relative_to(workdir):
        raise Refused(422, "a file is not below the working directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    fresh.write_bytes(content)
    fresh.replace(path)


@contextlib.contextmanager
def _tar(arguments: list[str], directory: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The input and the output of GNU tar, at work in a directory for as long as it may take. Raises `Refused` with
    what it said when it fails."""
    argv = ["tar", "--use-compress-program", "gzip -1", *arguments]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(argv, cwd=directory, stdin=pipe, stdout=pipe, stderr=said, start_new_session=True) as tar,
    ):
        timer = threading.Timer(ARCHIVE_SECONDS, os.killpg, (tar.pid, signal.SIGKILL))
        timer.start()
        try:
            yield _pipe(tar.stdin), _pipe(tar.stdout)
            if tar.wait() not in (0, 1):  # 1: a file changed meanwhile; below 0: it was killed
                said.seek(0)
                reason = said.readline(_REASON_CHARACTERS).decode(errors="replace").strip()
                raise Refused(422, f"tar failed with {tar.returncode}: {reason or 'it was killed'}")
        finally:
            timer.cancel()
            if tar.poll() is None:
                os.killpg(tar.pid, signal.SIGKILL)


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise TypeError("the process was started without a pipe")
    return stream


def _zombies() -> list[int]:
    """Our children that have ended and were not waited for."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, parent = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state == "Z" and int(parent) == os.getpid():
                    found.append(int(entry))
    return found
