"""torchvision's ResNet-18: each residual block becomes one 3×3 convolution, with gates that close during fine-tuning.

The weights are random and the images are noise, and few: this shows the calls and the costs, not what accuracy is kept.
With trained weights and images of your own, put your loader in the place of `noise`, let `elc_fx.plan` measure what
each region is worth, and train for some epochs.
"""

import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import elc_fx


def noise(samples: int, size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Batches (images, classes)."""
    images, classes = torch.randn(samples, 3, size, size), torch.randint(10, (samples,))
    return DataLoader(TensorDataset(images, classes), batch_size=8, shuffle=True)


def main(size: int = 224, samples: int = 16) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    x, loader = torch.randn(1, 3, size, size), noise(samples, size)

    blocks = [f"layer{stage}.{block}:3x3" for stage in (1, 2, 3, 4) for block in (0, 1)]
    plan = elc_fx.Plan.of(model, x, collapse=blocks)
    print(plan, end="\n\n")
    decoupled = elc_fx.decouple(model, plan, loader)
    elc_fx.finetune(decoupled, loader, teacher=model, epochs=2, gates=0.5, progress=False)
    small = elc_fx.compile(elc_fx.merge(decoupled), x)  # and folds the batch norms that are left
    print(elc_fx.compare(model, small, x))


if __name__ == "__main__":
    main()
