"""Pictures of an evaluation as small data URLs, so that they are seen where the files and MLflow are not."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

WIDTH = 960  # pixels of a picture, or of two beside each other
GAP = 8  # pixels between pictures
SIDES = "validation images; in each the truth on the left, what was detected on the right"
PICTURES = {
    "precision-recall": ("precision_recall.png", "Precision and recall on the validation images"),
    "worst-images": ("worst_*.png", f"The worst {SIDES}"),
    "best-images": ("best_*.png", f"The best {SIDES}"),
    "confusion": ("confusion.png", "What was taken for what"),
}


def collect_pictures(plots: Path) -> dict[str, tuple[str, str]]:
    """Data URL and description by key, of those that an evaluation has made."""
    found = {}
    for key, (pattern, description) in PICTURES.items():
        if paths := sorted(plots.glob(pattern)):
            found[key] = (draw_montage(paths), description)
    return found


def draw_montage(paths: Sequence[Path]) -> str:
    """Pictures in two columns as a JPEG, or a single one, a plot, as a PNG; as a data URL."""
    from PIL import Image

    columns = min(2, len(paths))
    images = [Image.open(path).convert("RGB") for path in paths]
    for image in images:
        image.thumbnail((WIDTH // columns, WIDTH // columns))
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    heights = [max(image.height for image in row) + GAP for row in rows]
    column = max(image.width for image in images) + GAP
    whole = Image.new("RGB", (column * columns - GAP, sum(heights) - GAP), "white")
    for number, row in enumerate(rows):
        for k, image in enumerate(row):
            whole.paste(image, (k * column, sum(heights[:number])))
    buffer, kind = io.BytesIO(), "png" if len(paths) == 1 else "jpeg"
    if kind == "png":
        whole.quantize(64).save(buffer, kind, optimize=True)
    else:
        whole.save(buffer, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
