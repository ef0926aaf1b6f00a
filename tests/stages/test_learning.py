"""That training by the real launcher learns what it should: golden losses of the demo's model."""

import json
from dataclasses import replace

import pytest

from pipelines.data.shapes import write_shapes
from pipelines.download import DownloadParams
from pipelines.params import from_document, merge_parameters, to_yaml
from tests.running import ROOT, call

# Of the demo as params.yaml has it, but for two epochs of 192 scenes and 4 steps of warmup: means of 6 steps each. Measured
# on an AMD EPYC. The kernels of a processor with AVX2 alone differ by 1e-7 of it, those of one without AVX by 4e-4.
GOLDEN = {
    "loss": [15.898626, 15.405019, 14.864796, 15.214790],
    "loss_class": [1.922947, 1.569763, 1.501338, 1.553715],
    "loss_box": [0.550257, 0.572035, 0.546002, 0.561351],
    "loss_giou": [0.798049, 0.839363, 0.845832, 0.839389],
    "loss_class_layer0": [1.666962, 1.581505, 1.506224, 1.575725],
    "loss_box_layer0": [0.553802, 0.578952, 0.549918, 0.561493],
    "loss_giou_layer0": [0.801208, 0.834412, 0.839204, 0.831457],
    "padding_ratio": [1.207547, 1.207547, 1.203762, 1.211356],
}


def trained(folder, num_train, *overrides):
    """The history of a training by the real launcher, with the demo's parameters but for `overrides`."""
    document = merge_parameters(ROOT, None, ["train.epochs=1", "train.evaluate_epochs=0", *overrides])
    shapes = from_document(document, "download", DownloadParams).shapes
    (folder / "data/coco").mkdir(parents=True)
    write_shapes(replace(shapes, num_train=num_train, num_val=4), folder / "data/coco")
    (folder / "params.yaml").write_text(to_yaml(document), encoding="utf-8")
    (folder / "artifacts/validate").mkdir(parents=True)
    (folder / "artifacts/validate/passed.json").write_text('{"data": "golden"}', encoding="utf-8")
    uri = f"sqlite:///{folder}/mlflow.db"
    call(folder, "python", "-m", "pipelines.train", PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=uri)
    return [
        json.loads(line) for line in (folder / "artifacts/train/history.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_the_demo_learns_as_it_did(tmp_path):
    rows = trained(tmp_path, 192, "train.epochs=2", "train.warmup_steps=4", "train.log_steps=6")
    assert [row["step"] for row in rows] == [6, 12, 18, 24]
    for name, values in GOLDEN.items():
        assert [row[name] for row in rows] == pytest.approx(values, rel=1e-3), name
