"""dataset/emoji.py: the emoji set, its splits, its questions, and an epoch of it."""

import re
from collections import Counter, defaultdict
from functools import cache

import pytest
import torch

import data
from common.cli import UserError
from dataset import emoji
from dataset.sources import question_prompt
from helpers import write_tar
from model import PRESETS
from pretrained import tokenizer

# how a group or kind begins if a noun is true; man, woman and child are decided by the name
WHERE = {"a person": "person", "a hand": "hand", "a face": "face|cat face|monkey face",
         "an animal": "animal ",
         "a bird": "animal bird", "a bug": "animal bug",
         "a plant": "plant ", "a flower": "plant flower",
         "a fruit": "food fruit", "a vegetable": "food vegetable", "food": "food ",
         "a drink": "drink", "clothing": "clothing", "a tool": "tool",
         "a musical instrument": "musical instrument", "a clock": "time",
         "a vehicle": "transport ", "a building": "place ",
         "a flag": "flag|country flag|subdivision flag",
         "an arrow": "arrow", "a heart": "heart"}
WHO = {"a man": r"\bman\b", "a woman": r"\bwoman\b", "a child": r"^(boy|girl|child|baby)$"}
TRAIN_IMAGES = 7025


@cache
def parse_yes_no(question):
    """Return (template, thing) of a yes/no question."""
    for template in emoji.YES_NO:
        if match := re.fullmatch(template.replace("?", r"\?").format("(.*)"), question):
            return template, match[1]
    raise AssertionError(question)


def test_the_set_is_whole_with_a_unique_caption_for_each_image(emoji_set):
    records, images = emoji_set
    assert images.shape == (7572, 3, 64, 64) and images.dtype == torch.uint8
    assert len(records) == len({r["key"] for r in records}) == 7572
    captions = {r["caption"]: r for r in records}
    assert len(captions) == 7572
    assert captions["waving hand, medium-dark skin tone, noto style"]["kind"] == "people & body"
    assert {"red apple, noto style", "red apple, twemoji style"} <= captions.keys()
    assert all(caption == " ".join(caption.split()) for caption in captions)


def test_splits_hold_out_tones_and_styles(emoji_set):
    splits = defaultdict(list)
    for record in emoji_set[0]:
        splits[record["split"]].append(record)
    sizes = {name: len(records) for name, records in splits.items()}
    assert sizes == {"train": TRAIN_IMAGES, "tone": 358, "style": 189}
    trained = {(r["emoji"], r["style"]) for r in splits["train"]}
    tones = {r["tone"] for r in splits["train"]} - {"none"}
    for r in splits["tone"]:    # trained on in other tones, and the tone on other emoji
        assert (r["emoji"], r["style"]) in trained and r["tone"] in tones
    other_style = {"noto": "twemoji", "twemoji": "noto"}
    for r in splits["style"]:   # trained on in the other style only
        assert (r["emoji"], r["style"]) not in trained
        assert (r["emoji"], other_style[r["style"]]) in trained


def is_true(record, kind_of_question, thing, names, kinds):
    """Return True if an emoji shows a thing, according to its name, kind or group."""
    if kind_of_question == "yes/no name":
        return names[thing] == record["name"]
    if kind_of_question == "yes/no kind":
        return kinds[thing] == record["kind"]
    assert kind_of_question == "yes/no sort"
    if thing in WHO:
        return bool(re.search(WHO[thing], record["name"]))
    return bool(re.match(WHERE[thing], record["group"]))


def test_every_answer_follows_from_the_metadata(emoji_set):
    records = emoji_set[0]
    names = {emoji.article(r["name"]): r["name"] for r in records}
    kinds = {noun: kind for kind, noun in emoji.NOUNS.items()}
    for r in records:
        for q in r["questions"]:
            if q["type"] in emoji.FIELD_QUESTIONS:
                assert q["question"] in emoji.FIELD_QUESTIONS[q["type"]]
                assert q["answer"] == r[q["type"]]
            else:
                _, thing = parse_yes_no(q["question"])
                right = "yes" if is_true(r, q["type"], thing, names, kinds) else "no"
                assert q["answer"] == right, (r["caption"], q)


def test_each_image_has_as_many_yes_as_no_answers(emoji_set):
    """Neither the phrasing, nor the type, nor a missing question gives the answer away."""
    types = set()
    for r in emoji_set[0]:
        counts = {"yes": Counter(), "no": Counter()}
        for q in r["questions"]:
            types.add(q["type"])
            if q["type"].startswith("yes/no"):
                template, _ = parse_yes_no(q["question"])
                counts[q["answer"]][q["type"], template] += 1
        assert counts["yes"] == counts["no"] and counts["yes"]
    assert types == {*emoji.FIELD_QUESTIONS, "yes/no name", "yes/no kind", "yes/no sort"}


def test_questions_about_a_man_use_everyday_nouns(emoji_set):
    pairs = set()
    for record in emoji_set[0]:
        if record["name"] == "man farmer":
            for q in record["questions"]:
                is_yes_no = q["type"].startswith("yes/no")
                thing = parse_yes_no(q["question"])[1] if is_yes_no else q["question"]
                pairs.add((thing, q["answer"]))
    assert {("a man", "yes"), ("a woman", "no"), ("a person", "yes"), ("a man farmer", "yes"),
            ("What is this?", "man farmer")} <= pairs


@pytest.mark.parametrize("name, phrase", [
    ("flag of Chad", "the flag of Chad"), ("ox", "an ox"), ("scissors", "scissors"),
    ("cactus", "a cactus")])
def test_articles(name, phrase):
    assert emoji.article(name) == phrase


def test_rivals_never_fit_the_same_emoji():
    rivals = emoji.rivals(["singer", "man singer", "woman singer", "cook", "man cook", "runner"])
    assert rivals["man singer"] == ["woman singer", "man cook"]
    assert rivals["singer"] == ["cook", "runner"]


def test_rivals_compare_words_by_three_letters():
    rivals = emoji.rivals(["biker", "mountain biking", "bird"])      # bik is shared, bike is not
    assert rivals["biker"] == ["bird"]


def test_every_text_fits_the_text_length_of_the_preset(emoji_set):
    gpt2 = tokenizer.gpt2_tokenizer()
    count = cache(lambda text: len(gpt2.pieces(text)))
    captions, questions = 0, 0
    for record in emoji_set[0]:
        captions = max(captions, count(record["caption"]) + 1)           # with the end token
        for q in record["questions"]:
            length = count(question_prompt(q["question"])) + count(q["answer"]) + 1
            questions = max(questions, length)
    assert (captions, questions) == (24, 27)
    assert questions <= PRESETS["emoji"]["text_length"]


def open_mix(emoji_set, suffix="", key="run"):
    """Open the whole emoji set as a mixture, without reading the tar again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "load", lambda *_: emoji_set)
        return data.Mix([f"{emoji.TAR}{suffix}"], 64, key)


@pytest.fixture(scope="module")
def mix(emoji_set):
    return open_mix(emoji_set)


def indices(mix, positions, name="image"):
    return [mix.index(place) for place in mix.places(positions, name)]


def test_an_epoch_takes_each_emoji_and_style_once_in_any_tone(mix):
    records, groups = mix.sources[0].records, mix.sources[0].groups
    trained = {(r["emoji"], r["style"]) for r in records if r["split"] == "train"}
    epochs, counts = 10, Counter()
    for epoch in range(epochs):
        picked = indices(mix, range(epoch * len(groups), (epoch + 1) * len(groups)))
        pairs = Counter((records[i]["emoji"], records[i]["style"]) for i in picked)
        assert pairs == Counter(trained)
        assert all(records[i]["split"] == "train" for i in picked)
        counts.update(picked)
    six = [group for group in groups if len(group) == 6]         # none of their tones is held out
    tones, places = Counter(), Counter()
    for group in six:
        for place, i in enumerate(group):
            tones[records[i]["tone"]] += counts[i]
            places[place] += counts[i]
    assert len(six) > 100 and len(tones) == len(places) == 6
    expected = epochs * len(six) / 6
    for observed in (tones, places):
        chi_square = sum((n - expected) ** 2 / expected for n in observed.values())
        assert chi_square < 20.5                                 # 5 df: p = 0.001


def test_samples_of_an_epoch_are_the_records_of_its_indices(mix):
    for sample, i in zip(mix.take(range(5), "image"), indices(mix, range(5)), strict=True):
        assert sample["key"] == mix.sources[0].records[i]["key"]


def test_another_key_gives_another_epoch(mix, emoji_set):
    assert indices(mix, range(50)) != indices(open_mix(emoji_set, key="other"), range(50))


def test_an_epoch_of_each_takes_every_image_once(emoji_set):
    mix = open_mix(emoji_set, "@each:2")
    records = mix.sources[0].records
    trained = [i for i, record in enumerate(records) if record["split"] == "train"]
    picked = indices(mix, range(TRAIN_IMAGES), "text")
    assert len(mix) == TRAIN_IMAGES
    assert sorted(picked) == trained != picked


def test_each_and_a_weight_change_the_fingerprint(small_tar):
    specs = [f"{small_tar}{suffix}" for suffix in ("", ":2", "@each", "@each:2")]
    assert len(set(map(data.fingerprint, specs))) == 4


def test_building_the_set_needs_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm"):
        emoji.build(tmp_path / "emoji.tar.gz")
    assert not (tmp_path / "emoji.tar.gz").exists()


def test_a_tar_of_something_else_is_refused(tmp_path):
    files = [("one.webp", b"x"), ("one.json", b'{"caption": "a"}')]
    path = write_tar(tmp_path / "other.tar", files)
    with pytest.raises(UserError, match='other.tar: one: "key"'):
        emoji.load(tmp_path / "other.tar")
    with pytest.raises(UserError, match="other.tar@each"):
        data.open_source(f"{path}@each", 16)
