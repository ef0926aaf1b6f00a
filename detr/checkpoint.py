"""Models and resume states as files."""

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torchvision.models import get_model

from detr.backbone import ResNet, freeze_stem
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


def build_model(config: ModelConfig, num_classes: int) -> DETR:
    """A model ready to train: random weights, or a pretrained backbone whose stem and first stage are frozen."""
    model = DETR(config, num_classes)
    if config.backbone_weights != "none":
        load_pretrained(model.backbone, config.backbone, config.backbone_weights)
        freeze_stem(model.backbone)
    return model


def load_pretrained(backbone: ResNet, name: str, source: str) -> None:
    """Fills the backbone with published weights, without their classifier.

    `source` is `imagenet` (torchvision's weights API, downloaded once) or a local `.safetensors` or `.pth`
    file under torchvision's names. Raises ValueError that names the first key that differs. Runs no code from
    the file.
    """
    if source == "imagenet":
        try:
            state = get_model(name, weights="IMAGENET1K_V1").state_dict()
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"torchvision's weights of {name} were not fetched ({error}); fetch them yourself, and give the file "
                "as model.backbone_weights"
            ) from error
    elif not Path(source).is_file():
        raise ValueError(f"model.backbone_weights is {source!r}: no such file; give none, imagenet or a file")
    elif source.endswith(".safetensors"):
        try:
            state = load_file(source)
        except SafetensorError as error:
            raise ValueError(f"{source} is not a whole safetensors file ({error}); fetch it again") from error
    else:
        state = read_torch(source)
    if not is_state(state):
        raise ValueError(f"{source} is not a flat dictionary of tensors; save the backbone's state_dict() alone")
    state = {key: value.float() for key, value in state.items() if not key.startswith("fc.")}
    own = backbone.state_dict()
    state = {key: value for key, value in state.items() if key in own or not key.endswith("num_batches_tracked")}
    if difference := find_difference(own, state):
        raise ValueError(f"{source} does not fit {name}: {difference}")
    backbone.load_state_dict(state)


def read_torch(file: str | Path | BinaryIO, name: str = "", allowed: tuple[type, ...] = ()) -> Any:
    """What torch.save wrote: tensors, plain values and `allowed` classes. Runs no code from the file.

    Raises ValueError that names a file that is damaged, that is something else, or that holds more; `name` is
    that of an open one.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler fail in any way, with advice to trust them
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {code[1]}" if code else type(error).__name__
        raise ValueError(f"{name or file} is not a whole file of weights and nothing else ({reason})") from error


def is_state(value: Any) -> TypeGuard[dict[str, Tensor]]:
    """Whether `value` is a flat dictionary of named tensors."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def find_difference(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """The first key, by name, that has another shape in `given` or is only on one side; empty if there is none."""
    for key in sorted(own.keys() | given.keys()):
        shapes = [tuple(side[key].shape) if key in side else "absent" for side in (own, given)]
        if shapes[0] != shapes[1]:
            return f"{key} is {shapes[0]} in the model, {shapes[1]} in the file"
    return ""


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
    if difference := find_difference(model.state_dict(), weights):
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
