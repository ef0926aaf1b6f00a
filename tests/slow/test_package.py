"""The library on its own: installed by pip, away from this folder."""

import shutil

from tests.running import ROOT, call

USE = """
import sys
from pathlib import Path
import torch
import detr
from detr import ModelConfig, build_model, normalize
from detr.postprocess import postprocess

assert Path(detr.__file__).is_relative_to(sys.argv[1]), detr.__file__
config = ModelConfig(
    backbone="resnet18", backbone_width=0.25, backbone_norm="group", backbone_weights="none", stride=32,
    position="sine", position_temperature=10000.0, hidden_dim=32, num_heads=4, dim_feedforward=64,
    num_encoder_layers=1, num_decoder_layers=1, num_queries=5, dropout=0.0, attention_dropout=0.0, pre_norm=False,
)
model = build_model(config, num_classes=3).eval()
with torch.no_grad():
    logits, boxes = model(normalize(torch.zeros(1, 3, 64, 96, dtype=torch.uint8)))
scores, labels, boxes_xyxy = postprocess(logits, boxes, torch.tensor([[64, 96]]))
assert boxes_xyxy.shape == (1, 5, 4)
for name in detr.__all__:
    getattr(detr, name)
assert not {"yaml", "ruamel", "dvc", "mlflow", "prefect", "great_expectations", "pipelines"} & set(sys.modules)
"""


def test_pip_installs_a_library_that_needs_no_orchestration(tmp_path):
    source, target, elsewhere = tmp_path / "source", tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("detr", "pipelines"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = ("python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    call(elsewhere, *pip, "--target", str(target), str(source))
    call(elsewhere, "python", "-c", USE, str(target), cold=True, PYTHONPATH=str(target))
    for name in ("detr", "pipelines"):
        shipped, ours = (
            {path.relative_to(place) for path in (place / name).rglob("*.py")} for place in (target, source)
        )
        assert shipped == ours
        assert len(ours) > 25
    call(elsewhere, "python", "-m", "pipelines", "--help", cold=True, PYTHONPATH=str(target))
