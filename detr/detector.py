"""A trained model at work: a picture in, detections out. n detections; h w the picture's size."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from detr.batch import Sample, collate, normalize
from detr.checkpoint import Category, InputSize, load_model
from detr.coco import decode_image
from detr.model import DETR, for_inference
from detr.postprocess import postprocess
from detr.transforms import EvalTransform


@dataclass(frozen=True)
class Detections:
    """What a model found in a picture, by falling score.

    boxes_xyxy [n, 4] float32 pixels of the picture; scores [n] (0..1); labels [n] in 0..C-1; names [n] of categories.
    """

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]


class Detector:
    """A trained model, answering as evaluation does: `Detector.load("artifacts/train")("picture.jpg")`.

    A picture passes the model alone, at the size and with the padding that the model was trained with, so no other
    picture changes its answer. `device` is a GPU where there is one.
    """

    def __init__(
        self, model: DETR, categories: list[Category], size: InputSize, device: torch.device | str | None = None
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = for_inference(model).to(self.device)
        self.categories = categories
        self.size = size

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str | None = None) -> "Detector":
        """Of a trained folder, as `load_model` reads it."""
        return cls(*load_model(Path(folder)), device)

    @torch.no_grad()
    def __call__(self, picture: Path | str | bytes | np.ndarray, threshold: float = 0.5) -> Detections:
        """The detections of a score from `threshold` in a picture: a file's path, its bytes, or pixels [h, w, 3] uint8.

        Raises ValueError that names what is no JPEG or PNG, is damaged, or is too large.
        """
        batch = collate([self._sample(picture)], self.size.size_multiple).to(self.device)
        padding = batch.padding if batch.padding.any() else None
        logits, boxes_cxcywh = self.model(normalize(batch.images, batch.padding), padding)
        found = postprocess(logits, boxes_cxcywh, batch.original_sizes_hw)
        scores, labels, boxes = (part[0].cpu().numpy() for part in found)
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] >= threshold]
        names = tuple(self.categories[label].name for label in labels[order])
        return Detections(boxes[order], scores[order], labels[order], names)

    def _sample(self, picture: Path | str | bytes | np.ndarray) -> Sample:
        name = str(picture) if isinstance(picture, Path | str) else "it"
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.shape[2:] != (3,) or not picture.size:
                raise ValueError(f"it is {picture.dtype} of shape {picture.shape}, expected uint8 of (h, w, 3)")
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # a copy: it may be read-only
        else:
            image = decode_image(picture if isinstance(picture, bytes) else Path(picture).read_bytes(), name)
        size_hw = (image.shape[1], image.shape[2])
        image, boxes, labels = EvalTransform(self.size.short, self.size.max_size)(
            image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        )
        return Sample(image, boxes, labels, 0, size_hw)
