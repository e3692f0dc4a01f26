"""``track VIDEO``: masks of objects through a video, as label images and JSON; a run that was ended goes on."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..masks import rle
from ..masks.formats import FORMATS, MaskSet, encode_masks
from ..masks.overlay import draw_overlay
from ..masks.palette import read_labels, write_labels
from ..modeling.sam2_base import SAM2Base
from ..prompts import wire
from ..system.atomic_write import write_atomically
from ..video.frames import VideoFrame, open_frames
from ..video.results import FrameResult
from ..video.session import TrackingSession
from ..video.session_file import load_session, save_session
from ..video.tracking import Tracking
from .model import model_from
from .parsers import Place

_STATE, _LINES, _RUN, _OVERLAY = "state.pt", "frames.jsonl", "track.json", "overlay.gif"
_OVERLAY_SIDE, _OVERLAY_MS = 480, 100


def run(args: argparse.Namespace) -> None:
    """Track objects through a video and write their masks."""
    prompts = _prompts(args)
    model: Any = model_from(args)
    source, count = open_frames(model, args.video)
    # What is wrong with the model or a prompt is said before anything is written.
    session = TrackingSession(model, num_frames=count, fill_hole_area=args.fill_holes)
    for frame, given in prompts.items():
        for name, prompt in given.items():
            session.add(name, prompt, frame)
    settings = _settings(args, model)
    folder = _Folder(Path(args.out), list(dict.fromkeys(name for given in prompts.values() for name in given)))
    goes_on = folder.prepare(settings, args.force)
    if goes_on is None:
        print(f"{folder.path} is finished; --force tracks anew")
        return
    if goes_on:
        session = load_session(folder.path / _STATE, model)
        folder.cut(session.next_frame)
        print(f"going on after frame {session.frame}")
    _track(session, source, folder, args.save_every, count)
    if session.frame is None:
        raise ValueError(f"{args.video} has no frames")
    if args.overlay:
        folder.draw(model, open_frames(model, args.video)[0], session.frame + 1)
    folder.finish(settings, session.frame + 1)
    print(f"{session.frame + 1} frames, {len(session.objects)} objects in {folder.path}")


def _track(
    session: TrackingSession, source: Iterator[VideoFrame], folder: _Folder, every: int, count: int | None
) -> None:
    """Write the result of each frame to come, and now and then the session; also before an error leaves."""
    done, saved = session.next_frame, session.frame
    results = Tracking(session, islice(source, done, None))
    bar = tqdm(results, "track", count, unit="frame", initial=done, disable=None, leave=False)
    try:
        for result in bar:
            folder.write(result)
            if (result.frame + 1) % every == 0:
                folder.save(session)
                saved = result.frame
    finally:
        if session.frame != saved:
            folder.save(session)


def _prompts(args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Return the prompts of the options, by frame and object."""
    clicks: dict[Place, list[tuple[float, float, int]]] = {}
    for place, click in args.point:
        clicks.setdefault(place, []).append(click)
    boxes = dict(args.box)
    prompts: dict[int, dict[str, Any]] = {}
    for place in dict.fromkeys([*clicks, *boxes]):
        prompts.setdefault(place.frame, {})[place.object] = wire.from_clicks(clicks.get(place, []), boxes.get(place))
    for frame, path in args.mask:
        for value, mask in read_labels(Path(path)).items():
            of_frame = prompts.setdefault(frame, {})
            if str(value) in of_frame:
                raise ValueError(f"object {value} has a mask and another prompt on frame {frame}")
            of_frame[str(value)] = mask
    return dict(sorted(prompts.items()))


def _settings(args: argparse.Namespace, model: SAM2Base) -> dict[str, Any]:
    """Return all that the results depend on."""
    video = Path(args.video)
    files = sorted(video.iterdir()) if video.is_dir() else [video]
    told = "".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n" for path in files)
    return {
        "video": video.name,
        "files": hashlib.sha256(told.encode()).hexdigest(),
        "model": model.model_hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "fill_holes": args.fill_holes,
        "points": [[*place, *click] for place, click in args.point],
        "boxes": [[*place, *box] for place, box in args.box],
        "masks": [[frame, hashlib.sha256(Path(path).read_bytes()).hexdigest()] for frame, path in args.mask],
    }


class _Folder:
    """The results of a video: ``masks/`` of label images, a line of JSON per frame, and the session while it runs."""

    def __init__(self, path: Path, objects: list[str]) -> None:
        self.path, self._masks = path, path / "masks"
        numbers = all(name.isdecimal() and 1 <= int(name) <= 255 for name in objects)
        if not numbers and len(objects) > 255:
            raise ValueError(f"label images have room for 255 objects, got {len(objects)}")
        self._values = {name: int(name) if numbers else index + 1 for index, name in enumerate(objects)}

    def prepare(self, settings: dict[str, Any], force: bool) -> bool | None:
        """Make the folder ready; returns whether a saved session goes on, None where all frames are done.

        Raises:
            ValueError: it holds something else, or results of other settings.
        """
        known = self.path / _RUN
        if self.path.exists() and not force and any(self.path.iterdir()):
            if not known.is_file():
                raise ValueError(f"{self.path} holds something else; --force replaces results, another --out keeps it")
            before = json.loads(known.read_text())
            changed = [name for name, value in settings.items() if before.get(name) != value]
            if changed:
                told = ", ".join(changed)
                raise ValueError(
                    f"{self.path} was made with another {told}; --force tracks anew, another --out keeps it"
                )
            if before.get("frames") is not None:
                return None
            if (self.path / _STATE).is_file():
                return True
        for name in (_STATE, _LINES, _RUN, _OVERLAY):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self._masks, ignore_errors=True)
        self._masks.mkdir(parents=True)
        self._describe(settings)
        return False

    def cut(self, frames: int) -> None:
        """Drop what was written of later frames than the first ``frames``."""
        lines = (self.path / _LINES).read_text().splitlines(keepends=True)[:frames]
        with write_atomically(self.path / _LINES) as partial:
            partial.write_text("".join(lines))

    def write(self, result: FrameResult) -> None:
        """Write the masks of a frame, and then its line."""
        masks, rles = result.masks.cpu().numpy(), result.rles()
        records = encode_masks(FORMATS["rle"], MaskSet(rles, result.size), result.predicted_iou.tolist())
        with write_atomically(self._masks / f"{result.frame:05d}.png") as partial:
            write_labels(partial, masks, [self._values[str(name)] for name in result.objects], result.size)
        scores = result.object_scores.tolist()
        objects = [
            {"id": name, "value": self._values[str(name)], **record, "object_score": score}
            for name, record, score in zip(result.objects, records, scores, strict=True)
        ]
        line = {"frame": result.frame, "height": result.size[0], "width": result.size[1], "objects": objects}
        with open(self.path / _LINES, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, session: TrackingSession) -> None:
        save_session(session, self.path / _STATE)

    def finish(self, settings: dict[str, Any], frames: int) -> None:
        """Note that all frames are done, and drop the session."""
        self._describe({**settings, "frames": frames})
        (self.path / _STATE).unlink(missing_ok=True)

    def _describe(self, settings: dict[str, Any]) -> None:
        with write_atomically(self.path / _RUN) as partial:
            partial.write_text(json.dumps({**settings, "objects": self._values}, indent=2) + "\n")

    def draw(self, model: SAM2Base, frames: Iterator[VideoFrame], count: int) -> None:
        """Draw the masks on the frames, as a GIF."""
        lines = map(json.loads, (self.path / _LINES).read_text().splitlines())
        pictures = (_picture(model, frame, line) for frame, line in zip(islice(frames, count), lines, strict=True))
        with write_atomically(self.path / _OVERLAY) as partial:
            first = next(pictures)
            first.save(partial, save_all=True, append_images=pictures, duration=_OVERLAY_MS, loop=0)


def _picture(model: SAM2Base, frame: VideoFrame, line: dict[str, Any]) -> Image.Image:
    height, width = frame.size
    factor = min(_OVERLAY_SIDE / max(height, width), 1.0)
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    levels = (frame.pixels.float() * model.pixel_std + model.pixel_mean).round().clamp(0, 255).byte()
    image = Image.fromarray(levels.permute(1, 2, 0).cpu().numpy()).resize(size)
    masks = [Image.fromarray(rle.decode(each["segmentation"])).resize(size) for each in line["objects"]]
    stacked = np.stack([np.array(mask) for mask in masks]) if masks else np.zeros((0, size[1], size[0]), bool)
    return draw_overlay(np.array(image), stacked)
