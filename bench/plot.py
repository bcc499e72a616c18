"""Pictures of the benchmark records. Reads CSV only: python -m bench.plot bench/results/<device>"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def plot_all(folder: Path) -> list[Path]:
    """Draw what the folder holds; returns the pictures."""
    written = []
    if (folder / "kernels.csv").exists():
        written.append(plot_kernels(read(folder / "kernels.csv"), folder / "kernels.png"))
        written.append(plot_roofline(read(folder / "kernels.csv"), folder))
    if (folder / "gpu_kernels.csv").exists():
        rows = [row for row in read(folder / "gpu_kernels.csv") if row["mode"] == "graph" and row["dtype"] == "bf16"]
        if rows:
            written.append(plot_kernels(rows, folder / "gpu_kernels.png"))
    if (folder / "decode.csv").exists():
        written.append(plot_decode(read(folder / "decode.csv"), folder / "decode.png"))
    if (folder / "prompt_length.csv").exists():
        written.append(plot_prompt_length(read(folder / "prompt_length.csv"), folder / "prompt_length.png"))
    return written


def of_every_shape(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those of the formats that were measured at most shapes: a full run has too many formats for a picture."""
    shapes: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for row in rows:
        shapes[row["format"]].add((row["n"], row["k"]))
    most = max(map(len, shapes.values()))
    return [row for row in rows if len(shapes[row["format"]]) == most]


def plot_kernels(rows: list[dict[str, str]], path: Path) -> Path:
    """Speed over dense versus rows, one panel per shape and direction."""
    rows = of_every_shape(rows)
    panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        panel = f"{row['direction']}, N x K = {row['n']} x {row['k']}"
        panels[panel][row["format"]].append((int(row["rows"]), float(row["speedup"])))
    figure, axes = _figure(len(panels), across=2)
    labels = dict.fromkeys(row["format"] for row in rows)
    styles = {label: f"C{i % 10}" + ("-o", "--s")[i // 10 % 2] for i, label in enumerate(labels)}
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), styles[label], label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="rows of x", ylabel="speed, dense = 1")
        ticks = sorted({rows for points in lines.values() for rows, _ in points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(rows) for rows in ticks], fontsize=7)
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return _save(figure, path)


def plot_roofline(rows: list[dict[str, str]], folder: Path) -> Path:
    """GFLOP/s against FLOP per byte moved, forward, under the measured roofs (those of fp32 multiply-adds)."""
    roof = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in of_every_shape(rows):
        if row["direction"] == "forward" and "int8 activations" not in row["format"]:
            speed = float(row["gflop_per_s"])
            lines[row["format"]].append((speed / float(row["gb_per_s"]), speed))
    figure, (axis,) = _figure(1)
    for label, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", linestyle="", label=label)
    bandwidth, peak = float(roof["gb_per_s"]), float(roof["gflop_per_s"])
    intensities = [x for points in lines.values() for x, _ in points] or [peak / bandwidth]
    ends = [min(intensities), max(intensities)]
    corner = sorted({*ends, min(max(peak / bandwidth, ends[0]), ends[1])})
    axis.plot(corner, [min(peak, bandwidth * x) for x in corner], color="black", label="limit")
    axis.set(xlabel="FLOP per byte", ylabel="GFLOP/s", xscale="log", yscale="log", title="forward")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    return _save(figure, folder / "roofline.png")


def plot_decode(rows: list[dict[str, str]], path: Path) -> Path:
    """Tokens a second of each format and of the dense model, one panel per batch, prompt length and mode."""
    panels: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for row in rows:
        panel = f"{row['model']}, {row['mode']}, batch {row['batch']}, {row['prompt_tokens']} prompt tokens"
        panels[panel].append((row["format"], float(row["packed_tokens_per_s"]), float(row["dense_tokens_per_s"])))
    figure, axes = _figure(len(panels))
    for axis, (title, bars) in zip(axes, panels.items(), strict=True):
        formats, packed, dense = zip(*bars, strict=True)
        axis.barh(formats, packed)
        axis.axvline(sum(dense) / len(dense), color="black", linewidth=0.8, label="dense")
        axis.set(xlabel="tokens a second")
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3, axis="x")
    axes[0].legend(fontsize=7)
    return _save(figure, path)


def plot_prompt_length(rows: list[dict[str, str]], path: Path) -> Path:
    """Latency versus prompt length, one panel per text length."""
    panels: dict[int, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        label = f"{row['format']}, {row['mode']}"
        panels[int(row["length"])][label].append((int(row["prompt_tokens"]), float(row["ms"])))
    figure, axes = _figure(len(panels))
    for axis, (length, lines) in zip(axes, sorted(panels.items()), strict=True):
        for label, points in lines.items():
            style = "-" if "kept" in label else "--"
            axis.plot(*zip(*sorted(points), strict=True), style, marker="o", label=label)
        axis.set(title=f"{length} tokens of text", xlabel="prompt tokens", ylabel="ms", ylim=(0, None))
    axes[0].legend(fontsize=7)
    return _save(figure, path)


def _figure(panels: int, across: int | None = None):
    from matplotlib.figure import Figure

    across = min(across or panels, panels)
    down = -(-panels // across)
    figure = Figure(figsize=(5 * across, 4 * down), layout="constrained")
    return figure, [figure.add_subplot(down, across, i + 1) for i in range(panels)]


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    for picture in plot_all(Path(sys.argv[1])):
        print(picture)
