"""Loads a provider folder the way its platform does: with the folder itself as the place where top-level names live.

Every folder has a `sandbox` and a `_shared`, so two of them cannot be imported side by side as they are. `load_folder`
imports one with `sys.modules` swapped, and keeps what it got: each folder keeps its own copies of the core's classes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

PROVIDERS = Path(__file__).resolve().parent.parent / "providers"


class Folder:
    """One provider folder, imported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._modules: dict[str, ModuleType] = {}

    def module(self, name: str) -> ModuleType:
        """The folder's module `name`, such as `sandbox` or `_shared.dispatcher`."""
        with self._active():
            return importlib.import_module(name)

    def shared(self, name: str) -> ModuleType:
        """The folder's own copy of a shared module."""
        return self.module(f"_shared.{name}")

    @property
    def sandbox(self) -> ModuleType:
        return self.module("sandbox")

    @contextmanager
    def _active(self) -> Iterator[None]:
        own = {"_shared", *(file.stem for file in self.path.glob("*.py"))}

        def taken() -> dict[str, ModuleType]:
            return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in own}

        outside = taken()
        sys.modules.update(self._modules)
        sys.path.insert(0, str(self.path))
        try:
            yield
        finally:
            sys.path.remove(str(self.path))
            self._modules = taken()
            sys.modules.update(outside)


@cache
def load_folder(name: str) -> Folder:
    """The provider folder `name`. Raises `FileNotFoundError` when there is none."""
    path = PROVIDERS / name
    if not (path / "sandbox.py").is_file():
        raise FileNotFoundError(f"providers/{name}/sandbox.py does not exist")
    return Folder(path)
