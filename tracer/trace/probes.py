"""Probe scores as a trace carries them: how true the model takes a step to be, beside what else is known of it.

A trace keeps them as plain data, so that those of other programs and of newer versions survive; this is the typed view
of those that tracer writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import Field, JsonValue, ValidationError

from tracer.errors import TraceFormatError
from tracer.trace.trace import Finite, Record, Trace

SINK = "sink"
"""The token is a resting place for attention: what it holds has little to do with the text."""
OTHER_TEXT = "other_kind_of_text"
"""The text does not read like a statement, which is all that the probe has seen."""
SEEN = "seen_in_training"
"""The probe learnt from this very text, so it is not scored."""
NOT_BETTER = "not_better_than_logprob"
"""On held-out steps the probe is not shown to be better than the log-probability."""
NOT_MEASURED = "not_measured_on_steps"
"""Nobody measured what the probe is worth on steps of reasoning."""

SENTENCES: Mapping[str, str] = {
    SINK: "the token is an attention sink, whose hidden state says little about the text",
    OTHER_TEXT: "the text does not read like a statement, and the probe has seen nothing else",
    SEEN: "the probe learnt from this very text, so it is not scored",
    NOT_BETTER: "on held-out steps this probe is not shown to be better than the log-probability: an experimental "
    "signal, no truth",
    NOT_MEASURED: "what this probe is worth on steps of reasoning was not measured: an experimental signal, no truth",
}
"""What each flag means."""


class ProbeBaselines(Record):
    """What can be known of the same tokens without a probe; ``None`` where it cannot."""

    mean_logprob: Finite | None = None
    """Mean log-probability of the tokens, if the model wrote them; nats."""
    min_logprob: Finite | None = None
    """That of the least likely one."""
    entropy: Finite | None = None
    """Mean entropy of the distributions that they were drawn from; nats."""
    agreement: Finite | None = None
    """Share of the answered branches that came to the same answer as the step's branch."""
    p_true: Finite | None = None
    """Probability of "True" against "False" where the model is asked (Kadavath et al. 2022, arXiv:2207.05221)."""


class ProbeScore(Record):
    """What one probe says about one step, or about one sentence of it."""

    key: str | None = None
    """SHA-256 of all that the score depends on but its place: the probe and the trace's tokens."""
    name: str
    layer: int
    """Decoder layer whose output was read, counted from 0."""
    position: str
    """Which token of the text was read."""
    step_id: str
    sentence: int | None = None
    """Number of the sentence in its step, from 0; ``None`` for the step as a whole."""
    text: str = ""
    """The sentence or step, as its tokens read."""
    call_id: str | None = None
    """The call that holds the tokens."""
    completion: int | None = None
    """Which completion of it, where they are not part of the prompt."""
    start: int | None = None
    """First token of the text in that call's prompt and completion taken together."""
    end: int | None = None
    """One past its last."""
    token: int | None = None
    """The token that was read."""
    score: Finite | None = None
    """Above zero means true; ``None`` where the probe learnt from this very text."""
    probability: Finite | None = None
    """Calibrated on texts that the probe was not fitted on; of the kind that it was trained on, not of steps."""
    low: Finite | None = None
    """End of the 95% band of the probability."""
    high: Finite | None = None
    baselines: ProbeBaselines = Field(default_factory=ProbeBaselines)
    held_out: dict[str, JsonValue] = Field(default_factory=dict)
    """What the probe is worth on texts that had no part in it, with the baselines on the same texts."""
    flags: list[str] = Field(default_factory=list)
    """Why the score is to be doubted."""
    replica: dict[str, JsonValue] = Field(default_factory=dict)
    """Identity of the model whose hidden states were read."""
    parity: dict[str, JsonValue] | None = None
    """How far its log-probabilities are from the recorded ones."""

    @classmethod
    def read(cls, document: Mapping[str, JsonValue]) -> ProbeScore:
        """The typed view of a trace's probe score.

        Raises:
            TraceFormatError: It is not of this form.
        """
        try:
            return cls.model_validate(dict(document))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "top level"
            raise TraceFormatError(f"a probe score cannot be read: {where}: {first['msg']}") from None


def probe_scores(trace: Trace, *, name: str | None = None) -> list[ProbeScore]:
    """Scores that a trace carries, those that cannot be read left out.

    Args:
        trace: The trace.
        name: The probe; all of them if not given.
    """
    found: list[ProbeScore] = []
    for document in trace.probes:
        try:
            score = ProbeScore.read(document)
        except TraceFormatError:
            continue
        if name in (None, score.name):
            found.append(score)
    return found


def of_steps(scores: Iterable[ProbeScore], *, name: str) -> dict[str, ProbeScore]:
    """A probe's scores of whole steps, by step id."""
    return {score.step_id: score for score in scores if score.sentence is None and score.name == name}
