"""What the product does not keep yet.

Each key is the label of a violation that is counted and shown, and fails nothing. Removing the entry is the acceptance
test of what is missing.
"""

from __future__ import annotations

NOT_YET: dict[str, str] = {
    "twice on two disks": "A call was begun on a disk that was gone with its sandbox, journal and all, before the call"
    " was run again. Where the session"
    " is queued again before healing has answered (a server that requeues a lapsed lease; a message that waits when a"
    " runner is told to leave, on a server that refuses its token after the stop), the next runner runs it again. Only"
    " a mark outside of that disk could tell it, and the one place that a session's token can write to is its event"
    " log, where every entry is the agent's to read. docs/lost-sessions.md says so under what is not promised.",
    "twice beside a forgotten disk": "The disk is still there, but the provider does not find its sandbox any more (its"
    " store is lost or restored from an old copy, or it lists wrongly) and makes another one, and the runner in it is"
    " suspended or dead. A suspended runner cannot be asked, and its lease has lapsed. When it goes on, it learns that"
    " within a second, ends its call and answers nothing; but its journal is where the second one could not look. A"
    " provider that finds sandboxes by what they are labelled with, and not by a store, has no such case.",
    "forced": "An operator stops an item by force, and its runner learns of it with its next heartbeat, within 30 s."
    " Where the session is queued again meanwhile and the provider no longer lists the sandbox, a second runner serves"
    " in another one, and the first works on beside it. A heartbeat before each call would cost a request each and not"
    " end it: a call that runs when the item is stopped runs on until the next one.",
}
