"""Ask what an answer was conditioned on: the demo's run that answered "Norway", which no document mentions.

python examples/explain_a_step.py [FILE]
"""

import sys
from pathlib import Path

import tracer
from tracer.explain.influence import influence_on
from tracer.trace.faithfulness import faithfulness_of

default = Path(__file__).parent / "traces" / "copied_from_the_exemplar.json"
trace = tracer.Trace.load(sys.argv[1] if len(sys.argv) > 1 else default)

# Replays the recorded tokens through a copy of the weights, which must reproduce the recorded log-probabilities.
report = tracer.explain(trace)
print(f"log-probabilities differ by {report.parity.mean_abs:.1e} on average over {report.parity.tokens} tokens")

method = report.explanations[0].method
for step_id in report.targets:
    print(f"\n{step_id} {' '.join(trace.step(step_id).text.split())[:80]}")
    for source, value in report.sources(step_id, method)[:4]:
        print(f"  {value:+8.3f}  {source.kind} {source.step_id or ''}")

# What a thought read, the answer that builds on it read too.
answer = report.targets[-1]
print(f"\n{answer} through all steps (directly)")
for item in influence_on(report.trace, method, answer)[:6]:
    print(f"  {item.through:6.1%} ({item.direct:6.1%})  {item.source.kind} {item.source.step_id or ''}")

# What the scores are worth: sources were taken away from the answer's prompt, and the answer was scored again.
known = faithfulness_of(report.explanation(method))
if known is not None:
    better = "better" if known.better_than_random else "not shown to be better"
    print(f"\n{method} is {better} than random on this run (z = {known.z:.1f})")
    for target, worth in known.targets.items():
        print(f"  {target}: LDS {'-' if worth.lds is None else f'{worth.lds:+.2f}'} over {worth.sources} sources")
