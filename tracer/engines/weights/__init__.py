"""Model weights: finding, fetching, checking and converting them. `tracer.engines.models` is the way in."""
