"""The repository tests itself: what CONTRIBUTING promises about a folder, a README or a module is true of each one."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tools import settings_tables
from tools.sync_shared import ROOT, VENDORED, folders, is_python, own_modules, typescript_folders

HEADINGS = [
    "What you get",
    "Limits and cost",
    "Copy this folder",
    "Configure",
    "Deploy",
    "See it work",
    "Clean up",
    "How it works",
]
REQUIRED = [
    "README.md",
    "pyproject.toml",
    "uv.lock",
    ".env.example",
    ".gitignore",
    "py.typed",
    "sandbox.py",
    "_shared/VERSION",
]
REQUIRED_TYPESCRIPT = [
    "README.md",
    "package.json",
    "package-lock.json",
    "tsconfig.json",
    "biome.json",
    "wrangler.jsonc",
    "worker-configuration.d.ts",
    ".env.example",
    ".gitignore",
    "src/index.ts",
    "_shared/VERSION",
]
# What a shared module may import besides the standard library: the SDK, what it cannot run without, and what its
# `webhooks` extra brings.
SHARED_MAY_IMPORT = {"anthropic", "anyio", "standardwebhooks"}

TRACKED = subprocess.run(
    ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    capture_output=True,
    text=True,
    check=True,
).stdout.split("\0")
FILES = sorted(ROOT / name for name in TRACKED if name and (ROOT / name).is_file())
SOURCES = [path for path in FILES if path.suffix == ".py" and VENDORED not in path.parts]
SHARED = [path for path in SOURCES if path.parent == ROOT / "shared"]
CORE = [*SHARED, *(path for path in FILES if path.parent == ROOT / "shared/typescript")]
SHIPPED = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("shared", "providers", "tools")]
READMES = [path for path in FILES if path.suffix == ".md"]
FOLDERS = folders(ROOT)
TYPESCRIPT_FOLDERS = typescript_folders(ROOT)
ALL_FOLDERS = [*FOLDERS, *TYPESCRIPT_FOLDERS]


def _name(path: object) -> str | None:
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else None


def each(name: str, values: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, values, ids=_name)


def _where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def _nodes(paths: list[Path], wrong: Callable[[ast.AST], bool]) -> list[str]:
    return [_where(path, node) for path in paths for node in ast.walk(ast.parse(path.read_bytes())) if wrong(node)]


def test_every_directory_of_providers_is_a_folder() -> None:
    assert [path for path in ROOT.glob("providers/*") if path not in ALL_FOLDERS] == []


@each("folder", ALL_FOLDERS)
def test_a_folder_has_what_a_copy_needs(folder: Path) -> None:
    tracked = {path.relative_to(folder).as_posix() for path in FILES if path.is_relative_to(folder)}
    assert set(REQUIRED if is_python(folder) else REQUIRED_TYPESCRIPT) - tracked == set()


@each("folder", ALL_FOLDERS)
def test_a_copy_commits_no_secret_and_nothing_that_is_installed(folder: Path, tmp_path: Path) -> None:
    """Whoever copies a folder into a repository says `git add` there: our own .gitignore does not go along."""
    made = (
        [".venv/a.py"]
        if is_python(folder)
        else ["node_modules/a/a.js", ".dev.vars", ".dev.vars.staging", ".wrangler/a.sqlite"]
    )
    for name in [".env", ".env.local", ".env.production", ".env.example", *made]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".gitignore").write_bytes((folder / ".gitignore").read_bytes())
    environ = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for argv in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *argv], cwd=tmp_path, env=environ, check=True)
    added = subprocess.run(["git", "ls-files"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    assert added.stdout.split() == [".env.example", ".gitignore"]


@each("folder", ALL_FOLDERS)
def test_a_folder_is_tested_against_the_contract(folder: Path) -> None:
    modules = list((ROOT / "tests/providers").glob(f"test_{folder.name.replace('-', '_')}*.py"))
    assert any("tests.contract" in module.read_text(encoding="utf-8") for module in modules)


@each("folder", ALL_FOLDERS)
def test_a_folders_readme_has_the_eight_headings_in_order(folder: Path) -> None:
    text = _without_code((folder / "README.md").read_text(encoding="utf-8"))
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS


@each("folder", ALL_FOLDERS)
def test_quoted_log_lines_exist_in_the_code(folder: Path) -> None:
    section = (
        (folder / "README.md").read_text(encoding="utf-8").partition("\n## See it work\n")[2].partition("\n## ")[0]
    )
    actions = set(re.findall(r"\baction=(\w+)", section))
    events = set(re.findall(r'"event": ?"(\w+)"', section))
    sources = [path for path in FILES if path.is_relative_to(folder) and path.suffix in {".py", ".ts"}]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    logs = r"\b(?:line|log\.(?:info|warning|error))\(\s*\"(\w+)\""
    logged = set(re.findall(logs, code)) | set(re.findall(r"\baction=(\w+)", code))
    assert actions, "a README shows the log lines by which one sees it work"
    assert actions - logged == set()
    assert {event for event in events if f'"{event}"' not in code} == set()


@each("folder", ALL_FOLDERS)
def test_the_env_example_lists_the_settings(folder: Path) -> None:
    example = (folder / ".env.example").read_text(encoding="utf-8")
    names = re.findall(r"^(?:# ?)?([A-Z][A-Z0-9_]+)=", example, re.MULTILINE)
    assert sorted(names) == sorted(row.name for row in settings_tables.rows(ROOT, folder))


@each("page", [path for path in READMES if path.parent == ROOT / "docs"])
def test_a_page_of_docs_claims_what_a_test_shows_and_quotes_what_is_logged(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text))
    assert {f"{path}::{name}" for path, name in named if name not in _tests_in(ROOT / path)} == set()
    tables = re.findall(r"^\|.*\| Tests \|\n\| ---.*\n((?:\|.*\n?)+)", text, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert rows, "what a page claims stands in tables whose last column is Tests"
    assert [row for row in rows if "::test_" not in row.rsplit("|", 2)[1]] == []
    code = "\n".join(path.read_text(encoding="utf-8") for path in SHARED)
    logged = set(re.findall(r"\b(?:line|bug)\(\s*(?:_log, )?\"(\w+)\"", code)) | set(
        re.findall(r"outcome = \"(\w+)\" if .* else \"(\w+)\"", code)[0]
    )
    assert set(re.findall(r"\baction=(\w+)", text)) - logged == set()
    assert {event for event in re.findall(r"\"event\": \"(\w+)\"", text) if f'emit("{event}"' not in code} == set()


def _tests_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_bytes()) if path.is_file() else ast.Module([], [])
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


RULES = [*(f"P{number}" for number in range(1, 11)), *(f"R{number}" for number in range(1, 13))]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_found_by_its_number(rule: str) -> None:
    """In the code that keeps it, in a test of it, and in the page that explains them all."""
    named = re.compile(rf"\b{rule}\b")
    tests = [path for path in SOURCES if path.is_relative_to(ROOT / "tests") and path != Path(__file__).resolve()]
    assert [path.name for path in SHARED if named.search(path.read_text(encoding="utf-8"))]
    assert [path.name for path in tests if named.search(path.read_text(encoding="utf-8"))]
    assert f"\n| {rule} | " in (ROOT / "docs/lost-sessions.md").read_text(encoding="utf-8")


@each("readme", READMES)
def test_relative_links_resolve(readme: Path) -> None:
    text = _without_code(readme.read_text(encoding="utf-8"))
    broken = [target for target in _links(text) if not _resolves(readme, target)]
    assert broken == []


def _without_code(markdown: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", markdown, flags=re.MULTILINE | re.DOTALL)


def _links(markdown: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", markdown):
        if not re.match(r"[a-z]+:", target):
            yield target


def _resolves(readme: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = (readme.parent / path).resolve() if path else readme
    if not (file.is_relative_to(ROOT) and file.exists()):
        return False
    return not anchor or anchor in _anchors(file)


def _anchors(file: Path) -> set[str]:
    """The anchors of a file's headings, as the usual forges make them."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_nothing_is_left_for_later() -> None:
    later = re.compile(r"\b(TO" r"DO|FIX" r"ME)\b")
    texts = [path for path in FILES if path.suffix in {".py", ".md", ".toml", ".sh", ".ts", ".mjs"}]
    assert [_name(path) for path in texts if later.search(path.read_text(encoding="utf-8"))] == []


def test_hand_written_files_name_no_package_registry() -> None:
    hosts = re.compile(r"\b(py" r"pi\.org|python" r"hosted\.org|registry\.np" r"mjs\.org)\b")
    texts = [path for path in FILES if path.name not in {"uv.lock", "package-lock.json"}]
    assert [_name(path) for path in texts if hosts.search(path.read_text(encoding="utf-8", errors="replace"))] == []


def test_no_exception_is_caught_unnamed() -> None:
    def broad(node: ast.AST) -> bool:
        if not isinstance(node, ast.ExceptHandler):
            return False
        if isinstance(last := node.body[-1], ast.Raise) and last.exc is None:
            return False  # it cleans up and lets everything through
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        return any(kind is None or ast.unparse(kind) in {"Exception", "BaseException"} for kind in caught)

    assert _nodes(SHIPPED, broad) == []


# Entry points of a folder: what a host, a platform or a sandbox starts, and the example of a tool with a secret.
READS_ENVIRONMENT = {
    *("main.py", "app.py", "bake.py", "sandbox_init.py", "inventory.py", "on_work.py", "start.py", "ant_runner.py"),
}


def _may_read_the_environment(path: Path) -> bool:
    inside = path.relative_to(ROOT)
    if inside.parts[0] == "shared":
        starts = {"settings.py", "sandbox_runner.py", "server.py", "worker.py"}
        return inside.name in starts or inside.name.startswith("runner_")
    return inside.parts[0] == "tools" or inside.name in READS_ENVIRONMENT


def test_the_environment_is_read_in_few_places() -> None:
    names = {"environ", "environb", "getenv", "getenvb"}

    def reads(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute):
            return node.attr in names and ast.unparse(node.value) == "os"
        return isinstance(node, ast.ImportFrom) and node.module == "os" and bool({a.name for a in node.names} & names)

    assert _nodes([path for path in SHIPPED if not _may_read_the_environment(path)], reads) == []


def test_only_command_lines_and_the_runner_print() -> None:
    def prints(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func) in {"print", "sys.stdout.write"}

    silent = [path for path in SHIPPED if not (_may_read_the_environment(path) and path.name != "settings.py")]
    assert _nodes(silent, prints) == []


def test_the_core_knows_no_provider() -> None:
    names = {folder.name for folder in ALL_FOLDERS} - {"local"} | {"modal", "vercel", "daytona", "cloudflare", "docker"}
    known = re.compile(rf"\b({'|'.join(sorted(names))})\b", re.IGNORECASE)
    assert [_name(path) for path in CORE if known.search(path.read_text(encoding="utf-8"))] == []
    assert [_name(path) for path in CORE if re.search(r"providers[./]", path.read_text(encoding="utf-8"))] == []


def test_the_core_imports_little() -> None:
    def foreign(node: ast.AST) -> bool:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                return node.level > 1
            modules = [node.module or ""]
        else:
            return False
        return any(name.partition(".")[0] not in sys.stdlib_module_names | SHARED_MAY_IMPORT for name in modules)

    assert _nodes([path for path in SHARED if path.name != "server.py"], foreign) == []  # that one is a web server


# Imports each module once with everything it imports already loaded; what then still happens, its own lines do. Each in
# a process of its own, which is a fork: what they all import takes a second to load.
_IMPORTS = """
import importlib, os, sys
sys.path.insert(0, sys.argv[1])
names = ["shared." + name for name in sys.argv[2:]]
for name in names:
    importlib.import_module(name)
for loaded in [m for m in sys.modules if m.partition(".")[0] == "shared"]:
    del sys.modules[loaded]
def watch(event, args):
    own_file = event == "open" and str(args[0]).endswith((".py", ".pyc"))
    if not own_file and event.split(".")[0] in {"open", "socket", "subprocess", "_thread", "ctypes"}:
        sys.exit(f"{name}: {event} {args}")
    if event in {"os.fork", "os.mkdir", "os.remove", "os.putenv", "os.system"}:
        sys.exit(f"{name}: {event} {args}")
class Environment(dict):
    def read(self, *args): sys.exit(f"{name}: the environment is read")
    __getitem__ = __contains__ = __iter__ = get = items = copy = read
for name in names:
    if not (child := os.fork()):
        os.environ = Environment()
        sys.addaudithook(watch)
        importlib.import_module(name)
        os._exit(0)
    if not os.waitpid(child, 0)[1]:
        print(name)
"""


def test_importing_the_core_reads_and_builds_nothing() -> None:
    modules = [path.stem for path in SHARED]
    run = subprocess.run(
        [sys.executable, "-I", "-B", "-c", _IMPORTS, str(ROOT), *modules], capture_output=True, text=True, check=False
    )
    assert run.stderr == ""
    assert run.stdout.split() == [f"shared.{name}" for name in modules]


def test_own_modules_are_those_that_are_tracked() -> None:
    for folder in FOLDERS:
        assert set(own_modules(folder)) == {path for path in SOURCES if path.is_relative_to(folder)}


def test_make_alone_lists_every_target() -> None:
    targets = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[0].split()
    printed = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    assert sorted(re.findall(r"^  make (\S+) +\S", printed, re.MULTILINE)) == sorted(targets)


def test_ci_runs_what_everybody_runs() -> None:
    assert re.findall(r"^make (\w+)", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE) == ["check", "test"]


def test_scripts_parse() -> None:
    for script in ["tools/venv.sh", "tools/ci_setup.sh", "tools/docker_engine.sh", ".ci/run"]:
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
