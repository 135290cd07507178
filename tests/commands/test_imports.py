"""Imports run one way, from the commands down to the maths."""

import ast
import importlib

import pytest

from helpers import ROOT

# a module may import, also inside functions, from its own folder and from earlier rows only
ROWS = [["common"], ["flow", "mask_diffusion", "model"], ["pretrained"], ["checkpoint"],
        ["dataset"], ["viz.grids"], ["data"], ["inference"], ["viz"], ["training", "metrics"],
        ["sample", "train", "evaluate"], ["experiments"]]
ROW = {name: number for number, names in enumerate(ROWS) for name in names}


def group(module: str) -> str:
    """Return the entry of ROWS that a module belongs to, for example "viz" for viz.curves."""
    return module if module in ROW else module.split(".")[0]


def imported(path) -> set[str]:
    """Return every name that a file imports, and every module that it imports from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Return for each of the project's modules the project's modules that it imports."""
    modules = {}
    for row in ROW:
        for path in [*ROOT.glob(f"{row}.py"), *ROOT.glob(f"{row}/*.py")]:
            modules[str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")] = path
    assert modules.keys() >= {"flow", "train", "dataset.emoji"}
    return {name: imported(path) & modules.keys() for name, path in modules.items()}


def test_experiments_import_names_that_exist():
    """No test runs those of the programs that need other packages."""
    absent = []
    for path in ROOT.glob("experiments/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ROW:
                module = importlib.import_module(node.module)
                folder = ROOT / node.module.replace(".", "/")
                for name in (alias.name for alias in node.names):
                    if not hasattr(module, name) and not (folder / f"{name}.py").exists():
                        absent.append(f"{path.name}: {node.module}.{name}")
    assert not absent, "; ".join(absent)


def test_every_import_runs_down(imports):
    upward = []
    for name, others in imports.items():
        for other in sorted(others):
            if group(other) != group(name) and ROW[group(other)] >= ROW[group(name)]:
                upward.append(f"{name} imports {other}")
    assert not upward, "; ".join(upward)


def test_no_imports_go_in_a_circle(imports):
    graph = dict(imports)
    while leaves := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in leaves}
    assert not graph, f"a circle among {sorted(graph)}"
