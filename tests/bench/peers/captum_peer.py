"""Runs captum's ablation methods in their own environment; knows nothing of tracer.

``python captum_peer.py JOB.json OUT.safetensors``, with JOB ``{model, threads, tasks: [{name, kind, ids, parts,
start}]}``. A task explains the tokens from ``start`` on by parts ``[start, end)`` of what is before them, which are
deleted. Prints one JSON line of seconds by task.
"""

import json
import sys
import time

import torch
from captum.attr import FeatureAblation, ShapleyValues
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

METHODS = {"leave_one_out": FeatureAblation, "shapley": ShapleyValues}


def forward_of(model, task):
    """Log-probability of the span as a function of which parts are there, ``(batch, parts) -> (batch,)``."""
    ids = torch.tensor(task["ids"])
    written = len(ids) - task["start"]
    known = {}

    def value(mask):
        keep = torch.ones(len(ids), dtype=torch.bool)
        for (start, end), kept in zip(task["parts"], mask, strict=True):
            keep[start:end] = bool(kept)
        logits = model(ids[keep][None], use_cache=False).logits[0, -written - 1 : -1].double()
        return logits.log_softmax(-1).gather(-1, ids[-written:, None]).sum()

    def forward(masks):
        rows = [tuple(row.tolist()) for row in masks]
        for row in rows:
            # Orders of parts ask for the same few masks again and again.
            if row not in known:
                known[row] = value(row)
        return torch.stack([known[row] for row in rows])

    return forward


def main():
    """Do the job."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    arrays, seconds = {}, {}
    with torch.no_grad():
        for task in job["tasks"]:
            began = time.perf_counter()
            present = torch.ones(1, len(task["parts"]), dtype=torch.float64)
            found = METHODS[task["kind"]](forward_of(model, task)).attribute(present, baselines=0)
            seconds[task["name"]] = time.perf_counter() - began
            arrays[task["name"]] = found[0].contiguous()
    save_file(arrays, sys.argv[2])
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
