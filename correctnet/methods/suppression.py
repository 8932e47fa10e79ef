"""Error suppression: the modified Lipschitz regulariser, (10) and (11) of the paper."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from correctnet.crossbar.kinds import FIRST, Crossbar, crossbars, plain_type
from correctnet.crossbar.layers import AnalogModule
from correctnet.devices.base import Variation
from correctnet.errors import UserError
from correctnet.networks.blocks import Block


def bound(device: Variation, k: float = 1.0) -> float:
    """Return lambda = k / (mean + 3 standard deviations of w / w_nominal), the bound (10) of the paper.

    Args:
        device: the device model; for the paper's lognormal variation the denominator is
            exp(sigma^2 / 2) + 3 sqrt((exp(sigma^2) - 1) exp(sigma^2)).
        k: Lipschitz constant that each layer must keep under variation; 1 in the paper.

    Returns:
        The bound on the spectral norm of a nominal weight matrix: 0.33958 at sigma 0.5, k at sigma 0.
    """
    mean, deviation = device.factor_moments()
    return k / (mean + 3 * deviation)


def bounds(model: nn.Module, device: Variation, k: float = 1.0) -> list[float]:
    """Return lambda of (10) for each weight of `analog_weights`.

    For a device whose w / w_nominal has one distribution, as the lognormal's, it is `bound` everywhere; for others it
    follows from the layer's present weights, `correctnet.devices.base.Variation.bound`. Where all of these are 0 it is
    k: W = 0 is a stationary point of (11) whatever lambda is.

    Raises NotImplementedError for a device without moments.
    """
    layers = crossbars(model)
    try:
        return [bound(device, k)] * len(layers)
    except NotImplementedError:
        weights = [each.weight.detach() for each in layers]
        return [device.bound(weight, k) if weight.any() else k for weight in weights]


def weight_matrix(weight: Tensor) -> Tensor:
    """The matrix W of a layer that maps its input x to x W.

    (out, in) becomes (in, out), and (out, in, kh, kw) becomes (in * kh * kw, out). A grouped convolution has one matrix
    for each group: (groups, out / groups, in / groups, kh, kw) becomes (groups, in / groups * kh * kw, out / groups),
    and so have other weights with several matrices, (maps, out, in).
    """
    return weight.flatten(2).mT if weight.dim() in (3, 5) else weight.flatten(1).t()


def penalty(
    weights: Iterable[Tensor],
    lam: float | Sequence[float],
    form: Literal["orthogonal", "one-sided"] = "orthogonal",
) -> Tensor:
    """The sum of (11) over all matrices, || W_i^T W_i - lambda^2 I ||_F^2; a differentiable scalar.

    W_i is (inputs, outputs), as from `weight_matrix`, so W^T W is (outputs, outputs). With s_j the singular values
    of W and c = outputs, the term is sum_{j <= c} (s_j^2 - lambda^2)^2, where s_j = 0 for the columns beyond the rank.

    The paper writes a layer as w x with w = W^T, whose w^T w is (inputs, inputs). Read so, each term of (11) is larger
    by the constant lambda^4 (inputs - outputs): it has the same gradient and the same minimum.

    Args:
        weights: from `analog_weights`: (out, in), (out, in, kh, kw), or (groups, out / groups, in / groups, kh, kw) for
            a grouped convolution, which has one matrix a group; (maps, out, in) for others with several.
        lam: lambda of (10), or one for each weight.
        form: "orthogonal": (11) as printed, which pulls every singular value to lambda; "one-sided": only those above
            lambda, sum_j max(0, s_j^2 - lambda^2)^2, as (9) requires.

    Raises:
        UserError: an unknown form, or no weights.
    """
    if form not in ("orthogonal", "one-sided"):
        raise UserError(f"penalty: form must be 'orthogonal' or 'one-sided', not {form!r}")
    weights = list(weights)
    if not weights:
        raise UserError("penalty: the network has no conv or linear layer")
    each = [lam] * len(weights) if isinstance(lam, int | float) else lam
    term = _one_sided if form == "one-sided" else _Orthogonal.apply
    return torch.stack([term(weight_matrix(w).float(), own) for w, own in zip(weights, each, strict=True)]).sum()


def _gram(matrix: Tensor) -> Tensor:
    """The smaller of W^T W and W W^T, for each matrix of a batch."""
    rows, columns = matrix.shape[-2:]
    return matrix.mT @ matrix if columns <= rows else matrix @ matrix.mT


def _one_sided(matrix: Tensor, lam: float) -> Tensor:
    gram = _gram(matrix)
    if not gram.isfinite().all():  # training diverged: `fit` reports a loss that is not finite, eigvalsh would raise
        return gram.sum()
    return (torch.linalg.eigvalsh(gram) - lam**2).clamp(min=0).square().sum()


class _Orthogonal(torch.autograd.Function):
    """|| W^T W - lambda^2 I ||_F^2 of a matrix, or the sum over a batch, with its gradient in closed form.

    The gradient is 4 W (W^T W - lambda^2 I). Forward and backward take two matrix products in total; automatic
    differentiation of the expression takes three.
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
    """The nominal weights of all crossbars, the set W of (11), by layer index.

    The weight of a grouped `nn.Conv2d` is split, (groups, out / groups, in / groups, kh, kw): each group is a matrix.
    Those of `nn.Linear` and other `nn.Conv2d` are as they are. Others are given as the matrices that they multiply with
    (`correctnet.crossbar.kinds.KINDS`), (out, in) or (maps, out, in):

        nn.Conv1d, nn.Conv3d         a window to a pixel, (out, in * kernel); one map for each group
        nn.ConvTranspose1d/2d/3d     a pixel to a window, (out * kernel, in); one map for each group
        nn.Bilinear                  products of both inputs' elements to the output, (out, in1 * in2)
        nn.MultiheadAttention        in_proj_weight: three maps, to queries, keys and values, (3, E, E)
        nn.LSTM, nn.GRU, nn.RNN      of the input and of the state: one map for each gate, (gates, hidden, in); of a
                                     projection, one
        a parameter by its name      (first dimension, product of the others)

    Args:
        model: the network.
        fold_batchnorm: multiply the weights of each output by gamma / sqrt(running variance + eps) of the BatchNorm
            after the layer. The result is the matrix that the layer applies, whatever the scale of its weight:
            BatchNorm cancels that scale, and with it the effect of (11) on the weight alone. True searches for the
            BatchNorms at each call; the result of `batchnorms` can be passed instead.

    Raises:
        UserError: with `fold_batchnorm` True, as `batchnorms`.
    """
    norms = batchnorms(model) if fold_batchnorm is True else fold_batchnorm or {}
    weights = []
    for each in crossbars(model):
        weight = each.weight
        if each.name in norms:
            norm = norms[each.name]
            scale = torch.rsqrt(norm.running_var + norm.eps)
            scale = scale if norm.weight is None else norm.weight * scale
            weight = _scaled(each.module, weight, scale)
        weights.append(_by_map(each, weight))
    return weights


def _by_map(each: Crossbar, weight: Tensor) -> Tensor:
    """Split a weight as `analog_weights` does."""
    if plain_type(each.module) not in FIRST or each.parameter != "weight":
        return each.matrices(weight)
    groups = getattr(each.module, "groups", 1)
    return weight if groups == 1 else weight.unflatten(0, (groups, -1))


def _scaled(layer: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply the weights of each output of a layer by its `scale`."""
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, ...)
        parts = weight.unflatten(0, (layer.groups, -1))
        return (parts * scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    return weight * scale.view(-1, *[1] * (weight.dim() - 1))


def _outputs(layer: nn.Module) -> int:
    return layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features


def batchnorms(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorm after each layer that has one, by the layer's name.

    A BatchNorm follows a layer if it alone reads the layer's output, and neither is used a second time. This is found
    by tracing the network or, if it cannot be traced, from its `nn.Sequential`s. In a
    `correctnet.networks.blocks.Block` a ReLU may come between the two: it commutes with positive scales and is
    1-Lipschitz, so the bound is the same.

    Raises:
        UserError: no layer has one.
    """
    kinds = (nn.Linear, nn.Bilinear, _ConvNd)
    layers = {each.name: each.module for each in crossbars(model) if isinstance(each.module, kinds)}
    names = {id(layer): name for name, layer in layers.items()}
    found = {names[id(m.layer)]: m.norm for m in model.modules() if _is_normalised(m) and id(m.layer) in names}
    nodes = _traced(model)
    pairs = _in_sequentials(model) if nodes is None else _in_graph(model, nodes)
    for layer, norm in pairs:
        if id(layer) in names:
            found.setdefault(names[id(layer)], norm)
    found = {
        name: norm
        for name, norm in found.items()
        if norm.running_var is not None and norm.num_features == _outputs(layers[name])
    }
    if not found:
        raise UserError("fold_batchnorm: no conv or linear layer of the network has a BatchNorm directly after it")
    return {each.name: found[each.name] for each in crossbars(model) if each.name in found}


def _is_normalised(module: nn.Module) -> bool:
    return isinstance(module, Block) and isinstance(getattr(module, "norm", None), _BatchNorm)


class _Tracer(fx.Tracer):
    """Traces into all modules except torch's own, BatchNorm and analog layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether `m` is one node of the graph."""
        return isinstance(m, (AnalogModule, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> list[fx.Node] | None:
    """The operations of the network in order; None if it cannot be traced.

    A copy is traced, because tracing may change the network.
    """
    try:
        return list(_Tracer().trace(copy.deepcopy(model)).nodes)
    except Exception:  # whatever the network's own code raises for a proxy in place of a tensor
        return None


def _in_graph(model: nn.Module, nodes: list[fx.Node]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(module, BatchNorm) for each BatchNorm that alone reads the module's output."""
    modules = {node: model.get_submodule(node.target) for node in nodes if node.op == "call_module"}
    calls = Counter(map(id, modules.values()))
    for node, norm in modules.items():
        if not isinstance(norm, _BatchNorm) or calls[id(norm)] != 1 or len(node.args) != 1:
            continue
        before = node.args[0]
        if before in modules and calls[id(modules[before])] == 1 and list(before.users) == [node]:
            yield modules[before], norm


def _in_sequentials(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(module, BatchNorm) for neighbours in an `nn.Sequential` that occur nowhere else."""
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for module in model.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            for before, norm in itertools.pairwise(module):
                if isinstance(norm, _BatchNorm) and places[id(before)] == places[id(norm)] == 1:
                    yield before, norm


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, float]:
    """The largest singular value of each crossbar's nominal weight matrix, by name; over all groups, gates or maps."""
    return {
        each.name: torch.linalg.matrix_norm(weight_matrix(_by_map(each, each.weight)).float(), ord=2).max().item()
        for each in crossbars(model)
    }
