"""Runs inseq and captum in their own environment; knows nothing of tracer.

``python inseq_peer.py JOB.json OUT.safetensors``, with JOB ``{model, threads, tasks: [{name, kind, ids, prompt, start,
end, ...}]}``. A task explains the tokens ``[start, end)`` of a sequence. Prints one JSON line of seconds by task.
"""

import copy
import json
import sys
import time
from pathlib import Path

import inseq
import torch
from captum.attr import IntegratedGradients
from safetensors.torch import load_file, save_file


def logprob(args):
    """The log-probability of what was written; inseq has it only as a probability."""
    logits = args.attribution_model.output2logits(args.forward_output)
    return logits.log_softmax(-1).gather(-1, args.target_ids.reshape(-1, 1)).squeeze(-1)


def token_by_token(model, task, method):
    """Sum over a span's tokens of inseq's attribution of each, ``(end - 1, width)``."""
    # The whole text: cut in mid-word it would be tokenised otherwise.
    text, prompt = (model.tokenizer.decode(task["ids"][:size]) for size in (None, task["prompt"]))
    found = model.tokenizer(text, add_special_tokens=False).input_ids
    assert found == task["ids"], "inseq would read other tokens than were recorded"
    out = model.attribute(
        prompt,
        text,
        method=method,
        attributed_fn="span_logprob",
        attr_pos_start=task["start"],
        attr_pos_end=task["end"],
        show_progress=False,
        **({"abs": False} if method == "saliency" else {}),
        **({"n_steps": task["points"], "internal_batch_size": 1} if method == "integrated_gradients" else {}),
    )
    scores = out.sequence_attributions[0].target_attributions  # (end, tokens, width), nan for what is not read
    return scores[: task["end"] - 1].nan_to_num(0.0).sum(1)


def whole_path(model, task):
    """captum's integrated gradients of the span's summed log-probability, ``(end - 1, width)``.

    The baseline is zero, or the token ``task["baseline"]`` at every position.
    """
    ids = torch.tensor(task["ids"][: task["end"]])
    span = slice(task["start"] - 1, task["end"] - 1)
    inner = copy.deepcopy(model.model).double() if task["kind"] == "captum_ig64" else model.model

    def forward(embeddings):
        logits = inner(inputs_embeds=embeddings, use_cache=False).logits[:, span]
        return logits.log_softmax(-1).gather(-1, ids[task["start"] :].expand(len(logits), -1)[..., None]).sum((1, 2))

    embed = inner.get_input_embeddings()
    inputs = embed(ids[:-1])[None].detach()
    start = torch.zeros_like(inputs)
    if task["baseline"] is not None:
        start = embed(torch.full_like(ids[:-1], task["baseline"]))[None].detach()
    method = IntegratedGradients(forward)
    found = method.attribute(
        inputs, baselines=start, n_steps=task["points"], method="gausslegendre", internal_batch_size=1
    )
    return found[0].float()


def main():
    """Do the job."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    inseq.register_step_function(fn=logprob, identifier="span_logprob", overwrite=True)
    model = inseq.load_model(job["model"], "input_x_gradient", device="cpu", model_kwargs={"dtype": torch.float32})
    out = Path(sys.argv[2])
    arrays = load_file(out) if out.exists() else {}
    seconds = json.loads(out.with_suffix(".json").read_text()) if arrays else {}
    for task in job["tasks"]:
        if task["name"] in arrays:
            continue
        began = time.perf_counter()
        with torch.enable_grad():
            found = (
                whole_path(model, task)
                if task["kind"].startswith("captum_ig")
                else token_by_token(model, task, task["kind"])
            )
        seconds[task["name"]] = time.perf_counter() - began
        arrays[task["name"]] = found.detach().contiguous()
        # Kept at once: a job takes a quarter of an hour.
        save_file(arrays, out)
        out.with_suffix(".json").write_text(json.dumps(seconds))
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
