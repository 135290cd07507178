"""Measure the time of a training step, a drawing and a caption, on a CPU or a GPU.

    python -m experiments.bench train                                        # the emoji preset, random data
    python -m experiments.bench train --preset sd3-medium --image-batch 4 --text-batch 4 --dtype bfloat16
    python -m experiments.bench train --preset sd3-medium --image-batch 8 --text-batch 8 --dtype bfloat16 --grow
    python -m experiments.bench sample                                       # the shipped weights
    python -m experiments.bench sample --preset sd3-medium --pixels 512 --dtype bfloat16 --n 4 --compile

With --preset, all weights are random, a preset that works on latents gets SD3's autoencoder, and
constant states replace T5's.  Captions of random weights never end, so they take all of their
steps.  The program prints a table, then the same as JSON.  With --grow it doubles both batches and
measures again, until the GPU's memory is full.

    MFU = FLOPs / (time x peak FLOP/s of dense products)
    FLOPs: plan.sample_flops, forward and backward.  What --checkpoint-activations computes twice
    counts once.
"""

from common import cli
cli.interruptible(__name__)

import argparse
import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Iterator

import torch
from torch import Tensor, nn

import flow
import mask_diffusion
import train
from common import processes
from common.devices import DEVICES, allow_tf32, choose_device
from experiments.turns import machine, time_in_turns, wait_for
from inference import text_to_image
from inference.compiled import compile_blocks
from inference.image_to_text import encode, fill
from inference.parts import EMOJI, PUBLISHED, WITH_EMBEDDING, Parts
from model import PRESETS, MMDiT, MMDiTConfig, TokenEmbedding
from pretrained.vae import AutoencoderKL, Pixels, VAEConfig
from training import plan
from training.batches import ImageBatch, TextBatch
from training.config import TrainConfig, parse, stage_defaults
from training.models import Models, recompute_blocks
from training.optimizers import make_optimizers


def median_seconds(function: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Return the median time of a call in seconds, after one warm-up call."""
    function()
    times = time_in_turns(dict(call=function), rounds, device)
    return statistics.median(times["call"])


def random_models(sizes: MMDiTConfig, length: int, device: torch.device) -> Models:
    """Return a new model with random gates, so that no part has zero effect, and constant text
    states."""
    torch.manual_seed(0)
    # a CPU is slow to draw 2 B weights; MPS lacks the position table's float64
    built_on = device if device.type == "cuda" else torch.device("cpu")
    with built_on:
        trainable = nn.ModuleDict(dict(mmdit=MMDiT(sizes)))
    vae = Pixels()
    states = t5 = None
    if sizes.channels != 3:
        vae = AutoencoderKL(VAEConfig()).to(device).eval()
    if sizes.text_length:
        trainable["embedding"] = TokenEmbedding(sizes.vocab_size, sizes.text_length,
                                                sizes.text_width)
    else:
        states = torch.randn(1, length, sizes.text_width, device=device)
        t5 = lambda ids, mask=None: states.expand(len(ids), -1, -1)
    for parameter in trainable.parameters():
        nn.init.normal_(parameter, std=0.02)
    trainable["mmdit"].null_image.requires_grad_(False)
    tokenizer = SimpleNamespace(mask_id=sizes.vocab_size - 1)
    return Models(trainable.to(device).train(), tokenizer, t5, vae, states)


def random_batches(config: TrainConfig, sizes: MMDiTConfig,
                   side: int) -> tuple[ImageBatch, TextBatch]:
    """Return random batches for both losses, with latents of side x side."""
    generator = torch.Generator().manual_seed(0)
    length, mask_id = config.text_length, sizes.vocab_size - 1
    shape = (sizes.channels, side, side)

    def pair(rows: int) -> tuple[Tensor, Tensor]:
        images = torch.randn(rows, *shape, generator=generator)
        return images, torch.randint(0, mask_id, (rows, length), generator=generator)
    image = pair(config.image_batch)
    text = pair(config.text_batch)
    t = flow.draw_times(config.image_batch, generator, config.time_shift)
    noise = torch.randn(image[0].shape, generator=generator)
    dropped = torch.zeros(config.image_batch, dtype=torch.bool)
    image_batch = ImageBatch(*image, t, noise, dropped)
    t = mask_diffusion.draw_times(config.text_batch, generator)
    uniform = torch.rand(text[1].shape, generator=generator)
    frozen = torch.zeros(uniform.shape, dtype=torch.bool)
    return image_batch, TextBatch(*text, t, uniform, frozen, config.text_loss)


def train_step(models: Models, optimizers: list[torch.optim.Optimizer],
               average: dict[str, Tensor], batches: tuple[ImageBatch, TextBatch],
               config: TrainConfig) -> None:
    """Compute both losses and their gradients, clip these, update weights and averaged weights."""
    image_batch, text_batch = batches
    train.accumulate(train.image_errors, models, image_batch, config.image_weight, config,
                     reduce_gradients=False)
    train.accumulate(train.text_errors, models, text_batch, config.text_weight, config,
                     reduce_gradients=True)
    nn.utils.clip_grad_norm_(models.trainable.parameters(), config.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    train.update_average(models.trainable, average, config.ema)


def profile(function: Callable[[], object], device: torch.device) -> str:
    """Return a table of the kernels that a call runs, those that take most time first."""
    with torch.profiler.profile() as profiler:
        function()
        wait_for(device)
    return profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=25)


def bench_train(config: TrainConfig, vocab_size: int | None, rounds: int, grow: bool,
                profile_file: Path | None) -> Iterator[dict]:
    """Time a training step, and yield the results.

    grow: then double both batches, again and again, until the GPU's memory is full.
    profile_file: write a table of the step's kernels to it."""
    device = torch.device(choose_device(config.device))
    allow_tf32(device, config.dtype)
    sizes = MMDiTConfig(**PRESETS[config.preset])
    sizes = replace(sizes, vocab_size=vocab_size or sizes.vocab_size,
                    text_length=config.text_length if sizes.text_length else 0)
    models = random_models(sizes, config.text_length, device)
    factor = models.vae.factor
    if config.checkpoint_activations:
        recompute_blocks(models)
    if config.compile:
        compile_blocks(models.trainable["mmdit"], dynamic=None)
    processes.keep_memory()
    average = {name: p.detach().clone() for name, p in models.trainable.named_parameters()}
    optimizers = make_optimizers(models.trainable, config)

    while True:
        batches = random_batches(config, sizes, config.pixels // factor)
        step = partial(train_step, models, optimizers, average, batches, config)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            seconds = median_seconds(step, rounds, device)
        except torch.OutOfMemoryError:
            cli.warn(f"{config.image_batch} images and {config.text_batch} texts don't fit in the "
                     f"GPU's memory")
            return
        results = dict(preset=config.preset, vocabulary=sizes.vocab_size, dtype=config.dtype,
                       compiled=config.compile, recomputed=config.checkpoint_activations,
                       pixels=config.pixels, image_batch=config.image_batch,
                       text_batch=config.text_batch, seconds=seconds)
        work = plan.work(config, sizes, factor)
        for name, amount in work.items():
            results[f"{name}_per_s"] = amount / seconds
        peak = plan.peak(device, config.dtype)
        if peak:
            results["mfu"] = work["tflop"] / seconds / peak
        yield results
        if profile_file:
            profile_file.write_text(profile(step, device))
        if not grow:
            return
        config = replace(config, image_batch=2 * config.image_batch,
                         text_batch=2 * config.text_batch)


def random_parts(preset: str, pixels: int | None, device: torch.device,
                 dtype: torch.dtype) -> Parts:
    """Return inference parts made of `random_models`."""
    sizes = MMDiTConfig(**PRESETS[preset])
    length = sizes.text_length or 256
    mask_id = sizes.vocab_size - 1
    models = random_models(sizes, length, device)
    models.trainable.to(dtype).eval().requires_grad_(False)

    def encode_text(text: str, length: int) -> Tensor:
        return torch.full((length,), len(text) % mask_id)
    no_end = -1                                              # no token is ever an end
    models.tokenizer = SimpleNamespace(mask_id=mask_id, end_id=no_end, pad_id=no_end,
                                       encode=encode_text)
    side = pixels or 512
    if sizes.channels == 3 and not pixels:
        side = stage_defaults("pretrain", sizes, {})["pixels"]
    parts = Parts.of(models, side, length, dtype)
    parts.defaults = WITH_EMBEDDING if sizes.text_length else PUBLISHED
    if not sizes.text_length:
        parts.text = lambda ids: models.text(ids).to(dtype)
    return parts


@torch.no_grad()
def bench_sample(parts: Parts, n: int, steps: int, guidance: float | None, compiled: bool,
                 rounds: int) -> dict:
    """Time a batch of n drawings, and a batch of n captions of noise images."""
    trace = text_to_image.Trace()
    states = []
    generator = torch.Generator().manual_seed(0)             # so that every run evaluates as often
    images = torch.randn(n, 3, parts.height, parts.width, generator=generator).clamp(-1, 1)
    blank = torch.full((n, parts.length), parts.tokenizer.mask_id)

    def draw() -> None:
        trace.evaluations = 0
        text_to_image.draw(parts, ["red apple, noto style"] * n, trace=trace, steps=steps,
                           guidance=guidance, compile=compiled, batch=n)

    def read() -> None:
        states.clear()
        fill(parts, encode(parts, images), blank, states=states)
    draw_seconds = median_seconds(draw, rounds, parts.device)
    read_seconds = median_seconds(read, rounds, parts.device)
    return dict(dtype=str(parts.dtype).removeprefix("torch."), compiled=compiled, n=n,
                pixels=[parts.width, parts.height], draws_per_s=n / draw_seconds,
                captions_per_s=n / read_seconds, evaluations_a_drawing=trace.evaluations // n,
                evaluations_a_batch_of_captions=len(states) - 1)


def show(results: dict, device: torch.device) -> None:
    """Print the results and the device, as a table and as JSON."""
    results = results | machine(device)
    for name, value in results.items():
        shown = f"{value:.5g}" if isinstance(value, float) else value
        print(f"{name:32}{shown}")
    print(json.dumps(results), flush=True)


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    count = cli.number(int, 1)
    kinds = parser.add_subparsers(dest="what", required=True)
    training = kinds.add_parser("train", doc="a step of training")
    training.add_argument("--preset", choices=list(PRESETS), default="emoji")
    for name in ("image-batch", "text-batch", "pixels"):
        training.add_argument(f"--{name}", type=count, help="(the stage's)")
    training.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    training.add_argument("--vocab-size", type=count, help="(the preset's; shipped weights: 4441)")
    training.add_argument("--checkpoint-activations", action="store_true", help="as train.py")
    training.add_argument("--grow", action="store_true",
                          help="double both batches until the GPU's memory is full")
    training.add_argument("--profile", type=Path, help="write a table of a step's kernels here")
    sampling = kinds.add_parser("sample", doc="drawings and captions")
    sampling.add_argument("--checkpoint", type=Path, default=EMOJI, help="(the shipped weights)")
    sampling.add_argument("--preset", choices=list(PRESETS), help="random weights of these sizes")
    sampling.add_argument("--n", type=count, default=16, help="drawings, captions per batch (16)")
    sampling.add_argument("--steps", type=count, default=28, help="steps of a drawing (28)")
    sampling.add_argument("--guidance", type=cli.number(float, 1e-3),
                          help="of a drawing (as sample.py)")
    sampling.add_argument("--pixels", type=count,
                          help="side of the images (as trained; latents: 512)")
    for command, rounds in ((training, 9), (sampling, 3)):
        command.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
        command.add_argument("--device", choices=DEVICES, default="auto")
        command.add_argument("--compile", action="store_true", help="compile the blocks")
        command.add_argument("--rounds", type=count, default=rounds, help=f"({rounds})")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device(choose_device(args.device))
    if args.what == "train":
        flags = ["--preset", args.preset, "--dtype", args.dtype, "--device", args.device,
                 "--optimizer", args.optimizer]
        for name in ("image_batch", "text_batch", "pixels"):
            if getattr(args, name):
                flags += [cli.flag(name), str(getattr(args, name))]
        for name in ("compile", "checkpoint_activations"):
            if getattr(args, name):
                flags.append(cli.flag(name))
        cli.require((not args.grow or device.type == "cuda", "--grow: needs an NVIDIA GPU"))
        for results in bench_train(parse(flags), args.vocab_size, args.rounds, args.grow,
                                   args.profile):
            show(results, device)
    else:
        dtype = getattr(torch, args.dtype)
        if args.preset:
            parts = random_parts(args.preset, args.pixels, device, dtype)
        else:
            parts = Parts(args.checkpoint, device, dtype, height=args.pixels, width=args.pixels)
        show(bench_sample(parts, args.n, args.steps, args.guidance, args.compile, args.rounds),
             device)


if __name__ == "__main__":
    cli.run(main)
