"""What a run needs, worked out before it starts: python train.py ... --print-plan GPUS.

Parameters and arithmetic follow from sizes, memory from what FSDP2 keeps where; what a block keeps for its
backward pass is measured: one block of the real width runs on a few tokens.

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
from training.config import STAGES, TrainConfig, start

NODE = 8                # GPUs of a machine, within which hsdp shards
MFU, PEAK = 0.4, 989.0  # to count days: the share reached of an H100's TFLOP/s in bfloat16
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}           # TFLOP/s in bfloat16, dense, by a GPU's name


def values(build_module, *sizes) -> int:
    """Count the parameters of a module, built without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_module(*sizes).parameters())


def forward_flops(module: nn.Module, *inputs: Tensor) -> int:
    """Count the multiplications and additions of a forward pass on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


def sample_flops(c: MMDiTConfig, N: int, L: int, need: str) -> int:
    """Count the FLOPs of one sample, forward and backward, in the transformer; a backward is two forwards.

        3 [ blocks (24 D^2 T + 4 D T^2) + 24 D^2 blocks + what goes in and out ]

    need: "velocity" or "logits": the last block's other stream ends with its keys and values, and the text
    head is computed at masked tokens, half of them on average."""
    D, T, patch = c.width, N + L, c.patch ** 2 * c.channels
    rows = N if need == "velocity" else L
    forward = (c.depth - 1) * (24 * D * D * T + 4 * D * T * T)
    forward += 6 * D * D * T + 4 * D * rows * T + 18 * D * D * rows               # the last block
    forward += 24 * D * D * c.depth + 2 * 256 * D + 2 * D * D + 2 * L * c.text_width * D
    if need == "velocity":
        forward += 4 * N * D * patch + 4 * D * D
    else:
        forward += L * D * c.vocab_size + (2 * N * D * patch if N != c.null_tokens else 0)
    return 3 * forward


def activation_bytes(block: nn.Module, inputs, tokens: int, dtype: torch.dtype) -> float:
    """Return the bytes that a block keeps for its backward pass, with inputs(tokens).

    Three small sizes are measured.  The constant of the parabola through them is left out: these are the
    casts of weights."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    sizes, measured = (32, 64, 96), []
    for size in sizes:
        kept.clear()
        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast:
            result = block(*inputs(size))                        # alive: its memory isn't reused
        measured.append(sum(kept.values()))
        del result
    a, b, _ = np.polyfit(sizes, measured, 2)
    return a * tokens ** 2 + b * tokens


def block_activations(c: MMDiTConfig, T: int, dtype: torch.dtype, gpu: bool) -> float:
    """Return the bytes of one sample in one block.  A GPU has flash attention, and its autocast keeps layer
    norms in float32: input and output of both, 12 D bytes a token more than on a CPU."""
    block = Block(c)
    if gpu:
        block.attention = F.scaled_dot_product_attention

    def inputs(tokens: int):
        streams = torch.zeros(2, 1, tokens // 2, c.width, dtype=dtype)
        image, text = (stream.clone().requires_grad_() for stream in streams)
        return image, text, torch.zeros(1, c.width)
    total = activation_bytes(block, inputs, T, dtype)
    if gpu and dtype != torch.float32:
        total += 12 * c.width * T
    return total


def t5_activations(t5: T5Config, L: int, dtype: torch.dtype) -> float:
    """Return the bytes of one text in one block of T5, with frozen weights."""
    block = T5Block(t5).to(dtype).requires_grad_(False)

    def inputs(tokens: int):
        states = torch.zeros(1, tokens, t5.width, requires_grad=True)
        return states, torch.zeros(1, t5.heads, tokens, tokens)
    return activation_bytes(block, inputs, L, torch.float32)


def frozen_sizes(config: TrainConfig, c: MMDiTConfig,
                 about: dict) -> tuple[T5Config | None, VAEConfig | None]:
    """Return the sizes of a run's T5 and autoencoder: of those that are named, or T5 v1.1 XXL's and SD3's."""
    t5 = vae = None
    where = training_models.places(config, c, about)
    if not c.text_length:
        t5 = checkpoint.t5_sizes(where["t5"]) if "t5" in where else T5Config()
    if c.channels != 3 and STAGES[config.stage].losses != "text":
        vae = checkpoint.vae_sizes(where["vae"]) if "vae" in where else VAEConfig()
    return t5, vae


def image_tokens(config: TrainConfig, c: MMDiTConfig, factor: int) -> int:
    """Return N of an image, or of the null image in its place.  factor: pixels per latent, along a side."""
    if STAGES[config.stage].losses == "text":
        return c.null_tokens
    return (config.pixels // (c.patch * factor)) ** 2


def trained_flops(config: TrainConfig, c: MMDiTConfig, N: int) -> int:
    """Count the FLOPs of one update in what is trained, forward and backward."""
    L = config.text_length
    return (config.text_batch * sample_flops(c, N, L, "logits")
            + config.image_batch * sample_flops(c, N, L, "velocity"))


def frozen_flops(config: TrainConfig, t5: T5Config | None, vae: VAEConfig | None) -> float:
    """Count the FLOPs of one update in T5 and the autoencoder."""
    total, L = 0.0, config.text_length
    with torch.device("meta"):
        if t5:
            texts = (1 - config.text_dropout) * config.image_batch + config.text_batch
            if config.stage == "mask-emb":
                texts += config.text_batch                       # backward through activations only
            inputs = torch.empty(1, L, t5.width), torch.empty(1, t5.heads, L, L)
            total += texts * t5.depth * forward_flops(T5Block(t5), *inputs)
        if vae:
            image = torch.empty(1, 3, config.pixels, config.pixels)
            images = config.image_batch + config.text_batch
            total += images * forward_flops(AutoencoderKL(vae).encoder, image)
    return total


def peak(device: torch.device, dtype: str) -> float:
    """Return a GPU's peak of dense products in TFLOP/s, 0 where it is not known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((value for key, value in PEAKS.items() if key in name), 0.0)


def work(config: TrainConfig, c: MMDiTConfig, factor: int) -> dict[str, float]:
    """Count an update's samples, tokens of images and texts, and TFLOP of what is trained."""
    samples, N = config.image_batch + config.text_batch, image_tokens(config, c, factor)
    return dict(samples=samples, tokens=samples * (N + config.text_length),
                tflop=trained_flops(config, c, N) / 1e12)


def trained_values(c: MMDiTConfig) -> int:
    """Count the parameters of what is trained."""
    count = values(MMDiT, c)
    if c.text_length:
        count += values(TokenEmbedding, c.vocab_size, c.text_length, c.text_width)
    return count


def at_once(config: TrainConfig, gpus: int) -> int:
    """Return the rows of a batch that a GPU has in memory together."""
    return config.micro_batch or -(-max(config.image_batch, config.text_batch) // gpus)


def memory(config: TrainConfig, c: MMDiTConfig, t5: T5Config | None, vae: VAEConfig | None, N: int, gpus: int,
           gpu: bool) -> dict[str, float]:
    """Return the bytes on each of so many GPUs, by part, in the backward pass of the largest loss."""
    dtype, stage, rows = getattr(torch, config.dtype), STAGES[config.stage], at_once(config, gpus)
    half, P, block = dtype.itemsize, trained_values(c), values(Block, c)
    shards = {"none": 1, "hsdp": min(gpus, NODE)}.get(config.shard, gpus)
    whole, in_use, gradients = P, 0, P / shards
    if config.shard == "zero3" and gpus > 1:
        whole -= (c.depth - 2) * block                           # of zero3 a block, and the next
    elif gpus > 1 and (stage.losses != "text" or config.micro_batch):
        gradients += P                                           # they stay whole between several losses
    if half == 2 or shards > 1:
        in_use = half * whole
    moments = 2 * P
    if config.optimizer == "muon":
        moments -= c.depth * block                               # a matrix has one
    one = block_activations(c, N + config.text_length, dtype, gpu)
    # the largest share of masked tokens in a micro-batch: train.micro_batches spreads its times evenly
    masked = 0.5 + 0.5 / rows

    def kept(depth: int, one: float, inputs: int) -> float:
        return rows * (depth * inputs + one if config.checkpoint_activations else depth * one)
    parts = {
        "weights, float32": 4 * (P / shards + c.position_size ** 2 * c.width),
        f"weights in use, {config.dtype}": in_use,
        "gradients, float32": 4 * gradients,
        "optimizer, float32": 4 * moments / shards,
        "averaged weights, float32": 4 * P / shards,
        "activations": kept(c.depth, one, 2 * c.width * (N + config.text_length)),
        "logits": rows * config.text_length * c.vocab_size * 4 * 3 * masked,
        "gradients of a block, of a layer": rows * one + 4 * max(c.vocab_size * c.width, 6 * c.width ** 2),
    }
    if t5:
        parts["T5"] = half * values(T5Encoder, t5) / (gpus if config.shard_t5 else 1)
    if t5 and config.stage == "mask-emb":
        one = t5_activations(t5, config.text_length, dtype)
        parts["T5's activations"] = kept(t5.depth, one, 4 * t5.width * config.text_length)
    if vae:
        parts["autoencoder"] = half * values(AutoencoderKL, vae)
    return parts


def show(config: TrainConfig) -> str:
    """Return the plan as a page of text.  Raises UserError for a stage that the model can't have."""
    _, c, about = start(config.init, config.preset)
    L, gpus = config.text_length, config.print_plan
    t5, vae = frozen_sizes(config, c, about)
    factor = vae.factor if vae else 1
    training_models.check(config, c, factor)
    N, P = image_tokens(config, c, factor), trained_values(c)
    samples = config.image_batch + config.text_batch
    trained, frozen = trained_flops(config, c, N), frozen_flops(config, t5, vae)
    parts = memory(config, c, t5, vae, N, gpus, config.device != "cpu")
    total, mask = P, ""
    if t5:
        total += values(T5Encoder, t5)
    if vae:
        total += values(AutoencoderKL, vae)
    if "null image" not in STAGES[config.stage].learns:
        P -= c.null_tokens * c.width
    if "[MASK]" in STAGES[config.stage].learns and t5:
        mask = f", and a [MASK] of {t5.width}"
    days = config.steps * (trained + frozen) / (gpus * PEAK * 1e12 * MFU) / 86400
    again = ", activations computed again" if config.checkpoint_activations else ""
    lines = [
        f"stage {config.stage} of {config.init or config.preset}, {gpus} GPU(s), {config.shard}{again}",
        f"parameters    {total / 1e6:,.1f} M, of which {P / 1e6:,.1f} M learn{mask}",
        f"one update    {config.image_batch} pictures and {config.text_batch} texts of {N} + {L} tokens: "
        f"{samples * (N + L):,} tokens, {at_once(config, gpus)} at once on a GPU",
        f"arithmetic    {trained / 1e12:,.1f} TFLOP, 3 [blocks (24 D^2 T + 4 D T^2) + ends] a sample, D = "
        f"{c.width}, T = {N + L}",
        f"              {frozen / 1e12:,.1f} TFLOP of T5 and the autoencoder",
        f"the run       {config.steps:,} steps, {config.steps * samples / 1e6:,.1f} M samples, "
        f"{days:,.2f} days at {MFU:.0%} of {gpus} x {PEAK:g} TFLOP/s, of all the arithmetic",
        "memory        GiB on each GPU"]
    parts["in all"] = sum(parts.values())
    lines += [f"    {name:34}{size / 2**30:8.2f}" for name, size in parts.items() if size]
    return "\n".join(lines)
