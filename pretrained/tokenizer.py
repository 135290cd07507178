"""Text <-> ids: GPT-2's byte-level BPE, whole or cut to a small vocabulary, and T5's, each with [MASK].

Shapes: L tokens.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Iterable

import torch
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from common.cli import UserError, require
from common.files import read_json_object, read_text

MERGES = Path(__file__).parents[1] / "assets" / "gpt2" / "merges.txt"


class Tokenizer:
    """Text <-> ids, with an end token, a padding token and [MASK].

    Special tokens are never read out of text: "[MASK]" in a caption is six characters like any others.
    specials: a pattern of T5's, which its vocabulary holds like any word.  seen: the ids of training texts,
    and capitals, the words that their captions capitalise, where these are known.  warns: about the first
    text that is cut; cut: counts them, and lost describes the first."""

    def __init__(self, bpe: BPE, end_id: int, pad_id: int, mask_id: int, vocab_size: int, specials: str = "",
                 keep: list[int] | None = None, seen: Iterable[int] | None = None,
                 capitals: Iterable[str] = ()):
        self.bpe = bpe
        self.end_id = end_id
        self.pad_id = pad_id
        self.mask_id = mask_id
        self.vocab_size = vocab_size
        self.specials = specials
        self.keep = keep
        self.seen = None if seen is None else set(seen)
        self.capitals = set(capitals)
        self.cut, self.lost, self.warns = 0, "", True

    def plain(self, text: str) -> str:
        """Pry special tokens apart: "</s>" becomes "< /s>"."""
        return re.sub(self.specials, r"< \1>", text) if self.specials else text

    def pieces(self, text: str) -> list[int]:
        """Return the bare ids of a text, no end token, no padding."""
        return self.bpe.encode(self.plain(text), add_special_tokens=False).ids

    def many(self, texts: list[str]) -> list[list[int]]:
        """Return the bare ids of many texts, on all cores."""
        encodings = self.bpe.encode_batch(list(map(self.plain, texts)), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def digest(self) -> str:
        """Hash the vocabulary and the special ids."""
        identity = sorted(self.bpe.get_vocab().items()), self.end_id, self.pad_id, self.mask_id
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]

    def files(self) -> dict[str, str]:
        """Return what a checkpoint's folder holds of it, by file name."""
        if self.specials:
            padding = {"pad_token": self.bpe.id_to_token(self.pad_id)}
            return {"tokenizer.json": self.bpe.to_str(),
                    "special_tokens_map.json": json.dumps(padding) + "\n"}
        content = {"tokenizer": "gpt2", "keep": self.keep}
        if self.seen is not None:
            content.update(seen=sorted(self.seen), capitals=sorted(self.capitals))
        return {"tokenizer.json": json.dumps(content) + "\n"}

    def continuation(self, text: str) -> list[int]:
        """Return the ids of a text that goes on where a token ended: T5's would put a space there."""
        ids = self.pieces(text)
        first = self.bpe.id_to_token(ids[0]) if ids else ""
        if text.startswith(" ") or not first.startswith("\u2581"):
            return ids
        if first == "\u2581":
            return ids[1:]
        bare = self.bpe.token_to_id(first[1:])
        return ids if bare is None else [bare] + ids[1:]

    def behind(self, ids: Tensor | list[int]) -> str:
        """Decode tokens that stand behind a text: T5's would lose the space that they begin with."""
        return self.decode([*self.pieces("a"), *ids])[1:]

    def meet(self, texts: list[str] | None) -> None:
        """Remember the ids and capitals of training texts; None: they are not known any more."""
        if texts is None:
            self.seen, self.capitals = None, set()
            return
        texts = sorted(set(texts))
        self.seen = (self.seen or set()).union(*self.many(texts))
        for text in texts:
            if not text.startswith("Q: "):
                self.capitals.update(word for word in re.findall(r"\w+", text) if word != word.lower())

    def lowered(self, text: str) -> str:
        """Lower the case of words that no training caption capitalises; [MASK] stays."""
        if self.seen is None:
            return text
        kept = self.capitals | {"[MASK]"}
        return re.sub(r"\[MASK\]|\w+", lambda word: word[0] if word[0] in kept else word[0].lower(), text)

    def strange(self, text: str) -> list[str]:
        """Return the words with a piece that no training text had, or for which there is none."""
        text = self.plain(text)
        encoding, unknown = self.bpe.encode(text, add_special_tokens=False), self.bpe.token_to_id("<unk>")
        spans = [span for i, span in zip(encoding.ids, encoding.offsets)
                 if i == unknown or self.seen is not None and i not in self.seen]
        words = []
        for word in re.finditer(r"\S+|\s\s+", text):
            if any(start < word.end() and end > word.start() for start, end in spans):
                words.append(word[0].strip(",.") or word[0])
        return list(dict.fromkeys(words))

    def encode(self, text: str, length: int) -> Tensor:
        """Return (length,) int64: the text, the end token, padding.  Longer texts are cut, with a warning."""
        return self.fit(self.pieces(text), length)

    def fit(self, ids: list[int], length: int) -> Tensor:
        """Cut or pad ids to (length,), with the end token; the first cut prints a warning to stderr."""
        room = length - 1
        if len(ids) > room:
            self.cut += 1
            if not self.lost:
                kept, cut = self.decode(ids[:room]), self.decode(ids[room:])
                self.lost = (f"{len(ids)} tokens, room for {room}: kept up to {kept[-20:]!r}, cut off "
                             f"{cut[:60]!r}")
                if self.warns:
                    print(f"warning: {self.lost}; others are counted", file=sys.stderr)
        ids = ids[:room] + [self.end_id]
        return torch.tensor(ids + [self.pad_id] * (length - len(ids)))

    def decode(self, ids: Tensor | list[int]) -> str:
        """Return the text up to the first end token; a [MASK] that is left reads "[MASK]"."""
        text, run = "", []
        for i in [*map(int, ids), self.end_id]:
            if i not in (self.end_id, self.pad_id, self.mask_id):
                run.append(i)
                continue
            text += self.bpe.decode(run)
            if i != self.mask_id:
                return text
            text += "[MASK]"
            run = []


def read_merges() -> list[tuple[str, ...]]:
    """Read GPT-2's pairs of pieces, in the order in which they are merged.  Raises UserError."""
    lines = read_text(MERGES).splitlines()[1:]
    require((len(lines) == 50000, f"{MERGES}: {len(lines)} merges, expected 50000; restore the file from git"))
    return [tuple(line.split(" ")) for line in lines]


def gpt2_tokenizer(keep: list[int] | None = None, **known) -> Tokenizer:
    """Make GPT-2's byte-level BPE, <|endoftext|> as end and padding, and [MASK] as one id more (50257).

    keep: GPT-2 ids to keep, renumbered in their order, for a small model's small head; it must hold the 256
    bytes and, for each id, the two ids it is merged from (`gpt2_subset` makes such a list).  Text made of
    kept tokens is cut up exactly as GPT-2 does; any other text falls into smaller pieces, down to bytes.
    known: `seen` and `capitals`."""
    pairs = read_merges()
    # GPT-2's order: printable bytes first, then the rest moved up to 256 and on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + ["".join(pair) for pair in pairs]
    if keep is not None:
        if keep != sorted(set(keep)) or keep[:256] != list(range(256)) or keep[-1] >= len(tokens):
            raise UserError("a tokenizer's keep list must be ascending GPT-2 ids that start with 256 bytes")
        tokens = [tokens[i] for i in keep]
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [pair for pair in pairs if "".join(pair) in vocab]
    if any(part not in vocab for pair in pairs for part in pair):
        raise UserError("a tokenizer's keep list holds a token without the two it is merged from")
    bpe = BPE(models.BPE(vocab=vocab, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    end = len(tokens)
    return Tokenizer(bpe, end_id=end, pad_id=end, mask_id=end + 1, vocab_size=end + 2, keep=keep, **known)


def t5_tokenizer(file: Path) -> Tokenizer:
    """Read T5's tokenizer.json: </s> as end, <extra_id_0> as [MASK], as padding what special_tokens_map.json
    or tokenizer_config.json beside it names (D-DiT pads with </s>), otherwise <pad>.  Raises UserError."""
    try:
        bpe = BPE.from_file(str(file))
    except Exception as error:      # tokenizers raises a bare Exception
        raise UserError(f"{file}: not a tokenizer that can be read ({str(error).splitlines()[0]})")
    bpe.no_padding()
    bpe.no_truncation()
    pad = "<pad>"
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file.parent / name).exists():
            token = read_json_object(file.parent / name).get("pad_token") or pad
            pad = token.get("content", pad) if isinstance(token, dict) else token
    ids = {token: bpe.token_to_id(token) for token in ("</s>", pad, "<extra_id_0>")}
    absent = [token for token, i in ids.items() if i is None]
    require((not absent, f"{file}: has no {' and no '.join(absent)}, expected T5 v1.1's tokenizer"))
    return Tokenizer(bpe, ids["</s>"], ids[pad], ids["<extra_id_0>"],
                     bpe.get_vocab_size(with_added_tokens=True), r"<(/s|pad|unk|extra_id_\d+)>")


def gpt2_subset(texts: list[str]) -> list[int]:
    """Return the GPT-2 ids that the texts use, those they are merged from, and the 256 bytes, ascending."""
    full = gpt2_tokenizer()
    number = full.bpe.token_to_id
    halves = {number(left + right): {number(left), number(right)} for left, right in read_merges()}
    wanted, todo = set(range(256)), set().union(*full.many(list(set(texts))))
    while todo:
        i = todo.pop()
        wanted.add(i)
        todo |= halves.get(i, set()) - wanted
    return sorted(wanted)
