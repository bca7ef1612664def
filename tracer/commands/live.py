"""Scoring the steps of `tracer run` while the agent runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tracer.errors import InputError, TracerError

if TYPE_CHECKING:
    from tracer.engines.base import Engine
    from tracer.explain.probes.live import LiveProbes
    from tracer.store import Store
    from tracer.trace.events import Event
    from tracer.trace.trace import Trace

Listener = Callable[["Event"], None]


class LiveScoring:
    """Probes of the served model that score a run as it comes; shows what they say.

    Args:
        engine: What runs the agent.
        names: Which probes.
        quiet: Show nothing.

    Raises:
        InputError: The engine gives no hidden states, or there is no such probe for its model.
        StoreError: A probe's file is damaged.
    """

    def __init__(self, engine: Engine, names: Sequence[str], *, quiet: bool) -> None:
        from tracer.commands.truth import print_live
        from tracer.engines.vllm import VllmEngine
        from tracer.explain.probes.live import LiveProbes

        if not isinstance(engine, VllmEngine):
            raise InputError(
                "only a served model scores steps while an agent runs: start one with `tracer serve --lens`, or score "
                "the run afterwards with `tracer explain`"
            )
        self._quiet = quiet
        self._probes: LiveProbes = LiveProbes(engine, names, on_scores=None if quiet else print_live)

    def after(self, show: Listener) -> Listener:
        """A listener that shows an event first and scores behind it."""

        def on_event(event: Event) -> None:
            show(event)
            self._probes.watch(event)

        return on_event

    def around(self, run: Callable[[], Trace], store: Store) -> Trace:
        """The trace of a run with its scores, kept with it; those of a run that fails are kept too.

        Raises:
            TracerError: The run failed.
            StoreError: The scores cannot be kept.
        """
        try:
            trace = run()
        except TracerError as error:
            if error.trace is not None:
                error.trace = self._probes.attach(error.trace, store)
            raise
        self._say_worth()
        return self._probes.attach(trace, store)

    def _say_worth(self) -> None:
        from tracer.commands.truth import print_live_worth
        from tracer.console import err

        if self._probes.error is not None:
            err.print(f"no more steps were scored: {self._probes.error}", markup=False)
        if not self._quiet:
            print_live_worth(self._probes.scores)
