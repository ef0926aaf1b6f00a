"""The authors' published weights (https://github.com/facebookresearch/detr), and training from trained ones."""

import argparse
import hashlib
import re
import sys
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor

from detr.backbone import freeze_stem
from detr.checkpoint import Category, InputSize, find_difference, is_state, load_model, read_torch
from detr.model import DETR, ModelConfig

_SITE = "https://dl.fbaipublicfiles.com/detr"
URLS = {
    "detr-r50": f"{_SITE}/detr-r50-e632da11.pth",
    "detr-dc5-r50": f"{_SITE}/detr-r50-dc5-f0fb7ef5.pth",
    "detr-r101": f"{_SITE}/detr-r101-2c7b67e5.pth",
    "detr-dc5-r101": f"{_SITE}/detr-r101-dc5-a2e86def.pth",
}
COCO_CATEGORIES = tuple(
    Category(int(number), name)
    for number, name in re.findall(
        r"(\d+) ([a-z ]+)",
        """1 person,2 bicycle,3 car,4 motorcycle,5 airplane,6 bus,7 train,8 truck,9 boat,10 traffic light,
        11 fire hydrant,13 stop sign,14 parking meter,15 bench,16 bird,17 cat,18 dog,19 horse,20 sheep,21 cow,
        22 elephant,23 bear,24 zebra,25 giraffe,27 backpack,28 umbrella,31 handbag,32 tie,33 suitcase,34 frisbee,
        35 skis,36 snowboard,37 sports ball,38 kite,39 baseball bat,40 baseball glove,41 skateboard,42 surfboard,
        43 tennis racket,44 bottle,46 wine glass,47 cup,48 fork,49 knife,50 spoon,51 bowl,52 banana,53 apple,
        54 sandwich,55 orange,56 broccoli,57 carrot,58 hot dog,59 pizza,60 donut,61 cake,62 chair,63 couch,
        64 potted plant,65 bed,67 dining table,70 toilet,72 tv,73 laptop,74 mouse,75 remote,76 keyboard,
        77 cell phone,78 microwave,79 oven,80 toaster,81 sink,82 refrigerator,84 book,85 clock,86 vase,87 scissors,
        88 teddy bear,89 hair drier,90 toothbrush""",
    )
)
_ROWS = [*(category.id for category in COCO_CATEGORIES), 91]  # of class_embed: row k is id k, the last "no object"


def load_official(source: str | Path, stride: int | None = None) -> tuple[DETR, list[Category], InputSize]:
    """The authors' model in eval mode, COCO's 80 categories, and the authors' evaluation size, as of `load_model`.

    `source` is a name in URLS, a URL (see `fetch_weights`) or a `.pth` file with the weights under "model". The
    architecture follows from names and shapes; the stride leaves no trace there: 16 where "dc5" is in the file's
    name, else 32, unless `stride` is given. Labels are the data's own: of class_embed's 92 rows the 80 of COCO's
    ids and "no object" are kept, and the 11 of ids that COCO does not use (0, 12, 26 ...) are dropped; they were
    never trained on an object, and a score grows by their share of the softmax. Raises ValueError that names the
    file, and the first key that is missing, left over or of another shape. Runs no code from the file.
    """
    path = fetch_weights(str(source))
    if not path.is_file():
        raise ValueError(f"{source} is neither a file, a URL nor one of {', '.join(URLS)}")
    document = read_torch(path, allowed=(argparse.Namespace,))  # the type of `args` in their training checkpoints
    state = document.get("model") if isinstance(document, dict) else None
    if not is_state(state):
        raise ValueError(f'{path} holds no tensors under "model", expected a checkpoint of the authors\' code')
    model = build_official(state, stride or (16 if "dc5" in path.name else 32), str(path))
    return model, list(COCO_CATEGORIES), InputSize(800, 1333, 1)


def build_official(state: dict[str, Tensor], stride: int, source: str) -> DETR:
    """The model of the authors' state dict; `source` is its name in errors."""
    if any(key.startswith(("detr.", "mask_head.", "bbox_attention.")) for key in state):
        raise ValueError(f"{source} is a segmentation model, which is not supported; give one that only detects")
    state = {key.replace("backbone.0.body.", "backbone.", 1): value for key, value in state.items()}
    for key in sorted({"class_embed.weight", "class_embed.bias"} & state.keys()):
        if state[key].shape[:1] != (92,):
            raise ValueError(f"{source}: {key} is {tuple(state[key].shape)}, expected 92 rows, one per id of COCO's")
        state[key] = state[key][_ROWS]

    config = read_architecture(state, stride)
    model = DETR(config, len(COCO_CATEGORIES))
    if difference := find_difference(model.state_dict(), state):
        raise ValueError(f"{source} does not fit {config.backbone}: {difference}")
    model.load_state_dict(state)
    return model.eval()


def read_architecture(state: dict[str, Tensor], stride: int) -> ModelConfig:
    """The architecture that names and shapes of the authors' weights tell, the published one where they do not."""

    def size(key: str, published: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(state[key].shape) if key in state and state[key].dim() == len(published) else published

    def num_layers(part: str) -> int:
        return len({key.split(".")[3] for key in state if key.startswith(f"transformer.{part}.layers.")})

    num_queries, hidden_dim = size("query_embed.weight", (100, 256))
    return ModelConfig(
        backbone="resnet101" if "backbone.layer3.6.conv1.weight" in state else "resnet50",
        backbone_width=1.0,
        backbone_norm="frozen",
        backbone_weights="none",
        stride=stride,
        position="sine",
        position_temperature=10000.0,
        hidden_dim=hidden_dim,
        num_heads=8,
        dim_feedforward=size("transformer.decoder.layers.0.linear1.weight", (2048, 256))[0],
        num_encoder_layers=num_layers("encoder"),
        num_decoder_layers=max(1, num_layers("decoder")),
        num_queries=num_queries,
        dropout=0.1,
        attention_dropout=0.1,
        pre_norm="transformer.encoder.norm.weight" in state,
    )


def fetch_weights(source: str) -> Path:
    """The file of a path, of a name in URLS or of a URL, downloaded once to torch.hub's folder (see TORCH_HOME).

    A URL's file name must end as `-DIGITS.pth`, 8 or more hex digits of its SHA-256, which guard against damage.
    A download gets its name when it is whole, so several processes may fetch at once. Raises ValueError.
    """
    url = URLS.get(source, source)
    if not url.startswith(("http://", "https://")):
        return Path(url)
    name = Path(urlparse(url).path).name
    digits = re.search(r"-([0-9a-f]{8,64})\.pth$", name)
    if digits is None:
        raise ValueError(f"{url} does not end as -DIGITS.pth, 8 or more hex digits of its SHA-256; give a local file")
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not (path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest().startswith(digits[1])):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), digits[1], progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{url} was not fetched ({error}); fetch it yourself and give the file") from error
    return path


def initialize_model(model: DETR, source: str) -> None:
    """Starts `model` from trained weights, all but its class head, which stays as it is.

    `source` is a folder of `save_model` or what `load_official` takes. With frozen norms the stem and first stage
    train no more, as with a pretrained backbone. Raises ValueError that names the first key that differs and what
    to set; the architecture must be that of the weights, but for dropout.
    """
    trained = (load_model(Path(source)) if Path(source).is_dir() else load_official(source))[0]
    own, given = asdict(model.config), asdict(trained.config)
    fixed = own.keys() - {"backbone_weights", "dropout", "attention_dropout"}
    unlike = [f"model.{key}={given[key]}" for key in own if key in fixed and own[key] != given[key]]
    own_state, state = (
        {key: value for key, value in side.state_dict().items() if not key.startswith("class_embed.")}
        for side in (model, trained)
    )
    if unlike:
        difference = find_difference(own_state, state) or "every shape is the same, but what is computed is not"
        raise ValueError(
            f"train.initial_weights {source} does not fit the model: {difference}; set {', '.join(unlike)} as in the "
            "weights, anything else throws trained ones away"
        )
    model.load_state_dict(state, strict=False)
    if model.config.backbone_norm == "frozen":
        freeze_stem(model.backbone)
