"""The merge of a decoupled network: with its gates closed, every region is an affine map, and becomes one convolution.

Nothing is approximated here: closed nodes are read as what they compute, and the same algebra that merges in the
lossless mode merges them. Inner padding is no obstacle any more, since it stands at the front of the region.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import fx

from elc_fx.affine import AffineMap, Geometry
from elc_fx.capturing.copying import clone
from elc_fx.capturing.graph import has_hooks, has_unknown_hooks, module_of, vanishes
from elc_fx.capturing.inputs import check_unwrapped
from elc_fx.compiled import REPORT, CompiledModule
from elc_fx.decoupling.decoupled import DecoupledModule
from elc_fx.decoupling.gates import decoupling_nodes
from elc_fx.decoupling.nodes import (
    DecoupledActivation,
    DecoupledConvolution,
    DecoupledPadding,
    DecoupledPooling,
    InteriorBatchNorm,
    RegionInput,
    RegionMarker,
    RegionOutput,
    RingPad,
)
from elc_fx.errors import GateNotClosedError, InvalidInputError, NotAffineError, Refusal, TrainingModeError, listed
from elc_fx.matching.chains import find_chains
from elc_fx.matching.interpret import Feature, Interpreter, Operation
from elc_fx.matching.regions import Chain, Merge, interpret, operations_of
from elc_fx.merging.fusion import Fusion
from elc_fx.merging.lossless import LAYERS, depth_of
from elc_fx.report import Report, Totals

KEEPS_CHANNELS = (RegionOutput, RingPad, DecoupledPadding)


@torch.inference_mode(False)  # what is made in that mode could not be trained
def merge(decoupled: DecoupledModule, *, verify: bool = True) -> fx.GraphModule:
    """A copy of a decoupled network in which every region of its plan is one convolution, its residual sum included.

    The merge is exact up to the rounding of the weights, borders included. Everything outside of the regions stays as
    it is; `elc_fx.compile` the result to fold what is left of batch norms there.

    Args:
        decoupled: what `decouple` returned, with all gates at 0, in eval mode.
        verify: compare each merged region with its layers, on random inputs in float64.

    Raises:
        GateNotClosedError: gates are open; the message lists them.
        TrainingModeError: the network is in training mode, in which its batch norms are not affine.
        InvalidInputError: the module was not returned by `decouple`, or has hooks.
        NotAffineError: a region was changed since, such as by hooks, or its numbers do not allow the merge.
        VerificationError: a merge does not compute what its layers compute.
    """
    check_unwrapped(decoupled)
    if not isinstance(decoupled, DecoupledModule):
        raise InvalidInputError(f"this {type(decoupled).__name__} was not returned by elc_fx.decouple")
    if has_hooks(decoupled):
        raise InvalidInputError("the network itself has hooks, which the merged one would not have; remove them")
    open_gates = {name: float(n.gate) for name, n in decoupling_nodes(decoupled).items() if float(n.gate) != 0}
    if open_gates:
        named = listed((f"`{name}` at {gate:g}" for name, gate in open_gates.items()), 8)
        raise GateNotClosedError(f"gates are open: {named}; close them with elc_fx.set_gate(module, 0)")
    if decoupled.training:
        raise TrainingModeError("the network is in training mode; call .eval() before it is merged")
    own = clone(decoupled, {})
    graph_module = fx.GraphModule(own, own.graph, type(decoupled).__name__)
    before = _counts(graph_module)
    fusion = _merge_regions(graph_module, verify)
    _erase_markers(graph_module)
    graph_module.delete_all_unused_submodules()
    merged = CompiledModule(graph_module, graph_module.graph, type(decoupled).__name__)
    merged.eval()
    merged.graph.lint()
    pairs = list(zip(before, _counts(merged), strict=True))
    totals = Totals(parameters=pairs[0], layers=pairs[1], depth=pairs[2])
    setattr(merged, REPORT, Report(tuple(fusion.merged), (), (), totals))
    return merged


def _counts(module: fx.GraphModule) -> tuple[int, int, int]:
    """Parameters, layers, depth."""
    layers = (*LAYERS, DecoupledConvolution)
    return (
        sum(p.numel() for p in module.parameters()),
        sum(isinstance(m, layers) for m in module.modules()),
        depth_of(module, layers=layers),
    )


def _merge_regions(graph_module: fx.GraphModule, verify: bool) -> Fusion:
    interpreter = ClosedInterpreter(graph_module)
    chains, _, refusals = find_chains(interpreter)
    whole = {chain.parts[-1].node: chain for chain in chains}
    fusion = Fusion(graph_module, verify)
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and isinstance(module := module_of(graph_module, node), RegionOutput):
            end = node.args[0]
            assert isinstance(end, fx.Node)
            fusion.apply(_merge_of(graph_module, module.candidate, end, whole, refusals))
    if fusion.refusals:
        raise NotAffineError(str(fusion.refusals[0]))
    return fusion


def _merge_of(
    graph_module: fx.GraphModule, name: str, end: fx.Node, chains: dict[fx.Node, Chain], refusals: list[Refusal]
) -> Merge:
    chain = chains.get(end)
    begins = chain is not None and chain.source.op == "call_module" and module_of(graph_module, chain.source)
    if chain is not None and isinstance(begins, RegionInput) and begins.candidate == name:
        layers = sum(op.convolves for op in operations_of(chain.parts))
        geometry = interpret(
            chain.parts, lambda op: op.geometry, lambda n: Geometry.identity(n, begins.dims), begins.channels
        )
        return Merge(chain.source, tuple(chain.parts), geometry, (0, 0, layers), (0, 0, 1), exact_size=False)
    reasons = "; ".join(str(refusal) for refusal in refusals[:3])
    raise NotAffineError(f"region `{name}` was changed after decouple and is not one affine map any more: {reasons}")


def _erase_markers(graph_module: fx.GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and isinstance(marker := module_of(graph_module, node), RegionMarker):
            if has_hooks(marker):
                raise NotAffineError(f"`{node.target}` has hooks, which the merged network would not have; remove them")
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph_module.graph.erase_node(node)


class ClosedInterpreter(Interpreter):
    """Reads decoupling nodes as what they compute with closed gates, while rings are computed."""

    trusting = True

    def _module(self, node: fx.Node) -> Operation | None:
        module, source = module_of(self.captured, node), node.args[0] if node.args else None
        if not isinstance(source, fx.Node):  # none of those that decouple inserts
            return super()._module(node)
        if has_unknown_hooks(module):
            self.refusals[node] = "it has hooks, which may change what it gives; remove them (prune.remove for pruning)"
            return None
        if isinstance(module, DecoupledConvolution):
            return self._closed_convolution(node, source, module)
        if isinstance(module, InteriorBatchNorm):
            return self._batch_norm_module(node, source, module, len(module.ring))
        if isinstance(module, DecoupledActivation):
            return self._closed_activation(node, source, module)
        identity = isinstance(module, DecoupledPadding) or vanishes(self.captured, node)
        if identity or isinstance(module, RingPad):
            if not self.features[source].is_known:
                return None
            settings = {"padding": module.change} if isinstance(module, RingPad) else {}
            return self._identity(node, source, **settings)
        return super()._module(node)

    def _declared(self, node: fx.Node) -> Feature:
        module = module_of(self.captured, node) if node.op == "call_module" else None
        return Feature(module.channels, module.dims) if isinstance(module, RegionInput) else super()._declared(node)

    def _passes_on(self, node: fx.Node) -> tuple[fx.Node, ...]:
        if node.op == "call_module" and isinstance(module_of(self.captured, node), KEEPS_CHANNELS):
            return tuple(node.all_input_nodes)
        return super()._passes_on(node)

    def _closed_convolution(self, node: fx.Node, source: fx.Node, module: DecoupledConvolution) -> Operation:
        on, bias = module.rings.on, module._parameters["bias"]
        return self._convolution(
            node,
            source,
            module.closed_weight,
            bias,
            stride=module.stride,
            padding=module.around_window(module.ring_padding if on else module.padding),
            dilation=module.dilation,
            groups=module.groups,
            padding_mode="zeros" if on or module.shrinks else module.mode,
            output_padding=None,
        )

    def _closed_activation(self, node: fx.Node, source: fx.Node, module: DecoupledActivation) -> Operation:
        slope, offset, dims = module.slope.detach(), module.offset.detach(), module.dims
        geometry = replace(Geometry.identity(len(slope), dims), bias=True)
        if isinstance(module, DecoupledPooling):
            geometry = replace(geometry, kernel_size=module.kernel_size, stride=module.stride)

        def load() -> AffineMap:
            kernel = (slope.double() / math.prod(geometry.kernel_size)).view(-1, 1, *[1] * dims)
            return AffineMap(geometry, kernel.expand(-1, 1, *geometry.kernel_size).contiguous(), offset.double())

        return Operation(node, source, geometry, load, slope.dtype, slope.device)
