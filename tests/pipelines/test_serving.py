"""The registered model behind MLflow's server, with real requests, and in an environment of its own."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import requests
import torch
from PIL import Image
from safetensors.torch import load_file

from detr.checkpoint import load_model
from detr.coco import CocoDataset, load_annotations
from detr.detect import detect_all
from detr.distributed import Process
from detr.images import open_images
from detr.metrics import to_results
from detr.transforms import EvalTransform
from tests import registered
from tests.running import environment

MEBIBYTE = 2**20
LIMIT = 50_000_000  # pixels, as the README says


def direct(model_folder, data):
    """The answers that the evaluation's own path gives to the pictures of a COCO folder, with no threshold."""
    model, kinds, size = load_model(model_folder)
    record = load_annotations(data / "instances_val.json")
    dataset = CocoDataset(record, open_images(data / "val.zip"), EvalTransform(size.short, size.max_size))
    process = Process(0, 1, torch.device("cpu"))
    names = {kind.id: kind.name for kind in kinds}
    detections = to_results(detect_all(model, dataset, size.size_multiple, process)[0])
    answers = []
    for image_id in record.image_ids.tolist():
        rows = sorted((d for d in detections if d["image_id"] == image_id), key=lambda d: -d["score"])
        answers.append(
            {
                "boxes": [[x, y, x + w, y + h] for x, y, w, h in (d["bbox"] for d in rows)],
                "scores": [d["score"] for d in rows],
                "labels": [names[d["category_id"]] for d in rows],
            }
        )
    return answers


def assert_same(answer, expected):
    assert answer["labels"] == expected["labels"]
    assert answer["scores"] == pytest.approx(expected["scores"], abs=1e-5)
    np.testing.assert_allclose(answer["boxes"], expected["boxes"], atol=0.03 + 1e-5 * np.max(expected["boxes"]))


@pytest.fixture(scope="module")
def version(drawn, tmp_path_factory):
    """A folder with a registry of one version, the champion, and the trained folder that it was made of."""
    root = tmp_path_factory.mktemp("serving")
    model = registered.write_model(root / "trained", registered.categories(drawn))
    registered.register(root, model, "champion", registered.pictures(drawn)[0])
    return root


@pytest.fixture(scope="module")
def server(version):
    """`mlflow models serve` of the champion: its address, and the psutil.Process that answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["python", "-m", "mlflow", "models", "serve", "-m", "models:/detr@champion"]
    env = environment(MLFLOW_TRACKING_URI=f"sqlite:///{version}/mlflow.db", MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false")
    with (version / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, "--env-manager", "local", "--port", str(port)],
            cwd=version,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                requests.get(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except requests.ConnectionError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((version / "log").read_text(encoding="utf-8")) from None
                time.sleep(0.2)
        (worker,) = (p for p in psutil.process_iter() if p.pid in family(process.pid) and listens(p, port))
        yield SimpleNamespace(address=f"http://127.0.0.1:{port}", process=worker)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def family(pid):
    parent = psutil.Process(pid)
    return {pid, *(child.pid for child in parent.children(recursive=True))}


def listens(process, port):
    return any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in process.net_connections())


def peak(process):
    """The most memory that a process ever held, in bytes."""
    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def body(*images, **params):
    rows = [[base64.b64encode(image).decode() if isinstance(image, bytes) else image] for image in images]
    return {"dataframe_split": {"columns": ["image"], "data": rows}} | ({"params": params} if params else {})


def ask(server, document):
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return requests.post(
        f"{server.address}/invocations", data=data, headers={"Content-Type": "application/json"}, timeout=120
    )


def answers(server, document):
    said = ask(server, document)
    assert said.status_code == 200, said.text
    return said.json()["predictions"]


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width, height):
    """A black grey PNG that is small however many pixels it has."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def lying_jpeg(width, height):
    """A JPEG of 40 x 30 pixels whose header promises others."""
    data = bytearray(encoded(NOISE, "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


DAMAGED = png(40, 30)[:-14] + b"\0\0" + png(40, 30)[-12:]  # in its last checksum
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))


def test_a_version_is_weights_and_source_and_nothing_else(version):
    (folder,) = version.glob("mlartifacts/models/*/artifacts")
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.suffix for path in files} == {".py", ".json", ".yaml", ".txt", ".safetensors", ""}
    for path in files:
        if path.suffix == ".safetensors":
            assert load_file(path)
        else:
            assert "\0" not in path.read_text(encoding="utf-8"), "text, as no pickle is"
    names = [line.partition("==")[0] for line in (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    assert names == ["mlflow", "torch", "torchvision", "numpy", "pandas", "pillow", "safetensors"]


def test_answers_are_those_of_the_evaluation(server, version, drawn):
    sent = registered.pictures(drawn)
    expected = direct(version / "trained", drawn)
    together = answers(server, body(*sent, threshold=0.0))
    assert len({json.dumps(answer) for answer in together}) == len(sent), "each picture has an answer of its own"
    for answer, one in zip(together, expected, strict=True):
        assert_same(answer, one)
    assert [answers(server, body(image, threshold=0.0))[0] for image in sent] == together


def test_pictures_of_any_size_and_kind_are_read_as_in_training(server, version, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    tall, wide = NOISE.resize((50, 300)), NOISE.resize((1500, 700))
    grey = Image.fromarray((np.arange(1200, dtype=np.uint16) * 50).reshape(30, 40))
    kinds = {
        "tall.jpg": encoded(tall, "JPEG"),
        "wide.png": encoded(wide, "PNG"),
        "tiny.png": encoded(NOISE.resize((1, 1)), "PNG"),
        "turned.jpg": encoded(tall, "JPEG", exif=exif),
        "progressive.jpg": encoded(NOISE, "JPEG", progressive=True),
        "cmyk.jpg": encoded(NOISE.convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(NOISE.convert("L"), "JPEG"),
        "palette.png": encoded(NOISE.convert("P"), "PNG"),
        "clear.png": encoded(NOISE.convert("RGBA"), "PNG"),
        "bits.png": encoded(NOISE.convert("1"), "PNG"),
    }
    (tmp_path / "val.zip").mkdir()
    images = []
    for number, (name, data) in enumerate(kinds.items(), start=1):
        (tmp_path / "val.zip" / name).write_bytes(data)
        width, height = Image.open(io.BytesIO(data)).size
        images.append({"id": number, "file_name": name, "width": width, "height": height})
    record = {"images": images, "annotations": [], "categories": [vars(c) for c in load_model(version / "trained")[1]]}
    (tmp_path / "instances_val.json").write_text(json.dumps(record), encoding="utf-8")
    for answer, expected in zip(
        answers(server, body(*kinds.values(), threshold=0.0)), direct(version / "trained", tmp_path), strict=True
    ):
        assert_same(answer, expected)
    deep, flat = encoded(grey, "PNG"), encoded(Image.fromarray((np.asarray(grey) >> 8).astype(np.uint8)), "PNG")
    assert answers(server, body(deep)) == answers(server, body(flat))
    lines = base64.encodebytes(kinds["tall.jpg"]).decode()
    assert answers(server, body(lines)) == answers(server, body(kinds["tall.jpg"]))


def test_the_threshold_is_a_parameter(server, drawn):
    image = registered.pictures(drawn)[1]
    (everything,) = answers(server, body(image, threshold=0.0))
    for threshold in (None, 0.0, 0.8, everything["scores"][0], 1, 1.0):
        params = {} if threshold is None else {"threshold": threshold}
        (answer,) = answers(server, body(image, **params))
        kept = sum(score >= (0.5 if threshold is None else threshold - 1e-6) for score in everything["scores"])
        assert answer == {name: values[:kept] for name, values in everything.items()}


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (-0.1, "threshold is -0.1, expected a score in 0..1"),
        (1.5, "threshold is 1.5, expected a score in 0..1"),
        (float("nan"), "threshold is nan, expected a score in 0..1"),
        (float("inf"), "threshold is inf, expected a score in 0..1"),
        (None, "threshold is None, expected a score in 0..1"),
        ("high", "Failed to validate type and shape for 'threshold': double"),
        ([0.5], "Failed to validate type and shape for 'threshold': double"),
    ],
)
def test_a_threshold_that_is_none_is_refused(server, threshold, message):
    said = ask(server, body(encoded(NOISE, "PNG"), threshold=threshold))
    assert (said.status_code, said.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert message in said.json()["message"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("@@@", "image 1: it is not base64 (Only base64 data is allowed)"),
        ("abcde", "image 1: it is not base64 ("),
        ("", "image 1: it is no picture: its 0 bytes begin neither as a JPEG nor as a PNG"),
        (b"a text file", "image 1: it is no picture: its 11 bytes begin neither as a JPEG nor as a PNG"),
        (encoded(NOISE, "GIF"), "image 1: it is a GIF picture, expected a JPEG or PNG; convert it"),
        (encoded(NOISE, "WEBP"), "image 1: it is a WEBP picture, expected a JPEG or PNG; convert it"),
        (encoded(NOISE, "PNG")[:20], "image 1: it is damaged: its header is broken or cut short"),
        (encoded(NOISE, "JPEG")[:30], "image 1: it is damaged: its header is broken or cut short"),
        (encoded(NOISE, "PNG")[:900], "image 1: it is damaged or cut short: it does not end as a PNG ends"),
        (encoded(NOISE, "JPEG")[:900], "image 1: it is damaged or cut short: it does not end as a JPEG ends"),
        (DAMAGED, "image 1: it is damaged: the checksum of its chunk IDAT is wrong"),
        (png(30_000, 30_000), f"image 1: it has 30000 x 30000 pixels, expected at most {LIMIT:,} in all"),
        (lying_jpeg(65_000, 65_000), f"image 1: it has 65000 x 65000 pixels, expected at most {LIMIT:,} in all"),
        (None, "image 1: it is null, expected the base64 text of a JPEG or PNG"),
        (5, "image 1: it is a int, expected the base64 text of a JPEG or PNG"),
        (True, "image 1: it is a bool, expected the base64 text of a JPEG or PNG"),
        ({"a": 1}, "image 1: it is a dict, expected the base64 text of a JPEG or PNG"),
        (["a"], "image 1: it is a list, expected the base64 text of a JPEG or PNG"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value)[:40],
)
def test_a_picture_that_is_none_is_named_and_refused(server, image, message):
    before = peak(server.process)
    said = ask(server, body(encoded(NOISE, "PNG"), image))
    assert (said.status_code, said.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert message in said.json()["message"]
    assert len(said.text) < 1000
    assert peak(server.process) - before < 32 * MEBIBYTE


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"dataframe_records": [{"picture": ""}]}, "Model is missing inputs ['image']"),
        ({"dataframe_records": []}, "Model is missing inputs ['image']"),
        ({"inputs": 5}, "Model is missing inputs ['image']"),
        ({"inputs": None}, "Model is missing inputs ['image']"),
        ({}, "exactly one of the input fields"),
        ([], "exactly one of the input fields"),
        (b"no json", "Ensure that input is a valid JSON formatted string"),
        (b"", "Ensure that input is a valid JSON formatted string"),
        (body() | {"params": [1]}, "Parameters must be a dictionary"),
    ],
    ids=str,
)
def test_a_request_that_is_none_is_refused(server, document, message):
    said = ask(server, document)
    assert said.status_code == 400
    assert message in said.json()["message"]


@pytest.mark.parametrize("document", [body(), {"inputs": []}, {"inputs": {"image": []}}], ids=str)
def test_no_pictures_have_no_answers(server, document):
    assert answers(server, document) == []


def test_the_largest_pictures_take_the_memory_that_is_said(server):
    before = peak(server.process)
    sides = (10_000, LIMIT // 10_000)
    for image in (png(*sides), lying_jpeg(*sides)):
        (answer,) = answers(server, body(image, threshold=0.0))
        assert np.max(answer["boxes"]) > 2000
    assert peak(server.process) - before < 6 * LIMIT + 64 * MEBIBYTE
    assert ask(server, body(png(10_000, LIMIT // 10_000 + 1))).status_code == 400


def test_two_hundred_requests_at_once(server, drawn):
    sent = registered.pictures(drawn)
    alone = [answers(server, body(image, threshold=0.0))[0] for image in sent]
    bad, before = [b"a text file", png(30_000, 30_000), encoded(NOISE, "GIF")], peak(server.process)

    def send(number):
        if number % 4 == 3:
            return ask(server, body(sent[0], bad[number % 3], threshold=0.0))
        return ask(server, body(sent[number % 12], sent[number % 7], threshold=0.0))

    with ThreadPoolExecutor(200) as pool:
        said = list(pool.map(send, range(200)))
    for number, one in enumerate(said):
        if number % 4 == 3:
            assert one.status_code == 400
            assert "Error: image 1: it" in one.json()["message"]
        else:
            assert one.status_code == 200, one.text
            assert one.json()["predictions"] == [alone[number % 12], alone[number % 7]]
    assert len(answers(server, body(*sent * 25))) == 300
    assert requests.get(f"{server.address}/health", timeout=10).status_code == 200
    assert server.process.is_running()
    assert server.process.num_threads() < 64
    assert peak(server.process) - before < 256 * MEBIBYTE


ALONE = """
import json, sys
import mlflow, pandas as pd, torch, torchvision
unpickled = []
sys.addaudithook(lambda event, arguments: unpickled.append(arguments) if event == "pickle.find_class" else None)
model = mlflow.pyfunc.load_model(sys.argv[1])
answer = model.predict(pd.DataFrame({"image": json.load(sys.stdin)}), params={"threshold": 0.0})
import detr
print(json.dumps([answer.to_dict("records"), [str(x) for x in unpickled], detr.__file__, sys.path]))
"""


def assert_it_runs_alone(python, alone, folder, model, data):
    """An interpreter loads a version's artifacts by their own code, unpickles nothing, and answers; its sys.path."""
    done = subprocess.run(
        [python, "-c", ALONE, str(alone)],
        cwd=folder,
        env=environment(MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false"),
        input=json.dumps([base64.b64encode(image).decode() for image in registered.pictures(data)]),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, unpickled, home, path = json.loads(done.stdout.splitlines()[-1])
    assert unpickled == []
    assert home == str(alone / "code/detr/__init__.py")
    for answer, expected in zip(found, direct(model, data), strict=True):
        assert_same(answer, expected)
    return path


def test_a_version_unpickles_nothing_and_runs_its_own_code(version, drawn, tmp_path):
    (folder,) = version.glob("mlartifacts/models/*/artifacts")
    alone = shutil.copytree(folder, tmp_path / "alone")
    assert_it_runs_alone("python", alone, tmp_path, version / "trained", drawn)
