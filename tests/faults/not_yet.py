"""What the product does not keep yet.

Each key is a kind of trouble (`TROUBLES`) that the random schedules leave out, or the label of a violation that is
counted and shown, and fails nothing. Removing the entry is the acceptance test of what is missing.
"""

from __future__ import annotations

NOT_YET: dict[str, str] = {
    "twice on two disks": "A call was begun on a disk that is lost with its sandbox, journal and all. Where a lapsed"
    " lease is requeued, or a person interrupts before healing has answered, the next runner runs it again. Only a mark"
    " outside of that disk could tell it, and the one place that a session's token can write to is its event log, where"
    " every entry is the agent's to read. docs/lost-sessions.md says so under what is not promised.",
}
