"""Category names of any kind in every plot, picture, page, table and store."""

import json

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from detr.visualize import draw
from pipelines import figures, labels
from pipelines.data import page
from pipelines.evaluate import write_table
from pipelines.labels import LONGEST, find_fonts, make_drawable, picture_font, read_letters
from pipelines.register import class_metrics
from pipelines.registry.aliases import CLASS_AP
from pipelines.registry.tracking import connect, find_run, log_params
from pipelines.serving import predict
from tests.hostile import NAMES


def png(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("name", NAMES)
def test_a_label_is_one_short_line_of_letters_that_a_font_has(name):
    (label,) = make_drawable([name])
    assert len(label) > 0
    assert label.isprintable()
    assert set(label) <= set().union(*map(read_letters, find_fonts((name,))))
    assert len(name) > LONGEST or name.strip() in (label, "") or name != label


def test_letters_that_no_font_has_are_their_code_points(monkeypatch):
    monkeypatch.setattr(labels, "find_fonts", lambda names: (labels_font(),))
    assert make_drawable(["\u884c\u4eba", "K\u00e4se", "a\U0001f6b2b"]) == ["U+884C U+4EBA", "K\u00e4se", "a U+1F6B2 b"]


def test_names_of_western_europe_look_for_no_font(monkeypatch):
    letters = "".join(chr(code) for code in range(256) if chr(code).isprintable())
    assert set(letters) <= read_letters(labels_font())
    monkeypatch.setattr(labels, "find_fonts", None)
    assert make_drawable(["K\u00e4se", "a\nb", ""]) == ["K\u00e4se", "a b", "''"]
    assert picture_font(["K\u00e4se", "a\nb", ""]) is None


def labels_font():
    from matplotlib.font_manager import findfont

    return findfont(labels.FONT)


def test_every_name_stands_in_every_figure_without_a_warning(tmp_path):
    for some in np.array_split(NAMES, 3):
        figures.draw_precision_recall(np.full((10, 101, len(some), 4, 3), 0.5), [*some], tmp_path / "curves.png")
    figures.draw_confusion(np.ones((len(NAMES) + 1,) * 2, int), NAMES, tmp_path / "confusion.png")
    longest = max(NAMES, key=len)
    figures.draw_confusion(np.ones((2, 2), int), [longest], tmp_path / "one.png")


def test_a_name_is_text_and_no_mathematics_and_none_is_left_out(tmp_path):
    seen = {}
    for name in ("$x^2$", "x^2", "_x", "x"):
        figures.draw_precision_recall(np.full((10, 101, 1, 4, 3), 0.5), [name], tmp_path / "x.png")
        seen[name] = (tmp_path / "x.png").read_bytes()
    assert len(set(seen.values())) == 4


def test_a_persons_own_settings_of_matplotlib_change_nothing(tmp_path, monkeypatch):
    def bytes_of_a_figure():
        figures.draw_confusion(np.ones((3, 3), int), ["a", "b"], tmp_path / "x.png")
        return (tmp_path / "x.png").read_bytes()

    before = bytes_of_a_figure()
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "figure.facecolor": "red"}):
        assert bytes_of_a_figure() == before


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_drawn_on_pictures(name):
    image, box = torch.zeros(3, 60, 200, dtype=torch.uint8), torch.tensor([[5.0, 5.0, 100.0, 50.0]])
    assert draw(image, box, [0], make_drawable([name]), font=picture_font([name])).any()
    answer = {"boxes": [[5, 5, 50, 50]], "scores": [0.5], "labels": [name]}
    assert predict.draw(np.zeros((100, 200, 3), np.uint8), "PNG", answer, {}).startswith(b"\x89PNG")


def test_letters_beyond_western_europe_are_no_empty_boxes():
    def drawn(name):
        return draw(torch.zeros(3, 60, 200, dtype=torch.uint8), torch.tensor([[5.0, 5.0, 100.0, 50.0]]), [0],
                    make_drawable([name]), font=picture_font([name]))  # fmt: skip

    assert not torch.equal(drawn("\u043a\u043e\u0442"), drawn("\u043f\u0435\u0441"))
    assert picture_font(["cat", "K\u00e4se"]) is None


def test_every_name_stands_on_the_page_of_the_dataset(tmp_path):
    counts = {"class": dict.fromkeys(NAMES, 3), "box_centres": [[1]]}
    counts |= {key: {"all": 1} for key in page.TITLES}
    with labels.draw_plainly(NAMES):
        page._draw_charts(tmp_path, {"train": counts, "val": counts})
    assert png(tmp_path / "classes.png").any()


def test_every_name_is_a_metric_and_a_parameter_of_its_own_in_the_registry(local, tmp_path):
    rows = [[number, name, 5, number / 100] for number, name in enumerate(NAMES, start=1)]
    write_table(tmp_path / "per_class.csv", ["category_id", "name", "num_objects", "AP"], rows)
    found = class_metrics(tmp_path / "per_class.csv")
    assert sorted(found.values()) == [row[3] for row in rows]
    client = connect()
    run_id = find_run(client, "abc", "train abc")
    for name, value in found.items():
        assert name.startswith(CLASS_AP)
        client.log_metric(run_id, name, value)
    protected = {name: number / 100 for number, name in enumerate(NAMES, start=1)}
    for _ in range(2):
        log_params(client, run_id, {"register": {"protected": protected}})
    kept = client.get_run(run_id).data.params
    assert json.loads(kept["register.protected"]) == protected
