"""Compare the memory that --print-plan predicts with the memory that a run on this CPU takes.

    python -m experiments.plan_memory small    # a small end-to-end model, in each way of training
    python -m experiments.plan_memory full     # four blocks of SD3-medium, at full width and pixels

This is not part of the test run.  The memory taken is the largest growth of the resident set after
the imports, before anything is saved.  `full` has random weights, SD3's autoencoder, and a T5 of
one narrow block.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

import checkpoint
import model
import train
from common import cli
from pretrained import layouts
from training import plan, run_folder
from training.config import read_base
from experiments.full_size import real_tokenizer
from pretrained.t5 import T5Config, T5Encoder
from pretrained.vae import AutoencoderKL, VAEConfig

SIZES = dict(
    small=("emoji", dict(depth=6, heads=8, width=512, text_width=512)),
    full=("sd3-medium", dict(depth=4)))
SMALL = ["--device", "cpu", "--vocabulary", "full", "--pixels", "128", "--optimizer", "adamw",
         "--image-batch", "32", "--text-batch", "16"]
WAYS = dict(plain=[], micro_batches=["--micro-batch", "4"], recomputed=["--checkpoint-activations"],
            float32=["--dtype", "float32"])


def resident(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def write_parts(folder: Path) -> list[str]:
    """Write SD3's autoencoder, a T5 of one block with the real width, and a tokenizer of the real
    size; return flags for them."""
    torch.manual_seed(0)
    vae, t5 = AutoencoderKL(VAEConfig()), T5Encoder(T5Config(depth=1, heads=4, hidden=256))
    for name, part, entries in (("vae", vae, layouts.vae_entries(vae, "folder")),
                                ("t5", t5, layouts.t5_entries(t5, "shared.weight"))):
        tensors = {entries[key].keys[0]: p.detach() for key, p in part.named_parameters()}
        checkpoint.write_tensors(folder / f"{name}.safetensors", tensors, torch.float16)
    real_tokenizer(folder)
    return ["--vae", folder / "vae.safetensors", "--t5", folder / "t5.safetensors", "--tokenizer",
            folder / "tokenizer", "--image-batch", 1, "--text-batch", 1, "--micro-batch", 1,
            "--checkpoint-activations", "--device", "cpu"]


def measure(kind: str, flags: list[str]) -> None:
    """Train in this process, and print the memory that it took and that the plan predicts."""
    preset, sizes = SIZES[kind]
    model.PRESETS[preset].update(sizes)
    with tempfile.TemporaryDirectory() as out:
        flags = ["--preset", preset, "--steps", "2" if kind == "small" else "1", "--log-every", "1",
                 "--sample-every", "0", "--out", out, *flags]
        run_folder.Run.save = run_folder.Run.end = lambda self, *_: None
        config = train.parse([*flags, "--print-plan", "1"])
        before = resident("VmRSS")
        job = train.set_up(config)
        Path("/proc/self/clear_refs").write_text("5")        # resets the peak of the resident set
        train.train(job, [])
        measured = resident("VmHWM") - before
    plan_config = train.parse([*flags, "--print-plan", "1"])
    print(json.dumps(dict(measured=measured, planned=planned_memory(plan_config),
                          row=job.run.rows[-1])))


def planned_memory(config) -> dict[str, float]:
    """Return the bytes that the plan predicts, by part."""
    _, sizes, about = read_base(config.init, config.preset)
    t5, vae = plan.frozen_sizes(config, sizes, about)
    N = plan.image_tokens(config, sizes, vae.factor if vae else 1) or sizes.null_tokens
    return plan.memory(config, sizes, t5, vae, N, 1, False)


def print_comparison(name: str, measured: int, planned: dict[str, float], row: dict) -> None:
    """Print the memory in GiB.  row: of the run's log."""
    total = sum(planned.values())
    print(f"{name}: took {measured / 2**30:.2f} GiB, the plan says {total / 2**30:.2f}: "
          f"{total / measured:.2f} of it; losses {row['image_loss']:.3f}, {row['text_loss']:.3f}")
    parts = [f"{part} {size / 2**30:.2f}" for part, size in planned.items() if size]
    print("    " + ", ".join(parts), flush=True)


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("kind", choices=SIZES)
    kind = parser.parse_args().kind
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images").mkdir()
        for i in range(8):
            Image.new("RGB", (256, 256), (30 * i, 99, 0)).save(Path(folder) / "images" / f"{i}.png")
            (Path(folder) / "images" / f"{i}.txt").write_text(f"a red cat {i}")
        ways = {name: [*SMALL, *more] for name, more in WAYS.items()}
        if kind == "full":
            ways = dict(full=list(map(str, write_parts(Path(folder)))))
        for name, flags in ways.items():
            command = [sys.executable, "-m", "experiments.plan_memory", kind, *flags,
                       "--image-data", f"{folder}/images"]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print_comparison(name, **json.loads(child.stdout.splitlines()[-1]))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        measure(sys.argv[1], sys.argv[2:])       # as `main` calls it
    else:
        cli.run(main)
