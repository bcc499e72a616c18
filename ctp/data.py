"""Text to windows of tokens: the embedded sets, the usual names, local files, sets on the hub.

Every window begins with BOS (where the tokenizer has one). BOS carries no text, so it is never scored; neither
is the first token of a window without BOS, which nothing predicts. `Windows.info` states every choice.
"""

from __future__ import annotations

import difflib
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctp_kernels.errors import CTPError

SPLITS = ("train", "valid", "test")
SEPARATOR = "<|endoftext|>"
EMBEDDED = Path(__file__).parent / "demo" / "text"
#: Documents that are read of an `hf:` set at most, and the rows that are cut at a time where it has no splits.
HUB_ROWS, HUB_BLOCK = 100_000, 1000
NAMES = ("embedded", "embedded:docs", "embedded:code", "wikitext2", "c4", "ptb")


@dataclass(frozen=True)
class Windows:
    """ids int64 (n, length); scored bool (n, length): which positions are targets; info: how they were made."""

    ids: torch.Tensor
    scored: torch.Tensor
    info: dict[str, Any]

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.info.items() if value is not None)


@dataclass(frozen=True)
class Text:
    """Documents in order; `joiner` goes between them (None: BOS does); `source` and `split` say where they are from."""

    documents: list[str]
    joiner: str | None
    source: str
    split: str


def token_windows(
    spec: str,
    tokenizer: Any,
    length: int,
    *,
    split: str = "train",
    count: int | None = None,
    seed: int | None = None,
    stride: int | None = None,
) -> Windows:
    """Windows of `length` tokens from one split of a text set.

    spec: `embedded[:docs|:code]`, `wikitext2`, `c4`, `ptb`, a `.txt/.jsonl/.parquet` file (or `.gz` of one; a
    `{split}` in its name stands for train, valid or test), or `hf:org/set:config:split:column` (see `_hub`).
    With a seed, `count` windows start at random places; without, windows follow each other by `stride` text tokens
    (default: no overlap), and a token that two windows share is scored in the first only. The tail is dropped.

    Raises CTPError for a set that is not there, holds no text, or is shorter than one window.
    """
    if count is not None and count < 1:
        raise CTPError(f"{count} windows hold no text: use 1 or more")
    text = read_text(spec, split, count * length if count else None)
    bos = tokenizer.bos_token_id
    body = length - (bos is not None)
    if body < 1 or length < 2:
        raise CTPError(f"a window of {length} tokens holds nothing to predict: use 2 or more")
    stride = body if stride is None else stride
    if not 1 <= stride <= body:
        raise CTPError(f"a stride of {stride} tokens does not fit windows of {body} text tokens: use 1 to {body}")
    stream = _stream(text, tokenizer)
    if len(stream) < body:
        raise CTPError(
            f"{spec} ({text.split}) has {len(stream)} tokens, fewer than one window of {length}: use shorter windows"
        )
    if seed is None:
        starts = torch.arange(0, len(stream) - body + 1, stride)[:count]
    else:
        if count is None:
            raise CTPError("random windows need a count")
        starts = torch.randint(len(stream) - body + 1, (count,), generator=torch.Generator().manual_seed(seed))
    ids = stream[starts.unsqueeze(1) + torch.arange(body)]
    scored = torch.ones_like(ids, dtype=torch.bool)
    if seed is None:
        scored[1:, : body - stride] = False
    if bos is None:
        scored[:, 0] = False
    else:
        scored &= ids != bos
        ids = torch.nn.functional.pad(ids, (1, 0), value=bos)
        scored = torch.nn.functional.pad(scored, (1, 0), value=False)
    info = {
        "data": text.source, "split": text.split, "windows": len(ids), "length": length,
        "stride": "random" if seed is not None else stride, "seed": seed, "tokens_in_split": len(stream),
        "scored_tokens": int(scored.sum()),
        "bos": "none" if bos is None else "first in every window, never scored",
        "joiner": "BOS" if text.joiner is None else repr(text.joiner),
    }  # fmt: skip
    return Windows(ids, scored, info)


def read_text(spec: str, split: str, tokens: int | None = None) -> Text:
    """The documents of one split of a set; see `token_windows` for the names.

    Of `hf:` sets the first HUB_ROWS documents are read, or fewer where `tokens` says how many are wanted: a document
    holds one or more.
    """
    if split not in SPLITS:
        raise CTPError(f"there is no split {split!r}: choose train, valid or test")
    if spec in ("embedded", "embedded:docs", "embedded:code"):
        name = spec.partition(":")[2] or "docs"
        found = _local(str(EMBEDDED / (name + ".{split}.txt.gz")), split)
        text = Text(found.documents, None, f"embedded:{name}", split)
    elif spec in ("wikitext2", "c4", "ptb"):
        text = _published(spec, split)
    elif spec.startswith("hf:"):
        text = _hub(spec, split, min(HUB_ROWS, tokens or HUB_ROWS))
    else:
        text = _local(spec, split)
    if not any(document.strip() for document in text.documents):
        raise CTPError(f"{spec} ({text.split}) holds no text")
    return text


def _stream(text: Text, tokenizer: Any) -> torch.Tensor:
    """All documents as one int64 stream, without the leading BOS."""
    if text.joiner is not None:
        ids = tokenizer(text.joiner.join(text.documents), add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)
    between = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    parts = tokenizer(text.documents, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [token for part in parts for token in (*between, *part)]
    return torch.tensor(ids[len(between) :], dtype=torch.long)


# ---- local files -----------------------------------------------------------------------------------------------


def _local(spec: str, split: str) -> Text:
    own_splits = "{split}" in spec
    path = Path(spec.replace("{split}", split))
    if not path.is_file():
        known = (
            [*NAMES, *(p.name for p in sorted(path.parent.glob("*")) if p.is_file())] if path.parent.is_dir() else NAMES
        )
        near = difflib.get_close_matches(path.name, known, n=1) or difflib.get_close_matches(spec, known, n=1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"give a file, hf:org/set:config:split:column, or {', '.join(NAMES)}"
        )
        raise CTPError(f"no file and no data set is called {path}: {hint}")
    documents, joiner = _documents(path)
    if own_splits:
        return Text(documents, joiner, path.name, split)
    documents, note = _cut(documents, split)
    return Text(documents, joiner, path.name, f"{split} ({note})")


def _documents(path: Path) -> tuple[list[str], str | None]:
    """Documents and joiner of a file: rows of jsonl and parquet, `<|endoftext|>`-separated texts, or lines."""
    kind = [suffix for suffix in path.suffixes if suffix != ".gz"][-1:]
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if kind == [".parquet"]:
            return _parquet(data, path), None
        text = data.decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise CTPError(f"cannot read {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise CTPError(f"{path} is not UTF-8 text: {error}") from error
    if kind == [".jsonl"]:
        return list(_jsonl(text, path)), None
    if SEPARATOR in text:
        return [part.strip("\n") for part in text.split(SEPARATOR) if part.strip()], None
    return text.split("\n"), "\n"


def _jsonl(text: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut inside a string, at U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CTPError(f"{path} line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise CTPError(f'{path} line {number} has no string field "text"')
        yield row["text"]


def _parquet(data: bytes, path: Path) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise CTPError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except pyarrow.ArrowInvalid as error:
        raise CTPError(f"{path} is not a parquet file: {error}") from error
    if "text" not in table.column_names:
        raise CTPError(f'{path} has no column "text" (it has {", ".join(table.column_names)})')
    return [row for row in table.column("text").to_pylist() if row is not None]


def _cut(documents: list[str], split: str) -> tuple[list[str], str]:
    """The first 90 % for train, then 5 % for valid and 5 % for test, always at the same places."""
    bounds = [0, len(documents) * 90 // 100, len(documents) * 95 // 100, len(documents)]
    index = SPLITS.index(split)
    return documents[bounds[index] : bounds[index + 1]], "cut 90/5/5 in file order, as the source has no splits"


# ---- the hub ---------------------------------------------------------------------------------------------------


def _published(name: str, split: str) -> Text:
    """The sets of the literature, joined as in GPTQ and SparseGPT.

    C4 has no test split: test is the published one (the first 1,100 documents of validation shard 0), valid the
    1,100 after it, so that choosing a checkpoint never sees the test.
    """
    hub_split = {"valid": "validation"}.get(split, split)
    if name == "wikitext2":
        rows = _rows("Salesforce/wikitext", "wikitext-2-raw-v1", hub_split, "text")
        return Text(list(rows), "\n\n", name, split)
    if name == "ptb":
        folder = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank"
        rows = _rows("parquet", None, hub_split, "sentence", {hub_split: f"{folder}/{hub_split}/*.parquet"})
        return Text(list(rows), " ", name, split)
    shard = "train.00000-of-01024" if split == "train" else "validation.00000-of-00008"
    skip, take = {"train": (0, 5000), "test": (0, 1100), "valid": (1100, 1100)}[split]
    rows = _rows("allenai/c4", None, hub_split, "text", {hub_split: f"en/c4-{shard}.json.gz"})
    where = f"{split} (documents {skip} to {skip + take} of {shard})"
    return Text(list(itertools.islice(rows, skip, skip + take)), " ", name, where)


def _hub(spec: str, split: str, limit: int) -> Text:
    """The first `limit` documents of `hf:org/set:config:split:column`.

    An empty split asks for the set's own. A named one is cut 90/5/5 in every HUB_BLOCK rows by itself, so that a part
    can be read from the front of a set of any length, and no row is in two parts however many are read.
    """
    parts = spec.split(":")[1:] + [""] * 4
    name, config, named, column = parts[:4]
    if not name or len(spec.split(":")) > 5:
        raise CTPError(f"{spec} is not of the form hf:org/set:config:split:column")
    rows = iter(_rows(name, config or None, named or {"valid": "validation"}.get(split, split), column or "text"))
    where = split
    if named:
        rows, where = _cut_blocks(rows, split), f"{split} (every {HUB_BLOCK:,} rows of {named} cut 90/5/5)"
    documents = list(itertools.islice(rows, limit))
    return Text(documents, None, spec, where + (f", first {limit:,} documents" if len(documents) == limit else ""))


def _cut_blocks(rows: Iterator[str], split: str) -> Iterator[str]:
    while block := list(itertools.islice(rows, HUB_BLOCK)):
        yield from _cut(block, split)[0]


def _rows(
    name: str, config: str | None, split: str, column: str, data_files: dict[str, str] | None = None
) -> Iterable[str]:
    """The text column of a hub set, streamed, so that a shard is read only as far as it is used."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise CTPError(f"{name} needs the datasets package: pip install datasets, or give a local file") from error
    try:
        rows = datasets.load_dataset(name, config, split=split, data_files=data_files, streaming=True)
        for row in rows:
            if column not in row:
                raise CTPError(f'{name} has no column "{column}" (it has {", ".join(row)})')
            yield row[column]
    except CTPError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # network, unknown set, config or split, damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CTPError(
            f"cannot load {name} ({split}): {reason}; check the name and the network, or give a local file"
        ) from error
