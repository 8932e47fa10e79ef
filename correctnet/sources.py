"""Sections of settings that say where something comes from: the data and the network, of this package or your own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from correctnet.datasets import DATASETS, Facts
from correctnet.files.factories import check_name, source_digest
from correctnet.files.storage import sha256
from correctnet.networks import NETWORKS
from correctnet.sections import Sourced, place

if TYPE_CHECKING:
    from correctnet.datasets.description import Description

# Names of the registries, so that a mistake in one is found when settings are read.
DataSetName = Literal[tuple(DATASETS)]
NetworkName = Literal[tuple(NETWORKS)]


class Data(Sourced):
    """The data that the network is trained and evaluated on: a data set of `correctnet.datasets`, or your own."""

    sources = ("dataset", "folder", "npz", "factory")
    added = ("folder", "npz", "factory", "digest")

    dataset: DataSetName | None = "digits"
    """data set"""
    validation: float = Field(0.1, gt=0, lt=1)
    """fraction of the training data held out for every choice (sweep, search)"""
    augment: Literal["none", "crop", "crop-flip"] = "none"
    """while training: random crop after padding by 4 pixels, and horizontal flip"""
    folder: str | None = None
    """instead of a data set, a folder of pictures: a sub-folder a class, or train and test with a sub-folder a class"""
    npz: str | None = None
    """instead of a data set, an .npz file: train_images, train_labels, test_images and test_labels, or images and
    labels"""
    factory: str | None = None
    """instead of a data set, package.module:function, which returns ((images, labels), (images, labels))"""
    digest: str | None = None
    """of the content of your own data, which is refused if it has another; found when it is not given"""

    @field_validator("folder", "npz")
    @classmethod
    def _places(cls, value: str | None) -> str | None:
        return None if value is None else place(value)

    @field_validator("factory")
    @classmethod
    def _factory(cls, value: str | None) -> str | None:
        return None if value is None else check_name(value)

    @property
    def place(self) -> str:
        """The data set, folder, file or function."""
        return getattr(self, self.kind)

    @property
    def name(self) -> str:
        """The data set's name, for tables and results; of your own data the name of the folder, file or function."""
        if self.kind == "dataset":
            return self.place
        from correctnet.datasets import own  # imports numpy, as below

        return own.name_of(self.kind, self.place)

    def described(self) -> Description | None:
        """Of your own data; None for a data set. Raises UserError where there is no such data."""
        if self.kind == "dataset":
            return None
        from correctnet.datasets import own

        return own.describe(self.kind, self.place, self.digest)

    def facts(self) -> Facts | None:
        """Numbers of images and their sizes; None for a function, which is called when its images are needed."""
        described = self.described()
        return DATASETS[self.place] if described is None else described.facts


class Network(Sourced):
    """The network: one of `correctnet.networks`, or your own."""

    sources = ("name", "factory")
    added = ("factory", "options", "weights", "digest")
    of_first = ("widths", "batchnorm", "dropout")

    name: NetworkName | None = "lenet5"
    """architecture"""
    widths: tuple[int, ...] = ()
    """outputs of each layer but the last: LeNet-5's two convolutions and two linear layers (empty: 6, 16, 120, 84), or
    VGG16's thirteen convolutions and its linear layer (empty: 64 to 512)"""
    batchnorm: Literal["before", "after", "none"] = "before"
    """VGG16's BatchNorm: before ReLU, after it (the Keras network), or none"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """fraction of each hidden layer's outputs that is dropped in training"""
    factory: str | None = None
    """instead of an architecture, package.module:function, which returns an nn.Module with outputs (N, classes)"""
    options: dict[str, Any] = Field(default_factory=dict)
    """arguments of that function"""
    weights: str | None = None
    """a file of weights to start from (safetensors, or a state dict that torch saved); nothing is pre-trained then"""
    digest: str | None = None
    """of the function's source and the weights, which are refused if they have another; found when it is not given"""

    @field_validator("widths")
    @classmethod
    def _widths(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value and min(value) < 1:
            raise ValueError("positive widths are expected")
        return value

    @field_validator("factory")
    @classmethod
    def _factory(cls, value: str | None) -> str | None:
        return None if value is None else check_name(value)

    @field_validator("weights")
    @classmethod
    def _weights(cls, value: str | None) -> str | None:
        return None if value is None else place(value)

    def found_digest(self) -> str | None:
        """Of the source of the function and of the weights; None for an architecture without weights.

        Raises UserError where one of them is not there.
        """
        parts = [] if self.factory is None else [source_digest(self.factory, "network.factory")]
        parts += [] if self.weights is None else [sha256(Path(self.weights).expanduser())]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest() if parts else None
