"""All stages in a row: plan, collapse or decouple, fine-tune, merge, verify, report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from elc_fx.capturing.copying import clone
from elc_fx.capturing.inputs import ExampleInputs
from elc_fx.capturing.randomness import randomness_of_the_caller, seed_all
from elc_fx.compiled import REPORT, report_of
from elc_fx.decoupling.decoupled import DecoupledModule
from elc_fx.decoupling.gates import set_gate
from elc_fx.decoupling.merging import merge
from elc_fx.decoupling.rewrite import decouple
from elc_fx.errors import InvalidInputError
from elc_fx.merging.lossless import LosslessCompilation
from elc_fx.planning.budget import Budget
from elc_fx.planning.latency import Backend
from elc_fx.planning.plan import Plan
from elc_fx.planning.planner import Planner
from elc_fx.training.finetuning import FinetuneConfig, Finetuning, check_folder, check_trainable


def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    budget: Budget | None,
    plan: Plan | None,
    calibration: Iterable[Any] | None,
    finetune: FinetuneConfig | None,
    verify: bool,
    backend: Backend,
) -> nn.Module:
    """See `elc_fx.compile` with mode "decouple". backend: by which latencies are measured."""
    if plan is not None and budget is not None:
        raise InvalidInputError("there is a plan and a budget; give one of the two")
    if plan is None and not isinstance(budget, Budget):
        raise InvalidInputError(f"budget is a {type(budget).__name__}, expected an elc_fx.Budget")
    if finetune is not None and not isinstance(finetune, FinetuneConfig):
        raise InvalidInputError(f"finetune is a {type(finetune).__name__}, expected an elc_fx.FinetuneConfig")
    if example_inputs is None:
        raise InvalidInputError("example_inputs are missing: the costs that a budget limits are those of their shapes")
    if calibration is None and finetune is None:
        raise InvalidInputError("calibration is missing: give batches of the training set")
    if finetune is not None and finetune.gates:  # what cannot be trained is told before anything is planned
        check_trainable(model)
    if finetune is not None and finetune.folder is not None:
        check_folder(Path(finetune.folder))
    loaders = calibration, finetune and finetune.train_data
    with randomness_of_the_caller(*loaders):
        if finetune is not None and not model.training:
            Finetuning(clone(model, {}), replace(finetune, folder=None, features=0.0)).check()
        seed_all(0, *loaders)  # one that shuffles gives the same batches when a killed run begins again
        plan, network = _planned(model, example_inputs, budget, plan, calibration, finetune, backend)
        if finetune is not None and not plan.candidates:  # then there is nothing whose features could be compared
            finetune = replace(finetune, features=0.0)
        history = None if finetune is None else Finetuning(network, finetune, model).run()
        if isinstance(network, DecoupledModule):
            set_gate(network, 0)
            network = merge(network, verify=verify)
        examples = ExampleInputs.of(network, example_inputs)
        small = LosslessCompilation(examples, verify=verify).run(network, original=model)
    setattr(small, REPORT, replace(report_of(small), plan=plan, epochs=() if history is None else history.epochs))
    return small


def _planned(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | None,
    plan: Plan | None,
    calibration: Iterable[Any] | None,
    finetune: FinetuneConfig | None,
    backend: Backend,
) -> tuple[Plan, nn.Module]:
    """The plan and what is trained. What the planner measured with is free again while it is trained."""
    batches = calibration if calibration is not None else _Inputs(() if finetune is None else finetune.train_data)
    folder = None if finetune is None or finetune.folder is None else Path(finetune.folder)
    if plan is not None:
        planner = Planner(model, example_inputs, batches, loss="uniform")
    else:
        assert budget is not None
        trained = finetune is not None  # else what counts is what is lost before any training
        options: dict[str, Any] = {"cache": folder, "backend": backend, "rehearse": trained}
        planner = Planner(model, example_inputs, batches, budget=budget, **options)
        plan = planner.plan(budget)
    gradual = finetune is not None and finetune.gates > 0
    return plan, decouple(model, plan, planner.calibrations[1].named()) if gradual else planner.collapse(plan)


@dataclass(frozen=True)
class _Inputs:
    """Of the pairs (inputs, target) that are trained on."""

    pairs: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        for batch in self.pairs:
            if not isinstance(batch, list | tuple) or len(batch) != 2:
                raise InvalidInputError(f"a batch is a {type(batch).__name__}, expected a pair (inputs, target)")
            yield batch[0]
