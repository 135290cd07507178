"""Capture a step of a small model as one CUDA graph: train.py --cuda-graph.

A small model spends most of a step on kernel-launch overhead; a graph launches all kernels at once.
Batches, the image loss, optimizers, averages and the run's folder are those of train.py, and a run
can resume with or without a graph.  A graph needs static shapes, and the host can't read a result
inside it.  So logits are computed at all tokens, and losses are read only when logging, validation,
saving or sampling is due.  A step that can't be captured ends the run with an error.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from common import cli
from common.devices import autocast, choose_device, world_size
from dataset import workers
from mask_diffusion import WEIGHTS
from training import reports
from training.batches import Batch, Errors, StepBatches, TextBatch
from training.config import STAGES, TrainConfig, average_decay, learning_rate, read_base
from training.models import Models
from training.optimizers import set_learning_rate
from training.setup import Job


def static_text_errors(models: Models, batch: TextBatch, mask_id: Tensor) -> Tensor:
    """Compute mask_diffusion.errors (B,) with static shapes, from the logits of all tokens."""
    masked = (batch.uniform < batch.t[:, None]) & ~batch.frozen                   # (B, L)
    noised = torch.where(masked, mask_id, batch.ids)
    clean = torch.zeros(1, device=batch.ids.device)
    logits = models.trainable["mmdit"](batch.images, models.text(noised), clean, need="logits")[1]
    logits = logits.float().index_fill(-1, mask_id, float("-inf")).flatten(0, 1)  # (B L, V)
    cross_entropy = F.cross_entropy(logits, batch.ids.flatten(), reduction="none")
    per_text = (cross_entropy.view_as(masked) * masked).sum(1)                    # (B,)
    return WEIGHTS[batch.time_weight](per_text, batch.t)


def refill(static: Batch, batch: Batch) -> None:
    """Copy a batch into the tensors of `static`, which a graph reads."""
    for name, tensor in vars(static).items():
        if isinstance(tensor, Tensor):
            source = getattr(batch, name)
            if tensor.is_cuda:
                source = source.pin_memory()
            tensor.copy_(source, non_blocking=True)


class GraphedStep:
    """A training step on static tensors.  Only tests run it without a GPU, uncaptured."""

    def __init__(self, job: Job, first: StepBatches, image_errors: Errors):
        self.job, self.image_errors = job, image_errors
        self.device = job.models.device
        self.image = first.image.map(lambda name, tensor: tensor.to(self.device))
        self.text = first.text.map(lambda name, tensor: tensor.to(self.device))
        self.mask_id = self.text.ids.new_tensor([job.models.tokenizer.mask_id])
        self.lr = torch.zeros((), device=self.device)
        self.average_weight = torch.zeros((), device=self.device)
        self.graph = None
        if self.device.type == "cuda":
            self.capture()

    def __call__(self, batch: StepBatches, lr: float, decay: float) -> dict[str, Tensor]:
        """Take a step; return losses and gradient norm, which the next call overwrites."""
        refill(self.image, batch.image)
        refill(self.text, batch.text)
        self.lr.fill_(lr)
        self.average_weight.fill_(1 - decay)
        if self.graph is None:
            self.results = self.take_step()
        else:
            self.graph.replay()
        return self.results

    def take_step(self) -> dict[str, Tensor]:
        """Compute one update on the static tensors; the graph captures this work."""
        config, models, run = self.job.config, self.job.models, self.job.run
        model = models.trainable
        set_learning_rate(run.optimizers, self.lr)
        for p in model.parameters():
            p.grad = None                                        # the graph allocates gradients
        precision = autocast(self.device, config.dtype, cache_enabled=False)
        with precision:
            image = self.image_errors(models, self.image).sum() / self.image.denominator
        (config.image_weight * image).backward()
        with precision:
            text = static_text_errors(models, self.text, self.mask_id)
            text = text.sum() / self.text.denominator
        (config.text_weight * text).backward()
        grad_norm = clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in run.optimizers:
            optimizer.step()
        with torch.no_grad():
            differences = torch._foreach_sub([*model.parameters()], [*run.ema.values()])
            torch._foreach_mul_(differences, self.average_weight)
            torch._foreach_add_([*run.ema.values()], differences)
        return dict(image_loss=image.detach(), text_loss=text.detach(), grad_norm=grad_norm)

    def capture(self) -> None:
        """Capture the step, after three steps in which libraries and optimizers allocate memory.

        During these steps the learning rate and the weight of the average are 0.  So they change
        only the optimizers' moments, which are restored.  Raises UserError."""
        self.lr.zero_()
        self.average_weight.zero_()
        optimizers = self.job.run.optimizers
        saved = [tensor.clone() for tensor in moments(optimizers)]
        optimizers[0].param_groups[0]["capturable"] = True       # otherwise torch refuses AdamW
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(3):
                expected = self.take_step()
        main.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.results = self.take_step()
        except RuntimeError as error:
            raise cli.UserError(f"--cuda-graph: this step can't be captured "
                                f"({str(error).splitlines()[0]}); leave the flag out")
        self.graph.replay()
        for name, value in expected.items():
            replayed = float(self.results[name])
            if not math.isclose(float(value), replayed, rel_tol=0.02):
                raise cli.UserError(f"--cuda-graph: the graph gives {name} {replayed:.6g}, the "
                                    f"step {float(value):.6g}; leave the flag out")
        optimizers[0].param_groups[0]["capturable"] = False
        for i, tensor in enumerate(moments(optimizers)):
            if saved:
                tensor.copy_(saved[i])
            else:
                tensor.zero_()                                   # a new run starts at 0


def moments(optimizers: list[torch.optim.Optimizer]) -> list[Tensor]:
    """Return the tensors of the optimizers' states."""
    tensors = []
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors += filter(torch.is_tensor, state.values())
    return tensors


def train(job: Job, signals: list[int], errors: dict[str, Errors]) -> None:
    """Train as train.py does, but wait for the device only when something is due."""
    config, maker, models, run = job
    cli.require((maker.mixes["text"].stamp, "--cuda-graph: --text-data without images does not fit "
                 "in a graph"))
    if models.device.type == "cuda":
        torch.set_num_threads(2)                                 # the workers need the other cores
    validation = reports.make_validation(job, errors)
    step = None
    feed = workers.feed(maker.make_batches, range(run.step, config.steps), config.workers)
    for batches, error in workers.look_ahead(feed):
        run.stop_reason = run.stop_reason or error
        if step is None:
            step = GraphedStep(job, batches, errors["image"])
        lr = learning_rate(run.step, config)
        results = step(batches, lr, average_decay(run.step, config))
        set_learning_rate(run.optimizers, lr)                    # as a number, for checkpoints
        run.step += 1
        run.note(results, batches)
        stopping = bool(signals or run.stop_reason)
        intervals = config.log_every, config.eval_every, config.save_every, config.sample_every
        if stopping or run.step <= 5 or any(map(run.due, intervals)):
            check_finite(job)
        reports.after_step(job, validation, lr, {}, stopping)
        if stopping:
            break
    run.end(config.steps)


def check_finite(job: Job) -> None:
    """Raise UserError if a loss or gradient was not finite since the last row, or a save failed."""
    run = job.run
    means = {name: float(total) / run.summed for name, total in run.sums.items()}
    if not all(map(math.isfinite, means.values())):              # first: NaN must not be saved
        run.wait()
        raise cli.UserError(f"step {run.step}, or one since the last row: a loss or the gradient "
                            f"is not finite ({means}); go on from {run.newest()} with a smaller "
                            f"--lr")
    if run.save_error:
        run.save_again()


def check(config: TrainConfig) -> None:
    """Raise UserError for settings with which a step does not fit into one graph."""
    sizes = read_base(config.init, config.preset)[1]
    world = world_size()
    flags = ("micro_batch", "meter_every", "checkpoint_activations", "compile", "buckets")
    refused = " ".join(cli.flag(name) for name in flags if getattr(config, name))
    model = config.init or config.preset
    cli.require(
        (not refused, f"--cuda-graph does not work with {refused}; leave one out"),
        (world == 1, f"--cuda-graph is for one process, not {world}"),
        (sizes.text_length and sizes.channels == 3, f"--cuda-graph: {model} is not a model of "
         f"pixels with a token embedding"),
        (STAGES[config.stage].images,
         f"--cuda-graph needs two losses, --stage {config.stage} has one"),
        (choose_device(config.device) == "cuda", "--cuda-graph needs an NVIDIA GPU"))
