"""Padding of shuffled and of grouped micro-batches: python benchmarks/padding.py [--quick] [--annotations FILE]

Padded pixels per pixel of the paper's random views of 118,287 images of COCO's sizes, or of those of FILE, an
`instances_*.json`: micro-batches as they come from the shuffle beside those of like shapes among `train.group_window`
images. With several processes a step takes as long as the one with the most pixels, so that counts for all of them.
Among the figures: other windows; what they cost in randomness, as the standard deviation over batches of 64 of their
mean log size and log aspect, in multiples of that of shuffled ones; and the seconds that an epoch's order takes.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from authors import ROOT

from detr.coco import load_annotations
from detr.sampler import TrainSampler
from detr.train_config import TrainConfig
from detr.transforms import TrainTransform
from pipelines.params import from_document, merge_parameters

BATCH = 64
WINDOW = 1024  # train.group_window of presets/coco-detr-r50-fast.yaml
WINDOWS = (64, 128, 256, 512, 1024, 2048)
SIZES = {  # COCO's images by width and height: 260 of train2017, val2017 and val2014
    640: {480: 58, 427: 33, 426: 14, 428: 9, 424: 4, 425: 3, 429: 2, 444: 2, 449: 2, 478: 2, 479: 2, 483: 2, 359: 1,
          218: 1, 226: 1, 320: 1, 327: 1, 347: 1, 360: 1, 368: 1, 383: 1, 406: 1, 407: 1, 409: 1, 418: 1, 420: 1,
          421: 1, 433: 1, 457: 1, 464: 1, 482: 1, 484: 1, 485: 1, 489: 1, 491: 1, 498: 1, 512: 1, 540: 1, 573: 1,
          580: 1},
    500: {375: 10, 333: 4, 374: 3, 332: 2, 335: 2, 334: 1, 343: 1, 346: 1, 357: 1, 370: 1, 486: 1, 496: 1},
    480: {640: 20}, 426: {640: 5}, 427: {640: 4}, 428: {640: 4}, 425: {640: 3}, 333: {500: 3}, 375: {500: 3},
    359: {640: 2}, 448: {336: 2}, 600: {500: 1, 593: 1}, 400: {267: 1, 302: 1}, 213: {140: 1}, 320: {240: 1},
    334: {500: 1}, 358: {640: 1}, 389: {500: 1}, 409: {500: 1}, 424: {640: 1}, 443: {640: 1}, 449: {640: 1},
    450: {600: 1}, 460: {640: 1}, 469: {469: 1}, 478: {640: 1}, 502: {640: 1}, 516: {640: 1}, 520: {640: 1},
    565: {640: 1}, 586: {640: 1}, 614: {461: 1}, 621: {640: 1}, 638: {640: 1},
}  # fmt: skip


def micro_batches(views_hw: np.ndarray, micro_batch: int, window: int) -> np.ndarray:
    """The (height, width) [steps, micro-batches, images, 2] of an epoch's views, as the sampler deals them."""
    sampler = TrainSampler(len(views_hw), BATCH, micro_batch, 1, 0, 0, 1, 0, window, lambda epoch: views_hw)
    images = [index for keys in sampler for _, index in keys]
    return views_hw[images].reshape(-1, BATCH // micro_batch, micro_batch, 2)


def padding_ratio(views: np.ndarray, size_multiple: int, num_processes: int) -> float:
    """Padded pixels per pixel of the views, every process counting as the one with the most in each step."""
    sides = -(-views.max(2) // size_multiple) * size_multiple  # [steps, micro-batches, 2]
    padded = sides.prod(2) * views.shape[2]
    busiest = np.max([padded[:, rank::num_processes].sum(1) for rank in range(num_processes)], axis=0)
    return float(busiest.sum() * num_processes / views.prod(3).sum())


def spread(views: np.ndarray) -> np.ndarray:
    """The standard deviation over batches of a batch's mean log size and log aspect [2]."""
    height, width = np.log(views.reshape(len(views), -1, 2)).transpose(2, 0, 1)
    return np.array([(height + width).mean(1).std(), (height - width).mean(1).std()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run on 2,048 images")
    parser.add_argument("--annotations", type=Path, help="an instances JSON with the sizes of the images")
    arguments = parser.parse_args()
    sizes_hw = np.array([(height, width) for width, row in SIZES.items() for height in row for _ in range(row[height])])
    if arguments.annotations:
        sizes_hw = load_annotations(arguments.annotations).sizes_hw
    sizes_hw = np.resize(sizes_hw, (2048 if arguments.quick else 118_287, 2))  # repeats them
    transform = TrainTransform(
        from_document(merge_parameters(ROOT, "coco-detr-r50", []), "train", TrainConfig).transform, seed=0
    )
    started = time.perf_counter()
    views_hw = transform.view_sizes(sizes_hw, 0)
    figures: dict[str, float] = {"images": len(views_hw), "seconds, sizes of views": time.perf_counter() - started}
    ratios = {}
    print(f"{'padded pixels per pixel':44}{'shuffled':>12}{'grouped':>12}{'ratio':>9}")
    for micro_batch in (4, 8):
        shuffled = micro_batches(views_hw, micro_batch, 0)
        started = time.perf_counter()
        grouped = micro_batches(views_hw, micro_batch, WINDOW)
        figures[f"seconds, order of {micro_batch}"] = time.perf_counter() - started
        for size_multiple in (1, 32):
            for num_processes in (1, 2, 4, 8, 16):
                if num_processes > BATCH // micro_batch:
                    continue
                what = f"{micro_batch} images, multiples of {size_multiple}"
                if num_processes > 1:
                    what += f", {num_processes} processes"
                before, after = (padding_ratio(views, size_multiple, num_processes) for views in (shuffled, grouped))
                print(f"{what:44}{before:>12.3f}{after:>12.3f}{before / after:>8.2f}x")
                ratios[what] = round(before / after, 3)
                figures[f"{what}, shuffled"], figures[f"{what}, grouped"] = before, after
        for window in WINDOWS:
            views = micro_batches(views_hw, micro_batch, window)
            figures[f"{micro_batch} images, window {window}"] = padding_ratio(views, 1, 1)
            size, aspect = spread(views) / spread(shuffled)
            figures[f"{micro_batch} images, window {window}, spread of size"] = float(size)
            figures[f"{micro_batch} images, window {window}, spread of aspect"] = float(aspect)
            what, after = f"{micro_batch} images, window of {window}", figures[f"{micro_batch} images, window {window}"]
            print(f"{what:56}{after:>12.3f}   spread of size {size:.2f}x, of aspect {aspect:.2f}x")
    rounded = {what: round(value, 4) for what, value in figures.items()}
    print(json.dumps({"benchmark": "padding", "ratios": {"shuffled": ratios}, "figures": rounded}))


if __name__ == "__main__":
    main()
