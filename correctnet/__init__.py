"""CorrectNet: neural networks under the device variation of analog in-memory hardware."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# The public names, and the modules that they come from; imported when first used, so that the command line, which
# needs few of them, starts at once.
_PUBLIC = {
    "LogNormalVariation": "devices.lognormal",
    "Variation": "devices.base",
    "GaussianVariation": "devices.gaussian",
    "Device": "devices.device",
    "Protected": "devices.protected",
    "convert": "crossbar.convert",
    "chip": "crossbar.plain",
    "program": "crossbar.convert",
    "programmed": "crossbar.convert",
    "protect": "crossbar.protection",
    "Converters": "crossbar.converters",
    "add_converters": "crossbar.calibration",
    "clipped": "crossbar.calibration",
    "noisy_linear": "crossbar.operators",
    "noisy_conv2d": "crossbar.operators",
    "check_coverage": "evaluation.coverage",
    "evaluate": "evaluation.montecarlo",
    "compare": "evaluation.comparison",
    "Comparison": "evaluation.comparison",
    "clean_accuracy": "evaluation.montecarlo",
    "clean_value": "evaluation.montecarlo",
    "Metric": "metrics",
    "Result": "evaluation.results",
    "correct": "correction.call",
    "Correction": "correction.outcome",
    "suppress": "methods.suppression_training",
    "find_candidates": "methods.candidates",
    "Sweep": "methods.candidates",
    "sensitivity": "methods.candidates",
    "adapt": "methods.adaptation",
    "add_calibration": "methods.calibration",
    "calibrate": "methods.calibration",
    "calibration_share": "methods.calibration",
    "distil": "methods.distillation",
    "fit_side_paths": "methods.sidepaths",
    "side_share": "methods.sidepaths",
    "front_layers": "methods.front",
    "digital_share": "methods.front",
    "multiplications": "methods.costs",
    "digital_multiplications": "methods.costs",
    "importance": "methods.selection",
    "protected_weights": "methods.selection",
    "protected_share": "methods.selection",
    "search": "methods.placement",
    "Placement": "methods.placement",
    "compensate": "methods.compensation",
    "overhead": "methods.compensation",
    "save": "methods.saved",
    "load": "methods.saved",
    "fit_compensators": "methods.compensation_training",
    "UserError": "errors",
}
__all__ = ["__version__", "metrics", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return import_module("correctnet.metrics")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'correctnet' has no attribute {name!r}")
    return getattr(import_module(f"correctnet.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
