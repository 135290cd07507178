"""Train the dual diffusion transformer: one loop, two losses, L = L_image + lambda L_text.

    python train.py --preset emoji --stage pretrain                     # from scratch: pictures and captions
    python train.py --stage instruct --init out/pretrain                # then questions with answers
    bash runs/emoji.sh                                                  # both: the emoji weights' recipe
    torchrun --standalone --nproc_per_node=2 train.py --stage pretrain  # the same lines, sharded by FSDP2

A run lives in --out (out/STAGE unless given), as run.py says: its log, its checkpoints, the averaged weights
that sample.py reads.  Run the same command again and it goes on from the newest step_* folder, with any
number of processes; Ctrl-C and SIGTERM save first.

The stages of the paper on its own data, from SD3's weights, are not here yet: this trains the end-to-end
variant (GPT-2's tokenizer, own embedding table) on the emoji set or your own pictures, pixels as latents.
"""

import cli
cli.interruptible(__name__)

import signal
import warnings
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import data
import emoji
import flow
import mask_diffusion
import parallel
import sample
import show
from cli import UserError, require, value
from model import PRESETS, MMDiT, MMDiTConfig, TokenEmbedding
from parts import Parts
from run import Run
from tokenizer import Tokenizer, gpt2_subset, gpt2_tokenizer
from vae import Pixels


@dataclass
class TrainConfig:
    stage: str = value("pretrain", choices=["pretrain", "instruct"])  # captions; or questions too
    preset: str = value("emoji", choices=list(PRESETS))  # sizes of the model; --init brings its own
    init: str = ""                                  # checkpoint folder to start from, instead of from scratch
    out: str = ""                                   # folder of the run, instead of out/STAGE
    image_data: list = value([str(emoji.TAR)])      # of the image loss, PATH[:WEIGHT] ...: see data.py
    text_data: list = value([])                     # of the text loss, if others
    recaption: float = value(0.5, low=0, high=1)    # share of re-captions where a sample has one
    min_side: int = value(1, low=1)                 # pictures with a shorter side are left out
    pixels: int = value(0, low=1)            # pictures are resized to this; 0: as the preset or --init has it
    steps: int = value(4000, low=1)                 # updates
    image_batch: int = value(96, low=1)         # pictures in the image loss of one update, over all processes
    text_batch: int = value(48, low=1)              # texts in the text loss
    lr: float = value(2.5e-3, low=1e-12, high=1)    # peak learning rate
    warmup: int = value(50, low=0)                  # steps of linear warm-up
    schedule: str = value("constant", choices=["constant", "linear"])  # after warm-up; linear: ends at zero
    decay_steps: int = value(0, low=1)     # of a linear schedule: over the last so many; 0: all after warm-up
    decay_from: int = value(0, low=1)           # when time is up: from this step on, which ends the run early
    optimizer: str = value("muon", choices=["adamw", "muon"])  # of the blocks' matrices; of all else adamw
    weight_decay: float = value(1e-2, low=0, high=1)  # of either
    time_shift: float = value(2.0, low=0.001, high=1000)  # of the image loss's times; 1: the paper's
    text_weight: float = value(0.2, low=0)          # lambda
    text_dropout: float = value(0.1, low=0, high=1)  # share of pictures with the empty prompt, for guidance
    question_share: float = value(0.4, low=0, high=1)  # of the texts in `instruct`; the others are captions
    text_length: int = value(0, low=2)              # tokens of a text, padded; 0: as preset or --init has it
    vocabulary: str = value("used", choices=["used", "full"])  # GPT-2's tokens that the texts use, or all
    clip: float = value(2.0, low=1e-6)              # largest gradient norm
    ema: float = value(0.999, low=0, high=1)        # decay of the averaged weights
    seed: int = value(0, low=0, high=2**63 - 1)     # of weights, order, noise, times and masks
    dtype: str = value("bfloat16", choices=["float32", "bfloat16"])  # of products; weights stay float32
    device: str = value("auto", choices=["auto", "cpu", "cuda"])  # where
    workers: int = value(0, low=0, high=256)        # processes that read, cut and tokenize ahead; 0: none
    compile: bool = False                           # torch.compile each block (needs a C++ compiler on a CPU)
    log_every: int = value(20, low=1)               # steps between lines
    save_every: int = value(250, low=1)             # steps between checkpoints
    sample_every: int = value(500, low=0)           # steps between pictures of samples; 0: never
    shard: str = value("zero2", choices=["zero2", "zero3", "hsdp", "none"])  # over processes: parallel.shard
    resume_step: int = value(0, low=1)              # go on from this step_N; 0: from the newest
    extend: bool = False                            # with more --steps: a rate that fell rises again
    fresh: bool = False                         # start over in a folder that holds a run, instead of going on


PIXELS = {"emoji": 64, "e2e-1.1b": 256, "sd3-medium": 256}      # side of the pictures that a preset starts on
STAGES = {  # what differs from the defaults above; lambda is the paper's, 0.2 and then 1.0
    "pretrain": dict(),
    "instruct": dict(schedule="linear", text_weight=1.0),
}


def parse(argv: list[str] | None = None) -> TrainConfig:
    """The command line as a TrainConfig: dataclass defaults, then the stage's, then the flags."""
    first = cli.Parser("", add_help=False)
    first.add_argument("--stage", default=TrainConfig.stage)
    defaults = STAGES.get(first.parse_known_args(argv)[0].stage, {})
    parser = cli.Parser(__doc__)
    parser.add_fields(TrainConfig, defaults)
    given = vars(parser.parse_args(argv))
    config = TrainConfig(**(defaults | given))
    scratch = config.init and "a start from scratch, and --init was given"
    idle = {"decay_steps": config.schedule == "constant" and "--schedule linear",
            "decay_from": not config.decay_steps and "--decay-steps, how long the rate takes to fall to zero",
            "question_share": config.stage == "pretrain" and "--stage instruct",
            "preset": scratch, "vocabulary": scratch}
    for name in given:
        if idle.get(name):
            parser.error(f"{cli.flag(name)} changes nothing without {idle[name]}")
    steps = config.decay_from + config.decay_steps if config.decay_from else config.steps
    return replace(config, out=config.out or f"out/{config.stage}", steps=steps)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant; `linear` falls to zero, which the step after the last would have."""
    rate = config.lr * min(1, (step + 1) / max(config.warmup, 1))
    if config.schedule == "linear":
        rate *= min(1, (config.steps - step) / (config.decay_steps or max(config.steps - config.warmup, 1)))
    return rate


# --------------------------------------------------------------------------------------------- the two losses

def image_batch(config: TrainConfig, held: "Held", step: int) -> dict:
    """Noised pictures with clean captions, now and then with none: this process's rows of a global batch."""
    samples, draws = held.rows(step, config.image_batch, "image")
    images = data.latents_of(samples)
    shape = (1, *images.shape[1:])
    t, noise = map(torch.cat, zip(*(flow.draw(shape, generator, config.time_shift) for generator in draws)))
    chances = [torch.rand(2, generator=generator).tolist() for generator in draws]
    texts = ["" if drop < config.text_dropout else data.choose_caption(sample, config.recaption, chance)
             for sample, (drop, chance) in zip(samples, chances)]
    ids = torch.stack([held.tokenizer.encode(text, config.text_length) for text in texts])
    return dict(images=images, ids=ids, t=t, noise=noise, count=len(ids))


def text_batch(config: TrainConfig, held: "Held", step: int) -> dict:
    """Clean pictures, or none, with texts to be masked: this process's rows of a global batch.

    Times are antithetic over the global batch; dealt out row by row, each process has early and late ones."""
    samples, draws = held.rows(step, config.text_batch, "text")
    t, _ = mask_diffusion.draw((config.text_batch, 0), data.seeded(held.key, "times", step))
    uniform = torch.stack([torch.rand(config.text_length, generator=generator) for generator in draws])
    pairs = [text_sample(held.tokenizer, *row, config) for row in zip(samples, draws)]
    ids, frozen = map(torch.stack, zip(*pairs))                                   # (B, L) each
    return dict(images=data.latents_of(samples), ids=ids, frozen=frozen, t=t[held.rank::held.world],
                uniform=uniform, count=int((~frozen).sum()), mask_id=held.tokenizer.mask_id)


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


def image_errors(model: nn.ModuleDict, batch: dict) -> Tensor:
    """The velocity's error of each picture, (B,): the text is clean, the picture noised to t."""
    velocity = lambda x_t, t: model["mmdit"](x_t, model["embedding"](batch["ids"]), t, need="velocity")[0]
    return flow.errors(velocity, batch["images"], t=batch["t"], noise=batch["noise"])


def text_errors(model: nn.ModuleDict, batch: dict) -> Tensor:
    """The masked tokens' error of each text, (B,): the picture, if any, is clean, so its time is 0."""
    clean = torch.zeros(1, device=batch["ids"].device)
    logits = lambda ids: model["mmdit"](batch["images"], model["embedding"](ids), clean, need="logits")[1]
    return mask_diffusion.errors(logits, batch["ids"], batch["mask_id"], batch["frozen"],
                                 t=batch["t"], uniform=batch["uniform"])


# ----------------------------------------------------------------------------------------------------- set-up

@dataclass
class Held:
    """What batches are made of, the same on every process."""
    tokenizer: Tokenizer
    mixes: dict[str, data.Mix]      # "image" and "text"
    key: str                        # of all draws of this run
    rank: int
    world: int
    device: torch.device

    def rows(self, step: int, size: int, name: str) -> tuple[list[dict], list[torch.Generator]]:
        """The samples of this process's rows of a global batch, and a generator for each: what is drawn with
        it depends on the run and on the row's position alone, whatever the number of processes."""
        positions = range(step * size + self.rank, (step + 1) * size, self.world)
        return (self.mixes[name].take(positions, name),
                [data.seeded(self.key, name, position) for position in positions])

    def batches(self, config: TrainConfig, step: int) -> dict:
        """This process's rows of both global batches, on the CPU, and what samples were of no use for them: a
        function of the step alone, so that it can be made ahead, anywhere."""
        made = dict(image=image_batch(config, self, step), text=text_batch(config, self, step))
        return made | dict(bad=[name for mix in self.mixes.values() for name in mix.newly_bad()])


def sizes_of(config: TrainConfig) -> tuple[TrainConfig, MMDiTConfig]:
    """The configuration with pixels and text length as the preset, or --init, has them; and the sizes."""
    if config.init:
        _, sizes = checkpoint.read_sizes(config.init)
        require((sizes.text_length > 0, f"--init {config.init}: its text comes from T5; this trainer reads "
                 f"the end-to-end variant"),
                (config.text_length <= sizes.text_length, f"--text-length {config.text_length}: expected at "
                 f"most {sizes.text_length}, with which {config.init} was trained"))
        pixels = checkpoint.read_config(config.init).get("pixels")
    else:
        sizes, pixels = MMDiTConfig(**PRESETS[config.preset]), PIXELS[config.preset]
        require((sizes.text_length, f"--preset {config.preset}: its text comes from T5; this trainer reads "
                 f"the end-to-end variant"))
    pixels, length = config.pixels or pixels, config.text_length or sizes.text_length
    unit = sizes.patch * (1 if sizes.channels == 3 else 8)                       # pixels of a patch's side
    most = unit * sizes.position_size
    require((pixels % unit == 0 and pixels <= most, f"--pixels {pixels}: expected a multiple of the "
             f"patch, {unit}, up to {most}, this model's position table"))
    return replace(config, pixels=pixels, text_length=length), sizes


def build(config: TrainConfig, sizes: MMDiTConfig, texts: list[str] | None,
          plain: bool) -> tuple[nn.ModuleDict, list[int] | None]:
    """The model, and the tokenizer's keep list: from --init, or new with the texts' vocabulary, if known.

    plain: there are texts without a picture, for which the null image learns."""
    if config.init:
        mmdit = checkpoint.load_mmdit(config.init, training=True)
        embedding = checkpoint.load_embedding(config.init, training=True)
        keep = checkpoint.read_json(Path(config.init) / "tokenizer.json").get("keep")
    else:
        keep = gpt2_subset(texts) if config.vocabulary == "used" and texts is not None else None
        sizes = replace(sizes, vocab_size=gpt2_tokenizer(keep).vocab_size, text_length=config.text_length)
        torch.manual_seed(config.seed)
        mmdit, embedding = MMDiT(sizes), TokenEmbedding(sizes.vocab_size, sizes.text_length, sizes.text_width)
    mmdit.null_image.requires_grad_(plain)
    if config.compile:
        torch._dynamo.config.recompile_limit = 64                # image, text, and last-block variants
        for block in mmdit.blocks:
            block.compile()
    return nn.ModuleDict(dict(mmdit=mmdit, embedding=embedding)).train(), keep


def optimizers_of(model: nn.ModuleDict, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW; with --optimizer muon that for the blocks' matrices."""
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = {p for p in model["mmdit"].blocks.parameters() if p.ndim == 2 and config.optimizer == "muon"}
    optimizers = [torch.optim.AdamW([p for p in learning if p not in matrices], lr=config.lr,
                                    weight_decay=config.weight_decay, fused=True)]
    if matrices:                                                 # scaled so that AdamW's learning rate fits
        optimizers.append(torch.optim.Muon([p for p in learning if p in matrices], lr=config.lr,
                                           weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def check_extension(config: TrainConfig, run: Run) -> None:
    """More steps after a rate that falls to zero would let it rise: refused, unless that is asked for."""
    if not run.step or config.schedule != "linear" or config.steps <= run.was["steps"]:
        return
    before = replace(config, **{name: run.was[name] for name in ("steps", "lr", "warmup", "decay_steps")})
    then, now = learning_rate(run.step, before), learning_rate(run.step, config)
    said = f"the rate, {then:.3g} at step {run.step}, rises to {now:.3g} and falls to zero at {config.steps}"
    end = run.was["steps"]
    require((config.extend, f"--steps {config.steps}: this run's rate falls to zero at step {end}; with "
             f"--extend {said}"))
    if run.rank == 0:
        print(f"note: {said}", flush=True)


def set_up(config: TrainConfig) -> tuple[TrainConfig, Held, Run]:
    """Processes, data, model, optimizers and the run's folder, as far as the run has come."""
    rank, world, device = parallel.start(config.device)
    require(*((size % world == 0, f"{flag} {size} does not divide over {world} processes") for flag, size in
              (("--image-batch", config.image_batch), ("--text-batch", config.text_batch))))
    config, sizes = sizes_of(config)
    settings = asdict(config) | dict(world=world, torch=torch.__version__)
    run = Run(Path(config.out), settings, rank, config.fresh, config.resume_step)
    check_extension(config, run)
    mix, *other = [data.Mix(specs, config.pixels, run.key, config.min_side, config.text_length)
                   for specs in (config.image_data, config.text_data) if specs]
    mixes = dict(image=mix, text=(other or [mix])[0])
    was = checkpoint.read_config(config.init).get("latents") if config.init else None
    latents = data.check_stamps(mixes["image"], mixes["text"], sizes.channels, was)
    texts = [each.texts() for each in (mix, *other)]
    texts = None if None in texts else sum(texts, [])
    model, keep = build(config, sizes, texts, mixes["text"].stamp is None)
    held = Held(gpt2_tokenizer(keep), mixes, run.key, rank, world, device)
    data.check_tokens(mixes["text"], held.tokenizer, config.init or "gpt2")
    if config.stage == "instruct":
        data.check_questions(texts or [], held.tokenizer, config.text_length)
    model.to(device)
    if world > 1:
        parallel.shard(model, getattr(torch, config.dtype), config.shard)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    run.begin(model, optimizers_of(model, config), ema, keep, dict(
        pixels=config.pixels, text_length=config.text_length, stage=config.stage, latents=latents))
    if rank == 0:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{millions:.2f} M parameters, {len(mix):,} samples an epoch, vocabulary "
              f"{held.tokenizer.vocab_size}, {world} process(es), {device}, from step {run.step}", flush=True)
        if latents != "pixels" and config.sample_every:
            print("note: no samples are drawn, for lack of the autoencoder that made the latents", flush=True)
    return replace(config, sample_every=config.sample_every * (latents == "pixels")), held, run


# ------------------------------------------------------------------------------------------------------ train

def update(run: Run, decay: float) -> None:
    """A step of the optimizers, and of the average: e += (1 - decay) (p - e), the decay smaller at first."""
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    decay = min(decay, (run.step + 1) / (run.step + 10))
    torch._foreach_lerp_([parallel.local(e) for e in run.ema.values()],
                         [parallel.local(p.detach()) for p in run.model.parameters()], 1 - decay)


def show_samples(config: TrainConfig, run: Run, held: Held) -> None:
    """Drawings and captions by the averaged weights, made by all processes; the last two prompts are new."""
    mix = held.mixes["image"]
    known, kept = mix.shown(6, False), mix.shown(8, True)
    captions = lambda samples: [data.choose_caption(sample, 0, 0) for sample in samples]
    parts = Parts.of(run.model, Pixels(), held.tokenizer, config.pixels, config.text_length, held.device)
    with parallel.averaged(run.model, run.ema), torch.compiler.set_stance("force_eager"):
        results = sample.results(parts, captions(known + kept[:2]), captions(kept), data.latents_of(kept))
    if run.rank == 0:
        show.write_picture(run.out / f"samples_{run.step}.png", results)


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


def train(config: TrainConfig, held: Held, run: Run, asked: list[int]) -> None:
    """The loop: rate, both losses, clip, agree, update, log, save, show."""
    model, device, samples = run.model, held.device, config.image_batch + config.text_batch
    dtype = getattr(torch, config.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    # measured on a CPU: flash attention's backward took a third of the step, plain products a tenth
    kernels = [SDPBackend.MATH]
    if device.type == "cuda":
        kernels += [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    sides = (("image", 1.0, image_errors), ("text", config.text_weight, text_errors))
    feed = data.feed(partial(held.batches, config), range(run.step, config.steps), config.workers)
    bad = []                                                     # samples of no use since the last row

    while run.step < config.steps:
        rate = learning_rate(run.step, config)
        for group in [group for optimizer in run.optimizers for group in optimizer.param_groups]:
            group["lr"] = rate
        made, losses = next(feed), []
        counts = [float(made[name]["count"]) for name, _, _ in sides]           # of pictures, unfrozen tokens
        counts = parallel.mean(torch.tensor(counts, device=device)).clamp(min=1 / run.world)
        for (name, weight, errors), count in zip(sides, counts):
            parallel.last_backward(model, name == "text", config.shard)
            batch = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in made[name].items()}
            with autocast, sdpa_kernel(kernels):                 # the mean over processes is the global mean
                loss = errors(model, batch).sum() / count
                (weight * loss).backward()
            losses.append(loss.detach())
        norm = parallel.whole(nn.utils.clip_grad_norm_(model.parameters(), config.clip))
        votes = bool(asked), not norm.isfinite(), bool(run.error)
        stopping, unsound, failed = parallel.agree(*votes, device=device)
        if failed or unsound:
            run.wait()                                           # says what went wrong with a save
        if unsound:                                              # before anything is spoilt
            image, text = map(float, losses)
            raise UserError(f"step {run.step + 1}: the gradient is not finite (image loss {image:.4g}, text "
                            f"{text:.4g}); go on from {run.newest()} with a smaller --lr")
        update(run, config.ema)
        run.step += 1
        run.note(torch.stack([*losses, norm]))
        last, bad = run.step == config.steps, bad + made["bad"]
        if run.step % config.log_every == 0 or last or run.step <= 5:
            run.log(rate, samples, config.steps, bad)
            bad = []
        if run.step % config.save_every == 0 or last or stopping:
            run.save()
        if config.sample_every and (run.step % config.sample_every == 0 or last) and not stopping:
            with autocast:
                show_samples(config, run, held)
        if stopping:
            break
    run.end(config.steps)


def main(argv: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")   # dcp says so at world size 1
    config = parse(argv)
    with parallel.one_voice():
        config, held, run = set_up(config)
        with closing(run), asked_to_stop() as asked, data.readers_watched():
            train(config, held, run, asked)


if __name__ == "__main__":
    cli.run(main)
