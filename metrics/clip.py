"""Measure how well images fit their captions, by the cosine of their CLIP embeddings (arXiv
2103.00020).

    folder = Path("clip-vit-large-patch14")
    clip, tokenizer = load(folder, "cuda"), load_tokenizer(folder)
    cosines, left_out = score(read_pairs(Path("drawn")), clip, tokenizer, "cuda")
    print(summarize(cosines), len(cosines), "pairs", len(left_out), "left out")

Two transformers of the same design read a text and an image.  Each projects one of its tokens into
a shared space: the text's end token, or the image's class token.  Weights and tokenizer are read
from a Hugging Face folder.

Shapes: B batch, L text tokens, N image tokens (a class token and g x g patches), W width of a
tower, H heads, E width of the shared space, S pixels a side.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from checkpoint import build, load_tensors, shards
from common.cli import UserError, require
from common.files import is_there, read_json_object, read_text, text_lines
from common.progress import batches
from dataset.images import read_image, text_fields, to_tensor
from metrics.fid import image_files
from pretrained.layouts import Config, rename, renamed_entries
from pretrained.safetensors_io import Tensors

# Our names and those in Hugging Face's files, as in pretrained/layouts.py; {q,k,v} are three
# tensors that we stack.
HUGGING_FACE = {
    "txt.positions": "text_model.embeddings.position_embedding.weight",
    "img.positions": "vision_model.embeddings.position_embedding.weight",
    "txt.proj.": "text_projection.",
    "img.proj.": "visual_projection.",
    "txt.norm.": "text_model.final_layer_norm.",
    "img.norm.": "vision_model.post_layernorm.",
    "embed.": "text_model.embeddings.token_embedding.",
    "patches.": "vision_model.embeddings.patch_embedding.",
    "cls": "vision_model.embeddings.class_embedding",
    "pre_norm.": "vision_model.pre_layrnorm.",
    "txt.blocks.": "text_model.encoder.layers.",
    "img.blocks.": "vision_model.encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".qkv.": ".self_attn.{q,k,v}_proj.",
    ".out.": ".self_attn.out_proj.",
    ".fc1.": ".mlp.fc1.",
    ".fc2.": ".mlp.fc2.",
}
# tensors in the files that are not used here: the temperature, and the numbers 0 1 2 3 ...
BESIDE = ("logit_scale", "text_model.embeddings.position_ids",
          "vision_model.embeddings.position_ids")
# each tower's section of config.json, and the number of heads if the section does not give it
SECTIONS = dict(txt=("text_config", 8), img=("vision_config", 12))
MEAN = 0.48145466, 0.4578275, 0.40821073                         # of the RGB values in [0, 1]
STD = 0.26862954, 0.26130258, 0.27577711
START = "<|startoftext|>"
END = "<|endoftext|>"
TEXT_LENGTH = 77                # tokens


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = dict(quick_gelu=quick_gelu, gelu=F.gelu)


@dataclass
class TowerConfig:
    width: int                  # W
    depth: int                  # blocks
    heads: int                  # H
    hidden: int                 # hidden width of the MLP
    length: int                 # rows of the position table
    causal: bool                # attend only to earlier tokens; True for the text
    activation: str             # a key of ACTIVATIONS
    eps: float                  # epsilon of the layer norms


class Block(nn.Module):
    """A transformer block: norm and attention, then norm and MLP, (B, L, W) -> (B, L, W)."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        self.heads = c.heads
        self.causal = c.causal
        self.activation = ACTIVATIONS[c.activation]
        self.norm1 = nn.LayerNorm(c.width, c.eps)
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.out = nn.Linear(c.width, c.width)
        self.norm2 = nn.LayerNorm(c.width, c.eps)
        self.fc1 = nn.Linear(c.width, c.hidden)
        self.fc2 = nn.Linear(c.hidden, c.width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))         # (B, L, 3, H, W/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                   # (B, H, L, W/H) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)        # (B, H, L, W/H)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class Tower(nn.Module):
    """Blocks over embedded tokens (B, L, W).  The token at position `at` (B,) is projected to
    (B, E)."""

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
    """Embed texts and images in one space.  The embeddings (B, E) are not normalised."""

    def __init__(self, txt: TowerConfig, img: TowerConfig, vocab_size: int, patch: int, joint: int):
        super().__init__()
        self.txt = Tower(txt, joint)
        self.img = Tower(img, joint)
        self.embed = nn.Embedding(vocab_size, txt.width)
        self.patches = nn.Conv2d(3, img.width, patch, patch, bias=False)
        self.cls = nn.Parameter(torch.zeros(img.width))
        self.pre_norm = nn.LayerNorm(img.width, img.eps)
        self.size = patch * math.isqrt(img.length - 1)                            # S

    def text(self, ids: Tensor) -> Tensor:
        """Embed ids (B, L) int64, with an end token in each row, as (B, E).  Tokens after the first
        end token have no effect."""
        x = self.embed(ids) + self.txt.positions[:ids.shape[1]]                   # (B, L, W)
        return self.txt(x, ids.argmax(-1))      # the end token has the largest id; take the first

    def image(self, x: Tensor) -> Tensor:
        """Embed images (B, 3, S, S) from `prepare` as (B, E)."""
        x = self.patches(x).flatten(2).transpose(1, 2)                            # (B, g g, W)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.img.positions      # (B, N, W)
        class_token = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return self.img(self.pre_norm(x), class_token)


def key_of(name: str) -> str:
    """Return the published name of one of our parameters; for "qkv", that of "q"."""
    return rename(name, HUGGING_FACE)[0]


def tower_config(tensors: Tensors, part: str, config: dict) -> TowerConfig:
    """Read the sizes of the "txt" or "img" tower from shapes and config.json.  Raises UserError."""
    name, default_heads = SECTIONS[part]
    section = config.get(name) or {}
    values = Config(tensors, section)
    require((isinstance(section, dict),
             f"{values.where}: {name} is {str(section)[:40]}, expected an object"))
    positions = key_of(f"{part}.positions")
    width = tensors.size(positions, 1)
    heads = values.whole("num_attention_heads", default_heads)
    require((width % heads == 0,
             f"{values.where}: a width of {width} does not divide by {heads} heads"))
    values.only("hidden_act", *ACTIVATIONS)
    return TowerConfig(
        width, depth=tensors.count(key_of(f"{part}.blocks.")), heads=heads,
        hidden=tensors.size(key_of(f"{part}.blocks.0.fc1.weight"), 0),
        length=tensors.size(positions, 0),
        causal=part == "txt", activation=section.get("hidden_act", "quick_gelu"),
        eps=values.real("layer_norm_eps", 1e-5, 0))


def load(folder: Path, device: str = "cpu") -> CLIP:
    """Load CLIP, with a ViT of any size, from a Hugging Face folder, in float32 and eval mode.

    config.json gives what no shape shows: heads, "quick_gelu" or "gelu", and the norms' epsilon.
    Raises UserError for tensors that are missing, unexpected, of a wrong shape or not finite."""
    tensors = Tensors(shards(folder))
    config = read_json_object(folder / "config.json")
    vocab_size = tensors.size(key_of("embed.weight"), 0)
    joint = tensors.size(key_of("txt.proj.weight"), 0)
    patch = tensors.size(key_of("patches.weight"), 2)
    txt = tower_config(tensors, "txt", config)
    img = tower_config(tensors, "img", config)
    require((txt.length >= TEXT_LENGTH, f"{folder}: {txt.length} positions of texts, expected at least "
             f"{TEXT_LENGTH}"),
            (math.isqrt(img.length - 1) ** 2 == img.length - 1,
             f"{folder}: {img.length} positions of images, expected a square and one more"))
    clip = build(CLIP, folder, txt, img, vocab_size, patch, joint)
    load_tensors(clip, tensors, renamed_entries(clip, HUGGING_FACE), torch.float32, BESIDE)
    return clip.to(device).eval()


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load CLIP's byte-level BPE from tokenizer.json in a Hugging Face folder.

    It puts a start and an end token around a text, cuts it to 77 tokens including these, and pads
    the shorter texts of a batch with end tokens.  OpenAI's tokenizer first applies html.unescape
    and ftfy: "&amp;", ligatures, wide letters and garbled encodings get other ids there.  In both,
    "<|endoftext|>" in a text becomes the end token.  Raises UserError."""
    file = folder / "tokenizer.json"
    content = read_text(file)
    try:
        bpe = Tokenizer.from_str(content)
    except Exception as error:      # tokenizers raises a bare Exception
        raise UserError(f"{file}: not a vocabulary that can be read ({str(error).splitlines()[0]})")
    bpe.no_padding()
    end = bpe.token_to_id(END)
    require((end is not None and bpe.encode("").ids == [bpe.token_to_id(START), end],
             f"{file}: puts no {START} and {END} around a text, expected CLIP's vocabulary"))
    bpe.enable_truncation(TEXT_LENGTH)
    bpe.enable_padding(pad_id=end, pad_token=END)
    return bpe


def prepare(image: Image.Image, size: int) -> Tensor:
    """Convert an RGB image to (3, S, S) float32 as OpenAI does: resize the short side to S with a
    bicubic filter, crop the centre, and normalise.

    Here only the centre is resized, since all of an image of 100,000 x 1 would take gigabytes.  In
    an image that is not square, this changes up to 0.3 % of the values by one level of 255."""
    starts, ends = [], []                                              # of the centre, in pixels
    for side in image.size:
        resized = size * side // min(image.size)
        start = round((resized - size) / 2)
        starts.append(start * side / resized)
        ends.append((start + size) * side / resized)
    middle = image.resize((size, size), Image.Resampling.BICUBIC, (*starts, *ends))
    x = to_tensor(middle) / 2 + 0.5                                     # in [0, 1]
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


Pairs = list[tuple[str, Path, str | None]]       # (name, file, caption)


@torch.inference_mode()
def score(pairs: Pairs, clip: CLIP, tokenizer: Tokenizer, device: str,
          batch: int = 32) -> tuple[list[float], list[str]]:
    """Return 100 cos(image, caption) of each pair, and a line for each pair that is left out.

    A pair is left out if its image can't be read, or if its caption is missing or blank.  Negative
    cosines are kept (torchmetrics raises a negative mean to 0; CLIPScore, arXiv 2104.08718, is 2.5
    max(cosine, 0)).  Raises UserError if no pair is left."""
    cosines, left_out = [], []
    for rows in batches("CLIP, pairs", pairs, batch):
        images, captions = [], []
        for name, file, caption in rows:
            try:
                image = prepare(read_image(file), clip.size)
                require((caption and caption.strip(), f"{name}: has no caption"))
                images.append(image)
                captions.append(caption)
            except UserError as error:
                left_out.append(str(error))
        if images:
            encodings = tokenizer.encode_batch(captions)
            ids = torch.tensor([encoding.ids for encoding in encodings])         # (B, L)
            x = torch.stack(images)                                              # (B, 3, S, S)
            img = F.normalize(clip.image(x.to(device)), dim=-1)                  # (B, E)
            txt = F.normalize(clip.text(ids.to(device)), dim=-1)                 # (B, E)
            cosines += (100 * (img * txt).sum(-1)).tolist()
    require((cosines, f"none of {len(pairs)} pairs can be scored; {''.join(left_out[:1])}"))
    return cosines, left_out


def summarize(cosines: list[float]) -> dict[str, float]:
    """Return the CLIP score, which is the mean of `cosines`, and its standard error if there are
    several.  cosines: as `score` returns them, times 100."""
    scores = {"CLIP": float(np.mean(cosines))}
    if len(cosines) > 1:
        scores["its standard error"] = float(np.std(cosines, ddof=1) / math.sqrt(len(cosines)))
    return scores


def read_pairs(folder: Path) -> Pairs:
    """Return the images in and below a folder with their captions.

    Raises UserError if there is no image."""
    return [(str(file.relative_to(folder)), file, read_caption(file))
            for file in image_files(folder)]


def read_caption(file: Path) -> str | None:
    """Return an image's caption: a PNG's text field "prompt", if `draw` wrote it, else the first
    line of NAME.txt, else None."""
    try:
        fields = text_fields(file)
    except UserError:
        fields = {}                                             # `score` will report the file
    if {"prompt", "seed", "checkpoint"} <= fields.keys():       # other programs write other prompts
        return fields["prompt"]
    text_file = file.with_suffix(".txt")
    if not is_there(text_file):
        return None
    return next(iter(text_lines(read_text(text_file))), None)
