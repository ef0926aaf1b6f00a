"""Models and resume states as files."""

import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from detr.backbone import first_difference, read_torch
from detr.model import DETR, ModelConfig


@dataclass(frozen=True)
class Category:
    """One class: label k of the model is the k-th category by ascending id."""

    id: int
    name: str


@dataclass(frozen=True)
class InputSize:
    """How an image becomes the model's input: resized to `short`, at most `max_size`, padded to `size_multiple`.

    The last is that of training: a model that never saw an image without padding is worse on one.
    """

    short: int
    max_size: int
    size_multiple: int


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that is either whole or absent: temporary name, sync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_model(model: DETR, categories: list[Category], input_size: InputSize, fingerprint: str, folder: Path) -> None:
    """Writes `model.safetensors` and `config.json` into `folder`.

    The latter holds the architecture, the categories, the input size and the
    fingerprint of the training.
    """
    weights = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    config = {
        "model": asdict(model.config),
        "categories": [asdict(category) for category in categories],
        "input_size": asdict(input_size),
        "fingerprint": fingerprint,
    }
    write_atomically(folder / "model.safetensors", lambda file: file.write(save(weights)))
    write_atomically(folder / "config.json", lambda file: file.write(json.dumps(config, indent=1).encode()))


def load_model(folder: Path) -> tuple[DETR, list[Category], InputSize]:
    """The model in eval mode, its categories and its input size.

    Raises ValueError that names the file when one is torn or they disagree. Runs no code from the files.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
        model_config, input_size = ModelConfig(**config["model"]), InputSize(**config["input_size"])
        categories = [Category(**category) for category in config["categories"]]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{folder} holds no whole model of this version ({reason}); train or fetch it again"
        ) from error
    model = DETR(model_config, len(categories))
    if difference := first_difference(model.state_dict(), weights):
        raise ValueError(f"{folder}: model.safetensors does not fit config.json: {difference}")
    model.load_state_dict(weights)
    return model.eval(), categories, input_size


def save_state(state: dict[str, Any], path: Path) -> None:
    """Writes a resume state with its SHA-256 beside it, keeping the one before as `.previous`."""
    hidden = path.with_suffix(".torch")
    write_atomically(hidden, lambda file: torch.save(state, file))
    digest = hashlib.sha256(hidden.read_bytes()).digest()
    with hidden.open("ab") as file:
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        os.replace(path, path.with_suffix(".previous"))
    os.replace(hidden, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the new names outlive a loss of power too
    finally:
        os.close(folder)


def load_state(path: Path) -> dict[str, Any] | None:
    """The newest whole resume state, or None. One that is damaged is put aside, with a warning, for the one before.

    Raises ValueError for one that was written whole but holds more than values. Runs no code from the file.
    """
    for candidate in (path, path.with_suffix(".previous")):
        if not candidate.exists():
            continue
        data = candidate.read_bytes()
        if hashlib.sha256(data[:-32]).digest() == data[-32:]:
            state: dict[str, Any] = read_torch(io.BytesIO(data[:-32]), str(candidate))
            return state
        damaged = path.with_suffix(".damaged")  # away from where the next state would push out the good one
        os.replace(candidate, damaged)
        warnings.warn(f"{candidate} is damaged and was moved to {damaged}; looking for the state before", stacklevel=2)
    return None
