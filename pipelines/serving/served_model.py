"""The registered model: an MLflow pyfunc that answers images with detections.

MLflow packs this file and what it imports of `detr/` into the model version, and needs nothing else of the project.
"""

import base64
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from detr.detector import Detector


class ServedModel(PythonModel):
    """Rows with a base64 JPEG or PNG in `image` become rows of `boxes`, `scores` and `labels`.

    boxes are [left, top, right, bottom] in pixels of the image sent, by falling score; labels are category
    names. The parameter `threshold` (0.5) is the lowest score that is answered. Pixels count as they are stored, as in
    training: an EXIF orientation turns nothing. Images and parameters that cannot be used are an MlflowException that
    the server answers as 400; it names the first such image by its row, counted from 0.

    Requests may come from any number of threads: one thread does all the work, an image at a time with all cores, so
    that neither memory nor OpenMP's threads grow with the number of requests or of images in one.
    """

    def load_context(self, context: PythonModelContext) -> None:
        self.detector = Detector.load(Path(context.artifacts["weights"]).parent)
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

    def _detect(self, index: int, text: Any, threshold: float) -> dict[str, list]:
        try:
            found = self.detector(_bytes(text), threshold)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(f"image {index}: {error}") from error
        return {
            "boxes": [[round(v, 2) for v in box] for box in found.boxes_xyxy.tolist()],
            "scores": [round(score, 6) for score in found.scores.tolist()],
            "labels": list(found.names),
        }


def _bytes(text: Any) -> bytes:
    if not isinstance(text, str):
        missing = text is None or (isinstance(text, float) and math.isnan(text))  # a column's null becomes NaN
        got = "null" if missing else f"a {type(text).__name__}"
        raise ValueError(f"it is {got}, expected the base64 text of a JPEG or PNG")
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # the command base64 breaks its lines
    except ValueError as error:
        raise ValueError(f"it is not base64 ({error})") from error


set_model(ServedModel())
