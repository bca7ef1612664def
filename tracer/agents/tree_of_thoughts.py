"""Tree of thoughts: breadth-first and depth-first search over thoughts (Yao et al. 2023a)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue

from tracer.agents.base import Agent, Budget, Grader, Reply, Run, ask, document_pieces
from tracer.agents.tot_problems import Candidate, Game24, Problem, State, load_problem
from tracer.engines.base import Engine
from tracer.errors import InputError, UnknownNameError
from tracer.trace.segments import Piece, Rendered, render_chat, render_text
from tracer.trace.steps import token_range
from tracer.trace.trace import AgentKind, Sampling, Step, StructuredOutput, Task

Search = Literal["bfs", "dfs"]
Generate = Literal["propose", "sample"]
Evaluate = Literal["value", "vote"]


@dataclass(slots=True)
class Node:
    """A state of the search and the step that led to it."""

    state: State
    step: Step
    branch: str
    value: float = 0.0
    children: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TreeSettings:
    """How to search.

    Args:
        search: Level by level (``bfs``) or best child first with backtracking (``dfs``).
        generate: One call a state that proposes several thoughts, a line each (``propose``), or several samples of one
            thought (``sample``).
        evaluate: Judge each thought on its own (``value``) or let the model choose among all of a level (``vote``).
        breadth: Thoughts kept a level (``b`` in the paper).
        depth: Thoughts on a path; ``None`` asks the problem.
        nodes: States after which the search stops.
        samples: Thoughts sampled a state when ``generate`` is ``sample``.
        judgements: Judgements a thought, or votes a level.
        children: Children that a depth-first search follows at most.
        temperature: Sampling temperature of thoughts and judgements.
        seed: Makes the search reproducible.
        structured: Constrain judgements and votes to their labels. Their log-probabilities are then those after the
            constraint, which a replay cannot reproduce.
        max_tokens: Length of one reply.
    """

    search: Search = "bfs"
    generate: Generate = "propose"
    evaluate: Evaluate = "value"
    breadth: int = 5
    depth: int | None = None
    nodes: int = 100
    samples: int = 5
    judgements: int = 3
    children: int = 3
    temperature: float = 0.7
    seed: int | None = 0
    structured: bool = True
    max_tokens: int = 256

    def __post_init__(self) -> None:
        choices = {"search": ("bfs", "dfs"), "generate": ("propose", "sample"), "evaluate": ("value", "vote")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UnknownNameError(name, str(getattr(self, name)), known)
        for name in ("breadth", "nodes", "samples", "judgements", "children", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.temperature <= 0 and max(self.samples, self.judgements) > 1:
            raise InputError("a tree of thoughts samples: set a temperature above 0, or samples and judgements to 1")
        if self.search == "dfs" and self.evaluate == "vote":
            raise InputError("depth-first search judges each thought on its own; use evaluate='value'")


class TreeOfThoughts(Agent):
    """Searches a tree whose nodes are partial solutions.

    Args:
        engine: What runs the model.
        problem: ``game24`` for the Game of 24, ``text`` for any question; ``None`` recognises a Game of 24.
        settings: How to search.
        prompt: A prompt's name or file, in place of the problem's own.
        budget: Limits of one run.
    """

    kind: AgentKind = "tot"

    def __init__(
        self,
        engine: Engine,
        *,
        problem: str | None = None,
        settings: TreeSettings | None = None,
        prompt: str | None = None,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(engine, budget=budget)
        self.problem = problem
        self.settings = settings or TreeSettings()
        self.prompt = prompt
        if problem is not None:
            load_problem(problem, "", prompt=prompt)

    def parameters(self) -> dict[str, JsonValue]:
        """The agent's parameters."""
        settings: dict[str, JsonValue] = {
            name: getattr(self.settings, name) for name in TreeSettings.__dataclass_fields__
        }
        return {"problem": self.problem, "prompt": self.prompt, **settings}

    def grader(self, task: Task) -> Grader:
        """A Game of 24 is checked by calculating; anything else is compared with the reference."""
        problem = load_problem(self.problem, task.question, prompt=self.prompt)
        return problem.grade if isinstance(problem, Game24) else super().grader(task)

    def solve(self, run: Run, task: Task) -> None:
        """Search, then write the answer from the best state."""
        question, documents = ask(run, task)
        problem = load_problem(self.problem, task.question, prompt=self.prompt)
        _TreeSearch(run, problem, self.settings, question, documents).solve()


class _TreeSearch:
    def __init__(
        self, run: Run, problem: Problem, settings: TreeSettings, question: Step, documents: Sequence[Step]
    ) -> None:
        self.run = run
        self.problem = problem
        self.settings = settings
        self.documents = documents
        self.root = Node(problem.root(question), question, "")
        self.depth = settings.depth or problem.depth
        self.nodes = 0

    def solve(self) -> None:
        """Search and write down the answer of the best leaf."""
        leaves = self._breadth_first() if self.settings.search == "bfs" else self._depth_first()
        if not leaves:
            self.run.recorder.step("answer", "the search found no usable thought", parents=[self.root.step])
            self.run.finish(None, nodes=self.nodes, kept=[])
            return
        best = max(leaf.value for leaf in leaves)
        ties = sum(leaf.value == best for leaf in leaves)
        chosen = next(leaf for leaf in leaves if leaf.value == best)
        answers = self._answers(leaves, chosen)
        graded = [self.run.grade(answer) for answer in answers]
        self.run.finish(
            answers[leaves.index(chosen)],
            nodes=self.nodes,
            kept=[leaf.step.id for leaf in leaves],
            top_value_ties=ties,
            # The gap between this and `correct` is what a better final choice would have won.
            any_kept_correct=None if None in graded else any(graded),
        )

    def _breadth_first(self) -> list[Node]:
        frontier = [self.root]
        kept: list[Node] = []
        for _ in range(self.depth):
            candidates = self._expand([node for node in frontier if not self.problem.is_leaf(node.state)])
            finished = [node for node in frontier if self.problem.is_leaf(node.state) and node is not self.root]
            self._judge(candidates)
            ranked = sorted([*finished, *candidates], key=lambda node: -node.value)
            kept = ranked[: self.settings.breadth]
            for node in ranked[self.settings.breadth :]:
                self.run.recorder.update(node.step, pruned=True)
            if not candidates or self.nodes >= self.settings.nodes:
                break
            frontier = kept
        return kept

    def _depth_first(self) -> list[Node]:
        """Follow the best child first; give up a path that was judged impossible; stop at the first solution."""
        leaves: list[Node] = []
        stack = [self.root]
        while stack and self.nodes < self.settings.nodes:
            node = stack.pop()
            path = len(node.state.thoughts)
            if path and (self.problem.is_leaf(node.state) or path >= self.depth):
                leaves.append(node)
                if self.problem.is_solved(node.state):
                    return [node]
                continue
            children = self._expand([node])
            self._judge(children)
            ranked = sorted(children, key=lambda child: -child.value)
            hopeful = [child for child in ranked if not self.problem.is_hopeless(child.value / self._judgements)]
            followed = hopeful[: self.settings.children]
            for child in ranked:
                if child not in followed:
                    self.run.recorder.update(child.step, pruned=True)
            stack.extend(reversed(followed))
        return leaves

    @property
    def _judgements(self) -> int:
        return self.settings.judgements

    def _expand(self, nodes: Sequence[Node]) -> list[Node]:
        """All children of all nodes, asked for in one request each and sent together."""
        settings = self.settings
        sampling = Sampling(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            n=1 if settings.generate == "propose" else settings.samples,
            stop=self._stop(settings.generate),
        )
        prompts = [self._prompt(settings.generate, node.state) for node in nodes]
        children: list[Node] = []
        for node, replies in zip(nodes, self.run.complete(prompts, sampling), strict=True):
            for reply in replies:
                children.extend(self._children(node, reply))
        return children

    def _children(self, node: Node, reply: Reply) -> list[Node]:
        children: list[Node] = []
        for candidate in self.problem.parse_thoughts(node.state, reply.text[: reply.stop_position]):
            if candidate.error:
                self.run.count("parse_failures")
            if candidate.corrected:
                self.run.count("corrected_thoughts")
            branch = f"{node.branch}.{len(node.children) + 1}" if node.branch else str(len(node.children) + 1)
            step = self._record_thought(node, reply, candidate, branch)
            child = Node(node.state.extend(step, candidate), step, branch)
            node.children.append(child)
            self.nodes += 1
            if candidate.error is None:
                children.append(child)
        return children

    def _record_thought(self, node: Node, reply: Reply, candidate: Candidate, branch: str) -> Step:
        span = token_range(reply.decoded, candidate.start, candidate.end)
        return self.run.recorder.step(
            "thought",
            candidate.text,
            parents=[node.step],
            edge="branch",
            branch=branch,
            pruned=candidate.error is not None,
            call=reply.call_id,
            completion=reply.index,
            start=span.start,
            end=span.end,
            error=candidate.error,
            data={"corrected": candidate.corrected} if candidate.corrected else None,
        )

    def _judge(self, nodes: Sequence[Node]) -> None:
        if nodes and self.settings.evaluate == "value":
            self._value(nodes)
        elif nodes:
            self._vote(nodes)

    def _value(self, nodes: Sequence[Node]) -> None:
        """Value distinct states, all in one batch; a state that stands there already is worth nothing."""
        first: dict[str, Node] = {}
        for node in nodes:
            key = self.problem.key(node.state)
            if key in first:
                self.run.recorder.update(node.step, score=0.0, data={"duplicate_of": first[key].step.id})
            else:
                first[key] = node
        distinct = list(first.values())
        sampling = self._judging(list(self.problem.labels))
        prompts = [self._prompt("value", node.state) for node in distinct]
        for node, replies in zip(distinct, self.run.complete(prompts, sampling), strict=True):
            labels = [self.problem.parse_label(reply.text) for reply in replies]
            for reply, label in zip(replies, labels, strict=True):
                if label is None:
                    self.run.count("parse_failures")
                value = self.problem.labels[label] if label else 0.0
                node.value += value
                self._record_judgement("evaluation", reply, label, value, [node])
            self.run.recorder.update(node.step, score=node.value)

    def _vote(self, nodes: Sequence[Node]) -> None:
        """Show all states of a level at once and let the model choose."""
        choices = [str(number) for number in range(1, len(nodes) + 1)]
        prompt = self._prompt("vote", self.root.state, choices=[node.state for node in nodes])
        (replies,) = self.run.complete([prompt], self._judging(choices))
        for reply in replies:
            choice = self.problem.parse_choice(reply.text, len(nodes))
            if choice is None:
                self.run.count("parse_failures")
            else:
                nodes[choice].value += 1.0
            voted = [nodes[choice]] if choice is not None else []
            self._record_judgement("vote", reply, None if choice is None else str(choice + 1), 1.0, voted)
        for node in nodes:
            self.run.recorder.update(node.step, score=node.value)

    def _judging(self, labels: list[str]) -> Sampling:
        settings = self.settings
        return Sampling(
            max_tokens=settings.max_tokens if not settings.structured else 16,
            temperature=settings.temperature,
            seed=settings.seed,
            n=settings.judgements,
            structured=StructuredOutput(kind="choice", value=list(labels)) if settings.structured else None,
        )

    def _record_judgement(
        self, kind: Literal["evaluation", "vote"], reply: Reply, label: str | None, value: float, judged: Sequence[Node]
    ) -> None:
        step = self.run.recorder.step(
            kind,
            reply.text.strip(),
            parents=[node.step for node in judged] or [self.root.step],
            branch=judged[0].branch if judged else None,
            score=value if label is not None else None,
            call=reply.call_id,
            completion=reply.index,
            start=0,
            end=len(reply.completion.token_ids),
            error=None if label is not None else "this judgement could not be read",
            data={"label": label},
        )
        for node in judged:
            self.run.recorder.edge(step, node.step, "evaluates" if kind == "evaluation" else "votes_for")

    def _answers(self, leaves: Sequence[Node], chosen: Node) -> list[str | None]:
        """The answer that every kept leaf leads to; the chosen one's is the run's."""
        sampling = Sampling(max_tokens=self.settings.max_tokens)
        prompts = [self._prompt("final", leaf.state) for leaf in leaves]
        answers: list[str | None] = []
        for leaf, (reply,) in zip(leaves, self.run.complete(prompts, sampling), strict=True):
            answer = self.problem.parse_answer(reply.text)
            if answer is None:
                self.run.count("parse_failures")
            answers.append(answer)
            self.run.recorder.step(
                "answer",
                reply.text.strip(),
                parents=[leaf.step],
                edge="selects" if leaf is chosen else "next",
                branch=leaf.branch,
                pruned=leaf is not chosen,
                call=reply.call_id,
                completion=reply.index,
                start=0,
                end=len(reply.completion.token_ids),
                error=None if answer is not None else "no answer could be read from this",
                data={"value": answer},
            )
        return answers

    def _stop(self, template: str) -> list[str]:
        """Where a reply ends besides the end of the turn, if the prompt file says so."""
        stop = self.problem.prompt.templates.get(f"{template}_stop")
        return [stop] if stop else []

    def _prompt(self, template: str, state: State, *, choices: Sequence[State] = ()) -> Rendered:
        """A prompt about a state; thoughts in it are labelled with their steps."""
        fields = self.problem.fields(state)
        fields["documents"] = document_pieces(self.documents)
        fields["choices"] = [
            piece
            for number, choice in enumerate(choices, start=1)
            for piece in [Piece(f"Choice {number}:\n", "instruction"), *self.problem.path(choice)]
        ]
        name = self.problem.template(template, state)
        rendered = render_chat(self.problem.prompt.chat(self.problem.prompt.fill(name, fields)), self.run.tokenizer)
        if f"{name}_reply" in self.problem.prompt.templates:
            rendered.extend(render_text(self.problem.prompt.fill(f"{name}_reply", fields), self.run.tokenizer))
        return rendered
