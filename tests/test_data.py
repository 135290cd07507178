"""data.py: GPT-2's tokenizer, pictures, the tar reader."""

import random
import tarfile

import pytest
import torch
from PIL import Image

import data
import emoji

# ids by the npm package gpt-3-encoder 1.1.4, an implementation of its own
KNOWN = {
    "Hello world": [15496, 995],
    "The quick brown fox jumps over the lazy dog.": [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13],
    "red apple, noto style": [445, 17180, 11, 407, 78, 3918],
    "waving hand, medium-dark skin tone, twemoji style": [86, 2703, 1021, 11, 7090, 12, 21953, 4168, 8216, 11, 665,
                                                          368, 31370, 3918],
    "Q: What kind of thing is this? A: ": [48, 25, 1867, 1611, 286, 1517, 318, 428, 30, 317, 25, 220],
    "  two  spaces\n\nand a tab\t.": [220, 734, 220, 9029, 198, 198, 392, 257, 7400, 197, 13],
    "naïve café — São Tomé": [2616, 38776, 40304, 851, 311, 28749, 4186, 2634],
    "日本語とemoji 👋🏾": [33768, 98, 17312, 105, 45739, 252, 30201, 368, 31370, 50169, 233, 8582, 237, 122],
    "x = 3.14159 * r**2;": [87, 796, 513, 13, 1415, 19707, 1635, 374, 1174, 17, 26],
    "don't we'll I'VE they're": [9099, 470, 356, 1183, 314, 6, 6089, 484, 821],
}


@pytest.fixture(scope="module")
def gpt2():
    return data.gpt2_tokenizer()


def test_known_sentences_have_their_gpt2_ids(gpt2):
    for text, ids in KNOWN.items():
        assert gpt2.pieces(text) == ids
    assert (gpt2.end_id, gpt2.pad_id, gpt2.mask_id, gpt2.vocab_size) == (50256, 50256, 50257, 50258)


def test_a_thousand_random_unicode_strings_survive_a_round_trip(gpt2, emoji_set):
    subset = data.gpt2_tokenizer(data.gpt2_subset(emoji.texts(emoji_set[0][:500])))
    draw = random.Random(0)
    ranges = [(32, 126), (0, 0x2FF), (0x300, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    for _ in range(1000):
        text = "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(0, 40)))
        for tokenizer in (gpt2, subset):
            assert tokenizer.decode(tokenizer.pieces(text)) == text


def test_special_tokens_are_not_read_out_of_text(gpt2):
    for text in ("[MASK]", "<|endoftext|>"):
        assert not {gpt2.mask_id, gpt2.end_id} & set(gpt2.pieces(text))
        assert gpt2.decode(gpt2.encode(text, 16)) == text


def test_encoding_ends_pads_and_warns_of_what_is_cut(gpt2, capsys):
    assert gpt2.encode("Hello world", 5).tolist() == [15496, 995, 50256, 50256, 50256]
    assert capsys.readouterr().err == ""
    assert gpt2.encode("Hello world, a long goodbye", 4).tolist() == [15496, 995, 11, 50256]
    assert "cut off ' a long goodbye'" in capsys.readouterr().err
    assert gpt2.decode(torch.tensor([15496, 50257, 50256, 995])) == "Hello[MASK]"


def test_a_subset_cuts_its_own_texts_up_as_gpt2_does(gpt2, emoji_set):
    texts = emoji.texts(emoji_set[0])
    keep = data.gpt2_subset(texts)
    subset = data.gpt2_tokenizer(keep)
    assert len(keep) < 5000 and subset.vocab_size == len(keep) + 2
    for text in texts[:4000]:
        assert [keep[i] for i in subset.pieces(text)] == gpt2.pieces(text)
    with pytest.raises(data.UserError, match="start with the 256 bytes"):
        data.gpt2_tokenizer(keep[1:])
    with pytest.raises(data.UserError, match="without the two it is merged from"):
        data.gpt2_tokenizer(list(range(256)) + [50000])


def test_a_tar_is_read_sample_by_sample_and_a_cut_one_is_refused(tmp_path):
    with tarfile.open(emoji.TAR) as tar:
        names = [tar.next().name for _ in range(4)]
    first, second = list(zip(range(2), data.read_tar(emoji.TAR)))
    assert [first[1]["__key__"], second[1]["__key__"]] == [names[0].split(".")[0], names[2].split(".")[0]]
    assert set(first[1]) == {"__key__", "webp", "json"}
    whole = emoji.TAR.read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(data.UserError, match="cut.tar.gz: not a whole tar file"):
        list(data.read_tar(tmp_path / "cut.tar.gz"))
    with pytest.raises(data.UserError, match="no such tar"):
        list(data.read_tar(tmp_path / "none.tar"))


def test_any_picture_is_read_transparent_parts_white(tmp_path):
    picture = Image.new("RGBA", (60, 40), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 30, 40))
    picture.save(tmp_path / "a.png")
    rgb = data.read_picture(tmp_path / "a.png")
    assert rgb.getpixel((5, 5)) == (0, 0, 255) and rgb.getpixel((55, 5)) == (255, 255, 255)
    square = data.fit_picture(rgb, 20)
    assert square.size == (20, 20) and square.getpixel((2, 10)) == (0, 0, 255)
    Image.new("P", (9, 70)).save(tmp_path / "b.gif")
    assert data.to_tensor(data.fit_picture(data.read_picture(tmp_path / "b.gif"), 8)).shape == (3, 8, 8)
    image = torch.rand(3, 8, 8) * 2 - 1
    assert (data.to_tensor(data.to_picture(image)) - image).abs().max() < 1 / 127
    (tmp_path / "c.png").write_text("not a picture")
    with pytest.raises(data.UserError, match="c.png: not a picture"):
        data.read_picture(tmp_path / "c.png")
    with pytest.raises(data.UserError, match="no such picture"):
        data.read_picture(tmp_path / "d.png")
