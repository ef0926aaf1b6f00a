"""The input pipeline beside the authors' code: python benchmarks/input_pipeline.py [--quick] [--images FOLDER]

Decoding, the paper's train transform, normalisation and batches of 4, in one process with one thread, on 640x480 JPEGs:
those of FOLDER, or drawn ones. Normalisation is a row of its own, because with a GPU it runs there.
"""

import argparse
import io
import random
from pathlib import Path

import numpy as np
import torch
from authors import ROOT, importable, install, interleaved, report
from PIL import Image, ImageFilter

from detr.batch import Sample, collate, normalize
from detr.coco import decode
from detr.train import TrainConfig
from detr.transforms import TrainTransform
from pipelines.params import from_document, merged

BATCH = 4
SIZE = (640, 480)


def drawn(count: int) -> list[bytes]:
    """JPEGs of about COCO's size, 160 kB: noise, blurred and sharp."""
    files = []
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        image = Image.blend(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(6)), Image.fromarray(noise), 0.15)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one batch, once")
    parser.add_argument("--images", type=Path, help="a folder of JPEGs, of which those of 640x480 are read")
    arguments = parser.parse_args()
    install()
    torch.set_num_threads(1)
    num_images, rounds = (BATCH, 1) if arguments.quick else (32, 7)
    if arguments.images:
        files = [path.read_bytes() for path in sorted(arguments.images.glob("*.jpg")) if Image.open(path).size == SIZE]
    else:
        files = drawn(num_images)
    files = files[: min(num_images, len(files) // BATCH * BATCH)]
    with importable():
        from datasets.coco import ConvertCocoPolysToMask, make_coco_transforms  # type: ignore[import-not-found]
        from util.misc import collate_fn  # type: ignore[import-not-found]
    their_transform, prepare = make_coco_transforms("train"), ConvertCocoPolysToMask()
    records = [
        {"bbox": [40.0 * k, 30.0 * k, 100.0, 120.0], "category_id": 1, "area": 1.0, "iscrowd": 0} for k in range(7)
    ]
    boxes = torch.tensor([record["bbox"] for record in records])
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.zeros(7, dtype=torch.int64)
    transform = TrainTransform(from_document(merged(ROOT, "coco-detr-r50", []), "train", TrainConfig).transform, seed=0)
    memory = torch.empty(0)
    epoch = 0

    def authors() -> None:
        random.seed(epoch)
        torch.manual_seed(epoch)
        samples = []
        for index, data in enumerate(files):
            target = {"image_id": index, "annotations": records}
            samples.append(their_transform(*prepare(Image.open(io.BytesIO(data)).convert("RGB"), target)))
        for start in range(0, len(samples), BATCH):
            collate_fn(samples[start : start + BATCH])

    def ours(normalized: bool) -> None:
        for start in range(0, len(files), BATCH):
            samples = []
            for index, data in enumerate(files[start : start + BATCH], start):
                image, kept, kinds = transform(decode(data, str(index)), boxes, labels, (epoch, index))
                samples.append(Sample(image, kept, kinds, index, SIZE[::-1]))
            batch = collate(samples)
            if normalized:
                normalize(batch.images, batch.padding, memory)

    sides = {"authors": authors, "normalised": lambda: ours(True), "to be": lambda: ours(False)}
    seconds = interleaved(sides, rounds)
    each = {name: 1000 * value / len(files) for name, value in seconds.items()}
    rows = [
        ("with normalisation on the CPU", each["authors"], each["normalised"]),
        ("with normalisation left to the device", each["authors"], each["to be"]),
    ]
    kilobytes = round(sum(map(len, files)) / len(files) / 1000)
    report("input_pipeline", rows, "ms", {"images": len(files), "kilobytes per image": kilobytes})


if __name__ == "__main__":
    main()
