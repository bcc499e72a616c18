"""The demo in small, and the bench suite's flag."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ctp.demo import run as demo
from ctp.model import EMBEDDED
from ctp_kernels import CTPError

ROOT = Path(__file__).parents[1]
KEYS = (
    "model format method bits_per_weight bytes_dense bytes_packed ppl_dense ppl_dense_prompt ppl_compressed "
    "ppl_untrained_prompt ppl_prompt prompt_tokens gap_recovered ms_per_token_dense ms_per_token_packed train_seconds"
).split()


@pytest.fixture
def small(monkeypatch):
    """The settings of a demo that takes seconds."""
    tiny = {"prompt_tokens": 4, "window": 64, "batch_size": 2}
    tiny |= {"valid_windows": 2, "test_windows": 4, "calibration_windows": 8}
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, **tiny})
    monkeypatch.setattr(demo, "FORMATS", demo.FORMATS[:1])


@pytest.mark.skipif(not (EMBEDDED["embedded:opt"] / "training.json").is_file(), reason="no embedded OPT here")
def test_demo_writes_results_and_report_and_resumes(small, tmp_path):
    result = demo.run_demo(tmp_path, model="embedded:opt", steps=3)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["rows"] == result["rows"] and all(key in saved["rows"][0] for key in KEYS)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page
    lines = []
    again = demo.run_demo(tmp_path, model="embedded:opt", steps=3, resume=True, echo=lines.append)
    assert again["rows"] == result["rows"] and any("kept" in line for line in lines)
    (tmp_path / "dense" / "row.json").write_text("{")
    with pytest.raises(CTPError, match="damaged"):
        demo.run_demo(tmp_path, model="embedded:opt", steps=3, resume=True)


def test_demo_into_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CTPError, match="is a file, not a folder"):
        demo.run_demo(tmp_path / "file", model="embedded:opt")


def test_bench_items_are_skipped_without_the_flag():
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-rs", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "passed" not in result.stdout
    assert "run pytest bench/ --benchmark" in result.stdout
