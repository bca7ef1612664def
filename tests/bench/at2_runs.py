"""Runs that AT2's weights for the demo model are fitted on: questions over six passages about things that do not exist.

``python -m tests.bench.at2_runs`` records them with the engine that ``TRACER_ENGINE_URL`` names, or with a vLLM of its
own. No name, passage or question is among the bundled ones, so that those stay unseen by the fit. The weights are made
by ``tracer at2 fit tests/bench/traces/at2/*.json --steps 2 --masks 16 --out FILE``, FILE being in
``tracer/explain/attribution/fitted`` and called after the SHA-256 of the model's weights.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import tracer
from tracer.trace.trace import Document

FOLDER = Path(__file__).with_name("traces") / "at2"
QUESTIONS = 16
PASSAGES = 6
MAX_TOKENS = 64
SEED = 20261129
_STARTS = (
    "Vel",
    "Tas",
    "Orr",
    "Bren",
    "Kal",
    "Mir",
    "Dov",
    "Sel",
    "Hal",
    "Fen",
    "Rud",
    "Ist",
    "Pel",
    "Gar",
    "Lum",
    "Cor",
    "Wes",
    "Nar",
    "Ebb",
    "Tol",
)
_ENDS = (
    "mora",
    "sin",
    "in",
    "wick",
    "dane",
    "avar",
    "ten",
    "heim",
    "low",
    "osk",
    "ury",
    "ander",
    "mouth",
    "by",
    "elle",
)
_TRADES = ("copper kettles", "sailcloth", "pocket watches", "candied plums", "barometers", "church bells")
_STONES = ("granite", "red sandstone", "limestone", "brick", "basalt")
_GOODS = ("salt", "timber", "wool", "herring", "slate")


class Passage(NamedTuple):
    """A passage, with questions that only it answers."""

    document: Document
    questions: tuple[tuple[str, str], ...]
    """Each with its answer."""


def main() -> None:
    """Record the runs."""
    FOLDER.mkdir(exist_ok=True)
    engine = tracer.connect("auto")
    for number, (question, answer, documents) in enumerate(tasks(), 1):
        agent = tracer.ChainOfThought(engine, shots="zero", max_tokens=MAX_TOKENS)
        run = agent.run(question, documents=documents, reference=answer, name=f"AT2 {number}")
        run.save(FOLDER / f"at2-{number:02d}.json")
        print(f"{number:2d} {question} -> {run.outcome.answer!r} ({answer})", flush=True)


def tasks() -> list[tuple[str, str, list[Document]]]:
    """Questions with their answers and passages; the passage that is needed stands in every place equally often."""
    draw = random.Random(SEED)
    names = _names(draw)
    found: list[tuple[str, str, list[Document]]] = []
    for number in range(QUESTIONS):
        makers = draw.sample([_lighthouse, _company, _bridge, _town, _museum, _mountain, _painter], PASSAGES)
        passages = [make(draw, names) for make in makers]
        question, answer = draw.choice(passages[number % PASSAGES].questions)
        found.append((question, answer, [passage.document for passage in passages]))
    return found


class _Names:
    """Names that were not used yet."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def one(self) -> str:
        return self._names.pop()

    def person(self) -> str:
        return f"{self.one()} {self.one()}"


def _names(draw: random.Random) -> _Names:
    every = [start + end for start in _STARTS for end in _ENDS]
    draw.shuffle(every)
    return _Names(every)


def _passage(title: str, text: str, *questions: tuple[str, str]) -> Passage:
    return Passage(Document(id=title.lower().replace(" ", "-"), title=title, text=text), questions)


def _lighthouse(draw: random.Random, names: _Names) -> Passage:
    name, builder, reach = names.one(), names.person(), draw.randint(15, 39)
    return _passage(
        f"{name} Lighthouse",
        f"The {name} Lighthouse was built by {builder}. Its light reaches {reach} kilometres and has two colours.",
        (f"Who built the {name} Lighthouse?", builder),
        (f"How many kilometres does the light of the {name} Lighthouse reach?", str(reach)),
    )


def _company(draw: random.Random, names: _Names) -> Passage:
    name, founder, trade = names.one(), names.person(), draw.choice(_TRADES)
    return _passage(
        f"{name} Works",
        f"The {name} Works make {trade}. The company was founded by {founder} and has {draw.randint(40, 900)} workers.",
        (f"What do the {name} Works make?", trade),
        (f"Who founded the {name} Works?", founder),
    )


def _bridge(draw: random.Random, names: _Names) -> Passage:
    name, river, stone = names.one(), names.one(), draw.choice(_STONES)
    return _passage(
        f"{name} Bridge",
        f"The {name} Bridge crosses the river {river}. It is made of {stone} and has {draw.randint(3, 11)} arches.",
        (f"Which river does the {name} Bridge cross?", river),
        (f"What is the {name} Bridge made of?", stone),
    )


def _town(draw: random.Random, names: _Names) -> Passage:
    name, country, good = names.one(), names.one(), draw.choice(_GOODS)
    return _passage(
        name,
        f"{name} is a port in {country}. It grew rich by the trade in {good}, and holds a fair every autumn.",
        (f"In which country does {name} lie?", country),
        (f"By the trade in what did {name} grow rich?", good),
    )


def _museum(draw: random.Random, names: _Names) -> Passage:
    name, town, year = names.one(), names.one(), draw.randint(1801, 1960)
    return _passage(
        f"{name} Museum",
        f"The {name} Museum stands in {town}. It opened in {year} and shows maps, globes and instruments.",
        (f"In which town does the {name} Museum stand?", town),
        (f"In which year did the {name} Museum open?", str(year)),
    )


def _mountain(draw: random.Random, names: _Names) -> Passage:
    name, climber, height = names.one(), names.person(), draw.randint(1200, 4900)
    return _passage(
        f"Mount {name}",
        f"Mount {name} is {height} metres high. {climber} was the first to climb it, alone and in winter.",
        (f"How many metres high is Mount {name}?", str(height)),
        (f"Who was the first to climb Mount {name}?", climber),
    )


def _painter(draw: random.Random, names: _Names) -> Passage:
    name, town, teacher = names.person(), names.one(), names.person()
    return _passage(
        name,
        f"{name} painted harbours and storms. Born in {town} in {draw.randint(1790, 1900)}, the painter learned from "
        f"{teacher}.",
        (f"In which town was {name} born?", town),
        (f"From whom did {name} learn to paint?", teacher),
    )


if __name__ == "__main__":
    main()
