"""Inference of one 800x1066 image beside the authors' code: python benchmarks/inference.py [--quick]

Both with the same weights, batch 1, float32, on a GPU where there is one. Ours is `for_inference`: frozen norms
folded into convolutions, channels last, fused attention.
"""

import argparse

import torch
from authors import build, install, interleaved, nested, paper_model, report

from detr.model import for_inference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one small image, once")
    parser.add_argument("--variants", nargs="+", default=["detr-r50", "detr-dc5-r50"])
    arguments = parser.parse_args()
    install()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    height, width = (160, 224) if arguments.quick else (800, 1066)
    rows, figures = [], {"device": str(device), "threads": torch.get_num_threads(), "size_hw": [height, width]}
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    padding = torch.zeros(1, height, width, dtype=torch.bool, device=device)
    for variant in arguments.variants:
        torch.manual_seed(0)
        theirs = build(variant, dropout=0.1).model.to(device).eval()
        ours = for_inference(paper_model(variant, theirs)).to(device)

        @torch.no_grad()
        def authors(theirs: torch.nn.Module = theirs) -> torch.Tensor:
            return theirs(nested(images, padding))["pred_boxes"].cpu()

        @torch.no_grad()
        def this(ours: torch.nn.Module = ours) -> torch.Tensor:
            boxes: torch.Tensor = ours(images)[1][-1]
            return boxes.cpu()

        figures[f"{variant} max difference"] = float((authors() - this()).abs().max())
        seconds = interleaved({"authors": authors, "ours": this}, 1 if arguments.quick else 7)
        rows.append((variant, 1000 * seconds["authors"], 1000 * seconds["ours"]))
    report("inference", rows, "ms", figures)


if __name__ == "__main__":
    main()
