"""The choice: which candidates meet the limits at the least loss, exactly, as a mixed-integer linear programme.

A binary variable x says whether a candidate is chosen. Candidates that share a node exclude each other, which is also
how nested ones do. FLOPs add up. A parameter that several layers read goes only if all of them do, and the depth is a
longest path: both have variables of their own. HiGHS solves it (`scipy.optimize.milp`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from elc_fx.errors import PlanError
from elc_fx.planning.budget import cost_text
from elc_fx.planning.cost import Choice, CostModel

Pair = tuple[int, int]  # two choices by their positions
SECONDS = 60.0  # for one solution; what is not proven best by then has a gap
HALF = 0.5
FINENESS = 1e4  # HiGHS is content within 1e-6 of the best, in absolute terms


@dataclass(frozen=True)
class Problem:
    """The choices, what each loses, and what may be spent.

    limits: absolute, by the names of `Costs`. together: what two choices lose beyond the sum of both, if both are made.
    """

    choices: Sequence[Choice]
    losses: Sequence[float]
    model: CostModel
    limits: Mapping[str, float]
    together: Mapping[Pair, float] | None = None


@dataclass(frozen=True)
class Solution:
    """chosen: positions of the choices. loss: predicted. gap: how far from the best that may be, relative."""

    chosen: tuple[int, ...]
    loss: float
    gap: float


def solve(problem: Problem) -> Solution:
    """The choice with the least loss that keeps all limits.

    Raises `PlanError` where there is none; the message says what is the least that can be reached.
    """
    limits = dict(problem.limits)
    while True:
        solution = _Programme(problem, limits).minimise_loss()
        if solution is None:
            raise PlanError(_why_infeasible(problem))
        after = problem.model.after([problem.choices[i] for i in solution.chosen])
        over = {name: getattr(after, name) - problem.limits[name] for name in limits if name != "latency"}
        if all(excess <= 0 for excess in over.values()):
            return solution
        # HiGHS allows for an error of 1e-6 of the largest saving.
        limits |= {name: limits[name] - 2 * excess for name, excess in over.items() if excess > 0}


def _why_infeasible(problem: Problem) -> str:
    original, texts = problem.model.original, []
    alone = True
    for name, limit in problem.limits.items():
        least = _Programme(problem, {}).least(name)
        reached, wanted, whole = (cost_text(name, value) for value in (least, limit, getattr(original, name)))
        alone &= least <= limit
        texts.append(f"{name}: at most {wanted} wanted, {reached} is the least (of {whole})")
    reason = "each limit can be kept alone, but not all together" if alone else "; ".join(texts)
    left = _untouchable(problem)
    more = f"; no candidate covers {', '.join(left)}" if left else ""
    return f"the budget cannot be met: {reason}{more}; allow longer or larger candidates, or raise the budget"


def _untouchable(problem: Problem, most: int = 6) -> list[str]:
    """Layers that no candidate covers."""
    covered = {name for choice in problem.choices for name in choice.candidate.nodes}
    labels = problem.model.labels
    left = [f"`{labels.get(n, n)}`" for n, count in problem.model.layers.items() if count and n not in covered]
    return [*left[:most], *([f"{len(left) - most} more"] if len(left) > most else [])]


class _Programme:
    """Variables and constraints. Rows are collected as (coefficients by variable, lower bound, upper bound)."""

    def __init__(self, problem: Problem, limits: Mapping[str, float]) -> None:
        self.problem = problem
        self.binary = len(problem.choices)
        self.count = self.binary
        self.upper: list[float] = [float(np.isfinite(loss)) for loss in problem.losses]  # never where inf
        self.rows: list[tuple[dict[int, float], float, float]] = []
        self.covering: dict[str, list[int]] = {}
        for i, choice in enumerate(problem.choices):
            for name in choice.candidate.nodes:
                self.covering.setdefault(name, []).append(i)
        self._variable(0.0)  # milp wants at least one
        self._exclude()
        for name, limit in limits.items():
            coefficients, constant = self._cost(name)
            self._at_most(coefficients, constant, limit)

    def minimise_loss(self) -> Solution | None:
        losses = np.array(self.problem.losses, dtype=float)
        finite = np.where(np.isfinite(losses), losses, 0.0)
        objective = dict(enumerate(finite))
        for (i, j), extra in (self.problem.together or {}).items():
            both = self._variable(1.0)
            objective[both] = extra
            self.rows.append(({both: 1.0, i: -1.0, j: -1.0}, -1.0, np.inf))
            self.rows.append(({both: 1.0, i: -1.0}, -np.inf, 0.0))
            self.rows.append(({both: 1.0, j: -1.0}, -np.inf, 0.0))
        result = self._solve(objective)
        if result is None:
            return None
        values, gap = result
        chosen = tuple(i for i in range(self.binary) if values[i] > HALF)
        return Solution(chosen, float(sum(objective[k] * values[k] for k in objective)), gap)

    def least(self, cost: str) -> float:
        """The least that a cost can be, whatever is lost."""
        coefficients, constant = self._cost(cost)
        result = self._solve(coefficients)
        assert result is not None  # to choose nothing is allowed
        return float(sum(c * result[0][k] for k, c in coefficients.items()) + constant)

    # Costs, each as (coefficients, constant).

    def _cost(self, name: str) -> tuple[dict[int, float], float]:
        costs = {"flops": self.flops, "params": self.params, "depth": self.depth, "latency": self.latency}
        return costs[name]()

    def flops(self) -> tuple[dict[int, float], float]:
        saved = {i: float(c.candidate.flops[1] - c.candidate.flops[0]) for i, c in enumerate(self.problem.choices)}
        return saved, float(self.problem.model.original.flops)

    def params(self) -> tuple[dict[int, float], float]:
        total: dict[int, float] = {i: float(c.candidate.parameters[1]) for i, c in enumerate(self.problem.choices)}
        constant = 0.0
        for count, readers in self.problem.model.groups:
            if len(readers) == 1:
                constant += count
                for i in self.covering.get(next(iter(readers)), ()):
                    total[i] -= count
                continue
            kept = self._variable(1.0)
            total[kept] = float(count)
            for reader in readers:  # kept >= 1 - (the reader is gone)
                self.rows.append(({kept: 1.0, **dict.fromkeys(self.covering.get(reader, ()), 1.0)}, 1.0, np.inf))
        return total, constant

    def latency(self) -> tuple[dict[int, float], float]:
        model = self.problem.model.latency
        assert model is not None
        return {i: -model.saved(choice) for i, choice in enumerate(self.problem.choices)}, model.whole

    def depth(self) -> tuple[dict[int, float], float]:
        """A potential for each node, at least that of what it reads plus its own layers."""
        model = self.problem.model
        potential = {name: self._variable(np.inf) for name in model.sources}
        deepest = self._variable(np.inf)
        for name, read in model.sources.items():
            own = model.layers[name]
            gone = dict.fromkeys(self.covering.get(name, ()), float(own)) if own else {}
            self.rows.append(({deepest: 1.0, potential[name]: -1.0}, 0.0, np.inf))
            if not read:
                self.rows.append(({potential[name]: 1.0, **gone}, float(own), np.inf))
            for source in read:
                self.rows.append(({potential[name]: 1.0, potential[source]: -1.0, **gone}, float(own), np.inf))
        for i, choice in enumerate(self.problem.choices):
            row = {potential[choice.output]: 1.0, potential[choice.source]: -1.0, i: -1.0}
            self.rows.append((row, 0.0, np.inf))
        return {deepest: 1.0}, 0.0

    # The programme itself.

    def _exclude(self) -> None:
        """At most one of the candidates that have a node in common."""
        together = {frozenset(indices) for indices in self.covering.values() if len(indices) > 1}
        self.rows.extend((dict.fromkeys(sorted(indices), 1.0), -np.inf, 1.0) for indices in together)

    def _variable(self, upper: float) -> int:
        self.upper.append(upper)
        self.count += 1
        return self.count - 1

    def _at_most(self, coefficients: dict[int, float], constant: float, limit: float) -> None:
        """A cost within its limit; scaled, since HiGHS allows for absolute errors of 1e-6."""
        scale = max([abs(c) for c in coefficients.values()], default=1.0) or 1.0
        self.rows.append(({k: c / scale for k, c in coefficients.items()}, -np.inf, (limit - constant) / scale))

    def _solve(self, objective: Mapping[int, float]) -> tuple[np.ndarray, float] | None:
        costs = np.zeros(self.count)
        costs[list(objective)] = list(objective.values())
        scale = np.abs(costs).max(initial=0.0) or 1.0
        integrality = np.zeros(self.count)
        integrality[: self.binary] = 1
        entries = [(i, k, c) for i, (row, _, _) in enumerate(self.rows) for k, c in row.items()]
        rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
        matrix = csr_matrix((values, (rows, columns)), shape=(len(self.rows), self.count))
        lower, upper = [row[1] for row in self.rows], [row[2] for row in self.rows]
        result = milp(
            FINENESS * costs / scale,
            integrality=integrality,
            bounds=Bounds(np.zeros(self.count), np.array(self.upper)),
            constraints=LinearConstraint(matrix, lower, upper) if self.rows else None,
            options={"mip_rel_gap": 0.0, "time_limit": SECONDS},
        )
        if result.x is None:
            return None
        return result.x, float(result.mip_gap or 0.0)
