"""Train the dual diffusion transformer: one loop, two losses, L = L_image + lambda L_text.

    python train.py --preset emoji --stage pretrain                     # from scratch: pictures and captions
    python train.py --stage instruct --init out/pretrain                # then questions with answers
    bash runs/emoji.sh                                                  # all: the emoji weights' recipe
    torchrun --standalone --nproc_per_node=2 train.py --stage pretrain  # the same lines, sharded by FSDP2

From SD3's weights, as in the paper, and the end-to-end variant of its size; training/config.py has the table:

    torchrun --nproc_per_node=8 train.py --stage pretrain --init SD3 --image-data 'recap/{000..999}.tar'
    torchrun --nproc_per_node=8 train.py --stage mask-emb --init out/pretrain --image-data ...
    torchrun --nproc_per_node=8 train.py --stage text --preset e2e-1.1b --text-data tokens.safetensors
    python train.py --stage pretrain --init SD3 --print-plan 8          # memory, arithmetic and days, first

A run lives in --out (out/STAGE unless given), as training/run_folder.py says: its log, its checkpoints, the averaged weights
that sample.py reads.  Run the same command again and it goes on from the newest step_* folder, with any
number of processes; Ctrl-C and SIGTERM save first.
"""

from common import cli
cli.interruptible(__name__)

import os
import signal
import warnings
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor, nn

import checkpoint
import data
import flow
import mask_diffusion
from checkpoint import load_autoencoder
from common import processes
from common.cli import UserError, require
from common.devices import allow_tf32, autocast, choose_dtype
from dataset import sources, workers
from inference.parts import Parts
from model import T_FLOOR
from pretrained.vae import Pixels
from training import cuda_graph, distributed, gradient_meter, models as training_models, plan
from training.batches import BatchMaker, micro_batches, on_device
from training.config import STAGES, TrainConfig, learning_rate, parse, start
from training.models import Models
from training.muon import Muon
from training.run_folder import Run
from training.validation import Validation
from viz import grids
from viz.samples import samples_page


# --------------------------------------------------------------------------------------------- the two losses

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


def set_up(config: TrainConfig) -> tuple[TrainConfig, BatchMaker, Models, Run]:
    """Processes, data, models, optimizers and the run's folder, as far as the run has come."""
    rank, world, device = processes.start(config.device)
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
    where = training_models.places(config, sizes, about)
    vae = load_autoencoder(where["vae"], sizes.channels) if "vae" in where else (
        Pixels() if sizes.channels == 3 else None)
    factor = vae.factor if vae else data.latent_factor([*config.image_data, *config.text_data])
    training_models.check(config, sizes, factor)
    checkpoint.check_config(sizes)
    settings = asdict(config) | dict(world=world, torch=torch.__version__)
    run = Run(Path(config.out), settings, rank, config.fresh, config.resume_step)
    check_extension(config, run)
    mixes = mixtures(config, run.key)
    encoder = vae and checkpoint.digest(vae)
    latents = data.check_stamps(mixes.get("image"), mixes["text"], sizes.channels, about.get("latents"),
                                encoder)
    unit = sizes.patch * (factor or 1)
    buckets = {name: mixes[name].buckets(name, unit) for name in mixes if config.buckets}
    texts = [mix.texts() for mix in dict.fromkeys(mixes.values())]
    texts = None if None in texts else sum(texts, [])
    plain = mixes["text"].stamp is None                          # the null image learns
    models = training_models.build(config, sizes, where, texts, plain, vae, device)
    stated = training_models.stated(config, mixes.get("image"), models, where)
    maker = BatchMaker(models.tokenizer, mixes, run.key, rank, world, sizes.channels, factor or 1, stated, buckets)
    data.check_tokens(mixes["text"], maker.tokenizer, config.init or "gpt2")
    if config.stage == "instruct":
        data.check_questions(mixes["text"], texts or [], maker.tokenizer, config.text_length)
    if world > 1:
        distributed.shard(models.learns, getattr(torch, config.dtype), config.shard)
        if config.shard_t5 and models.t5:
            distributed.shard_frozen(models.t5)
    remembered = {part: str(Path(path).resolve()) for part, path in where.items()}
    run.begin(models, optimizers_of(models.learns, config), remembered | dict(
        pixels=config.pixels, buckets=config.buckets, text_length=config.text_length, stage=config.stage,
        latents=latents, null_image=plain or bool(about.get("null_image"))),
        plan.work(config, sizes, factor or 1))
    if rank == 0:
        if family == "SD3":
            training_models.report(config, maker.tokenizer.vocab_size)
        millions = sum(p.numel() for p in models.learns.parameters()) / 1e6
        print(f"{millions:.2f} M parameters, {len(mixes.get('image') or mixes['text']):,} samples an epoch, "
              f"vocabulary {maker.tokenizer.vocab_size}, {world} process(es), {device}, from step {run.step}",
              flush=True)
        print(f"matrix products in {dtype}: {why}", flush=True)
        if vae is None and config.sample_every and "image" in mixes:
            print("note: no samples are drawn, for lack of the autoencoder that made the latents (--vae)",
                  flush=True)
    drawable = vae is not None and "image" in mixes
    return replace(config, sample_every=config.sample_every * drawable), maker, models, run


# ------------------------------------------------------------------------------------------------------ train

def update(run: Run, decay: float) -> None:
    """A step of the optimizers, and of the average: e += (1 - decay) (p - e), the decay smaller at first."""
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    decay = min(decay, (run.step + 1) / (run.step + 10))
    torch._foreach_lerp_([distributed.local(e) for e in run.ema.values()],
                         [distributed.local(p.detach()) for p in run.model.parameters()], 1 - decay)


def show_samples(config: TrainConfig, maker: BatchMaker, models: Models, run: Run) -> None:
    """Drawings and captions by the averaged weights, made by all processes; the last two prompts are new."""
    mix, device = maker.mixes["image"], next(models.learns.parameters()).device
    known, kept = mix.shown(6, False), mix.shown(8, True)
    captions = lambda samples: [sources.choose_caption(sample, 0, 0) for sample in samples]
    parts = Parts.of(models, config.pixels, config.text_length, device)
    with (distributed.averaged(run.model, run.ema), torch.compiler.set_stance("force_eager"),
          autocast(device, config.dtype)):
        results = samples_page(parts, captions(known + kept[:2]), captions(kept), sources.latents_of(kept))
    if run.rank == 0:
        grids.write_picture(run.out / f"samples_{run.step}.png", results)
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


def backward(config: TrainConfig, models: Models, made: dict, world: int, metered: bool) -> tuple[dict, dict]:
    """Add up the gradients of both losses, in micro-batches; returns the losses, and what the meter says."""
    model, losses, image = models.learns, {}, []
    device = next(model.parameters()).device
    sides = [name for name in ERRORS if name in made]
    counts = [float(made[name]["count"]) for name in sides]                     # of pictures, unfrozen tokens
    counts = processes.mean(torch.tensor(counts, device=device)).clamp(min=1 / world)
    for name, count in zip(sides, counts):
        weight = config.text_weight if name == "text" else config.image_weight
        parts = micro_batches(made[name], config.micro_batch)
        for part in parts:
            of_loss = part is parts[-1]
            distributed.last_backward(model, of_loss and (name == "text" or metered), of_loss, config.shard)
            batch = on_device(part, device)
            with autocast(device, config.dtype):                      # the mean over processes is the global mean
                loss = ERRORS[name](models, batch).sum() / count
                (weight * loss).backward()
            losses[name] = losses.get(name, 0) + loss.detach()
        if metered and name == "image":
            image = gradient_meter.gradients(model)
    return losses, gradient_meter.compare(model, image) if image else {}


def validate(config: TrainConfig, maker: BatchMaker, models: Models, run: Run, validation: Validation) -> dict:
    """The averaged weights on what is always the same."""
    device = next(models.learns.parameters()).device
    errors = lambda name: lambda batch: ERRORS[name](models, on_device(batch, device))
    with (distributed.averaged(run.model, run.ema), torch.compiler.set_stance("force_eager"),
          autocast(device, config.dtype)):
        run.model.train()                                        # the loss that it learns by
        return validation.measure({name: errors(name) for name in ERRORS}, maker.rank, maker.world)


def finish_step(config: TrainConfig, maker: BatchMaker, models: Models, run: Run, validation: Validation | None,
                rate: float, found: dict, stopping: bool) -> None:
    """What is due after a step: validation, a row of the log, a checkpoint, samples.  found: what the meter says."""
    if validation and run.due(config.eval_every) and not stopping:
        found = found | validate(config, maker, models, run, validation)
    if run.due(config.log_every) or run.step <= 5 or found:
        run.log(rate, config.steps, found)
    if run.due(config.save_every) or stopping:
        run.save()
    if run.due(config.sample_every) and not stopping:
        show_samples(config, maker, models, run)


def train(config: TrainConfig, maker: BatchMaker, models: Models, run: Run, asked: list[int]) -> None:
    """The loop: rate, both losses, clip, agree, update, log, measure, save, show."""
    model, device = models.learns, next(models.learns.parameters()).device
    feed = workers.feed(partial(maker.batches, config), range(run.step, config.steps), config.workers)
    validation = maker.validation(config) if config.eval_every else None

    while run.step < config.steps:
        rate = learning_rate(run.step, config)
        for group in [group for optimizer in run.optimizers for group in optimizer.param_groups]:
            group["lr"] = rate
        made = next(feed)
        metered = config.meter_every and (run.step + 1) % config.meter_every == 0
        losses, found = backward(config, models, made, run.world, bool(metered))
        norm = distributed.whole(nn.utils.clip_grad_norm_(model.parameters(), config.clip))
        votes = bool(asked), not norm.isfinite(), bool(run.error)
        stopping, unsound, failed = processes.agree(*votes, device=device)
        if failed or unsound:
            run.wait()                                           # says what went wrong with a save
        if unsound:                                              # before anything is spoilt
            said = ", ".join(f"{name} loss {float(loss):.4g}" for name, loss in losses.items())
            raise UserError(f"step {run.step + 1}: the gradient is not finite ({said}); go on from "
                            f"{run.newest()} with a smaller --lr")
        update(run, config.ema)
        run.step += 1
        run.note(losses | dict(grad=norm), made)
        finish_step(config, maker, models, run, validation, rate, found, stopping)
        if stopping:
            break
    run.end(config.steps)


def main(argv: list[str] | None = None) -> None:
    # the former of dcp at world size 1, the latter of AdamW's state in a graph
    warnings.filterwarnings("ignore", message="torch.distributed is disabled|This instance was constructed")
    config = parse(argv, __doc__)
    if config.print_plan:                                        # under torchrun, of its processes
        gpus = max(config.print_plan, int(os.environ.get("WORLD_SIZE", 1)))
        if os.environ.get("RANK", "0") == "0":
            print(plan.show(replace(config, print_plan=gpus)))
        return
    if config.cuda_graph:
        cuda_graph.check(config)
    with processes.one_voice():
        config, maker, models, run = set_up(config)
        with closing(run), asked_to_stop() as asked, workers.readers_watched():
            if config.cuda_graph:
                cuda_graph.train(config, maker, models, run, asked, image_errors, finish_step)
            else:
                train(config, maker, models, run, asked)


if __name__ == "__main__":
    cli.run(main)
