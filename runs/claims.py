"""The paper's claims on the emoji set, three seeds each: what runs/table4.sh, table5.sh and lambda.sh call.

    table4    a dual model that starts from a text-to-image model, against one from scratch, at equal steps
    table5    instruction tuning with no, some and all of the image-generation data
    lambda    the weight of the text loss

    python runs/claims.py table4                 # 4,000 steps a stage: hours a run, on two cores days
    python runs/claims.py table4 --quick         # 50 small steps, to see that it works

Each run is a folder below OUT (out/table4); one that was stopped goes on, one that is done is not made again.
At the end OUT.json has every figure of every seed, and the table stands in OUT.md.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import cli  # noqa: E402
import emoji  # noqa: E402
from files import parse_json, replacing, write_json, write_text  # noqa: E402
from data import fraction  # noqa: E402
from devices import DEVICES  # noqa: E402
from metrics.tables import table  # noqa: E402
from tars import Tar  # noqa: E402

SEEDS = (0, 1, 2)
RECIPE = ["--optimizer", "muon", "--lr", "2.5e-3", "--warmup", "50", "--image-batch", "96", "--text-batch", "48",
          "--eval-every", "250", "--save-every", "250"]
QUICK = ["--pixels", "32", "--image-batch", "16", "--text-batch", "16", "--dtype", "float32", "--ema", "0.99",
         "--eval-every", "100"]
PRETRAIN = ("pretrain", ["--stage", "pretrain"])
INSTRUCT = ["--stage", "instruct", "--decay-steps", "{decay}"]   # all steps but the warm-up's
THIRD = ["--image-data", "{third}", "--text-data", str(emoji.TAR)]
# each setting: its stages, (folder, flags), of which each starts from the one before
TABLES = dict(
    table4={"from a text-to-image model": [("text-to-image", ["--stage", "pretrain", "--text-weight", "0"]),
                                           ("from-text-to-image", ["--stage", "pretrain"])],
            "from scratch": [PRETRAIN]},
    table5={"no image data": [PRETRAIN, ("none", [*INSTRUCT, "--image-weight", "0"])],
            "a third of the emoji": [PRETRAIN, ("third", [*INSTRUCT, *THIRD])],
            "all": [PRETRAIN, ("all", INSTRUCT)]},
    **{"lambda": {f"λ = {weight}": [(f"lambda-{weight}", ["--stage", "pretrain", "--text-weight", weight])]
                  for weight in ("0.05", "0.2", "1")}})
# what of evaluate.py's figures is shown, and what of the log's last row
SHOWN = {"caption": "caption, %", "POPE: accuracy": "POPE accuracy, %", "drawing: emoji": "drawn right, %",
         "val_nats": "text, nats a token", "val_image": "velocity's error"}


def write_third(path: Path) -> None:
    """The emoji tar with a third of the emoji to learn from; what is held out stays, to measure alike."""
    with replacing(path) as temporary, tarfile.open(temporary, "w") as small:
        for key, files in Tar(str(emoji.TAR)):
            record = parse_json(files["json"], key)
            if record["split"] == "train" and fraction(f"third {record['emoji']}") >= 1 / 3:
                continue
            for kind, content in files.items():
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(content)
                small.addfile(member, io.BytesIO(content))


def call(command: list[str], threads: int) -> None:
    """Raises SystemExit with what it said, if it fails."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}))
    if done.returncode:
        raise SystemExit(f"python {' '.join(command)}\n{done.stderr}")


def train(args: argparse.Namespace, name: str, flags: list[str], before: Path | None, seed: int) -> None:
    folder = args.out / f"{name}_{seed}"
    given = [flag.format(third=args.out / "third.tar", decay=max(1, args.steps - 50)) for flag in flags]
    command = ["train.py", *RECIPE, *given, *(["--init", str(before)] if before else []), "--seed", str(seed),
               "--steps", str(args.steps), "--out", str(folder), "--sample-every", "0", "--device",
               args.device]
    small = [] if not args.quick else QUICK[2:] if before else QUICK
    call([*command, *small], args.threads)
    print(f"{folder}: {args.steps} steps", file=sys.stderr, flush=True)


def measure(args: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    """What is shown of one run; of a checkpoint that was measured nothing is measured again."""
    folder = args.out / f"{name}_{seed}"
    file = folder / f"emoji_{args.steps}.json"
    if not file.exists():
        call(["evaluate.py", "emoji", "--checkpoint", str(folder), "--splits", "train", "--limit",
              str(args.limit), "--prompts", str(args.limit), "--device", args.device, "--json", str(file)],
             args.threads)
    found = json.loads(file.read_text())["results"]["train"][0]
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return found | next(row for row in reversed(rows) if "val_nats" in row)


def main() -> None:
    parser, count = cli.Parser(__doc__), dict(type=cli.number(int, 1), metavar="N")
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--out", type=Path, help="(out/TABLE)")
    parser.add_argument("--steps", **count, help="of each stage (4000; --quick 50)")
    parser.add_argument("--limit", **count, help="pictures read, and prompts drawn (200; --quick 20)")
    parser.add_argument("--quick", action="store_true", help="32x32 pixels, 16 pictures and texts a step")
    parser.add_argument("--at-once", default=2, **count, help="runs at once (2)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(auto)")
    args = parser.parse_args()
    args.out = args.out or Path("out") / (args.table + "-quick" * args.quick)
    args.steps = args.steps or (50 if args.quick else 4000)
    args.limit = args.limit or (20 if args.quick else 200)
    args.threads = max(1, (os.cpu_count() or 1) // args.at_once)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = TABLES[args.table]
    if args.table == "table5" and not (args.out / "third.tar").exists():
        write_third(args.out / "third.tar")
    with ThreadPoolExecutor(args.at_once) as pool:
        for depth in range(max(map(len, settings.values()))):    # shared stages once
            stages = {s[depth][0]: (s[depth][1], s[depth - 1][0] if depth else None)
                      for s in settings.values() if depth < len(s)}
            list(pool.map(lambda task: train(args, *task), [
                (name, flags, before and args.out / f"{before}_{seed}", seed)
                for seed in SEEDS for name, (flags, before) in stages.items()]))
        found = {setting: list(pool.map(lambda seed: measure(args, stages[-1][0], seed), SEEDS))
                 for setting, stages in settings.items()}
    asked = args.table == "table5"                               # in the others nobody has learnt to answer
    rows = {setting: {column: [run[name] for run in runs] for name, column in SHOWN.items()
                      if asked or "POPE" not in name} for setting, runs in found.items()}
    shown = table(rows, 3, args.table)
    write_json(Path(f"{args.out}.json"), dict(table=args.table, steps=args.steps, limit=args.limit,
                                              quick=args.quick, seeds=SEEDS, runs=found))
    write_text(Path(f"{args.out}.md"), shown + "\n")
    print(shown)


if __name__ == "__main__":
    cli.run(main)
