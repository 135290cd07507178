"""Safetensors files: read strictly, one tensor at a time, and written so; and any file replaced whole."""

import json
import math
from pathlib import Path
from typing import Callable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.cli import UserError, require
from common.files import replacing

SUFFIXES = (".safetensors", ".sft")
# how other files begin that lie in a safetensors' place
OTHERS = {b"GGUF": "GGUF, quantised weights, which are not read here; fetch the same ones as safetensors",
          b"PK\3\4": "a pickle, which can run code; convert it to safetensors first",
          b"\x80\2\x8a\n": "a pickle, which can run code; convert it to safetensors first",
          b"vers": "a pointer of Git LFS, not the file itself; git lfs pull fetches it",
          **dict.fromkeys([b"<htm", b"<!DO", b"<!do"], "a web page, not the file; fetch it again")}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}       # of types in safetensors


def is_safetensors(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in SUFFIXES


class Tensors:
    """The tensors of one part: those under a prefix in one or several safetensors files, read one at a time.
    Raises UserError for a file that is missing, no safetensors, or cut off."""

    def __init__(self, files: list[Path], prefix: str = ""):
        self.files = files
        self.prefix = prefix
        self.opened = self.handle = None        # the file that is open, and its tensors
        self.converted = 0                      # bytes since it was opened
        self.file, self.shape, self.dtype = {}, {}, {}
        for file in files:
            with self.open(file) as tensors:
                for key in tensors.keys():
                    if key.startswith(prefix):
                        name = key.removeprefix(prefix)
                        part = tensors.get_slice(key)
                        self.file[name] = file
                        self.shape[name] = tuple(part.get_shape())
                        self.dtype[name] = part.get_dtype()

    @staticmethod
    def open(file: Path):
        try:
            with open(file, "rb") as opened:
                begins = opened.read(4)
        except OSError as error:
            raise UserError(f"{file}: can't be read ({error.strerror})")
        require((begins not in OTHERS, f"{file}: is {OTHERS.get(begins)}"),
                (is_safetensors(file), f"{file}: expected .safetensors; a {file.suffix} may be a pickle, "
                 f"which can run code; convert it first"))
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); copy it again")

    def __contains__(self, name: str) -> bool:
        return name in self.file

    def size(self, name: str, axis: int) -> int:
        """Raises UserError when the tensor isn't there or has fewer axes."""
        require((len(self.shape.get(name, ())) > axis, f"{self.files[0]}: {self.prefix}{name} is missing, so "
                 f"the sizes can't be read"))
        return self.shape[name][axis]

    def values(self) -> int:
        """Count the numbers in all tensors, from the headers."""
        return sum(map(math.prod, self.shape.values()))

    def refuse(self, problems: dict[str, str]) -> None:
        """Raise UserError with the problems, by tensor name, if there are any."""
        lines = [f"{self.file.get(name, self.files[0]).name}: {self.prefix}{name} {problem}"
                 for name, problem in sorted(problems.items())]
        if lines:
            more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
            raise UserError(f"{self.files[0].parent}/{'; '.join(lines[:4])}{more}")

    def count(self, stem: str) -> int:
        """How many numbers stand behind a stem: 24 of "blocks." for blocks.0.a, blocks.0.b, ..., 23.b."""
        return len({name[len(stem):].split(".")[0] for name in self.file if name.startswith(stem)})

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """In the stored dtype (then mapped, not copied), or converted.  The pages of a mapped file that were
        touched count as this process's memory until it is unmapped: after each gigabyte that was converted
        the file is opened anew, so that a conversion needs no memory for both."""
        if self.opened != self.file[name] or self.converted > 2**30:
            self.handle = None                  # unmap before the file is mapped again
            self.converted = 0
            self.opened = self.file[name]
            self.handle = self.open(self.opened)
        tensor = self.handle.get_tensor(self.prefix + name)
        if dtype in (None, tensor.dtype):
            return tensor
        self.converted += tensor.nbytes
        return tensor.to(dtype)


def read_any(path: Path, wrong: Callable[[Exception], str]):
    """What a safetensors file holds, as tensors by name, or a .pth, unpickled with weights_only.

    Raises UserError, of what torch could not read with what `wrong` says of it."""
    if is_safetensors(path):
        tensors = Tensors([path])
        return {name: tensors.read(name) for name in tensors.file}
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # torch raises whatever the missing, damaged or refused file led to
        raise UserError(f"{path}: {wrong(error)}")


def finite(tensor: Tensor) -> bool:
    """No NaN and no infinity, in one pass: both survive a minimum and a maximum."""
    return tensor.numel() == 0 or all(map(math.isfinite, tensor.detach().aminmax()))


def write_tensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype,
                  gather: Callable[[Tensor], Tensor] = Tensor.detach) -> None:
    """A safetensors file, one tensor after the other: `gather` makes each a whole one when its turn comes.

    Raises UserError for one that is not finite in `dtype`: it would be refused when it is read."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * dtype.itemsize
        header[name] = dict(dtype=NAMES[dtype], shape=list(tensor.shape), data_offsets=[at, end])
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            values = gather(tensor).detach().to("cpu", dtype).contiguous()
            if not finite(values):
                raise UserError(f"{path}: {name} is not finite in {NAMES[dtype]} (BF16 has F32's range); "
                                f"nothing was written")
            file.write(values.reshape(-1).view(torch.uint8).numpy())
