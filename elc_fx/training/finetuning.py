"""Fine-tuning: a decoupled or collapsed network learns again what the original computes.

One loop for one CPU, one GPU and several processes (Hugging Face Accelerate). Every epoch begins from random numbers of
its own, so that a run that was killed and started again ends as one that was not.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from elc_fx.arguments import check_from_zero, check_positive, check_share, check_whole
from elc_fx.capturing.copying import clone
from elc_fx.capturing.identity import described, fingerprint, structure_of, tensors_of
from elc_fx.capturing.inputs import check_visible, fresh, number_type, of_dicts, of_type, running
from elc_fx.capturing.randomness import parts_of_loader, randomness_of_the_caller, seed_all
from elc_fx.decoupling.gates import GateSchedule, Order, Shape, decoupling_nodes
from elc_fx.decoupling.nodes import DecoupledActivation
from elc_fx.errors import InvalidInputError, TrainingError
from elc_fx.files import alone_in, make_folder, write_whole
from elc_fx.packages import required
from elc_fx.training.checkpoints import Checkpoint
from elc_fx.training.features import Features
from elc_fx.training.history import METRICS, Epoch, History, metrics
from elc_fx.training.losses import distance, of_classes
from elc_fx.workarounds import SoundConvolutions, without_autocast_cache

Loss = Callable[[Any, Any], Tensor]  # (output, target) → a tensor with one number

MOMENTUM = 0.9
TOO_FEW = "more than 1 value per channel"  # what a batch norm says that is to train on one sample
IGNORED = -100  # the class of what has none, as torch's cross entropy has it by default


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune.

    Args:
        train_data: batches (inputs, target), anew in each epoch: a `DataLoader`, or another iterable. Inputs are a
            tensor, a sequence of arguments or a mapping of them; without a loss of your own, the target holds classes
            (−100 for none).
        epochs: passes over `train_data`.
        validation: batches held out from the training set. The epoch that did best on it, with closed gates, is what
            remains.
        learning_rate: its peak. It rises over the first `warmup` (a share of all steps), then falls to 0 as a cosine.
        weight_decay: of weights with more than one axis.
        distillation: how much of the loss is to compute what the teacher computes, from 0 to 1.
        temperature: at which the two distributions of classes are compared.
        features: weight of the distance between what the regions of the network give and what the teacher gives there;
            added to the loss.
        gates: the share of all steps in which the gates close; 0 closes them at once.
        gate_shape, gate_order: as `shape` and `order` of `GateSchedule`.
        clip: the largest norm of the gradient.
        ema: decay of an exponential moving average of the weights, which then is what remains; None for none.
        patience: epochs without a better validation after which training ends; None for never.
        loss: (output, target) → a tensor with one number; by default the cross entropy.
        bf16: autocast to bfloat16; by default that of float32 networks where the hardware computes in it.
        seed: of the order of the data and of all else that is random.
        folder: where checkpoints and metrics.csv are kept. A run that was killed goes on from there.
        tensorboard: also write events for TensorBoard, into the folder.
        progress: show a bar on a terminal.
    """

    train_data: Iterable[Any]
    epochs: int = 10
    validation: Iterable[Any] | None = None
    learning_rate: float = 0.02
    warmup: float = 0.1
    weight_decay: float = 5e-4
    distillation: float = 0.9
    temperature: float = 4.0
    features: float = 0.0
    gates: float = 0.0
    gate_shape: Shape = "cosine"
    gate_order: Order = "together"
    clip: float = 5.0
    ema: float | None = None
    patience: int | None = None
    loss: Loss | None = None
    bf16: bool | None = None
    seed: int = 0
    folder: str | Path | None = None
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        check_whole(1, epochs=self.epochs)
        if self.patience is not None:
            check_whole(1, patience=self.patience)
        check_share(warmup=self.warmup, distillation=self.distillation, gates=self.gates)
        check_positive(learning_rate=self.learning_rate, temperature=self.temperature, clip=self.clip)
        if self.ema is not None:
            check_share(ema=self.ema)
        check_from_zero(weight_decay=self.weight_decay, features=self.features)
        check_whole(0, seed=self.seed)
        if self.seed >= 2**32:
            raise InvalidInputError(f"seed is {self.seed}, expected a whole number below 2³²")
        for name, known in (("gate_shape", get_args(Shape)), ("gate_order", get_args(Order))):
            if getattr(self, name) not in known:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.loss is not None and not callable(self.loss):
            raise InvalidInputError(f"loss is {self.loss!r}, expected a function (output, target) → tensor")
        if self.folder is not None and not isinstance(self.folder, str | Path):
            raise InvalidInputError(f"folder is {self.folder!r}, expected a path")
        if not isinstance(self.train_data, Iterable):
            raise InvalidInputError(
                f"train_data is a {type(self.train_data).__name__}, expected a DataLoader or batches (inputs, target)"
            )
        if self.validation is not None and (
            not isinstance(self.validation, Iterable) or isinstance(self.validation, Iterator)
        ):
            raise InvalidInputError(
                f"validation is a {type(self.validation).__name__}, expected a DataLoader or a list of batches, which "
                "can be gone through in every epoch"
            )
        if self.tensorboard and self.folder is None:
            raise InvalidInputError("tensorboard needs a folder to write to")

    def identity(self) -> dict[str, Any]:
        """What has to be the same where a run goes on."""
        left_out = ("train_data", "validation", "loss", "folder", "tensorboard", "progress")
        settings: dict[str, Any] = {}
        for setting in fields(self):
            if setting.name not in left_out:
                value = getattr(self, setting.name)
                settings[setting.name] = float(value) if isinstance(setting.default, float) else value  # 1 is 1.0
        loss = getattr(self.loss, "__qualname__", type(self.loss).__name__)
        if isinstance(self.loss, nn.Module):
            loss = described(self.loss) + fingerprint(self.loss)
        return settings | {"loss": loss}


def finetune(
    network: nn.Module, train_data: Iterable[Any], *, teacher: nn.Module | None = None, **options: Any
) -> History:
    """Trains a decoupled or collapsed network, in place; ends in eval mode with all gates closed.

    Args:
        network: what `decouple` or `Planner.collapse` returned, or any other module.
        train_data, options: the fields of `FinetuneConfig`.
        teacher: the original; what it computes is learned as well. It does not change.

    Raises:
        InvalidInputError: an argument is out of its range, or the data does not fit the network.
        TrainingError: the loss is not finite; or `folder` holds another run.
    """
    return Finetuning(network, FinetuneConfig(train_data, **options), teacher).run()


@dataclass
class _State:
    """What changes from epoch to epoch, besides weights."""

    history: list[Epoch] = field(default_factory=list)
    steps: int = 0


class Finetuning:
    """One run. Arguments and errors: see `finetune`."""

    def __init__(self, network: nn.Module, config: FinetuneConfig, teacher: nn.Module | None = None) -> None:
        from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs  # seconds to import
        from accelerate.state import GradientState
        from accelerate.utils import send_to_device

        if not isinstance(network, nn.Module):
            raise InvalidInputError(f"network is a {type(network).__name__}, expected a torch.nn.Module")
        check_visible(network)
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise InvalidInputError(f"teacher is a {type(teacher).__name__}, expected a torch.nn.Module")
        if teacher is network:
            raise InvalidInputError("the teacher is the network itself; pass the original")
        if config.tensorboard:
            _summary_writer()  # or an error, before anything is trained
        self.network, self.config = network, config
        shared = GradientState()
        of_the_caller = dict(shared.plugin_kwargs)
        self.accelerator = Accelerator(
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=bool(decoupling_nodes(network)))],
            cpu=not torch.cuda.is_available(),
        )
        shared.plugin_kwargs = of_the_caller  # which the one made here has changed for all
        self.device = self.accelerator.device
        self.to_device = partial(send_to_device, device=self.device, non_blocking=True)
        self.dtype = number_type(network)
        autocasts = self.dtype == torch.float32 and computes_in_bf16(self.device)
        self.bf16 = autocasts if config.bf16 is None else config.bf16
        self.channels_last = self.device.type == "cpu" or self.bf16
        self.structure = [structure_of(network), structure_of(teacher), fingerprint(teacher)]
        self.teacher = None if teacher is None else clone(teacher, {}).to(self.device).eval().requires_grad_(False)
        self.batches = self._shared("train_data", config.train_data)
        # Evenly shared batches would be filled up with samples that then count twice.
        self.accelerator.dataloader_config.even_batches = False
        self.validation = None if config.validation is None else self._shared("validation", config.validation)
        self.steps_per_epoch = _length(self.batches)
        self.total = config.epochs * self.steps_per_epoch
        self.state = _State()
        self.folder = None if config.folder is None else Path(config.folder)
        if self.folder is not None:
            with self._alone():  # or an error, before anything else is done
                pass
        self.best: dict[str, Tensor] | None = None
        self.trained: Any = None

    def run(self) -> History:
        """All epochs that are left."""
        with self._alone(), torch.inference_mode(False), torch.enable_grad():
            return self._run()

    def check(self) -> None:
        """Raises what the data and the loss would raise in the first step; nothing is trained.

        Nor is data looked at that can be gone through only once, or a loss asked that keeps what it was given.
        """
        if not isinstance(self.batches, DataLoader | list | tuple) and iter(self.batches) is iter(self.batches):
            return
        if isinstance(self.config.loss, nn.Module) and any(True for _ in self.config.loss.buffers()):
            return
        network = self.network.to(self.device)
        with torch.inference_mode(False), torch.enable_grad(), SoundConvolutions():
            for batch in self.batches:
                inputs, target = self._parts(batch)
                output = self._output(network, inputs)
                self._loss(output, target, output)
                break

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other runs out of the folder. The first process does it for those that train together."""
        with contextlib.ExitStack() as stack:
            if self.folder is not None and self.accelerator.is_main_process:
                with _writing_to(self.folder):
                    stack.enter_context(alone_in(self.folder))
            yield

    def _run(self) -> History:
        home = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        check_trainable(self.network)
        last = None if self.folder is None else Checkpoint.read(self.folder, self._identity(), self.device)
        self.features = self._features()
        network = self.network.to(self.device)
        try:
            self._begin(last)
            drawn = randomness_of_the_caller(self.batches, self.validation)
            with drawn, without_autocast_cache(), SoundConvolutions(), _Bar(self) as bar:
                if self.validation is not None and len(self.state.history) < self.config.epochs:
                    self._check_validation()
                for number in range(len(self.state.history), self.config.epochs):
                    if self._impatient():
                        break
                    self._epoch(number, bar)
        finally:
            self.trained = None
            network.eval()
            if self.features is not None:
                self.features.remove()
        if self.average is not None and self.best is None:
            _load(network, self.average)
        if self.best is not None:
            _load(network, self.best)
        network.to(home).eval()
        return History(tuple(self.state.history))

    def _begin(self, last: Checkpoint | None) -> None:
        """Where the last checkpoint was, if there is one. Errors come before anything of the network is changed."""
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = optimizer_of(self.parameters, self.config.learning_rate, self.config.weight_decay)
        if last is not None:
            try:
                self.optimizer.load_state_dict(last.optimizer)
            except ValueError as error:
                raise TrainingError(f"the checkpoint in {self.folder} is of a run of other parameters") from error
        self.gates = self._gate_schedule()
        self.gate_names = {f"{name}.gate" for name in decoupling_nodes(self.network)}
        self.average = None
        if self.config.ema is not None:
            self.average = {k: v.detach().clone() for k, v in tensors_of(self.network).items()}
        if last is not None:
            self._resume(last)
        self.optimizer.zero_grad()  # of what the caller did before
        # With one process there is nothing to prepare, and Accelerate would cast to what the caller's own one casts to.
        self.trained = self.accelerator.prepare(self.network) if self.accelerator.num_processes > 1 else self.network

    # One epoch

    def _epoch(self, number: int, bar: Any) -> None:
        seed_all(self.config.seed + number, self.batches)
        for part in parts_of_loader(self.batches):
            if hasattr(part, "set_epoch"):
                part.set_epoch(number)
        self.trained.train()
        total, images, start = torch.zeros((), device=self.device), 0, time.perf_counter()
        steps = 0
        for batch in self.batches:
            inputs, target = self._parts(batch)
            loss = self._step(inputs, target)
            total += loss
            steps += 1
            images += _size(inputs)
            speed = images / (time.perf_counter() - start)
            bar(number, steps, total, speed)
        if not steps:
            raise InvalidInputError(
                f"train_data gives no batches in epoch {number + 1}; give what can be gone through again, such as a "
                "DataLoader"
            )
        mean = float(self.accelerator.reduce(total / steps, "mean"))
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean} in epoch {number + 1}; give a learning_rate below {self.config.learning_rate}, "
                "unless there are numbers in the training data that are not finite"
            )
        speed = images * self.accelerator.num_processes / (time.perf_counter() - start)
        self._catch_up((number + 1) * self.steps_per_epoch)
        self._agree()
        score = self._score() if self.validation is not None and self._closed() else None
        rate = self.optimizer.param_groups[0]["lr"]
        self.state.history.append(Epoch(number + 1, mean, self._mean_gate(), rate, speed, score))
        if score is not None and History(tuple(self.state.history)).best.number == number + 1:
            self.best = {k: v.detach().clone() for k, v in self._remaining().items()}
        self._save()

    def _step(self, inputs: Any, target: Any) -> Tensor:
        self._set_rates()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            wanted = self._taught(inputs)
            output = self._output(self.trained, inputs)
        loss = self._loss(output, target, wanted)
        if self.features is not None:
            loss = loss + self.config.features * self.features.distance()
        if not loss.requires_grad:
            raise InvalidInputError("the loss has no gradient: what its function gives is detached from the output")
        # Accelerate's own would follow an Accelerator of the caller: its accumulation, its scale for half precision.
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.steps += 1
        if self.gates is not None:
            self.gates.step()
        if self.average is not None:
            self._update_average()
        return loss.detach()

    @torch.no_grad()
    def _taught(self, inputs: Any) -> Any:
        """What the teacher gives, if it is asked."""
        if self.features is not None:
            with _running("the teacher"):
                return self.features.teach(fresh(inputs))
        if self.teacher is not None and self.config.distillation:
            return self._output(self.teacher, inputs, "the teacher")
        return None

    @staticmethod
    def _output(network: nn.Module, inputs: Any, name: str = "the network") -> Any:
        """What a network gives for inputs of its own, which it may overwrite."""
        with _running(name):
            return _call(network, fresh(inputs))

    def _loss(self, output: Any, target: Any, wanted: Any) -> Tensor:
        share = 0.0 if wanted is None else self.config.distillation
        total: Any = 0.0
        if share < 1:
            total = (1 - share) * self._task_loss(output, target)
        if share > 0:
            numbers = isinstance(target, Tensor) and target.is_floating_point() and not _classes(output, target)
            classes = of_classes(output) and not numbers
            total = total + share * distance(output, wanted, self.config.temperature if classes else None)
        return total

    def _features(self) -> Features | None:
        if not self.config.features:
            return None
        if self.teacher is None:
            raise InvalidInputError("features are compared with those of a teacher; pass one")
        return Features(self.network, self.teacher)

    def _task_loss(self, output: Any, target: Any) -> Tensor:
        if self.config.loss is not None:
            with running("the loss function does not run on what the network gives"):
                return _one_number(self.config.loss(output, target))
        if not isinstance(output, Tensor) or not isinstance(target, Tensor):
            raise InvalidInputError(
                f"the network gives a {type(output).__name__} and the data a {type(target).__name__} as target; "
                "pass a loss of your own"
            )
        if not _classes(output, target):
            raise InvalidInputError(
                f"the network gives {list(output.shape)} and the target is {target.dtype} {list(target.shape)}, "
                "neither a class nor a distribution of classes for each; pass a loss of your own"
            )
        if target.is_floating_point():
            return F.cross_entropy(output.float(), target)
        target = target.long()
        labelled = target != IGNORED
        # Elsewhere a look at the numbers makes the whole device wait.
        known = target[labelled] if target.device.type == "cpu" else target[:0]
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < output.shape[1]:
            raise InvalidInputError(
                f"classes go from {int(known.min())} to {int(known.max())}, and the network gives {output.shape[1]} "
                f"scores; {IGNORED} is what has no class"
            )
        total = F.cross_entropy(output.float(), target, ignore_index=IGNORED, reduction="sum")
        return total / labelled.sum().clamp_min(1)

    def _set_rates(self) -> None:
        share = share_of_rate(self.state.steps, self.total, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * share

    @torch.no_grad()
    def _update_average(self) -> None:
        assert self.average is not None and self.config.ema is not None
        # As long as there are few steps, the average is over all of them.
        decay = min(self.config.ema, self.state.steps / (self.state.steps + 10))
        for name, value in tensors_of(self.network).items():
            mean = self.average[name]
            if value.is_floating_point() and name not in self.gate_names:
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)

    def _agree(self) -> None:
        """Statistics of batch norms are those of each process's own batches; all go on with those of the first."""
        if self.accelerator.num_processes > 1:
            for value in (*tensors_of(self.network).values(), *(self.average or {}).values()):
                torch.distributed.broadcast(value, 0)

    # Gates

    def _gate_schedule(self) -> GateSchedule | None:
        if not decoupling_nodes(self.network):
            return None
        options: Any = {"shape": self.config.gate_shape, "order": self.config.gate_order}
        schedule = GateSchedule(self.network, max(1, round(self.config.gates * self.total)), **options)
        if self.config.gates == 0:
            schedule.load_state_dict({"steps": schedule.total_steps})
        return schedule

    def _catch_up(self, steps: int) -> None:
        """A loader may give other than the number of batches that it says; at the end all gates are closed."""
        self.state.steps = steps
        if self.gates is not None and self.config.gates:
            self.gates.load_state_dict({"steps": steps})

    def _closed(self) -> bool:
        return self.gates is None or self.gates.closed

    def _mean_gate(self) -> float:
        values = [float(node.gate) for node in decoupling_nodes(self.network).values()]
        return sum(values) / len(values) if values else 0.0

    # Validation

    def _remaining(self) -> dict[str, Tensor]:
        return tensors_of(self.network) if self.average is None else self.average

    @torch.no_grad()
    def _score(self) -> float:
        assert self.validation is not None
        current = None
        if self.average is not None:
            current = {k: v.detach().clone() for k, v in tensors_of(self.network).items()}
            _load(self.network, self.average)
        self.network.eval()
        total = torch.zeros((2,), device=self.device)
        for batch in self.validation:
            total += self._judged(batch)
        self.network.train()
        if current is not None:
            _load(self.network, current)
        total = self.accelerator.reduce(total, "sum")
        score = float(total[0] / total[1]) if total[1] else math.nan
        if not math.isfinite(score):
            raise TrainingError(
                f"the network scores {score} on the validation data" if total[1] else "validation holds no samples"
            )
        return score

    @torch.no_grad()
    def _check_validation(self) -> None:
        """Its errors come before the first epoch, though it is not scored before all gates are closed."""
        assert self.validation is not None
        self.network.eval()
        for batch in self.validation:
            self._judged(batch)
            return
        raise TrainingError("validation holds no samples")

    def _judged(self, batch: Any) -> Tensor:
        """How many are right, or minus the sum of the losses where no classes are scored; and how many there are."""
        try:
            inputs, target = self._parts(batch)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                output = self._output(self.network, inputs)
            if self.config.loss is None and _classes(output, target) and output.dim() == 2:
                wanted = target.argmax(1) if target.is_floating_point() else target.long()
                right, count = (output.argmax(1) == wanted).sum(), (wanted != IGNORED).sum()
            else:
                count = torch.tensor(_size(inputs), device=self.device)
                right = -self._loss_to_judge_by(inputs, output, target) * count
        except InvalidInputError as error:
            raise InvalidInputError(f"validation: {error}") from error
        return torch.stack([right.float(), count.float()])

    def _loss_to_judge_by(self, inputs: Any, output: Any, target: Any) -> Tensor:
        """Where nothing but the teacher is learned, the distance from it; the targets may be anything then."""
        if self.teacher is not None and self.config.distillation == 1 and self.config.loss is None:
            return distance(output, self._output(self.teacher, inputs, "the teacher"), None)
        return self._task_loss(output, target)

    def _impatient(self) -> bool:
        history = History(tuple(self.state.history))
        patience = self.config.patience
        if patience is None or not history.epochs or history.epochs[-1].score is None:
            return False
        return history.epochs[-1].number - history.best.number >= patience

    # Data

    def _shared(self, name: str, batches: Iterable[Any]) -> Any:
        """The batches of this process."""
        if self.accelerator.num_processes == 1:  # then what Accelerate makes of a loader would only lose its own ways
            return batches
        if not isinstance(batches, DataLoader) or type(batches).__iter__ is not DataLoader.__iter__:
            raise InvalidInputError(
                f"{name} is a {type(batches).__name__}; with several processes it has to be a DataLoader that iterates "
                "as torch's does, so that each process gets a share"
            )
        return self.accelerator.prepare_data_loader(batches)

    def _parts(self, batch: Any) -> tuple[Any, Any]:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise InvalidInputError(f"a batch is a {type(batch).__name__}, expected a pair (inputs, target)")
        moved = self.to_device((of_dicts(batch[0]), batch[1]))
        # Nothing can be trained on tensors of `torch.inference_mode`.
        inputs, target = pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, moved)
        if not _size(inputs):
            raise InvalidInputError("a batch of the data has no samples")
        inputs = of_type(inputs, self.dtype)
        if self.channels_last:
            inputs = pytree.tree_map_only(Tensor, _channels_last, inputs)
        return inputs, target

    # Checkpoints

    def _identity(self) -> str:
        network = [(name, tuple(value.shape)) for name, value in tensors_of(self.network).items()]
        sizes = [_samples(batches) for batches in (self.config.train_data, self.config.validation)]
        what = (self.config.identity(), self.steps_per_epoch, sizes, network, self.structure)
        return hashlib.sha256(repr(what).encode()).hexdigest()

    def _save(self) -> None:
        if self.folder is None:
            return
        if self.accelerator.is_main_process:
            weights = {"network": tensors_of(self.network), "average": self.average, "best": self.best}
            checkpoint = Checkpoint(
                self._identity(),
                self.state.steps,
                self.state.history,
                self.optimizer.state_dict(),
                {name: tensors for name, tensors in weights.items() if tensors is not None},
            )
            with _writing_to(self.folder):
                checkpoint.write(self.folder)
            if self.config.tensorboard:
                _write_events(self.folder, self.state.history[-1])
        self.accelerator.wait_for_everyone()

    def _resume(self, last: Checkpoint) -> None:
        _load(self.network, last.weights["network"])
        self.average, self.best = last.weights.get("average"), last.weights.get("best")
        self.state = _State(last.history)
        self._catch_up(last.steps)
        if self.folder is not None and self.accelerator.is_main_process and last.history:
            # A kill may have kept them from being written.
            write_whole({self.folder / METRICS: metrics(last.history)})


class _Bar:
    """Steps of all epochs, with the loss, the gate and the speed."""

    def __init__(self, run: Finetuning) -> None:
        self.run = run
        shown = run.config.progress and run.accelerator.is_main_process and sys.stderr.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self.shown = shown

    def __enter__(self) -> Callable[[int, int, Tensor, float], None]:
        self.progress.start()
        self.task = self.progress.add_task("fine-tuning", total=self.run.total, completed=self.run.state.steps)
        return self._update

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def _update(self, epoch: int, steps: int, total: Tensor, speed: float) -> None:
        if not self.shown or steps % 10:
            return
        run = self.run
        gate = f", gate {run._mean_gate():.2f}" if run.gates is not None else ""
        best = max((e.score for e in run.state.history if e.score is not None), default=None)
        score = "" if best is None else f", best {best:.4f}"
        done = f"epoch {epoch + 1}/{run.config.epochs}: loss {float(total) / steps:.4f}"
        text = f"{done}{gate}{score}, {speed:,.0f} images/s"
        self.progress.update(self.task, completed=run.state.steps, description=text)


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(f"checkpoints cannot be kept in {folder}: {error}") from error


def check_folder(folder: Path) -> None:
    """Raises `TrainingError` where checkpoints cannot be kept."""
    with _writing_to(folder):
        make_folder(folder)


def _load(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    network.load_state_dict({**network.state_dict(), **tensors})


def check_trainable(network: nn.Module) -> None:
    """Raises `InvalidInputError` where nothing that a network computes would be trained."""
    lines = {id(p) for m in network.modules() if isinstance(m, DecoupledActivation) for p in (m.slope, m.offset)}
    parameters = [p for p in network.parameters() if p.requires_grad and id(p) not in lines]
    if not parameters:
        raise InvalidInputError("no parameter of the network requires a gradient; call requires_grad_(True) first")
    if any(p.is_inference() for p in parameters):
        raise InvalidInputError("the network was made under torch.inference_mode, and cannot be trained")


def optimizer_of(parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.SGD:
    """weight_decay: of weights with more than one axis."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=MOMENTUM, nesterov=True)


def share_of_rate(step: int, total: int, warmup: float) -> float:
    """Of the peak of the learning rate: a linear warm-up for a share of all steps, then a cosine to 0."""
    warm = warmup * total
    if step < warm:
        return (step + 1) / math.ceil(warm)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16; elsewhere it is emulated, several times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every release of torch
    return device.type == "cpu" and any(getattr(torch.cpu, unit, bool)() for unit in units)


def _write_events(folder: Path, epoch: Epoch) -> None:
    with _summary_writer()(str(folder / "tensorboard"), purge_step=epoch.number) as writer:
        for name, value in asdict(epoch).items():
            if name != "number" and value is not None:
                writer.add_scalar(name, value, epoch.number)


def _summary_writer() -> Any:
    return required("torch.utils.tensorboard", "tensorboard").SummaryWriter


@contextlib.contextmanager
def _running(name: str) -> Iterator[None]:
    """See `running`; with the way out where a batch is too small."""
    try:
        with running(f"{name} does not run on a batch of the data"):
            yield
    except InvalidInputError as error:
        if TOO_FEW not in str(error):
            raise
        raise InvalidInputError(f"{error}; drop_last=True of a DataLoader leaves out a last batch of one") from error


def _call(network: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, list | tuple) else network(inputs)


def _size(inputs: Any) -> int:
    return next((len(v) for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor) and v.dim()), 1)


def _classes(output: Any, target: Any) -> bool:
    """Whether [N, classes, …] stands beside the class of each, or beside a distribution over the classes."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or output.dim() < 2:
        return False
    if target.is_floating_point():
        sums = target.sum(1) if target.dim() > 1 else torch.zeros(1)
        return target.shape == output.shape and bool((target >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all())
    return not target.is_complex() and target.shape == (len(output), *output.shape[2:])


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _samples(batches: Any) -> int | None:
    """How many there are, where that can be told without going through them."""
    whole = batches.dataset if isinstance(batches, DataLoader) else batches
    return len(whole) if isinstance(whole, Sized) else None


def _length(batches: Any) -> int:
    try:
        length = len(batches)
    except TypeError:  # a DataLoader has one only if its dataset has
        length = 0
    if not length:
        raise InvalidInputError(
            "train_data has no length, or is empty; give a list of batches, a DataLoader, or one whose dataset has a "
            "`__len__`"
        )
    return length


def _one_number(loss: Any) -> Tensor:
    """What a loss function gives, if one can train on it."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a tensor of {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise InvalidInputError(f"the loss function gives {given}, expected a tensor with one number, such as a mean")
    return loss.reshape(())
