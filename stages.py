"""The stages of training as a table, and every other setting of train.py as a flag.

    text -> pretrain                                 the end-to-end variant, from scratch
    pretrain -> mask-emb -> high-res -> instruct     from SD3's weights (Table 1 of arXiv 2501.00289)
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import checkpoint
import cli
import emoji
from cli import value
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
# The same for the emoji preset, on a laptop; it has no T5 whose [MASK] could learn.
SMALL = {
    "text":     Stage("text",        "null image", 64,  28,     1.0,    0,   48,   2.5e-3, 50,      1000),
    "pretrain": Stage("image, text", "",           64,  28,     0.2,    96,  48,   2.5e-3, 50,      4000),
    "high-res": Stage("image, text", "",           128, 28,     0.2,    32,  16,   2.5e-3, 50,      1000),
    "instruct": Stage("image, text", "",           64,  28,     1.0,    96,  48,   2.5e-3, 50,      4000),
}


# The validations of three seeds of the emoji preset's first stage (runs/expected.sh), with which a run is
# compared where no flag but these is given: they leave what is learnt as it is.
EXPECTED = emoji.TAR.parent / "emoji" / "expected"
SAME = {"stage", "preset", "seed", "steps", "workers", "micro_batch", "checkpoint_activations", "dtype",
        "device", "compile", "shard", "out", "log_every", "eval_every", "meter_every", "save_every",
        "sample_every", "resume_step", "extend", "fresh"}


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
        found |= dict(vocabulary="used", optimizer="muon", ema=0.999, time_shift=2.0, question_share=0.4,
                      save_every=250, sample_every=500, eval_every=250)
        found |= dict(image_data=[str(emoji.TAR)]) if stage != "text" else {}
        found |= dict(schedule="linear") if stage == "instruct" else {}
    if stage == "pretrain" and preset == "e2e-1.1b":
        found |= dict(steps=400_000)                             # then 100 k on the filtered subset
    return found


@dataclass
class TrainConfig:
    # what is trained; `pixels` to `steps` are those of the stage's row
    stage: str = value("pretrain", choices=list(STAGES))  # a row of the table
    preset: str = value("emoji", choices=list(PRESETS))  # sizes of the model; --init brings its own
    init: str = ""                                  # weights to start from, any layout of checkpoint.py
    vae: str = ""                                   # where the autoencoder is, if not in --init
    t5: str = ""                                    # where T5 is, if not in --init
    tokenizer: str = ""                             # where T5's tokenizer is, if not in --init
    mask_embedding: str = ""                        # the aligned [MASK] vector of T5, if not --init's
    pixels: int = value(0, low=1)                   # side of the square pictures
    text_length: int = value(0, low=2)              # tokens of a text, padding included
    text_weight: float = value(0.0, low=0)          # lambda
    image_weight: float = value(1.0, low=0)         # of the image loss; 0: it is shown, and not learnt from
    image_batch: int = value(0, low=1)         # pictures in the image loss of one update, over all processes
    text_batch: int = value(0, low=1)               # texts in the text loss
    lr: float = value(0.0, low=1e-12, high=1)       # peak learning rate
    warmup: int = value(0, low=0)                   # steps of linear warm-up
    steps: int = value(0, low=1)                    # updates
    # data: PATH[:WEIGHT] ..., see data.py
    image_data: list = value([])                    # of the image loss
    text_data: list = value([])                     # of the text loss, if others
    recaption: float = value(0.5, low=0, high=1)    # share of re-captions where a sample has one
    min_side: int = value(1, low=1)                 # pictures with a shorter side are left out
    buckets: bool = False                           # pictures keep about their shape: sizes of equal area
    text_dropout: float = value(0.1, low=0, high=1)  # share of pictures with the empty prompt, for guidance
    question_share: float = value(1.0, low=0, high=1)  # of `instruct`: of questions where there are captions
    vocabulary: str = value("full", choices=["used", "full"])  # GPT-2's tokens that the texts use, or all
    workers: int = value(0, low=0, high=256)        # processes that read, cut and tokenize ahead; 0: none
    # the step
    schedule: str = value("constant", choices=["constant", "linear"])  # after warm-up; linear: ends at zero
    decay_steps: int = value(0, low=1)     # of a linear schedule: over the last so many; 0: all after warm-up
    decay_from: int = value(0, low=1)           # when time is up: from this step on, which ends the run early
    optimizer: str = value("adamw", choices=["adamw", "muon"])  # of the blocks' matrices; of all else adamw
    weight_decay: float = value(1e-2, low=0, high=1)  # of either
    times: str = value("logit-normal", choices=["logit-normal", "uniform"])  # of the image loss
    time_shift: float = value(1.0, low=0.001, high=1000)  # of the image loss's times; 1: the paper's
    image_loss: str = value("velocity", choices=["velocity", "data"])  # what is compared; data: t^2 as much
    predicts: str = value("", choices=["", "velocity", "data"])  # of the image head, instead of the preset's
    text_loss: str = value("1/t", choices=["1/t", "flat"])  # weight of a masked token
    text_mean: str = value("token", choices=["token", "answer"])  # over all tokens, or over each text's first
    padding: str = value("all", choices=["all", "end", "random"])  # learnt; not; or so much of it, drawn anew
    clip: float = value(2.0, low=1e-6)              # largest gradient norm
    ema: float = value(0.9999, low=0, high=1)       # decay of the averaged weights
    seed: int = value(0, low=0, high=2**63 - 1)     # of weights, order, noise, times and masks
    # the machine
    micro_batch: int = value(0, low=1)              # rows of a batch at once on each process; 0: all it has
    checkpoint_activations: bool = False            # keep each block's input alone, compute the rest again
    dtype: str = value("bfloat16", choices=["float32", "bfloat16"])  # of products; weights stay float32
    device: str = value("auto", choices=["auto", "cpu", "cuda"])  # where
    compile: bool = False                           # torch.compile each block (needs a C++ compiler on a CPU)
    shard: str = value("zero2", choices=["zero2", "zero3", "hsdp", "none"])  # over processes: parallel.shard
    shard_t5: bool = False                          # T5 too is spread over the processes
    # the run
    out: str = ""                                   # its folder, instead of out/STAGE
    log_every: int = value(20, low=1)               # steps between lines
    eval_every: int = value(1000, low=0)            # steps between validations; 0: never
    compare: list = value([])                       # logs of other runs; of the emoji recipe: EXPECTED
    eval_samples: int = value(160, low=10)          # pictures, and texts, of a validation
    meter_every: int = value(0, low=0)              # steps between looks at the losses' gradients; 0: never
    save_every: int = value(1000, low=1)            # steps between checkpoints
    sample_every: int = value(5000, low=0)          # steps between pictures of samples; 0: never
    resume_step: int = value(0, low=1)              # go on from this step_N; 0: from the newest
    extend: bool = False                            # with more --steps: a rate that fell rises again
    fresh: bool = False                         # start over in a folder that holds a run, instead of going on
    print_plan: int = value(0, low=1, bare=1)       # say what the run needs on so many GPUs, and stop
    rate: float = value(0.0, low=1e-9)              # with --print-plan: samples/s of all, for the days; or
    mfu: float = value(0.4, low=1e-3, high=1)       # the share reached of
    peak: float = value(989.0, low=1e-3)            # the peak of a GPU in TFLOP/s (H100, bf16, dense)


def parse(argv: list[str] | None = None, doc: str = __doc__) -> TrainConfig:
    """The command line as a TrainConfig: dataclass defaults, then the stage's, then the flags.  UserError."""
    first = cli.Parser("", add_help=False)
    for name, default in (("stage", "pretrain"), ("preset", "emoji"), ("init", "")):
        first.add_argument(cli.flag(name), default=default)
    known = first.parse_known_args(argv)[0]
    _, sizes, about = start(known.init, known.preset)
    defaults = settings(known.stage, known.preset, sizes, about) if known.stage in STAGES else {}
    parser = cli.Parser(doc)
    parser.add_fields(TrainConfig, defaults)
    given = vars(parser.parse_args(argv))
    config = TrainConfig(**(defaults | given))
    scratch = config.init and "a start from scratch, and --init was given"
    pictures = config.stage == "text" and "pictures, and --stage text has none"
    plan = not config.print_plan and "--print-plan"
    idle = {"decay_steps": config.schedule == "constant" and "--schedule linear",
            "decay_from": not config.decay_steps and "--decay-steps, how long the rate takes to fall to zero",
            **dict.fromkeys(("eval_samples", "compare"), not config.eval_every and "--eval-every"),
            "text_mean": config.padding == "all" and config.stage != "instruct" and (
                "--padding end or random, or --stage instruct, where texts differ in length"),
            "question_share": config.stage != "instruct" and "--stage instruct",
            **dict.fromkeys(("preset", "vocabulary", "predicts"), scratch),
            **dict.fromkeys(("rate", "mfu", "peak"), plan),
            **dict.fromkeys(("image_data", "image_batch", "image_weight", "times", "time_shift", "image_loss",
                             "text_dropout", "recaption", "min_side", "pixels", "buckets", "sample_every",
                             "meter_every"), pictures)}
    for name in given:
        if idle.get(name):
            parser.error(f"{cli.flag(name)} changes nothing without {idle[name]}")
    if not set(given) - SAME and (config.stage, config.preset, bool(config.eval_every)) == (
            "pretrain", "emoji", True):
        config = replace(config, compare=[str(path) for path in sorted(EXPECTED.glob("*.jsonl"))])
    steps = config.decay_from + config.decay_steps if config.decay_from else config.steps
    return replace(config, out=config.out or f"out/{config.stage}", steps=steps)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant; `linear` falls to zero, which the step after the last would have."""
    rate = config.lr * min(1, (step + 1) / max(config.warmup, 1))
    if config.schedule == "linear":
        rate *= min(1, (config.steps - step) / (config.decay_steps or max(config.steps - config.warmup, 1)))
    return rate
