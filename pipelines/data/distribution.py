"""How a dataset is distributed, as counts, and how far two datasets are apart."""

from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.distance import jensenshannon

from pipelines.data.tables import SPLITS

AREAS = {"small": 32.0**2, "medium": 96.0**2, "large": np.inf}  # COCO's, in pixels, each up to its bound
GRID = 24  # cells of the map of box centres, per side
LIMITS: dict[str, list[float]] = {  # upper bounds of the bins, but for a last one without bound
    "objects_per_image": [0, 1, 2, 4, 8, 16, 32, 64],
    "aspect_ratio": [1 / 8, 1 / 4, 1 / 2, 2 / 3, 1, 3 / 2, 2, 4, 8],  # width by height of a box
    "relative_side": [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2],  # root of a box's share of its image
    "image_side": [128, 256, 384, 512, 640, 800, 1024, 2048],  # root of an image's pixels
}


def compute_statistics(tables: dict[str, pd.DataFrame]) -> dict[str, dict[str, Any]]:
    """Per split: numbers of images, annotations, crowds and empty images, and counts by class and by bin.

    Crowds and boxes without area count in the first numbers only. A pure function of the data.
    """
    return {split: _of_split(*(tables[f"{split}_{kind}"] for kind in ("images", "annotations", "categories")))
            for split in SPLITS}  # fmt: skip


def _of_split(images: pd.DataFrame, annotations: pd.DataFrame, categories: pd.DataFrame) -> dict[str, Any]:
    sizes = images[["width", "height"]].to_numpy(float, na_value=np.nan)
    objects = annotations[(annotations["crowd"] == 0) & annotations["has_size"] & (annotations["owner"] >= 0)]
    width, height, owner = (objects[key].to_numpy() for key in ("width", "height", "owner"))
    area = objects["area"].to_numpy()
    centres = np.stack([objects["x"] + width / 2, objects["y"] + height / 2], axis=1) / sizes[owner]
    grid, _, _ = np.histogram2d(centres[:, 1], centres[:, 0], bins=GRID, range=((0, 1), (0, 1)))
    values = {
        "objects_per_image": np.bincount(owner, minlength=len(images)),
        "aspect_ratio": width / height,
        "relative_side": np.sqrt(width * height / sizes[owner].prod(axis=1)),
        "image_side": np.sqrt(sizes.prod(axis=1)),
    }
    bounds = [0.0, *AREAS.values()]
    return {
        "images": len(images),
        "annotations": len(annotations),
        "crowds": int((annotations["crowd"] == 1).sum()),
        "images_without_objects": int((images["num_objects"] == 0).sum()),
        "class": dict(zip(categories["name"].fillna(""), categories["num_objects"].tolist(), strict=True)),
        "area": {
            name: int(((area >= low) & (area < high)).sum())
            for name, low, high in zip(AREAS, bounds, bounds[1:], strict=False)
        },
        **{name: _binned(values[name], limits) for name, limits in LIMITS.items()},
        "box_centres": grid.astype(int).tolist(),
    }


def _binned(values: np.ndarray, limits: list[float]) -> dict[str, int]:
    counts = np.bincount(np.searchsorted(limits, values), minlength=len(limits) + 1)
    names = [f"up to {limit:.4g}" for limit in limits] + [f"above {limits[-1]:.4g}"]
    return dict(zip(names, counts.tolist(), strict=True))


def compute_distances(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How far two results of `compute_statistics` are apart, by "SPLIT DISTRIBUTION": Jensen-Shannon distances in 0..1.

    What two samples of one distribution differ by chance is taken off: (k - 1) (1/n + 1/m) / (8 ln 2) of the
    divergence in bits for n and m things in k bins (Lin 1991; its second-order term).
    """
    return {
        f"{split} {name}": _distance(*_aligned(ours[split][name], theirs[split][name]))
        for split in SPLITS
        for name in ("class", "area", *LIMITS)
    }


def _distance(p: np.ndarray, q: np.ndarray) -> float:
    n, m = p.sum(), q.sum()
    if not n or not m:
        return float(n != m)
    chance = (len(p) - 1) * (1 / n + 1 / m) / (8 * np.log(2))
    return float(np.sqrt(max(0.0, float(jensenshannon(p, q, base=2)) ** 2 - chance)))


def _aligned(ours: dict[str, int], theirs: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Counts of both over the bins that either has."""
    bins = [name for name in ours | theirs if ours.get(name) or theirs.get(name)]
    return np.array([ours.get(name, 0) for name in bins]), np.array([theirs.get(name, 0) for name in bins])
