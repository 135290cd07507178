"""pretrained/tokenizer.py: GPT-2's tokenizer, full and with a small vocabulary."""

import json
import random
from pathlib import Path

import pytest
import torch

import checkpoint
from common.cli import UserError
from dataset import emoji
from dataset.webdataset import Tar
from inference.parts import EMOJI
from pretrained.tokenizer import gpt2_subset, gpt2_tokenizer, t5_tokenizer

RELEASE = Path(__file__).parents[1] / "fixtures" / "release"

# ids by the npm package gpt-3-encoder 1.1.4, an independent implementation
GPT2_IDS = {
    "Hello world": [15496, 995],
    "The quick brown fox jumps over the lazy dog.": [
        464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13],
    "red apple, noto style": [445, 17180, 11, 407, 78, 3918],
    "waving hand, medium-dark skin tone, twemoji style": [
        86, 2703, 1021, 11, 7090, 12, 21953, 4168, 8216, 11, 665, 368, 31370, 3918],
    "Q: What kind of thing is this? A: ": [
        48, 25, 1867, 1611, 286, 1517, 318, 428, 30, 317, 25, 220],
    "  two  spaces\n\nand a tab\t.": [220, 734, 220, 9029, 198, 198, 392, 257, 7400, 197, 13],
    "naïve café — São Tomé": [2616, 38776, 40304, 851, 311, 28749, 4186, 2634],
    "日本語とemoji 👋🏾": [
        33768, 98, 17312, 105, 45739, 252, 30201, 368, 31370, 50169, 233, 8582, 237, 122],
    "x = 3.14159 * r**2;": [87, 796, 513, 13, 1415, 19707, 1635, 374, 1174, 17, 26],
    "don't we'll I'VE they're": [9099, 470, 356, 1183, 314, 6, 6089, 484, 821],
}


@pytest.fixture(scope="module")
def gpt2():
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def emoji_texts():
    """Return the texts of the whole emoji set, without its images."""
    records = []
    for _, files in Tar(str(emoji.TAR)):
        records.append(json.loads(files["json"]))
    emoji.add_questions(records)
    return emoji.texts(records)


@pytest.fixture(scope="module")
def keep(emoji_texts):
    return gpt2_subset(emoji_texts)


@pytest.mark.parametrize("text, ids", GPT2_IDS.items())
def test_sentences_have_their_gpt2_ids(text, ids, gpt2):
    assert gpt2.pieces(text) == ids


def test_gpt2_has_one_id_more_for_the_mask(gpt2):
    special = gpt2.end_id, gpt2.pad_id, gpt2.mask_id, gpt2.vocab_size
    assert special == (50256, 50256, 50257, 50258)


def test_random_unicode_survives_a_round_trip(gpt2, keep):
    subset = gpt2_tokenizer(keep)
    chance = random.Random(0)
    ranges = [(32, 126), (0, 0x2FF), (0x300, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    for _ in range(1000):
        length = chance.randint(0, 40)
        text = "".join(chr(chance.randint(*chance.choice(ranges))) for _ in range(length))
        assert gpt2.decode(gpt2.pieces(text)) == text
        assert subset.decode(subset.pieces(text)) == text


@pytest.mark.parametrize("text", ["[MASK]", "<|endoftext|>"])
def test_special_tokens_are_not_read_out_of_text(text, gpt2):
    assert not {gpt2.mask_id, gpt2.end_id} & set(gpt2.pieces(text))
    assert gpt2.decode(gpt2.encode(text, 16)) == text


def test_encoding_ends_and_pads(gpt2, capsys):
    assert gpt2.encode("Hello world", 5).tolist() == [15496, 995, 50256, 50256, 50256]
    assert capsys.readouterr().err == ""


def test_first_cut_is_warned_of_and_all_are_counted(capsys):
    gpt2 = gpt2_tokenizer()                                      # a new one, since it counts cuts
    for _ in range(6):
        ids = gpt2.encode("Hello world, a long goodbye", 4)
        assert ids.tolist() == [15496, 995, 11, 50256]
    message = capsys.readouterr().err
    assert message.startswith("warning: ") and message.count("\n") == 1
    assert "' a long goodbye'" in message and gpt2.cut == 6


def test_decoding_stops_at_the_end_and_shows_masks(gpt2):
    assert gpt2.decode(torch.tensor([15496, 50257, 50256, 995])) == "Hello[MASK]"


TEXTS = ["red apple, noto style", "flag of Brazil", "a grey T-rex", "Q: What is This? A: ", "red"]


@pytest.fixture(scope="module")
def small_keep():
    return gpt2_subset(TEXTS)


@pytest.fixture
def trained(small_keep):
    """Return a tokenizer with the vocabulary of TEXTS that has met TEXTS."""
    tokenizer = gpt2_tokenizer(small_keep)
    tokenizer.meet(TEXTS)
    return tokenizer


def test_words_outside_the_training_texts_are_strange(trained):
    assert [trained.strange(text) for text in TEXTS] == [[]] * 5
    assert trained.strange("red äpple, nöto style") == ["äpple", "nöto"]
    assert trained.strange("red 日本 apple  style") == ["日本"]


@pytest.mark.parametrize("text, lowered", [
    ("Red Apple, NOTO style", "red apple, noto style"), ("Flag of Brazil", "flag of Brazil"),
    ("This T-Rex, [MASK] Style", "this T-rex, [MASK] style")])
def test_only_the_captions_capitals_are_kept(text, lowered, trained):
    assert trained.lowered(text) == lowered


def read_cached(tokenizer):
    """Return a tokenizer made from another one's files."""
    content = json.loads(tokenizer.files()["tokenizer.json"])
    return gpt2_tokenizer(content["keep"], seen=content["seen"], capitals=content["capitals"])


def test_seen_ids_and_capitals_are_saved_and_extended(trained):
    again = read_cached(trained)
    assert again.seen == trained.seen and again.capitals == trained.capitals == {"Brazil", "T"}
    again.meet(["A Zebra"])  # the texts of a later run are added
    assert again.strange("red Zebra") == []
    assert again.lowered("Zebra of Brazil") == "Zebra of Brazil"


def test_without_known_texts_nothing_is_strange_or_lowered(trained, small_keep):
    fresh = gpt2_tokenizer(small_keep)
    trained.meet(None)
    for tokenizer in (fresh, trained):
        assert tokenizer.strange("äpple") == [] and tokenizer.lowered("Red FLAG") == "Red FLAG"
        assert "seen" not in json.loads(tokenizer.files()["tokenizer.json"])


def test_shipped_tokenizer_remembers_its_texts():
    tokenizer = checkpoint.load_tokenizer(EMOJI)
    assert 2000 < len(tokenizer.seen) < tokenizer.vocab_size and "Brazil" in tokenizer.capitals


def test_t5_names_words_without_a_piece():
    t5 = t5_tokenizer(RELEASE / "tokenizer" / "tokenizer.json")
    assert t5.strange("a red {cat} </s>") == ["{cat}", "<", "/s>"] and t5.strange("a red cat") == []


def test_tokens_behind_a_text_keep_their_space(gpt2):
    t5 = t5_tokenizer(RELEASE / "tokenizer" / "tokenizer.json")
    assert t5.decode(t5.pieces("red cat")) == "red cat"
    assert t5.behind(t5.pieces("red cat")) == " red cat"
    assert gpt2.behind(gpt2.pieces(" red")) == " red" and gpt2.behind(gpt2.pieces("red")) == "red"
    assert gpt2.behind([gpt2.end_id, *gpt2.pieces("red")]) == ""


def test_subset_splits_its_own_texts_as_gpt2_does(gpt2, keep, emoji_texts):
    subset = gpt2_tokenizer(keep)
    assert len(keep) < 5000 and subset.vocab_size == len(keep) + 2
    texts = emoji_texts[:4000]
    for ids, expected in zip(subset.many(texts), gpt2.many(texts)):
        assert [keep[i] for i in ids] == expected


def test_subset_without_its_parts_is_refused(keep):
    with pytest.raises(UserError, match="256 bytes"):
        gpt2_tokenizer(keep[1:])
    with pytest.raises(UserError, match="merged"):
        gpt2_tokenizer(list(range(256)) + [50000])
