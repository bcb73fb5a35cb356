"""The emulator for people outside this project: the folder alone, by uvx and by pip's way, as its README says."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx2
import pytest

import tools.emulator
from tests.test_copy_out import _uv
from tools.sync_shared import ROOT

FOLDER = Path(tools.emulator.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SECONDS = 120.0


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Alone, in a directory of its own."""
    directory = tmp_path_factory.mktemp("checkout") / "emulator"
    shutil.copytree(FOLDER, directory, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
    return directory


@pytest.fixture
def environ() -> dict[str, str]:
    """Nothing that leads back here."""
    ours = {"PYTHONPATH", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT"}
    return {key: value for key, value in os.environ.items() if key not in ours} | {"UV_PYTHON": sys.executable}


def code(language: str, about: str) -> str:
    """The one block of code of the README that speaks of this."""
    blocks = re.findall(rf"^```{language}\n(.+?)^```$", README, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if about in block)
    return str(block)


@pytest.mark.timeout(150)
def test_uvx_starts_it_and_the_readmes_curl_makes_a_session(
    copy: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed, and the README's first request is made with it")
    assert "uvx --from <checkout>/tools/emulator managed-agents-emulator --port 8700" in README
    command = [_uv(), "tool", "run", "--from", str(copy), "managed-agents-emulator", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            ready = json.loads(process.stdout.readline())
            names = {"API_KEY": "api_key", "AGENT_ID": "agent_id", "ENVIRONMENT_ID": "environment_id"}
            script = code("console", "curl").removeprefix("$ ").replace("http://127.0.0.1:8700", ready["url"])
            values = {name: ready[key] for name, key in names.items()}
            asked = ["bash", "-euc", script]
            done = subprocess.run(
                asked, env=environ | values, capture_output=True, text=True, timeout=SECONDS, check=True
            )
            assert json.loads(done.stdout)["environment_id"] == ready["environment_id"]
            page = httpx2.get(ready["url"], trust_env=False)
            assert (page.status_code, "app.js" in page.text) == (200, True)
            assert httpx2.get(f"{ready['url']}/page/app.js", trust_env=False).status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.mark.timeout(150)
def test_the_readmes_test_of_a_worker_passes(copy: Path, environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "test_worker.py").write_text(code("python", "def test_"))
    pins = {pin.split("==")[0]: pin for pin in _pins()}
    command = [_uv(), "run", "--no-project", "--with", str(copy), "--with", pins["anthropic"], "--with", pins["pytest"]]
    command += ["pytest", "-q", "test_worker.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_every_scenario_is_in_the_package(copy: Path, environ: dict[str, str]) -> None:
    command = [_uv(), "run", "--no-project", "--with", str(copy), "python", "-m", "managed_agents_emulator", "--help"]
    done = subprocess.run(
        command, cwd=copy.parent, env=environ, capture_output=True, text=True, timeout=SECONDS, check=True
    )
    assert done.stdout.startswith("usage: python -m managed_agents_emulator")
    told = re.sub(r"\s+", "", done.stdout)
    for path in FOLDER.glob("scenarios/*.yaml"):
        assert path.stem in told


def test_the_package_has_the_projects_version_and_admits_its_pins() -> None:
    ours, its = (tomllib.loads((path / "pyproject.toml").read_text())["project"] for path in (ROOT, FOLDER))
    assert its["version"] == ours["version"]
    sources = "\n".join(path.read_text() for path in FOLDER.rglob("*.py"))
    imported = {from_ or plain for from_, plain in re.findall(r"^from (\w+)[\w.]* import|^import (\w+)", sources, re.M)}
    third_party = imported - set(sys.stdlib_module_names)
    names = {re.split(r"[>=]", each)[0].replace("pyyaml", "yaml") for each in its["dependencies"]}
    assert third_party == names


def _pins() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    return [re.sub(r"\[.*?\]", "", pin) for pin in pins]
