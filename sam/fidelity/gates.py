"""Gates that a quantised model has to pass, per scheme, relative to what bf16 alone does to the same model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .measure import Measures


@dataclass(frozen=True)
class Gate:
    """The limits of a scheme.

    Attributes:
        embedding: how many times the error of bf16 the embedding's may be.
        box_iou, box_iou_p5: least mean and 5th percentile of the IoU of the masks of boxes.
        automatic_f1: least F1 of automatic masks.
    """

    embedding: float
    box_iou: float
    box_iou_p5: float
    automatic_f1: float


# fp8 is three times as coarse as int8, so its embedding may be further off; masks may not.
GATES = {"int8": Gate(2.0, 0.99, 0.97, 0.98), "fp8": Gate(4.0, 0.99, 0.97, 0.98)}


@dataclass(frozen=True)
class Verdict:
    """One measure, its limit and whether it passed."""

    name: str
    value: float
    limit: float
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(measures: Measures, noise: Measures, gate: Gate) -> list[Verdict]:
    """Hold measures against a gate; ``noise`` are those of bf16."""
    limit = gate.embedding * noise.embedding
    verdicts = [Verdict("embedding", measures.embedding, limit, measures.embedding <= limit)]
    for name in ("box_iou", "box_iou_p5", "automatic_f1"):
        value, least = getattr(measures, name), getattr(gate, name)
        verdicts.append(Verdict(name, value, least, value >= least))
    return verdicts
