"""dataset/questions.py: a small file of each published format, and its exact prompts."""

import collections
import json

import pytest
from PIL import Image

import data
from common.cli import UserError
from dataset import questions
from dataset.sources import question_prompt

SHORT = "Q: What is it? Answer the question using a single word or phrase. A: "


@pytest.fixture
def folder(tmp_path):
    for name in ("COCO_train2014_000000000042.jpg", "42.jpg", "a/42.jpg", "VizWiz_train_1.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "images" / name)
    return tmp_path


def prompts(folder, name, content):
    """Write a file of questions, and return [(prompt, answer)] of all its samples."""
    (folder / name).write_text(json.dumps(content))
    mix = data.Mix([f"{folder / name}@{folder / 'images'}:2"], 16)
    pairs = []
    for i in range(len(mix)):
        pairs += mix.prepare(mix.sources[0][i])["questions"]
    return [(question_prompt(pair["question"]), pair["answer"]) for pair in pairs]


def vqa(prefix, key, folder, answers):
    """Write VQAv2's or OK-VQA's two files of one question, and return the prompts."""
    annotation = dict(question_id=key, answers=[dict(answer=answer) for answer in answers])
    annotations = folder / f"{prefix}mscoco_train2014_annotations.json"
    annotations.write_text(json.dumps(dict(annotations=[annotation])))
    question = dict(question_id=key, image_id=42, question=" What is it?")
    return prompts(folder, f"{prefix}OpenEnded_mscoco_train2014_questions.json",
                   dict(data_subtype="train2014", questions=[question]))


def conversation(*turns, **entry):
    return entry | dict(conversations=[{"from": who, "value": text} for who, text in turns])


def test_llava_gives_every_turn_of_entries_with_an_image(folder):
    turns = [("human", "<image>\nWhat is it?\nAnswer the question using a single word or phrase."),
             ("gpt", "An apple"), ("human", "Is it red?"), ("gpt", "Yes, it is.")]
    entries = [conversation(*turns, id=1, image="a/42.jpg"), conversation(*turns, id=2)]
    assert prompts(folder, "llava.json", entries) == [(SHORT, "An apple"),
                                                      ("Q: Is it red? A: ", "Yes, it is.")]


def test_llava_pairs_a_question_with_the_next_answer_only(folder):
    turns = [("gpt", "Hello"), ("human", "Is it red?"), ("gpt", "Yes."), ("gpt", "It is an apple."),
             ("human", "Is it blue?"), ("human", "Is it ripe?"), ("gpt", "No.")]
    assert prompts(folder, "llava.json", [conversation(*turns, image="a/42.jpg")]) == [
        ("Q: Is it red? A: ", "Yes."), ("Q: Is it ripe? A: ", "No.")]


def test_vqa_takes_the_most_common_answer(folder):
    answers = ["pear", "apple", "apple", "fig", "pear", "apple"]
    assert vqa("v2_", 7, folder, answers) == [(SHORT, "apple")]


def test_other_annotations_are_other_data(folder):
    vqa("v2_", 7, folder, ["apple"])
    [file] = folder.glob("v2_*questions.json")
    before = data.fingerprint(f"{file}@{folder}")
    vqa("v2_", 7, folder, ["pear"])
    assert data.fingerprint(f"{file}@{folder}") != before


def test_vqa_takes_the_first_answer_in_a_tie(folder):
    assert vqa("", "OK-VQA", folder, ["pear", "apple", "apple", "pear"]) == [(SHORT, "pear")]


def test_a_question_without_an_answer_is_refused(folder):
    with pytest.raises(UserError, match="questions.json: question 7 "):
        vqa("v2_", 7, folder, [])


GQA = {"07": dict(imageId="42", question="What is it?", answer="apple", isBalanced=False)}
TEXTVQA = dict(data=[dict(image_id="42", question="What is it?",
                          answers=["fig", "apple", "apple"])])
VIZWIZ = [dict(image="VizWiz_train_1.jpg", question="What is it?",
               answers=[dict(answer="unanswerable")])]


@pytest.mark.parametrize("name, content", [("train_balanced_questions.json", GQA),
                                           ("TextVQA_0.5.1_train.json", TEXTVQA)])
def test_gqa_and_textvqa(name, content, folder):
    assert prompts(folder, name, content) == [(SHORT, "apple")]


def test_vizwiz(folder):
    assert prompts(folder, "train.json", VIZWIZ) == [(
        "Q: What is it? Answer the question using a single word or phrase. "
        "Reply unanswerable if information is not present in the image. A: ", "unanswerable")]


@pytest.mark.parametrize("kind, name, content", [
    ("vqav2", "v2_OpenEnded_mscoco_train2014_questions.json", None), ("gqa", "gqa.json", GQA),
    ("textvqa", "text.json", TEXTVQA)])
def test_training_and_scoring_read_the_same_files(kind, name, content, folder):
    if kind == "vqav2":
        pairs = vqa("v2_", 7, folder, ["pear", "apple", "apple"])
    else:
        pairs = prompts(folder, name, content)
    reader = questions.READ[kind]
    q, = reader.read(reader.load(folder / name), folder / name, collections.defaultdict(list))
    prompt = question_prompt(q.with_suffix(questions.SUFFIX[kind]))
    assert [(prompt, q.common_answer())] == pairs == [(SHORT, "apple")]
    assert q.balanced == (kind != "gqa")


def test_questions_without_captions_train_the_text_side_only(folder):
    prompts(folder, "train.json", VIZWIZ)
    mix = data.Mix([f"{folder / 'train.json'}@{folder / 'images'}"], 16)
    assert mix.take([0], "text")[0]["questions"][0]["answer"] == "unanswerable"
    with pytest.raises(UserError, match="VizWiz_train_1.jpg: no caption"):
        mix.take([0], "image")


@pytest.mark.parametrize("field, message", [
    (dict(answer=None), r"42.jpg: .*questions\[0\].answer.* null"),
    (dict(question="What \ud83c?"), r"42.jpg: .*questions\[0\].question.*\\ud83c"),
    (dict(question=3), "gqa.json: ")])
def test_a_question_or_answer_that_is_no_text_is_refused(field, message, folder):
    entry = dict(imageId="42", question="What?", answer="no") | field
    with pytest.raises(UserError, match=message) as error:
        prompts(folder, "gqa.json", {"07": entry})
    assert "\n" not in str(error.value) and str(folder / "gqa.json") in str(error.value)


def test_a_missing_image_is_named(folder):
    entry = GQA["07"] | dict(imageId="43")
    with pytest.raises(UserError, match="43.jpg: .*No such file"):
        prompts(folder, "gqa.json", {"07": entry})


def test_missing_annotations_are_named(folder):
    path = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    path.write_text(json.dumps(dict(questions=[])))
    with pytest.raises(UserError, match="v2_mscoco_val2014_annotations.json: "):
        data.open_source(str(path), 16)
