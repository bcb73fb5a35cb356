"""TypeScript folders: vendoring, tables and pins as Python's, and a workspace that holds the folder and no more."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools import trees
from tools import check, pins, settings_tables, sync_shared, typescript


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = trees.make_typescript(tmp_path)
    assert sync_shared.main(["--root", str(tmp_path)]) == 0
    return folder


def _check(folder: Path) -> int:
    return sync_shared.main(["--check", "--root", str(folder.parent.parent)])


def _edit_a_copy(folder: Path) -> None:
    (folder / "_shared/errors.ts").write_text("export class Other extends Error {}\n", encoding="utf-8")


def _edit_the_source(folder: Path) -> None:
    trees.write(folder.parent.parent / "shared/typescript/errors.ts", "export class Broken extends TypeError {}\n")


def _add_a_file(folder: Path) -> None:
    trees.write(folder / "_shared/more.ts", "")


def _delete_a_copy(folder: Path) -> None:
    (folder / "_shared/jobs.ts").unlink()


def _edit_the_table(folder: Path) -> None:
    readme = folder / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("A key.", "A door."), encoding="utf-8")


@pytest.mark.parametrize(
    "attack",
    [_edit_a_copy, _edit_the_source, _add_a_file, _delete_a_copy, _edit_the_table],
    ids=lambda attack: attack.__name__.strip("_"),
)
def test_every_change_is_found_and_sync_mends_it(
    folder: Path, attack: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _check(folder) == 0
    attack(folder)
    capsys.readouterr()
    assert _check(folder) == 1
    assert capsys.readouterr().err.endswith("Fix: make sync\n")
    assert sync_shared.main(["--root", str(folder.parent.parent)]) == 0
    assert _check(folder) == 0


def test_copies_are_of_the_typescript_sources(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "_shared").iterdir()) == ["VERSION", "errors.ts", "jobs.ts"]
    source = folder.parent.parent / "shared/typescript/jobs.ts"
    assert (folder / "_shared/jobs.ts").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("shared/typescript/jobs.ts", 'import { line } from "./log.ts";\n'),
        ("shared/typescript/jobs.ts", 'export { line } from "./log.ts";\n'),
        ("providers/yours/src/deep/more.ts", 'import { line } from "../_shared/log.ts";\n'),
        ("providers/yours/test/a.test.ts", "import type {\n  line,\n} from '../_shared/log.ts';\n"),
    ],
)
def test_an_import_outside_the_vendored_set_is_found(
    folder: Path, where: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder.parent.parent
    trees.write(root / "shared/typescript/log.ts", "export const line = String;\n")
    trees.write(root / where, text)
    assert sync_shared.main(["--root", str(root)]) == 1
    assert f"{where} imports log.ts: add log.ts to the manifest in providers/yours/package.json" in (
        capsys.readouterr().err
    )


def test_a_folder_without_a_manifest_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees.write(folder / "package.json", '{"name": "yours"}')
    assert _check(folder) == 1
    assert '"sandboxes": {"shared"' in capsys.readouterr().err


def test_rows_come_from_both_files(folder: Path) -> None:
    rows = settings_tables.rows(folder.parent.parent, folder)
    assert [(row.name, row.required) for row in rows] == [("BASE_URL", True), ("KEY", False)]


def test_both_cores_declare_a_setting_alike() -> None:
    """What a host in either language reads under one name means the same, and has the same default."""
    root, own = sync_shared.ROOT, {"FILES_KEY", "FILES_MAX_MB"}
    python = {row.name: row for row in settings_tables.rows(root, root / "providers/local")}
    ours = [row for row in settings_tables.rows(root, root / "providers/cloudflare-worker") if row.name not in own]
    assert len(ours) >= 10
    assert [row for row in ours if python[row.name] != row] == []


def test_settings_that_are_no_json_say_where(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees.write(folder / "src/settings.json", "[")
    assert _check(folder) == 1
    assert "providers/yours/src/settings.json: its settings cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"1.0.0"', '"^1.0.0"', "a ^1.0.0 is not pinned exactly"),
        ('"1.0.0"', '"1.0.1"', "pins a 1.0.1, its package-lock.json has 1.0.0"),
    ],
)
def test_other_npm_pins_are_found(folder: Path, old: str, new: str, problem: str) -> None:
    root, project = folder.parent.parent, folder / "package.json"
    assert list(pins.npm_problems(root)) == []
    project.write_text(project.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    assert problem in "\n".join(pins.npm_problems(root))


def test_the_check_has_a_step_for_the_folder(folder: Path) -> None:
    (step,) = [step for step in check.steps(folder.parent.parent) if step.name.endswith("of providers/yours")]
    assert step.argv[-2:] == ["check", str(folder)]


def test_what_a_folder_puts_into_its_image_is_vendored_pinned_and_checked_too(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, image = folder.parent.parent, folder / "container"
    trees.write(root / "shared/__init__.py", "")
    trees.write(root / "shared/runner.py", "from .sibling import helper\n")
    project = '[project]\nname = "image"\nversion = "0"\ndependencies = ["anthropic{pin}"]\n'
    manifest = '[tool.sandboxes]\nshared = ["runner.py"]\n'
    trees.write(image / "pyproject.toml", project.format(pin="") + manifest)
    assert sync_shared.main(["--root", str(root)]) == 1
    said = capsys.readouterr().err
    assert "container/pyproject.toml: anthropic is not pinned exactly" in said
    assert "shared/runner.py imports sibling: add sibling.py" in said
    assert (image / "_shared/runner.py").read_bytes() == (root / "shared/runner.py").read_bytes()
    (image / "_shared/runner.py").write_text("", encoding="utf-8")
    assert "container/_shared/runner.py differs" in "\n".join(sync_shared.stale_copies(root))
    (step,) = [step for step in check.steps(root) if step.name.endswith("of providers/yours/container")]
    assert step.cwd == image


def test_a_step_that_cannot_run_here_says_why_and_fails_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.run(check.Step("a step", ["sh", "-c", f"echo no npm; exit {check.EXIT_SKIPPED}"]))
    assert capsys.readouterr().out.split() == ["skip", "a", "step", "no", "npm"]


def _npm(directory: Path, script: str) -> None:
    """A `node` that is too old and an `npm` that does what `script` says."""
    for name, text in (("node", "echo v18.1.0"), ("npm", script)):
        trees.write(directory / name, f"#!/bin/sh\n{text}\n")
        (directory / name).chmod(0o755)


def test_a_workspace_is_the_folder_with_its_packages_and_follows_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder.parent.parent
    for name in ("package.json", "package-lock.json"):
        trees.write(root / "tools/node" / name, "{}")
    installs = tmp_path / "installs"
    _npm(
        tmp_path / "bin",
        f"mkdir -p node_modules/node-here/bin && touch node_modules/node-here/bin/node; pwd >> {installs}",
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin:/bin")
    trees.write(folder / ".env", "KEY=secret")
    trees.write(folder / "node_modules/ours/index.js", "")
    copy = typescript.workspace(folder, root)
    assert (copy / "src/index.ts").read_bytes() == (folder / "src/index.ts").read_bytes()
    assert not (copy / ".env").exists()
    assert not (copy / "node_modules/ours").exists()

    (folder / "src/settings.json").unlink()
    trees.write(folder / "src/more.ts", "export {};\n")
    assert typescript.workspace(folder, root) == copy
    assert sorted(path.name for path in (copy / "src").iterdir()) == ["index.ts", "more.ts"]
    assert len(installs.read_text(encoding="utf-8").split()) == 2, "Node once, the folder's packages once"


def test_without_npm_it_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    for name in ("package.json", "package-lock.json"):
        trees.write(folder.parent.parent / "tools/node" / name, "{}")
    with pytest.raises(typescript.ToolchainMissing, match="npm is not installed"):
        typescript.workspace(folder, folder.parent.parent)


def test_an_install_that_fails_says_what_npm_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("package.json", "package-lock.json"):
        trees.write(folder.parent.parent / "tools/node" / name, "{}")
    _npm(tmp_path / "bin", "echo npm error network >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin:/bin")
    with pytest.raises(typescript.InstallFailed, match="npm error network"):
        typescript.workspace(folder, folder.parent.parent)
