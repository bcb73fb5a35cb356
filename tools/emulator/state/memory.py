"""Memory stores: text documents at paths, changed under preconditions. Pure.

Documented in the SDK's types: the limits, the paths, the hashes and the 409 of a lost precondition. Inferred: the 409
for a path that is taken, and the order of a list, which is by path.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..errors import Conflict, Invalid, NotFound
from ..memory_params import MemoryStoreUpdateBody
from ..params import MOST_METADATA, MemoryStoreResource
from .ids import new_id
from .work import merge

MAX_CONTENT_BYTES = 102_400
MAX_PATH_BYTES = 1024
MAX_SEGMENTS = 20
MAX_MEMORIES = 2000  # the SDK's comment on its flush
MAX_STORES_PER_SESSION = 8
MOUNT_ROOT = "/mnt/memory"
_FORBIDDEN_CATEGORIES = ("Cc", "Cf", "Zl", "Zp")


@dataclass
class Memory:
    id: str
    store_id: str
    path: str
    content: str
    created_at: datetime
    updated_at: datetime
    version_id: str = field(default_factory=lambda: new_id("memver"))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()

    @property
    def size(self) -> int:
        return len(self.content.encode())

    def expect(self, sha256: str | None) -> None:
        """Raise Conflict unless the content still has this hash; None expects nothing."""
        if sha256 is not None and sha256 != self.sha256:
            raise Conflict(f"memory {self.id} has content_sha256 {self.sha256}, not the expected {sha256}")


@dataclass
class MemoryStore:
    id: str
    name: str
    created_at: datetime
    updated_at: datetime
    description: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    archived_at: datetime | None = None
    memories: dict[str, Memory] = field(default_factory=dict)

    def memory(self, memory_id: str) -> Memory:
        if memory_id not in self.memories:
            raise NotFound(f"memory {memory_id} not found in memory store {self.id}")
        return self.memories[memory_id]

    def create(self, path: str, content: str, now: datetime) -> Memory:
        self._check_writable()
        self._check_free(path)
        check_content(content)
        if len(self.memories) >= MAX_MEMORIES:
            raise Invalid(f"memory store {self.id} holds {MAX_MEMORIES} memories, which is the most it can")
        memory = Memory(new_id("mem"), self.id, path, content, now, now)
        self.memories[memory.id] = memory
        return memory

    def change(
        self, memory_id: str, now: datetime, content: str | None, path: str | None, expected: str | None
    ) -> Memory:
        """All of it or nothing. The precondition is about the content the memory has now."""
        self._check_writable()
        memory = self.memory(memory_id)
        memory.expect(expected)
        if path is not None and path != memory.path:
            self._check_free(path)
        if content is not None:
            check_content(content)
        memory.path = memory.path if path is None else path
        memory.content = memory.content if content is None else content
        memory.updated_at = now
        memory.version_id = new_id("memver")
        return memory

    def delete(self, memory_id: str, expected: str | None) -> None:
        self.memory(memory_id).expect(expected)
        del self.memories[memory_id]

    def listing(self, prefix: str, depth: int) -> list[Memory | str]:
        """Memories below the prefix by path. At a depth, what lies deeper is rolled up into prefixes (strings)."""
        if not (prefix.startswith("/") and prefix.endswith("/")):
            raise Invalid("path_prefix: must start and end with /")
        items: dict[str, Memory | str] = {}
        for memory in self.memories.values():
            if memory.path.startswith(prefix):
                below = memory.path[len(prefix) :].split("/")
                is_deep = depth > 0 and len(below) > depth
                rolled_up = prefix + "/".join(below[:depth]) + "/"
                items[rolled_up if is_deep else memory.path] = rolled_up if is_deep else memory
        return [items[path] for path in sorted(items)]

    def update(self, body: MemoryStoreUpdateBody, now: datetime) -> None:
        self._check_writable()
        merge(self.metadata, body.metadata or {}, MOST_METADATA)
        self.name = body.name or self.name
        if "description" in body.model_fields_set:
            self.description = body.description or ""
        self.updated_at = now

    def _check_writable(self) -> None:
        if self.archived_at is not None:
            raise Invalid(f"memory store {self.id} is archived")

    def _check_free(self, path: str) -> None:
        check_path(path)
        if any(memory.path == path for memory in self.memories.values()):
            raise Conflict(f"path: memory store {self.id} already has a memory at {path}")


class MemoryStores:
    def __init__(self) -> None:
        self.all: dict[str, MemoryStore] = {}
        self.mount_root = MOUNT_ROOT
        """Where sessions find their stores. Another root is for machines whose /mnt nobody may write to."""

    def create(self, name: str, now: datetime, description: str, metadata: dict[str, str]) -> MemoryStore:
        store = MemoryStore(new_id("memstore"), name, now, now, description, dict(metadata))
        self.all[store.id] = store
        return store

    def get(self, store_id: str) -> MemoryStore:
        if store_id not in self.all:
            raise NotFound(f"memory store {store_id} not found")
        return self.all[store_id]

    def attach(self, wanted: Sequence[MemoryStoreResource]) -> list[dict[str, Any]]:
        """The resources as the session keeps them: name and description as they are now, and a mount path each."""
        if len(wanted) > MAX_STORES_PER_SESSION:
            raise Invalid(f"resources: at most {MAX_STORES_PER_SESSION} memory stores")
        attached: list[dict[str, Any]] = []
        for resource in wanted:
            store = self.get(resource.memory_store_id)
            if store.archived_at is not None:
                raise Invalid(f"resources: memory store {store.id} is archived")
            if any(other["memory_store_id"] == store.id for other in attached):
                raise Invalid(f"resources: memory store {store.id} is attached twice")
            taken = [other["mount_path"] for other in attached]
            attached.append(
                {
                    "type": "memory_store",
                    "memory_store_id": store.id,
                    "access": resource.access or "read_write",
                    "mount_path": self._mount_path(store.name, taken),
                    "name": store.name,
                    "description": store.description,
                    "instructions": resource.instructions,
                }
            )
        return attached

    def _mount_path(self, name: str, taken: Sequence[str]) -> str:
        """Documented: lower case, each run of other characters one hyphen. Inferred: the second of a name gets `-2`."""
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "memory"
        paths = (f"{self.mount_root}/{slug}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 10))))
        return next(path for path in paths if path not in taken)


def check_path(path: str) -> None:
    segments = path[1:].split("/")
    if not path.startswith("/") or any(segment in ("", ".", "..") for segment in segments):
        raise Invalid(f"path: {path!r} is not a path of segments that starts with /")
    if len(segments) > MAX_SEGMENTS or len(path.encode()) > MAX_PATH_BYTES:
        raise Invalid(f"path: more than {MAX_SEGMENTS} segments or {MAX_PATH_BYTES} bytes")
    if any(unicodedata.category(character) in _FORBIDDEN_CATEGORIES for character in path):
        raise Invalid(f"path: {path!r} has control or format characters")
    if not unicodedata.is_normalized("NFC", path):
        raise Invalid(f"path: {path!r} is not in Unicode Normalization Form C")


def check_content(content: str) -> None:
    if len(content.encode()) > MAX_CONTENT_BYTES:
        raise Invalid(f"content: more than {MAX_CONTENT_BYTES} bytes")
