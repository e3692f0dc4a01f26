"""Fidelity of a model in fewer bits to the one that it was made of, without labels: measures, gates and a report."""

from .gates import GATES, Gate, Verdict, judge
from .measure import Measures, compare, measure
from .report import Report, report

__all__ = ["GATES", "Gate", "Measures", "Report", "Verdict", "compare", "judge", "measure", "report"]
