"""The claims of the design, held: who imports whom, what a stage depends on, where parameters belong."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import detr
from pipelines.imports import list_imports, read_lazy_names, trace_imports
from pipelines.params import SECTIONS, read_yaml
from pipelines.workspace.dvc import list_stages
from tests.running import ROOT, environment

STAGES = ("download", "validate", "train", "evaluate", "register")
ROOMS = ("data", "workspace", "registry", "serving", "retraining")  # each imports itself and what stands before it
DOORS = ("__main__", "agreement", "arguments", "launch", "training_log")  # no room imports them, nor a stage
NO_BYTES = {  # what says how far a download is, waits, warns; a change of it must not download 20 GB again
    f"pipelines/{name}.py"
    for name in ("__init__", "data/looks", "locks", "progress", "redaction", "stage", "surroundings")
}
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


def modules():
    """The files of the pipelines; as many as git has, so that a move cannot empty a check."""
    found = [path for path in (ROOT / "pipelines").rglob("*.py") if path.name != "__init__.py"]
    assert len(found) >= 62
    return found


def room(path):
    return path.parts[1] if len(path.parts) > 2 else ""


def module_file(name):
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return path if path.is_file() else None


def reach(path):
    """The project's own files that a file imports, directly or not, with itself."""
    return {file.relative_to(ROOT).as_posix() for file in trace_imports(path)}


def top_level(path):
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", sorted((ROOT / "detr").glob("*.py")), ids=lambda path: path.stem)
def test_the_library_meets_nobody(path):
    allowed = {
        "detr",
        "torch",
        "torchvision",
        "scipy",
        "numpy",
        "PIL",
        "hotcoco",
        "msgspec",
        "safetensors",
    } | sys.stdlib_module_names
    assert top_level(path) <= allowed


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("dvc", {"cache", "dvc", "history", "worktree"}),
        ("prefect", {"automations", "flow", "progress_artifact", "terminal"}),
        ("mlflow", {"access", "aliases", "database", "mirror", "packaging", "served_model", "tracking", "turns"}),
        ("great_expectations", {"validate"}),
        ("subprocess", {"git", "packaging", "processes", "services"}),
    ],
)
def test_each_tool_has_one_home(package, homes):
    assert {path.stem for path in modules() if package in top_level(path)} == homes


def test_rooms_import_one_way():
    for path in modules():
        file = path.relative_to(ROOT)
        own = [module_file(name) for name in imports(path) if name.startswith("pipelines.")]
        met = {one.relative_to(ROOT) for one in own if one} - {file}
        if room(file):
            assert {room(one) for one in met} <= {"", *ROOMS[: ROOMS.index(room(file)) + 1]}, file
            assert not {one.stem for one in met if not room(one)} & {*STAGES, *DOORS}, file
        elif file.stem in STAGES:
            assert {room(one) for one in met} <= {"", "data", "registry", "serving"}, file
            assert not {one.stem for one in met if not room(one)} & {*STAGES, "__main__", "agreement"} - {file.stem}
        elif file.stem not in DOORS:
            assert {room(one) for one in met} <= {""}, file


def test_download_and_validate_do_not_touch_torch():
    for stage in ("download", "validate"):
        assert all("torch" not in top_level(ROOT / file) for file in reach(ROOT / f"pipelines/{stage}.py"))
    assert "torch" not in top_level(ROOT / "detr/__init__.py")


def test_versions_of_the_data_are_compared_without_torch():
    for file in reach(ROOT / "pipelines/data/changes.py"):
        assert "torch" not in top_level(ROOT / file)


def needed_by(stage):
    packed = reach(ROOT / "pipelines/serving/served_model.py") if stage == "register" else set()
    return (reach(ROOT / f"pipelines/{stage}.py") | packed) - (NO_BYTES if stage == "download" else set())


@pytest.mark.parametrize("stage", STAGES)
def test_the_deps_of_a_stage_are_the_modules_that_it_imports(stage):
    deps = GRAPH[stage]["deps"]
    assert sorted(dep for dep in deps if dep.endswith(".py")) == sorted(needed_by(stage))
    assert not [dep for dep in deps if dep.startswith(("detr", "pipelines")) and not dep.endswith(".py")]


def test_no_modules_import_each_other_in_a_circle():
    files = [*modules(), *(ROOT / "detr").glob("*.py")]
    TopologicalSorter({path: list_imports(path) for path in files}).prepare()


def test_every_section_is_some_stages_and_every_stages_section_exists():
    used = {name.partition(".")[0] for stage in GRAPH.values() for name in stage["params"]}
    assert used == set(SECTIONS) == set(read_yaml(ROOT / "params.yaml"))


def test_the_order_of_stages_is_the_order_of_their_files():
    made = set()
    for stage in list_stages(ROOT):
        needed = {dep for dep in GRAPH[stage]["deps"] if dep.startswith(("data/", "artifacts/"))}
        assert needed <= made
        made |= set(GRAPH[stage].get("outs", [])) | set(GRAPH[stage].get("metrics", []))
    assert list_stages(ROOT) == list(STAGES)


def test_outputs_are_ignored_by_git_and_bytecode_by_dvc():
    outs = [out for stage in GRAPH.values() for out in [*stage.get("outs", []), *stage.get("metrics", [])]]
    ignored = subprocess.run(
        ["git", "check-ignore", *outs], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    assert ignored.stdout.split() == outs
    assert {"__pycache__/", "*.pyc"} <= set((ROOT / ".dvcignore").read_text(encoding="utf-8").split())


def test_nothing_happens_on_import(tmp_path):
    paths = [path for path in modules() if path.stem != "served_model"] + [*(ROOT / "detr").glob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name.removesuffix('.__init__'))"
    env = environment(cold=True, PYTHONPATH=str(ROOT), PREFECT_HOME=str(tmp_path / "prefect"))
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "empty", env=env, capture_output=True, encoding="utf-8"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list((tmp_path / "empty").iterdir())


def test_every_exported_name_exists_and_has_its_type():
    typed = read_lazy_names(ROOT / "detr/__init__.py")
    assert set(detr.__all__) == set(typed) <= set(dir(detr))
    for name, home in typed.items():
        assert getattr(detr, name).__module__ == home
        assert getattr(detr, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'detr' has no attribute 'nothing'"):
        _ = detr.nothing


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    return [Path(name) for name in listed.split()]


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


def test_no_module_of_ours_shadows_an_installed_package_in_a_flow_run(tmp_path):
    """As a worker starts one: in a folder of its own, then in the clone, by the entrypoints of prefect.yaml."""
    entrypoints = {one["entrypoint"] for one in read_yaml(ROOT / "prefect.yaml")["deployments"]}
    code = (
        "import importlib, json, os, sys\nfrom pathlib import Path\n"
        "from prefect.flows import load_flow_from_entrypoint\n"
        "root, entrypoints, stems = sys.argv[1], sys.argv[2].split(), sys.argv[3].split()\n"
        "os.chdir(root)\n"
        "for entrypoint in entrypoints: load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)\n"
        "places = [importlib.util.find_spec(stem) for stem in stems]\n"
        "inside = [one.origin for one in places if one and str(one.origin).startswith(root + '/pipelines')]\n"
        "print(json.dumps([inside, [path for path in sys.path if path.startswith(root + '/pipelines')]]))"
    )
    stems = " ".join(path.stem for path in modules() if path.stem != "__main__")
    command = [sys.executable, "-c", code, str(ROOT), " ".join(entrypoints), stems]
    env = environment(cold=True, PREFECT_HOME=str(tmp_path / "prefect"))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[[], []]\n")
