"""common/cli.py: every program's exit status, error messages and flags."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch

import evaluate
import sample
import train
from common import cli
from common.progress import pace
from helpers import ROOT, Forked, wait_until

IMAGE = ["--image", "assets/ATTRIBUTION.md"]     # not an image: flags are checked before files


CODE = "import sys\nfrom common import cli\ndef main():\n    {}\ncli.run(main)"


def run_program(body, *flags, **environment):
    """Run a program with this body under cli.run, in a new process."""
    return subprocess.run([sys.executable, "-c", CODE.format(body), *flags], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | environment)


@pytest.mark.parametrize("body, status, parts", [
    ("raise cli.UserError('the tar is cut')", 1, ["error: the tar is cut"]),
    ("open('nowhere/x')", 1, ["error: ", "nowhere/x", "No such file"]),
    ("open('assets')", 1, ["error: ", "assets", "Is a directory"]),
    ("raise KeyboardInterrupt", 130, ["stopped"]),
    ("cli.Parser('').parse_args()", 2, ["error: ", "--x", "--help"]),
])
def test_a_program_that_fails_prints_one_line_and_has_a_status(body, status, parts):
    process = run_program(body, *(["--x"] if "Parser" in body else []))
    assert process.returncode == status
    assert process.stderr.count("\n") == 1 and process.stderr.startswith(parts[0])
    for part in parts:
        assert part in process.stderr


def test_a_program_that_succeeds_prints_no_error():
    process = run_program("pass")
    assert (process.returncode, process.stderr) == (0, "")


def test_an_internal_error_keeps_its_traceback():
    process = run_program("raise OSError('without a file')")
    assert process.returncode == 1 and "Traceback" in process.stderr


def test_a_character_the_terminal_lacks_is_printed_by_name():
    process = run_program("print('snow: \\u2603'); print('\\udc80', file=sys.stderr)",
                          PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert process.returncode == 0 and process.stdout == "snow: \\N{SNOWMAN}\n"


def test_control_characters_are_printed_escaped():
    """An ESC, a BEL, a NUL, a line separator, and a change of direction from a file's name."""
    name = "a\\x1b[2J\\x07\\0\\u2028\\u202eb\\x9bc\\r"
    process = run_program(f"print('{name}', 'tab\\there'); raise cli.UserError('{name}\\nd')")
    shown = r"a\x1b[2J\x07\x00\u2028\u202eb\x9bc\r"
    assert process.stdout == f"{shown} tab\there\n"
    assert process.stderr == rf"error: {shown}\nd" + "\n"
    process = run_program("cli.Parser('').parse_args()", "--a\x1b[2J")
    assert process.returncode == 2 and "\x1b" not in process.stderr


def test_a_closed_pipe_ends_a_program_silently():
    code = CODE.format("for i in range(99999): print('line', i)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.parametrize("name, flags", [
    ("sample.py", ["--prompt", "a", "--out", "{}/a.png"]), ("evaluate.py", ["emoji"]),
    ("checkpoint.py", ["inspect", "x"]), ("train.py", ["--out", "{}/run", "--device", "cpu"]),
    ("data.py", ["build-emoji", "--out", "{}/x.tar.gz"])])
def test_ctrl_c_during_imports_prints_one_line(name, flags, tmp_path):
    """A stand-in for torch prints that importing has begun, and sleeps."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, name, *(flag.format(tmp_path) for flag in flags)],
                               cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=20)[1]
    assert (process.returncode, errors) == (130, "stopped\n")


def test_ctrl_c_while_a_run_is_set_up_prints_one_line(tmp_path):
    """The data file is a pipe, so that the program has imported everything and waits for data."""
    pipe = tmp_path / "data.tar.gz"
    os.mkfifo(pipe)
    process = Forked(1, "--image-data", pipe, "--out", tmp_path / "run")
    writers = []

    def is_read():
        """Try to open the pipe, which fails until the program opens it to read."""
        try:
            writers.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True
    wait_until(is_read, process)
    time.sleep(0.05)                                   # the program reads, and waits
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=20)[1]
    os.close(writers[0])
    assert (process.returncode, errors) == (130, "stopped\n")


@dataclass
class Config:
    steps: int = cli.option(4, "updates", low=1)
    share: float = cli.option(0.5, "50% of the texts", low=0, high=1)
    way: str = cli.option("up", "direction", choices=["up", "down"])
    every: int | None = cli.option(None, "steps between lines (a tenth)", low=0)
    quick: bool = False


def parse(*flags):
    parser = cli.Parser("")
    parser.add_fields(Config, dict(steps=9))
    return vars(parser.parse_args(list(flags)))


def test_a_dataclass_becomes_flags_of_its_fields_types():
    assert parse() == {}
    flags = "--steps 7 --share 1e-1 --way=down --quick --every 0"
    assert parse(*flags.split()) == dict(steps=7, share=0.1, way="down", quick=True, every=0)


@pytest.mark.parametrize("flags, parts", [
    (["--steps", "0"], ["--steps", "at least 1", "'0'"]),
    (["--steps", "1.5"], ["--steps", "whole", "'1.5'"]),
    (["--share", "nan"], ["--share", "0 to 1", "'nan'"]),
    (["--share", "inf"], ["--share", "0 to 1", "'inf'"]),
    (["--share", "1.01"], ["--share", "0 to 1", "'1.01'"]),
    (["--way", "left"], ["--way", "'left'", "'up', 'down'"]),
    (["--quik"], ["--quik;", "--quick?"]),
    (["--ste", "3"], ["--ste;", "--steps?"]),               # abbreviations are not accepted
])
def test_a_value_out_of_range_is_refused_by_name(flags, parts, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    for part in parts:
        assert part in error


def refused(main, flags, run_program, *parts):
    """Check that a program rejects these flags with one line and status 2."""
    status, error = run_program(main, flags)
    assert status == 2 and len(error.splitlines()) == 1
    for part in parts:
        assert part in error


@pytest.mark.parametrize("main, flags, missing", [
    (train.main, ["--question-share", "1"], "--stage instruct"),
    (train.main, ["--compare", "x", "--eval-every", "0"], "without --eval-every"),
    (train.main, ["--preset", "emoji", "--init", "assets/emoji"], "scratch"),
    (train.main, ["--vocabulary", "full", "--init", "assets/emoji"], "scratch"),
    (sample.main, ["--guidance", "9", *IMAGE], "--prompt"),
    (sample.main, ["--n", "2", *IMAGE], "--prompt"),
    (sample.main, ["--out", "x.png", *IMAGE], "--prompt"),
    (sample.main, ["--order", "random", "--prompt", "a"], "--image"),
    (sample.main, ["--image-cache", "off", "--prompt", "a"], "--image"),
    (sample.main, ["--temperature", "1", "--prompt", "a"], "--image"),
    (sample.main, ["--max-tokens", "3", *IMAGE, "--text", "a [MASK]"], "--text"),
])
def test_a_flag_that_changes_nothing_is_refused(main, flags, missing, run_program, monkeypatch):
    monkeypatch.chdir(ROOT)
    refused(main, flags, run_program, f"{flags[0]} changes nothing", missing)


@pytest.mark.parametrize("main, flags, limits", [
    (train.main, ["--seed", "9" * 20], "0 to 9223372036854775807"),
    (train.main, ["--clip", "0"], "1e-06"), (train.main, ["--lr", "0"], "1e-12 to 1"),
    (train.main, ["--lr", "nan"], "1e-12 to 1"),
    (sample.main, ["--guidance", "inf", "--prompt", "a"], "0.001"),
    (sample.main, ["--prompt", "a\udc80"], "encoding: 'a\\udc80'"),
])
def test_a_flag_with_an_impossible_value_is_refused(main, flags, limits, run_program):
    refused(main, flags, run_program, flags[0], limits)


@pytest.mark.parametrize("error, expected", [
    (MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False)])
def test_only_these_errors_are_reported_as_out_of_memory(error, expected):
    assert cli.ran_out_of_memory(error) == expected


@pytest.mark.parametrize("path", ["", ".", "tests", "/dev/null", "nowhere/a.json"])
def test_a_path_that_can_hold_no_file_is_refused_before_the_work(path, run_program, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ["shapes", "--checkpoint", "nowhere", "--json", path]
    refused(evaluate.main, flags, run_program, "--json")


def test_a_pace_uses_the_unit_that_is_above_one():
    assert [pace(2.5, "step"), pace(0.4, "step")] == ["2.5 steps/s", "2.5 s/step"]
    assert [pace(1234.0), pace(0.4)] == ["1,234.0/s", "2.5 s each"]


@pytest.mark.parametrize("stage, weight", [("pretrain", "0.2"), ("instruct", "1.0")])
def test_help_shows_the_chosen_stages_defaults(stage, weight, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse(["--stage", stage, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert re.search(rf"--text-weight N [^()]*\({re.escape(weight)}\)", text)
    assert re.search(r"--image-batch N [^()]*\(32\)", text)


def test_help_shows_a_fields_text_with_its_percent_sign(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "50% of the texts (0.5)" in capsys.readouterr().out


def test_a_number_is_read_as_its_type():
    assert cli.number(int)("-3") == -3 and cli.number(float)("-3e2") == -300


@pytest.mark.parametrize("text", ["", "one", "1_0x", "1e999"])
def test_a_text_that_is_no_finite_number_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"number.*'{text}'"):
        cli.number(float)(text)
