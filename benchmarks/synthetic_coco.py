"""Drawn data of COCO's full size and shape, without a fault: python benchmarks/synthetic_coco.py FOLDER [--folders]

118,287 and 5,000 small JPEGs, 860,001 and 36,781 objects with polygons: the JSON is as large as COCO's, 448 MB and
20 MB, and as long to parse; only the pictures are small. The same arguments give the same bytes.
"""

import argparse
import io
import json
import multiprocessing
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((64, 48), (48, 64), (64, 64), (80, 56))  # width, height, in turn
GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # COCO numbers its 80 categories 1 to 90
CATEGORY_IDS = np.array([number for number in range(1, 91) if number not in GAPS])
CORNERS = 29  # of a polygon, so that an annotation takes as many bytes as COCO's
CHUNK = 5000
HUNDREDTHS = [f"{value // 100}.{value % 100:02}" for value in range(100 * max(map(max, SIZES)) + 1)]


def write_synthetic(
    folder: Path,
    num_train: int = 118_287,
    num_val: int = 5_000,
    num_train_annotations: int = 860_001,
    num_val_annotations: int = 36_781,
    folders: bool = False,
) -> None:
    """Writes `{train,val}.zip` of stored JPEGs and `instances_{train,val}.json` into `folder`.

    With `folders` the same pictures also as single files in `train/` and `val/`. No two pictures have the same pixels,
    boxes lie inside their images, no image has an object twice, and 80 annotations have every category.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool() as pool:
        for split, first, count, num_annotations in (
            ("train", 0, num_train, num_train_annotations),
            ("val", num_train, num_val, num_val_annotations),
        ):
            numbers = range(first, first + count)
            parts = [numbers[k : k + CHUNK // 10] for k in range(0, count, CHUNK // 10)]
            pictures = (picture for part in pool.imap(_jpegs, parts) for picture in part)
            _write_pictures(folder, split, pictures, folders)
            owners, ranks = _owners(count, num_annotations, seed=first)
            chunks = [
                (first + owners[k : k + CHUNK], ranks[k : k + CHUNK], first * 100 + k)
                for k in range(0, num_annotations, CHUNK)
            ]
            with (folder / f"instances_{split}.json").open("w", encoding="utf-8") as file:
                file.write('{"info": {"description": "drawn", "year": 2017},"licenses": [{"id": 1,"name": "none"}],')
                file.write('"images": [')
                file.write(",".join(map(partial(_image_record, split), numbers)))
                file.write('],"annotations": [')
                for index, text in enumerate(pool.imap(_annotation_records, chunks)):
                    file.write("," * bool(index) + text)
                names = [{"supercategory": "thing", "id": int(k), "name": f"thing {k}"} for k in CATEGORY_IDS]
                file.write(f'],"categories": {json.dumps(names)}}}')


def image_id(number: int) -> int:
    return 9 + 4 * number


def file_name(number: int) -> str:
    return f"{image_id(number):012}.jpg"


def _write_pictures(folder: Path, split: str, pictures: Iterator[tuple[str, bytes]], folders: bool) -> None:
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(folder / f"{split}.zip", "w"))
        if folders:
            (folder / split).mkdir(exist_ok=True)
        for name, data in pictures:
            archive.writestr(zipfile.ZipInfo(f"{split}2017/{name}"), data)
            if folders:
                (folder / split / name).write_bytes(data)


def _jpegs(numbers: range) -> list[tuple[str, bytes]]:
    """(name, bytes) of each picture: noise, with its number in 20 bright or dark blocks of 8 pixels."""
    noise = np.random.default_rng(0).integers(64, 192, (128, 128, 3), dtype=np.uint8)
    found = []
    for number in numbers:
        width, height = SIZES[number % len(SIZES)]
        pixels = noise[number % 47 :, number % 43 :][:height, :width].copy()
        for bit in range(20):
            row, column = bit // 4 * 8, bit % 4 * 8
            pixels[row : row + 8, column : column + 8] = 255 * (number >> bit & 1)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        found.append((file_name(number), file.getvalue()))
    return found


def _owners(num_images: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The image of each annotation and its rank among all, in no order: images have 0 to 30 objects, 7 on average.

    Consecutive ranks belong to one image, so that categories by rank never meet twice in one.
    """
    generator = np.random.default_rng([seed, 1])
    weights = generator.random(num_images)
    ranks = generator.permutation(count)
    counts = generator.multinomial(count, weights / weights.sum())
    return np.repeat(np.arange(num_images), counts)[ranks], ranks


def _image_record(split: str, number: int) -> str:
    width, height = SIZES[number % len(SIZES)]
    name = file_name(number)
    return (
        f'{{"license": 1,"file_name": "{name}","coco_url": "http://images.cocodataset.org/{split}2017/{name}",'
        f'"height": {height},"width": {width},"date_captured": "2013-11-14 17:02:52",'
        f'"flickr_url": "http://farm7.staticflickr.com/6116/{6255196340 + number}_da26cf2c9e_z.jpg",'
        f'"id": {image_id(number)}}}'
    )


def _annotation_records(chunk: tuple[np.ndarray, np.ndarray, int]) -> str:
    """Annotations as JSON: polygons around a centre, their extents as boxes and their own areas, in 1/100 pixels."""
    numbers, ranks, seed = chunk
    generator = np.random.default_rng([seed, 2])
    sizes = 100 * np.array(SIZES)[numbers % len(SIZES)]  # [A, 2] width, height
    radii = generator.integers(400, 2000, (len(numbers), 2))
    centres = generator.integers(radii, sizes - radii + 1)
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    reach = radii[:, None] * generator.uniform(0.7, 1.0, (len(numbers), CORNERS, 1))
    corners = (centres[:, None] + reach * np.stack([np.cos(angles), np.sin(angles)], axis=1)).round().astype(int)
    low, high = corners.min(axis=1), corners.max(axis=1)
    x, y = corners[..., 0], corners[..., 1]
    areas = abs((x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(axis=1)) / 20000
    columns = zip(
        corners.reshape(len(numbers), -1).tolist(), areas.tolist(), numbers.tolist(),
        np.concatenate([low, high - low], axis=1).tolist(), CATEGORY_IDS[ranks % 80].tolist(), ranks.tolist(),
        strict=True,
    )  # fmt: skip
    decimal = HUNDREDTHS.__getitem__
    return ",".join(
        f'{{"segmentation": [[{",".join(map(decimal, polygon))}]],"area": {area!r},"iscrowd": 0,'
        f'"image_id": {image_id(number)},"bbox": [{",".join(map(decimal, box))}],"category_id": {category},'
        f'"id": {rank + 1}}}'
        for polygon, area, number, box, category, rank in columns
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--folders", action="store_true", help="the pictures as single files too")
    arguments = parser.parse_args()
    write_synthetic(arguments.folder, folders=arguments.folders)
