"""A page that shows a dataset: what it counts, how it is distributed, and annotated pictures of every class.

The same bytes for the same data: no times, no names of machines.
"""

import html
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from detr.pixels import decode_pixels
from pipelines.data.pictures import find, list_members, open_archive, pictures_of, read
from pipelines.data.tables import SPLITS
from pipelines.labels import draw_plainly, make_drawable

CELL = 192  # pixels of a picture on a contact sheet, per side
COLUMNS = 6
TITLES = {
    "objects_per_image": "objects per image",
    "aspect_ratio": "width by height of boxes",
    "relative_side": "size of boxes (root of their share of the image)",
    "image_side": "size of images (root of their pixels)",
    "area": "COCO's sizes of objects (small: below 32x32 pixels, large: from 96x96)",
}
STYLE = """body{font:15px/1.4 sans-serif;margin:2em auto;max-width:1200px;padding:0 1em}table{border-collapse:collapse}
td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}
img{max-width:100%}"""


def write_page(
    folder: Path, data: Path, tables: dict[str, pd.DataFrame], counts: dict[str, dict[str, Any]], num_examples: int
) -> None:
    """Writes `index.html` and its pictures into `folder`, from tables that keep the rules and their `counts`.

    Contact sheets show up to `num_examples` training pictures per class, evenly spread over the images that have it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with draw_plainly(counts["train"]["class"]):
        _draw_charts(folder, counts)
    sheets = _draw_sheets(folder, pictures_of(data, "train"), tables, num_examples)
    rows = ["images", "annotations", "crowds", "images_without_objects"]
    numbers = _table(["", *SPLITS], [[row.replace("_", " "), *(counts[s][row] for s in SPLITS)] for row in rows])
    classes = {name: [counts[split]["class"].get(name, 0) for split in SPLITS] for name in counts["train"]["class"]}
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Dataset</title><style>{STYLE}</style>",
        f"<h1>Dataset</h1>{numbers}<h2>Classes</h2><img src=classes.png alt='objects of each class'>",
        "<h2>Sizes and shapes</h2><img src=distributions.png alt='histograms'>",
        "<h2>Where boxes have their centres</h2><img src=centres.png alt='heat maps'>",
        "<h2>Training pictures of each class</h2>",
    ]
    for name, (train, val) in classes.items():
        parts.append(f"<h3>{html.escape(name)}</h3><p>{train} training objects, {val} validation objects</p>")
        if name in sheets:
            parts.append(f"<img loading=lazy src={sheets[name]} alt='pictures with boxes'>")
    (folder / "index.html").write_text("\n".join(parts) + "</html>\n", encoding="utf-8")


def _table(head: list[str], rows: list[list[Any]]) -> str:
    def line(tag: str, cells: list[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _draw_charts(folder: Path, counts: dict[str, dict[str, Any]]) -> None:
    os.environ["MPLBACKEND"] = "Agg"  # a notebook may have left one that is not here
    from matplotlib.figure import Figure

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / name, metadata={"Software": None})

    by_class = sorted(counts["train"]["class"].items(), key=lambda pair: -pair[1])
    names = [name for name, _ in by_class]
    figure = Figure((12, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    _bars(axes, make_drawable(names), [[counts[split]["class"].get(name, 0) for name in names] for split in SPLITS])
    axes.set(yscale="log" if by_class and by_class[0][1] > 1000 else "linear", ylabel="objects")
    axes.tick_params(axis="x", labelrotation=90, labelsize=8 if len(names) <= 100 else 4)
    save(figure, "classes.png")

    figure = Figure((12, 10), dpi=100, layout="constrained")
    for axes, (key, title) in zip(figure.subplots(3, 2).flat, TITLES.items(), strict=False):
        bins = list(counts["train"][key])
        shares = [np.array([counts[s][key][name] for name in bins]) for s in SPLITS]
        _bars(axes, bins, [values / max(1, values.sum()) for values in shares])
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("share")
        axes.tick_params(axis="x", labelrotation=30, labelsize=8)
    figure.axes[-1].set_axis_off()
    save(figure, "distributions.png")

    figure = Figure((12, 5.5), dpi=100, layout="constrained")
    for axes, split in zip(figure.subplots(1, 2), SPLITS, strict=True):
        axes.imshow(counts[split]["box_centres"], extent=(0, 1, 1, 0), cmap="magma")
        axes.set(title=split, xlabel="x", ylabel="y")
    save(figure, "centres.png")


def _bars(axes: Any, names: list[str], values: list[Any]) -> None:
    """Bars of both splits side by side."""
    places = np.arange(len(names))
    for offset, split, heights in zip((-0.2, 0.2), SPLITS, values, strict=True):
        axes.bar(places + offset, heights, 0.4, label=split)
    axes.set_xticks(places, names)
    axes.margins(x=0.01)
    axes.legend()


def _draw_sheets(folder: Path, path: Path, tables: dict[str, pd.DataFrame], num_examples: int) -> dict[str, str]:
    """A JPEG of training pictures for each class that has some; file names by class."""
    images, annotations = tables["train_images"], tables["train_annotations"]
    seen = ((images["digest"] != b"") & images["whole"] & images["decodes"]).to_numpy()
    owned = annotations["owner"].to_numpy()
    objects = annotations[(annotations["crowd"] == 0) & annotations["has_size"] & (owned >= 0) & seen[owned]]
    chosen = {}
    for category, name in tables["train_categories"][["id", "name"]].itertuples(index=False):
        mine = objects[(objects["category_id"] == category).to_numpy(bool)]
        owners = np.unique(mine["owner"].to_numpy())
        picked = owners[np.linspace(0, len(owners) - 1, min(num_examples, len(owners))).round().astype(int)]
        if len(picked):
            chosen[name] = f"class_{category}.jpg", picked, mine[mine["owner"].isin(picked)]
    rows = sorted({int(row) for _, picked, _ in chosen.values() for row in picked})
    found = {
        row: first
        for row, (first, *_) in zip(rows, find(images["file_name"].iloc[rows], list_members(path)), strict=True)
    }
    with open_archive(path) as archive:
        for file, picked, mine in chosen.values():
            sheet = Image.new("RGB", (COLUMNS * CELL, -(-len(picked) // COLUMNS) * CELL), "white")
            for place, row in enumerate(picked.tolist()):
                boxes = mine.loc[mine["owner"] == row, ["x", "y", "width", "height"]].to_numpy(float)
                try:
                    cell = _cell(read(path, archive, found[row]), boxes)
                except ValueError as error:
                    raise ValueError(
                        f"{found[row].name} {error}; mend it, and find others like it by a higher "
                        "validate.decoded_share"
                    ) from error
                sheet.paste(cell, (place % COLUMNS * CELL, place // COLUMNS * CELL))
            sheet.save(folder / file, quality=85, subsampling=0)
    return {name: file for name, (file, *_) in chosen.items()}


def _cell(data: bytes, boxes_xywh: np.ndarray) -> Image.Image:
    """The picture with its boxes [n, 4] in pixels, within CELL x CELL."""
    image = Image.fromarray(decode_pixels(data))
    width = image.width
    image.thumbnail((CELL - 4, CELL - 4))
    scale = image.width / width
    pen = ImageDraw.Draw(image)
    for x, y, w, h in (boxes_xywh * scale).tolist():
        pen.rectangle((x, y, max(x, x + w - 1), max(y, y + h - 1)), outline="red", width=2)
    return image
