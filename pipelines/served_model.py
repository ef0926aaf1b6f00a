"""The registered model: an MLflow pyfunc that answers images with detections.

MLflow packs this file and `detr/` into the model version and needs nothing else of the project.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from detr.batch import Sample, collate, normalize
from detr.checkpoint import load_model
from detr.coco import decode
from detr.model import for_inference
from detr.postprocess import postprocess
from detr.transforms import EvalTransform


class Detector(PythonModel):
    """Rows with a base64 JPEG or PNG in `image` become rows of `boxes`, `scores` and `labels`.

    boxes are [left, top, right, bottom] in pixels of the image sent, by falling score; labels are category
    names. The parameter `threshold` (0.5) is the lowest score that is answered.
    """

    def load_context(self, context: PythonModelContext) -> None:
        model, self.categories, size = load_model(Path(context.artifacts["weights"]).parent)
        self.model, self.transform = for_inference(model), EvalTransform(size.short, size.max_size)
        self.size_multiple = size.size_multiple

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        threshold = float((params or {}).get("threshold", 0.5))
        samples = [self._sample(index, text) for index, text in enumerate(model_input["image"])]
        rows: dict[int, dict[str, list]] = {}
        for indices in ([index] for index in range(len(samples))):
            batch = collate([samples[index] for index in indices], self.size_multiple)
            with torch.no_grad():
                logits, boxes_cxcywh = self.model(normalize(batch.images, batch.padding), batch.padding)
            found = zip(*postprocess(logits, boxes_cxcywh, batch.original_sizes_hw), strict=True)
            for index, (scores, labels, boxes) in zip(indices, found, strict=True):
                order = [k for k in scores.argsort(descending=True).tolist() if scores[k] >= threshold]
                rows[index] = {
                    "boxes": [[round(v, 2) for v in boxes[k].tolist()] for k in order],
                    "scores": [round(scores[k].item(), 6) for k in order],
                    "labels": [self.categories[labels[k]].name for k in order],
                }
        return pd.DataFrame([rows[index] for index in sorted(rows)], columns=["boxes", "scores", "labels"])

    def _sample(self, index: int, text: str) -> Sample:
        try:
            image = decode(base64.b64decode(text, validate=True), f"image {index}")
        except (binascii.Error, ValueError, TypeError) as error:
            raise MlflowException.invalid_parameter_value(
                f"image {index} is not a base64 JPEG or PNG: {error}"
            ) from error
        size_hw = (image.shape[1], image.shape[2])
        image, boxes, labels = self.transform(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        return Sample(image, boxes, labels, index, size_hw)


set_model(Detector())
