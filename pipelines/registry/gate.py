"""The gate before champion: two versions on the same validation images, with a paired bootstrap. R resamples."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from detr.annotation_file import read_truth
from detr.bootstrap import Matches, bootstrap_ap, can_be_certain, compute_weighted_ap, find_interval, match_detections
from detr.config import Key, check_keys
from pipelines.labels import say_metric
from pipelines.params import find_nearest
from pipelines.registry import aliases
from pipelines.stage import quote_error

ROUNDING = 1e-9  # differences of APs below it are rounding


@dataclass(frozen=True)
class RegisterParams:
    """The `register` section of params.yaml."""

    min_ap_gain: Annotated[float, Key("gain in AP over the champion that a new model needs to take its place", ge=0)]
    confidence: Annotated[
        float,
        Key(
            "share of the random halves in which the new model must be better; also the level of the intervals",
            gt=0,
            lt=1,
        ),
    ]
    num_resamples: Annotated[int, Key("random halves of the validation images on which both are compared", ge=1)]
    seed: Annotated[int, Key("random seed of those halves", ge=0)]
    protected: Annotated[
        dict[str, float], Key("largest loss of AP that is allowed for a category, by its name: {person: 0.01}", ge=0)
    ]
    promote: Annotated[bool, Key("whether a better model becomes the champion; false leaves it a challenger")]

    def __post_init__(self) -> None:
        check_keys(self, "register")


@dataclass(frozen=True)
class Judged:
    """A version's numbers on the validation images (AP 0..1), with the interval where there are detections."""

    version: str
    ap: float
    low: float | None
    high: float | None
    per_class: dict[str, float]  # of the categories with objects, empty where unknown
    source: str  # of the numbers
    num_images: int


@dataclass(frozen=True)
class Loss:
    """What a protected category loses against the champion, None where its champion's AP is unknown."""

    name: str
    allowed: float
    candidate: float
    champion: float | None
    loss: float | None

    def too_much(self) -> bool:
        return self.loss is not None and self.loss > self.allowed + ROUNDING


@dataclass(frozen=True)
class Decision:
    """The alias that a candidate gets, and why. The numbers are None where there is no champion to compare with."""

    alias: str
    sentence: str
    candidate: Judged
    champion: Judged | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    share_better: float | None  # of the resamples
    protected: list[Loss]


def decide(
    candidate: Judged, champion: Judged | None, gains: np.ndarray | None, config: RegisterParams, note: str = ""
) -> Decision:
    """Champion when the gain is at least `min_ap_gain`, certain enough, and no protected category loses too much.

    `gains` [R] are those of the resamples. Without a champion the candidate takes the place; `note` says what else a
    reader must know of it. An AP of -1 is none: a candidate with it takes no place, a champion with it holds none.
    """
    suffix = f"; {note}" if note else ""
    if candidate.ap < 0:
        sentence = f"its AP is -1, for no validation image has an object to judge it by: it takes no place{suffix}"
        return Decision("challenger", sentence, candidate, None, None, None, None, None, [])
    if champion is not None and champion.ap < 0:
        sentence = (
            f"version {champion.version}, the champion, has an AP of -1, which is none: its place is free{suffix}"
        )
        return Decision("champion", sentence, candidate, None, None, None, None, None, [])
    if champion is None or gains is None:
        return Decision("champion", note or "there was no champion", candidate, None, None, None, None, None, [])
    gain = candidate.ap - champion.ap
    low, high = find_interval(gains, config.confidence, candidate.num_images)
    share = float((gains > ROUNDING).mean())
    losses = []
    for name, allowed in config.protected.items():
        before = champion.per_class.get(name)
        after = candidate.per_class[name]
        losses.append(Loss(name, allowed, after, before, None if before is None else before - after))
    compared = (
        f"AP {candidate.ap:.4f} against {champion.ap:.4f} of version {champion.version}, the champion: "
        f"{gain:+.4f} [{low:+.4f}, {high:+.4f}], better in {share:.1%} of {len(gains)} resamples"
    )
    against = []
    if gain < config.min_ap_gain - ROUNDING:
        against.append(f"the gain is below {config.min_ap_gain:g}")
    if share < config.confidence:
        against.append(f"it is not certain enough ({config.confidence:.1%} are asked for)")
    elif not can_be_certain(candidate.num_images, config.confidence):
        against.append(f"{candidate.num_images} images cannot make it certain ({config.confidence:.1%} are asked for)")
    against += [
        f"{x.name} loses {x.loss:.4f} AP, {x.allowed:g} allowed" for x in losses if x.loss is not None and x.too_much()
    ]
    if unknown := [x.name for x in losses if x.loss is None]:
        suffix += f"; the champion's AP of {', '.join(unknown)}, protected, is unknown and was not compared"
    sentence = f"{compared}{': ' if against else ''}{', '.join(against)}{suffix}"
    return Decision(
        "challenger" if against else "champion", sentence, candidate, champion, gain, low, high, share, losses
    )


def check_protected(config: RegisterParams, annotations: Path) -> None:
    """Raises ValueError that names a protected category which the validation images cannot judge."""
    truth = read_truth(annotations)
    names = dict(zip(truth.category_ids.tolist(), truth.category_names, strict=True))
    seen = {names[category_id] for category_id in truth.category_of[~truth.crowd].tolist()}
    for name in config.protected:
        if name not in names.values():
            raise ValueError(
                f"register.protected names {name!r}, no category{find_nearest(name, sorted(names.values()))}"
            )
        if name not in seen:
            raise ValueError(
                f"register.protected names {name!r}, of which {annotations} has no object to judge it by; leave it out"
            )


def read_names(annotations: Path) -> list[str]:
    """Names of the categories by ascending id."""
    return [*read_truth(annotations).category_names]


def compute_class_ap(matches: Matches, names: list[str]) -> dict[str, float]:
    """AP of each category that has objects."""
    once = np.ones((len(matches.objects), 1))
    found = {}
    for k, name in enumerate(names):
        own, column = matches.category == k, np.arange(len(names)) == k
        if matches.objects[:, k].any():
            part = replace(
                matches,
                category=matches.category[own],
                image=matches.image[own],
                hit=matches.hit[own],
                ignored=matches.ignored[own],
                objects=matches.objects * column,
            )
            found[name] = float(compute_weighted_ap(part, once)[0])
    return found


def compute_numbers(
    version: str, matches: Matches, resamples: np.ndarray, names: list[str], confidence: float
) -> Judged:
    """The numbers of a version whose detections are matched; `resamples` [R] are its APs."""
    num_images = len(matches.objects)
    ap = float(compute_weighted_ap(matches, np.ones((num_images, 1)))[0])
    low, high = find_interval(resamples, confidence, num_images, lowest=0)
    return Judged(version, ap, low, high, compute_class_ap(matches, names), "its detections", num_images)


def judge(client: Any, version: Any, detections: list[dict], data: Path, config: RegisterParams) -> Decision:
    """The decision on a registered version, whose detections on the validation images of `data` are given.

    The champion's detections on them are those of its run, if that saw the same data; else it detects again by its own
    code. Where neither can be had but its files are there, its tag AP counts, against all resamples of the candidate.
    Where its files are gone, so that it cannot serve either, its place is free.
    """
    annotations = data / "instances_val.json"
    names, own = read_names(annotations), match_detections(annotations, detections)
    best = aliases.get_champion(client)

    def alone() -> tuple[np.ndarray, Judged]:
        (resamples,) = bootstrap_ap([own], config.num_resamples, config.seed)
        return resamples, compute_numbers(str(version.version), own, resamples, names, config.confidence)

    if best is None:
        return decide(alone()[1], None, None, config)
    number = str(best.version)
    if best.tags.get("weights_sha256", "") == version.tags.get("weights_sha256"):
        other = "other names for what they find" if aliases.has_files(client, best) else "lost its files"
        note = f"version {number}, the champion, has the same weights and {other}"
        return decide(alone()[1], None, None, config, note)
    theirs, source = find_champions_matches(client, best, version, annotations, data)
    if theirs is not None:
        aps = bootstrap_ap([own, theirs], config.num_resamples, config.seed)
        candidate = compute_numbers(str(version.version), own, aps[0], names, config.confidence)
        champion = replace(compute_numbers(number, theirs, aps[1], names, config.confidence), source=source)
        return decide(candidate, champion, aps[0] - aps[1], config, "" if source == STORED else f"it was {source}")
    resamples, candidate = alone()
    if not aliases.has_files(client, best):
        note = f"the files of version {number}, the champion, are gone, so it cannot serve: its place is free"
        return decide(candidate, None, None, config, f"{note} ({source})")
    if "AP" not in best.tags:
        note = f"version {number}, the champion, can be judged by nothing, its place is free"
        return decide(candidate, None, None, config, f"{note} ({source})")
    note = f"of the champion only its tag AP counts, which may be of other data ({source})"
    note += f"; without the alias it answers by its number: predict --model {version.version}"
    per_class = aliases.read_class_aps(client, best)
    champion = Judged(number, float(best.tags["AP"]), None, None, per_class, "its tag AP", candidate.num_images)
    return decide(candidate, champion, resamples - champion.ap, config, note)


STORED = "its run's detections"


def find_champions_matches(
    client: Any, best: Any, version: Any, annotations: Path, data: Path
) -> tuple[Matches | None, str]:
    """The champion's detections as matched and where they are from, or None and why they cannot be had."""
    reason = "it was evaluated on other data"
    if have_same_images(best.tags, version.tags):
        try:
            content = aliases.read_run_file(client, best.run_id, "evaluate/detections.json")
            expected = best.tags.get("detections_sha256")
            if expected not in (None, hashlib.sha256(content).hexdigest()):
                raise ValueError("they are not those that it was registered with")
            if expected is None and best.run_id == version.run_id:
                raise ValueError("its run holds those of other weights now")
            return match_detections(annotations, json.loads(content)), STORED
        except Exception as error:
            reason = f"the detections of its run cannot be used: {brief(error)}"
    try:
        from pipelines.registry.packaging import compute_detections

        return match_detections(
            annotations, compute_detections(str(best.version), data)
        ), f"evaluated again by its code: {reason}"
    except Exception as error:
        return None, f"{reason}; it cannot be evaluated again: {brief(error)}"


def have_same_images(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two versions were evaluated on the same validation data; an older one knows the digest of all data."""
    name = "val_digest" if "val_digest" in one and "val_digest" in other else "data_digest"
    return one.get(name) is not None and one.get(name) == other.get(name)


def brief(error: Exception) -> str:
    return quote_error(error, 200) or type(error).__name__


def as_json(decision: Decision) -> dict[str, Any]:
    return asdict(decision)


def as_markdown(decision: Decision, config: RegisterParams) -> str:
    """The decision as a page for people."""

    def number(value: float | None, signed: bool = False) -> str:
        return "-" if value is None else f"{value:+.4f}" if signed else say_metric(value, digits=4)

    def span(low: float | None, high: float | None, signed: bool = False) -> str:
        return "-" if low is None else f"{number(low, signed)} to {number(high, signed)}"

    lines = [f"# Version {decision.candidate.version}: {decision.alias}", "", f"{decision.sentence}.", ""]
    lines += [f"| | version | AP | {config.confidence:.0%} interval | from |", "|---|---|---|---|---|"]
    for role, one in (("candidate", decision.candidate), (aliases.name_rival(decision.alias), decision.champion)):
        if one is not None:
            lines.append(f"| {role} | {one.version} | {number(one.ap)} | {span(one.low, one.high)} | {one.source} |")
    if decision.gain is not None:
        lines.append(
            f"| gain | | {number(decision.gain, True)} | {span(decision.gain_low, decision.gain_high, True)} | "
            f"better in {decision.share_better:.1%} of {config.num_resamples} resamples |"
        )
    lines += ["", f"Asked for: a gain of {config.min_ap_gain:g}, better in {config.confidence:.1%} of the resamples."]
    if decision.champion is not None:
        allowed = {loss.name: loss.allowed for loss in decision.protected}
        lines += ["", "| category | candidate | champion | change | may lose |", "|---|---|---|---|---|"]
        for name, ap in decision.candidate.per_class.items():
            before = decision.champion.per_class.get(name)
            change = None if before is None else ap - before
            limit = f"{allowed[name]:g}" if name in allowed else ""
            lines.append(f"| {name} | {number(ap)} | {number(before)} | {number(change, True)} | {limit} |")
    return "\n".join(lines) + "\n"
