"""The latent interface: pictures in [-1, 1] on one side, what the transformer diffuses on the other.

`AutoencoderKL` is Stable Diffusion 3's autoencoder (arXiv 2403.03206): 8 pixels a side become one latent of
16 channels.  Its shift and scale, z = (mean - 0.0609) * 1.5305, are applied here and nowhere else.  `Pixels`
is the identity behind the same two calls, for models small enough to work on pixels.

Shapes: B batch, H and W picture height and width, C channels inside, h = H/8, w = W/8.
"""

from dataclasses import dataclass
from functools import partial
from typing import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Pixels:
    """Latents are the pixels: (B, 3, H, W) in [-1, 1] both ways."""

    factor = 1      # pixels per latent, along a side
    channels = 3

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images themselves; there is no posterior to draw from, so `generator` changes nothing."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents


@dataclass
class VAEConfig:
    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of a level; each but the last halves the side
    blocks: int = 2             # residual blocks a level in the encoder; the decoder has one more
    latent: int = 16            # channels of a latent
    groups: int = 32            # of GroupNorm
    scale: float = 1.5305       # of latents, after
    shift: float = 0.0609       # the shift

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.widths) - 1)


GroupNorm = partial(nn.GroupNorm, eps=1e-6)     # as in every Stable Diffusion autoencoder; torch has 1e-5


def activate(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())   # at 1024 pixels one copy is half a gigabyte


class ResBlock(nn.Module):
    def __init__(self, inner: int, outer: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = GroupNorm(groups, outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(activate(self.norm1, x))
        return self.conv2(activate(self.norm2, y)) + self.shortcut(x)


class Attention(nn.Module):
    """One head over all positions of the smallest level."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        y = self.norm(x).flatten(2).transpose(1, 2).unsqueeze(1)                  # (B, 1, hw, C)
        y = F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        return x + self.out(y)[:, 0].transpose(1, 2).view(B, C, h, w)


class Level(nn.Module):
    """Residual blocks, then a change of size: to half ("down"), to twice ("up"), or none."""

    def __init__(self, inner: int, outer: int, blocks: int, groups: int, change: str):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(outer if i else inner, outer, groups) for i in range(blocks))
        self.change = change
        if change == "down":
            self.resample = nn.Conv2d(outer, outer, 3, stride=2)
        elif change == "up":
            self.resample = nn.Conv2d(outer, outer, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.change == "none":
            return x
        if self.change == "down":
            x = F.pad(x, (0, 1, 0, 1))                                            # right and bottom only
        else:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.resample(x)


def levels(widths: Sequence[int], blocks: int, groups: int, change: str) -> nn.Sequential:
    """Build levels of these widths; each but the last changes the size."""
    inner = [widths[0], *widths]
    changes = [change] * (len(widths) - 1) + ["none"]
    return nn.Sequential(*(Level(inner[i], width, blocks, groups, changes[i])
                           for i, width in enumerate(widths)))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        groups, width = config.groups, config.widths[-1]
        self.conv_in = nn.Conv2d(3, config.widths[0], 3, padding=1)
        self.down = levels(config.widths, config.blocks, groups, "down")
        self.mid_1 = ResBlock(width, width, groups)
        self.attention = Attention(width, groups)
        self.mid_2 = ResBlock(width, width, groups)
        self.norm = GroupNorm(groups, width)
        self.conv_out = nn.Conv2d(width, 2 * config.latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.conv_in(x))                                            # (B, C, h, w)
        x = self.mid_2(self.attention(self.mid_1(x)))
        return self.conv_out(activate(self.norm, x))                              # (B, 32, h, w)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        groups, width = config.groups, config.widths[-1]
        self.conv_in = nn.Conv2d(config.latent, width, 3, padding=1)
        self.mid_1 = ResBlock(width, width, groups)
        self.attention = Attention(width, groups)
        self.mid_2 = ResBlock(width, width, groups)
        self.up = levels(config.widths[::-1], config.blocks + 1, groups, "up")
        self.norm = GroupNorm(groups, config.widths[0])
        self.conv_out = nn.Conv2d(config.widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_2(self.attention(self.mid_1(self.conv_in(z))))               # (B, C, h, w)
        x = self.up(x)                                                            # (B, C, H, W)
        return self.conv_out(activate(self.norm, x))


class AutoencoderKL(nn.Module):
    """encode and decode, one picture at a time: a batch takes no more memory than its largest picture."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.factor = config.factor
        self.channels = config.latent
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> mean and log variance, (B, 16, h, w) each, unscaled."""
        return torch.cat([self.encoder(image) for image in images.split(1)]).chunk(2, dim=1)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1], sides multiples of 8 -> shifted and scaled latents (B, 16, h, w).

        The posterior's mean, or a draw from it with a generator (the published code draws, for captions too).
        Raises ValueError for sides that are no multiples of 8."""
        if any(side % self.factor for side in images.shape[2:]):
            raise ValueError(f"a picture of {tuple(images.shape[2:])} is not a multiple of {self.factor}")
        z, logvar = self.posterior(images)
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, device=generator.device)
            z = z + (0.5 * logvar.float().clamp(-30, 20)).exp().to(z.dtype) * noise.to(z)
        return (z - self.config.shift) * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 16, h, w) -> pictures (B, 3, H, W), not clipped."""
        z = latents / self.config.scale + self.config.shift
        return torch.cat([self.decoder(one) for one in z.split(1)])
