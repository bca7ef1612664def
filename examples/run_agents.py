"""Run all four agents from Python and look at what they did.

python examples/run_agents.py
"""

import tracer
from tracer.agents.tools import bundled
from tracer.tasks import documents_folder, load_tasks

engine = tracer.connect("auto")  # a running vLLM, one that is started now, or the model in this process
print(engine.description)

word = load_tasks("word")[0]
game = load_tasks("game24")[0]
river = load_tasks("multihop")[1]

with tracer.Store() as store:
    traces = [
        tracer.ChainOfThought(engine).run(word.question, reference=word.reference, store=store),
        tracer.SelfConsistency(engine, n=8).run(word.question, reference=word.reference, store=store),
        tracer.TreeOfThoughts(engine).run(game.question, store=store),
        tracer.ReAct(engine, tools=bundled(["search"], documents_folder())).run(
            river.question, reference=river.reference, store=store
        ),
    ]

for trace in traces:
    print(f"\n{trace.id} {trace.agent.kind}: {trace.outcome.answer} (right: {trace.outcome.correct})")
    for step in trace.steps[:12]:
        print(f"  {step.id:>4} {step.kind:12} {' '.join(step.text.split())[:90]}")

engine.close()
