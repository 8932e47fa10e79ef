"""Attention in plans: every way that networks write it, against float64 and the plain network with a chip's weights."""

import copy
import math
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvisions
from torch import nn

from correctnet import LogNormalVariation, convert
from correctnet.crossbar.convert import programmed
from correctnet.crossbar.layers import analog_layers, analog_names
from correctnet.engine.engine import Engine
from correctnet.engine.expansion import window_attention
from correctnet.noise import core

pytestmark = pytest.mark.skipif(not core.status().built, reason="the C++ core was not built")

HALF = LogNormalVariation(0.5)
TOKENS, CHANNELS, HEADS = 11, 24, 3


class Block(nn.Module):
    """A transformer's layer on tokens; subclasses say how they compute attention."""

    def __init__(self, out: int = CHANNELS) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.qkv, self.proj = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.up, self.down = nn.Linear(CHANNELS, 40), nn.Linear(40, out)

    def forward(self, x):
        x = x + self.proj(self.attend(self.norm(x)))
        return self.down(F.gelu(self.up(self.after(x))))


def own(attend):
    return type("Own", (Block,), {"attend": attend})


class Joint(Block):
    """As timm's Attention."""

    def attend(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.0).transpose(1, 2).reshape(n, t, c)


class Causal(Block):
    """As nanoGPT's CausalSelfAttention."""

    def attend(self, x):
        n, t, c = x.size()
        q, k, v = self.qkv(x).split(CHANNELS, dim=2)
        q, k, v = (a.view(n, t, HEADS, c // HEADS).transpose(1, 2) for a in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).contiguous().view(n, t, c)


class Separate(Block):
    """Three layers, another scale and a mask, as a decoder without words to come."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(CHANNELS, CHANNELS, bias=False) for _ in range(3))
        self.register_buffer("mask", torch.randn(1, HEADS, TOKENS, TOKENS))

    def attend(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).swapaxes(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=0.7)
        return y.permute(0, 2, 1, 3).flatten(2)


class Written(Block):
    """As before PyTorch 2, with a dropout and relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.positions = nn.Dropout(0.1), nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def attend(self, x):
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * 0.6) @ k.transpose(-2, -1) / 2
        weights = self.dropout(torch.softmax(scores + self.positions, dim=-1))
        return (weights @ v).transpose(1, 2).reshape(n, t, c)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(CHANNELS, HEADS, 40, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False, norm=nn.LayerNorm(CHANNELS))


class Hidden(Block):
    """As the first nanoGPT: positions for more tokens than there are, and what comes later is filled."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 20, CHANNELS))
        self.register_buffer("seen", torch.tril(torch.ones(20, 20)).view(1, 1, 20, 20))

    def attend(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(x + self.positions[:, :t]).split(CHANNELS, dim=2)
        q, k, v = (a.view(n, t, HEADS, c // HEADS).transpose(1, 2) for a in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.seen[:, :, :t, :t] == 0, float("-inf"))
        return (F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous().view(n, t, c)


class Filled(Hidden):
    """Rows of which nothing is seen, filled with a number: their weights are all the same."""

    def attend(self, x):
        self.seen[:, :, 3] = 0
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        scores = (q @ k.mT).masked_fill(self.seen[:, :, :TOKENS, :TOKENS] == 0, -1e9)
        return (scores.softmax(-1) @ v)[:, 0]


class Masked(Block):
    """nn.MultiheadAttention with a mask of booleans, true where there is no attention."""

    def __init__(self, boolean: bool = True) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)
        hidden = torch.rand(TOKENS, TOKENS) > 0.6
        hidden.fill_diagonal_(False)
        self.register_buffer("mask", hidden if boolean else torch.randn(TOKENS, TOKENS))

    def attend(self, x):
        return self.mha(x, x, x, attn_mask=self.mask, need_weights=False)[0]


class Later(nn.Module):
    """An encoder that sees no later tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(TOKENS))

    def forward(self, x):
        return self.encoder(x, mask=self.mask, is_causal=True)


class TokensFirst(nn.Module):
    """torch's default: an encoder on (T, N, C), and attention likewise, between permutations."""

    def __init__(self, **options) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(CHANNELS, HEADS, 40, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.mha = nn.MultiheadAttention(CHANNELS, HEADS)

    def forward(self, x):
        x = self.encoder(x.permute(1, 0, 2))
        return self.mha(x, x, x)[0].permute(1, 0, 2)


def single(self, x):
    q, k, v = self.qkv(x).chunk(3, -1)
    return F.softmax(0.2 * torch.bmm(q, 0.5 * k.mT.contiguous()), -1).matmul(v)


def over_queries(self, x):
    q, k, v = self.qkv(x).chunk(3, -1)
    return (q @ k.transpose(1, 2)).softmax(1) @ v


def turned(self, x):
    """Numbers in another order, in a value of the same shape."""
    return self.qkv(x.transpose(1, 2).reshape(-1, TOKENS, CHANNELS))[..., :CHANNELS]


class Shuffled(Joint):
    """Channels of the heads in an order that a plan does not know: torch computes the attention."""

    def attend(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, c // HEADS, HEADS).permute(2, 0, 4, 1, 3).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c)


class Swapped(Joint):
    """Results of the heads that are not put side by side."""

    def attend(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).reshape(n, t, c)


def masked_by_what_is_computed(self, x):
    q, k, v = self.qkv(x)[:, None].chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(x @ x.mT)[:, None])[:, 0]


class Mha(Block):
    """Self-attention with the weights of the heads asked for, and not used."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True, bias=False)

    def attend(self, x):
        return self.mha(x, x, x)[0]


# By name: the network, and the plans that compute it.
NETWORKS = {
    "joint": (Joint, 1),
    "causal": (Causal, 1),
    "separate": (Separate, 1),
    "written": (Written, 1),
    "written, one head": (own(single), 1),
    "written, later tokens hidden": (Hidden, 1),
    "written, rows without tokens": (Filled, 3),
    "MultiheadAttention, booleans": (Masked, 1),
    "MultiheadAttention, mask": (lambda: Masked(False), 1),
    "encoder, later tokens hidden": (Later, 1),
    "tokens first": (TokensFirst, 1),
    "tokens first, norm first": (lambda: TokensFirst(norm_first=True), 1),
    "softmax over the queries": (own(over_queries), 3),
    "encoder": (lambda: encoder(), 1),
    "encoder, norm first, GELU": (lambda: encoder(norm_first=True, activation="gelu"), 1),
    "layer": (lambda: nn.TransformerEncoderLayer(CHANNELS, HEADS, 40, batch_first=True, bias=False), 1),
    "MultiheadAttention": (Mha, 1),
    "tokens in another order": (own(turned), 2),
    "other order of channels": (Shuffled, 3),
    "results in another order": (Swapped, 3),
    "a mask that is computed": (own(masked_by_what_is_computed), 3),
}


def unused(analog: nn.Module, engine: Engine) -> set[int]:
    """Indices of the layers that the network does not use."""
    names = analog_names(analog)
    return {own.layer_index for own in analog_layers(analog) if names[id(own)] in engine.report.unused}


@pytest.mark.parametrize("isa", core.status().available)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_attention_is_part_of_the_plan(name, isa, on_isa) -> None:
    on_isa(isa)
    make, plans = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_bias is not None:
            nn.init.normal_(module.in_proj_bias)  # made of zeros
    analog, x = convert(network, HALF), torch.randn(21, TOKENS, CHANNELS)
    for precision, bound in (("float32", 1e-5), ("bfloat16", 0.05)):
        engine = Engine(analog, x, precision=precision)
        assert engine.report.plans == plans, engine.report
        assert engine.report.unfused == ()
        assert len(engine.report.fused) == len(analog_layers(analog)) - len(engine.report.unused)
        used = [own for own in analog_layers(analog) if own.layer_index not in unused(analog, engine)]
        assert engine.cost[2] == sum(own.nominal.numel() for own in used), "a layer is computed twice"
        found = engine.outputs(x, [0, 5])
        for outputs, sample in zip(found, (0, 5), strict=True):
            with programmed(analog, sample):
                wanted = copy.deepcopy(analog).double()(x.double()) if precision == "float32" else analog(x)
            assert (outputs - wanted).abs().max() <= bound * wanted.abs().max()


class Tokens(nn.Module):
    """Tokens of patches as in a ViT: a token and positions that are parameters, some tokens, and other views."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 12, 2, stride=2), nn.Parameter(torch.randn(1, 1, 12))
        self.positions, self.layer = nn.Parameter(torch.randn(1, 17, 12)), nn.Linear(12, 9)
        self.on_map, self.head = nn.Conv2d(9, 6, 3, padding=1), nn.Linear(9 + 4 * 6, 5)
        self.on_maps = nn.Parameter(torch.randn(6, 4, 1))
        self.number, self.on_all = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.randn(9))

    def forward(self, x):
        n = x.shape[0]
        x = self.stem(x).reshape(n, 12, -1).permute(0, 2, 1)
        x = torch.cat([self.first.expand(n, -1, -1), x], dim=1) + self.positions
        x = self.number + self.layer(x) + self.on_all
        tokens = x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        maps = self.on_map(x[:, 1:].view(n, 4, 4, 9).permute(0, 3, 1, 2))
        parts = (maps + self.on_maps).permute(0, 2, 3, 1)
        parts = torch.cat([parts[..., i::2, j::2, :] for i in (0, 1) for j in (0, 1)], -1)[:, 1:, :1]
        return self.head(torch.cat([x[:, 0] + tokens.mean((2, 3)), parts.flatten(1)], 1))


@pytest.mark.parametrize("isa", core.status().available)
@torch.no_grad()
def test_tokens_are_part_of_the_plan(isa, on_isa) -> None:
    on_isa(isa)
    torch.manual_seed(0)
    analog, x = convert(Tokens().eval(), HALF), torch.randn(19, 3, 8, 8)
    for precision, bound in (("float32", 1e-5), ("bfloat16", 0.05)):
        engine = Engine(analog, x, precision=precision)
        assert (engine.report.plans, engine.report.torch) == (1, ()), engine.report
        with programmed(analog, 3):
            wanted = analog(x)
        assert (engine.outputs(x, [3])[0] - wanted).abs().max() <= bound * wanted.abs().max()


@pytest.mark.parametrize(("window", "shift"), [((3, 2), (0, 0)), ((3, 2), (1, 1)), ((6, 2), (0, 1)), ((2, 4), (1, 0))])
@torch.no_grad()
def test_window_attention_is_torchvisions(window, shift) -> None:
    torchvisions.models()
    swin = sys.modules["torchvision.models.swin_transformer"]
    torch.manual_seed(0)
    module = swin.ShiftedWindowAttention(8, list(window), list(shift), 2).eval().double()
    nn.init.normal_(module.relative_position_bias_table)
    x, tokens = torch.randn(3, 6, 8, 8).double(), window[0] * window[1]
    bias = module.get_relative_position_bias().reshape(2, tokens, tokens)
    found = module.proj(window_attention(module.qkv(x), bias, 2, *window, *shift))
    torch.testing.assert_close(found, module(x), rtol=0, atol=1e-12)
