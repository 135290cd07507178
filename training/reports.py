"""Validate, log, save and sample after a step, each when it is due."""

from contextlib import contextmanager
from typing import Iterator

import torch
from torch import Tensor

from common.devices import autocast
from dataset import sources
from inference.parts import Parts
from inference.text_to_image import decode
from training import distributed
from training.batches import Batch, Errors
from training.setup import Job
from training.validation import Validation
from viz import grids
from viz.samples import samples_page


def make_validation(job: Job, errors: dict[str, Errors]) -> Validation | None:
    """Return the samples to validate on, with each loss's errors; None without --eval-every."""
    if not job.config.eval_every:
        return None

    def measure(name: str, batch: Batch) -> Tensor:
        return errors[name](job.models, batch.move_large_tensors(job.models.device))
    return Validation(job.maker.for_validation(), measure)


def after_step(job: Job, validation: Validation | None, learning_rate: float, measured: dict,
               stopping: bool) -> None:
    """Validate, log, save and sample, each if it is due.  measured: more values for the log."""
    config, run = job.config, job.run
    if validation and run.due(config.eval_every) and not stopping:
        measured = measured | validate(job, validation)
    if run.due(config.log_every) or run.step <= 5 or measured:
        run.log(learning_rate, config.steps, measured)
    if run.due(config.save_every) or stopping:
        run.save()
    drawable = job.models.vae is not None and "image" in job.maker.mixes
    if run.due(config.sample_every) and drawable and not stopping:
        show_samples(job)


@contextmanager
def averaged_weights(job: Job) -> Iterator[None]:
    """In this context, the model has its averaged weights, in eval mode, uncompiled, in --dtype."""
    with (distributed.averaged(job.models.trainable, job.run.ema),
          torch.compiler.set_stance("force_eager"),
          autocast(job.models.device, job.config.dtype)):
        yield


def validate(job: Job, validation: Validation) -> dict:
    """Measure the averaged weights, with the same samples, times and noise every time."""
    with averaged_weights(job):
        return validation.measure(job.run.rank, job.run.world)


def show_samples(job: Job) -> None:
    """Draw 8 prompts and caption 8 images, with averaged weights: 2 prompts and all images are held
    out, if the first source has held-out samples."""
    config, run = job.config, job.run
    mix = job.maker.mixes["image"]
    trained_on = mix.shown(6, held=False)
    held_out = mix.shown(8, held=True)
    prompts = [sources.choose_caption(sample, 0, 0) for sample in trained_on + held_out[:2]]
    captions = [sources.choose_caption(sample, 0, 0) for sample in held_out]
    parts = Parts.of(job.models, config.pixels, config.text_length)
    parts.set_defaults(run.about)
    images = sources.latents_of(held_out)
    with averaged_weights(job):
        if "latents" in held_out[0]:
            images = torch.stack([decode(parts, x) for x in images.to(parts.device)])
        page = samples_page(parts, prompts, captions, images)
    if run.rank == 0:
        path = run.out / f"samples_{run.step}.png"
        with run.writing(path):
            grids.write_image(path, page)
        run.show()
