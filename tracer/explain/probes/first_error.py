"""Finding the first wrong step of a chain whose mistakes are known, by probes, log-probabilities, and by asking.

The chains are those of BIG-Bench Mistake (Tyen et al. 2024, arXiv:2311.08516): other models wrote them, people marked
the first wrong step of each, or that there is none.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from tracer.errors import InputError
from tracer.explain.probes.activations import tokenizer_of
from tracer.explain.probes.asking import Progress, option_logprobs, prompt_ids
from tracer.explain.probes.controls import TEXT
from tracer.explain.probes.examples import Floats
from tracer.explain.probes.metrics import DRAWS, estimate
from tracer.explain.probes.places import answer_end
from tracer.explain.probes.statements import Indices
from tracer.explain.probes.step_chains import Step, StepExample
from tracer.explain.probes.step_features import LOGPROBS, StepFeatures, step_features
from tracer.explain.probes.transfer import Reader, read_steps, text_baseline
from tracer.replay.model import Replica
from tracer.trace.probe_report import Estimate, FirstErrors, FirstErrorTask, Located
from tracer.trace.segments import Piece

MISTAKES = Path("../shared/data/mistakes")
"""Where the chains are looked for."""
LIMIT = 40
"""Chains of each task."""
OTHER = "other"
"""The operation of steps that nobody labelled by what they do."""
NONE = -1
"""Stands for: every step is right."""
_FOLDS = 2
_MOST_THRESHOLDS = 200


@dataclass(frozen=True, slots=True)
class MistakeChain:
    """A chain of steps and where it first goes wrong.

    Args:
        task: What kind of problem it is.
        problem: The problem.
        steps: Its steps.
        first_wrong: Number of the first wrong step from 0, or `NONE`.
    """

    task: str
    problem: str
    steps: tuple[str, ...]
    first_wrong: int


def read_mistakes(folder: Path = MISTAKES, *, limit: int | None = LIMIT, seed: int = 0) -> list[MistakeChain]:
    """Chains with known mistakes: a JSON line for each with ``input``, ``steps`` and ``mistake_index``.

    Args:
        folder: Holds a file for each task, ``TASK.jsonl``.
        limit: Chains of each task, drawn at random; ``None`` for all.
        seed: Decides which ones.

    Raises:
        InputError: There are no such files, or a line cannot be read.
    """
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not files:
        raise InputError(f"there are no chains with known mistakes in {folder}; give a folder with TASK.jsonl files")
    found: list[MistakeChain] = []
    for file in files:
        own = [_chain(file, number, line) for number, line in enumerate(_lines(file), start=1)]
        if limit is not None and limit < len(own):
            own = Random(f"mistakes {seed}").sample(own, limit)  # noqa: S311
        found += own
    return found


def first_errors(
    replica: Replica,
    chains: Sequence[MistakeChain],
    probes: Sequence[Reader],
    *,
    seed: int = 0,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> FirstErrors:
    """Compare what finds the first wrong step.

    A score names the first step below a threshold, or none where no step is; the threshold is the best one on the other
    half of the task's chains.

    Args:
        replica: The model, with its tokenizer.
        chains: The chains.
        probes: Probes of this model.
        seed: Decides the halves and the bootstrap draws.
        progress: Told steps read and their total.
        cancel: Ends the work between two passes.

    Raises:
        InputError: There is no chain, or the replica has no tokenizer.
        PromptTooLongError: A chain is longer than the replica's context.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    layers = sorted({probe.layer for probe in probes})
    features = step_features(replica, step_examples(chains), layers=layers, progress=progress, cancel=cancel)
    scores = {probe.name: read_steps(features, probe) for probe in probes}
    scores |= {name: features.baselines[name] for name in (*LOGPROBS, "entropy")}
    if features.labels.any() and not features.labels.all():
        scores[TEXT] = text_baseline(features, seed=seed)
    asked = ask_first_wrong(replica, chains, cancel=cancel)
    by_chain = _rows(features, len(chains))
    tasks = tuple(
        _task(task, [n for n, chain in enumerate(chains) if chain.task == task], chains, scores, by_chain, asked, seed)
        for task in dict.fromkeys(chain.task for chain in chains)
    )
    return FirstErrors(
        protocol=(
            "the first step below a threshold, chosen on the other half of the task's chains; intervals over chains; "
            "chance names any step or none alike"
        ),
        tasks=tasks,
    )


def step_examples(chains: Sequence[MistakeChain]) -> list[StepExample]:
    """Every step of chains behind those before it; a step counts as right as long as none before it was wrong."""
    return [
        StepExample(
            problem=number,
            context=chain.problem,
            before=chain.steps[:position],
            step=Step(text, *_result(text), OTHER),
            label=chain.first_wrong == NONE or position < chain.first_wrong,
            position=position,
        )
        for number, chain in enumerate(chains)
        for position, text in enumerate(chain.steps)
    ]


def ask_first_wrong(
    replica: Replica, chains: Sequence[MistakeChain], *, cancel: threading.Event | None = None
) -> Indices:
    """The first wrong step by the model's own word, or `NONE`, ``(chains,)``.

    Raises:
        InputError: The replica has no tokenizer.
        PromptTooLongError: A chain is longer than the replica's context.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    tokenizer = tokenizer_of(replica)
    prompts: list[list[int]] = []
    options: list[list[list[int]]] = []
    for chain in chains:
        numbered = "\n".join(f"Step {number}: {step}" for number, step in enumerate(chain.steps, start=1))
        text = (
            f"{chain.problem}\n\nHere is a solution:\n{numbered}\n\nWhich step is the first wrong one? Answer with its "
            "number, or with 0 if every step is right."
        )
        ids, chat = prompt_ids([Piece(text, "question")], tokenizer, plain="\nAnswer:")
        prompts.append(ids)
        space = "" if chat else " "
        options.append([tokenizer.encode(f"{space}{number}").token_ids for number in range(len(chain.steps) + 1)])
    found = option_logprobs(replica, prompts, options, cancel=cancel)
    # Option 0 stands for none, option 1 for step 0.
    return np.array([int(scores.argmax()) - 1 for scores in found], dtype=np.int64)


def locate(scores: Sequence[Floats], threshold: float) -> Indices:
    """The first step of each chain whose score is below a threshold, or `NONE`, ``(chains,)``."""
    return np.array([next((int(place) for place in np.flatnonzero(own < threshold)), NONE) for own in scores])


def best_threshold(scores: Sequence[Floats], first_wrong: Indices) -> float:
    """The threshold by which `locate` is right most often; of several the one that is farthest from all scores."""
    every = np.unique(np.concatenate(list(scores)))
    if len(every) > _MOST_THRESHOLDS:
        every = np.unique(np.quantile(every, np.linspace(0.0, 1.0, _MOST_THRESHOLDS)))
    candidates = [float(every[0]), *((every[1:] + every[:-1]) / 2.0).tolist(), float(np.nextafter(every[-1], np.inf))]
    right = [float((locate(scores, threshold) == first_wrong).mean()) for threshold in candidates]
    margins = [0.0, *np.diff(every).tolist(), 0.0]
    best: float = max(zip(right, margins, candidates, strict=True))[2]
    return best


def _task(
    task: str,
    members: Sequence[int],
    chains: Sequence[MistakeChain],
    scores: Mapping[str, Floats],
    by_chain: Sequence[Indices],
    asked: Indices,
    seed: int,
) -> FirstErrorTask:
    truth = np.array([chains[number].first_wrong for number in members], dtype=np.int64)
    steps = np.array([len(chains[number].steps) for number in members])
    halves = np.random.default_rng(seed).permutation(len(members)) % _FOLDS
    right: dict[str, NDArray[np.float64]] = {}
    for name, values in scores.items():
        own = [values[by_chain[number]] for number in members]
        right[name] = (_crossed(own, truth, halves) == truth).astype(np.float64)
    right["asking the model"] = (asked[list(members)] == truth).astype(np.float64)
    right["most common place"] = (_most_common(truth, halves) == truth).astype(np.float64)
    right["chance"] = 1.0 / (steps + 1.0)
    wrong = truth != NONE
    return FirstErrorTask(
        task=task,
        chains=len(members),
        with_mistake=int(wrong.sum()),
        methods=tuple(
            Located(
                name=name,
                overall=_share(values, seed),
                named=_share(values[wrong], seed) if wrong.any() else None,
                none=_share(values[~wrong], seed) if not wrong.all() else None,
            )
            for name, values in right.items()
        ),
    )


def _crossed(scores: Sequence[Floats], truth: Indices, halves: Indices) -> Indices:
    """What a threshold from the other half says, ``(chains,)``."""
    found = np.full(len(scores), NONE, dtype=np.int64)
    for half in range(_FOLDS):
        rows, rest = np.flatnonzero(halves == half), np.flatnonzero(halves != half)
        if len(rows) and len(rest):
            threshold = best_threshold([scores[row] for row in rest], truth[rest])
            found[rows] = locate([scores[row] for row in rows], threshold)
    return found


def _most_common(truth: Indices, halves: Indices) -> Indices:
    """The most common place in the other half, ``(chains,)``."""
    found = np.full(len(truth), NONE, dtype=np.int64)
    for half in range(_FOLDS):
        rest = truth[halves != half]
        if len(rest):
            values, counts = np.unique(rest, return_counts=True)
            found[halves == half] = values[counts.argmax()]
    return found


def _share(right: NDArray[np.float64], seed: int) -> Estimate:
    rows = np.random.default_rng(seed).integers(0, len(right), (DRAWS, len(right)))
    return estimate(float(right.mean()), right[rows].mean(1))


def _rows(features: StepFeatures, chains: int) -> list[Indices]:
    problems = np.array(features.problems)
    return [np.flatnonzero(problems == number) for number in range(chains)]


def _result(text: str) -> tuple[int, int]:
    """Where a step's result is; all of it where none is stated."""
    end = answer_end(text)
    if end is None:
        return 0, len(text)
    start = max((place + 1 for place, sign in enumerate(text[:end]) if sign.isspace() or sign == "="), default=0)
    return start, end


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from None


def _chain(file: Path, number: int, line: str) -> MistakeChain:
    try:
        row = json.loads(line)
        steps, mistake = row["steps"], row["mistake_index"]
        texts = tuple(" ".join(str(step).split()) for step in steps)
        first = NONE if mistake is None else int(mistake)
        if not texts or not all(texts) or not NONE <= first < len(texts):
            raise ValueError("steps are empty or mistake_index is none of theirs")
        return MistakeChain(file.stem, str(row["input"]), texts, first)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}, line {number} is no chain with a known mistake: {error}") from None
