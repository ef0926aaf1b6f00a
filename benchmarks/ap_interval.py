"""How often the interval of AP holds the AP of all images there could be: python benchmarks/ap_interval.py [--quick]

Of a drawn population of 10,000 images, sets of 50, 150 and 500 are drawn again and again. Each has an interval of 95%
of a detector's AP, and of the gain of a second detector over it, by random halves of the images (detr/bootstrap.py) and
by the usual bootstrap, which draws as many images with replacement: its percentiles as they are, shifted to the AP, and
shifted by as much again as they lie above it. Counted are the sets whose interval holds the population's AP or gain,
and those in which the gate would find a detector better by more than it is, which should be 5%.
Populations: 3 classes and 2 objects an image; 3 classes, two of them rare, and 13 objects; 20 classes, from many to
few, and 5 objects; 80 classes of COCO's shares and 7 objects. In each, images, objects and classes differ in how hard
they are, and scores go with the overlap.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from detr.bootstrap import IOU_THRESHOLDS, Matches, bootstrap_ap, compute_weighted_ap, find_interval

NUM_IMAGES = 10_000
CONFIDENCE = 0.95
GAIN = 0.1  # in the logit of the overlap
POPULATIONS = {  # shares of the classes, objects of an image, false detections of an image
    "3 classes": (np.ones(3), 2, 3),
    "3 classes, 2 rare": (np.array([85, 8, 7]), 13, 10),
    "20 classes": (1 / np.arange(1, 21), 5, 8),
    "80 classes": (1 / np.arange(1, 81), 7, 10),
}


def draw_detectors(kind: str, seed: int) -> tuple[Matches, Matches]:
    """Two detectors' matches with the objects of a population, the second a little better."""
    shares, per_image, false = POPULATIONS[kind]
    shares, num_classes = shares / shares.sum(), len(shares)
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(NUM_IMAGES), rng.poisson(per_image * rng.gamma(2, 0.5, NUM_IMAGES)))
    label = rng.choice(num_classes, len(owner), p=shares)
    first = np.searchsorted(owner, owner)
    label = np.where(rng.random(len(owner)) < 0.4, label[first], label)  # an image has much of one class
    ease = 1 - rng.normal(0, 0.7, NUM_IMAGES)[owner] - rng.normal(0, 1, len(owner))
    ease -= rng.normal(0, 0.5, num_classes)[label]
    objects = np.zeros((NUM_IMAGES, num_classes), dtype=np.int64)
    np.add.at(objects, (owner, label), 1)

    def detect(gain: float) -> Matches:
        skill = ease + gain + rng.normal(0, 0.7, len(owner))
        score = _share(skill + rng.normal(0, 1, len(owner)))
        right = rng.random(len(owner)) < _share(skill + 2.5)
        category = np.where(right, label, rng.choice(num_classes, len(owner), p=shares))
        hit = (_share(skill + 0.6)[:, None] >= IOU_THRESHOLDS) & right[:, None]
        double = rng.random(len(owner)) < 0.25
        place = np.repeat(np.arange(NUM_IMAGES), rng.poisson(false, NUM_IMAGES))
        category = np.r_[category, label[double], rng.choice(num_classes, len(place), p=shares)]
        image = np.r_[owner, owner[double], place]
        score = np.r_[score, score[double] * rng.random(double.sum()), rng.beta(1, 5, len(place))]
        hit = np.r_[hit, np.zeros((len(image) - len(hit), len(IOU_THRESHOLDS)), dtype=bool)]
        order = np.lexsort([-score, category])
        return Matches(order, category[order], image[order], hit[order], np.zeros_like(hit), objects)

    return detect(0), detect(GAIN)


def _share(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


def choose(matches: Matches, images: np.ndarray) -> Matches:
    """Those of some images."""
    place = np.full(len(matches.objects), -1)
    place[images] = np.arange(len(images))
    kept = place[matches.image] >= 0
    rows = (matches.row[kept], matches.category[kept], place[matches.image[kept]], matches.hit[kept])
    return Matches(*rows, matches.ignored[kept], matches.objects[images])


def resample(pair: list[Matches], aps: np.ndarray, num_resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Resampled APs of two detectors [2, R] by each method."""
    num_images = len(pair[0].objects)
    shares = np.full(num_images, 1 / num_images)
    drawn = np.random.default_rng(seed).multinomial(num_images, shares, num_resamples).T
    plain = np.array([compute_weighted_ap(matches, drawn) for matches in pair])
    above = plain.mean(axis=1, keepdims=True) - aps[:, None]
    return {
        "halves": bootstrap_ap(pair, num_resamples, seed),
        "bootstrap": plain,
        "shifted to the AP": plain - above,
        "shifted by the bias": plain - 2 * above,
    }


def measure(kind: str, num_images: int, num_sets: int, num_resamples: int, seed: int) -> dict:
    """Shares of the sets by method: AP and gain in their intervals, gain taken for more than it is; and mean width."""
    everyone = draw_detectors(kind, seed)
    rng = np.random.default_rng(seed + 1)

    def ap_of(pair: Sequence[Matches]) -> np.ndarray:
        return np.array([compute_weighted_ap(matches, np.ones((len(matches.objects), 1)))[0] for matches in pair])

    true, bias = ap_of(everyone), 0.0
    counts: dict[str, np.ndarray] = {}
    for number in range(num_sets):
        images = rng.choice(NUM_IMAGES, num_images, replace=False)
        pair = [choose(matches, images) for matches in everyone]
        aps = ap_of(pair)
        bias += (aps[0] - true[0]) / num_sets
        for method, found in resample(pair, aps, num_resamples, number).items():
            low, high = find_interval(found[0], CONFIDENCE, num_images, lowest=0)
            gains, gain = found[1] - found[0], true[1] - true[0]
            least, most = find_interval(gains, CONFIDENCE, num_images)
            promoted = np.mean(gains > gain) >= CONFIDENCE
            row = (low <= true[0] <= high, least <= gain <= most, promoted, high - low)
            counts[method] = counts.get(method, 0) + np.array(row, dtype=float) / num_sets
    return {"AP": true[0], "gain": true[1] - true[0], "bias": bias, "shares": counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 2 sets of 50 images of each population")
    parser.add_argument("--population", choices=POPULATIONS, help="this one alone")
    parser.add_argument("--sets", type=int, default=200, help="of each size")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes, sets, resamples = ((50,), 2, 20) if arguments.quick else ((50, 150, 500), arguments.sets, 400)
    figures, wider = {}, []
    print(f"{'':<20}{'images':>7}  {'AP (bias)':<16}{'by':<22}{'AP':>7}{'gain':>7}{'promoted':>10}{'width':>8}")
    for kind in [arguments.population] if arguments.population else POPULATIONS:
        for size in sizes:
            found = measure(kind, size, sets, resamples, arguments.seed)
            for method, (ap, gain, promoted, width) in found["shares"].items():
                start = f"{kind:<20}{size:>7}  {found['AP']:.3f} ({found['bias']:+.4f}) "
                print(f"{start}{method:<22}{ap:>7.1%}{gain:>7.1%}{promoted:>10.1%}{width:>8.3f}", flush=True)
            figures[f"{kind}, {size} images"] = {
                "bias": found["bias"],
                **{method: dict(zip(("AP", "gain", "promoted", "width"), map(float, row), strict=True))
                   for method, row in found["shares"].items()},
            }  # fmt: skip
            shares = found["shares"]
            wider.append(float(shares["halves"][3] / shares["bootstrap"][3]))
    ratios = {"bootstrap": float(np.mean(wider))}  # of the widths
    print(json.dumps({"benchmark": "ap_interval", "ratios": ratios, "figures": figures}))


if __name__ == "__main__":
    main()
