"""Train the two embedded models, from `text/` alone, on a CPU.

    python -m ctp.demo.train_models llama      # and: opt

Writes `ctp/demo/<llama|opt>/`: a Hugging Face folder (fp16 safetensors, config, tokenizer) with
`training.json`, the record of how it was made. Seeded; about an hour and half an hour on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SEPARATOR = "\n<|endoftext|>\n"
VOCAB, CONTEXT = 2048, 512

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(
        vocab_size=VOCAB, hidden_size=128, word_embed_proj_dim=128, ffn_dim=512, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=CONTEXT, dropout=0.0, layerdrop=0.0,
        bos_token_id=0, eos_token_id=1, pad_token_id=2)),
}  # fmt: skip


def documents(split: str) -> list[str]:
    texts = []
    for name in ("docs", "code"):
        with gzip.open(HERE / "text" / f"{name}.{split}.txt.gz", "rt", encoding="utf-8") as file:
            texts += file.read().split(SEPARATOR)
    return texts


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 2,048 entries, BOS in front of every text; trained on the train split."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        documents("train"), vocab_size=VOCAB, min_frequency=2, special_tokens=["<s>", "</s>", "<pad>"]
    )
    from tokenizers.processors import TemplateProcessing

    core = bpe._tokenizer
    core.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=CONTEXT
    )


def stream(tok: PreTrainedTokenizerFast, split: str) -> torch.Tensor:
    ids = [i for text in documents(split) for i in [*tok(text)["input_ids"], 1]]
    return torch.tensor(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8, help="windows of 512 tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    out = args.out or HERE / args.model
    out.mkdir(parents=True, exist_ok=True)

    tok = tokenizer()
    train, valid = stream(tok, "train"), stream(tok, "valid")
    model = MODELS[args.model]()
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.model}: {size:,} parameters; {len(train):,} training tokens, {len(valid):,} validation", flush=True)

    def batch(data: torch.Tensor, count: int) -> torch.Tensor:
        starts = torch.randint(len(data) - CONTEXT, (count,))
        ids = torch.stack([data[s : s + CONTEXT] for s in starts])
        ids[:, 0] = 0  # every window begins with BOS, as at evaluation
        return ids

    def validation_loss() -> float:
        windows = valid[: len(valid) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:64].clone()
        windows[:, 0] = 0
        with torch.no_grad():
            return sum(model(input_ids=w, labels=w).loss.item() for w in windows.split(16)) / len(windows.split(16))

    decay = [p for p in model.parameters() if p.ndim == 2]
    other = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.95)
    )
    warm_up = 100
    begun = time.time()
    for step in range(args.steps):
        progress = max(0.0, (step - warm_up) / (args.steps - warm_up))
        rate = args.lr * min(1.0, (step + 1) / warm_up) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = batch(train, args.batch)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == args.steps - 1:
            print(
                f"step {step} train {loss.item():.3f} valid {validation_loss():.3f} {time.time() - begun:.0f} s",
                flush=True,
            )
        if step % 500 == 499:
            model.save_pretrained(out)
    final = validation_loss()
    model.half().save_pretrained(out)
    tok.save_pretrained(out)
    record = {
        "script": "ctp/demo/train_models.py", "seed": args.seed, "steps": args.steps, "lr": args.lr,
        "tokens_per_step": args.batch * CONTEXT, "parameters": size, "train_tokens": len(train),
        "validation_perplexity": math.exp(final), "seconds": round(time.time() - begun),
        "text": ["docs.train", "code.train"], "torch": torch.__version__,
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record)


if __name__ == "__main__":
    main()
