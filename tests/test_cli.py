"""The command line from end to end on the embedded OPT, and every kind of bad input."""

import json
import math
import subprocess
import sys

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ctp.cli import app
from ctp.model import EMBEDDED, load_model
from ctp_kernels.backends import cpu
from ctp_kernels.checkpoints import MANIFEST

runner = CliRunner()
OPT = "embedded:opt"
needs_opt = pytest.mark.skipif(
    not (EMBEDDED[OPT] / "training.json").is_file(), reason="the embedded OPT is not part of this installation"
)


def ctp(*args: object, code: int = 0) -> str:
    result = runner.invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A packed OPT and a prompt trained for it, made by the commands themselves."""
    root = tmp_path_factory.mktemp("cli")
    ctp("compress", OPT, "--format", "sparse24-int4-g64", "-o", root / "packed", "--samples", 8, "--length", 64,
        "--csv", root / "layers.csv", "--json", root / "compress.json")  # fmt: skip
    ctp("train", root / "packed", "-o", root / "prompt", "--tokens", 8, "--steps", 6, "--batch-size", 2, "--length", 64,
        "--json", root / "train.json")  # fmt: skip
    return root


@needs_opt
def test_compress_then_train_then_evaluate(folders):
    compress = json.loads((folders / "compress.json").read_text())
    assert compress["method"] == "sparsegpt" and compress["bytes_packed"] < compress["bytes_dense"] / 4
    assert len((folders / "layers.csv").read_text().splitlines()) == compress["layers"] + 1
    assert not list(folders.glob(".*")), "staging or work folders were left behind"
    common = ["--data", "embedded:docs", "--length", 128, "--count", 4]
    out = ctp("evaluate", folders / "packed", *common, "--json", folders / "a.json")
    assert "perplexity" in out
    plain = json.loads((folders / "a.json").read_text())
    assert 1 < plain["perplexity"] < 2048
    expected = {"data": "embedded:docs", "split": "test", "windows": 4, "length": 128, "stride": 127, "seed": 0}
    assert plain | expected | {"dtype": "float32", "model": str(folders / "packed"), "prompt": None} == plain
    assert math.isclose(plain["perplexity"], math.exp(plain["nll"] / plain["tokens"]))
    ctp("evaluate", folders / "packed", "--prompt", folders / "prompt", *common, "--json", folders / "b.json")
    prompted = json.loads((folders / "b.json").read_text())
    assert prompted["tokens"] == plain["tokens"] and prompted["prompt_tokens"] == 8
    assert prompted["perplexity_published_divisor"] < prompted["perplexity"]


@needs_opt
def test_generate_inspect_explain(folders):
    text = ctp("generate", folders / "packed", "The function returns", "--prompt", folders / "prompt",
               "--max-new-tokens", 8, "--seed", 3, "--json", folders / "generate.json")  # fmt: skip
    assert text.startswith("The function returns") and len(text.strip()) > len("The function returns")
    said = json.loads((folders / "generate.json").read_text())
    assert said["text"] + said["continuation"] in text
    assert said["prompt"] == str(folders / "prompt") and said["seed"] == 3
    half = ("--dtype", "bfloat16", "--max-new-tokens", 2)
    assert ctp("generate", folders / "packed", "The function returns", *half).startswith("The function returns")
    assert "sparse24-int4-g64" in ctp("inspect", folders / "packed")
    assert "8 tokens" in ctp("inspect", folders / "prompt")
    rows = folders / "explain.json"
    assert "forward" in ctp("explain", folders / "packed", "--json", rows)
    assert f"forward, 16 rows: cpu: {cpu.isa()} kernels" in ctp("explain", folders / "packed", "--rows", "1,16")
    assert all(row["forward"] and row["seed"] == 0 for row in json.loads(rows.read_text()))


@needs_opt
@pytest.mark.parametrize("to", ["gptq", "compressed-tensors", "dense"])
def test_an_exported_model_is_read_by_every_command(folders, tmp_path, to):
    one, json_file = tmp_path / "one", tmp_path / "a.json"
    assert "24 layers" in ctp("export", folders / "packed", "--to", to, "-o", one, "--json", tmp_path / "export.json")
    assert json.loads((tmp_path / "export.json").read_text())["layout"] == to
    common = ["--length", 64, "--count", 4, "--prompt", folders / "prompt", "--json", json_file]
    measured = []
    for model in (folders / "packed", one):
        ctp("evaluate", model, *common)
        measured.append(json.loads(json_file.read_text())["perplexity"])
    assert math.isclose(*measured, rel_tol=1e-3)
    if to == "dense":
        assert "not a packed checkpoint" in ctp("inspect", one, code=2)
        return
    assert f"{to} checkpoint" in ctp("inspect", one) and "int4-g64" in ctp("explain", one)
    ctp("train", one, "-o", tmp_path / "prompt", "--tokens", 4, "--steps", 2, "--batch-size", 2, "--length", 32)
    assert "packed already" in ctp("compress", one, "--format", "int4", "-o", tmp_path / "x", code=2)
    ctp("export", one, "--to", "compressed-tensors", "-o", tmp_path / "other")
    assert (tmp_path / "other" / "config.json").is_file()


@needs_opt
def test_an_exported_prompt(folders, tmp_path):
    prompt = folders / "prompt"
    ctp("export", folders / "packed", "--prompt", prompt, "--to", "peft", "-o", tmp_path / "peft")
    key = "prompt_embeddings"
    there, here = (load_file(f / "adapter_model.safetensors")[key] for f in (tmp_path / "peft", prompt))
    assert torch.equal(there, here)
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert said["num_virtual_tokens"] == 8 and said["base_model_name_or_path"] == "packed"
    told = ctp("export", folders / "packed", "--prompt", prompt, "--to", "tokens", "-o", tmp_path / "words")
    words = json.loads((tmp_path / "words" / "tokens.json").read_text())
    assert len(words["ids"]) == 8 and repr(words["text"]) in told
    table = load_model(OPT)[0].get_input_embeddings().weight
    rows = load_file(tmp_path / "words" / "adapter_model.safetensors")[key]
    assert torch.equal(rows, table[words["ids"]])
    angles = torch.nn.functional.cosine_similarity(here[:, None], table[None], dim=-1)
    assert angles.argmax(-1).tolist() == words["ids"]
    ctp("evaluate", folders / "packed", "--prompt", tmp_path / "words", "--length", 64, "--count", 2)


@needs_opt
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("command", [["compress", OPT, "--format", "int4", "-o", "x"], ["train", OPT, "-o", "x"],
                                     ["evaluate", OPT], ["generate", OPT, "text"]], ids=lambda c: c[0])  # fmt: skip
def test_without_a_gpu_it_says_so(command):
    assert "PyTorch finds none" in ctp(*command, "--device", "cuda", code=2)


@needs_opt
def test_explain_for_a_gpu(folders):
    pytest.importorskip("triton")
    planned = ctp("explain", folders / "packed", "--device", "cuda", "--rows", "1,2048")
    assert "forward, 1 rows: triton: decode" in planned and "backward, 2048 rows: triton: dequantise" in planned


@needs_opt
def test_training_with_a_teacher_finds_the_original(folders):
    ctp("train", folders / "packed", "-o", folders / "kl", "--tokens", 4, "--steps", 2, "--batch-size", 2,
        "--length", 32, "--loss", "kl")  # fmt: skip
    assert (folders / "kl" / "adapter_config.json").is_file()


@needs_opt
def test_transfer_measures_every_pair_and_goes_on(folders, tmp_path):
    packed, prompt, out, plot = (
        folders / "packed",
        folders / "prompt",
        tmp_path / "matrix.json",
        tmp_path / "matrix.png",
    )
    one = ["--models", packed, "--prompts", prompt, "--length", 64, "--count", 5, "--json", out]
    texts = ["--data", "embedded:docs", "--data", "embedded:code"]
    table = ctp("transfer", *one, *texts, "--models", OPT, "--plot", plot)
    assert str(packed) in table and "embedded:code" in table and plot.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * 2 * 2 and not list(tmp_path.glob(".*"))
    without, with_prompt = rows[:2]
    assert without["prompt"] is None and "ratio" not in without and with_prompt["prompt"] == str(prompt)
    assert math.isclose(with_prompt["ratio"], with_prompt["perplexity"] / without["perplexity"])
    assert with_prompt["ratio_low"] < with_prompt["ratio"] < with_prompt["ratio_high"]
    for row, options in ((without, []), (with_prompt, ["--prompt", prompt])):
        ctp("evaluate", packed, "--data", "embedded:docs", "--length", 64, "--count", 5, *options, "--json",
            tmp_path / "one.json")  # fmt: skip
        measured = json.loads((tmp_path / "one.json").read_text())
        assert math.isclose(measured["perplexity"], row["perplexity"]) and measured["tokens"] == sum(row["tokens"])

    kept = json.loads(out.read_text())
    kept["rows"] = kept["rows"][:3]
    kept["rows"][0]["perplexity"] = 1.5  # a cell that is there is not measured again
    out.write_text(json.dumps(kept))
    ctp("transfer", *one, *texts, "--models", OPT, "--resume")
    again = json.loads(out.read_text())["rows"]
    assert again[0]["perplexity"] == 1.5 and again[1:] == rows[1:]
    ctp("transfer", *one, "--data", "embedded:docs", "--resume")  # fewer of them: the others stay in the file
    assert json.loads(out.read_text())["rows"] == again
    assert "other settings" in ctp("transfer", *one[:-4], "--count", 4, "--json", out, "--resume", code=2)
    assert "named twice" in ctp("transfer", *one, "--models", packed, code=2)


BAD = {
    "missing folder": ["evaluate", "./no/such/model"],
    "unknown format": ["compress", OPT, "--format", "int5", "-o", "{out}"],
    "unknown method": ["compress", OPT, "--format", "int4", "--method", "magic", "-o", "{out}"],
    "unknown data": ["evaluate", OPT, "--data", "wikitxt2"],
    "missing file": ["evaluate", OPT, "--data", "no/such.txt"],
    "missing prompt": ["evaluate", OPT, "--prompt", "no/prompt"],
    "window too long": ["evaluate", OPT, "--length", "100000"],
    "bad sparsity": ["compress", OPT, "--format", "unstructured", "--sparsity", "1.5", "-o", "{out}"],
    "bad loss": ["train", OPT, "--loss", "mse", "-o", "{out}"],
    "not packed": ["inspect", "{empty}"],
    "dense explain": ["explain", OPT],
    "explain elsewhere": ["explain", OPT, "--device", "tpu"],
    "explain no rows": ["explain", OPT, "--rows", "0"],
    "no such device": ["evaluate", OPT, "--device", "tpu"],
    "no such dtype": ["generate", OPT, "text", "--dtype", "int8"],
    "other architecture": ["evaluate", "{bert}"],
    "transfer of no prompt": ["transfer", "--models", OPT, "--prompts", "{empty}"],
    "transfer drawn as text": ["transfer", "--models", OPT, "--prompts", "{empty}", "--plot", "matrix.txt"],
    "export of a dense model": ["export", OPT, "--to", "gptq", "-o", "{out}"],
    "export to nothing known": ["export", OPT, "--to", "awq", "-o", "{out}"],
    "export of no prompt": ["export", OPT, "--to", "peft", "-o", "{out}"],
    "export of a prompt as a model": ["export", OPT, "--prompt", "{empty}", "--to", "gptq", "-o", "{out}"],
    "export of a folder that is no prompt": ["export", OPT, "--prompt", "{empty}", "--to", "tokens", "-o", "{out}"],
    "transfer goes on from nowhere": ["transfer", "--models", OPT, "--prompts", "{empty}", "--resume"],
}


@needs_opt
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_code_2(case, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    out = tmp_path / "out"
    places = {"out": out, "empty": tmp_path / "empty", "bert": tmp_path / "bert"}
    output = ctp(*[a.format(**places) for a in BAD[case]], code=2)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bert", "empty"], "something half-written was left"


NUMBERS = {
    "compress": ["--samples 0", "--samples -1", "--length 0", "--seed -1"],
    "train": ["--steps 0", "--tokens 0", "--batch-size 0", "--accumulation 0", "--length 1", f"--seed {2**63}"],
    "evaluate": ["--count 0", "--count -1", "--length 0", "--batch-size 0", "--limit -1", "--stride 0"],
    "generate": ["--max-new-tokens 0", "--temperature -1"],
    "transfer": ["--count 0", "--length 1", "--batch-size 0"],
    "demo": ["--steps 0"],
}


@pytest.mark.parametrize(("command", "option"), [(c, option) for c, options in NUMBERS.items() for option in options])
def test_numbers_out_of_range_are_named(command, option, tmp_path):
    required = {"compress": [OPT, "--format", "int4"], "train": [OPT], "evaluate": [OPT], "generate": [OPT, "x"]}
    required["transfer"] = ["--models", OPT, "--prompts", tmp_path]
    out = ["-o", tmp_path / "out"] if command in ("compress", "train", "demo") else []
    output = ctp(command, *required.get(command, []), *out, *option.split(), code=2)
    assert "Invalid value" in output and option.split()[0] in output and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "job", "said"), [
    ("compress {} --format int4 -o x", "compress_to_folder", "interrupted; the same command goes on\n"),
    ("train {} -o x", "train_to_folder", "interrupted; with --resume it goes on\n"),
    ("explain {}", "explain_model", "interrupted\n"),
])  # fmt: skip
def test_ctrl_c_says_how_to_go_on(monkeypatch, command, job, said):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"ctp.jobs.{job}", interrupted)
    assert ctp(*command.format(OPT).split(), code=130) == said


def test_every_command_takes_json_and_seed():
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        assert {"--json", "--seed"} <= {name for option in command.params for name in option.opts}, command.name


@needs_opt
def test_a_prompt_of_another_width_and_a_tampered_one_are_refused(folders, tmp_path):
    weights = folders / "prompt" / "adapter_model.safetensors"
    for name, tensor in {"wide": torch.randn(8, 64), "nan": torch.full((8, 128), float("nan"))}.items():
        folder = tmp_path / name
        folder.mkdir()
        save_file({"prompt_embeddings": tensor}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text((folders / "prompt" / "adapter_config.json").read_text())
        ctp("evaluate", folders / "packed", "--prompt", folder, "--count", 1, "--length", 64, code=2)
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    (truncated / "adapter_model.safetensors").write_bytes(weights.read_bytes()[:-5])
    (truncated / "adapter_config.json").write_text((folders / "prompt" / "adapter_config.json").read_text())
    ctp("generate", folders / "packed", "x", "--prompt", truncated, code=2)


@needs_opt
def test_nan_weights_are_named(tmp_path):
    model, tokenizer = load_model(OPT)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("layers.1.fc1.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    output = ctp("compress", tmp_path / "dense", "--format", "int4", "--method", "rtn", "-o", tmp_path / "out", code=2)
    assert "layers.1.fc1" in output and "NaN" in output
    assert not (tmp_path / "out").exists()


@needs_opt
def test_a_damaged_packed_folder_is_refused(folders, tmp_path):
    import shutil

    shutil.copytree(folders / "packed", tmp_path / "packed")
    manifest = json.loads((tmp_path / "packed" / MANIFEST).read_text())
    assert "ctp_model.safetensors" in manifest["files"]
    (tmp_path / "packed" / "ctp_model.safetensors").write_bytes(b"\0" * 100)
    assert "truncated or altered" in ctp("evaluate", tmp_path / "packed", code=2)
    assert "truncated or altered" in ctp("inspect", tmp_path / "packed", code=2)


@needs_opt
def test_an_earlier_model_is_replaced_only_on_demand(folders, tmp_path):
    command = ("compress", OPT, "--method", "rtn", "-o", tmp_path / "packed", "--format")
    ctp(*command, "int4")
    before = (tmp_path / "packed" / MANIFEST).read_bytes()
    assert "holds an earlier result" in ctp(*command, "int3", code=2)
    assert (tmp_path / "packed" / MANIFEST).read_bytes() == before
    ctp(*command, "int3", "--overwrite")
    assert (tmp_path / "packed" / MANIFEST).read_bytes() != before
    export = ("export", tmp_path / "packed", "--to", "gptq", "-o", tmp_path / "out")
    ctp(*export)
    assert "holds an earlier result" in ctp(*export, code=2)
    ctp(*export, "--overwrite")
    assert "holds an earlier result" in ctp(
        "train", folders / "packed", "-o", folders / "prompt", "--tokens", 8, "--steps", 6, code=2
    )


def test_importing_touches_no_device_and_no_network():
    code = (
        "import sys, socket\n"
        "def no(*a, **k): raise AssertionError('network at import')\n"
        "socket.socket.connect = no\n"
        "import ctp_kernels, ctp.cli\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'datasets' not in sys.modules and 'lm_eval' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_opt
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_main_job_on_a_gpu(tmp_path):
    gpu = ("--device", "cuda")
    ctp("compress", OPT, "--format", "sparse24-int4", "-o", tmp_path / "packed", "--samples", 8, "--length", 64, *gpu)
    ctp("train", tmp_path / "packed", "-o", tmp_path / "prompt", "--tokens", 8, "--steps", 6, "--length", 64, *gpu)
    common = ["--prompt", tmp_path / "prompt", "--data", "embedded:docs", "--length", 128, "--count", 4]
    found = []
    for where in ("cpu", "cuda"):
        ctp("evaluate", tmp_path / "packed", *common, "--device", where, "--json", tmp_path / "result.json")
        found.append(json.loads((tmp_path / "result.json").read_text())["perplexity"])
    assert math.isclose(*found, rel_tol=0.05)
    assert ctp("generate", tmp_path / "packed", "The function returns", *gpu).startswith("The function returns")
