"""Settings of the stages and methods, one section each, validated before anything runs.

The docstring below a setting is its help text on the command line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from correctnet.devices.configuration import (
    AnyVariation,
    ConverterSettings,
    DeviceSettings,
    VariationSettings,
    checked_variation,
    replaced,
)
from correctnet.errors import UserError
from correctnet.sections import Grown, Section, merge
from correctnet.sources import Data, Network

# Which weights are protected, and how they are divided among the layers (`correctnet.methods.selection`).
Selection = Literal["random", "magnitude", "fisher", "sampled"]
Allocation = Literal["global", "equal", "weighted"]
# Digital paths beside analog layers: module and class in `correctnet.methods`; known without torch.
PATHS: dict[str, str] = {
    "lora": "lora:LowRank",
    "vera": "vera:SharedProjections",
    "sparse": "sparse:SparseResidual",
}


class Digital(Grown):
    """Layers in digital hardware, exact on every chip; their weights count as overhead (a baseline)."""

    later = ("front", "layers")

    front: int = Field(0, ge=0)
    """number of layers from the first on, in the order in which the network runs them, that are digital"""
    layers: tuple[str, ...] = ()
    """names of further layers that are digital"""


class Protect(Grown):
    """Weights that are exact on every chip, as they are kept in digital memory; they count as overhead (a baseline)."""

    later = ("fraction", "select", "allocation", "images")

    fraction: float = Field(0.0, ge=0, le=1)
    """protected weights / weights that carry variation"""
    select: Selection = "fisher"
    """which ones: random ones; the largest; those of the largest importance w^2 E[(dL/dw)^2]; or drawn by importance"""
    allocation: Allocation | None = None
    """how many in each layer: as the selection over all layers has it, the same fraction, or in proportion to the
    importance of all of a layer's weights; empty: the same fraction for random ones, else over all layers"""
    images: int | None = Field(2000, ge=1)
    """training images from which the importance is found; empty: all"""


class Training(Section):
    """One training run."""

    epochs: int = Field(10, ge=0)
    """passes over the training data"""
    batch: int = Field(128, ge=1)
    """images a step"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9"""
    learning_rate: float = Field(1e-3, gt=0)
    """peak learning rate of the one-cycle schedule (linear warm-up, then cosine to zero)"""
    weight_decay: float = Field(0.0, ge=0)
    """weight decay"""
    warmup: float = Field(0.1, ge=0, lt=1)
    """fraction of the steps over which the learning rate rises"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """arithmetic of forward and backward (bfloat16: autocast, weights stay float32; float32 on a CPU without it)"""
    clip: float | None = Field(None, gt=0)
    """gradient clipping: the largest norm of a step's gradient; empty: no clipping"""


class Resized(Training):
    """A training whose first epochs may see smaller images."""

    sizes: tuple[int, ...] = ()
    """progressive resizing: side of the images in the first epochs, one value an epoch; later epochs use the full size.
    An epoch at half the side takes about a quarter of the time"""

    @field_validator("sizes")
    @classmethod
    def _sizes(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(n < 1 for n in value):
            raise ValueError("sides of 1 pixel or more are expected")
        return value


class Pretrain(Resized):
    """Training of the original network."""


class Suppress(Resized):
    """Error suppression: training under the modified Lipschitz regulariser, (10) and (11)."""

    beta: float = Field(1e-4, ge=0)
    """weight of the regulariser in the loss"""
    k: float = Field(1.0, gt=0)
    """Lipschitz constant k of each layer; 1 in the paper"""
    form: Literal["orthogonal", "one-sided"] = "orthogonal"
    """pull all singular values to lambda, as (11) is printed, or only those above it, as (9) asks"""
    start: Literal["pretrained", "scratch"] = "pretrained"
    """weights to start from"""
    ramp: float = Field(0.0, ge=0, lt=1)
    """fraction of the steps over which beta rises from 0"""
    fold_batchnorm: bool = False
    """regularise each weight times its BatchNorm's scale, the matrix whose norm is the layer's Lipschitz constant"""
    temperature: float = Field(1.0, gt=0)
    """the loss divides the logits by it; below 1 it offsets the small logits of suppressed networks"""


class Inject(Training, Grown):
    """Variation-aware training: variation in all weights, a fresh chip sample each batch (a baseline, after [11])."""

    later = ("gradient",)

    batchnorm: Literal["updated", "frozen"] = "updated"
    """normalise with each batch, which is one chip's, and update the statistics; or normalise with those of
    pre-training, as a chip does that is not recalibrated"""
    gradient: Literal["through", "straight"] = "through"
    """of the nominal weights: through the variation, e^theta times that of the chip's weights, or straight, as if these
    were the nominal ones"""


class Distil(Inject):
    """Variation-aware training that also learns from the original network (a baseline, after [8])."""

    later = ("gradient", "teachers")

    temperature: float = Field(2.0, gt=0)
    """T, by which the logits of both networks are divided where the student learns from the teacher"""
    alpha: float = Field(0.5, ge=0, le=1)
    """weight of the teacher in the loss, (1 - alpha) cross entropy + alpha T^2 KL divergence"""
    teachers: tuple[float, ...] = Field((), max_length=7)
    """instead of the original network, several that are first trained at these sigmas, and teach with them; empty: the
    original network alone"""

    @field_validator("teachers")
    @classmethod
    def _teachers(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < s <= 3 for s in value) or len(set(value)) != len(value):
            raise ValueError("sigmas lie above 0 and at most 3, each once")
        return value


class MomentsTraining(Training):
    """Training with the moments of what variation does, instead of chips (a baseline, after [10] and [7])."""

    layers: Literal["all", "last"] = "all"
    """whose variation is seen: that of all layers, in logits that are drawn ([10]); or that of the last layer, in a
    margin ([7])"""
    gamma: float = Field(1.0, ge=0)
    """standard deviations of the margin, by which the last layer's true class is lowered and others are raised"""


class Adapt(Grown):
    """Online training of the protected weights on each chip, all else frozen (a baseline, after [8] and [9])."""

    later = ("weights", "passes", "images", "batch", "optimizer", "learning_rate", "warmup", "precision", "clip")

    weights: Literal["protected", "digital", "all"] = "protected"
    """which are trained: the protected ones, those of digital layers, or all on crossbars, as a ceiling"""
    passes: int = Field(0, ge=0)
    """passes over the images on each chip; 0: the weights are not trained"""
    images: int | None = Field(None, ge=1)
    """training images that each chip is trained on; empty: all"""
    batch: int = Field(128, ge=1)
    """images a step"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9, without weight decay"""
    learning_rate: float = Field(1e-3, gt=0)
    """peak learning rate of the one-cycle schedule"""
    warmup: float = Field(0.1, ge=0, lt=1)
    """fraction of the steps over which the learning rate rises"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """arithmetic of forward and backward, as for the other trainings"""
    clip: float | None = Field(None, gt=0)
    """gradient clipping, as for the other trainings"""

    def training(self) -> Training:
        """The training that these settings describe."""
        values = {key: value for key, value in dict(self).items() if key not in ("weights", "passes", "images")}
        return Training(epochs=self.passes, weight_decay=0.0, **values)


class Calibrate(Grown):
    """Calibration of each chip by least squares on a few images, without labels (a baseline)."""

    later = ("images", "rank", "ridge")

    images: int = Field(0, ge=0)
    """training images on which each chip is calibrated; 0: no chip is"""
    rank: int = Field(2, ge=0)
    """of the path beside each layer; 0: a gain for each output alone"""
    ridge: float = Field(1e-3, ge=0)
    """weight of the path's squared norm, over that of the layer's inputs"""


class RowMapping(Grown):
    """Where the rows of a layer's weights are on a chip's crossbars (a baseline, after [7] and [12])."""

    later = ("rows",)

    rows: Literal["given", "assigned"] = "given"
    """in their order; or on each chip, whose factors are known, where these harm least"""


class Sweep(Section):
    """Candidate layers: variation from the last layer backwards to the i-th."""

    threshold: float = Field(0.95, gt=0, le=1)
    """fraction of the original accuracy below which the first i layers become candidates; 0.95 in the paper"""
    chips: int = Field(50, ge=1, le=2**28)
    """chip samples a layer"""
    images: int | None = Field(None, ge=1)
    """validation images; empty: all"""


class Compensate(Training):
    """Generators and compensators (Fig. 5), trained with everything else frozen."""

    batch: int = Field(32, ge=1)
    """images a step; few, since a step uses one chip sample, and many chips teach more than many images of one"""
    learning_rate: float = Field(1e-2, gt=0)
    """peak learning rate of the one-cycle schedule; ten times a network's own, as the new layers are few"""
    activation: Literal["none", "relu"] = "relu"
    """activation after the generator"""
    init: Literal["identity", "random"] = "identity"
    """start as the identity, or from torch's default initialisation"""
    place: Literal["layer", "block"] = "layer"
    """after the analog layer itself, or after its BatchNorm and ReLU"""
    pool: Literal["adaptive", "kernel"] = "adaptive"
    """average pooling of the layer's input to its output's size: adaptive, or with the layer's own window"""
    batchnorm: Literal["frozen", "updated", "affine"] = "frozen"
    """while the compensators train: normalise with the stored statistics; normalise with each batch and update them; or
    normalise with the stored ones and train scale and shift (digital already: no overhead) with the compensators"""
    chips_per_batch: int = Field(1, ge=1)
    """fresh chip samples a batch, over which the gradient is averaged"""


# Chip samples on which trained compensators are compared with none, see
# `correctnet.methods.compensation_training.keep_better`.
JUDGED_CHIPS = 10


class Finetune(Inject):
    """Variation-aware training of a whole compensated network, analog weights and compensators: beyond the paper, which
    trains the compensators alone."""

    batch: int = Field(32, ge=1)
    """images a step; few, since a step uses one chip sample"""
    batchnorm: Literal["updated", "frozen"] = "frozen"
    """as for `inject`"""


class SidePath(Training):
    """Digital paths beside the layers of a network, trained with variation and all else frozen (a baseline)."""

    path: Literal[tuple(PATHS)] = "lora"
    """low-rank; through projections that all layers share, of which each trains two vectors; or sparse"""
    rank: int = Field(4, ge=1)
    """of a path through a low-rank product"""
    fraction: float = Field(0.01, ge=0, le=1)
    """of a sparse path: its weights / those of the network"""
    select: Selection = "fisher"
    """of a sparse path: at which weights it is, as for `protect`"""
    select_images: int | None = Field(2000, ge=1)
    """training images from which their importance is found; empty: all"""
    batch: int = Field(32, ge=1)
    """images a step; few, since a step uses one chip sample"""


class Search(Section):
    """Search for the layers to compensate and their numbers of filters: REINFORCE over the candidates, reward (12)."""

    strategy: Literal["reinforce", "random", "greedy", "all"] = "reinforce"
    """REINFORCE with an LSTM policy; random states; or no search: greedy, the candidates in order, each with the
    largest S that still fits the largest limit; all, every candidate with the largest S, whatever the limit"""
    limits: tuple[float, ...] = (0.01, 0.02, 0.03)
    """overhead limits, one search each; the most accurate result of all is used"""
    ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """possible values of S, generator filters / layer filters"""
    evaluations: int = Field(24, ge=1)
    """largest number of states trained and evaluated; the one without compensation trains nothing and is not counted"""
    episodes: int = Field(100, ge=1)
    """largest number of updates of the policy"""
    rollouts: int = Field(4, ge=1)
    """states drawn an episode"""
    population: int | None = Field(None, ge=1)
    """new states an episode, drawn until there are that many; the workflow trains each in its own job, so that a
    cluster works on a population at a time. Empty: those among the rollouts, all in one job"""
    learning_rate: float = Field(0.1, gt=0)
    """of the policy (Adam)"""
    entropy: float = Field(0.3, ge=0)
    """weight of the policy's entropy, against premature convergence; rewards are in standard deviations"""
    baseline: float = Field(0.8, ge=0, lt=1)
    """decay of the moving average of the rewards"""
    train_epochs: int = Field(1, ge=1)
    """epochs of compensator training a state"""
    train_images: int | None = Field(None, ge=1)
    """training images a state; empty: all"""
    chips: int = Field(20, ge=2, le=2**28)
    """chip samples for a state's accuracy"""
    images: int | None = Field(None, ge=1)
    """validation images; empty: all"""

    @field_validator("limits")
    @classmethod
    def _limits(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) <= 0 or max(value) > 1:
            raise ValueError("limits are fractions above 0 and at most 1, at least one")
        if len(set(value)) != len(value):
            raise ValueError("each limit once")
        return value

    @field_validator("ratios")
    @classmethod
    def _ratios(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if 0.0 not in value or max(value) <= 0:
            raise ValueError("ratios need 0 (no compensation) and a positive value")
        if min(value) < 0 or max(value) > 10:
            raise ValueError("ratios are numbers from 0 to 10 (0.5, not 50)")
        if len(set(value)) != len(value):
            raise ValueError("each ratio once")
        return value


# Strategies that train states.
SEARCHING = ("reinforce", "random")


def search_rounds(search: Search) -> int:
    """Largest number of populations that a search trains after the state without compensation; 0 if it has none."""
    return math.ceil(search.evaluations / search.population) if search.population else 0


class MonteCarlo(Section):
    """Simulation of chip samples, in the sweep, the search and the evaluation."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """precision of weights and activations in the C++ core (sums are float32)"""
    gpu_method: Literal["auto", "fused", "materialise", "library"] = "auto"
    """where noisy weights are generated on a GPU: fused, while a kernel loads them; materialised in memory for the same
    kernels (the same bits); or in memory for cuBLAS and cuDNN (other bits). No effect on a CPU"""


class Evaluate(Grown):
    """Monte Carlo evaluation."""

    later = ("until", "variation")

    chips: int = Field(250, ge=1, le=2**28)
    """chip samples of a Table I row"""
    until: float | None = Field(None, gt=0)
    """half-width of the 95 % interval of the mean (0.002: 0.2 points) at which fewer chips are enough; empty: all"""
    split: Literal["test", "validation"] = "test"
    """images that are classified; "validation" for every choice between settings"""
    images: int | None = Field(None, ge=1)
    """how many of them; empty: all"""
    sigmas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    """further levels for the curves of Figures 2 and 7: sigmas, or multiples of a measured device's deviations"""
    curve_chips: int = Field(50, ge=1, le=2**28)
    """chip samples at each of those"""
    curve_images: int | None = Field(None, ge=1)
    """images at each of those; empty: as many as at the row's own level"""
    chunk: int = Field(125, ge=1)
    """chip samples a job"""
    recalibrate: Literal["none", "simulated", "chip"] = "none"
    """BatchNorm statistics: as trained, estimated once over simulated chips, or estimated on each chip"""
    recalibrate_images: int = Field(512, ge=2)
    """training images for the estimate"""
    variation: dict[str, Any] = Field(default_factory=dict)
    """settings of `variation` that differ where networks are evaluated: another time, or another device than the one
    that they are trained for; empty: none"""

    @field_validator("variation")
    @classmethod
    def _variation(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            checked_variation(value)
        except UserError as error:
            raise ValueError(
                " and ".join(str(error).replace("evaluate: variation", "variation").splitlines())
            ) from None
        return value

    @field_validator("sigmas")
    @classmethod
    def _sigmas(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < s <= 3 for s in value):
            raise ValueError("sigmas lie above 0 and at most 3 (0 is always evaluated)")
        return value


class Sensitivity(Section):
    """Sensitivity of each layer: accuracy with variation in that layer alone."""

    chips: int = Field(20, ge=1, le=2**28)
    """chip samples a layer"""
    images: int | None = Field(500, ge=1)
    """validation images; empty: all"""


class Settings(Grown):
    """All settings of one row of a pair."""

    later = ("converters", "digital", "protect", "adapt", "calibrate", "mapping")

    seed: int = Field(0, ge=0, lt=2**63)
    """seed of every random draw"""
    data: Data = Data()
    network: Network = Network()
    variation: AnyVariation = VariationSettings()
    converters: ConverterSettings = ConverterSettings()
    digital: Digital = Digital()
    protect: Protect = Protect()
    adapt: Adapt = Adapt()
    calibrate: Calibrate = Calibrate()
    mapping: RowMapping = RowMapping()
    base: Literal["pretrain", "suppress", "inject"] = "suppress"
    """the stage whose network is swept, searched and compensated; suppress in the paper"""
    pretrain: Pretrain = Pretrain()
    suppress: Suppress = Suppress()
    inject: Inject = Inject()
    distil: Distil = Distil()
    moments: MomentsTraining = MomentsTraining()
    sidepath: SidePath = SidePath()
    sweep: Sweep = Sweep()
    search: Search = Search()
    compensate: Compensate = Compensate()
    finetune: Finetune = Finetune()
    montecarlo: MonteCarlo = MonteCarlo()
    evaluate: Evaluate = Evaluate()
    sensitivity: Sensitivity = Sensitivity()

    @property
    def tested(self) -> VariationSettings | DeviceSettings:
        """The variation under which networks are evaluated: `variation`, with what `evaluate.variation` changes."""
        if not self.evaluate.variation:
            return self.variation
        own = {"variation": self.variation.model_dump(mode="json")}
        return checked_variation(layered(own, {"variation": self.evaluate.variation})["variation"])

    def identified(self) -> Settings:
        """The settings with the digests of the user's own data, network and device, where they are not given.

        Raises UserError where these are not there, or the settings of a device make none.
        """
        changed: dict[str, Section] = {}
        if self.data.digest is None and (described := self.data.described()) is not None:
            changed["data"] = self.data.model_copy(update={"digest": described.digest})
        if self.network.digest is None and (digest := self.network.found_digest()) is not None:
            changed["network"] = self.network.model_copy(update={"digest": digest})
        if (variation := self.variation.identified()) is not self.variation:
            changed["variation"] = variation
        if self.evaluate.variation:
            tested = self.tested.identified().model_dump(mode="json")
            changed["evaluate"] = self.evaluate.model_copy(update={"variation": tested})
        return self.model_copy(update=changed) if changed else self


def layered(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Settings merged as by `merge`; data, a network or a device that `over` names take the place of those of `under`.

    A digest, weights or options of the former are not those of the latter.
    """
    under = dict(under)
    if isinstance(under.get("variation"), Mapping) and isinstance(over.get("variation"), Mapping):
        under["variation"] = replaced(under["variation"], over["variation"])
    for key, section in (("data", Data), ("network", Network)):
        inner, outer = under.get(key), over.get(key)
        if not (isinstance(inner, Mapping) and isinstance(outer, Mapping)):
            continue
        named = [source for source in section.sources if outer.get(source) is not None]
        if named and any(inner.get(source) != outer.get(source) for source in section.sources):
            left = {*section.sources, *section.added}
            if outer.get(section.sources[0]) is None:
                left |= set(section.of_first)
            under[key] = {k: v for k, v in inner.items() if k not in left}
    return merge(under, over)
