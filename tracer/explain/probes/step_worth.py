"""What a probe is worth on steps of reasoning, beside everything that can be had without it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, JsonValue

from tracer.explain.probes.metrics import Estimate, Measured

_LEAST = 0.001
"""AUROC below which a gain is one of the fit, not of what was known."""


class StepWorth(BaseModel):
    """How well a probe tells right from wrong steps of problems that had no part in it."""

    model_config = ConfigDict(frozen=True)

    protocol: str
    """What was held out and how, in a sentence."""
    rows: int
    """Steps."""
    wrong: int
    """Those of them that are wrong."""
    probe: Measured
    baselines: tuple[Measured, ...]
    """Log-probability, entropy, length, position and the like, on the same steps."""
    over_logprob: Estimate
    """AUROC of the probe less that of the best log-probability baseline, drawn together."""
    stack: Measured
    """All baselines together: logistic regression, cross-validated over problems."""
    with_probe: Measured
    """The same with the probe among them."""
    adds: Estimate
    """AUROC that the probe adds to the stack."""

    @property
    def beats_logprob(self) -> bool:
        """Whether the probe is better than the log-probability, beyond the interval."""
        return self.over_logprob.low > 0.0

    @property
    def adds_to_stack(self) -> bool:
        """Whether the probe adds to what can be had without it, beyond the interval."""
        return self.adds.low > _LEAST

    def baseline(self, name: str) -> Measured | None:
        """The baseline of that name, if it was measured."""
        return next((item for item in self.baselines if item.name == name), None)

    def to_document(self) -> dict[str, JsonValue]:
        """What a trace keeps of it."""
        best = max((item for item in self.baselines if item.auroc), key=_area, default=None)
        return {
            "protocol": self.protocol,
            "steps": self.rows,
            "wrong": self.wrong,
            "auroc": _interval(self.probe.auroc),
            "best_baseline": best.name if best else None,
            "best_baseline_auroc": _interval(best.auroc if best else None),
            "over_logprob": _interval(self.over_logprob),
            "adds_to_stack": _interval(self.adds),
        }


def _area(measured: Measured) -> float:
    return measured.auroc.value if measured.auroc else 0.0


def _interval(estimate: Estimate | None) -> list[JsonValue] | None:
    return None if estimate is None else [estimate.value, estimate.low, estimate.high]
