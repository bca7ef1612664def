"""Ask what an answer was conditioned on: the demo's run that answered "Norway", which no document mentions.

python examples/explain_a_step.py [FILE]
"""

import sys
from pathlib import Path

import tracer
from tracer.explain.influence import influence_on

default = Path(__file__).parent / "traces" / "copied_from_the_exemplar.json"
trace = tracer.Trace.load(sys.argv[1] if len(sys.argv) > 1 else default)

# Replays the recorded tokens through a copy of the weights, which must reproduce the recorded log-probabilities.
report = tracer.explain(trace, methods=["grad_x_input"])
print(f"log-probabilities differ by {report.parity.mean_abs:.1e} on average over {report.parity.tokens} tokens")

for step_id in report.targets:
    print(f"\n{step_id} {' '.join(trace.step(step_id).text.split())[:80]}")
    for source, value in report.sources(step_id, "grad_x_input")[:4]:
        print(f"  {value:+8.3f}  {source.kind} {source.step_id or ''}")

# What a thought read, the answer that builds on it read too.
answer = report.targets[-1]
print(f"\n{answer} through all steps (directly)")
for item in influence_on(report.trace, "grad_x_input", answer)[:6]:
    print(f"  {item.through:6.1%} ({item.direct:6.1%})  {item.source.kind} {item.source.step_id or ''}")
