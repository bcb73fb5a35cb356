"""The local provider's sandboxes, with real bubblewrap and real processes; only the runner is a stand-in."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.providers.local_support import (
    LOCAL,
    PATIENCE_SECONDS,
    PROBLEM,
    RUNNER,
    Sandboxes,
    both,
    needs_bubblewrap,
    processes,
    read_all,
    until,
)

LaunchFailed = LOCAL.shared("errors").LaunchFailed
SettingsError = LOCAL.shared("errors").SettingsError

PYTHON = os.path.abspath(sys.executable)  # as it can be named in a sandbox
PREFIXES = LOCAL.module("bubblewrap").python_prefixes(sys.executable)


@pytest.fixture
def isolation() -> str:
    return "bubblewrap"


@pytest.fixture
def options() -> dict[str, Any]:
    return {}


@pytest.fixture
async def sandboxes(tmp_path: Path, isolation: str, options: dict[str, Any]) -> AsyncIterator[Sandboxes]:
    made = Sandboxes(tmp_path / "root", tmp_path / "runner", isolation=isolation, **options)
    yield made
    await made.provider.close()


def with_options(**options: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("options", [options], ids=[",".join(options)])


# --- isolation -------------------------------------------------------------------------------------------------------


@needs_bubblewrap
async def test_a_sandbox_sees_neither_other_sessions_nor_the_machines_files(
    sandboxes: Sandboxes, tmp_path: Path
) -> None:
    secret = f"secret-{uuid.uuid4().hex}"
    (tmp_path / secret).write_text("of the host")
    await sandboxes.run("sesn_other", f"echo of the other > {secret}")
    found, root, homes = await sandboxes.run(
        "sesn_1",
        f"find / -name {secret} 2>/dev/null; cat {tmp_path}/{secret}",
        "ls -A /",
        "ls -A /home /root 2>/dev/null",
    )
    assert found == f"cat: {tmp_path}/{secret}: No such file or directory\n"
    own = {"bin", "dev", "etc", "home", "lib", "lib32", "lib64", "libx32", "nix", "opt", "proc", "root", "run", "sbin"}
    shown = {path.parts[1] for path in PREFIXES}
    assert set(root.split()) - shown <= own | {"tmp", "usr", "workspace"}
    assert set(homes.split()) <= {"/home:", "/root:", "sandbox", *(part for path in PREFIXES for part in path.parts)}


@needs_bubblewrap
async def test_a_sandbox_sees_no_process_but_its_own(sandboxes: Sandboxes) -> None:
    (seen,) = await sandboxes.run("sesn_1", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert "pytest" not in seen
    assert "sandbox_init.py" in seen


@needs_bubblewrap
async def test_a_sandbox_is_nobody_on_this_machine(sandboxes: Sandboxes, tmp_path: Path) -> None:
    uid, groups, capabilities, kernel, namespace, children = await sandboxes.run(
        "sesn_1",
        "id -u; touch mine",
        "id -G",
        "grep -E 'Cap(Prm|Eff|Amb)|NoNewPrivs' /proc/self/status",
        "for f in /proc/sys/kernel/core_pattern /proc/sysrq-trigger /etc/hosts /usr/x /x /dev/x; do"
        " test -w $f && echo $f; (: > $f) 2>/dev/null && echo $f; done; true",
        "unshare --user true 2>&1",
        f"{PYTHON} -I -c 'import os, threading; threading.Thread(target=os.system, args=[\"id\"]).start()'",
    )
    assert int(uid) >= 10_001
    assert groups == uid
    assert capabilities.count("0000000000000000") == 3
    assert "NoNewPrivs:\t1" in capabilities
    assert kernel == ""
    assert "Operation not permitted" in namespace
    assert children.startswith(f"uid={uid.strip()}")  # and what is no namespace works: threads, processes
    # Root's sandboxes are not even on the host root's.
    owner = (tmp_path / "root/sesn_1/workspace/mine").stat().st_uid
    assert owner == (int(uid) if os.geteuid() == 0 else os.geteuid())


@both
async def test_a_runner_gets_nothing_of_the_hosts_environment(
    sandboxes: Sandboxes, isolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTS_SECRET", "hosts-secret-value")
    own, every = await sandboxes.run("sesn_1", "env", "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'")
    names = {line.partition("=")[0] for line in own.splitlines()} - {"_", "PWD", "SHLVL"}
    assert names == {"HOME", "LANG", "PATH", "SANDBOX_STATE_DIR", "SANDBOX_WORKDIR"}
    if isolation == "bubblewrap":
        assert "hosts-secret-value" not in every


@both
async def test_a_job_is_in_no_environment_no_argument_and_on_no_disk(sandboxes: Sandboxes, tmp_path: Path) -> None:
    secret = uuid.uuid4().hex
    sandbox, _ = await sandboxes.begin("sesn_1", "true", secret=secret, linger=True)
    assert processes(str(sandboxes.root)), "nothing runs, so nothing could leak"
    for name in ("cmdline", "environ"):
        assert [pid for pid, text in read_all(name).items() if secret.encode() in text] == []
    assert _files_with(secret.encode(), tmp_path) == []
    assert secret not in await sandbox.tail(1000)


def _files_with(text: bytes, directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and text in path.read_bytes()]


@needs_bubblewrap
async def test_init_cannot_be_looked_into(sandboxes: Sandboxes) -> None:
    look = "for f in environ mem maps fd/0 fd/7; do cat /proc/1/$f >/dev/null 2>&1 && echo $f; done; ls /proc/1/fd"
    (looked,) = await sandboxes.run("sesn_1", look)
    assert looked.splitlines()[:-1] == []
    assert "Permission denied" in looked


@needs_bubblewrap
async def test_a_runner_is_hidden_before_it_hides_itself(sandboxes: Sandboxes) -> None:
    """This one never does."""
    look = "for f in environ mem fd/0; do cat /proc/$PPID/$f >/dev/null 2>&1 && echo $f; done; ls /proc/$PPID/fd"
    (looked,) = await sandboxes.run("sesn_1", look)
    assert looked.splitlines()[:-1] == []
    assert "Permission denied" in looked


@both
async def test_a_runner_inherits_its_two_pipes_and_nothing_else(sandboxes: Sandboxes) -> None:
    (files,) = await sandboxes.run("sesn_1", list_open=True)
    held = dict(line.split(" ", 1) for line in files.splitlines())
    assert {number: where.partition(":")[0] for number, where in held.items()} == dict.fromkeys("012", "pipe")
    assert held["1"] == held["2"] != held["0"]


@needs_bubblewrap
async def test_an_agent_cannot_lock_its_session_out(sandboxes: Sandboxes) -> None:
    await sandboxes.run("sesn_1", "echo kept > file; chmod 000 /workspace /home/sandbox")
    await sandboxes.provider.close()
    assert await sandboxes.run("sesn_1", "cat file") == ["kept\n"]


# --- limits ----------------------------------------------------------------------------------------------------------


@both
@with_options(memory_mb=200)
async def test_a_process_gets_no_more_memory_than_the_limit(sandboxes: Sandboxes) -> None:
    take = f"{PYTHON} -c 'print(len(bytearray(%d << 20)))'"
    allowed, refused = await sandboxes.run("sesn_1", take % 100, take % 300)
    assert allowed == f"{100 << 20}\n"
    assert "MemoryError" in refused


@needs_bubblewrap
@with_options(memory_mb=64)
async def test_what_is_written_to_memory_is_limited(sandboxes: Sandboxes) -> None:
    places = ("/tmp/x", "/run/x", "/dev/shm/x")
    for out in await sandboxes.run("sesn_1", *(f"head -c 70M /dev/zero > {place}; rm {place}" for place in places)):
        assert "No space left" in out


@needs_bubblewrap
@with_options(pids=40)
async def test_a_sandbox_has_no_more_processes_than_the_limit(sandboxes: Sandboxes) -> None:
    many = "import subprocess\nfor _ in range(60): subprocess.Popen(['sleep', '60'])"
    other, bomb = await asyncio.gather(
        sandboxes.run("sesn_other", "sleep 1; echo fine"), sandboxes.run("sesn_1", f'{PYTHON} -c "{many}"')
    )
    assert "Resource temporarily unavailable" in bomb[0]
    assert other == ["fine\n"]  # the limit is the sandbox's, not shared by all
    await until(lambda: "ended with 0" in (sandboxes.root / "sesn_1" / "runner.log").read_text())
    assert await sandboxes.run("sesn_1", "echo fine") == ["fine\n"]  # and its processes went with their runner


@both
@with_options(file_mb=1)
async def test_a_file_gets_no_larger_than_the_limit(sandboxes: Sandboxes) -> None:
    (out,) = await sandboxes.run("sesn_1", "head -c 2M /dev/zero > file; stat -c %s file")
    assert out.endswith(f"{1 << 20}\n")


@both
async def test_the_log_is_limited_and_nobody_needs_to_read_it(sandboxes: Sandboxes) -> None:
    sandboxes.runner.write_text(
        "print('{\"event\": \"ready\"}', flush=True); print('x' * (3 << 20), flush=True); open('done', 'x')"
    )
    sandbox = await sandboxes.provider.acquire("sesn_1")
    await sandbox.start(sandboxes.launch({}))
    await until((sandboxes.root / "sesn_1" / "workspace" / "done").exists)
    assert (sandboxes.root / "sesn_1" / "runner.log").stat().st_size <= 1 << 20


# --- acquire and start -----------------------------------------------------------------------------------------------


@both
async def test_ten_acquires_of_two_hosts_make_one_sandbox(sandboxes: Sandboxes, tmp_path: Path, isolation: str) -> None:
    rival = Sandboxes(sandboxes.root, tmp_path / "runner", isolation=isolation)
    hosts = [sandboxes, rival] * 5
    found = await asyncio.gather(*(host.provider.acquire("sesn_1") for host in hosts))
    assert sorted(sandbox.created for sandbox in found) == [False] * 9 + [True]
    watchers = [*sandboxes.provider._watchers, *rival.provider._watchers]
    assert len(watchers) == 1
    await sandboxes.provider.close()
    await rival.provider.close()


ACQUIRE = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import sandbox

async def main():
    provider = sandbox.LocalProvider(Path(sys.argv[2]), isolation=sys.argv[3])
    print("loaded", flush=True)
    sys.stdin.readline()
    print((await provider.acquire("sesn_1")).created, flush=True)
    sys.stdin.readline()
    await provider.close()

asyncio.run(main())
"""


@both
def test_acquires_of_several_processes_make_one_sandbox(tmp_path: Path, isolation: str) -> None:
    arguments = [str(LOCAL.path), str(tmp_path / "root"), isolation]
    hosts = [_host([sys.executable, "-c", ACQUIRE, *arguments], "loaded\n") for _ in range(4)]
    for host in hosts:
        _tell(host)
    created = [_line(host) for host in hosts]
    assert sorted(created) == ["False\n"] * 3 + ["True\n"]
    assert len(processes(str(tmp_path / "root/sesn_1"))) == 1
    for host in hosts:
        host.communicate("\n", timeout=PATIENCE_SECONDS)
    assert processes(str(tmp_path / "root")) == []


@both
async def test_the_next_acquire_finds_the_files_running_or_not(sandboxes: Sandboxes) -> None:
    await sandboxes.run("sesn_1", "echo kept > file; echo kept > ~/other")
    assert await sandboxes.run("sesn_1", "cat file ~/other") == ["kept\nkept\n"]
    await sandboxes.provider.close()
    (info,) = await sandboxes.infos()
    assert (info.session_id, info.running) == ("sesn_1", False)
    assert not (await sandboxes.provider.acquire("sesn_1")).created
    assert await sandboxes.run("sesn_1", "cat file ~/other") == ["kept\nkept\n"]


@both
async def test_any_session_id_and_any_root_will_do(tmp_path: Path, isolation: str) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    sandboxes = Sandboxes(deep, tmp_path / "runner", isolation=isolation)
    assert await sandboxes.run("s" * 128, "echo fine") == ["fine\n"]
    await sandboxes.provider.close()


@both
async def test_a_python_named_by_a_detour_will_do(tmp_path: Path, isolation: str) -> None:
    python = f"{tmp_path}/{'../' * len(tmp_path.parts[1:])}{PYTHON[1:]}"
    sandboxes = Sandboxes(tmp_path / "root", tmp_path / "runner", isolation=isolation, python=python)
    assert await sandboxes.run("sesn_1", "echo fine") == ["fine\n"]
    await sandboxes.provider.close()
    assert isolation == "none" or LOCAL.module("bubblewrap").problem(python) is None


@pytest.mark.parametrize("session_id", ["", ".", "..", "../sesn_1", "a/b", "-x", "s" * 129, "sesn_1\n"])
async def test_a_session_id_that_is_no_name_is_refused(sandboxes: Sandboxes, session_id: str) -> None:
    with pytest.raises(LaunchFailed) as failed:
        await sandboxes.provider.acquire(session_id)
    assert not failed.value.retriable
    await sandboxes.provider.release(session_id)
    assert not sandboxes.root.exists()


@both
async def test_files_are_put_in_place_whatever_the_agent_left_there(sandboxes: Sandboxes, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    await sandboxes.run("sesn_1", f"mkfifo pipe; ln -s {outside} link; mkdir dir")
    put = {"pipe": b"1", "link": b"2", "dir/new/file": b"3"}
    assert await sandboxes.run("sesn_1", "cat pipe link dir/new/file", files=put) == ["123"]
    assert outside.read_text() == "untouched"


@both
@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x"])
async def test_files_outside_the_workspace_are_refused(sandboxes: Sandboxes, path: str) -> None:
    with pytest.raises(LaunchFailed, match="not below the working directory"):
        await sandboxes.begin("sesn_1", files={path: b"x"})


@both
async def test_a_runner_that_fails_is_told_with_its_last_words(sandboxes: Sandboxes) -> None:
    sandbox = await sandboxes.provider.acquire("sesn_1")
    with pytest.raises(LaunchFailed, match=r"ended before it was ready: json\.decoder\.JSONDecodeError") as failed:
        await sandbox.start(sandboxes.launch(b"no json"))
    assert failed.value.retriable
    assert "Traceback" in await sandbox.tail(100)


@both
async def test_a_runner_that_is_killed_is_told(sandboxes: Sandboxes) -> None:
    sandboxes.runner.write_text("import os; os.kill(os.getpid(), 9)")
    sandbox = await sandboxes.provider.acquire("sesn_1")
    with pytest.raises(LaunchFailed, match="killed by SIGKILL"):
        await sandbox.start(sandboxes.launch({}))


@both
async def test_a_large_job_and_a_runner_that_does_not_read_it(sandboxes: Sandboxes) -> None:
    assert await sandboxes.run("sesn_1", "true", filler="x" * 1_000_000) == [""]
    sandboxes.runner.write_text('print(\'{"event": "exit", "code": 0}\')')
    sandbox = await sandboxes.provider.acquire("sesn_1")
    assert (await sandbox.start(sandboxes.launch(b"x" * 1_000_000))).outcome == "not_needed"


@both
async def test_a_start_that_is_given_up_leaves_the_runner_to_its_work(sandboxes: Sandboxes) -> None:
    sandboxes.runner.write_text(
        "import sys, time, pathlib\n"
        "pathlib.Path('begun').touch()\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.02)\n"
        "print('x' * 500_000, flush=True); pathlib.Path('done').touch()"
    )
    workspace = sandboxes.root / "sesn_1" / "workspace"
    sandbox = await sandboxes.provider.acquire("sesn_1")
    starting = asyncio.create_task(sandbox.start(sandboxes.launch({})))
    await until((workspace / "begun").exists)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    (workspace / "go").touch()
    await until((workspace / "done").exists)


@both
async def test_a_sandbox_that_vanished_is_started_again(sandboxes: Sandboxes) -> None:
    sandbox = await sandboxes.provider.acquire("sesn_1")
    (init,) = await _inits(sandboxes)
    os.kill(init, signal.SIGKILL)
    await until(lambda: not sandboxes.provider._watchers)
    with pytest.raises(LaunchFailed) as failed:
        await sandbox.start(sandboxes.launch({}))
    assert failed.value.retriable
    assert await sandboxes.run("sesn_1", "echo back") == ["back\n"]


async def _inits(sandboxes: Sandboxes) -> list[int]:
    """The pids of the processes that answer below the root, as this machine counts them."""
    found = []
    for directory in sandboxes.root.iterdir():
        place = LOCAL.module("session").Session(directory)
        async with place.connected() as (_, writer):
            found.append(LOCAL.module("session").peer(writer.get_extra_info("socket")))
    return found


# --- the end ---------------------------------------------------------------------------------------------------------


@both
async def test_what_a_runner_leaves_behind_ends_with_it(sandboxes: Sandboxes) -> None:
    marker = f"77{uuid.uuid4().int % 10**6}"
    await sandboxes.run("sesn_1", f"setsid nohup sleep {marker} >/dev/null 2>&1 & (sleep {marker} &) ; true")
    await until(lambda: not processes(f"sleep\0{marker}"))
    (info,) = await sandboxes.infos()
    assert info.running


@both
async def test_a_live_runners_processes_survive_the_end_of_another(sandboxes: Sandboxes) -> None:
    marker = f"78{uuid.uuid4().int % 10**6}"
    await sandboxes.begin("sesn_1", f"setsid sleep {marker}", linger=True)
    await until(lambda: processes(f"sleep\0{marker}"))
    await sandboxes.begin("sesn_1", "true")
    await until(lambda: "ended with 0" in (sandboxes.root / "sesn_1" / "runner.log").read_text())
    assert processes(f"sleep\0{marker}")


@both
@with_options(keep_warm_seconds=0.3)
async def test_an_unused_sandbox_ends_and_its_files_stay(sandboxes: Sandboxes) -> None:
    await sandboxes.run("sesn_1", "echo kept > file")
    await until(lambda: not sandboxes.provider._watchers)
    (info,) = await sandboxes.infos()
    assert not info.running
    assert info.last_used_at >= info.created_at
    assert (sandboxes.root / "sesn_1" / "workspace" / "file").read_text() == "kept\n"


@both
@with_options(keep_warm_seconds=0.1)
async def test_a_renewed_sandbox_stays(sandboxes: Sandboxes) -> None:
    sandbox, _ = await sandboxes.begin("sesn_1", "while ! test -e go; do sleep 0.02; done")
    await sandboxes.provider.renew(sandbox.id, 3600)  # while it serves: nothing to extend
    (sandboxes.root / "sesn_1" / "workspace" / "go").touch()
    await until(lambda: not sandboxes.provider._watchers)
    await sandboxes.provider.acquire("sesn_1")
    await sandboxes.provider.renew("sesn_1", 3600)
    await asyncio.sleep(0.5)
    (info,) = await sandboxes.infos()
    assert info.running
    await sandboxes.provider.renew("sesn_unknown", 3600)


@both
async def test_close_lets_runners_hand_over_and_leaves_no_process(sandboxes: Sandboxes) -> None:
    marker = f"79{uuid.uuid4().int % 10**6}"
    await sandboxes.begin("sesn_1", f"setsid sleep {marker}", linger=True)
    await sandboxes.begin("sesn_2", "true", linger=True)
    await sandboxes.provider.close()
    assert processes(str(sandboxes.root)) == []
    assert processes(f"sleep\0{marker}") == []
    for session_id in ("sesn_1", "sesn_2"):
        assert (sandboxes.root / session_id / "workspace" / "handed-over").exists()


@needs_bubblewrap
@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "KILL", "STOP"])
async def test_an_agent_that_signals_init_ends_its_own_sandbox_in_order_at_most(
    sandboxes: Sandboxes, name: str
) -> None:
    sandbox, _ = await sandboxes.begin("sesn_1", f"kill -{name} 1", linger=True)
    if name in ("KILL", "STOP"):  # the kernel keeps these from process 1
        assert await sandboxes.run("sesn_1", "echo alive") == ["alive\n"]
    else:
        await until((sandboxes.root / "sesn_1" / "workspace" / "handed-over").exists)
        await until(lambda: not sandboxes.provider._watchers)
        assert await sandboxes.run("sesn_1", "echo again") == ["again\n"]
    assert name in ("KILL", "STOP") or f"SIG{name}" in await sandbox.tail(100)


@both
@with_options(grace_seconds=0.5)
async def test_close_ends_a_runner_that_will_not_leave(sandboxes: Sandboxes) -> None:
    await sandboxes.begin("sesn_1", "true", linger=True, stubborn=True)
    await sandboxes.provider.close()
    assert processes(str(sandboxes.root)) == []
    assert not sandboxes.provider._watchers


@both
@with_options(grace_seconds=1.0)
async def test_an_acquire_during_the_end_waits_for_it(sandboxes: Sandboxes) -> None:
    await sandboxes.begin("sesn_1", "echo kept > file", linger=True, stubborn=True)
    closing = asyncio.create_task(sandboxes.provider.close())
    await until(lambda: "stopped by a host" in (sandboxes.root / "sesn_1" / "runner.log").read_text())
    assert await sandboxes.run("sesn_1", "cat file") == ["kept\n"]
    await closing


@both
async def test_release_deletes_the_session_and_nothing_else(sandboxes: Sandboxes, tmp_path: Path) -> None:
    bystander = tmp_path / "bystander"
    bystander.mkdir(mode=0o750)
    (bystander / "file").touch()
    await sandboxes.run("sesn_1", f"ln -s {bystander} link; mkdir -p a/b; touch a/b/c; chmod 000 a/b a")
    await sandboxes.run("sesn_2", "true")
    await sandboxes.provider.release("sesn_1")
    await sandboxes.provider.release("sesn_1")
    await sandboxes.provider.release("sesn_unknown")
    assert os.listdir(sandboxes.root) == ["sesn_2"]
    assert (bystander / "file").exists()
    assert bystander.stat().st_mode & 0o777 == 0o750
    assert [info.session_id for info in await sandboxes.infos()] == ["sesn_2"]


@both
async def test_release_deletes_what_an_agent_made_hard_to_delete(sandboxes: Sandboxes) -> None:
    deep = "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')"
    await sandboxes.run("sesn_1", f'{PYTHON} -c "{deep}"; mkdir -p shut/shut; chmod 000 shut/shut shut')
    await sandboxes.provider.release("sesn_1")
    assert os.listdir(sandboxes.root) == []


async def test_what_a_killed_release_left_is_no_sandbox_and_goes_with_the_next(sandboxes: Sandboxes) -> None:
    left = sandboxes.root / ".released-0123"
    (left / "workspace").mkdir(parents=True)
    await sandboxes.run("sesn_1", "true")
    assert [info.session_id for info in await sandboxes.infos()] == ["sesn_1"]
    await sandboxes.provider.release("sesn_1")
    assert os.listdir(sandboxes.root) == []


@both
async def test_release_and_acquire_at_once_end_with_a_sandbox_that_works(sandboxes: Sandboxes) -> None:
    for _ in range(5):
        await sandboxes.run("sesn_1", "touch old")
        _, out = await asyncio.gather(sandboxes.provider.release("sesn_1"), _retried(sandboxes))
        assert out in (["fine\n"], ["fine\nold\n"])
    await sandboxes.provider.release("sesn_1")
    assert os.listdir(sandboxes.root) == []


async def _retried(sandboxes: Sandboxes) -> list[str]:
    while True:
        try:
            sandbox = await sandboxes.provider.acquire("sesn_1")
            await sandbox.start(sandboxes.launch({"run": "x", "commands": ["true"]}))
            return await sandboxes.run("sesn_1", "echo fine; ls")
        except LaunchFailed as error:
            if not error.retriable:
                raise


HOST = """
import asyncio, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import sandbox
from _shared.provider import Launch

async def main():
    provider = sandbox.LocalProvider(Path(sys.argv[2]), isolation=sys.argv[3], runner=Path(sys.argv[4]))
    command = f"setsid sleep {sys.argv[5]} & sleep 0.1; id -u; ulimit -u; touch /x /dev/x; unshare -U true"
    job = {"run": "1", "commands": [command], "linger": True}
    found = await provider.acquire("sesn_1")
    print((await found.start(Launch(json.dumps(job).encode()))).outcome, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def _host(argv: list[str], ready: str, **options: Any) -> subprocess.Popen[str]:
    """A host process of its own, that has said `ready`."""
    host = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
    assert _line(host) == ready
    return host


def _line(host: subprocess.Popen[str]) -> str:
    assert host.stdout is not None
    return host.stdout.readline()


def _tell(host: subprocess.Popen[str]) -> None:
    assert host.stdin is not None
    host.stdin.write("\n")
    host.stdin.flush()


def _is_recent(python: str) -> bool:
    done = subprocess.run([python, "-c", "import sys; assert sys.version_info >= (3, 11)"], capture_output=True)
    return done.returncode == 0


@both
async def test_a_host_killed_leaves_no_process(tmp_path: Path, isolation: str) -> None:
    marker = f"76{uuid.uuid4().int % 10**6}"
    sandboxes = Sandboxes(tmp_path / "root", tmp_path / "runner", isolation=isolation)
    arguments = [str(LOCAL.path), str(sandboxes.root), isolation, str(sandboxes.runner), marker]
    with _host([sys.executable, "-c", HOST, *arguments], "ready\n") as host:
        await until(lambda: processes(f"sleep\0{marker}"))
        host.kill()
    await until(lambda: not processes(f"sleep\0{marker}") and not processes(str(sandboxes.root)))
    assert (sandboxes.root / "sesn_1" / "workspace" / "handed-over").exists()


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that an ordinary user can get to; pytest's are root's alone."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o777)
        yield path


@needs_bubblewrap
async def test_an_ordinary_user_needs_no_root(open_to_all: Path) -> None:
    """Also when the tests run as root: everybody else's way is a user namespace."""
    folder = open_to_all / "folder"
    (folder / "_shared").mkdir(parents=True)
    for file in [*LOCAL.path.glob("*.py"), *LOCAL.path.glob("_shared/*.py")]:
        (folder / file.relative_to(LOCAL.path)).write_bytes(file.read_bytes())
    runner = open_to_all / "runner"
    runner.mkdir()
    (runner / RUNNER.name).write_bytes(RUNNER.read_bytes())
    is_root = os.geteuid() == 0
    python = "/usr/bin/python3" if is_root else sys.executable
    user: dict[str, Any] = {"user": 12345, "group": 12345, "extra_groups": []} if is_root else {}
    if not _is_recent(python):
        pytest.skip("needs a Python 3.11 in /usr/bin, where an ordinary user can run it")
    root, marker = open_to_all / "root", f"75{uuid.uuid4().int % 10**6}"
    arguments = [str(folder), str(root), "bubblewrap", str(runner / RUNNER.name), marker]
    with _host([python, "-c", HOST, *arguments], "ready\n", **user) as host:
        try:
            log = root / "sesn_1" / "runner.log"
            await until(lambda: '"done"' in log.read_text().rpartition("\n")[0])
            (done,) = [json.loads(line) for line in log.read_text().splitlines() if '"done"' in line]
            (out,) = done["out"]
            assert out.startswith("10001\n256\n")
            assert out.count("Read-only file system") == 2
            assert "unshare: unshare failed" in out
        finally:
            host.kill()
    await until(lambda: not processes(f"sleep\0{marker}") and not processes(str(root)))


# --- where bubblewrap does not run -----------------------------------------------------------------------------------

FORBIDDEN = "#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n"


@pytest.fixture(params=["absent", "forbidden"])
def no_bubblewrap(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    directory = tmp_path / "bin"
    directory.mkdir()
    if request.param == "forbidden":
        (directory / "bwrap").write_text(FORBIDDEN)
        (directory / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))
    return "bwrap is not installed" if request.param == "absent" else "setting up uid map: Permission denied"


def _open(tmp_path: Path, **environ: str) -> Any:
    settings = LOCAL.shared("settings").Settings(environment_id="env_1", environment_key="key")
    return LOCAL.sandbox.open_provider({"LOCAL_ROOT": str(tmp_path / "root"), **environ}, settings)


def test_without_bubblewrap_the_provider_is_refused(no_bubblewrap: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        _open(tmp_path)
    for words in (no_bubblewrap, "apt-get install bubblewrap", "ALLOW_UNISOLATED_TOOLS=true"):
        assert words in str(refused.value)


async def test_without_bubblewrap_tools_run_unisolated_when_that_is_allowed(
    no_bubblewrap: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    provider = _open(tmp_path, ALLOW_UNISOLATED_TOOLS="true")
    assert "tools run without isolation" in caplog.text
    assert no_bubblewrap in caplog.text
    sandbox = await provider.acquire("sesn_1")
    assert sandbox.created
    assert (tmp_path / "root/env_1/sesn_1/workspace").is_dir()
    await provider.close()


async def test_without_bubblewrap_a_launch_fails_for_good(no_bubblewrap: str, sandboxes: Sandboxes) -> None:
    with pytest.raises(LaunchFailed) as failed:
        await sandboxes.provider.acquire("sesn_1")
    assert not failed.value.retriable
    assert no_bubblewrap in str(failed.value)


@needs_bubblewrap
def test_bubblewrap_is_used_where_it_runs_even_if_it_need_not_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert PROBLEM is None
    _open(tmp_path, ALLOW_UNISOLATED_TOOLS="true")
    assert "without isolation" not in caplog.text


@needs_bubblewrap
def test_a_root_that_every_sandbox_could_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"root/env_1 is inside .*, which every sandbox can read"):
        _open(tmp_path, LOCAL_READABLE=str(tmp_path))


@needs_bubblewrap
def test_a_secret_that_every_sandbox_could_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".env").touch()
    with pytest.raises(SettingsError, match=r"/\.env is inside"):
        LOCAL.sandbox._refuse_if_shown([tmp_path / ".env"], [tmp_path / "other", tmp_path])


def test_relative_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="LOCAL_READABLE is unusable: expected absolute paths"):
        _open(tmp_path, LOCAL_READABLE="tools")


def test_an_environment_id_that_is_no_name_is_refused(tmp_path: Path) -> None:
    settings = LOCAL.shared("settings").Settings(environment_id="../x", environment_key="key")
    with pytest.raises(SettingsError, match="ANTHROPIC_ENVIRONMENT_ID"):
        LOCAL.sandbox.open_provider({"LOCAL_ROOT": str(tmp_path)}, settings)


@pytest.mark.parametrize(
    ("environ", "where"),
    [
        ({"XDG_STATE_HOME": "{}/state"}, "state/sandboxes/env_1"),
        ({"HOME": "{}/me"}, "me/.local/state/sandboxes/env_1"),
        ({"LOCAL_ROOT": "{}/own", "XDG_STATE_HOME": "{}/state"}, "own/env_1"),
    ],
)
@needs_bubblewrap
def test_where_sessions_are_kept(tmp_path: Path, environ: dict[str, str], where: str) -> None:
    settings = LOCAL.shared("settings").Settings(environment_id="env_1", environment_key="key")
    given = {name: value.format(tmp_path) for name, value in environ.items()}
    assert LOCAL.sandbox.open_provider(given, settings)._root == tmp_path / where


@needs_bubblewrap
async def test_a_full_disk_is_not_retried_and_an_unknown_error_is_not_hidden(sandboxes: Sandboxes) -> None:
    mapped = LOCAL.sandbox._mapped
    for error, retriable in ((OSError(28, "No space left on device"), False), (OSError(11, "try again"), True)):
        with pytest.raises(LaunchFailed) as failed, mapped():
            raise error
        assert failed.value.retriable is retriable
        assert failed.value.__cause__ is error
    with pytest.raises(OSError, match="Bad file descriptor"), mapped():
        raise OSError(9, "Bad file descriptor")


def test_the_init_script_stands_alone() -> None:
    code = textwrap.dedent("""
        import sys
        sys.argv = ["x"]
        import sandbox_init
    """)
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=LOCAL.path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
