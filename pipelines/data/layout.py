"""Where the data lies and what its files are called."""

from pathlib import Path

DATA = Path("data/coco")
FILES = ("train.zip", "val.zip", "instances_train.json", "instances_val.json")
DOCS_DIGEST = "data.sha256"  # in the Data Docs: which data they show
