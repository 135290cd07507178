"""dataset/sources.py, and the mixtures of data.py: each kind of source, and its errors."""

import json
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image

import data
from common.cli import UserError
from dataset import emoji, sources
from helpers import jpeg, write_tar
from training import setup


@pytest.fixture
def photos(tmp_path):
    """Write five images with a caption file each; one is in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    names = ["IMG 0.JPG", "IMG 1.png", "IMG 2.jpeg", "IMG 3.webp", "more/IMG 4.jpg"]
    for i, name in enumerate(names):
        Image.new("RGB", (60, 40), (50 * i, 0, 0)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"red {i}\nstill red {i}\n\n")
    return folder


def write_images(folder, count, caption="a caption", content=jpeg("red")):
    """Write `count` equal images with a caption each."""
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(content)
        (folder / f"{i}.txt").write_text(caption)
    return folder


# --------------------------------------------------------------------------------- kinds of sources

def test_a_folder_of_images_with_caption_files(photos):
    source = data.open_source(str(photos), 16)
    samples = {}
    for i in range(len(source)):
        samples[source[i]["key"].rpartition("/")[2]] = source[i]
    assert len(samples) == 5
    assert samples["IMG 1.png"]["captions"] == ["red 1", "still red 1"]
    assert samples["IMG 4.jpg"]["image"] == (photos / "more" / "IMG 4.jpg").read_bytes()
    assert sorted(source.texts())[:2] == ["red 0", "red 1"]


def test_a_folder_with_a_metadata_file(photos):
    records = [dict(file_name="IMG 1.png", text="one"),
               dict(file_name="more/IMG 4.jpg", text="four"),
               dict(file_name="IMG 1.png", text="a line\u2028in a line")]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\r\n" for record in records)
    (photos / "metadata.jsonl").write_text(lines, encoding="utf-8")
    source = data.open_source(str(photos), 16)
    captions = [source[i]["captions"] for i in range(len(source))]
    assert captions == [["one"], ["four"], ["a line\u2028in a line"]]


def test_a_list_of_images_with_captions_and_recaptions(photos):
    size = dict(height=40, width=60)
    entries = [dict(size, image_path="IMG 1.png", caption=" one\n", re_caption="a red image"),
               dict(size, image_path="IMG 3.webp", caption=None, re_caption="another"),
               dict(size, image_path="IMG 3.webp", caption=" ", re_caption="another")]
    (photos / "list.json").write_text(json.dumps(entries))
    source = data.open_source(str(photos / "list.json"), 16)
    assert source[0]["captions"] == ["one"]
    assert source[0]["recaption"] == "a red image"
    assert source[1]["captions"] == source[2]["captions"] == []
    assert source[1]["recaption"] == "another"


def test_texts_of_a_list_include_questions(photos):
    pair = dict(question="Which colour?", answer="red")
    entries = [dict(image_path="IMG 1.png", caption="one", re_caption="again", questions=[pair]),
               dict(image_path="IMG 3.webp", caption=5)]                 # skipped when it is read
    (photos / "list.json").write_text(json.dumps(entries))
    texts = list(data.open_source(str(photos / "list.json"), 16).texts())
    assert texts == ["one", "again", "Q: Which colour? A: ", "red"]


def test_captions_beside_a_recaption_are_drawn_uniformly():
    sample = dict(captions=["one", "two", "three"], recaption="again")
    counts = Counter(sources.choose_caption(sample, 0.25, (n + 0.5) / 1000) for n in range(1000))
    assert counts == {"again": 250, "one": 250, "two": 250, "three": 250}


def test_a_recaption_stands_in_where_there_is_no_caption():
    assert sources.choose_caption(dict(captions=[], recaption="again"), 0.0, 0.9) == "again"


def test_the_emoji_set_is_recognised_by_its_first_sample(tmp_path, small_tar):
    files = [("x.webp", jpeg("red")), ("x.json", b'{"caption": "red"}')]
    other = write_tar(tmp_path / "a.tar", files)
    assert isinstance(data.open_source(small_tar, 16), emoji.Emoji)
    assert isinstance(data.open_source(other, 16), sources.Tars)
    assert isinstance(data.open_source(str(tmp_path), 16), sources.Tars)


def test_a_fingerprint_depends_on_contents_and_weight_only(photos, tmp_path):
    moved = shutil.copytree(photos, tmp_path / "moved")
    before = data.fingerprint(str(photos))
    assert data.fingerprint(str(moved)) == before
    assert data.fingerprint(f"{moved}:2") != before
    (moved / "IMG 1.txt").write_text("another caption")
    assert data.fingerprint(str(moved)) != before


# ----------------------------------------------------------------------------------------- mixtures

def test_a_mixture_crops_images_and_repeats_itself(photos, tmp_path):
    write_tar(tmp_path / "a.tar", [("x.jpg", jpeg("blue", (90, 50))), ("x.txt", b"blue")])
    mix = data.Mix([f"{photos}:3", str(tmp_path / "a.tar")], 16, "run")
    samples = mix.take(range(160), "image")
    assert len(mix) == 6
    assert {tuple(sample["image"].shape) for sample in samples} == {(3, 16, 16)}
    blue = sum(sample["captions"] == ["blue"] for sample in samples)
    assert blue == 10                               # one sample, and five with weight 3
    again = mix.take(range(7, 160, 40), "image")
    for one, other in zip(samples[7::40], again, strict=True):
        assert torch.equal(one["image"], other["image"])


def test_a_mixture_lists_its_texts_where_that_is_cheap(photos, tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("x.jpg", jpeg("blue")), ("x.txt", b"blue")])
    assert len(setup.all_texts({"text": data.Mix([str(photos)], 16)})) == 10
    assert setup.all_texts({"text": data.Mix([str(photos), tar], 16)}) is None


@pytest.mark.parametrize("weight, share", [("", 2 / 32), (":5", 10 / 40)])
def test_a_weight_is_that_of_each_sample(weight, share, tmp_path):
    large, small = write_images(tmp_path / "large", 30), write_images(tmp_path / "small", 2)
    mix = data.Mix([str(large), f"{small}{weight}"], 16, "run")
    drawn = [source for source, _, _ in mix.places(range(640), "image")]
    assert drawn.count(1) == pytest.approx(share * 640, abs=1)   # a share is rounded down


def test_a_source_too_small_to_be_drawn_is_refused(tmp_path):
    large, small = write_images(tmp_path / "large", 30), write_images(tmp_path / "small", 2)
    with pytest.raises(UserError, match=f"{small}: 2 samples of 32"):
        data.Mix([f"{large}:99999999", str(small)], 16)


def test_shown_emoji_are_of_the_split_that_is_asked_for(small_tar):
    mix = data.Mix([small_tar], 16, "run")
    splits = {record["key"]: record["split"] for record in mix.sources[0].records}
    trained, held_out = mix.shown(8, False), mix.shown(8, True)
    assert len(trained) == 8
    assert {splits[sample["key"]] for sample in trained} == {"train"}
    assert held_out and "train" not in {splits[sample["key"]] for sample in held_out}


def test_shown_samples_are_readable(photos):
    for file in ("IMG 0.JPG", "IMG 1.png"):
        (photos / file).write_bytes(b"not an image")
    samples = data.Mix([str(photos)], 16).shown(2, False)
    assert len(samples) == 2
    assert all(sample["image"].shape == (3, 16, 16) for sample in samples)


# ---------------------------------------------------------------------------- unusable and filtered

def test_unusable_samples_are_replaced_and_named(photos):
    (photos / "IMG 2.jpeg").write_bytes(b"not an image")
    Image.new("RGB", (500, 40)).save(photos / "IMG 1.png")
    mix = data.Mix([str(photos)], 16, "run")
    samples = mix.take(range(5), "image")
    assert len(samples) == 5
    assert {sample["captions"][0] for sample in samples} == {"red 0", "red 3", "red 4"}
    assert {message.partition(": ")[0] for message in mix.bad} == {
        str(photos / "IMG 1.png"), str(photos / "IMG 2.jpeg")}
    assert any("500x40" in message for message in mix.bad)


@pytest.mark.parametrize("broken, ends", [(3, False), (20, True)])
def test_over_five_percent_of_unreadable_samples_end_a_run(broken, ends, tmp_path):
    """3 bad samples of 100 never end a run, even at an epoch's start (9 of 209); 20 of 120 do."""
    folder = write_images(tmp_path / "images", 100, content=jpeg("red", (16, 16)))
    for i in range(broken):
        (folder / f"{3 * i}.jpg").write_bytes(b"not an image")
    mix = data.Mix([str(folder)], 16, "run")
    if ends:
        with pytest.raises(UserError, match=f"{folder}: [0-9]+ of [0-9]+ .*{folder}/.*.jpg"):
            mix.take(range(400), "image")
    else:
        assert len(mix.take(range(400), "image")) == 400
        assert mix.lost.total() == 4 * broken


def test_only_unusable_samples_end_a_run(photos):
    mix = data.Mix([str(photos)], 16, "run", data.Filters(min_side=41))
    with pytest.raises(UserError, match=f"{photos}: 5 samples .*60x40"):
        mix.take([0], "image")


def test_filters_leave_out_any_share_without_ending_a_run(tmp_path):
    """30 of 40 images are too small, too long or have a short caption; 10 are drawn 400 times."""
    sizes = [(64, 64), (20, 64), (64, 300), (64, 64)]
    for i in range(40):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg("red", sizes[i % 4]))
        (tmp_path / f"{i}.txt").write_text("red" if i % 4 == 3 else f"caption {i}")
    filters = data.Filters(min_side=32, max_ratio=4.5, min_caption=6)
    mix = data.Mix([str(tmp_path)], 16, "run", filters)
    captions = {sample["captions"][0] for sample in mix.take(range(400), "image")}
    assert captions == {f"caption {i}" for i in range(0, 40, 4)}
    assert not mix.lost
    assert len(mix.newly_bad()) > 400 and not mix.newly_bad()
    wide = data.Mix([str(tmp_path)], 16, "run", data.Filters(max_ratio=5))
    assert len({sample["captions"][0] for sample in wide.take(range(40), "image")}) == 31


def test_short_captions_are_left_out_one_by_one(photos):
    mix = data.Mix([str(photos)], 16, filters=data.Filters(min_caption=6))
    sample = dict(key="a", captions=["short", "long enough"], recaption="no")
    mix.filter_captions(sample, True)
    assert sample["captions"] == ["long enough"]
    assert not sample["recaption"]
    questions = [dict(question="Is it?", answer="yes")]
    sample = dict(key="b", captions=["short"], questions=questions)
    mix.filter_captions(sample, False)
    assert sample["captions"] == []
    for texts in (dict(captions=["short"], questions=questions),
                  dict(captions=[], recaption="short")):
        with pytest.raises(data.Filtered, match="^b: .* 6 "):
            mix.filter_captions(dict(key="b", **texts), True)


# ------------------------------------------------------------------------------------------- errors

def delete_files(folder):
    for path in folder.rglob("*.*"):
        path.unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def unlink(name):
    return lambda folder: (folder / name).unlink()


def tar_of(*files):
    return lambda folder: write_tar(folder / "a.tar", files)


@pytest.mark.parametrize("damage, suffix, message", [
    (delete_files, "", "photos: .*more"),
    (unlink("IMG 1.png"), "", "IMG 1.txt: "),
    (unlink("IMG 3.txt"), "", "IMG 3.webp: .*.txt"),
    (write("metadata.jsonl", b'{"file": "x"}'), "", "metadata.jsonl:1: .*file_name"),
    (write("a.json", b'{"colour": 1}'), "/a.json", "a.json: .*colour"),
    (write("a.json", b'[{"image_path": 1}]'), "/a.json", "a.json: .*image_path"),
    (write("a.json", b"{"), "/a.json", "a.json: .*JSON"),
    (write("a.json", b'{"data": [{}]}'), "/a.json", "a.json: .*'image_id'"),
    (write("a.json", b"[]"), "/a.json", "a.json: .*keys"),
    (write("a.parquet", b"x"), "/a.parquet", "a.parquet: "),
    (tar_of(("x.txt", b"x")), "/a.tar", "a.tar: x: .*txt"),
    (tar_of(), "/a.tar", "a.tar: no samples"),
    (write("a.tar", bytes(700)), "/a.tar", "a.tar: "),
    (None, "/none.tar", "none.tar: "),
    (None, "/none-*.tar", r"none-\*.tar: "),
    (None, ":0", "photos:0: "),
    (None, "/nothing", "nothing: "),
])
def test_a_damaged_source_is_refused_in_one_line(damage, suffix, message, photos):
    if damage:
        damage(photos)
    with pytest.raises(UserError, match=message) as error:
        data.Mix([f"{photos}{suffix}"], 16).take(range(1), "image")
    assert "\n" not in str(error.value) and str(photos) in str(error.value)


def test_the_show_command_draws_a_page_and_counts_errors(photos, tmp_path, capsys):
    (photos / "IMG 2.jpeg").write_bytes(b"not an image")
    data.main(["show", str(photos), "--pixels", "32", "--out", str(tmp_path / "page.png")])
    output = capsys.readouterr().out
    assert f"{photos}: Folder, 5 samples, 100.0%" in output
    assert "5 samples, 1 " in output
    assert str(photos / "IMG 2.jpeg") in output
    assert Image.open(tmp_path / "page.png").size == (1000, 4 * 104)     # two columns, four samples
