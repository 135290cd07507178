"""Check docstrings and comments for openings and phrases that are hard to read."""

import ast
import re

from helpers import ROOT

OTHER_FOLDERS = {"tests", "experiments", ".venv"}
DISLIKED = re.compile(r"^((What|Of|Whether)\b|As `)|\b(of no use|(is|are) said|none chosen)\b")


def docstrings_and_comments(source):
    """Yield (line number, text) of each docstring and comment; comments begin with their #."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if docstring := ast.get_docstring(node):
                yield node.body[0].lineno, docstring
    for line, text in enumerate(source.splitlines(), 1):
        if comment := re.search("(^| )# .*", text):
            yield line, comment[0]


def test_docstrings_and_comments_are_plain_english():
    faults = []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT)
        if name.parts[0] not in OTHER_FOLDERS:
            for line, text in docstrings_and_comments(path.read_text()):
                if DISLIKED.search(" ".join(text.split())):
                    faults.append(f"{name}:{line}: {text}")
    assert not faults, "\n".join(faults)
