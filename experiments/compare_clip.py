"""Compare metrics/clip.py with transformers' CLIP, and make the fixture of
tests/commands/test_clip.py.

    python3.11 -m venv /tmp/clipenv
    /tmp/clipenv/bin/pip install torch==2.13.0                # first, and this one: the pin is a CPU's build
    /tmp/clipenv/bin/pip install transformers==5.24.0 safetensors pillow numpy ftfy
    /tmp/clipenv/bin/pip install --no-deps open_clip_torch==3.3.0         # for its vocabulary, 1.3 MB
    OMP_NUM_THREADS=1 nice -n 19 /tmp/clipenv/bin/python -m experiments.compare_clip

The program writes tests/fixtures/clip: a random CLIP of two blocks and its features, 600 of the
published merges, and the ids of 50 texts.  Then it compares ids of the whole vocabulary, and
features of random weights in the sizes of ViT-B/32 and ViT-L/14 (a minute, some GB); these are not
kept.  It is not part of the test run, since it needs packages that the project does not need.
"""

import gzip
import importlib.util
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from common import cli
from common.cli import ROOT
from metrics import clip

FIXTURE = ROOT / "tests" / "fixtures" / "clip"
OPEN_CLIP = Path(importlib.util.find_spec("open_clip").origin).parent
VOCABULARY = OPEN_CLIP / "bpe_simple_vocab_16e6.txt.gz"
PUBLISHED = 48894                                                # merges of CLIP's 49,408 tokens
SMALL = 600                                                      # merges of the fixture
LENGTH = 77                                                      # tokens of a text
TEXTS = [
    "", " ", "a photo of a cat", "Red Apple, NOTO style", "  two  spaces\n\nand a tab\t.",
    "don't we'll I'VE they're", "it's the dogs' o'clock, y'all'd've", "''s '' 'T", "x = 3.14159 * r**2;",
    "year 2024, room 101a", "²½ Ⅷ ٣٤ 一二", "naïve café — São Tomé",
    "cafe\u0301 n\u0303 a\u0300\u0301 \u0301alone", "ﬁne ﬂow Å \u212b", "日本語とemoji", "白い猫が窓のそばで眠っている",
    "한국어 \u1112\u1161\u11ab", "привет, мир!", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया",
    "สวัสดีชาวโลก", "ΟΔΥΣΣΕΥΣ στάσις", "İstanbul ISPARTA ıĞŞ", "STRAßE straße ẞ", "👋🏾 waving",
    "👩‍👩‍👧‍👦🇧🇷❤️", "AT&amp;T &lt;b&gt; &amp;amp; &#39;", "<b>bold</b> <|startoftext|>",
    "before <|endoftext|> behind", "<|EndOfText|>", "<|endoftext|><|endoftext|>", "snake_case __init__ _",
    "wait...what?!?! -- (no) [yes] {ok}", "!!!!!!!!!!!!", "#tag @you $5",
    "zero\u200bwidth\u200djoin\ufeffbom", "soft\u00adhyphen no\u00a0break\u3000wide\u2028line",
    "𝓱𝓮𝓵𝓵𝓸 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚", "ｆｕｌｌ ＷＩＤＴＨ", "nul\x00 bell\x07 esc\x1b", "\u202eright to left",
    "ÃƒÂ©tÃ© mojibake â€™", "\ufffd\U0010ffff\ue000", "https://example.org/a?b=c&d=%20e",
    "C:\\dir\\n.txt", "a" * 200, "pneumono" * 40, "one two three " * 40, "7 " * 100,
]


# ------------------------------------------------------------------------------------- tokenizers

def vocabulary(count: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return ids by token, and the first `count` of OpenAI's merges, numbered as in OpenAI's
    tokenizer."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1:count + 1]]
    # bytes that stand for themselves; the others get letters from 256 on
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
               *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in visible]
    letters += [chr(256 + i) for i in range(256 - len(visible))]
    tokens = letters + [f"{letter}</w>" for letter in letters]
    tokens += ["".join(pair) for pair in merges]
    tokens += [clip.START, clip.END]
    return {token: i for i, token in enumerate(tokens)}, merges


def compare_ids(folder: Path, count: int) -> list[list[int]]:
    """Write transformers' tokenizer with the first `count` merges; print for how many texts our ids
    are its ids, and return these."""
    vocab, merges = vocabulary(count)
    published = CLIPTokenizer(vocab=vocab, merges=merges)
    expected = [published(text, truncation=True, max_length=LENGTH).input_ids for text in TEXTS]
    published.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, separators=(",", ":")))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    tokenizer = clip.load_tokenizer(folder)
    tokenizer.no_padding()
    same = sum(tokenizer.encode(text).ids == ids for text, ids in zip(TEXTS, expected))
    print(f"{count} merges: {same} of {len(TEXTS)} texts have transformers' ids")
    return expected


def openai_tokenizer():
    """Return OpenAI's tokenizer in Python, by way of open_clip, with renamed special tokens."""
    file = OPEN_CLIP / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(clean="lower")


def compare_texts() -> None:
    """Write the fixture's vocabulary and ids; then compare ids of the whole vocabulary."""
    assert len(TEXTS) == len(set(TEXTS)) == 50
    ids = compare_ids(FIXTURE, SMALL)
    pairs = [[text, text_ids] for text, text_ids in zip(TEXTS, ids)]
    (FIXTURE / "ids.json").write_text(json.dumps(pairs, separators=(",", ":")))
    with tempfile.TemporaryDirectory() as folder:
        expected = compare_ids(Path(folder), PUBLISHED)
    tokenize = openai_tokenizer()
    different = []
    for text, ids in zip(TEXTS, expected):
        if tokenize([text])[0][:len(ids)].tolist() != ids:
            different.append(ascii(text[:30]))
    print(f"OpenAI's tokenizer in Python, by way of open_clip, differs for {len(different)}: "
          + ", ".join(different))


# --------------------------------------------------------------------------------------- networks

def spread(name: str, p: Tensor) -> float:
    """Return the standard deviation of a random parameter."""
    if p.ndim < 2:
        return 0.1
    if "embedding" in name:
        return 0.5
    return 1.5 * p[0].numel() ** -0.5


@torch.no_grad()
def random_clip(txt: dict, img: dict, joint: int, vocab: int) -> CLIPModel:
    """Return a CLIP with random weights, also for biases and norms, so that every part has an
    effect."""
    special = dict(vocab_size=vocab, bos_token_id=vocab - 2, eos_token_id=vocab - 1,
                   pad_token_id=vocab - 1)
    config = CLIPConfig(text_config=txt | special, vision_config=img, projection_dim=joint)
    model = CLIPModel(config).eval()
    for name, p in model.named_parameters():
        is_norm = "norm" in name or "layrnorm" in name
        mean = 1 if is_norm and name.endswith("weight") else 0
        p.copy_(torch.randn(p.shape) * spread(name, p) + mean)
    return model


@torch.no_grad()
def features(model: CLIPModel, ids: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """Return transformers' embeddings of texts and images."""
    return dict(text=model.get_text_features(ids).pooler_output,
                image=model.get_image_features(pixels).pooler_output)


@torch.no_grad()
def compare_features(title: str, folder: Path, ids: Tensor, pixels: Tensor,
                     published: dict[str, Tensor]) -> None:
    """Print the largest difference of the embeddings, and the largest value."""
    model = clip.load(folder)
    ours = dict(text=model.text(ids), image=model.image(pixels))
    lines = []
    for name, expected in published.items():
        difference = float((ours[name] - expected).abs().max())
        lines.append(f"{name} differs by {difference:.1e} of {float(expected.abs().max()):.1f}")
    print(f"{title}: {', '.join(lines)}")


def write_tiny() -> None:
    """Write the fixture's model, its embeddings, and its embeddings with GELU."""
    torch.manual_seed(0)
    txt = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)
    img = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
               image_size=32, patch_size=8)
    model = random_clip(txt, img, 16, 2 * 256 + SMALL + 2)
    model.save_pretrained(FIXTURE)
    tokenizer = CLIPTokenizer.from_pretrained(FIXTURE)
    texts = ["", "a photo of a cat", "Red Apple, NOTO style", "before <|endoftext|> behind",
             "日本語とemoji", "7 " * 100]
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH,
                    return_tensors="pt").input_ids
    pixels = torch.randn(2, 3, 32, 32)
    plain = features(model, ids, pixels)
    for part in (model.config.text_config, model.config.vision_config):
        part.hidden_act = "gelu"
    with_gelu = CLIPModel(model.config).eval()
    with_gelu.load_state_dict(model.state_dict())
    gelu = {f"{name}_gelu": x for name, x in features(with_gelu, ids, pixels).items()}
    save_file(dict(ids=ids, pixels=pixels, **plain, **gelu), FIXTURE / "expected.safetensors")
    compare_features("tiny", FIXTURE, ids, pixels, plain)


def compare_sizes() -> None:
    """Compare embeddings of random weights of the published sizes."""
    a_photo_of_a_cat = [49406, 320, 1125, 539, 320, 2368] + [49407] * 71
    long_text = [49406, *range(1000, 1075), 49407]
    ids = torch.tensor([a_photo_of_a_cat, long_text])
    depth = dict(num_hidden_layers=12)
    sizes = {
        "ViT-B/32": (
            depth | dict(hidden_size=512, num_attention_heads=8, intermediate_size=2048),
            depth | dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072,
                         patch_size=32, image_size=224), 512),
        "ViT-L/14": (
            depth | dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072),
            dict(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16,
                 intermediate_size=4096, patch_size=14, image_size=224), 768),
    }
    for title, (txt, img, joint) in sizes.items():
        torch.manual_seed(1)
        with tempfile.TemporaryDirectory() as folder:
            model = random_clip(txt, img, joint, 49408)
            pixels = torch.randn(2, 3, 224, 224)
            published = features(model, ids, pixels)
            model.save_pretrained(folder)
            del model
            compare_features(title, Path(folder), ids, pixels, published)


# ------------------------------------------------------------------------------------------ images

def resize_whole(image: Image.Image, side: int) -> Tensor:
    """Resize an image and crop its centre, as transformers does, (3, side, side) in [0, 1]."""
    short = min(image.size)
    size = int(side * image.width / short), int(side * image.height / short)
    whole = image.resize(size, Image.Resampling.BICUBIC)
    left = round((whole.width - side) / 2)
    top = round((whole.height - side) / 2)
    centre = np.array(whole.crop((left, top, left + side, top + side)))
    return torch.from_numpy(centre).permute(2, 0, 1) / 255


def compare_preparation() -> None:
    """Compare `prepare` with resizing a whole image and cropping its centre; print levels of 255.
    """
    draw = np.random.default_rng(0)
    mean = torch.tensor(clip.MEAN).view(3, 1, 1)
    std = torch.tensor(clip.STD).view(3, 1, 1)
    largest = share = 0.0
    for width, height in ((224, 224), (640, 480), (333, 1000), (225, 224), (1024, 1024), (300, 2999)):
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = (resize_whole(image, 224) - mean) / std
        difference = (clip.prepare(image, 224) - expected).abs() * std * 255
        largest = max(largest, float(difference.max()))
        share = max(share, float((difference > 0.01).float().mean()))
    print(f"prepare: {share:.1e} of an image's values at most differ, by {largest:.2f} levels of "
          f"255 at most, from the whole resized and then cut")


def main() -> None:
    cli.Parser(__doc__).parse_args()
    FIXTURE.mkdir(exist_ok=True)
    compare_texts()
    write_tiny()
    compare_preparation()
    compare_sizes()


if __name__ == "__main__":
    cli.run(main)
