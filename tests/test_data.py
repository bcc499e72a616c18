"""Windows of tokens: what they hold, what is scored, where splits end, and how bad input is answered."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
import types

import pytest
import torch

from ctp import data
from ctp.data import EMBEDDED, read_text, token_windows
from ctp_kernels.errors import CTPError

from .text import character_tokenizer

TOKENIZER = character_tokenizer()


@pytest.fixture
def story(tmp_path):
    """A file of 40 documents, each of 30 equal letters."""
    path = tmp_path / "story.txt"
    path.write_text("\n<|endoftext|>\n".join(chr(65 + i % 26) * 30 for i in range(40)))
    return path


def test_bos_begins_every_window_and_is_never_scored(story):
    windows = token_windows(str(story), TOKENIZER, 20)
    assert (windows.ids[:, 0] == 0).all()
    assert not windows.scored[windows.ids == 0].any()
    assert (windows.ids[:, 1:] == 0).any(), "BOS must also stand between documents"
    assert windows.scored.sum() == (windows.ids != 0).sum() == windows.info["scored_tokens"]


def test_consecutive_windows_spell_the_text(story):
    windows = token_windows(str(story), TOKENIZER, 20)
    tokens = windows.ids[:, 1:].flatten()
    spelled = TOKENIZER.decode(tokens[tokens != 0])
    assert "".join(read_text(str(story), "train").documents).startswith(spelled)
    assert windows.info["tokens_in_split"] - len(tokens) < 19, "only the tail is dropped"


@pytest.mark.parametrize("stride", [1, 7, 19])
def test_overlap_scores_each_token_once(story, stride):
    windows = token_windows(str(story), TOKENIZER, 20, stride=stride)
    body, scored = windows.ids[:, 1:], windows.scored[:, 1:]
    places = (torch.arange(len(windows)) * stride).unsqueeze(1) + torch.arange(19)
    seen = places[scored]
    assert len(seen.unique()) == len(seen)
    assert set(seen.tolist()) == set(places[body != 0].tolist())


def test_without_bos_the_first_token_is_not_scored(story):
    windows = token_windows(str(story), character_tokenizer(bos=False), 20)
    assert (windows.ids > 2).all()
    assert not windows.scored[:, 0].any() and windows.scored[:, 1:].all()
    assert windows.info["bos"] == "none"


def test_random_windows_follow_from_the_seed(story):
    first, again = (token_windows(str(story), TOKENIZER, 20, count=9, seed=3) for _ in range(2))
    other = token_windows(str(story), TOKENIZER, 20, count=9, seed=4)
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids, other.ids)
    assert len(first) == 9


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet"])
def test_local_kinds_hold_the_same_documents(tmp_path, suffix):
    documents = [f"document {i}" for i in range(100)]
    path = tmp_path / f"set{suffix}"
    if suffix == ".parquet":
        table = pytest.importorskip("pyarrow").table({"text": documents})
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        lines = [json.dumps({"text": d, "url": "x"}) for d in documents]
        text = "\n".join(lines) if "jsonl" in suffix else "\n<|endoftext|>\n".join(documents)
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    cut = {split: read_text(str(path), split) for split in ("train", "valid", "test")}
    assert [d for text in cut.values() for d in text.documents] == documents
    assert {split: len(text.documents) for split, text in cut.items()} == {"train": 90, "valid": 5, "test": 5}
    assert "90/5/5" in cut["valid"].split


def test_jsonl_lines_end_at_line_feeds_only(tmp_path):
    documents = ["one\u2028two", "three\u2029four", "five\x85six", "seven"]
    lines = [json.dumps({"text": document}, ensure_ascii=False) for document in documents]
    (tmp_path / "set.train.jsonl").write_bytes("\r\n".join(lines).encode())
    assert read_text(str(tmp_path / "set.{split}.jsonl"), "train").documents == documents


def test_plain_text_is_cut_by_lines_and_keeps_its_line_ends(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("\n".join(f"line {i}" for i in range(100)))
    windows = token_windows(str(path), TOKENIZER, 30, split="test")
    assert TOKENIZER.decode(windows.ids[0, 1:]).startswith("line 95\nline 96\n")


def test_a_name_with_split_reads_the_files_own_splits(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"x.{split}.txt").write_text(f"the {split} text\n" * 3)
    text = read_text(str(tmp_path / "x.{split}.txt"), "valid")
    assert text.documents[0] == "the valid text" and text.split == "valid"


@pytest.mark.parametrize("name", ["docs", "code"])
def test_embedded_splits_share_no_document(name):
    assert (EMBEDDED / "LICENSE").is_file()
    splits = [set(read_text(f"embedded:{name}", split).documents) for split in ("train", "valid", "test")]
    assert all(splits) and not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])


def _fake_hub(monkeypatch, rows, error=None):
    """A stand-in for the datasets package that records what was asked of it."""
    calls = []

    def load_dataset(name, config=None, **options):
        calls.append((name, config, options))
        if error is not None:
            raise error
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


@pytest.mark.parametrize(
    ("name", "column", "joiner", "repository"),
    [
        ("wikitext2", "text", "\n\n", "Salesforce/wikitext"),
        ("c4", "text", " ", "allenai/c4"),
        ("ptb", "sentence", " ", "parquet"),
    ],
)
def test_published_sets_are_joined_as_published(monkeypatch, name, column, joiner, repository):
    calls = _fake_hub(monkeypatch, [{column: f"row {i}"} for i in range(3000)])
    windows = token_windows(name, TOKENIZER, 40, split="test")
    assert calls[0][0] == repository and calls[0][2]["streaming"]
    assert TOKENIZER.decode(windows.ids[0, 1:]).startswith(joiner.join(["row 0", "row 1", "row 2"]))
    assert windows.info["joiner"] == repr(joiner)


def test_c4_validation_and_test_documents_differ(monkeypatch):
    _fake_hub(monkeypatch, [{"text": str(i)} for i in range(6000)])
    train, valid, test = ([int(d) for d in read_text("c4", s).documents] for s in ("train", "valid", "test"))
    assert (len(train), test[0], test[-1], valid[0], valid[-1]) == (5000, 0, 1099, 1100, 2199)


def test_hub_name_with_a_split_is_cut_and_without_takes_its_own(monkeypatch):
    calls = _fake_hub(monkeypatch, [{"body": str(i)} for i in range(100)])
    assert read_text("hf:org/set:main:train:body", "test").documents == [str(i) for i in range(95, 100)]
    assert len(read_text("hf:org/set:::body", "valid").documents) == 100
    assert [(c[0], c[1], c[2]["split"]) for c in calls] == [
        ("org/set", "main", "train"),
        ("org/set", None, "validation"),
    ]


def test_a_hub_set_is_read_only_as_far_as_asked(monkeypatch):
    pulled = []
    endless = ({"text": f"row {i}"} for i in itertools.count() if pulled.append(i) is None)
    _fake_hub(monkeypatch, endless)
    windows = token_windows("hf:org/set", TOKENIZER, 20, count=2, seed=0)
    assert len(windows) == 2 and len(pulled) == 40 and windows.info["split"] == "train, first 40 documents"
    monkeypatch.setattr(data, "HUB_ROWS", 500)
    assert len(read_text("hf:org/set", "train").documents) == 500


def test_the_parts_of_a_named_hub_split_do_not_depend_on_how_much_is_read(monkeypatch):
    parts = {}
    for split in ("train", "valid", "test"):
        for tokens in (None, 120):
            _fake_hub(monkeypatch, [{"text": str(i)} for i in range(2500)])
            parts[split, tokens] = read_text("hf:org/set::train", split, tokens).documents
        assert parts[split, 120] == parts[split, None][:120]
    whole = [parts[split, None] for split in ("train", "valid", "test")]
    assert [len(part) for part in whole] == [2250, 125, 125] and len(set().union(*whole)) == 2500
    assert whole[1][0] == "900" and whole[2][-1] == "2499"


def test_hub_bad_column_missing_package_and_no_network(monkeypatch):
    _fake_hub(monkeypatch, [{"body": "x"}])
    with pytest.raises(CTPError, match='no column "text"'):
        read_text("hf:org/set", "train")
    _fake_hub(monkeypatch, [], ConnectionError("Couldn't reach the hub\nmore"))
    with pytest.raises(CTPError, match="Couldn't reach the hub; check the name and the network"):
        read_text("wikitext2", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CTPError, match="needs the datasets package"):
        read_text("c4", "train")


def test_bad_input_is_one_sentence(tmp_path, story):
    (tmp_path / "empty.txt").write_text(" \n \n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.txt.gz").write_bytes(b"no gzip")
    damaged = bytearray(gzip.compress(bytes(range(256)) * 9))
    damaged[20] ^= 255
    (tmp_path / "damaged.txt.gz").write_bytes(damaged)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    cases = {
        "wikitxt2": "did you mean wikitext2",
        str(tmp_path / "stroy.txt"): "did you mean story.txt",
        "zzzzzz": "give a file",
        "hf:": "not of the form",
        str(tmp_path / "empty.txt"): "holds no text",
        str(tmp_path / "bad.jsonl"): 'line 2 has no string field "text"',
        str(tmp_path / "broken.jsonl"): "line 1 is not JSON",
        str(tmp_path / "bytes.txt"): "not UTF-8",
        str(tmp_path / "broken.txt.gz"): "cannot read",
        str(tmp_path / "damaged.txt.gz"): "cannot read",
        str(tmp_path / "broken.parquet"): "not a parquet file",
    }
    for spec, message in cases.items():
        with pytest.raises(CTPError, match=message) as caught:
            token_windows(spec, TOKENIZER, 8)
        assert "\n" not in str(caught.value)
    for options, message in [
        ({"length": 5000}, "fewer than one window"),
        ({"length": 1}, "nothing to predict"),
        ({"length": 8, "stride": 8}, "does not fit windows of 7"),
        ({"length": 8, "seed": 1}, "need a count"),
        ({"length": 8, "count": 0}, "0 windows hold no text"),
        ({"length": 8, "seed": 1, "count": -1}, "-1 windows hold no text"),
        ({"length": 8, "split": "dev"}, "no split"),
    ]:
        with pytest.raises(CTPError, match=message):
            token_windows(str(story), TOKENIZER, **options)
