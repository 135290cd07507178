"""dataset/questions.py: each published form from a small file of its shape, and its prompt letter by letter."""

import collections
import json

import pytest
from PIL import Image

import data
from common.cli import UserError
from dataset import questions
from dataset.questions import question_prompt


@pytest.fixture
def folder(tmp_path):
    for name in ("COCO_train2014_000000000042.jpg", "42.jpg", "a/42.jpg", "VizWiz_train_1.jpg"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "pictures" / name)
    return tmp_path


def prompts(folder, name, content, **others):
    """[(prompt, answer)] of every sample that a file of this name and content gives."""
    for file, more in (others | {name: content}).items():
        (folder / file).write_text(json.dumps(more))
    source = data.open_source(f"{folder / name}@{folder / 'pictures'}", 16)
    mix = data.Mix([f"{folder / name}@{folder / 'pictures'}:2"], 16)
    found = [q for i in range(len(source)) for q in mix.cut(source[i])["questions"]]
    return [(question_prompt(q["question"]), q["answer"]) for q in found]


def vqa(name, key, folder, answers):
    question = dict(question_id=key, image_id=42, question=" What is it?")
    asked = dict(data_subtype="train2014", questions=[question])
    given = dict(annotations=[dict(question_id=key, answers=[dict(answer=answer) for answer in answers])])
    return prompts(folder, f"{name}OpenEnded_mscoco_train2014_questions.json", asked,
                   **{f"{name}mscoco_train2014_annotations.json": given})


SHORT = "Q: What is it? Answer the question using a single word or phrase. A: "


def test_llava_gives_every_turn_and_leaves_out_what_has_no_picture(folder):
    turns = [dict(zip(("from", "value"), turn)) for turn in (
        ("human", "<image>\nWhat is it?\nAnswer the question using a single word or phrase."),
        ("gpt", "An apple"),
        ("human", "Is it red?"), ("gpt", "Yes, it is."))]
    found = prompts(folder, "llava.json", [dict(id=1, image="a/42.jpg", conversations=turns),
                                           dict(id=2, conversations=turns)])
    assert found == [(SHORT, "An apple"), ("Q: Is it red? A: ", "Yes, it is.")]


def test_vqa_takes_the_answer_that_most_people_gave(folder):
    assert vqa("v2_", 7, folder, ["pear", "apple", "apple", "fig", "pear", "apple"]) == [(SHORT, "apple")]
    assert vqa("", "What is it?", folder, ["pear", "apple", "apple", "pear"]) == [(SHORT, "pear")]  # OK-VQA


def test_a_question_that_nobody_answered_is_named(folder):
    with pytest.raises(UserError, match="questions.json: question 7 has no answer"):
        vqa("v2_", 7, folder, [])


def test_training_and_scoring_read_the_same_files(folder):
    """The answers of each question, and the one that training takes of them."""
    vqa("v2_", 7, folder, ["pear", "apple", "apple"])
    gqa = {"07": dict(imageId="42", question="What is it?", answer="apple", isBalanced=False)}
    text = dict(data=[dict(image_id="42", question="What is it?", answers=["fig", "apple", "apple"])])
    for kind, name, content in (("vqav2", "v2_OpenEnded_mscoco_train2014_questions.json", None),
                                ("gqa", "gqa.json", gqa), ("textvqa", "text.json", text)):
        if content:
            assert prompts(folder, name, content) == [(SHORT, "apple")]
        path, read = folder / name, questions.READ[kind]
        q, = read.read(read.load(path), path, collections.defaultdict(list))
        assert q.answers.count("apple") >= 1 and q.common_answer() == "apple"
        assert question_prompt(q.with_suffix(questions.SUFFIX[kind])) == SHORT
        assert q.balanced == (kind != "gqa")


def test_gqa_textvqa_and_vizwiz(folder):
    gqa = {"07": dict(imageId="42", question="What is it?", answer="apple")}
    assert prompts(folder, "train_balanced_questions.json", gqa) == [(SHORT, "apple")]
    text = dict(data=[dict(image_id="42", question="What is it?", answers=["apple", "apple", "pear"])])
    assert prompts(folder, "TextVQA_0.5.1_train.json", text) == [(SHORT, "apple")]
    viz = [dict(image="VizWiz_train_1.jpg", question="What is it?", answers=[dict(answer="unanswerable")])]
    assert prompts(folder, "train.json", viz) == [(
        "Q: What is it? Answer the question using a single word or phrase. "
        "Reply unanswerable if information is not present in the image. A: ", "unanswerable")]


def test_a_source_of_questions_alone_can_be_read_and_not_drawn(folder):
    viz = [dict(image="VizWiz_train_1.jpg", question="What is it?", answers=[dict(answer="no")])]
    prompts(folder, "train.json", viz)
    mix = data.Mix([f"{folder / 'train.json'}@{folder / 'pictures'}"], 16)
    assert mix.take([0], "text")[0]["questions"][0]["answer"] == "no"
    with pytest.raises(UserError, match="in a row are of no use, the last: .*VizWiz_train_1.jpg: no caption"):
        mix.take([0], "image")


@pytest.mark.parametrize("wrong, message", [
    (dict(answer=None), r"42.jpg: \"questions\[0\].answer\" is null, expected a text"),
    (dict(question="What \ud83c?"), r"42.jpg: \"questions\[0\].question\" is .*\\ud83c.*, expected a text"),
    (dict(question=3), "an entry lacks 'int' object has no attribute 'strip'")])
def test_a_question_or_an_answer_that_is_no_text_is_named(wrong, message, folder):
    with pytest.raises(UserError, match=message) as error:
        prompts(folder, "gqa.json", {"07": dict(imageId="42", question="What?", answer="no") | wrong})
    assert "\n" not in str(error.value) and str(folder / "gqa.json") in str(error.value)


def test_a_picture_that_is_not_there_and_annotations_that_are_not_beside(folder):
    gqa = {"07": dict(imageId="43", question="What is it?", answer="apple")}
    with pytest.raises(UserError, match="43.jpg: can't be read .No such file"):
        prompts(folder, "train_balanced_questions.json", gqa)
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(dict(questions=[])))
    with pytest.raises(UserError, match="v2_mscoco_val2014_annotations.json: can't be read"):
        data.open_source(str(folder / "v2_OpenEnded_mscoco_val2014_questions.json"), 16)
