"""Fetch models from the Hugging Face hub, into the cache that other programs share."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any, Final

from tracer.engines.weights.cache import ProgressCallback, disk_error, report
from tracer.errors import InputError, ModelError

_HUB_PATTERNS: Final = [
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
]
_HUB_IGNORED: Final = ["*.bin", "*.pt", "*.pth", "*.py", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*/*"]


def hub_folder(repo: str, *, fetch: bool, progress: ProgressCallback | None = None) -> Path | None:
    """Return the local snapshot of a hub model: safetensors, tokenizer and configuration only.

    Args:
        repo: The hub id, ``organisation/name``.
        fetch: Whether the hub may be asked.
        progress: Told stage ``"download"``.

    Returns:
        The folder; None if it is not there yet and ``fetch`` is false.

    Raises:
        InputError: The hub does not allow such a name.
        ModelError: The hub cannot be reached, or has no such model, or the disk is full.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repo,
                allow_patterns=_HUB_PATTERNS,
                ignore_patterns=_HUB_IGNORED,
                local_files_only=constants.HF_HUB_OFFLINE or not fetch,
                tqdm_class=_bar(progress),
            )
        )
    except HFValidationError as error:
        raise InputError(f"{repo!r} is not a name that a hub model can have") from error
    except GatedRepoError as error:
        raise ModelError(f"the hub model {repo} is gated; accept its terms and log in with: hf auth login") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no model {repo!r} (or it is private); check the name") from error
    except LocalEntryNotFoundError as error:
        if not fetch:
            return None
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ModelError(f"{repo} is not in the local cache and {why}; give a local folder or GGUF file") from error
    except HfHubHTTPError as error:
        raise _failed(repo, error) from error
    except Exception as error:  # the hub's HTTP client differs between its versions
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise disk_error(Path(constants.HF_HUB_CACHE), error, "HF_HOME") from error
        raise _failed(repo, error) from error


_DISK_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def _failed(repo: str, error: Exception) -> ModelError:
    line = " ".join(str(error).split())[:200] or type(error).__name__
    return ModelError(f"the hub could not send {repo}: {line}; try again")


class _Nowhere(io.TextIOBase):
    def write(self, text: str, /) -> int:
        return len(text)


def _bar(progress: ProgressCallback | None) -> type[Any]:
    """Return a progress bar class that draws nothing and tells ``progress`` about bytes."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["file"] = _Nowhere()
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.unit == "B":
                report(progress, "download", int(self.n), int(self.total or 0))
            return shown

    return Bar
