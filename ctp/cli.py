"""The `ctp` command: compress, train a prompt, evaluate, move it, generate, export, inspect, explain, and a demo."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ctp_kernels.errors import CTPError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compress a LLaMA or OPT model, run it packed, and win its quality back with a prompt.",
)

Model = Annotated[
    str, typer.Argument(help="a model folder (packed or not), a hub name, embedded:llama or embedded:opt")
]
Json = Annotated[Path | None, typer.Option("--json", help="also write the result to this file")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="of everything random; recorded where nothing is random")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="embedded[:docs|:code], wikitext2, c4, ptb, a .txt/.jsonl/.parquet file, hf:org/set:config:split:column",
    ),
]

#: Tokens a window, where the default is what the model holds.
Length = Annotated[
    int | None, typer.Option(min=2, help="tokens a window (default 2048, or what context and prompt leave)")
]
BatchSize = Annotated[int, typer.Option(min=1, help="windows at a time")]
Overwrite = Annotated[bool, typer.Option(help="replace an earlier result at the output")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32, of what is not packed (default: float32; on cuda bfloat16)"),
]


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """A typer command that answers bad input with one sentence and exit code 2, Ctrl-C with what to do and 130."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        from transformers.utils.logging import disable_progress_bar

        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        disable_progress_bar()  # of loading shards: ours show what takes long
        try:
            return function(*args, **kwargs)
        except CTPError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            hint = "; with --resume it goes on" if "resume" in kwargs else ""
            hint = "; the same command goes on" if function.__name__ == "compress" else hint
            typer.echo(f"interrupted{hint}", err=True)
            raise typer.Exit(130) from error

    return app.command()(run)


@command
def compress(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder of the packed model")],
    format: Annotated[str, typer.Option(help="such as int4, int3-g64-asym, sparse24-int4, unstructured")],
    method: Annotated[
        str, typer.Option(help="gptq, sparsegpt, wanda, magnitude or rtn; auto: gptq, or sparsegpt for a sparse format")
    ] = "auto",
    sparsity: Annotated[float, typer.Option(help="share of zeros, for unstructured formats")] = 0.5,
    calibration: Annotated[
        str, typer.Option(help="text to calibrate on, as --data of the other commands")
    ] = "embedded",
    samples: Annotated[int, typer.Option(min=1, help="calibration windows")] = 128,
    length: Length = None,
    mse: Annotated[bool, typer.Option(help="search each grid for the least error")] = False,
    csv: Annotated[Path | None, typer.Option(help="write the error of every layer to this file")] = None,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Prune, quantise, or both in one sweep, and save the packed model.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    from ctp.jobs import compress_to_folder

    result = compress_to_folder(
        model, output, format, method=method, sparsity=sparsity, calibration=calibration, samples=samples,
        length=length, mse=mse, csv_path=csv, seed=seed, device=device, overwrite=overwrite,
    )  # fmt: skip
    typer.echo(
        f"{output}: {result['layers']} layers as {result['format']}, {result['bits_per_weight']:.2f} bits a weight, "
        f"{result['bytes_dense']:,} -> {result['bytes_packed']:,} bytes, {result['seconds']:.0f} s"
    )
    _write(json_file, result)


@command
def train(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder of the prompt (PEFT's layout)")],
    data: Data = "embedded",
    tokens: Annotated[int, typer.Option(min=1, help="length of the prompt")] = 100,
    loss: Annotated[str, typer.Option(help="ce: next token; kl: distil from the dense model")] = "ce",
    teacher: Annotated[str | None, typer.Option(help="dense model for kl (default: the original)")] = None,
    init: Annotated[str, typer.Option(help="vocab, mean or text:<words>")] = "vocab",
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps")] = 600,
    batch_size: BatchSize = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="batches a step")] = 1,
    length: Annotated[int, typer.Option(min=2, help="tokens a window")] = 256,
    lr: Annotated[float, typer.Option(help="peak learning rate, in units of the embedding table's RMS")] = 0.15,
    schedule: Annotated[str, typer.Option(help="cosine or linear")] = "cosine",
    resume: Annotated[bool, typer.Option(help="go on from the last saved state of this output")] = False,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Train a soft prompt through the packed weights; only the prompt has a gradient."""
    from ctp.jobs import train_to_folder

    result = train_to_folder(
        model, output, data=data, tokens=tokens, loss=loss, teacher=teacher, init=init, steps=steps,
        batch_size=batch_size, accumulation=accumulation, length=length, lr=lr, schedule=schedule, resume=resume,
        overwrite=overwrite, seed=seed, device=device, dtype=dtype,
    )  # fmt: skip
    typer.echo(f"{output}: {tokens} tokens, validation perplexity {result['valid_perplexity_start']:.3f} -> "
               f"{result['valid_perplexity']:.3f}, {result['seconds']:.0f} s")  # fmt: skip
    _write(json_file, result)


@command
def evaluate(
    model: Model,
    data: Data = "embedded",
    prompt: Annotated[Path | None, typer.Option(help="folder of a trained prompt")] = None,
    split: Annotated[str, typer.Option(help="train, valid or test")] = "test",
    length: Length = None,
    stride: Annotated[int | None, typer.Option(min=1, help="text tokens between windows (default: no overlap)")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="windows (default: all)")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm_eval tasks or local .jsonl files, separated by commas")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="examples a task")] = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: Dtype = None,
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Perplexity (prompt positions are neither scored nor counted), and tasks."""
    from ctp.data import token_windows
    from ctp.evaluate import perplexity
    from ctp.jobs import placement
    from ctp.model import context_length, load_model
    from ctp.prompt import SoftPrompt

    net, tokenizer = load_model(model, **placement(device, dtype))
    soft = SoftPrompt.load(prompt) if prompt else None
    room = context_length(net) - (len(soft) if soft else 0)
    windows = token_windows(data, tokenizer, length or min(2048, room), split=split, count=count, stride=stride)
    typer.echo(f"{windows}")
    measured = perplexity(net, windows, prompt=soft, batch_size=batch_size, progress=True)
    dtype = str(next(net.parameters()).dtype).removeprefix("torch.")
    result: dict[str, Any] = {
        **windows.info, "model": model, "prompt": str(prompt) if prompt else None, "dtype": dtype, "seed": seed,
        **measured.as_dict(),
    }  # fmt: skip
    typer.echo(f"perplexity {measured.perplexity:.4f} over {measured.tokens:,} tokens")
    if soft:
        typer.echo(f"(with the divisor of the method's published code, which counts the prompt: "
                   f"{measured.perplexity_published_divisor:.4f}; not comparable with unprompted figures)")  # fmt: skip
    if tasks:
        from ctp.evaluate.tasks import evaluate_tasks

        result["tasks"] = evaluate_tasks(
            net, tokenizer, tasks.split(","), prompt=soft, limit=limit, batch_size=batch_size
        )
        for name, scores in result["tasks"].items():
            typer.echo(f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items() if isinstance(v, float)))
    _write(json_file, result)


@command
def transfer(
    models: Annotated[list[str], typer.Option("--models", help="a model, as of the other commands; may be repeated")],
    prompts: Annotated[list[Path], typer.Option("--prompts", help="folder of a trained prompt; may be repeated")],
    data: Annotated[
        list[str] | None, typer.Option("--data", help="a text, as of the other commands; may be repeated")
    ] = None,
    split: Annotated[str, typer.Option(help="train, valid or test")] = "test",
    length: Length = None,
    count: Annotated[int | None, typer.Option(min=1, help="windows (default: all)")] = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: Dtype = None,
    plot: Annotated[Path | None, typer.Option(help="draw the ratios and their intervals into this file")] = None,
    resume: Annotated[
        bool, typer.Option(help="keep the cells that an interrupted run has written to --json, known by their names")
    ] = False,
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Every prompt on every model and text: perplexity, and its ratio to that without a prompt, with intervals."""
    from ctp.evaluate import transfer as measure
    from ctp.jobs import placement
    from ctp.report.html import PICTURES, transfer_figure
    from ctp.report.table import transfer_table

    if plot is not None and plot.suffix not in PICTURES:
        raise CTPError(f"--plot draws {', '.join(PICTURES)}, not {plot.suffix or 'a file without an ending'}")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise CTPError("--plot needs matplotlib: pip install matplotlib")
    result = measure(
        models, prompts, data or ["embedded"], split=split, length=length, count=count, batch_size=batch_size,
        path=json_file, resume=resume, progress=True, seed=seed, **placement(device, dtype),
    )  # fmt: skip
    typer.echo(transfer_table(result["rows"]))
    if plot is not None:
        transfer_figure(result["rows"], plot)
    _write(json_file, result)


@command
def generate(
    model: Model,
    text: Annotated[str, typer.Argument(help="what to continue")],
    prompt: Annotated[Path | None, typer.Option(help="folder of a trained prompt")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to add")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    device: Device = "cpu",
    dtype: Dtype = None,
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Continue a text; the prompt's keys and values are computed once."""
    import torch

    from ctp.jobs import placement
    from ctp.model import load_model
    from ctp.prompt import SoftPrompt
    from ctp.prompt import generate as continue_text

    torch.manual_seed(seed)
    net, tokenizer = load_model(model, **placement(device, dtype))
    options = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    soft = SoftPrompt.load(prompt) if prompt else None
    (continuation,) = continue_text(net, tokenizer, text, soft, max_new_tokens, **options)
    typer.echo(text + continuation)
    _write(json_file, {
        "model": model, "prompt": str(prompt) if prompt else None, "text": text, "continuation": continuation,
        "seed": seed,
    })  # fmt: skip


@command
def export(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write")],
    to: Annotated[str, typer.Option(help="gptq, compressed-tensors or dense; with --prompt: peft or tokens")],
    prompt: Annotated[Path | None, typer.Option(help="folder of a trained prompt, to export that")] = None,
    overwrite: Overwrite = False,
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Write a packed model, or a prompt, as other software reads it; no code is rounded."""
    from ctp.export import export_to_folder

    result = export_to_folder(model, output, to, prompt=prompt, overwrite=overwrite)
    if "ids" in result:
        told = f"{len(result['ids'])} words, mean cosine to the prompt {result['mean_cosine']:.2f}: {result['text']!r}"
    elif prompt:
        told = f"a prompt of {result['tokens']} tokens for {result['base_model']}, as PEFT's prompt tuning"
    else:
        told = f"{result['layers']} layers as {result['layout']}, {result['bytes']:,} bytes in all"
    typer.echo(f"{output}: {told}")
    _write(json_file, {**result, "seed": seed})


@command
def inspect(
    folder: Annotated[Path, typer.Argument(help="a packed model or a prompt")],
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """What a packed model or a prompt holds, from its files alone."""
    from ctp.report.inspect import inspect_folder

    result = inspect_folder(folder)
    typer.echo(result.pop("text"))
    _write(json_file, {**result, "seed": seed})


@command
def explain(
    model: Model,
    rows: Annotated[str | None, typer.Option(help="also how these row counts run, separated by commas")] = None,
    dtype: Dtype = None,
    device: Annotated[str, typer.Option(help="cpu or cuda, which need not be there")] = "cpu",
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Which kernel runs each packed layer, and why."""
    from ctp.jobs import explain_model

    explanation = explain_model(model, rows=rows, dtype=dtype, device=device)
    typer.echo(str(explanation))
    _write(json_file, [{**row, "seed": seed} for row in explanation.rows])


@command
def warmup(
    model: Model,
    rows: Annotated[str | None, typer.Option(help="row counts, separated by commas (default: 1 to 128)")] = None,
    dtype: Annotated[str, typer.Option(help="of the activations: bfloat16, float16 or float32")] = "bfloat16",
    tune: Annotated[bool, typer.Option(help="also time other tiles, and keep the best for this GPU")] = False,
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """Compile every Triton kernel that a packed model needs, so that no first token waits for a compiler."""
    from ctp.jobs import warm_up_model

    result = warm_up_model(model, rows=rows, dtype=dtype, tune=tune)
    typer.echo(f"{result['gpu']}: {result['kernels']} launches of {result['layers']} kinds of layer are compiled"
               + (f", {len(result['tuned'])} plans tuned" if tune else ""))  # fmt: skip
    _write(json_file, {**result, "seed": seed})


@command
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="folder of the run")] = Path("runs/demo"),
    model: Annotated[str, typer.Option(help="embedded:llama or embedded:opt")] = "embedded:llama",
    steps: Annotated[
        int | None, typer.Option(min=1, help="training steps a prompt (default: about a minute's worth)")
    ] = None,
    resume: Annotated[bool, typer.Option(help="keep the rows that an interrupted run has finished")] = False,
    json_file: Json = None,
    seed: Seed = 0,
) -> None:
    """The whole main job on an embedded model: compress five ways, run packed, train prompts, measure. No network."""
    from ctp.demo.run import run_demo

    result = run_demo(output, model=model, steps=steps, resume=resume, seed=seed, echo=typer.echo)
    _write(json_file, result)


def _write(path: Path | None, result: Any) -> None:
    if path is not None:
        from ctp_kernels.files import write_json

        write_json(path, json.loads(json.dumps(result, default=str)))


def main() -> None:
    """Entry point of the `ctp` console script."""
    app()


if __name__ == "__main__":
    main()
