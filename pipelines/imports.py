"""Which of the project's files a Python file imports: what its results depend on, and what must be packed with it."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).parent.parent


def trace_imports(*paths: Path, root: Path = ROOT) -> set[Path]:
    """The files under `root` that these import at run time, directly or not, with themselves.

    An import inside a function counts, one for type checkers alone (`if TYPE_CHECKING`) does not.
    """
    seen: set[Path] = set()
    todo = list(paths)
    while todo:
        if (path := todo.pop()) not in seen:
            seen.add(path)
            todo += list_imports(path, root)
    return seen


def list_imports(path: Path, root: Path = ROOT) -> set[Path]:
    """The files under `root` that a file itself imports, `__init__.py` too where it has code."""
    found = set()
    for name in _list_names(path):
        for end in range(1, name.count(".") + 2):
            place = root.joinpath(*name.split(".")[:end])
            package = place / "__init__.py"
            if place.with_suffix(".py").is_file():
                found.add(place.with_suffix(".py"))
            elif package.is_file() and _has_code(package):
                found.add(package)
            elif end > 1 and (home := read_lazy_names(place.parent / "__init__.py").get(place.name)):
                found.add(root.joinpath(*home.split(".")).with_suffix(".py"))
    return found - {path}


def _list_names(path: Path) -> Iterator[str]:
    """Full dotted names of what a file imports at run time, or takes from a package that it imports."""
    tree, packages = ast.parse(path.read_bytes()), set()
    for node in _walk_code(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            packages |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ValueError(f"{path}, line {node.lineno}, imports by a relative name; write the full one")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for node in _walk_code(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in packages:
            yield f"{node.value.id}.{node.attr}"


def _walk_code(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes that can run."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        todo += node.orelse if _is_for_type_checkers(node) else ast.iter_child_nodes(node)


def _is_for_type_checkers(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _has_code(package: Path) -> bool:
    """Whether an `__init__.py` is more than its docstring."""
    return any(not isinstance(node, ast.Expr) for node in ast.parse(package.read_bytes()).body)


def read_lazy_names(package: Path) -> dict[str, str]:
    """The module of each name that a package imports where it is first used, by what it tells type checkers."""
    if not package.is_file():
        return {}
    blocks = [node for node in ast.parse(package.read_bytes()).body if _is_for_type_checkers(node)]
    nodes = [node for block in blocks for node in ast.walk(block) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: str(node.module) for node in nodes for alias in node.names}
