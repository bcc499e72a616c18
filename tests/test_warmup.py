"""`ctp warmup`, the table of tuned plans, and tuning itself with a clock that is given."""

import json

import pytest
import torch
from typer.testing import CliRunner

from ctp.cli import app
from ctp_kernels import CTPError, parse_format
from ctp_kernels.backends.triton import plan as plans
from ctp_kernels.backends.triton import tuned, warmup
from ctp_kernels.backends.triton.plan import Plan, default_plan, plan_for

pytest.importorskip("triton")
GPU, SHAPE, BF16 = "NVIDIA H200", (4096, 4096), torch.bfloat16
INT4 = parse_format("int4")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without tuned plans."""
    monkeypatch.setattr(tuned, "user_file", lambda: tmp_path / "cache" / "triton_tuned.json")
    for cached in (tuned._table, plans.plan_for):
        cached.cache_clear()
    yield tmp_path
    for cached in (tuned._table, plans.plan_for):
        cached.cache_clear()


def test_the_shipped_table_is_sound():
    assert isinstance(tuned.read(tuned.SHIPPED), dict) and tuned.SHIPPED.is_file()


def test_a_tuned_plan_is_remembered_and_goes_before_the_rule(home):
    rule = plan_for(INT4, BF16, 16, SHAPE, "forward", GPU)
    assert rule == default_plan(INT4, BF16, 16, SHAPE, "forward", plans.MULTIPROCESSORS)
    other = Plan("tile", 128, 16, 128, splits=2, warps=8, stages=4)
    tuned.remember(GPU, {tuned.key(INT4, BF16, 16, SHAPE, "forward"): other.to_dict()})
    assert plan_for(INT4, BF16, 16, SHAPE, "forward", GPU) == other
    assert plan_for(INT4, BF16, 16, SHAPE, "forward", "another GPU") == rule
    assert plan_for(INT4, BF16, 16, SHAPE, "backward", GPU) != other
    tuned.remember(GPU, {tuned.key(INT4, BF16, 1, SHAPE, "forward"): rule.to_dict()})
    assert len(json.loads(tuned.user_file().read_text())["gpus"][GPU]) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1, "gpus": {"x": {"y": {"kind": "tile"}}}}', '{"gpus": {}}'])
def test_a_damaged_table_is_named(home, text):
    tuned.user_file().parent.mkdir()
    tuned.user_file().write_text(text)
    with pytest.raises(CTPError, match=r"triton_tuned\.json is damaged"):
        plan_for(INT4, BF16, 16, SHAPE, "forward", GPU)


def test_a_table_of_another_release_is_measured_again(home):
    tuned.user_file().parent.mkdir()
    tuned.user_file().write_text('{"version": 0, "gpus": {"what": "ever"}}')
    assert plan_for(INT4, BF16, 16, SHAPE, "forward", GPU).kind == "tile"


@pytest.mark.parametrize("name", ["int4", "unstructured-int3", "sparse24", "int3-g8-asym"])
def test_candidates_keep_what_the_kernels_need(name):
    format = parse_format(name).with_dtype(BF16)
    for direction in ("forward", "backward"):
        for m in (1, 4, 16, 64):
            rule = default_plan(format, BF16, m, SHAPE, direction, 132)
            found = list(warmup.candidates(rule, format, m, direction))
            if rule.kind == "dense":
                assert found == [rule]
                continue
            assert found[0] == rule and len(set(found)) == len(found) > 5
            assert [plan.kind for plan in found].count("dense") == 1
            assert all(format.pattern != "unstructured" or plan.block_k == 128 for plan in found)
            assert all(plan.block_m >= m for plan in found if plan.kind == "decode")


def test_the_fastest_right_plan_wins():
    fast, slow, huge = (Plan("tile", n, 16, 128) for n in (32, 64, 128))
    y = torch.ones(3)

    def run(plan):
        if plan == huge:
            raise warmup._too_large()[0](300_000, 200_000, "shared memory")
        return y

    timed = iter((2.0, 1.0))
    assert warmup.best([slow, huge, fast], run, lambda call: next(timed)) == (fast, 1.0)
    with pytest.raises(CTPError, match="computes something else"):
        warmup.best([slow, fast], lambda plan: y * (1 + (plan == fast)), lambda call: 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence():
    result = CliRunner().invoke(app, ["warmup", "embedded:opt"])
    assert result.exit_code == 2
    assert result.output.strip().splitlines() == [
        "error: ctp warmup compiles kernels for a GPU, and PyTorch finds none on this machine"
    ]


@pytest.mark.parametrize("bad", [["--rows", "1,x"], ["--rows", "0"], ["--dtype", "int8"]])
def test_bad_input_ends_with_a_sentence(bad):
    result = CliRunner().invoke(app, ["warmup", "embedded:opt", *bad])
    assert result.exit_code == 2 and result.output.startswith("error: --")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(home):
    from ctp_kernels import pack

    packed = pack(torch.randn(512, 512), INT4).to("cuda")
    weight = warmup.Weight(INT4, packed.shape, packed.tensors, None)
    result = warmup.warm_up([weight], BF16, rows=(1, 16), tune=True)
    assert result["kernels"] == 4 and len(result["tuned"]) == 4 and tuned.user_file().is_file()
