"""An answer with numbered citations, made from what MIRAGE found out about it.

MIRAGE says which tokens of an answer depend on its documents, and for each of them what every document contributed.
Here those contributions are added up over words or sentences and turned into citations by a rule. Documents carry the
number at which they stand in the prompt, so that ``[2]`` means the same here and there. With the citations comes what
is known of how faithful the scores behind them are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, cast, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tracer.errors import InputError, TraceFormatError, UnknownNameError
from tracer.explain.cited import Citation, CitedAnswer, Reference, Rule, Trust
from tracer.explain.faithfulness import measures_of
from tracer.trace.explanation import Explanation
from tracer.trace.faithfulness import against_random
from tracer.trace.segments import assign
from tracer.trace.steps import Span, split_text
from tracer.trace.trace import Trace

Unit = Literal["word", "sentence"]
_WORD = re.compile(r"\s*\S+")
_CLOSING = " \t\r\n.,;:!?"


class _Token(BaseModel):
    """A row of the table that MIRAGE leaves in an explanation's details."""

    model_config = ConfigDict(extra="ignore")
    text: str | None
    kl: float
    kept: bool
    sources: dict[str, float] = Field(default_factory=dict)


class _Details(BaseModel):
    model_config = ConfigDict(extra="ignore")
    context: list[str]
    tokens: list[_Token]


def shared_threshold(explanation: Explanation, step_ids: Iterable[str]) -> float:
    """What MIRAGE's threshold would be over the tokens of several steps together, in nats.

    Its own is taken for each step alone, where some token is always among the highest; a step that owes little to the
    context beside the others should cite nothing.

    Raises:
        InputError: The explanation is by another method.
        TraceFormatError: It cannot be read.
    """
    kl = [token.kl for step_id in step_ids for token in _read(explanation, step_id).tokens if token.text]
    deviations = explanation.parameters.get("deviations")
    fixed = explanation.parameters.get("threshold") is not None or not isinstance(deviations, int | float)
    return float(np.mean(kl) + float(cast("float", deviations)) * np.std(kl)) if kl and not fixed else 0.0


def cited_answer(
    trace: Trace,
    explanation: Explanation,
    step_id: str,
    *,
    rule: Rule | None = None,
    unit: Unit = "sentence",
    least: float = 0.0,
) -> CitedAnswer:
    """Make citations for one step.

    Args:
        trace: The trace.
        explanation: What MIRAGE found out about the step, among others.
        step_id: The step.
        rule: What is cited; the range rule if not given.
        unit: What contributions are added up over before the rule is applied. Neighbouring words that cite the same
            become one citation.
        least: Tokens that the context changed by less than this cite nothing, nats.

    Raises:
        UnknownNameError: The explanation does not cover the step, or there is no such unit.
        InputError: The explanation is by another method, or the step read nothing that could be cited.
        TraceFormatError: The explanation cannot be read.
    """
    if unit not in get_args(Unit):
        raise UnknownNameError("unit of citations", unit, get_args(Unit))
    explanation.row(step_id)
    details = _read(explanation, step_id)
    if not details.context:
        raise InputError(
            f"step {step_id} of trace {trace.id} read no document or observation, so there is nothing to cite"
        )
    numbers, references = _number(trace, explanation, details.context)
    texts = [token.text for token in details.tokens]
    if None in texts:
        raise InputError("the replica that explained the trace had no tokenizer, so the answer's text is not known")
    text = "".join(cast("list[str]", texts))
    tokens = [token if token.kl >= least else token.model_copy(update={"kept": False}) for token in details.tokens]
    values = [_by_number(token, numbers, len(references)) for token in tokens]
    citations = _join(text, tokens, values, rule or Rule(), unit)
    cited = {number for citation in citations for number in citation.numbers}
    totals = [max(0.0, sum(row[place] for row in values)) for place in range(len(references))]
    return CitedAnswer(
        step_id,
        explanation.method,
        text,
        tuple(_of_tokens(tokens, values, rule or Rule())),
        tuple(citations),
        _shared(
            replace(item, value=total, cited=item.number in cited)
            for item, total in zip(references, totals, strict=True)
        ),
        # The end of the answer has no text that the context could have changed.
        max((token.kl for token in tokens if token.text), default=0.0),
        _trust(explanation, step_id),
    )


def cited_answers(
    trace: Trace,
    explanation: Explanation,
    step_ids: Sequence[str],
    *,
    rule: Rule | None = None,
    unit: Unit = "sentence",
) -> list[CitedAnswer]:
    """Citations for those of several steps that read something to cite, with a threshold over all of them.

    Args:
        trace: The trace.
        explanation: What MIRAGE found out about the steps.
        step_ids: The steps; where none of them read anything, that is an error as in `cited_answer`.
        rule: What is cited; the range rule if not given.
        unit: What contributions are added up over.

    Raises:
        InputError: As `cited_answer`.
        UnknownNameError: As `cited_answer`.
        TraceFormatError: As `cited_answer`.
    """
    read = [step_id for step_id in step_ids if explanation.details.get(step_id, {}).get("context")]
    least = shared_threshold(explanation, read) if len(read) > 1 else 0.0
    return [
        cited_answer(trace, explanation, step_id, rule=rule, unit=unit, least=least) for step_id in read or step_ids
    ]


def joint_references(answers: Iterable[CitedAnswer]) -> tuple[Reference, ...]:
    """References of several answers of one trace, with what they contributed to all of them."""
    found: dict[tuple[int, str | None], Reference] = {}
    for reference in (reference for answer in answers for reference in answer.references):
        key = (reference.number, reference.step_id)
        before = found.get(key, replace(reference, value=0.0, cited=False))
        found[key] = replace(before, value=before.value + reference.value, cited=before.cited or reference.cited)
    return _shared(found[key] for key in sorted(found, key=lambda key: key[0]))


def _shared(references: Iterable[Reference]) -> tuple[Reference, ...]:
    """References with their shares of what all of them contributed."""
    known = tuple(references)
    whole = sum(item.value for item in known)
    return tuple(replace(item, share=item.value / whole if whole > 0 else 0.0) for item in known)


def _read(explanation: Explanation, step_id: str) -> _Details:
    found = explanation.details.get(step_id, {})
    if "context" not in found:
        raise InputError(f"citations are made from an explanation by mirage, and this one is by {explanation.method}")
    try:
        return _Details.model_validate(found)
    except ValidationError:
        raise TraceFormatError(
            f"the explanation of step {step_id} by {explanation.method} cannot be read; explain the trace again"
        ) from None


def _number(trace: Trace, explanation: Explanation, context: Iterable[str]) -> tuple[dict[str, int], list[Reference]]:
    """The number of each source, and the references that bear them; chunks of a step are one."""
    steps = {step.id: step for step in trace.steps}
    sources = {source.id: source for source in explanation.sources}
    places: dict[str, int] = {}
    numbers: dict[str, int] = {}
    references: list[Reference] = []
    for name in context:
        if name not in sources:
            raise TraceFormatError(f"an explanation names the source {name!r}, which it does not have")
        source = sources[name]
        number = places.setdefault(f"step {source.step_id}" if source.step_id else f"source {name}", len(places) + 1)
        numbers[name] = number
        if number > len(references):
            step = steps.get(source.step_id or "")
            lines = [] if step is None else step.text.strip().splitlines()
            title = "" if step is None else str(step.data.get("title") or "").strip()
            title = title or (lines[0] if lines else "")
            references.append(Reference(number, source.kind, source.step_id, title, 0.0, 0.0, cited=False))
    return numbers, references


def _by_number(token: _Token, numbers: dict[str, int], references: int) -> list[float]:
    """What each reference contributed to a token, ``(references,)``."""
    values = [0.0] * references
    if token.kept:
        for name, value in token.sources.items():
            if name in numbers:
                values[numbers[name] - 1] += value
    return values


def _of_tokens(tokens: Sequence[_Token], values: Sequence[Sequence[float]], rule: Rule) -> Iterable[Citation]:
    position = 0
    for token, row in zip(tokens, values, strict=True):
        start, position = position, position + len(token.text or "")
        if token.kept:
            yield _citation((start, position), row, rule)


def _citation(span: tuple[int, int], values: Sequence[float], rule: Rule) -> Citation:
    chosen = rule.chosen(values)
    return Citation(*span, tuple(place + 1 for place in chosen), tuple(values[place] for place in chosen))


def _join(
    text: str, tokens: Sequence[_Token], values: Sequence[Sequence[float]], rule: Rule, unit: Unit
) -> list[Citation]:
    """Citations of words or sentences; neighbouring words that cite the same are one."""
    spans = split_text(text) if unit == "sentence" else _words(text)
    found: list[Citation] = []
    last: Span | None = None
    for span, row in zip(spans, _sums(tokens, values, spans), strict=True):
        citation = _citation(_trimmed(text, span), row, rule)
        if not citation.numbers:
            continue
        adjoins = last is not None and last.end == span.start and found[-1].numbers == citation.numbers
        if unit == "word" and adjoins:
            before = found.pop()
            both = tuple(one + other for one, other in zip(before.values, citation.values, strict=True))
            citation = replace(citation, start=before.start, values=both)
        found.append(citation)
        last = span
    return found


def _sums(tokens: Sequence[_Token], values: Sequence[Sequence[float]], spans: Sequence[Span]) -> list[list[float]]:
    """Contributions to the tokens that mostly lie in each span, added up, ``(spans, references)``."""
    sums = np.zeros((len(spans), len(values[0]) if values else 0))
    if spans:
        ends = np.cumsum([len(token.text or "") for token in tokens]).tolist()
        owners = assign(list(zip([0, *ends[:-1]], ends, strict=True)), [(span.start, span.end) for span in spans])
        np.add.at(sums, owners, np.asarray(values))
    found: list[list[float]] = sums.tolist()
    return found


def _trimmed(text: str, span: Span) -> tuple[int, int]:
    """A span without the white space around it and the punctuation at its end, if more than that is in it."""
    inside = text[span.start : span.end]
    core = inside.rstrip(_CLOSING) or inside
    return span.start + len(inside) - len(inside.lstrip()), span.start + len(core)


def _words(text: str) -> list[Span]:
    """Consecutive ranges that cover the text, each a word with the white space before it."""
    spans = [Span(*match.span()) for match in _WORD.finditer(text)]
    return [*spans[:-1], Span(spans[-1].start, len(text))] if spans else []


def _trust(explanation: Explanation, step_id: str) -> Trust:
    known = measures_of(explanation)
    pooled = against_random(known.values()) if known else None
    parity = explanation.parity or {}
    return Trust(
        known.get(step_id),
        None if pooled is None else pooled.z,
        None if pooled is None else pooled.better,
        forced=bool(parity.get("forced")),
        retokenised=bool(parity.get("retokenised")),
    )
