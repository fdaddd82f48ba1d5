"""A merged network runs in ExecuTorch with the XNNPACK backend, and computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import image
from torch import Tensor, nn

import cifar_models
import elc_fx

exir = pytest.importorskip("executorch.exir", exc_type=ImportError)  # also where it is built for another torch
partition = pytest.importorskip("executorch.backends.xnnpack.partition.xnnpack_partitioner", exc_type=ImportError)
runtime = pytest.importorskip("executorch.runtime", exc_type=ImportError)


@pytest.fixture
def merged() -> nn.Module:
    torch.manual_seed(0)
    return elc_fx.compile(cifar_models.ResNet(1).eval())


def run(program: torch.export.ExportedProgram, file: Path, *inputs: Tensor) -> list[Tensor]:
    """What the runtime computes for each of the inputs."""
    lowered = exir.to_edge_transform_and_lower(program, partitioner=[partition.XnnpackPartitioner()])
    assert any("executorch_call_delegate" in str(node.target) for node in lowered.exported_program().graph.nodes)
    lowered.to_executorch().save(str(file))
    method = runtime.Runtime.get().load_program(file).load_method("forward")
    return [method.execute([x])[0].clone() for x in inputs]


@torch.no_grad()
def test_executorch_computes_the_same(merged: nn.Module, tmp_path: Path) -> None:
    x = image(1, 3, 8, 8, dtype=torch.float32)
    (output,) = run(torch.export.export(merged, (x,)), tmp_path / "net.pte", x)
    torch.testing.assert_close(output, merged(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_executorch_takes_several_batches(merged: nn.Module, tmp_path: Path) -> None:
    inputs = [image(n, 3, 8, 8, dtype=torch.float32) for n in (1, 2, 8)]
    batch = torch.export.Dim("batch", max=8)
    program = torch.export.export(merged, (inputs[-1],), dynamic_shapes=({0: batch},))
    for x, output in zip(inputs, run(program, tmp_path / "net.pte", *inputs), strict=True):
        torch.testing.assert_close(output, merged(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_executorch_computes_in_int8_after_merging(merged: nn.Module, tmp_path: Path) -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    xnnpack = pytest.importorskip("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    x = image(1, 3, 8, 8, dtype=torch.float32)
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    program = torch.export.export(merged, (x,))
    prepared = pt2e.prepare_pt2e(program.module(), xnnpack.XNNPACKQuantizer().set_global(config))
    prepared(x)
    int8 = pt2e.convert_pt2e(prepared)
    (output,) = run(torch.export.export(int8, (x,)), tmp_path / "int8.pte", x)
    run(program, tmp_path / "float32.pte", x)
    torch.testing.assert_close(output, merged(x), rtol=0, atol=0.1 * merged(x).abs().max().item())
    assert (tmp_path / "int8.pte").stat().st_size < 0.5 * (tmp_path / "float32.pte").stat().st_size
