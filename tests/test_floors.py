"""The floors of the house hold: `distill/` imports no other room, the rooms never each other, the data half no torch.

The checker reads the source (imports at any depth, and lazy "package.module:name" strings), so that an import inside a
function or a table counts as well. It is tried on a synthetic tree first: a checker that cannot fail proves nothing.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("distill", "teachers", "students", "align")
ROOF = "cli"
HEAVY = ("torch", "transformers", "vllm", "accelerate", "safetensors")
# Prompts to verified traces, and the command line itself: torch is imported inside functions only, directly or not.
DATA_HALF = (
    "cli",
    "distill",
    "distill.records",
    "distill.errors",
    "distill.tables",
    "distill.config",
    "distill.store",
    "teachers.prompts",
    "teachers.filters",
    "teachers.verifiers",
    "teachers.generate",
    "teachers.refilter",
    "teachers.sampling",
    "teachers.plan",
    "teachers.curation",
    "teachers.judging",
    "teachers.score",
    "teachers.engines.server",
    "teachers.engines.replay",
    "distill.signals",
    "distill.export",
)
LAZY = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")


def modules(root: Path) -> dict[str, Path]:
    """Return the dotted name and file of every module of the house."""
    files = [root / f"{ROOF}.py", *(file for room in ROOMS for file in sorted((root / room).rglob("*.py")))]
    named = {}
    for file in files:
        if file.is_file():
            parts = file.relative_to(root).with_suffix("").parts
            named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return named


def imports(name: str, file: Path, *, top_level_only: bool = False) -> list[tuple[int, str]]:
    """Return line and dotted name of everything a module imports; relative names are made absolute.

    With `top_level_only`, what is imported when the module is (class bodies, try and if blocks included; not functions,
    lazy strings and `if TYPE_CHECKING:`).
    """
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    nodes = list(_eager(tree)) if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found += [(node.lineno, f"{base}.{alias.name}" if base else alias.name) for alias in node.names]
        elif not top_level_only and isinstance(node, ast.Constant) and isinstance(node.value, str):
            if LAZY.fullmatch(node.value):
                found.append((node.lineno, node.value.partition(":")[0]))
        elif not top_level_only and isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                found.append((node.lineno, str(first.value)))
    return found


def _eager(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _eager(child)


def broken_floors(root: Path) -> list[str]:
    """Return one line for each import that breaks a floor."""
    broken = []
    for name, file in modules(root).items():
        room = name.partition(".")[0]
        if room == ROOF:
            continue
        allowed = {"distill", room}
        for line, imported in imports(name, file):
            target = imported.partition(".")[0]
            if target in (*ROOMS, ROOF) and target not in allowed:
                broken.append(f"{file.relative_to(root)}:{line}: {room} imports {imported}")
    return broken


def graph(root: Path) -> dict[str, set[str]]:
    """Return which modules of the house each imports when it is imported, parents included."""
    known = modules(root)
    edges: dict[str, set[str]] = {}
    for name, file in known.items():
        targets = set()
        for _, imported in imports(name, file, top_level_only=True):
            parts = imported.split(".")
            targets |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)} & set(known)
        parts = name.split(".")
        edges[name] = (targets | {".".join(parts[:i]) for i in range(1, len(parts))} & set(known)) - {name}
    return edges


def cycles(root: Path) -> list[str]:
    """Return the cycles of module imports; a package's `__init__` that offers its own modules' names is none."""
    edges = graph(root)
    edges = {n: {t for t in ts if not (n.startswith(f"{t}.") or t.startswith(f"{n}."))} for n, ts in edges.items()}
    found, done = [], set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in sorted(edges[name]):
                walk(target, (*path, name))
            done.add(name)

    for name in sorted(edges):
        walk(name, ())
    return found


def heavy_data_half(root: Path) -> list[str]:
    """Return each chain of eager imports that leads from the data half to torch and its like."""
    known, edges = modules(root), graph(root)
    roots = [name for name in known if any(name == d or name.startswith(f"{d}.") for d in DATA_HALF if d != "distill")]
    roots += [name for name in ("distill",) if name in known]
    heavy = {
        name: [
            f"{imported} (line {line})"
            for line, imported in imports(name, file, top_level_only=True)
            if imported.partition(".")[0] in HEAVY
        ]
        for name, file in known.items()
    }
    broken = []
    for start in roots:
        seen, queue = {start}, [(start,)]
        while queue:
            path = queue.pop()
            broken += [f"{' -> '.join(path)} imports {what}" for what in heavy[path[-1]]]
            for target in edges[path[-1]] - seen:
                seen.add(target)
                queue.append((*path, target))
    return broken


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small house whose floors hold."""
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("")
    (tmp_path / "cli.py").write_text("def run():\n    import teachers, students, align, distill\n")
    (tmp_path / "distill/records.py").write_text("import json\n")
    (tmp_path / "distill/store.py").write_text("from distill.records import json\n")
    (tmp_path / "distill/models.py").write_text("import torch\n")
    (tmp_path / "teachers/generate.py").write_text("from distill.store import json\nfrom . import verifiers\n")
    (tmp_path / "teachers/verifiers").mkdir()
    (tmp_path / "teachers/verifiers/__init__.py").write_text('TABLE = {"math": "teachers.verifiers.math:check"}\n')
    return tmp_path


def everything(root: Path) -> list[str]:
    return broken_floors(root) + cycles(root) + heavy_data_half(root)


def test_sound_house_passes(house: Path) -> None:
    assert everything(house) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("distill/store.py", "import teachers"),
        ("distill/store.py", "def f():\n    import teachers.generate"),
        ("distill/store.py", "from students import build"),
        ("distill/store.py", "from .. import align"),
        ("distill/store.py", "from ..teachers import generate"),
        ("distill/store.py", 'TABLE = {"x": "teachers.generate:run"}'),
        ("distill/store.py", 'import importlib\nimportlib.import_module("align.identity")'),
        ("distill/store.py", "if 1:\n    import cli"),
        ("teachers/generate.py", "import students"),
        ("students/__init__.py", "def f():\n    from align import identity"),
        ("align/__init__.py", "import teachers.verifiers"),
    ],
)
def test_broken_floor_is_seen(house: Path, file: str, line: str) -> None:
    (house / file).write_text(line + "\n")
    assert [b for b in broken_floors(house) if b.startswith(file)]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("distill/records.py", "import torch"),
        ("distill/records.py", "from transformers import AutoTokenizer"),
        ("distill/__init__.py", "import torch.nn"),
        ("distill/store.py", "from distill.models import load_model"),  # heavy through another module
        ("teachers/verifiers/__init__.py", "try:\n    import vllm\nexcept ImportError:\n    vllm = None"),
        ("teachers/generate.py", "class A:\n    import torch"),
        ("cli.py", "import distill.models"),
    ],
)
def test_heavy_import_in_the_data_half_is_seen(house: Path, file: str, line: str) -> None:
    (house / file).write_text(line + "\n")
    assert heavy_data_half(house)


@pytest.mark.parametrize(
    "line", ["def f():\n    import torch", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"]
)
def test_import_inside_a_function_or_for_types_is_light(house: Path, line: str) -> None:
    (house / "distill/records.py").write_text(line + "\n")
    assert heavy_data_half(house) == []


def test_cycle_is_seen(house: Path) -> None:
    (house / "distill/records.py").write_text("from distill.store import json\n")
    assert cycles(house) == ["distill.records -> distill.store -> distill.records"]


def test_this_house() -> None:
    assert "distill.records" in modules(ROOT)
    assert everything(ROOT) == []
