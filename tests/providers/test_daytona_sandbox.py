"""Daytona's own failures, and what it is told: the real client against the double, the real runner in its sandboxes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daytona import DaytonaError

from tests.fakes.daytona import DaytonaDouble
from tests.providers.daytona_support import (
    ENVIRONMENT,
    FOLDER,
    PATIENCE_SECONDS,
    SNAPSHOT,
    account,
    provided,
    until,
)
from tests.providers.local_support import needs_bubblewrap
from tests.world import World
from tools.emulator import Emulator, call, end, repeat_output, tools

pytestmark = needs_bubblewrap
LaunchFailed = FOLDER.shared("errors").LaunchFailed
Launch = FOLDER.shared("provider").Launch
SESSION = "sesn_1"
# A stand-in for the runner: says what it was told, and stays.
RUNNER = """import sys, time
told = sys.stdin.readline()
print('{"event": "told", "length": %d}' % len(told))
print('{"event": "ready"}', flush=True)
time.sleep(3600)
"""


@pytest.fixture
def daytona(tmp_path: Path) -> Iterator[DaytonaDouble]:
    with account(tmp_path / "daytona") as daytona:
        stand_in = tmp_path / "stand_in"
        stand_in.mkdir()
        (stand_in / "runner.py").write_text(RUNNER)
        daytona.readable.append(stand_in)
        yield daytona


def stand_in(daytona: DaytonaDouble) -> dict[str, Any]:
    return {"runner": f"{daytona.readable[0]}/runner.py"}


async def refused(awaitable: Any) -> Any:
    with pytest.raises(LaunchFailed) as raised:
        await awaitable
    return raised.value


# --- create ----------------------------------------------------------------------------------------------------------


async def test_a_missing_snapshot_is_named_with_the_cure(daytona: DaytonaDouble) -> None:
    async with provided(daytona, snapshot="sandboxes-0123") as provider:
        error = await refused(provider.acquire(SESSION))
    assert not error.retriable
    assert "Snapshot sandboxes-0123 not found" in str(error)
    assert "python bake.py" in str(error)


async def test_an_inactive_snapshot_is_activated(daytona: DaytonaDouble) -> None:
    daytona.snapshots[SNAPSHOT]["state"] = "inactive"
    daytona.seconds["activate"] = 3600
    async with provided(daytona) as provider:
        errors = await asyncio.gather(*(refused(provider.acquire(f"sesn_{number}")) for number in range(2)))
        assert all(error.retriable for error in errors)
        assert {str(error) for error in errors} <= {
            f"the snapshot {SNAPSHOT} was inactive and is being activated",
            f"the snapshot {SNAPSHOT} is pending",
        }
        daytona.snapshots[SNAPSHOT]["state"] = "active"
        assert (await provider.acquire(SESSION)).created
    assert daytona.count("snapshot.activate", 200) == 1


async def test_a_snapshot_that_the_key_may_not_activate_is_named_with_the_cure(daytona: DaytonaDouble) -> None:
    daytona.snapshots[SNAPSHOT]["state"] = "inactive"
    daytona.fault("snapshot.activate", "fail", status=403)
    async with provided(daytona) as provider:
        error = await refused(provider.acquire(SESSION))
    assert not error.retriable
    assert "run `python bake.py`" in str(error)


@pytest.mark.parametrize("state", ["pending", "building", "pulling", "snapshotting"])
async def test_a_snapshot_that_is_just_being_made_is_tried_again(daytona: DaytonaDouble, state: str) -> None:
    daytona.snapshots[SNAPSHOT]["state"] = state
    async with provided(daytona) as provider:
        assert (await refused(provider.acquire(SESSION))).retriable
    assert daytona.count("snapshot.activate") == 0


async def test_an_exhausted_quota_is_named(daytona: DaytonaDouble) -> None:
    daytona.quota = 1
    async with provided(daytona) as provider:
        await provider.acquire(SESSION)
        error = await refused(provider.acquire("sesn_2"))
    assert not error.retriable
    assert "Total CPU limit exceeded" in str(error)


@pytest.mark.parametrize("kind", ["lose", "hang"])
async def test_a_create_that_took_effect_unheard_is_found(daytona: DaytonaDouble, kind: Any) -> None:
    daytona.fault("create", kind, seconds=30)
    async with provided(daytona) as provider:
        if kind == "lose":
            assert (await refused(provider.acquire(SESSION))).retriable
        else:
            creating = asyncio.create_task(provider.acquire(SESSION))
            await until(daytona.existing)
            creating.cancel()  # the dispatcher's budget is spent
            with pytest.raises(asyncio.CancelledError):
                await creating
        sandbox = await provider.acquire(SESSION)
    assert not sandbox.created
    assert len(daytona.existing()) == 1


async def test_two_hosts_that_create_at_once_have_one_sandbox(daytona: DaytonaDouble) -> None:
    daytona.seconds["create"] = 0.3
    daytona.fault("get", "fail", times=2, status=404)  # both look before either creates
    async with provided(daytona) as one, provided(daytona) as other:
        found = await asyncio.gather(one.acquire(SESSION), other.acquire(SESSION))
    assert len({sandbox.id for sandbox in found}) == 1
    assert sorted(sandbox.created for sandbox in found) == [False, True]
    assert daytona.count("create", 409) == 1


async def test_a_sandbox_of_that_name_that_is_not_ours_is_left_alone(daytona: DaytonaDouble) -> None:
    async with provided(daytona, environment_id="env_theirs") as theirs, provided(daytona) as ours:
        await theirs.acquire(SESSION)
        assert not (await refused(ours.acquire(SESSION))).retriable
        assert [info async for info in ours.sandboxes()] == []
    assert daytona.box(SESSION).state == "started"


async def test_a_snapshot_without_the_runner_is_named(daytona: DaytonaDouble) -> None:
    async with provided(daytona, runner="/opt/elsewhere.py") as provider:
        error = await refused(provider.acquire(SESSION))
    assert not error.retriable
    assert "/opt/elsewhere.py" in str(error)
    assert "DAYTONA_SNAPSHOT" in str(error)


async def test_a_sandbox_is_made_as_the_settings_say(daytona: DaytonaDouble) -> None:
    daytona.volumes.add("data")
    environ = {
        "ANTHROPIC_ENVIRONMENT_ID": ENVIRONMENT,
        "ANTHROPIC_ENVIRONMENT_KEY": "key",
        "ANTHROPIC_BASE_URL": "https://api.example.com",
        "SANDBOX_KEEP_WARM_SECONDS": "610",
        "SANDBOX_RETENTION_SECONDS": "3600",
        "SANDBOX_ALLOWED_HOSTS": "github.com, example.org",
        "DAYTONA_API_KEY": daytona.key,
        "DAYTONA_API_URL": daytona.url,
        "DAYTONA_TARGET": "eu",
        "DAYTONA_SNAPSHOT": SNAPSHOT,
        "DAYTONA_ARCHIVE_MINUTES": "90",
        "DAYTONA_VOLUMES": "data:/mnt/data",
    }
    settings = FOLDER.shared("settings").Settings.from_env(environ)
    provider = FOLDER.sandbox.open_provider(environ, settings)
    await provider.acquire(SESSION)
    await provider.close()
    asked = daytona.box(SESSION).asked
    assert asked["labels"] == {
        "sandboxes-environment": ENVIRONMENT,
        "sandboxes-session": SESSION,
        "code-toolbox-language": "python",
    }
    assert (asked["name"], asked["target"], asked["public"]) == (SESSION, "eu", False)
    assert (asked["autoStopInterval"], asked["autoArchiveInterval"]) == (11, 90)
    assert asked["autoDeleteInterval"] == 60 + 24 * 60
    assert asked["domainAllowList"] == "api.example.com,example.org,github.com"
    assert asked["volumes"] == [{"volumeId": "data", "mountPath": "/mnt/data"}]


@pytest.mark.parametrize(("hosts", "asked"), [("", "api.example.com"), ("*", None)])
async def test_only_the_api_may_be_reached_unless_the_settings_name_more(
    daytona: DaytonaDouble, hosts: str, asked: str | None
) -> None:
    environ = {
        "ANTHROPIC_ENVIRONMENT_ID": ENVIRONMENT,
        "ANTHROPIC_ENVIRONMENT_KEY": "key",
        "ANTHROPIC_BASE_URL": "https://api.example.com",
        "SANDBOX_ALLOWED_HOSTS": hosts,
        "DAYTONA_API_KEY": daytona.key,
        "DAYTONA_API_URL": daytona.url,
        "DAYTONA_SNAPSHOT": SNAPSHOT,
    }
    provider = FOLDER.sandbox.open_provider(environ, FOLDER.shared("settings").Settings.from_env(environ))
    await provider.acquire(SESSION)
    await provider.close()
    assert daytona.box(SESSION).asked.get("domainAllowList") == asked


# --- states ----------------------------------------------------------------------------------------------------------


async def test_a_stopped_sandbox_starts_with_its_disk(daytona: DaytonaDouble) -> None:
    async with provided(daytona) as provider:
        first = await provider.acquire(SESSION)
        (daytona.box(SESSION).directory / "workspace" / "file.txt").write_text("kept")
        daytona.stop(daytona.box(SESSION))
        again = await provider.acquire(SESSION)
        assert (again.id, again.created) == (first.id, False)
        answer = await again._sandbox.process.exec("cat /workspace/file.txt")
        assert answer.result == "kept"


async def test_an_archived_sandbox_that_takes_its_time_is_waited_for(daytona: DaytonaDouble) -> None:
    async with provided(daytona) as provider:
        first = await provider.acquire(SESSION)
        daytona.archive(daytona.box(SESSION))
        daytona.seconds["restore"] = 1.5  # thirty of a real one's
        assert (await provider.acquire(SESSION)).id == first.id
        assert daytona.count("get") > 2  # it asked until it was there


async def test_a_sandbox_that_is_just_stopping_is_started_again(daytona: DaytonaDouble) -> None:
    async with provided(daytona) as provider:
        first = await provider.acquire(SESSION)
        daytona.seconds["stop"] = 60
        daytona.stop(daytona.box(SESSION))
        assert daytona.box(SESSION).state == "stopping"
        acquiring = asyncio.create_task(provider.acquire(SESSION))
        asked = daytona.count("get")
        await until(lambda: daytona.count("get") > asked + 1)  # it waits
        daytona.seconds["stop"] = 0
        assert (await acquiring).id == first.id
    assert daytona.box(SESSION).state == "started"


async def test_a_stop_between_acquire_and_start_is_tried_again(daytona: DaytonaDouble) -> None:
    async with provided(daytona, **stand_in(daytona)) as provider:
        sandbox = await provider.acquire(SESSION)
        daytona.stop(daytona.box(SESSION))
        assert (await refused(sandbox.start(Launch(stdin=b"{}")))).retriable
        assert (await (await provider.acquire(SESSION)).start(Launch(stdin=b"{}"))).outcome == "ready"


async def test_a_start_that_is_refused_says_why(daytona: DaytonaDouble) -> None:
    daytona.quota = 1
    async with provided(daytona) as provider:
        await provider.acquire(SESSION)
        daytona.stop(daytona.box(SESSION))
        await provider.acquire("sesn_2")
        error = await refused(provider.acquire(SESSION))
    assert error.retriable
    assert "Total CPU limit exceeded" in str(error)


async def test_a_broken_sandbox_is_recovered_with_its_disk_where_daytona_can(daytona: DaytonaDouble) -> None:
    async with provided(daytona) as provider:
        first = await provider.acquire(SESSION)
        daytona.kill(daytona.box(SESSION), recoverable=True)
        assert (await provider.acquire(SESSION)).id == first.id
    assert daytona.count("recover") == 1


@pytest.mark.parametrize("state", ["error", "build_failed"])
async def test_a_broken_sandbox_is_made_anew_where_it_cannot(daytona: DaytonaDouble, state: str) -> None:
    async with provided(daytona) as provider:
        first = await provider.acquire(SESSION)
        daytona.kill(daytona.box(SESSION), state)
        error = await refused(provider.acquire(SESSION))
        assert error.retriable
        assert "files are lost" in str(error)
        again = await provider.acquire(SESSION)
    assert again.created
    assert again.id != first.id
    assert len(daytona.existing()) == 1


async def test_a_sandbox_that_breaks_while_it_starts_is_made_anew(daytona: DaytonaDouble) -> None:
    daytona.seconds["create"] = 60
    async with provided(daytona) as provider:
        creating = asyncio.create_task(provider.acquire(SESSION))
        await until(lambda: daytona.existing())
        daytona.kill(daytona.box(SESSION))
        assert (await refused(creating)).retriable
        daytona.seconds["create"] = 0
        assert (await provider.acquire(SESSION)).created


async def test_a_sandbox_that_is_being_deleted_is_waited_out(daytona: DaytonaDouble) -> None:
    async with provided(daytona) as provider:
        first = await provider.acquire(SESSION)
        daytona.seconds["delete"] = 60
        releasing = asyncio.create_task(provider.release(first.id))
        await until(lambda: daytona.box(SESSION).state == "destroying")
        acquiring = asyncio.create_task(refused(provider.acquire(SESSION)))
        asked = daytona.count("get")
        await until(lambda: daytona.count("get") > asked + 1)  # it waits
        daytona.seconds["delete"] = 0
        assert (await acquiring).retriable
        await releasing
        assert (await provider.acquire(SESSION)).id != first.id


# --- the way there ---------------------------------------------------------------------------------------------------


async def test_a_toolbox_that_cannot_be_reached_after_the_create_is_tried_again(daytona: DaytonaDouble) -> None:
    daytona.fault("execute", "fail", status=502)
    async with provided(daytona) as provider:
        assert (await refused(provider.acquire(SESSION))).retriable
        await provider.acquire(SESSION)
    assert daytona.count("create") == 1


async def test_when_told_to_slow_down_it_waits_as_long_as_it_is_told(daytona: DaytonaDouble) -> None:
    daytona.fault("get", "fail", status=429, headers={"Retry-After": "1"})
    async with provided(daytona) as provider:
        began = time.monotonic()
        assert (await refused(provider.acquire(SESSION))).retriable
        assert time.monotonic() - began >= 1.0
        await provider.acquire(SESSION)


@pytest.mark.parametrize(
    ("status", "retriable"),
    [
        *((status, False) for status in (401, 403, 422)),
        *((status, True) for status in (400, 404, 409, 410, 429, 500, 502, 503, 504)),
    ],
)
async def test_every_error_is_mapped_and_keeps_its_cause(daytona: DaytonaDouble, status: int, retriable: bool) -> None:
    async with provided(daytona) as provider:
        sandbox = await provider.acquire(SESSION)
        daytona.fault("activity", "fail", status=status, headers={"Retry-After": "0"})
        error = await refused(provider.renew(sandbox.id, 60))
    assert error.retriable == retriable
    assert isinstance(error.__cause__, DaytonaError)
    assert daytona.key not in str(error)


async def test_an_error_that_nobody_has_listed_is_a_bug(daytona: DaytonaDouble) -> None:
    async with provided(daytona) as provider:
        sandbox = await provider.acquire(SESSION)
        daytona.fault("activity", "fail", status=418)
        with pytest.raises(DaytonaError):
            await provider.renew(sandbox.id, 60)


async def test_a_wrong_key_is_named(daytona: DaytonaDouble) -> None:
    async with provided(daytona) as provider:
        daytona.key = "dtn_another"
        error = await refused(provider.acquire(SESSION))
    assert not error.retriable
    assert "DAYTONA_API_KEY" in str(error)


async def test_an_api_that_is_not_there_is_tried_again(daytona: DaytonaDouble) -> None:
    daytona.fault("create", "drop")
    async with provided(daytona) as provider:
        assert (await refused(provider.acquire(SESSION))).retriable
        await provider.acquire(SESSION)


# --- start -----------------------------------------------------------------------------------------------------------


async def test_dropped_logs_do_not_end_a_start(daytona: DaytonaDouble) -> None:
    daytona.fault("session.logs", "drop", times=2)
    daytona.fault("session.command", "fail", times=2, status=502)
    async with provided(daytona, **stand_in(daytona)) as provider:
        sandbox = await provider.acquire(SESSION)
        assert (await sandbox.start(Launch(stdin=b'{"job": 1}'))).outcome == "ready"
        assert '"length": 11' in await sandbox.tail(10)


async def test_an_input_that_is_not_there_yet_is_waited_for(daytona: DaytonaDouble) -> None:
    daytona.fault("session.input", "fail", times=3)
    async with provided(daytona, **stand_in(daytona)) as provider:
        assert (await (await provider.acquire(SESSION)).start(Launch(stdin=b"{}"))).outcome == "ready"


@pytest.mark.parametrize("fault", [{"kind": "lose"}, {"kind": "fail", "times": 99}])
async def test_a_runner_whose_job_may_not_have_arrived_is_ended(daytona: DaytonaDouble, fault: Any) -> None:
    async with provided(daytona, **stand_in(daytona)) as provider:
        sandbox = await provider.acquire(SESSION)
        daytona.fault("session.input", **fault)
        assert (await refused(sandbox.start(Launch(stdin=b"{}")))).retriable
        assert await sandbox._sandbox.process.list_sessions() == []
        deadline = time.monotonic() + PATIENCE_SECONDS
        while "runner.py" in (await sandbox._sandbox.process.exec("cat /proc/[0-9]*/cmdline")).result:
            assert time.monotonic() < deadline, "the runner is still there"


async def test_a_runner_whose_launch_is_cancelled_before_it_has_its_job_is_ended(daytona: DaytonaDouble) -> None:
    async with provided(daytona, **stand_in(daytona)) as provider:
        sandbox = await provider.acquire(SESSION)
        daytona.fault("session.input", "hang", seconds=3600.0)
        starting = asyncio.create_task(sandbox.start(Launch(stdin=b"{}")))
        await until(lambda: daytona.count("session.exec") == 1)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert await sandbox._sandbox.process.list_sessions() == []


async def test_a_runner_that_ends_at_once_is_a_failed_start_with_its_last_words(daytona: DaytonaDouble) -> None:
    (daytona.readable[0] / "runner.py").write_text("raise SystemExit('no such thing')")
    async with provided(daytona, **stand_in(daytona)) as provider:
        error = await refused((await provider.acquire(SESSION)).start(Launch(stdin=b"{}")))
    assert "no such thing" in str(error) or "ended before it had its job" in str(error)


async def test_ended_runners_leave_no_session_behind(daytona: DaytonaDouble) -> None:
    (daytona.readable[0] / "runner.py").write_text('import sys; sys.stdin.readline(); print(\'{"event": "ready"}\')')
    async with provided(daytona, **stand_in(daytona)) as provider:
        for _ in range(3):
            sandbox = await provider.acquire(SESSION)
            assert (await sandbox.start(Launch(stdin=b"{}"))).outcome == "ready"
        (session,) = await sandbox._sandbox.process.list_sessions()
        assert session.session_id.startswith("runner-")


async def test_files_are_put_below_the_working_directory_and_nowhere_else(daytona: DaytonaDouble) -> None:
    async with provided(daytona, **stand_in(daytona)) as provider:
        sandbox = await provider.acquire(SESSION)
        await sandbox.start(Launch(stdin=b"{}", files={"in/data.bin": b"\0data"}))
        placed = daytona.box(SESSION).directory / "workspace" / "in" / "data.bin"
        assert placed.read_bytes() == b"\0data"
        for path in ("/etc/passwd", "../up"):
            assert not (await refused(sandbox.start(Launch(stdin=b"{}", files={path: b""})))).retriable


async def test_the_job_goes_to_the_runners_input_and_nowhere_else(daytona: DaytonaDouble, tmp_path: Path) -> None:
    """R11: not in a command, a label, a variable or a file; not in the log on the sandbox's disk."""
    with Emulator() as emulator:
        world = World(emulator, FOLDER, lambda root, settings: None, tmp_path)
        settings = {"environment_id": emulator.environment_id}
        async with provided(daytona, **settings) as provider:
            host = world.host(provider=provider)
            session = emulator.create_session()
            look = "grep -rIls sk-ant- ~ . /tmp /run /dev/shm /etc /opt --exclude='*.py' 2>/dev/null; echo looked"
            emulator.set_script(session, [tools(call("bash", command=look)), repeat_output, end()])
            assert await host.ask(session, "look") == "looked"
            await host.until_stopped(session)
            await world.close()
    jobs = [seen for seen in daytona.requests if seen.operation == "session.input"]
    assert [json.loads(json.loads(seen.body)["data"])["ANTHROPIC_SESSION_ID"] for seen in jobs] == [session]
    secret = json.loads(json.loads(jobs[0].body)["data"])["ANTHROPIC_WORK_SECRET"].encode()
    for seen in daytona.requests:
        if seen.operation != "session.input":
            assert secret not in seen.body
            assert b"ANTHROPIC_" not in seen.body
            assert secret.decode() not in seen.path
    files = [path for path in daytona.box(session).directory.rglob("*") if path.is_file()]
    assert any(path.name == "stdout" for path in files)  # the runner's log is there,
    assert [path for path in files if secret in path.read_bytes()] == []  # and tells nothing


# --- life ------------------------------------------------------------------------------------------------------------


async def test_renewing_puts_off_the_auto_stop(daytona: DaytonaDouble) -> None:
    async with provided(daytona) as provider:
        sandbox = await provider.acquire(SESSION)
        box = daytona.box(SESSION)
        box.used_at -= 299
        await provider.renew(sandbox.id, 300)
        assert time.time() - box.used_at < 60
        daytona.minute = 0.01
        await until(lambda: box.state == "stopped")


async def test_a_longer_renewal_lengthens_the_interval(daytona: DaytonaDouble) -> None:
    async with provided(daytona) as provider:
        sandbox = await provider.acquire(SESSION)
        await provider.renew(sandbox.id, 300)
        assert daytona.box(SESSION).intervals["autoStopInterval"] == 5
        await provider.renew(sandbox.id, 601)
        assert daytona.box(SESSION).intervals["autoStopInterval"] == 11


async def test_every_sandbox_is_listed_with_its_session_and_state(daytona: DaytonaDouble) -> None:
    daytona.page = 2
    async with provided(daytona) as provider:
        names = [f"sesn_{number}" for number in range(5)]
        for name in names:
            await provider.acquire(name)
        daytona.stop(daytona.box("sesn_0"))
        daytona.archive(daytona.box("sesn_1"))
        daytona.kill(daytona.box("sesn_2"))
        infos = {info.session_id: info async for info in provider.sandboxes()}
    assert sorted(infos) == names
    assert [infos[name].running for name in names] == [False, False, False, True, True]
    assert all(abs(info.created_at - time.time()) < 60 for info in infos.values())
    assert daytona.count("list") == 3


async def test_without_hosts_daytona_deletes_it_by_itself(daytona: DaytonaDouble) -> None:
    async with provided(daytona, retention_seconds=0, archive_minutes=60) as provider:
        await provider.acquire(SESSION)
        daytona.minute = 0.0005
        await until(lambda: not daytona.existing())
