"""dataset/webdataset.py: samples of a tar at random, whole or refused, and what lies beside them left out."""

import gzip
import json
import os
import random
import tarfile

import numpy as np
import pytest

import data
from common.cli import UserError
from dataset import emoji, sources, webdataset
from dataset.webdataset import Tar
from helpers import jpeg, write_tar
from pretrained import tokenizer


def link(name, to, kind):
    member = tarfile.TarInfo(name)
    member.linkname, member.type = to, kind
    return member, b""


GOOD = [(f"{i:03}.{kind}", content) for i in range(8) for kind, content in
        (("jpg", jpeg((30 * i, 0, 0))), ("json", json.dumps(dict(caption=f"red {i}")).encode()))]
READ = [(f"{i:03}", {"jpg": GOOD[2 * i][1], "json": GOOD[2 * i + 1][1]}) for i in range(8)]


def test_the_emoji_set_is_read_sample_by_sample():
    with tarfile.open(emoji.TAR) as whole:
        names = [whole.next().name for _ in range(4)]
    tar = Tar(str(emoji.TAR))
    assert [tar[i][0] for i in range(2)] == [names[0].split(".")[0], names[2].split(".")[0]]
    assert len(tar) == 7572 and set(tar[7571][1]) == {"webp", "json"}


def test_tars_are_read_at_random_by_an_index_beside_them(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"shard-{shard:03}.tar", [
            (f"deep.er/{shard}{i:02}.{kind}", content) for i in range(20 + shard) for kind, content in (
                ("jpg", jpeg((i, 0, 0))), ("txt", f"text {shard} {i}".encode()),
                ("json", json.dumps(dict(re_caption=f"again {i}")).encode()))])
    before = data.fingerprint(str(tmp_path))
    source = sources.of_path(str(tmp_path / "shard-{000..002}.tar"))
    assert [len(sources.of_path(str(path))) for path in (tmp_path, tmp_path / "*.tar")] == [63, 63]
    assert len(source) == 63 and data.fingerprint(str(tmp_path)) == before
    assert np.load(tmp_path / "shard-001.tar.index.npy").shape == (22, 2)
    order = random.Random(0).sample(range(63), 63)
    for i in order:
        shard, at = next((s, i - start) for s, start in ((2, 41), (1, 20), (0, 0)) if i >= start)
        assert source[i]["captions"] == [f"text {shard} {at}"] and source[i]["recaption"] == f"again {at}"
        assert source[i]["key"].endswith(f"shard-{shard:03}.tar: deep.er/{shard}{at:02}.jpg")


def test_a_packed_tar_is_held_in_memory_up_to_a_size(tmp_path, monkeypatch):
    plain = write_tar(tmp_path / "a.tar", GOOD)
    with open(plain, "rb") as file:
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(file.read()))
    assert list(Tar(str(tmp_path / "a.tar.gz"))) == READ
    monkeypatch.setattr(webdataset, "WHOLE_GZIP", 1000)
    with pytest.raises(UserError, match="a .tar.gz is held in memory; gunzip it"):
        Tar(str(tmp_path / "a.tar.gz"))


def test_a_cut_tar_and_an_old_or_broken_index_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", GOOD)
    tar, index = tmp_path / "a.tar", tmp_path / "a.tar.index.npy"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="a.tar: not a whole tar file"):
        Tar(path)
    tar.write_bytes(whole)
    assert len(Tar(path)) == 8 and index.exists()
    webdataset.read_index.cache_clear()
    os.utime(index, (1, 1))
    with pytest.raises(UserError, match="older than its tar .*; make it again with python data.py index"):
        Tar(path)
    data.main(["index", path])
    for content in (b"x" * 300, index.read_bytes()[:-8]):
        index.write_bytes(content)
        with pytest.raises(UserError, match="a.tar.index.npy: damaged.* make it again with"):
            Tar(path)
    np.save(index, np.array([[0, len(whole)]]))
    with pytest.raises(UserError, match="a.tar.index.npy: .*the rules of this program; make it again"):
        Tar(path)
    with pytest.raises(UserError, match="none.tar: no such tar file"):
        Tar(str(tmp_path / "none.tar"))


def test_what_lies_beside_the_samples_is_left_out(tmp_path):
    folder = tarfile.TarInfo("sub")
    folder.type = tarfile.DIRTYPE
    names = "README README.md LICENSE.txt .DS_Store __MACOSX/000.jpg".split()
    beside = [(folder, b""), *((name, b"x") for name in names)]
    mixed = [file for name, content in GOOD for file in ((f"._{name}", b"\0\5"), (name, content))]
    assert list(Tar(write_tar(tmp_path / "a.tar", beside + mixed + beside[1:]))) == READ
    own = [(f"license.{name[4:]}", content) for name, content in GOOD[:2]]       # a sample may be called so
    assert list(Tar(write_tar(tmp_path / "own.tar", own))) == [("license", READ[0][1])]
    upper = [(name.upper(), content) for name, content in GOOD]
    assert list(Tar(write_tar(tmp_path / "b.tar", upper))) == READ


def test_tars_that_were_joined_are_read_to_the_end(tmp_path):
    """Also where the first ends in the middle of a sample, and with what `cat` leaves between them."""
    for at in (8, 7):
        parts = [write_tar(tmp_path / "a.tar", GOOD[:at]), write_tar(tmp_path / "b.tar", GOOD[at:])]
        whole = b"".join(open(path, "rb").read() for path in parts)
        (tmp_path / f"{at}.tar").write_bytes(whole)
        assert list(Tar(str(tmp_path / f"{at}.tar"))) == READ
    with tarfile.open(tmp_path / "8.tar") as first:
        assert len(first.getnames()) == 8                        # tarfile alone reads the first


@pytest.mark.parametrize("files, message", [
    (sorted(GOOD, key=lambda file: file[0][-3:]),
     "the files of a sample stand in two places, .* tar it again with --sort"),
    (GOOD + GOOD[:2], "000.jpg is in it twice"),
    (GOOD[:2] + GOOD[1:], "000.json is in it twice"),
    (GOOD[:-2] + [link("007.jpg", "006.jpg", tarfile.LNKTYPE)],
     "007.jpg is a link or no plain file, expected the file itself"),
    (GOOD[:-2] + [link("007.jpg", "006.jpg", tarfile.SYMTYPE)],
     "007.jpg is a link or no plain file, expected the file"),
    (GOOD[:-2] + [link("007.jpg", "", tarfile.FIFOTYPE)], "007.jpg is a link or no plain file"),
    ([("README", b"x")], "no samples in this tar"), ([], "no samples in this tar")])
def test_a_tar_whose_samples_are_not_clear_is_refused(files, message, tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/a.tar: {message}"):
        Tar(write_tar(tmp_path / "a.tar", files))


@pytest.mark.parametrize("record, message", [
    (b"[1]", r"expected a JSON object, found \[1\]"), (b"3", "expected a JSON object, found 3"),
    (b"{", "not readable as JSON"), (b"[" * 10**5, "not readable as JSON"),
    (b'{"caption": "\xff"}', "not readable as JSON .*utf-8"),
    (b'{"caption": 3}', '"caption" is 3, expected a text'),
    (rb'{"caption": "red \ud83c apple"}', r'"caption" is .red \\ud83c apple., expected a text'),
    (b'{"caption": "a", "re_caption": ["b"]}', r'"re_caption" is \[.b.\], expected a text'),
    (b'{"caption": "a", "questions": {}}', '"questions" is {}, expected a list of objects'),
    (b'{"caption": "a", "questions": ["q"]}', r'"questions" is \[.q.\], expected a list of objects'),
    (b'{"caption": "a", "questions": [{"question": "b", "answer": "c"}, {"question": "b"}]}',
     r'"questions\[1\].answer" is null'),
    (b'{"questions": [{"q": "x"}]}', r'"questions\[0\].question" is null')])
def test_a_record_of_the_wrong_type_names_tar_key_and_field(record, message, tmp_path):
    source = sources.of_path(write_tar(tmp_path / "a.tar", GOOD[:1] + [("000.json", record)]))
    with pytest.raises(UserError, match=f"^{tmp_path}/a.tar: 000.json: {message}") as error:
        source[0]
    assert len(str(error.value).splitlines()) == 1


def test_texts_are_read_in_utf_8_and_nothing_else(tmp_path):
    for content, captions in ((b"\xef\xbb\xbfred\n", ["red"]), ("сад".encode(), ["сад"])):
        source = sources.of_path(write_tar(tmp_path / f"{len(content)}.tar", GOOD[:1] + [("000.txt", content)]))
        assert source[0]["captions"] == captions
    latin = sources.of_path(write_tar(tmp_path / "latin.tar", GOOD[:1] + [("000.txt", b"caf\xe9")]))
    with pytest.raises(UserError, match="latin.tar: 000.txt: not UTF-8 text .unexpected end .* at byte 3"):
        latin[0]


def test_null_is_no_caption(tmp_path):
    for record, recaption in ((dict(caption=None, re_caption="b"), "b"), (dict(caption=None), None)):
        content = json.dumps(record).encode()
        path = write_tar(tmp_path / "null.tar", GOOD[:1] + [("000.json", content)])
        (tmp_path / "null.tar.index.npy").unlink(missing_ok=True)
        webdataset.read_index.cache_clear()
        webdataset.opened.cache_clear()
        again = sources.of_path(path)
        assert again[0]["captions"] == [] and again[0].get("recaption") == recaption
    with pytest.raises(UserError, match="000.jpg: no caption"):
        data.Mix([path], 16).sample(0, 0, 0)


def test_a_stage_that_asks_refuses_an_empty_list_of_questions_and_sources_without_any(small_tar, tmp_path):
    empty = b'{"caption": "a", "questions": []}'
    path = write_tar(tmp_path / "a.tar", [*GOOD[:2], GOOD[2], ("001.json", empty)])
    asks, learns = data.Mix([path], 16, asks=True), data.Mix([path], 16)
    assert [learns.sample(0, 0, i)["captions"] for i in (0, 1)] == [["red 0"], ["a"]]
    assert asks.sample(0, 0, 1, captioned=True)["captions"] == ["a"] and asks.sample(0, 0, 0)
    with pytest.raises(UserError, match=f'^{path}: 001.jpg: "questions" is .., and this stage asks some'):
        asks.sample(0, 0, 1)
    gpt2 = tokenizer.gpt2_tokenizer()
    with pytest.raises(UserError, match=f"^{path}: no questions among the first 20 samples"):
        data.check_questions(asks, [], gpt2, 28)
    data.check_questions(learns, [], gpt2, 28)
    data.check_questions(data.Mix([path, small_tar], 16, asks=True), [], gpt2, 28)


def test_a_picture_in_a_tar_is_named_by_tar_and_key(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*GOOD[:2], ("001.png", b"x"), ("001.txt", b"x")])
    mix = data.Mix([path], 16)
    with pytest.raises(UserError, match=f"^{path}: 001.png: not a picture that can be read"):
        mix.sample(0, 0, 1)


def test_damaged_tars_are_read_as_the_whole_one_or_refused_in_one_line(tmp_path):
    """Cut anywhere, and any bit of a packed one flipped, or of a header, which has a checksum of its own."""
    chance, whole = random.Random(0), open(write_tar(tmp_path / "good.tar", GOOD), "rb").read()
    with tarfile.open(tmp_path / "good.tar") as tar:
        headers = [member.offset for member in tar]
    packed, counts = gzip.compress(whole, mtime=1), dict(whole=0, refused=0)
    bit = lambda byte: bytes([byte ^ 1 << chance.randrange(8)])
    flip = lambda content, at: content[:at] + bit(content[at]) + content[at + 1:]
    for n in range(280):
        name, damaged = [
            ("a.tar", whole[:chance.randrange(len(whole))]),
            ("a.tar", flip(whole, chance.choice(headers) + chance.randrange(512))),
            ("a.tar.gz", packed[:chance.randrange(len(packed))]),
            ("a.tar.gz", flip(packed, chance.randrange(len(packed))))][n % 4]
        (tmp_path / name).write_bytes(damaged)
        for index in tmp_path.glob("*.npy"):
            index.unlink()
        webdataset.read_index.cache_clear()
        webdataset.opened.cache_clear()
        try:
            assert list(Tar(str(tmp_path / name))) == READ, n
            counts["whole"] += 1
        except UserError as error:
            assert str(error).startswith(f"{tmp_path / name}: ") and len(str(error).splitlines()) == 1
            counts["refused"] += 1
    assert counts["refused"] > 200 and counts["whole"] > 10
