"""runs/claims.py: which runs a table is made of, what starts from what, and what the table says."""

import json
import sys
from pathlib import Path

import pytest

import emoji
from stages import parse
from files import parse_json
from tars import Tar

sys.path.insert(0, str(Path(__file__).parent.parent / "runs"))
import claims  # noqa: E402


@pytest.fixture
def called(monkeypatch, tmp_path):
    """The flags of every run, which is not made; a log and figures by seed are left in its place."""
    found = []

    def call(command, threads):
        flags = dict(zip(command[1::1], command[2::1]))
        seed = int(flags.get("--seed", "0"))
        if command[0] == "train.py":
            found.append(command[1:])
            (out := Path(flags["--out"])).mkdir(exist_ok=True)
            (out / "log.jsonl").write_text(json.dumps(dict(val_nats=1.5 + seed, val_image=0.25)) + "\n{}\n")
        else:
            found.append(command)
            row = {"caption": 50.0, "POPE: accuracy": 75.0, "drawing: emoji": 12.0, "answer: name": 3.0}
            Path(flags["--json"]).write_text(json.dumps(dict(results=dict(train=[row]))))
    monkeypatch.setattr(claims, "call", call)
    monkeypatch.setattr(claims, "write_third", lambda path: path.write_bytes(emoji.TAR.read_bytes()))
    return found


@pytest.mark.parametrize("table, runs, rows", [("table4", 9, 2), ("table5", 12, 3), ("lambda", 9, 3)])
def test_a_table_is_made_of_three_seeds_and_of_shared_stages_once(table, runs, rows, called, tmp_path,
                                                                  monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["claims.py", table, "--out", str(tmp_path / "t"), "--steps", "7"])
    claims.main()
    trained = [flags for flags in called if flags[0] != "evaluate.py"]
    assert len(trained) == len({flags[flags.index("--out") + 1] for flags in trained}) == runs
    assert len(called) - runs == 3 * rows
    made = []
    for flags in trained:                                        # in the order in which they were started
        before = flags[flags.index("--init") + 1] if "--init" in flags else None
        assert before is None or before in made and before[-2:] == flags[flags.index("--out") + 1][-2:]
        made.append(flags[flags.index("--out") + 1])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 + rows and all("2.500 (1.500–3.500)" in line for line in said[2:])
    assert ("POPE" in said[0]) == (table == "table5")
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["steps"] == 7 and all(len(each) == 3 for each in found["runs"].values())
    assert (tmp_path / "t.md").read_text().splitlines() == said
    called.clear()
    claims.main()                                                # what is measured is not measured again
    assert len(called) == runs


def test_every_stage_takes_flags_that_train_has(tmp_path, tiny):
    for settings in claims.TABLES.values():
        for stages in settings.values():
            for i, (_, flags) in enumerate(stages):
                given = [flag.format(third=emoji.TAR, decay=1) for flag in flags] + ["--init", str(tiny)] * (i > 0)
                small = claims.QUICK[2:] if i else claims.QUICK
                config = parse([*claims.RECIPE, *given, *small, "--steps", "7", "--sample-every", "0", "--device", "cpu"])
                assert config.steps == 7 and config.image_batch == 16
    weights = [parse(flags).text_weight for stages in claims.TABLES["lambda"].values() for _, flags in stages]
    assert weights == [0.05, 0.2, 1]


def test_a_third_of_the_emoji_is_left_to_learn_from_and_all_that_is_held_out(tmp_path):
    claims.write_third(tmp_path / "third.tar")
    records = lambda path: [parse_json(files["json"], key) for key, files in Tar(str(path))]
    whole, third = records(emoji.TAR), records(tmp_path / "third.tar")
    held = lambda found: sorted(r["key"] for r in found if r["split"] != "train")
    left, every = ({r["emoji"] for r in found if r["split"] == "train"} for found in (third, whole))
    assert held(third) == held(whole) and left < every and 0.3 < len(left) / len(every) < 0.37
    kept = [r["key"] for r in whole if r["split"] == "train" and r["emoji"] in left]
    assert kept == [r["key"] for r in third if r["split"] == "train"]
