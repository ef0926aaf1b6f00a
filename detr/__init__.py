"""DETR (End-to-End Object Detection with Transformers, ECCV 2020) in pure PyTorch."""

import importlib
from typing import Any

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
    "compute_coco_metrics": "metrics",
    "collate": "batch",
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


def __getattr__(name: str) -> Any:
    """Imports a public name where it is first used, so that serving a model does not load what trains it."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"detr.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'detr' has no attribute {name!r}")
