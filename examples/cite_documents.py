"""Answer a question from a folder of documents, with citations that say what the model really read.

python examples/cite_documents.py [QUESTION FOLDER]
"""

import sys

import tracer
from tracer.agents.tools import load_documents
from tracer.explain.citations import cited_answer, shared_threshold
from tracer.tasks import documents_folder

question, folder = sys.argv[1:3] if len(sys.argv) > 2 else ("What is the currency of Brundalia?", documents_folder())
documents = load_documents(folder)[:6]  # each is part of the prompt

engine = tracer.connect("local")
trace = tracer.ChainOfThought(engine, max_tokens=64).run(question, documents=documents)
engine.close()

# Which tokens the documents changed, and which documents did it; how faithful that is comes with it.
report = tracer.explain(trace, methods=["mirage"])
mirage = report.explanation("mirage")

least = shared_threshold(mirage, report.targets)
for step_id in report.targets:
    answer = cited_answer(report.trace, mirage, step_id, least=least)
    print(f"{step_id:>4} {' '.join(answer.marked().split())}")

print()
for reference in answer.references:
    print(f"{f'[{reference.number}]':>5} {reference.share:6.1%}  {reference.title}")
worth = answer.trust.measured
if worth is not None and worth.lds is not None:
    better = "better" if answer.trust.better_than_random else "not shown to be better"
    print(f"\nLDS {worth.lds:+.2f} over {worth.sources} sources, {better} than random")
