"""Which weights are protected, against closed forms and brute force."""

import itertools
import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from by_hand import succeed
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from correctnet.crossbar.convert import convert, programmed
from correctnet.crossbar.layers import analog_layers
from correctnet.crossbar.protection import protect
from correctnet.datasets.base import Split
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import clean_accuracy, evaluate
from correctnet.methods.compensation import compensate
from correctnet.methods.selection import allotted, importance, protected_share, protected_weights

DEVICE = LogNormalVariation(0.5)


def test_importance_of_a_softmax_layer_in_closed_form():
    """dL/dW = (p - onehot(y)) x^T for one image, and w^2 E[(dL/dW)^2] over all."""
    torch.manual_seed(0)
    layer, x, y = nn.Linear(5, 3).double(), torch.randn(40, 5, dtype=torch.float64), torch.randint(3, (40,))
    (found,) = importance(nn.Sequential(layer), (x, y)).values()
    with torch.no_grad():
        gradients = (layer(x).softmax(1) - F.one_hot(y, 3)).unsqueeze(2) * x.unsqueeze(1)
        expected = layer.weight.square() * gradients.square().mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    mean = layer.weight.square() * gradients.mean(0).square()
    assert not torch.allclose(found, mean, rtol=0.1), "the gradient of the mean loss is something else"


def test_importance_of_layers_of_other_kinds():
    """Image by image, from the gradients of the parameters themselves, which may be frozen."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.lstm = nn.LSTM(4, 6, batch_first=True)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            h, _ = self.lstm(x)
            return self.head(self.attention(h, h, h)[0].mean(1))

    network, x, y = Reader().eval(), torch.randn(6, 5, 4), torch.arange(6) % 3
    named = {name: p for name, p in network.named_parameters() if p.dim() > 1}
    expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
    for i in range(6):
        loss = F.cross_entropy(network(x[i : i + 1]), y[i : i + 1])
        for (name, p), g in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
            expected[name] += (p * g).double().square() / 6
    network.requires_grad_(False)
    found = importance(network, (x, y))
    assert {name.removesuffix(".weight") for name in named} == {name.removesuffix(".weight") for name in found}
    for name, score in found.items():
        wanted = expected[name if name in expected else f"{name}.weight"]
        torch.testing.assert_close(score, wanted, rtol=1e-3, atol=1e-12)
    masks = protected_weights(network, 0.3, data=(x, y))
    analog = convert(network, DEVICE)
    protect(analog, masks)
    with programmed(analog, 3):
        drawn = analog.lstm.weight_hh_l0
        same = drawn == network.lstm.weight_hh_l0
    assert torch.equal(same, masks["lstm.weight_hh_l0"])


def labelled(network, count, size):
    """Inputs with labels that are drawn from the network's own probabilities: its loss is then at its minimum."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y = torch.multinomial(network(x).softmax(1), 1, generator=generator).flatten()
    return x, y


def test_fisher_against_brute_force():
    """Of all ways to protect two of twelve weights, the chosen one leaves nearly the least expected loss.

    The expected loss of every way is that over many draws of small factors on all weights that are not protected.
    """
    torch.manual_seed(5)
    network = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False)).double()
    with torch.no_grad():
        network[0].weight.mul_(2)
        network[2].weight.mul_(2)
    x, y = labelled(network, 1500, 2)
    first, second = network[0].weight.detach(), network[2].weight.detach()
    factors = torch.exp(0.15 * torch.randn(400, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64))

    def loss(kept):
        drawn = factors.clone()
        drawn[:, list(kept)] = 1.0
        a, b = drawn[:, :6].view(-1, 3, 2) * first, drawn[:, 6:].view(-1, 2, 3) * second
        logits = torch.tanh(x[:300] @ a.mT) @ b.mT
        p = network(x[:300]).softmax(1).detach()  # the labels' distribution, without their noise
        return float(-(p * logits.log_softmax(2)).sum(2).mean())

    ways = list(itertools.combinations(range(12), 2))
    losses = dict(zip(ways, map(loss, ways), strict=True))
    masks = protected_weights(network, 2 / 12, "fisher", data=(x, y))
    chosen = torch.cat([mask.flatten() for mask in masks.values()]).nonzero().flatten().tolist()
    none, best = loss(()), min(losses.values())
    assert none - losses[tuple(chosen)] > 0.9 * (none - best)
    assert sorted(losses.values()).index(losses[tuple(chosen)]) < 4, "among the best of 66"
    score = torch.cat([s.flatten() for s in importance(network, (x, y)).values()])
    alone = [none - loss((i,)) for i in range(12)]  # what each weight is worth, by its removal from the variation
    assert stats.spearmanr(score, alone).statistic > 0.9


@pytest.mark.parametrize("select", ["random", "magnitude", "fisher", "sampled"])
@pytest.mark.parametrize("allocation", ["global", "equal", "weighted"])
def test_without_and_with_all_weights(tiny, blobs, select, allocation):
    """A fraction of 0 is the unprotected network bit for bit, and one of 1 the nominal network on every chip."""
    few = blobs.take(20)
    analog = convert(tiny, DEVICE)
    with programmed(analog, 4), torch.no_grad():
        weights = [layer.chip_weight() for layer in analog_layers(analog)]
        outputs = analog(few.images)
    bare = evaluate(analog, blobs, 5, progress=False).table
    protect(analog, protected_weights(tiny, 0, select, allocation, data=few))
    with programmed(analog, 4), torch.no_grad():
        again = [layer.chip_weight() for layer in analog_layers(analog)]
        assert torch.equal(analog(few.images), outputs)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    assert evaluate(analog, blobs, 5, progress=False).table["correct"].tolist() == bare["correct"].tolist()
    protect(analog, protected_weights(tiny, 1.0, select, allocation, data=few))
    assert set(evaluate(analog, blobs, 5, progress=False).accuracies) == {clean_accuracy(tiny, blobs)}


def test_protection_takes_the_variation_of_the_protected_weights_alone(tiny, blobs):
    masks = protected_weights(tiny, 0.3, "fisher", data=blobs.take(20))
    analog, bare = convert(tiny, DEVICE), convert(tiny, DEVICE)
    protect(analog, masks)
    with programmed(analog, 9), programmed(bare, 9):
        for own, other, mask in zip(analog_layers(analog), analog_layers(bare), masks.values(), strict=True):
            assert torch.equal(own.chip_weight(), torch.where(mask, other.nominal, other.chip_weight()))


def test_results_with_and_without_protection_pair_over_chips(tiny, blobs):
    analog = convert(tiny, DEVICE)
    bare = evaluate(analog, blobs, 5, progress=False)
    protect(analog, protected_weights(tiny, 0.5, "magnitude"))
    found = evaluate(analog, blobs, 5, progress=False)
    assert found.minus(bare).estimate == pytest.approx(found.mean - bare.mean)
    assert found.table["model"][0] != bare.table["model"][0], "but are told apart"


def test_numbers_in_each_layer(tiny, blobs):
    sizes, data = {"0.layer": 36, "3.layer": 512, "4": 24}, blobs.take(20)

    def counts(*arguments):
        return {name: int(mask.sum()) for name, mask in protected_weights(tiny, *arguments, data=data).items()}

    assert counts(0.25, "random") == counts(0.25, "fisher", "equal") == {"0.layer": 9, "3.layer": 128, "4": 6}
    assert sum(counts(0.1, "fisher").values()) == round(0.1 * 572)
    totals = {name: float(score.sum()) for name, score in importance(tiny, data).items()}
    expected = allotted(list(totals.values()), list(sizes.values()), round(0.1 * 572))
    assert list(counts(0.1, "random", "weighted").values()) == expected
    assert counts(0.1, "magnitude", {"0.layer": 0, "3.layer": 1, "4": 3}) == {"0.layer": 0, "3.layer": 33, "4": 24}


def test_the_largest_weights(tiny):
    masks = protected_weights(tiny, 0.1, "magnitude")
    weights = dict(zip(masks, (tiny[0].layer.weight, tiny[3].layer.weight, tiny[4].weight), strict=True))
    inside = torch.cat([weights[name][mask].abs() for name, mask in masks.items()])
    outside = torch.cat([weights[name][~mask].abs() for name, mask in masks.items()])
    assert inside.numel() == 57
    assert inside.min() >= outside.max()


def test_random_masks_are_uniform_and_drawn_from_the_seed():
    network = nn.Linear(20, 50)
    found = torch.stack([protected_weights(network, 0.2, "random", seed=s)[""] for s in range(100)])
    assert found.sum((1, 2)).tolist() == [200] * 100
    each = found.double().mean(0)
    assert abs(float(each.var() / (0.2 * 0.8 / 100)) - 1) < 5 * math.sqrt(2 / 1000), "as independent draws have it"
    assert torch.equal(found[7], protected_weights(network, 0.2, "random", seed=7)[""])
    assert not torch.equal(found[7], found[8])
    larger = protected_weights(network, 0.4, "random", seed=7)[""]
    assert (larger & found[7]).sum() == 200, "a larger fraction protects the same weights and more"


def test_sampled_weights_are_drawn_by_their_importance():
    """The first draw of weight i has probability p_i / sum p."""
    network, x, y = nn.Linear(2, 2, bias=False), torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([0, 1])
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.6, -0.5], [0.2, 0.4]]))
    score = importance(network, (x, y))[""].flatten().numpy()
    draws = sum(
        protected_weights(network, 0.25, "sampled", data=(x, y), seed=s)[""].flatten().numpy() * 1 for s in range(500)
    )
    assert draws.sum() == 500
    assert stats.chisquare(draws, 500 * score / score.sum()).pvalue > 1e-4
    assert stats.chisquare(draws).pvalue < 1e-6, "uniform draws would be seen"


def test_excluded_layers_are_not_protected(tiny, blobs):
    masks = protected_weights(tiny, 0.5, "fisher", data=blobs.take(20), exclude=["0"])
    assert {name: mask.numel() for name, mask in masks.items()} == {"3.layer": 512, "4": 24}
    assert sum(int(mask.sum()) for mask in masks.values()) == 268


def test_the_share_of_protected_weights(tiny):
    masks = protected_weights(tiny, 0.5, "random")
    parameters = sum(p.numel() for p in tiny.parameters())
    assert protected_share(tiny, masks) == 286 / parameters
    assert protected_share(compensate(tiny, {"0.layer": 2}), masks) == 286 / parameters
    assert protected_share(tiny, {}) == 0


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 500)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_numbers_add_up_and_fit(layers, fraction):
    shares, sizes = zip(*layers, strict=True)
    total = round(fraction * sum(sizes))
    counts = allotted(shares, sizes, total)
    assert sum(counts) == total
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


def test_numbers_by_hand():
    assert allotted([1, 1], [10, 10], 7) == [4, 3]
    assert allotted([3, 1], [10, 10], 8) == [6, 2]
    assert allotted([3, 1], [4, 10], 8) == [4, 4], "what the first cannot take, the second gets"
    assert allotted([0, 5], [10, 3], 6) == [3, 3]
    assert allotted([0, 0], [10, 30], 8) == [2, 6]
    assert allotted([1, 2, 3], [5, 5, 5], 15) == [5, 5, 5]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fraction": 5}, "fraction lies between 0 and 1"),
        ({"fraction": True}, "fraction lies between 0 and 1"),
        ({"select": "largest"}, "select is one of random, magnitude, fisher, sampled, not 'largest'"),
        ({"allocation": "even"}, "allocation is one of global, equal, weighted, not 'even'"),
        ({"select": "fisher"}, "importance is found from images and labels; give data"),
        ({"allocation": "weighted"}, "importance is found from images and labels; give data"),
        ({"allocation": {"4": 1.0}}, "allocation has 4, but the layers are 0.layer, 3.layer, 4"),
        ({"allocation": {"0.layer": 1.0, "3.layer": -1.0, "4": 0.0}}, "a number of at least 0, not -1.0"),
    ],
)
def test_bad_calls(tiny, options, said):
    with pytest.raises(UserError, match=said):
        protected_weights(tiny, **{"fraction": 0.1, "select": "random", **options})


def test_gradients_that_are_not_finite(tiny, blobs):
    with torch.no_grad():
        tiny[4].weight.fill_(float("inf"))
    with pytest.raises(UserError, match=r"the gradients of .* are not finite"):
        importance(tiny, Split(blobs.images[:2], blobs.labels[:2]))
    assert tiny[4].weight.isinf().all(), "the network is left as it was"


def test_rows_with_protected_weights(tmp_path):
    """The stage: all weights protected are the nominal network on every chip; the columns say what is protected."""
    model, parameters = tmp_path / "pretrain", 61706
    succeed("pretrain", "--quiet", "--threads", 1, "--epochs", 3, "--batch", 64, "--out", model)

    def table(name, *options):
        out = tmp_path / f"{name}.csv"
        few = ["--quiet", "--threads", 1, "--chips", 4, "--images", 100, "--protect-images", 50]
        succeed("evaluate", *few, *options, "--note", "pair=p", "--note", f"row={name}", "--model", model, "--out", out)
        return pd.read_csv(out)

    bare, clean = table("bare"), table("clean", "--sigma", 0)
    everything = table("everything", "--fraction", 1, "--select", "random")
    assert everything["correct"].tolist() == [clean["correct"][0]] * 4
    assert everything["protected"].tolist() == [61470] * 4
    assert everything["overhead"].tolist() == [61470 / parameters] * 4
    assert bare["correct"].nunique() > 1
    assert everything["digital_macs"].tolist() == [1.0] * 4
    assert "protected" not in bare

    important, again = (table(name, "--fraction", 0.2) for name in ("important", "again"))
    random = table("random", "--fraction", 0.2, "--select", "random")
    assert important["correct"].tolist() == again["correct"].tolist() != random["correct"].tolist()
    assert important["overhead"].tolist() == random["overhead"].tolist() == [12294 / parameters] * 4
    assert important["masks"][0] == again["masks"][0] != random["masks"][0]
    assert important["device"][0] == bare["device"][0], "rows pair over chips"
    both = table("both", "--fraction", 1, "--front", 1)
    assert both["overhead"][0] == pytest.approx(61470 / parameters)
    files = [tmp_path / f"{name}.csv" for name in ("bare", "important", "random")]
    succeed("collect", *files, "--out", tmp_path / "samples.csv")
    assert len(pd.read_csv(tmp_path / "samples.csv")) == 12
