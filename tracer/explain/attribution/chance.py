"""Values drawn at random: what a method without any knowledge scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tracer.explain.base import Context, Finding, Request
from tracer.replay.recorded import Target


def run(context: Context, requests: Sequence[Request], targets: Sequence[Target]) -> Iterator[Finding]:
    """Draw a standard normal value for each source that a target could read, spread evenly over its tokens.

    Raises:
        CancelledError: Somebody stopped it.
    """
    for number, target in enumerate(targets):
        context.check_cancel()
        owner = context.recorded.source_of[target.sequence][: target.end]
        sources, place, sizes = np.unique(owner, return_inverse=True, return_counts=True)
        # The same target gets the same values whatever else is asked.
        drawn = np.random.default_rng([context.seed, target.sequence, target.start, target.end]).normal(
            size=len(sources)
        )
        scores = (drawn / sizes)[place].astype(np.float32)
        for item in requests:
            yield Finding(item, target, scores)
        context.report(number + 1, len(targets))
