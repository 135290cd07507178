"""Tokenizers, tar shards in WebDataset layout, and the emoji set.

    python data.py emoji            # rebuild assets/emoji.tar.gz from two npm packages (needs npm, 140 MB)

The emoji set is 7,572 pictures: every emoji of Unicode 16 in the style of Google (Noto) and of Twitter
(Twemoji), with one caption each and questions with known answers from Unicode's metadata.

Shapes: B batch, L tokens, n pictures, P pixels a side.
"""

import argparse
import difflib
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

ASSETS = Path(__file__).parent / "assets"
EMOJI_TAR = ASSETS / "emoji.tar.gz"


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


# ---------------------------------------------------------------------------------------------- the emoji set

STYLES = {"noto": "google", "twemoji": "twitter"}       # our word in captions: the npm package's and folder's
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
NOUNS = {                                               # a kind of thing, and how a yes/no question names it
    "smileys & emotion": "a smiley", "people & body": "a person or a body part",
    "animals & nature": "an animal or a plant", "food & drink": "food or drink",
    "travel & places": "a place or a vehicle", "activities": "an activity", "objects": "an object",
    "symbols": "a symbol", "flags": "a flag", "component": "a skin tone swatch",
}


def fraction(text: str) -> float:
    """A text's hash as a number in [0, 1): the same on every machine, so splits never move."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def emoji_names(entries: list[dict]) -> dict[str, str]:
    """A short, natural and unique name for every base emoji, by its codepoints.

    Unicode's name in lower case, "sign" and "symbol" at its end and colons taken out, "X flag" as "flag of X".
    Where two emoji would share a name, the data set's own short name is used.
    """
    def plain(name: str) -> str:
        if name.endswith(" Flag"):
            return "flag of " + name.removesuffix(" Flag")
        head, colon, tail = name.lower().partition(": ")
        *first, last = tail.split(", ")
        if colon and head in ("family", "kiss", "couple with heart"):
            return f"{head} of {', '.join(first)} and {last}"
        return f"{head} with {tail}" if colon and head in ("man", "woman", "person") else name.lower().replace(":", "")

    short = {e["unified"]: plain(e["name"]).removesuffix(" sign").removesuffix(" symbol") for e in entries}
    taken = Counter(list(short.values()) + [plain(e["name"]) for e in entries
                                            if short[e["unified"]] != plain(e["name"])])
    names = {e["unified"]: short[e["unified"]] if taken[short[e["unified"]]] == 1 else plain(e["name"])
             for e in entries}
    taken = Counter(names.values())
    return {e["unified"]: names[e["unified"]] if taken[names[e["unified"]]] == 1
            else e["short_name"].replace("_", " ").replace("-", " ") for e in entries}


def emoji_records(entries: list[dict]) -> list[dict]:
    """One record a picture: key, image file, style, caption, metadata, questions with answers, split."""
    names = emoji_names(entries)
    records = []
    for entry in entries:
        variants = {"": entry} | entry.get("skin_variations", {})
        for tone_code, variant in variants.items():
            tones = list(dict.fromkeys(TONES[code] for code in tone_code.split("-") if code))
            tone = " and ".join(tones) or "none"
            words = [names[entry["unified"]]] + [f"{tone} skin tone{'s' * (len(tones) > 1)}"] * bool(tones)
            for style, package in STYLES.items():
                if not variant[f"has_img_{package}"]:
                    continue
                records.append(dict(
                    key=f"{Path(variant['image']).stem}-{style}", image=variant["image"], style=style,
                    emoji=entry["unified"], name=names[entry["unified"]], tone=tone,
                    kind=entry["category"].lower(), group=entry["subcategory"].replace("-", " "),
                    caption=", ".join(words + [f"{style} style"])))
    for record in records:
        record["questions"] = emoji_questions(record)
        held_style = sorted(STYLES)[fraction("which style of " + record["emoji"]) < 0.5]
        if fraction("style of " + record["emoji"]) < 0.05 and record["style"] == held_style:
            record["split"] = "style"
        elif record["tone"] != "none" and fraction("tone of " + record["key"]) < 0.10:
            record["split"] = "tone"
        else:
            record["split"] = "train"
    return records


def emoji_questions(record: dict) -> list[dict]:
    """Questions with known answers; one yes and one no for each picture, so that always-yes scores a half."""
    others = [kind for kind in NOUNS if kind != record["kind"]]
    other = others[int(fraction("not " + record["key"]) * len(others))]
    return [dict(type="kind", question="What kind of thing is this?", answer=record["kind"]),
            dict(type="group", question="Which group does it belong to?", answer=record["group"]),
            dict(type="tone", question="What is the skin tone?", answer=record["tone"]),
            dict(type="style", question="Which style is it drawn in?", answer=record["style"]),
            dict(type="yes/no", question=f"Is this {NOUNS[record['kind']]}?", answer="yes"),
            dict(type="yes/no", question=f"Is this {NOUNS[other]}?", answer="no")]


def build_emoji(out: Path = EMOJI_TAR) -> None:
    """Write the emoji tar, bit for bit the same each time, from the two npm packages (`npm pack`)."""
    with tempfile.TemporaryDirectory() as folder:
        packages = {style: f"emoji-datasource-{package}@16.0.0" for style, package in STYLES.items()}
        print("fetching " + " and ".join(packages.values()), flush=True)
        try:
            subprocess.run(["npm", "pack", "--silent", *packages.values()], cwd=folder, check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        except FileNotFoundError:
            raise UserError("npm was not found: install Node.js, or use the assets/emoji.tar.gz that is committed")
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"npm pack failed ({reason}): is the npm registry within reach?")
        pictures, entries = {}, []
        for style, package in STYLES.items():
            wanted = f"package/img/{package}/64/"
            with tarfile.open(Path(folder) / f"emoji-datasource-{package}-16.0.0.tgz") as tar:
                for member in tar:
                    if member.name.startswith(wanted):
                        pictures[style, member.name.removeprefix(wanted)] = tar.extractfile(member).read()
                    elif member.name == "package/emoji.json":
                        entries = json.load(tar.extractfile(member))
    records = sorted(emoji_records(entries), key=lambda r: hashlib.sha256(r["key"].encode()).digest())
    if len({r["caption"] for r in records}) != len(records):
        raise RuntimeError("two pictures share a caption")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    with open(temporary, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed, \
            tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for n, record in enumerate(records, 1):
            picture = io.BytesIO()
            image = record.pop("image")
            read_picture(pictures[record["style"], image]).save(picture, "WEBP", lossless=True, quality=75, method=4)
            text = json.dumps(record, ensure_ascii=False, indent=1).encode()
            for extension, content in (("webp", picture.getvalue()), ("json", text)):
                member = tarfile.TarInfo(f"{record['key']}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            if n % 500 == 0 or n == len(records):
                print(f"\r{n}/{len(records)} pictures", end="", flush=True)
    temporary.replace(out)
    counts = Counter(r["split"] for r in records)
    print(f"\n{out}: {out.stat().st_size / 2**20:.1f} MiB, splits {dict(counts)}")


def load_emoji(path: Path = EMOJI_TAR, pixels: int = 32) -> tuple[list[dict], Tensor]:
    """Every record of the emoji tar, and the pictures as uint8 (n, 3, P, P)."""
    records, pictures = [], []
    for sample in read_tar(path):
        try:
            record, picture = json.loads(sample["json"]), sample["webp"]
            record["caption"], record["questions"], record["split"]
        except (KeyError, ValueError):
            raise UserError(f"{path}: sample {sample['__key__']} lacks a webp picture or a caption, questions and split")
        records.append(record)
        pictures.append(np.array(fit_picture(read_picture(picture), pixels)))
    if not records:
        raise UserError(f"{path}: no samples in this tar")
    return records, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def emoji_texts(records: list[dict]) -> list[str]:
    """Every text of the emoji set, in the pieces in which it is tokenized."""
    return [r["caption"] for r in records] + [
        text for r in records for q in r["questions"] for text in (question_prompt(q["question"]), q["answer"])]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=["emoji"], help="emoji: rebuild the emoji tar from npm")
    parser.add_argument("--out", type=Path, default=EMOJI_TAR)
    args = parser.parse_args()
    build_emoji(args.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
