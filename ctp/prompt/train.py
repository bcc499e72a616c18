"""Train a soft prompt on a frozen model: the gradient crosses the packed weights and reaches the prompt only.

The prompt is trained in units of the embedding table's RMS, so that learning rate, clipping and epsilon mean the
same in every model. Its keys and values are computed once a step and shared by the whole batch, which is exact:
a window costs its own rows only. Everything about step s follows from (seed, s), so resuming needs no RNG state.
The findings behind the defaults are in `docs/prompt.md`.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ctp.data import Windows
from ctp.evaluate.perplexity import perplexity
from ctp_kernels.errors import CTPError
from ctp_kernels.files import check_output, staged_folder, write_text

from .curve import write_curve
from .kv import check_context, prefix_of, prompted_logits
from .soft import CONFIG, SoftPrompt, embedding_table, init_prompt
from .state import LOG, STATE, State, finished, lines, resumed, save

CURVE = "curve.png"
#: Gradients of a mean over thousands of tokens are multiplied by this on their way through an fp16 model: they would
#: fall below its range. A power of two, divided out in fp32.
FP16_SCALE = 1024.0
#: A run that is cut off loses no more than this.
KEEP_SECONDS = 60.0


@dataclass
class TrainResult:
    """prompt: that with the lowest validation perplexity, `best_valid`; history: one dict per evaluation."""

    prompt: SoftPrompt
    best_valid: float
    history: list[dict[str, Any]]
    seconds: float


def train_prompt(
    model: nn.Module,
    train: Windows,
    valid: Windows,
    *,
    tokens: int = 100,
    init: str = "vocab",
    tokenizer: Any = None,
    loss: str = "ce",
    teacher: nn.Module | None = None,
    steps: int = 600,
    lr: float = 0.15,
    batch_size: int = 8,
    accumulation: int = 1,
    warmup: int | None = None,
    schedule: str = "cosine",
    clip: float = 1.0,
    eval_every: int = 100,
    patience: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    base_model: str = "",
    teacher_model: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train `tokens` embeddings in front of every window; the validation windows choose the checkpoint.

    loss `ce`: mean token cross-entropy. `kl`: mean over tokens of KL(teacher || prompted model) in fp32, the teacher
    (the dense model) seeing no prompt. AdamW without decay; `lr` is a share of the embedding table's RMS, warmed up
    over `warmup` steps (default: a twentieth), then decayed to zero (`cosine` or `linear`). One step takes
    `accumulation` times `batch_size` windows, as one large batch would. `patience` evaluations without a better
    validation perplexity end the run.

    With `out`, the state is kept in `<out>.training`, every minute at least (and continued from there with `resume`,
    bit for bit on the CPU); the prompt folder `out` appears when the run ends, with the log (JSONL) and the curve
    (PNG). `resume` where there is no such state but a finished `out` of the same settings returns that. `overwrite`
    allows an earlier prompt at `out`, or an unfinished run, to be replaced. `base_model` and `teacher_model` are names
    for the record.

    Raises CTPError for settings that do not fit, a resumed run with other settings, an earlier result that would be
    lost, and a loss that is not finite.
    """
    _check(model, train, valid, tokens, loss, teacher, schedule, steps, lr, batch_size, accumulation, eval_every)
    device = next(model.parameters()).device
    table = embedding_table(model)
    unit = table.detach().float().square().mean().sqrt().item()
    warmup = max(1, steps // 20) if warmup is None else warmup
    settings = {
        "tokens": tokens, "init": init, "loss": loss, "steps": steps, "lr": lr, "batch_size": batch_size,
        "accumulation": accumulation, "warmup": warmup, "schedule": schedule, "clip": clip, "eval_every": eval_every,
        "patience": patience, "seed": seed, "train": train.info, "valid": valid.info,
        "fingerprint": _fingerprint(model, train, valid),
        "teacher": _fingerprint(teacher) if teacher is not None and loss == "kl" else None,
    }  # fmt: skip
    out = None if out is None else check_output(out, CONFIG, fresh=not (resume or overwrite))
    work = None if out is None else out.with_name(out.name + ".training")
    if work is not None and (work / STATE).exists() and not (resume or overwrite):
        raise CTPError(f"{work} holds an unfinished run: go on with --resume, or begin again with --overwrite")
    state = resumed(work, settings) if resume and work is not None else None
    if resume and state is None and out is not None and (done := finished(out, settings)):
        prompt, history = done
        if progress:
            print(f"  {out} is finished already, by a run of the same settings")
        best = min(row["valid_perplexity"] for row in history)
        return TrainResult(prompt, best, history, prompt.info["seconds"])
    if state is None:
        start = init_prompt(model, tokens, init, seed, tokenizer).embeddings / unit
        state = State(start, start, torch.zeros_like(start), torch.zeros_like(start))
    elif progress:
        print(f"  resumed at step {state.step}")
    begun = time.monotonic() - state.seconds

    relative = state.relative.to(device).requires_grad_(True)
    optimizer = torch.optim.AdamW([relative], lr=lr, weight_decay=0.0)
    if state.step:
        optimizer.state[relative] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": state.exp_avg.to(device),
            "exp_avg_sq": state.exp_avg_sq.to(device),
        }

    def keep() -> None:
        """What the run has reached, also on disk."""
        moments = optimizer.state.get(relative, {})
        state.relative = relative.detach().cpu().clone()
        state.exp_avg = moments.get("exp_avg", state.exp_avg).cpu()
        state.exp_avg_sq = moments.get("exp_avg_sq", state.exp_avg_sq).cpu()
        state.seconds = time.monotonic() - begun
        if work is not None:
            save(state, settings, work)

    def evaluate(rate: float, norm: float) -> None:
        prompt = SoftPrompt(relative.detach().cpu() * unit)
        ppl = perplexity(model, valid, prompt=prompt, batch_size=batch_size).perplexity
        if ppl < state.best_valid:
            state.best, state.best_valid = relative.detach().cpu().clone(), ppl
        state.history.append({
            "step": state.step, "train_loss": sum(state.recent) / len(state.recent) if state.recent else None,
            "valid_perplexity": ppl, "lr": rate, "grad_norm": norm, "seconds": round(time.monotonic() - begun, 2),
        })  # fmt: skip
        state.recent.clear()
        keep()
        if work is not None:
            write_text(work / LOG, lines(state.history))
        if progress:
            print(_progress(state, steps, loss), flush=True)

    if not state.history:
        evaluate(0.0, 0.0)
    while state.step < steps and not _stalled(state.history, patience):
        rate = lr * _factor(state.step, steps, warmup, schedule)
        optimizer.param_groups[0]["lr"] = rate
        windows = _batch(len(train), batch_size * accumulation, seed, state.step)
        value = _accumulate(model, teacher, train, windows.split(batch_size), relative, unit, loss)
        norm = float(nn.utils.clip_grad_norm_([relative], clip))
        if not (math.isfinite(value) and math.isfinite(norm)):
            kept = f"; an earlier state is kept in {work}" if work is not None else ""
            what = "gradient is not finite" if math.isfinite(value) else f"loss is {value}"
            advice = "load the model in bf16 or fp32" if table.dtype == torch.float16 else "lower the learning rate"
            raise CTPError(f"the {what} at step {state.step} (lr {rate:.3g}): {advice}{kept}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.recent.append(value)
        if state.step % eval_every == 0 or state.step == steps:
            evaluate(rate, norm)
        elif time.monotonic() - begun - state.seconds > KEEP_SECONDS:
            keep()
            if progress:
                print(f"  step {state.step} of {steps}{_clock(state, steps)}", flush=True)
    _assert_frozen(model)

    info = {
        **settings, "width": state.best.shape[1], "base_model": base_model,
        "teacher_model": teacher_model, "best_valid_perplexity": state.best_valid,
        "best_step": min(state.history, key=lambda row: row["valid_perplexity"])["step"],
        "seconds": round(state.seconds, 2),
    }  # fmt: skip
    prompt = SoftPrompt(state.best * unit, info)
    if out is not None and work is not None:
        with staged_folder(out, CONFIG) as staging:
            prompt.write(staging, base_model)
            write_text(staging / LOG, lines(state.history))
            write_curve(state.history, staging / CURVE)
        shutil.rmtree(work)
    return TrainResult(prompt, state.best_valid, state.history, state.seconds)


# ---- one step --------------------------------------------------------------------------------------------------


def _accumulate(
    model: nn.Module,
    teacher: nn.Module | None,
    train: Windows,
    parts: tuple[torch.Tensor, ...],
    relative: torch.Tensor,
    unit: float,
    loss: str,
) -> float:
    """Add the gradient of the step's mean token loss to `relative`, part by part; return the loss."""
    table = embedding_table(model)
    total = sum(int(train.scored[part, 1:].sum()) for part in parts)
    scale = FP16_SCALE if table.dtype == torch.float16 else 1.0
    value = 0.0
    for part in parts:
        ids = train.ids[part].to(table.device)
        scored = train.scored[part, 1:].to(table.device)
        prefix = prefix_of(model, (relative * unit).to(table.dtype).unsqueeze(0))
        logits = prompted_logits(model, ids[:, :-1], prompt=prefix)
        if loss == "ce":
            targets = ids[:, 1:].masked_fill(~scored, -100)
            summed = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        else:
            assert teacher is not None
            with torch.no_grad():
                wanted = prompted_logits(teacher, ids[:, :-1])[scored].float().log_softmax(-1)
            reached = logits[scored].float().log_softmax(-1)
            summed = nn.functional.kl_div(reached, wanted, log_target=True, reduction="sum")
        (summed / total * scale).backward()
        value += summed.item() / total
    assert relative.grad is not None
    relative.grad /= scale
    return value


def _batch(count: int, size: int, seed: int, step: int) -> torch.Tensor:
    """The windows of a step: `size` numbers from an endless row of seeded permutations of range(count)."""
    first, last = step * size, (step + 1) * size
    epochs = range(first // count, (last - 1) // count + 1)
    seeds = [(seed * 1_000_003 + epoch) % 2**63 for epoch in epochs]
    order = [torch.randperm(count, generator=torch.Generator().manual_seed(s)) for s in seeds]
    offset = first - epochs[0] * count
    return torch.cat(order)[offset : offset + size]


def _factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The learning rate of a step as a share of its peak."""
    if step < warmup:
        return (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def _stalled(history: list[dict[str, Any]], patience: int | None) -> bool:
    if patience is None:
        return False
    curve = [row["valid_perplexity"] for row in history]
    return len(curve) - 1 - curve.index(min(curve)) >= patience


# ---- checks ----------------------------------------------------------------------------------------------------


def _check(
    model: nn.Module,
    train: Windows,
    valid: Windows,
    tokens: int,
    loss: str,
    teacher: nn.Module | None,
    schedule: str,
    steps: int,
    lr: float,
    batch_size: int,
    accumulation: int,
    eval_every: int,
) -> None:
    if loss not in ("ce", "kl"):
        raise CTPError(f"no loss is called {loss!r}: choose ce or kl")
    if loss == "kl" and teacher is None:
        raise CTPError("loss kl learns from the dense model: give it as the teacher")
    if loss == "kl" and teacher is not None:
        words, own = len(embedding_table(teacher)), len(embedding_table(model))
        if words != own:
            raise CTPError(f"the teacher has {words} words, the model {own}: use a teacher with the model's tokenizer")
    if schedule not in ("cosine", "linear"):
        raise CTPError(f"no schedule is called {schedule!r}: choose cosine or linear")
    for name, value in (
        ("steps", steps),
        ("batch_size", batch_size),
        ("accumulation", accumulation),
        ("eval_every", eval_every),
    ):
        if value < 1:
            raise CTPError(f"{name} is {value}: use 1 or more")
    if not 0 < lr < math.inf:
        raise CTPError(f"lr is {lr}: use a number above 0")
    for windows in (train, valid):
        check_context(model, tokens + windows.ids.shape[1])
        if not windows.scored[:, 1:].any(1).all():
            raise CTPError("a window has no token to score: use longer windows")
    if model.training:
        raise CTPError("the model is in training mode: call model.eval() first, dropout is not part of the method")
    model.requires_grad_(False)
    if teacher is not None:
        teacher.requires_grad_(False)


def _assert_frozen(model: nn.Module) -> None:
    """Only the prompt may have had a gradient."""
    touched = [name for name, p in model.named_parameters() if p.requires_grad or p.grad is not None]
    if touched:
        raise AssertionError(f"parameters of the frozen model have a gradient: {', '.join(touched[:3])}")


def _fingerprint(model: nn.Module, *texts: Windows) -> str:
    """SHA-256 over all token windows and the head of every tensor of the model: enough to notice another run."""
    digest = hashlib.sha256()
    for windows in texts:
        digest.update(windows.ids.numpy().tobytes() + windows.scored.numpy().tobytes())
    for name, tensor in model.state_dict().items():
        head = tensor.detach().flatten()[:256].contiguous().cpu().view(torch.uint8)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + head.numpy().tobytes())
    return digest.hexdigest()


def _progress(state: State, steps: int, loss: str) -> str:
    row = state.history[-1]
    train_loss = "" if row["train_loss"] is None else f"{loss} {row['train_loss']:.4f}, "
    return (
        f"  step {state.step} of {steps}: {train_loss}validation perplexity {row['valid_perplexity']:.3f}"
        f"{_clock(state, steps)}"
    )


def _clock(state: State, steps: int) -> str:
    left = state.seconds / state.step * (steps - state.step) if state.step else None
    return "" if left is None else f" ({state.seconds:.0f} s, about {left:.0f} s left)"
