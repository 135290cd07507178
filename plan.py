"""What a run needs, worked out before it starts: python train.py ... --print-plan GPUS.

Parameters and arithmetic follow from sizes.  What memory holds follows from what FSDP2 keeps where, and what a
block keeps for its backward pass is measured: one block of the real width runs on a few tokens.

Shapes: N image tokens, L text tokens, T = N + L, D width, E width of text states, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import build
import checkpoint
from model import Block, MMDiT, MMDiTConfig, TokenEmbedding
from stages import STAGES, TrainConfig, start
from t5 import T5Block, T5Config, T5Encoder
from vae import AutoencoderKL, VAEConfig

NODE = 8                # GPUs of a machine, within which hsdp shards


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

    need: "velocity" or "logits": the last block's other stream ends with its keys and values."""
    D, T, patch = c.width, N + L, c.patch ** 2 * c.channels
    rows = N if need == "velocity" else L
    forward = (c.depth - 1) * (24 * D * D * T + 4 * D * T * T)
    forward += 6 * D * D * T + 4 * D * rows * T + 18 * D * D * rows               # the last block
    forward += 24 * D * D * c.depth + 2 * 256 * D + 2 * D * D + 2 * L * c.text_width * D
    if need == "velocity":
        forward += 4 * N * D * patch + 4 * D * D
    else:
        forward += 2 * L * D * c.vocab_size + (2 * N * D * patch if N != c.null_tokens else 0)
    return 3 * forward


def kept_bytes(block: nn.Module, *inputs: Tensor, kernel: SDPBackend, dtype: torch.dtype) -> int:
    """What a block keeps for its backward pass; a weight that is cast counts too, and drops out of a slope."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), sdpa_kernel(kernel), autocast:
        held = block(*inputs)                                    # alive until counted: its memory isn't reused
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
    kernel = SDPBackend.FLASH_ATTENTION if gpu else SDPBackend.MATH
    measure = lambda size: kept_bytes(block, x(size // 2), x(size // 2), torch.zeros(1, c.width), kernel=kernel,
                                      dtype=dtype)
    return activation_bytes(measure, T) + 12 * c.width * T * (gpu and dtype != torch.float32)


def t5_activations(t5: T5Config, L: int, dtype: torch.dtype) -> float:
    """Bytes of one text in one block of T5, whose weights are frozen."""
    block = T5Block(t5).to(dtype).requires_grad_(False)
    measure = lambda size: kept_bytes(block, torch.zeros(1, size, t5.width, requires_grad=True),
                                      torch.zeros(1, t5.heads, size, size), kernel=SDPBackend.MATH,
                                      dtype=torch.float32)
    return activation_bytes(measure, L)


def frozen_sizes(config: TrainConfig, own: bool, pixels: bool) -> tuple[T5Config | None, VAEConfig | None]:
    """Of T5 and the autoencoder that are named; T5 v1.1 XXL's and SD3's where none is."""
    t5, vae = None if own else T5Config(), None if pixels else VAEConfig()
    if t5 and (path := build.place(config, "t5")):
        t5 = checkpoint.t5_sizes(path)
    if vae and (path := build.place(config, "vae")):
        vae = checkpoint.vae_sizes(path)
    return t5, vae


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


def memory(config: TrainConfig, c: MMDiTConfig, t5: T5Config | None, vae: VAEConfig | None, N: int, gpus: int,
           gpu: bool) -> dict[str, float]:
    """Bytes on each of so many GPUs, by part; the last are those of the loss that needs most."""
    dtype, L, own = getattr(torch, config.dtype), config.text_length, c.text_length > 0
    P = values(lambda: MMDiT(c)) + own * values(lambda: TokenEmbedding(c.vocab_size, c.text_length, c.text_width))
    spread = {"none": 1, "hsdp": min(gpus, NODE)}.get(config.shard, gpus)
    half, block = dtype.itemsize, values(lambda: Block(c))
    whole = 2 * block + P - c.depth * block if config.shard == "zero3" and gpus > 1 else P
    matrices = config.optimizer == "muon" and c.depth * block
    backwards = gpus > 1 and (STAGES[config.stage].losses != "text" or config.micro_batch > 0)
    rows = config.micro_batch or -(-max(config.image_batch, config.text_batch) // gpus)
    one = block_activations(c, N + L, dtype, gpu)
    kept = c.depth * 2 * c.width * (N + L) + one if config.checkpoint_activations else c.depth * one
    share = 0.5 + 0.5 / rows                                     # of tokens that are masked, in a small batch
    parts = {
        "weights, float32": 4 * (P / spread + c.position_size ** 2 * c.width),
        f"weights in use, {config.dtype}": half * whole if half == 2 or spread > 1 else 0,
        "gradients, float32": 4 * (P / spread + (P if backwards and config.shard != "zero3" else 0)),
        "optimizer, float32": (8 * P - 4 * matrices) / spread,
        "averaged weights, float32": 4 * P / spread,
        "T5": half * values(lambda: T5Encoder(t5)) / (gpus if config.shard_t5 else 1) if t5 else 0,
        "autoencoder": half * values(lambda: AutoencoderKL(vae)) if vae else 0,
        "activations": rows * kept,
        "logits": rows * L * c.vocab_size * 4 * (1 + 2 * share),
        "a block's and a layer's gradients": rows * one + 4 * max(c.vocab_size * c.width, 6 * c.width ** 2),
    }
    if t5 and config.stage == "mask-emb":
        one = t5_activations(t5, L, dtype)
        parts["T5's activations"] = rows * (t5.depth * 4 * t5.width * L + one if config.checkpoint_activations
                                            else t5.depth * one)
    return parts


def show(config: TrainConfig) -> str:
    """The plan as a page of text.  Raises UserError for a stage that the model can't have."""
    _, c, _ = start(config.init, config.preset)
    text = STAGES[config.stage].losses == "text"
    t5, vae = frozen_sizes(config, c.text_length > 0, c.channels == 3 or text)
    build.check(config, c, vae.factor if vae else 1)
    gpus, gpu = config.print_plan, config.device != "cpu"
    N = c.null_tokens if text else (config.pixels // (c.patch * (vae.factor if vae else 1))) ** 2
    learns, frozen = arithmetic(config, c, t5, vae, N)
    parts = memory(config, c, t5, vae, N, gpus, gpu)
    P = values(lambda: MMDiT(c)) + (values(lambda: TokenEmbedding(c.vocab_size, c.text_length, c.text_width))
                                    if c.text_length else 0)
    still = 0 if text else c.null_tokens * c.width
    others = sum(values(lambda: make(sizes)) for make, sizes in ((T5Encoder, t5), (AutoencoderKL, vae)) if sizes)
    samples = config.image_batch + config.text_batch
    at_once = config.micro_batch or -(-max(config.image_batch, config.text_batch) // gpus)
    days = samples * config.steps / config.rate if config.rate else (
        config.steps * (learns + frozen) / (gpus * config.peak * 1e12 * config.mfu))
    said = f"{config.rate:g} samples/s" if config.rate else (
        f"{config.mfu:.0%} of {gpus} x {config.peak:g} TFLOP/s, T5 and autoencoder included")
    recomputed = ", activations computed again" if config.checkpoint_activations else ""
    lines = [
        f"stage {config.stage} of {config.init or config.preset}, {gpus} GPU(s), {config.shard}{recomputed}",
        f"parameters      {(P + others) / 1e6:,.1f} M, of which {(P - still) / 1e6:,.1f} M learn"
        + (f", and a [MASK] of {t5.width}" if "[MASK]" in STAGES[config.stage].learns and t5 else ""),
        f"one update      {config.image_batch} pictures and {config.text_batch} texts, {N} + {config.text_length} "
        f"tokens each: {samples * (N + config.text_length):,} tokens, {at_once} samples at once on a GPU",
        f"arithmetic      {learns / 1e12:,.1f} TFLOP of 3 [ blocks (24 D^2 T + 4 D T^2) + ends ] a sample, T = "
        f"{N + config.text_length}, D = {c.width}; {frozen / 1e12:,.1f} of T5 and the autoencoder",
        "memory of a GPU, GiB"]
    lines += [f"    {name:34}{size / 2**30:8.2f}" for name, size in parts.items() if size]
    lines += [f"    {'in all':34}{sum(parts.values()) / 2**30:8.2f}",
              f"the run         {config.steps:,} steps, {config.steps * samples / 1e6:,.1f} M samples, "
              f"{days / 86400:,.2f} days at {said}"]
    return "\n".join(lines)
