"""dataset/webdataset.py: samples of a tar in any order; other files are skipped."""

import gzip
import json
import os
import random
import tarfile
from collections import Counter

import numpy as np
import pytest

import data
from common.cli import UserError
from dataset import emoji, webdataset
from dataset.webdataset import Tar
from helpers import jpeg, write_tar
from pretrained import tokenizer

FILES, SAMPLES = [], []         # files and samples of a good tar: eight images with captions
for i in range(8):
    content = dict(jpg=jpeg((30 * i, 0, 0)), json=json.dumps(dict(caption=f"red {i}")).encode())
    FILES += [(f"{i:03}.{kind}", content[kind]) for kind in content]
    SAMPLES.append((f"{i:03}", content))


def forget():
    """Clear the caches of open files and indexes."""
    webdataset.read_index.cache_clear()
    webdataset.opened.cache_clear()


def link(name, target, kind):
    member = tarfile.TarInfo(name)
    member.linkname, member.type = target, kind
    return member, b""


def test_the_emoji_set_is_read_sample_by_sample():
    with tarfile.open(emoji.TAR) as whole:
        names = [whole.next().name for _ in range(4)]
    tar = Tar(str(emoji.TAR))
    assert [tar[i][0] for i in range(2)] == [names[0].split(".")[0], names[2].split(".")[0]]
    assert len(tar) == 7572
    assert set(tar[7571][1]) == {"webp", "json"}


@pytest.fixture
def shards(tmp_path):
    """Write three tars of 20, 21 and 22 samples."""
    for shard in range(3):
        files = []
        for i in range(20 + shard):
            key = f"deep.er/{shard}{i:02}"
            recaption = json.dumps(dict(re_caption=f"again {i}")).encode()
            files += [(f"{key}.jpg", jpeg((i, 0, 0))), (f"{key}.txt", f"text {shard} {i}".encode()),
                      (f"{key}.json", recaption)]
        write_tar(tmp_path / f"shard-{shard:03}.tar", files)
    return tmp_path


def test_shards_are_read_in_any_order(shards):
    source = data.open_source(str(shards / "shard-{000..002}.tar"), 16)
    assert len(source) == 63
    places = [(shard, i) for shard in range(3) for i in range(20 + shard)]
    for n in random.Random(0).sample(range(63), 63):
        shard, i = places[n]
        assert source[n]["captions"] == [f"text {shard} {i}"]
        assert source[n]["recaption"] == f"again {i}"
        assert source[n]["key"].endswith(f"shard-{shard:03}.tar: deep.er/{shard}{i:02}.jpg")


@pytest.mark.parametrize("pattern", ["", "*.tar"])
def test_shards_are_found_by_folder_and_by_pattern(pattern, shards):
    assert len(data.open_source(str(shards / pattern), 16)) == 63


def test_an_index_lies_beside_its_tar_and_outside_the_fingerprint(shards):
    before = data.fingerprint(str(shards))
    data.open_source(str(shards), 16)
    assert np.load(shards / "shard-001.tar.index.npy").shape == (23, 2)  # 21 samples and the tar's stamp
    assert data.fingerprint(str(shards)) == before


def test_a_packed_tar_is_held_in_memory_up_to_a_size(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", FILES)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    assert list(Tar(str(tmp_path / "a.tar.gz"))) == SAMPLES
    monkeypatch.setattr(webdataset, "WHOLE_GZIP", 1000)
    with pytest.raises(UserError, match="a.tar.gz: .*gunzip"):
        Tar(str(tmp_path / "a.tar.gz"))


def test_a_missing_tar_is_named(tmp_path):
    with pytest.raises(UserError, match="none.tar: no such"):
        Tar(str(tmp_path / "none.tar"))


def test_the_index_command_indexes_whole_tars_only(shards, tmp_path, run_program, capsys):
    data.main(["index", str(shards / "shard-000.tar")])
    assert "20 samples" in capsys.readouterr().out
    assert (shards / "shard-000.tar.index.npy").exists()
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress((shards / "shard-000.tar").read_bytes()))
    code, error = run_program(data.main, ["index", packed])
    assert code == 1 and str(packed) in error
    code, error = run_program(data.main, ["index", tmp_path / "none*.tar"])
    assert code == 1 and "none*.tar" in error


def test_a_cut_tar_is_refused_and_leaves_no_index(tmp_path):
    path = write_tar(tmp_path / "a.tar", FILES)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="a.tar: .*whole"):
        Tar(path)
    assert not (tmp_path / "a.tar.index.npy").exists()


def test_an_index_may_be_older_than_its_tar_but_not_that_of_another(tmp_path):
    path = write_tar(tmp_path / "a.tar", FILES)
    Tar(path)
    before = os.stat(path)
    os.utime(path + ".index.npy", (1, 1))
    forget()
    assert len(Tar(path)) == 8 and os.stat(path + ".index.npy").st_mtime == 1
    renamed = [(name.replace("000", "zzz"), content) for name, content in FILES]
    write_tar(tmp_path / "a.tar", renamed)                       # of the same size and time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size
    forget()
    assert len(Tar(path)) == 8 and Tar(path)[0][0].startswith("zzz")


def test_a_damaged_index_is_made_again(tmp_path):
    path = write_tar(tmp_path / "a.tar", FILES)
    Tar(path)
    index = tmp_path / "a.tar.index.npy"
    whole = index.read_bytes()
    rows = np.load(index)
    rows[-1, 1] -= 1                                             # the rules of an older program
    np.save(tmp_path / "older.npy", rows)
    for content in (b"x" * 300, whole[:-8], (tmp_path / "older.npy").read_bytes()):
        forget()
        index.write_bytes(content)
        assert len(Tar(path)) == 8 and index.read_bytes() == whole


BESIDE = [(name, b"x") for name in
          ("README", "README.md", "LICENSE.txt", ".DS_Store", "__MACOSX/000.jpg")]


def test_files_beside_the_samples_are_left_out(tmp_path):
    folder = tarfile.TarInfo("sub")
    folder.type = tarfile.DIRTYPE
    mixed = []
    for name, content in FILES:
        mixed += [(f"._{name}", b"\0\5"), (name, content)]
    path = write_tar(tmp_path / "a.tar", [(folder, b""), *BESIDE, *mixed, *BESIDE])
    assert list(Tar(path)) == SAMPLES


def test_a_sample_may_be_called_license(tmp_path):
    files = [(name.replace("000", "license"), content) for name, content in FILES[:2]]
    assert list(Tar(write_tar(tmp_path / "a.tar", files))) == [("license", SAMPLES[0][1])]


def test_extensions_may_be_upper_case(tmp_path):
    files = [(name.upper(), content) for name, content in FILES]
    assert list(Tar(write_tar(tmp_path / "a.tar", files))) == SAMPLES


@pytest.mark.parametrize("cut", [8, 7], ids=["between samples", "in a sample"])
def test_joined_tars_are_read_to_the_end(cut, tmp_path):
    """`cat` leaves blocks of zeros between the tars, where tarfile stops."""
    with open(tmp_path / "joined.tar", "wb") as joined:
        for files in (FILES[:cut], FILES[cut:]):
            write_tar(tmp_path / "part.tar", files)
            joined.write((tmp_path / "part.tar").read_bytes())
    with tarfile.open(tmp_path / "joined.tar") as first:
        assert len(first.getnames()) == cut
    assert list(Tar(str(tmp_path / "joined.tar"))) == SAMPLES


@pytest.mark.parametrize("files, message", [
    (sorted(FILES, key=lambda file: file[0][-3:]), ".*--sort"),
    (FILES + FILES[:2], "000.jpg .*twice"),
    (FILES[:2] + FILES[1:], "000.json .*twice"),
    (FILES[:-2] + [link("007.jpg", "006.jpg", tarfile.LNKTYPE)], "007.jpg .*link"),
    (FILES[:-2] + [link("007.jpg", "006.jpg", tarfile.SYMTYPE)], "007.jpg .*link"),
    (FILES[:-2] + [link("007.jpg", "", tarfile.FIFOTYPE)], "007.jpg .*link"),
    ([("README", b"x")], "no samples"),
    ([], "no samples")])
def test_a_tar_of_unclear_samples_is_refused(files, message, tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/a.tar: {message}"):
        Tar(write_tar(tmp_path / "a.tar", files))


@pytest.mark.parametrize("record, message", [
    (b"[1]", r".*\[1\]"),
    (b"3", ".* 3"),
    (b"{", ".*JSON"),
    (b"[" * 10**5, ".*JSON"),
    (b'{"caption": "\xff"}', ".*UTF-8"),
    (b'{"caption": 3}', '"caption" is 3'),
    (rb'{"caption": "red \ud83c apple"}', r'"caption" is .red \\ud83c apple'),
    (b'{"caption": "a", "re_caption": ["b"]}', r'"re_caption" is \[.b.\]'),
    (b'{"caption": "a", "questions": {}}', '"questions" is {}'),
    (b'{"caption": "a", "questions": ["q"]}', r'"questions" is \[.q.\]'),
    (b'{"caption": "a", "questions": [{"question": "b", "answer": "c"}, {"question": "b"}]}',
     r'"questions\[1\].answer" is null'),
    (b'{"questions": [{"q": "x"}]}', r'"questions\[0\].question" is null')])
def test_a_record_of_the_wrong_type_names_tar_key_and_field(record, message, tmp_path):
    source = data.open_source(write_tar(tmp_path / "a.tar", [FILES[0], ("000.json", record)]), 16)
    with pytest.raises(UserError, match=f"^{tmp_path}/a.tar: 000.json:(1:)? ?{message}") as error:
        source[0]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content, caption", [
    (b"\xef\xbb\xbfred\n", "red"), ("сад".encode(), "сад")])
def test_captions_are_read_as_utf_8(content, caption, tmp_path):
    source = data.open_source(write_tar(tmp_path / "a.tar", [FILES[0], ("000.txt", content)]), 16)
    assert source[0]["captions"] == [caption]


def test_captions_in_another_encoding_are_refused(tmp_path):
    path = write_tar(tmp_path / "latin.tar", [FILES[0], ("000.txt", b"caf\xe9")])
    latin = data.open_source(path, 16)
    with pytest.raises(UserError, match="latin.tar: 000.txt:1: .*UTF-8.* byte 3"):
        latin[0]


@pytest.mark.parametrize("record, recaption", [
    (dict(caption=None, re_caption="b"), "b"), (dict(caption=None), None), (dict(caption=""), None)])
def test_null_is_no_caption(record, recaption, tmp_path):
    path = write_tar(tmp_path / "null.tar", [FILES[0], ("000.json", json.dumps(record).encode())])
    sample = data.open_source(path, 16)[0]
    assert sample["captions"] == []
    assert sample.get("recaption") == recaption
    if recaption is None:
        with pytest.raises(UserError, match="000.jpg: no caption"):
            data.Mix([path], 16).sample(data.Place(0, 0, 0))


@pytest.fixture
def without_questions(tmp_path):
    """Write a tar of two samples: one without a list of questions, one with an empty list."""
    empty = b'{"caption": "a", "questions": []}'
    return write_tar(tmp_path / "a.tar", [*FILES[:3], ("001.json", empty)])


def test_an_empty_list_of_questions_is_refused_where_they_are_asked(without_questions):
    mix = data.Mix([without_questions], 16)
    asking = data.Mix([without_questions], 16, asks=True)
    places = [data.Place(0, 0, i) for i in (0, 1)]
    assert [mix.sample(place)["captions"] for place in places] == [["red 0"], ["a"]]
    assert asking.sample(places[0])["captions"] == ["red 0"]
    assert asking.sample(places[1], captioned=True)["captions"] == ["a"]
    with pytest.raises(UserError, match=f'^{without_questions}: 001.jpg: "questions" is '):
        asking.sample(places[1])


def test_sources_without_questions_are_refused_where_they_are_asked(without_questions, small_tar):
    gpt2 = tokenizer.gpt2_tokenizer()
    with pytest.raises(UserError, match=f"^{without_questions}: no questions"):
        data.check_questions(data.Mix([without_questions], 16, asks=True), [], gpt2, 28)
    data.check_questions(data.Mix([without_questions], 16), [], gpt2, 28)
    data.check_questions(data.Mix([without_questions, small_tar], 16, asks=True), [], gpt2, 28)


def test_an_unreadable_image_is_named_by_tar_and_key(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*FILES[:2], ("001.png", b"x"), ("001.txt", b"x")])
    with pytest.raises(UserError, match=f"^{path}: 001.png: "):
        data.Mix([path], 16).sample(data.Place(0, 0, 1))


def damaged_tars(whole, headers):
    """Yield (name, content) of tars that are cut anywhere or have one flipped bit.

    Bits are flipped in headers and packed tars, which have checksums; files in a plain tar do not.
    """
    generator = random.Random(0)
    packed = gzip.compress(whole, mtime=1)

    def flip(content, at):
        return content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1:]

    for _ in range(70):
        yield "a.tar", whole[:generator.randrange(len(whole))]
        yield "a.tar", flip(whole, generator.choice(headers) + generator.randrange(512))
        yield "a.tar.gz", packed[:generator.randrange(len(packed))]
        yield "a.tar.gz", flip(packed, generator.randrange(len(packed)))


def test_damaged_tars_are_read_whole_or_refused_in_one_line(tmp_path):
    write_tar(tmp_path / "good.tar", FILES)
    with tarfile.open(tmp_path / "good.tar") as tar:
        headers = [member.offset for member in tar]
    counts = Counter()
    for name, content in damaged_tars((tmp_path / "good.tar").read_bytes(), headers):
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.index.npy").unlink(missing_ok=True)
        forget()
        try:
            assert list(Tar(str(tmp_path / name))) == SAMPLES
            counts["whole"] += 1
        except UserError as error:
            assert str(error).startswith(f"{tmp_path / name}: ") and "\n" not in str(error)
            counts["refused"] += 1
    assert counts["refused"] > 200 and counts["whole"] > 10  # damage is mostly, not always noticed
