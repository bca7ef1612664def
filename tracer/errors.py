"""Everything that tracer raises on purpose.

TracerError
├── InputError              what the caller gave cannot be used (exit code 2)
│   ├── UnknownNameError        a model, agent, tool or method that does not exist
│   ├── PromptTooLongError      prompt and completion do not fit in the model's context
│   └── TraceFormatError        a trace file or event that cannot be read
├── EngineError             the model could not be run (exit code 1)
│   ├── EngineUnavailableError  no server there, or it died, or it refuses
│   ├── EngineTimeoutError      it is there and does not answer
│   └── EngineResponseError     it answered, with something that is not a completion
├── ModelError              weights could not be found, fetched, checked or converted
├── ToolError               a tool raised, ran too long or returned too much
├── BudgetExceededError     a run used up its step or token budget
├── CancelledError          a person stopped the run
└── StoreError              the store cannot be read or written
    ├── StoreVersionError       it was written by a newer tracer
    └── TraceNotFoundError      no trace has that id
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracer.trace.trace import Trace


class TracerError(Exception):
    """Base of all expected failures; its message is one line that says what to do."""

    exit_code = 1
    """Exit status of the command line."""
    trace: Trace | None = None
    """What was recorded before a run failed."""


class InputError(TracerError, ValueError):
    """What the caller gave cannot be used."""

    exit_code = 2


class UnknownNameError(InputError):
    """A name that stands for nothing tracer knows.

    Args:
        what: The kind of thing, such as ``"agent"``.
        name: The name that was given.
        known: The names that would have worked.
    """

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}"
        super().__init__(f"unknown {what} {name!r}; {hint}")
        self.what = what
        self.name = name
        self.known = names


class PromptTooLongError(InputError):
    """A prompt that does not fit in the model's context.

    Args:
        prompt_tokens: Length of the prompt, in tokens.
        max_tokens: Tokens asked for on top of it.
        context_length: Tokens that the model can hold.
    """

    def __init__(self, prompt_tokens: int, max_tokens: int, context_length: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and {max_tokens} more were asked for, but the model's "
            f"context holds {context_length}; shorten the prompt or lower max_tokens"
        )
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.context_length = context_length


class TraceFormatError(InputError):
    """A trace file or a stored event that cannot be read."""


class EngineError(TracerError):
    """The model could not be run."""


class EngineUnavailableError(EngineError):
    """There is no engine, it died, or it refuses to serve."""


class EngineTimeoutError(EngineError):
    """The engine is there but does not answer in time."""


class EngineResponseError(EngineError):
    """The engine answered with something that is not a completion."""


class ModelError(TracerError):
    """Weights could not be found, fetched, checked or converted."""


class ToolError(TracerError):
    """A tool raised, ran too long or returned too much."""


class BudgetExceededError(TracerError):
    """A run used up its step or token budget."""


class CancelledError(TracerError):
    """A person stopped the run; what was recorded is kept."""

    exit_code = 130


class StoreError(TracerError):
    """The store cannot be read or written."""


class StoreVersionError(StoreError):
    """The store was written by a newer tracer."""


class TraceNotFoundError(StoreError):
    """No stored trace has that id."""

    exit_code = 2
