"""The InceptionV3 of FID (arXiv 1706.08500), up to its 2048 pooled features.

    network = load(Path("pt_inception-2015-12-05-6726825d.pth"))
    network(prepare(image)[None])                                # (1, 2048)

That file has TensorFlow's weights of 2015, ported by github.com/mseitzer/pytorch-fid.  Parameter
names are the file's, which are torchvision's.  Torchvision's own weights differ: scores from them
can't be compared with published ones.

Shapes: B batch.
"""

import math
import re
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from checkpoint import build
from common.cli import require
from dataset.images import to_tensor
from pretrained.safetensors_io import finite, read_any

FILE = "pt_inception-2015-12-05-6726825d.pth"
SIDE = 299              # pixels
POOLS = dict(           # as in TensorFlow, the average does not count the padding
    average=partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
    max=partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
    halve=partial(F.max_pool2d, kernel_size=3, stride=2))


# The convolutions of each kind of block: [channels, height, width, stride]; the last three are 1
# by default.  branch5x5_2 reads branch5x5_1, 2a and 2b both read 1, branch_pool reads the pooled
# input, and all others read the block's input.  Outputs that no convolution reads are concatenated.
DOUBLE = dict(branch3x3dbl_1=[64], branch3x3dbl_2=[96, 3, 3])


def A(pooled: int) -> dict:
    return dict(branch1x1=[64], branch5x5_1=[48], branch5x5_2=[64, 5, 5], **DOUBLE,
                branch3x3dbl_3=[96, 3, 3], branch_pool=[pooled])


B = dict(branch3x3=[384, 3, 3, 2], **DOUBLE, branch3x3dbl_3=[96, 3, 3, 2])


def C(inner: int) -> dict:
    single = dict(branch7x7_1=[inner], branch7x7_2=[inner, 1, 7], branch7x7_3=[192, 7, 1])
    double = dict(branch7x7dbl_1=[inner], branch7x7dbl_2=[inner, 7, 1],
                  branch7x7dbl_3=[inner, 1, 7], branch7x7dbl_4=[inner, 7, 1],
                  branch7x7dbl_5=[192, 1, 7])
    return dict(branch1x1=[192], **single, **double, branch_pool=[192])


D = dict(branch3x3_1=[192], branch3x3_2=[320, 3, 3, 2],
         branch7x7x3_1=[192], branch7x7x3_2=[192, 1, 7], branch7x7x3_3=[192, 7, 1],
         branch7x7x3_4=[192, 3, 3, 2])
E = dict(branch1x1=[320],
         branch3x3_1=[384], branch3x3_2a=[384, 1, 3], branch3x3_2b=[384, 3, 1],
         branch3x3dbl_1=[448], branch3x3dbl_2=[384, 3, 3],
         branch3x3dbl_3a=[384, 1, 3], branch3x3dbl_3b=[384, 3, 1], branch_pool=[192])
BLOCKS = dict(Mixed_5b=A(32), Mixed_5c=A(64), Mixed_5d=A(64),
              Mixed_6a=B, Mixed_6b=C(128), Mixed_6c=C(160), Mixed_6d=C(160), Mixed_6e=C(192),
              Mixed_7a=D, Mixed_7b=E, Mixed_7c=E)
# blocks with another pool than the average; the maximum in the last block is special to FID
POOL_OF = dict(Mixed_6a="halve", Mixed_7a="halve", Mixed_7c="max")


class Conv(nn.Module):
    """A convolution, a batch norm and a ReLU.  The image keeps its size unless the stride is 2 or
    `pad` is False."""

    def __init__(self, inputs: int, channels: int, height: int = 1, width: int = 1, stride: int = 1,
                 pad: bool = True):
        super().__init__()
        padding = (height // 2, width // 2) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, channels, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Branches that read one input; their outputs are concatenated.  table: a value of BLOCKS."""

    def __init__(self, width: int, table: dict, pool: str):
        super().__init__()
        self.pool = POOLS[pool]
        self.inputs = {}                                         # convolution -> what it reads
        channels = dict(x=width, pooled=width)
        for name, shape in table.items():
            source = "pooled" if name == "branch_pool" else "x"
            if step := re.fullmatch(r"(\w+_)([2-9])[ab]?", name):
                source = f"{step[1]}{int(step[2]) - 1}"
            self.add_module(name, Conv(channels[source], *shape))
            self.inputs[name] = source
            channels[name] = shape[0]
        self.ends = [name for name in [*table, "pooled"] if name not in self.inputs.values()]
        self.width = sum(channels[name] for name in self.ends)

    def forward(self, x: Tensor) -> Tensor:
        outputs = dict(x=x, pooled=self.pool(x))
        for name, source in self.inputs.items():
            outputs[name] = self.get_submodule(name)(outputs[source])
        return torch.cat([outputs[name] for name in self.ends], 1)


class Inception(nn.Module):
    """Map images (B, 3, 299, 299) in [-1, 1] to features (B, 2048) float32, the last block's mean
    over positions."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 3, pad=False)
        width = 192
        for name, table in BLOCKS.items():
            block = Block(width, table, POOL_OF.get(name, "average"))
            self.add_module(name, block)
            width = block.width
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)         # 1.4 times as fast on two cores
        x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))                    # (B, 32, 147, 147)
        x = POOLS["halve"](self.Conv2d_2b_3x3(x))                        # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))                    # (B, 192, 71, 71)
        x = POOLS["halve"](x)                                            # (B, 192, 35, 35)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)                        # 35, from 6a on 17, from 7a on 8
        return x.mean((2, 3))                                            # (B, 2048)


def prepare(image: Image.Image) -> Tensor:
    """Convert an RGB image to (3, 299, 299) in [-1, 1], resized to a square as in pytorch-fid:
    bilinear, without antialiasing.  (clean-fid resizes differently and gets other scores: arXiv
    2104.11222.)"""
    x = to_tensor(image)[None]                                           # (1, 3, H, W)
    return F.interpolate(x, (SIDE, SIDE), mode="bilinear")[0]


def load(path: Path, device: str = "cpu") -> Inception:
    """Load the network, without its classifier, from the published file, with weights_only.

    Raises UserError, which names tensors that are missing, of a wrong shape or not finite."""
    tensors = read_any(path, f"a whole .pth of tensors only (others could run code); fetch {FILE} "
                       f"of github.com/mseitzer/pytorch-fid")
    network = build(Inception, path)
    require((isinstance(tensors, dict),
             f"{path}: found {type(tensors).__name__}, expected tensors by name"))
    # without the norms' num_batches_tracked, which some files lack
    shapes = {name: list(x.shape) for name, x in network.state_dict().items() if x.dim()}
    problems = []
    # fc tells FID's weights from torchvision's, which have 1000 classes and else the same shapes
    for name, expected in [*shapes.items(), ("fc.weight", [1008, 2048])]:
        tensor = tensors.get(name)
        shape = list(getattr(tensor, "shape", []))
        if shape != expected:
            problems.append(f"{name} is {shape or 'missing'}, expected {expected}")
        elif not finite(tensor):
            problems.append(f"{name} is not finite")
    require((not problems,
             f"{path}: not the weights of FID's Inception, {FILE}; {'; '.join(problems[:4])}"))
    network.load_state_dict({name: tensors[name].float() for name in shapes}, assign=True)
    return network.requires_grad_(False).to(device)


def untrained() -> Inception:
    """Return a network with random weights, to test the code around it; the scores mean nothing."""
    network = Inception()
    generator = torch.Generator().manual_seed(0)
    for name, x in network.named_parameters():
        if name.endswith("conv.weight"):
            x.normal_(0, math.sqrt(2 / x[0].numel()), generator=generator)
    return network
