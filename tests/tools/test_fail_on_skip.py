"""On CI a skipped test is a failed one; an expected failure is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.sync_shared import ROOT

FILES = {
    "test_mark.py": "import pytest\n@pytest.mark.skip(reason='no docker')\ndef test_it(): pass\n",
    "test_call.py": "import pytest\ndef test_it(): pytest.skip('no redis')\n",
    "test_fixture.py": "import pytest\n@pytest.fixture\ndef d(): pytest.skip('no bwrap')\ndef test_it(d): pass\n",
    "test_module.py": "import pytest\npytest.skip('no node', allow_module_level=True)\n",
    "test_import.py": "import pytest\npytest.importorskip('not_there', reason='no boto')\n",
    "test_xfail.py": "import pytest\n@pytest.mark.xfail(reason='known')\ndef test_it(): assert False\n",
    "test_pass.py": "def test_it(): pass\n",
}


def _pytest(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    for name, text in FILES.items():
        (directory / name).write_text(text, encoding="utf-8")
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(directory), *options]
    return subprocess.run([*argv, str(directory)], cwd=ROOT, capture_output=True, text=True, check=False)


def test_skips_pass_without_the_plugin(tmp_path: Path) -> None:
    run = _pytest(tmp_path)
    assert run.returncode == 0
    assert "1 passed, 5 skipped, 1 xfailed" in run.stdout


@pytest.mark.parametrize("workers", ["0", "1"])
def test_skips_fail_with_it_and_keep_their_reason(tmp_path: Path, workers: str) -> None:
    run = _pytest(tmp_path, "-p", "tools.fail_on_skip", "-n", workers, "--continue-on-collection-errors")
    assert run.returncode == 1
    assert "1 failed, 1 passed, 1 xfailed, 4 errors" in run.stdout
    assert all(f"no {what}" in run.stdout for what in ("docker", "redis", "bwrap", "node", "boto"))
    assert "INTERNALERROR" not in run.stdout
