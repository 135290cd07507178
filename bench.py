"""How long a step of training takes, and where its time goes; random data, a CPU or a GPU.

    python bench.py train                                        # the emoji preset
    python bench.py train --preset sd3-medium --image-batch 4 --text-batch 4 --dtype bfloat16
    python bench.py train --against-plain --compile              # against a plain loop, in turns

The plain loop is in the manner of the published trainer: both heads in each of two forwards, logits of all
tokens, AdamW that is not fused, an average of the weights parameter by parameter, torch's attention, nothing
compiled, malloc as it comes.  Both step copies of one model on the same batch.

    MFU = arithmetic / (time x peak of dense products);  arithmetic: plan.sample_flops, forward and backward

A table, and one last line of JSON.
"""

import cli
cli.interruptible(__name__)

import copy
import json
import statistics
import time
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flow
import mask_diffusion
import parallel
import plan
import train
from build import Models
from model import PRESETS, MMDiT, MMDiTConfig, TokenEmbedding
from stages import parse
from vae import Pixels


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
                 count=B, of=config.image_loss)
    t, uniform = mask_diffusion.draw((n, L), g)
    none = torch.zeros(n, L, dtype=torch.bool)
    return dict(image=image, text=dict(
        images=images(n), ids=ids(n), frozen=none, unscored=none, over=torch.ones(n), t=t, uniform=uniform,
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


class Plain:
    """The same in the manner of the published trainer."""

    def __init__(self, config, models: Models):
        self.config, self.models, self.mmdit = config, models, models.learns["mmdit"]
        self.device = next(models.learns.parameters()).device
        for block in self.mmdit.blocks:
            block.attention = F.scaled_dot_product_attention
        self.optimizer = torch.optim.AdamW(models.learns.parameters(), lr=config.lr, foreach=False,
                                           fused=False, weight_decay=config.weight_decay)
        self.ema = [p.detach().clone() for p in models.learns.parameters()]

    def step(self, made: dict) -> None:
        parallel.keep_memory(False)
        image, text = (train.on_device(made[name], self.device) for name in ("image", "text"))
        with train.precision(self.config, self.device):
            states = self.models.captions(image["ids"], image["dropped"])
            velocity = lambda x, t: self.mmdit(x, states, t, need="both")[0]
            flow.loss(velocity, image["images"], t=image["t"], noise=image["noise"]).backward()
            clean = torch.zeros(len(text["ids"]), device=self.device)
            logits = lambda ids: self.mmdit(text["images"], self.models.text(ids), clean, need="both")[1]
            (self.config.text_weight * mask_diffusion.loss(logits, text["ids"], text["mask_id"], t=text["t"],
                                                           uniform=text["uniform"])).backward()
        nn.utils.clip_grad_norm_(self.models.learns.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average, p in zip(self.ema, self.models.learns.parameters()):
            average.mul_(self.config.ema).add_(p.detach(), alpha=1 - self.config.ema)


def seconds_of(stepper, made: dict, steps: int) -> float:
    begun = synchronise(stepper.device)
    for _ in range(steps):
        stepper.step(made)
    return (synchronise(stepper.device) - begun) / steps


def bench_train(config, vocab_size: int | None, rounds: int, steps: int, against: bool, peak: float) -> dict:
    """Medians of `rounds` of `steps`; with a plain loop the ratio's median and range, round by round."""
    device = torch.device(cli.device(config.device))
    sizes = MMDiTConfig(**PRESETS[config.preset])
    sizes = replace(sizes, text_length=config.text_length if sizes.text_length else 0,
                    vocab_size=vocab_size or sizes.vocab_size)
    _, vae = plan.frozen_sizes(config, sizes, {})
    factor = vae.factor if vae else 1
    begun = time.perf_counter()
    made = random_batch(config, sizes, config.pixels // factor)
    drawn = time.perf_counter() - begun
    models = random_models(sizes, config.text_length, device)
    plain = Plain(config, replace(models, learns=copy.deepcopy(models.learns))) if against else None
    for block in models.learns["mmdit"].blocks if config.compile else []:
        block.compile()
    ours = Ours(config, models)
    for stepper in filter(None, (ours, plain)):
        seconds_of(stepper, made, 2)                             # what is made once is not counted
    ours.seconds = dict.fromkeys(ours.seconds, 0.0)
    pairs = [(seconds_of(ours, made, steps), seconds_of(plain, made, steps) if plain else 0.0)
             for _ in range(rounds)]
    second = statistics.median(one for one, _ in pairs)
    work, peak = plan.work(config, sizes, factor), peak or plan.peak(device, config.dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    found = dict(device=name, preset=config.preset, vocabulary=sizes.vocab_size, dtype=config.dtype,
                 compiled=config.compile, seconds=second)
    found |= {part: total / (rounds * steps) for part, total in ours.seconds.items()}
    found |= dict(data=drawn)
    found |= {f"{each}_per_s": amount / second for each, amount in work.items()}
    found |= dict(mfu=work["tflop"] / second / peak) if peak else {}
    if device.type == "cuda":
        found["gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    if plain:
        ratios = sorted(one / other for one, other in pairs)
        found |= dict(plain_seconds=statistics.median(other for _, other in pairs),
                      ratio=statistics.median(ratios), ratio_range=[ratios[0], ratios[-1]])
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in found.items()}


def main() -> None:
    parser, count = cli.Parser(__doc__), cli.number(int, 1)
    parser.add_argument("what", choices=["train"])
    parser.add_argument("--preset", choices=list(PRESETS), default="emoji")
    for name in ("image-batch", "text-batch", "pixels"):
        parser.add_argument(f"--{name}", type=count, help="(the stage's)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--compile", action="store_true", help="ours, block by block")
    parser.add_argument("--vocab-size", type=count, help="(the preset's; the shipped weights have 3680)")
    parser.add_argument("--rounds", type=count, default=9, help="(9)")
    parser.add_argument("--steps", type=count, default=2, help="of a round (2)")
    parser.add_argument("--peak", type=cli.number(float, 1e-3), default=0.0, help="of the device, TFLOP/s")
    parser.add_argument("--against-plain", action="store_true", help="in turns with a plain loop")
    args = parser.parse_args()
    settings = ("preset", "image_batch", "text_batch", "pixels", "dtype", "device", "optimizer")
    flags = [f"{cli.flag(name)}={value}" for name, value in vars(args).items()
             if name in settings and value is not None] + ["--compile"] * args.compile
    found = bench_train(parse(flags), args.vocab_size, args.rounds, args.steps, args.against_plain, args.peak)
    for key, value in found.items():
        print(f"{key:16}{value}")
    print(json.dumps(found))


if __name__ == "__main__":
    cli.run(main)
