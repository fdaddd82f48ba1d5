"""CIFAR images from whatever they come in, as tensors.

A data set is a directory or a tar archive (.tar, .tar.gz, .tar.xz …; read without unpacking), and holds either

- images in folders, `test/CLASS/IMAGE.jpg` (any image type that Pillow reads), or
- the original "python" files, `test_batch` and `data_batch_1` … `data_batch_5`, with `batches.meta`,

at its top or inside one enclosing folder, as archives have it.
"""

import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

Split = Literal["train", "test"]
Entry = tuple[PurePosixPath, Callable[[], bytes]]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp"}
PADDING = 4
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Images:
    """pixels: uint8 [N, 3, H, W]; labels: int64 [N], indices into classes."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, count: int) -> "Images":
        """About so many images, evenly spread: in order, they would all be of one class."""
        chosen = slice(None, None, max(1, len(self) // count))
        return Images(self.pixels[chosen], self.labels[chosen], self.classes)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised float32 images and their labels, in order."""
        for pixels, labels in zip(torch.split(self.pixels, size), torch.split(self.labels, size), strict=True):
            yield normalise(pixels), labels


class Augmented(Dataset[Any]):
    """Images for training, whole batches at a time: padded by 4 zeros, cropped at random, half of them mirrored.

    For a `DataLoader` with `collate_fn=as_it_is`. pixels, labels: as those of `Images`.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices)
        count, channels, height, width = self.pixels[chosen].shape
        padded = F.pad(self.pixels[chosen], (PADDING,) * 4)
        top, left = torch.randint(0, 2 * PADDING + 1, (2, count, 1))
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
        image, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
        return normalise(padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]), self.labels[chosen]


def as_it_is(batch: Any) -> Any:
    """What `__getitems__` gives is a batch already."""
    return batch


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] → float32, with the mean and deviation that the networks were trained with."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (pixels.float() / 255 - mean) / deviation


def load(path: Path, split: Split = "test") -> Images:
    """Reads one split. Raises FileNotFoundError for a missing path, ValueError for an unknown layout."""
    if not path.exists():
        raise FileNotFoundError(f"no data set at {path}")
    pictures: list[tuple[str, PurePosixPath, bytes]] = []
    pickles: dict[str, dict[bytes, Any]] = {}
    for name, read in _entries(path):
        if _is_picture(name, split):
            pictures.append((name.parent.name, name, read()))
        elif _is_pickle(name, split):
            pickles[name.name] = _Unpickler(io.BytesIO(read()), encoding="bytes").load()
    if pictures:
        return _from_pictures(sorted(pictures))
    if pickles.keys() - {"batches.meta"}:
        return _from_pickles(pickles)
    expected = "test_batch" if split == "test" else "data_batch_*"
    raise ValueError(
        f"{path} holds neither {split}/CLASS/IMAGE files nor {expected}: not a CIFAR data set in a known layout"
    )


def _entries(path: Path) -> Iterator[Entry]:
    """The files, by their names inside the data set. Read each before asking for the next: an archive is one stream."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                yield PurePosixPath(file.relative_to(path).as_posix()), file.read_bytes
        return
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            if member.isfile():
                yield PurePosixPath(member.name), partial(_content, archive, member)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None, f"{member.name} is no regular file"
    return stream.read()


def _is_picture(name: PurePosixPath, split: Split) -> bool:
    """SPLIT/CLASS/IMAGE, possibly in one enclosing folder."""
    parts = [part for part in name.parts if part != "."]
    return name.suffix.lower() in IMAGE_SUFFIXES and len(parts) in (3, 4) and parts[-3] == split


def _is_pickle(name: PurePosixPath, split: Split) -> bool:
    return name.name == "batches.meta" or name.name.startswith("test_batch" if split == "test" else "data_batch_")


class _Unpickler(pickle.Unpickler):
    """Reads arrays and plain values only: a data set has no business naming any other class."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct", "ndarray", "dtype", "scalar"} if module.startswith("numpy") else {"encode"}
        if name not in allowed or module.partition(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"the data set asks for {module}.{name}, which CIFAR files never do")
        return super().find_class(module, name)


def _from_pictures(pictures: list[tuple[str, PurePosixPath, bytes]]) -> Images:
    classes = tuple(sorted({label for label, _, _ in pictures}))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for _, _, content in pictures])
    labels = torch.tensor([classes.index(label) for label, _, _ in pictures])
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels, classes)


def _from_pickles(pickles: dict[str, dict[bytes, Any]]) -> Images:
    """Rows of 3072 bytes, one colour plane after the other."""
    meta = pickles.pop("batches.meta", {})
    batches = [pickles[name] for name in sorted(pickles)]
    pixels = np.concatenate([np.asarray(batch[b"data"], dtype=np.uint8) for batch in batches]).reshape(-1, 3, 32, 32)
    labels = torch.tensor([label for batch in batches for label in batch[b"labels"]])
    named = tuple(name.decode() for name in meta.get(b"label_names", ()))
    return Images(torch.from_numpy(pixels), labels, named or tuple(map(str, range(int(labels.max()) + 1))))
