"""Truth probes: what hidden states say about whether the model takes a text for true."""
