"""The parameters of the flows: what Prefect's form asks a person, and what it and the server refuse."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from pipelines.redaction import SECRET_IN_PARAMETER, refuse_password

NOTE_LENGTH = 1000
PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "presets").glob("*.yaml"))
LINES = r"[^\x00-\x08\x0b-\x1f\x7f]*$"  # what a person types: no control characters but tabs and ends of lines
NO_PASSWORD: Any = {  # for the server, which refuses what it would store
    "not": {
        "pattern": SECRET_IN_PARAMETER.pattern,
        "description": "A URL with a password or signature is committed: put a password into ~/.netrc.",
    }
}


def describe_field(title: str, description: str, **more: Any) -> Any:
    """How the form shows a parameter. Prefect drops title and description of an annotation, but not what is extra."""
    return Field(json_schema_extra={"title": title, "description": description, **more})


def check_password(text: str) -> str:
    refuse_password("a parameter", text)
    return text


Preset = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=100),
    describe_field(
        "Preset",
        "What is merged over params.yaml of the ref first; none for params.yaml as it is.",
        enum=["none", *PRESETS],
    ),
]
Override = Annotated[
    str,
    Field(pattern=rf"^[a-z_0-9]+(\.[^.=\s\x00-\x1f\x7f]+)+={LINES}", max_length=1000, json_schema_extra=NO_PASSWORD),
    AfterValidator(check_password),
]
Overrides = Annotated[
    list[Override],
    Field(max_length=100),
    describe_field(
        "Overrides",
        "One parameter each, as train.epochs=3; misspelt ones are refused. No passwords: it is committed.",
    ),
]
Ref = Annotated[
    str,
    Field(pattern=r"^[^\s\x00-\x1f\x7f:?*\[\\{}^~@/.-][^\s\x00-\x1f\x7f:?*\[\\{}]*$", max_length=200),
    describe_field(
        "Git ref",
        "Branch, tag or commit of the code and params.yaml; origin/main fetches first. HEAD: the clone's.",
    ),
]
Promote = Annotated[
    bool, describe_field("Promote", "Whether a better model becomes the champion; off: it stays a challenger.")
]
Note = Annotated[
    str,
    Field(pattern=f"^{LINES}", max_length=NOTE_LENGTH),
    describe_field("Note", "Why; stands in the commit and in the report.", **NO_PASSWORD),
    AfterValidator(check_password),
]
Refresh = Annotated[bool, describe_field("Refresh", "Download again: the content of the source has changed.")]
KeepDays = Annotated[int, Field(ge=0), describe_field("Keep days", "What was touched since stays.")]
DryRun = Annotated[bool, describe_field("Dry run", "Only say what would go.")]
SharedCache = Annotated[
    bool,
    describe_field(
        "Shared cache", "Collect a DVC cache outside of the project too; what only other clones need in it is lost."
    ),
]
