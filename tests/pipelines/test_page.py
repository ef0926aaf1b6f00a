import io
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from pipelines.data.distribution import compute_statistics
from pipelines.data.page import CELL, COLUMNS, write_page
from pipelines.data.tables import tabulate


def page(data, folder, num_examples):
    tables = tabulate(data, 1.0, 0.0)
    write_page(folder, data, tables, compute_statistics(tables), num_examples)
    return (folder / "index.html").read_text(encoding="utf-8")


def opened(path):
    return Image.open(io.BytesIO(path.read_bytes()))


def test_the_page_shows_numbers_charts_and_every_class(drawn, tmp_path):
    text = page(drawn, tmp_path / "page", 4)
    counts = compute_statistics(tabulate(drawn, 1.0, 0.0))
    for name, number in counts["train"]["class"].items():
        assert f"<h3>{name}</h3><p>{number} training objects, {counts['val']['class'][name]} validation objects" in text
    shown = set(re.findall(r"src=(\S+)", text))
    assert shown == {path.name for path in (tmp_path / "page").iterdir()} - {"index.html"}
    assert {"classes.png", "distributions.png", "centres.png"} <= shown
    assert len(shown) == 3 + 5
    assert "http" not in text


def test_boxes_are_drawn_where_the_annotations_have_them(drawn, tmp_path):
    page(drawn, tmp_path / "page", 1)
    for path in (tmp_path / "page").glob("class_*.jpg"):
        sheet = np.asarray(opened(path)).astype(int)
        assert sheet.shape == (CELL, COLUMNS * CELL, 3)
        red = (sheet[..., 0] > 180) & (sheet[..., 1:].max(axis=2) < 90)
        assert red[:, :CELL].sum() > 40
        assert not red[:, CELL:].any()


@pytest.mark.parametrize("num_examples", [0, 7])
def test_the_number_of_examples_is_a_parameter(drawn, tmp_path, num_examples):
    page(drawn, tmp_path / "page", num_examples)
    sheets = list((tmp_path / "page").glob("class_*.jpg"))
    assert len(sheets) == (5 if num_examples else 0)
    heights = [opened(path).height for path in sheets]
    assert max(heights, default=0) == -(-num_examples // COLUMNS) * CELL


def test_folders_give_the_same_page(drawn, source, tmp_path):
    page(drawn, tmp_path / "one", 3)
    for split in ("train", "val"):
        with zipfile.ZipFile(source / f"{split}.zip") as archive:
            archive.extractall(source / split)
        (source / f"{split}.zip").unlink()
    page(source, tmp_path / "two", 3)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_name_is_text_not_markup(source, tmp_path):
    for split in ("train", "val"):
        path = source / f"instances_{split}.json"
        path.write_text(path.read_text(encoding="utf-8").replace('"ellipse"', '"<script>ä"'), encoding="utf-8")
    assert "<h3>&lt;script&gt;ä</h3>" in page(source, tmp_path / "page", 1)


def test_a_picture_that_was_not_decoded_before_and_does_not_is_named(source, tmp_path):
    with zipfile.ZipFile(source / "train.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(source / "train.zip", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(b"\xff\xdb", b"\xff\xfe"))  # a JPEG without its tables
    with pytest.raises(
        ValueError, match=r"\d+\.jpg is damaged: cannot decode image data; mend it, and find others like it by a "
    ):
        page(source, tmp_path / "page", 3)
