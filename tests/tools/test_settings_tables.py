"""The settings tables: what a README says is what the dataclasses read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools import trees
from tools import settings_tables, sync_shared

TABLE = """\
<!-- settings:begin -->
| Setting | Default | Meaning |
| --- | --- | --- |
| `MINE_TOKEN` | required | The account's token. |
| `BASE_URL` | `https://api.example` | The API \\| as the host reaches it. |
| `WAIT_SECONDS` | `60` | How long. |
| `KEEP_SECONDS` | `604800` | How long to keep. |
| `LOUD` | `false` | Whether. |
| `TOOLS` |  | Which. The old name `OLD_TOOLS` still works, with a warning. |
<!-- settings:end -->
"""


def test_the_table_holds_the_shared_settings_and_the_folders_own(tmp_path: Path) -> None:
    folder = trees.make(tmp_path)
    sync_shared.main(["--root", str(tmp_path)])
    assert (folder / "README.md").read_text(encoding="utf-8") == f"# Mine\n\n{TABLE}\nThe end.\n"


def test_loading_leaves_no_trace_in_the_folder(tmp_path: Path) -> None:
    folder = trees.make(tmp_path)
    sync_shared.main(["--root", str(tmp_path)])
    assert not list(folder.rglob("__pycache__"))


@pytest.mark.parametrize(
    "readme",
    ["no markers", "<!-- settings:begin -->", "<!-- settings:end --> <!-- settings:begin -->", TABLE + TABLE],
)
def test_a_readme_without_its_two_markers_is_refused(
    tmp_path: Path, readme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.write(trees.make(tmp_path) / "README.md", readme)
    assert sync_shared.main(["--root", str(tmp_path)]) == 1
    assert "once each" in capsys.readouterr().err


def test_a_folder_that_cannot_be_imported_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trees.make(tmp_path)
    trees.write(folder / "sandbox.py", "import a_vendors_sdk\nsetting()\n")
    assert sync_shared.main(["--root", str(tmp_path)]) == 1
    assert "providers/mine: its settings cannot be loaded: ModuleNotFoundError" in capsys.readouterr().err


def test_rows_name_what_is_required(tmp_path: Path) -> None:
    folder = trees.make(tmp_path)
    sync_shared.main(["--root", str(tmp_path)])
    assert [row.name for row in settings_tables.rows(tmp_path, folder) if row.required] == ["MINE_TOKEN"]
