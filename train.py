"""Train the dual diffusion transformer: one loop, two losses, L = L_image + lambda L_text.

    python train.py --preset emoji --stage pretrain         # from scratch: images and captions
    python train.py --stage instruct --init out/pretrain    # then questions with answers
    bash runs/emoji.sh                                      # the recipe of the shipped weights
    torchrun --standalone --nproc_per_node=2 train.py       # two processes, sharded by FSDP2

To start from SD3's weights, as in the paper (training/config.py has the table of stages), or to
train the paper's end-to-end variant (SD3 stands for a folder of SD3-medium; docs/paper.md):

    torchrun --nproc_per_node=8 train.py --init SD3 --micro-batch 8 --image-data 'recap/{000..999}.tar'
    torchrun --nproc_per_node=8 train.py --stage mask-emb --init out/pretrain --image-data ...
    torchrun --nproc_per_node=8 train.py --stage text --preset e2e-1.1b --text-data t.safetensors
    python train.py --init SD3 --print-plan 8               # print memory, arithmetic and days

The folder --out (out/STAGE unless given) holds a run: its log, its checkpoints, and the averaged
weights that sample.py reads.  The same command resumes the run from the newest step_* folder, with
any number of processes.  Ctrl-C and SIGTERM save a checkpoint first.

With --cuda-graph, training/cuda_graph.py replaces the loop and the text loss.
"""

from common import cli
cli.interruptible(__name__)     # before the slow imports: Ctrl-C prints one line

import os
import warnings
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import flow
import mask_diffusion
from common import processes
from common.cli import UserError
from common.devices import autocast, world_size
from dataset import workers
from training import cuda_graph, distributed, gradient_meter, plan, reports
from training.batches import Batch, Errors, ImageBatch, TextBatch
from training.config import TrainConfig, average_decay, learning_rate, parse
from training.models import Models
from training.optimizers import set_learning_rate
from training.run_folder import Run
from training.setup import Job, set_up, stop_requests


# ----------------------------------------------------------------------------------- the two losses

def image_errors(models: Models, batch: ImageBatch) -> Tensor:
    """Return |v(x_t, t | caption) - (e - x)|^2 (e: noise), averaged over each image's values, (B,).

    L_image is the mean over images.  The caption has no [MASK].  --time-floor weighs low times
    less."""
    mmdit = models.trainable["mmdit"]
    text = models.captions(batch.ids, batch.dropped, batch.states)                # (B, L, E)
    latents = models.latents(batch.images)                                        # (B, C, h, w)

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        return mmdit(x_t, text, t, need="velocity")[0]
    return flow.errors(velocity, latents, batch.t, batch.noise, batch.floor)


def text_errors(models: Models, batch: TextBatch) -> Tensor:
    """Return -log p(masked tokens | the others, image) / t of each text, (B,).

    L_text is the sum over texts, divided by B L, the number of all positions, prompts included.
    The image is clean, so its time is 0.  --text-loss selects another weight than 1/t."""
    mmdit = models.trainable["mmdit"]
    latents = models.latents(batch.images)                                # (B, C, h, w) or None
    time_zero = torch.zeros(1, device=batch.ids.device)

    def logits_at(ids: Tensor, at: Tensor) -> Tensor:
        return mmdit(latents, models.text(ids), time_zero, need="logits", at=at)[1]
    return mask_diffusion.errors(logits_at, batch.ids, models.tokenizer.mask_id, batch.t,
                                 batch.uniform, batch.frozen, batch.time_weight)


ERRORS = dict(image=image_errors, text=text_errors)


# ---------------------------------------------------------------------------------- one step

def accumulate(errors: Errors, models: Models, batch: Batch, weight: float, config: TrainConfig,
               reduce_gradients: bool) -> Tensor:
    """Add up the gradient of weight * L, in micro-batches, and return L of this process's rows.

    reduce_gradients: let FSDP2 reduce the gradients that both losses share.  True for the last loss
    of the step, and for the first if the gradient meter reads its gradient."""
    device = models.device
    loss = torch.zeros((), device=device)
    micro_batches = batch.split(config.micro_batch)
    for micro in micro_batches:
        is_last = micro is micro_batches[-1]
        distributed.set_reductions(models.trainable, shared=reduce_gradients and is_last,
                                   others=is_last, mode=config.shard)
        with autocast(device, config.dtype):
            part = errors(models, micro.move_large_tensors(device)).sum() / batch.denominator
        (weight * part).backward()
        loss += part.detach()
    return loss


@torch.no_grad()
def update_average(model: nn.Module, average: dict[str, Tensor], decay: float) -> None:
    """Move the averaged weights (EMA): average += (1 - decay) (weights - average)."""
    # both lists follow named_parameters(), so one kernel can update all of them
    averages = [distributed.local(tensor) for tensor in average.values()]
    weights = [distributed.local(p) for p in model.parameters()]
    torch._foreach_lerp_(averages, weights, 1 - decay)


def check_step(run: Run, signals: list[int], grad_norm: Tensor, losses: dict[str, Tensor]) -> bool:
    """Return True if training stops after this step; all processes agree.

    Call it before the weights are updated: it raises UserError if the gradient is not finite, or a
    save has failed, on any process."""
    stops_here = bool(signals or run.stop_reason)
    is_infinite_here = not grad_norm.isfinite()
    stops, is_infinite, save_failed = processes.agree(stops_here, is_infinite_here,
                                                      bool(run.save_error), device=grad_norm.device)
    if save_failed:
        run.save_again()
    if is_infinite:
        shown = ", ".join(f"{name} loss {float(loss):.4g}" for name, loss in losses.items())
        run.rescue()
        raise UserError(f"step {run.step + 1}: the gradient is not finite (on this process "
                        f"{shown}); go on from {run.newest()} with a smaller --lr")
    return stops


# ---------------------------------------------------------------------------------- the loop

def train(job: Job, signals: list[int]) -> None:
    """Train until step --steps, or until a signal handler adds to `signals`."""
    config, maker, models, run = job
    model = models.trainable
    validation = reports.make_validation(job, ERRORS)

    feed = workers.feed(maker.make_batches, range(run.step, config.steps), config.workers)
    for batches, error in workers.look_ahead(feed):
        run.stop_reason = run.stop_reason or error               # the next batch can't be read
        lr = learning_rate(run.step, config)
        set_learning_rate(run.optimizers, lr)
        metered = bool(config.meter_every) and (run.step + 1) % config.meter_every == 0
        losses = {}
        measured = {}

        # L = L_image + lambda L_text, lambda = --text-weight: two passes of the same network
        if batches.image is not None:
            losses["image"] = accumulate(image_errors, models, batches.image, config.image_weight,
                                         config, reduce_gradients=metered)
        if metered:
            image_gradient = gradient_meter.gradients(model)
        losses["text"] = accumulate(text_errors, models, batches.text, config.text_weight,
                                    config, reduce_gradients=True)
        if metered:
            measured = gradient_meter.compare(model, image_gradient)

        grad_norm = distributed.whole(clip_grad_norm_(model.parameters(), config.clip))
        stopping = check_step(run, signals, grad_norm, losses)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_average(model, run.ema, average_decay(run.step, config))
        run.step += 1

        numbers = {f"{name}_loss": loss for name, loss in losses.items()}
        run.note(numbers | dict(grad_norm=grad_norm), batches)
        reports.after_step(job, validation, lr, measured, stopping)
        if stopping:
            break
    run.end(config.steps)


def main(argv: list[str] | None = None) -> None:
    # two expected warnings: torch's checkpoints warn if only one process saves, and AdamW warns if
    # it takes a step before its graph is captured
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    warnings.filterwarnings("ignore", message="This instance was constructed")
    config = parse(argv, __doc__)
    if config.print_plan:
        gpus = max(config.print_plan, world_size())
        if os.environ.get("RANK", "0") == "0":
            print(plan.show(replace(config, print_plan=gpus)))
        return
    if config.cuda_graph:
        cuda_graph.check(config)
    with processes.one_voice():
        job = set_up(config)
        with closing(job.run), stop_requests() as signals:
            if config.cuda_graph:
                cuda_graph.train(job, signals, ERRORS)
            else:
                train(job, signals)


if __name__ == "__main__":
    cli.run(main)
