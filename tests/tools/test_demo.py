"""`make demo`, as a person sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

DEMO = [sys.executable, "-m", "tools.demo"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An empty home, and a temporary directory in which a leftover shows."""
    (tmp_path / "tmp").mkdir()
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "nowhere"), "TMPDIR": str(tmp_path / "tmp")}


@pytest.fixture
def kept(environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    command = [*DEMO, "--keep"]
    # What starts the tests in the background may have them ignore Ctrl-C; at a terminal nothing does.
    heeds_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c
    ) as demo:
        yield demo
        demo.kill()


def test_the_demo_shows_the_whole_way_and_leaves_nothing(environ: dict[str, str]) -> None:
    done = subprocess.run(DEMO, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    way = (
        "control plane  http://127.0.0.1:",
        "host           http://127.0.0.1:",
        "calls write  file_path=note.txt",
        "session.status_run_started: answered 200 in",
        "sandbox ready",
        "claimed",
        "calls read  file_path=note.txt",
        "calls bash",
        "idle: the turn has ended",
        "the runner has stopped its work item",
        "you      !cat note.txt",
        "says  written by the first message",
        "milliseconds after the message",
    )
    position = 0
    for step in way:
        position = done.stdout.find(step, position)
        assert position >= 0, f"{step!r} is missing, or too early, in:\n{done.stdout}"
    assert os.listdir(environ["TMPDIR"]) == []


def test_ctrl_c_ends_everything(kept: subprocess.Popen[str], environ: dict[str, str]) -> None:
    assert kept.stdout is not None
    assert next(line for line in kept.stdout if "events.send" in line)
    kept.send_signal(signal.SIGINT)
    assert "stopped and removed" in kept.stdout.read()
    assert kept.wait(60) == 0
    assert os.listdir(environ["TMPDIR"]) == []


def test_the_line_that_keep_prints_is_served(kept: subprocess.Popen[str]) -> None:
    assert kept.stdout is not None
    line = next(line for line in kept.stdout if "events.send" in line)
    subprocess.run(["/bin/sh", "-c", line], check=True, capture_output=True, timeout=60)
    assert any("says" in line for line in kept.stdout)
    kept.send_signal(signal.SIGINT)
    assert kept.wait(60) == 0


def test_tempfile_follows_the_environment_of_the_test(environ: dict[str, str]) -> None:
    """Else the two tests above would look for leftovers in the wrong place."""
    code = "import tempfile; print(tempfile.gettempdir())"
    out = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True).stdout
    assert out.strip() == environ["TMPDIR"] != tempfile.gettempdir()
