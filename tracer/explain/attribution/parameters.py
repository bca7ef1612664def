"""Reading the parameters of a request, with one clear line for what cannot be used."""

from __future__ import annotations

import math

from tracer.errors import InputError
from tracer.explain.base import Request


def whole(request: Request, name: str, *, least: int, most: int) -> int:
    """A parameter that is a whole number.

    Raises:
        InputError: It is not, or out of its range.
    """
    value = request.parameters[name]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(
            f"{name} of {request.method.name} is {value!r}; it must be a whole number from {least} to {most}"
        )
    return value


def number(request: Request, name: str, *, least: float) -> float:
    """A parameter that is a finite number.

    Raises:
        InputError: It is not, or below its least value.
    """
    value = request.parameters[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < math.inf:
        raise InputError(f"{name} of {request.method.name} is {value!r}; it must be a number of at least {least:g}")
    return float(value)


def sink_rule(request: Request) -> tuple[float, float]:
    """What makes a token a sink: ``sink_share``, above 0 and up to 1, and ``sink_factor``, at least 0.

    Raises:
        InputError: One is out of its range.
    """
    return share(request, "sink_share"), number(request, "sink_factor", least=0)


def share(request: Request, name: str) -> float:
    """A parameter above 0 and up to 1.

    Raises:
        InputError: It is not.
    """
    value = request.parameters[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise InputError(f"{name} of {request.method.name} is {value!r}; it must be above 0 and at most 1")
    return float(value)


def layer_number(request: Request, name: str, layers: int) -> int:
    """A parameter that names a layer, from the end where it is negative.

    Raises:
        InputError: The model has no such layer.
    """
    return whole(request, name, least=-layers, most=layers - 1) % layers
