"""Build the two embedded text sets from a Python installation and its documentation sources.

    python -m ctp.demo.build_text --docs HTML/_sources --lib lib/python3.11 --out ctp/demo/text

`docs` is the prose of the Python documentation, `code` the source of its standard library
(both PSF License Version 2, see `text/LICENSE`). Whole documents go to train, valid or test by a
hash of their name, so no split shares a document with another.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
from pathlib import Path

#: Documents are separated by this line in the text files; a reader puts a BOS token there.
SEPARATOR = "\n<|endoftext|>\n"
SKIP_CODE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo", "config"}


def prose(rst: str) -> str:
    """The plain paragraphs of a reStructuredText document: roles unwrapped, directives and code dropped."""
    rst = re.sub(r":[a-z:+-]+:`[!~]?([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", rst)
    rst = re.sub(r"`([^`<]+?)\s*<[^`]*>`__?", r"\1", rst)
    rst = re.sub(r"(?<![\w*])\*(\w[^*\n]*)\*(?!\*)", r"\1", rst)
    rst = re.sub(r"``([^`]*)``", r"\1", rst).replace("\\ ", "").replace("\\*", "*").replace("|version|", "3.11")
    kept = []
    for block in re.split(r"\n\s*\n", rst):
        lines = [line.strip() for line in block.splitlines()]
        text = re.sub(r"^(?:[*-]|#\.|\d+\.)\s+", "", " ".join(lines)).replace("::", ":")
        first = lines[0] if lines else ""
        if first.startswith((".. ", ">>>", "#", "|", "+-", "==", ":", "$", "_", "`")) or len(text) < 60:
            continue
        words = text.split()
        plain = sum(w.strip(".,;:()'\"").isalpha() for w in words)
        if text[0].isalpha() and text[-1] in ".:!?)" and plain > 0.75 * len(words):
            kept.append(text)
    return "\n".join(kept)


def split_of(name: str) -> str:
    """train, valid or test (90 : 5 : 5) by the SHA-256 of the document's name."""
    bucket = hashlib.sha256(name.encode()).digest()[0]
    return "train" if bucket < 230 else "valid" if bucket < 243 else "test"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--lib", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-bytes", type=int, default=4_000_000, help="of each set")
    args = parser.parse_args()
    sets: dict[str, list[tuple[str, str]]] = {"docs": [], "code": []}
    for path in args.docs.rglob("*.rst.txt"):
        sets["docs"].append((path.relative_to(args.docs).as_posix(), prose(path.read_text(encoding="utf-8"))))
    for path in args.lib.rglob("*.py"):
        name = path.relative_to(args.lib)
        if not SKIP_CODE.intersection(name.parts) and not any(p.startswith("config-") for p in name.parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.isascii() and max(map(len, text.splitlines() or [""])) < 200:  # no tables of data
                sets["code"].append((name.as_posix(), text))
    args.out.mkdir(parents=True, exist_ok=True)
    for set_name, documents in sets.items():
        documents.sort(key=lambda item: hashlib.sha256(item[0].encode()).digest()[::-1])
        parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
        total = 0
        for name, text in documents:
            if len(text) > 400 and total + len(text) <= args.max_bytes:
                parts[split_of(name)].append(text.strip())
                total += len(text)
        for split, texts in parts.items():
            data = SEPARATOR.join(texts).encode()
            with open(args.out / f"{set_name}.{split}.txt.gz", "wb") as raw:
                with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=9, mtime=0, filename="") as out:
                    out.write(data)
            print(f"{set_name}.{split}: {len(texts)} documents, {len(data):,} bytes")


if __name__ == "__main__":
    main()
