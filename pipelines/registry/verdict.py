"""Whether two trainings gave the same, and where they part. `here` is what was made again, `there` the registered."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.registry.tracking import read_rows, sha256

IDENTICAL, CLOSE, DIFFERENT = "bit-identical", "equal within tolerance", "different"
# Measured with the demo's parameters on 4,800 pictures, 300 steps: SSE4 or AVX2 instead of the processor's own choice
# changes the loss at step 50 by 3e-6 of its value, at 100 by 4e-4, at 150 by 9e-4, at 200 to 300 by 4e-3 to 2e-2: later
# rows say nothing. The demo's seeds (params.yaml) differ by 0.02 to 0.07 AP.
LOSS_TOLERANCE = 1e-3  # relative, of every loss of the first row
AP_TOLERANCE = 0.005
WEIGHT_TOLERANCE = 1e-3  # where all of the history is the same: then rounding is all that is left to differ


def compare_weights(here: Path, there: Path | None, registered_sha256: str) -> dict[str, Any]:
    """By digest; tensor by tensor where the digests differ and the registered file could be had."""
    found: dict[str, Any] = {"sha256": sha256(here), "registered_sha256": registered_sha256}
    found |= {"stored_sha256": sha256(there) if there else None}
    found["identical"] = found["sha256"] == registered_sha256 == (found["stored_sha256"] or registered_sha256)
    if there is None or found["stored_sha256"] == found["sha256"]:
        return found
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        ours, theirs = load_file(here), load_file(there)
    except SafetensorError as error:
        return found | {"problem": f"the weights in the artifact store are damaged: {error}"}
    different, largest = [], 0.0
    for name in sorted(ours | theirs):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            different.append(name)
            largest = math.inf
        elif not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            different.append(name)
            gap = float((a.double() - b.double()).abs().max())
            largest = max(largest, math.inf if math.isnan(gap) else gap)
    finite = largest if math.isfinite(largest) else None  # JSON has no infinity
    return found | {
        "tensors": len(ours | theirs),
        "different": len(different),
        "largest_difference": finite,
        "first_different": different[0] if different else None,
    }


def compare_history(here: Path, there: Path | None) -> dict[str, Any]:
    """Row by row; `close` is whether the first rows' losses are equal within LOSS_TOLERANCE."""
    if there is None or not here.exists():
        return {"identical": None, "close": None}
    ours, theirs = read_rows(here), read_rows(there)
    found: dict[str, Any] = {"rows": len(ours), "registered_rows": len(theirs), "first_difference": None}
    for index in range(max(len(ours), len(theirs))):
        a, b = (rows[index] if index < len(rows) else {} for rows in (ours, theirs))
        names = sorted((name for name in a | b if not _same(a.get(name), b.get(name))), key=lambda name: name != "loss")
        if names:
            step, name = (a or b)["step"], names[0]
            found["first_difference"] = {"step": step, "name": name, "here": a.get(name), "there": b.get(name)}
            break
    first, other = ours[0] if ours else {}, theirs[0] if theirs else {}
    losses = [name for name in first | other if name.startswith("loss")]
    close = all(math.isclose(first.get(n, math.nan), other.get(n, math.nan), rel_tol=LOSS_TOLERANCE) for n in losses)
    close = close and len(ours) == len(theirs) and first.get("step") == other.get("step")
    return found | {"identical": found["first_difference"] is None, "close": close}


def compare_metrics(here: dict[str, float], there: dict[str, float] | None) -> dict[str, Any]:
    """By name, of those that both have; `close` is whether AP is equal within AP_TOLERANCE."""
    names = [name for name in here if name in (there or {})]
    if there is None or not names:
        return {"identical": None, "close": None, "largest_difference": None}
    gaps = {name: abs(here[name] - there[name]) for name in names if not _same(here[name], there[name])}
    largest = max(gaps, key=lambda name: gaps[name]) if gaps else None
    found = {"name": largest, "here": here[largest], "there": there[largest]} if largest else None
    close = "AP" in names and gaps.get("AP", 0.0) <= AP_TOLERANCE
    ap = {"AP": here.get("AP"), "registered_AP": there.get("AP")}
    return {"identical": not gaps, "close": close, "largest_difference": found} | ap


def compare_detections(here: Path, there: Path | None) -> dict[str, Any]:
    """By bytes; where those differ, the number of images whose detections do."""
    if there is None or not here.exists():
        return {"identical": None}
    if here.read_bytes() == there.read_bytes():
        return {"identical": True}
    by_image: list[dict[int, list[Any]]] = []
    for path in (here, there):
        by_image.append({})
        for detection in json.loads(path.read_text(encoding="utf-8")):
            by_image[-1].setdefault(detection["image_id"], []).append(detection)
    ours, theirs = by_image
    parted = [image for image in sorted(ours | theirs) if ours.get(image) != theirs.get(image)]
    return {"identical": not parted, "images": len(ours | theirs), "different": len(parted)}


def judge(weights: Any, history: Any, metrics: Any, detections: Any) -> tuple[str, str]:
    """The verdict, and where the first difference lies. Parts that could not be compared are no difference."""
    tampered = weights["stored_sha256"] not in (None, weights["registered_sha256"])
    gap = weights.get("largest_difference")
    rounding = gap is not None and gap <= WEIGHT_TOLERANCE
    if tampered:
        where = f"the artifact store has weights {weights['stored_sha256'][:12]}, registered were "
        where += weights["registered_sha256"][:12]
    elif history.get("first_difference"):
        first = history["first_difference"]
        where = f"first at step {first['step']}, {_pair(first)}"
    elif not weights["identical"] and "first_different" in weights:
        where = f"first in the weights {weights['first_different']}, {_by(weights)}"
    elif not weights["identical"]:
        digests = f"{weights['sha256'][:12]} here, {weights['registered_sha256'][:12]} there"
        where = f"in the digest of the weights, {digests}; without the registered file there is no finer answer"
    elif metrics["largest_difference"]:
        where = f"first in the metrics, {_pair(metrics['largest_difference'])}"
    else:
        where = "" if detections["identical"] is not False else f"in the detections of {detections['different']} images"
    if not where:
        return IDENTICAL, ""
    unexplained = not weights["identical"] and history["identical"] is not False and not rounding
    close = metrics["close"] and history["close"] is not False and not tampered and not unexplained
    return CLOSE if close else DIFFERENT, where


def tolerance() -> str:
    return f"AP within {AP_TOLERANCE:g}, the losses of the first row within {LOSS_TOLERANCE:g} of their value"


def report(document: dict[str, Any]) -> str:
    """The whole verdict as text."""
    lines = [title(document)]
    if document["verdict"] == CLOSE:
        lines.append(f"  {'tolerance':<12}{tolerance()}")
    lines += [f"  {name:<12}{document[name]}" for name in ("commit", "data")]
    shown: dict[str, Callable[[Any], str]] = {
        "history": lambda part: (
            f"{part['rows']} rows here, {part['registered_rows']} there, "
            + (f"first at step {part['first_difference']['step']}, {_pair(part['first_difference'])}")
        ),
        "weights": _weights,
        "metrics": lambda part: (
            f"at most in {_pair(part['largest_difference'])}; AP {part['AP']:.4f} here, "
            f"{part['registered_AP']:.4f} there"
        ),
        "detections": lambda part: f"differ in {part['different']} of {part['images']} images",
    }
    for name, show in shown.items():
        if part := document.get(name):
            same = {
                "history": f"{part.get('rows')} rows",
                "weights": f"sha256 {part.get('sha256')}",
                "metrics": f"AP {part.get('AP')}",
            }.get(name)
            said = {True: f"identical{f', {same}' if same else ''}", None: "not compared"}.get(part["identical"])
            lines.append(f"  {name:<12}{said or show(part)}")
    lines += [f"  {'warning':<12}{warning}" for warning in document["warnings"]]
    lines.append(f"  {'written to':<12}{document['written to']}")
    return "\n".join(lines)


def title(document: dict[str, Any]) -> str:
    where = f": {document['first_difference']}" if document["first_difference"] else ""
    return f"{document['model']} is {document['verdict']}{where}"


def _weights(part: dict[str, Any]) -> str:
    if "tensors" not in part:
        return part.get("problem") or f"{part['sha256'][:12]} here, {part['registered_sha256'][:12]} registered"
    return f"{part['different']} of {part['tensors']} tensors differ, {_by(part)}, first {part['first_different']}"


def _by(part: dict[str, Any]) -> str:
    gap = part["largest_difference"]
    return "in shape, or by no finite number" if gap is None else f"by up to {gap:.2g}"


def _same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)


def _pair(difference: dict[str, Any]) -> str:
    """`loss 6.1193 here, 6.1190 there`, with as many digits as it takes to tell them apart."""
    a, b = difference["here"], difference["there"]
    if isinstance(a, float) and isinstance(b, float):
        digits = next((d for d in range(5, 17) if f"{a:.{d}g}" != f"{b:.{d}g}"), 17)
        a, b = f"{a:.{digits}g}", f"{b:.{digits}g}"
    return f"{difference['name']} {a} here, {b} there"
