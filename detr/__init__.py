"""DETR (End-to-End Object Detection with Transformers, ECCV 2020) in pure PyTorch.

From the paper's sections to the files:

| section | what | files |
|---|---|---|
| 3.1, A.2 | matching and loss | matcher, loss, boxes |
| 3.2, A.1, A.3, A.4 | backbone, position encoding, transformer, heads | model: backbone, position, transformer |
| 3.2 | from queries to detections | postprocess, detect, detector (a picture in, detections out) |
| 4, "Technical details" | augmentation | transforms |
| 4, "Technical details"; A.4 | training | train, the loop: step, optimizer, train_config |
| 4.1, table 1 | AP, parameters, multiply-adds; the authors' weights | metrics, cost; official |
| 4.2, table 4; 4.3 | figures 3, 6, 7: attention and slots | visualize |

What the paper does not speak of:

| what | files |
|---|---|
| COCO's files | annotation_file, coco; images (archives), pixels (JPEG, PNG) |
| batches | sampler, loader, batch |
| several processes | distributed |
| how a training goes | meter, diagnosis (numbers that are not finite, memory that runs out) |
| weights and resume states | checkpoint |
| models for other programs | export (torch.export, ONNX) |
| how sure an AP is | bootstrap |
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # isort: off
    from detr.batch import (
        Batch as Batch,
        Sample as Sample,
        Targets as Targets,
        collate as collate,
        normalize as normalize,
    )
    from detr.checkpoint import build_model as build_model, load_model as load_model, save_model as save_model
    from detr.coco import Annotations as Annotations, CocoDataset as CocoDataset, load_annotations as load_annotations
    from detr.detect import detect_all as detect_all, detect_each as detect_each
    from detr.detector import Detections as Detections, Detector as Detector
    from detr.export import export_onnx as export_onnx, export_program as export_program
    from detr.images import ImageArchive as ImageArchive, ImageFolder as ImageFolder, open_images as open_images
    from detr.loss import LossConfig as LossConfig, set_loss as set_loss
    from detr.matcher import MatcherConfig as MatcherConfig, match_targets as match_targets
    from detr.metrics import compute_coco_metrics as compute_coco_metrics
    from detr.model import DETR as DETR, ModelConfig as ModelConfig, for_inference as for_inference
    from detr.official import initialize_model as initialize_model, load_official as load_official
    from detr.train import fit as fit
    from detr.train_config import TrainConfig as TrainConfig
    from detr.transforms import (
        EvalTransform as EvalTransform,
        TrainTransform as TrainTransform,
        TransformConfig as TransformConfig,
    )
    # isort: on

_HOMES = {
    "Annotations": "coco",
    "Batch": "batch",
    "CocoDataset": "coco",
    "DETR": "model",
    "Detections": "detector",
    "Detector": "detector",
    "EvalTransform": "transforms",
    "ImageArchive": "images",
    "ImageFolder": "images",
    "LossConfig": "loss",
    "MatcherConfig": "matcher",
    "ModelConfig": "model",
    "Sample": "batch",
    "Targets": "batch",
    "TrainConfig": "train_config",
    "TrainTransform": "transforms",
    "TransformConfig": "transforms",
    "build_model": "checkpoint",
    "collate": "batch",
    "compute_coco_metrics": "metrics",
    "detect_all": "detect",
    "detect_each": "detect",
    "export_onnx": "export",
    "export_program": "export",
    "fit": "train",
    "for_inference": "model",
    "initialize_model": "official",
    "load_annotations": "coco",
    "load_model": "checkpoint",
    "load_official": "official",
    "match_targets": "matcher",
    "normalize": "batch",
    "open_images": "images",
    "save_model": "checkpoint",
    "set_loss": "loss",
}
__all__ = [*_HOMES]  # noqa: PLE0604


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # or a name that does not exist would be Any

    def __getattr__(name: str) -> Any:
        """Imports a public name where it is first used, so that serving a model does not load what trains it."""
        if name in _HOMES:
            return getattr(importlib.import_module(f"detr.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'detr' has no attribute {name!r}")
