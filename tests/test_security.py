"""What a form, an environment or a repository may hold of hostile strings and secrets, and where none of it may go."""

import json
import re
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import jsonschema
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML

from pipelines import flow
from pipelines.git import full_commit
from pipelines.overrides import DATA_ROOTS, absolute_paths, confine, parameters
from pipelines.params import read_yaml, to_yaml
from pipelines.redaction import hidden
from tests.conftest import ROOT, call, small_project
from tests.orchestra import Services, services

SCHEMA = parameter_schema(flow.retrain).model_dump()
TYPES = {"preset": flow.Preset, "overrides": flow.Overrides, "ref": flow.Ref, "note": flow.Note}
HOSTILE = [
    "$(touch {file})",
    "`touch {file}`",
    "; touch {file};",
    "| touch {file}",
    "&& touch {file}",
    "\ntouch {file}\n",
    "--upload-pack=touch {file}",
    "-c core.fsmonitor=touch {file}",
    "--output={file}",
    "!!python/object/apply:os.system ['touch {file}']",
    "!!python/object/new:os.system ['touch {file}']",
    "${{{{ github.token }}}}",
    "${{PATH}}",
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "{{% for x in range(10 ** 9) %}}{{% endfor %}}",
    "{{0.__class__}}",
    "%(touch {file})s",
    "a\x00b",
    "\x1b]0;title\x07",
    "\u202e\u2066 Zoë 日本",
    "a" * 100_000,
    "[" * 900,
    "{{a: " * 300,
    "&a [*a]",
    "*nowhere",
    "<<: *a",
    "? [a] : b",
    "{{[a]: b}}",
    "2001-99-99",
    "!!binary a",
    "!!set {{a, b}}",
    "!!omap [a: 1]",
    "!!float x",
    "0x",
    "--- a\n--- b",
    "%YAML 9.9\n--- a",
    '"\\0"',
    "../../../../etc/passwd",
    "file:///etc/passwd",
    "~/.ssh/id_rsa",
    "HEAD:params.yaml",
    "@{{upstream}}",
    "main@{{yesterday}}",
    "refs/../../config",
    "../x",
    "-x",
    ":/start",
    "main..runs",
    "^main",
]
BOMB = ", ".join(f"&{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))
WITH_PASSWORDS = [
    "download.source=https://somebody:pa55word@host/data",
    "download.source={train_images: 'HTTPS://to-ken@host/x', val_images: a}",
    "download.mirrors={https://host/: ['https://u:p%40ss@mirror/']}",
    "download.sha256={https://u:p@host/x: a}",
    "train.initial_weights=http://u:p@host/x.pth",
    """download.source="https://u:pass'w@host/data\"""",
    "download.source='https://us\"er:p@host/data'",
    "download.source=https://bucket.s3.amazonaws.com/train.zip?X-Amz-Expires=3600&X-Amz-Signature=s1gned",
    "download.source=https://bucket.s3.amazonaws.com/x?AWSAccessKeyId=s1gned&Expires=1",
    "download.source='https://account.blob.core.windows.net/x.zip?sv=2024-11-04&sig=s1gned'",
    "train.initial_weights=https://host/model.pth?download=true&access_token=s1gned",
    "download.source=https://host/data?API_KEY=s1gned",
    "download.source=https://host/data&token=s1gned",
]


def refused(name, value):
    """Whether the server refuses a value by the schema of its form; it must where the flow does."""
    schema = {"properties": {name: SCHEMA["properties"][name]}}
    by_server = not jsonschema.Draft202012Validator(schema).is_valid({name: value})
    assert by_server or not by_flow(name, value)
    return by_server


def by_flow(name, value):
    """Whether the flow's own types refuse a value, however it came there."""
    try:
        TypeAdapter(TYPES[name]).validate_python(value)
    except ValidationError:
        return True
    return False


@pytest.mark.parametrize("text", [text.format(file="x") for text in HOSTILE])
def test_a_hostile_text_is_no_preset_and_no_control_character_passes(text):
    assert refused("preset", text)
    assert by_flow("preset", text) == (re.fullmatch(r"[\w-]{1,100}", text, re.ASCII) is None)
    assert refused("note", text) == (len(text) > 1000 or bool(re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)))
    assert refused("overrides", [f"download.source={text}"]) == refused("note", f"download.source={text}")
    assert refused("overrides", [f"{text}=1"]) or re.fullmatch(r"[a-z_0-9]+(\.[^.=\s]+)+", text)


@pytest.mark.parametrize(
    "ref", ["../x", "-x", "--upload-pack=x", "HEAD:params.yaml", "@{upstream}", "main@{yesterday}", ":/start", "^main",
            "a b", "a\x00", "/etc/passwd", "~", "", "main^{/x}", "a\\b", "*", "x" * 201],
)  # fmt: skip
def test_such_a_ref_is_refused_before_anything_is_stored(ref):
    assert refused("ref", ref)


@pytest.mark.parametrize(
    "ref", ["HEAD", "main", "HEAD~2", "v1.2^", "origin/main", "runs/none-20260101-000000", "größe"]
)
def test_what_git_calls_a_commit_is_a_ref(ref):
    assert not refused("ref", ref)


@pytest.mark.parametrize("ref", ["refs/../..", "main..main", "x/../../y", "HEAD~99999999999999999999"])
def test_a_ref_that_names_no_commit_is_told_in_one_line(ref):
    with pytest.raises(ValueError, match="is no commit, branch or tag here") as caught:
        full_commit(ROOT, ref)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", WITH_PASSWORDS)
def test_a_password_in_a_url_is_refused_before_it_is_stored_by_form_flow_and_command(override, tmp_path):
    schema = {"properties": {"overrides": SCHEMA["properties"]["overrides"]}}
    with pytest.raises(jsonschema.ValidationError, match="put a password into ~/.netrc"):
        jsonschema.validate({"overrides": [override]}, schema)
    for name, value in (("overrides", [override]), ("note", override)):
        with pytest.raises(ValidationError, match="put a password into ~/.netrc"):
            TypeAdapter(TYPES[name]).validate_python(value)
    with pytest.raises(ValueError, match="put a password into ~/.netrc") as caught:
        parameters(ROOT, None, [override])
    assert not re.search("pa55word|to-ken|p%40ss|u:p|s1gned", str(caught.value))


@pytest.mark.parametrize(
    "query", ["version=3&design=a", "versionId=aB3", "path=a;b=c", "keys=3&monkey=1", "x=1#token=2"]
)
def test_an_address_with_a_query_that_is_no_secret_is_taken(query):
    override = f"download.source=https://host/data.zip?{query}"
    assert not refused("overrides", [override])
    assert parameters(ROOT, None, [override])["download"]["source"].endswith(query)


def test_the_command_refuses_a_password_too(tmp_path):
    project = small_project(tmp_path)
    said = call(project, "python", "-m", "pipelines", "run", "--set", WITH_PASSWORDS[0], code=1)
    assert re.fullmatch(r"error: source has a URL .*~/.netrc: machine HOST login USER password PASSWORD\n", said)
    assert "pa55word" not in said


@pytest.mark.parametrize("text", [f"[{BOMB}]".replace("*a", "x"), "[" * 400 + "]" * 400])
def test_a_few_letters_do_not_become_billions_of_values(text):
    with pytest.raises(ValueError, match="more than 10000 values|is not valid YAML|maximum") as caught:
        parameters(ROOT, None, [f"register.protected={text}"])
    assert len(str(caught.value)) < 2000


KEYS = [f"{name}.{key}" for name, section in read_yaml(ROOT / "params.yaml").items() for key in section]
PIECES = st.sampled_from([text.format(file="x") for text in HOSTILE if len(text) < 1000])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KEYS), st.one_of(st.text(max_size=60), PIECES, st.lists(PIECES, max_size=4).map("".join)))
def test_whatever_an_override_holds_it_is_data_of_one_key_or_refused_in_one_line(key, text):
    override = f"{key}={text}"
    if refused("overrides", [override]):
        return
    said = ""
    try:
        document = parameters(ROOT, None, [override])
        confine(document, ROOT)
        absolute_paths(document, ROOT)
    except ValueError as error:
        said = str(error)
    assert "\n" not in said.strip()
    if said:
        return
    written = YAML(typ="safe", pure=True).load(to_yaml(document))
    before = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    section, name = key.split(".")
    written[section].pop(name), before[section].pop(name)
    for one in (written, before):  # made absolute
        for place in (("download", "source"), ("model", "backbone_weights"), ("train", "initial_weights")):
            one[place[0]].pop(place[1], None)
    assert written == before


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The root of a project with links that lead out of it, and a folder that the worker lets parameters name."""
    root = tmp_path / "project"
    for folder in (root / "data/mine", root / "data/linked", tmp_path / "outside", tmp_path / "shared"):
        folder.mkdir(parents=True)
    (tmp_path / "outside/x.pth").write_text("secret")
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "data/linked/train").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root / "loop")
    monkeypatch.setenv(DATA_ROOTS, str(tmp_path / "shared"))
    return root


def confined(root, override):
    confine(parameters(ROOT, None, [override]), root)


FOUR = "{{train_images: {0}, val_images: data/mine, train_annotations: data/mine, val_annotations: data/mine}}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("download.source=/etc", "outside of the project"),
        ("download.source=..", "outside of the project"),
        ("download.source=../outside", "outside of the project"),
        ("download.source=data/mine/../../../outside", "outside of the project"),
        ("download.source=out", "leads to .*outside, outside of the project"),
        ("download.source=data/linked", "leads to .*outside, outside of the project"),
        ("download.source=loop", "no path that can be followed"),
        (f"download.source={'a' * 300}", "no path that can be followed"),
        ('download.source="a\\0b"', "no path that can be followed"),
        ("download.source=file:///etc", "only http:// and https:// work"),
        ("download.source=s3://bucket/x", "only http:// and https:// work"),
        ("download.source=" + FOUR.format("/etc/passwd"), "train_images is '/etc/passwd', outside of the project"),
        ("download.source=" + FOUR.format("../outside/a.zip#x"), "outside of the project"),
        ("download.sha256={/etc/passwd: a}", "outside of the project"),
        ("model.backbone_weights=/etc/passwd", "model.backbone_weights is '/etc/passwd', outside"),
        ("model.backbone_weights=out/x.pth", "leads to"),
        ("train.initial_weights=../../x.pth", "train.initial_weights is '../../x.pth', outside"),
        ("train.initial_weights=out/x.pth", "leads to"),
    ],
)  # fmt: skip
def test_no_parameter_leads_out_of_the_project(place, override, said):
    with pytest.raises(ValueError, match=said) as caught:
        confined(place, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    ["download.source=data/mine", "download.source=shapes", "download.source=https://host/x", "model.backbone_weights=imagenet",
     "train.initial_weights=detr-r50", "download.source={shared}", "train.initial_weights={shared}/x.pth",
     "download.source=" + FOUR.format("data/mine/a.zip#../x")],
)  # fmt: skip
def test_what_lies_in_the_project_or_where_the_worker_allows_is_taken(place, override):
    shared = place.parent / "shared"
    confined(place, override.replace("{shared}", str(shared)))


@pytest.mark.parametrize(
    ("section", "value", "said"),
    [
        ("download", {"sources": "shapes", "sha256": {}}, "download lacks the key 'source'; did you mean 'sources'?"),
        ("download", {"source": "shapes", "sha256": 5}, "download.sha256 is 5: expected `object`, got `int`"),
        ("model", {}, "model lacks the key 'backbone_weights'"),
        ("train", None, "params.yaml lacks the section 'train'"),
    ],
)
def test_parameters_of_another_version_of_the_project_are_refused_by_name(place, section, value, said):
    document = read_yaml(ROOT / "params.yaml") | {section: value}
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        confine(document, place)
    assert "\n" not in str(caught.value)


def test_mirrors_are_addresses_of_the_web():
    from pipelines.__main__ import check

    with pytest.raises(ValueError, match="http, https and local paths work"):
        check(parameters(ROOT, None, ["download.mirrors={https://host/: ['file:///etc/']}"]))


def test_a_stage_prints_no_secret_of_the_environment(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", 'a "quoted" one\nwith lines')
    monkeypatch.setenv("DATABASE", "postgresql://somebody:p%40ss%2Fword@host/db")
    monkeypatch.setenv("SITE", "https://gh0-to-ken@host/x.git")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Somebody")
    for text in (
        'it is a "quoted" one',
        "and with lines",
        r"{'x': 'a \"quoted\" one'}",
        "the password p@ss/word is wrong",
        "p%40ss%2Fword",
        "p%40ss/word",
        "postgresql://somebody:p%40ss%2Fword@host/db",
        "gh0-to-ken",
        "https://u:p@ss@host",
    ):
        assert not re.search(r"quoted|with lines|p@ss|p%40ss|gh0-to-ken", hidden(text)), hidden(text)
    assert hidden("Somebody at https://host/a@b and models:/detr@champion") == (
        "Somebody at https://host/a@b and models:/detr@champion"
    )


PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws+secret/1",
    "SOME_PREFECT_API_KEY": "planted-pnu-2",
    "DETR_WEBHOOK_URL": "http://127.0.0.1:9/services/planted-hook-3",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-4",
    "WAREHOUSE": "postgresql://somebody:planted-database-5@127.0.0.1:9/db",
}
NOTE = """<script>alert(1)</script> <img src=x onerror=alert(1)> {{ 7 * 191 }} {% raw %} $(touch FILE) `touch FILE`

Signed-off-by: Somebody Else <somebody@else.example>
Co-authored-by: Somebody Else <somebody@else.example>"""
LOUD = """
import os, subprocess
print(dict(os.environ), flush=True)
print(*os.environ.values(), sep="\\n", flush=True)
subprocess.run("env; git remote --verbose", shell=True)
"""


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """A project with secrets in its settings, and branches whose stages print their environment; one fails."""
    project = small_project(tmp_path_factory.mktemp("loud"))
    author = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
    for branch, end in (
        ("loud", ""),
        ("failing", "raise ValueError(f'no {os.environ}: {os.environ[\"WAREHOUSE\"]}')\n"),
    ):
        call(project, "git", "checkout", "--quiet", "-b", branch, "main")
        module = project / "pipelines/validate.py"
        begin = module.read_text().index("def main() -> None:\n") + len("def main() -> None:\n")
        text = module.read_text()
        lines = "".join(f"    {line}\n" for line in (LOUD + end).strip().splitlines())
        module.write_text(text[:begin] + lines + text[begin:])
        call(project, *author, "commit", "--quiet", "--all", "-m", branch)
    call(project, "git", "checkout", "--quiet", "main")
    call(project, "git", "remote", "add", "origin", "https://planted-git-token-6@127.0.0.1:9/x.git")
    call(project, "python", "-m", "dvc", "remote", "add", "--local", "--default", "far", "https://127.0.0.1:9/x")
    call(project, "python", "-m", "dvc", "remote", "modify", "--local", "far", "password", "planted-dvc-7")
    with services(project, DETR_DATA_ROOTS=str(project.parent / "shared"), **PLANTED) as found:
        yield found


def everything(project: Path) -> dict[str, bytes]:
    """All that is kept of the runs, by place: files, rows of databases, objects of git; but not where we planted."""
    kept = {}
    for path in project.rglob("*"):
        own = path.relative_to(project).as_posix()
        if path.is_file() and not path.is_symlink() and own not in (".git/config", ".dvc/config.local"):
            kept[own] = path.read_bytes()
    for name in (".prefect/prefect.db", "mlflow.db"):
        with closing(sqlite3.connect(f"file:{project / name}?mode=ro", uri=True)) as database:
            kept[f"rows of {name}"] = "\n".join(database.iterdump()).encode()
    objects = ("git", "cat-file", "--batch", "--batch-all-objects", "--buffer")
    kept["git"] = subprocess.run(objects, cwd=project, capture_output=True, check=True).stdout
    return kept


def test_no_secret_of_the_environment_is_kept_of_runs_that_print_it(loud: Services, tmp_path):
    outside = tmp_path / "planted"
    note = NOTE.replace("FILE", str(outside))
    good = loud.start("retrain/on-demand", ref="loud", overrides=["train.epochs=1"], note=note)
    bad = loud.start("retrain/on-demand", ref="failing")
    unreachable = loud.start("retrain/on-demand", ref="origin/main")
    run = loud.wait(good, 800)
    assert run["state_type"] == "COMPLETED", loud.log(good)
    for run_id, said in ((bad, "validate: "), (unreachable, "git fetch")):
        run = loud.wait(run_id, 800)
        assert (run["state_type"], said in run["state"]["message"]) == ("FAILED", True), loud.log(run_id)
    assert "WAREHOUSE=postgresql://127.0.0.1:9/db" in loud.log(good)  # printed, without the password
    assert "AWS_SECRET_ACCESS_KEY=***" in loud.log(good)
    secrets = [b"planted-" + name for name in (b"aws", b"pnu", b"hook", b"password", b"database", b"git", b"dvc")]
    found = {(place, s) for place, content in everything(loud.project).items() for s in secrets if s in content}
    assert not found
    for path in ("block_documents", "automations", "deployments", "logs", "artifacts", "flow_runs", "task_runs"):
        assert "planted-" not in json.dumps(loud.ask("POST", f"{path}/filter", limit=200)), path

    branch = loud.run(good)["state"]["message"].removeprefix("branch ")
    assert not call(loud.project, "git", "log", "--format=%(trailers)", f"loud..{branch}").strip()
    assert "> Signed-off-by: Somebody Else" in call(loud.project, "git", "log", "--format=%B", f"loud..{branch}")
    for run_id in (good, bad):
        for one in loud.artifacts(run_id).values():
            if one["type"] != "image":
                text = f"{one['description']} {one['data']}"
                assert not re.search(r"(?<!\\)<(script|img)|1337", text)  # a backslash has Markdown show it as it is
    assert not outside.exists()


def test_a_run_may_take_data_from_the_folders_that_its_worker_names(loud: Services, drawn):
    folder = shutil.copytree(drawn, loud.project.parent / "shared" / "coco")
    other = shutil.copytree(drawn, loud.project.parent / "other")
    taken = loud.start("retrain/on-demand", overrides=[f"download.source={folder}", "train.epochs=1"])
    refused = loud.start("retrain/on-demand", overrides=[f"download.source={other}", "train.epochs=1"])
    branch = loud.completed(taken)
    committed = YAML(typ="safe").load(call(loud.project, "git", "show", f"{branch}:params.yaml"))
    assert committed["download"]["source"] == str(folder)
    assert "outside of the project" in loud.wait(refused)["state"]["message"]


def test_hostile_strings_from_the_form_run_nothing_and_are_told_in_one_line(loud: Services, tmp_path):
    file = tmp_path / "planted"
    texts = [text.format(file=file) for text in HOSTILE]
    before = len(loud.runs())
    for text in texts:
        for asked in ({"preset": text}, {"overrides": [text]}):
            with pytest.raises(requests.HTTPError, match=r"^(409|422): .*"):
                loud.start("retrain/on-demand", **asked)
    for text in ("--upload-pack=touch x", "HEAD:params.yaml", "@{upstream}", "../x", "-x"):
        with pytest.raises(requests.HTTPError, match=r"^(409|422): "):
            loud.start("retrain/on-demand", ref=text)
    with pytest.raises(requests.HTTPError, match="put a password into ~/.netrc"):
        loud.start("retrain/on-demand", overrides=WITH_PASSWORDS[:1])
    assert len(loud.runs()) == before

    started = [
        loud.start("retrain/on-demand", overrides=[f"download.source=$(touch {file}); touch {file}"], ref="HEAD"),
        loud.start("retrain/on-demand", overrides=[f"train.epochs=!!python/object/apply:os.system ['touch {file}']"]),
        loud.start("retrain/on-demand", overrides=["model.backbone_weights=/etc/passwd"]),
        loud.start("retrain/on-demand", ref=f"origin/$(touch${{IFS}}{file})".replace("{", "").replace("}", "")),
    ]
    for run_id in started:
        run = loud.wait(run_id, 800)
        assert run["state_type"] == "FAILED", loud.log(run_id)
        assert "\n" not in run["state"]["message"].strip()
    assert not file.exists()
    assert not list((loud.project / "scratch/worktrees").glob("*"))
