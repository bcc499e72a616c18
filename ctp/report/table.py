"""Results as an aligned table for the terminal."""

from __future__ import annotations

from typing import Any


def demo_table(result: dict[str, Any]) -> str:
    """The rows of the demo's results, one line per format; perplexities on the test split."""
    dense = result["dense"]
    head = ["format", "method", "bits", "bytes", "ppl", "+BOS", "+untrained", "+prompt", "gap won back", "ms/token"]
    first = result["rows"][0]
    lines = [
        ["dense", "", f"{8 * first['bytes_dense'] / weights_of(first):.0f}", f"{first['bytes_dense']:,}",
         f"{dense['ppl']:.2f}", f"{dense['ppl_bos']:.2f}", "", f"{dense['ppl_prompt']:.2f}", "",
         f"{first['ms_per_token_dense']:.2f}"]
    ]  # fmt: skip
    for row in result["rows"]:
        lines.append([
            label(row), row["method"], f"{row['bits_per_weight']:.2f}", f"{row['bytes_packed']:,}",
            f"{row['ppl_compressed']:.2f}", f"{row['ppl_bos']:.2f}", f"{row['ppl_untrained_prompt']:.2f}",
            f"{row['ppl_prompt']:.2f}", f"{row['gap_recovered']:.0%}",
            f"{row['ms_per_token_packed']:.2f}",
        ])  # fmt: skip
    return align([head, *lines])


def transfer_table(rows: list[dict[str, Any]]) -> str:
    """A line for each text and prompt, a column for each model: `37.18 x0.990 (0.988 to 0.992)`, the perplexity, and
    what of it without a prompt, with the 95 % confidence interval."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells = {(row["data"], row["prompt"], row["model"]): row for row in rows}
    lines = [
        [data, prompt or "none", *(_transferred(cells.get((data, prompt, model))) for model in models)]
        for data, prompt in dict.fromkeys((row["data"], row["prompt"]) for row in rows)
    ]
    return align([["data", "prompt", *models], *lines])


def _transferred(row: dict[str, Any] | None) -> str:
    if row is None or row["perplexity"] is None:
        return "" if row is None else "inf"
    text = f"{row['perplexity']:.2f}"
    if row["prompt"] is None or row["ratio"] is None:
        return text
    low, high = row["ratio_low"], row["ratio_high"]
    return f"{text} x{row['ratio']:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")


def label(row: dict[str, Any]) -> str:
    """`unstructured-fp16 50 %`: the format, and its sparsity where the name does not say it."""
    return row["format"] if row["sparsity"] is None else f"{row['format']} {row['sparsity'] * 100:g} %"


def weights_of(row: dict[str, Any]) -> float:
    return 8 * row["bytes_packed"] / row["bits_per_weight"]


def align(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
