"""pretrained/tokenizer.py: GPT-2's tokenizer, whole and cut to a small vocabulary."""

import json
import random
from pathlib import Path

import pytest
import torch

from common.cli import UserError
from dataset import emoji
from pretrained.tokenizer import gpt2_subset, gpt2_tokenizer, t5_tokenizer

RELEASE = Path(__file__).parents[1] / "fixtures" / "release"

# ids by the npm package gpt-3-encoder 1.1.4, an implementation of its own
KNOWN = {
    "Hello world": [15496, 995],
    "The quick brown fox jumps over the lazy dog.": [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290,
                                                     13],
    "red apple, noto style": [445, 17180, 11, 407, 78, 3918],
    "waving hand, medium-dark skin tone, twemoji style": [86, 2703, 1021, 11, 7090, 12, 21953, 4168, 8216, 11,
                                                          665,
                                                          368, 31370, 3918],
    "Q: What kind of thing is this? A: ": [48, 25, 1867, 1611, 286, 1517, 318, 428, 30, 317, 25, 220],
    "  two  spaces\n\nand a tab\t.": [220, 734, 220, 9029, 198, 198, 392, 257, 7400, 197, 13],
    "naïve café — São Tomé": [2616, 38776, 40304, 851, 311, 28749, 4186, 2634],
    "日本語とemoji 👋🏾": [33768, 98, 17312, 105, 45739, 252, 30201, 368, 31370, 50169, 233, 8582, 237, 122],
    "x = 3.14159 * r**2;": [87, 796, 513, 13, 1415, 19707, 1635, 374, 1174, 17, 26],
    "don't we'll I'VE they're": [9099, 470, 356, 1183, 314, 6, 6089, 484, 821],
}


@pytest.fixture
def gpt2():
    return gpt2_tokenizer()


def test_known_sentences_have_their_gpt2_ids(gpt2):
    for text, ids in KNOWN.items():
        assert gpt2.pieces(text) == ids
    assert (gpt2.end_id, gpt2.pad_id, gpt2.mask_id, gpt2.vocab_size) == (50256, 50256, 50257, 50258)


def test_a_thousand_random_unicode_strings_survive_a_round_trip(gpt2, emoji_set):
    subset = gpt2_tokenizer(gpt2_subset(emoji.texts(emoji_set[0][:500])))
    draw = random.Random(0)
    ranges = [(32, 126), (0, 0x2FF), (0x300, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    for _ in range(1000):
        text = "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(0, 40)))
        for cut in (gpt2, subset):
            assert cut.decode(cut.pieces(text)) == text


def test_special_tokens_are_not_read_out_of_text(gpt2):
    for text in ("[MASK]", "<|endoftext|>"):
        assert not {gpt2.mask_id, gpt2.end_id} & set(gpt2.pieces(text))
        assert gpt2.decode(gpt2.encode(text, 16)) == text


def test_encoding_ends_pads_and_warns_of_what_is_cut(gpt2, capsys):
    assert gpt2.encode("Hello world", 5).tolist() == [15496, 995, 50256, 50256, 50256]
    assert capsys.readouterr().err == ""
    assert gpt2.encode("Hello world, a long goodbye", 4).tolist() == [15496, 995, 11, 50256]
    assert "cut off ' a long goodbye'" in capsys.readouterr().err
    assert [len(gpt2.encode("Hello world, a long goodbye", 4)) for _ in range(5)] == [4] * 5
    assert capsys.readouterr().err == "" and gpt2.cut == 6       # said once, counted each time
    assert gpt2.decode(torch.tensor([15496, 50257, 50256, 995])) == "Hello[MASK]"


def test_words_that_no_training_text_had_are_named_and_their_capitals_lowered(gpt2):
    captions = ["red apple, noto style", "flag of Brazil", "a grey T-rex"]
    texts = captions + ["Q: What is This? A: ", "red"]
    subset = gpt2_tokenizer(gpt2_subset(texts))
    assert subset.strange("Anything") == [] and subset.lowered("Red FLAG") == "Red FLAG"
    subset.meet(texts)
    assert [subset.strange(text) for text in texts] == [[]] * 5
    assert subset.strange("red äpple, nöto style") == ["äpple", "nöto"]
    assert subset.strange("red 日本 apple  style") == ["日本"] or subset.strange("  ") == ["  "]
    for text, lowered in (("Red Apple, NOTO style", "red apple, noto style"),
                          ("Flag of Brazil", "flag of Brazil"),
                          ("This T-Rex, [MASK] Style", "this T-rex, [MASK] style")):
        assert subset.lowered(text) == lowered
    again = gpt2_tokenizer(**{name: json.loads(subset.files()["tokenizer.json"])[name]
                              for name in ("keep", "seen", "capitals")})
    assert (again.seen, again.capitals) == (subset.seen, subset.capitals) == (again.seen, {"Brazil", "T"})
    again.meet(["A Zebra"])                                      # what a later run learns comes on top
    assert not again.strange("red Zebra") and again.lowered("Zebra of Brazil") == "Zebra of Brazil"
    again.meet(None)
    assert again.strange("äpple") == [] and "seen" not in json.loads(again.files()["tokenizer.json"])


def test_t5_names_what_it_has_no_piece_for_and_words_stand_behind_a_text_with_their_space():
    t5 = t5_tokenizer(RELEASE / "tokenizer" / "tokenizer.json")
    assert t5.strange("a red {cat} </s>") == ["{cat}", "<", "/s>"] and t5.strange("a red cat") == []
    assert t5.decode(t5.pieces("red cat")) == "red cat" and t5.behind(t5.pieces("red cat")) == " red cat"
    gpt2 = gpt2_tokenizer()
    assert gpt2.behind(gpt2.pieces(" red")) == " red" and gpt2.behind(gpt2.pieces("red")) == "red"
    assert gpt2.behind([gpt2.end_id, *gpt2.pieces("red")]) == ""


def test_a_subset_cuts_its_own_texts_up_as_gpt2_does(gpt2, emoji_set):
    texts = emoji.texts(emoji_set[0])
    keep = gpt2_subset(texts)
    subset = gpt2_tokenizer(keep)
    assert len(keep) < 5000 and subset.vocab_size == len(keep) + 2
    for text in texts[:4000]:
        assert [keep[i] for i in subset.pieces(text)] == gpt2.pieces(text)
    with pytest.raises(UserError, match="start with 256 bytes"):
        gpt2_tokenizer(keep[1:])
    with pytest.raises(UserError, match="without the two it is merged from"):
        gpt2_tokenizer(list(range(256)) + [50000])
