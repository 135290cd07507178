"""Build everything that the training loop needs, from the flags of train.py."""

import signal
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Iterator, NamedTuple

import torch

import checkpoint
import data
from common import processes
from common.cli import UserError, require
from common.devices import allow_tf32, check_compiler, choose_dtype
from model import MMDiTConfig
from pretrained.tokenizer import Tokenizer
from pretrained.vae import AutoencoderKL, Pixels
from training import distributed, models as training_models, plan
from training.batches import BatchMaker
from training.config import STAGES, TrainConfig, check_batches, read_base
from training.models import Models
from training.optimizers import make_optimizers
from training.run_folder import Run


class Job(NamedTuple):
    """A run that is ready to be trained."""
    config: TrainConfig
    maker: BatchMaker
    models: Models
    run: Run


class Base(NamedTuple):
    """The model to start from, which --init or --preset names."""
    family: str                                 # "ours", "D-DiT", "SD3"; "" for a preset
    sizes: MMDiTConfig
    about: dict                                 # config.json of a run of ours
    where: dict[str, str]                       # the paths of its "t5" and "vae"
    vae: AutoencoderKL | Pixels | None        # None: the latents are stored, or there are no images
    factor: int | None                         # pixels per latent along a side, if there are images


def set_up(config: TrainConfig) -> Job:
    """Start processes, open the run's folder and the data, and build models and optimizers.

    Checks that need no loaded weights come first.  Raises UserError."""
    rank, world, device = processes.start(config.device)
    config, why = prepare_device(config, device)
    check_batches(config, world)
    base = find_base(config)
    settings = asdict(config) | dict(world=world, torch=torch.__version__)
    run = Run(Path(config.out), settings, rank, config.fresh, config.resume_step)
    check_extension(config, run)

    mixes, latents = open_data(config, base, run.key)
    texts = all_texts(mixes)
    tokenizer = training_models.build_tokenizer(config, base.sizes, texts)
    check_texts(config, mixes["text"], tokenizer, texts)
    maker = BatchMaker(config, tokenizer, mixes, run.key, rank, world, base.sizes.channels,
                       base.factor or 1)
    maker.make_buckets(base.sizes.patch)
    no_images = mixes["text"].stamp is None                      # then the null image is trained
    models = training_models.build(config, base.sizes, base.where, tokenizer, no_images, base.vae,
                                   device)
    maker.stored_states = training_models.has_stored_states(config, mixes.get("image"), models,
                                                            base.where)

    shard(config, models, world)
    about = remember(config, base, latents, no_images)
    run.begin(models, make_optimizers(models.trainable, config), about,
              plan.work(config, models.trainable["mmdit"].config, maker.factor, no_images))
    job = Job(config, maker, models, run)
    if rank == 0:
        print_start(job, base.family, device, why)
    return job


def prepare_device(config: TrainConfig, device: torch.device) -> tuple[TrainConfig, str]:
    """Return the config with a dtype in place of "auto", and the reason for the dtype.

    Raises UserError without the compiler that --compile needs."""
    dtype, why = choose_dtype(config.dtype, device)
    allow_tf32(device, dtype)
    if config.compile:
        check_compiler(device)
    return replace(config, dtype=dtype), why


def find_base(config: TrainConfig) -> Base:
    """Read the sizes of the model to start from, and load its autoencoder.  Raises UserError."""
    family, sizes, about = read_base(config.init, config.preset)
    where = training_models.find_parts(config, sizes, about)
    vae = None
    if "vae" in where:
        vae = checkpoint.load_autoencoder(where["vae"], sizes.channels)
    elif sizes.channels == 3:
        vae = Pixels()
    if vae:
        factor = vae.factor
    else:
        factor = data.latent_factor([*config.image_data, *config.text_data])
    training_models.check(config, sizes, factor)
    checkpoint.check_config(sizes)
    return Base(family, sizes, about, where, vae, factor)


def open_data(config: TrainConfig, base: Base, key: str) -> tuple[dict[str, data.Mix], str | None]:
    """Open the data of each loss; also return the stamp of the latents: "pixels", or an
    autoencoder's digest."""
    mixes = mixtures(config, key)
    digest = base.vae and checkpoint.digest(base.vae)
    latents = data.check_stamps(mixes.get("image"), mixes["text"], base.sizes.channels,
                                base.about.get("latents"), digest)
    return mixes, latents


def remember(config: TrainConfig, base: Base, latents: str | None, no_images: bool) -> dict:
    """Return the entries of the run's config.json besides the sizes."""
    paths = {part: str(Path(path).resolve()) for part, path in base.where.items()}
    # True: it is trained, here or before
    null_image = no_images or base.family == "D-DiT" or bool(base.about.get("null_image"))
    return paths | dict(pixels=config.pixels, buckets=config.buckets,
                        text_length=config.text_length, stage=config.stage, latents=latents,
                        null_image=null_image, guidance=config.guidance, shift=config.shift)


def check_extension(config: TrainConfig, run: Run) -> None:
    """Raise UserError if --steps is increased after the learning rate has begun to fall."""
    steps, decay_steps = run.previous.get("steps", 0), run.previous.get("decay_steps", 0)
    if decay_steps and run.step > steps - decay_steps and config.steps > steps:
        raise UserError(f"--steps {config.steps}: this run's learning rate falls to zero at step "
                        f"{steps}; --init {config.out} with another --out starts a run from its "
                        f"weights")


def mixtures(config: TrainConfig, key: str) -> dict[str, data.Mix]:
    """Open the data of each loss of the stage.  Raises UserError, also if no data are named."""
    text_only = not STAGES[config.stage].images
    if text_only:
        specs, flag = config.text_data, "--text-data"
    else:
        specs, flag = config.image_data, "--image-data"
    require((specs, f"--stage {config.stage}: name its data with {flag}; python data.py --help "
             f"lists the forms"))
    asks = config.stage == "instruct" and config.question_share > 0
    filters = data.PUBLISHED if config.filtered else data.Filters()

    def open_mix(specs: list[str]) -> data.Mix:
        return data.Mix(specs, config.pixels, key, filters, config.text_length, asks)
    if text_only:
        return {"text": open_mix(config.text_data)}
    image = open_mix(config.image_data)
    text = image
    if config.text_data:
        text = open_mix(config.text_data)
    return {"image": image, "text": text}


def all_texts(mixes: dict[str, data.Mix]) -> list[str] | None:
    """Return every text of the data, or None if only reading all of the data would list them."""
    texts = []
    for mix in dict.fromkeys(mixes.values()):                    # one mix may serve both losses
        for source in mix.sources:
            source_texts = source.texts()
            if source_texts is None:
                return None
            texts += source_texts
    return texts


def check_texts(config: TrainConfig, mix: data.Mix, tokenizer: Tokenizer,
                texts: list[str] | None) -> None:
    """Raise UserError for texts that a model with this tokenizer can't be trained on."""
    data.check_tokens(mix, tokenizer, config.tokenizer or config.init or "gpt2")
    if config.stage == "instruct":
        data.check_questions(mix, texts or [], tokenizer, config.text_length)


def shard(config: TrainConfig, models: Models, world: int) -> None:
    if world == 1:
        return
    distributed.shard(models.trainable, getattr(torch, config.dtype), config.shard)
    if config.shard_t5 and models.t5:
        distributed.shard_frozen(models.t5)


def print_start(job: Job, family: str, device: torch.device, why: str) -> None:
    """Print the sizes of model and data, and the device.  why: the reason for the dtype."""
    config, maker, models, run = job
    if family == "SD3":
        training_models.report(config, maker.tokenizer.vocab_size)
    millions = sum(p.numel() for p in models.trainable.parameters()) / 1e6
    samples = len(maker.mixes.get("image") or maker.mixes["text"])
    print(f"{millions:.2f} M parameters, {samples:,} samples an epoch, vocabulary "
          f"{maker.tokenizer.vocab_size}, {maker.world} process(es), {device}, from step "
          f"{run.step}", flush=True)
    print(f"matrix products in {config.dtype}: {why}", flush=True)
    if models.vae is None and config.sample_every and "image" in maker.mixes:
        print("note: no samples are drawn: they need the autoencoder that made the latents (--vae)",
              flush=True)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """In this context, Ctrl-C and SIGTERM only append their number to the list that is yielded.

    The training loop reads the list, and stops after its current step."""
    requests = []

    def note(number: int, frame) -> None:
        requests.append(number)
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
