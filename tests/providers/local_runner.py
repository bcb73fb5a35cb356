"""A stand-in for the runner: says ready, runs the commands in its job, tells what they printed, and ends or lingers."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

job = json.loads(sys.stdin.buffer.read())


def hand_over(number: int, frame: object) -> None:
    Path("handed-over").touch()
    sys.exit(143)


signal.signal(signal.SIGTERM, signal.SIG_IGN if job.get("stubborn") else hand_over)
sys.stdout.write('{"event": "ready"}\n')
sys.stdout.flush()
out = []
if job.get("list_open"):  # what this process itself has open
    found = [(number, Path("/proc/self/fd", number)) for number in os.listdir("/proc/self/fd")]
    out.append("\n".join(f"{number} {link.readlink()}" for number, link in found if link.is_symlink()))
for command in job["commands"]:
    with tempfile.TemporaryFile(dir=".") as printed:  # no pipe: what is left behind would hold it open
        subprocess.run(["/bin/bash", "-c", command], stdout=printed, stderr=printed)
        printed.seek(0)
        out.append(printed.read().decode(errors="replace"))
sys.stdout.write(json.dumps({"event": "done", "run": job["run"], "out": out}) + "\n")
sys.stdout.flush()
while job.get("linger"):
    time.sleep(1)
