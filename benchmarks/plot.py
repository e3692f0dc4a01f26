"""A picture of results files: for each case of the model the medians of its forms, and the machine's limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .provenance import describe, form_name, read_rows, title

_COLORS = {True: "#2a7f62", False: "#9aa5b1"}


def run(results: Sequence[Path], out: Path) -> int:
    """Run the command: draw ``results`` as written by ``--json`` to the PNG ``out``."""
    draw([row for path in results for row in read_rows(path)], out)
    print(out)
    return 0


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw bars of every case that has peers, from the slowest form to the fastest.

    Raises:
        ValueError: no case has a peer.
        ImportError: matplotlib is not installed (the extra ``bench``).
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'fastsam-kernels[bench]'") from None

    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(title(row), []).append(row)
    shown = {name: forms for name, forms in cases.items() if len(forms) > 2}
    if not shown:
        raise ValueError("no case was measured beside a peer; measure with --peers")

    figure = Figure(figsize=(9, 1.1 + sum(0.34 * len(forms) + 0.75 for forms in shown.values())), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[len(forms) + 1.2 for forms in shown.values()])
    for axis, (name, forms) in zip(axes[:, 0], shown.items(), strict=True):
        forms = sorted(forms, key=lambda row: -row["timing"]["p50"])
        times = [row["timing"]["p50"] for row in forms]
        limit = min(row["percent_of_limit"] * row["timing"]["p50"] / 100 for row in forms)
        names = [form_name(row["form"]) for row in forms]
        bars = axis.barh(names, times, color=[_COLORS[name.startswith("ours")] for name in names])
        for bar, row in zip(bars, forms, strict=True):
            speedup = "" if row["speedup"] is None else f"  ({row['speedup']:.2f}x)"
            label = f" {_milliseconds(row['timing']['p50'])}{speedup}"
            axis.text(bar.get_width(), bar.get_y() + bar.get_height() / 2, label, va="center", fontsize=9)
        axis.axvline(limit, color="#c0392b", linewidth=1, linestyle="--")
        axis.set_xlim(0, 1.3 * max(times))
        axis.set_title(name, loc="left", fontsize=10, fontweight="bold")
        axis.tick_params(axis="x", labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1, 0].set_xlabel(
        "ms, median; (speed-up over the official modules); dashed: least time of this machine for the products and "
        "bytes\n" + "\n".join(dict.fromkeys(describe(row["provenance"]) for row in rows)),
        fontsize=7,
    )
    figure.savefig(out, dpi=150)


def _milliseconds(value: float) -> str:
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.1f} ms"
