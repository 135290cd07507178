"""Read a step_N folder without running anything that its files hold.

torch's own reader unpickles `.metadata`, and everything in a checkpoint that is not a tensor; a
pickle can run any code.  Here a pickle may name the types in ALLOWED and nothing else.
"""

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from common.cli import UserError, require

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
IN_METADATA = ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata",
               "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
               "_MEM_FORMAT_ENCODING")
ALLOWED = {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"), ("torch", "Size"),
           ("torch.serialization", "_get_layout"),
           ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
           *(("torch", name) for name in DTYPES),
           *(("torch.distributed.checkpoint.metadata", name) for name in IN_METADATA)}


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """Read a folder whose `.metadata` may name these files, and no others."""

    def __init__(self, folder: Path, files: set[str]):
        super().__init__(folder)
        self.metadata = folder / ".metadata"
        self.files = files

    def read_metadata(self, *_, **__) -> Metadata:
        """Raises UserError."""
        try:
            with open(self.metadata, "rb") as file:
                metadata = Unpickler(file).load()
            named = {place.relative_path for place in metadata.storage_data.values()}
            metadata.storage_meta.load_id = self.load_id
        except Exception as error:  # a pickle raises whatever it was made to
            raise UserError(f"{self.metadata}: not written by train.py ({error})")
        require((isinstance(metadata, Metadata) and named <= self.files,
                 f"{self.metadata}: names {', '.join(sorted(named - self.files))}, expected files "
                 f"of this folder"))
        return metadata


class Planner(DefaultLoadPlanner):
    """Refuse what is not a tensor, a number, a text, or a container of these."""

    def load_bytes(self, read_item, value) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)
