"""A caller's model, as a graph: it is read, run and copied, and left as it was."""
