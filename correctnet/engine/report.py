"""Report on which parts of a network an engine runs in the C++ core."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx, nn

from correctnet.crossbar.layers import analog_names
from correctnet.engine.lowering import Lowering
from correctnet.engine.steps import PlanStep, TorchStep
from correctnet.engine.trace import read_by


@dataclass(frozen=True)
class Report:
    """Report on which parts of a network the core runs.

    Attributes:
        fused: the analog layers that run in the core.
        unfused: the analog layers that run through torch, their weights drawn once a chip.
        torch: the operations that run through torch, as "name (type)".
        plans: number of plans.
        reason: why nothing runs in the core, in one line, or None.
        library: whether only the noise is drawn by the kernels (`Engine`'s method "library").
        unused: the analog layers that the network does not use in evaluation mode.
    """

    fused: tuple[str, ...] = ()
    unfused: tuple[str, ...] = ()
    torch: tuple[str, ...] = ()
    plans: int = 0
    reason: str | None = None
    library: bool = False
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.library:
            return f"{len(self.unfused)} analog layers: their weights by the CUDA kernels, the rest by cuBLAS and cuDNN"
        if self.reason:
            return f"everything runs through torch: {self.reason}"
        total = len(self.fused) + len(self.unfused)
        parts = [f"{len(self.fused)} of {total} analog layers fused, in {self.plans} piece{'s' * (self.plans != 1)}"]
        if self.unfused:
            parts.append(f"unfused: {', '.join(self.unfused)}")
        if self.torch:
            parts.append(f"through torch: {', '.join(_grouped(self.torch))}")
        if self.unused:
            parts.append(f"not used: {', '.join(self.unused)}")
        return "; ".join(parts)


def _grouped(operations: tuple[str, ...]) -> list[str]:
    """Return up to three operations by name, more by type."""
    if len(operations) <= 3:
        return list(operations)
    kinds = Counter(operation[operation.rindex("(") + 1 : -1] for operation in operations)
    return [f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.most_common()]


def report_of(graph: Lowering, steps: list[TorchStep], library: bool) -> Report:
    """Return the report on the steps that a network was lowered to."""
    named, reached = analog_names(graph.root), {}
    for node in graph.root.graph.nodes:
        reached |= {id(held): held for held in read_by(graph.root, node).values()}
    in_order = sorted(reached.values(), key=lambda held: held.layer_index)
    planned = {name for s in steps if isinstance(s, PlanStep) for name in s.layers}
    names = [getattr(held, "known_as", named[id(held)]).removeprefix(graph.prefix) for held in in_order]
    fused = {name for name, held in zip(names, in_order, strict=True) if named[id(held)] in planned}
    several = isinstance(graph.input.meta.get("tensor_meta"), tuple)  # whose parts are no operations
    parts = set(graph.input.users) if several else set()
    own = [s.node for s in steps if not isinstance(s, PlanStep) and s.node not in parts]
    through = [node for node in own if "tensor_meta" in node.meta]
    return Report(
        fused=tuple(n for n in names if n in fused),
        unfused=tuple(n for n in names if n not in fused),
        torch=tuple(f"{n.name} ({_what(graph.root, n)})" for n in through),
        plans=sum(isinstance(s, PlanStep) for s in steps),
        library=library,
        unused=graph.unused,
    )


def _what(root: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(root.get_submodule(node.target)).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
