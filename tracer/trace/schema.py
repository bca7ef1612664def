"""The published JSON Schema of a trace file: ``schema-1.json`` beside this module.

Run ``python -m tracer.trace.schema`` after a change of the model; a test compares the two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tracer.trace.explanation import Explanation
from tracer.trace.faithfulness import MethodFaithfulness
from tracer.trace.layer_map import LayerMap
from tracer.trace.probes import ProbeScore
from tracer.trace.trace import SCHEMA_VERSION, Trace

SCHEMA_FILE = Path(__file__).with_name(f"schema-{SCHEMA_VERSION.split('.')[0]}.json")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a trace file."""
    schema = Trace.model_json_schema()
    # Beside the trace's own definitions and not required by it: other programs may attach documents of their own.
    for attached in (Explanation, MethodFaithfulness, ProbeScore, LayerMap):
        own = attached.model_json_schema(ref_template="#/$defs/{model}")
        schema["$defs"] |= own.pop("$defs", {}) | {attached.__name__: own}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"tracer-trace-{SCHEMA_VERSION}",
        **schema,
    }


def write() -> Path:
    """Write the schema to its file."""
    SCHEMA_FILE.write_text(json.dumps(json_schema(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return SCHEMA_FILE


if __name__ == "__main__":
    write()
