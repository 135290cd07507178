"""The InceptionV3 that FID (arXiv 1706.08500) looks at pictures with, up to its 2048 pooled features.

    network = load("pt_inception-2015-12-05-6726825d.pth")
    network(prepare(picture)[None])                              # (1, 2048)

That file is TensorFlow's network of 2015, ported by github.com/mseitzer/pytorch-fid; its names, which are
torchvision's, are the names here.  Torchvision's own weights are others, and their figures compare with
nobody's.

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
from cli import require
from pictures import to_tensor
from tensors import finite, read_any

FILE = "pt_inception-2015-12-05-6726825d.pth"
SIDE = 299              # pixels
CLASSES = 1008          # in that file; torchvision's own weights have 1000
ASIDE = re.compile(r"fc\..*|AuxLogits\..*|.*\.num_batches_tracked")      # what features don't need
POOLS = dict(           # of a block; TensorFlow's average leaves out the zeros around the picture
    average=partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
    max=partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
    halve=partial(F.max_pool2d, kernel_size=3, stride=2))


# The convolutions of each kind of block: channels, height, width, stride.  branch5x5_2 reads branch5x5_1, 2a
# and 2b both read 1, and branch_pool what is pooled; what none reads is the output, one behind the other.
def A(pooled: int) -> dict:
    return dict(branch1x1=(64, 1, 1), branch5x5_1=(48, 1, 1), branch5x5_2=(64, 5, 5),
                branch3x3dbl_1=(64, 1, 1), branch3x3dbl_2=(96, 3, 3), branch3x3dbl_3=(96, 3, 3),
                branch_pool=(pooled, 1, 1))


B = dict(branch3x3=(384, 3, 3, 2),
         branch3x3dbl_1=(64, 1, 1), branch3x3dbl_2=(96, 3, 3), branch3x3dbl_3=(96, 3, 3, 2))


def C(inner: int) -> dict:
    return dict(branch1x1=(192, 1, 1),
                branch7x7_1=(inner, 1, 1), branch7x7_2=(inner, 1, 7), branch7x7_3=(192, 7, 1),
                branch7x7dbl_1=(inner, 1, 1), branch7x7dbl_2=(inner, 7, 1), branch7x7dbl_3=(inner, 1, 7),
                branch7x7dbl_4=(inner, 7, 1), branch7x7dbl_5=(192, 1, 7), branch_pool=(192, 1, 1))


D = dict(branch3x3_1=(192, 1, 1), branch3x3_2=(320, 3, 3, 2),
         branch7x7x3_1=(192, 1, 1), branch7x7x3_2=(192, 1, 7), branch7x7x3_3=(192, 7, 1),
         branch7x7x3_4=(192, 3, 3, 2))
E = dict(branch1x1=(320, 1, 1), branch3x3_1=(384, 1, 1), branch3x3_2a=(384, 1, 3), branch3x3_2b=(384, 3, 1),
         branch3x3dbl_1=(448, 1, 1), branch3x3dbl_2=(384, 3, 3),
         branch3x3dbl_3a=(384, 1, 3), branch3x3dbl_3b=(384, 3, 1), branch_pool=(192, 1, 1))
BLOCKS = dict(          # and how each pools; a maximum in the last is what FID's network has, and no other
    Mixed_5b=(A(32), "average"), Mixed_5c=(A(64), "average"), Mixed_5d=(A(64), "average"),
    Mixed_6a=(B, "halve"), Mixed_6b=(C(128), "average"), Mixed_6c=(C(160), "average"),
    Mixed_6d=(C(160), "average"), Mixed_6e=(C(192), "average"),
    Mixed_7a=(D, "halve"), Mixed_7b=(E, "average"), Mixed_7c=(E, "max"))


class Norm(nn.Module):
    """Batch norm by the stored statistics: nothing is trained here."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)


class Conv(nn.Module):
    """A convolution, its norm and a ReLU; sides stay as they are, but for a stride of 2 or no padding."""

    def __init__(self, reads: int, channels: int, height: int, width: int, stride: int = 1, pad: bool = True):
        super().__init__()
        padding = (height // 2, width // 2) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(reads, channels, (height, width), stride, padding, bias=False)
        self.bn = Norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Branches of one input, side by side."""

    def __init__(self, width: int, table: dict, pool: str):
        super().__init__()
        self.pool, self.reads, channels = POOLS[pool], {}, dict(x=width, pooled=width)
        for name, shape in table.items():
            step = re.fullmatch(r"(\w+_)([2-9])[ab]?", name)
            before = f"{step[1]}{int(step[2]) - 1}" if step else "pooled" if name == "branch_pool" else "x"
            self.add_module(name, Conv(channels[before], *shape))
            self.reads[name], channels[name] = before, shape[0]
        self.ends = [name for name in [*table, "pooled"] if name not in self.reads.values()]
        self.width = sum(channels[name] for name in self.ends)

    def forward(self, x: Tensor) -> Tensor:
        found = dict(x=x, pooled=self.pool(x))
        for name, before in self.reads.items():
            found[name] = getattr(self, name)(found[before])
        return torch.cat([found[name] for name in self.ends], 1)


class Inception(nn.Module):
    """(B, 3, 299, 299) in [-1, 1] -> (B, 2048) float32, the mean over places of the last block."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 3, pad=False)
        width = 192
        for name, (table, pool) in BLOCKS.items():
            self.add_module(name, Block(width, table, pool))
            width = getattr(self, name).width
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (3, SIDE, SIDE), f"{tuple(x.shape)}: pictures go through prepare() first"
        x = x.contiguous(memory_format=torch.channels_last)              # 1.4 times as fast on two cores
        x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))                    # (B, 32, 147, 147)
        x = POOLS["halve"](self.Conv2d_2b_3x3(x))                        # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))                    # (B, 192, 71, 71)
        x = POOLS["halve"](x)                                            # (B, 192, 35, 35)
        for name in BLOCKS:
            x = getattr(self, name)(x)                                   # 35, from 6a on 17, from 7a on 8
        return x.mean((2, 3))                                            # (B, 2048)


def prepare(picture: Image.Image) -> Tensor:
    """RGB picture -> (3, 299, 299) in [-1, 1], resized as pytorch-fid does it: bilinear, not antialiased,
    the shape not kept.  (clean-fid resizes otherwise, and its figures are others: arXiv 2104.11222.)"""
    return F.interpolate(to_tensor(picture)[None], (SIDE, SIDE), mode="bilinear", align_corners=False)[0]


def shape(x) -> tuple[int, ...] | str:
    """Of a tensor of floats that is in memory as such; what anything else is."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    plain = x.is_floating_point() and x.layout is torch.strided and x.device.type == "cpu"
    return tuple(x.shape) if plain else f"{x.dtype} {x.layout} on {x.device}"


def load(path: str | Path, device: str = "cpu") -> Inception:
    """The network, from the published .pth, unpickled with weights_only, or a .safetensors of its tensors.

    Raises UserError for a file that is missing, damaged or no such thing: what is missing, left over, of a
    wrong shape or not finite in it is named in one message.  The classifier is left aside."""
    path = Path(path)
    require((path.exists(), f"{path}: no such file; it is {FILE} of github.com/mseitzer/pytorch-fid"))
    held = read_any(path, lambda error: f"not a whole .pth, or one of more than tensors, which could run "
                                        f"code ({type(error).__name__}); fetch {FILE} again")
    require((isinstance(held, dict), f"{path}: expected tensors by name, found {type(held).__name__}"))
    network = build(Inception, path)
    wanted = {name: tuple(x.shape) for name, x in network.state_dict().items()}
    state = {name: held[name].float() for name in wanted if shape(held.get(name)) == wanted[name]}
    asked = wanted | dict.fromkeys({"fc.weight"} & held.keys(), (CLASSES, 2048))
    problems = {
        "missing": [name for name in wanted if name not in held],
        "left over": [str(name) for name in held if name not in asked and not ASIDE.fullmatch(str(name))],
        "misshapen": [f"{name} {found}, expected {asked[name]}" for name, found in
                      ((name, shape(held[name])) for name in asked if name in held) if found != asked[name]],
        "not finite": [name for name, x in state.items() if not finite(x)]}
    said = [f"{what}: {', '.join(names[:4])}" + f" and {len(names) - 4} more" * (len(names) > 4)
            for what, names in problems.items() if names]
    require((not said, f"{path}: not the weights of FID's Inception, {FILE}; {'; '.join(said)}"))
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).to(device)


def untrained(seed: int = 0) -> Inception:
    """Random weights, for trying out what goes around the network: figures of theirs say nothing."""
    network, generator = Inception(), torch.Generator().manual_seed(seed)
    for name, x in network.named_parameters():
        if name.endswith("conv.weight"):
            x.normal_(0, math.sqrt(2 / x[0].numel()), generator=generator)
    return network
