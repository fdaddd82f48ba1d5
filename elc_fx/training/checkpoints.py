"""Checkpoints of a fine-tuning: a folder keeps the last one; a kill while it is written leaves the one before."""

from __future__ import annotations

import io
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor

from elc_fx.errors import TrainingError
from elc_fx.files import write_whole
from elc_fx.training.history import METRICS, Epoch, metrics

NAME = "checkpoint-{:05d}"  # by epochs done


@dataclass(frozen=True)
class Checkpoint:
    """A run after one of its epochs. identity: of the run. weights: those trained, their average, the best so far."""

    identity: str
    steps: int
    history: list[Epoch]
    optimizer: dict[str, Any]
    weights: dict[str, dict[str, Tensor]]

    def write(self, folder: Path) -> None:
        """Beside the one before, which then goes. Raises `OSError`."""
        done = len(self.history)
        unfinished, final = folder / f".{NAME.format(done)}.tmp", folder / NAME.format(done)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        state = {**vars(self), "history": [asdict(epoch) for epoch in self.history], "weights": sorted(self.weights)}
        stream = io.BytesIO()
        torch.save(state, stream)
        try:
            for name, weights in self.weights.items():
                on_cpu = {key: value.detach().cpu().clone().contiguous() for key, value in weights.items()}
                write_whole({unfinished / f"{name}.safetensors": safetensors.torch.save(on_cpu)})
            write_whole({unfinished / "state.pt": stream.getvalue()})
            unfinished.rename(final)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        for older in sorted(folder.glob("checkpoint-*")):
            if older != final:
                shutil.rmtree(older)
        write_whole({folder / METRICS: metrics(self.history)})

    @classmethod
    def read(cls, folder: Path, identity: str, device: torch.device) -> Checkpoint | None:
        """The last one, if there is any. Raises `TrainingError` where it is damaged or of another run."""
        found = sorted(folder.glob("checkpoint-*"))
        if not found:
            return None
        last = found[-1]
        try:
            state = torch.load(last / "state.pt", map_location=device, weights_only=True)
            weights = {file.stem: load_file(file, device=str(device)) for file in last.glob("*.safetensors")}
            history = [Epoch(**epoch) for epoch in state["history"]]
            if sorted(weights) != state["weights"]:
                raise FileNotFoundError(f"of {', '.join(state['weights'])} there are {', '.join(weights) or 'none'}")
            checkpoint = cls(**{**state, "history": history, "weights": weights})
        except Exception as error:  # whatever a damaged file leads to
            raise TrainingError(f"the checkpoint {last} cannot be read: {error}; delete it to begin anew") from error
        if checkpoint.identity != identity:
            raise TrainingError(
                f"the checkpoint {last} is of another run: the network, the data or the options differ; "
                "give another folder, or delete it"
            )
        return checkpoint
