"""Networks that are not ours: torchvision's, each chip held against the plain network with the chip's weights."""

import warnings

import pytest
import torch
import torchvisions
from torch import nn

from correctnet import LogNormalVariation, check_coverage, chip, convert, evaluate, metrics
from correctnet.crossbar.kinds import crossbars
from correctnet.crossbar.layers import CoverageWarning, analog_layers
from correctnet.engine.engine import Engine
from correctnet.evaluation.montecarlo import EngineWarning
from correctnet.noise import specification as reference

HALF = LogNormalVariation(0.5)
CHIPS = 2
# By name: side of the images, and layers of which the network uses none when it is evaluated.
NETWORKS = {
    "resnet18": (32, 0),
    "mobilenet_v2": (64, 0),
    "SwinTransformer": (64, 0),
    "VisionTransformer": (32, 0),
    "inception_v3": (96, 3),
    "shufflenet_v2_x1_0": (64, 0),
}
# The two transformers as in swin_t and vit_b_16, with fewer and narrower layers.
OPTIONS = {
    "SwinTransformer": {
        "patch_size": [4, 4],
        "embed_dim": 24,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": [7, 7],
    },
    "VisionTransformer": {
        "image_size": 32,
        "patch_size": 16,
        "num_layers": 3,
        "num_heads": 4,
        "hidden_dim": 64,
        "mlp_dim": 128,
    },
    "inception_v3": {"init_weights": False, "aux_logits": True},
}


@torch.no_grad()
def chips_by_hand(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(CHIPS, N, classes): outputs of the plain network, its weights replaced by the specification's."""
    held = crossbars(network)
    parameters = [getattr(each.module, each.parameter) for each in held]
    nominal, outputs = [parameter.detach().clone() for parameter in parameters], []
    for sample in range(CHIPS):
        for each, parameter, weight in zip(held, parameters, nominal, strict=True):
            out, channels, *kernel = weight.shape
            factor = torch.from_numpy(reference.lognormal(0, each.index, sample, weight.numel(), 0.5))
            parameter.data = weight * factor.view(out, *kernel, channels).movedim(-1, 1)
        outputs.append(network(images))
    for parameter, weight in zip(parameters, nominal, strict=True):
        parameter.data = weight
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "VisionTransformer")) for name in NETWORKS]
)
def test_every_chip_is_the_oracles(name):
    side, unused = NETWORKS[name]
    make = getattr(torchvisions.models(), name)
    torch.manual_seed(0)
    network = make(num_classes=10, **OPTIONS.get(name, {})).eval()
    if name == "VisionTransformer":  # its head is made of zeros
        nn.init.normal_(network.heads.head.weight, std=0.05)
    images = torch.randn(12, 3, side, side)
    with torch.no_grad():
        labels = network(images).argmax(1)
    outputs = chips_by_hand(network, images)
    # Images whose two best logits are nearly equal may come out either way.
    best = outputs.topk(2, dim=2).values
    close = ((best[..., 0] - best[..., 1]) < 1e-4 * outputs.abs().amax((1, 2))[:, None]).sum(1).tolist()
    wanted = (outputs.argmax(2) == labels).sum(1).tolist()
    with warnings.catch_warnings():
        for category in (CoverageWarning, EngineWarning):
            warnings.simplefilter("ignore", category)
        analog = convert(network, HALF)
        assert len(check_coverage(network, analog, images[:2])) == len(analog_layers(analog)) - unused
        for engine in ("auto", "torch"):
            found = evaluate(analog, (images, labels), CHIPS, engine=engine, progress=False).table["correct"].tolist()
            assert all(abs(f - w) <= c for f, w, c in zip(found, wanted, close, strict=True)), (engine, found, wanted)


# By name: side of the images.
PLANS = {
    "resnet18": 32,
    "resnet50": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "efficientnet_b0": 32,
    "densenet121": 32,
    "shufflenet_v2_x1_0": 32,
    "squeezenet1_1": 35,
    "regnet_y_400mf": 32,
    "inception_v3": 96,
    "googlenet": 35,
    "convnext_tiny": 32,
    "VisionTransformer": 32,
    "SwinTransformer": 36,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "mobilenet_v2")) for name in PLANS]
)
@torch.no_grad()
def test_one_plan_computes_the_network(name):
    side = PLANS[name]
    torch.manual_seed(0)
    # Without the heads that are for training: the images are too small for inception_v3's.
    options = OPTIONS | {key: {"init_weights": False, "aux_logits": False} for key in ("googlenet", "inception_v3")}
    network = getattr(torchvisions.models(), name)(num_classes=10, **options.get(name, {}))
    if name == "VisionTransformer":  # its head is made of zeros
        nn.init.normal_(network.heads.head.weight, std=0.05)
    images = torch.randn(12, 3, side, side)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    network.train()(images)  # statistics with which the network does not amplify rounding
    network.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        analog = convert(network, HALF)
    engine = Engine(analog, images)
    report = engine.report
    assert (report.plans, report.unfused, report.torch) == (1, (), ())
    found, plain = engine.outputs(images, range(CHIPS)), chips_by_hand(network, images)
    exact = chips_by_hand(network.double(), images.double())
    scale = exact.abs().max()
    torch_error, error = ((outputs.double() - exact).abs().max() / scale for outputs in (plain, found))
    assert error <= 4 * torch_error + 1e-5, (error, torch_error)


def test_segmentation_with_outputs_in_a_dict():
    torchvisions.models()
    from torchvision.models import segmentation

    torch.manual_seed(0)
    options = {"weights": None, "weights_backbone": None, "num_classes": 4}
    model = segmentation.lraspp_mobilenet_v3_large(**options).eval()
    images, labels = torch.randn(4, 3, 64, 64), torch.randint(0, 4, (4, 64, 64))
    with torch.no_grad():  # so that no class wins everywhere
        model.classifier.low_classifier.bias -= model(images)["out"].mean((0, 2, 3))
    analog = convert(model, LogNormalVariation(0.05))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = evaluate(analog, (images, labels), CHIPS, metric=metrics.mean_iou(), progress=False)
    said = [str(w.message) for w in caught if issubclass(w.category, EngineWarning)]
    assert len(said) == 1
    assert "66 of 66 analog layers fused" in said[0]
    for k, value in enumerate(found.values):
        with torch.no_grad():
            predicted = chip(analog, k)(images)["out"].argmax(1)
        assert len(predicted.unique()) > 1
        pairs = [((predicted == c) & (labels == c), (predicted == c) | (labels == c)) for c in range(4)]
        wanted = sum(int(both.sum()) / int(either.sum()) for both, either in pairs) / 4
        assert value == pytest.approx(wanted, abs=2e-3), "up to pixels with nearly equal outputs"
