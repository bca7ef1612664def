"""What the tokens of a trace read, by the tokenizer of its model, where that is on this machine; imports no torch.

A trace keeps ids. The vocabulary that turns them into text is only trusted if its hash is the one that the trace
recorded: the same ids in another vocabulary are other words.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.engines import models
from tracer.errors import ModelError
from tracer.trace.trace import ModelInfo

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BROKEN = "\ufffd"
"""Stands for bytes that are no character, and for ids that the vocabulary does not have."""


class TokenTexts:
    """Turns ids into the text of each of them.

    Args:
        folder: A model folder with a ``tokenizer.json``.

    Raises:
        ModelError: There is none, or it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        # Not the chat tokenizer: it loads transformers, ten times slower and 150 MB that nothing here needs.
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        try:
            self._backend: Tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:
            # The library raises bare exceptions.
            raise ModelError(f"cannot read {file}: {error}") from None
        self._size = self._backend.get_vocab_size(with_added_tokens=True)

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token; joined, they are the text of all.

        A token that holds only the beginning of a character has no text; the one that completes it has the character.
        Control tokens read as they are written, such as ``<|im_end|>``. Some vocabularies drop the space that a text
        begins with, so sequences are to be given from their beginning.

        Args:
            token_ids: The ids, in order.
        """
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        found: list[str] = []
        written = 0
        for number, token_id in enumerate(token_ids):
            if not 0 <= token_id < self._size:
                # What the stream still waits for will not come.
                stream = DecodeStream(skip_special_tokens=False)
                found.append(BROKEN)
                written = number + 1
                continue
            part = stream.step(self._backend, token_id)
            found.append(part or "")
            written = number + 1 if part else written
        if written < len(found) and BROKEN in self._backend.decode(
            list(token_ids[written:]), skip_special_tokens=False
        ):
            found[-1] = BROKEN
        return found


def token_texts(model: ModelInfo) -> TokenTexts:
    """The texts of the tokens that a model wrote; nothing is fetched.

    Args:
        model: The model as the trace names it.

    Raises:
        InputError: Its name stands for no model.
        ModelError: The model is not on this machine, has another vocabulary, or the trace does not say which it had.
    """
    if model.tokenizer_sha256 is None:
        raise ModelError("the trace does not say which tokenizer its ids belong to, so their texts are not known")
    folder = models.resolve(model.name, fetch=False).path
    if models.tokenizer_sha256(folder) != model.tokenizer_sha256:
        raise ModelError(
            f"the tokenizer of {model.name!r} on this machine is not the one that the trace was recorded with, so the "
            "texts of its ids are not known"
        )
    state = (folder / "tokenizer.json").stat()
    return _load(folder, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=2)
def _load(folder: Path, _size: int, _changed: int) -> TokenTexts:
    return TokenTexts(folder)
