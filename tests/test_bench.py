"""The benchmarks of whole models, on a model so small that they end at once: what a GPU will run is what runs here."""

import pytest
import torch

from bench import plot, test_decode, test_prompt_length, test_training_step
from bench.conftest import Table, write_csv
from bench.models import QUICK, TINY, Setup, gpu, llama, random_ids

SETUPS = [
    Setup("cpu", torch.float32, TINY),
    Setup("cpu", torch.bfloat16, TINY),
    pytest.param(Setup("cuda", torch.bfloat16, TINY), marks=gpu),
]
on_each = pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: f"{setup}-{setup.dtype}".replace("torch.", ""))


@pytest.fixture(autouse=True)
def roofs(monkeypatch):
    """Measuring the machine takes seconds."""
    from bench.machine import Machine

    monkeypatch.setattr(test_decode, "machine", lambda device: Machine("any", device, 1, 1.0, 1.0, "", ""))
    yield
    llama.cache_clear()


def interleave(contenders, **options):
    """As the fixture of the benchmarks, but each contender is called once, and takes a second."""
    for calls in contenders.values():
        for call in calls:
            call()
    return {name: {"median": 1.0, "low": 1.0, "high": 1.0} for name in contenders}


@pytest.mark.parametrize("format", QUICK)
@on_each
def test_rows_and_pictures(setup, format, tmp_path):
    table = Table(record=False)
    for mode in ["eager", "graph"] if setup.device == "cuda" else ["eager"]:
        test_decode.run(interleave, table, setup, format, 2, 5, mode)
    for prompt_tokens in (0, 5):
        test_prompt_length.run(interleave, table, setup, format, 7, prompt_tokens)
    test_training_step.run(interleave, table, setup, format, 2)
    for (_, name), rows in table.rows.items():
        write_csv(tmp_path / f"{name}.csv", rows)
        assert all(row["format"] == format and row["model"] == "tiny" for row in rows)
    assert {path.name for path in plot.plot_all(tmp_path)} == {"decode.png", "prompt_length.png"}
    (row,) = table.rows[setup.device, "training_step"]
    assert 0 < row["weight_bytes_packed"] < row["weight_bytes_dense"]


@on_each
def test_layers_have_memory_of_their_own(setup):
    """Or a cache would hold a layer that the other layers pass on."""
    first, second = (layer.mlp.down_proj for layer in llama(setup, "int4").model.layers)
    assert torch.equal(first.codes, second.codes) and first.codes.data_ptr() != second.codes.data_ptr()


@pytest.mark.parametrize("format", ["dense", "int4"])
@pytest.mark.parametrize("prompt_tokens", [0, 5])
@on_each
@torch.no_grad()
def test_decoding_gives_the_tokens_of_generate(setup, prompt_tokens, format):
    from ctp.prompt import generate_ids, prompt_cache

    net, ids = llama(setup, format), random_ids(setup, 3, 7)
    prompt = None
    if prompt_tokens:
        prompt = prompt_cache(net, torch.randn(1, prompt_tokens, TINY.hidden).to(setup.device, setup.dtype))
    decoding = test_decode.Decoding(net, ids, prompt, test_decode.STEPS)
    options = {"max_new_tokens": test_decode.STEPS + 1, "eos_token_id": None, "pad_token_id": 0}
    expected = generate_ids(net, ids, torch.ones_like(ids), prompt, **options)
    assert torch.equal(decoding.round(), expected) and torch.equal(decoding.round(), expected)


@pytest.mark.parametrize("file, format, direction", [
    ("kernels", "int3, int8 activations", "forward"), ("kernels", "int4", "dX"), ("gpu_kernels", "int4", "forward")
])  # fmt: skip
def test_a_run_of_a_few_benchmarks_is_drawn(file, format, direction, tmp_path):
    """Without what the roofline shows, or the mode that the picture of a GPU's kernels shows."""
    row = {"format": format, "direction": direction, "n": 64, "k": 64, "rows": 1, "speedup": 2.0, "gflop_per_s": 3.0,
           "gb_per_s": 4.0, "mode": "eager", "dtype": "bf16"}  # fmt: skip
    write_csv(tmp_path / f"{file}.csv", [row])
    (tmp_path / "machine.json").write_text('{"gb_per_s": 30, "gflop_per_s": 200}')
    drawn = {path.name for path in plot.plot_all(tmp_path)}
    assert drawn == ({"kernels.png", "roofline.png"} if file == "kernels" else set())
