"""The planner: under a budget, the candidates that lose least."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn

from elc_fx.arguments import check_whole
from elc_fx.capturing.attributes import unchanged
from elc_fx.capturing.randomness import seeded
from elc_fx.errors import InvalidInputError, PlanError, listed, warn
from elc_fx.planning.agreement import of_the_first
from elc_fx.planning.budget import Budget, cost_text, real_number
from elc_fx.planning.candidates import Candidate, serial_graph
from elc_fx.planning.cost import Choice, CostModel, LatencyModel, choices_of
from elc_fx.planning.latency import Backend, LatencyMeter, check_backend
from elc_fx.planning.plan import Plan, Prediction, named_inputs
from elc_fx.planning.rehearsal import Rehearsal
from elc_fx.planning.sensitivity import Calibration, Loss, Sensitivity
from elc_fx.planning.solve import Pair, Problem, Solution, solve
from elc_fx.planning.stored import StoredTable
from elc_fx.workarounds import without_autocast

LONGEST_PLANNED = 6  # layers or blocks in a row that a planned candidate may replace: measuring all runs takes long
LARGEST_PLANNED = 5  # kernel
REFINEMENTS = 8
EMPHASES = (0.7, 1.5, 2.0, 3.0)  # powers of the losses
ACCURACY = 0.05  # of a predicted latency, relative, with which a plan is not made again
CORRECTIONS = 4  # of the latencies, at most, for one plan
ALIKE = 0.05  # relative: losses after a short training that chance can make
BROKEN = 10.0  # times as much is lost after a training that tells nothing: it is too rough for such a network,
NEGLIGIBLE = 1e-3  # but not so small a loss, as of an exact merge
SHUN = 4.0  # by what the loss of a choice is multiplied to see how it is without

LossChoice = Literal["auto", "uniform"] | Mapping[str, float] | Loss


class Planner:
    """The tables of one model, from which plans for any budget follow. Arguments and errors: see `plan`."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        calibration: Iterable[Any] | None = None,
        *,
        loss: LossChoice = "auto",
        allow: Callable[[Candidate], bool] | None = None,
        longest: int = LONGEST_PLANNED,
        largest_kernel: int = LARGEST_PLANNED,
        samples: int | None = None,
        refinements: int = REFINEMENTS,
        rehearse: bool = True,
        backend: Backend = "eager",
        cache: str | Path | None = None,
        progress: bool = True,
        budget: Budget | None = None,
    ) -> None:
        """budget: one that plans will be made for; an error at once, if no plan can meet it."""
        check_whole(1, longest=longest, largest_kernel=largest_kernel, samples=1 if samples is None else samples)
        check_whole(0, refinements=refinements)
        if not isinstance(rehearse, bool):
            raise InvalidInputError(f"rehearse is {rehearse!r}, expected True or False")
        if cache is not None and not isinstance(cache, str | Path):
            raise InvalidInputError(f"cache is {cache!r}, expected a folder")
        check_backend(backend)
        if not (allow is None or callable(allow)):
            raise InvalidInputError(f"allow is {allow!r}, expected a function of a candidate")
        if not (callable(loss) or isinstance(loss, Mapping) or (isinstance(loss, str) and loss in ("auto", "uniform"))):
            raise InvalidInputError(f"loss is {loss!r}, expected 'auto', 'uniform', a mapping or a function")
        self.graph = serial_graph(model, example_inputs)
        self.meter = LatencyMeter(self.graph, backend, cache, progress=progress)
        self.inputs = named_inputs(model, example_inputs)
        with self._leaving_no_trace():
            self.model = CostModel.of(model, example_inputs, self.graph)
        found = choices_of(self.graph, longest=longest, largest_kernel=largest_kernel)
        saving = [choice for choice in found if choice.candidate.saves and _pools_last(choice)]
        self.choices = [choice for choice in saving if allow is None or allow(choice.candidate)]
        self.pools_between = len(saving) < sum(choice.candidate.saves for choice in found)
        if budget is not None:
            _check_budget(budget)
            self._check_reachable(budget)
        self.sensitivity: Sensitivity | None = None
        self.known = StoredTable()  # what was measured before
        self.calibration, self.samples = calibration, samples
        self.refinements, self.rehearse, self.progress = refinements, rehearse, progress
        self.measured: dict[tuple[int, ...], float] = {}  # what sets of choices lose together
        self.rehearsed: dict[tuple[int, ...], float] = {}  # and after a short training
        self.latency: LatencyModel | None = None  # once a budget has limited it
        if loss == "uniform":
            self.losses = [float(len(choice.region.layers)) for choice in self.choices]
        elif isinstance(loss, Mapping):
            self.losses = _from_table(loss, saving, self.choices)
        elif calibration is None:
            raise InvalidInputError("calibration is None: pass batches to measure losses on, or loss='uniform'")
        else:
            measured, _ = self.calibrations
            with self._leaving_no_trace():
                function: Loss | None = loss if callable(loss) else None
                self.sensitivity = Sensitivity(self.graph, measured, function, progress=progress)
                # Nobody can tell whether a function computes what it computed when the table was made.
                if cache is not None and function is None:
                    self.known = StoredTable(Path(cache), f"losses-{_key(measured)}")
                self.losses = self.sensitivity.each_alone(self.choices, self.known)

    @functools.cached_property
    def calibrations(self) -> tuple[Calibration, Calibration]:
        """What losses are measured on, and what `collapse` fits to."""
        if self.calibration is None:
            raise InvalidInputError("calibration is None: pass the planner batches to fit convolutions to")
        with self._leaving_no_trace():
            both = Calibration.read(self.graph, self.calibration, self.samples)
        self.calibration = None  # a loader may hold processes
        return both

    @contextmanager
    def _leaving_no_trace(self) -> Iterator[None]:
        """What modules draw is the same each time; what they keep, and the generators, are then as they were."""
        # What the caller's autocast gives would be fitted in its type. Others need not wait as long as for `alone`.
        with unchanged(self.graph.graph_module), seeded(), without_autocast(self.graph.graph_module):
            yield

    def plan(self, budget: Budget) -> Plan:
        """The plan that loses least. Where losses add up wrongly, choices are measured together, and chosen again."""
        _check_budget(budget)
        if "latency" in budget.names and self.latency is None:
            with self._leaving_no_trace():
                self.latency = self.meter.model(self.choices)
        self.model = self.model.with_latency(self.latency if "latency" in budget.names else None)
        with self._poolings_told(budget):
            best = self._in_time(budget, lambda first, _: first, lambda solution: solution.loss)
        rehearsed = None
        if self.sensitivity is not None:
            with self.sensitivity.keeping():
                best = self._in_time(budget, self._refined, self._lost, best)
                finalists = [best, *(self._leaving_more(budget, best) if self._rehearses(best) else [])]
            if len(finalists) > 1:
                best, rehearsed = self._rehearsed_best(finalists)
        return self._plan_of(best, rehearsed)

    def _check_reachable(self, budget: Budget) -> None:
        """Raises `PlanError` where no choices at all keep the limits, but for that of the latency."""
        if budget.names != ("latency",):
            limits = replace(budget, latency=None).limits(self.model.original)
            with self._poolings_told(budget):
                _solved(Problem(self.choices, [0.0] * len(self.choices), self.model, limits))

    @contextmanager
    def _poolings_told(self, budget: Budget) -> Iterator[None]:
        try:
            yield
        except PlanError as error:
            if not (self.pools_between and "depth" in budget.names):
                raise
            between = "merges of layers with a max pooling between them are not planned; elc_fx.Plan.of takes them"
            raise PlanError(f"{error}; {between}") from None

    def _rehearses(self, best: Solution) -> bool:
        with self._leaving_no_trace():
            return self.rehearse and self._removed(best) > 0 and of_the_first(lambda: self._rehearsal().tells)

    def _leaving_more(self, budget: Budget, best: Solution) -> Iterator[Solution]:
        """Found as the best was: what leaves half of the layers that need not go, and what leaves all of them."""
        limits = budget.limits(self.model.original)
        allowed = zip(self.losses, self.choices, strict=True)
        layers = [float(choice.candidate.removed) if math.isfinite(loss) else math.inf for loss, choice in allowed]
        least = round(_solved(Problem(self.choices, layers, self.model, limits)).loss)
        most, seen = self._removed(best), {best.chosen}
        for removed in sorted({(most + least) // 2, least} - {most}, reverse=True):
            try:
                found = self._in_time(budget, self._refined, self._lost, removed=removed)
            except PlanError:  # its network, measured, takes longer than it may
                continue
            if found.chosen not in seen:
                seen.add(found.chosen)
                yield found

    def _rehearsed_best(self, finalists: Sequence[Solution]) -> tuple[Solution, float | None]:
        """The first of those that lose least after a short training, and how much that is.

        finalists: those with fewer layers first. Where the training tells nothing, it is the one that loses least
        without.
        """
        try:
            losses = [self.loss_after_training(finalist.chosen) for finalist in finalists]
        except Exception as error:  # whatever the model's own layers raise
            reason = f"{type(error).__name__}: {error}"
        else:
            before, after = max(map(self._lost, finalists)), max(losses)
            if after <= BROKEN * max(before, NEGLIGIBLE) < math.inf:
                good = (1 + ALIKE) * min(losses)
                return next((f, loss) for f, loss in zip(finalists, losses, strict=True) if loss <= good)
            reason = f"it makes the losses of {len(finalists)} plans, at most {before:.3g}, as large as {after:.3g}"
        warn(
            "plans with more and fewer layers were not compared after a short training, which the network does not "
            f"bear: {reason}; rehearse=False of elc_fx.plan leaves it out"
        )
        return min(finalists, key=self._lost), None

    def _in_time(
        self,
        budget: Budget,
        improved: Callable[[Solution, Problem], Solution],
        loss: Callable[[Solution], float],
        first: Solution | None = None,
        removed: float = math.inf,
    ) -> Solution:
        """The best by the sum, improved; made again with what its network takes, where that was not predicted.

        Of many choices whose layers are timed with errors, those are found that were timed too fast. Where no
        prediction was right, it is the one that loses least of those that were measured to keep the limit. Raises
        `PlanError` where none did, up to the accuracy of a measurement. first: the best by the sum, where it is known.
        removed: how many layers may go, at most.
        """
        limits = budget.limits(self.model.original)
        found: dict[tuple[int, ...], Solution] = {}
        solved = first
        while True:
            problem = Problem(self.choices, self.losses, self.model, limits, removed=removed)
            solution = improved(solved or _solved(problem), problem)
            solved = None
            if (latency := self.model.latency) is None:
                return solution
            before, after = self._timed(solution)
            choices, taken = self._choices(solution.chosen), latency.whole * after / before
            predicted = latency.after(choices)
            right = predicted <= limits["latency"] and abs(predicted - taken) <= ACCURACY * taken
            known = latency.knowing(choices, predicted if right else taken)  # what is right remains allowed
            self.model = self.model.with_latency(known)
            if right:
                return solution
            repeated = solution.chosen in found
            found[solution.chosen] = solution
            if repeated or len(found) > CORRECTIONS:
                measured = [*found.values(), *([] if first is None else [first])]
                times = [known.after(self._choices(each.chosen)) for each in measured]
                return min(_within(limits["latency"], measured, times), key=loss)

    def _refined(self, first: Solution, problem: Problem) -> Solution:
        """The solution that loses least when its choices are measured together, of `first` and others near it.

        The others: the best after what the sum left out is put down to the choices that follow each other; the best
        where large losses count more, or less, than they are, since many small changes, fitted one after the other,
        can make up for each other; and the best that shun one of the choices of the best so far.
        """
        together: dict[Pair, float] = {}
        best, seen = first, {first.chosen}
        solution, loss = first, self._lost(first)
        for _ in range(self.refinements):
            if len(solution.chosen) < 2:
                break
            _correct(together, solution, self._in_order(solution.chosen), loss)
            solution = _solved(replace(problem, together=together))
            if solution.chosen in seen:
                break
            seen.add(solution.chosen)
            loss = self._lost(solution)
            best = min(best, solution, key=self._lost)
        weighted = self.losses
        largest = max((loss for loss in self.losses if math.isfinite(loss)), default=0.0) or 1.0
        for emphasis in EMPHASES if self.refinements else ():
            raised = [(loss / largest) ** emphasis for loss in self.losses]
            solution = _solved(replace(problem, losses=raised))
            if self._lost(solution) < self._lost(best):
                best, weighted = solution, raised
        tried: set[int] = set()
        for _ in range(self.refinements):
            left = [i for i in best.chosen if i not in tried]
            if not left:
                break
            shunned = max(left, key=lambda i: self.losses[i])
            tried.add(shunned)
            others = [loss * SHUN if i == shunned else loss for i, loss in enumerate(weighted)]
            solution = _solved(replace(problem, losses=others))
            if self._lost(solution) < self._lost(best):
                best, weighted = solution, others
        return best

    @torch.inference_mode(False)
    def collapse(self, plan: Plan) -> fx.GraphModule:
        """The network with the plan's regions as the convolutions that were fitted to them, without any training.

        They are fitted in the order of the graph, each to what the network computes that is collapsed up to there.
        For a plan that is there already no losses need be measured: `Planner(model, x, batches, loss="uniform")`.
        Raises `PlanError` for a plan that was made for another model, and `InvalidInputError` without calibration.
        """
        if not isinstance(plan, Plan):
            raise InvalidInputError(f"plan is a {type(plan).__name__}, expected an elc_fx.Plan")
        choices = [Choice(candidate, region) for candidate, region, _ in plan.locate(self.graph)]
        self.graph.captured.warn_of_eval_only()
        self._warn_of_shared_layers(choices)
        _, fitted_to = self.calibrations
        fits = Sensitivity(self.graph, fitted_to, None, progress=self.progress)
        with self._leaving_no_trace():
            return fits.collapsed(choices)

    def _warn_of_shared_layers(self, choices: Sequence[Choice]) -> None:
        calls = Counter(node.target for node in self.graph.graph_module.graph.find_nodes(op="call_module"))
        for choice in choices:
            shared = [f"`{node.target}`" for node in choice.region.layers if calls[node.target] > 1]
            if shared:
                warn(
                    f"{listed(shared)} {'are' if len(shared) > 1 else 'is'} called more than once; the convolution in "
                    f"the place of `{choice.candidate.name}` has weights of its own, which train apart from the others"
                )

    def loss_together(self, positions: Iterable[int]) -> float:
        """The loss when several of `choices` are collapsed, measured as a whole. positions: of them in `choices`.

        Raises `InvalidInputError` for a planner that was given its losses.
        """
        return self._measured("together", self._sensitivity().together, self.measured, positions)

    def loss_after_training(self, positions: Iterable[int]) -> float:
        """The same after a short training of the network, on some of the samples that losses are measured on.

        Infinite where it is not finite. Raises whatever the model's own layers do where they cannot be trained, and
        `InvalidInputError` for batches too small to train on, or for a planner that was given its losses.
        """
        return self._measured("trained", self._rehearsal().loss, self.rehearsed, positions)

    def _rehearsal(self) -> Rehearsal:
        return Rehearsal(self.graph, self._sensitivity())

    def _sensitivity(self) -> Sensitivity:
        if self.sensitivity is None:
            raise InvalidInputError("this planner was given its losses: loss='auto' or a function measures them")
        return self.sensitivity

    def _measured(
        self,
        how: str,
        measure: Callable[[Sequence[Choice]], float],
        known: dict[tuple[int, ...], float],
        positions: Iterable[int],
    ) -> float:
        chosen = tuple(sorted(positions))
        if chosen not in known:
            choices = self._choices(chosen)
            name = ", ".join([how, *sorted(choice.key for choice in choices)])
            with self._leaving_no_trace():
                known[chosen] = of_the_first(lambda: self.known[name] if name in self.known else measure(choices))
            if name not in self.known:
                self.known[name] = known[chosen]
        return known[chosen]

    def _lost(self, solution: Solution) -> float:
        return self.loss_together(solution.chosen)

    def _removed(self, solution: Solution) -> int:
        return sum(choice.candidate.removed for choice in self._choices(solution.chosen))

    def _in_order(self, chosen: Sequence[int]) -> list[int]:
        """As their outputs stand in the graph."""
        order = {name: position for position, name in enumerate(self.model.reads)}
        return sorted(chosen, key=lambda i: order[self.choices[i].output])

    def _choices(self, positions: Iterable[int]) -> list[Choice]:
        return [self.choices[i] for i in positions]

    def _timed(self, solution: Solution) -> tuple[float, float]:
        """Seconds of the original and of what the solution leaves behind."""
        with self._leaving_no_trace():
            return self.meter.whole(self._choices(solution.chosen))

    def _plan_of(self, solution: Solution, rehearsed: float | None) -> Plan:
        order = self._in_order(solution.chosen)
        chosen = self._choices(order)
        together = None if self.sensitivity is None else self.measured[solution.chosen]
        losses = tuple(self.losses[i] for i in order)
        measured = None if self.model.latency is None else self._timed(solution)
        after = self.model.after(chosen)
        prediction = Prediction(self.model.original, after, losses, together, solution.gap, measured, rehearsed)
        return Plan(tuple(choice.candidate for choice in chosen), self.inputs, prediction)


def _pools_last(choice: Choice) -> bool:
    """Whether no max pooling stands before other layers.

    A layer behind one is cheap by itself; what merges with it has the kernel and stride of the layers before, too, and
    many weights.
    """
    return len(choice.candidate.poolings) <= choice.region.ends_with_pooling


def _solved(problem: Problem) -> Solution:
    return of_the_first(lambda: solve(problem))


def _within(limit: float, measured: Sequence[Solution], times: Sequence[float]) -> list[Solution]:
    """Those that keep the limit, or else the fastest, if it is above by no more than measurements are inaccurate."""
    fastest = min(times)
    if fastest > (1 + ACCURACY) * limit:
        wanted, least = cost_text("latency", limit), cost_text("latency", fastest)
        raise PlanError(
            f"the budget cannot be met: latency: at most {wanted} wanted, and of {len(measured)} plans whose networks "
            f"were measured the fastest takes {least}; raise the budget, or plan while nothing else runs"
        )
    return [solution for solution, time in zip(measured, times, strict=True) if time <= max(limit, fastest)]


def _correct(together: dict[Pair, float], solution: Solution, order: Sequence[int], measured: float) -> None:
    """What the sum left out is put down to the choices that follow each other."""
    pairs: list[Pair] = [(min(a, b), max(a, b)) for a, b in itertools.pairwise(order)]
    if not math.isfinite(measured):
        measured = 10 * solution.loss + 1
    extra = (measured - solution.loss) / len(pairs)
    for pair in pairs if math.isfinite(extra) else ():
        together[pair] = together.get(pair, 0.0) + extra


def _from_table(table: Mapping[str, float], known: Sequence[Choice], choices: Sequence[Choice]) -> list[float]:
    """Losses of choices. known: what a table may name."""
    names = {choice.candidate.full_name for choice in known}
    for name, loss in table.items():
        if name not in names:
            raise PlanError(f"the table of losses names `{name}`, which is no candidate that saves FLOPs")
        if not real_number(loss) >= 0:
            raise InvalidInputError(f"the loss of `{name}` is {loss!r}, expected a number from 0 on")
    return [float(table.get(choice.candidate.full_name, math.inf)) for choice in choices]


def _key(calibration: Calibration) -> str:
    versions = f"{importlib.metadata.version('elc_fx')} {torch.__version__}"  # another may fit otherwise
    return hashlib.sha256(f"{versions} {calibration.fingerprint()}".encode()).hexdigest()[:20]


def plan(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget,
    calibration: Iterable[Any] | None = None,
    **options: Any,
) -> Plan:
    """Which regions of a model to collapse, so that it keeps a budget and loses least.

    Every candidate is collapsed alone, after the best cheap fit of its convolution on the calibration batches, and the
    change of the network's output is its loss. The choice is the exact optimum for the sum of the losses; then it is
    measured as a whole and corrected where the sum was wrong, and compared with plans that leave more layers after a
    short training of each.

    Args:
        model, example_inputs: as for `candidates`; costs are those of these shapes.
        budget: what the merged network may cost.
        calibration: batches, as for `decouple`. Take them from the training set.
        loss: "auto", see docs/planning.md; "uniform": one for each layer that is replaced; a mapping from names of
            candidates ("layer1.0:3x3") to losses, where what is missing is never chosen; or a function (output, output
            of the original) → number.
        allow: which candidates may be chosen, all by default. `lambda candidate: not candidate.merges` keeps all
            layers and max poolings and shrinks kernels, `lambda candidate: candidate.merges` shrinks the kernel of no
            layer by itself, `lambda candidate: not candidate.poolings` keeps the max poolings.
        longest, largest_kernel: which candidates there are, as for `candidates`.
        samples: how many samples of `calibration` losses are measured on; by default 1,024, or fewer of large inputs,
            which have many windows: as many as hold 2²⁶ numbers (445 images of 3×224×224), since much of the network's
            inside is kept. `Planner.collapse` fits to these and to what follows, four times as many, if those hold so
            many numbers at most, and the largest value inside of the network 2²⁸.
        refinements: how often, at most, a choice is corrected, and then looked for without one of its candidates.
        rehearse: compare the choice with others that leave more layers after a short training of each on some of the
            samples, without labels; see docs/planning.md. The model itself is not trained.
        backend: how the merged network will run, for budgets with a latency: "eager", "compile" (`torch.compile`),
            "onnxruntime" or "openvino".
        cache: a folder in which losses and latencies, of candidates and of plans, are kept as soon as they are known,
            and found by the next call; not the losses of a function.
        progress: show a bar on a terminal.

    Raises:
        PlanError: the budget cannot be met; the message says what can.
        LatencyError: the backend does not run one of the layers.
        MissingPackageError: the backend is not installed.
        TrainingModeError, InvalidInputError, CaptureError: as `candidates`.
    """
    _check_budget(budget)
    return Planner(model, example_inputs, calibration, budget=budget, **options).plan(budget)


def pareto(
    model: nn.Module,
    example_inputs: Any,
    budgets: Iterable[Budget],
    calibration: Iterable[Any] | None = None,
    **options: Any,
) -> list[Plan]:
    """The plan for each budget, from tables that are measured once. Arguments and errors: see `plan`."""
    if not isinstance(budgets, Iterable):
        raise InvalidInputError(f"budgets is a {type(budgets).__name__}, expected several of elc_fx.Budget")
    budgets = list(budgets)
    for budget in budgets:
        _check_budget(budget)  # before anything is measured
    planner = Planner(model, example_inputs, calibration, **options)
    return [planner.plan(budget) for budget in budgets]


def _check_budget(budget: Any) -> None:
    if not isinstance(budget, Budget):
        raise InvalidInputError(f"budget is a {type(budget).__name__}, expected an elc_fx.Budget")
