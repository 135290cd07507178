"""Read and write safetensors files, one tensor at a time."""

import json
import math
from pathlib import Path
from typing import Callable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.cli import UserError, require
from common.files import check_plain, replacing

SUFFIXES = (".safetensors", ".sft")
PICKLE = "a pickle, which can run code; convert it to safetensors first"
WEB_PAGE = "a web page, not the file; fetch it again"
# the first bytes of files that are often mistaken for safetensors
OTHERS = {
    b"GGUF": "GGUF, quantised weights, which are not read here; fetch the same ones as safetensors",
    b"PK\3\4": PICKLE,
    b"\x80\2\x8a\n": PICKLE,
    b"vers": "a pointer of Git LFS, not the file itself; git lfs pull fetches it",
    b"<htm": WEB_PAGE,
    b"<!DO": WEB_PAGE,
    b"<!do": WEB_PAGE,
}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # dtypes we write


def is_safetensors(path: Path) -> bool:
    """Return True for a file name that ends in .safetensors or .sft."""
    return path.suffix.lower() in SUFFIXES


class Tensors:
    """The tensors under a prefix in one or several safetensors files; only headers are in memory.

    file, shape, dtype: dicts from each tensor's name, without the prefix, to its file, shape and
    dtype.  Raises UserError for a file that is missing, incomplete, or of another format."""

    def __init__(self, files: list[Path], prefix: str = ""):
        self.files = files
        self.prefix = prefix
        self.opened = None                      # the file that is mapped now
        self.handle = None
        self.converted = 0                      # bytes converted since it was opened
        self.file, self.shape, self.dtype = {}, {}, {}
        for file in files:
            with self.open(file) as handle:
                for key in handle.keys():
                    if key.startswith(prefix):
                        name = key.removeprefix(prefix)
                        header = handle.get_slice(key)
                        self.file[name] = file
                        self.shape[name] = tuple(header.get_shape())
                        self.dtype[name] = header.get_dtype()

    @staticmethod
    def open(file: Path):
        check_plain(file)
        try:
            with open(file, "rb") as stream:
                first_bytes = stream.read(4)
        except OSError as error:
            raise UserError(f"{file}: can't be read ({error.strerror})")
        require((first_bytes not in OTHERS, f"{file}: is {OTHERS.get(first_bytes)}"),
                (is_safetensors(file), f"{file}: expected .safetensors; a {file.suffix} may be a "
                 f"pickle, which can run code; convert it first"))
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); copy it again")

    def __contains__(self, name: str) -> bool:
        return name in self.file

    def where(self, name: str) -> str:
        """Return the file and the full name of a tensor, for a message."""
        file = self.file.get(name, self.files[0])
        return f"{file}: {self.prefix}{name}"

    def size(self, name: str, axis: int) -> int:
        """Return the size of a tensor along an axis.  Raises UserError if it is missing or 0."""
        shape = self.shape.get(name, ())
        require((len(shape) > axis and shape[axis] > 0,
                 f"{self.where(name)} is missing or empty, so the sizes can't be read"))
        return shape[axis]

    def values(self) -> int:
        """Return how many numbers all tensors hold together."""
        return sum(map(math.prod, self.shape.values()))

    def count(self, stem: str) -> int:
        """Count the modules of a list: 24 for the stem "blocks." of blocks.0.a to blocks.23.b."""
        items = [name.removeprefix(stem) for name in self.file if name.startswith(stem)]
        return len({item.split(".")[0] for item in items})

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read a tensor in its stored dtype, mapped to the file, or converted to another dtype.

        Pages of a mapped file that were read count as this process's memory until it is unmapped.
        So the file is opened again after each gigabyte of converted tensors: the process does not
        hold the originals and the converted tensors together."""
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


def read_any(path: Path, expected: str):
    """Read a safetensors file as tensors by name, or unpickle a .pth with weights_only.

    expected: the kind of file, for the error message.  Raises UserError for an unreadable file."""
    if is_safetensors(path):
        tensors = Tensors([path])
        return {name: tensors.read(name) for name in tensors.file}
    check_plain(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # torch raises many types for missing, damaged or refused files
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{path}: not {expected} ({reason})")


def finite(tensor: Tensor) -> bool:
    """Return True if no value is NaN or infinite.

    One pass is enough: the minimum or maximum of such a tensor is NaN or infinite."""
    return tensor.numel() == 0 or all(map(math.isfinite, tensor.detach().aminmax()))


def make_header(tensors: dict[str, Tensor], dtype: torch.dtype) -> bytes:
    """Return the header of a safetensors file of these tensors, with its length, as bytes."""
    header = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * dtype.itemsize
        header[name] = dict(dtype=NAMES[dtype], shape=list(tensor.shape), data_offsets=[start, end])
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype,
                  gather: Callable[[Tensor], Tensor] = Tensor.detach) -> None:
    """Write tensors as `dtype` to a safetensors file; `gather` makes one sharded tensor whole.

    Raises UserError for a tensor that is not finite in `dtype`: loading it would fail."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(make_header(tensors, dtype))
        for name, tensor in tensors.items():
            values = gather(tensor).detach().to("cpu", dtype).contiguous()
            require((finite(values), f"{path}: {name} is not finite in {NAMES[dtype]} (BF16 has "
                     f"F32's range); the file was not written"))
            file.write(values.reshape(-1).view(torch.uint8).numpy())
