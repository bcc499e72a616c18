"""The prompt as embeddings, as a folder, and as keys and values: every form gives the re-run prompt's logits."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders
from transformers import MistralConfig, MistralForCausalLM

from ctp.prompt import PromptCache, SoftPrompt, generate, generate_ids, init_prompt, prompt_cache, prompted_logits
from ctp_kernels import patch_model
from ctp_kernels.errors import CTPError

from .helpers import MODELS, SMALL, small_model
from .text import character_tokenizer, random_windows

P = 7


def _prompt(model, scale: float = 8.0) -> SoftPrompt:
    """A prompt loud enough to change what the model says."""
    return SoftPrompt(scale * init_prompt(model, P, seed=3).embeddings)


# ---- logits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_kept_keys_and_values_give_the_rerun_logits(name):
    model = small_model(name)
    prompt, ids = _prompt(model), random_windows(3, 20).ids
    rerun = prompted_logits(model, ids, prompt=prompt, mode="rerun")
    assert rerun.shape == (3, 20, 96)
    assert (rerun - prompted_logits(model, ids)).abs().max() > 0.1, "the prompt must matter here"
    kept = prompt_cache(model, prompt)
    assert len(kept) == P
    for _ in range(2):  # the kept prefix is not used up
        torch.testing.assert_close(prompted_logits(model, ids, prompt=kept), rerun, rtol=1e-4, atol=1e-4)
    assert kept.layers[0][0].shape[:1] + kept.layers[0][0].shape[2:3] == (1, P)


@pytest.mark.parametrize("mode", ["kv", "rerun"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_rows_equal_unpadded_rows(name, side, mode):
    model = small_model(name)
    prompt, ids = _prompt(model), random_windows(3, 20).ids
    lengths = [20, 11, 1]
    mask = torch.zeros_like(ids)
    batch = torch.full_like(ids, 2)
    for row, length in enumerate(lengths):
        place = slice(20 - length, 20) if side == "left" else slice(0, length)
        batch[row, place], mask[row, place] = ids[row, :length], 1
    logits = prompted_logits(model, batch, mask, prompt, mode)
    for row, length in enumerate(lengths):
        alone = prompted_logits(model, ids[row : row + 1, :length], prompt=prompt, mode="rerun")[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], alone, rtol=1e-4, atol=1e-4)


def test_packed_model_keeps_and_reruns_alike():
    model = patch_model(small_model("llama-gqa-tied"), "int4-g8", skip=("lm_head",))
    prompt, ids = _prompt(model), random_windows(2, 12).ids
    rerun = prompted_logits(model, ids, prompt=prompt, mode="rerun")
    torch.testing.assert_close(prompted_logits(model, ids, prompt=prompt), rerun, rtol=1e-4, atol=1e-4)


def test_bf16_model_takes_the_fp32_prompt():
    model = small_model("opt").bfloat16()
    prompt, ids = _prompt(model), random_windows(2, 12).ids
    kept = prompt_cache(model, prompt)
    assert kept.layers[0][0].dtype == torch.bfloat16 and prompt.embeddings.dtype == torch.float32
    rerun = prompted_logits(model, ids, prompt=prompt, mode="rerun")
    torch.testing.assert_close(prompted_logits(model, ids, prompt=kept), rerun, rtol=5e-2, atol=5e-1)


# ---- generation ------------------------------------------------------------------------------------------------


def _greedy(model, prompt: SoftPrompt | None, row: torch.Tensor, count: int) -> list[int]:
    """Greedy continuation with nothing kept: the whole text is run again for every token."""
    ids = row.unsqueeze(0)
    for _ in range(count):
        mode = "kv" if prompt is None else "rerun"
        ids = torch.cat([ids, prompted_logits(model, ids, prompt=prompt, mode=mode)[:, -1:].argmax(-1)], 1)
    return ids[0, len(row) :].tolist()


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen2", "opt", "opt-350m-like"])
def test_generation_equals_the_rerun_prompt(name):
    model = small_model(name)
    model.generation_config.eos_token_id = None
    prompt, rows = _prompt(model), random_windows(3, 12).ids
    lengths = [12, 5, 1]
    ids, mask = torch.full_like(rows, 2), torch.zeros_like(rows)
    for row, length in enumerate(lengths):
        ids[row, 12 - length :], mask[row, 12 - length :] = rows[row, :length], 1
    for given in (None, prompt):
        expected = [_greedy(model, given, rows[row, :length], 10) for row, length in enumerate(lengths)]
        assert len({tuple(e) for e in expected}) > 1
        for cache in ("dynamic", "static"):
            for mode in ("kv", "rerun"):
                new = generate_ids(model, ids, mask, given, 10, cache=cache, mode=mode, pad_token_id=2)
                assert new.tolist() == expected, (cache, mode)
    assert expected != [_greedy(model, None, rows[row, :length], 10) for row, length in enumerate(lengths)]
    kept = prompt_cache(model, prompt)
    for _ in range(2):
        assert generate_ids(model, ids, mask, kept, 10, pad_token_id=2).tolist() == expected


def test_generate_texts_begin_with_bos_and_may_be_sampled():
    model, tokenizer = small_model("opt"), character_tokenizer()
    prompt = _prompt(model)
    texts = ["Once", "A longer beginning"]
    said = generate(model, tokenizer, texts, prompt, 8)
    alone = [generate(model, tokenizer, text, prompt, 8, mode="rerun")[0] for text in texts]
    assert said == alone
    ids = torch.tensor([[0, *tokenizer("Once", add_special_tokens=False)["input_ids"]]])
    new = torch.tensor(_greedy(model, prompt, ids[0], 8))
    assert said[0] == tokenizer.decode(new[: (new == 1).nonzero()[0] if 1 in new else None], skip_special_tokens=True)
    torch.manual_seed(0)
    sampled = [generate(model, tokenizer, "Once", prompt, 8, do_sample=True)[0] for _ in range(5)]
    assert len(set(sampled)) > 1


def test_a_continuation_keeps_its_first_space(monkeypatch):
    """A SentencePiece decoder drops the space in front of what it is given: texts and new tokens go in together."""
    model, tokenizer = small_model("opt"), character_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    ids = tokenizer(" a time", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(
        "ctp.prompt.kv.generate_ids", lambda *_, **options: torch.tensor([ids, ids, [*ids[:4], 1, 2, 2]])
    )
    assert generate(model, tokenizer, ["Once upon", "There was", "x"]) == [" a time", " a time", " a t"]
    assert generate(model, tokenizer, "Once upon", num_return_sequences=3) == [" a time", " a time", " a t"]


def test_a_window_shorter_than_the_prompt_is_refused():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, intermediate_size=172, sliding_window=16))
    model.eval()
    ids = random_windows(2, 20).ids
    prompt = init_prompt(model, 15)
    rerun = prompted_logits(model, ids, prompt=prompt, mode="rerun")
    torch.testing.assert_close(prompted_logits(model, ids, prompt=prompt), rerun, rtol=1e-4, atol=1e-4)
    with pytest.raises(CTPError, match="has 16 tokens, but a sliding window of the model keeps 15"):
        prompt_cache(model, init_prompt(model, 16))


def test_beam_search_runs_on_the_kept_prefix():
    model = small_model("llama-gqa-tied")
    prompt, ids = _prompt(model), random_windows(2, 6).ids
    options = {"num_beams": 3, "pad_token_id": 2, "eos_token_id": None}
    kept = generate_ids(model, ids, torch.ones_like(ids), prompt, 6, **options)
    rerun = generate_ids(model, ids, torch.ones_like(ids), prompt, 6, mode="rerun", **options)
    assert kept.tolist() == rerun.tolist()


# ---- initialisation --------------------------------------------------------------------------------------------


def test_initialisations_come_from_the_table():
    model, tokenizer = small_model("opt-350m-like"), character_tokenizer()
    table = model.get_input_embeddings().weight
    drawn = init_prompt(model, 20, "vocab", seed=5).embeddings
    assert drawn.shape == (20, 32) and drawn.dtype == torch.float32
    assert ((drawn[:, None] == table[None]).all(-1).sum(1) >= 1).all() and len(drawn.unique(dim=0)) == 20
    assert torch.equal(drawn, init_prompt(model, 20, "vocab", seed=5).embeddings)
    assert not torch.equal(drawn, init_prompt(model, 20, "vocab", seed=6).embeddings)
    assert len(init_prompt(model, 250, "vocab")) == 250
    text = init_prompt(model, 5, "text:abc", tokenizer=tokenizer).embeddings
    ids = tokenizer("abcab", add_special_tokens=False)["input_ids"]
    assert torch.equal(text, table[ids].float())
    mean = init_prompt(model, 50, "mean").embeddings
    assert (mean.mean(0) - table.mean(0)).abs().max() < 0.1 * table.std()
    assert len(mean.unique(dim=0)) == 50


def test_bad_initialisations_are_one_sentence():
    model = small_model("opt")
    for arguments, message in [
        ((0,), "no prompt"),
        ((5, "zeros"), "choose vocab, mean, text"),
        ((5, "text:abc"), "tokenizer"),
        ((5, "text:", 0, character_tokenizer()), "no tokens"),
    ]:
        with pytest.raises(CTPError, match=message):
            init_prompt(model, *arguments)


# ---- on disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    SoftPrompt(torch.randn(P, 64), {"steps": 3}).save(tmp_path / "prompt", "org/base-model")
    return tmp_path / "prompt"


def test_folder_is_what_peft_reads_and_comes_back_exactly(tmp_path):
    prompt = SoftPrompt(torch.randn(P, 64), {"steps": 3})
    prompt.save(tmp_path / "prompt", "org/base-model")
    assert list(load_file(tmp_path / "prompt" / "adapter_model.safetensors")) == ["prompt_embeddings"]
    assert json.loads((tmp_path / "prompt" / "adapter_config.json").read_text()) == {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "inference_mode": True, "num_virtual_tokens": P,
        "base_model_name_or_path": "org/base-model",
    }  # fmt: skip
    loaded = SoftPrompt.load(tmp_path / "prompt")
    assert torch.equal(loaded.embeddings, prompt.embeddings) and loaded.info == {"steps": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["prompt"], "no staging folder is left"
    prompt.save(tmp_path / "prompt", str(tmp_path))
    config = (tmp_path / "prompt" / "adapter_config.json").read_text()
    assert str(tmp_path) not in config and tmp_path.name in config


def test_a_folder_of_pefts_own_has_no_training_record(folder):
    (folder / "training.json").unlink()
    save_file({"prompt_embeddings": torch.randn(P, 64).bfloat16()}, folder / "adapter_model.safetensors")
    assert SoftPrompt.load(folder).embeddings.dtype == torch.float32


def _weights(**tensors):
    return lambda folder: save_file(tensors, folder / "adapter_model.safetensors")


def _bytes(change):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def _config(**fields):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def _no_record(damage):
    return lambda folder: ((folder / "training.json").unlink(), damage(folder))


DAMAGE = {
    "truncated": (_bytes(lambda b: b[:-5]), "damaged"),
    "empty": (_bytes(lambda b: b""), "damaged"),
    "header-length": (_bytes(lambda b: struct.pack("<Q", 1 << 40) + b[8:]), "damaged"),
    "one-bit": (_bytes(lambda b: b[:-1] + bytes([b[-1] ^ 1])), "was changed after it was written"),
    "nan": (_no_record(_weights(prompt_embeddings=torch.full((P, 64), float("nan")))), "not finite"),
    "integers": (_no_record(_weights(prompt_embeddings=torch.ones(P, 64, dtype=torch.int32))), "not finite"),
    "other-key": (_weights(prefix=torch.randn(P, 64)), "has no prompt_embeddings"),
    "other-rank": (_weights(prompt_embeddings=torch.randn(P)), "has no prompt_embeddings"),
    "other-rows": (_config(num_virtual_tokens=10_000_000), "of 10000000 rows"),
    "other-kind": (_config(peft_type="LORA"), "does not describe prompt tuning"),
    "config-gone": (lambda folder: (folder / "adapter_config.json").unlink(), "cannot read"),
    "config-broken": (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot read"),
    "config-list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "weights-gone": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "not a prompt folder"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder_is_refused(folder, damage):
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(CTPError, match=message):
        SoftPrompt.load(folder)


def test_failed_save_leaves_the_old_prompt(folder, monkeypatch):
    before = SoftPrompt.load(folder).embeddings

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("ctp.prompt.soft.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        SoftPrompt(torch.zeros(P, 64)).save(folder)
    assert torch.equal(SoftPrompt.load(folder).embeddings, before)
    assert [p.name for p in folder.parent.iterdir()] == ["prompt"]


# ---- requests that cannot be met -------------------------------------------------------------------------------


def test_requests_that_cannot_be_met():
    model = small_model("opt-350m-like")
    narrow, ids = SoftPrompt(torch.randn(P, 64)), random_windows(1, 10).ids
    mask = torch.ones_like(ids)
    kept = prompt_cache(model, _prompt(model))
    assert isinstance(kept, PromptCache)
    for call, message in [
        (lambda: prompted_logits(model, ids, prompt=narrow), "has width 64, but OPTForCausalLM embeds words in 32"),
        (lambda: prompted_logits(model, random_windows(1, 122).ids, prompt=kept), "take 129 positions"),
        (lambda: prompted_logits(model, ids, prompt=kept, mode="rerun"), "cannot be used with mode 'rerun'"),
        (lambda: prompted_logits(model, ids, prompt=kept, mode="cached"), "mode 'cached'"),
        (lambda: generate_ids(model, ids, mask, kept, 112), "take 129 positions"),
        (lambda: generate_ids(model, ids, mask, kept, 5, mode="rerun"), "from its embeddings only"),
        (lambda: generate_ids(model, ids, mask, kept, 5, cache="paged"), "choose dynamic or static"),
        (lambda: generate_ids(model, ids, 1 - mask, kept, 5), "pad the texts on the left"),
        (lambda: generate(model, character_tokenizer(bos=False), "", kept), "no text to continue"),
    ]:
        with pytest.raises(CTPError, match=message):
            call()
