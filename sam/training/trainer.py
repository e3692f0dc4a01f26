"""The training step, and the state that it leaves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..build_sam import NANO_CHECKPOINT, load_model
from ..config import VARIANTS
from ..modeling import Sam
from ..modeling.build import build_from_config
from ..system.device_profile import device_profile
from ..system.hardware import multiplies_bf16_fast
from .batches import Batch, ScenePool
from .crops import CropModel
from .helper import SameObjectHead
from .losses import prompt_losses
from .muon import Muon, hidden_matrices
from .prompts import Objects, add_corrections, choose_objects, first_prompts
from .provenance import EMBEDDED, SCRATCH, revision
from .schedule import CONTINUED, FROM_SCRATCH, Stage, balance_at, learning_rate, stage_at
from .team import ALONE, Team

_WEIGHT_DECAY, _BETAS = 0.05, (0.9, 0.99)
_MAX_GRADIENT_NORM = 3.0
_AVERAGE_DECAY = 0.995
_BOX_SHARE = 0.45
_SECOND_CORRECTION, _LOGITS_FED_BACK = 0.5, 0.75  # shares of the correction steps
_CORRECTION_WEIGHT = 0.5
_IOU_HEAD_WEIGHT = 2.5
_HELPER_WEIGHT = 1.0
_MIN_PIXELS = 100  # that an object must show to be prompted for, on crops as on the whole canvas
MEANS = (
    "mask loss",
    "IoU head loss",
    "click IoU",
    "best of three",
    "box IoU",
    "corrected IoU",
    "gradient norm",
    "helper loss",
)


@dataclass(frozen=True)
class Settings:
    """Describe a run, apart from where and how long; saved with its state, so that a resumed run cannot differ.

    Attributes:
        seed: seed of everything that is random.
        init: "embedded", "scratch", or a checkpoint to start from.
        images: times the images of every stage.
        reuse: how often a scene is used; one fresh scene comes with ``reuse - 1`` from the pool.
        pool: scenes that a process keeps on the device to be used again.
        peak: learning rate of the plateau.
        processes: the number that trains together, each on its own images.
    """

    seed: int = 0
    init: str = EMBEDDED
    images: int = 1
    reuse: int = 1
    pool: int = 64
    peak: float = 4e-4
    processes: int = 1


def initial_model(init: str, seed: int, device: torch.device) -> Sam:
    """Return a model to train, in fp32."""
    if init == SCRATCH:
        torch.manual_seed(seed)
        model = build_from_config(VARIANTS["nano"]).to(device)
        if model.image_encoder.pos_embed is not None:
            torch.nn.init.trunc_normal_(model.image_encoder.pos_embed, std=0.02)
        return model.train()
    checkpoint = NANO_CHECKPOINT if init == EMBEDDED else init
    return load_model(checkpoint, device=device, kernels="torch").train()


def arithmetic(device: torch.device) -> torch.dtype:
    """Choose bf16 where the device multiplies it faster than fp32, else fp32; weights stay in fp32."""
    return torch.bfloat16 if multiplies_bf16_fast(device) else torch.float32


def _optimizers(model: Sam, trained: list[nn.Parameter], peak: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of hidden layers, AdamW for all else."""
    matrices = hidden_matrices(model)
    taken = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in trained if id(parameter) not in taken]
    decayed, plain = ([p for p in others if (p.ndim > 1) == many] for many in (True, False))
    groups = [{"params": decayed, "weight_decay": _WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    return [
        Muon(matrices, lr=peak, weight_decay=_WEIGHT_DECAY),
        torch.optim.AdamW(groups, lr=peak, betas=_BETAS, fused=True),
    ]


class Trainer:
    """Train a model: its weights, optimisers and average, and its position in the data."""

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        workers: int,
        model: Sam | None = None,
        stages: tuple[Stage, ...] | None = None,
        team: Team = ALONE,
    ) -> None:
        """Set up a run; ``model`` and ``stages`` stand in for what ``settings.init`` would give.

        Raises:
            ValueError: ``team`` is not of ``settings.processes``.
        """
        if team.size != settings.processes:
            raise ValueError(f"a run of {settings.processes} processes cannot go on with {team.size}")
        self.settings, self.device, self.team = settings, device, team
        self.stages = stages or (FROM_SCRATCH if settings.init == SCRATCH else CONTINUED)
        self.model = initial_model(settings.init, settings.seed, device) if model is None else model
        self.dtype = arithmetic(device)
        self.max_tokens = device_profile(device).training_tokens_per_chunk
        self.revision = revision()  # now: the repository may move on while this runs
        self.step = 0
        self._workers = workers
        self._pool: ScenePool | None = None
        self._next_scene = 0
        self.helper = SameObjectHead(self.model.prompt_encoder.embed_dim, settings.seed).to(device)
        self._trained = [p for p in [*self.model.parameters(), *self.helper.parameters()] if p.requires_grad]
        self._gradients = self._flat_gradients()
        self.optimizers = _optimizers(self.model, self._trained, settings.peak)
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _flat_gradients(self) -> Tensor:
        """Return one tensor that holds all gradients, so that processes exchange one message per step."""
        flat = torch.zeros(sum(p.numel() for p in self._trained), dtype=torch.float32, device=self.device)
        for parameter, part in zip(self._trained, flat.split([p.numel() for p in self._trained]), strict=True):
            parameter.grad = part.view_as(parameter)
        return flat

    # One step ----------------------------------------------------------------------------------------------

    def train_step(self, progress: float) -> Tensor:
        """Train on one batch with its rounds of prompts; return the values of ``MEANS``, NaN where not measured."""
        shared = np.random.default_rng([self.settings.seed, self.step])  # what all processes do alike
        rng = np.random.default_rng([self.settings.seed, self.step, self.team.rank])
        generator = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
        stage = stage_at(self.stages, progress)
        batch = self._batch(stage, rng)
        objects = choose_objects(batch.ids, batch.parents, stage.prompts, _MIN_PIXELS, generator)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.settings.peak, self.step, progress)
        self._gradients.zero_()
        means = torch.full((len(MEANS),), torch.nan, dtype=torch.float32, device=self.device)
        corrected = shared.random() < stage.corrections
        rounds = (1 + int(shared.random() < _SECOND_CORRECTION)) if corrected else 0
        fed_back = shared.random() < _LOGITS_FED_BACK
        if len(objects.masks):  # else a batch of empty pictures, which teaches nothing
            grid = self.model.image_size // self.patch - stage.size // self.patch
            crop = CropModel(self.model, stage.size, tuple(rng.integers(0, grid + 1, 2).tolist()))
            self._backward(crop, batch, objects, rounds, fed_back, generator, means)
        if self._average_over_team(means, taught=len(objects.masks) > 0):
            means[6] = torch.nn.utils.clip_grad_norm_(self._trained, _MAX_GRADIENT_NORM)
            for optimizer in self.optimizers:
                optimizer.step()
            self._update_average()
        self.step += 1
        return means

    def _average_over_team(self, means: Tensor, taught: bool) -> bool:
        """Average gradients and ``means`` over the processes that had objects; return False where none had."""
        if self.team.size == 1:
            return taught
        known = ~means.isnan()
        taught_here = torch.tensor([float(taught)], dtype=torch.float32, device=self.device)
        message = torch.cat([self._gradients, means.nan_to_num(), known.float(), taught_here])
        self.team.all_reduce(message)
        gradients, sums, counts, teachers = message.split([len(self._gradients), len(means), len(means), 1])
        torch.div(gradients, teachers.clamp(min=1), out=self._gradients)
        means.copy_(sums / counts)  # NaN where no process measured it
        return bool(teachers)

    @property
    def patch(self) -> int:
        return self.model.image_encoder.patch_embed.proj.kernel_size[0]

    def _batch(self, stage: Stage, rng: np.random.Generator) -> Batch:
        settings = self.settings
        if self._pool is None:
            capacity = settings.images * max(stage.images for stage in self.stages)
            if settings.reuse > 1:
                capacity = max(capacity, settings.pool)
            self._pool = ScenePool(settings.seed, self._next_scene, capacity, self._workers, self.device, self.team)
        mean, std = self.model.pixel_mean, self.model.pixel_std
        return self._pool.batch(stage.images * settings.images, settings.reuse, stage.size, rng, mean, std)

    def _backward(
        self,
        crop: CropModel,
        batch: Batch,
        objects: Objects,
        rounds: int,
        fed_back: bool,
        generator: torch.Generator,
        means: Tensor,
    ) -> None:
        """Compute gradients of the first prompts and of ``rounds`` corrections, one round's activations at a time."""
        with self._autocast():
            features = crop.encode(batch.pixels)
        shared_features = features.detach().requires_grad_()
        covered = torch.nn.functional.avg_pool2d(objects.masks.float()[:, None], 2)
        targets = torch.nn.functional.avg_pool2d(covered, self.patch // 8)[:, 0]
        truth = covered[:, 0] > 0.5
        coords, labels, is_click = first_prompts(objects, _BOX_SHARE, generator)
        balance = balance_at(self.step) if self.settings.init == SCRATCH else 0.0
        mask_inputs = None
        for turn in range(1 + rounds):
            ambiguous = is_click if turn == 0 else torch.zeros_like(is_click)
            weight = 1.0 if turn == 0 else _CORRECTION_WEIGHT
            answers = []
            for rows in self._prompt_chunks(objects.image_index, crop.grid):
                images = objects.image_index[rows]
                first, last = int(images[0]), int(images[-1])
                fed = mask_inputs[rows] if mask_inputs is not None else None
                with self._autocast():
                    logits, iou = crop.decode(
                        shared_features[first : last + 1], coords[rows], labels[rows], images - first, fed
                    )
                losses = prompt_losses(logits, iou, targets[rows], truth[rows], ambiguous[rows], balance)
                share = len(images) / len(is_click)
                (weight * share * (losses.mask + _IOU_HEAD_WEIGHT * losses.iou_head)).backward()
                summed = share * torch.stack([losses.mask, losses.iou_head])
                answers.append((logits.detach(), iou.detach(), losses.iou, summed.detach()[None]))

            logits, iou, true_iou, summed = (torch.cat(part) for part in zip(*answers, strict=True))
            chosen = 1 + iou[:, 1:].argmax(1)  # the mask the model would choose
            if turn == 0:
                means[:2] = summed.sum(0)
                means[2] = true_iou.gather(1, chosen[:, None])[:, 0][is_click].mean()
                means[3] = true_iou[:, 1:].amax(1)[is_click].mean()
                means[4] = true_iou[:, 0][~is_click].mean()
            else:
                means[5] = true_iou[:, 0].mean()
            if turn < rounds:
                shown = logits[torch.arange(len(chosen), device=self.device), torch.where(ambiguous, chosen, 0)].float()
                coords, labels = add_corrections(coords, labels, shown, objects.masks, generator)
                mask_inputs = shown if fed_back else None
        helped = self.helper.loss(shared_features, batch.ids)
        (_HELPER_WEIGHT * helped).backward()
        means[7] = helped.detach()
        features.backward(shared_features.grad)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _prompt_chunks(self, image_index: Tensor, grid: int) -> list[slice]:
        """Choose the prompts that are decoded together: those of whole images, as many as the device takes."""
        starts = [0, *(1 + (image_index[1:] != image_index[:-1]).nonzero()[:, 0]).tolist(), len(image_index)]
        max_tokens = self.max_tokens or len(image_index) * grid**2
        chunks = [slice(0, starts[1])]
        for start, stop in pairwise(starts[1:]):
            if (stop - chunks[-1].start) * grid**2 <= max_tokens:
                chunks[-1] = slice(chunks[-1].start, stop)
            else:
                chunks.append(slice(start, stop))
        return chunks

    def _update_average(self) -> None:
        decay = min(_AVERAGE_DECAY, (1 + self.step) / (10 + self.step))
        names = [name for name, _ in self.model.named_parameters()]
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            torch._foreach_lerp_([self.average[n] for n in names], [parameters[n] for n in names], 1 - decay)

    # State -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return all that the rest of a run depends on; random numbers follow from the seed and the step."""
        return {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "helper": self.helper.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "next_scene": self._pool.next_scene if self._pool is not None else self._next_scene,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.helper.load_state_dict(state["helper"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.average = {name: value.to(self.device) for name, value in state["average"].items()}
        self.step, self._next_scene, self._pool = state["step"], state["next_scene"], None
