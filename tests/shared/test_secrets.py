"""No way into a log leaks: every place that writes, fed with every shape of secret, in every spelling."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from shared import log, runner_secrets
from shared.errors import LaunchFailed, SettingsError
from shared.handler import Request, handle
from shared.provider import SandboxInfo, read_ready
from shared.runner_secrets import hide, redact
from shared.settings import Settings, load, setting
from shared.webhook import Verifier
from tests.shared import leaks
from tests.shared.conftest import MakeDispatcher
from tests.shared.support import Detour, FakeProvider, chunks
from tools.emulator import Emulator

RUNNER = Path(__file__).resolve().parents[2] / "shared" / "sandbox_runner.py"
SECRETS = {**leaks.SHAPED, **leaks.SHAPELESS}
TEXTS = {
    f"{name}, {way}": (secret, write(secret))
    for name, secret in SECRETS.items()
    for way, write in leaks.WRITTEN.items()
}


@dataclass(frozen=True)
class VendorSettings:
    """A provider folder's settings."""

    token: str = setting("VENDOR_TOKEN", "The vendor's token.", secret=True)
    password: str = setting("VENDOR_PASSWORD", "The vendor's password.", secret=True)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor's secrets are settings, read as a folder reads them."""
    monkeypatch.setattr(runner_secrets, "_known", {})
    load(
        VendorSettings,
        {
            "VENDOR_TOKEN": leaks.SHAPELESS["vendor token"],
            "VENDOR_PASSWORD": leaks.SHAPELESS["vendor password"],
        },
    )


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the host's log says, configured as an entry point does it."""
    root, hook = logging.getLogger(), sys.excepthook
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    log.configure(stream=stream)
    yield stream
    logging.captureWarnings(False)
    sys.excepthook = hook
    root.handlers[:] = handlers
    root.setLevel(level)


def assert_clean(output: str) -> None:
    assert {name: pieces for name, secret in SECRETS.items() if (pieces := leaks.found(secret, output))} == {}


def test_the_search_finds_what_is_not_redacted() -> None:
    assert [name for name, (secret, text) in TEXTS.items() if not leaks.found(secret, text)] == []


def test_a_log_line_shows_no_secret(written: io.StringIO) -> None:
    """As it is made, whatever writes it then: a platform has handlers of its own."""
    for secret, text in TEXTS.values():
        line = log.line("launch_failed", session="sesn_01AbC", reason=text, sandbox=text)
        logging.getLogger("anybody").warning(line)
        assert leaks.found(secret, line) == [], text
        assert line.startswith("action=launch_failed session=sesn_01AbC sandbox=")
    assert_clean(written.getvalue())


def test_a_traceback_shows_no_secret(written: io.StringIO) -> None:
    for secret, text in TEXTS.values():
        error = ExceptionGroup("several", [ValueError(text)])
        error.__cause__ = KeyError(text)
        error.add_note(text)
        log.bug(logging.getLogger("anybody"), "launch_failed", error)
        logging.getLogger("anybody").error("cannot: %s %r", text, {"headers": text})
        assert leaks.found(secret, written.getvalue()) == [], text
        assert "direct cause" in written.getvalue()
        written.seek(0)
        written.truncate()


def test_what_python_writes_by_itself_shows_no_secret(written: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    for _, value in TEXTS.values():
        error = RuntimeError(value)
        sys.excepthook(RuntimeError, error, error.__traceback__)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(True)
            warnings.warn(value, UserWarning, stacklevel=1)
    assert_clean(capsys.readouterr().err)
    assert_clean(written.getvalue())
    assert written.getvalue().count("UserWarning: ") == len(TEXTS)


def test_ordinary_lines_stay_as_they_are() -> None:
    for line in (
        "action=launched provider=p session=sesn_01AbC work=work_01 sandbox=sb-eye attempt=1 ms=12",
        'action=launch_failed reason="https://api.example.com/v1/x?page=2&limit=10 answered 503"',
        'action=settings reason="ANTHROPIC_ENVIRONMENT_KEY is not set: the environment\'s key, from the console"',
        '{"event": "tool", "name": "bash", "ms": 12, "is_error": false}',
        "the bearer of the key, a task-ants nest",
    ):
        assert redact(line).replace("bearer [redacted]", "bearer of") == line


def test_a_short_value_is_not_hidden() -> None:
    hide("true")
    assert redact("it is true") == "it is true"


@pytest.mark.parametrize("secret", ["narrow-Zq7R", "r1 gap|Zq7 kWx2L", 'a\\nd"Zq7/', "\nZq7RkWx2", "'q7:b\\ 'x"])
def test_a_secret_that_looks_like_a_break_or_an_escape_is_found(secret: str) -> None:
    hide(secret)
    for way, write in leaks.WRITTEN.items():
        for before in ("", "\\", "n", "a b|"):
            text = redact(before + write(secret))
            assert "[redacted]" in text, way
            assert not any(piece in text for piece in (secret[2:], json.dumps(secret[2:])[1:-1])), way


def test_secrets_that_share_a_piece_go_whole() -> None:
    hide("Zq7RkWx2LmVb")
    hide("LmVb9TnPs4Gh")
    assert redact("a Zq7RkWx2LmVb9TnPs4Gh b") == "a [redacted] b"
    assert redact("a Zq7RkWx2\nLmVb9TnPs4Gh b") == "a [redacted] b"


# --- the host's paths ------------------------------------------------------------------------------------------------


class Leaky(FakeProvider):
    """A provider whose every failure quotes what it was sent."""

    def __init__(self, error: Exception, info: SandboxInfo) -> None:
        super().__init__()
        self.infos = [info]
        self.broken = dict.fromkeys((info.session_id, info.sandbox_id), error)


@pytest.mark.parametrize("unmapped", [False, True], ids=["LaunchFailed", "a bug"])
async def test_a_providers_failures_show_no_secret(
    emulator: Emulator, make_dispatcher: MakeDispatcher, written: io.StringIO, unmapped: bool
) -> None:
    everything = "; ".join(text for _, text in TEXTS.values())
    session_id = emulator.create_session()
    old = SandboxInfo(session_id, "box-1", 0.0, 0.0, running=False)
    error = RuntimeError(everything) if unmapped else LaunchFailed(everything, retriable=False)
    dispatcher = make_dispatcher(Leaky(error, old))
    await dispatcher.sweep()
    gone = SandboxInfo("sesn_gone", "box-1", 0.0, 0.0, running=False)
    provider = Leaky(error, gone)
    await make_dispatcher(provider).sweep()
    provider.broken["sandboxes"] = LaunchFailed(everything, retriable=True)
    await make_dispatcher(provider).sweep()
    assert_clean(written.getvalue())
    for action in ("launch_failed", "list", *(["sweep"] if unmapped else ["release"])):
        assert f"action={action}" in written.getvalue()


async def test_the_control_planes_errors_show_no_secret(
    emulator: Emulator, detour: Detour, make_dispatcher: MakeDispatcher, written: io.StringIO
) -> None:
    """Its answers, quoted by the SDK's exceptions: of a poll, of a list, of an answer to a strand."""
    emulator.create_session()
    everything = "; ".join(text for _, text in TEXTS.values())
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": everything}}
    answers = [httpx2.Response(status, json=error) for status in (400, 401, 403, 429, 503)]
    page = httpx2.Response(200, text=everything)  # a proxy's, in the place of an answer
    left = [*answers, page]
    detour.changes.append(lambda _request, _response: left[0])
    while left:
        await make_dispatcher(FakeProvider(), retry_pauses=(0.0,)).sweep()
        left.pop(0)
    assert "action=poll" in written.getvalue()
    assert "action=heal" in written.getvalue()
    assert_clean(written.getvalue())


async def test_a_refused_webhook_shows_no_secret(written: io.StringIO) -> None:
    verifier = Verifier(["whsec_4OHi4-Tl5ufo6err7O3u7_Dx8vP09fb3-Pn6-_z9_v8"])
    for _, text in TEXTS.values():
        one_line = text.replace("\n", " ")
        headers = {
            "webhook-id": one_line,
            "webhook-timestamp": "1",
            "webhook-signature": f"v1,{one_line}",
            "authorization": one_line,
        }
        for method, sent in (("POST", headers), ("GET", headers), ("POST", {"authorization": one_line})):
            reply = await handle(Request(method, sent, chunks(text.encode())), verifier=verifier, wake=lambda _: None)
            assert reply.status >= 400
            assert_clean(reply.body.decode())
    assert "action=refused" in written.getvalue()
    assert_clean(written.getvalue())


def test_settings_that_cannot_be_used_are_not_quoted() -> None:
    for _, text in TEXTS.values():
        names = ["ANTHROPIC_ENVIRONMENT_KEY", "ANTHROPIC_BASE_URL", "SANDBOX_MAX_LIVE", "SANDBOX_MAX_IDLE_SECONDS"]
        with pytest.raises(SettingsError) as raised:
            Settings.from_env({**dict.fromkeys(names, f"{text} \u00e9"), "ANTHROPIC_API_KEY": text})
        assert_clean(str(raised.value))
        with pytest.raises(SettingsError) as raised:
            Verifier([f"{text}!"])
        assert_clean(str(raised.value))


async def test_a_runners_last_words_show_no_secret_not_even_half_of_one() -> None:
    """They are cut to a length: a secret that lies across the cut has lost its beginning, by which one knows it."""

    async def lines(text: str) -> AsyncIterator[bytes]:
        yield text.encode()

    for secret in leaks.SHAPED.values():
        for padding in range(240, 300, 7):
            for text in (
                f"Error: {secret} {'x' * padding}",
                f'{{"event": "exit", "code": 69, "reason": "{"x" * padding} {secret} {"x" * padding}"}}',
            ):
                with pytest.raises(LaunchFailed) as raised:
                    await read_ready(lines(text))
                assert_clean(str(raised.value))


# --- the runner's paths ----------------------------------------------------------------------------------------------

_SPEAK = """
import json, logging, sys, warnings
sys.path.insert(0, sys.argv[1])
from shared import sandbox_runner
from shared.runner_secrets import hide
secrets, texts = json.load(sys.stdin)
for secret in secrets:
    hide(secret)
sandbox_runner._log_to_stderr()
for text in texts:
    sandbox_runner.emit("exit", code=69, reason=text, nested={"of": [text]})
    logging.getLogger("anthropic.lib.tools.agent_toolset").warning("failed to download skill: %s", text)
    warnings.warn(text)
    try:
        raise ValueError(text)
    except ValueError:
        logging.getLogger("asyncio").exception("Task exception was never retrieved")
raise RuntimeError("; ".join(texts))
"""


async def test_a_runners_output_shows_no_secret() -> None:
    """Its own lines, the SDK's warnings, Python's, and the traceback that ends it."""
    stdin = json.dumps([list(leaks.SHAPELESS.values()), [text for _, text in TEXTS.values()]])
    root = str(RUNNER.parents[1])
    run = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-I", "-c", _SPEAK, root],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stdout.count('"event": "exit"') == len(TEXTS)
    assert run.stderr.count("failed to download skill") == run.stderr.count("UserWarning: ") == len(TEXTS)
    assert "RuntimeError: " in run.stderr
    assert_clean(run.stdout)
    assert_clean(run.stderr)


@pytest.mark.parametrize("name", SECRETS)
def test_a_job_that_cannot_be_used_is_not_quoted(name: str, tmp_path: Path) -> None:
    """The whole runner, given a credential where it does not belong."""
    secret = SECRETS[name]
    for job in (
        secret,
        json.dumps({"ANTHROPIC_SESSION_ID": secret, "ANTHROPIC_WORK_SECRET": secret}),
        json.dumps(
            {
                "ANTHROPIC_SESSION_ID": "sesn_1",
                "ANTHROPIC_WORK_ID": "sesn_1",
                "ANTHROPIC_ENVIRONMENT_ID": "env_1",
                "ANTHROPIC_BASE_URL": secret,
                "ANTHROPIC_ENVIRONMENT_KEY": f"{secret}\n",
                "SANDBOX_TOOLS": f"/nowhere/{secret}.py:tools",
            }
        ),
    ):
        run = subprocess.run(
            [sys.executable, "-I", str(RUNNER)], input=job, capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert run.returncode == 64
        assert_clean(run.stdout + run.stderr)
