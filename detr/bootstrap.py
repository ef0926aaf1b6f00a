"""How sure an AP is: resampling the images. N images, C categories, R resamples, T = 10 IoU thresholds.

Detections are matched with the objects once, as COCO does; a resample then only weighs each image by the number of
times that it was drawn. A weighted AP equals that of a dataset in which each image stands as often as it weighs.
The matching is our own: hotcoco's is equal, and reading it from `eval_imgs`, a dictionary for each image and category,
takes 14 times as long and 7 times the memory (7.5 s and 1.9 GB for COCO's size, benchmarks/coco_eval.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from detr.annotation_file import read_truth
from detr.metrics import from_results

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 100  # per image and category
MAX_AREA = 1e10  # objects and detections of a larger area are none to COCO, as are those of a negative one
CHUNK = 100  # resamples at a time, which bounds memory


@dataclass(frozen=True)
class Matches:
    """Detections as matched with the objects of N images at T = 10 IoU thresholds, by category and falling score.

    row [D] is the place of each in what was given; category, image [D] are indices by ascending id; hit [D, T]: matched
    with an object; ignored [D, T]: neither right nor wrong, as matched with a crowd or of an area that COCO leaves out;
    objects [N, C] counts those to be found.
    """

    row: np.ndarray
    category: np.ndarray
    image: np.ndarray
    hit: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray


def match_detections(annotations: Path, detections: np.ndarray | list[dict]) -> Matches:
    """The matches of detections [n, 7], or in the form of COCO's results, with a COCO JSON file."""
    rows = from_results(detections) if isinstance(detections, list) else detections
    held = read_truth(annotations)
    image_ids, category_ids = np.sort(held.image_ids), held.category_ids
    num_images, num_categories = len(image_ids), len(category_ids)
    truth = np.column_stack([held.image_of, held.boxes_xywh, held.crowd, held.category_of, held.areas])
    known = np.isin(rows[:, 0], image_ids) & np.isin(rows[:, 6], category_ids)
    if not known.all():
        raise ValueError(f"detections {rows[~known][:3].tolist()} are of images or categories not in {annotations}")

    def keys(table: np.ndarray) -> np.ndarray:
        """Category and image as one number."""
        return np.searchsorted(category_ids, table[:, 6]) * num_images + np.searchsorted(image_ids, table[:, 0])

    passed = (truth[:, 5] != 0) | _is_outside(truth[:, 7])  # not to be found
    order = np.lexsort([passed, keys(truth)])  # within a key, these last
    truth, passed = truth[order], passed[order]
    row = np.lexsort([-rows[:, 5], keys(rows)])
    owner = keys(rows[row])
    rank = np.arange(len(rows)) - np.searchsorted(owner, owner)
    row, owner, rank = (x[rank < MAX_DETECTIONS] for x in (row, owner, rank))
    rows = rows[row]
    hit, ignored = _assign(rows[:, 1:5], owner, rank, truth[:, 1:5], keys(truth), truth[:, 5] != 0, passed)
    ignored |= ~hit & _is_outside(rows[:, 3] * rows[:, 4])[:, None]
    category, image = np.divmod(owner, max(num_images, 1))
    order = np.lexsort([-rows[:, 5], category])  # stable: among equal scores by image, as pycocotools
    objects = np.bincount(keys(truth)[~passed], minlength=num_images * num_categories)
    per_image = objects.reshape(num_categories, num_images).T
    return Matches(row[order], category[order], image[order], hit[order], ignored[order], per_image)


def _is_outside(area: np.ndarray) -> np.ndarray:
    return (area < 0) | (area > MAX_AREA)


def _assign(
    boxes: np.ndarray,
    owner: np.ndarray,
    rank: np.ndarray,
    truth: np.ndarray,
    holder: np.ndarray,
    crowd: np.ndarray,
    passed: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """hit, ignored [D, T]: each detection, best first, takes the free object of its key with the highest IoU.

    One that is passed over is taken when no other is; a crowd by any number. Of equal overlaps the later object counts,
    as in pycocotools.
    """
    detection, target, iou = _find_overlaps(boxes, owner, truth, holder, crowd)
    hit = np.zeros((len(boxes), len(IOU_THRESHOLDS)), dtype=bool)
    ignored, taken = hit.copy(), np.zeros((len(truth), len(IOU_THRESHOLDS)), dtype=bool)
    order = np.lexsort([target, detection, rank[detection]])
    turns = np.searchsorted(rank[detection[order]], np.arange(MAX_DETECTIONS + 1))
    for start, stop in pairwise(turns.tolist()):
        pairs = order[start:stop]
        if not len(pairs):
            continue
        d, g = detection[pairs], target[pairs]
        value = np.where(passed[g], iou[pairs], iou[pairs] + 2)[:, None]
        open_ = (iou[pairs, None] >= IOU_THRESHOLDS) & ~(taken[g] & ~crowd[g, None])
        value = np.where(open_, value, -1.0)  # [P, T]
        firsts = np.flatnonzero(np.r_[True, d[1:] != d[:-1]])
        group = np.cumsum(np.r_[True, d[1:] != d[:-1]]) - 1
        best = np.maximum.reduceat(value, firsts)
        last = np.maximum.reduceat(np.where(value == best[group], np.arange(len(d))[:, None], -1), firsts)
        which, threshold = np.nonzero(best >= 0)
        chosen = g[last[which, threshold]]
        taken[chosen, threshold] = True
        hit[d[firsts[which]], threshold] = ~passed[chosen]
        ignored[d[firsts[which]], threshold] = passed[chosen]
    return hit, ignored


def _find_overlaps(
    boxes: np.ndarray, owner: np.ndarray, truth: np.ndarray, holder: np.ndarray, crowd: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detection, object and IoU [P] of each pair of one key that overlaps enough for the lowest threshold.

    Over a crowd the share of the detection inside it counts.
    """
    first = np.searchsorted(holder, owner)
    number = np.searchsorted(holder, owner, side="right") - first
    detection = np.repeat(np.arange(len(boxes)), number)
    target = np.repeat(first, number) + np.arange(len(detection)) - np.repeat(np.cumsum(number) - number, number)
    a, b = boxes[detection], truth[target]
    sides = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    shared = sides.clip(min=0).prod(axis=1)
    area = a[:, 2:].prod(axis=1)
    whole = np.where(crowd[target], area, area + b[:, 2:].prod(axis=1) - shared)
    iou = np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
    near = iou >= IOU_THRESHOLDS[0]
    return detection[near], target[near], iou[near]


def rank_images(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images where detections or misses are wrong, worst first, and of those with hits, best first.

    By F1 at IoU 0.50; among equals those with more errors are worse and those with more hits better. Crowds, and what
    is detected on them, count as neither.
    """
    num_images, hit = len(matches.objects), matches.hit[:, 0]
    hits = np.bincount(matches.image[hit], minlength=num_images)
    invented = np.bincount(matches.image[~hit & ~matches.ignored[:, 0]], minlength=num_images)
    errors = invented + matches.objects.sum(axis=1) - hits
    ranked = np.lexsort([hits - errors, 2 * hits / np.maximum(2 * hits + errors, 1)])
    return ranked[errors[ranked] > 0], ranked[::-1][hits[ranked[::-1]] > 0]


def compute_weighted_ap(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """AP (0..1) [R] when image i counts weights[i, r] times, -1 where nothing is to be found; weights are [N, R]."""
    weights = np.ascontiguousarray(weights, dtype=np.float64)
    total, present = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    bounds = np.searchsorted(matches.category, np.arange(matches.objects.shape[1] + 1))
    found = csr_array(matches.objects.T.astype(np.float64)) @ weights  # [C, R]
    for wanted, (start, stop) in zip(found, pairwise(bounds.tolist()), strict=True):
        mean = np.zeros(weights.shape[1])
        for t in range(len(IOU_THRESHOLDS)):
            seen = ~matches.ignored[start:stop, t]
            mean += _average_precision(
                matches.image[start:stop][seen], matches.hit[start:stop, t][seen], wanted, weights
            )
        total += np.where(wanted > 0, mean / len(IOU_THRESHOLDS), 0)
        present += wanted > 0
    return np.where(present > 0, total / np.maximum(present, 1), -1.0)


def _average_precision(image: np.ndarray, hit: np.ndarray, wanted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of the precision envelope over the recall thresholds [R], of detections [d] by falling score.

    Precision matters at hits alone: the envelope has its steps there, and what comes after the last hit has no recall.
    """
    at = np.flatnonzero(hit)
    if not len(at):
        return np.zeros(weights.shape[1])
    errors = np.flatnonzero(~hit[: at[-1]])
    before = csr_array(  # which images' errors lie between a hit and the one before
        (np.ones(len(errors)), (np.searchsorted(at, errors), image[errors])), shape=(len(at), len(weights))
    )
    true = np.cumsum(weights[image[at]], axis=0)  # [hits, R]
    false = np.cumsum(before @ weights, axis=0)
    precision = true / (true + false + np.spacing(1))
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    recall = true / np.maximum(wanted, 1)
    reached = (recall * 100).astype(np.int64)  # the last threshold that it reaches, but for rounding
    reached -= RECALL_THRESHOLDS[reached] > recall
    reached += RECALL_THRESHOLDS[np.minimum(reached + 1, 100)] <= recall * (reached < 100)
    steps = np.diff(reached, axis=0, prepend=-1)
    return (steps * envelope).sum(axis=0) / len(RECALL_THRESHOLDS)


def bootstrap_ap(matches: Sequence[Matches], num_resamples: int, seed: int) -> np.ndarray:
    """APs (0..1) [len(matches), num_resamples] of models over the same random halves of the images.

    Differences between rows are paired. The AP of a half, drawn without replacement, lies about as far from that of all
    images as this lies from that of all images there could be; drawing all with replacement has no new image, and
    finds less spread than there is (benchmarks/ap_interval.py). Each row is shifted to have the AP of the images
    themselves as its mean. Raises ValueError for matches with different images or objects.

    AP itself is biased upward, by more than halves show, so an interval of 95% holds the AP of all images in 93 to 95%
    of sets with 3 classes (50 to 500 images; the bias at 500 is 0.0035, a quarter of the spread), in 90% with 20
    classes on 50 images, in 85% with 80. More resamples change nothing, and taking off the bias that halves show covers
    less often. The bias of two models cancels: intervals of differences hold them in 94 to 96%.
    Source: Shao and Wu, A General Theory for Jackknife Variance Estimation, Annals of Statistics 17, 1989.
    """
    objects = [m.objects for m in matches]
    if any(not np.array_equal(o, objects[0]) for o in objects[1:]):
        raise ValueError("the models were matched with different objects, expected the same annotations for all")
    drawn = draw_halves(len(objects[0]), num_resamples, seed)
    chunks = [slice(start, start + CHUNK) for start in range(0, num_resamples, CHUNK)]
    rows = []
    for m in matches:
        ap = compute_weighted_ap(m, np.ones((len(drawn), 1)))[0]
        found = np.concatenate([compute_weighted_ap(m, drawn[:, chunk]) for chunk in chunks])
        found = np.where(found < 0, ap, found)  # of halves without an object
        rows.append(found - found.mean() + ap)
    return np.array(rows)


def draw_halves(num_images: int, num_resamples: int, seed: int) -> np.ndarray:
    """Random halves of the images, each followed later by the other half: bool [N, R]."""
    half = np.tile(np.arange(num_images) < num_images // 2, (-(-num_resamples // 2), 1))
    half = np.random.default_rng(seed).permuted(half, axis=1).T
    return np.concatenate([half, ~half], axis=1)[:, :num_resamples]


def find_interval(values: np.ndarray, confidence: float, num_images: int, lowest: float = -1.0) -> tuple[float, float]:
    """The interval that holds the share `confidence` of the resampled APs or differences, in lowest..1.

    Where all are alike, as with one image or with an AP of 0, each side is as long as the share that images of another
    kind may have though none of these is one.
    """
    ends = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    if ends[0] == ends[1]:
        margin = 1 - ((1 - confidence) / 2) ** (1 / max(num_images, 1))
        ends += [-margin, margin]
    low, high = np.clip(ends, lowest, 1)
    return float(low), float(high)


def can_be_certain(num_images: int, confidence: float) -> bool:
    """Whether the images are so many that chance would hardly favour one of two equal models in all: 5 for 0.95."""
    return 0.5**num_images <= 1 - confidence
