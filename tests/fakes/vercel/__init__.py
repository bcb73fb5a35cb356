"""A wire-level double of Vercel: the Sandbox API with real processes, for the real SDK."""

from .api import FakeVercel, Sent
from .machine import missing

__all__ = ["FakeVercel", "Sent", "missing"]
