"""The stages of training as a table, and every other setting of train.py as a flag.

    text -> pretrain                                 the end-to-end variant, from scratch
    pretrain -> mask-emb -> high-res -> instruct     from SD3's weights (Table 1 of arXiv 2501.00289)
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import checkpoint
from common import cli
from common.cli import option
from common.devices import DEVICES, DTYPES
from dataset import emoji
from model import PRESETS, MMDiTConfig


class Stage(NamedTuple):
    losses: str             # L = L_image + lambda L_text, or one of them
    learns: str             # beside the transformer, and the end-to-end variant's token embedding
    pixels: int             # of a picture's side; a run of ours keeps its own, but for `high-res`
    text_length: int        # tokens, padding included; at most what a token embedding has positions for
    text_weight: float      # lambda
    image_batch: int        # pictures in the image loss of one update, over all processes
    text_batch: int         # texts in the text loss
    lr: float               # constant after
    warmup: int             # so many steps
    steps: int


# Table 1; text lengths and resolutions are those of the published code.  `text`, of the end-to-end variant,
# is 350 B tokens in the paper, which gives neither batch nor rate: those are ours.
STAGES = {  # losses          learns        pixels  tokens  lambda  batches    rate    warm-up  steps
    "text":     Stage("text",        "null image", 256, 256,    1.0,    0,   2048, 1e-4,   5000,    667_000),
    "pretrain": Stage("image, text", "",           256, 256,    0.2,    512, 512,  5e-5,   5000,    60_000),
    "mask-emb": Stage("image, text", "[MASK]",     256, 256,    0.2,    512, 512,  3e-5,   1000,    200_000),
    "high-res": Stage("image, text", "",           512, 256,    0.2,    768, 768,  3e-5,   1000,    80_000),
    "instruct": Stage("image, text", "",           512, 128,    1.0,    512, 512,  3e-5,   1000,    50_000),
}
# The same for the emoji preset: a first run of a quarter of an hour on a laptop; runs/emoji.sh has the recipe
# of the shipped weights.  It has no T5 whose [MASK] could learn.
SMALL = {
    "text":     Stage("text",        "null image", 64,  28,     1.0,    0,   32,   2.5e-3, 50,      500),
    "pretrain": Stage("image, text", "",           64,  28,     0.2,    32,  32,   2.5e-3, 50,      500),
    "high-res": Stage("image, text", "",           128, 28,     0.2,    16,  16,   2.5e-3, 50,      500),
    "instruct": Stage("image, text", "",           64,  28,     1.0,    32,  32,   2.5e-3, 50,      500),
}


def start(init: str, preset: str) -> tuple[str, MMDiTConfig, dict]:
    """(family, sizes, config.json) of what --init names; of a preset ("", its sizes, {}).  UserError."""
    if not init:
        return "", MMDiTConfig(**PRESETS.get(preset, {})), {}
    family, sizes = checkpoint.read_sizes(init)
    return family, sizes, checkpoint.read_config(init) if family == "ours" else {}


def settings(stage: str, preset: str, sizes: MMDiTConfig, about: dict) -> dict:
    """What a stage has instead of the defaults of TrainConfig, for a model of these sizes."""
    small = sizes.channels == 3
    found = ((SMALL if small else STAGES).get(stage) or STAGES[stage])._asdict()
    del found["losses"], found["learns"]
    if sizes.text_length:
        found["text_length"] = min(found["text_length"], sizes.text_length)
    if stage != "high-res":
        found["pixels"] = about.get("pixels") or found["pixels"]
    if small:
        found |= dict(vocabulary="used", optimizer="muon", ema=0.999, time_shift=2.0, question_share=0.4)
        found |= dict(image_data=[str(emoji.TAR)]) if stage != "text" else {}
    if stage == "instruct" and not small:
        found["recaption"] = 0.9                                 # as the published code
    if stage == "pretrain" and sizes.text_length and not small:
        # 400,000 steps are "an epoch" of DataComp-Recap-1B.  2,560 a step assumes 1.02 B pairs: of its 1.3 B
        # those whose image can still be fetched
        found.update(steps=400_000, image_batch=2560, text_batch=2560)
    return found


@dataclass
class TrainConfig:
    # What is trained.  The stage's row sets `pixels` to `steps`.
    stage: str = option("pretrain", "row of the table of stages", choices=list(STAGES))
    preset: str = option("emoji", "sizes of a new model; --init brings its own",
                         choices=list(PRESETS))
    init: str = option("", "weights to start from, in any layout that checkpoint.py reads")
    vae: str = option("", "the autoencoder, if --init has none")
    t5: str = option("", "the T5 encoder, if --init has none")
    tokenizer: str = option("", "T5's tokenizer, if --init has none")
    mask_embedding: str = option("", "the aligned [MASK] vector of T5, in place of --init's")
    pixels: int = option(0, "side of the square images", low=1)
    text_length: int = option(0, "tokens of a text, padding included", low=2)
    text_weight: float = option(0.0, "lambda, the weight of the text loss", low=0)
    image_weight: float = option(1.0, "weight of the image loss; 0 computes it without learning",
                                 low=0)
    image_batch: int = option(0, "images in the image loss of a step, over all processes", low=1)
    text_batch: int = option(0, "texts in the text loss of a step, over all processes", low=1)
    lr: float = option(0.0, "peak learning rate", low=1e-12, high=1)
    warmup: int = option(0, "steps of linear warm-up", low=0)
    steps: int = option(0, "updates of the weights", low=1)
    # Data: PATH[:WEIGHT] ..., see data.py.
    image_data: list = option([], "data of the image loss")
    text_data: list = option([], "data of the text loss, if it has its own")
    recaption: float = option(1.0, "share of re-captions where a sample has one", low=0, high=1)
    filtered: bool = option(False, "leave out what the published trainer does: sides under 256, "
                            "longer than 4.5 to 1, captions under 6 characters")
    buckets: bool = option(False, "keep the aspect ratio of images: batches of sizes of equal area")
    text_dropout: float = option(0.1, "share of images with the empty prompt, for guidance",
                                 low=0, high=1)
    question_share: float = option(1.0, "share of questions where a sample has captions too",
                                   low=0, high=1)
    vocabulary: str = option("full", "all of GPT-2's tokens, or those that the texts use",
                             choices=["used", "full"])
    workers: int = option(0, "processes that prepare batches ahead; 0: the trainer itself",
                          low=0, high=256)
    # The step.
    decay_steps: int = option(0, "last steps, over which the learning rate falls to zero; 0: none",
                              low=0)
    optimizer: str = option("adamw", "of the blocks' matrices; everything else has AdamW",
                            choices=["adamw", "muon"])
    weight_decay: float = option(1e-2, "weight decay of both optimizers", low=0, high=1)
    times: str = option("logit-normal", "distribution of the image loss's times",
                        choices=["logit-normal", "uniform"])
    time_shift: float = option(1.0, "shift of the image loss's times towards noise; 1: none",
                               low=0.001, high=1000)
    predicts: str = option("", "what the image head predicts, in place of the preset's choice",
                           choices=["", "velocity", "data"])
    text_loss: str = option("1/t", "weight of a masked token", choices=["1/t", "flat"])
    clip: float = option(2.0, "largest gradient norm", low=1e-6)
    ema: float = option(0.9999, "decay of the averaged weights", low=0, high=1)
    seed: int = option(0, "seed of weights, order, noise, times and masks", low=0, high=2**63 - 1)
    # The machine.
    micro_batch: int = option(0, "rows at once on each process; 0: all of them", low=1)
    checkpoint_activations: bool = option(False, "keep only each block's input, recompute the rest")
    dtype: str = option("auto", "of matrix products; auto: bfloat16 where the device has it",
                        choices=DTYPES)
    device: str = option("auto", "auto: CUDA, then Apple's MPS, then the CPU", choices=DEVICES)
    cuda_graph: bool = option(False, "on a GPU, the step of a small model as one CUDA graph")
    compile: bool = option(False, "torch.compile each block; on a CPU this needs a C++ compiler")
    shard: str = option("zero2", "what FSDP2 shards, see training/distributed.py",
                        choices=["zero2", "zero3", "hsdp", "none"])
    shard_t5: bool = option(False, "shard the frozen T5 too")
    # The run.
    out: str = option("", "folder of the run; out/STAGE if not given")
    log_every: int = option(20, "steps between lines of the log", low=1)
    eval_every: int | None = option(None, "steps between validations; 0: never "
                                    "(a twentieth of --steps, at most 1000)", low=0)
    compare: list = option([], "log.jsonl of other runs, to compare validations with")
    meter_every: int = option(0, "steps between measurements of both losses' gradients; 0: never",
                              low=0)
    save_every: int | None = option(None, "steps between checkpoints "
                                    "(a tenth of --steps, at most 1000)", low=1)
    sample_every: int | None = option(None, "steps between images of samples; 0: never "
                                      "(a tenth of --steps, at most 5000)", low=0)
    resume_step: int = option(0, "resume from this step_N; 0: from the newest", low=1)
    fresh: bool = option(False, "start over in a folder that holds a run")
    print_plan: int = option(0, "print what the run needs on so many GPUs, and stop", low=1, bare=1)


# Steps between validations, checkpoints and samples that are not given: a share of --steps, at most so many.
INTERVALS = {"eval_every": (20, 1000), "save_every": (10, 1000), "sample_every": (10, 5000)}


def fill_intervals(config: TrainConfig) -> TrainConfig:
    """Set the intervals that were not given in proportion to the length of the run."""
    intervals = {}
    for name, (parts, most) in INTERVALS.items():
        if getattr(config, name) is None:
            intervals[name] = min(max(config.steps // parts, 1), most)
    return replace(config, **intervals)


def parse(argv: list[str] | None = None, doc: str = __doc__) -> TrainConfig:
    """The command line as a TrainConfig: dataclass defaults, then the stage's, then the flags.  UserError."""
    first = cli.Parser("", add_help=False)
    for name, default in (("stage", "pretrain"), ("preset", "emoji"), ("init", "")):
        first.add_argument(cli.flag(name), default=default)
    known = first.parse_known_args(argv)[0]
    _, sizes, about = start(known.init, known.preset)
    defaults = settings(known.stage, known.preset, sizes, about) if known.stage in STAGES else {}
    parser = cli.Parser(doc, {"--schedule": "--decay-steps", "--min-side": "--filtered"})
    parser.add_fields(TrainConfig, defaults)
    given = vars(parser.parse_args(argv))
    config = TrainConfig(**(defaults | given))
    scratch = config.init and "a start from scratch, and --init was given"
    pictures = config.stage == "text" and "pictures, and --stage text has none"
    idle = {"compare": config.eval_every == 0 and "--eval-every",
            "question_share": config.stage != "instruct" and "--stage instruct",
            **dict.fromkeys(("preset", "vocabulary", "predicts"), scratch),
            **dict.fromkeys(("image_data", "image_batch", "image_weight", "times", "time_shift",
                             "text_dropout", "recaption", "filtered", "pixels", "buckets", "sample_every",
                             "meter_every"), pictures)}
    for name in given:
        if idle.get(name):
            parser.error(f"{cli.flag(name)} changes nothing without {idle[name]}")
    if config.print_plan and config.dtype == "auto":
        config = replace(config, dtype="bfloat16")               # of GPUs, whatever this machine has
    return fill_intervals(replace(config, out=config.out or f"out/{config.stage}"))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant; over the last --decay-steps it falls towards zero at step --steps."""
    rate = config.lr * min(1, (step + 1) / max(config.warmup, 1))
    if config.decay_steps:
        rate *= min(1, (config.steps - step) / config.decay_steps)
    return rate
