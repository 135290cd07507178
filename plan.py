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

import build
import checkpoint
from model import Block, MMDiT, MMDiTConfig, TokenEmbedding
from stages import STAGES, TrainConfig, start
from t5 import T5Block, T5Config, T5Encoder
from vae import AutoencoderKL, VAEConfig

NODE = 8                # GPUs of a machine, within which hsdp shards
MFU, PEAK = 0.4, 989.0  # to count days: the share reached of an H100's TFLOP/s in bfloat16
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}           # TFLOP/s in bfloat16, dense, by a GPU's name


def values(make) -> int:
    """Parameters of a module, built without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


def forward_flops(make, *shapes) -> int:
    """Multiplications and additions of a module's forward pass, counted as it runs without memory."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        make()(*shapes)
    return counter.get_total_flops()


def sample_flops(c: MMDiTConfig, N: int, L: int, need: str) -> int:
    """Of one sample, forward and backward, through the transformer; a backward is two forwards.

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


def kept_bytes(block: nn.Module, *inputs: Tensor, dtype: torch.dtype) -> int:
    """What a block keeps for its backward pass; casts of weights count too, and drop out of a slope."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast:
        held = block(*inputs)                                    # alive: its memory isn't reused
    del held
    return sum(kept.values())


def activation_bytes(measure, tokens: int, sizes: tuple[int, ...] = (32, 64, 96)) -> float:
    """Of a block at so many tokens: a parabola through three small sizes, less what no tokens keep."""
    a, b, _ = np.polyfit(sizes, [measure(size) for size in sizes], 2)
    return a * tokens ** 2 + b * tokens


def block_activations(c: MMDiTConfig, T: int, dtype: torch.dtype, gpu: bool) -> float:
    """Bytes of one sample in one block.  A GPU has flash attention, and its autocast keeps layer norms in
    float32: input and output of both, 12 D bytes a token more than on a CPU."""
    block, x = Block(c), lambda rows: torch.zeros(1, rows, c.width, dtype=dtype, requires_grad=True)
    block.attention = F.scaled_dot_product_attention if gpu else block.attention
    measure = lambda size: kept_bytes(block, x(size // 2), x(size // 2), torch.zeros(1, c.width), dtype=dtype)
    return activation_bytes(measure, T) + 12 * c.width * T * (gpu and dtype != torch.float32)


def t5_activations(t5: T5Config, L: int, dtype: torch.dtype) -> float:
    """Bytes of one text in one block of T5, whose weights are frozen."""
    block = T5Block(t5).to(dtype).requires_grad_(False)
    measure = lambda size: kept_bytes(block, torch.zeros(1, size, t5.width, requires_grad=True),
                                      torch.zeros(1, t5.heads, size, size), dtype=torch.float32)
    return activation_bytes(measure, L)


def frozen_sizes(config: TrainConfig, c: MMDiTConfig,
                 about: dict) -> tuple[T5Config | None, VAEConfig | None]:
    """Of T5 and the autoencoder that a run has: of those that are named, or T5 v1.1 XXL's and SD3's."""
    t5, vae = None if c.text_length else T5Config(), None if c.channels == 3 else VAEConfig()
    where = build.places(config, c, about)
    if "t5" in where:
        t5 = checkpoint.t5_sizes(where["t5"])
    if "vae" in where:
        vae = checkpoint.vae_sizes(where["vae"])
    return t5, None if STAGES[config.stage].losses == "text" else vae


def image_tokens(config: TrainConfig, c: MMDiTConfig, factor: int) -> int:
    """N of a picture, or of the null image in its place.  factor: pixels per latent, along a side."""
    if STAGES[config.stage].losses == "text":
        return c.null_tokens
    return (config.pixels // (c.patch * factor)) ** 2


def arithmetic(config: TrainConfig, c: MMDiTConfig, t5: T5Config | None, vae: VAEConfig | None,
               N: int) -> tuple[float, float]:
    """FLOPs of one update: (of what learns, forward and backward; of T5 and the autoencoder)."""
    L = config.text_length
    learns = config.text_batch * sample_flops(c, N, L, "logits")
    learns += config.image_batch * sample_flops(c, N, L, "velocity")
    frozen = 0.0
    if t5 is not None:
        meta = dict(device="meta")
        encode = t5.depth * forward_flops(lambda: T5Block(t5), torch.empty(1, L, t5.width, **meta),
                                          torch.empty(1, t5.heads, L, L, **meta))
        backward = 2 if config.stage == "mask-emb" else 1        # of activations alone
        frozen += encode * (backward * config.text_batch + (1 - config.text_dropout) * config.image_batch)
    if vae is not None:
        picture = torch.empty(1, 3, config.pixels, config.pixels, device="meta")
        frozen += forward_flops(lambda: AutoencoderKL(vae).encoder, picture) * (
            config.image_batch + config.text_batch)
    return learns, frozen


def peak(device: torch.device, dtype: str) -> float:
    """Of dense products in TFLOP/s, 0 where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and dtype == "bfloat16" else ""
    return next((value for key, value in PEAKS.items() if key in name), 0.0)


def work(config: TrainConfig, c: MMDiTConfig, factor: int) -> dict[str, float]:
    """What an update computes: samples, tokens of pictures and texts, TFLOP of what learns."""
    samples, N = config.image_batch + config.text_batch, image_tokens(config, c, factor)
    learns, _ = arithmetic(config, c, None, None, N)
    return dict(samples=samples, tokens=samples * (N + config.text_length), tflop=learns / 1e12)


def learning(c: MMDiTConfig) -> int:
    """Parameters of what is trained."""
    own = values(lambda: TokenEmbedding(c.vocab_size, c.text_length, c.text_width)) if c.text_length else 0
    return values(lambda: MMDiT(c)) + own


def at_once(config: TrainConfig, gpus: int) -> int:
    """Rows of a batch that a GPU has in memory together."""
    return config.micro_batch or -(-max(config.image_batch, config.text_batch) // gpus)


def memory(config: TrainConfig, c: MMDiTConfig, t5: T5Config | None, vae: VAEConfig | None, N: int, gpus: int,
           gpu: bool) -> dict[str, float]:
    """Bytes on each of so many GPUs, by part, while the loss that needs most is differentiated."""
    dtype, T, rows = getattr(torch, config.dtype), N + config.text_length, at_once(config, gpus)
    P = learning(c)
    spread = {"none": 1, "hsdp": min(gpus, NODE)}.get(config.shard, gpus)
    zero3 = config.shard == "zero3" and gpus > 1
    half, block = dtype.itemsize, values(lambda: Block(c))
    whole = P - (c.depth - 2) * block if zero3 else P            # of zero3 a block, and the next
    several = STAGES[config.stage].losses != "text" or config.micro_batch > 0   # gradients stay whole between
    matrices = c.depth * block if config.optimizer == "muon" else 0
    one = block_activations(c, T, dtype, gpu)
    kept = c.depth * 2 * c.width * T + one if config.checkpoint_activations else c.depth * one
    # the largest share of masked tokens in a micro-batch: train.micro_batches spreads its times evenly
    masked = 0.5 + 0.5 / rows
    parts = {
        "weights, float32": 4 * (P / spread + c.position_size ** 2 * c.width),
        f"weights in use, {config.dtype}": half * whole if half == 2 or spread > 1 else 0,
        "gradients, float32": 4 * (P / spread + (P if several and gpus > 1 and not zero3 else 0)),
        "optimizer, float32": (8 * P - 4 * matrices) / spread,
        "averaged weights, float32": 4 * P / spread,
        "T5": half * values(lambda: T5Encoder(t5)) / (gpus if config.shard_t5 else 1) if t5 else 0,
        "autoencoder": half * values(lambda: AutoencoderKL(vae)) if vae else 0,
        "activations": rows * kept,
        "logits": rows * config.text_length * c.vocab_size * 4 * 3 * masked,
        "gradients of a block, of a layer": rows * one + 4 * max(c.vocab_size * c.width, 6 * c.width ** 2),
    }
    if t5 and config.stage == "mask-emb":
        one, inputs = t5_activations(t5, config.text_length, dtype), 4 * t5.width * config.text_length
        parts["T5's activations"] = rows * (
            t5.depth * inputs + one if config.checkpoint_activations else t5.depth * one)
    return parts


def show(config: TrainConfig) -> str:
    """The plan as a page of text.  Raises UserError for a stage that the model can't have."""
    _, c, about = start(config.init, config.preset)
    row, L, gpus = STAGES[config.stage], config.text_length, config.print_plan
    t5, vae = frozen_sizes(config, c, about)
    build.check(config, c, vae.factor if vae else 1)
    N = image_tokens(config, c, vae.factor if vae else 1)
    learns, frozen = arithmetic(config, c, t5, vae, N)
    parts = memory(config, c, t5, vae, N, gpus, config.device != "cpu")
    P, samples = learning(c), config.image_batch + config.text_batch
    others = sum(values(lambda: make(size)) for make, size in ((T5Encoder, t5), (AutoencoderKL, vae)) if size)
    still = 0 if "null image" in row.learns else c.null_tokens * c.width
    mask = f", and a [MASK] of {t5.width}" if t5 and "[MASK]" in row.learns else ""
    seconds = config.steps * (learns + frozen) / (gpus * PEAK * 1e12 * MFU)
    pace = f"{MFU:.0%} of {gpus} x {PEAK:g} TFLOP/s, of all the arithmetic"
    again = ", activations computed again" if config.checkpoint_activations else ""
    lines = [
        f"stage {config.stage} of {config.init or config.preset}, {gpus} GPU(s), {config.shard}{again}",
        f"parameters    {(P + others) / 1e6:,.1f} M, of which {(P - still) / 1e6:,.1f} M learn{mask}",
        f"one update    {config.image_batch} pictures and {config.text_batch} texts of {N} + {L} tokens: "
        f"{samples * (N + L):,} tokens, {at_once(config, gpus)} at once on a GPU",
        f"arithmetic    {learns / 1e12:,.1f} TFLOP, 3 [blocks (24 D^2 T + 4 D T^2) + ends] a sample, D = "
        f"{c.width}, T = {N + L}",
        f"              {frozen / 1e12:,.1f} TFLOP of T5 and the autoencoder",
        f"the run       {config.steps:,} steps, {config.steps * samples / 1e6:,.1f} M samples, "
        f"{seconds / 86400:,.2f} days at {pace}",
        "memory        GiB on each GPU"]
    lines += [f"    {name:34}{size / 2**30:8.2f}" for name, size in parts.items() if size]
    return "\n".join(lines + [f"    {'in all':34}{sum(parts.values()) / 2**30:8.2f}"])
