"""What the authors' code and this one compute on the same numbers: python -m tests.golden records the authors' side.

Parameters, pixels and targets come from a formula over names, so nothing but results is stored: outputs of every
decoder layer, losses, matches, and a digest of every gradient and of every parameter after three optimizer steps.
"""

import random
import statistics
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks import authors
from detr.batch import Targets
from detr.loss import count_totals, set_loss
from detr.matcher import match_targets
from detr.optimizer import build_optimizer
from detr.postprocess import postprocess
from detr.train_config import TrainConfig
from pipelines.params import from_document, merge_parameters

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "golden"
SIZES_HW = ((128, 104), (88, 160))  # two images, each with padding, in 128x160
COUNTS = (3, 5)
LR, LR_BACKBONE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 1e-5, 1e-4, 0.1
STEPS = 3


def uniform(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """float64 in [-1, 1), a function of name and place alone: 32 bits of a multiplicative hash (splitmix64)."""
    count = int(np.prod(shape))
    state = np.arange(1, count + 1, dtype=np.uint64) + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32))
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    state = (state ^ (state >> np.uint64(31))) >> np.uint64(32)
    return torch.from_numpy(state.astype(np.float64) / 2**31 - 1).view(shape)


def filled(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of a parameter or buffer under its official name, scaled so that signals neither vanish nor explode."""
    value = uniform(name, shape)
    if name.endswith("running_var"):
        return 1 + 0.25 * value
    if len(shape) == 1:
        weight_of_norm = name.endswith("weight")
        closes_block = ".bn3." in name  # of a residual branch, which adds up over 33 blocks
        return (0.25 if closes_block else 1.0) * (weight_of_norm + 0.1 * value)
    fan_in = int(np.prod(shape[1:]))
    return value * (
        1.0 if "query_embed" in name else (6 / fan_in) ** 0.5 if "backbone" in name else (3 / fan_in) ** 0.5
    )


def official_name(name: str) -> str:
    return name.replace("backbone.", "backbone.0.body.", 1)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Images, padding, and boxes and labels of each image."""
    height, width = (max(size[k] for size in SIZES_HW) for k in (0, 1))
    images = torch.zeros(2, 3, height, width, dtype=dtype)
    padding = torch.ones(2, height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(SIZES_HW):
        images[i, :, :h, :w] = 2 * uniform(f"image {i}", (3, h, w))
        padding[i, :h, :w] = False
    boxes = [0.3 + 0.2 * uniform(f"boxes {i}", (count, 4)).to(dtype) for i, count in enumerate(COUNTS)]
    labels = [(45.5 + 45 * uniform(f"labels {i}", (count,))).long() for i, count in enumerate(COUNTS)]
    return images, padding, boxes, labels


def theirs(variant: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every compared number of the authors' code."""
    peer = authors.build(variant, dropout=0.0)
    model, criterion = peer.model.to(dtype), peer.criterion.to(dtype)
    criterion.empty_weight[-1] = criterion.eos_coef  # in full precision
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(filled(name, tuple(value.shape)))
    images, padding, boxes, labels = inputs(dtype)
    goals = [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]
    backbone = [p for name, p in model.named_parameters() if "backbone" in name and p.requires_grad]
    others = [p for name, p in model.named_parameters() if "backbone" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": backbone, "lr": LR_BACKBONE}], lr=LR, weight_decay=WEIGHT_DECAY
    )
    result, norms = {}, []
    for step in range(STEPS):
        outputs = model(authors.nested(images, padding))
        losses = criterion(outputs, goals)
        total = sum(losses[name] * weight for name, weight in criterion.weight_dict.items())
        optimizer.zero_grad()
        total.backward()
        if step == 0:
            layers = [*outputs["aux_outputs"], {key: outputs[key] for key in ("pred_logits", "pred_boxes")}]
            suffixes = [*(f"_{k}" for k in range(5)), ""]
            result |= {
                "logits": torch.stack([layer["pred_logits"] for layer in layers]),
                "boxes": torch.stack([layer["pred_boxes"] for layer in layers]),
                "loss": total,
                "class_error": losses["class_error"],
                "matched": torch.stack([
                    torch.cat([queries[found.argsort()] for queries, found in criterion.matcher(layer, goals)])
                    for layer in layers
                ]),
            }  # fmt: skip
            for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
                result[name] = torch.stack([losses[name + suffix] for suffix in suffixes])
            result |= {f"gradient {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM))
        optimizer.step()
    result |= {f"parameter {name}": p for name, p in model.named_parameters() if p.requires_grad}
    result |= {"grad_norm": norms[0], "parameter steps' grad_norm": torch.stack(norms)}
    target_sizes = torch.tensor([[480, 640], [333, 500]])
    detections = peer.postprocess(
        {"pred_logits": result["logits"][-1], "pred_boxes": result["boxes"][-1]}, target_sizes
    )
    for key in ("scores", "labels", "boxes"):
        result[f"detections {key}"] = torch.stack([found[key] for found in detections])
    return {name: value.detach() for name, value in result.items()}


def ours(variant: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same numbers of this code, under the same names."""
    train = from_document(merge_parameters(ROOT, f"coco-{variant}", []), "train", TrainConfig)
    model = authors.paper_model(variant, dropout=0.0, attention_dropout=0.0).to(dtype)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(filled(official_name(name), tuple(value.shape)))
    images, padding, boxes, labels = inputs(dtype)
    targets = Targets.join(boxes, labels)
    totals = count_totals(targets, model.config.num_queries)
    optimizer = build_optimizer(model, train)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"]
    result, norms = {}, []
    for step in range(STEPS):
        logits, predicted = model(images, padding)
        total, parts = set_loss(logits, predicted, targets, totals, train.matcher, train.loss)
        optimizer.zero_grad()
        total.backward()
        if step == 0:
            result |= {
                "logits": logits, "boxes": predicted, "loss": total, "class_error": parts["class_error"],
                "matched": match_targets(logits, predicted, targets, train.matcher),
                "loss_ce": parts["loss_class"], "loss_bbox": parts["loss_box"], "loss_giou": parts["loss_giou"],
                "cardinality_error": parts["cardinality_error"],
            }  # fmt: skip
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            result |= {f"gradient {official_name(name)}": grad.clone() for name, grad in grads.items()}
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm))
        optimizer.step()
    result |= {f"parameter {official_name(name)}": p for name, p in model.named_parameters() if p.requires_grad}
    result |= {"grad_norm": norms[0], "parameter steps' grad_norm": torch.stack(norms)}
    detections = postprocess(result["logits"], result["boxes"], torch.tensor([[480, 640], [333, 500]]))
    result |= dict(zip(("detections scores", "detections labels", "detections boxes"), detections, strict=True))
    return {name: value.detach() for name, value in result.items()}


@cache
def _directions() -> torch.Tensor:
    return uniform("projections", (3_000_000,)) * 3**0.5


def digest(result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is stored: every fifth query's logits, and of each gradient and parameter its norm and four projections.

    Projections are onto fixed directions of random numbers with variance 1, so that they differ as much as tensors do.
    """
    stored = {}
    for name, value in result.items():
        if name == "logits":
            value = value[:, :, ::5]
        if name.startswith(("gradient", "parameter")):
            flat = value.double().flatten()
            projections = [flat @ _directions()[1000 * k : 1000 * k + len(flat)] for k in range(4)]
            value = torch.stack([flat.norm(), *projections])
        stored[name] = value.contiguous()
    return stored


def difference(name: str, value: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error: of the whole tensor for gradients and parameters, of the largest entry for all else."""
    value, expected = value.double(), expected.double()
    if name.startswith(("gradient", "parameter")):
        return float((value - expected).norm() / expected.norm())
    return float((value - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def assert_equal(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Everything within the tolerance; in float32 half of the gradients and parameters, and all within a hundredth.

    In float32 a ReLU whose input is zero but for rounding passes its gradient or not, on either side, and AdamW makes
    a whole step of it. The authors' float32 differs from their own float64 by 2.3e-3 in some gradients.
    """
    tolerance = TOLERANCE[dtype]
    assert result.keys() == expected.keys()
    without = "gradient transformer.decoder.layers.0.self_attn.in_proj_weight"  # zero: it attends over zeros
    assert max(float(side[without].norm()) for side in (result, expected)) < 1e-8 * float(expected["grad_norm"])
    smooth, rough = {}, {}
    for name, value in expected.items():
        if value.dtype == torch.int64:
            assert torch.equal(result[name], value), name
        elif name != without:
            rounded = dtype == torch.float32 and name.startswith(("gradient", "parameter"))
            (rough if rounded else smooth)[name] = difference(name, result[name], value)
    far = {name: error for name, error in smooth.items() if error >= tolerance}
    assert not far, far
    if rough:
        assert statistics.median(rough.values()) < tolerance
        far = {name: error for name, error in rough.items() if error >= 1e-2}
        assert not far, far


TRANSFORM_SIZES_HW = ((480, 640), (640, 427), (375, 500), (240, 640), (500, 500))
NUM_DRAWS = 60


def objects(index: int) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor]:
    """Size (height, width) of a picture, and of what is in it boxes_xyxy [7, 4] in pixels and labels [7]."""
    height, width = TRANSFORM_SIZES_HW[index % len(TRANSFORM_SIZES_HW)]
    corners = (uniform(f"corners {index}", (7, 2, 2)) + 1) / 2 * torch.tensor([width, height])
    return (height, width), torch.cat([corners.amin(1), corners.amax(1)], dim=1).float(), torch.arange(7)


def scene(index: int) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """A smooth picture [h, w, 3] uint8 with boxes_xyxy [7, 4] in pixels and labels [7]."""
    (height, width), boxes, labels = objects(index)
    y, x = np.mgrid[:height, :width] / 40.0
    image = 127.5 + 60 * np.stack([np.sin(x + k) + np.cos(y * (k + 1) / 2) for k in range(3)], axis=2)
    return image.round().astype(np.uint8), boxes, labels


def their_transform(split: str, index: int, rng: random.Random | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A normalised image and its targets by the authors' transform, with all randomness from `rng` where one is given."""
    with authors.importable():
        import datasets.transforms
        from datasets.coco import make_coco_transforms

    def place(image: Image.Image, size_hw: tuple[int, int]) -> tuple[int, int, int, int]:
        top, left = (rng.randint(0, have - need) for have, need in zip(image.size[::-1], size_hw, strict=True))
        return top, left, *size_hw

    picture, boxes, labels = scene(index)
    target = {"boxes": boxes, "labels": labels, "area": torch.zeros(7), "iscrowd": torch.zeros(7)}
    with pytest.MonkeyPatch.context() as patch:
        if rng is not None:
            patch.setattr(datasets.transforms, "random", rng)
            patch.setattr(datasets.transforms.T.RandomCrop, "get_params", staticmethod(place))
        return make_coco_transforms(split)(Image.fromarray(picture), target)


def their_views() -> dict[str, torch.Tensor]:
    """Of transforms with given draws: image sizes [n, 2], boxes_cxcywh (fractions) and labels of all, counts [n].

    And sizes and kept boxes of as many with their own randomness, and every 97th value of an evaluation image.
    """
    result: dict[str, list[torch.Tensor]] = {name: [] for name in ("sizes", "boxes", "labels", "counts", "free")}
    random.seed(0)
    torch.manual_seed(0)
    for index in range(NUM_DRAWS):
        image, target = their_transform("train", index, random.Random(index))
        result["sizes"].append(torch.tensor(image.shape[1:]))
        result["counts"].append(torch.tensor(len(target["labels"])))
        result["boxes"].append(target["boxes"])
        result["labels"].append(target["labels"])
    for index in range(5 * NUM_DRAWS):
        image, target = their_transform("train", index, None)
        result["free"].append(torch.tensor([*image.shape[1:], len(target["labels"])]))
    joined = {name: (torch.cat if name in ("boxes", "labels") else torch.stack)(rows) for name, rows in result.items()}
    return joined | {"evaluation": their_transform("val", 0, None)[0].flatten()[::97].clone()}


def main() -> None:
    authors.install()
    FOLDER.mkdir(exist_ok=True)
    for variant in authors.VARIANTS:
        save_file(digest(theirs(variant, torch.float64)), FOLDER / f"{variant}.safetensors")
        print(f"{variant} recorded", flush=True)
    save_file(their_views(), FOLDER / "transforms.safetensors")


if __name__ == "__main__":
    main()
