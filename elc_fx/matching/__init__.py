"""What of a graph is an affine map, or could become one: operations, chains, branches; and the cheapest merges."""
