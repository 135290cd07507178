"""Measure memory and loading time with random weights of the published, full size.

    python -m experiments.full_size make FOLDER         # 18 GB: a D-DiT release with T5-XXL, an SD3 file, float16
    python -m experiments.full_size memory FOLDER       # peak memory, as if memory were short
    python -m experiments.full_size decode FOLDER       # the autoencoder's decoder at 1024x1024, float32
    python -m experiments.full_size load FOLDER         # time to load the transformer against reading its bytes

This is not part of the test run.  `memory` draws and captions with two steps in bfloat16; it
reports the process's largest resident set as the kernel counts it, the number that `/usr/bin/time
-v` prints.
"""

import gzip
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from common import cli
from common.cli import ROOT
from experiments.turns import time_in_turns

FIXTURES = ROOT / "tests" / "fixtures"
PARTS = {"transformer": "dual_diff_release.transformer", "vae": "sd3_diffusers.vae",
         "text_encoder": "t5_xxl.text_encoder"}


def write(path: Path, shapes: dict[str, list[int]]) -> None:
    """Write a safetensors file of float16 noise, scaled by fan-in, a tensor at a time."""
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = dict(dtype="F16", shape=shape, data_offsets=[at, at + 2 * math.prod(shape)])
        at += 2 * math.prod(shape)
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    started, done = time.time(), 0
    noise = torch.randn(2**24)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            count, fan = math.prod(shape), math.prod(shape[1:]) or 1
            scale = 1 / fan**0.5 if len(shape) > 1 else 0.02
            if "norm" in name and name.endswith("weight") and len(shape) == 1:
                tensor = torch.ones(count)
            else:
                tensor = noise.repeat(count // len(noise) + 1)[:count] * scale
            file.write(tensor.half().numpy().tobytes())
            done += 2 * count
            rate = done / (time.time() - started)
            print(f"\r{path.name}: {done / 1e9:.1f} of {at / 1e9:.1f} GB, {(at - done) / rate:.0f} s left  ",
                  end="", flush=True)
    print()


def make(folder: Path) -> None:
    full = json.loads(gzip.decompress((FIXTURES / "full_size_keys.json.gz").read_bytes()))
    for part, entry in PARTS.items():
        shapes = full[entry]
        if part == "text_encoder":
            shapes = {name: shape for name, shape in shapes.items() if name != "encoder.embed_tokens.weight"}
        write(folder / part / "model.safetensors", shapes)
    write(folder / "sd3_medium.safetensors",
          {name: shape for name, shape in full["sd3_medium_single_file"].items()
                                              if name.startswith(("model.diffusion_model.",
                                                                  "first_stage_model."))})
    real_tokenizer(folder)


def real_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the real size: filler follows the fixture's words, so that <extra_id_0>
    is 32099."""
    shutil.copytree(FIXTURES / "release" / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    content = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    content["model"]["vocab"] += [[f"\u2581filler{i}", -20.0] for i in range(32100 - 110)]
    for token in content["added_tokens"]:
        token["id"] += 32100 - 110 if token["content"].startswith("<extra_id_") else 0
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))


def memory(folder: Path) -> None:
    Image.new("RGB", (300, 256), (180, 60, 60)).save(folder / "red.png")
    sides = ["--height", "256", "--width", "256", "--steps", "2", "--dtype", "bfloat16"]
    for name, flags in (("draw", ["--prompt", "a red cat on a house", "--out", folder / "out.png"]),
                        ("caption", ["--image", folder / "red.png"])):
        started = time.time()
        short = ("import sample; from common import cli; from inference import parts; "
                 "parts.available = lambda device: 0; cli.run(sample.main)")
        command = [sys.executable, "-c", short, "--checkpoint", folder, *flags, *sides]
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        status, peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024 / 1e9
        print(f"{name}: exit status {status}, peak {peak:.2f} GB, {time.time() - started:.0f} s", flush=True)


def decode(folder: Path) -> None:
    import checkpoint
    vae, started = checkpoint.load_vae(folder), time.time()
    with torch.inference_mode():
        image = vae.decode(torch.randn(1, 16, 128, 128))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{tuple(image.shape)}: {time.time() - started:.0f} s, peak {peak:.2f} GB")


def load(folder: Path, repeats: int = 5) -> None:
    """Compare the time to load the transformer with the time to read its bytes from the file."""
    import checkpoint
    for path, what in ((folder / "sd3_medium.safetensors", "SD3, one file"), (folder, "D-DiT release")):
        tensors = checkpoint.find(path, "transformer").tensors
        size, file = 2 * sum(map(math.prod, tensors.shape.values())), tensors.files[0]

        def read() -> None:
            buffer = torch.empty(size, dtype=torch.uint8)
            with open(file, "rb", buffering=0) as stream:
                view, at = memoryview(buffer.numpy()), 0
                while at < size:
                    at += stream.readinto(view[at:at + 2**28])
        jobs = {"read": read} | {name: lambda dtype=getattr(torch, name): checkpoint.load_mmdit(path, dtype)
                                 for name in ("float16", "bfloat16", "float32")}
        read()                                               # fills the page cache
        times = time_in_turns(jobs, repeats)
        base = statistics.median(times["read"])
        for name, values in times.items():
            middle, low, high = statistics.median(values), min(values), max(values)
            print(f"{what}, {name}: {middle:.2f} s ({low:.2f} to {high:.2f}), {middle / base:.2f} times "
                  f"reading", flush=True)


def main() -> None:
    programs = dict(make=make, memory=memory, decode=decode, load=load)
    parser = cli.Parser(__doc__)
    parser.add_argument("program", choices=programs)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    programs[args.program](args.folder)


if __name__ == "__main__":
    cli.run(main)
