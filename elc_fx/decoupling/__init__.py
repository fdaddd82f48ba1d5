"""The ELC transformation: decoupling nodes, their gates, and the merge when the gates have closed."""
