"""Training a prompt: only the prompt learns, the packed weights stay packed, and a killed run goes on bit for bit."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ctp.data import Windows
from ctp.evaluate import perplexity
from ctp.model import load_model
from ctp.prompt import SoftPrompt, prompted_logits
from ctp.prompt import train as training
from ctp.prompt.soft import init_prompt
from ctp.prompt.state import lines
from ctp.prompt.train import train_prompt
from ctp_kernels import PackedWeight, explain, patch_model
from ctp_kernels.errors import CTPError

from .helpers import MODELS, small_model
from .text import character_tokenizer, random_windows


def _repeating(count: int, length: int = 16, seed: int = 0) -> Windows:
    """Windows that repeat one of eight letters, so that there is something to learn from few steps."""
    windows = random_windows(count, length, 12, seed)
    windows.ids[:, 1:] = windows.ids[:, 1:2]
    return windows


TRAIN, VALID = _repeating(32), _repeating(8, seed=1)
SHORT = {"tokens": 4, "steps": 12, "lr": 0.3, "batch_size": 4, "eval_every": 4, "progress": False}


@pytest.mark.parametrize("name", MODELS)
def test_the_prompt_learns_and_nothing_else_does(name):
    model = small_model(name)
    before = copy.deepcopy(model.state_dict())
    result = train_prompt(model, TRAIN, VALID, **SHORT)
    assert result.best_valid < 0.95 * result.history[0]["valid_perplexity"]
    assert result.best_valid == min(row["valid_perplexity"] for row in result.history)
    assert perplexity(model, VALID, prompt=result.prompt).perplexity == pytest.approx(result.best_valid, rel=1e-5)
    assert [row["step"] for row in result.history] == [0, 4, 8, 12]
    assert result.prompt.embeddings.dtype == torch.float32
    assert result.prompt.embeddings.shape[1] == model.get_input_embeddings().weight.shape[1]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("format", ["int3-row-asym", "sparse24-int4-g8", "unstructured"])
def test_training_never_materialises_a_dense_weight(format, monkeypatch):
    """Autograd keeps no tensor of a packed weight's size, and with a kernel backend nothing is unpacked at all."""
    model = patch_model(small_model("llama-biases"), format, skip=("lm_head",))
    packed = [m.packed for m in model.modules() if hasattr(m, "packed")]
    sizes = {p.shape for p in packed} | {p.shape[::-1] for p in packed}
    backends = {row[way] for row in explain(model).rows for way in ("forward", "backward")}
    if "reference" not in backends:
        monkeypatch.setattr(PackedWeight, "unpack", lambda *_: pytest.fail("a packed weight was unpacked"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape[-2:])) or t, lambda t: t):
        result = train_prompt(model, TRAIN, VALID, **{**SHORT, "steps": 2, "tokens": 5, "batch_size": 3})
    assert kept and not sizes.intersection(kept)
    assert result.history[-1]["train_loss"] is not None


def test_gradient_is_that_of_the_rerun_prompt():
    """The shared prefix is exact: its gradient equals that of the prompt repeated in front of every window."""
    model, windows = small_model("llama-gqa-tied"), random_windows(6, 10)
    relative = torch.randn(3, 64, requires_grad=True)
    value = training._accumulate(model, None, windows, (torch.arange(6),), relative, 0.5, "ce")
    found, relative.grad = relative.grad, None
    embeds = torch.cat([(relative * 0.5).expand(6, -1, -1), model.get_input_embeddings()(windows.ids)], 1)
    logits = model(inputs_embeds=embeds).logits[:, 3:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows.ids[:, 1:].flatten())
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(found, relative.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_accumulation_equals_one_large_batch(loss):
    model, teacher, windows = small_model("opt"), small_model("opt"), random_windows(8, 10)
    windows.scored[:3, 4:] = False  # parts of unequal numbers of targets must still weigh each token alike
    grads = []
    for parts in ((torch.arange(8),), tuple(torch.arange(8).split(2))):
        relative = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        training._accumulate(model, teacher, windows, parts, relative, 1.0, loss)
        grads.append(relative.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-7)


def test_kl_is_the_mean_over_scored_tokens_to_the_unprompted_teacher():
    model, teacher, windows = small_model("opt"), small_model("opt-350m-like"), random_windows(4, 10)
    windows.scored[1, 3:] = False
    relative = torch.randn(3, 64, requires_grad=True)
    value = training._accumulate(model, teacher, windows, (torch.arange(4),), relative, 1.0, "kl")
    scored = windows.scored[:, 1:]
    q = (
        prompted_logits(model, windows.ids[:, :-1], prompt=SoftPrompt(relative.detach()))
        .double()
        .log_softmax(-1)[scored]
    )
    p = prompted_logits(teacher, windows.ids[:, :-1]).double().log_softmax(-1)[scored]
    assert value == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_kl_brings_a_damaged_model_nearer_its_teacher():
    teacher = small_model("llama-gqa-tied")
    model = patch_model(small_model("llama-gqa-tied"), "int2-row-asym", skip=("lm_head",))
    result = train_prompt(model, TRAIN, VALID, teacher=teacher, **{**SHORT, "steps": 40}, loss="kl")
    losses = [row["train_loss"] for row in result.history[1:]]
    assert losses[-1] < 0.8 * losses[0]


def test_bf16_model_trains_an_fp32_master():
    model = small_model("opt").bfloat16()
    result = train_prompt(model, TRAIN, VALID, **SHORT)
    assert result.best_valid < result.history[0]["valid_perplexity"]
    embeddings = result.prompt.embeddings
    assert not torch.equal(embeddings, embeddings.bfloat16().float()), "the master must be finer than bf16"


def test_every_window_is_seen_once_an_epoch():
    seen = torch.cat([training._batch(10, 4, 7, step) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert len(training._batch(3, 8, 0, 1)) == 8
    assert len(training._batch(10, 4, 20250611123456789, 0)) == 4, "a seed of any length"


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_rises_and_falls_to_zero(schedule):
    rates = [training._factor(step, 100, 10, schedule) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1 and all(a > b for a, b in itertools.pairwise(rates[10:])) and 0 < rates[-1] < 0.02


def test_patience_ends_a_run_that_stopped_improving():
    result = train_prompt(small_model("opt"), TRAIN, VALID, **{**SHORT, "lr": 1e-12, "steps": 100}, patience=2)
    assert result.history[-1]["step"] < 100


# ---- files -----------------------------------------------------------------------------------------------------


def test_finished_folder_holds_prompt_log_and_curve(tmp_path):
    result = train_prompt(small_model("opt"), TRAIN, VALID, **SHORT, out=tmp_path / "p", base_model="org/model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p"]
    loaded = SoftPrompt.load(tmp_path / "p")
    assert torch.equal(loaded.embeddings, result.prompt.embeddings)
    assert loaded.info["best_valid_perplexity"] == result.best_valid and loaded.info["lr"] == 0.3
    assert [json.loads(line) for line in (tmp_path / "p" / "log.jsonl").read_text().splitlines()] == result.history
    if training.write_curve(result.history, tmp_path / "curve.png"):
        assert (tmp_path / "p" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_an_infinite_perplexity_is_null_in_the_log():
    assert json.loads(lines([{"step": 0, "valid_perplexity": math.inf}])) == {"step": 0, "valid_perplexity": None}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("seconds", [60, -1])  # between states: by the evaluations alone, or at each step
@pytest.mark.parametrize("at", [1, 6, 11])
def test_interrupted_run_goes_on_bit_for_bit(tmp_path, monkeypatch, at, seconds):
    monkeypatch.setattr(training, "KEEP_SECONDS", seconds)
    whole = train_prompt(small_model("opt"), TRAIN, VALID, **SHORT, accumulation=2, out=tmp_path / "whole")
    steps = iter(range(100))

    def dying(*arguments):
        if next(steps) == at:
            raise Killed
        return real(*arguments)

    real = training._accumulate
    monkeypatch.setattr(training, "_accumulate", dying)
    with pytest.raises(Killed):
        train_prompt(small_model("opt"), TRAIN, VALID, **SHORT, accumulation=2, out=tmp_path / "cut")
    assert not (tmp_path / "cut").exists() and (tmp_path / "cut.training" / "state.safetensors").exists()
    kept = safe_open(tmp_path / "cut.training" / "state.safetensors", "pt").metadata()["state"]
    every = SHORT["eval_every"] if seconds > 0 else 1
    assert json.loads(kept)["step"] == at // every * every
    monkeypatch.setattr(training, "_accumulate", real)
    resumed = train_prompt(small_model("opt"), TRAIN, VALID, **SHORT, accumulation=2, out=tmp_path / "cut", resume=True)
    names = ("step", "train_loss", "valid_perplexity", "lr", "grad_norm")
    assert [[row[n] for n in names] for row in resumed.history] == [[row[n] for n in names] for row in whole.history]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "cut.training").exists()


SCRIPT = """
import sys
from tests.test_train import SHORT, TRAIN, VALID, small_model, train_prompt
train_prompt(small_model("opt"), TRAIN, VALID, **{**SHORT, "eval_every": 1, "steps": 30}, out=sys.argv[1], resume=True)
"""


def test_sigkill_leaves_a_state_that_resumes_to_the_same_bytes(tmp_path):
    options = {**SHORT, "eval_every": 1, "steps": 30}
    train_prompt(small_model("opt"), TRAIN, VALID, **options, out=tmp_path / "whole")
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "cut")], cwd=root, env=environment)
    log = tmp_path / "cut.training" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert log.exists() and not (tmp_path / "cut").exists(), "the run was to be killed in the middle"
    train_prompt(small_model("opt"), TRAIN, VALID, **options, out=tmp_path / "cut", resume=True)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The output name of a run that was interrupted after its first evaluation."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "_accumulate", lambda *_: (_ for _ in ()).throw(Killed()))
        train_prompt(small_model("opt"), TRAIN, VALID, **SHORT, out=tmp_path / "p")
    return tmp_path / "p"


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 0.1}, "lr"), ({"seed": 1}, "seed"), ({"steps": 13}, "steps"), ({"tokens": 5}, "tokens")],
)
def test_resuming_another_run_is_refused(stopped, change, named):
    with pytest.raises(CTPError, match=f"another {named}"):
        train_prompt(small_model("opt"), TRAIN, VALID, **{**SHORT, **change}, out=stopped, resume=True)


def test_resuming_with_another_model_or_text_is_refused(stopped):
    other = small_model("opt")
    other.model.decoder.layers[0].fc1.weight[0, 0] += 1
    for model, train in ((other, TRAIN), (small_model("opt"), _repeating(32, seed=5))):
        with pytest.raises(CTPError, match="another fingerprint"):
            train_prompt(model, Windows(train.ids, train.scored, TRAIN.info), VALID, **SHORT, out=stopped, resume=True)


def test_resuming_with_another_teacher_is_refused(tmp_path, monkeypatch):
    """Where a run was stopped, and where it has ended; the teacher is in the record."""
    model, teacher, other = small_model("opt"), small_model("opt"), small_model("opt")
    other.model.decoder.layers[0].fc1.weight[0, 0] += 1
    run = functools.partial(train_prompt, model, TRAIN, VALID, **{**SHORT, "steps": 4}, loss="kl", out=tmp_path / "p")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "_accumulate", lambda *_: (_ for _ in ()).throw(Killed()))
        run(teacher=teacher)
    for _ in range(2):
        with pytest.raises(CTPError, match="another teacher: "):
            run(teacher=other, resume=True)
        run(teacher=teacher, teacher_model="org/dense", resume=True)
    assert json.loads((tmp_path / "p" / "training.json").read_text())["teacher_model"] == "org/dense"


def test_resuming_a_finished_run_returns_it_or_says_what_differs(tmp_path, monkeypatch, capsys):
    done = train_prompt(small_model("opt"), TRAIN, VALID, **SHORT, out=tmp_path / "p")
    monkeypatch.setattr(training, "_accumulate", lambda *_: pytest.fail("there was nothing left to train"))
    again = train_prompt(
        small_model("opt"), TRAIN, VALID, **{**SHORT, "progress": True}, out=tmp_path / "p", resume=True
    )
    assert (
        torch.equal(again.prompt.embeddings, done.prompt.embeddings) and "finished already" in capsys.readouterr().out
    )
    assert (again.best_valid, again.history) == (done.best_valid, done.history)
    for change in ({"lr": 0.1}, {"seed": 1}):
        with pytest.raises(CTPError, match=f"another {next(iter(change))}: "):
            train_prompt(small_model("opt"), TRAIN, VALID, **{**SHORT, **change}, out=tmp_path / "p", resume=True)
    (tmp_path / "p" / "log.jsonl").write_text("{")
    with pytest.raises(CTPError, match="is damaged"):
        train_prompt(small_model("opt"), TRAIN, VALID, **SHORT, out=tmp_path / "p", resume=True)


def test_damaged_state_is_refused_and_a_fresh_start_is_not(stopped):
    path = stopped.with_name("p.training") / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CTPError, match="is damaged"):
        train_prompt(small_model("opt"), TRAIN, VALID, **SHORT, out=stopped, resume=True)
    train_prompt(small_model("opt"), TRAIN, VALID, **SHORT, out=stopped, overwrite=True)
    assert stopped.is_dir() and not path.exists()


def test_nothing_is_replaced_unasked(stopped):
    """Neither the state of an unfinished run nor a finished prompt."""
    path = stopped.with_name("p.training") / "state.safetensors"
    state = path.read_bytes()
    with pytest.raises(CTPError, match="holds an unfinished run: go on with --resume, or begin again with --overwrite"):
        train_prompt(small_model("opt"), TRAIN, VALID, **SHORT, out=stopped)
    assert path.read_bytes() == state
    train_prompt(small_model("opt"), TRAIN, VALID, **SHORT, out=stopped, resume=True)
    weights = stopped / "adapter_model.safetensors"
    prompt = weights.read_bytes()
    assert weights.stat().st_mode & 0o777 == (stopped / "training.json").stat().st_mode & 0o777
    with pytest.raises(CTPError, match="p holds an earlier result: choose another output, or replace it with --over"):
        train_prompt(small_model("opt"), TRAIN, VALID, **{**SHORT, "seed": 1}, out=stopped)
    assert weights.read_bytes() == prompt
    train_prompt(small_model("opt"), TRAIN, VALID, **{**SHORT, "seed": 1}, out=stopped, overwrite=True)
    assert weights.read_bytes() != prompt


def test_a_loss_that_is_not_finite_stops_with_the_state_kept(tmp_path, monkeypatch):
    model = small_model("opt")
    count = iter(range(100))

    def breaking(*arguments):
        value = real(*arguments)
        return float("nan") if next(count) == 5 else value

    real = training._accumulate
    monkeypatch.setattr(training, "_accumulate", breaking)
    with pytest.raises(CTPError, match=r"the loss is nan at step 5 .*an earlier state is kept"):
        train_prompt(model, TRAIN, VALID, **SHORT, out=tmp_path / "p")
    assert (tmp_path / "p.training" / "state.safetensors").exists() and not (tmp_path / "p").exists()


def test_bad_settings_are_one_sentence():
    model = small_model("opt")
    silent = random_windows(2, 10)
    silent.scored[1] = False
    for change, message in [
        ({"loss": "mse"}, "choose ce or kl"),
        ({"loss": "kl"}, "give it as the teacher"),
        ({"schedule": "step"}, "choose cosine or linear"),
        ({"loss": "kl", "teacher": load_model("embedded:opt")[0]}, "the teacher has 2048 words, the model 96"),
        ({"steps": 0}, "steps is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"tokens": 0}, "no prompt"),
        ({"tokens": 120}, "take 136 positions"),
        ({"init": "zeros"}, "choose vocab, mean"),
    ]:
        with pytest.raises(CTPError, match=message):
            train_prompt(model, TRAIN, VALID, **{**SHORT, **change})
    with pytest.raises(CTPError, match="no token to score"):
        train_prompt(model, silent, VALID, **SHORT)
    with pytest.raises(CTPError, match=r"call model\.eval"):
        train_prompt(small_model("opt").train(), TRAIN, VALID, **SHORT)


def test_prompt_from_text_needs_the_tokenizer():
    result = train_prompt(
        small_model("opt"), TRAIN, VALID, **{**SHORT, "steps": 1}, init="text:hello", tokenizer=character_tokenizer()
    )
    assert result.prompt.info["init"] == "text:hello"


def test_an_fp16_model_gives_the_gradient_of_an_fp32_one():
    """The gradient of a mean over 2000 tokens is below fp16's range in the logits: 1 % of it was lost unscaled."""
    windows, parts = random_windows(16, 128, 400, 0), (torch.arange(16),)
    found = []
    for dtype in (torch.float32, torch.float16):
        model, _ = load_model("embedded:llama", dtype=dtype)
        unit = model.get_input_embeddings().weight.float().square().mean().sqrt().item()
        relative = (init_prompt(model, 20, "vocab").embeddings / unit).requires_grad_(True)
        training._accumulate(model, None, windows, parts, relative, unit, "ce")
        found.append(relative.grad)
    assert (found[1] - found[0]).norm() < 0.003 * found[0].norm()


def test_a_gradient_beyond_fp16_says_so(monkeypatch):
    monkeypatch.setattr(training, "FP16_SCALE", 2.0**40)
    with pytest.raises(CTPError, match=r"the gradient is not finite at step 0 .*load the model in bf16 or fp32"):
        train_prompt(small_model("opt").half(), TRAIN, VALID, **SHORT)
