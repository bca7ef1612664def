"""The model's tokenizer, as `tracer.trace.segments.Tokenizer` asks for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tracer.errors import InputError, ModelError
from tracer.trace.segments import Decoded, Encoded

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class ChatTokenizer:
    """A Hugging Face fast tokenizer with exact offsets and control tokens that untrusted text cannot forge.

    Args:
        folder: A model folder with ``tokenizer.json`` and its configuration.

    Raises:
        ModelError: The folder holds no fast tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        # Not AutoTokenizer: that imports torch, which a client of a running server has no use for.
        from transformers import PreTrainedTokenizerFast

        if not (folder / "tokenizer.json").is_file():
            raise ModelError(f"{folder} has no tokenizer.json; tracer needs one for exact offsets")
        try:
            loaded = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"no usable tokenizer in {folder}: {_first_line(error)}") from None
        self._tokenizer = loaded
        self._backend: Backend = loaded.backend_tokenizer
        self._special = {
            token.content: token_id for token_id, token in loaded.added_tokens_decoder.items() if token.special
        }
        self._special_ids = frozenset(self._special.values())
        contents = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, contents))) if contents else None
        self._eos = frozenset(_eos_ids(folder, loaded.eos_token_id))

    @property
    def backend(self) -> Backend:
        """The tokenizer of the ``tokenizers`` library, for decoding streams and grammars."""
        return self._backend

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """End-of-sequence ids from the generation configuration and the tokenizer."""
        return self._eos

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Control tokens, which `decode` leaves out."""
        return self._special_ids

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self._tokenizer)

    @property
    def start_token_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text of its own; a chat template writes that itself."""
        plain = self._backend.encode("a", add_special_tokens=False).ids
        whole = self._backend.encode("a", add_special_tokens=True).ids
        return tuple(whole[: whole.index(plain[0])])

    @property
    def has_chat_template(self) -> bool:
        """Whether the model comes with a chat template."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, *, trusted: Sequence[tuple[int, int]] | None = None) -> Encoded:
        """Tokenise; control tokens count only inside ``trusted`` character ranges.

        A text without forged control tokens is tokenised in one piece. Otherwise it is cut at the genuine ones,
        which is where a tokenizer cuts before anything else, and the rest is read as plain text.
        """
        found = list(self._special_pattern.finditer(text)) if self._special_pattern else []
        genuine = [match for match in found if _inside(match.span(), trusted or ())]
        if len(genuine) == len(found):
            encoding = self._backend.encode(text, add_special_tokens=False)
            return Encoded(list(encoding.ids), list(encoding.offsets))
        token_ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for match in [*genuine, None]:
            start = match.start() if match else len(text)
            for token_id, (left, right) in self._plain(text[position:start]):
                token_ids.append(token_id)
                offsets.append((position + left, position + right))
            if match:
                token_ids.append(self._special[match.group()])
                offsets.append(match.span())
                position = match.end()
        return Encoded(token_ids, offsets)

    def _plain(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """Tokenise without giving any text a special meaning."""
        if not text:
            return []
        if self._special_pattern is None or not self._special_pattern.search(text):
            encoding = self._backend.encode(text, add_special_tokens=False)
        else:
            encoding = self._literal_backend.encode(text, add_special_tokens=False)
        return list(zip(encoding.ids, encoding.offsets, strict=True))

    @property
    def _literal_backend(self) -> Any:
        """A copy of the tokenizer that reads control tokens as text; apart, since the switch is shared state."""
        backend = getattr(self, "_literal", None)
        if backend is None:
            from tokenizers import Tokenizer

            backend = Tokenizer.from_str(self._backend.to_str())
            backend.encode_special_tokens = True
            self._literal = backend
        return backend

    def decode(self, token_ids: Sequence[int]) -> Decoded:
        """Text of ids with the position where each token ends; special tokens are left out."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        parts: list[str] = []
        ends: list[int] = []
        length = 0
        for token_id in token_ids:
            part = stream.step(self._backend, token_id)
            if part:
                parts.append(part)
                length += len(part)
            ends.append(length)
        return Decoded("".join(parts), ends)

    def render_chat(
        self,
        messages: Sequence[dict[str, object]],
        *,
        tools: Sequence[dict[str, object]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Apply the model's chat template.

        Raises:
            InputError: There is no template, or it refuses these messages.
        """
        if not self.has_chat_template:
            raise InputError("this model has no chat template; use an instruction-tuned model")
        try:
            text = self._tokenizer.apply_chat_template(
                cast("list[dict[str, str]]", list(messages)),
                tools=cast("list[dict[str, Any]]", list(tools)) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:
            # Templates are programs: whatever they raise means that these messages do not suit them.
            raise InputError(f"the model's chat template refuses these messages: {_first_line(error)}") from None
        return str(text)


@lru_cache(maxsize=4)
def load_tokenizer(folder: Path) -> ChatTokenizer:
    """The tokenizer of a model folder, loaded once a process."""
    return ChatTokenizer(folder)


def _inside(span: tuple[int, int], ranges: Iterable[tuple[int, int]]) -> bool:
    return any(start <= span[0] and span[1] <= end for start, end in ranges)


def _eos_ids(folder: Path, default: int | None) -> list[int]:
    ids = [] if default is None else [default]
    config = folder / "generation_config.json"
    if config.is_file():
        listed = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
        ids.extend(listed if isinstance(listed, list) else [] if listed is None else [listed])
    return ids


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
