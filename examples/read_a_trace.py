"""Read a recorded trace: the run of the demo whose answer was copied from the prompt's exemplar.

python examples/read_a_trace.py [FILE]
"""

import sys
from pathlib import Path

import tracer

default = Path(__file__).parent / "traces" / "copied_from_the_exemplar.json"
trace = tracer.Trace.load(sys.argv[1] if len(sys.argv) > 1 else default)

print(f"{trace.task.question}\nanswered {trace.outcome.answer!r}, should be {trace.task.reference!r}\n")
for step in trace.steps:
    print(f"{step.id:>4} {step.kind:12} {' '.join(step.text.split())[:100]}")

# Every token of a prompt belongs to one segment, so what the last step could read is known exactly.
call = trace.calls[-1]
tokens: dict[str, int] = {}
for segment in call.segments:
    shown = f"{segment.kind} {segment.step_id or ''}".strip()
    tokens[shown] = tokens.get(shown, 0) + segment.end - segment.start
print(f"\nwhat the last call was conditioned on, {len(call.prompt_token_ids)} tokens:")
for shown, count in tokens.items():
    print(f"  {shown:16} {count:5}")

graph = trace.graph()
print(f"\n{graph.number_of_nodes()} steps, {graph.number_of_edges()} relations")
