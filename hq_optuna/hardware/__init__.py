"""What a target can execute: pairs of bits by kind of layer, grids, pins. Data, and its reader."""

from hq_optuna.hardware.description import ANY, Hardware, presets, read_hardware
from hq_optuna.hardware.space import space_on

__all__ = ["ANY", "Hardware", "presets", "read_hardware", "space_on"]
