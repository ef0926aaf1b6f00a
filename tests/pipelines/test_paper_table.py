"""The paper's table on this machine, on small images; AP from a real registry and from files as the authors' are."""

import hashlib
import json
import zipfile

import pytest
import torch
from PIL import Image

from detr.official import COCO_CATEGORIES, URLS
from pipelines.data.layout import DATA
from pipelines.params import merge_parameters
from pipelines.registry import paper_table, tracking
from tests.detr.published import R50, SMALL, published
from tests.running import ROOT, call


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project's folder without data and registry, and an empty torch.hub folder."""
    for name in ("params.yaml", "presets"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def test_the_table_stands_beside_the_papers(root):
    for name in ("detr", "pipelines"):
        (root / name).symlink_to(ROOT / name)
    home = {"TORCH_HOME": str(root / "torch"), "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}
    said = call(root, "python", "-m", "pipelines", "table", "--quick", **home)
    lines = said[said.index("| model") :].splitlines()
    header, rule, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:7]]
    assert header == ["model", "params (M)", "paper", "GFLOPs", "paper", "FPS", "paper", "AP", "paper"]
    assert rule == ["-" * 16, *(f"{'-' * (len(cell) - 1)}:" for cell in rule[1:])]
    assert [row[0] for row in rows] == list(paper_table.PAPER)
    assert [row[1] for row in rows] == ["41.8", "41.3", "41.3", "60.2", "60.2"]
    assert [[row[k] for row in rows] for k in (2, 4, 6, 8)] == [
        ["42", "41", "41", "60", "60"],
        ["180", "86", "187", "152", "253"],
        ["26", "28", "12", "20", "10"],
        ["40.2", "42.0", "43.3", "43.5", "44.9"],
    ]
    detr, dc5, r101, dc5_r101 = (float(row[3]) for row in rows[1:])
    assert detr < min(dc5, r101) <= max(dc5, r101) < dc5_r101
    assert all(float(row[5]) > 0 and row[7] == "-" for row in rows)
    assert f"PyTorch {torch.__version__}" in said
    assert "- AP of DETR-R101: nothing is registered yet" in said
    assert "detr-r101-dc5-a2e86def.pth) to " in said
    with Image.open(root / "scratch/table.png") as picture:
        assert picture.size[0] > picture.size[1] > 300
    assert not (root / "mlflow.db").exists()


def version(client, root, mark, ap, statistics, **changes):
    """A version of the registry as a training of the paper's DETR leaves it."""
    run_id = tracking.find_run(client, mark, mark)
    model = paper_table.read_preset(root, "detr-r50")["model"]
    tracking.log_params(client, run_id, {"model": dict(model) | changes})
    client.log_dict(run_id, statistics, "validate/statistics.json")
    client.create_model_version(tracking.MODEL, f"runs:/{run_id}/model", run_id, tags={"AP": str(ap)})


def test_ap_is_the_best_of_the_versions_of_that_model_on_val2017(root):
    assert paper_table.find_registered(root, "detr-r50") == (None, "nothing is registered yet")
    client = tracking.connect()
    none = (None, "no registered version of this architecture was evaluated on COCO val2017")
    assert paper_table.find_registered(root, "detr-r50") == none
    client.create_registered_model(tracking.MODEL)
    coco = {"val": {"images": 5000, "class": {category.name: 1 for category in COCO_CATEGORIES}}}
    version(client, root, "few images", 0.9, {"val": coco["val"] | {"images": 500}})
    version(client, root, "other classes", 0.8, {"val": coco["val"] | {"class": {"ellipse": 1}}})
    version(client, root, "other model", 0.7, coco, num_queries=50)
    assert paper_table.find_registered(root, "detr-r50") == none
    version(client, root, "good", 0.41, coco)
    version(client, root, "worse", 0.40, coco)
    assert paper_table.find_registered(root, "detr-r50") == (0.41, "models:/detr/4")
    assert paper_table.find_accuracy(root, "detr-r50", quick=True) == (41.0, "models:/detr/4")
    assert paper_table.find_registered(root, "detr-dc5-r50") == none


def test_a_dead_server_costs_the_ap_alone(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    ap, why = paper_table.find_accuracy(root, "detr-r50", quick=False)
    assert ap is None
    assert why.startswith("not known: MLflow at http://127.0.0.1:9 is unreachable")


def coco_like(root, num_images):
    """Validation images with COCO's categories: drawn noise and one box each."""
    (root / DATA).mkdir(parents=True, exist_ok=True)
    images = [{"id": k, "file_name": f"{k}.png", "width": 64, "height": 48} for k in range(1, num_images + 1)]
    boxes = [
        {"id": k, "image_id": k, "category_id": 1, "bbox": [0, 0, 40, 40], "area": 1600, "iscrowd": 0}
        for k in range(1, num_images + 1)
    ]
    with zipfile.ZipFile(root / DATA / "val.zip", "w") as archive:
        for image in images[:2]:
            Image.effect_noise((64, 48), 50).convert("RGB").save(root / "noise.png")
            archive.write(root / "noise.png", image["file_name"])
    categories = [{"id": category.id, "name": category.name} for category in COCO_CATEGORIES]
    document = {"images": images, "annotations": boxes, "categories": categories}
    (root / DATA / "instances_val.json").write_text(json.dumps(document), encoding="utf-8")


def test_val2017_is_known_by_its_images_and_categories(root):
    assert not paper_table.is_val2017(root / DATA)
    coco_like(root, 4999)
    assert not paper_table.is_val2017(root / DATA)
    coco_like(root, 5000)
    assert paper_table.is_val2017(root / DATA)


def test_the_authors_weights_are_evaluated_once(root, monkeypatch):
    torch.manual_seed(0)
    state = {name: torch.rand(shape) * 0.02 for name, shape in published(R50, **SMALL).items()}
    hub = root / "torch/hub/checkpoints"
    hub.mkdir(parents=True)
    torch.save({"model": state}, hub / "made.pth")
    digest = hashlib.sha256((hub / "made.pth").read_bytes()).hexdigest()[:8]
    name = f"detr-made-{digest}.pth"
    monkeypatch.setitem(URLS, "detr-r50", f"https://127.0.0.1/{name}")
    assert paper_table.find_official_weights("detr-r50") is None
    (hub / name).write_bytes((hub / "made.pth").read_bytes()[:-1])
    assert paper_table.find_official_weights("detr-r50") is None
    (hub / "made.pth").rename(hub / name)
    assert paper_table.find_official_weights("detr-r50") == hub / name
    assert paper_table.find_accuracy(root, "detr-r50", quick=False) == (None, "nothing is registered yet")
    coco_like(root, 2)
    monkeypatch.setattr(paper_table, "NUM_VAL", 2)
    kept = root / "scratch/table/detr-r50.json"
    assert paper_table.find_accuracy(root, "detr-r50", quick=True) == (
        None,
        f"{hub / name} is there; without --quick it is evaluated",
    )
    ap, where = paper_table.find_accuracy(root, "detr-r50", quick=False)
    assert where == f"the authors' weights, {name}, evaluated here"
    assert ap == 100 * paper_table.measure_official_ap(hub / name, root / DATA)
    assert json.loads(kept.read_text(encoding="utf-8"))["weights"] == name
    kept.write_text(kept.read_text(encoding="utf-8").replace(f'"AP": {ap / 100}', '"AP": 0.42'), encoding="utf-8")
    assert paper_table.find_accuracy(root, "detr-r50", quick=True)[0] == 42.0
    coco_like(root, 2)
    document = json.loads((root / DATA / "instances_val.json").read_text(encoding="utf-8"))
    document["annotations"].pop()
    (root / DATA / "instances_val.json").write_text(json.dumps(document), encoding="utf-8")
    assert paper_table.find_accuracy(root, "detr-r50", quick=True)[0] is None


def test_faster_rcnn_takes_images_at_their_size():
    torch.manual_seed(0)
    model = paper_table.faster_rcnn((96, 128))
    images, _ = model.transform([torch.zeros(3, 96, 128)])
    assert images.image_sizes == [(96, 128)]
    assert not model.training


def test_presets_are_the_papers_models():
    for name in paper_table.OFFICIAL.values():
        assert paper_table.read_preset(ROOT, name)["model"] == merge_parameters(ROOT, f"coco-{name}", [])["model"]


def test_markdown_is_aligned_and_escaped():
    assert paper_table.markdown([["name", "n"], ["a|b", "1000"], ["c", "2"]]) == "\n".join(
        ["| name |    n |", "| ---- | ---: |", "| a\\|b | 1000 |", "| c    |    2 |"]
    )
