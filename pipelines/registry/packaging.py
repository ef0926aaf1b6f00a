"""A model version as MLflow keeps it: made from a trained folder, and loaded again.

A version answers by the code that is packed in it, so a process that loads one never imports this checkout's `detr`.
`python -m pipelines.registry.packaging VERSION DATA_FOLDER WANTED FILE` writes what `compute_detections` returns, of
the images and categories that WANTED lists.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipelines.data import pictures
from pipelines.files import write_json
from pipelines.imports import ROOT, trace_imports
from pipelines.progress import Progress
from pipelines.registry import tracking
from pipelines.registry.tracking import MODEL
from pipelines.stage import command, quote_error

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.pyfunc import PyFuncModel

SERVED = Path(__file__).parents[1] / "serving/served_model.py"
REQUIREMENTS = ("mlflow", "torch", "torchvision", "numpy", "pandas", "pillow", "safetensors")  # what serving imports


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
    temporary = tempfile.TemporaryDirectory
    with mlflow.start_run(run_id=run_id), temporary() as folder, temporary() as packed:
        copied = shutil.copytree(model_folder, folder, dirs_exist_ok=True)  # MLflow follows no link out of a folder
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(SERVED),
            artifacts={
                "weights": f"{copied}/model.safetensors",
                "config": f"{copied}/config.json",
            },
            code_paths=[str(pack_code(Path(packed)))],
            signature=signature,
            input_example=pd.DataFrame({"image": [example]}),
            # without the label of a build, as in 2.14.1+cpu: an index of packages may lack that one
            pip_requirements=[f"{name}=={installed(name).partition('+')[0]}" for name in REQUIREMENTS],
        )
    return mlflow.register_model(info.model_uri, MODEL, tags=tags)


def pack_code(folder: Path) -> Path:
    """Copies what the served model imports of the library into `folder`, and returns the copy."""
    for path in trace_imports(SERVED):
        if path != SERVED:
            place = folder / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    return folder / "detr"


def load(model: str) -> "PyFuncModel":
    """The registered version of an alias (champion) or a number (3), which answers by its own packed code.

    Raises ValueError that says what to do when it cannot be had, and RuntimeError in a process that has imported a
    `detr` before: that would answer instead.
    """
    if "detr" in sys.modules:
        raise RuntimeError(f"detr was imported from {sys.modules['detr'].__file__}; load a model in a fresh process")
    version = tracking.find_version(tracking.connect_to_models(), model)
    import mlflow

    try:
        return mlflow.pyfunc.load_model(f"models:/{MODEL}/{version.version}")
    except Exception as error:
        raise ValueError(
            f"the files of {MODEL} version {version.version}, which MLflow keeps at {version.source}, cannot be loaded "
            f"({quote_error(error)}); bring them back from a copy, or name another version: --model NUMBER"
        ) from error


def detect(model: "PyFuncModel", image: bytes, threshold: float) -> dict[str, list]:
    """{boxes, scores, labels} as a loaded version answers a JPEG or PNG. Raises ValueError for one that it refuses."""
    import pandas as pd
    from mlflow.exceptions import MlflowException

    asked = pd.DataFrame({"image": [base64.b64encode(image).decode()]})
    try:
        (answer,) = cast(pd.DataFrame, model.predict(asked, params={"threshold": threshold})).to_dict("records")
    except MlflowException as error:
        raise ValueError(error.message.removeprefix("image 0: ")) from error
    return dict(answer)


def compute_detections(version: str, data_folder: Path) -> list[dict]:
    """COCO's detections {image_id, category_id, bbox, score} of a registered version on the validation images.

    `data_folder` has `instances_val.json` and `val.zip` or `val/`. A fresh process runs the version's own packed code,
    with no threshold: one detection per query. They are in the order of the images, by falling score. Raises ValueError
    when the version cannot be had, its categories are not those of the data, or an image is missing or damaged.
    """
    from detr.annotation_file import read_truth  # here: the process that loads the version must not meet this `detr`

    truth = read_truth(data_folder / "instances_val.json")
    images = zip(truth.image_ids.tolist(), truth.file_names, strict=True)
    categories = zip(truth.category_names, truth.category_ids.tolist(), strict=True)
    root = str(Path(__file__).parents[2])
    env = os.environ | {"MLFLOW_TRACKING_URI": tracking.get_tracking_uri()}
    env.setdefault("OMP_NUM_THREADS", "1")  # as the evaluation: the number of threads shows in the last digits
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        wanted, file = Path(folder) / "wanted.json", Path(folder) / "detections.json"
        write_json(wanted, {"images": [*images], "categories": dict(categories)})
        asked = [
            sys.executable,
            "-m",
            "pipelines.registry.packaging",
            version,
            str(data_folder),
            str(wanted),
            str(file),
        ]
        said = ""
        with subprocess.Popen(
            asked, env=env, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            for line in process.stdout or ():
                said = line.strip() or said
                if not said.startswith("error: "):
                    print(line, end="", file=sys.stderr, flush=True)
        if process.returncode:
            raise ValueError(f"{MODEL} version {version} gives no detections: {said.removeprefix('error: ')}")
        found: list[dict] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _detections_here(version: str, data: Path, images: list[tuple[int, str]], ids: dict[str, int]) -> list[dict]:
    """What `compute_detections` returns, by this process, of images (id, file name) and category ids by name."""
    model = load(version)
    known = {category["name"] for category in _config(version)["categories"]}
    if known != set(ids):
        different = ", ".join(sorted(known ^ set(ids))[:5])
        raise ValueError(f"it knows {len(known)} categories, {data} has {len(ids)}; they differ in {different}")
    path = pictures.pictures_of(data, "val")
    names = [name for _, name in images]
    found: list[dict] = []
    with pictures.open_archive(path) as archive, Progress(None, "detect", len(names), "image") as bar:
        for (image_id, name), members in zip(images, pictures.find(names, pictures.list_members(path)), strict=True):
            if len(members) != 1:
                raise ValueError(f"{name} is {len(members)} times in {path}, expected once")
            try:
                answer = detect(model, pictures.read(path, archive, members[0]), 0.0)
            except ValueError as error:
                raise ValueError(f"{name} in {path}: {error}") from error
            for (left, top, right, bottom), score, label in zip(*answer.values(), strict=True):
                box = [left, top, round(right - left, 2), round(bottom - top, 2)]
                found.append({"image_id": image_id, "category_id": ids[label], "bbox": box, "score": score})
            bar.update()
    return found


def _config(version: str) -> dict[str, Any]:
    """The config.json of a version: architecture, categories, input size."""
    import mlflow

    number = tracking.find_version(tracking.connect_to_models(), version).version
    config: dict[str, Any] = mlflow.artifacts.load_dict(f"models:/{MODEL}/{number}/artifacts/config.json")
    return config


def main() -> None:
    version, data, wanted, file = sys.argv[1:]
    asked = json.loads(Path(wanted).read_text(encoding="utf-8"))
    write_json(Path(file), _detections_here(version, Path(data), asked["images"], asked["categories"]))


if __name__ == "__main__":
    command(main)
