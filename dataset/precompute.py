"""What is computed once, before training: latents of images, states of captions, tokens of plain text.

Stored latents are the mean of the autoencoder's posterior, in shards of 512 samples with their
texts, and a stamp of the settings that made them.  T5's states of a clean caption can be stored
too.  States of masked text can't: a mask is drawn anew each time, and T5 reads both ways, so that
every state depends on all masks.

Shapes: B batch, L tokens, E width of T5's states, C channels, h and w latent height and width.
"""

import argparse
import gzip
import itertools
import json
import os
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

import checkpoint
from common import seeding
from common.cli import UserError, require
from common.devices import choose_device
from common.files import parse_json, replacing
from common.progress import Progress
from dataset import sources, workers
from pretrained.safetensors_io import finite
from pretrained.t5 import T5Encoder
from pretrained.tokenizer import Tokenizer

SHARD = 512             # samples of a file of latents
DOCUMENT = 2**16        # characters: a longer text is cut up in pieces of about as many
HEADER = 512            # bytes of a token file before its tokens


# ------------------------------------------------------------------------------------------ latents

def states_stamp(t5: T5Encoder, tokenizer: Tokenizer, length: int,
                 recaption: float) -> dict[str, str]:
    """Return what T5's stored states depend on."""
    return dict(t5=checkpoint.digest(t5), tokenizer=tokenizer.digest(), length=str(length),
                recaption=str(recaption))


class Encoder:
    """The networks that encode samples; stamp: the settings that made what is stored."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(choose_device(args.device))
        self.vae, self.t5 = checkpoint.load_vae(args.vae), None
        factor = self.vae.factor
        require((args.pixels % factor == 0,
                 f"--pixels {args.pixels}: expected a multiple of {factor}"))
        self.stamp = dict(vae=checkpoint.digest(self.vae), pixels=str(args.pixels),
                          channels=str(self.vae.channels), dtype=args.dtype)
        if isinstance(self.vae, torch.nn.Module):
            self.vae.to(self.device)
        if args.t5:
            self.tokenizer = checkpoint.load_tokenizer(args.tokenizer or args.t5)
            self.tokenizer.pad_id = self.tokenizer.end_id                # as train.py pads
            self.t5 = checkpoint.load_text_encoder(args.t5, torch.bfloat16, self.tokenizer)
            self.stamp |= states_stamp(self.t5, self.tokenizer, args.text_length, args.recaption)
            self.t5.to(self.device)

    @torch.inference_mode()
    def encode(self, samples: list[dict]) -> dict[str, Tensor]:
        """Return latents (B, C, h, w) and, with T5, states (B, L, E) of each sample's caption
        "stated"."""
        encoded = dict(latents=self.vae.encode(sources.latents_of(samples).to(self.device)))
        if self.t5 is not None:
            ids = []
            for sample in samples:
                chance = seeding.fraction(sample["key"])
                sample["stated"] = sources.choose_caption(sample, self.args.recaption, chance)
                ids.append(self.tokenizer.encode(sample["stated"], self.args.text_length))
            encoded["states"] = self.t5(torch.stack(ids).to(self.device))
        dtype = getattr(torch, self.args.dtype)
        return {name: tensor.to("cpu", dtype) for name, tensor in encoded.items()}


def read(mix, captioned: bool, batches: list[range], number: int) -> dict:
    """Return the samples of a batch of positions, and what is wrong with the unreadable ones."""
    samples, bad = [], []
    for at in batches[number]:
        try:
            samples.append(mix.cut(mix.sources[0][at], captioned))
        except UserError as error:
            bad.append(str(error))
    return dict(samples=samples, bad=bad)


def store_latents(args: argparse.Namespace, encoder: Encoder, mix, fingerprint: str) -> None:
    """Store the images of a `data.Mix` of one source as latents, in files that are written whole or not at
    all.  fingerprint: of the source."""
    source = mix.sources[0]
    require((source.holds == "images", f"{args.source}: has no images to encode"))
    every = source.every
    shards = [every[at:at + SHARD] for at in range(0, len(every), SHARD)]
    stamp = dict(encoder.stamp, source=fingerprint, shards=str(len(shards)))
    files, batches = [], []                                      # of each batch
    first, step = args.part
    for number in range(first, len(shards), step):
        file = args.out / sources.SHARDS.format(f"{number:05d}")
        if file.exists():
            other = sources.read_stamp(str(file))
            require((other == stamp, f"{file}: made with other settings, {other}, not {stamp}"))
            continue
        for at in range(0, len(shards[number]), args.batch):
            files.append(file)
            batches.append(shards[number][at:at + args.batch])
    args.out.mkdir(parents=True, exist_ok=True)
    read_batch = partial(read, mix, bool(args.t5), batches)
    reading = workers.feed(read_batch, range(len(batches)), args.workers)
    progress = Progress("samples", sum(map(len, batches)))
    stored = lost = 0
    for file, group in itertools.groupby(zip(files, reading), lambda pair: pair[0]):
        samples, encoded = [], []
        for _, batch in group:
            for message in batch["bad"]:
                print(f"left out: {message}", file=sys.stderr)
            lost += len(batch["bad"])
            if batch["samples"]:
                encoded.append(encoder.encode(batch["samples"]))
                samples += batch["samples"]
            progress.update(stored + len(samples) + lost)
        require((samples, f"{file}: all of its samples are of no use"))
        tensors = {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}
        write_shard(file, samples, tensors, stamp)
        stored += len(samples)
    print(f"{args.out}: {len(shards)} shards, {stored:,} samples encoded now, {lost:,} left out")


def write_shard(file: Path, samples: list[dict], tensors: dict[str, Tensor],
                stamp: dict[str, str]) -> None:
    """Write samples as one file: their tensors, and their texts as JSON, end to end."""
    for name, tensor in tensors.items():
        require((finite(tensor), f"{file}: {name} are not finite in {stamp['dtype']}"))
    lines = []
    for sample in samples:
        names = ("key", "captions", "recaption", "questions", "stated")
        texts = {name: sample[name] for name in names if name in sample}
        lines.append(json.dumps(texts).encode())
    tensors["texts"] = torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8)
    tensors["ends"] = torch.tensor([0, *itertools.accumulate(map(len, lines))])
    with replacing(file) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata={"stamp": json.dumps(stamp)})
        except safetensors.SafetensorError as error:
            raise UserError(f"{file}: can't be written ({error}); run it again to go on")


# --------------------------------------------------------------------------------------------- pack

def documents(path: str, report: Callable[[int], None]) -> Iterator[tuple[str, bool]]:
    """Yield the texts of a file in pieces, and if a document ends there; `report` the bytes read.

    A long .txt is cut where one line break stands between two letters: tokenizers cut there too."""
    plain, text = path.removesuffix(".gz").endswith(".txt"), ""
    try:
        with open(path, "rb") as raw, (gzip.open(raw) if path.endswith(".gz") else raw) as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                report(raw.tell())
                if plain:
                    line = line.decode("utf-8")
                    if len(text) > DOCUMENT and not line[0].isspace() and not text[-2].isspace():
                        yield text, False
                        text = ""
                    text += line
                elif line.strip():
                    record = parse_json(line, where)
                    if isinstance(record, dict):
                        record = record.get("text")
                    yield sources.text(record, where, "text"), True
        if text:
            yield text, True
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason})")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can't be read ({error})")


def pack(args: argparse.Namespace) -> None:
    """Write documents as one safetensors file of tokens, uint16 where the vocabulary allows, else
    uint32."""
    require((args.out.suffix == ".safetensors", f"{args.out}: expected the .safetensors to write"))
    tokenizer = checkpoint.load_tokenizer(args.tokenizer)
    bits = 16 if tokenizer.vocab_size <= 2**16 else 32
    paths = expand(args.paths)
    for path in paths:
        require((path.endswith(sources.TEXTS), f"{path}: expected {', '.join(sources.TEXTS)}"))
    sizes = list(map(os.path.getsize, paths))
    progress = Progress("bytes", sum(sizes))
    total = count = 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as temporary, open(temporary, "wb") as file:
        file.write(bytes(HEADER))
        for n, path in enumerate(paths):
            pieces = documents(path, lambda at: progress.update(sum(sizes[:n]) + at))
            while batch := list(itertools.islice(pieces, 64)):
                for ids, (_, ends) in zip(tokenizer.many([text for text, _ in batch]), batch):
                    if ends:
                        ids = [*ids, tokenizer.end_id]
                        count += 1
                    np.array(ids, f"uint{bits}").tofile(file)
                    total += len(ids)
        require((total, f"{', '.join(args.paths)}: no text in it"))
        tensor = dict(dtype=f"U{bits}", shape=[total], data_offsets=[0, total * bits // 8])
        metadata = dict(tokenizer=tokenizer.digest(), documents=str(count))
        header = json.dumps({"__metadata__": metadata, "tokens": tensor})
        file.seek(0)
        file.write((HEADER - 8).to_bytes(8, "little"))
        file.write(header.encode().ljust(HEADER - 8))
    print(f"{args.out}: {total:,} tokens, {count:,} document(s)")


def expand(patterns: list[str]) -> list[str]:
    return [path for pattern in patterns for path in sources.expand(pattern)]
