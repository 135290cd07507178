"""common/cli.py: how every program ends, what it prints, and which flags it takes."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import sample
import train
from common import cli
from common.progress import pace

ROOT = Path(__file__).parents[2]
APPLE = ["--image", "assets/ATTRIBUTION.md"]     # no picture: what the flags say comes first


def program(body, *flags, **how):
    """A program of these lines, run as the others are."""
    code = f"import sys\nfrom common import cli\ndef main():\n    {body}\ncli.run(main)"
    return subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True,
                          **how)


@pytest.mark.parametrize("body, status, said", [
    ("raise cli.UserError('the tar is cut')", 1, "error: the tar is cut\n"),
    ("open('nowhere/x')", 1, "error: nowhere/x: No such file or directory\n"),
    ("open('assets')", 1, "error: assets: Is a directory\n"),
    ("raise KeyboardInterrupt", 130, "stopped\n"),
    ("cli.Parser('').parse_args()", 2, "error: unknown argument --x; did you mean --help?\n"),
    ("pass", 0, ""),
])
def test_a_program_ends_in_one_line_and_a_status(body, status, said):
    done = program(body, *(["--x"] if "Parser" in body else []))
    assert (done.returncode, done.stderr) == (status, said)


def test_a_fault_of_ours_keeps_its_traceback():
    done = program("raise OSError('no file, so not the person')")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_what_the_terminal_cannot_show_is_named():
    done = program("print('snow: \\u2603'); print('\\udc80', file=sys.stderr)", env=os.environ | {
        "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and done.stdout == "snow: \\N{SNOWMAN}\n"


def test_a_reader_that_goes_away_is_no_mistake():
    code = "from common import cli\ndef main():\n    for i in range(99999): print('line', i)\ncli.run(main)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.parametrize("name, flags", [
    ("sample.py", ["--prompt", "a", "--out", "{}/a.png"]), ("evaluate.py", ["emoji"]),
    ("checkpoint.py", ["inspect", "x"]),
    ("train.py", ["--out", "{}/run", "--device", "cpu"]), ("data.py", ["build-emoji", "--out", "{}/x.tar.gz"])])
def test_ctrl_c_while_a_program_is_still_importing_is_one_line(name, flags, tmp_path):
    """The module `hold`, imported in torch's place, says that importing has begun, and goes on for ever."""
    (tmp_path / "torch.py").write_text("import sys, time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, name, *(flag.format(tmp_path) for flag in flags)], cwd=ROOT,
                               text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "stopped\n" and process.returncode == 130


def test_ctrl_c_while_a_run_is_set_up_is_one_line(tmp_path):
    """A pipe in the tar's place: the program waits for it, with everything imported."""
    os.mkfifo(tmp_path / "data.tar.gz")
    process = subprocess.Popen([sys.executable, "train.py", "--image-data", tmp_path / "data.tar.gz", "--out",
                                tmp_path / "run"],
                               cwd=ROOT, stderr=subprocess.PIPE, text=True)
    writer = os.open(tmp_path / "data.tar.gz", os.O_WRONLY)  # returns when the program opens it for reading
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "stopped\n" and process.returncode == 130
    os.close(writer)


@dataclass
class Config:
    steps: int = cli.option(4, "updates", low=1)
    share: float = cli.option(0.5, "50% of the texts", low=0, high=1)
    way: str = cli.option("up", "where to", choices=["up", "down"])
    every: int | None = cli.option(None, "steps between lines (a tenth)", low=0)
    quick: bool = False


def parse(*flags):
    parser = cli.Parser("")
    parser.add_fields(Config, dict(steps=9))
    return vars(parser.parse_args(list(flags)))


def test_flags_of_a_dataclass_are_those_given_in_its_types():
    assert parse() == {}
    assert parse("--steps", "7", "--share", "1e-1", "--way=down", "--quick", "--every", "0") == dict(
        steps=7, share=0.1, way="down", quick=True, every=0)


@pytest.mark.parametrize("flags, said", [
    (["--steps", "0"], "--steps: expected a whole number, at least 1, got '0'"),
    (["--steps", "1.5"], "--steps: expected a whole number, at least 1, got '1.5'"),
    (["--share", "nan"], "--share: expected a number from 0 to 1, got 'nan'"),
    (["--share", "inf"], "--share: expected a number from 0 to 1, got 'inf'"),
    (["--share", "1.01"], "--share: expected a number from 0 to 1, got '1.01'"),
    (["--way", "left"], "--way: invalid choice: 'left' (choose from 'up', 'down')"),
    (["--quik"], "unknown argument --quik; did you mean --quick?"),
    (["--ste", "3"], "unknown argument --ste; did you mean --steps?"),
])
def test_a_value_out_of_range_is_refused_by_name(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*flags)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize("main, flags, said", [
    (train.main, ["--seed", "9" * 20], "--seed: expected a whole number from 0 to 9223372036854775807"),
    (train.main, ["--clip", "0"], "--clip: expected a number, at least 1e-06"),
    (train.main, ["--lr", "0"], "--lr: expected a number from 1e-12 to 1"),
    (train.main, ["--lr", "nan"], "--lr: expected a number from 1e-12 to 1"),
    (train.main, ["--question-share", "1"], "--question-share changes nothing without --stage instruct"),
    (train.main, ["--eval-every", "0", "--compare", "x"], "--compare changes nothing without --eval-every"),
    (train.main, ["--init", "assets/emoji", "--preset", "emoji"],
     "--preset changes nothing without a start from scratch"),
    (train.main, ["--init", "assets/emoji", "--vocabulary", "full"],
     "--vocabulary changes nothing without a start"),
    (sample.main, [*APPLE, "--guidance", "9"], "--guidance changes nothing without --prompt"),
    (sample.main, [*APPLE, "--n", "2"], "--n changes nothing without --prompt"),
    (sample.main, [*APPLE, "--out", "x.png"], "--out changes nothing without --prompt"),
    (sample.main, ["--prompt", "a", "--order", "random"], "--order changes nothing without --image"),
    (sample.main, ["--prompt", "a", "--image-cache", "off"], "--image-cache changes nothing without --image"),
    (sample.main, ["--prompt", "a", "--temperature", "1"], "--temperature changes nothing without --image"),
    (sample.main, [*APPLE, "--text", "a [MASK]", "--max-tokens", "3"],
     "--max-tokens changes nothing with --text"),
    (sample.main, ["--prompt", "a", "--guidance", "inf"], "--guidance: expected a number, at least 0.001"),
    (sample.main, ["--prompt", "a\udc80"], "--prompt is no text in this terminal's encoding: 'a\\udc80'"),
])
def test_flags_that_change_nothing_or_mean_nothing_are_refused(main, flags, said, mistake, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, found = mistake(main, flags)
    assert code == 2 and said in found and len(found.splitlines()) == 1


REMOVED = {
    sample.main: ["--joint", "--vary", "--separate", "--zero-steps", "--guidance-rule", "--ramp", "--top-p",
                  "--posterior", "--refresh", "--tokens-per-step"],
    train.main: ["--image-loss", "--text-mean", "--padding", "--schedule", "--decay-from", "--extend", "--rate",
                 "--mfu", "--peak", "--min-side", "--eval-samples"]}


def test_a_removed_flag_is_refused_by_name_with_one_that_exists(mistake):
    nearest = {}
    for main, flags in REMOVED.items():
        for flag in flags:
            code, said = mistake(main, [flag, "1"])
            found = re.fullmatch(rf"error: unknown argument {flag}; did you mean (--[a-z-]+)\?\n", said)
            assert code == 2 and found
            nearest[flag] = found[1]
    assert nearest["--refresh"] == "--image-cache" and nearest["--schedule"] == "--decay-steps"


def test_a_pace_is_told_in_the_unit_that_is_above_one():
    assert [pace(2.5, "step"), pace(0.4, "step")] == ["2.5 steps/s", "2.5 s/step"]
    assert [pace(1234.0), pace(0.4)] == ["1,234.0/s", "2.5 s each"]


def test_help_shows_each_text_and_the_stages_own_default(capsys):
    for stage, rate in (("pretrain", "0.2"), ("instruct", "1.0")):
        with pytest.raises(SystemExit) as stop:
            train.parse(["--stage", stage, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert stop.value.code == 0 and f"--text-weight N lambda, the weight of the text loss ({rate})" in said
        assert "images in the image loss of a step, over all processes (32)" in said
    with pytest.raises(SystemExit):
        parse("--help")
    assert "50% of the texts (0.5)" in capsys.readouterr().out


def test_a_number_is_read_as_its_type():
    assert cli.number(int)("-3") == -3 and cli.number(float)("-3e2") == -300
    for text in ("", "one", "1_0x", "1e999"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a number"):
            cli.number(float)(text)
