"""How long a step of training takes, a drawing, a caption, and where the time goes; on a CPU or a GPU.

    python bench.py sample                                       # drawings and captions a second
    python bench.py sample --preset sd3-medium --pixels 512 --dtype bfloat16 --n 4 --compile
    python bench.py train                                        # random data, the emoji preset
    python bench.py train --preset sd3-medium --image-batch 4 --text-batch 4 --dtype bfloat16

    MFU = arithmetic / (time x peak of dense products);  arithmetic: plan.sample_flops, forward and backward

`sample` with a --preset has random weights, with an autoencoder if the preset has one, and T5's states given;
a caption of such weights never ends, and takes all of its evaluations.  --profile: the operations that take
longest, of one batch of drawings.  A table, and one last line of JSON.
"""

import cli
cli.interruptible(__name__)

import json
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import drawing
import flow
import mask_diffusion
import parallel
import plan
import train
from build import Models
from devices import DEVICES, choose_device
from model import PRESETS, MMDiT, MMDiTConfig, TokenEmbedding
from parts import EMOJI, OWN, PUBLISHED, Parts
from reading import STEPS, encode, fill
from stages import parse
from vae import AutoencoderKL, Pixels, VAEConfig


def synchronise(device: torch.device) -> float:
    """The time, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def random_models(sizes: MMDiTConfig, length: int, device: torch.device) -> Models:
    """A new model, and in T5's place states that are drawn once."""
    torch.manual_seed(0)
    learns = nn.ModuleDict(dict(mmdit=MMDiT(sizes)))
    if sizes.text_length:
        learns["embedding"] = TokenEmbedding(sizes.vocab_size, sizes.text_length, sizes.text_width)
    states = torch.randn(1, length, sizes.text_width, device=device)
    t5 = None if sizes.text_length else lambda ids, mask=None: states.expand(len(ids), -1, -1)
    learns["mmdit"].null_image.requires_grad_(False)
    return Models(learns.to(device).train(), None, t5, Pixels(), None if t5 is None else states)


def random_batch(config, sizes: MMDiTConfig, side: int) -> dict:
    """Both losses' batches, as train.py makes them; of latents of side x side."""
    g, L, V = torch.Generator().manual_seed(0), config.text_length, sizes.vocab_size
    images = lambda rows: torch.randn(rows, sizes.channels, side, side, generator=g)
    ids = lambda rows: torch.randint(0, V - 1, (rows, L), generator=g)
    B, n = config.image_batch, config.text_batch
    t, noise = flow.draw((B, sizes.channels, side, side), g, config.time_shift)
    image = dict(images=images(B), ids=ids(B), dropped=torch.zeros(B, dtype=torch.bool), t=t, noise=noise,
                 count=B)
    t, uniform = mask_diffusion.draw((n, L), g)
    none = torch.zeros(n, L, dtype=torch.bool)
    return dict(image=image, text=dict(
        images=images(n), ids=ids(n), frozen=none, t=t, uniform=uniform,
        count=n * L, mask_id=V - 1, weight=config.text_loss))


class Ours:
    """A step as train.py makes it; `seconds` has its parts."""

    def __init__(self, config, models: Models):
        self.config, self.models = config, models
        self.seconds = dict(forward=0.0, backward=0.0, optimizer=0.0)
        self.device = next(models.learns.parameters()).device
        ema = {name: p.detach().clone() for name, p in models.learns.named_parameters()}
        self.run = SimpleNamespace(model=models.learns, ema=ema, step=0,
                                   optimizers=train.optimizers_of(models.learns, config))
        self.errors = {name: self.timed(errors) for name, errors in train.ERRORS.items()}

    def timed(self, errors):
        def call(*args) -> Tensor:
            begun = synchronise(self.device)
            found = errors(*args)
            self.seconds["forward"] += synchronise(self.device) - begun
            return found
        return call

    def step(self, made: dict) -> None:
        plain, train.ERRORS = train.ERRORS, self.errors
        parallel.keep_memory()
        begun, before = synchronise(self.device), self.seconds["forward"]
        train.backward(self.config, self.models, made, 1, False)
        train.ERRORS, done = plain, synchronise(self.device)
        nn.utils.clip_grad_norm_(self.models.learns.parameters(), self.config.clip)
        train.update(self.run, self.config.ema)
        self.run.step += 1
        self.seconds["backward"] += done - begun - (self.seconds["forward"] - before)
        self.seconds["optimizer"] += synchronise(self.device) - done


def seconds_of(stepper, made: dict, steps: int) -> float:
    begun = synchronise(stepper.device)
    for _ in range(steps):
        stepper.step(made)
    return (synchronise(stepper.device) - begun) / steps


def bench_train(config, vocab_size: int | None, rounds: int, steps: int, peak: float) -> dict:
    """Medians of `rounds` of `steps`."""
    device = torch.device(choose_device(config.device))
    sizes = MMDiTConfig(**PRESETS[config.preset])
    sizes = replace(sizes, text_length=config.text_length if sizes.text_length else 0,
                    vocab_size=vocab_size or sizes.vocab_size)
    _, vae = plan.frozen_sizes(config, sizes, {})
    factor = vae.factor if vae else 1
    begun = time.perf_counter()
    made = random_batch(config, sizes, config.pixels // factor)
    drawn = time.perf_counter() - begun
    models = random_models(sizes, config.text_length, device)
    for block in models.learns["mmdit"].blocks if config.compile else []:
        block.compile()
    ours = Ours(config, models)
    seconds_of(ours, made, 2)                                    # what is made once is not counted
    ours.seconds = dict.fromkeys(ours.seconds, 0.0)
    second = statistics.median(seconds_of(ours, made, steps) for _ in range(rounds))
    work, peak = plan.work(config, sizes, factor), peak or plan.peak(device, config.dtype)
    found = dict(device=name_of(device), preset=config.preset, vocabulary=sizes.vocab_size,
                 dtype=config.dtype, compiled=config.compile, seconds=second)
    found |= {part: total / (rounds * steps) for part, total in ours.seconds.items()}
    found |= dict(data=drawn)
    found |= {f"{each}_per_s": amount / second for each, amount in work.items()}
    found |= dict(mfu=work["tflop"] / second / peak) if peak else {}
    if device.type == "cuda":
        found["gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def random_parts(preset: str, pixels: int | None, device: torch.device, dtype: torch.dtype) -> Parts:
    """The parts of a new model of a preset, its gates too, so that it computes all; T5's states are given."""
    sizes = MMDiTConfig(**PRESETS[preset])
    own, length = sizes.text_length > 0, sizes.text_length or 256
    models = random_models(sizes, length, device)
    for p in models.learns.parameters():
        torch.nn.init.normal_(p, std=0.02)
    models.vae = Pixels() if sizes.channels == 3 else AutoencoderKL(VAEConfig()).to(device).eval()
    V = sizes.vocab_size
    ids = lambda text, length: torch.full((length,), len(text) % (V - 1))
    models.tokenizer = SimpleNamespace(encode=ids, mask_id=V - 1, end_id=-1, pad_id=-1)      # never an end
    models.learns.to(dtype).eval().requires_grad_(False)
    parts = Parts.of(models, pixels or (64 if sizes.channels == 3 else 512), length, device, dtype)
    parts.defaults = OWN if own else PUBLISHED
    if not own:
        parts.text = lambda ids: models.text(ids).to(dtype)
    return parts


@torch.no_grad()
def bench_sample(parts: Parts, n: int, steps: int, rounds: int, guidance: float | None, compiled: bool,
                 profiled: bool) -> dict:
    """Medians of `rounds` of n drawings, and of n captions of noise; what is made once is not counted."""
    device, seen = parts.device, drawing.Seen(states=None)
    how = dict(steps=steps, guidance=guidance, fast=compiled, batch=n)
    draws = lambda seen=None: drawing.draw(parts, ["red apple, noto style"] * n, seen=seen, **how)
    images, asked = torch.randn(n, 3, parts.height, parts.width).clamp(-1, 1), []
    blank = torch.full((n, parts.length), parts.tokenizer.mask_id)

    def reads() -> None:
        asked.clear()
        fill(parts, encode(parts, images), blank, STEPS["text"], asked=asked)

    def seconds(function) -> float:
        begun = synchronise(device)
        function()
        return synchronise(device) - begun
    first = seconds(lambda: draws(seen))
    drawn = [seconds(draws) for _ in range(rounds)]
    reads()
    read = [seconds(reads) for _ in range(rounds)]
    if profiled:
        with torch.profiler.profile() as profile:
            draws()
        key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=40))
    found = dict(device=name_of(device), dtype=str(parts.dtype).removeprefix("torch."), compiled=compiled,
                 n=n, pixels=[parts.width, parts.height], first_s=first,
                 draws_per_s=n / statistics.median(drawn),
                 draws_range=[round(n / s, 3) for s in (max(drawn), min(drawn))],
                 evaluations_a_drawing=seen.rows // n, captions_per_s=n / statistics.median(read),
                 captions_range=[round(n / s, 3) for s in (max(read), min(read))],
                 evaluations_a_batch_of_captions=len(asked))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else most
    return found | dict(gib=peak / 2**30)


def sample_flags(parser: cli.Parser) -> None:
    count = cli.number(int, 1)
    parser.add_argument("--checkpoint", type=Path, default=EMOJI, help="(the shipped weights)")
    parser.add_argument("--preset", choices=list(PRESETS), help="random weights of these sizes")
    parser.add_argument("--n", type=count, default=16, help="drawings, and captions, at once (16)")
    parser.add_argument("--steps", type=count, default=drawing.STEPS, help="of a drawing (28)")
    parser.add_argument("--guidance", type=cli.number(float, 1e-3), help="of a drawing (as sample.py)")
    parser.add_argument("--pixels", type=count, help="side of the pictures (as trained; 512)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="(as sample.py; presets float32)")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--compile", action="store_true", help="of drawings, on a GPU as one CUDA graph")
    parser.add_argument("--profile", action="store_true", help="what takes longest in a batch of drawings")
    parser.add_argument("--rounds", type=count, default=3, help="(3)")


def train_flags(parser: cli.Parser) -> None:
    count = cli.number(int, 1)
    parser.add_argument("--preset", choices=list(PRESETS), default="emoji")
    for name in ("image-batch", "text-batch", "pixels"):
        parser.add_argument(f"--{name}", type=count, help="(the stage's)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--compile", action="store_true", help="ours, block by block")
    parser.add_argument("--vocab-size", type=count, help="(the preset's; the shipped weights have 4441)")
    parser.add_argument("--rounds", type=count, default=9, help="(9)")
    parser.add_argument("--steps", type=count, default=2, help="of a round (2)")
    parser.add_argument("--peak", type=cli.number(float, 1e-3), default=0.0, help="of the device, TFLOP/s")


def main() -> None:
    parser = cli.Parser(__doc__)
    kinds = parser.add_subparsers(dest="what", required=True)
    train_flags(kinds.add_parser("train", doc="a step of training"))
    sample_flags(kinds.add_parser("sample", doc="drawings and captions"))
    args = parser.parse_args()
    if args.what == "sample":
        device, dtype = torch.device(choose_device(args.device)), getattr(torch, args.dtype or "float32")
        parts = random_parts(args.preset, args.pixels, device, dtype) if args.preset else Parts(
            args.checkpoint, device, dtype if args.dtype else None, height=args.pixels, width=args.pixels)
        found = bench_sample(parts, args.n, args.steps, args.rounds, args.guidance, args.compile,
                             args.profile)
    else:
        settings = ("preset", "image_batch", "text_batch", "pixels", "dtype", "device", "optimizer")
        flags = [f"{cli.flag(name)}={value}" for name, value in vars(args).items()
                 if name in settings and value is not None] + ["--compile"] * args.compile
        found = bench_train(parse(flags), args.vocab_size, args.rounds, args.steps, args.peak)
    found = {key: round(value, 5) if isinstance(value, float) else value for key, value in found.items()}
    for key, value in found.items():
        print(f"{key:32}{value}")
    print(json.dumps(found))


if __name__ == "__main__":
    cli.run(main)
