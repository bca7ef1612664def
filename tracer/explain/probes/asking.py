"""Asking the model itself: whether a statement is true, or which of some options it takes.

Nothing is generated. The model's answer is what it would sooner write of the given options, so that every question has
one, whatever format the model would have chosen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracer.errors import InputError
from tracer.explain.probes.activations import tokenizer_of
from tracer.explain.removal import batches
from tracer.replay.forward import CHUNK, Scored, Wanted, replay
from tracer.replay.model import Replica
from tracer.replay.retokenise import transcripts
from tracer.replay.tree import build_tree
from tracer.trace.segments import Message, Piece, Tokenizer, render_chat, render_text
from tracer.trace.trace import Trace

Progress = Callable[[int, int], None]
_TRUE, _FALSE = "True", "False"


@dataclass(frozen=True, slots=True)
class Question:
    """A statement that the model is asked about.

    Args:
        context: What it has to go by: the problem and what was said so far; may be empty.
        statement: The statement.
    """

    context: str
    statement: str


def p_true(
    replica: Replica,
    questions: Sequence[Question],
    *,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> NDArray[np.float64]:
    """Probability of "True" against "False" for each statement (Kadavath et al. 2022, arXiv:2207.05221, section 3).

    Args:
        replica: The model, with its tokenizer.
        questions: The statements; what they share is computed once.
        progress: Told questions done and their total.
        cancel: Ends the work between two passes.

    Returns:
        ``(questions,)``.

    Raises:
        InputError: The replica has no tokenizer.
        PromptTooLongError: A question is longer than the replica's context.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    tokenizer = tokenizer_of(replica)
    asked = [
        (
            f"{question.context}\n\nStatement: {question.statement}\n\nIs this statement true or false? "
            f"Answer with one word, {_TRUE} or {_FALSE}."
        ).lstrip()
        for question in questions
    ]
    prepared = [prompt_ids([Piece(text, "question")], tokenizer, plain="\nAnswer:") for text in asked]
    prompts, chat = [ids for ids, _ in prepared], [is_chat for _, is_chat in prepared]
    words = [[word if is_chat else f" {word}" for word in (_TRUE, _FALSE)] for is_chat in chat]
    options = [[tokenizer.encode(word).token_ids for word in pair] for pair in words]
    found = option_logprobs(replica, prompts, options, progress=progress, cancel=cancel)
    pairs = np.array([scores for scores in found]).reshape(-1, 2)
    result: NDArray[np.float64] = 1.0 / (1.0 + np.exp(pairs[:, 1] - pairs[:, 0]))
    return result


def option_logprobs(
    replica: Replica,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> list[NDArray[np.float64]]:
    """Log-probability of each option as the continuation of its prompt, summed over the option's tokens.

    Args:
        replica: The model.
        prompts: Ids of each prompt.
        options: For each prompt ids of its options; none may be empty.
        progress: Told prompts done and their total.
        cancel: Ends the work between two passes.

    Returns:
        For each prompt ``(options,)``.

    Raises:
        PromptTooLongError: A prompt with an option is longer than the replica's context.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    found: list[NDArray[np.float64]] = []
    lengths = [len(prompt) + sum(map(len, own)) for prompt, own in zip(prompts, options, strict=True)]
    for group in batches(lengths):
        sequences = [np.asarray([*prompts[number], *option]) for number in group for option in options[number]]
        if not sequences:
            continue
        # The last token is scored by the one before it and need not be run.
        tree = build_tree([sequence[:-1] for sequence in sequences], longest=CHUNK)
        sizes = [len(option) for number in group for option in options[number]]
        scored = Scored(
            np.concatenate([places[-size:] for places, size in zip(tree.sequences, sizes, strict=True)]),
            np.concatenate([sequence[-size:] for sequence, size in zip(sequences, sizes, strict=True)]),
        )
        logprobs = replay(replica, tree, Wanted(scored=scored), cancel=cancel).logprobs
        sums = np.add.reduceat(logprobs, np.cumsum([0, *sizes[:-1]]))
        bounds = np.cumsum([len(options[number]) for number in group])
        found += np.split(sums, bounds[:-1])
        if progress is not None:
            progress(len(found), len(prompts))
    return found


def prompt_ids(pieces: Sequence[Piece], tokenizer: Tokenizer, *, plain: str) -> tuple[list[int], bool]:
    """A request as a user's turn, or as plain text where the model has no chat template.

    Args:
        pieces: What is asked.
        tokenizer: The model's.
        plain: What follows it in plain text.

    Returns:
        Token ids, and whether it is a user's turn.
    """
    try:
        return render_chat([Message("user", pieces)], tokenizer).token_ids, True
    except InputError:
        rendered = render_text([*pieces, Piece(plain, "instruction")], tokenizer)
        return [*tokenizer.start_token_ids, *rendered.token_ids], False


def contexts(trace: Trace) -> dict[str, str]:
    """For each step what was said before it in its own branch: documents, question and earlier steps."""
    found: dict[str, str] = {}
    for steps, branch in transcripts(trace):
        lines: list[str] = []
        if not any(step.kind == "document" for step in steps):
            lines += [f"Document: {item.title}\n{item.text}" for item in trace.task.documents]
        if not any(step.kind == "question" for step in steps):
            lines.append(f"Question: {trace.task.question}")
        for step in steps:
            if step.branch == branch:
                found[step.id] = "\n".join(lines)
            lines.append(f"{step.kind.capitalize()}: {step.text}")
    return found
