"""The models of torchvision and timm, built offline, with statistics and parameters in which a wrong merge would show.

A freshly initialised network hides mistakes: its batch norms have mean 0, variance 1, weight 1 and bias 0, so that a
merge may ignore them altogether. `unsettle` gives a model the parameters of a network that has seen data: no constants
are left, batch-norm statistics lie near those of the activations but not on them, and nothing vanishes or explodes.
"""

import copy
import fnmatch
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

Arguments = tuple[Any, ...]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
QUIET_KEYWORDS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}
PUBLISHED_FROZEN = {
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
}


@dataclass(frozen=True)
class Family:
    """Models that are called in one way.

    arguments(batch, size) gives random arguments. The sizes are tried in order until a model accepts one; `batch` is
    how many samples its statistics are taken from.
    """

    name: str
    models: Callable[[str], list[str]]
    build: Callable[[str], nn.Module]
    arguments: Callable[[int, tuple[int, ...]], Arguments]
    sizes: tuple[tuple[int, ...], ...]
    batch: int


def _images(batch: int, size: tuple[int, ...]) -> Arguments:
    return (torch.randn(batch, 3, *size),)


def _image_list(batch: int, size: tuple[int, ...]) -> Arguments:
    return ([torch.rand(3, *size) for _ in range(batch)],)


def _image_pairs(batch: int, size: tuple[int, ...]) -> Arguments:
    """Two images and one refinement of the flow: with random weights, twelve in a row are chaotic, in float64 too."""
    return (torch.rand(batch, 3, *size) * 2 - 1, torch.rand(batch, 3, *size) * 2 - 1, 1)


def _torchvision_models(module: Any) -> Callable[[str], list[str]]:
    return lambda pattern: fnmatch.filter(torchvision.models.list_models(module=module), pattern)


def _torchvision_model(name: str, **keywords: Any) -> nn.Module:
    model: nn.Module = torchvision.models.get_model(name, weights=None, **keywords)
    return model


def _classifier(name: str) -> nn.Module:
    return _torchvision_model(name, **QUIET_KEYWORDS.get(name, {}))


def _segmenter(name: str) -> nn.Module:
    return _torchvision_model(name, weights_backbone=None)


def _detector(name: str) -> nn.Module:
    """Small images, few boxes, and no score threshold: with random weights, it would leave nothing to compare."""
    if "rcnn" in name:
        limits: dict[str, Any] = {"box_score_thresh": 0, "box_detections_per_img": 20, "rpn_post_nms_top_n_test": 100}
    else:
        limits = {"score_thresh": 0, "detections_per_img": 20, "topk_candidates": 100}
    resize = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 192}
    return _torchvision_model(name, weights_backbone=None, **limits, **resize)


def _timm_models(pattern: str) -> list[str]:
    import timm  # optional: only the sweeps that ask for it need it

    return list(timm.list_models(pattern))


def _timm_model(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


IMAGE_SIZES = tuple((side, side) for side in (64, 96, 128, 224, 256, 288, 384, 448))
CLIP_SIZES = ((8, 64, 64), (16, 64, 64), (16, 224, 224))

CLASSIFICATION = Family("classification", _torchvision_models(torchvision.models), _classifier, _images, IMAGE_SIZES, 8)
DETECTION = Family(
    "detection", _torchvision_models(torchvision.models.detection), _detector, _image_list, ((128, 160),), 2
)
SEGMENTATION = Family(
    "segmentation", _torchvision_models(torchvision.models.segmentation), _segmenter, _images, IMAGE_SIZES, 4
)
VIDEO = Family("video", _torchvision_models(torchvision.models.video), _torchvision_model, _images, CLIP_SIZES, 2)
OPTICAL_FLOW = Family(
    "optical_flow",
    _torchvision_models(torchvision.models.optical_flow),
    _torchvision_model,
    _image_pairs,
    ((128, 128),),
    2,
)
TIMM = Family("timm", _timm_models, _timm_model, _images, IMAGE_SIZES, 8)

TORCHVISION = (CLASSIFICATION, SEGMENTATION, DETECTION, VIDEO, OPTICAL_FLOW)


def family_of(name: str) -> Family:
    """The torchvision family that holds the model. Raises KeyError for a name that none holds."""
    for family in TORCHVISION:
        if family.models(name):
            return family
    raise KeyError(f"torchvision has no model `{name}`")


def build(family: Family, name: str) -> nn.Module:
    """The model in eval mode, without downloads and without the warnings about slow initialisation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return family.build(name).eval()


def accepted_size(model: nn.Module, family: Family) -> tuple[int, ...]:
    """The first of the family's sizes that the model runs on. Raises the model's own error where it takes none."""
    for size in family.sizes[:-1]:
        try:
            call(model, family.arguments(1, size))
        except (RuntimeError, ValueError, AssertionError, IndexError):
            continue
        return size
    call(model, family.arguments(1, family.sizes[-1]))
    return family.sizes[-1]


def call(model: nn.Module, arguments: Arguments) -> Any:
    """The model's output, without gradients. The arguments are copied first: some detectors write into their images."""
    with torch.no_grad():
        return model(*copy.deepcopy(arguments))


def unsettle(model: nn.Module, arguments: Arguments) -> None:
    """Gives a fresh model, in place, the parameters and statistics of a network that has seen data.

    The arguments are the sample batch. Every constant parameter becomes random. One forward pass then scales each
    convolution and linear layer to unit output variance and takes batch statistics, which are moved by a random fifth.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.min() == parameter.max():
                _randomise_constant(parameter)
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
        with _taking_statistics(norms), _scaling_layers(model):
            call(model, arguments)
        for norm in norms:
            _perturb_statistics(norm)


def freeze_as_published(name: str, model: nn.Module) -> None:
    """Torchvision freezes the batch norms of some detectors, but not of those that it builds without weights."""
    if name not in PUBLISHED_FROZEN:
        return
    parents = [parent for parent in model.modules() if not isinstance(parent, _BatchNorm)]
    for parent in parents:
        for child_name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features, child.eps)
                frozen.load_state_dict(child.state_dict())
                setattr(parent, child_name, frozen.eval())


def _randomise_constant(parameter: nn.Parameter) -> None:
    """0 becomes 0.3 ± 0.2, another constant is spread over 0.2 to 0.8 of itself: as in trained batch norms.

    Weights around 1 and biases around 0 would make a deep network chaotic: it then amplifies float32's rounding beyond
    any tolerance. LayerScale's tiny start counts as 1, because it would hide its whole branch.
    """
    constant = parameter.flatten()[0].item()
    if constant == 0:
        parameter.normal_(0.3, 0.2)
    else:
        parameter.uniform_(0.2, 0.8).mul_(constant if abs(constant) > 1e-3 else 1.0)


@contextmanager
def _taking_statistics(norms: list[_BatchNorm]) -> Iterator[None]:
    """Batch norms normalise by the batch and average its statistics; the rest of the model stays in eval."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    yield
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@contextmanager
def _scaling_layers(model: nn.Module) -> Iterator[None]:
    """At its first call, each convolution and linear layer is scaled so that its output has unit variance."""
    scaled: set[nn.Module] = set()

    def scale(module: nn.Module, arguments: Arguments, output: Tensor) -> Tensor:
        deviation = output.std() if output.numel() > 1 else torch.zeros(())
        if module in scaled or not torch.isfinite(deviation) or deviation == 0:
            return output
        scaled.add(module)
        module.get_parameter("weight").div_(deviation)
        result: Tensor = module.forward(*arguments)
        return result

    layers = [module for module in model.modules() if isinstance(module, (*CONVOLUTIONS, nn.Linear))]
    handles = [layer.register_forward_hook(scale) for layer in layers]
    yield
    for handle in handles:
        handle.remove()


def _perturb_statistics(norm: _BatchNorm) -> None:
    """Means move by a fifth of the deviation, variances by a fifth; the floor keeps a dead channel from exploding."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None, "only norms that track statistics come here"
    assert variance is not None
    mean.add_(0.2 * torch.randn_like(mean) * variance.sqrt())
    variance.mul_(torch.empty_like(variance).uniform_(0.8, 1.25)).add_(0.05 * variance.mean())
