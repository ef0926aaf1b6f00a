"""Detections of a model over a dataset, as rows of `detr.metrics`. Q queries, L decoder layers, n detections."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from detr.batch import normalize
from detr.coco import CocoDataset
from detr.distributed import Process
from detr.loader import Loader
from detr.metrics import COLUMNS
from detr.model import DETR, for_inference
from detr.postprocess import postprocess

PIXEL_DECIMALS, SCORE_DECIMALS = 4, 7


@torch.no_grad()
def detect_each(
    model: DETR,
    dataset: CocoDataset,
    indices: Sequence[int],
    size_multiple: int,
    device: torch.device,
    every_layer: bool = False,
) -> Iterator[np.ndarray]:
    """The detections [1, Q, 7], or those of every decoder layer [L, Q, 7], of each image in turn, in order of queries.

    Each image passes the model alone: batch mates bring padding, and their number other kernels, which round otherwise.
    So no batch size and no number of processes changes a detection. `size_multiple` is that of the model's `InputSize`.
    Coordinates are rounded to PIXEL_DECIMALS and scores to SCORE_DECIMALS, about what float32 holds: of 100 images of
    COCO that moves its 12 numbers by less than 1e-4, where 2 decimals of a pixel move them by up to 1e-3.
    """
    model = for_inference(model).to(device)
    category_ids = torch.from_numpy(dataset.annotations.category_ids)
    keys = [[(0, index)] for index in indices]
    for batch in Loader(dataset, keys, size_multiple, device):
        padding = batch.padding if batch.padding.any() else None
        logits, boxes = model(normalize(batch.images, batch.padding), padding)
        layers = []
        for layer in range(0 if every_layer else -1, len(logits) if every_layer else 0):
            found = postprocess(logits[layer][None], boxes[layer][None], batch.original_sizes_hw)
            scores, labels, boxes_xyxy = (x[0].cpu() for x in found)
            boxes_xyxy[:, 2:] -= boxes_xyxy[:, :2]
            rows = torch.empty(len(scores), COLUMNS, dtype=torch.float64)
            rows[:, 0] = batch.image_ids.cpu()
            rows[:, 1:5] = boxes_xyxy.double().round(decimals=PIXEL_DECIMALS)
            rows[:, 5] = scores.double().round(decimals=SCORE_DECIMALS)
            rows[:, 6] = category_ids[labels]
            layers.append(rows)
        yield torch.stack(layers).numpy()


def detect_all(
    model: DETR,
    dataset: CocoDataset,
    size_multiple: int,
    process: Process,
    progress: Callable[[int], object] = lambda num_images: None,
    every_layer: bool = False,
) -> np.ndarray:
    """The detections of the whole dataset in its order [1 or L, n, 7]: each process does its share, and gets all.

    `progress` is called with the number of images after each image of this process.
    """
    mine = range(process.rank, len(dataset), process.num_processes)
    found: list[np.ndarray] = []
    for rows in detect_each(model, dataset, mine, size_multiple, process.device, every_layer):
        found.append(rows)
        progress(1)
    parts = process.all_gather(found)
    ordered = [parts[index % len(parts)][index // len(parts)] for index in range(len(dataset))]
    num_layers = model.config.num_decoder_layers if every_layer else 1
    return np.concatenate(ordered, axis=1) if ordered else np.zeros((num_layers, 0, COLUMNS))
