"""A training step beside the authors' code: python benchmarks/train_step.py [--quick] [--presets coco-detr-r50 ...]

Per preset (`demo` is params.yaml itself; only the paper's four models have an authors' side): time, images per second,
model FLOP utilisation, peak memory, and where the time of a step goes. Both sides take the same views of drawn JPEGs of
640x480 (of the demo's scenes, its own), padded as each pads them: with `--sizes fixed` (the CPU's default) one batch of
800x1066, with `--sizes paper` eight of the paper's random scales and crops. The authors' side is as they wrote it, in
float32. Ours is as the preset trains it, on a GPU in bfloat16 and once more in float32; `--compile` compiles it, and
the graphs made for all those sizes are counted; `--set model.attention_dropout=0` changes a parameter of it;
`--attention` adds a side with `nn.MultiheadAttention` in the place of the project's own.

- A step is timed from a padded batch in the CPU's memory on, with no wait but the step's own. Its parts are timed on a
  GPU in rounds of their own, which wait for it at every mark. `data` is the copy to the device and the wait for the
  loader in a step loop, with as many workers as a training has (DETR_WORKERS) on both sides.
- Model FLOPs are those of the products in the forward and backward passes over the padded batch
  (torch.utils.flop_counter); utilisation is their share of what one large matrix product, timed in the same run and in
  the step's precision, reaches on that device. On a GPU float32 is measured as TF32, which its convolutions use.
- Peak memory is that of a process of its own for each side, beyond what it holds before the model is built.

Needs torch, torchvision, scipy, numpy, pycocotools, safetensors, pillow, tqdm, msgspec and ruamel.yaml, none of the
other tools; the authors' code comes by `python benchmarks/authors.py`, or lies in DETR_AUTHORS.
"""

import argparse
import contextlib
import io
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from authors import ROOT, VARIANTS, importable, install, interleaved
from input_pipeline import drawn, write_dataset
from steps import CLOCK, DEVICE, as_theirs, authors_step, our_step, replace_attention, synchronize
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from detr.backbone import freeze_stem
from detr.batch import Batch
from detr.coco import CocoDataset, load_annotations
from detr.images import open_images
from detr.loader import Loader
from detr.model import DETR, ModelConfig
from detr.train_config import TrainConfig
from detr.transforms import EvalTransform, TrainTransform
from pipelines.data.shapes import ShapesParams, write_shapes
from pipelines.params import from_document, merge_parameters

PARTS = ("data", "forward", "matcher", "loss", "backward", "optimizer")
PASSES = 3  # over the loaders


@dataclass(frozen=True)
class Setup:
    """What a preset trains: its parameters, the dataset in `folder`, and the keys of each batch."""

    preset: str
    model: ModelConfig
    train: TrainConfig
    dataset: CocoDataset
    folder: Path
    keys: list[list[tuple[int, int]]]

    @property
    def variant(self) -> str | None:
        """The authors' name of the model, if it is theirs."""
        name = self.preset.removeprefix("coco-")
        return name if name in VARIANTS else None

    def loader(self, device: torch.device, passes: int = 1) -> Loader:
        return Loader(self.dataset, self.keys * passes, self.train.size_multiple, device)

    def build(self) -> DETR:
        torch.manual_seed(0)
        model = DETR(self.model, 91 if self.variant else len(self.dataset.annotations.category_names)).train()
        if self.model.backbone_norm == "frozen":
            freeze_stem(model.backbone)
        return model


def prepare(preset: str, arguments: argparse.Namespace, folder: Path) -> Setup:
    demo = preset == "demo"
    quick = ["train.transform.scales=[128]"] if arguments.quick and not demo else []
    document = merge_parameters(ROOT, None if demo else preset, [*quick, *arguments.set])
    train = from_document(document, "train", TrainConfig)
    paper = arguments.sizes == "paper"
    batch = arguments.batch or (train.micro_batch if demo else 8 if DEVICE.type == "cuda" else 2)
    num_batches = 2 if arguments.quick else 8 if paper or demo else 1
    folder.mkdir()
    if demo:
        shapes = ShapesParams(**document["download"]["shapes"] | {"num_train": batch * num_batches, "num_val": 1})
        write_shapes(shapes, folder)
    else:
        write_dataset(folder, (drawn(8) * (batch * num_batches))[: batch * num_batches])
    transform = train.transform
    views = TrainTransform(transform, seed=0) if paper else EvalTransform(transform.scales[-1], transform.max_size)
    annotations = load_annotations(folder / "instances_train.json")
    dataset = CocoDataset(annotations, open_images(folder / "train.zip"), views)
    keys = [[(0, start + k) for k in range(batch)] for start in range(0, len(dataset), batch)]
    return Setup(preset, from_document(document, "model", ModelConfig), train, dataset, folder, keys)


def their_loader(setup: Setup, passes: int, num_workers: int) -> Iterable:
    with importable(), contextlib.redirect_stdout(io.StringIO()):
        from datasets.coco import CocoDetection, make_coco_transforms
        from util.misc import collate_fn

        transforms = make_coco_transforms("train" if isinstance(setup.dataset.transform, TrainTransform) else "val")
        annotations = str(setup.folder / "instances_train.json")
        dataset = CocoDetection(setup.folder / "train", annotations, transforms, return_masks=False)
    batches = [[index for _, index in keys] for keys in setup.keys] * passes
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate_fn, num_workers=num_workers)


def one_pass(step: Callable, batches: list, parts: list[dict[str, float]] | None) -> None:
    """A step of every batch; adds the seconds of their parts to the list, if there is one."""
    seconds: dict[str, float] = {}
    CLOCK.start(None if parts is None else seconds)
    for batch in batches:
        step(batch)
    synchronize()
    CLOCK.start(None)
    if parts is not None:
        parts.append(seconds)


def wait_seconds(step: Callable, batches: list, loader: Iterable) -> float:
    """Mean wait for the next batch of the loader, after a pass to warm up. Ours are the batches it gives."""
    source, waits = iter(loader), []
    for turn in range(PASSES * len(batches)):
        asked = time.perf_counter()
        arrived = next(source)
        waits.append(time.perf_counter() - asked)
        step(arrived if isinstance(arrived, Batch) else batches[turn % len(batches)])
    return statistics.mean(waits[len(batches) :])


def model_flops(setup: Setup, sizes: list[tuple[int, ...]]) -> int:
    """Of forward and backward passes over images of those sizes (B, 3, H, W)."""
    with torch.device("meta"):
        model = setup.build()
        total = 0
        for size in sizes:
            with FlopCounterMode(display=False) as counter:
                logits, boxes = model(torch.empty(size), torch.empty(size[0], *size[2:], dtype=torch.bool))
                (logits.sum() + boxes.sum()).backward()
            total += counter.get_total_flops()
    return total


def peak_flops(precision: str, side: int) -> float:
    """FLOP/s of the fastest of ten products of two square matrices."""
    if DEVICE.type == "cuda":
        torch.set_float32_matmul_precision("high")
    a, b = torch.randn(2, side, side, device=DEVICE, dtype=getattr(torch, precision))
    seconds = []
    for _ in range(10):
        synchronize()
        started = time.perf_counter()
        a @ b
        synchronize()
        seconds.append(time.perf_counter() - started)
    torch.set_float32_matmul_precision("highest")
    return 2 * side**3 / min(seconds)


def resident_megabytes(key: str) -> float:
    """VmRSS (now) or VmHWM (the highest so far) of this process."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(key)
    )
    return int(line.split()[1]) / 1024


def peak_megabytes(build_step: Callable[[], Callable], batches: list) -> float:
    before = resident_megabytes("VmRSS")
    step = build_step()
    for batch in (batches * 2)[: max(2, len(batches))]:
        step(batch)
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else resident_megabytes("VmHWM") - before


def measure(preset: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of each side; with `--memory SIDE` the peak memory of that one only."""
    setup = prepare(preset, arguments, folder)
    gpu, graphs = DEVICE.type == "cuda", torch._dynamo.utils.counters["stats"]
    ours = [batch.pin_memory() if gpu else batch for batch in setup.loader(torch.device("cpu"))]
    precisions = {"ours": "bfloat16", "ours, float32": "float32"} if gpu else {"ours": setup.train.precision}

    def our(precision: str, attention: bool = False) -> Callable:
        model = setup.build()
        if attention:
            replace_attention(model)
        return our_step(model, setup.train, precision, arguments.compile)

    sides: dict[str, tuple[str, Callable[[], Callable], list]] = {}  # precision, what makes the step, batches
    if setup.variant:
        sides["authors"] = ("float32", partial(authors_step, setup.variant), [as_theirs(batch) for batch in ours])
    sides |= {name: (precision, partial(our, precision), ours) for name, precision in precisions.items()}
    if arguments.attention:
        sides["its attention"] = (precisions["ours"], partial(our, precisions["ours"], attention=True), ours)
    if arguments.memory:
        return {"peak_megabytes": peak_megabytes(*sides[arguments.memory][1:])}

    rounds = 1 if arguments.quick else arguments.rounds or (20 if gpu else 3)
    steps: dict[str, Callable] = {}
    passes: dict[str, Callable] = {}
    marked: dict[str, Callable] = {}
    figures: dict[str, Any] = {name: {} for name in sides}
    seconds_of: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for name, (_, build_step, batches) in sides.items():
        steps[name] = build_step()
        passes[name] = partial(one_pass, steps[name], batches, None)
        marked[name] = partial(one_pass, steps[name], batches, seconds_of[name])
        if arguments.compile:
            graphs.clear()
            passes[name]()
            figures[name] = {"compiled_graphs": graphs["unique_graphs"]}
    side = 256 if arguments.quick else 8192 if gpu else 3072
    peaks = {precision: peak_flops(precision, side) for precision, *_ in sides.values()}
    seconds = interleaved(passes if gpu else marked, rounds)  # a mark costs a CPU nothing
    if gpu:
        interleaved(marked, rounds)
    for name, (precision, _, batches) in sides.items():
        sizes = [tuple((batch.images if isinstance(batch, Batch) else batch[0]).shape) for batch in batches]
        loader = setup.loader(DEVICE, PASSES)
        source = their_loader(setup, PASSES, loader.loader.num_workers) if name == "authors" else loader
        medians = {part: statistics.median(each[part] for each in seconds_of[name][1:]) for part in PARTS}
        parts = {part: 1000 * median / len(batches) for part, median in medians.items()}
        parts["data"] += 1000 * wait_seconds(steps[name], batches, source)
        figures[name] |= {
            "precision": precision,
            "padded_sizes": sizes,
            "step_milliseconds": 1000 * seconds[name] / len(batches),
            "images_per_second": sum(size[0] for size in sizes) / seconds[name],
            "utilisation_percent": 100 * model_flops(setup, sizes) / seconds[name] / peaks[precision],
            "peak_teraflops": peaks[precision] / 1e12,
            "peak_megabytes": in_own_process(preset, name),
            "parts_milliseconds": parts,
            "matcher_and_loss_percent": 100 * (parts["matcher"] + parts["loss"]) / sum(parts.values()),
        }
    return figures


def in_own_process(preset: str, side: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--presets", preset, "--memory", side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    return float(json.loads(done.stdout.splitlines()[-1])["peak_megabytes"])


def rows_of(figures: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Row -> side -> figure, of a preset's."""
    plain = {"step, ms": "step_milliseconds", "images per second": "images_per_second",
             "model FLOP utilisation, %": "utilisation_percent", "peak memory, MB": "peak_megabytes",
             "matcher and loss, % of the step": "matcher_and_loss_percent"}  # fmt: skip
    rows = {what: {side: of[key] for side, of in figures.items()} for what, key in plain.items()}
    if "compiled_graphs" in figures["ours"]:
        rows["compiled graphs"] = {side: of["compiled_graphs"] for side, of in figures.items()}
    return rows | {
        f"{part}, ms": {side: of["parts_milliseconds"][part] for side, of in figures.items()} for part in PARTS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small images, one round, the demo too")
    parser.add_argument("--presets", nargs="+", help="names in presets/, or demo; by default coco-detr-r50")
    parser.add_argument("--sizes", choices=("fixed", "paper"), default="paper" if DEVICE.type == "cuda" else "fixed")
    parser.add_argument("--batch", type=int, help="by default 8 on a GPU, 2 on a CPU, the demo's micro-batch for it")
    parser.add_argument("--rounds", type=int, help="by default 20 on a GPU, 3 on a CPU")
    parser.add_argument("--compile", action="store_true", help="compile our model")
    parser.add_argument("--attention", action="store_true", help="beside ours with nn.MultiheadAttention, too")
    parser.add_argument("--set", action="append", default=[], help="section.key=value, of ours")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    install()
    figures, ratios = dict[str, Any](), {}
    with tempfile.TemporaryDirectory() as folder:
        for preset in arguments.presets or ["coco-detr-r50", *(["demo"] if arguments.quick else [])]:
            figures[preset] = measure(preset, arguments, Path(folder) / preset)
            if arguments.memory:
                print(json.dumps(figures[preset]))
                return
    for preset, of in figures.items():
        print(f"{preset:36}" + "".join(f"{side:>16}" for side in of) + f"{'ratio':>10}")
        for what, row in rows_of(of).items():
            print(f"  {what:34}" + "".join(f"{value:>16.4g}" for value in row.values()), end="")
            if "its attention" in row and what == "step, ms":
                ratios[f"{preset}: step with nn.MultiheadAttention"] = round(row["its attention"] / row["ours"], 3)
            if "authors" in row and (what.endswith("MB") or what.endswith("ms")) and what != "data, ms":
                ratios[f"{preset}: {what.rpartition(',')[0]}"] = round(row["authors"] / row["ours"], 3)
                print(f"{row['authors'] / row['ours']:>9.2f}x", end="")
            print()
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu
    figures = {"device": device, "sizes": arguments.sizes, "set": arguments.set, **figures}
    figures = json.loads(json.dumps(figures), parse_float=lambda text: float(f"{float(text):.4g}"))
    print(json.dumps({"benchmark": "train_step", "ratios": {"authors": ratios}, "figures": figures}))


if __name__ == "__main__":
    main()
