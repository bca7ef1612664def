"""A trace as token sequences: which tokens each step wrote, and what every token that it could read shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tracer.errors import InputError, TraceFormatError
from tracer.replay.forward import CHUNK, Scored
from tracer.replay.tree import Ids, PrefixTree, build_tree
from tracer.trace.trace import Call, Step, Trace

SINK = "sink"
GLUE = "template"
WRITTEN = ("thought", "action", "evaluation", "answer")
"""Kinds of steps that a model writes, where nothing else says who did."""


@dataclass(frozen=True, slots=True)
class Source:
    """Something that a step could read: a run of tokens that show one thing.

    Args:
        id: Its name in this trace.
        kind: A segment kind, or ``sink`` for the first token of a sequence, which attention uses as a resting place.
        step_id: The step that it shows, if it shows one.
        call_id: The first call that holds it.
        start: Position of its first token in that call's prompt and completion taken together.
        end: One past its last.
        completion: Which completion of the call, where it reaches beyond the prompt.
    """

    id: str
    kind: str
    step_id: str | None
    call_id: str
    start: int
    end: int
    completion: int | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A step that the model wrote.

    Args:
        step_id: The step.
        sequence: Number of the sequence that it was written in.
        start: Position of its first token in that sequence.
        end: One past its last.
    """

    step_id: str
    sequence: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt and one of its completions.

    Args:
        call: The call.
        completion: Number of the completion.
        token_ids: Prompt and completion, ``(length,)``.
        prompt: Tokens of the prompt.
    """

    call: Call
    completion: int
    token_ids: Ids
    prompt: int


class Recorded:
    """What a trace recorded, laid out for replay.

    Attributes:
        trace: The trace.
        sequences: One for each completion.

    Args:
        trace: A trace with token ids.
        chunk_tokens: Documents and observations longer than this are cut into chunks of about equal size, each a
            source of its own; ``None`` keeps them whole.

    Raises:
        InputError: It has no token ids, or no completion at all.
    """

    def __init__(self, trace: Trace, *, chunk_tokens: int | None = None) -> None:
        if chunk_tokens is not None and chunk_tokens < 1:
            raise InputError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
        self.trace = trace
        self._chunk_tokens = chunk_tokens
        self.sequences = tuple(_sequences(trace))
        if not self.sequences:
            raise InputError(f"trace {trace.id} has no completion to explain: the model wrote nothing in it")
        self._by_place = {(item.call.id, item.completion): number for number, item in enumerate(self.sequences)}

    @cached_property
    def tree(self) -> PrefixTree:
        """All sequences with shared beginnings merged, cut for bounded memory."""
        return build_tree([sequence.token_ids for sequence in self.sequences], longest=CHUNK)

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """Every step that the model wrote, in the order of the trace."""
        return tuple(target for step in self.trace.steps if (target := self.find_target(step)) is not None)

    def target(self, name: str) -> Target:
        """The tokens of a step, or one of them.

        Args:
            name: A step's id, or ``ID#N`` for its token N, counted from 0.

        Raises:
            InputError: There is no such step or token, or the model did not write it.
        """
        step_id, mark, number = name.partition("#")
        if mark:
            whole = self.target(step_id)
            tokens = self.tokens_of(whole)
            if not number.isdecimal() or int(number) >= len(tokens):
                raise InputError(f"step {step_id} has tokens 0 to {len(tokens) - 1}; there is no {name!r}")
            return tokens[int(number)]
        try:
            step = self.trace.step(step_id)
        except TraceFormatError:
            known = ", ".join(target.step_id for target in self.targets[:12])
            raise InputError(f"trace {self.trace.id} has no step {step_id!r}; steps with tokens: {known}") from None
        target = self.find_target(step)
        if target is None:
            raise InputError(
                f"step {step_id} ({step.kind}) has no tokens of the model's own, so nothing led the model to it; "
                "explain a thought, action, evaluation or answer"
            )
        return target

    def tokens_of(self, target: Target) -> tuple[Target, ...]:
        """Each token of a target as a target of its own, named ``ID#N``."""
        return tuple(
            Target(f"{target.step_id}#{position - target.start}", target.sequence, position, position + 1)
            for position in range(target.start, target.end)
        )

    def answer(self) -> tuple[Target, ...]:
        """The targets that stand for the final answer: the last answer step, or those that were voted for.

        Raises:
            InputError: The run ended without an answer that the model wrote.
        """
        answers = [step for step in self.trace.steps if step.kind == "answer"]
        if not answers:
            raise InputError(f"trace {self.trace.id} has no answer; name the steps to explain, or use --targets all")
        own = self.find_target(answers[-1])
        if own is not None:
            return (own,)
        # A vote or a selection: what it came from says what the model read.
        before = {edge.source for edge in self.trace.edges if edge.target == answers[-1].id}
        before |= {edge.target for edge in self.trace.edges if edge.source == answers[-1].id}
        before |= set(answers[-1].parents)
        found = tuple(target for target in self.targets if target.step_id in before)
        if not found:
            raise InputError(f"the answer of trace {self.trace.id} was not written by the model; name the steps")
        return found

    @cached_property
    def scored(self) -> Scored:
        """Every completion token of the tree once, with the token before it."""
        rows, indices = self._completion_indices
        return Scored(rows, self.tree.token_ids[indices])

    @cached_property
    def _completion_indices(self) -> tuple[Ids, Ids]:
        pairs = [
            np.stack([places[sequence.prompt - 1 : -1], places[sequence.prompt :]])
            for sequence, places in zip(self.sequences, self.tree.sequences, strict=True)
        ]
        rows, indices = np.unique(np.concatenate(pairs, axis=1), axis=1)
        return rows, indices

    def by_completion(self, values: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """Spread values of `scored` over the sequences: for each one ``(tokens of its completion,)``."""
        _, indices = self._completion_indices
        order = np.argsort(indices)
        spread: list[NDArray[np.float64]] = []
        for sequence, places in zip(self.sequences, self.tree.sequences, strict=True):
            own = places[sequence.prompt :]
            spread.append(values[order[np.searchsorted(indices, own, sorter=order)]])
        return spread

    @cached_property
    def _labelled(self) -> tuple[tuple[Source, ...], tuple[Ids, ...]]:
        sources: dict[tuple[str, str | None, int], int] = {}
        found: list[Source] = []
        owners: list[Ids] = []
        for sequence, places in zip(self.sequences, self.tree.sequences, strict=True):
            owner = np.empty(len(places), dtype=np.int64)
            for start, end, kind, step_id in self._runs(sequence):
                # Not by its end: the end-of-sequence token behind a step may be cut off in later prompts.
                key = (kind, step_id, int(places[start]))
                number = sources.setdefault(key, len(found))
                if number == len(found):
                    completion = sequence.completion if end > sequence.prompt else None
                    found.append(Source(f"x{number}", kind, step_id, sequence.call.id, start, end, completion))
                owner[start:end] = number
            owners.append(owner)
        return tuple(found), tuple(owners)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Everything that any step could read; what several calls show alike is there once."""
        return self._labelled[0]

    @property
    def source_of(self) -> tuple[Ids, ...]:
        """For each sequence, the number of the source that each token belongs to, ``(length,)``."""
        return self._labelled[1]

    def aggregate(self, target: Target, scores: NDArray[np.floating]) -> NDArray[np.float32]:
        """Sum token scores by source.

        Args:
            target: What they explain.
            scores: One for each token before the target's end, ``(target.end,)``.

        Returns:
            ``(sources,)``; zero for what the target could not read.
        """
        owner = self.source_of[target.sequence][: target.end]
        return np.bincount(owner, weights=scores, minlength=len(self.sources)).astype(np.float32)

    def find_target(self, step: Step) -> Target | None:
        """The tokens of a step that the model wrote, or ``None`` where it wrote none."""
        if step.call_id is None or step.completion is None or step.start is None or step.end is None:
            return None
        number = self._by_place.get((step.call_id, step.completion))
        if number is None or step.end <= step.start:
            return None
        prompt = self.sequences[number].prompt
        return Target(step.id, number, prompt + step.start, prompt + step.end)

    def _runs(self, sequence: TokenSequence) -> list[tuple[int, int, str, str | None]]:
        """Cut a sequence into labelled runs ``(start, end, kind, step_id)``."""
        kinds: list[tuple[str, str | None]] = [(GLUE, None)] * len(sequence.token_ids)
        for segment in sequence.call.segments:
            kinds[segment.start : segment.end] = [(segment.kind, segment.step_id)] * (segment.end - segment.start)
        for step in self.trace.steps:
            if step.call_id == sequence.call.id and step.completion == sequence.completion:
                start, end = sequence.prompt + (step.start or 0), sequence.prompt + (step.end or 0)
                kinds[start:end] = [(step.kind, step.id)] * (end - start)
        if kinds[0][0] == GLUE:
            kinds[0] = (SINK, None)
        bounds = [0, *(at for at in range(1, len(kinds)) if kinds[at] != kinds[at - 1]), len(kinds)]
        return [
            (left, right, *kinds[start])
            for start, end in zip(bounds, bounds[1:], strict=False)
            for left, right in self._chunks(start, end, kinds[start][0])
        ]

    def _chunks(self, start: int, end: int, kind: str) -> list[tuple[int, int]]:
        if self._chunk_tokens is None or kind not in ("document", "observation"):
            return [(start, end)]
        count = -(-(end - start) // self._chunk_tokens)
        bounds = np.linspace(start, end, count + 1).round().astype(int).tolist()
        return list(zip(bounds, bounds[1:], strict=False))


def has_token_ids(trace: Trace) -> bool:
    """Whether every completion was recorded with its ids and its prompt's."""
    completed = [call for call in trace.calls if call.completions]
    return bool(completed) and all(
        call.prompt_token_ids and all(item.token_ids or not item.text for item in call.completions)
        for call in completed
    )


def _sequences(trace: Trace) -> Sequence[TokenSequence]:
    written = any(call.completions for call in trace.calls) or any(step.kind in WRITTEN for step in trace.steps)
    if not has_token_ids(trace) and written:
        raise InputError(
            f"trace {trace.id} was recorded without token ids, so it can only be tokenised again, and other tokens "
            "may come out than the model saw; --force explains it all the same and marks the result as retokenised"
        )
    return [
        TokenSequence(
            call, number, np.asarray([*call.prompt_token_ids, *completion.token_ids]), len(call.prompt_token_ids)
        )
        for call in trace.calls
        for number, completion in enumerate(call.completions)
        if completion.token_ids
    ]
