"""Plan a run's parameters, arithmetic and memory before it starts: train.py ... --print-plan GPUS.

Parameters and arithmetic follow from the sizes, memory from what FSDP2 keeps on each GPU.  The
activations of a block are measured: one block of the real width runs on a few tokens.

Shapes: N image tokens, L text tokens, T = N + L, D width, E width of text states, V vocabulary.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
from model import Block, MMDiT, MMDiTConfig, TokenEmbedding
from pretrained.t5 import T5Block, T5Config, T5Encoder
from pretrained.vae import AutoencoderKL, VAEConfig
from training import models as training_models
from training.config import STAGES, Stage, TrainConfig, check_batches, read_base
from training.distributed import hsdp_shards
from training.optimizers import OPTIMIZERS

NODE = 8                # GPUs of a machine; hsdp shards within it
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}   # TFLOP/s, dense, bfloat16, by a GPU's name
PEAK = PEAKS["H100"]    # the estimated days assume this GPU
MFU = 0.4               # at this share of its peak


def peak(device: torch.device, dtype: str) -> float:
    """Return a GPU's peak TFLOP/s in bfloat16; 0 for other dtypes, unknown GPUs and CPUs."""
    if device.type == "cuda" and dtype == "bfloat16":
        name = torch.cuda.get_device_name(device)
        for gpu, value in PEAKS.items():
            if gpu in name:
                return value
    return 0.0


# --------------------------------------------------------------------------------------- parameters

def count_parameters(build_module, *sizes) -> int:
    """Count the parameters of a module, built on the meta device, without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_module(*sizes).parameters())


def count_frozen(stage: Stage, c: MMDiTConfig) -> int:
    """Count the transformer's parameters that a stage does not train."""
    with torch.device("meta"):
        mmdit = MMDiT(c)
    mmdit.null_image.requires_grad_(not stage.images)
    if not stage.images:
        training_models.freeze_velocity_parts(mmdit)
    return sum(p.numel() for p in mmdit.parameters() if not p.requires_grad)


def count_weights(c: MMDiTConfig) -> int:
    """Count the parameters of the transformer and the end-to-end variant's token embedding."""
    count = count_parameters(MMDiT, c)
    if c.text_length:
        count += count_parameters(TokenEmbedding, c.vocab_size, c.text_length, c.text_width)
    return count


def frozen_sizes(config: TrainConfig, c: MMDiTConfig,
                 about: dict) -> tuple[T5Config | None, VAEConfig | None]:
    """Return the sizes of a run's T5 and autoencoder; None for a part that it does not use.

    If no file is named, they are the sizes of T5 v1.1 XXL and of SD3's autoencoder."""
    paths = training_models.find_parts(config, c, about)
    t5 = vae = None
    if "t5" in paths:
        t5 = checkpoint.t5_sizes(paths["t5"])
    elif not c.text_length:
        t5 = T5Config()
    if c.channels != 3 and STAGES[config.stage].images:
        vae = checkpoint.vae_sizes(paths["vae"]) if "vae" in paths else VAEConfig()
    return t5, vae


# --------------------------------------------------------------------------------------- arithmetic

def image_tokens(config: TrainConfig, c: MMDiTConfig, factor: int) -> int:
    """Return the tokens of an image; 0 in a stage without images.  factor: pixels per latent, along
    a side."""
    if not STAGES[config.stage].images:
        return 0
    return (config.pixels // (c.patch * factor)) ** 2


def sample_flops(c: MMDiTConfig, N: int, L: int, need: str) -> int:
    """Count a sample's FLOPs in the transformer; the backward pass costs two forward passes.

        3 [ blocks (24 D^2 T + 4 D T^2) + 24 D^2 blocks + inputs and outputs ]

    N: tokens of the image; 0: the null image stands in.  need: "velocity" or "logits".  In the last
    block, the other stream stops after its keys and values.  The text head runs only at masked
    tokens, on average half of all."""
    D = c.width
    has_image = N > 0
    N = N or c.null_tokens
    T = N + L
    patch = c.patch ** 2 * c.channels
    rows = N if need == "velocity" else L                # tokens that the last block finishes
    flops = (c.depth - 1) * (24 * D * D * T + 4 * D * T * T)
    flops += 6 * D * D * T + 4 * D * rows * T + 18 * D * D * rows                 # the last block
    flops += 24 * D * D * c.depth                                # modulations
    flops += 2 * 256 * D + 2 * D * D                             # time
    flops += 2 * L * c.text_width * D                            # text in
    if need == "velocity":
        flops += 4 * N * D * patch + 4 * D * D                   # image in and out
    else:
        flops += L * D * c.vocab_size
        if has_image:
            flops += 2 * N * D * patch
    return 3 * flops


def work(config: TrainConfig, c: MMDiTConfig, factor: int,
         no_images: bool = False) -> dict[str, float]:
    """Count the samples, tokens and TFLOP of one update, without the frozen T5 and autoencoder.

    no_images: the texts have no images, as with packed text."""
    N = image_tokens(config, c, factor)
    N_text = 0 if no_images else N
    L = config.text_length
    images, texts = config.image_batch, config.text_batch
    flops = images * sample_flops(c, N, L, "velocity")
    flops += texts * sample_flops(c, N_text, L, "logits")
    tokens = images * (N + L) + texts * ((N_text or c.null_tokens) + L)
    return dict(samples=images + texts, tokens=tokens, tflop=flops / 1e12)


def forward_flops(module: nn.Module, *inputs: Tensor) -> int:
    """Count the FLOPs (multiplications and additions) of a forward pass, on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


def frozen_flops(config: TrainConfig, t5: T5Config | None, vae: VAEConfig | None) -> float:
    """Count the FLOPs of one update in T5 and the autoencoder."""
    flops = 0.0
    L = config.text_length
    with torch.device("meta"):
        if t5:
            texts = (1 - config.text_dropout) * config.image_batch + config.text_batch
            if config.stage == "mask-emb":
                texts += config.text_batch                       # backward through activations only
            states = torch.empty(1, L, t5.width)
            bias = torch.empty(1, t5.heads, L, L)
            flops += texts * t5.depth * forward_flops(T5Block(t5), states, bias)
        if vae:
            images = config.image_batch + config.text_batch
            image = torch.empty(1, 3, config.pixels, config.pixels)
            flops += images * forward_flops(AutoencoderKL(vae).encoder, image)
    return flops


# ------------------------------------------------------------------------------------------- memory

def measure_saved(block: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> int:
    """Return the bytes that a block saves for its backward pass."""
    saved: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast:
        outputs = block(*inputs)        # a reference: freed memory would be reused, not counted
    return sum(saved.values())


def extrapolate(block: nn.Module, make_inputs, tokens: int, dtype: torch.dtype) -> float:
    """Return the bytes that a block saves for make_inputs(tokens), estimated from a few tokens.

    A parabola in the number of tokens is fitted to measurements.  Its constant is left out: it is
    the weights, cast to `dtype`."""
    sizes = (32, 64, 96)
    measured = [measure_saved(block, make_inputs(size), dtype) for size in sizes]
    quadratic, linear, _ = np.polyfit(sizes, measured, 2)
    return quadratic * tokens ** 2 + linear * tokens


def block_activations(c: MMDiTConfig, T: int, dtype: torch.dtype, gpu: bool) -> float:
    """Return the bytes that one block saves for one sample of T tokens."""
    block = Block(c)
    if gpu:
        block.attention = F.scaled_dot_product_attention         # flash attention

    def make_inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        image = torch.zeros(1, tokens // 2, c.width, dtype=dtype, requires_grad=True)
        text = torch.zeros(1, tokens // 2, c.width, dtype=dtype, requires_grad=True)
        return image, text, torch.zeros(1, c.width)
    total = extrapolate(block, make_inputs, T, dtype)
    if gpu and dtype != torch.float32:
        # on a GPU autocast computes layer norms in float32: their inputs and outputs are larger
        total += 12 * c.width * T
    return total


def t5_activations(t5: T5Config, L: int, dtype: torch.dtype) -> float:
    """Return the bytes that one block of T5, with frozen weights, saves for one text."""
    block = T5Block(t5).to(dtype).requires_grad_(False)

    def make_inputs(tokens: int) -> tuple[Tensor, Tensor]:
        states = torch.zeros(1, tokens, t5.width, requires_grad=True)
        return states, torch.zeros(1, t5.heads, tokens, tokens)
    return extrapolate(block, make_inputs, L, torch.float32)


def rows_at_once(config: TrainConfig, gpus: int) -> int:
    """Return the number of rows that one forward pass holds in a GPU's memory."""
    if config.micro_batch:
        return config.micro_batch
    return -(-max(config.image_batch, config.text_batch) // gpus)


def weight_memory(config: TrainConfig, c: MMDiTConfig, gpus: int) -> dict[str, float]:
    """Return the bytes on each GPU of the trained weights, gradients and moments, by part."""
    parameters = count_weights(c)
    block = count_parameters(Block, c)
    bytes_each = getattr(torch, config.dtype).itemsize
    shards = gpus
    if config.shard == "none":
        shards = 1
    elif config.shard == "hsdp":
        shards = hsdp_shards(gpus, NODE)
    shard = parameters / shards

    in_use = parameters
    gradients = shard
    if config.shard == "zero3" and gpus > 1:
        in_use -= (c.depth - 2) * block          # only a block and the next one are gathered
    elif gpus > 1 and (config.micro_batch or STAGES[config.stage].images):
        gradients += parameters                  # unsharded between backward passes
    if bytes_each == 4 and shards == 1:
        in_use = 0                               # the float32 weights serve both purposes
    saved = c.depth * block * (2 - OPTIMIZERS[config.optimizer].moments)
    moments = 2 * parameters - saved             # two in AdamW; Muon has one in the blocks
    return {
        "weights, float32": 4 * (shard + c.position_size ** 2 * c.width),
        f"weights in use, {config.dtype}": bytes_each * in_use,
        "gradients, float32": 4 * gradients,
        "optimizer, float32": 4 * moments / shards,
        "averaged weights, float32": 4 * shard,
    }


def stack_activations(config: TrainConfig, depth: int, block: float, inputs: int) -> float:
    """Return the bytes that a stack of blocks saves.

    block, inputs: the bytes that one block saves, and those of its inputs."""
    if config.checkpoint_activations:
        return depth * inputs + block                            # one block at a time is recomputed
    return depth * block


def memory(config: TrainConfig, c: MMDiTConfig, t5: T5Config | None, vae: VAEConfig | None, N: int,
           gpus: int, gpu: bool) -> dict[str, float]:
    """Return the bytes on each GPU, by part, in the backward pass of the larger loss.

    gpu: False for a run on CPUs, where a block saves other activations."""
    dtype = getattr(torch, config.dtype)
    L = config.text_length
    rows = rows_at_once(config, gpus)
    parts = weight_memory(config, c, gpus)
    if t5:
        weights = dtype.itemsize * count_parameters(T5Encoder, t5)
        parts["T5"] = weights / gpus if config.shard_t5 else weights
    if vae:
        parts["autoencoder"] = dtype.itemsize * count_parameters(AutoencoderKL, vae)
    block = block_activations(c, N + L, dtype, gpu)
    stack = stack_activations(config, c.depth, block, 2 * c.width * (N + L))
    parts["activations"] = rows * stack
    # the largest share of masked tokens in a micro-batch: TextBatch.split spreads its times evenly
    masked = 0.5 + 0.5 / rows
    parts["logits"] = rows * L * c.vocab_size * 4 * 3 * masked
    layer = max(c.vocab_size * c.width, 6 * c.width ** 2)        # weights of the largest layer
    parts["gradients of a block, of a layer"] = rows * block + 4 * layer
    if t5 and config.stage == "mask-emb":
        block = t5_activations(t5, L, dtype)
        stack = stack_activations(config, t5.depth, block, 4 * t5.width * L)
        parts["T5's activations"] = rows * stack
    return parts


# --------------------------------------------------------------------------------------------- page

def show(config: TrainConfig) -> str:
    """Return the plan as text.  No data are opened: in stages with images, texts have images, too.

    Raises UserError for a stage that does not fit the model, or batches that do not fit the number
    of GPUs."""
    _, c, about = read_base(config.init, config.preset)
    L = config.text_length
    gpus = config.print_plan
    check_batches(config, gpus)
    stage = STAGES[config.stage]
    t5, vae = frozen_sizes(config, c, about)
    factor = vae.factor if vae else 1
    training_models.check(config, c, factor)
    N = image_tokens(config, c, factor) or c.null_tokens
    update = work(config, c, factor)
    frozen = frozen_flops(config, t5, vae) / 1e12                # TFLOP
    seconds = config.steps * (update["tflop"] + frozen) / (gpus * PEAK * MFU)

    total = count_weights(c)
    trained = total - count_frozen(stage, c)
    if t5:
        total += count_parameters(T5Encoder, t5)
    if vae:
        total += count_parameters(AutoencoderKL, vae)
    mask = f", and a [MASK] of {t5.width}" if stage.trains_mask else ""
    recomputed = ", activations recomputed" if config.checkpoint_activations else ""
    lines = [
        f"stage {config.stage} of {config.init or config.preset}, {gpus} GPU(s), "
        f"{config.shard}{recomputed}",
        f"parameters    {total / 1e6:,.1f} M, {trained / 1e6:,.1f} M of them trained{mask}",
        f"one update    {config.image_batch} images and {config.text_batch} texts of {N} + {L} "
        f"tokens: {update['tokens']:,} tokens, {rows_at_once(config, gpus)} at once on a GPU",
        f"arithmetic    {update['tflop']:,.1f} TFLOP, 3 [blocks (24 D^2 T + 4 D T^2) + ends] a "
        f"sample, D = {c.width}, T = {N + L}",
        f"              {frozen:,.1f} TFLOP of T5 and the autoencoder",
        f"the run       {config.steps:,} steps, {config.steps * update['samples'] / 1e6:,.1f} M "
        f"samples, {seconds / 86400:,.2f} days at {MFU:.0%} of {gpus} x {PEAK:g} TFLOP/s, of all "
        f"the arithmetic",
        "memory        GiB on each GPU"]
    parts = memory(config, c, t5, vae, N, gpus, config.device != "cpu")
    parts["total"] = sum(parts.values())
    for name, size in parts.items():
        if size:
            lines.append(f"    {name:34}{size / 2**30:8.2f}")
    return "\n".join(lines)
