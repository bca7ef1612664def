"""What each kind of job does, with the same calls as the command line. Heavy libraries load when work begins."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pydantic import JsonValue

from tracer.errors import InputError
from tracer.jobs.parameters import (
    CiteParameters,
    ExplainParameters,
    FaithfulnessParameters,
    FetchModelParameters,
    Parameters,
    ProbeEvaluateParameters,
    ProbeMapParameters,
    ProbeTrainParameters,
    RunParameters,
    ServeStartParameters,
    ServeStopParameters,
)
from tracer.jobs.reporter import Reporter
from tracer.jobs.stop import Stop
from tracer.store import Store

if TYPE_CHECKING:
    from tracer.explain.base import TargetFunction
    from tracer.explain.report import Report

_CITED: str = "mirage"


@dataclass(frozen=True, slots=True)
class Context:
    """What work has around it.

    Args:
        reporter: Told what happens.
        stop: Knows whether somebody wants it to stop.
    """

    reporter: Reporter
    stop: Stop

    @property
    def cancel(self) -> threading.Event:
        """Set once somebody wants it to stop."""
        return self.stop.event

    def progress(self, progress: object) -> None:
        """Report, and end the work here if it shall stop.

        Raises:
            CancelledError: It shall stop.
        """
        self.reporter.progress(progress)
        self.stop.check()


def perform(parameters: Parameters, context: Context) -> None:
    """Do the work that parameters describe.

    Raises:
        CancelledError: Somebody stopped it.
        TracerError: It failed in an expected way.
    """
    match parameters:
        case RunParameters():
            _run(parameters, context)
        case ExplainParameters():
            _explain(parameters, context)
        case CiteParameters():
            _cite(parameters, context)
        case FaithfulnessParameters():
            _faithfulness(parameters, context)
        case ProbeTrainParameters():
            _probe_train(parameters, context)
        case ProbeEvaluateParameters():
            _probe_evaluate(parameters, context)
        case ProbeMapParameters():
            _probe_map(parameters, context)
        case ServeStartParameters():
            _serve_start(parameters, context)
        case ServeStopParameters():
            _serve_stop(parameters, context)
        case FetchModelParameters():
            _fetch_model(parameters, context)
        case _:
            raise InputError(f"no job does {type(parameters).__name__}")


def _run(parameters: RunParameters, context: Context) -> None:
    from tracer.agents.build import build_agent
    from tracer.agents.tools import load_documents
    from tracer.engines.connect import connect

    # ReAct searches the folder; the other agents are given all of it.
    given = parameters.docs if parameters.kind != "react" else None
    documents = [] if given is None else load_documents(given)
    context.reporter.stage("connecting to an engine")
    with context.stop.interrupting():
        found = connect(parameters.engine, model=parameters.model, dtype=parameters.dtype, progress=context.progress)
    with Store() as store, closing(found) as engine:
        context.reporter.log(f"engine: {engine.description}")
        build_agent(engine, parameters.options()).run(
            parameters.question,
            documents=documents,
            reference=parameters.reference,
            name=parameters.name,
            store=store,
            on_event=context.reporter.event,
            on_tokens=context.reporter.tokens,
            cancel=context.cancel,
        )


def _explain(parameters: ExplainParameters, context: Context) -> None:
    report = _report(
        parameters,
        context,
        methods=parameters.methods,
        probes=parameters.probes,
        ask=parameters.ask,
        target_function=parameters.target_function,
        foil=parameters.foil,
        chunk_tokens=parameters.chunk_tokens,
    )
    context.reporter.result(
        {
            "methods": [explanation.method for explanation in report.explanations],
            "targets": list(report.targets),
            "probes": list(dict.fromkeys(score.name for score in report.probes)),
            "probe_hint": report.probe_hint,
        }
    )


def _cite(parameters: CiteParameters, context: Context) -> None:
    report = _report(parameters, context, methods=[_CITED], probes=[])
    from tracer.explain.citations import cited_answers
    from tracer.explain.cited import Rule

    rule = Rule(parameters.rule, parameters.share)
    answers = cited_answers(report.trace, report.explanation(_CITED), report.targets, rule=rule, unit=parameters.by)
    context.reporter.result(cast("JsonValue", [answer.to_document() for answer in answers]))


def _report(
    parameters: ExplainParameters | CiteParameters,
    context: Context,
    *,
    methods: Sequence[str] | None,
    probes: Sequence[str] | None,
    ask: bool = False,
    target_function: TargetFunction = "logprob",
    foil: str | int | None = None,
    chunk_tokens: int | None = None,
) -> Report:
    """Explain a stored run as the parameters say."""
    with Store() as store:
        trace = store.load(parameters.trace)
        context.reporter.concerns(trace.id)
        with context.stop.interrupting():
            from tracer.explain.service import explain
        return explain(
            trace,
            methods=methods,
            probes=probes,
            ask=ask,
            targets=parameters.targets,
            target_function=target_function,
            foil=foil,
            replica=parameters.replica,
            dtype=parameters.dtype,
            parameters=parameters.parameters,
            chunk_tokens=chunk_tokens,
            seed=parameters.seed,
            store=store,
            faithfulness=parameters.faithfulness,
            force=parameters.force,
            low_memory=parameters.low_memory,
            progress=context.progress,
            cancel=context.cancel,
        )


def _faithfulness(parameters: FaithfulnessParameters, context: Context) -> None:
    with Store() as store:
        traces = [store.load(name) for name in dict.fromkeys(parameters.runs)]
        with context.stop.interrupting():
            from tracer.explain.leaderboard import DEFAULT_FIELD, leaderboard
        board = leaderboard(
            traces,
            methods=DEFAULT_FIELD if parameters.methods is None else parameters.methods,
            parameters=parameters.parameters,
            targets=parameters.targets,
            replica=parameters.replica,
            dtype=parameters.dtype,
            seed=parameters.seed,
            store=store,
            progress=context.progress,
            cancel=context.cancel,
        )
    context.reporter.result(cast("JsonValue", [item.to_document() for item in board.standings]))


def _probe_train(parameters: ProbeTrainParameters, context: Context) -> None:
    with context.stop.interrupting():
        from tracer.explain.probes.train import FACTS_PER_TOPIC, KIND
        from tracer.explain.probes.workbench import Workbench, keep_probes
    bench = Workbench(
        parameters.model,
        dtype=parameters.dtype,
        seed=parameters.seed,
        progress=context.progress,
        cancel=context.cancel,
    )
    probes = bench.train(kind=parameters.kind or KIND, per_topic=parameters.per_topic or FACTS_PER_TOPIC)
    files = keep_probes(probes, bench.identity)
    records = [cast("dict[str, JsonValue]", probe.record.model_dump(mode="json")) for probe in probes]
    context.reporter.result(
        {"probes": [{**record, "file": str(file)} for record, file in zip(records, files, strict=True)]}
    )


def _probe_evaluate(parameters: ProbeEvaluateParameters, context: Context) -> None:
    with context.stop.interrupting():
        from tracer.explain.probes.workbench import EVALUATED_PER_TOPIC, Sizes, Workbench, keep_report
        from tracer.store.probe_reports import report_path
    bench = Workbench(
        parameters.model, dtype=parameters.dtype, seed=parameters.seed, progress=context.progress, cancel=context.cancel
    )
    sizes = Sizes(per_topic=parameters.per_topic or EVALUATED_PER_TOPIC, repeats=parameters.repeats)
    found = bench.evaluate(parameters.sections, sizes=sizes)
    path = report_path(bench.identity)
    keep_report(path, found)
    context.reporter.result({"file": str(path), "sections": list(parameters.sections)})


def _probe_map(parameters: ProbeMapParameters, context: Context) -> None:
    with Store() as store:
        trace = store.load(parameters.trace)
        context.reporter.concerns(trace.id)
        with context.stop.interrupting():
            from tracer.explain.probes.layer_map import map_trace
            from tracer.explain.probes.workbench import Workbench
        bench = Workbench(
            parameters.replica or trace.model.name,
            dtype=parameters.dtype,
            seed=parameters.seed,
            progress=context.progress,
            cancel=context.cancel,
        )
        found = map_trace(trace, bench, steps=parameters.steps, store=store, force=parameters.force)
    context.reporter.result({"steps": [own.step_id for own in found]})


def _serve_start(parameters: ServeStartParameters, context: Context) -> None:
    from tracer.engines import models, server
    from tracer.engines.install import ServeOptions

    options = ServeOptions(
        dtype=parameters.dtype,
        max_model_len=parameters.max_model_len,
        idle_timeout=parameters.idle_minutes * 60 if parameters.idle_minutes > 0 else None,
    )
    with context.stop.interrupting():
        model = models.resolve(parameters.model, progress=context.progress)
        handle = server.reuse_or_start(model, options, progress=context.progress)
    context.reporter.result({"url": handle.url, "reused": handle.reused})


def _serve_stop(parameters: ServeStopParameters, context: Context) -> None:
    from tracer.engines import server, server_state

    stopped: list[JsonValue] = []
    for item in server_state.status():
        if parameters.server in (None, item.state.id):
            context.reporter.stage(f"stopping {item.state.url}")
            server.stop(item.state)
            stopped.append(item.state.url)
    if parameters.server is not None and not stopped:
        raise InputError(f"no server has the id {parameters.server!r}; it may have ended by itself")
    context.reporter.result(stopped)


def _fetch_model(parameters: FetchModelParameters, context: Context) -> None:
    from tracer.engines import models

    context.reporter.stage("looking for the model")
    with context.stop.interrupting():
        found = models.resolve(parameters.name, progress=context.progress, verify=parameters.verify)
    context.reporter.result({"name": found.name, "path": str(found.path), "source": found.source})
