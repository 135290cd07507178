"""A network that draws faster: its blocks compiled, and on a GPU its kernels in a CUDA graph.

Results then differ in rounding.  The first evaluation of each shape takes a minute.

Shapes: B batch, L tokens, E width of text states, C latent channels, h and w of latents.
"""

import torch
from torch import Tensor

from model import MMDiT


def compile_blocks(mmdit: MMDiT) -> None:
    """Compile each block, for each shape that it meets."""
    torch._dynamo.config.recompile_limit = 64                    # the last block, guided or not
    for block in mmdit.blocks:
        block.compile(dynamic=False)


def fast_network(mmdit: MMDiT) -> "MMDiT | CapturedNetwork":
    """Return the network with compiled blocks, for `need="velocity"`."""
    compile_blocks(mmdit)
    if next(mmdit.parameters()).is_cuda:
        return CapturedNetwork(mmdit)
    return mmdit


class CapturedNetwork:
    """The network as one CUDA graph for each shape: its kernels are launched once, not each by one.

    A graph belongs to the weights in memory: weights that are loaded again need a new one."""

    def __init__(self, mmdit: MMDiT):
        self.mmdit = mmdit
        self.graphs = {}

    def __call__(self, latents: Tensor, text: Tensor, t: Tensor, need: str) -> tuple[Tensor, None]:
        """Return (the velocity (B, C, h, w), None), as `MMDiT.forward` does."""
        inputs = [latents, text, t]
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture(inputs, need)
        graph, static_inputs, velocity = self.graphs[shapes]
        for static, tensor in zip(static_inputs, inputs):
            static.copy_(tensor)
        graph.replay()
        return velocity.clone(), None

    def capture(self, inputs: list[Tensor], need: str) -> tuple:
        """Return (graph, the tensors that it reads, the velocity that it writes)."""
        static_inputs = [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):         # compiles, and allocates what is allocated once
            for _ in range(3):
                self.mmdit(*static_inputs, need=need)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            velocity, _ = self.mmdit(*static_inputs, need=need)
        return graph, static_inputs, velocity
