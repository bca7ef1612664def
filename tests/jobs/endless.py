"""A tiny model that talks without end, so that a run of it is under way until somebody stops it."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.engines.test_local import AUTO, END
from tests.explain.tiny_runs import write_replica


def write_endless(folder: Path, *, context: int = 50_000) -> Path:
    """A random model with a chat template that never ends its turn."""
    write_replica(folder, context=context)
    model = AUTO.from_pretrained(str(folder))
    with torch.no_grad():
        # Zero, where the largest of more than two hundred random logits never is.
        model.lm_head.weight[END] = 0.0
    model.save_pretrained(str(folder))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    return folder
