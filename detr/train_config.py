"""What a training is told: its parameters."""

from dataclasses import dataclass
from typing import Annotated

from detr.config import Key, check_keys
from detr.loss import LossConfig
from detr.matcher import MatcherConfig
from detr.transforms import TransformConfig

MOST_SEEDS = 2**40  # so that a seed's epochs fit into 64 bits


@dataclass(frozen=True)
class TrainConfig:
    """The training: the `train` section of params.yaml."""

    seed: Annotated[int, Key("random seed of weights, order of images, crops and dropout", ge=0, lt=MOST_SEEDS)]
    initial_weights: Annotated[
        str,
        Key(
            "where the whole model starts: none; detr-r50, detr-dc5-r50, detr-r101, detr-dc5-r101, a .pth file of the "
            "authors' code or its URL; or a folder that training wrote. Wins over model.backbone_weights"
        ),
    ]
    epochs: Annotated[int, Key("passes over the training images", ge=1)]
    batch_size: Annotated[int, Key("images of a step, of all processes together; a multiple of micro_batch", ge=1)]
    micro_batch: Annotated[int, Key("images that pass the model together; the lower, the less memory", ge=1)]
    group_window: Annotated[
        int, Key("images of the shuffled order among which those of like shapes go together; 0 for none", ge=0)
    ]
    lr: Annotated[float, Key("highest learning rate of the transformer and the heads", ge=0)]
    lr_backbone: Annotated[float, Key("highest learning rate of the backbone; 0 freezes it", ge=0)]
    weight_decay: Annotated[float, Key("weight decay of AdamW", ge=0)]
    schedule: Annotated[
        str, Key("course of the learning rates: cosine to 0, or one step down to a tenth", choices=("cosine", "step"))
    ]
    lr_drop_epoch: Annotated[int, Key("epoch at which the step schedule drops the rates; cosine ignores it")]
    warmup_steps: Annotated[int, Key("steps at the start over which the rates rise from 0; 0 for none", ge=0)]
    clip_norm: Annotated[float, Key("norm to which a longer gradient is scaled down; 0 for no clipping", ge=0)]
    ema_decay: Annotated[
        float,
        Key("decay per step of an average of the weights, which is then evaluated and kept; 0 for none", ge=0, lt=1),
    ]
    precision: Annotated[str, Key("number format that the model computes in", choices=("float32", "bfloat16"))]
    compile: Annotated[bool, Key("compile the model by torch.compile: a slow start, then faster steps")]
    deterministic: Annotated[
        bool, Key("same bits in every run on one kind of GPU, at a cost in speed; on CPUs they are the same anyway")
    ]
    size_multiple: Annotated[int, Key("padded sizes are rounded up to a multiple of it, in pixels", ge=1)]
    log_steps: Annotated[int, Key("steps between rows of history.jsonl", ge=1)]
    evaluate_epochs: Annotated[int, Key("epochs between evaluations on the validation images; 0 for none", ge=0)]
    patience: Annotated[int, Key("evaluations without a higher AP after which training ends early; 0 for never", ge=0)]
    keep: Annotated[
        str, Key("weights that training ends with: the last, or the best by AP on validation", choices=("last", "best"))
    ]
    max_skipped: Annotated[
        int, Key("steps that may be left out because loss or gradient is not finite; 0 stops at the first", ge=0)
    ]
    checkpoint_minutes: Annotated[
        float, Key("minutes between saved states, from which a killed training goes on", ge=0)
    ]
    matcher: MatcherConfig
    loss: LossConfig
    transform: TransformConfig

    def __post_init__(self) -> None:
        check_keys(self, "train")
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"train.batch_size is {self.batch_size}, expected a multiple of train.micro_batch, {self.micro_batch}; "
                "lower train.micro_batch, or raise train.batch_size"
            )
        if self.schedule == "step" and self.lr_drop_epoch < 1:
            raise ValueError(
                f"train.lr_drop_epoch is {self.lr_drop_epoch} with train.schedule step, which would train at a tenth "
                f"of the rate from the start; expected the epoch of the drop, or {self.epochs} for none"
            )
        for key, value in (("patience", self.patience), ("keep", self.keep == "best")):
            if value and not 0 < self.evaluate_epochs <= self.epochs:
                raise ValueError(
                    f"train.{key} is {getattr(self, key)!r}, which needs evaluations, and train.evaluate_epochs is "
                    f"{self.evaluate_epochs}; expected 1 to {self.epochs}, train.epochs"
                )
