"""A Workers folder with containers under `wrangler dev`: real workerd, real containers on this machine's Docker Engine.

What `wrangler dev` would take from an image registry is made here: the base of the folder's image, and a stand-in for
the sidecar that it puts beside each container (tests/fakes/containers says what that one does not do).
"""

from __future__ import annotations

import shutil
import time
import uuid
from pathlib import Path

from tests.providers.docker_support import base, docker, image
from tests.providers.workers_dev import WAIT_SECONDS, WorkersDev
from tools.sync_shared import ROOT

FAKES = ROOT / "tests/fakes/containers"


def environment(folder: Path, tags: Path) -> dict[str, str]:
    """For wrangler, where there is no registry. Builds the images once; wrangler's own builds find the layers, and the
    names that wrangler gives them are written to `tags`."""
    image(folder / "container")
    found = base()
    return {
        "WRANGLER_DOCKER_BIN": str(FAKES / "docker"),
        "TEST_TAGS": str(tags),
        "MINIFLARE_CONTAINER_EGRESS_IMAGE": image(FAKES),
    } | ({"TEST_BASE_IMAGE": found} if found else {})


def altered_copy(folder: Path, directory: Path, file: str, old: str, new: str) -> Path:
    """The folder as somebody would have it who changed one file of it."""
    copy = directory / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("node_modules", ".wrangler"))
    (copy / "node_modules").symlink_to(folder / "node_modules")
    text = (copy / file).read_text(encoding="utf-8")
    assert old in text
    (copy / file).write_text(text.replace(old, new), encoding="utf-8")
    return copy


class ContainersDev(WorkersDev):
    """Its Worker has a name of its own, by which its containers are found; `remove_all` removes them."""

    def __init__(self, folder: Path, directory: Path, settings: dict[str, str] | None) -> None:
        self._tags = directory / "tags"
        super().__init__(folder, directory, settings, **environment(folder, self._tags))
        self._name = f"test-{uuid.uuid4().hex[:12]}"

    def arguments(self) -> list[str]:
        return ["--name", self._name]

    def containers(self) -> list[str]:
        """The names of the sandboxes that run, without their sidecars."""
        found = docker("ps", "--filter", f"name=workerd-{self._name}-", "--format", "{{.Names}}").split()
        return [name for name in found if not name.endswith("-proxy")]

    def until_no_containers(self) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while found := self.containers():
            assert time.monotonic() < deadline, f"{found} run:\n{self.log}"
            time.sleep(0.1)

    def remove_all(self) -> None:
        """Whatever this wrangler has left on the Engine."""
        if found := docker("ps", "-aq", "--filter", f"name=workerd-{self._name}-").split():
            docker("rm", "-f", *found, check=False)
        remove_tags(self._tags)


def remove_tags(tags: Path) -> None:
    """The names only: the layers stay, under the name by which the tests built them."""
    for name in tags.read_text(encoding="utf-8").split() if tags.is_file() else []:
        docker("rmi", name, check=False)
