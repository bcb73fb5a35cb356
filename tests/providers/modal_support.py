"""What the tests of the Modal provider share: the folder, a double, and a provider that talks to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import modal
import pytest

from tests.fakes.modal import ModalDouble
from tests.fakes.modal.machine import problem
from tests.folders import load_folder

MODAL = load_folder("modal")
INSIDE = "/opt/sandbox"

# On CI nothing may be skipped: there the tests run, and fail with the reason.
needs_bubblewrap = pytest.mark.skipif(problem() is not None and not os.environ.get("CI"), reason=str(problem()))


def image(double: ModalDouble, files: dict[str, Path] | None = None) -> str:
    """An image as `image.py` describes it, without building it: the folder's files where the image has them."""
    ours = {
        f"{INSIDE}/_shared": MODAL.path / "_shared",
        f"{INSIDE}/sandbox_init.py": MODAL.path / "sandbox_init.py",
    }
    return double.add_image({**ours, **(files or {})})


def open_provider(double: ModalDouble, image_id: str, settings: Any, runner: Any = None, **own: str) -> Any:
    """A provider with Modal's real client."""
    client = double.client
    return MODAL.sandbox.ModalProvider(
        MODAL.shared("settings").load(MODAL.sandbox.ModalSettings, own),
        settings,
        image=modal.Image.from_id(image_id, client),
        client=client,
        runner=runner,
    )
