"""dataset/emoji.py: the set, its splits, its questions, and an epoch of it."""

import io
import re
import tarfile
from collections import Counter, defaultdict

import pytest
import torch

import data
from common.cli import UserError
from dataset import emoji
from dataset.questions import question_prompt
from model import PRESETS
from pretrained import tokenizer

# what must begin the kind or the group for a noun to be right; man, woman and child go by the name
WHERE = {"a person": "person", "a hand": "hand", "a face": "face|cat face|monkey face",
         "an animal": "animal ",
         "a bird": "animal bird", "a bug": "animal bug", "a plant": "plant ", "a flower": "plant flower",
         "a fruit": "food fruit", "a vegetable": "food vegetable", "food": "food ", "a drink": "drink",
         "clothing": "clothing", "a tool": "tool", "a musical instrument": "musical instrument",
         "a clock": "time",
         "a vehicle": "transport ", "a building": "place ", "a flag": "flag|country flag|subdivision flag",
         "an arrow": "arrow", "a heart": "heart"}
WHO = {"a man": r"\bman\b", "a woman": r"\bwoman\b", "a child": r"^(boy|girl|child|baby)$"}


def test_the_emoji_set_is_whole_with_a_caption_of_its_own_for_each_picture(emoji_set):
    records, pictures = emoji_set
    assert len(records) == 7572 and pictures.shape == (7572, 3, 64, 64) and pictures.dtype == torch.uint8
    assert len({r["caption"] for r in records}) == 7572 == len({r["key"] for r in records})
    captions = {r["caption"]: r for r in records}
    assert captions["waving hand, medium-dark skin tone, noto style"]["kind"] == "people & body"
    assert "red apple, noto style" in captions and "red apple, twemoji style" in captions
    assert all(r["caption"] == " ".join(r["caption"].split()) for r in records)


def test_splits_hold_out_what_they_say(emoji_set):
    records = emoji_set[0]
    split = defaultdict(list)
    for r in records:
        split[r["split"]].append(r)
    assert {k: len(v) for k, v in split.items()} == {"train": 7025, "tone": 358, "style": 189}
    seen = {(r["emoji"], r["style"]) for r in split["train"]}
    tones = {r["tone"] for r in split["train"]}
    for r in split["tone"]:  # the emoji was seen in this style in other tones, the tone on other emoji
        assert (r["emoji"], r["style"]) in seen and r["tone"] in tones and r["tone"] != "none"
    other = {"noto": "twemoji", "twemoji": "noto"}
    for r in split["style"]:         # the emoji was seen in the other style only
        assert (r["emoji"], r["style"]) not in seen and (r["emoji"], other[r["style"]]) in seen


def test_every_answer_follows_from_the_metadata(emoji_set):
    records = emoji_set[0]
    named = {emoji.article(r["name"]): r["name"] for r in records}
    kinds = {noun: kind for kind, noun in emoji.NOUNS.items()}
    for r in records:
        for q in r["questions"]:
            if q["type"] in emoji.ASKED:
                assert q["question"] in emoji.ASKED[q["type"]] and q["answer"] == r[q["type"]]
                continue
            thing, = [match[1] for way in emoji.YES_NO
                      if (match := re.fullmatch(way.replace("?", r"\?").format("(.*)"), q["question"]))]
            right = {"yes/no name": lambda: named[thing] == r["name"],
                     "yes/no kind": lambda: kinds[thing] == r["kind"],
                     "yes/no sort": lambda: bool(re.search(WHO[thing], r["name"]) if thing in WHO
                                                 else re.match(WHERE[thing], r["group"]))}[q["type"]]()
            assert q["answer"] == ("yes" if right else "no"), (r["caption"], q)


def test_no_picture_has_more_of_yes_than_of_no(emoji_set):
    """Nor does a phrasing, a type or a picture without questions give the answer away."""
    for r in emoji_set[0]:
        told = [(q["type"], next(w for w in emoji.YES_NO
                                 if re.fullmatch(w[:-1].format(".*") + r"\?", q["question"])),
                 q["answer"]) for q in r["questions"] if q["type"].startswith("yes/no")]
        yes, no = (Counter((t, way) for t, way, answer in told if answer == wanted)
                   for wanted in ("yes", "no"))
        assert yes == no and sum(yes.values()) >= 1
    asked = Counter((q["type"], q["answer"]) for r in emoji_set[0] for q in r["questions"])
    assert {t for t, _ in asked} == {"name", "kind", "group", "tone", "style", "yes/no name", "yes/no kind",
                                     "yes/no sort"}


def test_a_man_is_asked_about_as_a_person_would(emoji_set):
    asked = {(q["question"].replace("Does this show", "Is this").replace("Can you see",
                                                                         "Is this").replace(" here", ""),
              q["answer"]) for r in emoji_set[0] if r["name"] == "man farmer" for q in r["questions"]}
    assert {("Is this a man?", "yes"), ("Is this a woman?", "no"), ("Is this a person?", "yes"),
            ("What is this?", "man farmer"), ("Is this a man farmer?", "yes")} <= asked
    assert emoji.article("flag of Chad") == "the flag of Chad" and emoji.article("ox") == "an ox"
    assert emoji.article("scissors") == "scissors" and emoji.article("cactus") == "a cactus"


def test_rivals_are_names_that_nobody_would_give_to_the_same_emoji():
    near = emoji.rivals(["singer", "man singer", "woman singer", "cook", "man cook", "runner"])
    assert near["man singer"] == ["woman singer", "man cook"] and near["singer"] == ["cook", "runner"]


def test_every_text_fits_the_text_length_of_the_preset(emoji_set):
    gpt2 = tokenizer.gpt2_tokenizer()
    length = max(len(gpt2.pieces(question_prompt(q["question"]))) + len(gpt2.pieces(q["answer"])) + 1
                 for r in emoji_set[0] for q in r["questions"])
    captions = max(len(gpt2.pieces(r["caption"])) + 1 for r in emoji_set[0])
    assert (captions, length) == (24, 27) and length <= PRESETS["emoji"]["text_length"]


def test_an_epoch_takes_each_emoji_and_style_once_and_each_tone_about_equally_often(emoji_set,
                                                                                           monkeypatch):
    monkeypatch.setattr(emoji, "load", lambda *_: emoji_set)
    mix = data.Mix([str(emoji.TAR)], 64, "run")
    source, = mix.sources
    records, groups = source.records, source.groups
    at = {record["key"]: i for i, record in enumerate(records)}
    wanted = {(r["emoji"], r["style"]) for r in records if r["split"] == "train"}
    counts = defaultdict(Counter)
    for epoch in range(30):
        places = range(epoch * len(groups), (epoch + 1) * len(groups))
        picked = [at[sample["key"]] for sample in mix.take(places, "image")]
        assert Counter((records[i]["emoji"], records[i]["style"]) for i in picked) == Counter(wanted)
        assert all(records[i]["split"] == "train" for i in picked)
        for i in picked:
            counts[records[i]["emoji"], records[i]["style"]][i] += 1
    other = data.Mix([str(emoji.TAR)], 64, "other").take(range(50), "image")
    assert [sample["key"] for sample in other] != [sample["key"] for sample in mix.take(range(50), "image")]
    six = [group for group in groups if len(group) == 6]  # no tone of these is held out
    tones = Counter({tone: sum(counts[records[g[0]]["emoji"], records[g[0]]["style"]][i] for g in six
                               for i in g
                               if records[i]["tone"] == tone) for tone in ("none", *emoji.TONES.values())})
    expected = 30 * len(six) / 6
    # 5 df: p = 0.001
    assert len(six) > 100 and sum((n - expected) ** 2 / expected for n in tones.values()) < 20.5


def test_an_epoch_of_each_takes_every_picture_once_and_is_another_set(emoji_set, monkeypatch, small_tar):
    monkeypatch.setattr(emoji, "load", lambda *_: emoji_set)
    mix = data.Mix([f"{emoji.TAR}@each:2"], 64, "run")
    taken = [mix.sources[0].records[mix.index(*place)]["key"] for place in mix.places(range(7025), "text")]
    learnt = [record["key"] for record in emoji_set[0] if record["split"] == "train"]
    assert len(mix) == 7025 and sorted(taken) == sorted(learnt) and taken != learnt
    assert data.fingerprint(f"{small_tar}@each") != data.fingerprint(small_tar)
    assert data.fingerprint(f"{small_tar}@each:2") not in (data.fingerprint(f"{small_tar}@each"),
                                                           data.fingerprint(f"{small_tar}:2"))


def test_without_npm_the_emoji_set_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm was not found: install Node.js"):
        emoji.build(tmp_path / "emoji.tar.gz")
    assert not (tmp_path / "emoji.tar.gz").exists()


def test_a_tar_of_something_else_is_refused(tmp_path):
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        for extension, content in (("webp", b"x"), ("json", b'{"caption": "a"}')):
            member = tarfile.TarInfo(f"one.{extension}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError,
                       match='other.tar: one: "key" is null, expected a text'):
        emoji.load(tmp_path / "other.tar")
    with pytest.raises(UserError, match="other.tar@each: @each is of the emoji set, .*other.tar is another"):
        data.open_source(f"{tmp_path}/other.tar@each", 16)
