"""What the host writes when all around it quotes secrets: of staging, health checks, tidying, the server and its page.
And no place that writes goes around `log.line`."""

from __future__ import annotations

import ast
import asyncio
import io
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from anthropic import AsyncAnthropic

from shared.errors import LaunchFailed
from shared.fetching import Fetcher
from shared.jobs import Job
from shared.server import Host, Server
from shared.staging import Stager
from shared.webhook import Verifier
from tests.shared.conftest import MakeDispatcher
from tests.shared.support import Answer, Detour, FakeProvider, settings_for
from tests.shared.test_secrets import SECRETS, TEXTS, assert_clean, known, written
from tools.emulator import Emulator

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = "; ".join(text for _, text in TEXTS.values())
STATUS_KEY = "status-" + "k" * 24
SIGNING_KEY = "whsec_4OHi4-Tl5ufo6err7O3u7_Dx8vP09fb3-Pn6-_z9_v8"
PATIENCE_SECONDS = 60.0
__all__ = ["known", "written"]  # fixtures


class Tidying(FakeProvider):
    """A provider whose work of its own fails, and quotes what it was sent."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    async def tidy(self) -> None:
        raise self._error

    async def close(self) -> None:
        return


@pytest.fixture
async def host(emulator: Emulator, detour: Detour) -> AsyncIterator[AsyncAnthropic]:
    """The host's client."""
    async with detour.client(emulator) as client:
        yield client


async def _job(client: AsyncAnthropic, emulator: Emulator) -> Job:
    item = await client.beta.environments.work.poll(emulator.environment_id, reclaim_older_than_ms=1)
    assert item is not None
    return Job.from_item(item, settings_for(emulator))


@pytest.mark.parametrize("name", SECRETS)
async def test_what_is_staged_shows_no_secret_of_its_address(
    emulator: Emulator, host: AsyncAnthropic, written: io.StringIO, name: str
) -> None:
    """A signed address is a credential; so may be what somebody calls a file."""
    secret = SECRETS[name]
    plain = secret.replace("/", "_")
    addresses = {
        "a.txt": f"http://files.example/{plain}?token={plain}",
        "b.txt": f"https://user:{plain}@files.example/",
        "c.txt": f"https://127.0.0.1:1/{plain}?X-Amz-Signature={plain}",
        "d.txt": f"https://[{plain}/",
        f"{secret} ": "https://files.example/",
    }
    fitting = {f"input:{name}": url for name, url in addresses.items() if len(name) <= 58}  # what a key may have
    emulator.create_session(metadata=fitting)
    files = await Stager(host, Fetcher()).files(await _job(host, emulator))
    assert written.getvalue().count("action=stage") == len(fitting) + 1
    assert_clean(written.getvalue())
    assert list(files) == ["inputs/ERRORS.txt"]
    refused = files["inputs/ERRORS.txt"].decode().splitlines()
    assert_clean("\n".join(line for line in refused if not line.startswith(secret)))  # its own name the agent may read


def _always(answer: httpx2.Response) -> Answer:
    return lambda _request, _response: answer


async def test_a_staging_that_the_api_refuses_shows_no_secret(
    emulator: Emulator, host: AsyncAnthropic, detour: Detour, written: io.StringIO
) -> None:
    emulator.create_session()
    job = await _job(host, emulator)
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": EVERYTHING}}
    for answer in (httpx2.Response(400, json=error), httpx2.Response(200, text=EVERYTHING)):
        detour.changes[:] = [_always(answer)]
        assert await Stager(host).files(job) == {}
    assert written.getvalue().count("no files were brought") == 2
    assert_clean(written.getvalue())


async def test_a_health_check_that_is_refused_shows_no_secret(
    emulator: Emulator, detour: Detour, make_dispatcher: MakeDispatcher, written: io.StringIO
) -> None:
    emulator.add_healthcheck()
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": EVERYTHING}}
    detour.changes.append(
        lambda request, _: httpx2.Response(400, json=error) if request.url.path.endswith("/ack") else None
    )
    await make_dispatcher(FakeProvider()).drain()
    assert "action=healthcheck" in written.getvalue()
    assert "error=BadRequestError" in written.getvalue()
    assert_clean(written.getvalue())


async def test_a_tidying_that_fails_shows_no_secret(
    emulator: Emulator, make_dispatcher: MakeDispatcher, written: io.StringIO
) -> None:
    await make_dispatcher(Tidying(LaunchFailed(EVERYTHING, retriable=True))).sweep()
    assert "action=tidy" in written.getvalue()
    assert_clean(written.getvalue())


async def test_a_server_whose_worker_fails_shows_no_secret_in_its_log_and_on_its_page(
    emulator: Emulator, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no table maps ends the worker, with its traceback; the page shows the same lines to whoever has its key."""
    told = asyncio.Event()
    monkeypatch.setattr(signal, "raise_signal", lambda _number: told.set())
    provider = Tidying(RuntimeError(EVERYTHING))
    provider.broken["sandboxes"] = LaunchFailed(EVERYTHING, retriable=True)
    served = Host(settings_for(emulator), provider, Verifier([SIGNING_KEY]), STATUS_KEY)
    app = Server(lambda _environ, _settings: provider, ()).app(served, poll=False)
    async with app.router.lifespan_context(app):
        async with asyncio.timeout(PATIENCE_SECONDS):
            await told.wait()
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://host") as client:
            page = await client.get("/status", headers={"authorization": f"Bearer {STATUS_KEY}"})
            refused = await client.get("/status", headers={"authorization": f"Bearer {EVERYTHING.encode()!r}"})
    assert (page.status_code, refused.status_code) == (200, 401)
    assert any("action=failed" in line and "RuntimeError: " in line for line in page.json()["log"])
    assert any("action=list" in line for line in page.json()["log"])
    assert "action=failed" in written.getvalue()
    assert_clean(written.getvalue() + page.text + refused.text)


# --- no place goes around ------------------------------------------------------------------------------------------

LEVELS = ("debug", "info", "warning", "error", "critical", "exception", "log")
_MADE_ELSEWHERE = {
    ("shared/fleet.py", "trouble"),  # by `log.line`, in the one caller
    ("shared/settings.py", "'action=settings reason=%s'"),  # two names of settings: `log` needs what is read there
}


def _around(path: Path) -> list[str]:
    """The calls of a logger in `path` that write something else than a line of `log.line`, or a traceback."""
    found: list[str] = []
    name = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in LEVELS:
            continue
        if ast.unparse(node.func.value) not in ("_log", "logger", "logging", "log"):
            continue
        text = ast.unparse(node.args[0]) if node.args else ""
        is_line = text.startswith(("log.line(", "line(")) and len(node.args) == 1
        shows_traceback = bool(node.keywords) and name not in ("shared/log.py", "shared/server.py")
        if shows_traceback or not (is_line or (name, text) in _MADE_ELSEWHERE):
            found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    return found


def _logging_files() -> list[Path]:
    files = [*(ROOT / "shared").glob("*.py"), *(ROOT / "providers").glob("*/*.py")]
    return sorted(path for path in files if not path.name.startswith("runner_"))


def test_no_place_that_logs_goes_around_the_redacted_line() -> None:
    """Of the core and of every folder: a new one is fed by `test_a_log_line_shows_no_secret`, or it is named here."""
    assert [found for path in _logging_files() for found in _around(path)] == []
    lines = sum(path.read_text().count("log.line(") + path.read_text().count(" line(") for path in _logging_files())
    assert lines > 40  # it looks where they are


def test_a_place_that_goes_around_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "some.py"
    for written_so in (
        '_log.warning(f"cannot: {error}")',
        '_log.error("cannot: %s", error)',
        '_log.error(log.line("x"), exc_info=error)',
        'logging.info(log.line("x"), error)',
    ):
        path.write_text(written_so)
        assert len(_around(path)) == 1, written_so
    path.write_text('_log.info(log.line("x", reason=text))')
    assert _around(path) == []
