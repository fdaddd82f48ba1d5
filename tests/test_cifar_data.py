"""tools/cifar_data.py reads a data set in every layout that CIFAR comes in, and tools/cifar_models.py its networks."""

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cifar_data
import cifar_models

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


def _check(images: cifar_data.Images) -> None:
    assert images.classes == CLASSES
    assert images.labels.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(images.pixels, torch.from_numpy(PIXELS).permute(0, 3, 1, 2), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["folders", "batches"])
def test_directory(layout: str, request: pytest.FixtureRequest) -> None:
    _check(cifar_data.load(request.getfixturevalue(layout)))


@pytest.mark.parametrize("layout", ["folders", "batches"])
@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz")])
@pytest.mark.parametrize("inside", [".", ""])
def test_archive(layout: str, suffix: str, mode: str, inside: str, request: pytest.FixtureRequest) -> None:
    _check(cifar_data.load(_archive(request.getfixturevalue(layout), suffix, mode, inside)))


def test_images_in_one_enclosing_folder(folders: Path) -> None:
    _check(cifar_data.load(_archive(folders, ".tar", "w", "cifar10")))


@pytest.mark.parametrize(("layout", "labels"), [("folders", [0]), ("batches", [0, 1])])
def test_training_images(layout: str, labels: list[int], request: pytest.FixtureRequest) -> None:
    assert cifar_data.load(request.getfixturevalue(layout), "train").labels.tolist() == labels


def test_batches_are_normalised_and_in_order(folders: Path) -> None:
    images = cifar_data.load(folders)
    pixels, labels = zip(*images.batches(3), strict=True)
    assert [len(batch) for batch in labels] == [3, 1]
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (cifar_data.MEAN, cifar_data.DEVIATION))
    torch.testing.assert_close(torch.cat(pixels) * deviation + mean, images.pixels / 255)


def test_sample_is_spread_over_the_classes(folders: Path) -> None:
    assert cifar_data.load(folders).sample(2).labels.tolist() == [0, 1]


def test_what_is_no_data_set_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data set at"):
        cifar_data.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="test/CLASS/IMAGE"):
        cifar_data.load(tmp_path)


def test_a_pickle_that_names_another_class_is_refused(tmp_path: Path) -> None:
    """A data set from elsewhere must not run code: pickle would call whatever it names."""
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Path("/")}))
    with pytest.raises(pickle.UnpicklingError, match="pathlib"):
        cifar_data.load(tmp_path)


@pytest.mark.parametrize("network", [cifar_models.ResNet(3), cifar_models.VGG16()])
def test_weights_say_which_network_they_are_for(network: torch.nn.Module, tmp_path: Path) -> None:
    """Half-precision weights are read as float32, and batch counters may be missing."""
    state = {key: value.half() for key, value in network.state_dict().items() if value.is_floating_point()}
    save_file(state, tmp_path / "weights.safetensors")
    loaded = cifar_models.load(tmp_path / "weights.safetensors")
    image = torch.rand(1, 3, 32, 32)
    assert not loaded.training
    torch.testing.assert_close(loaded(image), network.eval()(image), rtol=1e-2, atol=1e-2)
