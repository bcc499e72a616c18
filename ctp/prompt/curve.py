"""The training curve as a picture, drawn from the rows of the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_curve(history: list[dict[str, Any]], path: Path) -> bool:
    """PNG: validation perplexity and training loss (dashed) against the step. Without matplotlib: a note, and False.

    Draws without any display and leaves matplotlib's global state alone.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print(f"  no {path.name}: the curve needs matplotlib")
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["step"] for row in history], [row["valid_perplexity"] for row in history], marker=".")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("validation perplexity")
    rows = [row for row in history if row["train_loss"] is not None]
    if rows:
        right = axes.twinx()
        right.plot([row["step"] for row in rows], [row["train_loss"] for row in rows], "--", color="gray")
        right.set_ylabel("training loss (dashed)")
    FigureCanvasAgg(figure).print_png(path)
    return True
