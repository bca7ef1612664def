"""Chain-of-thought, self-consistency, tree-of-thoughts and ReAct agents."""
