"""Text <-> ids: GPT-2's byte-level BPE, full or with a small vocabulary, and T5's; with [MASK].

Shapes: L tokens.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable

import torch
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from common.cli import UserError, require, warn
from common.files import is_there, read_json_object, read_lines, read_text

MERGES = Path(__file__).parents[1] / "assets" / "gpt2" / "merges.txt"


@dataclass(eq=False)
class Tokenizer:
    """Text <-> ids, with an end token, a padding token and [MASK].

    Special tokens are never parsed from text: "[MASK]" in a caption is six ordinary characters."""
    bpe: BPE
    end_id: int
    pad_id: int
    mask_id: int
    vocab_size: int
    specials: str = ""                  # regex of T5's special tokens, which its vocabulary holds
    keep: list[int] | None = None       # the GPT-2 ids of a small vocabulary
    seen: set[int] | None = None        # the ids of the training texts; None: unknown
    capitals: set[str] = field(default_factory=set)     # words with capitals in captions and answers
    warns: bool = True                  # print a warning for the first text that is cut
    cut: int = 0                        # number of texts that were cut
    first_cut: str = ""                 # describes the first one

    def plain(self, text: str) -> str:
        """Break up special tokens in a text, so that they are read as text: "</s>" -> "< /s>"."""
        return re.sub(self.specials, r"< \1>", text) if self.specials else text

    def pieces(self, text: str) -> list[int]:
        """Return the ids of a text, without end token and padding."""
        return self.bpe.encode(self.plain(text), add_special_tokens=False).ids

    def many(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of many texts, as `pieces` does, on all cores."""
        plain = [self.plain(text) for text in texts]
        return [encoding.ids for encoding in self.bpe.encode_batch(plain, add_special_tokens=False)]

    def digest(self) -> str:
        """Return a hash of the vocabulary and the special ids, 16 hexadecimal digits."""
        vocabulary = sorted(self.bpe.get_vocab().items())
        identity = vocabulary, self.end_id, self.pad_id, self.mask_id
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]

    def files(self) -> dict[str, str]:
        """Return the contents of a checkpoint's tokenizer files, by file name."""
        if self.specials:
            padding = json.dumps({"pad_token": self.bpe.id_to_token(self.pad_id)})
            return {"tokenizer.json": self.bpe.to_str(), "special_tokens_map.json": padding + "\n"}
        content = dict(tokenizer="gpt2", keep=self.keep)
        if self.seen is not None:
            content.update(seen=sorted(self.seen), capitals=sorted(self.capitals))
        return {"tokenizer.json": json.dumps(content) + "\n"}

    def continuation(self, text: str) -> list[int]:
        """Return the ids of a text that follows other tokens directly, without the space that T5's
        tokenizer would put before it."""
        ids = self.pieces(text)
        first = self.bpe.id_to_token(ids[0]) if ids else ""
        if text.startswith(" ") or not first.startswith("\u2581"):
            return ids
        if first == "\u2581":
            return ids[1:]
        bare = self.bpe.token_to_id(first[1:])
        return ids if bare is None else [bare, *ids[1:]]

    def behind(self, ids: Tensor | list[int]) -> str:
        """Decode tokens that follow a text, and keep a leading space (T5's decoder drops it)."""
        return self.decode([*self.pieces("a"), *ids])[1:]

    def meet(self, texts: list[str] | None) -> None:
        """Remember the ids and capitalised words of training texts; None: forget all of them."""
        if texts is None:
            self.seen = None
            self.capitals = set()
            return
        texts = sorted(set(texts))
        self.seen = (self.seen or set()).union(*self.many(texts))
        for text in texts:
            if text.startswith("Q: "):
                continue
            words = re.findall(r"\w+", text)
            self.capitals.update(word for word in words if word != word.lower())

    def lowered(self, text: str) -> str:
        """Lower the case of each word that no training text has in this case; [MASK] stays."""
        if self.seen is None:
            return text
        kept = self.capitals | {"[MASK]"}

        def lower(match: re.Match) -> str:
            return match[0] if match[0] in kept else match[0].lower()
        return re.sub(r"\[MASK\]|\w+", lower, text)

    def strange(self, text: str) -> list[str]:
        """Return the words with a token that is unknown or that no training text has."""
        text = self.plain(text)
        encoding = self.bpe.encode(text, add_special_tokens=False)
        unknown = self.bpe.token_to_id("<unk>")
        spans = []
        for i, span in zip(encoding.ids, encoding.offsets):
            unseen = self.seen is not None and i not in self.seen
            if unseen or i == unknown:
                spans.append(span)
        words = []
        for word in re.finditer(r"\S+|\s\s+", text):
            if any(start < word.end() and end > word.start() for start, end in spans):
                words.append(word[0].strip(",.") or word[0])
        return list(dict.fromkeys(words))

    def encode(self, text: str, length: int) -> Tensor:
        """Return ids (length,) int64: the text, the end token, padding.  Long texts: see `fit`."""
        return self.fit(self.pieces(text), length)

    def fit(self, ids: list[int], length: int) -> Tensor:
        """Add the end token and cut or pad ids to (length,) int64.

        The first text that is cut triggers a warning on stderr."""
        room = length - 1
        if len(ids) > room:
            self.cut += 1
            if not self.first_cut:
                self.describe_cut(ids, room)
        ids = ids[:room] + [self.end_id]
        return torch.tensor(ids + [self.pad_id] * (length - len(ids)))

    def describe_cut(self, ids: list[int], room: int) -> None:
        """Describe in `first_cut`, and in a warning, what `ids` lose after `room` tokens."""
        kept = self.decode(ids[:room])
        cut = self.decode(ids[room:])
        self.first_cut = (f"{len(ids)} tokens, room for {room}: kept up to {kept[-20:]!r}, cut "
                          f"off {cut[:60]!r}")
        if self.warns:
            warn(f"{self.first_cut}; others are counted")

    def decode(self, ids: Tensor | list[int]) -> str:
        """Return the text up to the first end or padding token; mask ids are shown as "[MASK]"."""
        text = ""
        run = []
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
    """Read GPT-2's merges: pairs of pieces, in merging order.  Raises UserError."""
    lines = read_lines(MERGES)[1:]
    require((len(lines) == 50000,
             f"{MERGES}: {len(lines)} merges, expected 50000; restore the file from git"))
    return [tuple(line.split(" ")) for _, line in lines]


def gpt2_tokenizer(keep: list[int] | None = None, seen: list[int] | None = None,
                   capitals: Iterable[str] = ()) -> Tokenizer:
    """Make GPT-2's byte-level BPE, with <|endoftext|> as end and padding and [MASK] as a new id.

    keep: GPT-2 ids, renumbered in their order, for a small model's small head.  The list must hold
    the 256 bytes and, for each id, the two ids that it is merged from (`gpt2_subset` makes it).
    Text made of kept tokens is split exactly as by GPT-2; other text is split into smaller pieces,
    down to bytes.  seen, capitals: see `Tokenizer`.  Raises UserError for a wrong `keep`."""
    pairs = read_merges()
    # GPT-2's order: 188 printable bytes, then the other 68, written as characters 256 to 323
    codes = [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]
    tokens = [chr(code) for code in codes]
    tokens += ["".join(pair) for pair in pairs]
    if keep is not None:
        has_bytes = keep[:256] == list(range(256))
        require((has_bytes and keep == sorted(set(keep)) and keep[-1] < len(tokens),
                 "a tokenizer's keep list must be ascending GPT-2 ids that start with 256 bytes"))
        tokens = [tokens[i] for i in keep]
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [pair for pair in pairs if "".join(pair) in vocab]
    require((vocab.keys() >= set().union(*pairs),
             "a tokenizer's keep list holds a token without the two it is merged from"))
    bpe = BPE(models.BPE(vocab=vocab, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    end = len(tokens)
    return Tokenizer(bpe, end, end, mask_id=end + 1, vocab_size=end + 2, keep=keep,
                     seen=None if seen is None else set(seen), capitals=set(capitals))


def t5_tokenizer(file: Path) -> Tokenizer:
    """Read T5's tokenizer.json, with </s> as end token and <extra_id_0> as [MASK].

    The padding token is the pad_token of special_tokens_map.json or tokenizer_config.json in the
    same folder (D-DiT pads with </s>), or <pad> without them.  Raises UserError."""
    content = read_text(file)
    try:
        bpe = BPE.from_str(content)
    except Exception as error:      # tokenizers raises a bare Exception
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: not a tokenizer that can be read ({reason})")
    bpe.no_padding()
    bpe.no_truncation()
    pad = "<pad>"
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if is_there(file.parent / name):
            token = read_json_object(file.parent / name).get("pad_token") or pad
            pad = token.get("content", pad) if isinstance(token, dict) else token
            require((isinstance(pad, str), f"{file.parent / name}: \"pad_token\" is {pad!r}, expected "
                     f"a text"))
    ids = []
    for token in ("</s>", pad, "<extra_id_0>"):
        ids.append(bpe.token_to_id(token))
        require((ids[-1] is not None, f"{file}: has no {token}, expected T5 v1.1's tokenizer"))
    return Tokenizer(bpe, *ids, bpe.get_vocab_size(), specials=r"<(/s|pad|unk|extra_id_\d+)>")


def gpt2_subset(texts: list[str]) -> list[int]:
    """Return the GPT-2 ids that the texts use, the ids that these are merged from, and the 256
    bytes, ascending."""
    full = gpt2_tokenizer()
    id_of = full.bpe.get_vocab()
    halves = {}
    for left, right in read_merges():
        halves[id_of[left + right]] = {id_of[left], id_of[right]}
    wanted = set(range(256))
    pending = set().union(*full.many(list(set(texts))))
    while pending:
        i = pending.pop()
        wanted.add(i)
        pending |= halves.get(i, set()) - wanted
    return sorted(wanted)
