"""Matching and loss beside the authors' code: python benchmarks/matching.py [--quick]

Batch 64, 100 queries, 6 decoder layers, as many boxes per image as COCO has; one thread on a CPU.
"""

import argparse

import torch
from authors import build, install, interleaved, report

from detr.batch import Targets
from detr.loss import LossConfig, count_totals, set_loss
from detr.matcher import MatcherConfig, match_targets

MATCHER, LOSS = MatcherConfig(1.0, 5.0, 2.0), LossConfig(1.0, 5.0, 2.0, 0.1, auxiliary=True)
NUM_LAYERS, NUM_QUERIES, NUM_CLASSES = 6, 100, 91


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 4 images, once")
    arguments = parser.parse_args()
    install()
    torch.set_num_threads(1)
    num_images, rounds = (4, 1) if arguments.quick else (64, 15)
    generator = torch.Generator().manual_seed(0)
    counts = torch.empty(num_images).exponential_(1 / 7.3, generator=generator).ceil().long().clamp(max=63)  # COCO: 7.3
    logits = torch.randn(NUM_LAYERS, num_images, NUM_QUERIES, NUM_CLASSES + 1, generator=generator, requires_grad=True)
    boxes = 0.2 + 0.5 * torch.rand(NUM_LAYERS, num_images, NUM_QUERIES, 4, generator=generator)
    boxes.requires_grad_()
    target_boxes = [0.2 + 0.5 * torch.rand(count, 4, generator=generator) for count in counts.tolist()]
    labels = [torch.randint(NUM_CLASSES, (count,), generator=generator) for count in counts.tolist()]
    targets = Targets.join(target_boxes, labels)
    goals = [{"boxes": box, "labels": label} for box, label in zip(target_boxes, labels, strict=True)]
    criterion = build("detr-r50", dropout=0.0).criterion
    layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]

    def authors_matcher() -> torch.Tensor:
        matched = [criterion.matcher(layer, goals) for layer in layers]
        return torch.stack([torch.cat([query[target.argsort()] for query, target in layer]) for layer in matched])

    def our_matcher() -> torch.Tensor:
        return match_targets(logits, boxes, targets, MATCHER)

    def authors_loss() -> torch.Tensor:
        losses = criterion(layers[-1] | {"aux_outputs": layers[:-1]}, goals)
        loss = sum(losses[name] * weight for name, weight in criterion.weight_dict.items())
        return torch.autograd.grad(loss, logits)[0]

    def our_loss() -> torch.Tensor:
        loss, _ = set_loss(logits, boxes, targets, count_totals(targets, NUM_QUERIES), MATCHER, LOSS)
        return torch.autograd.grad(loss, logits)[0]

    rows = []
    for name, theirs, ours in (
        ("matcher", authors_matcher, our_matcher),
        ("matcher and loss, with gradients", authors_loss, our_loss),
    ):
        seconds = interleaved({"authors": theirs, "ours": ours}, rounds)
        rows.append((name, 1000 * seconds["authors"], 1000 * seconds["ours"]))
    figures = {
        "images": num_images,
        "boxes": int(counts.sum()),
        "equal matches": bool(torch.equal(authors_matcher(), our_matcher())),
        "max gradient difference": float((authors_loss() - our_loss()).abs().max()),
    }
    report("matching", rows, "ms", figures)


if __name__ == "__main__":
    main()
