"""What the local provider does where there is no /proc (macOS), as far as Linux can show it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.folders import load_folder

folder = load_folder("local")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc"),
    pytest.mark.skipif(shutil.which("ps") is None, reason="ps is not installed (apt-get install procps)"),
]


def test_ps_shows_the_same_processes_as_proc() -> None:
    init = folder.module("sandbox_init")
    with subprocess.Popen(["sleep", "60"]) as child:
        before, by_ps, in_proc = init.processes_in_proc(), init.processes_by_ps(), init.processes_in_proc()
        child.kill()
    assert by_ps[child.pid][0] == in_proc[child.pid][0] == os.getpid()
    # Others come and go meanwhile, and their children get another parent.
    parents = {pid: parent for pid, (parent, start) in in_proc.items() if before.get(pid) == (parent, start)}
    same = by_ps.keys() & parents.keys()
    assert {pid: by_ps[pid][0] for pid in same} == {pid: parents[pid] for pid in same}
    assert by_ps[os.getpid()][1] <= by_ps[child.pid][1] <= 0  # the later one has the larger number


def test_a_socket_is_reached_by_a_short_link(tmp_path: Path) -> None:
    session = folder.module("session")
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener, session.by_link(deep) as address:
        assert len(address) < 100
        listener.bind(address)
        listener.listen()
        assert (deep / "control.sock").is_socket()
        with session.by_descriptor(deep) as other, socket.socket(socket.AF_UNIX) as client:
            client.connect(other)
        link = Path(address).parent
    assert not link.parent.exists()
    assert deep.exists()
