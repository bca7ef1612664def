"""What a caller of `tracer.explain` asks for, checked: methods, parameters, targets, foil."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from pydantic import JsonValue

from tracer.errors import InputError, UnknownNameError
from tracer.explain import methods as registry
from tracer.explain.base import Request, TargetFunction
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded, Target


def parse_requests(names: Sequence[str], parameters: Mapping[str, Mapping[str, JsonValue]]) -> list[Request]:
    """Methods with all of their parameters.

    Raises:
        UnknownNameError: There is no such method.
        InputError: A parameter is unknown, or for a method that is not asked for.
    """
    for name in parameters:
        if registry.find(name).name not in names:
            raise InputError(f"there are parameters for {name}, which is not among the methods: {', '.join(names)}")
    return [registry.request(name, parameters.get(name)) for name in dict.fromkeys(names)]


def check_seed(seed: int) -> None:
    """Refuse what random generators cannot begin with.

    Raises:
        InputError: It is negative.
    """
    if seed < 0:
        raise InputError(f"the seed is {seed}; use a whole number from 0")


def check_target_function(name: str, requests: Sequence[Request]) -> None:
    """Refuse a target function that a method would not explain: its scores would be labelled with what they are not of.

    Raises:
        UnknownNameError: There is no such function.
        InputError: A method does not follow it.
    """
    if name not in get_args(TargetFunction):
        raise UnknownNameError("target function", name, get_args(TargetFunction))
    deaf = [item.method.name for item in requests if not item.method.follows]
    if name != "logprob" and deaf:
        following = ", ".join(sorted(method.name for method in registry.METHODS.values() if method.follows))
        raise InputError(
            f"the target function {name} changes nothing about {', '.join(deaf)}; choose among the methods that follow "
            f"it: {following}"
        )


def choose_targets(recorded: Recorded, targets: str | Sequence[str]) -> tuple[Target, ...]:
    """The steps and tokens that ``all``, ``answer`` or ids stand for, as `tracer.explain.service.explain` takes them.

    Raises:
        InputError: One is not there, or the model did not write it.
    """
    if targets == "all":
        if not recorded.targets:
            raise InputError(f"trace {recorded.trace.id} has no step that the model wrote")
        return recorded.targets
    if targets == "answer":
        return recorded.answer()
    names = [targets] if isinstance(targets, str) else targets
    found: dict[str, Target] = {}
    for name in names:
        step_id = name.removesuffix("#*")
        for target in recorded.tokens_of(recorded.target(step_id)) if step_id != name else [recorded.target(name)]:
            found[target.step_id] = target
    if not found:
        raise InputError("no target is named; give ids of steps, answer or all")
    return tuple(found.values())


def foil_token(foil: str | int | None, replica: Replica) -> int | None:
    """The token id of a foil.

    Raises:
        InputError: It is not one token of the replica.
    """
    if foil is None:
        return None
    if isinstance(foil, int):
        if not 0 <= foil < replica.vocabulary:
            raise InputError(f"the foil {foil} is not a token; the vocabulary has {replica.vocabulary}")
        return foil
    if replica.tokenizer is None:
        raise InputError("the replica has no tokenizer; give the foil as a token id")
    token_ids = replica.tokenizer.encode(foil).token_ids
    if len(token_ids) != 1:
        raise InputError(f"the foil {foil!r} is {len(token_ids)} tokens; give a text that is one, or id:NUMBER")
    return token_ids[0]
