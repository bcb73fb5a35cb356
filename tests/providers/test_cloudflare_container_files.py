"""providers/cloudflare-container/container/sandbox.py: what it packs, unpacks and refuses, without a container."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.folders import Folder
from tools.sync_shared import ROOT

container = Folder(ROOT / "providers/cloudflare-container/container").module("sandbox")
PLENTY = 1 << 30


@pytest.fixture
def sandbox(tmp_path: Path) -> Any:
    return make(tmp_path / "one")


def make(directory: Path) -> Any:
    """A sandbox that has no files yet."""
    for name in ("workspace", "state"):
        (directory / name).mkdir(parents=True)
    return container.Sandbox(directory / "workspace", directory / "state", os.environ)


def workspace(sandbox: Any) -> Path:
    path: Path = sandbox._workdir
    return path


def archive(sandbox: Any, most: int = PLENTY) -> bytes:
    with sandbox.archive(most) as (file, size, sha256):
        content: bytes = file.read()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha256)
    return content


def restore(sandbox: Any, content: bytes, sha256: str | None = None, size: int | None = None) -> None:
    digest = sha256 or hashlib.sha256(content).hexdigest()
    sandbox.restore(io.BytesIO(content), len(content) if size is None else size, digest)


def test_what_was_packed_is_unpacked(sandbox: Any, tmp_path: Path) -> None:
    restore(sandbox, b"")
    files = workspace(sandbox)
    (files / "deep/er").mkdir(parents=True)
    (files / "deep/er/file").write_text("content")
    (files / "program").write_text("#!/bin/sh\n")
    (files / "program").chmod(0o775)
    (files / "link").symlink_to("/etc/passwd")
    (files / "twin").hardlink_to(files / "program")
    os.mkfifo(files / "pipe")
    with (files / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 32)
    (files / "shut").mkdir()
    (files / "shut/in").write_text("found")
    (files / "shut").chmod(0)
    content = archive(sandbox)
    assert len(content) < 1 << 20

    other = make(tmp_path / "other")
    restore(other, content)
    found = workspace(other)
    assert (found / "deep/er/file").read_text() == "content"
    assert (found / "program").stat().st_mode & 0o777 == 0o775
    assert (found / "program").samefile(found / "twin")
    assert os.readlink(found / "link") == "/etc/passwd"
    assert (found / "pipe").is_fifo()
    assert (found / "shut/in").read_text() == "found"
    status = (found / "sparse").stat()
    assert (status.st_size, status.st_blocks < 1024) == (1 << 32, True)


def test_a_save_has_a_limit(sandbox: Any) -> None:
    restore(sandbox, b"")
    (workspace(sandbox) / "noise").write_bytes(os.urandom(1 << 20))
    with pytest.raises(container.Refused, match="more than 1000000 bytes") as refused:
        archive(sandbox, 1_000_000)
    assert refused.value.status == 413
    (workspace(sandbox) / "noise").unlink()
    archive(sandbox, 1_000_000)


def test_an_archive_that_is_not_the_saved_one_is_refused(sandbox: Any, tmp_path: Path) -> None:
    restore(sandbox, b"")
    (workspace(sandbox) / "noise").write_bytes(os.urandom(1 << 16))
    content = archive(sandbox)
    wrong: list[tuple[bytes, dict[str, Any]]] = [
        (content, {"sha256": "0" * 64}),
        (content[:-10], {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}),  # it broke off
        (content[:-10], {}),  # cut before it was saved
        (b"no archive", {}),
    ]
    for number, (damaged, stated) in enumerate(wrong):
        other = make(tmp_path / str(number))
        with pytest.raises(container.Refused) as refused:
            restore(other, damaged, **stated)
        assert refused.value.status == 422
        assert other.state()["fresh"], "it would start a runner"
        with pytest.raises(container.Refused, match="has not got its files"):
            other.start({}, b"{}")


def test_an_archive_stays_in_the_workspace(sandbox: Any) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(container.Refused, match="tar failed"):
        restore(sandbox, packed.getvalue())
    assert not (workspace(sandbox).parent / "outside").exists()


def test_files_are_restored_once_and_saved_only_then(sandbox: Any) -> None:
    with pytest.raises(container.Refused, match="nothing to save"):
        archive(sandbox)
    restore(sandbox, b"")
    with pytest.raises(container.Refused, match="has files already"):
        restore(sandbox, b"")


class Meddled(io.BytesIO):
    """A file that does something, once, after the first of it was read or written."""

    def __init__(self, content: bytes, meddle: Callable[[], None]) -> None:
        super().__init__(content)
        self._meddle: Callable[[], None] | None = meddle

    def _once(self) -> None:
        meddle, self._meddle = self._meddle, None
        if meddle:
            meddle()

    def read(self, size: int | None = -1, /) -> bytes:
        chunk = super().read(size)
        self._once()
        return chunk

    def write(self, chunk: Any, /) -> int:
        self._once()
        return super().write(chunk)


def kill_tar() -> None:
    """As the kernel does that is out of memory: it alone, at once, wherever it is."""
    for pid in container.runner_process.descendants(os.getpid()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone since the listing
            name, state = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rsplit(") ", 1)
            if (name, int(state.split()[1])) == ("tar", os.getpid()):  # it has children of the same name
                os.kill(pid, signal.SIGKILL)


def test_a_restore_whose_archiver_was_killed_is_none(sandbox: Any, tmp_path: Path) -> None:
    restore(sandbox, b"")
    (workspace(sandbox) / "noise").write_bytes(os.urandom(1 << 20))
    content = archive(sandbox)
    other = make(tmp_path / "other")
    with pytest.raises(container.Refused, match="tar failed with -9: it was killed") as refused:
        other.restore(Meddled(content, kill_tar), len(content), hashlib.sha256(content).hexdigest())
    assert (refused.value.status, other.state()["fresh"]) == (422, True)


def test_a_save_whose_archiver_was_killed_is_none(sandbox: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    restore(sandbox, b"")
    (workspace(sandbox) / "noise").write_bytes(os.urandom(4 << 20))  # more than fits into pipes
    monkeypatch.setattr(sandbox, "_spool_file", lambda: Meddled(b"", kill_tar))
    with pytest.raises(container.Refused, match="tar failed with -9: it was killed") as refused:
        archive(sandbox)
    assert refused.value.status == 422
    monkeypatch.undo()
    archive(sandbox)


def test_files_are_restored_by_one_at_a_time(sandbox: Any, tmp_path: Path) -> None:
    """An object that lost its memory meanwhile would begin again."""
    restore(sandbox, b"")
    (workspace(sandbox) / "file").write_text("content")
    content = archive(sandbox)
    other = make(tmp_path / "other")
    refusals: list[Any] = []

    def again() -> None:
        with pytest.raises(container.Refused, match="half of them") as refused:
            restore(other, content)
        refusals.append(refused.value.status)

    other.restore(Meddled(content, again), len(content), hashlib.sha256(content).hexdigest())
    assert refusals == [409]
    assert (workspace(other) / "file").read_text() == "content"


def test_a_restore_that_failed_is_not_tried_again_on_top_of_it(sandbox: Any) -> None:
    with pytest.raises(container.Refused, match="tar failed"):
        restore(sandbox, b"no archive")
    with pytest.raises(container.Refused, match="half of them"):
        restore(sandbox, b"")
    assert sandbox.state()["fresh"]


def test_a_runner_is_over_even_where_another_thread_collected_the_orphan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runners end at once, and both see the same orphan."""
    sandbox = make(tmp_path / "one")
    sandbox._runner = ["true"]
    restore(sandbox, b"")
    collected = subprocess.Popen(["true"])
    collected.wait()
    monkeypatch.setattr(container, "_zombies", lambda: [collected.pid])
    monkeypatch.setattr(
        container.runner_process, "descendants", lambda _: []
    )  # it kills what is below this very process
    died: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    output = sandbox.start({}, b"{}")
    assert list(iter(lambda: output.get(timeout=60), None)) == [b'{"event": "ended", "code": 0}\n']
    assert sandbox.state()["runners"] == 0
    assert not died


def test_a_runner_trusts_the_platform_where_it_looks_into_its_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, platforms, state = tmp_path / "usual.crt", tmp_path / "platform.crt", tmp_path / "state"
    state.mkdir()
    usual.write_text("usual\n")
    look = ["sh", "-c", 'cat "$SSL_CERT_FILE"; echo $NODE_EXTRA_CA_CERTS']
    sandbox = container.Sandbox(tmp_path, state, {"SSL_CERT_FILE": str(usual)}, look, platforms)
    monkeypatch.setattr(container.runner_process, "descendants", lambda _: [])
    restore(sandbox, b"")

    def said() -> list[bytes]:
        output = sandbox.start({}, b"{}")
        return [line.strip() for line in iter(lambda: output.get(timeout=60), None)][:-1]

    assert said() == [b"usual", b""]
    platforms.write_text("the platform's\n")  # it comes with the container, or later
    assert said() == [b"usual", b"the platform's", str(state / "trusted.crt").encode()]


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out"])
def test_a_brought_file_is_put_below_the_workspace_only(sandbox: Any, name: str) -> None:
    restore(sandbox, b"")
    with pytest.raises(container.Refused, match="not below"):
        sandbox.start({name: b"x"}, b"{}")
    assert not (workspace(sandbox).parent / "out").exists()


def test_a_brought_file_replaces_what_the_agent_left_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("untouched")
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs/file").symlink_to(tmp_path / "target")
    container._write(tmp_path, "inputs/file", b"brought")
    assert (tmp_path / "inputs/file").read_bytes() == b"brought"
    assert (tmp_path / "target").read_text() == "untouched"
