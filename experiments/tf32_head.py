"""Simulate on a CPU how much TF32, and bfloat16, change the text head's cross-entropy.

    python -m experiments.tf32_head                  # half a minute

TF32 keeps 10 mantissa bits of both factors and adds up in float32: here the factors are rounded in
this way.  The shipped weights read 512 randomly masked captions of the emoji set.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common import cli
from dataset import emoji
from inference.parts import Parts


def to_tf32(x: Tensor) -> Tensor:
    """Round float32 to the nearest number with 10 bits of mantissa, ties to even."""
    bits = x.contiguous().view(torch.int32)
    bits = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
    return bits.view(torch.float32)


@torch.no_grad()
def main() -> None:
    cli.Parser(__doc__).parse_args()
    parts = Parts(dtype=torch.float32)
    records, images = emoji.load()
    captions = [record["caption"] for record in records[:512]]
    ids = torch.stack([parts.tokenizer.encode(text, parts.length) for text in captions])  # (B, L)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(ids.shape, generator=generator)
    masked = uniform < torch.rand(len(ids), 1, generator=generator)
    noised = ids.masked_fill(masked, parts.tokenizer.mask_id)

    inputs = []
    head = parts.mmdit.txt_out
    head.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    parts.mmdit(images[:512].float() / 127.5 - 1, parts.text(noised), torch.zeros(1), need="logits")
    states = inputs[0][masked]                                   # (n, D)
    tokens = ids[masked]                                         # (n,)

    def cross_entropy(logits: Tensor) -> Tensor:
        logits = logits.double()
        logits[:, parts.tokenizer.mask_id] = -torch.inf
        return F.cross_entropy(logits, tokens, reduction="none")
    exact = cross_entropy(states.double() @ head.weight.double().T + head.bias)
    logits_in = {
        "float32": head(states),
        "TF32": to_tf32(states) @ to_tf32(head.weight).T + head.bias,
        "bfloat16": F.linear(states.bfloat16(), head.weight.bfloat16(), head.bias.bfloat16()),
    }
    for name, logits in logits_in.items():
        difference = (cross_entropy(logits) - exact).abs()
        print(f"{name}: {difference.mean():.1e} nats a token on average, {difference.max():.1e} at "
              f"most")


if __name__ == "__main__":
    cli.run(main)
