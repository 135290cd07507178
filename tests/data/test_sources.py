"""dataset/sources.py, and data.py's mixtures: every kind from a small fixture of its shape, and what can be wrong."""

import json
import shutil

import pytest
import torch
from PIL import Image

import data
from common.cli import UserError
from dataset import emoji, sources
from helpers import jpeg, write_tar


@pytest.fixture
def photos(tmp_path):
    """A folder of five pictures with a caption file each; one lies in a folder of its own."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i in range(5):
        file = folder / ("more" if i == 4 else "") / f"IMG {i}.{('JPG', 'png', 'jpeg', 'webp', 'jpg')[i]}"
        Image.new("RGB", (60, 40), (50 * i, 0, 0)).save(file)
        file.with_suffix(".txt").write_text(f"red {i}\nstill red {i}\n\n")
    return folder


def test_a_folder_of_pictures_with_captions(photos):
    source = sources.of_path(str(photos))
    assert len(source) == 5
    by_name = {sample["key"].rpartition("/")[2]: sample for sample in map(source.__getitem__, range(5))}
    assert by_name["IMG 1.png"]["captions"] == ["red 1", "still red 1"]
    assert by_name["IMG 4.jpg"]["picture"] == (photos / "more" / "IMG 4.jpg").read_bytes()
    assert sorted(source.texts())[:2] == ["red 0", "red 1"]


def test_a_folder_with_a_metadata_file(photos):
    lines = [dict(file_name="IMG 1.png", text="one"), dict(file_name="more/IMG 4.jpg", text="four")]
    lines += [dict(file_name="IMG 1.png", text="a line\u2028in a line")]
    (photos / "metadata.jsonl").write_text(
        "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n", encoding="utf-8")
    source = sources.of_path(str(photos))
    assert [sample["captions"] for sample in map(source.__getitem__, range(len(source)))] == [
        ["one"], ["four"], ["a line\u2028in a line"]]


def test_a_list_of_pictures_with_captions_and_recaptions(photos):
    entries = [dict(image_path="IMG 1.png", height=40, width=60, caption="one", re_caption="a red picture"),
               dict(image_path="IMG 3.webp", height=40, width=60, caption=None, re_caption="another")]
    (photos / "list.json").write_text(json.dumps(entries))
    source = data.open_source(str(photos / "list.json"), 16)
    assert (source[0]["captions"], source[0]["recaption"]) == (["one"], "a red picture")
    shares = [sources.choose_caption(source[0], 0.25, chance / 1000) for chance in range(1000)]
    assert shares.count("a red picture") == 250 and shares.count("one") == 750
    assert sources.choose_caption(source[1], 0.0, 0.9) == "another"


def test_a_mixture_cuts_pictures_and_says_what_its_sources_are(photos, tmp_path):
    write_tar(tmp_path / "a.tar", [("x.jpg", jpeg("blue", (90, 50))), ("x.txt", b"blue")])
    mix = data.Mix([f"{photos}:3", str(tmp_path / "a.tar")], 16, "run")
    found = mix.take(range(400), "image")
    assert {tuple(sample["picture"].shape) for sample in found} == {(3, 16, 16)} and len(mix) == 6
    assert sum(sample["captions"] == ["blue"] for sample in found) == 25     # one sample beside five that count 3
    again = mix.take(range(7, 400, 40), "image")
    assert all(torch.equal(a["picture"], b["picture"]) for a, b in zip(found[7::40], again))
    assert mix.texts() is None and data.Mix([str(photos)], 16).texts() is not None


def test_the_embedded_set_is_told_by_its_first_sample(tmp_path, small_tar):
    told = lambda path: emoji.is_emoji(sources.of_path(str(path)))
    assert told(small_tar) and told(emoji.TAR)
    other = write_tar(tmp_path / "a.tar", [("x.webp", jpeg("red")), ("x.json", b'{"caption": "red"}')])
    assert not told(other) and not told(tmp_path)


def test_what_is_shown_as_learnt_is_what_is_trained_on_and_can_be_read(photos, emoji_set):
    mix = data.Mix([str(emoji.TAR)], 64, "run")
    split = {record["key"]: record["split"] for record in emoji_set[0]}
    assert {split[sample["key"]] for sample in mix.shown(60, False)} == {"train"}
    assert "train" not in {split[sample["key"]] for sample in mix.shown(60, True)}
    for file in ("IMG 0.JPG", "IMG 1.png"):
        (photos / file).write_bytes(b"no picture")
    found = data.Mix([str(photos)], 16).shown(2, False)
    assert all(sample["picture"].shape == (3, 16, 16) for sample in found) and len(found) == 2


def test_a_sample_of_no_use_is_replaced_counted_and_too_many_end_the_run(photos):
    (photos / "IMG 2.jpeg").write_bytes(b"no picture")
    Image.new("RGB", (500, 40)).save(photos / "IMG 1.png")
    mix = data.Mix([str(photos)], 16, "run")
    found = mix.take(range(5), "image")
    assert len(found) == 5 and 2 <= len(mix.bad) <= 4
    assert {message.partition(": ")[2][:30] for message in mix.bad} == {
        "not a picture that can be read", "a picture of 500x40, expected "}
    with pytest.raises(UserError, match=f"{photos}: .* of .* samples are of no use, the last: "):
        mix.take(range(5, 400), "image")
    mix = data.Mix([str(photos)], 16, "run", data.Filters(min_side=41))
    with pytest.raises(UserError, match="100 samples in a row are of no use"):
        mix.take([0], "image")
    assert any("60x40, expected sides of at least 41 and at most 4 to 1" in name for name in mix.bad)


def test_filters_leave_out_any_share_without_ending_the_run(tmp_path):
    """Of 40 images 30 are too small, too long or have too short a caption: the others are drawn, 400 times."""
    sizes = {0: (64, 64), 1: (20, 64), 2: (64, 300), 3: (64, 64)}
    for i in range(40):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg("red", sizes[i % 4]))
        (tmp_path / f"{i}.txt").write_text("red" if i % 4 == 3 else f"caption {i}")
    mix = data.Mix([str(tmp_path)], 16, "run", data.Filters(min_side=32, max_ratio=4.5, min_caption=6))
    found = mix.take(range(400), "image")
    assert {sample["captions"][0] for sample in found} == {f"caption {i}" for i in range(0, 40, 4)}
    assert mix.lost == 0 and len(mix.newly_bad()) > 400
    wide = data.Mix([str(tmp_path)], 16, "run", data.Filters(max_ratio=5))
    assert len({tuple(sample["captions"]) for sample in wide.take(range(40), "image")}) == 31


def test_short_captions_go_one_by_one():
    mix = object.__new__(data.Mix)
    mix.filters = data.Filters(min_caption=6)
    sample = dict(key="a", captions=["short", "long enough"], recaption="no")
    mix.filter_captions(sample, True)
    assert sample["captions"] == ["long enough"] and not sample["recaption"]
    asks = dict(key="b", captions=["short"], questions=[dict(question="Is it?", answer="yes")])
    mix.filter_captions(asks, False)
    assert asks["captions"] == []
    with pytest.raises(data.Filtered, match="b: no caption of at least 6 characters"):
        mix.filter_captions(dict(asks, captions=["short"]), True)


def test_sets_are_concatenated_and_a_weight_is_that_of_each_sample(tmp_path, small_tar):
    """Every sample of a large and of a small set is drawn as often, PATH:W ones W times as often."""
    for folder, count in (("large", 300), ("small", 20)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            (tmp_path / folder / f"{i}.jpg").write_bytes(b"")
            (tmp_path / folder / f"{i}.txt").write_text("a caption")
    for weight, share in (("", 20 / 320), (":5", 100 / 400)):
        mix = data.Mix([str(tmp_path / "large"), f"{tmp_path / 'small'}{weight}"], 16, "run")
        drawn = [k for k, _, _ in mix.places(range(32_000), "image")]
        assert drawn.count(1) == pytest.approx(share * 32_000, abs=1)
    with pytest.raises(UserError, match="20 samples of 320 are too few to be drawn"):
        data.Mix([str(tmp_path / "large") + ":99999999", str(tmp_path / "small")], 16)


def test_what_a_source_is_does_not_depend_on_where_it_lies(photos, tmp_path):
    moved = shutil.copytree(photos, tmp_path / "moved")
    assert data.fingerprint(str(photos)) == data.fingerprint(str(moved)) != data.fingerprint(f"{moved}:2")
    (moved / "IMG 1.txt").write_text("another caption")
    assert data.fingerprint(str(photos)) != data.fingerprint(str(moved))


@pytest.mark.parametrize("damage, spec, message", [
    (lambda f: [p.unlink() for p in f.rglob("*.*")], "",
     "expected pictures .* with captions, or .tar files, found more"),
    (lambda f: (f / "IMG 1.png").unlink(), "",
     "IMG 1.txt: expected a picture of that name, found none"),
    (lambda f: (f / "IMG 3.txt").unlink(), "", "IMG 3.webp: expected its caption in a .txt of that name"),
    (lambda f: (f / "metadata.jsonl").write_text('{"file": "x"}'), "",
     "metadata.jsonl:1: expected file_name and text"),
    (lambda f: (f / "a.json").write_text('{"x": 1}'), "/a.json", "expected a list of pictures .* the keys x"),
    (lambda f: (f / "a.json").write_text('[{"image_path": 1}]'), "/a.json", "expected objects with image_path"),
    (lambda f: (f / "a.json").write_text("{"), "/a.json", "a.json: not readable as JSON"),
    (lambda f: (f / "a.json").write_text('{"data": [{}]}'), "/a.json", "an entry lacks 'image_id', so"),
    (lambda f: (f / "a.json").write_text("[]"), "/a.json", "a.json: expected .* found the keys of nothing"),
    (lambda f: (f / "a.parquet").write_bytes(b"x"), "/a.parquet",
     "expected a folder of pictures with captions, tars"),
    (lambda f: write_tar(f / "a.tar", [("x.txt", b"x")]), "/a.tar",
     "no picture in this sample, found .txt"),
    (lambda f: write_tar(f / "a.tar", []), "/a.tar", "a.tar: no samples in this tar"),
    (lambda f: (f / "a.tar").write_bytes(bytes(700)), "/a.tar",
     "a.tar: no samples in this tar|not a whole tar"),
    (lambda f: None, "/none.tar", "none.tar: no such tar file"),
    (lambda f: None, "/none-*.tar", "no file has such a name"),
    (lambda f: None, ":0", "a weight of 0, expected PATH or PATH:WEIGHT with one above 0"),
    (lambda f: None, "/nothing", "no such file or folder"),
])
def test_a_source_that_is_not_as_it_should_be_gets_one_line(damage, spec, message, photos):
    damage(photos)
    with pytest.raises(UserError, match=message) as error:
        data.Mix([f"{photos}{spec}"], 16).take(range(1), "image")
    assert "\n" not in str(error.value) and str(photos) in str(error.value)


def test_the_show_command_draws_a_page_and_counts_what_is_wrong(photos, tmp_path, capsys):
    (photos / "IMG 2.jpeg").write_bytes(b"no picture")
    data.main(["show", str(photos), "--pixels", "32", "--out", str(tmp_path / "page.png")])
    said = capsys.readouterr().out
    assert f"{photos}: Folder, 5 samples, 100.0% of the mix" in said
    assert "looked at 5 samples, 1 of no use" in said
    assert "wrong: " in said and Image.open(tmp_path / "page.png").size == (1000, 4 * 104)
