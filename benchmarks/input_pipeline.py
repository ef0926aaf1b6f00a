"""The input pipeline beside the authors' code: python benchmarks/input_pipeline.py [--quick] [--images FOLDER]

Decoding, the paper's train transform, normalisation and batches of 4 on 640x480 JPEGs, those of FOLDER or drawn ones:
in one process with one thread, then by loaders with two workers, the authors' from single files, ours from an archive.
Normalisation is a row of its own, because with a GPU it runs there. Last, reading alone: our folder in the authors'
place, our archive, and among the figures a memory map of the archive.
"""

import argparse
import contextlib
import io
import json
import mmap
import os
import random
import statistics
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from authors import ROOT, importable, install, interleaved, report
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader

from detr.batch import Sample, collate, normalize
from detr.coco import CocoDataset, decode_image, load_annotations
from detr.images import ImageArchive, open_images
from detr.sampler import TrainSampler
from detr.train_config import TrainConfig
from detr.transforms import TrainTransform
from pipelines.params import from_document, merge_parameters

BATCH = 4
SIZE = (640, 480)
RECORDS = [{"bbox": [40.0 * k, 30.0 * k, 100.0, 120.0], "category_id": 1, "area": 1.0, "iscrowd": 0} for k in range(7)]
Rows = list[tuple[str, float, float]]


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


def write_dataset(folder: Path, files: list[bytes]) -> list[str]:
    """Names of the pictures, which it writes to `train/` and `train.zip`, with annotations, and out of memory."""
    names = [f"{index:012}.jpg" for index in range(len(files))]
    (folder / "train").mkdir()
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        for name, data in zip(names, files, strict=True):
            archive.writestr(f"train2017/{name}", data)
            (folder / "train" / name).write_bytes(data)
    images = [{"id": k, "file_name": name, "width": SIZE[0], "height": SIZE[1]} for k, name in enumerate(names)]
    records = [record | {"image_id": image["id"]} for image in images for record in RECORDS]
    annotations = [record | {"id": k} for k, record in enumerate(records, start=1)]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances_train.json").write_text(json.dumps(document), encoding="utf-8")
    return names


def in_process(files: list[bytes], transform: TrainTransform, rounds: int) -> Rows:
    """Milliseconds per picture in memory, the authors' and ours."""
    with importable():
        from datasets.coco import ConvertCocoPolysToMask, make_coco_transforms
        from util.misc import collate_fn
    their_transform, prepare = make_coco_transforms("train"), ConvertCocoPolysToMask()
    boxes = torch.tensor([record["bbox"] for record in RECORDS])
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.zeros(len(boxes), dtype=torch.int64)
    memory = torch.empty(0)
    epoch = 0

    def authors() -> None:
        random.seed(epoch)
        torch.manual_seed(epoch)
        samples = []
        for index, data in enumerate(files):
            target = {"image_id": index, "annotations": RECORDS}
            samples.append(their_transform(*prepare(Image.open(io.BytesIO(data)).convert("RGB"), target)))
        for start in range(0, len(samples), BATCH):
            collate_fn(samples[start : start + BATCH])

    def ours(normalized: bool) -> None:
        for start in range(0, len(files), BATCH):
            samples = []
            for index, data in enumerate(files[start : start + BATCH], start):
                image, kept, kinds = transform(decode_image(data, str(index)), boxes, labels, (epoch, index))
                samples.append(Sample(image, kept, kinds, index, SIZE[::-1]))
            batch = collate(samples)
            if normalized:
                normalize(batch.images, batch.padding, memory)

    sides = {"authors": authors, "normalised": lambda: ours(True), "to be": lambda: ours(False)}
    each = {name: 1000 * value / len(files) for name, value in interleaved(sides, rounds).items()}
    return [
        ("with normalisation on the CPU", each["authors"], each["normalised"]),
        ("with normalisation left to the device", each["authors"], each["to be"]),
    ]


def by_workers(folder: Path, transform: TrainTransform, rounds: int) -> Rows:
    """Milliseconds per picture of two loaders with two workers: the authors' of single files, ours of an archive."""
    with importable(), contextlib.redirect_stdout(io.StringIO()):
        from datasets.coco import CocoDetection, make_coco_transforms
        from util.misc import collate_fn

        annotations = folder / "instances_train.json"
        theirs = CocoDetection(folder / "train", str(annotations), make_coco_transforms("train"), return_masks=False)
    dataset = CocoDataset(load_annotations(annotations), open_images(folder / "train.zip"), transform)
    sampler = TrainSampler(len(dataset), BATCH, BATCH, epochs=0, seed=0, rank=0, num_processes=1)
    workers = {"num_workers": 2, "persistent_workers": True}
    their_loader = DataLoader(theirs, BATCH, shuffle=True, collate_fn=collate_fn, **workers)  # type: ignore[arg-type]
    loader: DataLoader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **workers)  # type: ignore[arg-type]
    memory = torch.empty(0)

    def authors() -> None:
        for _ in their_loader:
            pass

    def ours(normalized: bool) -> None:
        sampler.first_step = sampler.epochs * sampler.steps_per_epoch  # the next epoch, and no other read ahead
        sampler.epochs += 1
        for batch in loader:
            if normalized:
                normalize(batch.images, batch.padding, memory)

    sides = {"authors": authors, "normalised": lambda: ours(True), "to be": lambda: ours(False)}
    each = {name: 1000 * value / len(dataset) for name, value in interleaved(sides, rounds).items()}
    return [
        ("two workers, with normalisation on the CPU", each["authors"], each["normalised"]),
        ("two workers, normalisation left to the device", each["authors"], each["to be"]),
    ]


def reading(folder: Path, names: list[str], rounds: int) -> tuple[Rows, dict[str, float]]:
    """Milliseconds per picture of our readers, an eighth of the pictures in random order; and of a memory map."""
    files, archive = open_images(folder / "train"), ImageArchive(folder / "train.zip")
    sides: dict[str, Callable[[list[str]], object]] = {
        "files": lambda some: [files.read(name) for name in some],
        "archive": lambda some: [archive.read(name) for name in some],
        "map": lambda some: read_mapped(archive, some),
    }
    os.sync()
    rows, figures = [], {}
    for place in ("memory", "the disk"):
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            some = random.sample(names, len(names) // 8)
            for side, read in sides.items():
                if place == "the disk":
                    forget([archive.path, *(folder / "train" / name for name in some)])
                else:
                    read(some)
                started = time.perf_counter()
                read(some)
                seconds[side].append(time.perf_counter() - started)
        each = {side: 1000 * statistics.median(values) / len(some) for side, values in seconds.items()}
        rows.append((f"reading from {place}: single files, archive", each["files"], each["archive"]))
        figures[f"ms through a memory map from {place}"] = round(each["map"], 4)
    return rows, figures


def read_mapped(archive: ImageArchive, names: list[str]) -> None:
    with archive.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        for name in names:
            offset, size = archive.members[name]
            start = offset + 30 + sum(struct.unpack_from("<HH", whole, offset + 26))
            _ = whole[start : start + size]


def forget(paths: list[Path]) -> None:
    """Drops files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: two batches, once")
    parser.add_argument("--images", type=Path, help="a folder of JPEGs, of which those of 640x480 are read")
    arguments = parser.parse_args()
    install()
    torch.set_num_threads(1)
    num_images, rounds = (2 * BATCH, 1) if arguments.quick else (64, 7)
    if arguments.images:
        files = [path.read_bytes() for path in sorted(arguments.images.glob("*.jpg")) if Image.open(path).size == SIZE]
    else:
        files = drawn(num_images)
    files = files[: min(num_images, len(files) // BATCH * BATCH)]
    transform = TrainTransform(
        from_document(merge_parameters(ROOT, "coco-detr-r50", []), "train", TrainConfig).transform, seed=0
    )
    rows = in_process(files, transform, rounds)
    (ROOT / "scratch").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "scratch") as folder:
        (Path(folder) / "few").mkdir()
        (Path(folder) / "many").mkdir()
        write_dataset(Path(folder) / "few", files)
        rows += by_workers(Path(folder) / "few", transform, rounds)
        names = write_dataset(Path(folder) / "many", files * (1 if arguments.quick else 32))
        read_rows, figures = reading(Path(folder) / "many", names, rounds)
    kilobytes = round(sum(map(len, files)) / len(files) / 1000)
    report(
        "input_pipeline", rows + read_rows, "ms", {"images": len(files), "kilobytes per image": kilobytes, **figures}
    )


if __name__ == "__main__":
    main()
