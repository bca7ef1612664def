"""What `tracer.explain` answers, and what it tells while it works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tracer.errors import UnknownNameError
from tracer.explain.document import Tokens
from tracer.replay.parity import Parity
from tracer.trace.explanation import Explanation, ExplanationSource
from tracer.trace.probes import ProbeScore
from tracer.trace.trace import Trace


@dataclass(frozen=True, slots=True)
class Stage:
    """How far `explain` is; ``total`` is 0 while unknown."""

    stage: str
    done: float
    total: int
    unit: str = "units"


Progress = Callable[[object], None]
"""Called with a `Stage`, or while weights are read with a `tracer.engines.models.Progress`; both have ``stage``,
``done``, ``total`` and ``unit``."""


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """What was found out about a trace.

    Args:
        trace: The trace with its explanations.
        explanations: Those that were asked for, in the order of the methods.
        targets: Ids of the steps that were asked for.
        parity: How well the replica reproduces the recorded log-probabilities.
        probes: How true the model takes its steps to be, by every probe.
        probe_hint: How to make a truth probe, where there is none and nobody insisted.
        left_out: Methods of the default that could not be used with this model, with the reason.
    """

    trace: Trace
    explanations: tuple[Explanation, ...]
    targets: tuple[str, ...]
    parity: Parity
    probes: tuple[ProbeScore, ...] = ()
    probe_hint: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    _tokens: Mapping[str, Tokens] = field(default_factory=dict, repr=False)

    def explanation(self, method: str) -> Explanation:
        """The explanation by a method.

        Raises:
            UnknownNameError: It was not asked for.
        """
        for explanation in self.explanations:
            if explanation.method == method:
                return explanation
        raise UnknownNameError("method of this report", method, [item.method for item in self.explanations])

    def sources(self, step_id: str, method: str) -> list[tuple[ExplanationSource, float]]:
        """What a step read with the method's values, largest first by absolute value.

        The step's own tokens and what it could not read are left out.

        Raises:
            UnknownNameError: The method or step was not asked for.
        """
        explanation = self.explanation(method)
        pairs = zip(explanation.sources, explanation.row(step_id), strict=True)
        found = [(source, value) for source, value in pairs if value and source.step_id != step_id]
        return sorted(found, key=lambda pair: -abs(pair[1]))

    def token_scores(self, step_id: str, method: str) -> NDArray[np.float32]:
        """Scores of the tokens before a step's end, ``(tokens,)``.

        Raises:
            UnknownNameError: The method or step was not asked for, or its token scores were not kept.
        """
        kept = self._tokens.get(str(self.explanation(method).key), {})
        if step_id not in kept:
            raise UnknownNameError(f"step with token scores by {method}", step_id, kept)
        return kept[step_id]
