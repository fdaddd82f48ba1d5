"""Finding the chains and joins of a graph: its series-parallel structure, read off in one pass."""

from __future__ import annotations

from collections.abc import Set

import torch
from networkx.utils import UnionFind
from torch import fx

from elc_fx.affine import AffineMap, Geometry
from elc_fx.capturing.graph import (
    allocates,
    function_name,
    has_hooks,
    label,
    module_of,
    overwritten_argument,
    runs_foreign_code,
    signature_of,
    tuples,
)
from elc_fx.errors import Refusal
from elc_fx.matching.interpret import CPU, Feature, Interpreter, Operation, Term
from elc_fx.matching.regions import Branch, Chain, Join, nodes_of

DEEPEST_NESTING = 24  # joins inside each other that are planned as one


def find_chains(interpreter: Interpreter) -> tuple[list[Chain], list[Join], list[Refusal]]:
    """The maximal chains of a graph, the joins of several sources, and why other places are neither."""
    finder = _Finder(interpreter)
    for node in interpreter.captured.graph.nodes:
        finder.visit(node)
    finder.explain_forks()
    return list(finder.chains.values()), list(finder.mixed.values()), finder.refusals


class _Finder:
    """One pass over the graph: chains grow at their end, and move into the join that reads them."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.graph_module = interpreter.captured
        nodes = list(self.graph_module.graph.nodes)
        self.position = {node: index for index, node in enumerate(nodes)}
        self.uses = dict.fromkeys(nodes, 0)
        for node in nodes:
            fx.map_arg((node.args, node.kwargs), self._count)
        self.aliases = _Aliases(interpreter)
        self.chains: dict[fx.Node, Chain] = {}  # by their last node
        self.mixed: dict[fx.Node, Join] = {}  # joins of several sources, by their node
        self.refusals: list[Refusal] = [Refusal(label(node), why) for node, why in interpreter.refusals.items()]

    def _count(self, node: fx.Node) -> fx.Node:
        self.uses[node] += 1
        return node

    def visit(self, node: fx.Node) -> None:
        written = overwritten_argument(self.graph_module, node)
        if written is not None and written not in self.aliases.private:
            if node in self.interpreter.operations or self.interpreter.summands(node):
                self.refusals.append(Refusal(label(node), f"it overwrites `{label(written)}`, which others may read"))
            return
        if (operation := self.interpreter.operations.get(node)) is not None:
            if not self._is_overwritten_before_read(node):
                self._append(node, operation)
        elif (terms := self.interpreter.summands(node)) is not None:
            join = Join(node, [])
            several = len({self._source(term.value) for term in terms}) > 1
            for term in terms:
                absorbs = not several or not (self._in_place(node) or self._in_place(term.value))
                self._add_operand(join, term, absorbs=absorbs)
            self._close(join)
        elif (values := self.interpreter.concatenated(node)) is not None:
            axis = signature_of(node).get("dim", 0)
            self._close(Join(node, [self._branch(value) for value in values], concatenates=True, axis=axis))

    def _append(self, node: fx.Node, operation: Operation) -> None:
        source, geometry = operation.source, operation.geometry
        if operation.inner and operation.inner[0] in self.chains:  # it continues where its first node began
            inner = self.chains.pop(operation.inner[0])
            inner.parts.pop()
            if inner.parts:
                self.chains[source] = inner
        chain = self.chains.get(source)
        fits = self.interpreter.features[source] == Feature(geometry.in_channels, geometry.dims)
        if chain is not None and self.uses[source] == 1 and fits:
            del self.chains[source]
            chain.parts.append(operation)
        else:
            chain = Chain(source, [operation])
        self.chains[node] = chain

    def explain_forks(self) -> None:
        """A chain that ends at a value with several readers cannot go on with one of them."""
        for node in self.chains:
            readers = [user for user in node.users if user in self.interpreter.operations]
            if readers and self.uses[node] > 1:
                everyone = ", ".join(f"`{label(user)}`" for user in node.users)
                self.refusals.append(
                    Refusal(label(node), f"not merged with `{label(readers[0])}`: it feeds {everyone}")
                )

    def _branch(self, value: fx.Node) -> Branch:
        if self.uses[value] == 1 and value in self.chains:
            return Branch(self.chains.pop(value), value)
        return Branch(Chain(value, []), value)

    def _source(self, value: fx.Node) -> fx.Node:
        chain = self.chains.get(value) if self.uses[value] == 1 else None
        return value if chain is None else chain.source

    def _in_place(self, node: fx.Node) -> bool:
        return overwritten_argument(self.graph_module, node) is not None

    def _add_operand(self, join: Join, term: Term, *, absorbs: bool) -> None:
        """A summand. absorbs: the summands of an inner sum that nobody else reads become the join's own.

        Not where it works in place on several sources: such a join is given up, and what it absorbed would be with it.
        """
        value, coefficient = term.value, term.coefficient
        inner = self.mixed.get(value)
        if inner is None and value in self.chains and len(self.chains[value].parts) == 1:
            only = self.chains[value].parts[0]
            inner = only if isinstance(only, Join) else None
        if self.uses[value] != 1 or inner is None or inner.concatenates or coefficient != 1 or not absorbs:
            branch = self._branch(value)
            branch.coefficient = coefficient
            branch.scale = self._scale(join.node, value, coefficient)
            join.branches.append(branch)
            return
        self.mixed.pop(value, None)
        self.chains.pop(value, None)
        join.branches.extend(inner.branches)
        join.inner.extend([*inner.inner, inner.node])

    def _scale(self, node: fx.Node, value: fx.Node, coefficient: float) -> Operation | None:
        feature = self.interpreter.features[value]
        if coefficient == 1 or feature.channels is None or feature.dims is None:
            return None
        channels, dims = feature.channels, feature.dims
        geometry = Geometry.identity(channels, dims)
        scale = torch.full((channels,), float(coefficient), dtype=torch.float64, device=CPU)
        return Operation(node, value, geometry, lambda: AffineMap.scale(scale, None, dims))

    def _close(self, join: Join) -> None:
        """A join of one source continues the chain before that source, if the join's branches are its only readers."""
        sources = join.sources
        axes = {self.interpreter.features[value].dims for value in (join.node, *sources)} - {None}
        depth = 1 + max(branch.chain.depth for branch in join.branches)
        apart = len(sources) != 1 or depth > DEEPEST_NESTING
        # In place, the first operand decides the data type of the result, which a regrouped sum would not keep.
        kept = apart and any(map(self._in_place, (join.node, *join.inner)))
        if len(axes) > 1 or kept or self._is_overwritten_between(join):
            self.chains.update({branch.value: branch.chain for branch in join.branches if branch.chain.parts})
            return
        if apart:
            self.mixed[join.node] = join
            return
        source, reads = sources[0], sum(branch.chain.reads for branch in join.branches)
        if source in self.chains and reads == self.uses[source]:
            chain = self.chains.pop(source)
            chain.parts.append(join)
            chain.depth = max(chain.depth, depth)
        else:
            chain = Chain(source, [join], reads, depth)
        self.chains[join.node] = chain

    def _is_overwritten_between(self, join: Join) -> bool:
        """Whether somebody may change a source between the first of the join's reads and the join."""
        nodes = {join.node, *nodes_of([join])}
        for source in join.sources:
            first = min(self.position[reader] for reader in nodes.intersection(source.users))
            if writer := self._writer_between(source, first, self.position[join.node], nodes):
                why = f"`{label(writer)}` may overwrite what its branches read"
                self.refusals.append(Refusal(label(join.node), why))
                return True
        return False

    def _is_overwritten_before_read(self, view: fx.Node) -> bool:
        """Whether somebody may change what a part of a value shows between the part and its last reader."""
        if function_name(view) != "getitem" or not view.users:
            return False
        last = max(self.position[reader] for reader in view.users)
        writer = self._writer_between(view, self.position[view], last, set())
        if writer:
            why = f"`{label(writer)}` may overwrite what it shows before that is read"
            self.refusals.append(Refusal(label(view), why))
        return writer is not None

    def _writer_between(self, value: fx.Node, first: int, last: int, own: Set[fx.Node]) -> fx.Node | None:
        """The first who may change the memory of a value between two positions. own: who does not count."""
        users = {user for member in self.aliases.of[value] for user in member.users} - own
        between = (user for user in users if first < self.position[user] < last)
        writers = (user for user in between if self.aliases.may_overwrite(user, value))
        return min(writers, key=self.position.__getitem__, default=None)


def allocating(captured: fx.GraphModule) -> set[fx.Node]:
    """The nodes of which it is known that what they give is in memory of its own."""
    several = tuples(captured.graph)
    return {node for node in captured.graph.nodes if node not in several and allocates(captured, node)}


class _Aliases:
    """Which values may share memory, erring on the safe side: what is not known to allocate its output, may."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.captured = interpreter.captured
        self.allocating = allocating(self.captured)
        storages = UnionFind(self.captured.graph.nodes)
        shared = set()  # views, inputs, attributes and opaque values
        for node in self.captured.graph.nodes:
            if (written := overwritten_argument(self.captured, node)) is not None:
                storages.union(node, written)
            elif node.op != "output" and not self._allocates(node):
                shared.add(node)
                storages.union(node, *(source for source in node.all_input_nodes if source.op != "get_attr"))
        self.of: dict[fx.Node, set[fx.Node]] = {}  # the values that may be in the same memory, itself among them
        self.private: set[fx.Node] = set()  # whose memory is seen only through them and in-place operations on them
        for storage in storages.to_sets():
            self.of |= dict.fromkeys(storage, storage)
            if shared.isdisjoint(storage):
                self.private |= storage

    def _allocates(self, node: fx.Node) -> bool:
        operation = self.interpreter.operations.get(node)
        read = operation is not None and (operation.convolves or node.op != "call_module")
        return (read and function_name(node) != "getitem") or node in self.allocating

    def may_overwrite(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether an operation may change the memory of a value."""
        if (written := overwritten_argument(self.captured, node)) is not None:
            return written in self.of[value]
        if node.op == "call_module":  # those that decouple inserts overwrite nothing
            module = module_of(self.captured, node)
            if type(module).__module__.startswith("elc_fx.") and not has_hooks(module):
                return False
        return runs_foreign_code(self.captured, node)
