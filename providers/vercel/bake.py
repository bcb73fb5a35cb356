"""Makes the snapshot that new sandboxes start from: `python bake.py`. Run it again after each change of this folder.

It starts a sandbox with the network open, installs what a runner needs, runs your own set-up script, proves that a
runner can work there, and takes the snapshot. Credentials are VERCEL_OIDC_TOKEN (`vercel env pull` writes one), or
VERCEL_TOKEN with VERCEL_TEAM_ID and VERCEL_PROJECT_ID.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from vercel.sandbox import (
    NetworkPolicy,
    Sandbox,
    SandboxClient,
    SandboxResources,
    SandboxServiceOptions,
    SnapshotExpiration,
)

import image
from _shared.errors import LaunchFailed, SandboxesError
from _shared.settings import load
from sandbox import install
from vercel_errors import creating, mapped
from vercel_settings import VercelSettings

BAKE_SECONDS = 1200.0
LONGEST_DAYS = 3650  # Vercel's limit
HERE = Path(__file__).resolve().parent


async def bake(options: argparse.Namespace, environ: Mapping[str, str]) -> str:
    """The snapshot's id. The sandbox is deleted again, also after a failure or Ctrl-C."""
    own = load(VercelSettings, environ)
    began = time.monotonic()
    client = SandboxClient.create(options=SandboxServiceOptions(base_url=own.api_url))
    try:
        _say(began, "starting a sandbox")
        with creating():
            sandbox = await client.create_sandbox(
                image=options.image or own.image,
                persistent=False,
                execution_time_limit=timedelta(seconds=BAKE_SECONDS),
                resources=SandboxResources(vcpus=own.vcpus),
                network_policy=NetworkPolicy.allow_all(),
            )
        try:
            return await _fill(sandbox, options, image.load(HERE), began)
        finally:
            await sandbox.destroy()  # without its orphaned snapshots: one of them is what this is about
    finally:
        await client.aclose()


async def _fill(sandbox: Sandbox, options: argparse.Namespace, wanted: image.Image, began: float) -> str:
    _say(began, "installing the SDK and the runner")
    await install(sandbox, wanted)
    if options.setup:
        _say(began, f"running {options.setup} as root")
        done = await sandbox.run_process(
            "bash", ["-eu", "-s"], cwd="/", sudo=True, input=options.setup.read_bytes(), stdout=sys.stderr
        )
        if done.returncode:
            raise LaunchFailed(f"{options.setup} ended with {done.returncode}: see its output above", retriable=False)
    _say(began, "checking that a runner can work there")
    done = await sandbox.run_process(
        wanted.python, wanted.arguments("--check"), cwd="/", env=image.VARIABLES, sudo=True, capture_output=True
    )
    if done.returncode:
        raise LaunchFailed(f"a runner cannot work there: {done.stdout}", retriable=False)
    _say(began, "taking the snapshot")
    snapshot = await sandbox.snapshot(expiration=SnapshotExpiration(timedelta(days=options.days)))
    _say(began, "done")
    return snapshot.id


def _say(began: float, what: str) -> None:
    sys.stderr.write(f"{time.monotonic() - began:6.1f} s  {what}\n")


def main(arguments: list[str] | None = None) -> int:
    """The command line. Exit codes: 0 done, 1 it failed, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--image", metavar="REF", help="the image to begin with (default: VERCEL_SANDBOX_IMAGE, else Vercel's)"
    )
    parser.add_argument(
        "--setup", type=Path, metavar="FILE", help="a bash script of yours, run as root: packages, tools"
    )
    parser.add_argument("--days", type=float, default=0.0, help="when the snapshot expires; 0: never (default)")
    options = parser.parse_args(arguments)
    if options.days and not 1 <= options.days <= LONGEST_DAYS:
        parser.error(f"--days is 1 to {LONGEST_DAYS}, or 0 for a snapshot that does not expire")
    if options.setup and not options.setup.is_file():
        parser.error(f"{options.setup} is no file")
    try:
        with mapped():
            snapshot_id = asyncio.run(bake(options, os.environ))
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the sandbox is deleted\n")
        return 130
    except SandboxesError as error:
        sys.stderr.write(f"bake failed: {error}\n")
        return 1
    sys.stdout.write(f"VERCEL_SNAPSHOT_ID={snapshot_id}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
