"""Device models: what programming a crossbar does to the weights.

A further device is a module with a `Variation` subclass and a line in `DEVICES`.
"""

from __future__ import annotations

from typing import Any

from correctnet.devices.base import Variation
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError

# The device models by their names in the settings (`variation.model`).
DEVICES: dict[str, type[Variation]] = {
    "lognormal": LogNormalVariation,
}


def make(settings: Any) -> Variation:
    """Make the device that the `variation` section of the settings describes.

    Raises:
        UserError: no device has the name `settings.model`.
    """
    if settings.model not in DEVICES:
        raise UserError(f"variation.model: no device {settings.model!r} (known: {', '.join(DEVICES)})")
    return DEVICES[settings.model].from_settings(settings)
