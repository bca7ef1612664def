"""Record an agent that is not one of tracer's: any Python code that calls a model.

python examples/record_your_own.py
"""

import tracer
from tracer.trace.segments import Message, Piece, render_chat

QUESTION = "Is 91 a prime number? Answer in one sentence."

engine = tracer.connect("auto")

with tracer.Store() as store, tracer.record(QUESTION, model=engine.info, sinks=[store]) as run:
    question = run.step("question", QUESTION)

    # A prompt is built from labelled pieces, so that every token is known to show one of them.
    prompt = render_chat([Message("user", [Piece(QUESTION, "question", question.id)])], engine.tokenizer)
    sampling = tracer.Sampling(max_tokens=64)
    call = run.call(prompt, sampling)
    ((completion,),) = engine.generate([prompt.token_ids], sampling)
    call.finish([completion])

    answer = run.step(
        "answer",
        completion.text,
        parents=[question],
        call=call.id,
        completion=0,
        start=0,
        end=len(completion.token_ids),
    )
    run.finish(completion.text)

print(f"{run.trace_id}: {completion.text}")
print(f"look at it with: tracer show {run.trace_id}")
engine.close()
