"""Which parts of its input each step was conditioned on.

The package can be called: ``tracer.explain(trace, ...)`` is `tracer.explain.service.explain`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracer.explain.report import Report


class _Callable(ModuleType):
    """A package whose name is also that of its one function; torch is only imported when it is called."""

    def __call__(self, *arguments: Any, **options: Any) -> Report:
        """See `tracer.explain.service.explain`."""
        from tracer.explain.service import explain

        return explain(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
