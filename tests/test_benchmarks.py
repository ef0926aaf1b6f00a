"""Every measurement beside the authors' code runs and ends with its line of JSON."""

import json
import sys

import pytest

from benchmarks import authors
from tests.conftest import ROOT, call

pytestmark = pytest.mark.skipif(
    not (authors.FOLDER / "models").is_dir(), reason="the authors' code is absent: python benchmarks/authors.py"
)
ROWS = {
    "inference": {"detr-r50", "detr-dc5-r50"},
    "input_pipeline": {"with normalisation on the CPU", "with normalisation left to the device"},
    "matching": {"matcher", "matcher and loss, with gradients"},
    "train_step": {
        "step", "step without attention dropout", "forward", "matcher and loss", "backward", "optimizer",
        "peak MB, attention dropout 0.1", "peak MB, attention dropout 0.0",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_measurement_runs(name):
    output = call(ROOT, sys.executable, f"benchmarks/{name}.py", "--quick", DETR_AUTHORS=str(authors.FOLDER))
    result = json.loads(output.splitlines()[-1])
    assert result["benchmark"] == name
    assert result["ratios"]["authors"].keys() == ROWS[name]
    assert all(ratio > 0 for ratio in result["ratios"]["authors"].values())
    figures = result["figures"]
    assert figures.get("equal matches", True) is True
    assert all(value < 1e-5 for key, value in figures.items() if "difference" in key)
