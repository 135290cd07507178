"""Train the dual diffusion transformer: one loop, two losses, L = L_image + lambda L_text.

    python train.py --preset emoji --stage pretrain                     # from scratch: pictures and captions
    python train.py --stage instruct --init out/pretrain                # then questions with answers
    bash runs/emoji.sh                                                  # all: the emoji weights' recipe
    torchrun --standalone --nproc_per_node=2 train.py --stage pretrain  # the same lines, sharded by FSDP2

From SD3's weights, as in the paper, and the end-to-end variant of its size; stages.py has the table:

    torchrun --nproc_per_node=8 train.py --stage pretrain --init SD3 --image-data 'recap/{000..999}.tar'
    torchrun --nproc_per_node=8 train.py --stage mask-emb --init out/pretrain --image-data ...
    torchrun --nproc_per_node=8 train.py --stage text --preset e2e-1.1b --text-data tokens.safetensors
    python train.py --stage pretrain --init SD3 --print-plan 8          # memory, arithmetic and days, first

A run lives in --out (out/STAGE unless given), as run.py says: its log, its checkpoints, the averaged weights
that sample.py reads.  Run the same command again and it goes on from the newest step_* folder, with any
number of processes; Ctrl-C and SIGTERM save first.
"""

import cli
cli.interruptible(__name__)

import os
import signal
import warnings
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor, nn

import build
import checkpoint
import data
import flow
import mask_diffusion
import meter
import parallel
import plan
import sample
import show
from buckets import Buckets
from build import Models
from cli import UserError, require
from devices import allow_tf32, autocast, choose_dtype
from muon import Muon
from parts import Parts, load_autoencoder
from model import T_FLOOR
from run import Run
from stages import STAGES, TrainConfig, learning_rate, parse, start
from tokenizer import Tokenizer
from vae import Pixels
from validate import Validation


# --------------------------------------------------------------------------------------------- the two losses

def image_batch(config: TrainConfig, held: "Held", samples: list[dict], draws: list[torch.Generator],
                times: Tensor | None = None) -> dict:
    """Noised pictures with clean captions, now and then with none; times (B,) in place of drawn ones."""
    images = data.latents_of(samples)
    shape = held.latent_shape(images)
    t, noise = map(torch.cat, zip(*(flow.draw(shape, generator, config.time_shift, config.times)
                                         for generator in draws)))
    t = t if times is None else times
    chances = [torch.rand(2, generator=generator).tolist() for generator in draws]
    dropped = torch.tensor([drop < config.text_dropout for drop, _ in chances])
    texts = ["" if none else data.choose_caption(sample, config.recaption, chance)
             for sample, none, (_, chance) in zip(samples, dropped, chances)]
    ids = torch.stack([held.tokenizer.encode(text, config.text_length) for text in texts])
    made = dict(images=images, ids=ids, dropped=dropped, t=t, noise=noise, count=len(ids))
    return made | ({"states": torch.stack([sample["states"] for sample in samples])} if held.stated else {})


def text_batch(config: TrainConfig, held: "Held", samples: list[dict], draws: list[torch.Generator],
               times: Tensor) -> dict:
    """Clean pictures, or none, with texts to be masked, each with its probability, times (B,)."""
    uniform = torch.stack([torch.rand(config.text_length, generator=generator) for generator in draws])
    pairs = [text_sample(held.tokenizer, *row, config) for row in zip(samples, draws)]
    ids, frozen = map(torch.stack, zip(*pairs))                                   # (B, L) each
    # the published mean is over all B L positions, prompts included
    return dict(images=data.latents_of(samples), ids=ids, frozen=frozen, t=times, uniform=uniform,
                count=ids.numel(), mask_id=held.tokenizer.mask_id, weight=config.text_loss)


def text_sample(tokenizer: Tokenizer, sample: dict, generator: torch.Generator,
                config: TrainConfig) -> tuple[Tensor, Tensor]:
    """ids (L,), and frozen (L,), True at the prompt: a caption or, in `instruct`, now and then a question;
    or a piece of plain text."""
    if "ids" in sample:
        return sample["ids"], torch.zeros(config.text_length, dtype=torch.bool)
    ask, which = torch.rand(2, generator=generator).tolist()
    questions, share = sample.get("questions"), config.question_share if config.stage == "instruct" else 0.0
    if questions and (ask < share or not sample["captions"]):
        asked = questions[int(which * len(questions))]
        prompt, answer = tokenizer.pieces(data.question_prompt(asked["question"])), asked["answer"]
    else:
        prompt, answer = [], data.choose_caption(sample, config.recaption, which)
    ids = tokenizer.fit(prompt + tokenizer.pieces(answer), config.text_length)
    return ids, torch.arange(config.text_length) < len(prompt)


def image_errors(models: Models, batch: dict) -> Tensor:
    """The velocity's error of each picture, (B,): the text is clean, the picture noised to t."""
    text = models.captions(batch["ids"], batch["dropped"], batch.get("states"))            # (B, L, E)
    mmdit = models.learns["mmdit"]
    velocity = lambda x_t, t: mmdit(x_t, text, t, need="velocity")[0]
    floor = T_FLOOR["train"] if mmdit.config.predicts == "data" else 0.0
    return flow.errors(velocity, models.latents(batch["images"]), t=batch["t"], noise=batch["noise"],
                       floor=floor)


def text_errors(models: Models, batch: dict) -> Tensor:
    """The masked tokens' error of each text, (B,): the picture, if any, is clean, so its time is 0."""
    images, clean = models.latents(batch["images"]), torch.zeros(1, device=batch["ids"].device)
    logits = lambda ids, at: models.learns["mmdit"](images, models.text(ids), clean, need="logits", at=at)[1]
    return mask_diffusion.errors(logits, batch["ids"], batch["mask_id"], batch["frozen"], t=batch["t"],
                                 uniform=batch["uniform"], weight=batch["weight"], picks=True)


ERRORS = dict(image=image_errors, text=text_errors)


# ----------------------------------------------------------------------------------------------------- set-up

@dataclass
class Held:
    """What batches are made of, the same on every process."""
    tokenizer: Tokenizer
    mixes: dict[str, data.Mix]      # "image" and "text", or the latter alone
    key: str                        # of all draws of this run
    rank: int
    world: int
    channels: int = 3               # of latents
    factor: int = 1                 # pixels per latent, along a side
    stated: bool = False            # T5's states of captions are stored
    buckets: dict[str, Buckets] = field(default_factory=dict)   # of each mix, where pictures are not square

    def latent_shape(self, images: Tensor) -> tuple[int, ...]:
        """(1, C, h, w) of what the model diffuses for a batch of pictures, or of latents that are stored."""
        factor = self.factor if images.shape[1] != self.channels else 1
        return 1, self.channels, images.shape[2] // factor, images.shape[3] // factor

    def rows(self, step: int, size: int, name: str) -> tuple[list[dict], list[torch.Generator]]:
        """The samples of this process's rows of a global batch, and a generator for each: what is drawn with
        it depends on the run and on the row's position alone, whatever the number of processes."""
        rows = range(self.rank, size, self.world)
        positions, shape = [step * size + row for row in rows], None
        if self.buckets:
            positions, shape = self.buckets[name].rows(step, size, rows)
        return (self.mixes[name].take(positions, name, shape),
                [data.seeded(self.key, name, position) for position in positions])

    def validation(self, config: TrainConfig) -> Validation:
        """What this run is measured on, in the same way whatever the losses that it learns by."""
        plain = replace(config, text_dropout=0.0, recaption=0.0, text_loss="1/t")
        make = dict(image=partial(image_batch, plain, self), text=partial(text_batch, plain, self))
        return Validation(self.mixes, make, self.tokenizer)

    def batches(self, config: TrainConfig, step: int) -> dict:
        """This process's rows of both global batches, on the CPU, what samples were of no use for them, and
        what was lost of each text that was cut: a function of the step alone, so that it can be made ahead,
        anywhere."""
        self.tokenizer.cut, made = 0, {}
        if "image" in self.mixes:
            made["image"] = image_batch(config, self, *self.rows(step, config.image_batch, "image"))
        # antithetic over the global batch; dealt out row by row, each process has early and late times
        t, _ = mask_diffusion.draw((config.text_batch, 0), data.seeded(self.key, "times", step))
        made["text"] = text_batch(config, self, *self.rows(step, config.text_batch, "text"),
                                  t[self.rank::self.world])
        return made | dict(bad=[name for mix in self.mixes.values() for name in mix.newly_bad()],
                           cut=[self.tokenizer.lost] * self.tokenizer.cut)


def optimizers_of(model: nn.ModuleDict, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW; with --optimizer muon that for the blocks' matrices."""
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = {p for p in model["mmdit"].blocks.parameters() if p.ndim == 2 and config.optimizer == "muon"}
    optimizers = [torch.optim.AdamW([p for p in learning if p not in matrices], lr=config.lr,
                                    weight_decay=config.weight_decay, fused=True)]
    if matrices:
        optimizers.append(Muon([p for p in learning if p in matrices], config.lr, config.weight_decay,
                               dtype=getattr(torch, config.dtype)))
    return optimizers


def check_extension(config: TrainConfig, run: Run) -> None:
    """Raise UserError for more steps once the learning rate has begun to fall to zero: it would rise again."""
    steps, decay_steps = run.was.get("steps", 0), run.was.get("decay_steps", 0)
    if decay_steps and run.step > steps - decay_steps and config.steps > steps:
        raise UserError(f"--steps {config.steps}: this run's learning rate falls to zero at step {steps}; --init "
                        f"{config.out} with another --out starts a run from its weights")


def mixtures(config: TrainConfig, key: str) -> dict[str, data.Mix]:
    """Of each loss that the stage has.  Raises UserError, also where a stage is given no data."""
    text_only, given = STAGES[config.stage].losses == "text", config.image_data or config.text_data
    require((given and (text_only or config.image_data), f"--stage {config.stage}: name its data with "
             f"{'--text-data' if text_only else '--image-data'}; python data.py --help lists the forms"))
    asks = config.stage == "instruct" and config.question_share > 0
    filters = data.PUBLISHED if config.filtered else data.Filters()
    image, text = (data.Mix(specs, config.pixels, key, filters, config.text_length, asks)
                   if specs else None for specs in (config.image_data, config.text_data))
    return {"text": text} if text_only else {"image": image, "text": text or image}


def set_up(config: TrainConfig) -> tuple[TrainConfig, Held, Models, Run]:
    """Processes, data, models, optimizers and the run's folder, as far as the run has come."""
    rank, world, device = parallel.start(config.device)
    dtype, why = choose_dtype(config.dtype, device)
    config = replace(config, dtype=dtype)
    allow_tf32(device, dtype)
    family, sizes, about = start(config.init, config.preset)
    sides = [("--text-batch", config.text_batch)] + [("--image-batch", config.image_batch)] * (
        config.image_batch > 0)
    for flag, size in sides:
        rows, micro = size // world, config.micro_batch
        require((size % world == 0, f"{flag} {size} does not divide over {world} processes"),
                (not micro or rows % micro == 0, f"--micro-batch {micro} does not divide {flag} {size} over "
                 f"{world} process(es), {rows} rows on each"))
    where = build.places(config, sizes, about)
    vae = load_autoencoder(where["vae"], sizes.channels) if "vae" in where else (
        Pixels() if sizes.channels == 3 else None)
    factor = vae.factor if vae else data.latent_factor([*config.image_data, *config.text_data])
    build.check(config, sizes, factor)
    checkpoint.check_config(sizes)
    settings = asdict(config) | dict(world=world, torch=torch.__version__)
    run = Run(Path(config.out), settings, rank, config.fresh, config.resume_step)
    check_extension(config, run)
    mixes = mixtures(config, run.key)
    encoder = vae and checkpoint.digest(vae)
    latents = data.check_stamps(mixes.get("image"), mixes["text"], sizes.channels, about.get("latents"),
                                encoder)
    unit = sizes.patch * (factor or 1)
    buckets = {name: Buckets(mixes[name], name, unit) for name in mixes if config.buckets}
    texts = [mix.texts() for mix in dict.fromkeys(mixes.values())]
    texts = None if None in texts else sum(texts, [])
    plain = mixes["text"].stamp is None                          # the null image learns
    models = build.build(config, sizes, where, texts, plain, vae, device)
    stated = build.stated(config, mixes.get("image"), models, where)
    held = Held(models.tokenizer, mixes, run.key, rank, world, sizes.channels, factor or 1, stated, buckets)
    data.check_tokens(mixes["text"], held.tokenizer, config.init or "gpt2")
    if config.stage == "instruct":
        data.check_questions(mixes["text"], texts or [], held.tokenizer, config.text_length)
    if world > 1:
        parallel.shard(models.learns, getattr(torch, config.dtype), config.shard)
        if config.shard_t5 and models.t5:
            parallel.shard_frozen(models.t5)
    remembered = {part: str(Path(path).resolve()) for part, path in where.items()}
    run.begin(models, optimizers_of(models.learns, config), remembered | dict(
        pixels=config.pixels, buckets=config.buckets, text_length=config.text_length, stage=config.stage,
        latents=latents, null_image=plain or bool(about.get("null_image"))),
        plan.work(config, sizes, factor or 1))
    if rank == 0:
        if family == "SD3":
            build.report(config, held.tokenizer.vocab_size)
        millions = sum(p.numel() for p in models.learns.parameters()) / 1e6
        print(f"{millions:.2f} M parameters, {len(mixes.get('image') or mixes['text']):,} samples an epoch, "
              f"vocabulary {held.tokenizer.vocab_size}, {world} process(es), {device}, from step {run.step}",
              flush=True)
        print(f"matrix products in {dtype}: {why}", flush=True)
        if vae is None and config.sample_every and "image" in mixes:
            print("note: no samples are drawn, for lack of the autoencoder that made the latents (--vae)",
                  flush=True)
    drawable = vae is not None and "image" in mixes
    return replace(config, sample_every=config.sample_every * drawable), held, models, run


# ------------------------------------------------------------------------------------------------------ train

def update(run: Run, decay: float) -> None:
    """A step of the optimizers, and of the average: e += (1 - decay) (p - e), the decay smaller at first."""
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    decay = min(decay, (run.step + 1) / (run.step + 10))
    torch._foreach_lerp_([parallel.local(e) for e in run.ema.values()],
                         [parallel.local(p.detach()) for p in run.model.parameters()], 1 - decay)


def show_samples(config: TrainConfig, run: Run, held: Held, models: Models, device: torch.device) -> None:
    """Drawings and captions by the averaged weights, made by all processes; the last two prompts are new."""
    mix = held.mixes["image"]
    known, kept = mix.shown(6, False), mix.shown(8, True)
    captions = lambda samples: [data.choose_caption(sample, 0, 0) for sample in samples]
    parts = Parts.of(models, config.pixels, config.text_length, device)
    with parallel.averaged(run.model, run.ema), torch.compiler.set_stance("force_eager"):
        results = sample.results(parts, captions(known + kept[:2]), captions(kept), data.latents_of(kept))
    if run.rank == 0:
        show.write_picture(run.out / f"samples_{run.step}.png", results)
        run.show()


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """While this lasts Ctrl-C and SIGTERM ask, by a number in the list, and the next step obeys."""
    asked = []
    before = {name: signal.signal(name, lambda number, frame: asked.append(number))
              for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def on_device(batch: dict, device: torch.device) -> dict:
    """With what is large there; times and masks stay on the CPU, so that nothing waits to learn of them."""
    large = {key: batch[key] for key in ("images", "ids", "states", "noise") if batch.get(key) is not None}
    pinned = lambda x: x.pin_memory() if device.type == "cuda" else x            # copied while others compute
    return batch | {key: pinned(x).to(device, non_blocking=True) for key, x in large.items()}


def micro_batches(batch: dict, size: int) -> list[dict]:
    """Return a batch in parts of `size` rows; 0: as one.

    Each part takes every so-manieth row: times of masking fall from row to row, and a part of neighbours could
    have nearly all of its tokens masked, whose logits it would hold at once."""
    rows = len(batch["ids"])
    count = rows // size if size else 1
    return [{name: x[first::count] if isinstance(x, Tensor) else x for name, x in batch.items()}
            for first in range(count)]


def backward(config: TrainConfig, models: Models, made: dict, world: int, metered: bool) -> tuple[dict, dict]:
    """Add up the gradients of both losses, in micro-batches; returns the losses, and what the meter says."""
    model, losses, image = models.learns, {}, []
    device = next(model.parameters()).device
    sides = [name for name in ERRORS if name in made]
    counts = [float(made[name]["count"]) for name in sides]                     # of pictures, unfrozen tokens
    counts = parallel.mean(torch.tensor(counts, device=device)).clamp(min=1 / world)
    for name, count in zip(sides, counts):
        weight = config.text_weight if name == "text" else config.image_weight
        parts = micro_batches(made[name], config.micro_batch)
        for part in parts:
            of_loss = part is parts[-1]
            parallel.last_backward(model, of_loss and (name == "text" or metered), of_loss, config.shard)
            batch = on_device(part, device)
            with autocast(device, config.dtype):                      # the mean over processes is the global mean
                loss = ERRORS[name](models, batch).sum() / count
                (weight * loss).backward()
            losses[name] = losses.get(name, 0) + loss.detach()
        if metered and name == "image":
            image = meter.gradients(model)
    return losses, meter.compare(model, image) if image else {}


def validate(config: TrainConfig, held: Held, models: Models, run: Run, validation: Validation) -> dict:
    """The averaged weights on what is always the same."""
    device = next(models.learns.parameters()).device
    errors = lambda name: lambda batch: ERRORS[name](models, on_device(batch, device))
    with (parallel.averaged(run.model, run.ema), torch.compiler.set_stance("force_eager"),
          autocast(device, config.dtype)):
        run.model.train()                                        # the loss that it learns by
        return validation.measure({name: errors(name) for name in ERRORS}, held.rank, held.world)


def train(config: TrainConfig, held: Held, models: Models, run: Run, asked: list[int]) -> None:
    """The loop: rate, both losses, clip, agree, update, log, measure, save, show."""
    model, device = models.learns, next(models.learns.parameters()).device
    feed = data.feed(partial(held.batches, config), range(run.step, config.steps), config.workers)
    validation = held.validation(config) if config.eval_every else None
    due = lambda every: every and (run.step % every == 0 or run.step == config.steps)
    bad, cut = [], []               # samples of no use, and what was lost of texts, since the last row

    while run.step < config.steps:
        rate = learning_rate(run.step, config)
        for group in [group for optimizer in run.optimizers for group in optimizer.param_groups]:
            group["lr"] = rate
        made = next(feed)
        metered = config.meter_every and (run.step + 1) % config.meter_every == 0
        losses, found = backward(config, models, made, run.world, bool(metered))
        norm = parallel.whole(nn.utils.clip_grad_norm_(model.parameters(), config.clip))
        votes = bool(asked), not norm.isfinite(), bool(run.error)
        stopping, unsound, failed = parallel.agree(*votes, device=device)
        if failed or unsound:
            run.wait()                                           # says what went wrong with a save
        if unsound:                                              # before anything is spoilt
            said = ", ".join(f"{name} loss {float(loss):.4g}" for name, loss in losses.items())
            raise UserError(f"step {run.step + 1}: the gradient is not finite ({said}); go on from "
                            f"{run.newest()} with a smaller --lr")
        update(run, config.ema)
        run.step += 1
        run.note(losses | dict(grad=norm))
        bad, cut = bad + made["bad"], cut + made["cut"]
        if validation and due(config.eval_every) and not stopping:
            found |= validate(config, held, models, run, validation)
        if due(config.log_every) or run.step <= 5 or found:
            run.log(rate, config.steps, bad, cut, found)
            bad, cut = [], []
        if due(config.save_every) or stopping:
            run.save()
        if due(config.sample_every) and not stopping:
            with autocast(device, config.dtype):
                show_samples(config, run, held, models, device)
        if stopping:
            break
    run.end(config.steps)


def main(argv: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")   # dcp says so at world size 1
    config = parse(argv, __doc__)
    if config.print_plan:                                        # under torchrun, of its processes
        gpus = max(config.print_plan, int(os.environ.get("WORLD_SIZE", 1)))
        if os.environ.get("RANK", "0") == "0":
            print(plan.show(replace(config, print_plan=gpus)))
        return
    with parallel.one_voice():
        config, held, models, run = set_up(config)
        with closing(run), asked_to_stop() as asked, data.readers_watched():
            train(config, held, models, run, asked)


if __name__ == "__main__":
    cli.run(main)
