"""Labelled images from whatever they come in, as tensors.

A data set is a directory, a zip or a tar archive (.tar, .tar.gz, .tar.xz …; read without unpacking), and holds either

- images in folders, `train/CLASS/IMAGE.jpg` and, where there is one, `test/CLASS/IMAGE.jpg` (or else `val/`); or
  `CLASS/IMAGE.jpg`, which are all for training; an image may also lie deeper in the folder of its class; or
- the original "python" files of CIFAR-10, `data_batch_1` … `data_batch_5` and `test_batch`, with `batches.meta`,

at its top or inside one enclosing folder, as archives have it. Names that begin with a dot are left out.
"""

from __future__ import annotations

import io
import lzma
import math
import os
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from elc_fx.errors import DataError, InvalidInputError

Split = Literal["train", "test"]
Entries = Mapping[PurePosixPath, Callable[[], bytes]]  # how to read each file, by its name inside the data set
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif"}
FOLDERS: dict[Split, tuple[tuple[str, ...], ...]] = {  # which of several is taken: of the first group that is there
    "train": (("train", "training"),),
    "test": (("test", "testing"), ("val", "valid", "validation")),
}
PICKLES: dict[Split, str] = {"train": r"data_batch_\d+", "test": r"test_batch"}
META = "batches.meta"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, with which most networks are trained
SCORED_BATCH = 250
MOST_BYTES = 8 * 2**30  # of pixels; all images are held in memory


@dataclass(frozen=True)
class Images:
    """pixels: uint8 [N, channels, H, W]; labels: int64 [N], indices into classes. mean, deviation: for networks."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: Sequence[float] = MEAN
    deviation: Sequence[float] = DEVIATION

    def __post_init__(self) -> None:
        channels = self.pixels.shape[1]
        for name, values, ours in (("mean", self.mean, MEAN), ("deviation", self.deviation, DEVIATION)):
            if len(values) not in (1, channels) and tuple(values) != ours:
                raise InvalidInputError(f"{name} has {len(values)} numbers, and the images have {channels} channels")
            if not all(math.isfinite(value) for value in values):
                raise InvalidInputError(f"{name} is {tuple(values)}, expected numbers")
        if not all(value > 0 for value in self.deviation):
            raise InvalidInputError(f"deviation is {tuple(self.deviation)}, expected numbers above 0")

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


@torch.no_grad()
def accuracy(network: nn.Module, images: Images) -> float:
    """The share of images to whose class the network, in eval mode, gives the highest score."""
    right = sum(int((network(x).argmax(1) == y).sum()) for x, y in images.batches(SCORED_BATCH))
    return right / len(images)


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


def load(
    path: Path,
    split: Split = "train",
    shape: tuple[int, int, int] | None = None,
    mean: Sequence[float] = MEAN,
    deviation: Sequence[float] = DEVIATION,
) -> Images | None:
    """One split of a data set; None where it has no such split.

    shape: (channels, height, width) that the images are brought to: scaled until they cover it, then cropped in the
    middle; by default that of the first image, in colour. mean, deviation: one number, or one for each channel, by
    which values from 0 to 1 are normalised. Raises `DataError`, and `InvalidInputError` for numbers that do not fit.
    """
    images = _read(path, split, shape)
    return None if images is None else replace(images, mean=tuple(mean), deviation=tuple(deviation))


def _read(path: Path, split: Split, shape: tuple[int, int, int] | None) -> Images | None:
    if not path.exists():
        raise DataError(f"there is no data set at {path}")
    try:
        with _opened(path) as entries:
            names = [name for name in entries if not any(p.startswith(".") and p != "." for p in name.parts)]
            labels = _labels([name for name in names if name.suffix.lower() in IMAGE_SUFFIXES], split)
            pickled = {name for name in names if re.fullmatch(PICKLES[split], name.name)}
            wanted = pickled | {name for name in names if name.name == META} if pickled else set(labels)
            contents = {name: entries[name]() for name in names if name in wanted}
    except (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        # A RuntimeError is zipfile's for what is encrypted, or compressed in a way that it does not know.
        kinds = "" if path.is_dir() else " as a tar or zip archive"
        raise DataError(f"{path} cannot be read{kinds}: {type(error).__name__}: {error}") from error
    if pickled:
        return _from_pickles(path, contents, shape)
    if labels:
        return _from_pictures(path, sorted((labels[name], name, contents[name]) for name in labels), shape)
    if split == "test":
        return None
    raise DataError(
        f"{path} holds no training images in a known layout: expected train/CLASS/IMAGE, CLASS/IMAGE, or CIFAR-10's "
        "data_batch_1 to data_batch_5"
    )


def _labels(pictures: Sequence[PurePosixPath], split: Split) -> dict[PurePosixPath, str]:
    """The class of each picture of a split, by the folder that it is in."""
    parts = {name: tuple(part for part in name.parts if part not in (".", "/")) for name in pictures}
    while inside := {name: own for name, own in parts.items() if len(own) > 1}:  # others are beside all folders
        folders = {own[0] for own in inside.values()}
        named = _named_for_splits() & {folder.lower() for folder in folders}
        if named or len(folders) > 1 or min(map(len, inside.values())) == 2:
            break
        parts = {name: own[1:] for name, own in inside.items()}  # an enclosing folder
    tops = {own[0].lower() for own in parts.values() if len(own) > 2}
    groups = [group for group in FOLDERS[split] if tops & set(group)]
    if groups:
        return {name: own[1] for name, own in parts.items() if len(own) > 2 and own[0].lower() in groups[0]}
    if split == "test" or (tops and tops <= _named_for_splits()):
        return {}
    return {name: own[0] for name, own in parts.items() if len(own) > 1}


def _named_for_splits() -> set[str]:
    return {name for groups in FOLDERS.values() for group in groups for name in group}


@contextmanager
def _opened(path: Path) -> Iterator[Entries]:
    """The files of a data set."""
    if path.is_dir():
        yield dict(_in_directory(path))
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            yield {PurePosixPath(member.filename): partial(archive.read, member) for member in members}
    else:
        yield dict(_in_tar(path))


def _in_directory(path: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    seen: set[str] = set()
    for folder, below, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = [] if real in seen else sorted(below)
        for file in sorted(files) if real not in seen else ():
            own = Path(folder, file)
            yield PurePosixPath(own.relative_to(path).as_posix()), own.read_bytes
        seen.add(real)


def _in_tar(path: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    """An archive is one stream, which may be slow to decompress: what may be wanted is kept as it comes by."""
    with tarfile.open(path, "r:*", tarinfo=_Member) as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if (member.isfile() or member.islnk() or member.issym()) and _may_hold_images(name):
                content = _content(archive, member)
                yield name, partial(bytes, content)
        while archive.fileobj is not None and archive.fileobj.read(2**20):
            pass  # its check sum comes last


def _may_hold_images(name: PurePosixPath) -> bool:
    batch = any(re.fullmatch(pattern, name.name) for pattern in (*PICKLES.values(), META))
    return batch or name.suffix.lower() in IMAGE_SUFFIXES


class _Member(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the archive, without a word."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset:,}: {error}") from error


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        stream = archive.extractfile(member)
    except KeyError:
        stream = None
    if stream is None:
        raise tarfile.ReadError(f"{member.name} is a link to what is not in the archive")
    return stream.read()


NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric", "numpy")
NAMES = {("_codecs", "encode")} | {
    (module, name) for module in NUMPY for name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")
}


class _Unpickler(pickle.Unpickler):
    """Reads arrays and plain values only: a data set has no business naming any other class."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
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
            picture = _eight_bits(picture).convert("L" if channels == 1 else "RGB")
            if picture.size != (width, height):
                picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
        except Exception as error:  # whatever Pillow runs into on damaged data
            raise DataError(f"{path}: {name} is no image that can be read: {error}") from error
        if pixels is None:
            if len(pictures) * channels * height * width > MOST_BYTES:
                raise DataError(
                    f"{path}: {len(pictures):,} images of {channels}×{height}×{width} are more than fits in memory; "
                    "bring them to the size that the network takes (--size 3x224x224), or call elc_fx.compile with a "
                    "DataLoader of your own"
                )
            pixels = np.empty((len(pictures), channels, height, width), np.uint8)
        pixels[number] = np.asarray(picture).reshape(height, width, channels).transpose(2, 0, 1)
    labels = torch.tensor([classes.index(label) for label, _, _ in pictures])
    assert pixels is not None
    return Images(torch.from_numpy(pixels), labels, classes)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Pillow would cut larger numbers off, not scale them."""
    if picture.mode == "F":
        raise ValueError("its pixels are floating point numbers, of which nobody says what is white")
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    return Image.fromarray((values if values.max() < 256 else values >> 8).clip(0, 255).astype(np.uint8))


def _from_pickles(path: Path, contents: dict[PurePosixPath, bytes], shape: tuple[int, int, int] | None) -> Images:
    """Rows of 3072 bytes, one colour plane after the other."""
    if shape is not None and shape != (3, 32, 32):
        raise DataError(f"CIFAR's images are 3×32×32, and {'×'.join(map(str, shape))} is wanted")
    named: tuple[str, ...] = ()
    pixels, labels = [], []
    for name, content in sorted(contents.items()):
        try:
            found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
            if name.name == META:
                named = tuple(label.decode() for label in found[b"label_names"])
                continue
            rows, own = np.asarray(found[b"data"]), np.asarray(found[b"labels"])
            if rows.dtype != np.uint8 or rows.shape != (len(own), 3072) or not np.issubdtype(own.dtype, np.integer):
                raise ValueError(f"pixels {rows.dtype}{list(rows.shape)}, labels {own.dtype}{list(own.shape)}")
        except Exception as error:  # whatever unpickling runs into
            problem = f"{type(error).__name__}: {error}"
            raise DataError(f"{path}: {name} is no batch of CIFAR-10 that can be read: {problem}") from error
        pixels.append(rows)
        labels.append(own)
    joined = torch.from_numpy(np.concatenate(labels).astype(np.int64))
    if not joined.numel():
        raise DataError(f"{path} holds no images")
    classes = named or tuple(map(str, range(max(10, int(joined.max()) + 1))))
    if int(joined.min()) < 0 or int(joined.max()) >= len(classes):
        raise DataError(
            f"{path}: labels go from {joined.min()} to {joined.max()}, and there are {len(classes)} classes"
        )
    return Images(torch.from_numpy(np.concatenate(pixels).reshape(-1, 3, 32, 32)), joined, classes)
