"""Print hashes of the commands' drawings, texts and trained weights, to compare two commits on one
machine.

    python -m experiments.hashes                     # three minutes; at both commits, then diff

It calls the commands as a user does, with the shipped weights and flags that do not change, so that
it runs at any commit: copy this file to an older one.  Run nothing else at the same time, and use
equally many threads.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

EMOJI = "assets/emoji.tar.gz"
PROMPT = "man farmer, medium skin tone, noto style"
SMALL = ["--image-batch", "16", "--text-batch", "16", "--dtype", "float32", "--device", "cpu", "--steps", "20",
         "--optimizer", "muon", "--lr", "2.5e-3", "--warmup", "5", "--log-every", "1", "--eval-every", "10",
         "--sample-every", "0", "--save-every", "20"]


def call(program: str, *flags) -> str:
    done = subprocess.run([sys.executable, program, *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program} {' '.join(map(str, flags))}\n{done.stderr}")
    return done.stdout


def short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def pixels(path: Path) -> str:
    return short(Image.open(path).convert("RGB").tobytes())


def write_images(folder: Path, count: int) -> list[Path]:
    """Write every 100th image of the emoji set, as PNG."""
    files = []
    with tarfile.open(EMOJI) as tar:
        members = [member for member in tar if member.name.endswith(".webp")][::100][:count]
        for i, member in enumerate(members):
            files.append(folder / f"{i:02}.png")
            Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB").save(files[-1])
    return files


def trained(out: Path) -> str:
    """Hash the losses of a run and its float32 weights."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    names = ("step", "image_loss", "text_loss", "grad_norm", "lr", "val_image", "val_nats")
    losses = json.dumps([[row.get(name) for name in names] for row in rows])
    return f"{short(losses.encode())} {short((out / 'weights.safetensors').read_bytes())}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        out, images = folder / "out.png", write_images(folder, 24)
        text = lambda *flags: short(call("sample.py", *flags).encode())

        def drawn(*flags) -> str:
            call("sample.py", *flags, "--out", out)
            return pixels(out)
        size = Image.open(images[0]).size
        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).rectangle((0, 0, size[0], size[1] // 2), fill=255)
        mask.save(folder / "mask.png")
        print("drawing             ", drawn("--prompt", PROMPT))
        print("guided, negative    ", drawn("--prompt", PROMPT, "--guidance", 3, "--negative-prompt",
                                            "red apple, noto style", "--seed", 5))
        print("masked edit         ", drawn("--prompt", PROMPT, "--image", images[3], "--mask",
                                            folder / "mask.png"))
        # without the temporary folder's name
        print("24 captions         ", short("\n".join(
            line.split("\t")[-1] for line in call("sample.py", "--image", *images).splitlines()).encode()))
        print("24 answers          ", short("\n".join(
            line.split("\t")[-1] for line in call("sample.py", "--image", *images, "--question",
                                                  "What kind of thing is this?").splitlines()).encode()))
        print("two gaps            ", text("--image", images[5], "--text", "[MASK] face, [MASK] style"))
        print("random, temperature ", text("--image", images[7], "--order", "random", "--temperature", 1,
                                           "--steps", 12, "--seed", 3))
        for i in (9, 11):
            print("score               ", text("--image", images[i], "--score", "red apple, noto style"))
        for stage, init in (("pretrain", []), ("instruct", ["--init", folder / "pretrain"])):
            call("train.py", "--stage", stage, *init, "--image-data", EMOJI, *SMALL, "--out", folder / stage)
            print(f"{stage:20}", trained(folder / stage))


if __name__ == "__main__":
    main()
