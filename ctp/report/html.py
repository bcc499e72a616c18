"""One HTML page with its pictures inside, from the demo's results.json; and the picture of a transfer matrix."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from ctp_kernels.files import write_bytes, write_text

from .table import demo_table, label

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
pre{background:#f6f6f6;padding:1rem;overflow-x:auto;font-size:13px}img{max-width:100%}h2{margin-top:2.5rem}"""


def write_report(result: dict[str, Any], path: Path) -> None:
    """Write the page: table, perplexity bars with controls, recovery against bytes, latency against prompt length."""
    settings, machine = result["settings"], result["machine"]
    intro = (
        f"{settings['model']}, {settings['data']} (test split), windows of {settings['window']} tokens. "
        f"Prompts: {settings['prompt_tokens']} tokens, {settings['steps']} steps of {settings['batch_size']} windows. "
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}."
    )
    parts = [
        f"<p>{html.escape(intro)}</p>",
        f"<pre>{html.escape(demo_table(result))}</pre>",
        "<p>Perplexity is exp(sum of NLL / scored tokens); prompt positions are neither scored nor counted. "
        "<b>+BOS</b>: one more BOS in front. <b>+untrained</b>: the prompt before training. "
        "<b>gap won back</b>: share of the log-perplexity gap between dense and compressed.</p>",
        "<h2>Perplexity, with its controls</h2>", _image(perplexity_bars(result)),
        "<h2>What the prompt wins back, against bytes</h2>", _image(recovery(result)),
        "<h2>Latency against prompt length</h2>", _image(latency(result)),
        "<p>Re-run: the prompt goes through every layer at each call. KV kept: its keys and values are computed "
        "once.</p>",
    ]  # fmt: skip
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Compress, then prompt</title><style>{STYLE}</style>"
    )
    write_text(path, page + "<h1>Compress, then prompt</h1>" + "\n".join(parts) + "</html>\n")


def perplexity_bars(result: dict[str, Any]):
    figure, axis = _figure(9, 4)
    bars = [("compressed", "ppl_compressed"), ("+ BOS", "ppl_bos"), ("+ untrained prompt", "ppl_untrained_prompt"),
            ("+ trained prompt", "ppl_prompt")]  # fmt: skip
    rows = result["rows"]
    for i, (name, key) in enumerate(bars):
        axis.bar([x + (i - 1.5) * 0.2 for x in range(len(rows))], [row[key] for row in rows], 0.2, label=name)
    axis.axhline(result["dense"]["ppl"], color="black", linewidth=1, label="dense")
    axis.axhline(result["dense"]["ppl_prompt"], color="black", linewidth=1, linestyle=":", label="dense + prompt")
    axis.set_xticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    axis.set_ylabel("perplexity")
    axis.set_ylim(bottom=0.8 * result["dense"]["ppl_prompt"])
    axis.legend(fontsize=8)
    return figure


def recovery(result: dict[str, Any]):
    figure, axis = _figure(7, 4)
    for row in result["rows"]:
        megabytes = row["bytes_packed"] / 1e6
        axis.plot([megabytes] * 2, [row["ppl_compressed"], row["ppl_prompt"]], "-", color="grey", linewidth=1)
        axis.plot(megabytes, row["ppl_compressed"], "o", color="tab:red")
        axis.plot(megabytes, row["ppl_prompt"], "o", color="tab:green")
        axis.annotate(f"{label(row)}\n{row['gap_recovered']:.0%}", (megabytes, row["ppl_compressed"]), fontsize=7,
                      xytext=(4, 2), textcoords="offset points")  # fmt: skip
    dense = result["rows"][0]["bytes_dense"] / 1e6
    axis.plot(dense, result["dense"]["ppl"], "s", color="black", label="dense")
    axis.plot([], [], "o", color="tab:red", label="compressed")
    axis.plot([], [], "o", color="tab:green", label="compressed + trained prompt")
    axis.set(xlabel="MB of linear weights", ylabel="perplexity")
    axis.legend(fontsize=8)
    return figure


def latency(result: dict[str, Any]):
    figure, axis = _figure(7, 4)
    for (name, rows), color in zip(result["prompt_length"].items(), ("tab:blue", "tab:orange"), strict=True):
        lengths = [row["prompt_tokens"] for row in rows]
        axis.plot(lengths, [row["rerun_ms"] for row in rows], "o--", color=color, label=f"{name}, prompt re-run")
        axis.plot(lengths, [row["kv_ms"] for row in rows], "o-", color=color, label=f"{name}, KV kept")
    text = next(iter(result["prompt_length"].values()))[0]["length"]
    axis.set(xlabel="prompt tokens", ylabel=f"ms for {text} tokens of text", ylim=(0, None))
    axis.legend(fontsize=8)
    return figure


PICTURES = (".png", ".svg", ".pdf")


def transfer_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw what each prompt leaves of a perplexity (`ctp.evaluate.transfer`), with its interval: below 1 it helps.

    The file's ending, one of PICTURES, says what it becomes.
    """
    rows = [row for row in rows if row["prompt"] is not None and row["ratio"] is not None]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    series = list(dict.fromkeys((row["model"], row["data"]) for row in rows))
    figure, axis = _figure(max(8, 1.5 * len(prompts) + 5), 4)
    for i, (model, data) in enumerate(series):
        mine = [row for row in rows if (row["model"], row["data"]) == (model, data)]
        places = [prompts.index(row["prompt"]) + (i + 1) / (len(series) + 1) - 0.5 for row in mine]
        below, above = (
            [abs(row[end] - row["ratio"]) if row[end] is not None else 0 for row in mine]
            for end in ("ratio_low", "ratio_high")
        )
        ratios = [row["ratio"] for row in mine]
        axis.errorbar(places, ratios, [below, above], fmt="o", capsize=3, label=f"{model}, {data}")
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xticks(range(len(prompts)), prompts, fontsize=8)
    axis.set_ylabel("perplexity over that without a prompt")
    figure.legend(loc="outside right upper", fontsize=8)
    write_bytes(path, _drawn(figure, path.suffix[1:]))


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _drawn(figure, format: str) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format=format, dpi=110)
    return data.getvalue()


def _image(figure) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(_drawn(figure, "png")).decode()}">'
