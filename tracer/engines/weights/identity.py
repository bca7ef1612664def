"""What makes two models speak the same language: hashes of the tokenizer and of the chat template."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from tracer.errors import ModelError


def tokenizer_sha256(path: Path) -> str:
    """Return the SHA-256 of a model folder's ``tokenizer.json`` in canonical form.

    Formatting, key order, the two spellings of merges, and the truncation and padding that a program last set do not
    change it.

    Args:
        path: The model's folder.

    Raises:
        ModelError: There is no ``tokenizer.json``, or it cannot be read.
    """
    file = path / "tokenizer.json"
    try:
        state = file.stat()
        return _tokenizer_sha256(file, state.st_size, state.st_mtime_ns)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {file}: {error}; tracer needs models with a tokenizer.json") from error


@lru_cache(maxsize=16)
def _tokenizer_sha256(file: Path, _size: int, _changed: int) -> str:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    content["truncation"] = content["padding"] = None
    model = content.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        model["merges"] = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def chat_template_sha256(path: Path) -> str | None:
    """Return the SHA-256 of a model folder's chat template text, or None if it has none.

    Args:
        path: The model's folder.

    Raises:
        ModelError: A file that should hold the template cannot be read.
    """
    template = _chat_template(path)
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def _chat_template(path: Path) -> str | None:
    """Look where transformers looks: the template's own file, the older JSON file, the tokenizer's configuration."""
    try:
        own = path / "chat_template.jinja"
        if own.is_file():
            return own.read_bytes().decode("utf-8")
        for name in ("chat_template.json", "tokenizer_config.json"):
            file = path / name
            if not file.is_file():
                continue
            content = json.loads(file.read_text(encoding="utf-8"))
            template = content.get("chat_template") if isinstance(content, dict) else None
            if isinstance(template, list):
                template = next((item["template"] for item in template if item["name"] == "default"), None)
            if isinstance(template, str):
                return template
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot read the chat template in {path}: {error}") from error
    return None
