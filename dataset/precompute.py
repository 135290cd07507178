"""Compute once, before training: latents of images, T5's states of captions, tokens of plain text.

Latents are the mean of the autoencoder's posterior.  They are stored in shards of 512 samples, with
the texts and a stamp of the settings that made them.  T5's states of a clean caption can be stored
too.  States of masked text can't be stored: each mask is drawn anew, and as T5 attends in both
directions, every state depends on the whole mask.

Shapes: B batch, L tokens, E width of T5's states, C channels, h and w latent height and width.
"""

import argparse
import gzip
import itertools
import json
import math
import os
import re
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Iterable, Iterator, Sequence

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

import checkpoint
from common import seeding
from common.cli import UserError, require
from common.devices import choose_device
from common.files import decode_text, parse_json, replacing
from common.progress import Progress, chunks
from dataset import sources, workers
from pretrained.safetensors_io import finite
from pretrained.t5 import T5Encoder
from pretrained.tokenizer import Tokenizer

SHARD = 512             # samples per file of latents
DOCUMENT = 2**16        # characters; longer texts are tokenized in pieces of about this length
WHITE_SPACE = re.compile(r"[^\S\x1c-\x1f]*")     # GPT-2's tokenizer does not count these four
HEADER = 512            # bytes of a token file before its tokens


# ------------------------------------------------------------------------------------------ latents

def states_stamp(t5: T5Encoder, tokenizer: Tokenizer, length: int,
                 recaption: float) -> dict[str, str]:
    """Return the settings that T5's stored states depend on."""
    return dict(t5=checkpoint.digest(t5), tokenizer=tokenizer.digest(), length=str(length),
                recaption=str(recaption))


class Encoder:
    """The networks that encode samples.  stamp: the settings that the results depend on.

    Raises UserError for a network that can't be loaded or does not fit the flags."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(choose_device(args.device))
        self.vae = checkpoint.load_vae(args.vae)
        factor = self.vae.factor
        require((args.pixels % factor == 0,
                 f"--pixels {args.pixels}: expected a multiple of {factor}"))
        self.stamp = dict(vae=checkpoint.digest(self.vae), pixels=str(args.pixels),
                          channels=str(self.vae.channels), dtype=args.dtype)
        self.vae.to(self.device)
        self.t5 = None
        if args.t5:
            self.tokenizer = checkpoint.training_tokenizer(args.tokenizer or args.t5)
            self.t5 = checkpoint.load_text_encoder(args.t5, torch.bfloat16, self.tokenizer)
            self.stamp |= states_stamp(self.t5, self.tokenizer, args.text_length, args.recaption)
            self.t5.to(self.device)

    @torch.inference_mode()
    def encode(self, samples: list[dict]) -> dict[str, Tensor]:
        """Return "latents" (B, C, h, w) and, with T5, "states" (B, L, E) of a caption per sample.

        The caption is added to each sample as "stated"."""
        images = sources.latents_of(samples).to(self.device)
        encoded = dict(latents=self.vae.encode(images))
        if self.t5:
            ids = []
            for sample in samples:
                chance = seeding.fraction(sample["key"])
                sample["stated"] = sources.choose_caption(sample, self.args.recaption, chance)
                ids.append(self.tokenizer.encode(sample["stated"], self.args.text_length))
            encoded["states"] = self.t5(torch.stack(ids).to(self.device))
        dtype = getattr(torch, self.args.dtype)
        return {name: tensor.to("cpu", dtype) for name, tensor in encoded.items()}

    def no_rows(self) -> dict[str, Tensor]:
        """Return what `encode` does, of no samples."""
        pixels = self.args.pixels
        blank = dict(key="", captions=[""], image=torch.zeros(3, pixels, pixels, dtype=torch.uint8))
        return {name: tensor[:0] for name, tensor in self.encode([blank]).items()}


def missing_shards(args: argparse.Namespace, shards: list[Sequence[int]],
                   stamp: dict[str, str]) -> dict[Path, Sequence[int]]:
    """Return the missing shard files of this --part, with the indices of their samples.

    Raises UserError if an existing file was made with other settings."""
    missing = {}
    first, step = args.part
    for number in range(first, len(shards), step):
        file = args.out / sources.SHARDS.format(f"{number:05d}")
        if not file.exists():
            missing[file] = shards[number]
            continue
        other = sources.read_stamp(str(file))
        require((other == stamp, f"{file}: made with other settings, {other}, not {stamp}"))
    return missing


def read(mix, captioned: bool, batches: list[Sequence[int]], number: int) -> list[dict]:
    """Return the samples of batches[number]; print a line for each sample that is left out."""
    samples = []
    for position in batches[number]:
        try:
            samples.append(mix.prepare(mix.sources[0][position], captioned))
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    return samples


def encode_shard(encoder: Encoder, batches: Iterable[list[dict]], progress: Progress
                 ) -> tuple[list[dict], dict[str, Tensor]]:
    """Return the samples of a shard, without their images, and their tensors; {} of no samples."""
    samples, encoded = [], []
    for batch in batches:
        if batch:
            encoded.append(encoder.encode(batch))
        for sample in batch:
            del sample["image"]                                  # workers share memory for it
        samples += batch
        progress.update(progress.done + len(batch))
    if not encoded:
        return [], {}
    return samples, {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}


def store_latents(args: argparse.Namespace, encoder: Encoder, mix, fingerprint: str) -> None:
    """Encode the one source of a `data.Mix` into shards; existing shards are kept.

    fingerprint: identifies the source.  Raises UserError if no sample is usable."""
    [source] = mix.sources
    require((source.holds == "images", f"{args.source}: has no images to encode"))
    shards = chunks(source.every, SHARD)
    stamp = dict(encoder.stamp, source=fingerprint, shards=str(len(shards)))
    if args.filtered:
        stamp["filtered"] = "True"
    missing = missing_shards(args, shards, stamp)
    batches = []
    for positions in missing.values():
        batches += chunks(positions, args.batch)              # a batch never spans two shards
    read_batch = partial(read, mix, bool(args.t5), batches)
    reading = workers.feed(read_batch, range(len(batches)), args.workers)
    progress = Progress("samples", sum(map(len, batches)))
    args.out.mkdir(parents=True, exist_ok=True)
    empty = []
    for file, positions in missing.items():
        count = math.ceil(len(positions) / args.batch)
        samples, tensors = encode_shard(encoder, itertools.islice(reading, count), progress)
        if samples:
            write_shard(file, samples, tensors, stamp)
        else:
            empty.append(file)
    require((progress.done or len(missing) < len(shards),
             f"{args.source}: all of its samples are unusable"))
    for file in empty:
        write_shard(file, [], encoder.no_rows(), stamp)
    print(f"{args.out}: {len(missing)} of {len(shards)} shards written, {progress.done:,} samples, "
          f"{progress.total - progress.done:,} left out")


def write_shard(file: Path, samples: list[dict], tensors: dict[str, Tensor],
                stamp: dict[str, str]) -> None:
    """Write samples as one file, atomically: their tensors, and their texts as concatenated JSON.

    Raises UserError for tensors that are not finite."""
    for name, tensor in tensors.items():
        require((finite(tensor), f"{file}: {name} are not finite in {stamp['dtype']}"))
    texts = [json.dumps(sample).encode() for sample in samples]
    tensors["texts"] = torch.from_numpy(np.frombuffer(bytearray(b"".join(texts)), np.uint8))
    tensors["ends"] = torch.tensor([0, *itertools.accumulate(map(len, texts))])
    with replacing(file) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata={"stamp": json.dumps(stamp)})
        except safetensors.SafetensorError as error:
            raise UserError(f"{file}: can't be written ({error}); run it again to go on")


# --------------------------------------------------------------------------------------------- pack

def documents(path: str) -> Iterator[tuple[str, bool]]:
    """Yield the texts of a file in pieces, each with True if a document ends after it.

    A long .txt is cut only before the last character of white space in front of a word.  GPT-2's
    tokenizer, too, starts a new piece there, so the tokens stay the same.  Raises UserError."""
    is_plain = path.removesuffix(".gz").endswith(".txt")
    text = ""
    try:
        with open(path, "rb") as raw, (gzip.open(raw) if path.endswith(".gz") else raw) as file:
            progress = Progress(f"{path}: bytes", os.path.getsize(path))
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                progress.update(raw.tell())
                line = decode_text(line, path, number)
                if is_plain:
                    begin = len(text)
                    text += line
                    indent = WHITE_SPACE.match(line).end()
                    is_blank = indent == len(line)
                    if begin > DOCUMENT and not is_blank:
                        cut = begin + indent - 1
                        yield text[:cut], False
                        text = text[cut:]
                elif line.strip():
                    record = parse_json(line, where)
                    if isinstance(record, dict):
                        record = record.get("text")
                    yield sources.text(record, where, "text"), True
        if text:
            yield text, True
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})")


def tokenize(paths: list[str], tokenizer: Tokenizer) -> Iterator[tuple[list[int], bool]]:
    """Yield the tokens of each piece of `documents`, with an end token after each document."""
    pieces = itertools.chain.from_iterable(map(documents, paths))
    while batch := list(itertools.islice(pieces, 64)):
        texts = [text for text, _ in batch]
        for ids, (_, ends) in zip(tokenizer.many(texts), batch):
            if ends:
                ids = [*ids, tokenizer.end_id]
            yield ids, ends


def pack(args: argparse.Namespace) -> None:
    """Write documents as one safetensors file of tokens, in uint16 if the vocabulary fits, else in
    uint32.  Raises UserError."""
    require((args.out.suffix == ".safetensors", f"{args.out}: expected the .safetensors to write"))
    tokenizer = checkpoint.training_tokenizer(args.tokenizer)
    paths = sources.expand_all(args.paths)
    for path in paths:
        require((path.endswith(sources.TEXTS), f"{path}: expected {', '.join(sources.TEXTS)}"))
    bits = 16 if tokenizer.vocab_size <= 2**16 else 32
    tokens = count = 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as temporary, open(temporary, "wb") as file:
        file.seek(HEADER)
        for ids, ends in tokenize(paths, tokenizer):
            file.write(np.array(ids, f"uint{bits}").tobytes())
            tokens += len(ids)
            count += ends
        require((tokens, f"{', '.join(args.paths)}: no text in it"))
        metadata = dict(tokenizer=tokenizer.digest(), documents=str(count))
        tensor = dict(dtype=f"U{bits}", shape=[tokens], data_offsets=[0, tokens * bits // 8])
        header = json.dumps({"__metadata__": metadata, "tokens": tensor})
        file.seek(0)
        file.write((HEADER - 8).to_bytes(8, "little"))
        file.write(header.encode().ljust(HEADER - 8))
    print(f"{args.out}: {tokens:,} tokens, {count:,} document(s)")
