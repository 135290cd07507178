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
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

ROOT = Path(__file__).parent.parent
from common import cli
from metrics import clip

FIXTURE = ROOT / "tests" / "fixtures" / "clip"
OPEN_CLIP = Path(importlib.util.find_spec("open_clip").origin).parent
VOCABULARY = OPEN_CLIP / "bpe_simple_vocab_16e6.txt.gz"
PUBLISHED = 48894                                                # merges of CLIP's 49,408 tokens
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


def vocabulary(count: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return ids by token, and the first `count` of OpenAI's merges, numbered as in OpenAI's
    tokenizer."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1:count + 1]]
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    return {token: i for i, token in enumerate([*tokens, clip.START, clip.END])}, merges


def random_clip(txt: dict, img: dict, joint: int, vocab: int) -> CLIPModel:
    """Return a CLIP with random weights, also for biases and norms, so that every part has an
    effect."""
    ends = dict(vocab_size=vocab, bos_token_id=vocab - 2, eos_token_id=vocab - 1, pad_token_id=vocab - 1)
    model = CLIPModel(CLIPConfig(text_config=txt | ends, vision_config=img, projection_dim=joint)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = "norm" in name or "layrnorm" in name
            spread = 0.1 if p.ndim < 2 else 0.5 if "embedding" in name else 1.5 * p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape) * spread + (norm and name.endswith("weight")))
    return model


@torch.no_grad()
def features(model: CLIPModel, ids: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return model.get_text_features(ids).pooler_output, model.get_image_features(pixels).pooler_output


@torch.no_grad()
def compare(title: str, folder: Path, ids: torch.Tensor, pixels: torch.Tensor, theirs: tuple) -> None:
    """Print the largest difference of the features, and the largest value."""
    ours = clip.load(folder)
    got = ours.text(ids), ours.image(pixels)
    print(f"{title}: " + ", ".join(
        f"{name} differs by {float((a - b).abs().max()):.1e} of {float(b.abs().max()):.1f}"
        for name, a, b in zip(("text", "image"), got, theirs)))


def tiny() -> None:
    """Write the fixture's model, its features, and its features with GELU."""
    torch.manual_seed(0)
    txt = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)
    img = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = random_clip(txt, img | dict(image_size=32, patch_size=8), 16, 2 * 256 + 600 + 2)
    model.save_pretrained(FIXTURE)
    bpe = CLIPTokenizer.from_pretrained(FIXTURE)
    some = ["", "a photo of a cat", "Red Apple, NOTO style", "before <|endoftext|> behind", "日本語とemoji",
            "7 " * 100]
    ids = bpe(some, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    pixels = torch.randn(2, 3, 32, 32)
    plain = features(model, ids, pixels)
    for part in (model.config.text_config, model.config.vision_config):
        part.hidden_act = "gelu"
    other = CLIPModel(model.config).eval()
    other.load_state_dict(model.state_dict())
    gelu = features(other, ids, pixels)
    found = zip(("text", "image", "text_gelu", "image_gelu"), plain + gelu)
    save_file(dict(ids=ids, pixels=pixels, **dict(found)), FIXTURE / "expected.safetensors")
    compare("tiny", FIXTURE, ids, pixels, plain)


def texts() -> None:
    """Write the fixture's vocabulary and ids; then compare ids of the whole vocabulary."""
    assert len(TEXTS) == len(set(TEXTS)) == 50
    for count in (600, PUBLISHED):
        vocab, merges = vocabulary(count)
        theirs = CLIPTokenizer(vocab=vocab, merges=merges)
        ids = [theirs(text, truncation=True, max_length=77).input_ids for text in TEXTS]
        with tempfile.TemporaryDirectory() as folder:
            where = FIXTURE if count == 600 else Path(folder)
            theirs.save_pretrained(where)
            (where / "vocab.json").write_text(json.dumps(vocab, separators=(",", ":")))
            (where / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
            bpe = clip.load_tokenizer(where)
            bpe.no_padding()
            same = sum(bpe.encode(text).ids == known for text, known in zip(TEXTS, ids))
            print(f"{count} merges: {same} of {len(TEXTS)} texts have transformers' ids")
        if count == 600:
            content = json.dumps([[text, known] for text, known in zip(TEXTS, ids)], separators=(",", ":"))
            (FIXTURE / "ids.json").write_text(content)
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", OPEN_CLIP / "pretrained/tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    python = module.SimpleTokenizer(clean="lower")       # OpenAI's, with renamed special tokens
    others = [text for text, known in zip(TEXTS, ids) if python([text])[0][:len(known)].tolist() != known]
    print(f"OpenAI's tokenizer in Python, by way of open_clip, differs for {len(others)}: "
          + ", ".join(ascii(text[:30]) for text in others))


def sizes() -> None:
    """Compare features of random weights of the published sizes."""
    ids = torch.tensor([[49406, 320, 1125, 539, 320, 2368] + [49407] * 71,                # a photo of a cat
                        [49406, *range(1000, 1075), 49407]])
    base = dict(hidden_size=512, num_hidden_layers=12, num_attention_heads=8, intermediate_size=2048), dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, patch_size=32)
    large = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072), dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14)
    for title, (txt, img), joint in (("ViT-B/32", base, 512), ("ViT-L/14", large, 768)):
        torch.manual_seed(1)
        with tempfile.TemporaryDirectory() as folder:
            model = random_clip(txt, img | dict(image_size=224), joint, 49408)
            pixels = torch.randn(2, 3, 224, 224)
            theirs = features(model, ids, pixels)
            model.save_pretrained(folder)
            del model
            compare(title, Path(folder), ids, pixels, theirs)


def preparation() -> None:
    """Compare `prepare` with resizing a whole image and cropping its centre; print levels of 255.
    """
    draw, worst, unlike, mean, std = np.random.default_rng(0), 0.0, [], *(
        torch.tensor(numbers).view(3, 1, 1) for numbers in (clip.MEAN, clip.STD))
    for width, height in ((224, 224), (640, 480), (333, 1000), (225, 224), (1024, 1024), (300, 2999)):
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        short = min(width, height)
        size = int(224 * width / short), int(224 * height / short)
        whole = image.resize(size, Image.Resampling.BICUBIC)
        left, top = round((whole.width - 224) / 2), round((whole.height - 224) / 2)
        cut = np.array(whole.crop((left, top, left + 224, top + 224)))
        cut = torch.from_numpy(cut).permute(2, 0, 1) / 255
        difference = (clip.prepare(image, 224) - (cut - mean) / std).abs() * std * 255
        worst = max(worst, float(difference.max()))
        unlike.append(float((difference > 0.01).float().mean()))
    print(f"prepare: {max(unlike):.1e} of an image's values at most differ, by {worst:.2f} levels of 255 at "
          f"most, from the whole resized and then cut")


def main() -> None:
    cli.Parser(__doc__).parse_args()
    FIXTURE.mkdir(exist_ok=True)
    texts()
    tiny()
    preparation()
    sizes()


if __name__ == "__main__":
    cli.run(main)
