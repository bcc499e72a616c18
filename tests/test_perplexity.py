"""Perplexity divides by the tokens it scored and by nothing else; tasks see text positions only."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ctp.data import token_windows
from ctp.evaluate import evaluate_tasks, perplexity
from ctp.evaluate.tasks import prompted_lm
from ctp.evaluate.transfer import interval
from ctp.prompt import SoftPrompt, generate_ids, init_prompt, prompt_cache, prompted_logits
from ctp_kernels.errors import CTPError

from .helpers import SHARED, STORIES, needs_shared, small_model
from .text import character_tokenizer, random_windows


@pytest.fixture(scope="module")
def uniform():
    """A real LLaMA of 1,000 words whose head is zero: every word is equally likely."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.lm_head.weight.zero_()
    return model


#: What the method's published evaluation prints for a true 1000 with 1024-token windows: its own functions, run.
PRINTED = {0: 1000.0, 20: 875.9, 50: 724.8, 100: 540.6}


@pytest.mark.parametrize("mode", ["kv", "rerun"])
@pytest.mark.parametrize("tokens", PRINTED)
def test_uniform_logits_give_the_vocabulary_size(uniform, tokens, mode):
    prompt = init_prompt(uniform, tokens) if tokens else None
    result = perplexity(uniform, random_windows(3, 1024, 1000), prompt=prompt, mode=mode, batch_size=2)
    assert result.perplexity == pytest.approx(1000, rel=1e-6)
    assert result.tokens == 3 * 1023 and result.prompt_tokens == tokens
    assert result.perplexity_published_divisor == pytest.approx(PRINTED[tokens], abs=0.05)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt-350m-like"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_perplexity_is_that_of_the_scored_tokens_by_hand(name, tokens):
    model, windows = small_model(name), random_windows(5, 30)
    windows.scored[2, 7:20] = False
    prompt = init_prompt(model, tokens, seed=1) if tokens else None
    losses = []
    for ids, scored in zip(windows.ids, windows.scored, strict=True):
        embeds = model.get_input_embeddings()(ids[None])
        if prompt is not None:
            embeds = torch.cat([prompt.embeddings[None], embeds], 1)
        log_probabilities = model(inputs_embeds=embeds).logits[0, tokens:].double().log_softmax(-1)
        losses += [-log_probabilities[i - 1, ids[i]].item() for i in range(1, 30) if scored[i]]
    expected = math.exp(sum(losses) / len(losses))
    for mode in ("kv", "rerun"):
        result = perplexity(model, windows, prompt=prompt, batch_size=2, mode=mode)
        assert result.tokens == len(losses) == 5 * 29 - 13
        assert result.perplexity == pytest.approx(expected, rel=1e-4)
    if prompt is not None:
        kept = perplexity(model, windows, prompt=prompt_cache(model, prompt), batch_size=5)
        assert kept.perplexity == pytest.approx(expected, rel=1e-4)


def test_nan_is_an_error_and_infinity_is_not():
    model, windows = small_model("llama-gqa-tied"), random_windows(2, 20)
    model.model.norm.weight[0] = float("nan")
    with pytest.raises(CTPError, match="outputs hold NaN: "):
        perplexity(model, windows)
    model.model.norm.weight[:] = 1e9
    assert perplexity(model, windows).perplexity == math.inf
    windows.scored[:] = False
    with pytest.raises(CTPError, match="no token to score"):
        perplexity(model, windows)


def test_windows_and_prompt_beyond_the_context_are_refused():
    model = small_model("opt")
    with pytest.raises(CTPError, match="take 129 positions, but the model has 128"):
        perplexity(model, random_windows(1, 120), prompt=init_prompt(model, 10))


@pytest.fixture(scope="module")
def stories():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        STORIES
    )


@needs_shared
def test_stories_perplexity_matches_transformers(stories):
    model, tokenizer = stories
    windows = token_windows(str(SHARED / "data/tinystories/sample.txt"), tokenizer, 512, split="test", count=4)
    labels = windows.ids.masked_fill(~windows.scored, -100)
    with torch.no_grad():
        expected = math.exp(model(input_ids=windows.ids, labels=labels).loss.item())
    assert perplexity(model, windows).perplexity == pytest.approx(expected, rel=1e-4)
    assert expected < 5, "the text is in the model's domain"


# ---- tasks -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker():
    """A small OPT, its tokenizer, and a prompt that changes what it says."""
    pytest.importorskip("lm_eval")
    model = small_model("opt")
    space = model.get_input_embeddings().weight[3]  # let it say " " now and then: every scored answer begins so
    model.model.decoder.final_layer_norm.bias.copy_(space / space.norm() ** 2)
    return model, character_tokenizer(), SoftPrompt(10 * init_prompt(model, 6, seed=2).embeddings)


def _score(speaker, prompt: SoftPrompt | None, context: str, continuation: str) -> float:
    """The log-likelihood of a continuation by hand: the prompt re-run, one text at a time."""
    model, tokenizer, _ = speaker
    front = tokenizer(context)["input_ids"]
    ids = torch.tensor([front + tokenizer(continuation, add_special_tokens=False)["input_ids"]])
    logits = prompted_logits(model, ids[:, :-1], prompt=prompt, mode="rerun")[0].double().log_softmax(-1)
    return sum(logits[i - 1, ids[0, i]].item() for i in range(len(front), ids.shape[1]))


@pytest.mark.parametrize("prompted", [False, True])
def test_loglikelihood_equals_the_rerun_prompt(speaker, prompted):
    from lm_eval.api.instance import Instance

    model, tokenizer, prompt = speaker
    prompt = prompt if prompted else None
    pairs = [("The cat", " sat on it."), ("A much longer context than the first one", " no"), ("x", " yes yes yes")]
    lm = prompted_lm(model, tokenizer, prompt, batch_size=2)
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    for (score, _), pair in zip(found, pairs, strict=True):
        assert score == pytest.approx(_score(speaker, prompt, *pair), rel=1e-4)
    assert lm.max_length == 128 - (6 if prompted else 0)


def test_local_tasks_of_all_three_kinds(speaker, tmp_path):
    model, tokenizer, prompt = speaker
    queries = [(f"Question: number {i}?\n", ["a long answer", "no", "perhaps"]) for i in range(6)]
    best = [
        max(range(3), key=lambda c: _score(speaker, prompt, q.rstrip() + "\nAnswer:", " " + choices[c]))
        for q, choices in queries
    ]
    gold = [b if i < 4 else (b + 1) % 3 for i, b in enumerate(best)]
    rows = [{"query": q, "choices": c, "gold": g} for (q, c), g in zip(queries, gold, strict=True)]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    options = ["first context", "the second one"]
    winner = max(range(2), key=lambda c: _score(speaker, prompt, options[c], " went on."))
    row = {"context_options": options, "continuation": "went on.", "gold": winner}
    (tmp_path / "context.jsonl").write_text(json.dumps(row) + "\n")

    spaces, tokenizer_ids = _context_continued_by_a_space(speaker)
    said = generate_ids(model, tokenizer_ids, torch.ones_like(tokenizer_ids), prompt, 3)[0]
    lines = [{"context": spaces, "continuation": tokenizer.decode(said[1:])}, {"context": spaces, "continuation": "~~"}]
    (tmp_path / "exact.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))

    paths = [str(tmp_path / f"{name}.jsonl") for name in ("choice", "context", "exact")]
    results = evaluate_tasks(model, tokenizer, paths, prompt=prompt, batch_size=4)
    assert results["choice"]["acc"] == pytest.approx(4 / 6) and results["choice"]["documents"] == 6
    assert results["context"]["acc"] == 1
    assert results["exact"]["acc"] == 0.5
    limited = evaluate_tasks(model, tokenizer, paths[2:], prompt=prompt, limit=1)["exact"]
    assert limited["acc"] == 1 and limited["limit"] == 1


def _context_continued_by_a_space(speaker) -> tuple[str, torch.Tensor]:
    """A text after which the prompted model says " " and then ordinary characters."""
    model, tokenizer, prompt = speaker
    ids = torch.randint(3, 95, (2048, 5), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    spoken = generate_ids(model, ids, torch.ones_like(ids), prompt, 3)
    good = (spoken[:, 0] == 3) & (spoken > 3)[:, 1:].all(1)
    assert good.any()
    chosen = ids[good][:1]
    return tokenizer.decode(chosen[0, 1:]), chosen


def test_generation_tasks_see_the_prompt(speaker):
    from lm_eval.api.instance import Instance

    model, tokenizer, prompt = speaker
    contexts = ["Say a word", "Another, longer text"]
    lm = prompted_lm(model, tokenizer, prompt)
    requests = [Instance("generate_until", {}, (c, {"until": ["\n"], "max_gen_toks": 6}), 0) for c in contexts]
    for said, context in zip(lm.generate_until(requests, disable_tqdm=True), contexts, strict=True):
        ids = torch.tensor([tokenizer(context)["input_ids"]])
        new = generate_ids(model, ids, torch.ones_like(ids), prompt, 6, mode="rerun")
        assert said == tokenizer.decode(new[0], skip_special_tokens=True).split("\n")[0]


@needs_shared
@pytest.mark.parametrize("task", ["piqa", "arc_easy", "winogrande", "openbook_qa", "lambada_openai"])
def test_real_task_files_are_read_and_scored(stories, task):
    model, tokenizer = stories
    prompt = init_prompt(model, 10)
    path = SHARED / "data" / "tasks" / f"{task}.jsonl"
    result = evaluate_tasks(model, tokenizer, [str(path)], prompt=prompt, limit=2)[task]
    assert 0 <= result["acc"] <= 1 and result["documents"] == 2


def test_acc_norm_is_by_the_characters_of_the_choice(speaker, tmp_path, monkeypatch):
    """Scores that lm_eval's rule and one by the bytes of the continuation rank in opposite order."""
    model, tokenizer, _ = speaker
    document = {"query": "line\u2028separator", "choices": ["ääää", "cccccc"], "gold": 1}
    (tmp_path / "norm.jsonl").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    lm = prompted_lm(model, tokenizer)
    monkeypatch.setattr(type(lm), "loglikelihood", lambda self, requests, **_: [(-4.0, False), (-5.9, False)])
    monkeypatch.setattr("ctp.evaluate.tasks.prompted_lm", lambda *_: lm)
    assert -4.0 / len(" ääää".encode()) > -5.9 / len(" cccccc") and -4.0 / 4 < -5.9 / 6
    result = evaluate_tasks(model, tokenizer, [str(tmp_path / "norm.jsonl")])["norm"]
    assert (result["acc"], result["acc_norm"]) == (0, 1)


def test_files_of_one_name_keep_their_results(speaker, tmp_path):
    model, tokenizer, _ = speaker
    paths = [tmp_path / name / "task.jsonl" for name in ("a", "b")]
    for count, path in enumerate(paths, 1):
        path.parent.mkdir()
        path.write_text(count * (json.dumps({"context": "a", "continuation": "b"}) + "\n"))
    results = evaluate_tasks(model, tokenizer, [str(path) for path in paths])
    assert {name: result["documents"] for name, result in results.items()} == {str(paths[0]): 1, str(paths[1]): 2}
    assert list(evaluate_tasks(model, tokenizer, [str(paths[0])] * 2)) == ["task"]


def test_bad_tasks_are_one_sentence(speaker, tmp_path):
    model, tokenizer, _ = speaker
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "kind.jsonl").write_text('{"question": "?"}\n')
    (tmp_path / "gold.jsonl").write_text('{"query": "?", "choices": ["a"], "gold": 1}\n')
    good = '{"query": "?", "choices": ["a"], "gold": 0}\n\n'
    for name, line in {
        "string": '{"query": "?", "choices": ["a", "b"], "gold": "0"}',
        "number": '{"query": "?", "choices": ["a", 1], "gold": 0}',
        "none": '{"query": "?", "choices": [], "gold": 0}',
        "mixed": '{"context": "a", "continuation": "b"}',
        "list": "[]",
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(good + line + "\n")
        with pytest.raises(CTPError, match=rf"{name}\.jsonl is not one kind of task: .* and line 3 does not fit"):
            evaluate_tasks(model, tokenizer, [str(tmp_path / f"{name}.jsonl")])
    (tmp_path / "json.jsonl").write_text(good + "{")
    for name, message in [
        ("empty.jsonl", "holds no documents"),
        ("kind.jsonl", "is not one kind of task"),
        ("gold.jsonl", "line 1: gold is 1, but there are 1 choices"),
        ("json.jsonl", "cannot read the task .* line 3 is not JSON"),
        ("gone.jsonl", "cannot read the task"),
    ]:
        with pytest.raises(CTPError, match=message):
            evaluate_tasks(model, tokenizer, [str(tmp_path / name)])
    (tmp_path / "long.jsonl").write_text(json.dumps({"context": "a", "continuation": "b" * 200}) + "\n")
    with pytest.raises(CTPError, match="201 tokens, more than the 128"):
        evaluate_tasks(model, tokenizer, [str(tmp_path / "long.jsonl")])


def test_named_tasks_run_on_the_prompted_model(speaker, monkeypatch):
    """lm_eval's own index takes a quarter of a minute to build, so a stand-in of one name is asked."""
    import lm_eval.evaluator
    import lm_eval.tasks

    model, tokenizer, prompt = speaker
    asked = {}

    def simple_evaluate(model, tasks, limit, **_):
        asked.update(lm=model, tasks=tasks, limit=limit)
        return {"results": {"piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1}}}

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda: type("Manager", (), {"all_tasks": ["piqa"]})())
    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", simple_evaluate)
    results = evaluate_tasks(model, tokenizer, ["piqa"], prompt=prompt, limit=3)
    assert results == {"piqa": {"acc": 0.5, "acc_stderr": 0.1, "limit": 3}}
    assert asked["lm"].max_length == 128 - len(prompt) and asked["tasks"] == ["piqa"] and asked["limit"] == 3
    with pytest.raises(CTPError, match="no task called pikka"):
        evaluate_tasks(model, tokenizer, ["pikka"])


def test_an_interval_of_equal_windows_is_that_of_a_mean():
    sums = torch.tensor([3.0, 5.0, 4.0, 8.0], dtype=torch.float64)
    mean, low, high = interval(sums, torch.full((4,), 2.0, dtype=torch.float64))
    half = 1.959964 * statistics.stdev(sums.tolist()) / 2 / 2  # of the mean of four, per token of two
    assert mean == 2.5 and high - mean == pytest.approx(half, rel=1e-6) and mean - low == pytest.approx(half, rel=1e-6)
    assert interval(sums[:1], torch.ones(1))[1:] == (-math.inf, math.inf)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Windows of unequal length, whose losses a token vary about 2: 95 % of 400 intervals, give or take 3 %."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        tokens = torch.randint(50, 150, (40,), generator=generator).double()
        losses = tokens * (2 + 0.3 * torch.randn(40, generator=generator, dtype=torch.float64))
        _, low, high = interval(losses, tokens)
        held += low <= 2 <= high
    assert 0.92 < held / 400 < 0.98
