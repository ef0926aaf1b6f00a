"""The registered model: an MLflow pyfunc that answers images with detections.

MLflow packs this file and `detr/` into the model version and needs nothing else of the project.
"""

import base64
import io
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from detr.batch import Sample, collate, normalize
from detr.checkpoint import load_model
from detr.coco import decode
from detr.model import for_inference
from detr.postprocess import postprocess
from detr.transforms import EvalTransform, fit_size

MAX_PIXELS = 50_000_000  # of an image; a small file can claim any number, and decoding takes 3 bytes for each
FORMATS = {b"\xff\xd8\xff": JpegImageFile, b"\x89PNG\r\n\x1a\n": PngImageFile}


class Detector(PythonModel):
    """Rows with a base64 JPEG or PNG in `image` become rows of `boxes`, `scores` and `labels`.

    boxes are [left, top, right, bottom] in pixels of the image sent, by falling score; labels are category
    names. The parameter `threshold` (0.5) is the lowest score that is answered. Pixels count as they are stored, as in
    training: an EXIF orientation turns nothing. Images and parameters that cannot be used are an MlflowException that
    the server answers as 400; it names the first such image by its row, counted from 0.

    Requests may come from any number of threads: one thread does all the work, an image at a time with all cores, so
    that neither memory nor OpenMP's threads grow with the number of requests or of images in one. An image passes the
    model alone, as in the evaluation: its answer does not depend on others.
    """

    def load_context(self, context: PythonModelContext) -> None:
        model, self.categories, self.size = load_model(Path(context.artifacts["weights"]).parent)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = for_inference(model).to(self.device)
        self.transform = EvalTransform(self.size.short, self.size.max_size)
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="detector")

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        threshold = (params or {}).get("threshold", 0.5)
        if threshold is None or not 0 <= threshold <= 1:
            raise MlflowException.invalid_parameter_value(f"threshold is {threshold}, expected a score in 0..1")
        rows = [
            self.worker.submit(self._detect, index, text, threshold).result()
            for index, text in enumerate(model_input["image"])
        ]
        return pd.DataFrame(rows, columns=["boxes", "scores", "labels"])

    @torch.no_grad()
    def _detect(self, index: int, text: Any, threshold: float) -> dict[str, list]:
        batch = collate([self._sample(index, text)], self.size.size_multiple).to(self.device)
        padding = batch.padding if batch.padding.any() else None
        logits, boxes_cxcywh = self.model(normalize(batch.images, batch.padding), padding)
        found = postprocess(logits, boxes_cxcywh, batch.original_sizes_hw)
        scores, labels, boxes = (part[0].cpu() for part in found)
        order = [k for k in scores.argsort(descending=True, stable=True).tolist() if scores[k] >= threshold]
        return {
            "boxes": [[round(v, 2) for v in boxes[k].tolist()] for k in order],
            "scores": [round(scores[k].item(), 6) for k in order],
            "labels": [self.categories[labels[k]].name for k in order],
        }

    def _sample(self, index: int, text: Any) -> Sample:
        try:
            if not isinstance(text, str):
                missing = text is None or (isinstance(text, float) and math.isnan(text))  # a column's null becomes NaN
                got = "null" if missing else f"a {type(text).__name__}"
                raise ValueError(f"it is {got}, expected the base64 text of a JPEG or PNG")
            data = _bytes(text)
            self._expect_size(data)
            image = decode(data, "it")
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(f"image {index}: {error}") from error
        size_hw = (image.shape[1], image.shape[2])
        image, boxes, labels = self.transform(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        return Sample(image, boxes, labels, index, size_hw)

    def _expect_size(self, data: bytes) -> None:
        """Raises ValueError unless the header, read before anything is decoded, is of an image of a usable size."""
        kind = next((kind for start, kind in FORMATS.items() if data.startswith(start)), None)
        if kind is None:
            raise ValueError(f"its {len(data)} bytes begin neither as a JPEG nor as a PNG")
        try:
            with kind(io.BytesIO(data)) as header:
                width, height = header.size
        except Exception as error:  # Pillow promises no kind of error for a broken header
            raise ValueError(f"its header is broken ({error})") from error
        size = f"it has {width} x {height} pixels"
        if width * height > MAX_PIXELS:
            raise ValueError(f"{size}, expected at most {MAX_PIXELS} in all; send it smaller")
        limit = 2 * self.size.max_size  # a side of one pixel bounds how small the other can become
        if max(fit_size((height, width), self.size.short, self.size.max_size)) > limit:
            raise ValueError(f"{size}, expected sides that differ by less than {limit} times; cut it in parts")


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # the command base64 breaks its lines
    except ValueError as error:
        raise ValueError(f"it is not base64 ({error})") from error


set_model(Detector())
