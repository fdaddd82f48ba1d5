"""The backbone of a detector: torchvision's Faster R-CNN on MobileNetV3.

The weights are random and the images are noise. `compile` takes the whole detector: what cannot be traced, since its
code branches on the sizes of images, stays as it is. For a budget, the body of the backbone is decoupled by itself,
trained to give the feature maps that the original gives, for which no boxes are needed, and put back.
"""

import copy

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import elc_fx


def give_statistics(body: nn.Module, size: int) -> None:
    """Batch norms that have seen nothing let random weights fade away from layer to layer."""
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        body.train()(torch.randn(4, 3, size, size))
    body.eval()


def main(size: int = 320, steps: int = 20) -> None:
    torch.manual_seed(0)
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    detector = build(weights=None, weights_backbone=None, num_classes=5, min_size=size, max_size=size).eval()
    give_statistics(detector.backbone.body, size)
    exact = elc_fx.compile(detector)
    print(f"{len(elc_fx.report_of(exact).merged)} regions of the whole detector merge exactly\n")

    body, x = detector.backbone.body, torch.randn(1, 3, size, size)
    plan = elc_fx.plan(body, x, elc_fx.Budget(flops=0.8, depth=0.9), loss="uniform", progress=False)
    print(plan)
    decoupled = elc_fx.decouple(body, plan).train()
    schedule = elc_fx.GateSchedule(decoupled, total_steps=steps // 2)
    optimizer = torch.optim.AdamW(decoupled.parameters(), lr=1e-3)
    for _ in range(steps):
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            wanted = body(images)
        given = decoupled(images)
        loss = torch.stack([F.mse_loss(given[name], wanted[name]) for name in wanted]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    small = copy.deepcopy(detector)
    small.backbone.body = elc_fx.compile(elc_fx.merge(decoupled.eval()), x)
    boxes = small([torch.rand(3, size, size)])[0]["boxes"]
    print(f"\nthe detector runs: {len(boxes)} boxes\n")
    print(elc_fx.compare(body, small.backbone.body, x))


if __name__ == "__main__":
    main()
