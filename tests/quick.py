"""Quick stages: what `dvc.yaml` promises, made in a moment and without torch, for tests of what runs the stages.

`python quick.py STAGE` in a project whose graph is this project's with other commands (tests.projects.quick_project).
What matters to whoever runs a stage is as the real stages have it: outputs that are a function of data and parameters, a
failure in one line, a progress of the real form, a state that a training goes on from and that is removed by the
registration, SIGTERM with exit code 75, a process beside the main one, and real versions in MLflow with aliases and tags.

A training has ten steps an epoch. It stays after the step that the file scratch/hold names for as long as that is there;
a registration stays after all that it does, for as long as there is scratch/hold_registered.
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from pipelines.data.layout import DATA, FILES
from pipelines.files import write_json
from pipelines.params import read_yaml
from pipelines.stage import command

PREEMPTED = 75
HOLD, HOLD_REGISTERED = Path("scratch/hold"), Path("scratch/hold_registered")
TRAINED, VALIDATED, EVALUATED = (Path("artifacts") / name for name in ("train", "validate", "evaluate"))
DISTRIBUTIONS = ("area", "objects_per_image", "aspect_ratio", "relative_side", "image_side")
DAY = (2026, 1, 1, 0, 0, 0)


def sha256(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=lambda path: path.read_bytes().hex()).encode()).hexdigest()


def write(path: Path, content: str | bytes) -> None:
    """A new file: the old one may be a link into DVC's cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def download(params: dict) -> None:
    chosen = params["download"]
    if chosen["source"] != "shapes":
        for name in FILES:
            write(DATA / name, (Path(chosen["source"]) / name).read_bytes())
        return
    for split in ("train", "val"):
        count = chosen["shapes"][f"num_{split}"]
        images = [{"id": k, "file_name": f"{k}.jpg", "width": 96, "height": 96} for k in range(1, count + 1)]
        boxes = [
            {"id": k, "image_id": k, "category_id": 1 + k % 2, "bbox": [9, 9, 20, 20]} for k in range(1, count + 1)
        ]
        for box in boxes:
            box |= {"area": 400, "iscrowd": 0}
        categories = [{"id": 1, "name": "box"}, {"id": 2, "name": "star"}]
        document = {"images": images, "annotations": boxes, "categories": categories}
        write(DATA / f"instances_{split}.json", json.dumps(document))
        (DATA / f"{split}.zip").unlink(missing_ok=True)
        with zipfile.ZipFile(DATA / f"{split}.zip", "w") as archive:
            for image in images:
                archive.writestr(zipfile.ZipInfo(image["file_name"], DAY), f"{chosen['shapes']['seed']} {image['id']}")


def validate(params: dict) -> None:
    (VALIDATED / "passed.json").unlink(missing_ok=True)
    counts = {}
    for split in ("train", "val"):
        document = json.loads((DATA / f"instances_{split}.json").read_text(encoding="utf-8"))
        sizes = {image["id"]: image["width"] for image in document["images"]}
        for box in document["annotations"]:
            if box["bbox"][0] + box["bbox"][2] > sizes[box["image_id"]]:
                raise ValueError(f"1 of 83 expectations on {DATA} are broken: a box is outside (ids {box['id']})")
        counts[split] = {"images": len(sizes), "annotations": len(document["annotations"])}
        number = len(document["annotations"])
        names = [category["name"] for category in document["categories"]]
        counts[split] |= {"crowds": 0, "images_without_objects": 0, "class": dict.fromkeys(names, number // len(names))}
        counts[split] |= {name: {"all": number} for name in DISTRIBUTIONS}
    write(VALIDATED / "statistics.json", json.dumps(counts))
    write(VALIDATED / "report.json", json.dumps([{"outcome": "holds"}] * 83))
    write(VALIDATED / "dataset/index.html", "<p>the data</p>")
    write(VALIDATED / "passed.json", json.dumps({"data": sha256(*(DATA / name for name in FILES))}))


def train(params: dict) -> None:
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    fingerprint = sha256(params["model"], params["train"], VALIDATED / "passed.json")[:16]
    epochs = params["train"]["epochs"]
    state, step = Path("scratch") / fingerprint / "state", 0
    state.parent.mkdir(parents=True, exist_ok=True)
    here = "1 processes on cpu"
    if state.exists():
        step = json.loads(state.read_text(encoding="utf-8"))["step"]
        print(f"train {fingerprint}: resuming at step {step} with {here}", flush=True)
    else:
        print(f"train {fingerprint}: starting with {here}", flush=True)
    beside = "import sys; sys.stdin.read()"  # ends with this process, however that ends
    with subprocess.Popen([sys.executable, "-IS", "-c", beside], stdin=subprocess.PIPE) as other:
        said = 0.0
        while step < 10 * epochs and not asked:
            held = HOLD.exists() and step >= int(HOLD.read_text(encoding="utf-8"))
            if not held:
                step += 1
                write_json(state, {"step": step})
                if step % 10 == 0:
                    print(f"epoch {step // 10}/{epochs}: loss {1 / step:.3f}, AP 0.100 AP50 0.200", flush=True)
            if (not held and step % 10 == 0) or (held and time.monotonic() - said > 1):
                said, done = time.monotonic(), step / (10 * epochs)
                print(f"train: {done:4.0%}|##| {step}/{10 * epochs} [00:01<00:01, 9.0step/s, loss 1.0]", flush=True)
            if held:
                time.sleep(0.02)
        other.stdin.close()
    if asked:
        print(f"stopped after step {step} of {10 * epochs}, as asked; the same command goes on", flush=True)
        print("error: the training was asked to stop; the same command goes on from its last state", file=sys.stderr)
        sys.exit(PREEMPTED)
    if params["train"]["lr"] > 1:
        raise ValueError("the loss is not finite; lower train.lr")
    rows = [{"step": k, "epoch": k // 10, "loss": 1 / (1 + k)} for k in range(10 * epochs)]
    write(TRAINED / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(TRAINED / "config.json", json.dumps({"fingerprint": fingerprint}))
    write(TRAINED / "model.safetensors", sha256("weights", fingerprint))


def evaluate(params: dict) -> None:
    from PIL import Image

    ap = int(sha256(TRAINED / "model.safetensors")[:4], 16) / 2**16
    names = ("AP", "AP50", "AP75", "AP_low", "AP_high")
    write(EVALUATED / "metrics.json", json.dumps(dict.fromkeys(names, ap)))
    write(EVALUATED / "per_class.csv", f"category_id,name,AP\n1,box,{ap}\n2,star,{ap}\n")
    for name in ("confusion", "errors", "per_layer", "precision_recall"):
        write(EVALUATED / f"{name}.csv", "name,value\nnothing,0\n")
    write(EVALUATED / "detections.json", "[]")
    shutil.rmtree(EVALUATED / "plots", ignore_errors=True)
    (EVALUATED / "plots").mkdir()
    for name in ("precision_recall", "confusion", "best_00", "worst_00"):
        Image.new("RGB", (32, 32), "navy").save(EVALUATED / f"plots/{name}.png")


def register(params: dict) -> None:
    from pipelines.registry import aliases, tracking
    from pipelines.registry.turns import take_turn

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, encoding="utf-8", check=False).stdout.strip()

    client = tracking.connect()
    fingerprint = json.loads((TRAINED / "config.json").read_text(encoding="utf-8"))["fingerprint"]
    metrics = json.loads((EVALUATED / "metrics.json").read_text(encoding="utf-8"))
    weights = tracking.sha256(TRAINED / "model.safetensors")
    with aliases.explain_errors("the registration"), take_turn(client) as check:
        run_id = tracking.find_run(client, fingerprint, f"train {fingerprint}")
        version = next((v for v in tracking.list_versions(client) if v.tags["weights_sha256"] == weights), None)
        if version is None:
            tracking.log_params(client, run_id, {name: params[name] for name in ("model", "train")})
            for path, place in (("dvc.lock", None), (VALIDATED / "statistics.json", "validate")):
                client.log_artifact(run_id, str(path), place)
            client.log_artifacts(run_id, str(EVALUATED), "evaluate")
            tags = {
                "git_commit": git("rev-parse", "HEAD"),
                "git_branch": git("branch", "--show-current") or "none",
                "dvc_lock_sha256": tracking.sha256(Path("dvc.lock")),
                "data_digest": json.loads((VALIDATED / "passed.json").read_text(encoding="utf-8"))["data"],
                "weights_sha256": weights,
                "fingerprint": fingerprint,
            }
            tags |= {name: str(value) for name, value in metrics.items()}
            source = f"{client.get_run(run_id).info.artifact_uri}/model"
            version = registry_version(client, source, run_id, tags)
        alias = version.tags.get("decision", "held back")
        if alias == "held back":
            champion = aliases.get_champion(client)
            better = champion is None or float(champion.tags["AP"]) < metrics["AP"]
            alias = "champion" if better and params["register"]["promote"] else "challenger"
            aliases.place(client, version, alias, check)
            alias = alias if params["register"]["promote"] else "held back"
            client.set_model_version_tag(tracking.MODEL, version.version, "decision", alias)
    number = int(version.version)
    write(Path("artifacts/register/version.json"), json.dumps({"name": "detr", "version": number}))
    (Path("scratch") / fingerprint / "state").unlink(missing_ok=True)
    while HOLD_REGISTERED.exists():
        time.sleep(0.02)
    print(f"registered detr version {number} as {alias}: it is quick", flush=True)


def registry_version(client, source: str, run_id: str, tags: dict):
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model("detr")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version("detr", source, run_id, tags=tags)


if __name__ == "__main__":
    stages = {stage.__name__: stage for stage in (download, validate, train, evaluate, register)}
    command(lambda: stages[sys.argv[1]](read_yaml(Path("params.yaml"))))
