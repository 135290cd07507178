"""README.md and docs/: commands have flags that exist, and links and file names lead somewhere."""

import importlib
import inspect
import re
import shlex

import pytest

from helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"\b(?:python(?:3)? (-m [\w.]+|\w+\.py)|torchrun .*?(\w+\.py))(?=\s|$)(.*)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAME = re.compile(r"`([\w./-]+)`")
WITH_COMMANDS = {"data", "evaluate", "checkpoint"}
PEERS = re.compile(r"experiments\.(compare|make_fixtures)")      # these import packages that aren't ours
# pages on which some commands, or names of files, are of the past
OLD_COMMANDS = {"moved.md", "results.md"}
OLD_NAMES = OLD_COMMANDS | {"benchmarks.md"}
CREATED = {"dataset/csv_folder.py"}                              # files that the reader is told to write


def page_name(page) -> str:
    return str(page.relative_to(ROOT))


def commands(page) -> list[str]:
    """Return the commands of a page: lines of its blocks, joined at backslashes, and inline code."""
    text = page.read_text()
    lines = []
    for language, block in BLOCK.findall(text):
        if language in ("", "bash", "sh"):
            lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python|torchrun) [^`]+)`", BLOCK.sub("", text))
    return [part for line in lines for part in re.split(r" && |; ", line.split("  #")[0])]


@pytest.fixture(scope="module")
def help_of():
    """Return a function that returns the help of a program, or of one of its commands."""
    help_texts = {}

    def help_of(name: str, command: str, capsys, monkeypatch) -> str:
        if (name, command) not in help_texts:
            argv = [command, "--help"] if command else ["--help"]
            main = importlib.import_module(name).main
            monkeypatch.setattr("sys.argv", [name, *argv])
            with pytest.raises(SystemExit):
                main(*[argv][:len(inspect.signature(main).parameters)])
            help_texts[name, command] = capsys.readouterr().out
        return help_texts[name, command]
    return help_of


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in OLD_COMMANDS], ids=page_name)
def test_commands_have_flags_that_exist(page, help_of, capsys, monkeypatch):
    wrong = []
    for line in commands(page):
        match = PROGRAM.search(line)
        if not match or "git checkout" in line:
            continue
        program = (match[1] or match[2]).removeprefix("-m ").removesuffix(".py")
        words = shlex.split(match[3].replace("...", ""))
        if program in ("pytest", "venv", "pip") or PEERS.match(program):
            continue
        if not (ROOT / (program.replace(".", "/") + ".py")).exists():
            wrong.append(f"no {program}: {line}")
            continue
        command = words[0] if program in WITH_COMMANDS and words and words[0] != "--help" else ""
        for flag in (word.split("=")[0] for word in words if word.startswith("--")):
            help_text = help_of(program, command, capsys, monkeypatch)
            if not re.search(rf"{flag}(?![\w-])", help_text):
                wrong.append(f"no {flag}: {line}")
    assert wrong == []
    assert page.parent.name == "tests" or commands(page)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_and_file_names_exist(page):
    text = page.read_text()
    wrong = []
    for link in LINK.findall(text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists():
            wrong.append(link)
        elif anchor and anchor not in anchors(target.read_text()):
            wrong.append(link)
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    for name in NAME.findall(BLOCK.sub("", text)):
        is_ours = name.split("/")[0] in folders - {"out", "data"} and "." in name
        if is_ours and page.name not in OLD_NAMES and name not in CREATED and not (ROOT / name).exists():
            wrong.append(name)
    assert wrong == []


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 2000 and len(text.splitlines()) <= 260
    assert max(map(len, text.splitlines())) <= 120
