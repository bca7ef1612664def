"""Whatever turns prompt ids into completions, and the weights it needs."""
