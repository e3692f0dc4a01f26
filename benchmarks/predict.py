"""Predicted times of kernels on absent GPUs: the least that their machine code and their bytes take.

The instruction floor is the warp instructions of the SASS, loops by their trip counts, at one a cycle on each of a
multiprocessor's four schedulers; the byte floor is each input read once and each output written once at the memory's
rate, the product floor all matrix products at the tensor cores' rate. What is expected is the instruction floor over
``ALONE`` where one program has a multiprocessor to itself and over ``TOGETHER`` where several share one, which is
judgement, or the largest of the other floors. A prediction never stands as a speed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sam
from fastsam_kernels.cross_attention.shapes import TokenShape
from fastsam_kernels.hypernetwork_masks.triton.shapes import UpscalingShape
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import lookup

from .case import meta
from .compile_cases import CompileCase
from .forks import map_in_forks
from .machine_code import compile_launch, inspect
from .measure import Work
from .model.encoder import encoder_work
from .operations import (
    hypernetwork_masks,
    mask_postprocess,
    nms,
    rel_pos_attention,
    two_way_attention,
    window_attention,
)
from .operations.token_to_image_attention import CHANNELS, CLICK_TOKENS, HEAD_CHANNELS, HEADS
from .provenance import RESULTS, describe, provenance
from .sass import executed

ALONE, TOGETHER = 0.35, 0.6
LINEARS = 0.8  # of the tensor cores' rate, which large products reach
_SURVIVORS = 300  # masks of which bits are made
_ROUNDS = 3  # links of a chain of boxes that suppress each other, in one word


@dataclass(frozen=True)
class GPU:
    """Data sheet of a GPU: multiprocessors, clock in Hz, bytes per second, 16-bit products in FLOP per second."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    bandwidth: float
    products: float


GPUS = (
    GPU("H200", 90, 132, 1.98e9, 4.8e12, 989e12),
    GPU("A100", 80, 108, 1.41e9, 2.0e12, 312e12),
)


@dataclass(frozen=True)
class Step:
    """One launch with what its machine code does not say: how often loops run, and the least work."""

    name: str
    operation: str
    launch: Launch
    trips: Mapping[str, float]
    work: Work
    fractions: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A step on a GPU; times in microseconds."""

    name: str
    gpu: str
    tile: str
    registers: int
    programs_an_sm: int
    programs: int
    instructions: float
    instruction_floor: float
    product_floor: float
    byte_floor: float
    expected: float


# What is predicted ----------------------------------------------------------------------------------------------


def steps(arch: int) -> Iterator[Step]:
    """Return every launch that is predicted, in bf16, with the committed tiles of an architecture."""
    for variant in ("vit_b", "vit_h"):
        for window in (rel_pos_attention.WINDOW, 0):
            yield _rel_pos(variant, window, arch)
    for variant in ("tiny", "large"):
        for kind in window_attention.SIZES[variant]:
            yield _window(variant, kind, arch)
    for prompts in (1, 1024):
        yield from _two_way(prompts, arch)
        yield _hypernetwork(prompts, 3, arch)
        yield _hypernetwork(prompts, 1, arch, finer=True)
    yield from _mask_postprocess(arch)
    yield from _nms(3072, arch)


def _rel_pos(variant: str, window: int, arch: int) -> Step:
    from fastsam_kernels.rel_pos_attention.triton.kernel import plan
    from fastsam_kernels.rel_pos_attention.triton.shapes import AttentionShape

    size = rel_pos_attention.SIZES[variant]
    bf16, channels, side = torch.bfloat16, size.heads * size.head_dim, window or size.grid
    qkv = meta(1, size.grid, size.grid, 3 * channels, dtype=bf16)
    table = meta(2 * side - 1, size.head_dim, dtype=bf16)
    out, bias = meta(1, size.grid, size.grid, channels, dtype=bf16), meta(3 * channels, dtype=bf16)
    tile = lookup("rel_pos_attention", arch, bf16, AttentionShape.of(size.head_dim, window))
    launch = plan(qkv, table, table, bias, out, size.heads, window, tile)
    rows = launch.tile.blocks["BLOCK_K"] // launch.constants["COLS"]
    return Step(
        f"rel_pos_attention, {variant}, {'windowed' if window else 'global'}, 1 image",
        "rel_pos_attention",
        launch,
        {
            "_spread_rel_pos: start": math.ceil((2 * side - 1) / launch.tile.blocks["BLOCK_T"]),
            "rel_pos_attention_kernel: start": math.ceil(side / rows),
        },
        rel_pos_attention.work(size, 1, window, 2),
    )


def _window(variant: str, kind: str, arch: int) -> Step:
    size, bf16 = window_attention.SIZES[variant][kind], torch.bfloat16
    launch = window_attention.meta_launch(size, 1, bf16, lookup("window_attention", arch, bf16, size.shape_class))
    rows = launch.tile.blocks["BLOCK_K"] // (launch.constants["COLS"] * launch.constants["GROUP"])
    trips = {"window_attention_kernel: start": math.ceil((size.window_size or size.grid) / rows)}
    name = f"window_attention, {variant}, {kind}, 1 image"
    return Step(name, "window_attention", launch, trips, window_attention.work(size, 1, 2))


def _two_way(prompts: int, arch: int) -> Iterator[Step]:
    from fastsam_kernels.two_way_attention.triton.kernel import plan

    bf16, tokens = torch.bfloat16, CLICK_TOKENS
    absorbed = (prompts, HEADS, tokens, CHANNELS)
    update = ((prompts, 4096, CHANNELS), (4096, CHANNELS), absorbed, absorbed[:3], absorbed, (CHANNELS,), (CHANNELS,))
    inputs = [meta(*shape, dtype=bf16) for shape in (*update, absorbed, (128, CHANNELS), (128,))]
    outputs = [meta(*shape, dtype=bf16) for shape in ((prompts, 4096, CHANNELS), (prompts, tokens, 128))]
    tile = lookup("two_way_attention", arch, bf16, TokenShape.of(tokens))
    first, combine = plan(*two_way_attention.operands(inputs), *outputs, tile).launches
    blocks = first.tile.blocks
    share = 4096 / first.constants["SPLITS"]
    trips = {
        "update_image_tokens: start": share / blocks["BLOCK_N"],
        "update_image_tokens: group": HEADS / blocks["HEADS"],
        "attend_share: start": share / blocks["ASKED_N"],
        "attend_share: part": max(1, blocks["ASKING_HEADS"] * HEAD_CHANNELS / 64),
        "two_way_kernel: first_head": HEADS / blocks["ASKING_HEADS"],
    }
    work = two_way_attention.work(prompts, tokens, 2)
    yield Step(f"two_way_attention, {_clicks(prompts)}", "two_way_attention", first, trips, work)
    partial = sum(x.nbytes for name, x in combine.arguments.items() if isinstance(x, Tensor))
    yield Step(f"two_way_attention, combine, {_clicks(prompts)}", "two_way_attention", combine, {}, Work(partial, 0))


def _hypernetwork(prompts: int, masks: int, arch: int, *, finer: bool = False) -> Step:
    bf16, shape = torch.bfloat16, UpscalingShape.FINER if finer else UpscalingShape.ANY
    tile = lookup("hypernetwork_masks", arch, bf16, shape)
    launch = hypernetwork_masks.meta_launch(prompts, masks, bf16, tile, finer=finer)
    trips = {
        "hypernetwork_masks_kernel: ab": 4,
        "hypernetwork_masks_kernel: start": 256 / launch.tile.blocks["BLOCK_C"],
    }
    work = hypernetwork_masks.work(prompts, masks, 2, finer=finer)
    name = f"hypernetwork_masks, {_clicks(prompts)} x {masks}" + (", finer features" if finer else "")
    return Step(name, "hypernetwork_masks", launch, trips, work)


def _mask_postprocess(arch: int) -> Iterator[Step]:
    from fastsam_kernels.mask_postprocess.triton.kernel import plan

    resizing, tile = mask_postprocess.SQUARE, lookup("mask_postprocess", arch, torch.float32)
    for what, masks in (("statistics", 3072), ("bits", _SURVIVORS)):
        logits, statistics = meta(masks, 256, 256, dtype=torch.float32), what == "statistics"
        out = meta(masks, 7, dtype=torch.int32) if statistics else meta(masks, 1024, 32, dtype=torch.int32)
        launch = plan(logits, resizing, 0.0, 1.0 if statistics else 0.0, out, tile, statistics=statistics)
        shares = tile_shares(launch.tile.blocks["BLOCK_W"], 1.0 if statistics else 0.0)
        kernel = launch.kernel.__name__
        nothing = "known & (greatest + guard <= tl.minimum(threshold, tl.minimum(above, below)))"
        fractions = {"evaluate": shares["undecided"]}
        if statistics:
            left = 1 - shares["outside"]  # of which evaluation and all else
            fractions = {f"{kernel}: return if {nothing}": left, "evaluate": shares["undecided"]}
        work = Work(logits.nbytes + (0 if statistics else out.nbytes), 0)
        trips = {"evaluate: i": launch.arguments["row_taps"], "evaluate: j": launch.arguments["column_taps"]}
        name = f"mask_postprocess, {what} of {masks}, 1024x1024"
        yield Step(name, "mask_postprocess", launch, trips, work, fractions)


def tile_shares(block_w: int, offset: float, masks: int = 128) -> dict[str, float]:
    """Return the shares of the tiles of 32 x ``block_w`` pixels of the benchmark's discs, by what decides them.

    A tile is "outside" where all its logits are at most -``offset``, "inside" where all are above ``offset``, and else
    "undecided".
    """
    from fastsam_kernels.mask_postprocess.resize_map import axes

    logits = mask_postprocess.discs(masks, 256, torch.device("cpu"), torch.float32)
    rows, columns = axes((256, 256), mask_postprocess.SQUARE)

    def spans(axis: Any, block: int) -> list[slice]:
        ends = [min(begin + block, len(axis.first)) - 1 for begin in range(0, len(axis.first), block)]
        firsts = axis.first[::block]
        return [
            slice(int(first), int(axis.first[end]) + axis.weights.shape[1])
            for first, end in zip(firsts, ends, strict=True)
        ]

    def patches(reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
        strips = torch.stack([reduce(logits[:, span], 1) for span in spans(rows, 32)], 1)
        return torch.stack([reduce(strips[..., span], 2) for span in spans(columns, block_w)], 2)

    outside = float((patches(torch.amax) <= -offset).float().mean())
    inside = float((patches(torch.amin) > offset).float().mean())
    return {"outside": outside, "inside": inside, "undecided": 1 - outside - inside}


def _nms(boxes: int, arch: int) -> Iterator[Step]:
    from fastsam_kernels.nms.triton.kernel import plan, words_of

    made, bits = meta(boxes, 4, dtype=torch.float32), meta(boxes, words_of(boxes), dtype=torch.int32)
    tile = lookup("nms", arch, torch.float32)
    overlaps, sweep = plan(made, nms.THRESHOLD, bits, meta(boxes, dtype=torch.bool), tile)
    yield Step(f"nms, overlaps of {boxes}", "nms", overlaps, {}, Work(made.nbytes + bits.nbytes, 0))
    trips = {"sweep_kernel: block": math.ceil(boxes / 32), "sweep_kernel: while": _ROUNDS}
    yield Step(f"nms, sweep of {boxes}", "nms", sweep, trips, Work(bits.nbytes, 0))


def _clicks(prompts: int) -> str:
    return f"{prompts} click{'s' if prompts > 1 else ''}"


# Times ------------------------------------------------------------------------------------------------------------


def predicted(gpu: GPU, step: Step) -> Row:
    """Compile a step for a GPU and count."""
    compiled = inspect(CompileCase(step.operation, step.name, torch.bfloat16, gpu.arch, step.launch))
    each = executed(compile_launch(step.launch, gpu.arch).asm["cubin"], step.trips, step.fractions)
    programs, warps = math.prod(step.launch.grid), step.launch.tile.num_warps
    assert compiled.programs_an_sm is not None
    times = floors(gpu, each, programs, warps, compiled.programs_an_sm, step.work)
    held = compiled.tile, compiled.registers, compiled.programs_an_sm
    return Row(step.name, gpu.name, *held, programs, each * warps, *times)


def floors(
    gpu: GPU, instructions: float, programs: int, warps: int, programs_an_sm: int, work: Work
) -> tuple[float, float, float, float]:
    """Return the least microseconds of a launch, by instructions, products and bytes, and what is expected.

    Args:
        instructions: of a warp.
        programs, warps: of the launch, and of a program.
        programs_an_sm: that fit a multiprocessor.
        work: the least.
    """
    share = max(1.0, programs / gpu.multiprocessors)  # programs of a multiprocessor; one cannot be shared out
    instruction_floor = 1e6 * instructions * max(1.0, share * warps / 4) / gpu.clock
    product_floor, byte_floor = 1e6 * work.flops / gpu.products, 1e6 * work.bytes / gpu.bandwidth
    reached = ALONE if programs_an_sm == 1 or share == 1 else TOGETHER
    return instruction_floor, product_floor, byte_floor, max(instruction_floor / reached, product_floor, byte_floor)


def linears(gpu: GPU, variant: str) -> float:
    """Return the microseconds of an encoder's projections, MLPs and convolutions for one image."""
    with torch.device("meta"):
        model = sam.build_from_config(sam.VARIANTS[variant])
    all_of_it, size = encoder_work(model, 1, 2), rel_pos_attention.SIZES[variant]
    windows = [block.window_size for block in model.image_encoder.blocks]
    flops = all_of_it.flops - sum(rel_pos_attention.work(size, 1, window, 2).flops for window in windows)
    return 1e6 * max(flops / (LINEARS * gpu.products), all_of_it.bytes / gpu.bandwidth)


def sums(gpu: GPU, rows: list[Row]) -> dict[str, float]:
    """Return the expected microseconds of whole requests."""
    expected = {row.name: row.expected for row in rows if row.gpu == gpu.name}

    def encoder(variant: str) -> float:
        config = sam.VARIANTS[variant]
        blocks = range(config.encoder_depth)
        kinds = ["global" if index in config.global_attn_indexes else "windowed" for index in blocks]
        attention = sum(expected[f"rel_pos_attention, {variant}, {kind}, 1 image"] for kind in kinds)
        return attention + linears(gpu, variant)

    def decoder(prompts: int) -> float:
        of = _clicks(prompts)
        passes = expected[f"two_way_attention, {of}"] + expected[f"two_way_attention, combine, {of}"]
        return 2 * passes + expected[f"hypernetwork_masks, {of} x 3"]

    return {
        "encoder, vit_b, 1 image": encoder("vit_b"),
        "encoder, vit_h, 1 image": encoder("vit_h"),
        "decoder, 1 click": decoder(1),
        "decoder, 1024 clicks": decoder(1024),
        "tail of automatic masks, 3072 masks, 1024x1024": sum(
            time for name, time in expected.items() if name.startswith(("mask_postprocess", "nms"))
        ),
    }


# The page ---------------------------------------------------------------------------------------------------------


def to_markdown(
    rows: list[Row], totals: dict[str, dict[str, float]], facts: dict[str, Any], before: dict[str, Any] | None
) -> str:
    """Format the tables; with ``before``, the document of another revision, its predictions beside them."""
    shares = tile_shares(32, 1.0)
    earlier = {(row["gpu"], row["name"]): row for row in before["rows"]} if before else {}
    lines = [
        "# Predicted times",
        "",
        f"Predictions, not speeds: nothing here has run on a GPU. triton {facts['triton']}, revision",
        f"{facts['revision']}, {facts['date']}. Regenerate: `python -m benchmarks predict --write`.",
        "",
        *[line.strip() for line in (__doc__ or "").split("\n\n", 1)[1].strip().splitlines()],
        "",
        f"ALONE is {ALONE}, TOGETHER {TOGETHER}. All in bf16, but logits and boxes, which are fp32. Masks are the",
        f"benchmark's discs: {shares['outside']:.0%} of their tiles of 32 x 32 pixels are wholly outside, and",
        f"{shares['undecided']:.0%} on a border. The sums are of the kernels, and of the encoder's linears at",
        f"{LINEARS} of the tensor cores' rate; what the host does between launches, norms and the token side of the",
        "decoder are not in them.",
    ]
    for gpu in (gpu for gpu in GPUS if gpu.name in totals):
        own = [row for row in rows if row.gpu == gpu.name]
        lines += [
            "",
            f"## {gpu.name}: {gpu.multiprocessors} multiprocessors at {gpu.clock / 1e9:g} GHz, "
            f"{gpu.bandwidth / 1e12:g} TB/s, {gpu.products / 1e12:g} TFLOP/s",
            "",
            "| kernel | tile | registers | programs an SM | programs | instructions a program | instruction floor, us "
            "| product floor | byte floor | expected, us |" + (" before |" if before else ""),
            "|---|---|" + "---:|" * (9 if before else 8),
        ]
        for row in own:
            cells = [row.name, row.tile, row.registers, row.programs_an_sm, row.programs, f"{row.instructions:.0f}"]
            cells += [f"{time:.3g}" for time in (row.instruction_floor, row.product_floor, row.byte_floor)]
            cells += [f"{row.expected:.3g}"]
            if before:
                old = earlier.get((gpu.name, row.name))
                cells += [f"{old['expected']:.3g} (floor {old['instruction_floor']:.3g})" if old else ""]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines += [
            "",
            "| sum | expected, ms |" + (" before |" if before else ""),
            "|---|---:|" + ("---:|" if before else ""),
        ]
        old_sums = before["sums"][gpu.name] if before else {}
        for name, time in totals[gpu.name].items():
            old_cell = f" {old_sums[name] / 1000:.3g} |" if name in old_sums else ""
            lines.append(f"| {name} | {time / 1000:.3g} |{old_cell}")
    if before:
        lines += ["", f"Before: revision {before['provenance']['revision']}."]
    return "\n".join(lines) + "\n"


def run(workers: int, write: bool, before: Path | None) -> int:
    """Run the command: print the page, and write it with its rows if asked."""
    work = [(gpu, step) for gpu in GPUS for step in steps(gpu.arch)]
    rows = map_in_forks(lambda pair: predicted(*pair), work, workers, "compile")
    totals = {gpu.name: sums(gpu, rows) for gpu in GPUS}
    facts = {**provenance(), "gpu": None}
    page = to_markdown(rows, totals, facts, json.loads(before.read_text()) if before else None)
    print(page)
    print(describe(facts))
    if write:
        (RESULTS / "predicted.md").write_text(page)
        document = {"provenance": facts, "rows": [asdict(row) for row in rows], "sums": totals}
        (RESULTS / "predicted.json").write_text(json.dumps(document, indent=1) + "\n")
    return 0
