"""SAM 2 and 2.1 by the import paths of the official package: ``sam2.x`` is ``sam.sam2.x`` here.

Where hydra is installed, and no program has initialised it, its configs are those of this package from now on, as
officially. Nothing here needs it.
"""

from __future__ import annotations


def _offer_configs() -> None:
    """Make hydra find the configs of this package by their names, as ``configs/sam2.1/sam2.1_hiera_t.yaml``."""
    try:
        from hydra import initialize_config_module
        from hydra.core.global_hydra import GlobalHydra
    except ImportError:
        return
    if not GlobalHydra.instance().is_initialized():
        initialize_config_module(__name__, version_base="1.2")


_offer_configs()
