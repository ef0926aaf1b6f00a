"""A small training, and what tests of trainings compare."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from detr.checkpoint import build_model
from detr.coco import CocoDataset, ImageArchive, load_annotations
from detr.distributed import Process
from detr.train import fit
from detr.transforms import TrainTransform, TransformConfig
from tests.projects import TINY_MODEL, TINY_TRAIN

CPU = Process(0, 1, torch.device("cpu"))
TINY = replace(TINY_MODEL, dropout=0.1)
CONFIG = replace(
    TINY_TRAIN,
    seed=3,
    transform=TransformConfig((64, 80), 96, flip=0.5, crop=0.5, crop_scales=(80,), crop_range=(48, 80)),
)


def dataset_of(drawn: Path) -> CocoDataset:
    annotations = load_annotations(drawn / "instances_train.json")
    return CocoDataset(annotations, ImageArchive(drawn / "train.zip"), TrainTransform(CONFIG.transform, CONFIG.seed))


def new_model(seed=0, config=TINY):
    torch.manual_seed(seed)
    return build_model(config, 8)


def rows_of(reports):
    return [report.row for report in reports if report.row]


def undisturbed(dataset, config=CONFIG):
    model = new_model()
    return rows_of(fit(model, dataset, config, CPU)), model.state_dict()


def assert_same_bits(weights, expected):
    assert weights.keys() == expected.keys()
    assert [key for key in weights if not torch.equal(weights[key], expected[key])] == []


def without_objects(dataset):
    record = dataset.annotations
    empty = replace(
        record, boxes_xyxy=record.boxes_xyxy[:0], labels=record.labels[:0], starts=np.zeros_like(record.starts)
    )
    return CocoDataset(empty, dataset.archive, dataset.transform)
