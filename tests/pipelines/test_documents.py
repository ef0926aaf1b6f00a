"""What the documents say is so: commands parse, links lead somewhere, the tree is the disk's, generated parts are fresh."""

import ast
import importlib.util
import re
import shlex
import warnings
from functools import cache
from itertools import dropwhile

import pytest
from PIL import Image

from docs import draw_detections, generate
from pipelines.arguments import PORTS, build_parser
from pipelines.params import read_yaml
from tests import registered
from tests.pipelines.test_wiring import tracked
from tests.running import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "data/README.md", *(ROOT / "docs").glob("*.md")])
WRITTEN = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
NAMES = [path.relative_to(ROOT).as_posix() for path in WRITTEN]
SHELL = {
    "source", "cd", "cp", "mkdir", "set", ".", "export", "printf", "base64", "curl", "git", "ssh", "docker", "kubectl",
    "sbatch", "pip", "torchrun",
}  # fmt: skip
FOLDERS = ("benchmarks", "deploy", "detr", "docs", "pipelines", "presets", "tests", ".ci")
SECTIONS = read_yaml(ROOT / "params.yaml")


def read(path):
    return path.read_text(encoding="utf-8")


def blocks(text, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def spans(text):
    """The code within sentences and tables."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def split(script):
    """The simple commands of a shell script, as lists of words without assignments."""
    script = re.sub(r"(^|\s)#\s.*", r"\1", script).replace("\\\n", " ")
    words = shlex.shlex(script, posix=True, punctuation_chars="();<>|&\n")
    words.whitespace, words.commenters, words.whitespace_split = " \t", "", True
    found = [[]]
    for word in words:
        if set(word) <= set("();<>|&\n"):
            found.append([])
        else:
            found[-1].append(word)
    return [command for command in map(without_assignments, found) if command]


def without_assignments(words):
    return list(dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))


def commands(text):
    """Every command of a page: those of its shell blocks, and code within sentences that begins as one."""
    begins = r"(python (-m|benchmarks/)|make |dvc |mlflow |prefect |torchrun |bash )"
    inline = [span for span in spans(text) if re.match(begins, span)]
    return [command for script in [*blocks(text, "bash"), *inline] for command in split(script)]


def check_python(words):
    """A module with its arguments, or a script of the project with options that it has."""
    if words[0] != "-m":
        script = read(ROOT / words[0])
        for option in (word for word in words[1:] if word.startswith("--")):
            assert f'"{option}"' in script, f"{words[0]} has no {option}"
    elif words[1] in ("pytest", "prefect", "mlflow", "dvc"):
        check(words[1:])
    elif words[1] == "pipelines":
        assert words[2:] == [] or build_parser().parse_args(words[2:])
    elif not words[1].rpartition(".")[2].isupper():  # which stands for a name
        assert importlib.util.find_spec(words[1]), f"there is no module {words[1]}"
        assert not words[2:], f"{words[1]} takes no arguments"


def check(words):
    """Fails where a command would not be understood."""
    program, arguments = words[0], words[1:]
    if program in ("python", "python3.11"):
        check_python(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w./-]+):", read(ROOT / "Makefile"), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif program == "dvc":
        from dvc.cli import parse_args

        parse_args(arguments)
    elif program == "mlflow":
        with warnings.catch_warnings(action="ignore"):  # what MLflow says of its own types
            from mlflow.cli import cli

        context = cli.make_context("mlflow", list(arguments))
        while hasattr(context.command, "resolve_command"):
            name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(name, rest, parent=context)
    elif program == "prefect":
        from prefect.cli._app import _app

        _app.parse_args([word for word in arguments if word != "--no-prompt"], print_error=False, exit_on_error=False)
    else:
        assert program in {*SHELL, "pytest", "bash"}, f"{program} is no program that these pages use"
    for word in words:
        if word.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
            assert (ROOT / word).exists(), f"{word} does not exist"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_every_command_parses(name):
    for words in commands(read(ROOT / name)):
        try:
            check(words)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{name}: {shlex.join(words)}: {type(error).__name__}: {error}")


def test_commands_are_found_and_wrong_ones_refused():
    script = "a=1 python -m pipelines run --set 'b={c: 1,\nd: 2}' && (make demo |  # of it\n   dvc repro)\nset -a; . x"
    words = [["python", "-m", "pipelines", "run", "--set", "b={c: 1,\nd: 2}"], ["make", "demo"], ["dvc", "repro"]]
    assert split(script.replace("a=1", "A=1")) == [*words, ["set", "-a"], [".", "x"]]
    assert sum(len(commands(read(path))) for path in PAGES) > 100
    for line in (
        "python -m pipelines rnu", "python -m pipelines run --sett a=1", "python -m pipelines.trian", "make demmo",
        "dvc reproo", "mlflow models serv", "mlflow models serve --modell x", "prefect worker strat", "pyhton x",
        "python benchmarks/padding.py --quik", "sbatch deploy/slum.sh",
    ):  # fmt: skip
        with pytest.raises((Exception, SystemExit)):
            check(shlex.split(line))


@cache
def anchors(path):
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", read(path), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def links(path):
    """The text and the address of every link of a page that leads to a file of the project."""
    found = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", read(path))
    return [(text, address) for text, address in found if not re.match(r"\w+://", address)]


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name):
    for text, address in links(ROOT / name):
        place, _, anchor = address.partition("#")
        target = ((ROOT / name).parent / place).resolve() if place else ROOT / name
        assert target.exists(), f"{name}: {address}"
        assert not anchor or anchor in anchors(target), f"{name}: {address}; {sorted(anchors(target))}"
        if text.startswith("test_") and not text.endswith(".py"):
            assert re.search(rf"^def {text}\(", read(target), re.MULTILINE), f"{name}: {text}"


def test_every_page_and_picture_is_reached_from_the_readme():
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page not in seen:
            seen.add(page)
            places = [(page.parent / address.partition("#")[0]).resolve() for _, address in links(page)]
            todo += [place for place in places if place.suffix in (".md", ".png") and place.is_file()]
            todo = [place for place in todo if place.suffix == ".md" or not seen.add(place)]
    assert {*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.png")} <= seen


@pytest.mark.parametrize("name", NAMES)
def test_every_file_and_parameter_that_is_named_exists(name):
    text = read(ROOT / name)
    for span in [*spans(text), *blocks(text, "bash")]:
        for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", span):
            assert (ROOT / path).exists() or path == "benchmarks/NAME.py", f"{name}: {path}"
        for key in re.findall(rf"(?<![\w./-])(?:{'|'.join(SECTIONS)})\.[a-z_0-9.]*[a-z_0-9](?!\()", span):
            if name != "CHANGELOG.md" and key.rpartition(".")[2] not in ("py", "zip", "safetensors"):
                assert has_key(key), f"{name}: {key}"


def has_key(key):
    document = SECTIONS
    for part in key.split("."):
        if document == "shapes" or document == {}:
            return True  # a source of four files, an empty mapping
        if part not in document:
            return False
        document = document[part]
    return True


def test_the_readme_has_at_most_150_lines_and_names_every_page_of_the_command_line():
    text = read(ROOT / "README.md")
    assert text.count("\n") <= 150
    assert all(f"python -m pipelines ui {name}" in text for name in PORTS)


def test_the_tree_is_the_disks():
    tree, rooms, *_ = blocks(read(ROOT / "docs/architecture.md"), "text")
    hidden = (".gitattributes", ".gitignore", ".dvcignore", "dvc.lock")
    on_disk = {path.parts[0] for path in tracked() if path.parts[0] not in hidden and (ROOT / path.parts[0]).exists()}
    assert {line.split()[0] for line in tree.splitlines()} == on_disk | {"data"}
    shown, folder = set(), ""
    for word in rooms.split():
        folder = word if word.endswith("/") else folder
        shown |= set() if word.endswith("/") else {f"{folder}{word}.py"}
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "pipelines").rglob("*.py")]
    assert shown == {name for name in modules if not name.endswith("__.py")}


def test_what_is_generated_is_fresh():
    assert generate.write_parameters() == read(ROOT / "docs/parameters.md"), "python -m docs.generate"
    assert generate.with_rules(read(ROOT / "docs/validation.md")) == read(ROOT / "docs/validation.md")


def test_every_parameter_has_a_meaning():
    page, rules = read(ROOT / "docs/parameters.md"), read(ROOT / "docs/validation.md")
    todo, keys = [("", SECTIONS)], []
    while todo:
        name, value = todo.pop()
        if isinstance(value, dict) and value and name != "validate.tolerated":
            todo += [(f"{name}.{key}".lstrip("."), one) for key, one in value.items()]
        else:
            keys.append(name)
    assert len(keys) > 75
    assert [
        key for key in keys if not re.search(rf"^\| `{re.escape(key)}` \| \w[^|]{{5,}} \|", page, re.MULTILINE)
    ] == []
    assert [rule for rule in SECTIONS["validate"]["tolerated"] if f"| `{rule}` |" not in rules] == []


def test_every_variable_of_ours_is_in_the_table_and_the_reverse():
    files = [
        ROOT / path for path in tracked() if path.suffix in (".py", ".yaml", ".sh", ".example", "") and path.is_file()
    ]
    code = " ".join(read(path) for path in files if path.suffix or path.name in ("Makefile", "run"))
    page = read(ROOT / "docs/environment.md")
    assert set(re.findall(r"\bDETR_[A-Z_]+\b", code)) == set(re.findall(r"\bDETR_[A-Z_]+\b", page))
    assert set(re.findall(r"\$\{(\w+)", read(ROOT / "compose.yaml"))) <= set(re.findall(r"\b[A-Z_]+\b", page))


def texts():
    """Every text of the code, with what differs in it as a space that no message has."""
    for path in [*(ROOT / "detr").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]:
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    yield read(ROOT / "Makefile").replace('\\"', "\0")


def test_messages_are_those_of_the_code():
    messages = re.findall(r"^\| `([^`]+)` \|", read(ROOT / "docs/troubleshooting.md"), re.MULTILINE)
    known = list(texts())
    assert len(messages) > 40
    for message in messages:
        parts = [part for part in message.split("…") if part.strip()]
        assert max(map(len, parts)) > 12, message
        pattern = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(text) for text in known), message


@pytest.mark.parametrize("name", ["README.md", "docs/library.md"])
def test_the_library_in_the_documents_runs_as_written(name, drawn, tmp_path, monkeypatch, capsys):
    registered.write_model(tmp_path / "artifacts/train", registered.categories(drawn))
    Image.new("RGB", (120, 90), "teal").save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    (code, *more) = [block for block in blocks(read(ROOT / name), "python") if "load_official(" not in block]
    names: dict = {}
    for block in (code.replace("threshold=0.5", "threshold=0.0"), *more):
        exec(compile(block, name, "exec"), names)
    assert len(names["found"].names) > 0
    assert capsys.readouterr().out
    assert name == "README.md" or (tmp_path / "attention.png").exists()


def test_the_picture_of_detections_is_drawn_of_any_model_and_data(drawn, tmp_path):
    model = registered.write_model(tmp_path / "model", registered.categories(drawn))
    picture = draw_detections.draw_detections(model, drawn)
    with Image.open(ROOT / "docs/detections.png") as committed:
        assert picture.size == committed.size
    assert len(picture.getcolors(1 << 20)) > 100
