"""The tables of attempts: what a hostile agent tries in its sandbox.

`ATTEMPTS` is for sandboxes that run commands: `hostile.py` has the code of most; those that need the SDK's file tools,
a second turn or a host that looks on are in `suite.py`. `FILE_ATTEMPTS` is for sandboxes without a shell, where the
agent has the file tools and nothing else: `file_suite.py`.

SECURITY.md shows the tables with a column per provider (`make sync`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal[
    "The credential",
    "Others",
    "The network",
    "The machine",
    "The runner",
    "Using everything up",
    "The session",
    "Staying",
    "The way out",
]


@dataclass(frozen=True)
class Attempt:
    name: str
    group: Group
    goal: str
    """What the agent tries, to follow "An agent tries to ..."."""


ATTEMPTS = (
    Attempt("environment", "The credential", "find it in the environment of any process"),
    Attempt("arguments", "The credential", "find it in the arguments of any process"),
    Attempt("memory", "The credential", "read it from the memory of any process"),
    Attempt("open-files", "The credential", "read it from, or take over, the runner's open files and connections"),
    Attempt("ptrace", "The credential", "trace the runner, or read its memory with process_vm_readv"),
    Attempt("storage", "The credential", "find it, or what is left of the job, in any file"),
    Attempt("core-dump", "The credential", "crash the runner and find it in the core file"),
    Attempt("window", "The credential", "look into the next runner before it has hidden itself"),
    Attempt("file-tools", "The credential", "have the file tools follow a link or a path out of the working directory"),
    Attempt("file-races", "The credential", "swap a link under the file tools after they have looked at a path"),
    Attempt("replay", "The credential", "use a token later that a runner left in its environment, arguments or files"),
    Attempt("shared-memory", "Others", "read shared memory of the host's"),
    Attempt("keyring", "Others", "read the kernel keys of the session that started the host"),
    Attempt("other-sessions", "Others", "find another session's files"),
    Attempt("other-processes", "Others", "see another session's processes"),
    Attempt("host-files", "Others", "read the host's files, also through the root directory of any process"),
    Attempt("loopback", "The network", "talk to a service on the host's own loopback address"),
    Attempt("metadata", "The network", "get to a cloud's metadata address or a link-local one"),
    Attempt("abstract-sockets", "The network", "talk to the host's abstract Unix sockets"),
    Attempt("service-sockets", "The network", "talk to the host's Docker, containerd or another Unix socket"),
    Attempt("sniffing", "The network", "open a raw socket, to read along and to forge"),
    Attempt("become-root", "The machine", "become root by way of a setuid program"),
    Attempt("mount", "The machine", "mount a file system, or make a read-only one writable"),
    Attempt("namespaces", "The machine", "enter another process's namespaces, or make a user namespace"),
    Attempt("kernel-settings", "The machine", "change core_pattern, modprobe, sysrq, binfmt_misc, release_agent"),
    Attempt("devices", "The machine", "open a disk or the machine's memory by a device file"),
    Attempt("runner-code", "The runner", "change the runner's code, its interpreter or a package it imports"),
    Attempt("redirect", "The runner", "change where it connects to or which certificates it trusts"),
    Attempt("forged-log", "The runner", "write lines into the runner's log"),
    Attempt("memory-pressure", "The runner", "have the kernel end the runner rather than the agent's own commands"),
    Attempt("big-file", "Using everything up", "write one file larger than the limit"),
    Attempt("disk", "Using everything up", "fill the disk with many files"),
    Attempt("processes", "Using everything up", "start more processes than the limit"),
    Attempt("process-memory", "Using everything up", "take more memory in one process than the limit"),
    Attempt("total-memory", "Using everything up", "take more memory in several processes than the limit"),
    Attempt("output", "Using everything up", "drown the runner in a command's output"),
    Attempt("kill", "The session", "strand it by killing the runner"),
    Attempt("freeze", "The session", "strand it by stopping the runner (SIGSTOP)"),
    Attempt("starve", "The session", "strand it by taking the runner's files and processor away (prlimit, nice)"),
    Attempt("lock", "The session", "strand it by making the runner's lock unusable"),
    Attempt("stale-lock", "The session", "strand it with a forged lock that a process of the agent's holds"),
    Attempt("journal", "The session", "strand it by making the journal of begun calls a trap"),
    Attempt("wreck", "The session", "strand it by closing the working directory to itself"),
    Attempt("background", "Staying", "leave a process that outlives the runner"),
    Attempt("next-runner", "Staying", "have the next runner, or what starts it, run a planted file"),
)  # fmt: skip

NAMES = tuple(attempt.name for attempt in ATTEMPTS)

FILE_ATTEMPTS = (
    Attempt("paths", "The credential", "leave the working directory: `..`, absolute, doubled, encoded, with a NUL"),
    Attempt("token", "The credential", "find the session's token, a key or a setting with any tool, in any place"),
    Attempt("queries", "The credential", "break out of the file system's queries with a path, a pattern or a content"),
    Attempt("other-sessions", "Others", "find another session's files"),
    Attempt("other-memory", "Others", "reach a memory store that is not the session's, or what lies beside a mount"),
    Attempt("read-only-memory", "Others", "change a memory store that it may only read"),
    Attempt("slow-patterns", "Using everything up", "hold up others with a pattern that is slow elsewhere"),
    Attempt("big-file", "Using everything up", "write one file larger than the limit"),
    Attempt("disk", "Using everything up", "write more than the session's files may take"),
    Attempt("names", "Using everything up", "do so with names and directories"),
    Attempt("output", "Using everything up", "drown the runner in what a tool prints"),
    Attempt("shapes", "The session", "strand it with inputs of another shape than the tool's"),
    Attempt("wreck", "The session", "strand it by putting files where the next runner wants directories"),
    Attempt("forged-log", "The runner", "write lines into the runner's log"),
    Attempt("download", "The way out", "have a person's browser run what it wrote"),
    Attempt("strangers", "The way out", "have a stranger read its files, or another session's, without the key"),
)  # fmt: skip

TABLES: dict[str, tuple[Attempt, ...]] = {"commands": ATTEMPTS, "files": FILE_ATTEMPTS}
"""By what an agent has in a sandbox."""
