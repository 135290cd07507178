"""Imports run one way, from the commands down to the maths: docs of the layout are true."""

import ast

from helpers import ROOT

# each may import what stands in an earlier row, and its own folder; imports inside functions count
ROWS = [["common"], ["flow", "mask_diffusion", "model"], ["pretrained"], ["checkpoint"], ["dataset"], ["viz.grids"],
        ["data"], ["inference"], ["viz"], ["training", "metrics"], ["sample", "train", "evaluate"], ["experiments"]]
ROW = {name: number for number, names in enumerate(ROWS) for name in names}


def group(module: str) -> str:
    """Return the entry of ROWS that a module belongs to, such as "viz" for viz.curves."""
    return module if module in ROW else module.split(".")[0]


def imports() -> dict[str, set[str]]:
    """Return the project's modules with the project's modules that each imports."""
    names = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path
             for name in ROW for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/*.py")]}
    found = {}
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name].update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found[name].update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        found[name] &= names.keys()
    return found


def test_every_import_runs_down():
    upward = [f"{name} imports {other}" for name, others in imports().items() for other in sorted(others)
              if group(other) != group(name) and ROW[group(other)] >= ROW[group(name)]]
    assert not upward, "these arrows run up: " + "; ".join(upward)


def test_no_imports_go_in_a_circle():
    graph = imports()
    while leaves := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in leaves}
    assert not graph, f"a circle among {sorted(graph)}"
