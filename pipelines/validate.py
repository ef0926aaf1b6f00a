"""Stage 2: the gate before training. `python -m pipelines.validate`"""

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines import params
from pipelines.data.distribution import compute_distances, compute_statistics
from pipelines.data.layout import DATA, DOCS_DIGEST, FILES
from pipelines.data.page import write_page
from pipelines.data.pictures import pictures_of
from pipelines.data.rules import Rule, ValidateParams, describe, make_rules
from pipelines.data.tables import tabulate
from pipelines.files import write_json
from pipelines.progress import Progress
from pipelines.registry import aliases
from pipelines.stage import command

OUTPUT = Path("artifacts/validate")
DATA_DOCS = Path("scratch/data_docs")


def validate(
    config: ValidateParams, data: Path, output: Path, data_docs: Path, num_queries: int, champions: dict | None
) -> None:
    """Writes `report.json` and Data Docs, and where no rule of level error is broken, what else there is.

    That is `statistics.json`, the dataset page in `dataset/`, and `passed.json`, which holds nothing but the digest of
    the data. `champions` are the statistics of the data that the champion was trained on: the distance from them is
    in the Data Docs only, since what DVC tracks depends on code, parameters and data alone. Raises ValueError that
    names the broken rules and the first offending ids.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "passed.json").unlink(missing_ok=True)
    tables = tabulate(data, config.box_tolerance_pixels, config.decoded_share)
    counts = compute_statistics(tables)
    judged = dict(tables)
    if champions is not None:
        apart = compute_distances(counts, champions)
        judged["champion_drift"] = pd.DataFrame({"entry": list(apart), "distance": list(apart.values())})
    context = make_context()
    report = judge(config, judged, num_queries, context)
    render(context, data_docs)
    data_digest = compute_digest(data)
    (data_docs / DOCS_DIGEST).write_text(data_digest, encoding="utf-8")
    write_json(output / "report.json", [row for row in report if row["table"] != "champion_drift"])
    for row in report:
        if row["outcome"] != "holds":
            word, num_examples = ("broken", 10) if row["outcome"] == "error" else ("warning", 1)
            print(f"{word}: {describe(row, num_examples)}", flush=True)
    broken = [row for row in report if row["outcome"] == "error"]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(report)} expectations on {data} are broken, "
            f"first: {describe(broken[0], 1)}; see {data_docs}/index.html; mend the source, and "
            "python -m pipelines run, or dvc repro --force download, takes it anew"
        )
    write_json(output / "statistics.json", counts)
    write_page(output / "dataset", data, tables, counts, config.num_examples)
    holding = sum(row["outcome"] == "holds" for row in report)
    print(f"{holding} of {len(report)} expectations hold", flush=True)
    print(f"Data Docs: {data_docs}/index.html, dataset: {output}/dataset/index.html", flush=True)
    write_json(output / "passed.json", {"data": data_digest})


def compute_digest(data: Path) -> str:
    """The SHA-256 of the four files together; of a folder in an archive's place, of its files and their names."""
    total = hashlib.sha256()
    for name in FILES:
        place = pictures_of(data, name.removesuffix(".zip")) if name.endswith(".zip") else data / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                total.update(path.relative_to(place).as_posix().encode() if place.is_dir() else b"")
                with path.open("rb") as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def judge(
    config: ValidateParams, tables: dict[str, pd.DataFrame], num_queries: int, context: Any
) -> list[dict[str, Any]]:
    """One row per rule and table, without times or run ids; the results stay in the Great Expectations `context`."""
    import great_expectations as gx

    source = context.data_sources.add_pandas("coco")
    report = []
    for table, frame in Progress(tables.items(), "validate", len(tables), "table"):
        suite = gx.ExpectationSuite(name=table)
        asked = {}
        for rule in make_rules(config, table.partition("_")[2], num_queries):
            if not rule.column or rule.column in frame:
                asked[rule.name] = rule, config.tolerated.get(rule.name, 0)
                suite.add_expectation(make_expectation(rule, len(frame), asked[rule.name][1]))
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
                result_format={"result_format": "SUMMARY", "partial_unexpected_count": config.num_reported},
            )
        )
        outcome = checkpoint.run(batch_parameters={"dataframe": frame.reset_index(drop=True)})
        ((key, suite_result),) = outcome.run_results.items()
        for result in suite_result.results:
            rule, tolerated = asked[result.expectation_config.meta["rule"]]
            report.append(_row(table, frame, rule, tolerated, result))
            _show_examples(result.result, rule.column, report[-1])
        context.validation_results_store.set(key, suite_result)
    return report


def _show_examples(result: dict[str, Any], column: str, row: dict[str, Any]) -> None:
    """Puts the entries and what is said of them beside the unexpected values, for the Data Docs.

    Great Expectations does so itself for named index columns, at 24 s for 860,000 unexpected rows.
    """
    values = result.get("partial_unexpected_list") or []
    if row["ids"]:
        told = row["examples"] or [""] * len(values)
        pairs = [
            {column: value, "entry": entry, "example": example}
            for value, entry, example in zip(values, row["ids"], told, strict=True)
        ]
        result |= {
            "unexpected_list": values,
            "unexpected_index_list": pairs,
            "unexpected_index_column_names": ["entry", "example"],
        }


def make_expectation(rule: Rule, num_rows: int, tolerated: int) -> Any:
    """The rule as Great Expectations has it."""
    import great_expectations.expectations as gxe

    severity = "critical" if rule.level == "error" else "warning"
    common: dict[str, Any] = {"severity": severity, "notes": rule.meaning, "meta": {"rule": rule.name}}
    if not rule.column:
        return gxe.ExpectTableRowCountToBeBetween(min_value=1, **common)
    common["mostly"] = max(0.0, 1 - (tolerated + 0.5) / max(1, num_rows)) if tolerated else 1.0
    common["column"] = rule.column
    if rule.expected == "unique":
        return gxe.ExpectColumnValuesToBeUnique(**common)
    if isinstance(rule.expected, tuple):
        return gxe.ExpectColumnValuesToBeBetween(min_value=rule.expected[0], max_value=rule.expected[1], **common)
    values = rule.expected if isinstance(rule.expected, list) else [rule.expected]
    return gxe.ExpectColumnValuesToBeInSet(value_set=values, **common)


def make_context() -> Any:
    """A Great Expectations context in memory, whose stores never grow, without progress bars and data docs."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    for site in list(context.get_docs_sites_urls()):
        context.delete_data_docs_site(str(site["site_name"]))
    return context


def render(context: Any, data_docs: Path) -> None:
    """The Data Docs of what the context has judged, made anew in `data_docs`."""
    shutil.rmtree(data_docs, ignore_errors=True)
    data_docs.mkdir(parents=True)
    context.add_data_docs_site(
        site_name="data_docs",
        site_config={
            "class_name": "SiteBuilder",
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(data_docs.resolve())},
        },
    )
    context.build_data_docs()


def _row(table: str, frame: pd.DataFrame, rule: Rule, tolerated: int, result: Any) -> dict[str, Any]:
    """A row of the report."""
    if rule.column and "unexpected_count" not in result.result:
        raise RuntimeError(f"Great Expectations could not judge {rule.name} of {table}: {result.exception_info}")
    unexpected = int(result.result.get("unexpected_count", not result.success))
    rows = result.result.get("partial_unexpected_index_list") or []
    seen = [{"row": row} | frame.iloc[row].to_dict() for row in rows]
    within = "warning" if unexpected and rule.level == "error" else "holds"
    return {
        "table": table,
        "name": rule.name,
        "level": rule.level,
        "meaning": rule.meaning,
        "outcome": rule.level if unexpected > tolerated else within,
        "rows": len(frame),
        "unexpected": unexpected,
        "tolerated": tolerated,
        "ids": [entry["entry"] for entry in seen],
        "examples": [rule.example.format_map(entry) for entry in seen if rule.example],
    }


def champions_statistics() -> dict[str, Any] | None:
    """The statistics of the data that the champion was trained on, or None, said, where they cannot be had."""
    try:
        return aliases.read_champions_file("validate/statistics.json")
    except ValueError as error:
        print(f"warning: drift from the champion's data is not judged: {error}", flush=True)
        return None


def main() -> None:
    document = params.read_yaml(Path("params.yaml"))
    num_queries = int(document["model"]["num_queries"])
    config = params.from_document(document, "validate", ValidateParams)
    validate(config, DATA, OUTPUT, DATA_DOCS, num_queries, champions_statistics())


if __name__ == "__main__":
    command(main)
