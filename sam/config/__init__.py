"""The descriptions of models, and the tables of the variants that exist."""

from .checks import SIZES, check_whole
from .sam1 import VARIANTS, SamConfig
from .sam2 import SAM2_VARIANTS, HieraConfig, Sam2Config
from .variants import variant_config

__all__ = [
    "SAM2_VARIANTS",
    "SIZES",
    "VARIANTS",
    "HieraConfig",
    "Sam2Config",
    "SamConfig",
    "check_whole",
    "variant_config",
]
