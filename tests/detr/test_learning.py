"""The paper's ablations are parameters: each of them trains."""

import pytest
import torch

from detr.checkpoint import build_model
from detr.coco import CocoDataset, ImageArchive, load_annotations
from detr.distributed import Process
from detr.model import ModelConfig
from detr.train import fit
from detr.train_config import TrainConfig
from detr.transforms import TrainTransform
from pipelines.params import from_document, merge_parameters
from tests.running import ROOT

ABLATIONS = {
    "without-l1": ["train.loss.box_weight=0", "train.matcher.box_cost=0"],
    "without-giou": ["train.loss.giou_weight=0", "train.matcher.giou_cost=0"],
    "without-auxiliary-losses": ["train.loss.auxiliary=false"],
    "no-encoder-layers": ["model.num_encoder_layers=0"],
    "three-encoder-layers": ["model.num_encoder_layers=3"],
    "six-encoder-layers": ["model.num_encoder_layers=6"],
    "without-positions": ["model.position=none"],
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_of_the_paper_trains(drawn, name):
    document = merge_parameters(
        ROOT, None, ["train.epochs=1", "train.batch_size=8", "train.micro_batch=4", *ABLATIONS[name]]
    )
    config = from_document(document, "train", TrainConfig)
    annotations = load_annotations(drawn / "instances_train.json")
    dataset = CocoDataset(annotations, ImageArchive(drawn / "train.zip"), TrainTransform(config.transform, config.seed))
    torch.manual_seed(config.seed)
    model = build_model(from_document(document, "model", ModelConfig), len(annotations.category_ids))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    *_, last = fit(model, dataset, config, Process(0, 1, torch.device("cpu")))
    assert last.step == 3
    assert 0 < last.row["loss"] < 100
    layers = {key for key in last.row if "_layer" in key}
    assert bool(layers) == (name != "without-auxiliary-losses")
    same = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    assert same <= {"transformer.decoder.layers.0.norm1.weight"}  # which scales the zeros that the decoder starts with
