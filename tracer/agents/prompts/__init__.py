"""Prompts as data: TOML files that a user can replace.

A file has a ``name``, optional ``system`` and ``exemplars`` (each a ``text``), and ``[templates]`` with the texts that
the agent asks for by name. ``{question}``, ``{documents}`` and so on are filled in by the agent; ``{{`` stands for a
brace.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tracer.errors import InputError, UnknownNameError
from tracer.trace.segments import Message, Piece
from tracer.trace.trace import SegmentKind

_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")


class Exemplar(BaseModel):
    """A worked example that is shown to the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str


class Prompt(BaseModel):
    """A prompt file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    system: str = ""
    exemplars: tuple[Exemplar, ...] = ()
    templates: dict[str, str] = Field(default_factory=dict)

    def template(self, name: str) -> str:
        """The template of that name.

        Raises:
            InputError: The file lacks it.
        """
        if name not in self.templates:
            raise InputError(f"prompt {self.name!r} has no template {name!r}; add it under [templates] in its file")
        return self.templates[name]

    def fill(
        self, name: str, values: Mapping[str, Sequence[Piece] | str], *, kind: SegmentKind = "instruction"
    ) -> list[Piece]:
        """A template with its fields filled in, as labelled pieces.

        Args:
            name: The template's name.
            values: Pieces, or plain text, for every field. ``{exemplars}`` is always known.
            kind: Label of the template's own text.

        Raises:
            InputError: The template is missing or uses a field that is not there.
        """
        template = self.template(name)
        known: dict[str, Sequence[Piece] | str] = {"exemplars": self.exemplar_pieces(), **values}
        pieces: list[Piece] = []
        text = ""
        position = 0
        for match in _FIELD.finditer(template):
            text += template[position : match.start()]
            position = match.end()
            field = match.group(1)
            if field is None:
                text += match.group()[0]
                continue
            if field not in known:
                names = ", ".join(sorted(known))
                raise InputError(f"prompt {self.name!r}, template {name!r}: unknown field {{{field}}}; known: {names}")
            value = known[field]
            if isinstance(value, str):
                text += value
                continue
            pieces.append(Piece(text, kind))
            text = ""
            pieces.extend(value)
        pieces.append(Piece(text + template[position:], kind))
        return [piece for piece in pieces if piece.text]

    def exemplar_pieces(self) -> list[Piece]:
        """The exemplars, one after the other."""
        return [Piece(f"{exemplar.text.strip()}\n\n", "exemplar") for exemplar in self.exemplars]

    def chat(self, user: Sequence[Piece]) -> list[Message]:
        """A system message, where the file has one, and the given user message."""
        messages = [Message("user", list(user))]
        if self.system.strip():
            messages.insert(0, Message("system", [Piece(self.system.strip(), "system")]))
        return messages


def load_prompt(name: str | Path, *, requires: Sequence[str] = ()) -> Prompt:
    """Load a bundled prompt by name, or a file by path.

    Args:
        name: A bundled name such as ``react-text``, or a path that ends in ``.toml``.
        requires: Templates that the file must have.

    Raises:
        UnknownNameError: No bundled prompt has that name.
        InputError: The file cannot be read, is no TOML, or lacks something.
    """
    path = Path(name)
    if path.suffix == ".toml":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read prompt file {path}: {error}") from None
    else:
        if str(name) not in bundled_prompts():
            raise UnknownNameError("prompt", str(name), bundled_prompts())
        text = (files(__package__) / f"{name}.toml").read_text(encoding="utf-8")
    try:
        prompt = Prompt.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"prompt file {name} is not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"prompt file {name}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        ) from None
    for template in requires:
        prompt.template(template)
    return prompt


def bundled_prompts() -> list[str]:
    """Names of the prompts that come with tracer."""
    return sorted(
        entry.name.removesuffix(".toml") for entry in files(__package__).iterdir() if entry.name.endswith(".toml")
    )
