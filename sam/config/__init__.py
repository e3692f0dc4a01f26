"""The descriptions of models, and the tables of the variants that exist."""

from .checks import SIZES, check_whole
from .sam1 import VARIANTS, SamConfig, variant_config

__all__ = ["SIZES", "VARIANTS", "SamConfig", "check_whole", "variant_config"]
