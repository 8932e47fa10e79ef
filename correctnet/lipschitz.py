"""Error suppression: the modified Lipschitz regulariser, (10) and (11) of the paper."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from correctnet.analog import crossbar_layers
from correctnet.models import Block


def bound(sigma: float, k: float = 1.0, shift: float = 0.0) -> float:
    """lambda = k / (exp(sigma^2 / 2) + 3 sqrt((exp(sigma^2) - 1) exp(sigma^2))) / exp(shift): (10) of the paper.

    The denominator is mean + 3 standard deviations of the lognormal factor exp(theta + shift), theta ~ N(0, sigma^2).

    Args:
        sigma: standard deviation of theta, >= 0.
        k: the Lipschitz constant that a layer under variation is to keep; 1 in the paper.
        shift: that of `correctnet.LogNormalVariation`; 0 in the paper.

    Returns:
        The bound on the spectral norm of a nominal weight matrix: 0.33958 at sigma 0.5, k at sigma 0.
    """
    variance = math.expm1(sigma**2) * math.exp(sigma**2)
    return k / (math.exp(sigma**2 / 2) + 3 * math.sqrt(variance)) / math.exp(shift)


def weight_matrix(weight: Tensor) -> Tensor:
    """A layer's weight as the matrix that multiplies its input, (in, out) or (in * kh * kw, out) for a convolution."""
    return weight.flatten(1).t()


def penalty(weights: Iterable[Tensor], lam: float, form: Literal["orthogonal", "one-sided"] = "orthogonal") -> Tensor:
    """The sum in (11), || W_i^T W_i - lambda^2 I ||_F^2 over all layers, differentiable, a scalar.

    With s_j the singular values of W_i and c its columns, the term is sum_{j <= c} (s_j^2 - lambda^2)^2. Of W^T W and
    W W^T the smaller is formed; the eigenvalues that only the larger has are zero, and their constant
    lambda^4 |rows - columns| is added where W^T W is the larger, so that the value is that of (11).

    Args:
        weights: (out, in) or (out, in, kh, kw) tensors.
        lam: lambda of (10).
        form: "orthogonal", (11) as it is printed: every singular value is pulled to lambda; "one-sided": only those
            above lambda, sum_j max(0, s_j^2 - lambda^2)^2, which is what (9) asks for.
    """
    if form == "one-sided":
        return torch.stack([_one_sided(weight_matrix(w).float(), lam) for w in weights]).sum()
    return torch.stack([_Orthogonal.apply(weight_matrix(w).float(), lam) for w in weights]).sum()


def _gram(matrix: Tensor) -> Tensor:
    """The smaller of W^T W and W W^T."""
    rows, columns = matrix.shape
    return matrix.t() @ matrix if columns <= rows else matrix @ matrix.t()


def _one_sided(matrix: Tensor, lam: float) -> Tensor:
    gram = _gram(matrix)
    if not gram.isfinite().all():  # training diverged, and says so of a loss that is not finite; eigvalsh would raise
        return gram.sum()
    return (torch.linalg.eigvalsh(gram) - lam**2).clamp(min=0).square().sum()


class _Orthogonal(torch.autograd.Function):
    """|| W^T W - lambda^2 I ||_F^2 of one matrix, with its gradient 4 W (W^T W - lambda^2 I) in closed form.

    Two products of matrices instead of the three that differentiating the first would take.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, lam: float) -> Tensor:
        gram = _gram(matrix)
        ctx.save_for_backward(matrix, gram)
        ctx.lam = lam
        # ||G - l^2 I||_F^2 = ||G||_F^2 - 2 l^2 tr G + l^4 n, without a copy of G
        return gram.square().sum() - 2 * lam**2 * gram.diagonal().sum() + lam**4 * matrix.shape[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        matrix, gram = ctx.saved_tensors
        first, second = (matrix, gram) if len(gram) == matrix.shape[1] else (gram, matrix)
        return 4 * gradient * torch.addmm(matrix, first, second, beta=-(ctx.lam**2)), None


def analog_weights(model: nn.Module, fold_batchnorm: bool = False) -> list[Tensor]:
    """The nominal weights of all conv and linear layers, the set W of (11).

    Args:
        model: the network.
        fold_batchnorm: multiply each output's weights by gamma / sqrt(running variance + eps) of the BatchNorm in the
            same `correctnet.models.Block`. That is the matrix the layer applies, whatever the scale of its weight:
            BatchNorm hides that scale, and with it what (11) does to the weight alone. As ReLU keeps the sign, the
            Lipschitz constant is the same with BatchNorm behind it, for gamma >= 0.
    """
    blocks = {id(m.layer): m for m in model.modules() if isinstance(m, Block) and hasattr(m, "norm")}
    weights = []
    for _, layer in crossbar_layers(model):
        weight = layer.weight
        if fold_batchnorm and id(layer) in blocks:
            norm = blocks[id(layer)].norm
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        weights.append(weight)
    return weights


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, float]:
    """The largest singular value of each layer's weight matrix, by layer name."""
    return {
        name: torch.linalg.matrix_norm(weight_matrix(layer.weight).float(), ord=2).item()
        for name, layer in crossbar_layers(model)
    }
