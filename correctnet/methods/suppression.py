"""Error suppression: the modified Lipschitz regulariser, (10) and (11) of the paper."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from correctnet.crossbar.layers import AnalogLayer, crossbar_layers, nominal_weight
from correctnet.devices.base import Variation
from correctnet.errors import UserError
from correctnet.networks.blocks import Block


def bound(device: Variation, k: float = 1.0) -> float:
    """Return lambda = k / (mean + 3 standard deviations of w / w_nominal), the bound (10) of the paper.

    Args:
        device: the device model; for the paper's lognormal variation the denominator is
            exp(sigma^2 / 2) + 3 sqrt((exp(sigma^2) - 1) exp(sigma^2)).
        k: the Lipschitz constant that a layer under variation is to keep; 1 in the paper.

    Returns:
        The bound on the spectral norm of a nominal weight matrix: 0.33958 at sigma 0.5, k at sigma 0.
    """
    mean, deviation = device.factor_moments()
    return k / (mean + 3 * deviation)


def weight_matrix(weight: Tensor) -> Tensor:
    """A layer's weight as the matrix W that its input is multiplied with from the left, x W.

    (out, in) gives (in, out), (out, in, kh, kw) gives (in * kh * kw, out). A grouped convolution applies a matrix of
    its own in each group: (groups, out / groups, in / groups, kh, kw) gives (groups, in / groups * kh * kw,
    out / groups).
    """
    return weight.flatten(2).mT if weight.dim() == 5 else weight.flatten(1).t()


def penalty(weights: Iterable[Tensor], lam: float, form: Literal["orthogonal", "one-sided"] = "orthogonal") -> Tensor:
    """The sum in (11), || W_i^T W_i - lambda^2 I ||_F^2 over all matrices, differentiable, a scalar.

    W_i is (inputs, outputs), as `weight_matrix` gives it, so W^T W is (outputs, outputs). With s_j the singular values
    of W and c = outputs, the term is sum_{j <= c} (s_j^2 - lambda^2)^2, where s_j = 0 for the columns beyond the rank.

    The paper writes a layer as w x with w = W^T, whose w^T w is (inputs, inputs). Read so, each term of (11) is larger
    by the constant lambda^4 (inputs - outputs): it has the same gradient and the same minimum.

    Args:
        weights: of `analog_weights`: (out, in), (out, in, kh, kw), or (groups, out / groups, in / groups, kh, kw) of a
            grouped convolution, whose groups are a matrix each.
        lam: lambda of (10).
        form: "orthogonal", (11) as it is printed: every singular value is pulled to lambda; "one-sided": only those
            above lambda, sum_j max(0, s_j^2 - lambda^2)^2, which is what (9) asks for.
    """
    if form not in ("orthogonal", "one-sided"):
        raise UserError(f"penalty: form must be 'orthogonal' or 'one-sided', not {form!r}")
    weights = list(weights)
    if not weights:
        raise UserError("penalty: the network has no conv or linear layer")
    if form == "one-sided":
        return torch.stack([_one_sided(weight_matrix(w).float(), lam) for w in weights]).sum()
    return torch.stack([_Orthogonal.apply(weight_matrix(w).float(), lam) for w in weights]).sum()


def _gram(matrix: Tensor) -> Tensor:
    """The smaller of W^T W and W W^T, of each matrix of a batch."""
    rows, columns = matrix.shape[-2:]
    return matrix.mT @ matrix if columns <= rows else matrix @ matrix.mT


def _one_sided(matrix: Tensor, lam: float) -> Tensor:
    gram = _gram(matrix)
    if not gram.isfinite().all():  # training diverged, and says so of a loss that is not finite; eigvalsh would raise
        return gram.sum()
    return (torch.linalg.eigvalsh(gram) - lam**2).clamp(min=0).square().sum()


class _Orthogonal(torch.autograd.Function):
    """|| W^T W - lambda^2 I ||_F^2 of one matrix or the sum over a batch, with its gradient in closed form.

    That is 4 W (W^T W - lambda^2 I): two products of matrices instead of the three that differentiating the first
    would take.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, lam: float) -> Tensor:
        gram = _gram(matrix)
        ctx.save_for_backward(matrix, gram)
        ctx.lam = lam
        # ||G - l^2 I||_F^2 = ||G||_F^2 - 2 l^2 tr G + l^4 n, without a copy of G; n columns in all matrices together,
        # also where G is W W^T: the eigenvalues that only W^T W has are zero
        trace = gram.diagonal(dim1=-2, dim2=-1).sum()
        return gram.square().sum() - 2 * lam**2 * trace + lam**4 * (matrix.numel() // matrix.shape[-2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        matrix, gram = ctx.saved_tensors
        first, second = (matrix, gram) if gram.shape[-1] == matrix.shape[-1] else (gram, matrix)
        product = torch.addmm if matrix.dim() == 2 else torch.baddbmm
        return 4 * gradient * product(matrix, first, second, beta=-(ctx.lam**2)), None


def analog_weights(model: nn.Module, fold_batchnorm: bool | Mapping[str, nn.Module] = False) -> list[Tensor]:
    """The nominal weights of all conv and linear layers, the set W of (11), in order of registration.

    A grouped convolution's is split, (groups, out / groups, in / groups, kh, kw): its groups are matrices of their own.

    Args:
        model: the network.
        fold_batchnorm: multiply each output's weights by gamma / sqrt(running variance + eps) of the BatchNorm behind
            the layer. That is the matrix the layer applies, whatever the scale of its weight: BatchNorm hides that
            scale, and with it what (11) does to the weight alone. True looks for them anew at each call; what
            `batchnorms` gave can stand here instead.

    Raises:
        UserError: with `fold_batchnorm` True, as `batchnorms`.
    """
    norms = batchnorms(model) if fold_batchnorm is True else fold_batchnorm or {}
    weights = []
    for name, layer in crossbar_layers(model):
        weight = nominal_weight(layer)
        if name in norms:
            norm = norms[name]
            scale = torch.rsqrt(norm.running_var + norm.eps)
            scale = scale if norm.weight is None else norm.weight * scale
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        weights.append(_by_group(layer, weight))
    return weights


def _by_group(layer: nn.Module, weight: Tensor) -> Tensor:
    groups = getattr(layer, "groups", 1)
    return weight if groups == 1 else weight.unflatten(0, (groups, -1))


def batchnorms(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorm behind each layer that has one, by the layer's name.

    It stands behind a layer if it reads the layer's output and nothing else does, and neither is used a second time:
    seen by tracing the network, or, where it cannot be traced, in the `nn.Sequential`s that it is made of. In a
    `correctnet.networks.blocks.Block` a ReLU may stand between them: as it keeps the sign, the Lipschitz constant is the same
    with BatchNorm behind it.

    Raises:
        UserError: no layer has one.
    """
    names = {id(layer): name for name, layer in crossbar_layers(model)}
    found = {names[id(m.layer)]: m.norm for m in model.modules() if _is_normalised(m) and id(m.layer) in names}
    nodes = _traced(model)
    pairs = _in_sequentials(model) if nodes is None else _in_graph(model, nodes)
    for layer, norm in pairs:
        if id(layer) in names:
            found.setdefault(names[id(layer)], norm)
    layers = dict(crossbar_layers(model))
    found = {
        name: norm
        for name, norm in found.items()
        if norm.running_var is not None and norm.num_features == layers[name].weight.shape[0]
    }
    if not found:
        raise UserError("fold_batchnorm: no conv or linear layer of the network has a BatchNorm directly behind it")
    return {name: found[name] for name in layers if name in found}


def _is_normalised(module: nn.Module) -> bool:
    return isinstance(module, Block) and isinstance(getattr(module, "norm", None), _BatchNorm)


class _Tracer(fx.Tracer):
    """Goes into all modules but torch's own and analog layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See the class."""
        return isinstance(m, (AnalogLayer, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> list[fx.Node] | None:
    """The operations of the network in order, None where it cannot be traced. A copy is: tracing may leave traces."""
    try:
        return list(_Tracer().trace(copy.deepcopy(model)).nodes)
    except Exception:  # whatever the network's code makes of a value that has none
        return None


def _in_graph(model: nn.Module, nodes: list[fx.Node]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(module, BatchNorm) of each BatchNorm that is the only one to read the module's output."""
    modules = {node: model.get_submodule(node.target) for node in nodes if node.op == "call_module"}
    calls = Counter(map(id, modules.values()))
    for node, norm in modules.items():
        if not isinstance(norm, _BatchNorm) or calls[id(norm)] != 1 or len(node.args) != 1:
            continue
        before = node.args[0]
        if before in modules and calls[id(modules[before])] == 1 and list(before.users) == [node]:
            yield modules[before], norm


def _in_sequentials(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(module, BatchNorm) that stand next to each other in an `nn.Sequential`, and nowhere else."""
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for module in model.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            for before, norm in itertools.pairwise(module):
                if isinstance(norm, _BatchNorm) and places[id(before)] == places[id(norm)] == 1:
                    yield before, norm


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, float]:
    """The largest singular value of each layer's nominal weight matrix, by name; of all groups of a convolution."""
    return {
        name: torch.linalg.matrix_norm(weight_matrix(_by_group(layer, nominal_weight(layer))).float(), ord=2)
        .max()
        .item()
        for name, layer in crossbar_layers(model)
    }
