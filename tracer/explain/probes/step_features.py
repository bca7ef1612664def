"""What can be read of steps of reasoning: hidden states for probes, and everything that needs none."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tracer.errors import InputError
from tracer.explain.probes.activations import tokenizer_of
from tracer.explain.probes.asking import Progress, Question, p_true, prompt_ids
from tracer.explain.probes.examples import Flags, Floats
from tracer.explain.probes.places import POSITIONS, Position
from tracer.explain.probes.step_chains import OPERATIONS, Chain, StepExample, right_steps
from tracer.explain.removal import batches
from tracer.replay.complete import complete
from tracer.replay.forward import CHUNK, Scored, Wanted, check_cancel, replay
from tracer.replay.model import Replica
from tracer.replay.tree import Ids, build_tree
from tracer.trace.segments import Piece, Tokenizer

BATCH_TOKENS = 32_768
"""Tokens of sequences that are laid out in one tree, which holds about an eighth of them; larger ones make fuller
passes."""
LOGPROBS = ("answer_logprob", "mean_logprob", "min_logprob")
"""Baselines that are log-probabilities: of the result's tokens, of all of the step's, and the least of these."""
_ASKED = "Solve the problem step by step. Write each step on a line of its own and nothing else.\n\n"
_RESULT_TOKENS = 8
_NUMBER = re.compile(r"\s*(-?\d+)")
_WORD = re.compile(r"\s*([^\W\d_]+)")


@dataclass(frozen=True, slots=True, eq=False)
class StepFeatures:
    """Steps with all that was read of them.

    Args:
        examples: The steps.
        labels: Whether each is right, ``(steps,)``.
        hidden: By position the outputs of decoder layers before the final norm, each ``(steps, layers, width)``.
        layers: Numbers of the layers.
        baselines: What is known without a probe, by name, each ``(steps,)``; higher speaks for right.
    """

    examples: tuple[StepExample, ...]
    labels: Flags
    hidden: Mapping[Position, NDArray[np.float32]]
    layers: tuple[int, ...]
    baselines: Mapping[str, Floats]

    @property
    def problems(self) -> list[int]:
        """The problem of each step."""
        return [example.problem for example in self.examples]

    @property
    def operations(self) -> Floats:
        """One column for each kind of step, ``(steps, operations)``."""
        names = [example.step.operation for example in self.examples]
        return np.array([[float(name == own) for own in OPERATIONS] for name in names]).reshape(-1, len(OPERATIONS))

    def take(self, rows: Sequence[int]) -> StepFeatures:
        """Some of the steps."""
        own = np.asarray(rows, dtype=np.int64)
        return StepFeatures(
            tuple(self.examples[row] for row in rows),
            self.labels[own],
            {position: values[own] for position, values in self.hidden.items()},
            self.layers,
            {name: values[own] for name, values in self.baselines.items()},
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """A step as tokens: ids, first and one past the last token of the step and of its result, and what is read."""

    token_ids: Ids
    step: tuple[int, int]
    result: tuple[int, int]
    read: Mapping[Position, int]


def step_features(
    replica: Replica,
    examples: Sequence[StepExample],
    *,
    layers: Sequence[int] | None = None,
    whole: bool = True,
    ask: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> StepFeatures:
    """Read steps in their place behind the problem and the steps before them.

    Args:
        replica: The model, with its tokenizer.
        examples: The steps; what they share is computed once.
        layers: Which layers; all of them if not given.
        whole: Whether to score all tokens of a step, or those of its result alone, which is a quarter less work: of
            what needs no probe only ``answer_logprob``, ``length`` and ``position`` are known then.
        ask: Whether to ask the model too whether each step is true.
        progress: Told steps done and their total.
        cancel: Ends the work between two passes.

    Raises:
        InputError: There is no step, or the replica has no tokenizer.
        PromptTooLongError: A chain is longer than the replica's context.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    tokenizer = tokenizer_of(replica)
    if not examples:
        raise InputError("there are no steps to read")
    wanted = tuple(range(len(replica.layers)) if layers is None else layers)
    layouts = [_layout(example, tokenizer) for example in examples]
    hidden = {
        position: np.empty((len(examples), len(wanted), replica.width), dtype=np.float32) for position in POSITIONS
    }
    scored = (*LOGPROBS, "entropy") if whole else LOGPROBS[:1]
    rows: dict[str, Floats] = {name: np.empty(len(examples)) for name in scored}
    done = 0
    for group in batches([len(layout.token_ids) for layout in layouts], at_once=BATCH_TOKENS):
        check_cancel(cancel)
        _read(replica, group, layouts, wanted, hidden, rows, cancel)
        done += len(group)
        if progress is not None:
            progress(done, len(examples))
    if whole:
        rows["entropy"] *= -1.0
    rows["length"] = -np.array([float(layout.step[1] - layout.step[0]) for layout in layouts])
    rows["position"] = -np.array([float(example.position) for example in examples])
    if ask:
        questions = [Question("\n".join((item.context, *item.before)), item.step.text) for item in examples]
        rows["p_true"] = p_true(replica, questions, progress=progress, cancel=cancel)
    labels = np.array([example.label for example in examples], dtype=np.bool_)
    return StepFeatures(tuple(examples), labels, hidden, wanted, rows)


def on_policy(replica: Replica, chosen: Sequence[Chain], *, cancel: threading.Event | None = None) -> list[StepExample]:
    """Steps with the results that the model itself comes to, each behind right steps, and whether they are right.

    Wrong results that somebody made up are ones that the model would hardly write, and its log-probability gives them
    away. These are its own.

    Args:
        replica: The model, with its tokenizer.
        chosen: Verified chains.
        cancel: Ends the work between two passes.

    Returns:
        A step for each one in the chains, those left out where the model gives no result.

    Raises:
        InputError: The replica has no tokenizer.
        PromptTooLongError: A chain is longer than the replica's context.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    tokenizer = tokenizer_of(replica)
    rights = right_steps(chosen)
    prompts = [_open_prompt(example, tokenizer) for example in rights]
    found: list[StepExample] = []
    for group in batches([len(prompt) for prompt in prompts], at_once=BATCH_TOKENS):
        continued = complete(
            replica,
            [prompts[number] for number in group],
            max_tokens=_RESULT_TOKENS,
            enough=lambda ids: _is_past_result(tokenizer.decode(ids).text),
            cancel=cancel,
        )
        for number, ids in zip(group, continued, strict=True):
            right = rights[number]
            pattern = _NUMBER if right.step.result.isdigit() else _WORD
            match = pattern.match(tokenizer.decode(ids).text)
            if match is not None:
                step = right.step.with_result(match.group(1))
                found.append(replace(right, step=step, label=match.group(1) == right.step.result))
    return found


def _is_past_result(text: str) -> bool:
    """Whether what follows cannot change the number or word that a text begins with."""
    match = _NUMBER.match(text) or _WORD.match(text)
    return len(text.strip()) > 1 if match is None else match.end() < len(text)


def _read(
    replica: Replica,
    group: Sequence[int],
    layouts: Sequence[_Layout],
    layers: tuple[int, ...],
    hidden: Mapping[Position, NDArray[np.float32]],
    rows: Mapping[str, Floats],
    cancel: threading.Event | None,
) -> None:
    """One tree of steps: fill their rows."""
    tree = build_tree([layouts[number].token_ids for number in group], longest=CHUNK)
    own = [layouts[number] for number in group]
    places = [
        sequence[layout.read[position]]
        for position in POSITIONS
        for sequence, layout in zip(tree.sequences, own, strict=True)
    ]
    unique, where = np.unique(np.array(places), return_inverse=True)
    whole = "entropy" in rows
    spans = [slice(*(layout.step if whole else layout.result)) for layout in own]
    before = [sequence[span.start - 1 : span.stop - 1] for sequence, span in zip(tree.sequences, spans, strict=True)]
    tokens = [tree.token_ids[sequence[span]] for sequence, span in zip(tree.sequences, spans, strict=True)]
    wanted = Wanted(
        scored=Scored(np.concatenate(before), np.concatenate(tokens)), hidden_indices=unique, hidden_layers=layers
    )
    found = replay(replica, tree, wanted, cancel=cancel)
    states = found.hidden.float().numpy()
    for number, position in enumerate(POSITIONS):
        mine = where[number * len(own) : (number + 1) * len(own)]
        hidden[position][list(group)] = states[:, mine].transpose(1, 0, 2)
    start = 0
    for number, layout, span in zip(group, own, spans, strict=True):
        stop = start + span.stop - span.start
        logprobs = found.logprobs[start:stop]
        rows["answer_logprob"][number] = logprobs[layout.result[0] - span.start : layout.result[1] - span.start].mean()
        if whole:
            rows["mean_logprob"][number] = logprobs.mean()
            rows["min_logprob"][number] = logprobs.min()
            rows["entropy"][number] = found.entropy[start:stop].mean()
        start = stop


def _layout(example: StepExample, tokenizer: Tokenizer) -> _Layout:
    """Where a step, its result and what is read of it lie."""
    prompt = _prompt(example, tokenizer)
    lead = "".join(f"{line}\n" for line in example.before)
    # The line's end is often one token with the full stop, as in what a model writes.
    encoded = tokenizer.encode(f"{lead}{example.step.text}\n")
    result = (len(lead) + example.step.start, len(lead) + example.step.end)
    ends = len(lead) + len(example.step.text)

    def token_of(character: int) -> int:
        return len(prompt) + next(
            number for number, (start, end) in enumerate(encoded.offsets) if start <= character < end
        )

    inside = (token_of(result[0]), token_of(result[1] - 1) + 1)
    last = token_of(ends - 1)
    read: dict[Position, int] = {"last": last, "answer": inside[1] - 1}
    ids = np.array([*prompt, *encoded.token_ids[: last + 1 - len(prompt)]], dtype=np.int64)
    return _Layout(ids, (token_of(len(lead)), last + 1), inside, read)


def _open_prompt(example: StepExample, tokenizer: Tokenizer) -> Ids:
    """Everything before a step's result; the space before it is the model's to write, as its tokens may hold it."""
    lead = "".join(f"{line}\n" for line in example.before)
    head = example.step.text[: example.step.start].rstrip()
    own = tokenizer.encode(lead + head).token_ids
    return np.array([*_prompt(example, tokenizer), *own], dtype=np.int64)


def _prompt(example: StepExample, tokenizer: Tokenizer) -> list[int]:
    pieces = [Piece(_ASKED, "instruction"), Piece(example.context, "question")]
    return prompt_ids(pieces, tokenizer, plain="\n\n")[0]
