"""CLIP (arXiv 2103.00020): how well pictures and texts go together, as the cosine of their embeddings.

    clip, tokenizer = load("clip-vit-large-patch14", "cuda"), tokenizer_of("clip-vit-large-patch14")
    found = score(pairs_of(Path("drawn")), clip, tokenizer, "cuda")
    print(f"{found.mean:.2f} +- {found.error:.2f}, {found.count} pairs, {len(found.bad)} left out")

Two transformers of the same block read a text and a picture, and each projects one of its tokens into a
shared space: the text's end token, the picture's class token.  Weights and vocabulary are read from a
Hugging Face folder.

Shapes: B batch, L text tokens, N picture tokens (a class token and g x g patches), W width of a tower,
H heads, E width of the shared space, S pixels a side.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from files import read_json_object, read_text
from checkpoint import build, fill, listing, shards
from cli import UserError, require
from layouts import Config, Entry, rename
from pictures import read_picture, text_fields, to_tensor
from sources import PICTURES, Folder, is_text
from tensors import Tensors

# our names (left) in Hugging Face's files (right); {q,k,v} are three tensors stacked, as in layouts.py
HUGGING_FACE = [
    ("txt.positions", "text_model.embeddings.position_embedding.weight"),
    ("img.positions", "vision_model.embeddings.position_embedding.weight"),
    ("txt.proj.", "text_projection."), ("img.proj.", "visual_projection."),
    ("txt.norm.", "text_model.final_layer_norm."), ("img.norm.", "vision_model.post_layernorm."),
    ("embed.", "text_model.embeddings.token_embedding."),
    ("patches.", "vision_model.embeddings.patch_embedding."),
    ("cls", "vision_model.embeddings.class_embedding"), ("pre_norm.", "vision_model.pre_layrnorm."),
    ("txt.blocks.", "text_model.encoder.layers."), ("img.blocks.", "vision_model.encoder.layers."),
    (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."), (".qkv.", ".self_attn.{q,k,v}_proj."),
    (".out.", ".self_attn.out_proj."), (".fc1.", ".mlp.fc1."), (".fc2.", ".mlp.fc2."),
]
# in the files, and not a part of the towers: the temperature, 0 1 2 3 ...
BESIDE = ("logit_scale", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
ACTIVATIONS = dict(quick_gelu=lambda x: x * torch.sigmoid(1.702 * x), gelu=F.gelu)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)   # of RGB in [0, 1]
START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARIES = ["tokenizer.json", "merges.txt"]                  # the first that is there
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@dataclass
class TowerConfig:
    width: int                  # W
    depth: int                  # blocks
    heads: int                  # H
    hidden: int                 # of the MLP
    length: int                 # rows of the position table
    causal: bool                # a token sees those before it alone: in the text
    activation: str             # a key of ACTIVATIONS
    eps: float                  # of the layer norms


class Block(nn.Module):
    """x (B, L, W) -> (B, L, W): attention and an MLP, each behind its norm."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        self.heads, self.causal, self.activation = c.heads, c.causal, ACTIVATIONS[c.activation]
        self.norm1, self.norm2 = nn.LayerNorm(c.width, c.eps), nn.LayerNorm(c.width, c.eps)
        self.qkv, self.out = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)
        self.fc1, self.fc2 = nn.Linear(c.width, c.hidden), nn.Linear(c.hidden, c.width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))          # (B, L, 3, H, W/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                      # (B, H, L, W/H) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)        # (B, H, L, W/H)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class Tower(nn.Module):
    """Embedded tokens (B, L, W), and which of them (B,) is read -> (B, E)."""

    def __init__(self, c: TowerConfig, joint: int):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(c.length, c.width))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, c.eps)
        self.proj = nn.Linear(c.width, joint, bias=False)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = x[torch.arange(len(x), device=x.device), at]                          # (B, W)
        return self.proj(self.norm(x))                                            # (B, E)


class CLIP(nn.Module):
    """Texts and pictures into one space.  Embeddings are left as long as they come out, not normalised."""

    def __init__(self, txt: TowerConfig, img: TowerConfig, vocab_size: int, patch: int, joint: int):
        super().__init__()
        self.txt, self.img = Tower(txt, joint), Tower(img, joint)
        self.embed = nn.Embedding(vocab_size, txt.width)
        self.patches = nn.Conv2d(3, img.width, patch, patch, bias=False)
        self.cls = nn.Parameter(torch.zeros(img.width))
        self.pre_norm = nn.LayerNorm(img.width, img.eps)
        self.size = patch * math.isqrt(img.length - 1)                            # S

    def text(self, ids: Tensor) -> Tensor:
        """ids (B, L) int64, an end token in each row -> (B, E).  What stands behind the first end token is
        not seen.  ValueError when L is over the length of the position table."""
        L, length = ids.shape[1], len(self.txt.positions)
        if L > length:
            raise ValueError(f"texts of {L} tokens are longer than the {length} positions that were trained")
        x = self.embed(ids) + self.txt.positions[:L]                              # (B, L, W)
        return self.txt(x, ids.argmax(-1))      # the end token has the highest id; the first of several

    def image(self, x: Tensor) -> Tensor:
        """x (B, 3, S, S), made by `prepare` -> (B, E)."""
        x = self.patches(x).flatten(2).transpose(1, 2)                            # (B, g g, W)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.img.positions      # (B, N, W)
        return self.img(self.pre_norm(x), torch.zeros(len(x), dtype=torch.int64, device=x.device))


def load(path: str | Path, device: str = "cpu") -> CLIP:
    """CLIP with ViTs of any size, of a Hugging Face folder or a safetensors file, in float32 and eval mode.

    What no shape shows, the heads, "quick_gelu" or "gelu" and the norms' eps, is read from the config.json in
    the folder or beside the file.  Without one it is as in OpenAI's models: W / 64 heads, quick GELU, 1e-5.
    LAION's have GELU and tensors of the same names, so name the folder.  Raises UserError with all tensors
    that are missing, left over, misshapen or not finite."""
    path = Path(path)
    require((path.suffix not in (".pt", ".pth", ".bin") or not path.is_file(),
             f"{path}: may be a program, which would be run; name a Hugging Face folder with .safetensors"))
    tensors = Tensors(shards(path) if path.is_dir() else [path])
    file, begins = tensors.files[0], {key.split(".")[0] for key in tensors.file}
    require(("visual" not in begins, f"{file}: its tensors have OpenAI's names, expected a Hugging Face "
             f"folder, such as clip-vit-large-patch14"),
            ("vision_model" in begins,
             f"{file}: no CLIP in it; its tensors begin with {', '.join(sorted(begins)[:4]) or 'nothing'}"))
    vocab_size = tensors.size(key_of("embed.weight"), 0)
    joint = tensors.size(key_of("txt.proj.weight"), 0)
    patch = tensors.size(key_of("patches.weight"), 2)
    config = read_json_object(file.parent / "config.json") if (file.parent / "config.json").is_file() else {}
    txt = tower_config(tensors, "txt", config.get("text_config") or {})
    img = tower_config(tensors, "img", config.get("vision_config") or {})
    clip, entries = build(lambda: CLIP(txt, img, vocab_size, patch, joint), file), {}
    for name, parameter in clip.named_parameters():
        keys, shape = rename(name, HUGGING_FACE)[0], tuple(parameter.shape)
        entries[name] = Entry(keys, (shape[0] // len(keys), *shape[1:]))
    fill(clip, tensors, entries, torch.float32, BESIDE)
    return clip.to(device).eval()


def key_of(name: str) -> str:
    """Return the published name of a parameter of ours; of "qkv", the name of "q"."""
    return rename(name, HUGGING_FACE)[0][0]


def tower_config(tensors: Tensors, part: str, config: dict) -> TowerConfig:
    """Sizes of the "txt" or the "img" tower, from the shapes and its section of config.json.  UserError."""
    require((isinstance(config, dict), f"{tensors.files[0].parent}/config.json: expected an object for each "
             f"tower, found {str(config)[:40]}"))
    c = Config(tensors, config)
    length, width = (tensors.size(key_of(f"{part}.positions"), axis) for axis in (0, 1))
    # a config.json leaves out what is the default there, 8 and 12
    heads = c.whole("num_attention_heads", dict(txt=8, img=12)[part] if config else max(1, width // 64))
    require((width % heads == 0, f"{tensors.files[0]}: a width of {width} does not divide by {heads} heads"))
    c.only("hidden_act", *ACTIVATIONS)
    return TowerConfig(
        width, depth=tensors.count(key_of(f"{part}.blocks.")), heads=heads,
        hidden=tensors.size(key_of(f"{part}.blocks.0.fc1.weight"), 0),
        length=length if part == "txt" else 1 + math.isqrt(max(1, length - 1)) ** 2, causal=part == "txt",
        activation=config.get("hidden_act", "quick_gelu"), eps=c.real("layer_norm_eps", 1e-5, 0))


def tokenizer_of(path: str | Path, length: int = 77) -> Tokenizer:
    """CLIP's byte-level BPE: lower case, "</w>" behind each word, start and end token, cut to `length` with
    the end token kept, and the shorter texts of a batch filled up with end tokens.

    path: a folder, or weights in a folder, that has tokenizer.json or merges.txt with vocab.json, or one of
    these files.  Ids are those of Hugging Face's tokenizer.  OpenAI's own does html.unescape and ftfy first:
    "&amp;", ligatures, wide letters and garbled encodings give others.  Of both, "<|endoftext|>" in a text is
    the end token.  Raises UserError."""
    path = Path(path)
    folder, names = path if path.is_dir() else path.parent, VOCABULARIES
    if path.suffix in (".json", ".txt"):
        names = ["merges.txt" if path.name == "vocab.json" else path.name]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    require((file, f"{folder}: expected CLIP's vocabulary, {' or '.join(names)}, found "
             f"{listing(folder) if folder.is_dir() else 'no folder'}; name the file or folder that has it"))
    try:
        bpe = Tokenizer.from_file(str(file)) if file.suffix == ".json" else bpe_of(file)
    except Exception as error:      # tokenizers raises a bare Exception
        raise error if isinstance(error, UserError) else UserError(
            f"{file}: not a vocabulary that can be read ({str(error).splitlines()[0]})")
    bpe.no_padding()
    bpe.no_truncation()
    end = bpe.token_to_id(END)
    require((end is not None and bpe.encode("").ids == [bpe.token_to_id(START), end],
             f"{file}: puts no {START} and {END} around a text, expected CLIP's vocabulary"))
    bpe.enable_truncation(length)
    bpe.enable_padding(pad_id=end, pad_token=END)
    return bpe


def bpe_of(file: Path) -> Tokenizer:
    """Return the tokenizer of merges, one a line behind a first line, and of the ids in vocab.json beside."""
    vocab = file.with_name("vocab.json")
    require((vocab.is_file(), f"{file}: expected vocab.json beside it, which has the ids"))
    merges = [tuple(line.split()) for line in read_text(file).split("\n")[1:] if line.strip()]
    bpe = Tokenizer(models.BPE(vocab=read_json_object(vocab), merges=merges, end_of_word_suffix="</w>",
                               unk_token=END))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.add_special_tokens([START, END])
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(name, bpe.token_to_id(name)) for name in (START, END)])
    return bpe


def prepare(picture: Image.Image, size: int) -> Tensor:
    """RGB picture -> (3, S, S) float32, as OpenAI does it: the short side resized to S by a bicubic filter,
    the middle cut out, CLIP's mean and deviation.  Only the middle is made, since all of 100,000 x 1 would
    take gigabytes: of what is not square, up to 0.3% of the values are one level of 255 off for it."""
    (width, height), short = picture.size, min(picture.size)
    across, down = size * width // short, size * height // short         # of the whole, resized
    left, top = round((across - size) / 2), round((down - size) / 2)
    box = (left * width / across, top * height / down,
           (left + size) * width / across, (top + size) * height / down)
    x = to_tensor(picture.resize((size, size), Image.Resampling.BICUBIC, box)) / 2 + 0.5
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@dataclass
class Result:
    mean: float                 # of the cosines x 100
    error: float                # its standard error, std(ddof=1) / sqrt(count), x 100; nan of a single pair
    count: int                  # pairs that were scored
    bad: list[str]              # a line for each that could not be
    values: dict[str, float]    # each pair's cosine x 100, by name


@torch.inference_mode()
def score(pairs: Iterable[tuple[str, Path | bytes | Callable[[], Image.Image], str | None]], clip: CLIP,
          tokenizer: Tokenizer, device: str, batch: int = 32,
          say: Callable[[int, int], None] = lambda done, total: None) -> Result:
    """The CLIP score: cosines of pictures and their captions, negative ones as they are (torchmetrics puts a
    mean below 0 at 0; CLIPScore, arXiv 2104.08718, is 2.5 max(cosine, 0)).

    pairs: (name, a picture's file, bytes or reader, caption), each name once.  A picture that can't be read
    and a caption that is missing or blank have a line in `bad`.  say: told (done, total) after each batch.
    Raises UserError when no pair is left, or the vocabulary is not that of the weights."""
    pairs, bad, values = list(pairs), [], {}
    found, expected = tokenizer.get_vocab_size(), clip.embed.num_embeddings
    require((found == expected, f"a vocabulary of {found:,} tokens, expected {expected:,}, as CLIP's weights "
             f"have; name the one that they were trained with"))
    if len({name for name, *_ in pairs}) < len(pairs):
        raise ValueError("two pairs have the same name")
    for start in range(0, len(pairs), batch):
        usable = []
        for name, source, caption in pairs[start:start + batch]:
            try:
                picture = source() if callable(source) else read_picture(source, name)
                require((is_text(caption) and caption.strip(), f"{name}: has no caption"))
                usable.append((name, prepare(picture, clip.size), caption))
            except UserError as error:
                bad.append(str(error))
        if usable:
            names, pictures, captions = zip(*usable)
            ids = torch.tensor([one.ids for one in tokenizer.encode_batch(list(captions))])     # (B, L)
            img = F.normalize(clip.image(torch.stack(pictures).to(device)), dim=-1)             # (B, E)
            txt = F.normalize(clip.text(ids.to(device)), dim=-1)                                # (B, E)
            values |= zip(names, (100 * (img * txt).sum(-1)).tolist())
        say(min(start + batch, len(pairs)), len(pairs))
    require((values, f"none of {len(pairs)} pairs can be scored{f'; {bad[0]}' if bad else ''}"))
    cosines = np.array(list(values.values()))
    error = cosines.std(ddof=1) / math.sqrt(len(cosines)) if len(cosines) > 1 else math.nan
    return Result(float(cosines.mean()), float(error), len(cosines), bad, values)


def pairs_of(folder: Path) -> list[tuple[str, Path, str | None]]:
    """(name, file, caption) of a folder's pictures, for `score`.  The caption is the text field "prompt" of a
    PNG (gallery.py's have one), else the first line of NAME.txt, else what metadata.jsonl says, else None.
    Raises UserError for a folder without pictures, and for captions that can't be read."""
    require((folder.is_dir(), f"{folder}: expected a folder of pictures"))
    files = sorted(file for file in folder.rglob("*")
                   if file.suffix.lower() in PICTURES and not file.name.startswith("."))
    require((files, f"{folder}: expected pictures ({', '.join(PICTURES)}), found {listing(folder)}"))
    listed = dict(Folder(folder).entries) if (folder / "metadata.jsonl").exists() else {}
    return [(str(file.relative_to(folder)), file, caption_of(file, listed)) for file in files]


def caption_of(file: Path, listed: dict[Path, list[str]]) -> str | None:
    try:
        fields = text_fields(file) if file.suffix.lower() == ".png" else {}
    except UserError:
        fields = {}                                              # `score` says what is wrong with it
    if "prompt" in fields:
        return fields["prompt"]
    beside = file.with_suffix(".txt")
    return read_text(beside).split("\n")[0].strip() if beside.is_file() else listed.get(file, [None])[0]
