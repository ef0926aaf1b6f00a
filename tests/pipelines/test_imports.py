"""Which files a file imports: what a stage depends on, a training's fingerprint digests, and a model version packs."""

import json
import shutil

import pytest

from pipelines.imports import list_imports, trace_imports
from pipelines.registry.packaging import SERVED, pack_code
from tests.running import ROOT, call

FILES = {
    "main.py": "import os.path\nimport json\nfrom box.first import a\nif TYPE_CHECKING:\n    import typed\nelse:\n    import chosen\n",
    "chosen.py": "def f():\n    import inside\n",
    "inside.py": "from box import second, Name\nimport lazy\nprint(lazy.Other)\n",
    "typed.py": "",
    "unused.py": "import main\n",
    "box/__init__.py": '"""A docstring alone."""\n',
    "box/first.py": "import chosen\n",
    "box/second.py": "import box.first\n",
    "lazy/__init__.py": "if TYPE_CHECKING:\n    from lazy.home import Other\n\ndef __getattr__(name): ...\n",
    "lazy/home.py": "",
    "lazy/away.py": "",
}


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def traced(root, *names):
    return {path.relative_to(root).as_posix() for path in trace_imports(*(root / name for name in names), root=root)}


def test_imports_are_followed_into_functions_and_through_lazy_packages_but_not_for_types(root):
    assert traced(root, "main.py") == {
        *("main.py", "chosen.py", "inside.py", "box/first.py", "box/second.py", "lazy/__init__.py", "lazy/home.py")
    }
    assert traced(root, "typed.py") == {"typed.py"}
    assert traced(root, "typed.py", "lazy/away.py") == {"typed.py", "lazy/away.py"}


def test_a_circle_ends(root):
    (root / "typed.py").write_text("import unused, typed\n", encoding="utf-8")
    assert traced(root, "unused.py") == traced(root, "main.py") | {"unused.py"}
    (root / "chosen.py").write_text("import typed\n", encoding="utf-8")
    assert {"typed.py", "unused.py", "main.py"} <= traced(root, "typed.py")


def test_a_relative_import_is_refused_by_file_and_line(root):
    (root / "box/first.py").write_text("\nfrom . import second\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"first\.py, line 2, imports by a relative name; write the full one"):
        list_imports(root / "box/first.py", root)


LOADED = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
names = [name for name in sys.modules if name.startswith(("detr.", "pipelines."))]
print(json.dumps([path for name in names if (path := sys.modules[name].__file__) and not path.endswith("__init__.py")]))
"""


@pytest.mark.parametrize("stage", ["download", "validate", "train", "evaluate", "register"])
def test_what_a_stage_loads_is_among_what_it_is_said_to_import(stage, tmp_path):
    said = call(tmp_path, "python", "-c", LOADED, f"pipelines.{stage}", PYTHONPATH=str(ROOT))
    loaded = json.loads(said.splitlines()[-1])
    assert f"{ROOT}/pipelines/{stage}.py" in loaded
    assert set(loaded) <= set(map(str, trace_imports(ROOT / f"pipelines/{stage}.py")))


MARKS = """
import json, sys
from pathlib import Path
from pipelines.train import compute_fingerprint
from tests.projects import TINY_MODEL, TINY_TRAIN

def mark():
    return compute_fingerprint(TINY_MODEL, TINY_TRAIN, "data")

found = {"": mark()}
for name in sys.argv[1:]:
    before = Path(name).read_bytes()
    Path(name).write_bytes(before + b"# a comment\\n")
    found[name] = mark()
    Path(name).write_bytes(before)
print(json.dumps(found))
"""


def test_the_fingerprint_is_of_what_training_imports_and_of_nothing_else(tmp_path):
    for name in ("detr", "pipelines"):
        shutil.copytree(ROOT / name, tmp_path / name)
    kept = ["detr/export.py", "detr/cost.py", "detr/bootstrap.py", "detr/detector.py", "pipelines/evaluate.py"]
    kept += ["pipelines/progress.py"]
    changed = ["detr/model.py", "detr/step.py", "detr/annotation_file.py", "detr/metrics.py", "pipelines/train.py"]
    said = call(tmp_path, "python", "-c", MARKS, *kept, *changed, PYTHONPATH=f"{tmp_path}:{ROOT}")
    found = json.loads(said.splitlines()[-1])
    assert {found[name] for name in kept} == {found[""]}
    assert len({found[name] for name in changed} - {found[""]}) == len(changed)


def test_a_version_is_packed_with_what_serving_imports(tmp_path):
    packed = {path.name for path in pack_code(tmp_path).rglob("*.py")}
    assert packed == {path.name for path in trace_imports(SERVED)} - {SERVED.name}
    assert {"__init__.py", "detector.py", "model.py", "pixels.py"} <= packed
    assert not {"train.py", "loss.py", "metrics.py", "export.py", "visualize.py"} & packed
