"""The first lines of a runner. Root runs them in a sandbox: `python -I start.py <user> <program> <arguments>`.

Root's process becomes the agent's user without another program being executed. Linux does not let a process that has
changed its user be read or traced by the new one, so the runner is hidden from its first instruction on (R11), and it
can become nobody else. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import runpy
import sys

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38


def become(name: str) -> None:
    """Raises `KeyError` when there is no such user, `OSError` when this is not root."""
    user = pwd.getpwnam(name)
    os.initgroups(name, user.pw_gid)
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")


def main() -> None:
    name, program, *arguments = sys.argv[1:]
    home = pwd.getpwnam(name).pw_dir
    become(name)
    sys.argv = [program, *arguments]
    os.environ.update({"HOME": home, "LOGNAME": name, "USER": name})
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
