"""Encode images in [-1, 1] as the latents that the transformer diffuses, and decode them.

`AutoencoderKL` is Stable Diffusion 3's autoencoder (arXiv 2403.03206): 8 x 8 pixels become one
latent of 16 channels.  Its shift and scale, z = (mean - 0.0609) * 1.5305, are applied only here.
`Pixels` has the same interface and is the identity, for models small enough to work on pixels.

Shapes: B batch, H and W image height and width, C inner channels, h = H/8, w = W/8.
"""

from dataclasses import dataclass
from functools import partial
from typing import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Pixels(nn.Module):
    """The identity in place of an autoencoder: latents are the pixels, (B, 3, H, W) in [-1, 1]."""

    factor = 1      # pixels per latent, along a side
    channels = 3

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the images; there is no posterior to sample, so `generator` is not used."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents


@dataclass
class VAEConfig:
    widths: tuple[int, ...] = (128, 256, 512, 512)  # each level but the last halves the side
    blocks: int = 2             # residual blocks per level of the encoder; one more in the decoder
    latent: int = 16            # channels of a latent
    groups: int = 32            # groups of GroupNorm
    scale: float = 1.5305       # latents = (mean - shift) * scale
    shift: float = 0.0609

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.widths) - 1)


GroupNorm = partial(nn.GroupNorm, eps=1e-6)     # as in Stable Diffusion; torch's default is 1e-5


def activate(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    # in place, because a copy takes half a gigabyte at 1024 pixels
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    def __init__(self, inner: int, outer: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = GroupNorm(groups, outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(activate(self.norm1, x))
        return self.conv2(activate(self.norm2, y)) + self.shortcut(x)


class Attention(nn.Module):
    """Attention with one head over all positions of the smallest level, (B, C, h, w) both ways."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).flatten(2).transpose(1, 2).unsqueeze(1)                  # (B, 1, hw, C)
        y = F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        y = self.out(y)[:, 0].transpose(1, 2)                                     # (B, C, hw)
        return x + y.view(x.shape)


class Level(nn.Module):
    """Residual blocks, then a change of size: half ("down"), double ("up"), or none ("none")."""

    def __init__(self, inner: int, outer: int, blocks: int, groups: int, change: str):
        super().__init__()
        self.blocks = nn.Sequential(ResBlock(inner, outer, groups))
        for _ in range(blocks - 1):
            self.blocks.append(ResBlock(outer, outer, groups))
        self.change = change
        if change == "down":
            self.resample = nn.Conv2d(outer, outer, 3, stride=2)
        elif change == "up":
            self.resample = nn.Conv2d(outer, outer, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        if self.change == "down":
            return self.resample(F.pad(x, (0, 1, 0, 1)))                          # right and bottom
        if self.change == "up":
            return self.resample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


def levels(widths: Sequence[int], blocks: int, groups: int, change: str) -> nn.Sequential:
    """Build levels of these widths; each but the last changes the size."""
    stack = nn.Sequential()
    inner = widths[0]
    for width in widths[:-1]:
        stack.append(Level(inner, width, blocks, groups, change))
        inner = width
    return stack.append(Level(inner, widths[-1], blocks, groups, "none"))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        groups = config.groups
        width = config.widths[-1]
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
        groups = config.groups
        width = config.widths[-1]
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
    """Encode and decode one image at a time, so that a batch needs the memory of one image."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.factor = config.factor
        self.channels = config.latent
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> mean and log variance, (B, 16, h, w) each, unscaled."""
        moments = torch.cat([self.encoder(image) for image in images.split(1)])   # (B, 32, h, w)
        return moments.chunk(2, dim=1)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> shifted and scaled latents (B, 16, h, w).

        The latents are the posterior's mean or, with a generator, a sample of it (the published
        code samples, also for captioning).  Raises ValueError for sides that are not multiples of
        `factor`."""
        height, width = images.shape[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"an image of {height} by {width}: the sides must be multiples of "
                             f"{self.factor}")
        z, logvar = self.posterior(images)
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, device=generator.device)
            deviation = (0.5 * logvar.float().clamp(-30, 20)).exp()
            z = z + deviation.to(z.dtype) * noise.to(z)
        return (z - self.config.shift) * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, 16, h, w) -> images (B, 3, H, W), not clipped to [-1, 1]."""
        z = latents / self.config.scale + self.config.shift
        return torch.cat([self.decoder(latent) for latent in z.split(1)])
