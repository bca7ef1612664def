"""Reasoning and agent traces, recorded token for token and explained step by step.

Public names load on first use, so that importing tracer is quick and brings in neither torch nor langchain.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracer.agents.base import Budget
    from tracer.agents.cot import ChainOfThought
    from tracer.agents.react import ReAct
    from tracer.agents.self_consistency import SelfConsistency
    from tracer.agents.tree_of_thoughts import TreeOfThoughts
    from tracer.engines.connect import connect
    from tracer.errors import TracerError
    from tracer.explain.service import explain
    from tracer.store import Store
    from tracer.trace.recorder import record
    from tracer.trace.trace import Completion, Document, Sampling, Trace

__all__ = [
    "Budget",
    "ChainOfThought",
    "Completion",
    "Document",
    "ReAct",
    "Sampling",
    "SelfConsistency",
    "Store",
    "Trace",
    "TracerError",
    "TreeOfThoughts",
    "connect",
    "explain",
    "record",
]

__version__ = "0.1.0"

_HOMES = {
    "Budget": "tracer.agents.base",
    "ChainOfThought": "tracer.agents.cot",
    "Completion": "tracer.trace.trace",
    "Document": "tracer.trace.trace",
    "ReAct": "tracer.agents.react",
    "Sampling": "tracer.trace.trace",
    "SelfConsistency": "tracer.agents.self_consistency",
    "Store": "tracer.store",
    "Trace": "tracer.trace.trace",
    "TracerError": "tracer.errors",
    "TreeOfThoughts": "tracer.agents.tree_of_thoughts",
    "connect": "tracer.engines.connect",
    "explain": "tracer.explain",
    "record": "tracer.trace.recorder",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'tracer' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    # The package `explain` is what the name stands for, and can be called.
    value = home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
