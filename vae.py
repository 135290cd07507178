"""The latent interface: pictures in [-1, 1] on one side, what the transformer diffuses on the other.

`Pixels` is the identity, for models small enough to work on pixels.  Stable Diffusion 3's autoencoder, behind
the same two calls, is not here yet.

Shapes: B batch, P pixels a side.
"""

import torch
from torch import Tensor


class Pixels:
    """Latents are the pixels: (B, 3, P, P) in [-1, 1] both ways."""

    factor = 1      # pixels per latent, along a side
    channels = 3

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images themselves; there is no posterior to draw from, so `generator` changes nothing."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents
