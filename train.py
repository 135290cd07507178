"""Train the dual diffusion transformer: one loop, two losses, L = L_image + lambda L_text.

    python train.py --preset emoji --stage pretrain                     # from scratch: pictures and captions
    python train.py --preset emoji --stage instruct --init out/pretrain # then questions with answers
    bash runs/emoji.sh                                                  # both: the recipe of the emoji weights
    torchrun --standalone --nproc_per_node=2 train.py --stage pretrain  # the same lines, sharded by FSDP2

A run lives in --out (out/STAGE unless given): log.jsonl, loss.png, samples_*.png, step_*/ to resume from, and
model.safetensors + config.json + tokenizer.json, the EMA weights that sample.py reads.  Run the same command
again and it goes on from the newest step_* folder; Ctrl-C and SIGTERM save first.

The stages of the paper on its own data, from SD3's weights, are not here yet: this trains the end-to-end
variant (GPT-2's tokenizer, own embedding table) on the emoji set, with `Pixels` as latents.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import data
import emoji
import flow
import mask_diffusion
import sample
from data import UserError
from model import PRESETS, MMDiT, MMDiTConfig, TokenEmbedding


@dataclass
class TrainConfig:
    stage: str = "pretrain"         # pretrain: captions; instruct: captions, and questions with answers
    preset: str = "emoji"           # sizes of the model, a name of model.PRESETS; --init brings its own
    init: str = ""                  # checkpoint folder to start from; empty: from scratch
    out: str = ""                   # folder of the run; empty: out/STAGE
    data: str = str(emoji.TAR)      # the emoji tar
    pixels: int = 0                 # pictures are resized to this; 0: as the preset, or --init, has it
    steps: int = 4000               # updates
    image_batch: int = 96           # pictures in the image loss of one update, over all processes
    text_batch: int = 48            # texts in the text loss
    lr: float = 1.2e-3              # peak learning rate
    warmup: int = 200               # steps of linear warm-up
    schedule: str = "constant"      # after warm-up; linear: down to zero over the last --decay-steps
    decay_steps: int = 0            # 0: all steps after warm-up
    decay_from: int = 0             # when time is up: go down from this step, which ends the run early
    optimizer: str = "adamw"        # adamw; or muon for the blocks' matrices (arXiv 2502.16982), adamw for the rest
    weight_decay: float = 1e-2      # of either
    time_shift: float = 2.0         # of the image loss's times towards noise; 1: SD3's and the paper's, unmoved
    text_weight: float = 0.2        # lambda
    text_dropout: float = 0.1       # share of pictures drawn from the empty prompt, for guidance
    question_share: float = 0.4     # of the texts in `instruct`; the others are captions
    text_length: int = 0            # tokens of a text, padding included; 0: as in the preset or --init
    vocabulary: str = "used"        # used: GPT-2's tokens that the texts use; full: all 50257
    clip: float = 2.0               # largest gradient norm
    ema: float = 0.999              # decay of the averaged weights
    seed: int = 0                   # of weights, order, noise, times and masks
    dtype: str = "bfloat16"         # of matrix products: bfloat16 or float32; weights stay float32
    device: str = "auto"            # auto, cpu or cuda
    compile: bool = False           # torch.compile each block (needs a C++ compiler on a CPU)
    log_every: int = 20             # steps between lines
    save_every: int = 250           # steps between checkpoints
    sample_every: int = 500         # steps between pictures of samples; 0: never
    fresh: bool = False             # start over in a folder that holds a run, instead of going on


PIXELS = {"emoji": 64, "e2e-1.1b": 256, "sd3-medium": 256}       # side of the pictures that a preset starts on
STAGES = {  # what differs from the defaults above; lambda is the paper's, 0.2 and then 1.0
    "pretrain": dict(optimizer="muon", lr=2.5e-3, warmup=50),
    "instruct": dict(optimizer="muon", lr=2.5e-3, warmup=50, schedule="linear", text_weight=1.0),
}


def parse(argv: list[str] | None = None) -> TrainConfig:
    """The command line as a TrainConfig: dataclass defaults, then the stage's, then the flags."""
    parser = data.Parser(__doc__)
    for field in fields(TrainConfig):
        name, kind = "--" + field.name.replace("_", "-"), type(field.default)
        if kind is bool:
            parser.add_argument(name, action="store_true", default=None)
        else:
            choices = dict(stage=list(STAGES), preset=list(PRESETS), schedule=["constant", "linear"],
                           vocabulary=["used", "full"], dtype=["float32", "bfloat16"], optimizer=["adamw", "muon"],
                           device=["auto", "cpu", "cuda"]).get(field.name)
            parser.add_argument(name, type=kind, choices=choices, default=None,
                                help=f"default {field.default}" if field.default != "" else None)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    config = TrainConfig(**(STAGES[given.get("stage", "pretrain")] | given))
    for name in ("pixels", "steps", "image_batch", "text_batch", "text_length", "decay_steps", "decay_from",
                 "log_every", "save_every"):
        if name in given and given[name] < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    for name, low, high in (("text_dropout", 0, 1), ("question_share", 0, 1), ("ema", 0, 1), ("lr", 0, 1),
                            ("clip", 0, math.inf), ("text_weight", 0, math.inf), ("warmup", 0, math.inf),
                            ("time_shift", 1e-3, 1e3)):
        if not low <= getattr(config, name) <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}, got {getattr(config, name)}")
    if config.decay_steps and config.schedule == "constant":
        parser.error("--decay-steps needs --schedule linear")
    if config.decay_from and not config.decay_steps:
        parser.error("--decay-from needs --decay-steps: how long the rate takes to fall to zero")
    steps = config.decay_from + config.decay_steps if config.decay_from else config.steps
    return replace(config, out=config.out or f"out/{config.stage}", steps=steps)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant; a linear schedule then falls to zero, which a step after the last would have."""
    rate = config.lr * min(1, (step + 1) / max(config.warmup, 1))
    if config.schedule == "linear":
        rate *= min(1, (config.steps - step) / (config.decay_steps or max(config.steps - config.warmup, 1)))
    return rate


# ------------------------------------------------------------------------------------------------ processes

def start_processes(config: TrainConfig) -> tuple[int, int, torch.device]:
    """(rank, world, device); a process group only under torchrun."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    kind = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, torch.device(kind)
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def shard(model: nn.ModuleDict, dtype: torch.dtype) -> None:
    """FSDP2: each block, then each root.  Gradients and optimizer state are sharded (ZeRO-2, the paper's);
    master weights and reductions are float32."""
    policy = MixedPrecisionPolicy(param_dtype=dtype if dtype != torch.float32 else None,
                                  reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model["mmdit"].blocks:
        fully_shard(block, mp_policy=policy, reshard_after_forward=False)
    for part in model.values():
        fully_shard(part, mp_policy=policy, reshard_after_forward=False)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def total(x: Tensor, world: int) -> Tensor:
    """The mean over processes."""
    if world > 1:
        dist.all_reduce(x)
    return x / world


# ----------------------------------------------------------------------------------------------------- data

def order(seed: int, name: str, groups: list[list[int]], step: int, batch: int) -> list[int]:
    """The samples of one step: positions [step B, (step + 1) B) of an endless run of shuffled epochs.

    An epoch takes one sample of every group, which one drawn anew each time (`emoji.fair`).  A function of its
    arguments alone, so that a resumed run, or another number of processes, sees the same.
    """
    picked = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, at = divmod(position, len(groups))
        if not picked or at == 0:
            generator = seeded(seed, name, epoch)
            shuffled = torch.randperm(len(groups), generator=generator)
            member = torch.rand(len(groups), generator=generator)
        group = groups[int(shuffled[at])]
        picked.append(group[int(float(member[at]) * len(group))])
    return picked


def seeded(*key) -> torch.Generator:
    return torch.Generator().manual_seed(int(data.fraction(repr(key)) * 2**53))


def text_sample(tokenizer: data.Tokenizer, record: dict, questions: float, length: int,
                generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids (L,) and frozen (L,), True at the prompt: a caption or, with probability `questions`, a question."""
    pick = torch.rand(2, generator=generator).tolist()
    prompt, answer = [], record["caption"]
    if pick[0] < questions:
        asked = record["questions"][int(pick[1] * len(record["questions"]))]
        prompt, answer = tokenizer.pieces(data.question_prompt(asked["question"])), asked["answer"]
    ids = tokenizer.fit(prompt + tokenizer.pieces(answer), length)
    return ids, torch.arange(length) < len(prompt)


# -------------------------------------------------------------------------------------------- the run's folder

def newest_step(out: Path) -> Path | None:
    """The newest complete step_* folder of a run."""
    done = [p for p in out.glob("step_*") if (p / ".metadata").exists()]
    return max(done, key=lambda p: int(p.name.removeprefix("step_")), default=None)


def read_log(path: Path, until: int) -> list[dict]:
    """The rows of a log up to a step; a last line that was cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return [row for row in rows if row["step"] <= until]


def save_step(out: Path, step: int, model: nn.ModuleDict, optimizers: list, ema: dict, rank: int, world: int) -> None:
    """Everything a resume needs, written beside and renamed when whole; the newest two are kept."""
    weights, state = get_state_dict(model, optimizers)
    temporary = out / f".tmp_step_{step}"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    if world > 1:
        dist.barrier()
    dcp.save({"model": weights, "optimizer": state, "ema": ema}, checkpoint_id=temporary, no_dist=world == 1)
    if rank == 0 and not (out / f"step_{step}").exists():
        temporary.rename(out / f"step_{step}")
        done = sorted(out.glob("step_*"), key=lambda p: int(p.name.removeprefix("step_")))
        for old in done[:-2]:
            shutil.rmtree(old)
    if world > 1:
        dist.barrier()


def load_step(folder: Path, model: nn.ModuleDict, optimizers: list, ema: dict, world: int) -> int:
    weights, state = get_state_dict(model, optimizers)
    held = {"model": weights, "optimizer": state, "ema": ema}
    try:
        dcp.load(held, checkpoint_id=folder, no_dist=world == 1)
    except (CheckpointException, RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{folder}: can't be resumed from ({reason}); delete it to go on from the one before")
    set_state_dict(model, optimizers, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    return int(folder.name.removeprefix("step_"))


def draw_losses(rows: list[dict], path: Path, size: tuple[int, int] = (720, 360)) -> None:
    """Both losses over steps on log axes of their own, left the image loss (blue), right the text loss (red)."""
    picture = Image.new("RGB", size, "white")
    pen, (width, height), margin = ImageDraw.Draw(picture), size, 50
    for key, colour, side in (("image_loss", (40, 90, 200), "left"), ("text_loss", (200, 60, 40), "right")):
        values = torch.tensor([row[key] for row in rows]).clamp(min=1e-4).log10()
        low, high = float(values.min()), float(values.max())
        spread = max(high - low, 1e-3)
        at = lambda i, v: (margin + (width - 2 * margin) * rows[i]["step"] / max(rows[-1]["step"], 1),
                           height - margin - (height - 2 * margin) * (float(v) - low) / spread)
        pen.line([at(i, v) for i, v in enumerate(values)], fill=colour, width=2)
        for value, y in ((low, height - margin), (high, margin)):
            pen.text((4 if side == "left" else width - margin + 4, y - 6), f"{10 ** value:.3g}", fill=colour)
        pen.text((margin if side == "left" else width - 140, 12), key.replace("_", " "), fill=colour)
    pen.rectangle((margin, margin, width - margin, height - margin), outline=(180, 180, 180))
    pen.text((width // 2 - 40, height - 30), f"{rows[-1]['step']} steps", fill="black")
    picture.save(path)


# ----------------------------------------------------------------------------------------------------- train

def prepare(config: TrainConfig) -> tuple[TrainConfig, nn.ModuleDict, list[int] | None, list[dict], Tensor]:
    """(config with its sizes, model, the tokenizer's keep list, records, pictures): from a checkpoint, or from a
    preset with the vocabulary of the set's texts."""
    if config.init:
        mmdit, embedding = checkpoint.load_mmdit(config.init), checkpoint.load_embedding(config.init)
        keep = checkpoint.read_json(Path(config.init) / "tokenizer.json").get("keep")
        sizes, pixels = mmdit.config, checkpoint.read_config(config.init).get("pixels")
        if config.text_length > sizes.text_length:
            raise UserError(f"--text-length {config.text_length}: {config.init} was trained with at most "
                            f"{sizes.text_length}")
    else:
        sizes, pixels = MMDiTConfig(**PRESETS[config.preset]), PIXELS[config.preset]
        if sizes.channels != 3:
            raise UserError(f"--preset {config.preset} needs a VAE's latents; this trainer has pixels: use emoji")
    config = replace(config, pixels=config.pixels or pixels, text_length=config.text_length or sizes.text_length)
    if config.pixels % sizes.patch or config.pixels > sizes.patch * sizes.position_size:
        raise UserError(f"--pixels {config.pixels}: expected a multiple of the patch, {sizes.patch}, up to "
                        f"{sizes.patch * sizes.position_size}, this model's position table")
    records, pictures = emoji.load(Path(config.data), config.pixels)
    if not config.init:
        keep = data.gpt2_subset(emoji.texts(records)) if config.vocabulary == "used" else None
        sizes = replace(sizes, vocab_size=data.gpt2_tokenizer(keep).vocab_size, text_length=config.text_length)
        torch.manual_seed(config.seed)
        mmdit = MMDiT(sizes)
        embedding = TokenEmbedding(sizes.vocab_size, sizes.text_length, sizes.text_width)
    mmdit.null_image.requires_grad_(False)                       # both stages have pictures: it would never learn
    return config, nn.ModuleDict(dict(mmdit=mmdit, embedding=embedding)).train(), keep, records, pictures


def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")   # dcp says so at world size 1
    rank, world, device = start_processes(config)
    out, dtype = Path(config.out), getattr(torch, config.dtype)
    for name in ("image_batch", "text_batch"):
        if getattr(config, name) % world:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} does not divide over "
                            f"{world} processes")
    image_rows, text_rows = (slice(rank * n // world, (rank + 1) * n // world)   # this process's, of global batches
                             for n in (config.image_batch, config.text_batch))
    config, model, keep, records, pictures = prepare(config)
    tokenizer, mmdit = data.gpt2_tokenizer(keep), model["mmdit"]
    model.to(device)
    groups, held = emoji.fair(records), [i for i, r in enumerate(records) if r["split"] != "train"]
    if not groups:
        raise UserError(f"{config.data}: no sample of this tar is in the split \"train\"")
    if config.compile:
        torch._dynamo.config.recompile_limit = 64                # image, text, and last-block variants
        for block in mmdit.blocks:
            block.compile()
    if world > 1:
        shard(model, dtype)
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = {p for p in mmdit.blocks.parameters() if p.ndim == 2 and config.optimizer == "muon"}
    optimizers = [torch.optim.AdamW([p for p in learning if p not in matrices], lr=config.lr,
                                    weight_decay=config.weight_decay, fused=True)]
    if matrices:                                                 # scaled so that AdamW's learning rate fits
        optimizers.append(torch.optim.Muon([p for p in learning if p in matrices], lr=config.lr,
                                           weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"))
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}

    # the run's folder
    step, begun = 0, newest_step(out)
    if begun is None and (out / "log.jsonl").exists() and not config.fresh:
        raise UserError(f"{out}: holds a log and no complete step_* folder to resume from; "
                        f"use --fresh to start over, or another --out")
    if begun is not None and not config.fresh:
        step = load_step(begun, model, optimizers, ema, world)
    if world > 1:
        dist.barrier()
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if config.fresh:
            for old in out.glob("step_*"):
                shutil.rmtree(old)
            (out / "log.jsonl").unlink(missing_ok=True)
        (out / "train.json").write_text(json.dumps(asdict(config) | dict(world=world, torch=torch.__version__),
                                                   indent=1) + "\n")
        count = sum(p.numel() for p in model.parameters())
        print(f"{count / 1e6:.2f} M parameters, "
              f"{len(records) - len(held)} pictures to learn, {len(groups)} an epoch, {len(held)} held out, "
              f"vocabulary {tokenizer.vocab_size}, {world} process(es), {device}, from step {step}", flush=True)
    rows = read_log(out / "log.jsonl", step) if step else []     # without what came after the checkpoint
    if rank == 0:
        temporary = out / ".log.jsonl.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(out / "log.jsonl")
    before = rows[-1]["seconds"] if rows else 0.0

    stop = []                                                    # a signal asks; the end of a step obeys
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: stop.append(number))
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    # measured on a CPU: flash attention's backward took a third of the step, plain products a tenth
    kernels = [SDPBackend.MATH] + [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION] * (device.type == "cuda")
    empty = tokenizer.encode("", config.text_length)
    scale = lambda indices: pictures[indices].to(device).float() / 127.5 - 1     # (B, 3, P, P) in [-1, 1]
    clean, started, first = torch.zeros(1, device=device), time.time(), step
    samples = config.image_batch + config.text_batch
    sums, summed = torch.zeros(3, device=device), 0              # losses and gradient norm since the last line

    def save(resumable: bool = True) -> None:
        averaged = {name: whole(tensor) for name, tensor in ema.items()}         # collective: all processes
        try:
            if resumable:
                save_step(out, step, model, optimizers, ema, rank, world)
            if rank == 0:
                checkpoint.save(out, averaged, mmdit.config, keep, dtype=torch.float16, pixels=config.pixels,
                                step=step, text_length=config.text_length, stage=config.stage)
                draw_losses(rows, out / "loss.png")
        except (CheckpointException, SafetensorError, OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{out}: step {step} could not be saved ({reason}); what was saved before is intact "
                            f"({newest_step(out)}); make room and give the same command again")

    if step >= config.steps:                                     # a kill may have come between the last two files
        save(resumable=False)
        if rank == 0:
            print(f"{out}: has its {config.steps} steps; with more --steps it goes on", flush=True)
    while step < config.steps:
        # 1. learning rate
        lr = learning_rate(step, config)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = lr

        # 2. the image loss: noised pictures, clean captions, now and then none
        draws = seeded(config.seed, config.stage, "draws", step)                 # one set for the global batch
        indices = order(config.seed, "image" + config.stage, groups, step, config.image_batch)
        t, noise = flow.draw((len(indices), 3, config.pixels, config.pixels), draws, config.time_shift)
        dropped = torch.rand(len(indices), generator=draws) < config.text_dropout
        ids = torch.stack([empty if dropped[i] else tokenizer.encode(records[k]["caption"], config.text_length)
                           for i, k in enumerate(indices)])[image_rows].to(device)
        with autocast, sdpa_kernel(kernels):
            velocity = lambda x_t, t: model["mmdit"](x_t, model["embedding"](ids), t, need="velocity")[0]
            image_loss = flow.loss(velocity, scale(indices[image_rows]), t=t[image_rows], noise=noise[image_rows])
            image_loss.backward()

        # 3. the text loss: clean pictures, masked captions or answers
        indices = order(config.seed, "text" + config.stage, groups, step, config.text_batch)
        t, uniform = mask_diffusion.draw((len(indices), config.text_length), draws)
        share = config.question_share if config.stage == "instruct" else 0.0
        texts, frozen = map(torch.stack, zip(*(text_sample(tokenizer, records[k], share, config.text_length, draws)
                                               for k in indices)))
        tokens = float((~frozen).sum()) / world                  # the sum over processes is the global mean
        with autocast, sdpa_kernel(kernels):
            images = scale(indices[text_rows])
            logits = lambda masked: model["mmdit"](images, model["embedding"](masked), clean, need="logits")[1]
            text_loss = mask_diffusion.loss(
                logits, texts[text_rows].to(device), tokenizer.mask_id, frozen[text_rows].to(device), t=t[text_rows],
                uniform=uniform[text_rows], tokens=tokens)
            (config.text_weight * text_loss).backward()

        # 4. clip, step, average
        norm = whole(nn.utils.clip_grad_norm_(learning, config.clip))
        if not norm.isfinite():                                  # before anything is spoilt
            raise UserError(f"step {step + 1}: the gradient is not finite (loss {float(image_loss.detach()):.4g}, "
                            f"{float(text_loss.detach()):.4g}); go on from {newest_step(out)} with a smaller --lr")
        sums, summed = sums + torch.stack([image_loss.detach(), text_loss.detach(), norm]), summed + 1
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(config.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_([local(e) for e in ema.values()],
                             [local(p.detach()) for p in model.parameters()], 1 - decay)
        step += 1

        # 5. log, stop, save, draw
        last = step == config.steps
        if step % config.log_every == 0 or last or step <= 5:
            means, sums, summed = total(sums / summed, world).tolist(), torch.zeros_like(sums), 0
            elapsed = time.time() - started
            rate = (step - first) / elapsed
            rows.append(dict(step=step, image_loss=means[0], text_loss=means[1], grad_norm=means[2], lr=lr,
                             seconds=round(before + elapsed, 1), samples_per_s=round(samples * rate, 1)))
            if rank == 0:
                with open(out / "log.jsonl", "a") as log:
                    log.write(json.dumps(rows[-1]) + "\n")
                left = (config.steps - step) / rate
                print(f"step {step}/{config.steps}  image {means[0]:.4f}  text {means[1]:.4f}  "
                      f"grad {means[2]:.2f}  {samples * rate:.0f} samples/s  {left / 60:.1f} min left",
                      flush=True)
        asked = torch.tensor(float(bool(stop)), device=device)
        stopping = bool(total(asked, world) > 0)
        drawing = config.sample_every and (step % config.sample_every == 0 or last) and not stopping
        if step % config.save_every == 0 or last or stopping or drawing:         # samples are drawn from what is saved
            save()
        if rank == 0 and drawing:
            known = [i for i, r in enumerate(records) if r["split"] == "train"]
            shown = (held or known)[:8]
            page = sample.page(sample.Sampler(out), [records[i]["caption"] for i in known[:6] + shown[:2]],
                               [records[i]["caption"] for i in shown], scale(shown).cpu())
            page.save(out / f"samples_{step}.png")
        if stopping:
            if rank == 0:
                print(f"stopped at step {step}, saved; the same command goes on from here", flush=True)
            break
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
