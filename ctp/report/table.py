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
