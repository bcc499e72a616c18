"""Write files so that a crash leaves the old ones or the new ones, never half of either."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import CTPError


def check_output(
    target: str | Path, marker: str | None = None, source: str | Path | None = None, *, fresh: bool = False
) -> Path:
    """The folder that `target` names, through links, if it may be written or replaced as a whole; for long work, ask
    before it begins.

    Raises CTPError where it is a file; the current folder, or one above; a folder that is not empty and lacks the file
    `marker`, so that somebody else's files would be lost; or holds what is being read, `source`; or, where `fresh`,
    holds an earlier result, which has its `marker`.
    """
    folder = Path(os.path.realpath(target))
    if folder.exists() and not folder.is_dir():
        raise CTPError(f"{target} is a file, not a folder: choose another output")
    if Path.cwd().is_relative_to(folder):
        raise CTPError(f"{target} is the current folder or one above it: choose another output")
    if source is not None and os.path.exists(source) and Path(os.path.realpath(source)).is_relative_to(folder):
        raise CTPError(f"{target} holds what is being read, {source}: choose another output")
    if marker is not None and folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise CTPError(f"{target} holds other files (and no {marker}), which would be lost: choose another output")
    if fresh and marker is not None and (folder / marker).is_file():
        raise CTPError(f"{target} holds an earlier result: choose another output, or replace it with --overwrite")
    return folder


@contextlib.contextmanager
def staged_folder(target: str | Path, marker: str | None = None) -> Iterator[Path]:
    """A staging folder beside `target` that takes its place when the block ends well, and is removed otherwise.

    An older folder of that name is replaced as a whole, if check_output() allows it: it is first renamed to
    `.<name>.old-...`, where a crash between the two renames would leave it. Raises CTPError, also where the parent
    cannot be written.
    """
    target = check_output(target, marker)
    staging = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise CTPError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        yield staging
        readers = staging.stat().st_mode & 0o666
        for path in staging.rglob("*"):
            if path.is_file():
                path.chmod(readers)  # safetensors writes for its owner alone
                _fsync(path)
        if target.exists():
            old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
            target.rename(old)
            try:
                staging.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old)
        else:
            staging.rename(target)
        _fsync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file through a temporary sibling and a rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        _fsync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise CTPError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, data: Any) -> None:
    """JSON as every reader takes it: a number that is not finite becomes null."""
    write_text(path, json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
