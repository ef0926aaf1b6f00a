"""Stage 2: the gate before training. `python -m pipelines.validate`"""

import hashlib
import io
import json
import logging
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from pipelines import params
from pipelines.stage import DATA, DOCS_DIGEST, FILES, Progress, command, write_json

OUTPUT = Path("artifacts/validate")
DATA_DOCS = Path("scratch/data_docs")


@dataclass(frozen=True)
class ValidateParams:
    """The `validate` section of params.yaml."""

    box_tolerance_pixels: float  # how far a box may reach outside its image
    max_zero_size_boxes: int  # per split; training leaves them out
    num_decoded: int  # images per split decoded in full; the headers of all are read
    num_reported: int  # offending ids listed per expectation

    def __post_init__(self) -> None:
        if min(self.box_tolerance_pixels, self.max_zero_size_boxes, self.num_decoded, self.num_reported) < 0:
            raise ValueError("validate: no value may be negative")


def validate(config: ValidateParams, data: Path, output: Path, data_docs: Path) -> None:
    """Writes `report.json` and Data Docs, and `passed.json` when every error-level expectation holds.

    `passed.json` holds nothing but the digest of the data. Raises ValueError that names the broken
    expectations and the first offending ids.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "passed.json").unlink(missing_ok=True)
    tables: dict[str, pd.DataFrame] = {}
    for split in ("train", "val"):
        tables |= tabulate(config, data, split)
    report = judge(config, tables, data_docs)
    data_digest = digest(data)
    (data_docs / DOCS_DIGEST).write_text(data_digest)
    write_json(output / "report.json", report)
    for row in report:
        if not row["success"]:
            print(f"{row['level']}: {describe(row)}", flush=True)
    broken = [row for row in report if row["level"] == "error" and not row["success"]]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(report)} expectations on {data} are broken, "
            f"first: {describe(broken[0])}; see {data_docs}/index.html"
        )
    print(f"{len(report)} expectations hold; Data Docs: {data_docs / 'index.html'}", flush=True)
    write_json(output / "passed.json", {"data": data_digest})


def digest(data: Path) -> str:
    """The SHA-256 of the four files together."""
    total = hashlib.sha256()
    for name in FILES:
        with (data / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def describe(row: dict[str, Any]) -> str:
    ids = f" (ids {', '.join(map(str, row['ids']))}{', ...' if row['unexpected'] > len(row['ids']) else ''})"
    return f"{row['table']}: {row['meaning']}: {row['unexpected']} break it{ids if row['ids'] else ''}"


def tabulate(config: ValidateParams, data: Path, split: str) -> dict[str, pd.DataFrame]:
    """The split's images, annotations and categories as tables with the columns that `expectations` judges."""
    document = json.loads((data / f"instances_{split}.json").read_bytes())
    images = _columns(document["images"], ("id", "file_name", "height", "width"), f"instances_{split}.json images")
    annotations = _columns(
        document["annotations"],
        ("id", "image_id", "category_id", "bbox", "area"),
        f"instances_{split}.json annotations",
    )
    categories = _columns(document["categories"], ("id", "name"), f"instances_{split}.json categories")

    if images.empty:
        raise ValueError(f"{data}/instances_{split}.json lists no images")
    seen = _inspect(data / f"{split}.zip", images["file_name"].tolist(), config.num_decoded)
    images["stored"], images["real_width"], images["real_height"], images["decodes"] = zip(*seen, strict=True)
    images["size_agrees"] = (images["real_width"] < 0) | (
        (images["real_width"] == images["width"]) & (images["real_height"] == images["height"])
    )

    boxes = np.full((len(annotations), 4), np.nan)
    for index, box in enumerate(annotations.pop("bbox")):
        if isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box):
            boxes[index] = box
    sizes = (
        images.drop_duplicates("id")
        .set_index("id")
        .reindex(annotations["image_id"])[["width", "height"]]
        .to_numpy(float)
    )
    overhang = np.maximum(-boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - sizes).max(axis=1)
    annotations["finite"] = np.isfinite(boxes).all(axis=1)
    annotations["has_size"] = (boxes[:, 2:] > 0).all(axis=1)
    annotations["overhang"] = np.where(np.isfinite(overhang), overhang, 0.0)
    annotations["image_known"] = annotations["image_id"].isin(images["id"])
    annotations["category_known"] = annotations["category_id"].isin(categories["id"])
    annotations["iscrowd"] = [a.get("iscrowd", 0) for a in document["annotations"]]
    images["num_objects"] = images["id"].map(annotations["image_id"].value_counts()).fillna(0).astype(int)
    return {f"{split}_images": images, f"{split}_annotations": annotations, f"{split}_categories": categories}


def _columns(records: list[dict], keys: tuple[str, ...], where: str) -> pd.DataFrame:
    for index, record in enumerate(records):
        missing = [key for key in keys if not isinstance(record, dict) or key not in record]
        if missing:
            raise ValueError(f"{where}: entry {index} lacks {missing[0]!r}; COCO's format needs {', '.join(keys)}")
    return pd.DataFrame({key: [record[key] for record in records] for key in keys})


def _inspect(path: Path, names: list[str], num_decoded: int) -> list[tuple[int, int, int, bool]]:
    """(times in the archive, width, height, decodes) per image; width and height are -1 where no header is readable."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a whole zip file ({error}); run download again") from error
    every = max(1, len(names) // max(1, num_decoded))
    with archive:
        members: dict[str, list[zipfile.ZipInfo]] = {}
        for info in archive.infolist():
            for key in {info.filename, info.filename.rsplit("/", 1)[-1]}:
                members.setdefault(key, []).append(info)
        rows = []
        for index, name in enumerate(Progress(names, f"inspect {path.name}", len(names), "image")):
            found = members.get(name, [])
            width = height = -1
            decodes = False
            if found:
                try:
                    with Image.open(io.BytesIO(archive.read(found[0]))) as image:
                        width, height = image.size
                        if num_decoded and index % every == 0:
                            image.load()
                    decodes = True
                except (OSError, SyntaxError, zipfile.BadZipFile, Image.DecompressionBombError):
                    pass
            rows.append((len(found), width, height, decodes))
    return rows


def expectations(config: ValidateParams, table: str, num_rows: int) -> list[tuple[str, str, Any]]:
    """(level, meaning, Great Expectations expectation) for a table named SPLIT_KIND."""
    import great_expectations.expectations as gxe

    kind = table.partition("_")[2]

    def true(column: str, mostly: float = 1.0) -> Any:
        return gxe.ExpectColumnValuesToBeInSet(column=column, value_set=[True], mostly=mostly)

    def within(column: str, low: float | None, high: float | None, mostly: float = 1.0) -> Any:
        return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=low, max_value=high, mostly=mostly)

    size_share = (
        max(0.0, 1 - (config.max_zero_size_boxes + 0.5) / max(1, num_rows)) if config.max_zero_size_boxes else 1.0
    )
    reach = config.box_tolerance_pixels
    return {
        "images": [
            ("error", "image ids are unique", gxe.ExpectColumnValuesToBeUnique(column="id")),
            ("error", "file names are unique", gxe.ExpectColumnValuesToBeUnique(column="file_name")),
            ("error", "images are in the archive once", within("stored", 1, 1)),
            ("error", "pictures decode", true("decodes")),
            ("error", "pictures have the annotated size", true("size_agrees")),
            ("warning", "images have objects", within("num_objects", 1, None)),
        ],
        "annotations": [
            ("error", "there are annotations", gxe.ExpectTableRowCountToBeBetween(min_value=1)),
            ("error", "annotation ids are unique", gxe.ExpectColumnValuesToBeUnique(column="id")),
            ("error", "annotations have a known image", true("image_known")),
            ("error", "annotations have a known category", true("category_known")),
            ("error", "boxes are four finite numbers", true("finite")),
            ("error", "boxes have a positive size", true("has_size", size_share)),
            ("error", f"boxes are inside the image by {reach:g} pixels", within("overhang", None, reach)),
            ("error", "crowd flags are 0 or 1", gxe.ExpectColumnValuesToBeInSet(column="iscrowd", value_set=[0, 1])),
            ("warning", "areas are positive", within("area", 1e-9, None)),
        ],
        "categories": [
            ("error", "there are categories", gxe.ExpectTableRowCountToBeBetween(min_value=1)),
            ("error", "category ids are unique", gxe.ExpectColumnValuesToBeUnique(column="id")),
            ("error", "category names are unique", gxe.ExpectColumnValuesToBeUnique(column="name")),
        ],
    }[kind]


def judge(config: ValidateParams, tables: dict[str, pd.DataFrame], data_docs: Path) -> list[dict[str, Any]]:
    """One row per expectation, without times or run ids, and the rendered Data Docs in `data_docs`.

    The Great Expectations context lives in memory, so its stores never grow; the pages are rendered anew.
    """
    import great_expectations as gx
    from great_expectations.checkpoint import UpdateDataDocsAction

    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    shutil.rmtree(data_docs, ignore_errors=True)
    data_docs.mkdir(parents=True)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    for site in list(context.get_docs_sites_urls()):
        context.delete_data_docs_site(site["site_name"])
    context.add_data_docs_site(
        site_name="data_docs",
        site_config={
            "class_name": "SiteBuilder",
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(data_docs.resolve())},
        },
    )
    source = context.data_sources.add_pandas("coco")
    report = []
    for table, frame in Progress(tables.items(), "validate", len(tables), "table"):
        rows = expectations(config, table, len(frame))
        suite = gx.ExpectationSuite(name=table)
        for level, meaning, expectation in rows:
            expectation.severity = "critical" if level == "error" else "warning"
            expectation.meta = {"meaning": meaning}
            suite.add_expectation(expectation)
        definition = context.validation_definitions.add(
            gx.ValidationDefinition(
                name=table,
                data=source.add_dataframe_asset(table).add_batch_definition_whole_dataframe("all"),
                suite=context.suites.add(suite),
            )
        )
        checkpoint = context.checkpoints.add(
            gx.Checkpoint(
                name=table,
                validation_definitions=[definition],
                actions=[UpdateDataDocsAction(name="data_docs", site_names=["data_docs"])],
                result_format={"result_format": "COMPLETE", "include_unexpected_rows": False},
            )
        )
        outcome = checkpoint.run(batch_parameters={"dataframe": frame})
        (suite_result,) = outcome.run_results.values()
        levels = {meaning: level for level, meaning, _ in rows}
        for result in suite_result.results:
            meaning = result.expectation_config.meta["meaning"]
            offending = result.result.get("unexpected_index_list") or []
            ids = frame["id"].to_numpy()[np.array(offending, dtype=int)].tolist()
            report.append(
                {
                    "table": table,
                    "level": levels[meaning],
                    "meaning": meaning,
                    "success": bool(result.success),
                    "rows": len(frame),
                    "unexpected": int(result.result.get("unexpected_count", 0 if result.success else 1)),
                    "ids": ids[: config.num_reported],
                }
            )
    return report


def main() -> None:
    validate(params.load("validate", ValidateParams), DATA, OUTPUT, DATA_DOCS)


if __name__ == "__main__":
    command(main)
