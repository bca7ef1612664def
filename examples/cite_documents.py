"""Answer a question from a folder of documents, with citations that say what the model really read.

python examples/cite_documents.py [QUESTION FOLDER]
"""

import sys

import tracer
from tracer.agents.tools import load_documents
from tracer.explain.citations import cited_answer, joint_references, shared_threshold
from tracer.tasks import documents_folder

question, folder = sys.argv[1:3] if len(sys.argv) > 2 else ("What is the currency of Brundalia?", documents_folder())
documents = load_documents(folder)[:6]  # each is part of the prompt

engine = tracer.connect("local")
trace = tracer.ChainOfThought(engine, max_tokens=64).run(question, documents=documents)
engine.close()

# Which tokens the documents changed, and which documents did it; how faithful that is comes with it.
report = tracer.explain(trace, methods=["mirage"])
mirage = report.explanation("mirage")

# The reasoning and the answer are judged together: what the documents hardly changed cites nothing.
least = shared_threshold(mirage, report.targets)
answers = [cited_answer(report.trace, mirage, step_id, least=least) for step_id in report.targets]
for answer in answers:
    print(f"{answer.step_id:>4} {' '.join(answer.marked().split())}")

print()
for reference in joint_references(answers):
    print(f"{f'[{reference.number}]':>5} {reference.share:6.1%}  {reference.title}")

worth = answers[-1].trust.measured
if worth is not None and worth.lds is not None:
    better = "better" if answers[-1].trust.better_than_random else "not shown to be better"
    print(f"\nthe answer's scores: LDS {worth.lds:+.2f} over {worth.sources} sources, {better} than random")
