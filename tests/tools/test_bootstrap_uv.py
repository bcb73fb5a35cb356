"""Fetching uv: the right wheel for every platform, only with the locked hash, and nothing left behind otherwise."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tools import bootstrap_uv
from tools.sync_shared import ROOT

SCRIPT = "#!/bin/sh\necho uv 9.9.9\n"


def _wheel(name: str = "uv-9.9.9.data/scripts/uv") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("uv/__init__.py", "")
        archive.writestr("uv-9.9.9.data/scripts/uvx", "not this one")
        archive.writestr(name, SCRIPT)
    return buffer.getvalue()


@pytest.fixture
def served() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A server on loopback: its address, and what it serves."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = files.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", files
        server.shutdown()
        thread.join()


def _lock(directory: Path, address: str, content: bytes) -> Path:
    """A uv.lock that pins `content` for every platform."""
    tags = "manylinux_2_17_x86_64.manylinux_2_17_aarch64.musllinux_1_1_x86_64.musllinux_1_1_aarch64"
    url = f"{address}/uv-9.9.9-py3-none-{tags}.macosx_11_0_arm64.macosx_10_12_x86_64.whl"
    lock = directory / "uv.lock"
    digest = hashlib.sha256(content).hexdigest()
    lock.write_text(f'[[package]]\nname = "uv"\nwheels = [{{ url = "{url}", hash = "sha256:{digest}" }}]\n', "utf-8")
    return lock


@pytest.mark.parametrize(
    ("system", "machine", "libc", "tag"),
    [
        ("linux", "x86_64", "glibc", "-manylinux_2_17_x86_64."),
        ("linux", "aarch64", "glibc", "-manylinux_2_17_aarch64."),
        ("linux", "x86_64", "musl", "-musllinux_1_1_x86_64."),
        ("linux", "aarch64", "musl", ".musllinux_1_1_aarch64."),
        ("darwin", "arm64", "", "_arm64."),
        ("darwin", "x86_64", "", "-macosx_10_12_x86_64."),
    ],
)
def test_the_lock_pins_a_wheel_for_every_platform(system: str, machine: str, libc: str, tag: str) -> None:
    lock = (ROOT / "uv.lock").read_text(encoding="utf-8")
    wheel = bootstrap_uv.find_wheel(lock, bootstrap_uv.platform_tags(system, machine, libc))
    assert tag in wheel.url
    assert ("macosx" in wheel.url) == (system == "darwin")
    assert len(wheel.sha256) == 64


@pytest.mark.parametrize(("system", "machine"), [("win32", "AMD64"), ("linux", "mips64"), ("freebsd14", "amd64")])
def test_an_unknown_platform_is_told_what_to_do(system: str, machine: str) -> None:
    with pytest.raises(bootstrap_uv.BootstrapError, match="install uv yourself"):
        bootstrap_uv.platform_tags(system, machine, "glibc")


def test_the_binary_is_fetched_verified_and_executable(tmp_path: Path, served: tuple[str, dict[str, bytes]]) -> None:
    address, files = served
    wheel = _wheel()
    lock = _lock(tmp_path, address, wheel)
    files[_path(lock)] = wheel
    target = tmp_path / ".tools/uv"

    assert bootstrap_uv.main(target, lock) == 0
    assert target.stat().st_mode & 0o777 == 0o755
    assert subprocess.run([str(target)], capture_output=True, text=True, check=True).stdout == "uv 9.9.9\n"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("served_instead", [_wheel("uv-6.6.6.data/scripts/uv"), b"", _wheel()[:-1]])
def test_another_content_is_refused_and_nothing_is_kept(
    tmp_path: Path,
    served: tuple[str, dict[str, bytes]],
    served_instead: bytes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address, files = served
    lock = _lock(tmp_path, address, _wheel())
    files[_path(lock)] = served_instead

    assert bootstrap_uv.main(tmp_path / ".tools/uv", lock) == 1
    assert "not what uv.lock pins" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [lock]


def test_a_failed_download_says_what_to_do(
    tmp_path: Path, served: tuple[str, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    lock = _lock(tmp_path, served[0], _wheel())
    assert bootstrap_uv.main(tmp_path / ".tools/uv", lock) == 1
    error = capsys.readouterr().err
    assert "HTTPS_PROXY" in error
    assert "install uv yourself" in error
    assert list(tmp_path.iterdir()) == [lock]


def test_it_runs_with_nothing_installed() -> None:
    """-S: no site-packages. It runs before there is an environment."""
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", "import runpy, sys; runpy.run_path(sys.argv[1])", "tools/bootstrap_uv.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")


def _path(lock: Path) -> str:
    return "/" + lock.read_text(encoding="utf-8").split('url = "')[1].split('"')[0].rsplit("/", 1)[1]
