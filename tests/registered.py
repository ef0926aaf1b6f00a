"""Registered models without a training: real versions in a real registry, within seconds."""

import base64
import json
import zipfile
from pathlib import Path

import torch

from detr.checkpoint import Category, InputSize, save_model
from detr.model import DETR
from tests.projects import TINY_MODEL
from tests.running import ROOT, call

REGISTER = """
import sys
from pathlib import Path
from pipelines.registry import tracking
from pipelines.registry.packaging import log_version
client = tracking.connect()
run_id = tracking.find_run(client, sys.argv[2], sys.argv[2])
version = log_version(run_id, Path(sys.argv[1]), sys.argv[3], {"fingerprint": sys.argv[2]})
client.set_registered_model_alias(tracking.MODEL, sys.argv[2], version.version)
"""


def categories(data: Path) -> list[Category]:
    document = json.loads((data / "instances_val.json").read_text(encoding="utf-8"))
    return sorted((Category(c["id"], c["name"]) for c in document["categories"]), key=lambda c: c.id)


def pictures(data: Path) -> list[bytes]:
    """The validation pictures in the order of the annotations."""
    document = json.loads((data / "instances_val.json").read_text(encoding="utf-8"))
    with zipfile.ZipFile(data / "val.zip") as archive:
        return [archive.read(image["file_name"]) for image in document["images"]]


def write_model(folder: Path, kinds: list[Category], short: int = 64, max_size: int = 96) -> Path:
    """A trained folder of a small model of random weights, so large that each picture has answers of its own."""
    torch.manual_seed(0)
    model = DETR(TINY_MODEL, len(kinds))
    with torch.no_grad():
        model.class_embed.weight *= 8
        model.query_embed.weight *= 4
        model.input_proj.weight *= 4
    save_model(model, kinds, InputSize(short, max_size, 32), "0" * 16, folder)
    return folder


def register(root: Path, model: Path, alias: str, image: bytes, checkout: Path = ROOT) -> dict[str, str]:
    """Registers a trained folder by the code of `checkout` in the registry of `root`, which the environment names."""
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}
    text = base64.b64encode(image).decode()
    call(root, "python", "-c", REGISTER, str(model), alias, text, PYTHONPATH=str(checkout), **store)
    return store
