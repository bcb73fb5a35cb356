"""What a test puts on the shelf before a session wants it: agents with skills, and memory stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .engine import Engine
from .params import Access, AgentCreateBody, parse
from .state.skills import Archive

Json = dict[str, Any]
MODEL = "claude-opus-5-5"
TOOLSET = {"type": "agent_toolset_20260401"}


class Shelf:
    """The part of `Emulator` about skills and memory stores; `_engine` is the emulator's."""

    _engine: Engine

    def __init__(self) -> None:
        self._access: dict[str, Access] = {}

    def add_skill(self, name: str, files: Mapping[str, bytes | str], archive: Archive = "zip") -> str:
        """Upload a skill; `files` by their paths below its directory, `SKILL.md` among them.

        A file that begins with `#!` is executable. A second upload of a name is a new version of that skill. Returns
        the skill's id.
        """
        packed = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
        with self._engine.transact() as now:
            skills = self._engine.world.skills
            known = next((skill for skill in skills.all.values() if skill.name == name), None)
            if known is None:
                return skills.create(packed, now, name, None, archive).id
            known.add(packed, archive, now)
            return known.id

    def add_memory_store(self, name: str, memories: Mapping[str, str], access: Access = "read_write") -> str:
        """A store with these memories by their paths. `access` is how a session gets it that names its id alone."""
        with self._engine.transact() as now:
            store = self._engine.world.memory.create(name, now, "", {})
            for path, content in memories.items():
                store.create(path, content, now)
        self._access[store.id] = access
        return store.id

    def memories(self, store_id: str) -> dict[str, str]:
        """What the store holds now, by path."""
        with self._engine.transact():
            store = self._engine.world.memory.get(store_id)
            return {memory.path: memory.content for memory in store.memories.values()}

    def write_memory(self, store_id: str, path: str, content: str | None) -> None:
        """Create, change or (None) delete a memory, as another session would."""
        with self._engine.transact() as now:
            store = self._engine.world.memory.get(store_id)
            known = next((memory.id for memory in store.memories.values() if memory.path == path), None)
            if content is None:
                store.delete(known or path, None)
            elif known is None:
                store.create(path, content, now)
            else:
                store.change(known, now, content, None, None)

    @property
    def memory_root(self) -> str:
        """Where sessions created from now on find their stores: `/mnt/memory`, unless a test cannot write there."""
        return self._engine.world.memory.mount_root

    @memory_root.setter
    def memory_root(self, path: str) -> None:
        self._engine.world.memory.mount_root = path

    def _create_agent(self, skills: Sequence[str | Json]) -> str:
        wanted = [{"type": "custom", "skill_id": each} if isinstance(each, str) else each for each in skills]
        values = {"name": "emulator", "model": MODEL, "tools": [TOOLSET], "skills": wanted}
        with self._engine.transact() as now:
            return self._engine.world.create_agent(parse(AgentCreateBody, values, "body"), now).id

    def _resources(self, wanted: Sequence[str | Json]) -> list[Json]:
        return [self._resource(each) if isinstance(each, str) else each for each in wanted]

    def _resource(self, store_id: str) -> Json:
        return {"type": "memory_store", "memory_store_id": store_id, "access": self._access.get(store_id)}
