"""What the product does not keep yet.

Each key is a kind of trouble (`TROUBLES`) that the random schedules leave out, or the label of a violation that is
counted and shown, and fails nothing. Removing the entry is the acceptance test of what is missing.
"""

from __future__ import annotations

NOT_YET: dict[str, str] = {
    "endless": "An interrupt ends the turn while a call waits for a person's word: the SDK's runner holds its idle"
    " clock for that verdict, which never comes, so the runner and its sandbox stay for ever.",
    "twice on two disks": "A call was begun on a disk that is lost with its sandbox, journal and all. Where a lapsed"
    " lease is requeued, or a person interrupts before healing has answered, the next runner runs it again.",
}
