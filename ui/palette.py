"""How kinds, outcomes and agents look: a text cue and a label always, colour on top of them.

The colours are Okabe and Ito's, shifted in lightness until they reach a contrast of 4.5:1 on each theme's background.
Everything that is returned here is one of this module's own strings, never text from a trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

Theme = Literal["light", "dark"]
BACKGROUND: Mapping[Theme, str] = MappingProxyType({"light": "#ffffff", "dark": "#171614"})
PRIMARY: Mapping[Theme, str] = MappingProxyType({"light": "#5b3a9e", "dark": "#b79cf0"})


class Look(NamedTuple):
    """How one kind of step is shown."""

    cue: str
    """One character that tells the kind without colour."""
    label: str
    light: str
    """Text colour on a light background."""
    dark: str
    """Text colour on a dark background."""

    @property
    def name(self) -> str:
        """Cue and label together."""
        return f"{self.cue} {self.label}"

    def colour(self, theme: Theme) -> str:
        """The text colour on a theme's background."""
        return self.light if theme == "light" else self.dark


KINDS: Mapping[str, Look] = MappingProxyType(
    {
        "question": Look("?", "question", "#00588f", "#6fb7e9"),
        "document": Look("≡", "document", "#6b5a35", "#cbb994"),
        "thought": Look("…", "thought", "#3d3d3d", "#d9d9d9"),
        "action": Look("→", "action", "#9c4400", "#f0a35a"),
        "observation": Look("←", "observation", "#00664b", "#4fc9a4"),
        "evaluation": Look("±", "evaluation", "#7a2a78", "#dd9bdb"),
        "vote": Look("#", "vote", "#665c00", "#e6da55"),
        "answer": Look("=", "answer", "#4b2aa8", "#b8a4ff"),
        "error": Look("!", "error", "#b3261e", "#ff9a8f"),
    }
)
OTHER = Look("·", "other", "#555555", "#bbbbbb")

_AGENTS = {"cot": "CoT", "cot_sc": "CoT-SC", "tot": "ToT", "react": "ReAct", "external": "external"}
_CORRECT = {True: "✓ right", False: "✗ wrong", None: "unknown"}
_STATUS = {
    "running": "running",
    "completed": "completed",
    "failed": "! failed",
    "cancelled": "cancelled",
    "interrupted": "! interrupted",
}
_SENTENCES = {
    "running": "This run is under way; the page follows it.",
    "failed": "This run failed; what was recorded until then is kept.",
    "cancelled": "This run was stopped by a person; what was recorded until then is kept.",
    "interrupted": "The process that recorded this run ended before the run did; what was recorded until then is kept.",
}
AGENTS = tuple(_AGENTS)
STATUSES = tuple(_STATUS)
OUTCOMES: tuple[bool, ...] = (True, False)


def look(kind: str) -> Look:
    """How a kind is shown; kinds of a newer trace format are ``OTHER``."""
    return KINDS.get(kind, OTHER)


def kind_name(kind: str) -> str:
    """Cue and label of a kind."""
    return look(kind).name


def kind_label(kind: str) -> str:
    """Label of a kind; ``other`` for kinds of a newer trace format."""
    return look(kind).label


def agent_name(kind: str) -> str:
    """Name of a kind of agent."""
    return _AGENTS.get(kind, OTHER.label)


def correct_name(correct: bool | None) -> str:
    """Whether an answer was right, in a word with a cue."""
    return _CORRECT[correct]


def status_name(status: str) -> str:
    """A run's status, in a word."""
    return _STATUS.get(status, OTHER.label)


def status_sentence(status: str) -> str:
    """What the status of a run that is not completed means for what is shown."""
    return _SENTENCES.get(status, "This run has a status that this version does not know.")


def colours_of(names: Mapping[str, Look], theme: Theme) -> dict[str, str]:
    """The text colour of every shown name, for colouring a table's column."""
    return {shown.name: shown.colour(theme) for shown in (*names.values(), OTHER)}


_JOBS = {
    "run": "Run of an agent",
    "explain": "Explanation",
    "cite": "Citations",
    "faithfulness": "Faithfulness of methods",
    "probe_train": "Training of a truth probe",
    "serve_start": "Start of vLLM",
    "serve_stop": "Stop of vLLM",
    "fetch_model": "Fetching a model",
}
_JOB_STATUS = {
    "queued": "waiting",
    "running": "at work",
    "completed": "done",
    "failed": "! failed",
    "cancelled": "cancelled",
    "interrupted": "! interrupted",
}
_JOB_SENTENCES = {
    "queued": "This job waits for its turn.",
    "running": "This job is at work.",
    "completed": "This job is done.",
    "failed": "This job failed.",
    "cancelled": "This job was stopped by a person; what was finished is kept.",
    "interrupted": "The process of this job died; what was finished is kept.",
}


def job_name(kind: str) -> str:
    """What a kind of job does, in words."""
    return _JOBS.get(kind, OTHER.label)


def job_status_name(status: str) -> str:
    """How a job is, in a word with a cue."""
    return _JOB_STATUS.get(status, OTHER.label)


def job_sentence(status: str) -> str:
    """How a job is, in a sentence."""
    return _JOB_SENTENCES.get(status, "This job has a status that this version does not know.")


class Scale(NamedTuple):
    """Colours of signed scores: orange raises, purple lowers; a sign is shown beside them always."""

    raises: str
    """Of bars and signs; reaches 4.5:1 on the theme's background."""
    lowers: str
    raises_tint: str
    """Mixed behind text, at most in the share `TINT`."""
    lowers_tint: str


SCALES: Mapping[Theme, Scale] = MappingProxyType(
    {
        "light": Scale("#a34700", "#5b3a9e", "#ee8f45", "#a58be0"),
        "dark": Scale("#f0a35a", "#b79cf0", "#b45f14", "#6f4fc0"),
    }
)
TINT = 0.8


def scale_properties() -> dict[str, str]:
    """The scales of both themes, as a component's style sheet names them."""
    return {
        f"{name.replace('_', '-')}-{theme}": colour
        for theme, scale in SCALES.items()
        for name, colour in scale._asdict().items()
    }


PARTS: Mapping[str, Look] = MappingProxyType(
    {
        "system": Look("§", "system", "#555555", "#bbbbbb"),
        "instruction": Look("»", "instruction", "#555555", "#bbbbbb"),
        "tools": Look("¤", "tools", "#555555", "#bbbbbb"),
        "exemplar": Look("«", "exemplar", "#8a3b6b", "#eba0cd"),
        "template": Look("▫", "chat template", "#555555", "#bbbbbb"),
        "sink": Look("⊥", "first token", "#555555", "#bbbbbb"),
    }
)
"""Parts of a prompt that are no steps."""


def source_look(kind: str) -> Look:
    """How a source of an explanation is shown: a step's kind, or a part of the prompt."""
    return KINDS.get(kind) or PARTS.get(kind, OTHER)


def source_name(kind: str) -> str:
    """Cue and label of a source."""
    return source_look(kind).name


_NOTHING: Mapping[Theme, str] = MappingProxyType({"light": "#f0ede6", "dark": "#2c2a27"})


def diverging(theme: Theme) -> tuple[str, str, str]:
    """The scale from purple (lowers) over a colour that says nothing to orange (raises)."""
    return SCALES[theme].lowers, _NOTHING[theme], SCALES[theme].raises
