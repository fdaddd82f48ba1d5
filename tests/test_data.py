"""Data sets in every layout, damaged ones, and the networks of tools/cifar_models.py."""

import itertools
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cifar_models
from elc_fx.errors import DataError
from elc_fx.training import data

CLASSES = ("cat", "dog")
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)  # two cats, then two dogs


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """test/cat/0.png … test/dog/3.png, and a training image that must not be read."""
    root = tmp_path / "folders"
    for index, pixels in enumerate(PIXELS):
        file = root / "test" / CLASSES[index // 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    (root / "train" / "cat").mkdir(parents=True)
    Image.fromarray(PIXELS[0]).save(root / "train" / "cat" / "0.png")
    return root


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    """cifar-10-batches-py as the original archive unpacks, pickled by the old protocol."""
    root = tmp_path / "batches" / "cifar-10-batches-py"
    root.mkdir(parents=True)
    rows = PIXELS.transpose(0, 3, 1, 2).reshape(4, -1)
    _pickle(root / "test_batch", {b"data": rows, b"labels": [0, 0, 1, 1]})
    _pickle(root / "data_batch_1", {b"data": rows[:1], b"labels": [0]})
    _pickle(root / "data_batch_2", {b"data": rows[3:], b"labels": [1]})
    _pickle(root / "batches.meta", {b"label_names": [name.encode() for name in CLASSES]})
    return root.parent


def _pickle(file: Path, content: object) -> None:
    file.write_bytes(pickle.dumps(content, protocol=2))


def _archive(root: Path, suffix: str, mode: str, inside: str) -> Path:
    path = root.with_suffix(suffix)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.add(root, arcname=inside)
    return path


def loaded(path: Path, split: data.Split = "test") -> data.Images:
    images = data.load(path, split)
    assert images is not None
    return images


def _check(images: data.Images) -> None:
    assert images.classes == CLASSES
    assert images.labels.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(images.pixels, torch.from_numpy(PIXELS).permute(0, 3, 1, 2), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["folders", "batches"])
def test_directory(layout: str, request: pytest.FixtureRequest) -> None:
    _check(loaded(request.getfixturevalue(layout)))


@pytest.mark.parametrize("layout", ["folders", "batches"])
@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz")])
@pytest.mark.parametrize("inside", [".", ""])
def test_archive(layout: str, suffix: str, mode: str, inside: str, request: pytest.FixtureRequest) -> None:
    _check(loaded(_archive(request.getfixturevalue(layout), suffix, mode, inside)))


def test_images_in_one_enclosing_folder(folders: Path) -> None:
    _check(loaded(_archive(folders, ".tar", "w", "cifar10")))


@pytest.mark.parametrize(("layout", "labels"), [("folders", [0]), ("batches", [0, 1])])
def test_training_images(layout: str, labels: list[int], request: pytest.FixtureRequest) -> None:
    assert loaded(request.getfixturevalue(layout), "train").labels.tolist() == labels


def test_batches_are_normalised_and_in_order(folders: Path) -> None:
    images = loaded(folders)
    pixels, labels = zip(*images.batches(3), strict=True)
    assert [len(batch) for batch in labels] == [3, 1]
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (data.MEAN, data.DEVIATION))
    torch.testing.assert_close(torch.cat(pixels) * deviation + mean, images.pixels / 255)


def test_sample_is_spread_over_the_classes(folders: Path) -> None:
    assert loaded(folders).sample(2).labels.tolist() == [0, 1]


def test_what_is_no_data_set_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set at"):
        data.load(tmp_path / "missing")
    with pytest.raises(DataError, match="train/CLASS/IMAGE"):
        data.load(tmp_path)
    assert data.load(tmp_path, "test") is None


def test_classes_at_the_top_are_all_for_training(folders: Path) -> None:
    _check(loaded(folders / "test", "train"))
    assert data.load(folders / "test", "test") is None


def test_images_of_other_sizes_are_brought_to_one(folders: Path) -> None:
    Image.new("L", (50, 20)).save(folders / "test" / "dog" / "wide.png")
    assert loaded(folders).pixels.shape == (5, 3, 32, 32)
    small = data.load(folders, "test", (1, 8, 12))
    assert small is not None and small.pixels.shape == (5, 1, 8, 12) and small.inputs().shape == (5, 1, 8, 12)


def test_a_damaged_image_is_named(folders: Path) -> None:
    (folders / "test" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cat/0\.png"):
        data.load(folders, "test")


def test_a_damaged_archive_is_told(folders: Path) -> None:
    archive = _archive(folders, ".tar.gz", "w:gz", "")
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(DataError, match="cannot be read"):
        data.load(archive, "test")


def test_the_split_is_the_same_each_time_and_holds_all() -> None:
    images = data.Images(torch.arange(40).view(10, 1, 2, 2).byte(), torch.arange(10), tuple("abcdefghij"))
    (kept, held), (again, _) = images.split(0.3), images.split(0.3)
    assert torch.equal(kept.labels, again.labels) and len(held) == 3
    assert sorted([*kept.labels.tolist(), *held.labels.tolist()]) == list(range(10))


def test_training_images_are_shifted_and_mirrored() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(64, -1, -1, -1)
    images = data.Images(pixels, torch.zeros(64, dtype=torch.int64), ("a",), mean=(0.0,), deviation=(1 / 255,))
    torch.manual_seed(0)
    batch, _ = next(iter(images.loader(64)))
    padded = torch.nn.functional.pad(pixels[:1].float(), (2, 2, 2, 2))
    windows = padded.unfold(2, 16, 1).unfold(3, 16, 1).reshape(25, 1, 16, 16)
    possible = torch.cat([windows, windows.flip(3)])
    matches = (batch[:, None] - possible[None]).abs().amax((2, 3, 4)) < 1e-3
    assert matches.sum(1).eq(1).all() and matches.any(0).sum() > 25


def test_a_pickle_that_names_another_class_is_refused(tmp_path: Path) -> None:
    """A data set from elsewhere must not run code: pickle would call whatever it names."""
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Path("/")}))
    with pytest.raises(DataError, match="pathlib"):
        data.load(tmp_path, "test")


@pytest.mark.parametrize("network", [cifar_models.ResNet(3), cifar_models.VGG16()])
def test_weights_say_which_network_they_are_for(network: torch.nn.Module, tmp_path: Path) -> None:
    """Half-precision weights are read as float32, and batch counters may be missing."""
    state = {key: value.half() for key, value in network.state_dict().items() if value.is_floating_point()}
    save_file(state, tmp_path / "weights.safetensors")
    loaded = cifar_models.load(tmp_path / "weights.safetensors")
    image = torch.rand(1, 3, 32, 32)
    assert not loaded.training
    torch.testing.assert_close(loaded(image), network.eval()(image), rtol=1e-2, atol=1e-2)


# Found by a fresh view: what was read wrongly without a word, or failed with an error of something else.


def _pictures(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[0]).save(root / name)
    return root


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (("Train/a/0.png", "Train/b/1.png", "Test/a/2.png", "Test/b/3.png"), ["a", "b"], ["a", "b"]),
        (("training/a/0.png", "testing/b/1.png"), ["a"], ["b"]),
        (("train/a/0.png", "valid/b/1.png"), ["a"], ["b"]),
        (("train/a/0.png", "val/b/1.png", "test/c/2.png"), ["a"], ["c"]),
        (("cats/2019/0.png", "dogs/2019/1.png"), ["cats", "dogs"], None),
        (("train/cats/more/0.png", "train/dogs/1.png"), ["cats", "dogs"], None),
        (("pass/0.png", "test/1.png"), ["pass", "test"], None),
        (("enclosing/train/a/0.png", "enclosing/test/b/1.png"), ["a"], ["b"]),
        (("enclosing/train/a/0.png", "enclosing/test/b/1.png", "logo.png"), ["a"], ["b"]),
        (("enclosing/a/0.png", "enclosing/b/1.png", "logo.png"), ["a", "b"], None),
        (("a/0.png", "a/more/1.png"), ["a"], None),
        (("a/0.tif", "b/1.gif", ".ipynb_checkpoints/2.png", "b/._1.png"), ["a", "b"], None),
    ],
)
def test_layouts(names: tuple[str, ...], train: list[str], test: list[str] | None, tmp_path: Path) -> None:
    root = _pictures(tmp_path / "root", *names)
    assert list(loaded(root, "train").classes) == train
    found = data.load(root, "test")
    assert (None if found is None else list(found.classes)) == test


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    elsewhere = _pictures(tmp_path / "elsewhere", "0.png")
    root = _pictures(tmp_path / "root", "a/0.png")
    (root / "b").symlink_to(elsewhere)
    (root / "a" / "around").symlink_to(root)
    assert list(loaded(root, "train").classes) == ["a", "b"]


def test_zip(folders: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", folders)
    _check(loaded(Path(archive)))


@pytest.mark.parametrize("changed", [{8: 1}, {10: 99}], ids=["encrypted", "unknown compression"])
def test_a_zip_that_python_cannot_read_is_told(changed: dict[int, int], folders: Path, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", folders))
    content = bytearray(archive.read_bytes())
    headers = [found.start() for found in re.finditer(rb"PK\x01\x02", content)]
    for header, (place, byte) in itertools.product(headers, changed.items()):
        content[header + place] = byte
    archive.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as a tar or zip archive"):
        data.load(archive)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
def test_a_cut_or_changed_archive_is_never_a_smaller_data_set(suffix: str, folders: Path) -> None:
    whole = _archive(folders, suffix, f"w:{suffix[5:]}", ".")
    content = bytearray(whole.read_bytes())
    with tarfile.open(whole) as archive:
        headers = [member.offset for member in archive.getmembers()]
    damaged = whole.with_name(f"damaged{suffix}")
    for position in (
        headers[1:] if suffix == ".tar" else range(100, len(content), len(content) // 20)
    ):  # behind its own header
        damaged.write_bytes(content[:position])
        with pytest.raises(DataError):
            data.load(damaged)
        changed = bytearray(content)
        changed[position + 150 if suffix == ".tar" else position] ^= 0xFF  # in the check sum of a header
        damaged.write_bytes(changed)
        with pytest.raises(DataError):
            data.load(damaged)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a" / "0.png")
    assert loaded(tmp_path, "train").pixels[0, 0].tolist() == (values >> 8).tolist()


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy.f2py.__main__\nndarray\n.",
        pickle.dumps({b"data": np.zeros((3, 3072), np.uint8), b"labels": [0, 1]}, 2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1, 1]}, 2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, -1]}, 2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 7]}, 2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0.5, 1.0]}, 2),
        pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, 2),
        pickle.dumps([1], 2),
    ],
)
def test_what_no_batch_of_cifar_holds(content: bytes, batches: Path) -> None:
    (batches / "cifar-10-batches-py" / "data_batch_1").write_bytes(content)
    with pytest.raises(DataError):
        data.load(batches)


def test_batches_without_images(batches: Path) -> None:
    inside = batches / "cifar-10-batches-py"
    for name in ("batches.meta", "data_batch_2"):
        (inside / name).unlink()
    content = {b"data": np.zeros((0, 3072), np.uint8), b"labels": np.zeros(0, int)}
    (inside / "data_batch_1").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match="holds no images"):
        data.load(batches)


def test_notes_beside_batches_are_no_batch(batches: Path) -> None:
    (batches / "cifar-10-batches-py" / "data_batch_notes.txt").write_text("notes")
    assert len(loaded(batches, "train")) == 2


def test_an_archive_is_decompressed_once(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = _archive(folders, ".tar.xz", "w:xz", "."), []
    original = tarfile.open

    def note(*args: object, **options: object) -> tarfile.TarFile:
        opened.append(args)
        return original(*args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(tarfile, "open", note)
    assert len(loaded(path)) == 4 and len(opened) == 1
