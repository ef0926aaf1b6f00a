"""The claims of the design, held: who imports whom, what a stage depends on, where parameters belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import detr
from pipelines.__main__ import PORTS
from pipelines.params import SECTIONS, read_yaml
from pipelines.repro import stages
from tests.running import ROOT, environment

STAGES = ("download", "validate", "train", "evaluate", "register")
OPERATORS = [
    *("__main__", "automations", "cache", "flow", "git", "history", "interruption", "progress_artifact", "report"),
    *("repro", "services", "terminal", "worktree"),
]
GRAPH = read_yaml(ROOT / "dvc.yaml")["stages"]


def imports(path):
    """Full names of everything a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_file(name):
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return path if path.is_file() else None


def reach(path):
    """The project's own files that a file imports, directly or not, with itself."""
    seen, todo = set(), [path]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += [file for name in imports(path) if (file := module_file(name))]
    return {file.relative_to(ROOT).as_posix() for file in seen}


def top_level(path):
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", sorted((ROOT / "detr").glob("*.py")), ids=lambda path: path.stem)
def test_the_library_meets_nobody(path):
    allowed = {"detr", "torch", "torchvision", "scipy", "numpy", "hotcoco", "safetensors"} | sys.stdlib_module_names
    assert top_level(path) <= allowed


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("dvc", {"cache", "history", "worktree"}),
        ("prefect", {"automations", "flow", "progress_artifact", "terminal"}),
        ("mlflow", {"mirror", "packaging", "registry", "served_model", "tracking"}),
        ("great_expectations", {"validate"}),
        ("subprocess", {"git", "packaging", "processes", "register", "services"}),
    ],
)
def test_each_tool_has_one_home(package, homes):
    assert {path.stem for path in (ROOT / "pipelines").glob("*.py") if package in top_level(path)} == homes


def test_stages_never_import_each_other_nor_the_flow():
    for stage in STAGES:
        others = {f"pipelines/{name}.py" for name in (*STAGES, *OPERATORS) if name != stage}
        assert not reach(ROOT / f"pipelines/{stage}.py") & others
    assert not reach(ROOT / "pipelines/flow.py") & {f"pipelines/{stage}.py" for stage in STAGES}


def test_download_and_validate_do_not_touch_torch():
    for stage in ("download", "validate"):
        assert not any(file.startswith("detr/") for file in reach(ROOT / f"pipelines/{stage}.py"))
        assert all("torch" not in top_level(ROOT / file) for file in reach(ROOT / f"pipelines/{stage}.py"))


def test_versions_of_the_data_are_compared_without_torch():
    for file in reach(ROOT / "pipelines/changes.py"):
        assert not top_level(ROOT / file) & {"torch", "detr"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_that_a_stage_imports_is_in_its_deps(stage):
    deps = set(GRAPH[stage]["deps"])
    packed = {"pipelines/served_model.py"} if stage == "register" else set()
    needed = reach(ROOT / f"pipelines/{stage}.py") | packed
    files = {file for file in needed if not file.startswith("detr/")}
    assert {dep for dep in deps if dep.endswith(".py")} == files
    assert ("detr" in deps) == any(file.startswith("detr/") for file in needed)


def test_every_section_is_some_stages_and_every_stages_section_exists():
    used = {name.partition(".")[0] for stage in GRAPH.values() for name in stage["params"]}
    assert used == set(SECTIONS) == set(read_yaml(ROOT / "params.yaml"))


def test_the_order_of_stages_is_the_order_of_their_files():
    made = set()
    for stage in stages(ROOT):
        needed = {dep for dep in GRAPH[stage]["deps"] if dep.startswith(("data/", "artifacts/"))}
        assert needed <= made
        made |= set(GRAPH[stage].get("outs", [])) | set(GRAPH[stage].get("metrics", []))
    assert stages(ROOT) == list(STAGES)


def test_outputs_are_ignored_by_git_and_bytecode_by_dvc():
    outs = [out for stage in GRAPH.values() for out in [*stage.get("outs", []), *stage.get("metrics", [])]]
    ignored = subprocess.run(
        ["git", "check-ignore", *outs], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    assert ignored.stdout.split() == outs
    assert {"__pycache__/", "*.pyc"} <= set((ROOT / ".dvcignore").read_text(encoding="utf-8").split())


def test_nothing_happens_on_import(tmp_path):
    modules = [f"pipelines.{path.stem}" for path in (ROOT / "pipelines").glob("*.py") if path.stem != "served_model"]
    modules += [f"detr.{path.stem}" for path in (ROOT / "detr").glob("*.py")]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name.removesuffix('.__init__'))"
    env = environment(cold=True, PYTHONPATH=str(ROOT), PREFECT_HOME=str(tmp_path / "prefect"))
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "empty", env=env, capture_output=True, encoding="utf-8"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list((tmp_path / "empty").iterdir())


def test_every_exported_name_exists():
    for name in detr.__all__:
        assert getattr(detr, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'detr' has no attribute 'nothing'"):
        _ = detr.nothing


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    return [Path(name) for name in listed.split()]


def test_the_tree_in_the_readme_is_the_tree_on_disk():
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("```text\n")[2].partition("```")[0]
    shown = {line.split()[0].rstrip("/") for line in text.splitlines() if line.strip()}
    on_disk = {path.parts[0] for path in tracked() if path.parts[0] not in (".gitignore", ".dvcignore", "dvc.lock")}
    assert shown == {name for name in on_disk if (ROOT / name).exists()} | {"data"}


def test_the_readme_names_every_user_interface():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"python -m pipelines ui {name}" in text for name in PORTS)


def test_no_file_has_a_name_that_says_nothing():
    empty = {"utils", "util", "common", "helpers", "misc", "core", "base", "manager", "entity", "components"}
    assert not [path for path in tracked() if empty & {path.stem, *path.parts[:-1]}]


def test_every_dependency_is_pinned_in_the_lock():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").split()
    assert all("==" in line for line in lock)
    assert {"torch==2.14.1", "torchvision==0.29.1"} <= set(lock)


def test_a_file_of_tests_has_one_subject_and_at_most_400_lines():
    long = {path: path.read_text(encoding="utf-8").count("\n") for path in (ROOT / "tests").rglob("*.py")}
    assert {path: lines for path, lines in long.items() if lines > 400} == {}


def test_what_shares_a_fixture_is_run_by_one_process(request):
    """Between some releases of pytest and pytest-xdist groups are passed over without a word."""
    if hasattr(request.config, "workerinput"):
        assert request.node.nodeid.endswith("@tests/pipelines/test_wiring.py")
