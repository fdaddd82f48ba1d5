"""Labelled images from whatever they come in, as tensors.

A data set is a directory or a tar archive (.tar, .tar.gz, .tar.xz …; read without unpacking), and holds either

- images in folders, `train/CLASS/IMAGE.jpg` and, where there is one, `test/CLASS/IMAGE.jpg` (or `val/`); any image type
  that Pillow reads; or `CLASS/IMAGE.jpg`, which are all for training; or
- the original "python" files of CIFAR-10, `data_batch_1` … `data_batch_5` and `test_batch`, with `batches.meta`,

at its top or inside one enclosing folder, as archives have it.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elc_fx.errors import ElcError

Split = Literal["train", "test"]
Entry = tuple[PurePosixPath, Callable[[], bytes]]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp"}
FOLDERS: dict[str, Split] = {"train": "train", "test": "test", "val": "test", "validation": "test"}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, with which most networks are trained
MOST_BYTES = 8 * 2**30  # of pixels; all images are held in memory


class DataError(ElcError, ValueError):
    """A data set is missing, in an unknown layout, damaged, or does not fit the model."""


@dataclass(frozen=True)
class Images:
    """pixels: uint8 [N, channels, H, W]; labels: int64 [N], indices into classes. mean, deviation: for networks."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: Sequence[float] = MEAN
    deviation: Sequence[float] = DEVIATION

    def __len__(self) -> int:
        return len(self.labels)

    def taken(self, indices: Any) -> Images:
        """Some of the images."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])

    def sample(self, count: int) -> Images:
        """About so many images, evenly spread: in order, they would all be of one class."""
        return self.taken(slice(None, None, max(1, len(self) // count)))

    def split(self, share: float, seed: int = 0) -> tuple[Images, Images]:
        """The rest, and a random share that is held out."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        count = round(share * len(self))
        return self.taken(order[count:]), self.taken(order[:count])

    def inputs(self) -> Tensor:
        """Normalised float32 images."""
        return self.normalised(self.pixels)

    def normalised(self, pixels: Tensor) -> Tensor:
        channels = pixels.shape[1]
        mean, deviation = (torch.tensor(tuple(v)[:channels]).view(-1, 1, 1) for v in (self.mean, self.deviation))
        return (pixels.float() / 255 - mean) / deviation

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and their labels, in order."""
        for pixels, labels in zip(torch.split(self.pixels, size), torch.split(self.labels, size), strict=True):
            yield self.normalised(pixels), labels

    def loader(self, size: int) -> DataLoader[Any]:
        """For training: batches in random order, of images that are shifted and mirrored at random."""
        last = len(self) > size  # a few images left over make noisy batch norms
        return DataLoader(Augmented(self), size, shuffle=True, drop_last=last, collate_fn=_as_it_is)


class Augmented(Dataset[Any]):
    """Images padded by an eighth of zeros, cropped at random, half of them mirrored; whole batches at a time."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = self.images.taken(torch.tensor(indices))
        count, channels, height, width = chosen.pixels.shape
        margin = height // 8, width // 8
        padded = F.pad(chosen.pixels, (margin[1], margin[1], margin[0], margin[0]))
        top, left = (torch.randint(0, 2 * m + 1, (count, 1)) for m in margin)
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
        image, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
        cropped = padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
        return chosen.normalised(cropped), chosen.labels


def _as_it_is(batch: Any) -> Any:
    """What `__getitems__` gives is a batch already."""
    return batch


def load(path: Path, split: Split = "train", shape: tuple[int, int, int] | None = None) -> Images | None:
    """One split of a data set; None where it has no such split.

    shape: (channels, height, width) that the images are brought to: scaled until they cover it, then cropped in the
    middle; by default that of the first image, in colour. Raises `DataError`.
    """
    if not path.exists():
        raise DataError(f"there is no data set at {path}")
    pictures: dict[Split | None, list[tuple[str, PurePosixPath, bytes]]] = {"train": [], "test": [], None: []}
    pickles: dict[str, dict[bytes, Any]] = {}
    try:
        for name, read in _entries(path):
            if name.suffix.lower() in IMAGE_SUFFIXES:
                own, label = _place(name)
                if label is not None and own in (split, None):
                    pictures[own].append((label, name, read()))
            elif _is_pickle(name, split):
                pickles[name.name] = _Unpickler(io.BytesIO(read()), encoding="bytes").load()
            elif _is_pickle(name, "test" if split == "train" else "train"):
                pickles.setdefault("batches.meta", {})
    except (OSError, EOFError, tarfile.TarError, pickle.UnpicklingError) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if pictures[split]:
        return _from_pictures(path, sorted(pictures[split]), shape)
    if pickles.keys() - {"batches.meta"}:
        return _from_pickles(pickles, shape)
    if pictures[None] and split == "train":
        return _from_pictures(path, sorted(pictures[None]), shape)
    if split == "test":
        return None
    raise DataError(
        f"{path} holds no training images in a known layout: expected train/CLASS/IMAGE, CLASS/IMAGE, or CIFAR-10's "
        "data_batch_1 to data_batch_5"
    )


def _place(name: PurePosixPath) -> tuple[Split | None, str | None]:
    """The split and the class of a picture: SPLIT/CLASS/IMAGE or CLASS/IMAGE, possibly in one enclosing folder."""
    parts = [part for part in name.parts if part != "."]
    if len(parts) in (3, 4) and parts[-3] in FOLDERS:
        return FOLDERS[parts[-3]], parts[-2]
    if len(parts) in (2, 3) and parts[-2] not in FOLDERS:
        return None, parts[-2]
    return None, None


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


def _is_pickle(name: PurePosixPath, split: Split) -> bool:
    return name.name == "batches.meta" or name.name.startswith("test_batch" if split == "test" else "data_batch_")


class _Unpickler(pickle.Unpickler):
    """Reads arrays and plain values only: a data set has no business naming any other class."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct", "ndarray", "dtype", "scalar"} if module.startswith("numpy") else {"encode"}
        if name not in allowed or module.partition(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"the data set asks for {module}.{name}, which CIFAR files never do")
        return super().find_class(module, name)


def _from_pictures(
    path: Path, pictures: Sequence[tuple[str, PurePosixPath, bytes]], shape: tuple[int, int, int] | None
) -> Images:
    classes = tuple(sorted({label for label, _, _ in pictures}))
    pixels: np.ndarray[Any, Any] | None = None
    for number, (_, name, content) in enumerate(pictures):
        try:
            picture: Image.Image = Image.open(io.BytesIO(content))
            shape = shape or (3, picture.height, picture.width)
            channels, height, width = shape
            picture = picture.convert("L" if channels == 1 else "RGB")
            if picture.size != (width, height):
                picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
        except Exception as error:  # whatever Pillow runs into on damaged data
            raise DataError(f"{path}: {name} is no image that can be read: {error}") from error
        if pixels is None:
            if len(pictures) * channels * height * width > MOST_BYTES:
                raise DataError(
                    f"{path}: {len(pictures):,} images of {channels}×{height}×{width} are more than fits in memory; "
                    "call elc_fx.compile with a DataLoader of your own"
                )
            pixels = np.empty((len(pictures), channels, height, width), np.uint8)
        pixels[number] = np.asarray(picture).reshape(height, width, channels).transpose(2, 0, 1)
    labels = torch.tensor([classes.index(label) for label, _, _ in pictures])
    assert pixels is not None
    return Images(torch.from_numpy(pixels), labels, classes)


def _from_pickles(pickles: dict[str, dict[bytes, Any]], shape: tuple[int, int, int] | None) -> Images:
    """Rows of 3072 bytes, one colour plane after the other."""
    if shape is not None and shape != (3, 32, 32):
        raise DataError(f"CIFAR's images are 3×32×32, and {'×'.join(map(str, shape))} is wanted")
    meta = pickles.pop("batches.meta", {})
    batches = [pickles[name] for name in sorted(pickles)]
    try:
        pixels = np.concatenate([np.asarray(batch[b"data"], dtype=np.uint8) for batch in batches])
        labels = torch.tensor([label for batch in batches for label in batch[b"labels"]])
        images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"this is no batch of CIFAR-10: {error}") from error
    named = tuple(name.decode() for name in meta.get(b"label_names", ()))
    return Images(images, labels, named or tuple(map(str, range(int(labels.max()) + 1))))
