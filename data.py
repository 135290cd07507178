"""Tokenizers, pictures, and tar shards in WebDataset layout.

Shapes: L tokens, P pixels a side.
"""

import argparse
import difflib
import hashlib
import io
import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

ASSETS = Path(__file__).parent / "assets"


class UserError(Exception):
    """A mistake that the person at the keyboard can mend; `main` prints it as one line and exits with 1."""


class Parser(argparse.ArgumentParser):
    """argparse that names the closest flag when one is unknown, and takes no abbreviations."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            self.error(f"unknown argument {name}" + (f"; did you mean {close[0]}?" if close else "; see --help"))
        return parsed

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


# ---------------------------------------------------------------------------------------------- tokenizers

class Tokenizer:
    """Text <-> ids, with an end token, a padding token and [MASK].

    Special tokens are never read out of text: "[MASK]" in a caption is six characters like any others.
    """

    def __init__(self, bpe: BPE, end_id: int, pad_id: int, mask_id: int, vocab_size: int, specials: str = ""):
        self.bpe, self.end_id, self.pad_id, self.mask_id = bpe, end_id, pad_id, mask_id
        self.vocab_size, self.specials = vocab_size, specials

    def pieces(self, text: str) -> list[int]:
        """The bare ids of a text, no end token, no padding."""
        if self.specials:       # a regular expression: T5's vocabulary holds "</s>" like any word, so it is pried apart
            text = re.sub(self.specials, r"< \1>", text)
        return self.bpe.encode(text, add_special_tokens=False).ids

    def continuation(self, text: str) -> list[int]:
        """As `pieces`, of a text that goes on where another token ended: T5's tokenizer would put a space there."""
        ids = self.pieces(text)
        first = self.bpe.id_to_token(ids[0]) if ids else ""
        if text.startswith(" ") or not first.startswith("\u2581"):
            return ids
        bare = self.bpe.token_to_id(first[1:])
        return ids[1:] if first == "\u2581" else ids if bare is None else [bare] + ids[1:]

    def encode(self, text: str, length: int) -> Tensor:
        """(length,) int64: the text, the end token, padding.  Too long a text is cut, with a warning on stderr."""
        return self.fit(self.pieces(text), length)

    def fit(self, ids: list[int], length: int) -> Tensor:
        """Ids to (length,): end token and padding added, or cut with a warning that shows the part cut off."""
        if len(ids) > length - 1:
            kept, cut = self.decode(ids[:length - 1]), self.decode(ids[length - 1:])
            shown = cut if len(cut) <= 60 else cut[:57] + "..."
            print(f"warning: {len(ids)} tokens, room for {length - 1}: kept up to {kept[-20:]!r}, cut off {shown!r}",
                  file=sys.stderr)
            ids = ids[:length - 1]
        return torch.tensor(ids + [self.end_id] + [self.pad_id] * (length - len(ids) - 1))

    def decode(self, ids: Tensor | list[int]) -> str:
        """The text up to the first end token; a [MASK] that is left reads "[MASK]"."""
        text, run = "", []
        for i in list(map(int, ids)) + [self.end_id]:
            if i in (self.end_id, self.pad_id, self.mask_id):
                text, run = text + self.bpe.decode(run), []
                if i != self.mask_id:
                    return text
                text += "[MASK]"
            else:
                run.append(i)


def gpt2_tokenizer(keep: list[int] | None = None, merges: Path = ASSETS / "gpt2" / "merges.txt") -> Tokenizer:
    """GPT-2's byte-level BPE, <|endoftext|> as end and padding, and [MASK] as one id more (50257).

    keep: GPT-2 ids to keep, renumbered in their order, for a small model's small head; it must hold the 256
    bytes and, for each id, the two ids it is merged from (`gpt2_subset` makes such a list).  Text made of kept
    tokens is cut up exactly as GPT-2 does; any other text falls into smaller pieces, down to bytes.
    """
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")[1:]
    except OSError as error:
        raise UserError(f"{merges}: GPT-2's merges file can't be read ({error.strerror}); restore it from git")
    pairs = [tuple(line.split(" ")) for line in lines if line]
    # GPT-2's order: printable bytes first, then the rest moved up to 256 and on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + ["".join(pair) for pair in pairs]
    if len(tokens) != 50256:
        raise UserError(f"{merges}: {len(pairs)} merges, expected 50000; restore the file from git")
    if keep is not None:
        if keep != sorted(set(keep)) or keep[:256] != list(range(256)) or keep[-1] >= len(tokens):
            raise UserError("a tokenizer's keep list must hold ascending GPT-2 ids that start with the 256 bytes")
        tokens = [tokens[i] for i in keep]
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [pair for pair in pairs if "".join(pair) in vocab]
    if any(part not in vocab for pair in pairs for part in pair):
        raise UserError("a tokenizer's keep list holds a token without the two it is merged from")
    bpe = BPE(models.BPE(vocab=vocab, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    end = len(tokens)
    return Tokenizer(bpe, end_id=end, pad_id=end, mask_id=end + 1, vocab_size=end + 2)


def t5_tokenizer(file: Path) -> Tokenizer:
    """T5's tokenizer.json: </s> as end, <extra_id_0> as [MASK], and the padding token that the folder's
    special_tokens_map.json or tokenizer_config.json names (D-DiT pads with </s>), <pad> where neither does."""
    try:
        bpe = BPE.from_file(str(file))
    except Exception as error:      # tokenizers raises a bare Exception
        raise UserError(f"{file}: not a tokenizer that can be read ({str(error).splitlines()[0]})")
    bpe.no_padding()
    bpe.no_truncation()
    pad = "<pad>"
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            named = json.loads((file.parent / name).read_text(encoding="utf-8")).get("pad_token")
        except (OSError, ValueError, AttributeError):
            continue
        pad = (named.get("content") if isinstance(named, dict) else named) or pad
    ids = {token: bpe.token_to_id(token) for token in ("</s>", pad, "<extra_id_0>")}
    if absent := [token for token, i in ids.items() if i is None]:
        raise UserError(f"{file}: has no {' and no '.join(absent)}, expected T5 v1.1's tokenizer")
    return Tokenizer(bpe, ids["</s>"], ids[pad], ids["<extra_id_0>"], bpe.get_vocab_size(with_added_tokens=True),
                     r"<(/s|pad|unk|extra_id_\d+)>")


def gpt2_subset(texts: list[str]) -> list[int]:
    """The GPT-2 ids that the texts use, those they are merged from, and the 256 bytes, in ascending order."""
    full = gpt2_tokenizer()
    parts = {}
    for left, right in json.loads(full.bpe.to_str())["model"]["merges"]:
        parts[full.bpe.token_to_id(left + right)] = [full.bpe.token_to_id(left), full.bpe.token_to_id(right)]
    wanted, todo = set(range(256)), {i for text in texts for i in full.pieces(text)}
    while todo:
        i = todo.pop()
        wanted.add(i)
        todo |= set(parts.get(i, [])) - wanted
    return sorted(wanted)


def question_prompt(question: str) -> str:
    """The paper's prompt format; the answer follows it directly."""
    return f"Q: {question} A: "


def fraction(text: str) -> float:
    """A text's hash as a number in [0, 1): the same on every machine, so splits never move."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


# ---------------------------------------------------------------------------------------------- pictures

def read_picture(source: Path | bytes) -> Image.Image:
    """Any picture file as RGB, transparent parts on white.  Raises UserError when it can't be read."""
    name = source if isinstance(source, Path) else "a picture"
    try:
        picture = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
        picture.load()
    except FileNotFoundError:
        raise UserError(f"{name}: no such picture file")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a picture that can be read ({str(error).splitlines()[0]})")
    if picture.mode != "RGB":
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture


def fit_picture(picture: Image.Image, height: int, width: int | None = None) -> Image.Image:
    """Resized (bicubic) until it just covers height x width, a square of `height` without a width; then the centre."""
    target = (width or height, height)
    scale = max(to / side for to, side in zip(target, picture.size))
    size = [max(to, round(side * scale)) for to, side in zip(target, picture.size)]
    left, top = (size[0] - target[0]) // 2, (size[1] - target[1]) // 2
    return picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + target[0], top + target[1]))


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> (3, P, P) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


def to_picture(image: Tensor) -> Image.Image:
    """(3, P, P) in [-1, 1], clipped -> RGB picture."""
    array = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def read_tar(path: Path) -> Iterator[dict]:
    """The samples of a tar in WebDataset layout, .tar or .tar.gz, in order.

    Files whose names agree up to the first dot of the last part are one sample: {"__key__": name, extension:
    bytes, ...}.  Raises UserError for a file that is missing, no tar, or cut off.
    """
    sample: dict = {}
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                sample["__key__"] = key
                sample[extension.lower()] = tar.extractfile(member).read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such tar file")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a whole tar file ({error}); fetch or build it again")
    if sample:
        yield sample
