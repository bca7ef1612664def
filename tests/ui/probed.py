"""Reports on truth probes whose every number is known, and runs that they scored."""

from __future__ import annotations

from tests.ui import samples
from tracer.store.probe_reports import report_path, write_report
from tracer.trace.layer_map import LayerMap
from tracer.trace.probe_report import (
    Bin,
    Curve,
    Density,
    Estimate,
    Evaluation,
    FirstErrors,
    FirstErrorTask,
    HeldOut,
    LayerResult,
    Located,
    Measured,
    MethodResult,
    Picture,
    ProbeReport,
    ProbeSummary,
    Projection,
    Reliability,
    StepEvaluation,
    StepWorth,
    TopicResult,
    Transfer,
)
from tracer.trace.probes import ProbeBaselines, ProbeScore
from tracer.trace.trace import Trace

WEIGHTS = "ab" * 32
RELIABILITY = Reliability(
    bins=(
        Bin(count=4, predicted=0.25, share=0.5, low=0.1, high=0.9),
        Bin(count=6, predicted=0.9, share=1, low=0.5, high=1),
    ),
    ece=0.125,
)


def estimate(value: float, half: float = 0.05) -> Estimate:
    """A number with a symmetric interval."""
    return Estimate(value=value, low=value - half, high=value + half)


def measured(name: str, auroc: float | None, half: float = 0.05) -> Measured:
    """Something with an AUROC, and an accuracy a little below it."""
    area = None if auroc is None else estimate(auroc, half)
    return Measured(name=name, rows=100, accuracy=estimate((auroc or 0.5) - 0.02), auroc=area)


def topic(name: str, accuracy: float) -> TopicResult:
    """A topic that was left out."""
    return TopicResult(
        topic=name, layer=3, accuracy=accuracy, accuracy_sd=0, auroc=accuracy, affirmative=None, negated=None
    )


def method(name: str, auroc: float) -> MethodResult:
    """A method on two topics."""
    topics = (topic("cities", auroc), topic("elements", auroc - 0.125))
    return MethodResult(
        **measured(name, auroc).model_dump(), accuracy_sd=0, auroc_sd=0, affirmative=None, negated=None, topics=topics
    )


def evaluation() -> Evaluation:
    """Two methods at two layers, beside a control."""
    picture = Picture(
        method="ttpd",
        roc=Curve(false_positives=(), true_positives=()),
        reliability=RELIABILITY,
        density=Density(edges=(0, 1), true=(1,), false=(1,)),
    )
    return Evaluation(
        model="demo",
        statements=200,
        left_out="topic",
        topics=("cities", "elements"),
        normalisation="rms",
        repeats=2,
        seed=0,
        layers=(0, 1),
        chosen_layer=1,
        layer_choice="given",
        methods=(method("ttpd", 0.875), method("logistic", 0.75)),
        controls=(method("shuffled labels", 0.5),),
        by_layer=tuple(
            LayerResult(
                method=name, layer=layer, accuracy=estimate(0.5 + layer / 4), accuracy_sd=0, auroc=estimate(0.5)
            )
            for name in ("ttpd", "logistic")
            for layer in (0, 1)
        ),
        pictures=(picture,),
        projection=Projection(
            truth=(1.0, -1.0),
            polarity_sensitive=(0.5, 0.5),
            label=(True, False),
            negated=(False, True),
            topic=("cities", "cities"),
        ),
        sinks=0,
        notes=("a note on what was left out",),
    )


def worth(*, over: float, adds: float) -> StepWorth:
    """A probe on steps, by how much it is better than log-probabilities and than all baselines."""
    return StepWorth(
        protocol="by problem",
        rows=40,
        wrong=10,
        probe=measured("steps", 0.75),
        baselines=(measured("mean_logprob", 0.625), measured("length", None)),
        over_logprob=estimate(over),
        stack=measured("all baselines", 0.75),
        with_probe=measured("with the probe", 0.8),
        adds=estimate(adds),
    )


def probe(auroc: float, *, on_steps: StepWorth | None = None) -> ProbeSummary:
    """A saved probe beside one baseline and one control."""
    held = HeldOut(
        protocol="each topic left out in turn",
        overall=measured("logistic_l2", auroc),
        parts=(measured("negated", 0.5),),
        baselines=(measured("TF-IDF of the text", 0.625),),
        controls=(measured("random direction", 0.5),),
    )
    return ProbeSummary(
        name="statements",
        kind="logistic_l2",
        layer=12,
        position="last",
        rows=576,
        topics=("cities",),
        source="by hand",
        seed=0,
        held_out=held,
        on_steps=on_steps,
        reliability=RELIABILITY,
        created_at="2026-01-01T00:00:00+00:00",
    )


def keep(report: ProbeReport, *, weights: str = WEIGHTS) -> ProbeReport:
    """Write a report where the app looks for it."""
    report = report.model_copy(update={"model": {"name": "demo", "weights_sha256": weights}})
    write_report(report_path(report.model), report)
    return report


def scored(weights: str = WEIGHTS) -> Trace:
    """A run one step of which was scored, by the model of those weights."""
    trace = samples.cot()
    score = ProbeScore(
        name="statements",
        layer=12,
        position="last",
        step_id=trace.steps[1].id,
        token=7,
        probability=0.25,
        low=0.125,
        high=0.5,
        baselines=ProbeBaselines(mean_logprob=-0.5),
        flags=["position"],
        replica={"weights_sha256": weights},
    )
    sentence = score.model_copy(update={"sentence": 0})
    return trace.model_copy(update={"probes": [score.model_dump(mode="json"), sentence.model_dump(mode="json")]})


def mapped(**changes: object) -> Trace:
    """A run whose answer was read by probes of two layers."""
    trace = samples.cot()
    step = trace.steps[-1]
    assert step.call_id is not None and step.completion is not None and step.start is not None and step.end is not None
    count = step.end - step.start
    own = LayerMap(
        step_id=step.id,
        call_id=step.call_id,
        completion=step.completion,
        start=step.start,
        kind="logistic_l2",
        layers=[0, 1],
        values=[[0.5] * count, [-1.25] * count],
        held_out=[0.5, 0.75],
        protocol="by hand",
        replica={"weights_sha256": WEIGHTS},
    )
    return trace.model_copy(update={"probes": [{**own.model_dump(mode="json"), **changes}]})


def report() -> ProbeReport:
    """A probe and an evaluation with all its parts."""
    transfer = Transfer(
        steps="the model's own", rows=40, wrong=10, by_operation={}, probes=(worth(over=0.1, adds=0.1),), baselines=()
    )
    located = Located(name="chance", overall=estimate(0.25), named=None, none=None)
    task = FirstErrorTask(task="sums", chains=4, with_mistake=2, methods=(located,))
    return ProbeReport(
        probes=(probe(0.75),),
        statements=evaluation(),
        steps=StepEvaluation(own=None, made_up=transfer),
        mistakes=FirstErrors(protocol="by hand", tasks=(task,)),
    )


def hostile() -> ProbeReport:
    """A report each of whose names and sentences is a text that would load something."""
    texts = samples.CORPUS
    kept = probe(0.75).model_copy(update={"kind": texts[0], "source": texts[1], "position": texts[2]})
    held = HeldOut(
        protocol=texts[3],
        overall=measured(texts[4], 0.6),
        parts=tuple(measured(text, 0.5) for text in texts),
        baselines=tuple(measured(text, 0.7) for text in texts),
        controls=(measured(texts[5], 0.5),),
    )
    own = evaluation()
    methods = tuple(
        method(text, 0.6).model_copy(update={"topics": tuple(topic(name, 0.5) for name in texts)}) for text in texts
    )
    found = own.model_copy(
        update={
            "model": texts[0],
            "topics": texts,
            "methods": methods,
            "notes": texts,
            "by_layer": tuple(item.model_copy(update={"method": texts[1]}) for item in own.by_layer),
            "pictures": tuple(item.model_copy(update={"method": texts[2]}) for item in own.pictures),
        }
    )
    located = Located(name=texts[6], overall=estimate(0.25), named=None, none=None)
    task = FirstErrorTask(task=texts[7], chains=4, with_mistake=2, methods=(located,))
    return ProbeReport(
        probes=(kept.model_copy(update={"held_out": held}),),
        statements=found,
        mistakes=FirstErrors(protocol=texts[0], tasks=(task,)),
    )
