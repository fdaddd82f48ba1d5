"""The choice: which candidates meet the limits at the least loss, exactly, as a mixed-integer linear programme.

A binary variable x says whether a candidate is chosen. Candidates that share a node exclude each other, which is also
how nested ones do. FLOPs add up. A parameter that several layers read goes only if all of them do, and the depth is a
longest path: both have variables of their own. HiGHS solves it (`scipy.optimize.milp`).

A path that enters a region leaves it by its output. So on every path the depth is a sum: of the layers that are left,
and of one for each output of a chosen candidate. On a chain that makes the relaxation as tight as can be.
"""

from __future__ import annotations

import math
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
FINENESS = 1e4  # of the largest coefficient: HiGHS is content within 1e-6 of the best, in absolute terms
SPREAD = 1e3  # of losses, beyond which those that cannot be afforded are left out, and the others looked at closely
ROUNDING = 1e-9  # of numbers that are the same
INFEASIBLE = 2  # `milp`'s status where that is proven


@dataclass(frozen=True)
class Problem:
    """The choices, what each loses, and what may be spent.

    limits: absolute, by the names of `Costs`. together: what two choices lose beyond the sum of both, if both are made.
    removed: how many layers may go, at most.
    """

    choices: Sequence[Choice]
    losses: Sequence[float]
    model: CostModel
    limits: Mapping[str, float]
    together: Mapping[Pair, float] | None = None
    removed: float = math.inf


@dataclass(frozen=True)
class Solution:
    """chosen: positions of the choices. loss: predicted. gap: how far from the best that may be, relative."""

    chosen: tuple[int, ...]
    loss: float
    gap: float


def solve(problem: Problem) -> Solution:
    """The choice with the least loss that keeps all limits.

    Raises `PlanError` where there is none; the message says what is the least that can be reached. Or where none was
    found in time, which the message tells from that.
    """
    # Rounded down where costs are whole numbers, which makes the relaxation much tighter.
    limits = {name: limit if name == "latency" else math.floor(limit) for name, limit in problem.limits.items()}
    while True:
        solution = _Programme(problem, limits).minimise_loss()
        if solution is None:
            raise PlanError(_why_infeasible(problem))
        solution = _closer(problem, limits, solution)
        after = problem.model.after([problem.choices[i] for i in solution.chosen])
        over = {name: getattr(after, name) - problem.limits[name] for name in limits if name != "latency"}
        if all(excess <= 0 for excess in over.values()):
            return solution
        # HiGHS allows for an error of 1e-6 of the largest saving.
        limits |= {name: limits[name] - 2 * excess for name, excess in over.items() if excess > 0}


def _closer(problem: Problem, limits: Mapping[str, float], solution: Solution) -> Solution:
    """The solution, or a better one that HiGHS did not tell from it, next to losses that are much larger.

    What alone loses more than the whole solution is in no better one, so it is left out.
    """
    gained = sum(max(-extra, 0.0) for extra in (problem.together or {}).values())
    largest = max((loss for loss in problem.losses if math.isfinite(loss)), default=0.0)
    while largest > SPREAD * (most := (solution.loss + gained) * (1 + ROUNDING)):
        largest = max((loss for loss in problem.losses if loss <= most), default=0.0)
        try:
            found = _Programme(problem, limits, most).minimise_loss()
        except PlanError:  # out of time
            break
        if found is None or found.loss > solution.loss:
            break
        solution = found
    return solution


def _why_infeasible(problem: Problem) -> str:
    original, texts, short = problem.model.original, [], []
    for name, limit in problem.limits.items():
        bound, found = _Programme(problem, {}).least(name)
        short += [name] if found > limit else []
        values = dict.fromkeys(cost_text(name, value) for value in (bound, found))  # one where they agree
        wanted, least, whole = cost_text(name, limit), " to ".join(values), cost_text(name, getattr(original, name))
        texts.append(f"{name}: at most {wanted} wanted, {least} is the least (of {whole})")
    reason = "; ".join(texts) if short else "each limit can be kept alone, but not all together"
    covers = "merges" if "depth" in short else "covers"  # a kernel that shrinks leaves the depth as it is
    left = _untouchable(problem, merging=covers == "merges")
    more = f"; no candidate {covers} {', '.join(left)}" if left else ""
    if never := sum(not math.isfinite(loss) for loss in problem.losses):
        more += f"; {never} of {len(problem.losses)} candidates are never chosen: their loss is infinite, or missing"
    return f"the budget cannot be met: {reason}{more}; allow more, longer or larger candidates, or raise the budget"


def _untouchable(problem: Problem, *, merging: bool, most: int = 6) -> list[str]:
    """Layers that no candidate covers. merging: none that covers others too."""
    labels = problem.model.labels
    layers = [name for name, read in problem.model.reads.items() if any(read.values())]
    touched = [set(layers).intersection(choice.candidate.nodes) for choice in problem.choices]
    covered = {name for names in touched if len(names) > merging for name in names}
    left = [f"`{labels.get(name, name)}`" for name in layers if name not in covered]
    return [*left[:most], *([f"{len(left) - most} more"] if len(left) > most else [])]


@dataclass(frozen=True)
class _Result:
    """Of HiGHS. values: of the variables. gap: how far the objective may be from the best, relative."""

    values: np.ndarray
    gap: float


class _Programme:
    """Variables and constraints. Rows are collected as (coefficients by variable, lower bound, upper bound)."""

    def __init__(self, problem: Problem, limits: Mapping[str, float], most: float = math.inf) -> None:
        """most: that one choice may lose."""
        self.problem = problem
        self.binary = len(problem.choices)
        self.count = self.binary
        self.upper: list[float] = [float(loss <= most and math.isfinite(loss)) for loss in problem.losses]
        self.rows: list[tuple[dict[int, float], float, float]] = []
        self.covering: dict[str, list[int]] = {}
        for i, choice in enumerate(problem.choices):
            for name in choice.candidate.nodes:
                self.covering.setdefault(name, []).append(i)
        self._variable(0.0)  # milp wants at least one
        self._exclude()
        for name, limit in limits.items():
            coefficients, constant = self._cost(name)
            self._at_most(coefficients, constant, self._allowed(limit) if name == "latency" else limit)
        if math.isfinite(problem.removed):
            self._at_most({i: float(c.candidate.removed) for i, c in enumerate(problem.choices)}, 0.0, problem.removed)

    def minimise_loss(self) -> Solution | None:
        """None where nothing keeps the limits. Raises `PlanError` where nothing was found in time."""
        objective = {i: loss for i, loss in enumerate(self.problem.losses) if self.upper[i]}
        for (i, j), extra in (self.problem.together or {}).items():
            both = self._variable(1.0)
            objective[both] = extra
            self.rows.append(({both: 1.0, i: -1.0, j: -1.0}, -1.0, np.inf))
            self.rows.append(({both: 1.0, i: -1.0}, -np.inf, 0.0))
            self.rows.append(({both: 1.0, j: -1.0}, -np.inf, 0.0))
        result = self._solve(objective)
        if result is None:
            return None
        chosen = self._chosen(result)
        loss = sum(c for k, c in objective.items() if result.values[k] > HALF)
        return Solution(chosen, float(loss), result.gap)

    def least(self, cost: str) -> tuple[float, float]:
        """What a cost cannot be below, and the least that was found, whatever is lost: the same, given time."""
        coefficients, constant = self._cost(cost)
        result = self._solve(coefficients)
        assert result is not None  # to choose nothing is allowed
        found = getattr(self.problem.model.after([self.problem.choices[i] for i in self._chosen(result)]), cost)
        return found - result.gap * abs(found - constant), found

    def _chosen(self, result: _Result) -> tuple[int, ...]:
        return tuple(i for i in range(self.binary) if result.values[i] > HALF)

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

    def _allowed(self, latency: float) -> float:
        """What the layers may add up to."""
        model = self.problem.model.latency
        assert model is not None
        return model.allowed(latency)

    def latency(self) -> tuple[dict[int, float], float]:
        """Of the layers, added up."""
        model = self.problem.model.latency
        assert model is not None
        return {i: -model.saved(choice) for i, choice in enumerate(self.problem.choices)}, model.whole

    def depth(self) -> tuple[dict[int, float], float]:
        """A potential for each node, at least that of what it reads plus the layers that are left between them."""
        model = self.problem.model
        potential = {name: self._variable(np.inf) for name in model.reads}
        deepest = self._variable(np.inf)
        ending: dict[str, list[int]] = {}
        for i, choice in enumerate(self.problem.choices):
            ending.setdefault(choice.output, []).append(i)
        for name, read in model.reads.items():
            self.rows.append(({deepest: 1.0, potential[name]: -1.0}, 0.0, np.inf))
            for source, count in read.items():
                row = {potential[name]: 1.0, potential[source]: -1.0}
                row |= dict.fromkeys(self.covering.get(name, ()), float(count))
                for i in ending.get(name, ()):
                    row[i] -= 1.0
                self.rows.append((row, float(count), np.inf))
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
        scale = max([abs(c) for c in coefficients.values()], default=0.0) or abs(limit - constant) or 1.0
        self.rows.append(({k: c / scale for k, c in coefficients.items()}, -np.inf, (limit - constant) / scale))

    def _solve(self, objective: Mapping[int, float]) -> _Result | None:
        """None where nothing keeps the limits. Raises `PlanError` where nothing was found in time."""
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
            FINENESS * (costs / scale),
            integrality=integrality,
            bounds=Bounds(np.zeros(self.count), np.array(self.upper)),
            constraints=LinearConstraint(matrix, lower, upper) if self.rows else None,
            options={"mip_rel_gap": 0.0, "time_limit": SECONDS},
        )
        if result.x is not None:
            gap = float(result.mip_gap or 0.0)
            return _Result(result.x, gap if gap > ROUNDING else 0.0)
        if result.status == INFEASIBLE:
            return None
        raise PlanError(
            f"the solver found no choice that keeps the budget within {SECONDS:.0f} s; there may be one all the same: "
            f"allow fewer candidates (`longest`, `largest_kernel`), or raise the budget ({result.message})"
        )
