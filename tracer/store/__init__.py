"""Runs in SQLite or PostgreSQL: append, load, list, search, import. Imports no torch."""

from tracer.store.arrays import Arrays
from tracer.store.database import DiskFullError, default_location
from tracer.store.owner import Owner
from tracer.store.query import TraceFilter, TraceSummary
from tracer.store.store import Store

__all__ = ["Arrays", "DiskFullError", "Owner", "Store", "TraceFilter", "TraceSummary", "default_location"]
