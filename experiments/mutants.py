"""Test the tests: break one line at a time, and see which test files fail.

    python -m experiments.mutants                        # every mutant, against the test files named beside it
    python -m experiments.mutants flow.py training/      # the mutants of these files
    python -m experiments.mutants --tests tests          # against all tests: a suite for each mutant
    python -m experiments.mutants --out mutants.md       # the table as Markdown

A mutant is a copy of the working tree in which one piece of code, which must occur exactly once in
its file, is replaced.  It is killed if a test fails or the tests run out of time.  A survivor is a
fault that no test sees.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from common import cli
from common.cli import ROOT, require
from common.files import write_text
from common.progress import Progress

TIMEOUT = 600           # seconds that the tests of one mutant may take
LARGE = ("assets", "tests/fixtures")     # linked into the copies, which only read them


class Mutant(NamedTuple):
    about: str          # the fault, in words
    file: str
    old: str
    new: str
    tests: str          # test files that should notice, separated by spaces


FLOW, MASK, MODEL = "tests/math/test_flow.py", "tests/math/test_mask_diffusion.py", "tests/math/test_model.py"
TRAIN, STAGES = "tests/training/test_train.py", "tests/training/test_stages.py"
PLAN, VALIDATION = "tests/training/test_plan.py", "tests/training/test_validation.py"
RUN, READING = "tests/distributed/test_run_folder.py", "tests/inference/test_image_to_text.py"

MUTANTS = [
    # ------------------------------------------------------------------------------ the mathematics
    Mutant("the velocity points from noise to data", "flow.py",
           "target = noise - x\n", "target = x - noise\n", FLOW),
    Mutant("times shift the other way", "flow.py",
           "return shift * t / (1 + (shift - 1) * t)", "return t / (shift + (1 - shift) * t)", FLOW),
    Mutant("Heun takes only the second velocity", "flow.py", "((v + v_s) / 2)", "v_s", FLOW),
    Mutant("Heun has no last Euler step", "flow.py", "return 2 * s >= t * (1 - 1e-6)", "return True", FLOW),
    Mutant("guidance starts at the text's velocity", "flow.py",
           "return v_null + scale", "return v_text + scale", FLOW),
    Mutant("uniform times are logit-normal", "flow.py",
           '"uniform": uniform_times', '"uniform": logit_normal_times', f"{FLOW} {TRAIN}"),
    Mutant("masking times are one for the batch", "mask_diffusion.py",
           "torch.arange(batch, device=device) / batch", "torch.zeros(batch, device=device)", MASK),
    Mutant("the text loss has no 1/t", "mask_diffusion.py", "return per_text / t\n", "return per_text\n",
           f"{MASK} {TRAIN}"),
    Mutant("[MASK] can be predicted in the loss", "mask_diffusion.py",
           "forbid(logits_at(noised, at).float(), mask_id)", "logits_at(noised, at).float()", MASK),
    Mutant("prompts are masked", "mask_diffusion.py",
           "masked &= ~frozen.to(masked.device)", "pass", f"{MASK} {TRAIN}"),
    Mutant("entropies may sum to twice the level", "mask_diffusion.py",
           "before <= state.level", "before <= 2 * state.level", MASK),
    Mutant("tokens are drawn in float32", "mask_diffusion.py",
           "logits_at(ids, at).to(exact_dtype(ids.device))", "logits_at(ids, at).float()", MASK),
    Mutant("likelihood: levels are rounded down", "mask_diffusion.py", ".ceil().clamp(min=1)", ".floor().clamp(min=1)",
           f"{MASK} {VALIDATION}"),
    Mutant("padding overwrites given text behind an end", "mask_diffusion.py",
           "ids = cut_after_end(ids, ids == config.end_id, written, config)",
           "ids = cut_after_end(ids, ids == config.end_id, torch.ones_like(written), config)", f"{MASK} {READING}"),
    Mutant("the time embedding is of t, not of 1000 t", "model.py", "angles = 1000 * t.float()", "angles = t.float()",
           f"{MODEL} tests/weights/test_layouts.py"),
    Mutant("blocks don't start as the identity", "model.py",
           "            nn.init.zeros_(linear.weight)\n            nn.init.zeros_(linear.bias)\n\n",
           "            nn.init.zeros_(linear.bias)\n\n", MODEL),
    Mutant("the cached text pass forgets the image", "model.py",
           "k = torch.cat([cache.keys, k], dim=2) ", "k = torch.cat([0 * cache.keys, k], dim=2) ",
           f"{MODEL} {READING}"),
    Mutant("the text head is computed in bfloat16", "model.py",
           "torch.autocast(txt.device.type, enabled=False)",
           "torch.autocast(txt.device.type, enabled=torch.is_autocast_enabled(txt.device.type))", f"{MODEL} {TRAIN}"),
    # ------------------------------------------------------------------------------------- training
    Mutant("a re-caption's chance is used again for the captions", "dataset/sources.py",
           "chance = (chance - recaption) / (1 - recaption)", "pass", f"tests/data/test_sources.py {TRAIN}"),
    Mutant("Muon has no weight decay", "training/muon.py",
           'p.mul_(1 - group["lr"] * group["weight_decay"])', "pass", f"tests/math/test_muon.py {TRAIN}"),
    Mutant("Muon takes matrices outside the blocks", "training/optimizers.py",
           'model["mmdit"].blocks.parameters()', 'model["mmdit"].parameters()', f"tests/math/test_muon.py {TRAIN}"),
    Mutant("validation has the run's floor", "training/batches.py",
           "time_floor=max(VALIDATION_FLOOR, self.config.time_floor)", "time_floor=self.config.time_floor", "tests/training/test_validation.py"),
    Mutant("validation drops captions", "training/batches.py", "text_dropout=0.0, recaption=0.0",
           "recaption=0.0", f"{VALIDATION} {TRAIN}"),
    Mutant("validation measures the raw weights", "training/reports.py",
           "with (distributed.averaged(job.models.trainable, job.run.ema),\n", "with (\n", f"{VALIDATION} {TRAIN}"),
    Mutant("gradients are reduced in bfloat16", "training/distributed.py",
           "reduce_dtype=torch.float32", "reduce_dtype=torch.bfloat16", f"{RUN} {TRAIN}"),
    Mutant("the gradient is not clipped", "train.py", "model.parameters(), config.clip)", "model.parameters(), 1e9)",
           TRAIN),
    Mutant("the average has no warm-up", "training/config.py",
           "return min(config.ema, (step + 1) / (step + 10))", "return config.ema", TRAIN),
    Mutant("the text loss is a mean over unfrozen tokens", "training/batches.py",
           "return self.ids.numel()", "return int((~self.frozen).sum())", TRAIN),
    Mutant("Table 1: lambda of high-res", "training/config.py",
           '512, 256, 0.2, 768,  768,', '512, 256, 1.0, 768,  768,', STAGES),
    Mutant("Table 1: batch of high-res", "training/config.py",
           '512, 256, 0.2, 768,  768,', '512, 256, 0.2, 512,  768,', STAGES),
    Mutant("Table 1: learning rate of pretrain", "training/config.py",
           "512,  512, 5e-5, 5000,  60_000", "512,  512, 3e-5, 5000,  60_000", STAGES),
    Mutant("Table 1: warm-up of mask-emb", "training/config.py",
           "3e-5, 1000, 200_000", "3e-5, 5000, 200_000", STAGES),
    Mutant("Table 1: steps of instruct", "training/config.py",
           "3e-5, 1000,  50_000", "3e-5, 1000,  80_000", STAGES),
    Mutant("Table 1: text length of instruct", "training/config.py", "512, 128, 1.0", "512, 256, 1.0", STAGES),
    Mutant("Table 1: clip", "training/config.py", 'clip: float = option(2.0', 'clip: float = option(1.0', STAGES),
    Mutant("Table 1: weight decay", "training/config.py",
           "weight_decay: float = option(1e-2", "weight_decay: float = option(1e-1", STAGES),
    Mutant("Table 1: decay of the average", "training/config.py",
           "ema: float = option(0.9999", "ema: float = option(0.999", STAGES),
    Mutant("Table 1: caption dropout", "training/config.py",
           "text_dropout: float = option(0.1", "text_dropout: float = option(0.2", STAGES),
    Mutant("the plan counts one block of T5", "training/plan.py", "texts * t5.depth * forward", "texts * forward", PLAN),
    Mutant("the plan encodes one image", "training/plan.py",
           "flops += images * forward_flops(", "flops += forward_flops(", PLAN),
    Mutant("the plan gives Muon two moments", "training/plan.py",
           "(2 - OPTIMIZERS[config.optimizer].moments)", "0", PLAN),
    Mutant("pace counts the steps before a resume", "training/run_folder.py",
           "self.first_step = self.step", "self.first_step = 0", RUN),
    Mutant("a run is resumed with other times", "training/run_folder.py", '"times", "text_loss")', '"text_loss")', RUN),
    Mutant("a run is resumed with another vocabulary", "training/run_folder.py",
           '"text_data", "vocabulary",', '"text_data",', RUN),
    Mutant("a damaged shard is loaded", "training/run_folder.py",
           "sha256(file) == digest,", "digest,", RUN),
    Mutant("bucket sizes come in a fixed order", "dataset/aspect_buckets.py",
           "int(torch.randperm(WINDOW, generator=generator)[batch])", "batch", "tests/data/test_aspect_buckets.py"),
    # ------------------------------------------------------------------------------ weights and inference
    Mutant("a digest is blind to names", "checkpoint.py", '(f"{name} {tensor.dtype}', '(f"{tensor.dtype}',
           "tests/weights/test_checkpoint.py tests/data/test_precompute.py"),
    Mutant("NaN in a file is loaded", "checkpoint.py", "if not finite(piece):", "if False:",
           "tests/weights/test_checkpoint.py tests/weights/test_layouts.py"),
    Mutant("a null shift_factor is SD3's", "pretrained/layouts.py",
           'if c.values.get("shift_factor", 0) is not None:', 'c.values = {k: x for k, x in c.values.items() if x is not None}\n'
           '    if True:', "tests/weights/test_layouts.py tests/weights/test_checkpoint.py"),
    Mutant("a data model walks to 1e-3", "inference/text_to_image.py",
           "LOWEST = dict(data=0.05, ", "LOWEST = dict(data=1e-3, ",
           "tests/inference/test_parts.py tests/commands/test_sample.py tests/inference/test_trajectory.py"),
    Mutant("published weights cache the image", "inference/parts.py",
           'order="random", image_cache="off")', 'order="random", image_cache="once")',
           f"tests/inference/test_parts.py {READING} tests/commands/test_sample.py"),
    Mutant("published weights answer in 256 tokens", "inference/parts.py",
           "self.answer_length = config.length or trained or 128",
           "self.answer_length = config.length or trained or 256",
           f"tests/inference/test_parts.py {READING} tests/commands/test_sample.py"),
    Mutant("ranking scores the question too", "inference/image_to_text.py",
           "score(parts, latents, row, len(prompt))", "score(parts, latents, row)",
           f"{READING} tests/commands/test_sample.py"),
    Mutant("all answers have one seed", "inference/answer_file.py",
           'seed_of(f"{self.seed} {ask.id}")', "self.seed",
           "tests/inference/test_answer_file.py"),
    Mutant("attention pages show one head", "model.py",
           "return (total / q.shape[1]).half()", "return scores.softmax(-1).half()", "tests/inference/test_pages.py"),
    Mutant("a grid of three images has one column", "viz/grids.py",
           "columns = math.ceil(math.sqrt(len(tiles)))", "columns = math.floor(math.sqrt(len(tiles)))",
           "tests/commands/test_sample.py tests/training/test_curves.py tests/inference/test_trajectory.py"),
    # ------------------------------------------------------------------------------ data and metrics
    Mutant("an answer follows the answer before it", "dataset/questions.py",
           'question = text if turn["from"] == "human" else None',
           'question = text if turn["from"] == "human" else question', "tests/data/test_questions.py"),
    Mutant("rivals are compared by four letters", "dataset/emoji.py", "{word[:3] for word", "{word[:4] for word",
           "tests/data/test_emoji.py"),
    Mutant("photographs lie on their side", "dataset/images.py",
           "return image if turn is None else image.transpose(turn)", "return image", "tests/data/test_images.py"),
    Mutant("an epoch is not shuffled", "data.py", 'f"{key} source {k} epoch {epoch}")', 'f"{key} source {k}")',
           "tests/data/test_data.py"),
    Mutant("over 5 % of unreadable samples are accepted", "data.py", "expected = 0.05 * seen",
           "expected = 0.5 * seen", "tests/data/test_data.py tests/data/test_sources.py"),
    Mutant("a list may name files outside its folder", "common/files.py", "!= os.pardir", "!= os.curdir",
           "tests/data/test_inputs.py"),
    Mutant("colour profiles are ignored", "dataset/images.py", "if profile else None", "if False else None",
           "tests/data/test_images.py"),
    Mutant("code in a checkpoint runs", "training/checkpoint_reader.py", "if (module, name) not in ALLOWED:",
           "if not module:", "tests/distributed/test_faults.py"),
    Mutant("a run whose gradient is not finite is not saved", "train.py", "run.rescue()", "pass",
           "tests/distributed/test_faults.py"),
    Mutant("a file is written in place", "common/files.py", 'temporary = path.with_name(f".{path.name}.tmp")',
           "temporary = path", f"tests/commands/test_cli.py tests/weights/test_safetensors_io.py {RUN}"),
    Mutant("FID's covariance divides by n", "metrics/fid.py", "centred / (n - 1)", "centred / n",
           "tests/commands/test_fid.py"),
    Mutant("KID compares an image with itself", "metrics/fid.py",
           "(k.sum() - k.trace()) / (len(k) * (len(k) - 1))", "k.mean()", "tests/commands/test_fid.py"),
    Mutant("VQA accuracy counts the annotator himself", "metrics/answers.py",
           "(sum(same) - itself) / 3", "sum(same) / 3", "tests/commands/test_answers.py"),
    Mutant("BLEU has no brevity penalty", "metrics/captions.py", "math.exp(min(0.0, 1 - 1 / ratio))", "1.0",
           "tests/commands/test_captions.py"),
]


def copy_tree(target: Path) -> None:
    """Copy the files that git tracks or would track; large folders, which are only read, become
    links."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout.splitlines()
    for name in listed:
        if not name.startswith(LARGE) and (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for name in LARGE:
        (target / name).symlink_to(ROOT / name)


def apply(mutant: Mutant, folder: Path) -> None:
    """Replace the mutant's code.  Raises UserError if it does not occur exactly once."""
    file = folder / mutant.file
    source = file.read_text(encoding="utf-8")
    count = source.count(mutant.old)
    require((count == 1, f"{mutant.file}: {mutant.old!r} occurs {count} times, expected once; the mutant "
             f"{mutant.about!r} is out of date"))
    file.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")


def killers(mutant: Mutant, tests: list[str]) -> list[str]:
    """Return the test files that fail; ["timeout"] if they take too long."""
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        apply(mutant, Path(folder))
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *tests]
        try:
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return ["timeout"]
        if result.returncode < 0:                                # the fault killed pytest itself
            return [f"signal {-result.returncode}"]
        require((result.returncode in (0, 1), f"{mutant.about}: the tests did not run\n{result.stdout[-2000:]}"))
        return sorted(set(re.findall(r"^(?:FAILED|ERROR) tests/(\S+?\.py)", result.stdout, re.MULTILINE)))


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("files", nargs="*", help="only the mutants of files that begin with one of these")
    parser.add_argument("--tests", nargs="+", help="test files or folders, in place of each mutant's own")
    parser.add_argument("--jobs", type=cli.number(int, 1), default=2, help="mutants at a time (2)")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if mutant.file.startswith(tuple(args.files or [""]))]
    require((chosen, f"no mutant of {' '.join(args.files)}"))
    rows, progress = ["| mutant | file | killed by |", "|---|---|---|"], Progress("mutants", len(chosen))
    survivors = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        found = pool.map(lambda mutant: killers(mutant, args.tests or mutant.tests.split()), chosen)
        for number, (mutant, files) in enumerate(zip(chosen, found), 1):
            survivors += not files
            rows.append(f"| {mutant.about} | {mutant.file} | {', '.join(files) or '**nothing**'} |")
            print(rows[-1], flush=True)
            progress.update(number)
    if args.out:
        write_text(args.out, "\n".join(rows) + "\n")
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants are killed")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    cli.run(main)
