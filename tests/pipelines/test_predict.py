"""Registered versions used by their own code: `python -m pipelines predict`, and their detections for the registry."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluate import EvaluateParams, evaluate
from pipelines.registry.packaging import compute_detections, load
from pipelines.serving.predict import draw, make_unused, open_list, replace_results
from tests import registered
from tests.running import ROOT, call, environment

pytestmark = pytest.mark.usefixtures("warm_python")


@pytest.fixture(scope="module")
def project(drawn, tmp_path_factory):
    """A folder with data, its evaluation, and two registered versions: the champion, and `other` by changed code."""
    root = tmp_path_factory.mktemp("predict")
    shutil.copytree(drawn, root / "data")
    model = registered.write_model(root / "trained", registered.categories(drawn))
    evaluate(EvaluateParams(0, 0.7, 0.95, 10, 0), root / "data", model, root / "evaluated")
    image = registered.pictures(drawn)[0]
    registered.register(root, model, "champion", image)
    changed = root / "changed"
    for name in ("detr", "pipelines"):
        shutil.copytree(ROOT / name, changed / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = changed / "detr/postprocess.py"
    path.write_text(
        path.read_text(encoding="utf-8").replace("return scores, labels", "return scores / 2, labels"), encoding="utf-8"
    )
    (changed / "detr/boxes.py").rename(changed / "detr/older_boxes.py")
    for path in (changed / "detr").glob("*.py"):
        path.write_text(path.read_text(encoding="utf-8").replace("detr.boxes", "detr.older_boxes"), encoding="utf-8")
    registered.register(root, model, "other", image, changed)
    shutil.rmtree(changed)
    (root / "images").mkdir()
    for number, data in enumerate(registered.pictures(drawn)):
        (root / "images" / f"{number:02d}.jpg").write_bytes(data)
    return root


def store(project):
    return f"sqlite:///{project}/mlflow.db"


def predict(folder, uri, *arguments, code=0):
    """What `python -m pipelines predict` prints, in `folder`."""
    return call(
        folder,
        "python",
        "-m",
        "pipelines",
        "predict",
        *map(str, arguments),
        code=code,
        PYTHONPATH=str(ROOT),
        MLFLOW_TRACKING_URI=uri,
    )


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def by_score(detections):
    return sorted(detections, key=lambda row: (row["image_id"], -row["score"]))


def assert_same_detections(found, expected):
    found, expected = by_score(found), by_score(expected)
    for key in ("image_id", "category_id"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    np.testing.assert_allclose([r["score"] for r in found], [r["score"] for r in expected], atol=2e-6)
    np.testing.assert_allclose([r["bbox"] for r in found], [r["bbox"] for r in expected], atol=0.021)


def test_detections_of_a_version_are_those_of_its_evaluation(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store(project))
    expected = read(project / "evaluated/detections.json")
    assert len(expected) == 12 * 5
    assert_same_detections(compute_detections("1", project / "data"), expected)


def test_detections_are_by_the_versions_own_code_also_from_a_folder(project, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store(project))
    shutil.copy(project / "data/instances_val.json", tmp_path)
    shutil.unpack_archive(project / "data/val.zip", tmp_path / "val")
    expected = read(project / "evaluated/detections.json")
    halved = [row | {"score": row["score"] / 2} for row in expected]
    assert_same_detections(compute_detections("2", tmp_path), halved)
    assert "detect: 100%" in capfd.readouterr().err


def change(document, what):
    if what == "more":
        document["categories"].append({"id": 99, "name": "kite"})
    elif what == "fewer":
        gone = document["categories"].pop(0)["id"]
        document["annotations"] = [a for a in document["annotations"] if a["category_id"] != gone]
    elif what == "renamed":
        document["categories"][0]["name"] = "kite"
    else:
        document["images"][0]["file_name"] = "missing.jpg"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("more", "detr version 1 gives no detections: it knows {n} categories, {data} has {more}; they differ in kite"),
        ("fewer", "detr version 1 gives no detections: it knows {n} categories, {data} has {fewer}; they differ in "),
        ("renamed", "it knows {n} categories, {data} has {n}; they differ in "),
        ("missing", "detr version 1 gives no detections: missing.jpg is 0 times in {data}/val.zip, expected once"),
    ],
)
def test_data_that_the_version_does_not_fit_is_an_error(project, tmp_path, monkeypatch, what, message):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store(project))
    data = Path(shutil.copytree(project / "data", tmp_path / "data"))
    document = read(data / "instances_val.json")
    count = len(document["categories"])
    change(document, what)
    (data / "instances_val.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match="gives no detections") as caught:
        compute_detections("1", data)
    assert message.format(data=data, n=count, more=count + 1, fewer=count - 1) in str(caught.value)


def test_pictures_are_drawn_and_listed(project, tmp_path):
    said = predict(tmp_path, store(project), project / "images", "--threshold", "0", "--output", "out")
    assert said.endswith(
        "12 of 12 pictures are in out, with 60 boxes of a score from 0; out/detections.json lists them\n"
    )
    assert "predict: 100%" in said
    listed = read(tmp_path / "out/detections.json")
    assert [list(item) for item in listed] == [["file", "picture", "boxes", "scores", "labels"]] * 12
    assert [item["file"] for item in listed] == [str(path) for path in sorted((project / "images").iterdir())]
    ids = [image["id"] for image in read(project / "data/instances_val.json")["images"]]
    kinds = {category["name"]: category["id"] for category in read(project / "data/instances_val.json")["categories"]}
    found = [
        {"image_id": image_id, "category_id": kinds[label], "bbox": [x, y, right - x, bottom - y], "score": score}
        for image_id, item in zip(ids, listed, strict=True)
        for (x, y, right, bottom), score, label in zip(item["boxes"], item["scores"], item["labels"], strict=True)
    ]
    assert_same_detections(found, read(project / "evaluated/detections.json"))
    for item in listed:
        with Image.open(item["file"]) as before, Image.open(tmp_path / "out" / item["picture"]) as after:
            assert (before.size, before.format) == (after.size, after.format)
            assert np.asarray(before.convert("RGB")).tolist() != np.asarray(after).tolist()


def test_any_registered_version_answers_by_its_own_code(project, tmp_path):
    picture = project / "images/00.jpg"
    for model, output in (("1", "one"), ("other", "two"), ("2", "three")):
        predict(tmp_path, store(project), picture, "--model", model, "--threshold", "0.3", "--output", output)
    (one,), (two,), (three,) = (read(tmp_path / name / "detections.json") for name in ("one", "two", "three"))
    assert two == three
    assert two["scores"] == pytest.approx([score / 2 for score in one["scores"]][: len(two["scores"])], abs=1e-6)


def test_names_folders_and_what_cannot_be_read(project, tmp_path):
    picture = (project / "images/00.jpg").read_bytes()
    for name in ("a/x.jpg", "b/x.jpg", "b/deep/er/X.JPG", "b/deep/y.jpeg", "no suffix"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    Image.open(io.BytesIO(picture)).save(tmp_path / "b/z.png")
    (tmp_path / "b/notes.txt").write_text("not a picture by its name", encoding="utf-8")
    (tmp_path / "b/bad.jpg").write_text("not a picture by its content", encoding="utf-8")
    (tmp_path / "b/cut.jpg").write_bytes(picture[:700])
    Image.open(io.BytesIO(picture)).save(tmp_path / "b/photo.webp")
    png = bytearray((tmp_path / "b/z.png").read_bytes())
    png[len(png) // 2] ^= 1
    (tmp_path / "b/flipped.png").write_bytes(png)
    given = ["a", "a/x.jpg", "b", "no suffix", "missing.jpg", "--output", "b/out"]
    said = predict(tmp_path, store(project), *given)
    left_out = [line for line in said.splitlines() if line.startswith("warning: ")]
    reasons = {
        "b/bad.jpg": "it is no picture: its 28 bytes begin neither as a JPEG nor as a PNG",
        "b/cut.jpg": "it is damaged or cut short: it does not end as a JPEG ends",
        "b/flipped.png": "it is damaged: the checksum of its chunk IDAT is wrong",
        "b/photo.webp": "it is a WEBP picture, expected a JPEG or PNG; convert it",
        "missing.jpg": "No such file or directory",
    }
    assert left_out == [f"warning: {name} is left out: {reason}" for name, reason in reasons.items()]
    assert "\n7 of 12 pictures are in b/out, with " in said
    written = {path.relative_to(tmp_path / "b/out").as_posix() for path in (tmp_path / "b/out").rglob("*.*")}
    names = {"x.jpg", "x_2.jpg", "x_3.jpg", "deep/er/X.JPG", "deep/y.jpeg", "z.png"}
    assert written == names | {"detections.json"}
    assert (tmp_path / "b/out/no suffix").exists()
    assert names | {"no suffix"} == {item["picture"] for item in read(tmp_path / "b/out/detections.json")}
    said = predict(tmp_path, store(project), "a", "--threshold", "1", "--output", "b/out")
    assert "1 of 1 pictures are in b/out, with 0 boxes of a score from 1; a lower --threshold may show some; " in said
    assert {path.name for path in (tmp_path / "b/out").rglob("*")} == {"x.jpg", "detections.json"}


def test_results_are_of_one_call_alone(tmp_path):
    """An earlier call's are replaced, by one that succeeds; what no call has made, as a person's notes, is left."""
    output = tmp_path / "out"

    def write(*names):
        with replace_results(output) as folder:
            with open_list(folder / "detections.json") as add:
                for name in names:
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).touch()
                    add({"file": "x", "picture": name})
            if not names:
                raise ValueError("none")

    def held():
        return {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}

    with pytest.raises(ValueError, match="none"):
        write()
    assert not output.exists()
    write("a/one.jpg", "two.jpg")
    assert held() == {"a/one.jpg", "two.jpg", "detections.json"}
    with pytest.raises(ValueError, match="none"):
        write()
    assert held() == {"a/one.jpg", "two.jpg", "detections.json"}
    (output / f"{2**22 + 1}.partial/b").mkdir(parents=True)  # of a call that was killed
    write("two.jpg", "c/three.jpg")
    assert held() == {"two.jpg", "c/three.jpg", "detections.json"}
    assert {path.name for path in output.iterdir()} == {"c", "two.jpg", "detections.json"}
    assert [item["picture"] for item in read(output / "detections.json")] == ["two.jpg", "c/three.jpg"]
    (output / "c/notes.txt").touch()
    with pytest.raises(
        ValueError, match="out, where c/notes.txt is no result of an earlier call; give an empty or new"
    ):
        write("two.jpg")
    assert "c/notes.txt" in held()


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"detections.json": '[{"image_id": 1}]'}, "where detections.json is no result of an earlier call"),
        ({"x/one.jpg": "", "detections.json": '[{"picture": "one.jpg"}]'}, "where x/one.jpg is no result"),
        ({"PID.partial/x": ""}, "process PID is writing to .*; wait for it, or give another"),
    ],
)
def test_what_else_lies_in_the_folder_of_results_is_kept(tmp_path, held, said):
    here = str(os.getpid())
    held, said = {name.replace("PID", here): text for name, text in held.items()}, said.replace("PID", here)
    for name, text in held.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said), replace_results(tmp_path):
        pass
    assert all((tmp_path / name).exists() for name in held)
    with pytest.raises(ValueError, match="--output is .*, a file; give a folder"), replace_results(tmp_path / name):
        pass


def test_memory_does_not_grow_with_the_number_of_pictures(project, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (1000, 1000, 3), dtype=np.uint8)
    (tmp_path / "first").mkdir()
    Image.fromarray(noise).save(tmp_path / "first/0.jpg", quality=95)
    shutil.copytree(tmp_path / "first", tmp_path / "all")
    for number in range(1, 80):
        os.link(tmp_path / "all/0.jpg", tmp_path / f"all/{number}.jpg")
    total = 80 * (tmp_path / "all/0.jpg").stat().st_size
    peaks = []
    for folder in ("first", "all"):
        process = subprocess.Popen(
            ["python", "-m", "pipelines", "predict", folder, "--output", f"{folder}-out"],
            cwd=tmp_path,
            env=environment(cold=True, PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=store(project)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks.append(usage.ru_maxrss * 1024)
    assert len(list((tmp_path / "all-out").glob("*.jpg"))) == 80
    assert total > 48 * 2**20
    assert peaks[1] - peaks[0] < 24 * 2**20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images", "--threshold", "1.5"], "error: --threshold is 1.5, expected a score in 0..1\n"),
        (["images", "--threshold", "nan"], "error: --threshold is nan, expected a score in 0..1\n"),
        (["empty"], "error: there are no .jpg, .jpeg, .png files in empty\n"),
        (["words.txt", "gone"], "error: none of 2 files could be read; expected JPEG or PNG pictures\n"),
        (
            ["images", "--model", "9"],
            " has no 9; versions of detr: 1, 2; aliases: champion (1), other (2)\n",
        ),
        (
            ["images", "--model", "best"],
            " has no best; versions of detr: 1, 2; aliases: champion (1), other (2)\n",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_one_line(project, tmp_path, arguments, message):
    (tmp_path / "images").symlink_to(project / "images")
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("words", encoding="utf-8")
    said = predict(tmp_path, store(project), *arguments, code=1)
    assert said.endswith(message)
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.json"))
    assert not list(tmp_path.rglob("*.partial"))


def test_without_a_registry_a_server_or_its_files(project, tmp_path):
    picture = project / "images/00.jpg"
    nothing = f"sqlite:///{tmp_path}/mlflow.db"
    said = predict(tmp_path, nothing, picture, code=1)
    assert said == f"error: nothing is registered yet: {nothing} does not exist; python -m pipelines run\n"
    assert not (tmp_path / "mlflow.db").exists()
    said = predict(tmp_path, "http://127.0.0.1:9", picture, code=1)
    assert said.startswith("error: MLflow at http://127.0.0.1:9 is unreachable (")
    assert said.endswith("); start it or unset MLFLOW_TRACKING_URI\n")
    assert said.count("\n") == 1
    models = project / "mlartifacts/models"
    models.rename(models.with_name("away"))
    try:
        said = predict(tmp_path, store(project), picture, code=1)
    finally:
        models.with_name("away").rename(models)
    assert said.startswith("error: the files of detr version 1, which MLflow keeps at models:/m-")
    assert said.endswith("bring them back from a copy, or name another version: --model NUMBER\n")
    assert said.count("\n") == 1


def test_a_process_with_another_detr_loads_no_version():
    assert "detr" in sys.modules
    with pytest.raises(RuntimeError, match="detr was imported from .*; load a model in a fresh process"):
        load("champion")


def test_no_name_is_used_twice():
    used = {"detections.json"}
    given = ["a.jpg", "a.jpg", "A.JPG", "b/a.jpg", "a_2.jpg", "detections.json"]
    assert [make_unused(Path(name), used).as_posix() for name in given] == [
        "a.jpg",
        "a_2.jpg",
        "A_3.JPG",
        "b/a.jpg",
        "a_2_2.jpg",
        "detections_2.json",
    ]


def test_boxes_lie_where_they_are_said_to_be():
    pixels = np.zeros((40, 60, 3), np.uint8)
    answer = {"boxes": [[10.0, 5.0, 50.0, 35.0], [-20.0, 30.0, 90.0, 70.0]], "scores": [0.9, 0.8], "labels": ["é", "b"]}
    picture = np.asarray(Image.open(io.BytesIO(draw(pixels, "PNG", answer, {}))))
    assert picture.shape == (40, 60, 3)
    assert picture[33:36, 30].tolist() == [[0, 0, 0], *[[60, 180, 75]] * 2], "the lower edge of the surest, on top"
    assert picture[39, 57].tolist() == [230, 25, 75], "what lies outside is drawn at the border"
    assert picture[2, 2].tolist() == [0, 0, 0]
    nothing = {"boxes": [], "scores": [], "labels": []}
    assert not np.asarray(Image.open(io.BytesIO(draw(pixels, "PNG", nothing, {})))).any()
