"""Puts the vendor's `ant` into the image, at one version and one hash: a step of the Dockerfile.

    get_ant.py VERSION SHA256 DIRECTORY

VERSION may be empty: no `ant`. SHA256 may be empty for a version of the table below. The release's archive is
downloaded, unless a file of its name lies beside this one. Standard library only.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import platform
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

# As the vendor's own Homebrew tap (anthropics/homebrew-tap, Casks/ant.rb) has them.
SHA256 = {
    "ant_1.29.0_linux_amd64.tar.gz": "ddb82c0920704d5c73867d640810729f90d12f38347eb2d3c8e6bfe8eec53abf",
    "ant_1.29.0_linux_arm64.tar.gz": "c3ca438e2e59d5804009df1a56922d8ec7ef64759089218ab057db811de2e068",
}
RELEASES = "https://github.com/anthropics/anthropic-cli/releases/download"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_DOWNLOAD_SECONDS = 60.0
_MODE = 0o711  # whoever runs it may not read it, so the kernel hides its processes from others of its user


def main(version: str, sha256: str, directory: Path, releases: str = RELEASES) -> None:
    """Raises `SystemExit` with what to do about it."""
    directory.mkdir(parents=True)
    if not version:
        if sha256:
            raise SystemExit("ANT_SHA256 is set without ANT_VERSION: name the version, such as 1.29.0")
        return
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise SystemExit(f"there is no ant for {machine} that this folder knows of: build without ANT_VERSION")
    name = f"ant_{version}_linux_{_ARCHITECTURES[machine]}.tar.gz"
    expected = sha256.lower() or SHA256.get(name)
    if expected is None:
        raise SystemExit(
            f"the hash of {name} is not known here: set ANT_SHA256 to it, as the release's checksums file says, or"
            f" ANT_VERSION to one of these: {', '.join(sorted({known.split('_')[1] for known in SHA256}))}"
        )
    archive = _archive(name, f"{releases}/v{version}/{name}")
    found = hashlib.sha256(archive).hexdigest()
    if found != expected:
        raise SystemExit(f"{name} is not what it should be: its SHA-256 is {found}, expected {expected}")
    ant = directory / "ant"
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        member = files.extractfile("ant") if "ant" in files.getnames() else None
        if member is None:
            raise SystemExit(f"{name} holds no file named ant")
        ant.write_bytes(member.read())
    ant.chmod(_MODE)
    try:
        said = subprocess.run([ant, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"the ant in {name} does not run here: {error}") from None
    if version not in said.split():
        raise SystemExit(f"the ant in {name} says it is {said!r}, not {version}")


def _archive(name: str, url: str) -> bytes:
    beside = Path(__file__).with_name(name)
    if beside.exists():
        return beside.read_bytes()
    try:
        with urllib.request.urlopen(url, timeout=_DOWNLOAD_SECONDS) as answer:  # noqa: S310 - https, see above
            content: bytes = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise SystemExit(
            f"{url} cannot be had ({error}): download it elsewhere, and put it beside the Dockerfile"
        ) from None
    return content


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
