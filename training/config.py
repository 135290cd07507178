"""The settings of train.py: the stages of training as a table, and every other setting as a flag.

    text -> pretrain                                the end-to-end variant, from scratch
    pretrain -> mask-emb -> high-res -> instruct    from SD3's weights (Table 1 of arXiv 2501.00289)

A flag that you leave out has the default of its stage (SMALL and SHAPES have those of the models of
pixels) or, if the stage has none, of TrainConfig.  With --init from a run, --guidance, --shift and
(except in high-res) --pixels are the run's.
"""

from dataclasses import dataclass
from typing import NamedTuple

import checkpoint
import flow
import mask_diffusion
from common import cli
from common.cli import option, require
from common.devices import DEVICES, DTYPES
from dataset import emoji, shapes
from model import PRESETS, MMDiTConfig
from training.optimizers import OPTIMIZERS


class Stage(NamedTuple):
    images: bool            # L = L_image + lambda L_text; without images, only L_text
    trains_mask: bool       # T5's [MASK] embedding is trained, too
    pixels: int             # side of an image; the run at --init decides it, except in high-res
    text_length: int        # tokens, padding included; at most the positions of a token embedding
    text_weight: float      # lambda
    image_batch: int        # images in the image loss of one update, over all processes
    text_batch: int         # texts in the text loss
    lr: float               # learning rate after the warm-up
    warmup: int             # steps
    steps: int


# Table 1 of the paper; text lengths and resolutions are those of the published code.  `text`, a
# stage of the end-to-end variant, is 350 B tokens in the paper.  The paper gives neither its batch
# nor its learning rate: both are ours.
STAGES = {
    #                 images, [MASK], pixels, tokens, lambda, batches, lr, warm-up, steps
    "text":     Stage(False, False, 256, 256, 1.0,   0, 2048, 1e-4, 5000, 667_000),
    "pretrain": Stage(True,  False, 256, 256, 0.2, 512,  512, 5e-5, 5000,  60_000),
    "mask-emb": Stage(True,  True,  256, 256, 0.2, 512,  512, 3e-5, 1000, 200_000),
    "high-res": Stage(True,  False, 512, 256, 0.2, 768,  768, 3e-5, 1000,  80_000),
    "instruct": Stage(True,  False, 512, 128, 1.0, 512,  512, 3e-5, 1000,  50_000),
}
# These settings replace those of STAGES for a model of pixels, so that a first run takes 4 to 15
# minutes of two cores.  runs/emoji.sh has the recipe of the shipped weights.
SMALL = dict(pixels=64, text_length=28, image_batch=32, text_batch=32, lr=2.5e-3, warmup=50,
             steps=500, vocabulary="used", optimizer="muon", ema=0.999, time_shift=2.0,
             time_floor=0.05, question_share=0.4)
# These replace those of SMALL for the shapes world.  Large plain shapes show through the noise up to
# t = 0.9, so the content of an image is decided between 0.75 and 0.95.  A shift of 4 draws 55 % of
# the times there; a shift of 2, 33 %.  The high floor is for the same reason.
SHAPES = dict(pixels=shapes.SIDE, image_batch=64, text_batch=16, text_weight=0.5, lr=3e-3,
              time_shift=4.0, time_floor=0.3, guidance=2.5, shift=2.0)


@dataclass
class TrainConfig:
    """Settings of a run; each one is a flag of train.py."""
    stage: str = option("pretrain", "stage of training", choices=STAGES,
                        group="the model (the stage sets --pixels to --steps)")
    preset: str = option("emoji", "sizes of a new model; --init brings its own", choices=PRESETS)
    init: str = option("", "weights to start from, in any layout that checkpoint.py reads")
    vae: str = option("", "the autoencoder, if --init has none")
    t5: str = option("", "the T5 encoder, if --init has none")
    tokenizer: str = option("", "T5's tokenizer, if --init has none")
    mask_embedding: str = option("", "the aligned [MASK] vector of T5, in place of --init's")
    pixels: int = option(0, "side of the square images", low=1)
    text_length: int = option(0, "tokens of a text, padding included", low=2)
    text_weight: float = option(0.0, "lambda, the weight of the text loss", low=0)
    image_batch: int = option(0, "images in the image loss of a step, over all processes", low=1)
    text_batch: int = option(0, "texts in the text loss of a step, over all processes", low=1)
    lr: float = option(0.0, "peak learning rate", low=1e-12, high=1)
    warmup: int = option(0, "steps of linear warm-up", low=0)
    steps: int = option(0, "updates of the weights", low=1)

    image_data: list[str] = option([], "data of the image loss",
                              group="the data (PATH or PATH:WEIGHT; see data.py)")
    text_data: list[str] = option([], "data of the text loss, if not --image-data")
    recaption: float = option(1.0, "share of re-captions, if a sample has one", low=0, high=1)
    filtered: bool = option(False, "filter like the published trainer: leave out sides under 256, "
                            "captions under 6 characters, aspect ratios over 4.5 (otherwise 4)")
    buckets: bool = option(False, "keep aspect ratios: each batch has its own size, of equal area")
    text_dropout: float = option(0.1, "share of images with the empty prompt, for guidance",
                                 low=0, high=1)
    question_share: float = option(1.0, "share of questions, if a sample also has captions",
                                   low=0, high=1)
    vocabulary: str = option("full", "used: the tokens in the texts; full: all of GPT-2's",
                             choices=["used", "full"])
    workers: int = option(0, "processes that prepare batches ahead; 0: the trainer itself",
                          low=0, high=256)

    decay_steps: int = option(0, "last steps, in which the learning rate falls to zero; 0: none",
                              low=0, group="one step")
    optimizer: str = option("adamw", "for the blocks' matrices; AdamW trains the rest",
                            choices=OPTIMIZERS)
    weight_decay: float = option(1e-2, "weight decay of both optimizers", low=0, high=1)
    times: str = option("logit-normal", "distribution of the image loss's times",
                        choices=flow.TIMES)
    time_shift: float = option(1.0, "shift of the image loss's times towards noise; 1: none",
                               low=0.001, high=1000)
    time_floor: float = option(0.0, "weigh the image loss at times t below this by (t / this)^2",
                               low=0, high=1)
    predicts: str = option("", "what the image head predicts, in place of the preset's choice",
                           choices=["", "velocity", "data"])
    image_weight: float = option(1.0, "weight of the image loss; 0: only measure it", low=0)
    text_loss: str = option("1/t", "weight of a masked token", choices=mask_diffusion.WEIGHTS)
    clip: float = option(2.0, "clip larger gradient norms to this", low=1e-6)
    ema: float = option(0.9999, "decay of the averaged weights", low=0, high=1)
    seed: int = option(0, "seed of weights, order, noise, times and masks", low=0, high=2**63 - 1)

    micro_batch: int = option(0, "rows in one pass on each process; 0: all of them", low=0,
                              group="the machine")
    checkpoint_activations: bool = option(False, "keep only each block's input, recompute the rest")
    dtype: str = option("auto", "dtype of matrix products; auto: bfloat16 if supported",
                        choices=DTYPES)
    device: str = option("auto", "auto: CUDA, then Apple's MPS, then the CPU", choices=DEVICES)
    cuda_graph: bool = option(False, "on a GPU, run a small model's step as one CUDA graph")
    compile: bool = option(False, "torch.compile each block; on a CPU this needs a C++ compiler")
    shard: str = option("zero2", "how FSDP2 shards, see docs/training.md",
                        choices=["zero2", "zero3", "hsdp", "none"])
    shard_t5: bool = option(False, "shard the frozen T5 too")

    out: str = option("", "folder of the run; out/STAGE if not given", group="the run")
    log_every: int = option(20, "steps between lines of the log", low=1)
    eval_every: int | None = option(None, "steps between validations; 0: never "
                                    "(a twentieth of --steps, at most 1000)", low=0)
    compare: list[str] = option([], "log.jsonl of other runs, to compare validations with")
    meter_every: int = option(0, "steps between measurements of both losses' gradients; 0: never",
                              low=0)
    save_every: int | None = option(None, "steps between checkpoints "
                                    "(a tenth of --steps, at most 1000)", low=1)
    sample_every: int | None = option(None, "steps between images of samples; 0: never "
                                      "(a tenth of --steps, at most 5000)", low=0)
    guidance: float | None = option(None, "sample.py's default with these weights (1.5; T5: 7)",
                                    low=0.001, high=1000)
    shift: float | None = option(None, "sample.py's default with these weights (1; T5: 3)",
                                 low=0.001, high=1000)
    resume_step: int = option(0, "resume from this step_N; 0: from the newest", low=0)
    fresh: bool = option(False, "delete the run in the folder, and start over")
    print_plan: int = option(0, "print what the run needs on this many GPUs, and stop",
                             low=1, bare=1)


# Intervals that are not given: --steps divided by the first number, at most the second.
INTERVALS = {"eval_every": (20, 1000), "save_every": (10, 1000), "sample_every": (10, 5000)}

ONLY_FROM_SCRATCH = ["preset", "vocabulary", "predicts"]
ONLY_WITH_IMAGES = ["image_data", "image_batch", "image_weight", "times", "time_shift",
                    "time_floor", "text_dropout", "recaption", "filtered", "pixels", "buckets",
                    "sample_every", "meter_every"]


def read_base(init: str, preset: str) -> tuple[str, MMDiTConfig, dict]:
    """Return (family, sizes, config.json) of --init; without --init, ("", sizes, {}) of the preset.

    config.json is {} unless a run of ours wrote it.  Raises UserError for weights that
    checkpoint.py can't read."""
    if not init:
        return "", MMDiTConfig(**PRESETS.get(preset, {})), {}    # parse refuses an unknown preset
    family, sizes = checkpoint.read_sizes(init)
    about = checkpoint.read_config(init) if family == "ours" else {}
    return family, sizes, about


def stage_defaults(stage: str, sizes: MMDiTConfig, about: dict) -> dict:
    """Return a stage's defaults for a model of these sizes.  about: the config.json of --init."""
    defaults = STAGES[stage]._asdict()
    del defaults["images"]
    del defaults["trains_mask"]
    if sizes.channels == 3:
        defaults |= SMALL
        image_data = str(emoji.TAR)
        if sizes.patch * sizes.position_size == shapes.SIDE:     # the largest image
            defaults |= SHAPES
            image_data = "shapes"
        if stage == "text":
            defaults["image_batch"] = 0
        else:
            defaults["image_data"] = [image_data]
        if stage == "high-res":
            defaults.update(pixels=128, image_batch=16, text_batch=16)
    elif stage == "instruct":
        defaults["recaption"] = 0.9                              # as in the published code
    elif stage == "pretrain" and sizes.text_length:
        # in the paper, 400,000 steps are "an epoch" of DataComp-Recap-1B.  2,560 pairs a step make
        # 1.02 B pairs: we assume that 1.02 B of its 1.3 B images can still be downloaded
        defaults.update(steps=400_000, image_batch=2560, text_batch=2560)
    if sizes.text_length:
        defaults["text_length"] = min(defaults["text_length"], sizes.text_length)
    inherited = ["guidance", "shift"]
    if stage != "high-res":
        inherited.append("pixels")
    for name in inherited:
        if about.get(name):
            defaults[name] = about[name]
    return defaults


def read_stage_defaults(argv: list[str] | None) -> dict:
    """Return the defaults of the stage and the model that unchecked arguments name."""
    parser = cli.Parser("", add_help=False)
    for name in ("stage", "preset", "init"):
        parser.add_argument(cli.flag(name), default=getattr(TrainConfig, name))
    args, _ = parser.parse_known_args(argv)
    _, sizes, about = read_base(args.init, args.preset)
    if args.stage not in STAGES:
        return {}                                                # parse refuses it
    return stage_defaults(args.stage, sizes, about)


def find_idle_flags(config: TrainConfig) -> dict[str, str]:
    """Return the settings that have no effect in this run, and what each one needs."""
    needs = {}
    if config.eval_every == 0:
        needs["compare"] = "--eval-every"
    if config.stage != "instruct":
        needs["question_share"] = "--stage instruct"
    if not PRESETS[config.preset].get("text_length"):
        needs["vocabulary"] = "a preset with a token embedding"
    if config.init:
        needs |= dict.fromkeys(ONLY_FROM_SCRATCH, "a start from scratch, and --init was given")
    if config.stage == "text":
        needs |= dict.fromkeys(ONLY_WITH_IMAGES, "images, and --stage text has none")
    return needs


def parse(argv: list[str] | None = None, doc: str = __doc__) -> TrainConfig:
    """Read the settings from the command line.

    Raises UserError for weights that can't be read; a wrong flag ends the program with status 2."""
    defaults = read_stage_defaults(argv)
    parser = cli.Parser(doc)
    parser.add_fields(TrainConfig, defaults)
    given = vars(parser.parse_args(argv))
    config = TrainConfig(**(defaults | given))
    needs = find_idle_flags(config)
    for name in given:
        if name in needs:
            parser.error(f"{cli.flag(name)} changes nothing without {needs[name]}")
    if config.print_plan and config.dtype == "auto":
        config.dtype = "bfloat16"                                # GPUs support it
    if not config.out:
        config.out = f"out/{config.stage}"
    if config.decay_steps > config.steps:
        parser.error(f"--decay-steps {config.decay_steps}: expected at most --steps {config.steps}")
    for name, (share, most) in INTERVALS.items():
        if getattr(config, name) is None:
            interval = max(config.steps // share, 1)
            setattr(config, name, min(interval, most))
    return config


def check_batches(config: TrainConfig, world: int) -> None:
    """Raise UserError for a batch that can't be split evenly over processes and micro-batches."""
    for flag, size in (("--text-batch", config.text_batch), ("--image-batch", config.image_batch)):
        rows, micro = size // world, config.micro_batch
        require((size % world == 0, f"{flag} {size} does not divide over {world} processes"),
                (not micro or rows % micro == 0, f"--micro-batch {micro} does not divide {flag} "
                 f"{size} over {world} process(es), {rows} rows on each"))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step, from 0.

    It rises linearly during the warm-up, stays constant, and falls linearly over the last
    --decay-steps, so that it would reach zero at step --steps."""
    warmup = (step + 1) / max(config.warmup, 1)
    lr = config.lr * min(1, warmup)
    if config.decay_steps:
        decay = (config.steps - step) / config.decay_steps
        lr *= min(1, decay)
    return lr


def average_decay(step: int, config: TrainConfig) -> float:
    """Return the decay of the averaged weights, which is smaller in the first steps."""
    return min(config.ema, (step + 1) / (step + 10))
