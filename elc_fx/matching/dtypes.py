"""Which type the numbers of each value have, whatever the input is: a scale that changes it is no affine map.

Layers, conversions and example inputs settle it, and nearly all that torch computes keeps it: what does not is named
here, and tests/test_dtypes.py asks all functions that torch's own tests have samples for whether it is complete.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from elc_fx.capturing.capture import assign
from elc_fx.capturing.graph import (
    IN_PLACE_OPERATORS,
    SPLITS,
    allocates,
    attribute_of,
    function_name,
    has_unknown_hooks,
    is_leaf,
    may_be_view,
    module_of,
    package_of,
)
from elc_fx.matching.constants import Constants


class Sort(enum.Enum):
    """What is known of a type that the input settles."""

    INEXACT = "floating-point or complex"  # a number does not change it, a tensor may
    EXACT = "of integers or booleans, or no tensor"  # what is computed with it keeps its own type, if that is inexact


DType = torch.dtype | Sort

CONVERSIONS: dict[str, DType] = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    **dict.fromkeys(("bool", "byte", "char", "short", "int", "long", "item", "tolist"), Sort.EXACT),
}
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # which take other types, too
WEIGHTED = (  # which give the type of their weights
    *(nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.PReLU),
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)
HOMES = ("torch", "torch.functional", "torch.nn.functional", "torch._ops.aten", "_operator")
# Of functions and methods that give other types than they take.
EXACT = frozenset(
    (
        *("lt", "le", "eq", "ne", "ge", "gt", "less", "less_equal", "greater", "greater_equal", "not_equal", "equal"),
        *("all", "any", "allclose", "isclose", "isin", "isfinite", "isinf", "isnan", "isneginf", "isposinf", "isreal"),
        *("argmax", "argmin", "argsort", "argwhere", "nonzero", "nonzero_static", "signbit", "not", "indices"),
        *("logical_and", "logical_or", "logical_xor", "logical_not", "bucketize", "searchsorted", "count_nonzero"),
        *("multinomial", "linalg_matrix_rank", "hash_tensor"),
        # And what gives Python's numbers.
        *("nelement", "ndimension", "stride", "storage_offset", "element_size", "get_device", "data_ptr", "has_names"),
        *("dim", "numel", "numpy", "storage", "untyped_storage", "const_data_ptr", "mutable_data_ptr"),
        *("dense_dim", "sparse_dim", "q_scale", "q_zero_point", "qscheme", "storage_type", "dim_order"),
    )
)
OTHERWISE = frozenset(  # inexact, but not of the same type
    (
        *("complex", "polar", "view_as_complex", "stft", "float_power", "linalg_eig", "linalg_eigvals"),
        *("cfloat", "cdouble", "chalf"),
    )
)
JOINS = ("add", "mul", "iadd", "imul")  # of tuples, too
SEPARATE = frozenset(  # tuples of what has a type of its own each
    ("broadcast_tensors", "meshgrid", "align_tensors", "atleast_1d", "atleast_2d", "atleast_3d")
)
OF_THE_FIRST = frozenset(  # the type is that of the first argument
    (
        *("view_as", "reshape_as", "expand_as", "masked_fill", "masked_scatter", "index_select"),
        *("gather", "take", "take_along_dim", "scatter", "scatter_add", "index_add", "index_copy", "index_fill"),
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "batch_norm", "instance_norm", "group_norm"),
        *("layer_norm", "rms_norm", "index_put", "masked_select", "repeat_interleave"),
    )
)
ALIKE = frozenset(  # all that is computed with has one type
    (
        *("linear", "bilinear", "embedding", "matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "einsum", "tensordot"),
        *("scaled_dot_product_attention", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))),
    )
)
INEXACT: dict[str, DType] = dict.fromkeys(  # whatever the input is
    (
        *("div", "truediv", "divide", "true_divide", "sigmoid", "tanh", "exp", "sqrt", "rsqrt", "reciprocal"),
        *("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm", "softmax", "log_softmax"),
    ),
    Sort.INEXACT,
)
OF_THE_VALUE = frozenset(("T", "mT", "H", "mH", "data", "values", "dtype"))  # attributes that have, or are, its type
NUMBERS: dict[str, DType] = dict.fromkeys(
    ("shape", "ndim", "device", "indices", "layout", "requires_grad", "is_cuda", "itemsize"), Sort.EXACT
)


def sort_of(dtype: torch.dtype) -> DType:
    return dtype if dtype.is_floating_point or dtype.is_complex else Sort.EXACT


def settled_dtypes(
    captured: fx.GraphModule,
    constants: Constants,
    sizes: Container[fx.Node],
    recorded: Mapping[fx.Node, torch.dtype],
) -> dict[fx.Node, DType]:
    """Of each value whose type is known. sizes: numbers that are computed from sizes. recorded: by the examples."""
    reader = _Reader(captured, constants)
    for node in captured.graph.nodes:
        exact = Sort.EXACT if node in sizes else None
        dtype = sort_of(recorded[node]) if node in recorded else exact or reader.read(node)
        if dtype is not None:
            reader.found[node] = dtype
        if reader.are_alike(node):
            reader.alike.add(node)
    return reader.found


class _Reader:
    """Reads the type of one node after the other."""

    def __init__(self, captured: fx.GraphModule, constants: Constants) -> None:
        self.captured, self.constants = captured, constants
        self.found: dict[fx.Node, DType] = {}
        self.alike: set[fx.Node] = set()

    def read(self, node: fx.Node) -> DType | None:
        if node.op == "get_attr":
            value = attribute_of(self.captured, node)
            return sort_of(value.dtype) if isinstance(value, Tensor) else None
        if node.op == "call_module":
            return self._module(node, module_of(self.captured, node))
        if node.target is getattr:
            attribute = str(node.args[1])
            return self.found.get(node.all_input_nodes[0]) if attribute in OF_THE_VALUE else NUMBERS.get(attribute)
        if node.op == "call_method" or (node.op == "call_function" and _is_documented(node)):
            return self._function(node, function_name(node).partition(".")[0])
        return None

    def _module(self, node: fx.Node, module: nn.Module) -> DType | None:
        torchs = str(type(module).forward.__module__).startswith("torch.nn.")  # quantised ones compute otherwise
        if has_unknown_hooks(module) or not is_leaf(module) or not torchs:
            return None
        operands = self._operands(node.all_input_nodes)
        if isinstance(module, NORMS):
            return _promoted(operands) or Sort.INEXACT
        if not isinstance(module, WEIGHTED):
            return _promoted(operands)
        lists: Any = getattr(module, "parametrizations", {})
        own = (made for made in lists.values() if any(not _is_torchs(part) for part in made))
        if any(made.unsafe for made in own):  # which may give another type
            return None
        weights = (sort_of(parameter.dtype) for parameter in module.parameters())
        return next((dtype for dtype in weights if dtype is not Sort.EXACT), None)

    def _function(self, node: fx.Node, called: str) -> DType | None:
        name, inputs = called.strip("_") or called, node.all_input_nodes
        given = node.args[0] if node.args else node.kwargs.get("input")
        first = self.found.get(given) if isinstance(given, fx.Node) else None
        if isinstance(out := node.kwargs.get("out"), fx.Node):
            return self.found.get(out)
        in_place = called.endswith("_") and not called.endswith("__") and not hasattr(operator, called)  # as not_ is
        if in_place or called in IN_PLACE_OPERATORS or node.target is assign:
            return None if first is Sort.EXACT else first  # a number may be added to
        if name in EXACT or name.startswith("is_"):
            return Sort.EXACT
        if asked := self._asked(node):
            return asked[0]
        if name in CONVERSIONS:
            return CONVERSIONS[name]
        if name in ("to", "type_as"):  # of another tensor, or on another device
            tensors = [source for source in inputs if source.target not in (getattr, "get_device")]
            return self.found.get(tensors[-1]) if tensors else None
        if name == "getitem":
            return self._item(node)
        if name in OF_THE_FIRST:
            return first or INEXACT.get(name)
        if name == "type" or any(isinstance(argument, complex) for argument in node.args):
            return None
        if name == "where":  # its condition has no part in it
            position = int(node.op == "call_method")
            condition = node.kwargs.get("condition", node.args[position] if len(node.args) > position else None)
            inputs = [source for source in inputs if source is not condition]
        operands = self._operands(inputs)
        known = [dtype for dtype in operands if isinstance(dtype, torch.dtype)]
        dtype = known[0] if known and name in ALIKE else _promoted(operands)
        if isinstance(dtype, torch.dtype) and (dtype.is_complex or name in OTHERWISE or name.startswith("fft_")):
            return dtype if name in ALIKE else Sort.INEXACT
        return dtype or (None if node.kwargs.get("rounding_mode") else INEXACT.get(name))

    def _asked(self, node: fx.Node) -> list[DType | None]:
        """The type that an argument names."""
        asked: list[DType | None] = []
        for argument in (*node.args, *node.kwargs.values()):
            if isinstance(argument, torch.dtype):
                asked.append(sort_of(argument))
            elif isinstance(argument, fx.Node) and argument.target is getattr and argument.args[1] == "dtype":
                asked.append(self.found.get(argument))
        return asked

    def _item(self, node: fx.Node) -> DType | None:
        """Of a tuple, the first item at least has the type that is known."""
        source, index = node.all_input_nodes[0], node.args[1]
        whole = isinstance(index, tuple | type(...))  # no index of a tuple
        first = type(index) is int and index == 0 and function_name(source) not in SEPARATE
        known = source in self.alike or whole or first
        return self.found.get(source) if known else None

    def are_alike(self, node: fx.Node) -> bool:
        """Whether a value is known to be one tensor, or several of one type."""
        if node.op == "call_module":
            module = module_of(self.captured, node)
            return is_leaf(module) and not getattr(module, "return_indices", False)
        name = function_name(node).removesuffix("_")
        if name in ("getitem", *JOINS):  # of tensors, or of tuples
            return node.all_input_nodes[0] in self.alike
        if name in SEPARATE or "max_pool" in name:  # which may give indices
            return False
        return name in SPLITS or allocates(self.captured, node) or may_be_view(node)

    def _operands(self, sources: Iterable[fx.Node]) -> list[DType | None]:
        """The types of what is computed with each other; numbers, and tensors of no axes, have no part in it."""
        operands: list[DType | None] = []
        for source in sources:
            value = self.constants.value(source)
            if value is None:
                operands.append(self.found.get(source))
            elif isinstance(value, complex):
                operands.append(Sort.INEXACT)
            elif isinstance(value, Tensor) and (value.dim() or value.is_complex()):
                operands.append(sort_of(value.dtype))
        return operands


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _is_documented(node: fx.Node) -> bool:
    """Whether a function is one of torch's own operations, or an operator: not what calls code of others."""
    home = getattr(node.target, "__module__", None) or package_of(node)
    return node.target is assign or home in HOMES or str(home).startswith("torch._C")


def _promoted(operands: Iterable[DType | None]) -> DType | None:
    """The type of what is computed of values of these: theirs if it is one, inexact if one of them is."""
    kinds = {dtype for dtype in operands if dtype is not Sort.EXACT}
    if len(kinds) == 1:
        return kinds.pop()
    return Sort.INEXACT if kinds - {None} else None
