"""Compare the reading speed with the package `webdataset`, on the same shards with the same
transforms.

    pip install webdataset                      # in a scratch environment; the project does not need it
    python -m experiments.compare_webdataset          # two minutes

Each sample is a JPEG of 640 x 480 with a caption.  The image is decoded, its shorter side resized
to 256 (bicubic), and its centre cropped; the caption is tokenized (GPT-2, 256 tokens).  Two
processes read batches of 32 ahead.
"""

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

import data
from dataset import workers
from dataset.images import fit_image
from pretrained.tokenizer import gpt2_tokenizer

SHARDS, EACH, BATCH = 4, 400, 32


def write_shards(folder: Path) -> list[str]:
    """Write shards of images with edges and gradients, about 60 kB each as a JPEG."""
    draw, paths = np.random.default_rng(0), []
    for shard in range(SHARDS):
        paths.append(str(folder / f"shard-{shard:03d}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for i in range(EACH):
                small, file = draw.integers(0, 256, (60, 80, 3), dtype=np.uint8), io.BytesIO()
                image = Image.fromarray(small).resize((640, 480), Image.Resampling.BILINEAR)
                image.save(file, "JPEG", quality=90)
                text = " ".join(["a photograph of something red beside a green field"] * 6).encode()
                for extension, content in (("jpg", file.getvalue()), ("txt", text)):
                    member = tarfile.TarInfo(f"{shard:03d}{i:05d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return paths


def make(mix: data.Mix, tokenizer, step: int) -> dict:
    samples = mix.take(range(step * BATCH, (step + 1) * BATCH), "image")
    return dict(images=torch.stack([sample["image"] for sample in samples]),
                ids=torch.stack([tokenizer.encode(sample["captions"][0], 256) for sample in samples]))


def ours(paths: list[str], tokenizer, count: int) -> float:
    """Return our samples per second, in random order over all shards."""
    mix = data.Mix([str(Path(paths[0]).parent / "shard-*.tar")], 256, "run")
    started, steps = time.time(), range(count // BATCH)
    seen = sum(len(made["images"]) for made in workers.feed(partial(make, mix, tokenizer), steps, 2))
    return seen / (time.time() - started)


def theirs(paths: list[str], tokenizer, count: int) -> float:
    """Return webdataset's samples per second, with shards in random order and a shuffle buffer of
    200."""
    def transform(sample):
        image = fit_image(sample[0].convert("RGB"), 256)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), tokenizer.encode(sample[1], 256)
    stack = lambda rows: tuple(torch.stack(column) for column in zip(*rows))
    dataset = webdataset.WebDataset(paths, shardshuffle=len(paths), nodesplitter=None).shuffle(200)
    dataset = dataset.decode("pil").to_tuple("jpg", "txt").map(transform)
    dataset = dataset.batched(BATCH, partial=False, collation_fn=stack)
    started, seen = time.time(), 0
    for images, _ in torch.utils.data.DataLoader(dataset.repeat(), batch_size=None, num_workers=2):
        seen += len(images)
        if seen >= count:
            break
    return seen / (time.time() - started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    args, tokenizer, ratios = parser.parse_args(), gpt2_tokenizer(), []
    with tempfile.TemporaryDirectory() as folder:
        paths = write_shards(Path(folder))
        data.main(["index", *paths])
        for number in range(args.rounds):
            order = [ours, theirs] if number % 2 else [theirs, ours]
            found = {which: which(paths, tokenizer, SHARDS * EACH) for which in order}
            ratios.append(found[ours] / found[theirs])
            print(f"round {number + 1}: ours {found[ours]:.0f}/s, webdataset {found[theirs]:.0f}/s, "
                  f"{ratios[-1]:.2f}", flush=True)
    low, high = min(ratios), max(ratios)
    print(f"ours / webdataset: median {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
