"""Write files so that a crash leaves the old ones or the new ones, never half of either."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import CTPError


@contextlib.contextmanager
def staged_folder(target: str | Path) -> Iterator[Path]:
    """A staging folder beside `target` that takes its place when the block ends well, and is removed otherwise.

    An older folder of that name is replaced as a whole. Raises CTPError where the parent cannot be written.
    """
    target = Path(target)
    staging = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    if target.exists() and not target.is_dir():
        raise CTPError(f"{target} is a file, not a folder: choose another output")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise CTPError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        yield staging
        for path in staging.rglob("*"):
            if path.is_file():
                _fsync(path)
        if target.exists():
            old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
            target.rename(old)
            staging.rename(target)
            shutil.rmtree(old)
        else:
            staging.rename(target)
        _fsync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file through a temporary sibling and a rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        _fsync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise CTPError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2) + "\n")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
