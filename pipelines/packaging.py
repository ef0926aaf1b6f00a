"""A model version as MLflow keeps it: made from a trained folder, and loaded again."""

import shutil
import tempfile
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tracking import MODEL

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

REQUIREMENTS = ("mlflow", "torch", "torchvision", "numpy", "pandas", "pillow", "safetensors")


def log_version(run_id: str, model_folder: Path, example: str, tags: dict[str, str]) -> "ModelVersion":
    """A new version of the registered model: self-contained, weights as safetensors, no pickle.

    `example` is a base64 JPEG or PNG, kept as the input example.
    """
    import mlflow
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, DataType

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image")]),
        outputs=Schema(
            [
                ColSpec(Array(Array(DataType.double)), "boxes"),
                ColSpec(Array(DataType.double), "scores"),
                ColSpec(Array(DataType.string), "labels"),
            ]
        ),
        params=ParamSchema([ParamSpec("threshold", DataType.double, 0.5)]),
    )
    with mlflow.start_run(run_id=run_id), tempfile.TemporaryDirectory() as folder:
        copied = shutil.copytree(model_folder, folder, dirs_exist_ok=True)  # MLflow follows no link out of a folder
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={
                "weights": f"{copied}/model.safetensors",
                "config": f"{copied}/config.json",
            },
            code_paths=[str(Path(__file__).parent.parent / "detr")],
            signature=signature,
            input_example=pd.DataFrame({"image": [example]}),
            pip_requirements=[f"{name}=={installed(name)}" for name in REQUIREMENTS],
        )
    return mlflow.register_model(info.model_uri, MODEL, tags=tags)
