"""The operations of ``fastsam_kernels``, one module each, with the same three names:

- ``CASES``: what ``python -m benchmarks kernels`` measures;
- ``LAUNCHES``: for each shape class of its tiles, the launches at real sizes that the compile report compiles;
- ``TUNING``: for each shape class, the problem on which ``python -m benchmarks tune`` chooses a tile.
"""

from . import (
    connected_components,
    hypernetwork_masks,
    image_to_token_attention,
    mask_postprocess,
    memory_attention,
    nms,
    preprocess_image,
    rel_pos_attention,
    token_to_image_attention,
    two_way_attention,
    window_attention,
)

OPERATIONS = {
    "connected_components": connected_components,
    "hypernetwork_masks": hypernetwork_masks,
    "image_to_token_attention": image_to_token_attention,
    "mask_postprocess": mask_postprocess,
    "memory_attention": memory_attention,
    "nms": nms,
    "preprocess_image": preprocess_image,
    "rel_pos_attention": rel_pos_attention,
    "token_to_image_attention": token_to_image_attention,
    "two_way_attention": two_way_attention,
    "window_attention": window_attention,
}
