"""`make sync` and its check: whatever is done to a vendored copy is found, and the message says how to mend it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools import trees
from tools import sync_shared


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A provider folder in a synced tree."""
    folder = trees.make(tmp_path)
    assert sync_shared.main(["--root", str(tmp_path)]) == 0
    return folder


def _root(folder: Path) -> Path:
    return folder.parent.parent


def _check(folder: Path) -> int:
    return sync_shared.main(["--check", "--root", str(_root(folder))])


def _edit_a_byte(folder: Path) -> None:
    copy = folder / "_shared/errors.py"
    copy.write_bytes(copy.read_bytes().replace(b"Broken", b"Brokem", 1))


def _truncate(folder: Path) -> None:
    copy = folder / "_shared/errors.py"
    copy.write_bytes(copy.read_bytes()[: -len(b"    pass\n")])


def _empty(folder: Path) -> None:
    (folder / "_shared/errors.py").write_bytes(b"")


def _append(folder: Path) -> None:
    copy = folder / "_shared/errors.py"
    copy.write_bytes(copy.read_bytes() + b"\n")


def _add_a_file(folder: Path) -> None:
    (folder / "_shared/helper.py").write_text("", encoding="utf-8")


def _add_a_data_file(folder: Path) -> None:
    (folder / "_shared/notes.txt").write_text("", encoding="utf-8")


def _add_a_directory(folder: Path) -> None:
    (folder / "_shared/inner").mkdir()


def _delete_a_file(folder: Path) -> None:
    (folder / "_shared/errors.py").unlink()


def _delete_the_package_file(folder: Path) -> None:
    (folder / "_shared/__init__.py").unlink()


def _delete_version(folder: Path) -> None:
    (folder / "_shared/VERSION").unlink()


def _edit_version(folder: Path) -> None:
    (folder / "_shared/VERSION").write_text("sandboxes 9.9.9\n", encoding="utf-8")


def _delete_everything(folder: Path) -> None:
    shutil.rmtree(folder / "_shared")


def _make_it_executable(folder: Path) -> None:
    (folder / "_shared/errors.py").chmod(0o755)


def _link_to_the_source(folder: Path) -> None:
    copy = folder / "_shared/errors.py"
    copy.unlink()
    copy.symlink_to(_root(folder) / "shared/errors.py")


def _link_the_directory(folder: Path) -> None:
    copies = folder / "_shared"
    copies.rename(folder.parent / "elsewhere")
    copies.symlink_to(folder.parent / "elsewhere")


def _replace_a_file_by_a_directory(folder: Path) -> None:
    (folder / "_shared/errors.py").unlink()
    (folder / "_shared/errors.py").mkdir()


def _edit_the_source(folder: Path) -> None:
    source = _root(folder) / "shared/errors.py"
    source.write_text(source.read_text(encoding="utf-8") + "\n\nclass Other(Exception):\n    pass\n", encoding="utf-8")


def _orphan(folder: Path) -> None:
    (_root(folder) / "shared/log.py").write_text("", encoding="utf-8")
    (folder / "_shared/log.py").write_text("", encoding="utf-8")


def _raise_the_version(folder: Path) -> None:
    project = _root(folder) / "pyproject.toml"
    project.write_text(project.read_text(encoding="utf-8").replace("1.2.3", "1.2.4"), encoding="utf-8")


def _edit_the_table(folder: Path) -> None:
    readme = folder / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("How long.", "How short."), encoding="utf-8")


ATTACKS = [
    _edit_a_byte,
    _truncate,
    _empty,
    _append,
    _add_a_file,
    _add_a_data_file,
    _add_a_directory,
    _delete_a_file,
    _delete_the_package_file,
    _delete_version,
    _edit_version,
    _delete_everything,
    _make_it_executable,
    _link_to_the_source,
    _link_the_directory,
    _replace_a_file_by_a_directory,
    _edit_the_source,
    _orphan,
    _raise_the_version,
    _edit_the_table,
]


def test_a_synced_tree_passes_in_silence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert _check(folder) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__.strip("_"))
def test_every_change_is_found_and_sync_mends_it(
    folder: Path, attack: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    attack(folder)
    before = sorted(folder.rglob("*"))

    assert _check(folder) == 1
    assert capsys.readouterr().err.endswith("Fix: make sync\n")
    assert sorted(folder.rglob("*")) == before, "the check changed the tree"

    assert sync_shared.main(["--root", str(_root(folder))]) == 0
    assert _check(folder) == 0
    assert not (folder / "_shared").is_symlink()


def test_copies_are_byte_identical(folder: Path) -> None:
    for name in ("__init__.py", "errors.py", "jobs.py", "settings.py"):
        assert (folder / "_shared" / name).read_bytes() == (_root(folder) / "shared" / name).read_bytes()


def test_an_executable_source_stays_executable(folder: Path) -> None:
    (_root(folder) / "shared/errors.py").chmod(0o755)
    assert _check(folder) == 1
    assert sync_shared.main(["--root", str(_root(folder))]) == 0
    assert (folder / "_shared/errors.py").stat().st_mode & 0o777 == 0o755


def test_a_stricter_umask_changes_nothing(folder: Path) -> None:
    (folder / "_shared/errors.py").chmod(0o600)
    assert _check(folder) == 0


def test_pythons_caches_are_not_judged(folder: Path) -> None:
    trees.write(folder / "_shared/__pycache__/errors.cpython-311.pyc", "")
    assert _check(folder) == 0


def test_version_is_the_same_for_the_same_sources(folder: Path) -> None:
    version = folder / "_shared/VERSION"
    first = version.read_bytes()
    shutil.rmtree(folder / "_shared")
    sync_shared.main(["--root", str(_root(folder))])
    assert version.read_bytes() == first
    assert first.startswith(b"sandboxes 1.2.3\nsha256 ")


def test_a_second_sync_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    sync_shared.main(["--root", str(_root(folder))])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("shared/jobs.py", "from .log import line\n"),
        ("shared/jobs.py", "from . import log\n"),
        ("shared/jobs.py", "def late():\n    from .log import line\n"),
        ("providers/mine/main.py", "from _shared.log import line\n"),
        ("providers/mine/main.py", "from _shared import log\n"),
        ("providers/mine/main.py", "import _shared.log\n"),
        ("providers/mine/api/index.py", "import _shared.log as log\n"),
    ],
)
def test_an_import_outside_the_vendored_set_is_found(
    folder: Path, where: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.write(_root(folder) / "shared/log.py", "line = str\n")
    trees.write(_root(folder) / where, text)
    assert sync_shared.main(["--root", str(_root(folder))]) == 1
    assert f"{where} imports log: add log.py to the manifest" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["absent.py", "../pyproject.toml", "/etc/passwd"])
def test_a_manifest_names_files_of_shared_only(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    project = folder / "pyproject.toml"
    project.write_text(project.read_text(encoding="utf-8").replace("errors.py", name), encoding="utf-8")
    assert _check(folder) == 1
    assert "is no file in shared/" in capsys.readouterr().err


def test_a_folder_without_a_manifest_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees.write(folder / "pyproject.toml", '[project]\nname = "mine"\n')
    assert _check(folder) == 1
    assert "[tool.sandboxes]" in capsys.readouterr().err
