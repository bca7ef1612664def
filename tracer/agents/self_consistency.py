"""Self-consistency: many sampled chains, one vote (Wang et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from tracer.agents.base import Agent, Budget, Run, ask
from tracer.agents.cot import AnswerType, Chain, ChainSampler, Shots, is_numeric
from tracer.agents.prompts import load_prompt
from tracer.engines.base import Engine
from tracer.errors import InputError, UnknownNameError
from tracer.trace.answers import normalise
from tracer.trace.trace import AgentKind, Sampling, Step, Task

Vote = Literal["majority", "weighted", "unnormalised"]
VOTES: tuple[Vote, ...] = ("majority", "weighted", "unnormalised")


@dataclass(frozen=True, slots=True)
class Tally:
    """The result of a vote.

    Answers are ranked by weight, then by the number of chains, then by which was given first.
    """

    weights: dict[str, float]
    """Weight of every normalised answer, the winner first."""
    chains: dict[str, list[int]]
    """Which chains gave it."""
    margin: float
    """The winner's share of all weight less the runner-up's, from 0 to 1."""
    tied: list[str]
    """Answers with the same weight as the winner's, itself included; one entry where there is no tie."""

    @property
    def winner(self) -> str | None:
        """The normalised answer that won."""
        return next(iter(self.weights), None)


class SelfConsistency(Agent):
    """Several sampled chains whose answers are put to a vote.

    Args:
        engine: What runs the model.
        n: Number of chains; all are sampled in one request.
        vote: ``majority`` counts chains; ``weighted`` adds up each chain's length-normalised probability,
            ``unnormalised`` its plain probability (Wang et al. 2023, Table 1).
        temperature: Sampling temperature.
        top_p: Nucleus of the sampling.
        seed: Makes the samples reproducible.
        shots: See `tracer.agents.cot.ChainOfThought`.
        answer_type: See `tracer.agents.cot.ChainOfThought`.
        prompt: A prompt's name or file.
        max_tokens: Length of a chain.
        budget: Limits of one run.

    Raises:
        InputError: ``n`` is below 1, or the temperature is 0 with several chains.
    """

    kind: AgentKind = "cot_sc"

    def __init__(
        self,
        engine: Engine,
        *,
        n: int = 8,
        vote: Vote = "majority",
        temperature: float = 0.7,
        top_p: float = 1.0,
        seed: int | None = 0,
        shots: Shots = "few",
        answer_type: AnswerType = "auto",
        prompt: str | None = None,
        max_tokens: int = 512,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(engine, budget=budget)
        if n < 1:
            raise InputError(f"self-consistency needs at least one chain, not {n}")
        if n > 1 and temperature <= 0:
            raise InputError("self-consistency samples: set a temperature above 0")
        if vote not in VOTES:
            raise UnknownNameError("vote", vote, VOTES)
        self.n = n
        self.vote: Vote = vote
        self.shots = shots
        self.answer_type = answer_type
        self.prompt = load_prompt(prompt or f"cot-{shots}-shot", requires=["user"])
        self.sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)

    def parameters(self) -> dict[str, JsonValue]:
        """The agent's parameters."""
        return {
            "n": self.n,
            "vote": self.vote,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": self.sampling.seed,
            "shots": self.shots,
            "answer_type": self.answer_type,
            "prompt": self.prompt.name,
            "max_tokens": self.sampling.max_tokens,
        }

    def solve(self, run: Run, task: Task) -> None:
        """Sample all chains together and count their votes."""
        question, documents = ask(run, task)
        sampler = ChainSampler(
            run, self.prompt, question, documents, numeric=is_numeric(self.answer_type, task.question)
        )
        chains = sampler.sample(self.sampling, branches=[f"b{index + 1}" for index in range(self.n)])
        tally = count_votes(chains, self.vote)
        for chain in chains:
            if chain.answer is None:
                run.count("abstained")
        answer = self._record_vote(run, chains, tally, question)
        run.finish(
            answer,
            chains=self.n,
            weights=dict(tally.weights),
            margin=tally.margin,
            tied=list(tally.tied),
            truncated_chains=sum(chain.answer_class == "truncated" for chain in chains),
        )

    def _record_vote(self, run: Run, chains: Sequence[Chain], tally: Tally, question: Step) -> str | None:
        if tally.winner is None:
            run.recorder.step("answer", f"none of {self.n} chains gave an answer", parents=[question])
            return None
        voters = [chains[index] for index in tally.chains[tally.winner]]
        answer = next(chain.answer for chain in voters if chain.answer is not None)
        tie = f", tied with {len(tally.tied) - 1} other" if len(tally.tied) > 1 else ""
        steps = [chain.answer_step for chain in voters if chain.answer_step is not None]
        run.recorder.step(
            "answer",
            f"{answer} ({len(voters)} of {self.n} chains{tie})",
            parents=steps,
            edge="votes_for",
            score=tally.weights[tally.winner],
            data={"value": answer, "weights": dict(tally.weights), "margin": tally.margin, "tied": list(tally.tied)},
        )
        return answer


def count_votes(chains: Sequence[Chain], vote: Vote) -> Tally:
    """Count the chains' votes; chains without an answer abstain."""
    weights: dict[str, float] = {}
    members: dict[str, list[int]] = {}
    for index, chain in enumerate(chains):
        if chain.answer is None:
            continue
        key = normalise(chain.answer)
        weights[key] = weights.get(key, 0.0) + _weight(chain, vote)
        members.setdefault(key, []).append(index)
    ranked = sorted(weights, key=lambda key: (-weights[key], -len(members[key]), members[key][0]))
    total = sum(weights.values())
    shares = [weights[key] / total if total > 0 else 0.0 for key in ranked] + [0.0]
    tied = [key for key in ranked if math.isclose(weights[key], weights[ranked[0]], rel_tol=1e-9, abs_tol=0.0)]
    return Tally(
        weights={key: weights[key] for key in ranked},
        chains={key: members[key] for key in ranked},
        margin=shares[0] - shares[1] if ranked else 0.0,
        tied=tied,
    )


def _weight(chain: Chain, vote: Vote) -> float:
    """A chain's weight; probabilities are of the chain's own tokens, before temperature."""
    if vote == "majority":
        return 1.0
    logprobs = chain.reply.completion.logprobs
    if not logprobs:
        raise InputError(f"vote {vote!r} needs log-probabilities, which this engine does not give; use 'majority'")
    total = math.fsum(logprobs)
    return math.exp(total / len(logprobs) if vote == "weighted" else total)
