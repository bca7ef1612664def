"""The command line in this process, so that torch is loaded once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tracer import cli


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


def runner(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *before: str) -> Run:
    """Runs `tracer` with arguments, those of ``before`` first."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["tracer", *before, *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capfd.readouterr()
        return Done(code, captured.out, captured.err)

    return call
