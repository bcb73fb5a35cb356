"""Fetches the uv that uv.lock pins, for a machine that has none: `python3 tools/bootstrap_uv.py .tools/uv`.

Standard library only: it runs before there is an environment. The wheel's address and its sha256 come from uv.lock, so
a bare machine with Python 3.11+ and certificates is enough, and what runs is what was locked.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import platform
import re
import ssl
import sys
import tomllib
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

_SELF_HELP = "or install uv yourself (its documentation lists many ways) and run make again"
_CHUNK = 1 << 18  # bytes
_TIMEOUT = 60  # seconds without a byte


class BootstrapError(Exception):
    """What went wrong, and what to do next."""


class Wheel(NamedTuple):
    url: str
    sha256: str


def platform_tags(system: str, machine: str, libc: str) -> re.Pattern[str]:
    """Matches the wheel tags that run on this machine. Raises `BootstrapError` for one we know no wheel of."""
    arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine.lower())
    if system == "darwin" and arch in ("x86_64", "aarch64"):
        return re.compile(rf"macosx_\d+_\d+_{'arm64' if arch == 'aarch64' else arch}")
    if system == "linux" and arch in ("x86_64", "aarch64"):
        # uv is a static binary, so the oldest glibc wheel (2.17, older than any Python 3.11) is right for every glibc.
        return re.compile(rf"manylinux_2_17_{arch}" if libc == "glibc" else rf"musllinux_1_\d+_{arch}")
    raise BootstrapError(f"no uv for {system} on {machine} is known here: install uv yourself and run make again")


def find_wheel(lock: str, tags: re.Pattern[str]) -> Wheel:
    """The pinned uv wheel with one of these tags."""
    packages = tomllib.loads(lock)["package"]
    for wheel in next(package["wheels"] for package in packages if package["name"] == "uv"):
        filename = wheel["url"].rsplit("/", 1)[-1]
        if any(tags.fullmatch(tag) for tag in filename.removesuffix(".whl").split("-")[-1].split(".")):
            return Wheel(wheel["url"], wheel["hash"].removeprefix("sha256:"))
    raise BootstrapError(f"uv.lock pins no uv for {tags.pattern}: install uv yourself and run make again")


def download(wheel: Wheel) -> bytes:
    """The wheel's bytes, hash verified. Honours HTTPS_PROXY and SSL_CERT_FILE, as urllib and OpenSSL do."""
    print(f"Fetching {wheel.url.rsplit('/', 1)[-1]}", file=sys.stderr)
    body = bytearray()
    try:
        with urllib.request.urlopen(wheel.url, timeout=_TIMEOUT) as response:
            size = int(response.headers.get("Content-Length") or 0)
            while chunk := response.read(_CHUNK):
                body += chunk
                if sys.stderr.isatty():
                    print(f"\r  {len(body) >> 20} of {size >> 20} MB", end="", file=sys.stderr, flush=True)
    except (OSError, http.client.HTTPException) as error:
        raise BootstrapError(_advice(error)) from error
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)
    if (found := hashlib.sha256(body).hexdigest()) != wheel.sha256:
        raise BootstrapError(
            f"the download is not what uv.lock pins (sha256 {found}, expected {wheel.sha256}): a broken or meddling"
            f" proxy? Nothing was kept. Try again, {_SELF_HELP}"
        )
    return bytes(body)


def _advice(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLError):
        return (
            f"the server's certificate was not accepted ({reason}). Install the ca-certificates package; behind a proxy"
            f" that signs its own, point SSL_CERT_FILE at its certificates; {_SELF_HELP}"
        )
    return f"the download failed ({reason}). Check the network and HTTPS_PROXY, and run make again, {_SELF_HELP}"


def extract(wheel: bytes, target: Path) -> None:
    """Puts the uv binary of `wheel` at `target`, executable, in one step: a half-written one is never found there."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        binary = next(name for name in archive.namelist() if name.endswith(".data/scripts/uv"))
        content = archive.read(binary)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.chmod(0o755)
    partial.replace(target)


def main(target: Path, lock: Path) -> int:
    try:
        libc = platform.libc_ver()[0] or "musl"
        wheel = find_wheel(lock.read_text(encoding="utf-8"), platform_tags(sys.platform, platform.machine(), libc))
        extract(download(wheel), target)
    except BootstrapError as error:
        print(f"make: {error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(__file__).parent.parent / "uv.lock"))
