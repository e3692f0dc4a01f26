"""Everything in every image, as one COCO file: ``python -m sam.examples.automatic_to_coco masks.json *.jpg``.

``python -m sam auto`` does this for folders, and goes on where it was interrupted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import sam
from sam.images import read_image
from sam.masks import rle


def main(out: str, *photos: str) -> None:
    """Write the masks of all photos to ``out``, as pycocotools reads them."""
    generator = sam.SamAutomaticMaskGenerator(sam.load_model(), points_per_side=8, output_mode="coco_rle")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, photo in enumerate(photos, start=1):
        image = read_image(photo)
        images.append({"id": image_id, "file_name": Path(photo).name, "height": len(image), "width": image.shape[1]})
        for record in generator.generate(image):
            annotation = {name: record[name] for name in ("segmentation", "area", "predicted_iou", "stability_score")}
            annotation |= {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0}
            annotations.append(annotation | {"bbox": rle.bounding_box(record["segmentation"])})
    categories = [{"id": 1, "name": "object"}]
    Path(out).write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    print(f"{out}: {len(annotations)} masks of {len(images)} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
