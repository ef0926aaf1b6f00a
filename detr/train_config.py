"""What a training is told: its parameters."""

import math
from dataclasses import dataclass

from detr.loss import LossConfig
from detr.matcher import MatcherConfig
from detr.transforms import TransformConfig

MOST_SEEDS = 2**40  # so that a seed's epochs fit into 64 bits


@dataclass(frozen=True)
class TrainConfig:
    """The training: the `train` section of params.yaml."""

    seed: int
    initial_weights: str  # none, or what detr.official.initialize_model takes; wins over model.backbone_weights
    epochs: int
    batch_size: int  # global, over all processes
    micro_batch: int  # images that pass through the model together: what bounds memory
    group_window: int  # images of the shuffled order among which micro-batches of like shapes are made, 0 for none
    lr: float
    lr_backbone: float  # 0 freezes the backbone
    weight_decay: float
    schedule: str  # cosine, or step: a tenth from lr_drop_epoch on
    lr_drop_epoch: int
    warmup_steps: int
    clip_norm: float  # 0 for none
    ema_decay: float  # of the averaged weights that are evaluated and kept, 0 for none
    precision: str  # float32 or bfloat16
    compile: bool
    deterministic: bool  # the same bits on the same GPU too, at a cost; holds for the whole process
    size_multiple: int  # padded sizes are rounded up to it
    log_steps: int
    evaluate_epochs: int  # between evaluations on the validation images, 0 for none
    patience: int  # evaluations without a higher AP after which training stops, 0 for never
    keep: str  # last, or best: the weights with the highest AP of all evaluations
    max_skipped: int  # steps whose loss or gradient is not finite that may be left out, 0 to stop at the first
    checkpoint_minutes: float
    matcher: MatcherConfig
    loss: LossConfig
    transform: TransformConfig

    def __post_init__(self) -> None:
        for key, choices in (
            ("schedule", ("cosine", "step")),
            ("precision", ("float32", "bfloat16")),
            ("keep", ("last", "best")),
        ):
            if getattr(self, key) not in choices:
                raise ValueError(f"train.{key} is {getattr(self, key)!r}, expected one of {list(choices)}")
        for key in ("epochs", "batch_size", "micro_batch", "log_steps", "size_multiple"):
            if getattr(self, key) < 1:
                raise ValueError(f"train.{key} is {getattr(self, key)}, expected at least 1")
        for key in (
            "lr", "lr_backbone", "weight_decay", "clip_norm", "group_window", "evaluate_epochs", "patience",
            "max_skipped", "warmup_steps", "checkpoint_minutes",
        ):  # fmt: skip
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"train.{key} is {getattr(self, key)}, expected a number that is not negative")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay is {self.ema_decay}, expected a fraction in 0 <= ema_decay < 1")
        if not 0 <= self.seed < MOST_SEEDS:
            raise ValueError(f"train.seed is {self.seed}, expected 0 <= seed < {MOST_SEEDS}")
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
