"""Device models: what programming a crossbar does to the weights.

To add a device, write a module with a `Variation` subclass that has `from_settings`, and add a line to `DEVICES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from correctnet.devices.base import Variation

# By name in the settings (`variation.model`), module and class of the device; known without torch. With
# `variation.device` it is `correctnet.devices.device.Device`.
DEVICES: dict[str, str] = {
    "lognormal": "lognormal:LogNormalVariation",
}


def make(settings: Any) -> Variation:
    """Make the device that the `variation` section of the settings describes.

    Raises UserError where the settings of a measured device make none.
    """
    named = getattr(settings, "model", None)
    module, name = ("device:Device" if named is None else DEVICES[named]).split(":")
    return getattr(import_module(f"correctnet.devices.{module}"), name).from_settings(settings)
