"""Zero-shot tasks through lm_eval, with a prompt in front: its own tasks by name, local ones as jsonl files.

Both kinds are scored by the same `HFLM.loglikelihood`. A local file holds one document a line:

    {"query", "choices", "gold"}                  multiple choice; the likeliest choice wins
    {"context_options", "continuation", "gold"}   one continuation, several contexts (WinoGrande)
    {"context", "continuation"}                   the greedy continuation must be the given one (LAMBADA)
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ctp.prompt.kv import PromptCache, generate_ids, prompt_cache, prompted_logits
from ctp.prompt.soft import SoftPrompt
from ctp_kernels.errors import CTPError

KINDS = {
    "choices": {"query": str, "choices": list, "gold": int},
    "contexts": {"context_options": list, "continuation": str, "gold": int},
    "exact": {"context": str, "continuation": str},
}


def prompted_lm(
    model: nn.Module, tokenizer: Any, prompt: SoftPrompt | PromptCache | None = None, batch_size: int = 8
) -> Any:
    """An lm_eval HFLM whose every call has BOS and the prompt in front; it sees text positions only.

    Its `max_length` is what the prompt leaves of the model's context.
    """
    hflm = _lm_eval("models.huggingface").HFLM
    prefix = prompt_cache(model, prompt) if isinstance(prompt, SoftPrompt) else prompt
    offset = 0 if prefix is None else len(prefix)

    class PromptedLM(hflm):
        def _model_call(self, inps, attn_mask=None, labels=None):
            with torch.no_grad():
                return prompted_logits(model, inps, prompt=prefix)

        def _model_generate(self, context, max_length, stop, **options):
            mask = options.pop("attention_mask")
            if options.get("temperature", 0.0) == 0.0:
                options.pop("temperature", None)
                options["do_sample"] = False
            stopping = _lm_eval("models.utils_hf").stop_sequences_criteria(
                self.tokenizer, stop, offset + context.shape[1], context.shape[0]
            )
            options |= {"stopping_criteria": stopping, "pad_token_id": self.tokenizer.pad_token_id}
            new = generate_ids(model, context, mask, prefix, max_length - context.shape[1], **options)
            return torch.cat([context, new], 1)

    limit = getattr(model.config, "max_position_embeddings", None)
    return PromptedLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # HFLM gives it a pad token
        batch_size=batch_size,
        max_length=None if limit is None else limit - offset,
        add_bos_token=True,
        device=str(next(model.parameters()).device),
    )


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    prompt: SoftPrompt | PromptCache | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Metrics of each task: lm_eval's names, or paths of local jsonl files (`acc`, `acc_norm`, standard errors).

    A file goes by its stem, or by its path where another task has that name. `limit` scores the first documents only,
    and is in the result. Raises CTPError for a task that is not there.
    """
    lm = prompted_lm(model, tokenizer, prompt, batch_size)
    tasks = list(dict.fromkeys(tasks))
    local = {name: Path(name) for name in tasks if name.endswith(".jsonl")}
    named = [name for name in tasks if name not in local]
    stems = [*named, *(path.stem for path in local.values())]
    results = {
        path.stem if stems.count(path.stem) == 1 else name: _local_task(lm, path, limit) for name, path in local.items()
    }
    if named:
        results |= _named_tasks(lm, named, limit)
    return results


def _named_tasks(lm: Any, names: list[str], limit: int | None) -> dict[str, dict[str, Any]]:
    manager = _lm_eval("tasks").TaskManager()
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise CTPError(
            f"lm_eval has no task called {', '.join(unknown)}: see lm_eval --tasks list, or give a .jsonl file"
        )
    try:
        found = _lm_eval("evaluator").simple_evaluate(
            model=lm, tasks=names, limit=limit, task_manager=manager, bootstrap_iters=0
        )
    except OSError as error:  # lm_eval downloads its sets
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CTPError(
            f"cannot load the data of {', '.join(names)}: {reason}; check the network, or give .jsonl files"
        ) from error
    return {
        name: {key.removesuffix(",none"): value for key, value in values.items() if key != "alias"} | {"limit": limit}
        for name, values in found["results"].items()
    }


def _local_task(lm: Any, path: Path, limit: int | None) -> dict[str, Any]:
    documents, kind = _read(path, limit)
    pairs = [_pairs(document, kind) for document in documents]
    longest = max(len(lm.tok_encode(continuation, add_special_tokens=False)) for of in pairs for _, continuation in of)
    if longest > lm.max_length:
        raise CTPError(
            f"{path} has an answer of {longest} tokens, more than the {lm.max_length} the model and prompt leave"
        )
    instance = _lm_eval("api.instance").Instance
    requests = [
        instance(request_type="loglikelihood", doc=document, arguments=pair, idx=index)
        for document, of in zip(documents, pairs, strict=True)
        for index, pair in enumerate(of)
    ]
    scores = iter(lm.loglikelihood(requests, disable_tqdm=True))
    right: list[bool] = []
    right_norm: list[bool] = []
    for document, of in zip(documents, pairs, strict=True):
        own = [next(scores) for _ in of]
        if kind == "exact":
            right.append(own[0][1])
            continue
        right.append(_argmax([score for score, _ in own]) == document["gold"])
        if kind == "choices":  # lm_eval's rule: by the characters of the choice, without the space in front
            shares = [score / max(len(choice), 1) for (score, _), choice in zip(own, document["choices"], strict=True)]
            right_norm.append(_argmax(shares) == document["gold"])
    result = _accuracy("acc", right)
    if kind == "choices":
        result |= _accuracy("acc_norm", right_norm)
    return result | {"documents": len(documents), "limit": limit}


def _pairs(document: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    """(context, continuation) to score; a query that begins "Question:" is followed by "Answer:"."""
    if kind == "exact":
        return [(document["context"], " " + document["continuation"])]
    if kind == "contexts":
        return [(context, " " + document["continuation"]) for context in document["context_options"]]
    query = document["query"].rstrip()
    if query.startswith("Question:"):
        query += "\nAnswer:"
    return [(query, " " + choice) for choice in document["choices"]]


def _read(path: Path, limit: int | None) -> tuple[list[dict[str, Any]], str]:
    """The first `limit` documents of a task file, and their kind. Raises CTPError naming the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also cut inside a string, at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise CTPError(f"cannot read the task {path}: {error}") from error
    documents, kinds = [], []
    for number, line in [(n, line) for n, line in enumerate(lines, 1) if line.strip()][:limit]:
        try:
            documents.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise CTPError(f"cannot read the task {path}: line {number} is not JSON: {error.msg}") from error
        kinds.append(_kind(documents[-1]))
        if kinds[-1] is None or kinds[-1] != kinds[0]:
            fields = " or ".join(", ".join(fields) for fields in KINDS.values())
            raise CTPError(f"{path} is not one kind of task: each line holds {fields}, and line {number} does not fit")
        options = documents[-1].get("choices") or documents[-1].get("context_options")
        if options and not 0 <= documents[-1]["gold"] < len(options):
            raise CTPError(
                f"{path} line {number}: gold is {documents[-1]['gold']}, but there are {len(options)} choices"
            )
    if not documents:
        raise CTPError(f"the task {path} holds no documents")
    return documents, kinds[0]


def _kind(document: Any) -> str | None:
    """The entry of KINDS whose fields a document has, each of its type; lists hold one string or more."""

    def fits(value: Any, wanted: type) -> bool:
        if wanted is list:
            return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
        return isinstance(value, wanted)

    if not isinstance(document, dict):
        return None
    found = (kind for kind, fields in KINDS.items() if all(fits(document.get(k), t) for k, t in fields.items()))
    return next(found, None)


def _argmax(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _accuracy(name: str, right: list[bool]) -> dict[str, float]:
    share = sum(right) / len(right)
    return {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / max(len(right) - 1, 1))}


def _lm_eval(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"lm_eval.{module}")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise CTPError("zero-shot tasks need lm_eval: pip install lm_eval") from error
