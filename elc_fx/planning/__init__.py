"""Which serial layers become one: the candidates, and the plan that chooses among them."""
