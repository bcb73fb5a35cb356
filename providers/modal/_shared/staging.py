"""What the host brings into a sandbox before the runner starts (R12). Off unless SANDBOX_STAGE_FILES says so.

- The agent's skills, where the server does not let the session's own token read them. The host fetches them with the
  environment key and puts them where the SDK would have: `skills/<name>/`. A script in them is not executable there.
- The input files that the session's metadata names: `input:<name>` is the key, an https address the value. They are put
  into `inputs/`, before each runner anew, so that a sandbox that was lost has them again: what the agent changes there
  does not stay.

Nothing of this keeps a session from being served. What could not be brought is named in the log, and for the agent in
`inputs/ERRORS.txt`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import tempfile
from pathlib import Path

import anthropic
from anthropic import AsyncAnthropic
from anthropic.lib.environments import download_session_skills
from anthropic.types.beta import BetaManagedAgentsSession

from . import log
from .errors import FetchRefused
from .fetching import Fetcher
from .jobs import Job
from .runner_job import sessions_token
from .runner_pages import RefusePages

STAGE_SECONDS = 45.0  # for everything; it goes on beside `acquire`, and is half of what a launch has
MAX_INPUT_BYTES = 10 * 1024 * 1024  # one file
MAX_BYTES = 20 * 1024 * 1024  # all files of a session, and of its skills: some providers take them in one request
PREFIX = "input:"
_NAME = re.compile(r"[\w][\w.\- ]{0,100}(?:/[\w][\w.\- ]{0,100}){0,4}\Z", re.ASCII)
_ERRORS = "inputs/ERRORS.txt"

_log = logging.getLogger(__name__)


class Stager:
    """Fetches a session's files. `client` has the environment key."""

    def __init__(self, client: AsyncAnthropic, fetcher: Fetcher | None = None) -> None:
        self._client = client
        self._fetcher = fetcher or Fetcher()

    async def files(self, job: Job) -> dict[str, bytes]:
        """Path relative to the working directory -> content. Never raises for what cannot be had."""
        try:
            async with asyncio.timeout(STAGE_SECONDS):
                session = await self._client.beta.sessions.retrieve(job.session_id)
                skills = await self._skills(job, session)
                inputs = await self._inputs(job, session, MAX_BYTES - sum(map(len, skills.values())))
        except (anthropic.APIError, OSError) as error:  # a TimeoutError is one, and so is a full disk
            _log.warning(log.line("stage", session=job.session_id, error=error, reason="no files were brought"))
            return {}
        if skills or inputs:
            reason = f"{len(skills)} files of skills, {len(inputs)} of inputs"
            _log.info(log.line("stage", session=job.session_id, reason=reason))
        return skills | inputs

    # --- skills ------------------------------------------------------------------------------------------------------

    async def _skills(self, job: Job, session: BetaManagedAgentsSession) -> dict[str, bytes]:
        if not session.agent.skills or not await self._are_refused(job, session):
            return {}
        with tempfile.TemporaryDirectory(prefix="skills-") as directory:
            await download_session_skills(self._client, workdir=directory, session=session)
            found = await asyncio.to_thread(_read_all, Path(directory))
        if found is None:
            reason = f"the skills have more than {MAX_BYTES} bytes: not brought"
            _log.warning(log.line("stage", session=job.session_id, reason=reason))
        return found or {}

    async def _are_refused(self, job: Job, session: BetaManagedAgentsSession) -> bool:
        """Whether the runner, with its own token, would be."""
        token = sessions_token(job.secret)
        if token is None:
            return False  # it has the environment key
        skill = session.agent.skills[0]
        async with AsyncAnthropic(auth_token=token, base_url=job.base_url, middleware=[RefusePages()]) as runners:
            try:
                await runners.beta.skills.versions.retrieve(skill.version, skill_id=skill.skill_id)
            except (anthropic.AuthenticationError, anthropic.PermissionDeniedError):
                return True
            except anthropic.NotFoundError:
                return False
        return False

    # --- inputs ------------------------------------------------------------------------------------------------------

    async def _inputs(self, job: Job, session: BetaManagedAgentsSession, room: int) -> dict[str, bytes]:
        named = {key.removeprefix(PREFIX): url for key, url in session.metadata.items() if key.startswith(PREFIX)}
        found: dict[str, bytes] = {}
        problems: list[str] = []
        left = room
        for name, url in sorted(named.items()):
            try:
                if not _NAME.match(name):
                    raise FetchRefused("its name is no relative path of plain names")
                content = await self._fetcher.fetch(url, min(left, MAX_INPUT_BYTES))
            except FetchRefused as error:
                problems.append(f"{name}: {error}")
                _log.warning(log.line("stage", session=job.session_id, reason=f"input {name}: {error}"))
            else:
                found[f"inputs/{name}"] = content
                left -= len(content)
        if problems:
            found[_ERRORS] = "".join(f"{problem}\n" for problem in problems).encode()
        return found


def _read_all(root: Path) -> dict[str, bytes] | None:
    """Every file below `root`; None when they are too many bytes."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    if sum(path.stat().st_size for path in paths) > MAX_BYTES:
        return None
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
