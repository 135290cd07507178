"""train.py --cuda-graph: a step of the emoji preset as one CUDA graph, for launches are most of its time.

Flags, draws, losses, optimizers and the run's folder are the same, and a run goes on with or without it.  What
differs: logits are made at all tokens, so that shapes are static; losses are looked at where something is
logged or saved.  Saves, validations and samples take seconds each.

Shapes: B pictures of the image loss, n texts, P pixels a side, L tokens.
"""

import math
import mmap
import os
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import cli
from common.devices import autocast, choose_device
from dataset import workers
from training.batches import BatchMaker
from training.config import STAGES, TrainConfig, learning_rate, start


def views(config: TrainConfig, memory: Tensor | None) -> tuple[dict[str, Tensor], int]:
    """What a step reads, in one piece of memory (bytes,), and how many bytes it takes; None: these alone."""
    B, n, L, P = config.image_batch, config.text_batch, config.text_length, config.pixels
    found, at = {}, 0
    for name, *shape in (("images", B, 3, P, P), ("noise", B, 3, P, P), ("t", B), ("ids", B, L), ("rate",),
                         ("seen", n, 3, P, P), ("noised", n, L), ("clean", n, L), ("weight", n, L),
                         ("average",)):
        dtype = torch.int64 if name in ("ids", "noised", "clean") else torch.float32
        size = math.prod(shape) * dtype.itemsize
        if memory is not None:
            found[name] = memory[at:at + size].view(dtype).view(shape)
        at += -(-size // 256) * 256                              # kernels like their tensors aligned
    return found, at


def pack(config: TrainConfig, maker: BatchMaker, ring: Tensor, step: int) -> dict:
    """By a reader: what a step reads, into its slot of the ring (slots, bytes)."""
    made = maker.batches(config, step)
    image, text = made["image"], made["text"]
    masked = (text["uniform"] < text["t"][:, None]) & ~text["frozen"]             # as mask_diffusion.errors
    each = (1 / text["t"] if text["weight"] == "1/t" else torch.full_like(text["t"], 2)) / text["count"]
    found = dict(image, seen=text["images"], noised=text["ids"].masked_fill(masked, text["mask_id"]),
                 clean=text["ids"], weight=masked * each[:, None],
                 rate=torch.tensor(learning_rate(step, config)),                  # and as train.update
                 average=torch.tensor(1 - min(config.ema, (step + 1) / (step + 10))))
    for name, part in views(config, ring[step % len(ring)])[0].items():
        assert part.shape == found[name].shape, name
        part.copy_(found[name])
    return dict(bad=made["bad"], cut=made["cut"])


def take_step(config: TrainConfig, models, run, image_errors: Callable, x: dict[str, Tensor],
              mask: Tensor) -> dict:
    """A step on what is in x: losses, and the gradient's norm.  mask: [MASK], (1,).  Nothing here may wait
    for the device, nor make a tensor on the host."""
    model, device = models.learns, mask.device
    for p in model.parameters():
        p.grad = None                                            # of a graph they have its memory
    with autocast(device, config.dtype, cache_enabled=False):    # each weight is cast once a loss, as it is
        image = image_errors(models, x | dict(dropped=None)).mean()
        (config.image_weight * image).backward()
        clean = torch.zeros(1, device=device)
        logits = model["mmdit"](x["seen"], models.text(x["noised"]), clean, need="logits")[1]     # (n, L, V)
        logits = logits.float().index_fill(-1, mask, float("-inf")).flatten(0, 1)
        each = F.cross_entropy(logits, x["clean"].flatten(), reduction="none")    # (n L,)
        text = (each * x["weight"].flatten()).sum()
        (config.text_weight * text).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer in run.optimizers:
        optimizer.step()
    with torch.no_grad():
        apart = torch._foreach_sub([*model.parameters()], [*run.ema.values()])
        torch._foreach_mul_(apart, x["average"])
        torch._foreach_add_([*run.ema.values()], apart)
    return dict(image=image.detach(), text=text.detach(), grad=norm)


@torch.no_grad()
def put_back(run, before: dict[int, Tensor]) -> dict[int, Tensor]:
    """All that a step changes, in place as it was before; a moment that is new, zero.  Gives a copy of it."""
    state = [x for optimizer in run.optimizers for kept in optimizer.state.values() for x in kept.values()]
    tensors = {id(x): x for x in (*run.model.parameters(), *run.ema.values(), *filter(torch.is_tensor, state))}
    for key, x in tensors.items() if before else ():
        x.copy_(before[key]) if key in before else x.zero_()
    return {key: x.detach().clone() for key, x in tensors.items()}


def captured(take, run):
    """A step as one graph, after three that are undone; as it is where that fails or gives something else."""
    before, main, side = put_back(run, {}), torch.cuda.current_stream(), torch.cuda.Stream()
    graph, numbers = torch.cuda.CUDAGraph(), lambda found: {name: float(x) for name, x in found.items()}
    side.wait_stream(main)
    with torch.cuda.stream(side):
        seen = [numbers(take()) for _ in range(3)]
    main.wait_stream(side)
    put_back(run, before)
    try:
        with torch.cuda.graph(graph):
            found = take()
        graph.replay()
        again, step = numbers(found), lambda: (graph.replay(), found)[1]
        assert all(abs(again[name] - value) <= 0.02 * abs(value) for name, value in seen[0].items()), again
        print(f"one graph; the first step, and by the graph: {seen[0]} {again}", flush=True)
    except Exception as error:                                   # whatever it is: a slow step is one, too
        torch.cuda.set_stream(main)
        said = [str(e).strip().splitlines()[:1] for e in (error.__context__, error) if e]
        print(f"warning: no graph, a step's kernels are launched one by one: {said}", flush=True)
        torch.cuda.synchronize()
        step = take
    put_back(run, before)
    return step                                                  # its results are overwritten by the next


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float | Tensor) -> None:
    """Set the learning rate: a tensor while the graph runs, a number, as train.py has it, in a checkpoint."""
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group["lr"] = rate
    optimizers[0].param_groups[0]["capturable"] = torch.is_tensor(rate) and rate.is_cuda      # AdamW's


def train(config: TrainConfig, maker: BatchMaker, models, run, asked: list[int], image_errors: Callable,
          finish_step: Callable) -> None:
    """train.py's loop, with its functions; the device is waited for where something is due."""
    cli.require((bool(maker.mixes["text"].stamp), "--cuda-graph with --text-data that has no pictures: not in a "
                 "graph"))
    device, size = next(models.learns.parameters()).device, views(config, None)[1]
    cuda, slots = device.type == "cuda", 3 * config.workers + 2
    # a DataLoader has two steps a reader on the way; forks share this memory, whatever /dev/shm can hold
    ring = torch.frombuffer(mmap.mmap(-1, slots * size), dtype=torch.uint8).view(slots, size)
    there = torch.zeros(size, dtype=torch.uint8, device=device)
    x, take = views(config, there)[0], None
    mask = x["ids"].new_tensor([maker.tokenizer.mask_id])
    step = partial(take_step, config, models, run, image_errors, x, mask)
    validation = config.eval_every and maker.validation(config)
    if cuda:
        torch.set_num_threads(2)                                 # the readers want the other cores
    for made in workers.feed(partial(pack, config, maker, ring), range(run.step, config.steps), config.workers):
        slot = ring[run.step % slots]                            # pinned memory is kept until it is copied
        there.copy_(slot.pin_memory() if cuda else slot, non_blocking=True)
        set_rate(run.optimizers, x["rate"])
        take = take or (captured(step, run) if cuda else step)
        run.note(take(), made)
        rate, stopping = learning_rate(run.step, config), bool(asked)
        run.step += 1
        if stopping or run.step <= 5 or any(map(run.due, (config.log_every, config.eval_every, config.save_every,
                                                          config.sample_every))):
            set_rate(run.optimizers, rate)                       # a checkpoint has it as train.py does
            means = {name: float(total) / run.summed for name, total in run.sums.items()}
            if run.error or not all(map(math.isfinite, means.values())):
                run.wait()                                       # says what went wrong with a save
                raise cli.UserError(f"step {run.step}, or one since the last row: the gradient is not finite "
                                    f"({means}); go on from {run.newest()} with a smaller --lr")
        finish_step(config, maker, models, run, validation, rate, {}, stopping)
        if stopping:
            break
    run.end(config.steps)


def check(config: TrainConfig) -> None:
    """Raise UserError for a run whose step does not fit into one graph."""
    sizes, world = start(config.init, config.preset)[1], int(os.environ.get("WORLD_SIZE", 1))
    given = [cli.flag(flag) for flag in ("micro_batch", "meter_every", "checkpoint_activations", "compile",
                                         "buckets") if getattr(config, flag)]
    cli.require(
        (not given, f"--cuda-graph with {' '.join(given)}: not in a graph; leave one out"),
        (world == 1, "--cuda-graph with several processes: a graph is of one"),
        (sizes.text_length and sizes.channels == 3, f"--cuda-graph with {config.init or config.preset}: "
         f"expected a token embedding of its own, and pixels"),
        (STAGES[config.stage].losses == "image, text", f"--cuda-graph with --stage {config.stage}: has one loss"),
        (choose_device(config.device) == "cuda", "--cuda-graph needs an NVIDIA GPU"))
