"""The explanation documents of one trace: what their key is, how rows are merged in, and where they are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import cast

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.errors import ModelError, StoreError, TraceFormatError, TraceNotFoundError
from tracer.explain.base import Cost, Finding, Request, TargetFunction
from tracer.explain.faithfulness import Faithfulness, measures_of, readable
from tracer.explain.influence import is_complete, through_steps
from tracer.replay.parity import Parity
from tracer.replay.recorded import Recorded
from tracer.store import Arrays, Store
from tracer.trace.explanation import Explanation, ExplanationSource
from tracer.trace.faithfulness import against_random
from tracer.trace.probes import ProbeScore, probe_scores
from tracer.trace.trace import Trace

SHARED_WITH = "shared_with"
"""Key in a cost that names the methods for which the same passes were made."""
Tokens = dict[str, NDArray[np.float32]]
"""Token scores by step id, each ``(tokens before the target's end,)``."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all explanations of one call of `tracer.explain` share.

    Args:
        content: `content_sha256` of the trace as it is replayed.
        replica: Identity of the replica.
        target_function: The scalar that is explained.
        foil: Token id of the foil.
        chunk_tokens: Longest chunk of a document or observation.
        seed: For everything drawn at random.
    """

    content: str
    replica: Mapping[str, JsonValue]
    target_function: TargetFunction
    foil: int | None
    chunk_tokens: int | None
    seed: int

    def key(self, request: Request) -> str:
        """SHA-256 of everything that the scores of a method depend on."""
        return _sha256({**asdict(self), "method": request.method.name, "parameters": dict(request.parameters)})


def content_sha256(trace: Trace) -> str:
    """SHA-256 of what a replay reads from a trace: ids, what they show, and where the steps are in them."""
    calls = [
        [
            call.id,
            call.prompt_token_ids,
            [[part.start, part.end, part.kind, part.step_id] for part in call.segments],
            [[completion.token_ids, completion.logprobs] for completion in call.completions],
        ]
        for call in trace.calls
    ]
    steps = [[step.id, step.kind, step.call_id, step.completion, step.start, step.end] for step in trace.steps]
    return _sha256([calls, steps])


def _sha256(content: object) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(slots=True)
class Draft:
    """An explanation that is being computed.

    Args:
        request: The method.
        explanation: What is known so far.
        tokens: Token scores of its targets, as far as they are there.
    """

    request: Request
    explanation: Explanation
    tokens: Tokens = field(default_factory=dict)
    before: Mapping[str, JsonValue] = field(default_factory=dict)
    """Cost of what was computed in earlier calls."""
    changed: bool = False

    def add(self, finding: Finding, recorded: Recorded) -> None:
        """Take in what the method found out about one target, in place of what was known of it.

        Raises:
            ModelError: Its scores are not finite.
        """
        step_id = finding.target.step_id
        row = [float(value) for value in recorded.aggregate(finding.target, finding.scores)]
        if not np.isfinite(row).all():
            raise ModelError(
                f"{self.request.method.name} gave scores of step {step_id} that are not finite; "
                "use --dtype float32, or other parameters"
            )
        own = self.explanation
        rows = dict(zip(own.targets, own.values, strict=True))
        rows[step_id] = row
        order = sorted(rows, key=_place_in(recorded.trace))
        self.explanation = own.model_copy(
            update={
                "targets": order,
                "values": [rows[target] for target in order],
                "details": {**own.details, step_id: dict(finding.details)},
            }
        )
        self.tokens[step_id] = np.asarray(finding.scores, dtype=np.float32)
        self._forget_trust(step_id)
        self.changed = True

    def _forget_trust(self, step_id: str) -> None:
        """Scores that were computed again are to be measured again."""
        if self.measured(step_id):
            own = dict(self.explanation.faithfulness or {})
            rest = {key: value for key, value in cast("dict[str, JsonValue]", own["targets"]).items() if key != step_id}
            update = {**own, "targets": rest} if rest else None
            self.explanation = self.explanation.model_copy(update={"faithfulness": update})

    def measured(self, step_id: str) -> bool:
        """Whether the faithfulness of a target's scores is known."""
        targets = (self.explanation.faithfulness or {}).get("targets")
        return isinstance(targets, dict) and step_id in targets and readable(targets[step_id])

    def trust(self, step_id: str, found: Faithfulness) -> None:
        """Take in how faithful the scores of one target are."""
        own = dict(self.explanation.faithfulness or {})
        targets = {**cast("dict[str, JsonValue]", own.get("targets") or {}), step_id: found.to_document()}
        document: dict[str, JsonValue] = {
            "targets": targets,
            "agreement": own.get("agreement") or {},
            "removal": "delete",
        }
        self.explanation = self.explanation.model_copy(update={"faithfulness": document})
        pooled = against_random(measures_of(self.explanation).values())
        document |= {"z": pooled.z, "better_than_random": pooled.better}
        self.changed = True

    def agree(self, step_id: str, agrees: Mapping[str, float | None]) -> None:
        """Take in the rank correlation with the other methods on a target that was measured."""
        own = dict(self.explanation.faithfulness or {})
        before = cast("dict[str, JsonValue]", own.get("agreement") or {})
        known = cast("dict[str, JsonValue]", before.get(step_id) or {})
        if any(known.get(name, ...) != value for name, value in agrees.items()):
            own["agreement"] = {**before, step_id: {**known, **agrees}}
            self.explanation = self.explanation.model_copy(update={"faithfulness": own})
            self.changed = True

    def finish(self, answers: Sequence[str], cost: Cost, *, beside: Collection[str] = ()) -> None:
        """Bring up to date what depends on all targets: the influence on the answer through the steps, and the cost.

        Args:
            answers: Steps of the final answer.
            cost: Of the passes that were made in this call.
            beside: Other methods that these passes were made for as well.
        """
        own = self.explanation
        through = {step: through_steps(own, step) for step in answers if step in own.targets and is_complete(own, step)}
        self.explanation = own.model_copy(update={"through": through, "cost": _sum(self.before, cost, beside)})


def _place_in(trace: Trace) -> Callable[[str], tuple[int, int]]:
    """Sorts targets as the trace has them; single tokens, named ``ID#N``, behind their step."""
    numbers = {step.id: number for number, step in enumerate(trace.steps)}

    def place(target: str) -> tuple[int, int]:
        step_id, _, token = target.partition("#")
        return numbers.get(step_id, len(numbers)), int(token) if token.isdecimal() else -1

    return place


def _sum(before: Mapping[str, JsonValue], cost: Cost, beside: Collection[str] = ()) -> dict[str, JsonValue]:
    total: dict[str, JsonValue] = {}
    for item in fields(cost):
        old, new = before.get(item.name, 0), getattr(cost, item.name)
        total[item.name] = new + old if isinstance(old, int | float) else new
    shared = before.get(SHARED_WITH)
    names = {str(name) for name in shared} if isinstance(shared, list) else set()
    if names := names | set(beside):
        total[SHARED_WITH] = cast("JsonValue", sorted(names))
    return total


class Kept:
    """The explanations of a trace: those that it carries, those in the store, and what is added to them.

    Args:
        trace: The trace.
        store: Where explanations go, if a trace of this id and content is in it.
        arrays: Where token scores go; the store's place if not given.
    """

    def __init__(self, trace: Trace, *, store: Store | None, arrays: Arrays | None) -> None:
        self._trace = trace
        self._store = store if store is not None and _holds(store, trace) else None
        self.arrays = arrays or (self._store.arrays if self._store is not None else None)
        self._documents = [dict(document) for document in trace.explanations]
        self._stored: dict[str, str] = {}
        if self._store is not None:
            known = {document.get("key") for document in self._documents}
            for name, document in self._store.documents(trace.id, "explanation").items():
                self._stored[str(document.get("key"))] = name
                if document.get("key") not in known:
                    self._documents.append(document)
        self._scores = [dict(document) for document in trace.probes]
        if self._store is not None:
            places = {_place(document) for document in self._scores}
            stored = self._store.documents(trace.id, "probe").values()
            self._scores += [document for document in stored if _place(document) not in places]

    @property
    def trace(self) -> Trace:
        """The trace with everything that is known about it."""
        return self._trace.model_copy(update={"explanations": list(self._documents), "probes": list(self._scores)})

    def scores(self, name: str | None) -> list[ProbeScore]:
        """Scores of a probe, or of all of them."""
        return probe_scores(self.trace, name=name)

    def put_scores(self, names: Collection[str], scores: Sequence[ProbeScore]) -> None:
        """Keep scores in place of all that probes of these names gave before, in the trace and in the store.

        Raises:
            StoreError: They cannot be written.
        """
        documents = [cast("dict[str, JsonValue]", score.model_dump(mode="json")) for score in scores]
        self._scores = [document for document in self._scores if document.get("name") not in names] + documents
        if self._store is not None:
            stored = self._store.documents(self._trace.id, "probe")
            old = [key for key, document in stored.items() if document.get("name") in names]
            new = {json.dumps(_place(document)): document for document in documents}
            self._store.put_documents(self._trace.id, "probe", new, remove=old)

    def parity(self, setting: Setting) -> Parity | None:
        """The parity that was measured before for the same trace and replica."""
        for document in self._documents:
            same = (document.get("trace_sha256"), document.get("replica")) == (setting.content, setting.replica)
            stored = document.get("parity")
            if same and isinstance(stored, dict) and (found := _parity(stored)) is not None:
                return found
        return None

    def draft(self, request: Request, setting: Setting, recorded: Recorded, parity: Parity) -> Draft:
        """What is known under the key of a method, or an empty explanation to begin with."""
        key = setting.key(request)
        known = self._find(key, len(recorded.sources))
        if known is not None:
            return Draft(request, known, self._tokens(known), dict(known.cost))
        sources = [ExplanationSource.model_validate(asdict(source)) for source in recorded.sources]
        method = request.method
        fresh = Explanation(
            key=key,
            trace_sha256=setting.content,
            method=method.name,
            parameters=dict(request.parameters),
            target_function=setting.target_function,
            foil=setting.foil,
            chunk_tokens=setting.chunk_tokens,
            unit=method.unit if setting.target_function == "logprob" else method.unit.replace("nats", "logits"),
            signed=method.signed,
            targets=[],
            sources=sources,
            values=[],
            parity=parity.to_document(),
            replica=dict(setting.replica),
            cost=_sum({}, Cost()),
            seed=setting.seed,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        return Draft(request, fresh)

    def missing(self, draft: Draft, targets: Sequence[str]) -> tuple[str, ...]:
        """Which targets still have to be computed: those without a row, or whose token scores are gone."""
        known = set(draft.explanation.targets)
        if self.arrays is not None:
            known &= set(draft.tokens)
        return tuple(target for target in targets if target not in known)

    def put(self, draft: Draft) -> None:
        """Keep an explanation as it is now: in the trace, and in the store with its token scores.

        Raises:
            StoreError: It cannot be written.
        """
        explanation = draft.explanation
        key = str(explanation.key)
        if self.arrays is not None:
            file = self.arrays.write(self._trace.id, key, draft.tokens)
            explanation = draft.explanation = explanation.model_copy(update={"arrays": file})
        document = cast("dict[str, JsonValue]", explanation.model_dump(mode="json"))
        for place, other in enumerate(self._documents):
            if other.get("key") == key:
                self._documents[place] = document
                break
        else:
            self._documents.append(document)
        if self._store is not None:
            # An imported explanation has a name of its own in the store.
            name = self._stored.setdefault(key, key)
            self._store.put_document(self._trace.id, "explanation", key=name, document=document)
        draft.changed = False

    def _find(self, key: str, sources: int) -> Explanation | None:
        for document in self._documents:
            if document.get("key") == key:
                try:
                    found = Explanation.read(document)
                except TraceFormatError:
                    return None
                return found if len(found.sources) == sources else None
        return None

    def _tokens(self, explanation: Explanation) -> Tokens:
        if self.arrays is None or explanation.arrays is None or explanation.key is None:
            return {}
        try:
            return self.arrays.read(self._trace.id, explanation.key, explanation.arrays)
        except StoreError:
            return {}


def _holds(store: Store, trace: Trace) -> bool:
    """Whether the store has this very trace, not another one of the same id."""
    try:
        return store.resolve(trace.id) == trace.id and content_sha256(store.load(trace.id)) == content_sha256(trace)
    except TraceNotFoundError:
        return False


def _place(score: Mapping[str, JsonValue]) -> tuple[JsonValue, ...]:
    """What a probe score is about."""
    return score.get("name"), score.get("step_id"), score.get("sentence")


def _parity(stored: Mapping[str, JsonValue]) -> Parity | None:
    """A stored parity, or ``None`` where it is not of the right form."""
    names = {item.name for item in fields(Parity)}
    numbers = [stored.get(name) for name in ("mean_abs", "max_abs", "tokens", "tolerance_mean", "tolerance_max")]
    if set(stored) != names or not all(value is None or isinstance(value, int | float) for value in numbers):
        return None
    if not all(isinstance(value, int | float) for value in numbers[2:]):
        return None
    return Parity(**cast("dict[str, float]", dict(stored)))  # type: ignore[arg-type]
