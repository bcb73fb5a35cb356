"""The control plane without its network: pure rules that take the time as an argument."""

from .sessions import Event, Session
from .work import WorkItem, WorkQueue
from .world import World

__all__ = ["Event", "Session", "WorkItem", "WorkQueue", "World"]
