"""What truth probes are worth on a model, as plain data that tables, JSON and pictures are made from; needs no torch.

A `ProbeReport` is one JSON file for each model. `tracer probe train` puts in what its probes are worth, `tracer probe
evaluate` the section that it was asked for; `tracer.store.probe_reports` reads and writes them::

    model        name and hashes of the weights
    probes       the saved probes: held-out results, reliability, worth on reasoning steps
    statements   leave-one-topic-out: methods, controls, topic x method, accuracy by layer with intervals, ROC,
                 reliability, score densities, projections on the truth and polarity directions
    steps        transfer to right and wrong reasoning steps, against every baseline
    mistakes     who finds the first wrong step of chains with known mistakes

Numbers are shares or areas from 0 to 1, intervals are 95% bootstrap intervals; ``None`` means not measured.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from tracer.trace.trace import Finite

VERSION = 1
_LEAST = 0.001
"""AUROC below which a gain is one of the fit, not of what was known."""


class Frozen(BaseModel):
    """Base of all parts: they do not change, and fields of newer versions are left out."""

    model_config = ConfigDict(frozen=True)


class Estimate(Frozen):
    """A number with its 95% bootstrap interval."""

    value: Finite
    low: Finite
    high: Finite


class Measured(Frozen):
    """How well something tells true from false statements, or right from wrong steps."""

    name: str
    """What is measured: a method, a baseline, a topic."""
    rows: int
    """Statements that it was measured on."""
    accuracy: Estimate
    """Share of statements on the right side of zero."""
    auroc: Estimate | None
    """How often a true statement scores above a false one; ``None`` where there are only true or only false ones."""


class Curve(Frozen):
    """A receiver operating characteristic; empty without both labels."""

    false_positives: tuple[Finite, ...]
    """Share of false statements above a threshold, rising."""
    true_positives: tuple[Finite, ...]
    """Share of true statements above it; as many."""


class Bin(Frozen):
    """Statements that were given about the same probability."""

    count: int
    predicted: Finite
    """Mean probability that they were given."""
    share: Finite
    """Share of them that is true."""
    low: Finite
    """95% interval of that share (Clopper & Pearson 1934), were the statements independent."""
    high: Finite


class Reliability(Frozen):
    """How well probabilities of statements that had no part in the fit agree with the truth."""

    bins: tuple[Bin, ...]
    """Ten bins of equal width, those without a statement left out."""
    ece: Finite
    """Expected calibration error: mean of |share - predicted| over statements (Naeini et al. 2015)."""


class Density(Frozen):
    """Histograms of the scores of true and of false statements."""

    edges: tuple[Finite, ...]
    """Edges of the bins, rising, one more than there are bins; scores beyond the ends are in the outer bins."""
    true: tuple[int, ...]
    """True statements in each bin."""
    false: tuple[int, ...]


class TopicResult(Frozen):
    """One topic, judged by probes of the others."""

    topic: str
    layer: int | None
    accuracy: Finite
    accuracy_sd: Finite
    """Over draws of training rows."""
    auroc: Finite | None
    affirmative: Finite | None
    """Accuracy on its affirmative statements; ``None`` if there are none."""
    negated: Finite | None


class MethodResult(Measured):
    """One method over all topics: means of the topics' accuracy and AUROC."""

    accuracy_sd: Finite
    """Over draws of training rows."""
    auroc_sd: Finite
    affirmative: Finite | None
    negated: Finite | None
    topics: tuple[TopicResult, ...]
    """In the order of the evaluation's topics."""


class LayerResult(Frozen):
    """One method at one layer, over all topics."""

    method: str
    layer: int
    accuracy: Estimate
    accuracy_sd: Finite
    """Over draws of training rows."""
    auroc: Estimate


class Projection(Frozen):
    """Statements on the two truth directions of the other topics, for a scatter plot; all lists are equally long."""

    truth: tuple[Finite, ...]
    """Projection on the general truth direction."""
    polarity_sensitive: tuple[Finite, ...]
    """Projection on the polarity-sensitive truth direction."""
    label: tuple[bool, ...]
    negated: tuple[bool, ...]
    topic: tuple[str, ...]


class Picture(Frozen):
    """What one method's curves are drawn from: scores of statements of all topics by probes of the others."""

    method: str
    roc: Curve
    reliability: Reliability
    density: Density
    """In units of the spread of each probe's own training rows."""


class Evaluation(Frozen):
    """What truth probes are worth on statements whose topic they have not seen."""

    model: str | None
    source: str = ""
    """Where the statements came from."""
    statements: int
    left_out: str
    """What was left out in turn: a topic, or a group of entities where there are fewer than three topics."""
    topics: tuple[str, ...]
    normalisation: str
    repeats: int
    seed: int
    layers: tuple[int, ...]
    """Layers that there were hidden states of."""
    chosen_layer: int
    """The best layer over all topics; each topic is judged at the one that was chosen without it."""
    layer_choice: str
    methods: tuple[MethodResult, ...]
    controls: tuple[MethodResult, ...]
    """Shuffled labels, a random direction, the first layer, TF-IDF of the text."""
    by_layer: tuple[LayerResult, ...]
    pictures: tuple[Picture, ...]
    """One for each method."""
    projection: Projection | None
    sinks: int
    """Hidden states at the chosen layer that are attention sinks."""
    notes: tuple[str, ...]


class StepWorth(Frozen):
    """How well a probe tells right from wrong steps of problems that had no part in it."""

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


class StepCurve(Frozen):
    """The receiver operating characteristic of one probe or baseline on steps."""

    name: str
    roc: Curve


class Transfer(Frozen):
    """Probes and baselines on the same steps."""

    steps: str
    """What steps these are."""
    rows: int
    wrong: int
    by_operation: dict[str, tuple[int, int]]
    """For each kind of step how many there are, and how many of them are wrong."""
    probes: tuple[StepWorth, ...]
    baselines: tuple[Measured, ...]
    curves: tuple[StepCurve, ...] = ()
    """Of all probes and of all baselines that are one number."""


class StepEvaluation(Frozen):
    """Probes on steps that had no part in them."""

    own: Transfer | None
    """Steps with the model's own results; ``None`` where it was nearly always right, or nearly always wrong."""
    made_up: Transfer
    """Right steps and the same with a made-up wrong result."""


class Located(Frozen):
    """How well one method finds the first wrong step."""

    name: str
    overall: Estimate
    """Share of chains for which it names the first wrong step, or says rightly that there is none."""
    named: Estimate | None
    """The same for the chains with a mistake."""
    none: Estimate | None
    """The same for those without one."""


class FirstErrorTask(Frozen):
    """All methods on the chains of one task."""

    task: str
    chains: int
    with_mistake: int
    methods: tuple[Located, ...]
    """Probes, log-probabilities, entropy, asking the model, the most common place, chance."""


class FirstErrors(Frozen):
    """Where chains first go wrong, task by task."""

    protocol: str
    tasks: tuple[FirstErrorTask, ...]


class HeldOut(Frozen):
    """What a saved probe is worth on statements that had no part in it."""

    protocol: str
    """What was held out and how, in a sentence."""
    overall: Measured
    parts: tuple[Measured, ...] = ()
    """Affirmative and negated statements, and each topic; or each kind of step."""
    baselines: tuple[Measured, ...] = ()
    """What can be had without the probe: the text alone, log-probabilities."""
    controls: tuple[Measured, ...] = ()
    """The same probe where there is nothing to learn: shuffled labels, a random direction, the first layer."""


class ProbeSummary(Frozen):
    """A saved probe, without its directions."""

    name: str
    """``statements`` or ``steps``."""
    kind: str
    layer: int
    position: str
    rows: int
    """Statements or steps that it learnt from."""
    topics: tuple[str, ...]
    source: str
    seed: int
    held_out: HeldOut
    on_steps: StepWorth | None
    """``None`` where that was not measured."""
    reliability: Reliability
    created_at: str


class ProbeReport(Frozen):
    """All that is known of the truth probes of one model."""

    schema_version: int = VERSION
    model: dict[str, JsonValue] = Field(default_factory=dict)
    """Identity of the model whose hidden states were read."""
    created_at: str = ""
    """When it was last written, ISO 8601."""
    probes: tuple[ProbeSummary, ...] = ()
    statements: Evaluation | None = None
    steps: StepEvaluation | None = None
    mistakes: FirstErrors | None = None


def _area(measured: Measured) -> float:
    return measured.auroc.value if measured.auroc else 0.0


def _interval(estimate: Estimate | None) -> list[JsonValue] | None:
    return None if estimate is None else [estimate.value, estimate.low, estimate.high]
