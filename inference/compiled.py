"""Make a network faster: compile its blocks; to draw on a GPU, capture its kernels in a CUDA graph.

Results then differ in rounding.  The first evaluation of each shape takes a minute.

Shapes: B batch, L tokens, E width of text states, C latent channels, h and w of latents.
"""

import torch
from torch import Tensor

from common.devices import check_compiler
from model import MMDiT


def compile_blocks(mmdit: MMDiT, dynamic: bool | None = False) -> None:
    """Compile each block, for the device that the weights are on.

    dynamic: False: once for each shape of its input; None: torch decides, as in training.  Raises
    UserError without a compiler."""
    check_compiler(next(mmdit.parameters()).device)
    # blocks are compiled for several shapes, each `need`, and once more for the last block
    torch._dynamo.config.recompile_limit = 64
    for block in mmdit.blocks:
        block.compile(dynamic=dynamic)


def fast_network(mmdit: MMDiT) -> "MMDiT | CapturedNetwork":
    """Compile the blocks, in place; on a GPU, return a CapturedNetwork, for velocities only."""
    compile_blocks(mmdit)
    if next(mmdit.parameters()).is_cuda:
        return CapturedNetwork(mmdit)
    return mmdit


class CapturedNetwork:
    """The network as one CUDA graph for each shape: one launch replays all of its kernels.

    A graph reads the weights at their address.  If they are loaded again, make a new graph."""

    def __init__(self, mmdit: MMDiT):
        self.mmdit = mmdit
        self.graphs = {}

    def __call__(self, latents: Tensor, text: Tensor, t: Tensor, need: str) -> tuple[Tensor, None]:
        """Return (the velocity (B, C, h, w), None), as `MMDiT.forward` does.  need: "velocity"."""
        assert need == "velocity"
        inputs = [latents, text, t]
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture(inputs)
        graph, static_inputs, velocity = self.graphs[shapes]
        for static, tensor in zip(static_inputs, inputs):
            static.copy_(tensor)
        graph.replay()
        return velocity.clone(), None

    def capture(self, inputs: list[Tensor]) -> tuple:
        """Return (graph, the tensors that it reads, the velocity that it writes)."""
        static_inputs = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(static_inputs[0].device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):     # compiling and lazy allocations can't be captured
                for _ in range(3):
                    self.mmdit(*static_inputs, need="velocity")
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                velocity, _ = self.mmdit(*static_inputs, need="velocity")
        return graph, static_inputs, velocity
