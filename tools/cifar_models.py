"""The CIFAR networks of the weights in shared/data: ResNets with option-A shortcuts, and VGG-16 with batch norm.

ResNet: He et al., "Deep Residual Learning for Image Recognition" (2015), section 4.2. VGG: torchvision's `vgg16_bn`
feature keys, then one linear layer. A weight file says by its keys which network it is for.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

CLASSES = 10
VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def _convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters: [N, in, H, W] → [N, out, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _convolution(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: every stride-th pixel; half of the new channels, all zero, on either side."""
        if self.stride == 1:
            return x
        half = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet of 6·blocks + 2 layers for 32×32 images: three stages of `blocks` blocks, 16, 32 and 64 channels wide."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = _convolution(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def resnet20() -> ResNet:
    """For the command line: `cifar_models:resnet20`."""
    return ResNet(3)


def resnet56() -> ResNet:
    return ResNet(9)


def _stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, out_channels // in_channels)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


class VGG16(nn.Module):
    """VGG-16 with batch norm for 32×32 images: five stages, each halved by max pooling, and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for widths in VGG16_STAGES:
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def load(weights: Path) -> nn.Module:
    """The network that the weight file is for, in float32 and eval mode. Raises RuntimeError where keys do not fit."""
    state = {
        key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in load_file(weights).items()
    }
    first_stage = {key.split(".")[1] for key in state if key.startswith("layer1.")}
    with torch.device("meta"):
        model = ResNet(len(first_stage)) if first_stage else VGG16()
    counters = {
        key: torch.zeros((), dtype=torch.long) for key in model.state_dict() if key.endswith("num_batches_tracked")
    }
    model.load_state_dict(counters | state, assign=True)
    return model.eval()
