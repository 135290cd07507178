"""metrics/answers.py: each rule of each benchmark's score by hand, and its files in small."""

import json

import pytest

from common.cli import UserError
from dataset.questions import SUFFIX, Question, question_prompt
from metrics import answers
from metrics.answers import normal, pope, questions, read_answers, relaxed, score, yes_or_no

FORMS = {
    "a mark beside a space is removed, wherever it stands": [
        ("red - blue", "red blue"), ("t-shirt - red", "tshirt red"), ("yes, sir", "yes sir"),
        ("t-shirt -red", "tshirt red"), ("t-shirt- red", "tshirt red"),
        ("red (dark)", "red dark"), ('say "hi"', "say hi"), ("and / or / not/so", "and or notso")],
    "any other mark becomes a space": [
        ("t-shirt", "t shirt"), ("yes,sir", "yes sir"), ("what?", "what"), ("(red)", "red"),
        ("[x]{y}", "x y"), ("x=y+z", "x y z"), ("c:\\dir", "c: dir"), ("snake_case", "snake case"),
        ("<b>", "b"), ("me@home", "me home"), ("`tick`", "tick"), ("cat;dog", "cat dog"),
        ("and/or", "and or"), ("stop!", "stop")],
    "these are no marks": [
        ("10:30", "10:30"), ("50%", "50%"), ("$5", "$5"), ("#1", "#1"), ("rock&roll", "rock&roll"),
        ("girl's", "girl's"), ("5*5", "5*5"), ("x~y|z^w", "x~y|z^w")],
    "a comma between two digits removes all marks": [
        ("1,000", "1000"), ("1,000-2,000", "10002000"), ("(1,000) t-shirts", "1000 tshirts"),
        ("1,x t-shirt", "1 x t shirt"), ("1, 000", "1 000"), ("٣,٤ t-shirt", "٣ ٤ t shirt")],
    "a period goes unless a digit follows": [
        ("3.5", "3.5"), ("3.5.", "3.5"), ("5.", "5"), (".5", ".5"), ("..5", ".5"), ("v.2", "v.2"),
        ("u.s.a.", "usa"), ("mr. smith", "mr smith"), ("...", ""), ("٣.٤", "٣٤")],
    "of more than 32 periods the first 32 go": [("." * 32, ""), ("." * 33 + "x", ".x")],
    "lower case, one space": [("YES", "yes"), ("New  York ", "new york"), ("\u00c9clair", "éclair")],
    "number words are digits": [
        ("none", "0"), ("Zero", "0"), ("one", "1"), ("two dogs", "2 dogs"), ("three/four", "3 4"),
        ("five-six", "5 6"), ("seven eight nine", "7 8 9"), ("ten.", "10"), ("eleven", "eleven"),
        ("twenty-two", "twenty 2"), ("ones", "ones"), ("no one", "no 1")],
    "articles go": [
        ("the cat", "cat"), ("THE END", "end"), ("an apple a day", "apple day"), ("a", ""), ("a/c", "c"),
        ("a.m.", "am"), ("a. m.", "m"), ("another", "another"), ("x-the-y", "x y")],
    "contractions get their apostrophe": [
        ("dont", "don't"), ("Dont.", "don't"), ("don't", "don't"), ("cant/wont", "can't won't"),
        ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("5 oclock", "5 o'clock"),
        ("theyre here", "they're here"), ("twas", "'twas"), ("yall", "y'all"), ("y'alld've", "y'all'd've"),
        ("'ows'at", "'ow's'at"), ("hes", "he's"), ("maam", "ma'am")],
    "and these don't, or the wrong way round": [
        ("couldntve", "couldntve"), ("Im", "im"), ("ive", "ive"), ("its", "its"), ("shes", "shes"),
        ("lets", "lets"), ("let's", "let's"), ("somebody'd", "somebodyd"), ("somebodyd", "somebodyd")]}


@pytest.mark.parametrize("said, form", [pair for pairs in FORMS.values() for pair in pairs])
def test_the_normal_form_of_vqa(said, form):
    assert normal(said) == form


def of_ten(times, said="cat", others="dog"):
    return [said] * times + [others] * (10 - times)


@pytest.mark.parametrize("times, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
def test_the_accuracy_by_how_many_of_ten_said_it(times, accuracy):
    for rule in (answers.vqa, answers.textvqa, answers.vizwiz):
        assert rule("cat", of_ten(times)) == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize("said, given, accuracy", [
    ("Yes", of_ten(9, "yes", "no"), 1), ("Yes", of_ten(10, "yes"), 0),      # who all agree: letter by letter
    ("2 dogs", of_ten(10, "two dogs"), 0), ("2 dogs", of_ten(4, "two dogs", "two"), 1),
    (" yes\n", of_ten(10, "yes"), 1), ("two\tdogs", of_ten(10, "two\ndogs"), 1),      # but for whitespace,
    ("Yes", of_ten(5, "yes", "yes "), 0),                                   # which makes nobody differ
    ("yes", of_ten(5, "yes", "Yes."), 1),                                   # made the same, so ten said it
    ("", of_ten(4, "the", "dog"), 1)])
def test_vqa_normalises_only_where_the_annotators_differ(said, given, accuracy):
    assert answers.vqa(said, given) == accuracy


@pytest.mark.parametrize("said, given, accuracies", [     # by the rules of VQA, TextVQA, VizWiz
    ("Yes.", ["yes"] * 10, (0, 1, 1)), ("Yes", ["Yes"] * 10, (1, 1, 0)), ("yes", ["Yes"] * 10, (0, 1, 0)),
    ("bc", of_ten(5, "b,c"), (0, 1, 0)), ("b c", of_ten(5, "b,c"), (1, 0, 0)),
    ("john 's", of_ten(5, "John's"), (0, 1, 0)), ("1000 t shirts", of_ten(5, "1,000 t-shirts"), (0, 1, 0))])
def test_textvqa_and_vizwiz_normalise_otherwise(said, given, accuracies):
    assert tuple(rule(said, given) for rule in (answers.vqa, answers.textvqa, answers.vizwiz)) == accuracies


@pytest.mark.parametrize("said, right", [("Red", 1), (" red. ", 1), ("reds", 0), ("red car", 0), ("", 0)])
def test_gqa_wants_the_very_word(said, right):
    assert answers.exact(said, ["red"]) == right


@pytest.mark.parametrize("said, true, right", [
    ("95", "100", 1), ("105", "100", 1), ("94.9", "100", 0), ("-95", "-100", 1), ("95", "-100", 0),
    ("1,234", "1234", 1), ("1200", "1,234", 1), ("10%", "10%", 1), ("10.4 %", "10%", 1), ("0.1", "10%", 1),
    ("10", "10%", 0), ("0.0", "0", 1), ("0.01", "0", 0), ("Yes", " yes", 1), ("2015", "2015 to 2016", 0),
    ("nan", "NaN", 1), ("5", "five", 0), ("", "5", 0), ("[1, 2]", "[1, 2]", 1)])
def test_chartqa_takes_numbers_within_five_percent(said, true, right):
    assert relaxed(said, [true]) == right


@pytest.mark.parametrize("said, taken", [
    ("yes", "yes"), ("no", "no"), ("No", "no"), ("No, there is none.", "no"), ("There is not.", "no"),
    ("Yes. There is no cat.", "yes"), ("No.", "no"), ("no,", "no"), ("There is no cat", "no"),
    ("NO", "yes"), ("Not there", "yes"), ("no!", "yes"), ("nope", "yes"), ("no\nand", "yes"), ("", "yes"),
    (".no", "yes"), ("maybe", "yes")])
def test_pope_takes_an_answer_for_a_yes_unless_it_says_no(said, taken):
    assert yes_or_no(said) == taken


def test_the_five_figures_of_pope_from_a_table_of_ten():
    table = [("yes", "yes")] * 3 + [("no", "yes")] + [("yes", "no")] * 2 + [("no", "no")] * 4
    found = pope(*map(list, zip(*table)))
    assert found == pytest.approx({"accuracy": 70, "precision": 60, "recall": 75, "F1": 200 / 3,
                                   "yes-ratio": 50})
    assert pope(["no", ""], ["yes", "no"]) == dict(zip(found, [0] * 5))    # "" is a no that is wrong


# ------------------------------------------------------------------------------------------------ the files

def write(path, content):
    lines = content if isinstance(content, str) else json.dumps(content)
    path.write_text(lines, encoding="utf-8")
    return str(path)


def note(key, said, kind="other", question="what"):
    return dict(question_id=key, question_type=question, answer_type=kind,
                answers=[dict(answer=each, answer_id=i, raw_answer="x") for i, each in enumerate(said, 1)])


def vqa_files(folder, asked, notes, **more):
    content = dict(data_subtype="val2014", questions=[dict(question_id=k, image_id=42, question=f"What {k}? ")
                                                      for k in asked])
    write(folder / "v2_mscoco_val2014_annotations.json", dict(annotations=notes) | more)
    return write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", content)


def test_vqa_by_type_of_answer_and_of_question(tmp_path):
    path = vqa_files(tmp_path, [1, 2, 3, 4], [
        note(1, of_ten(9, "yes", "no"), "yes/no", "is the"), note(3, of_ten(2), "other", "what"),
        note(2, of_ten(1, "two", "3"), "number", "how many"), note(4, of_ten(3), "other", "how many")])
    asked, bad = questions("vqav2", [path])
    assert bad == [] and asked[0] == Question("1", "COCO_val2014_000000000042.jpg", "What 1?",
                                           of_ten(9, "yes", "no"), ("yes/no", "question type: is the"))
    found, bad = score("vqav2", asked, {"1": "Yes", "2": "2", "3": "a cat", "4": "cat."})
    assert bad == [] and found == pytest.approx({
        "overall": 70, "yes/no": 100, "number": 30, "other": 75, "question type: is the": 100,
        "question type: how many": 60, "question type: what": 60})


def test_scores_are_rounded_to_two_decimals_and_a_half_upwards():
    assert answers.rounded(dict(third=100 / 3, half=0.125, down=12.344999)) == dict(
        third=33.33, half=0.13, down=12.34)


def test_okvqa_is_scored_by_its_stemmed_answers_and_its_types_have_names(tmp_path):
    path = vqa_files(tmp_path, [7], [note(7, ["surf"] * 10, "other", "four")],
                     question_types={"four": "Sports and Recreation"})
    asked, _ = questions("okvqa", [path, tmp_path / "v2_mscoco_val2014_annotations.json"])
    assert score("okvqa", asked, {"7": "surf"})[0] == {
        "overall": 100, "other": 100, "question type: Sports and Recreation": 100}


def test_what_does_not_fit_in_vqa_is_counted_and_named(tmp_path):
    path = vqa_files(tmp_path, [1, 2, 1, 3], [note(key, ["a"] * 10) for key in (1, 1, *range(4, 11))])
    asked, bad = questions("vqav2", [path])
    assert [q.id for q in asked] == ["1"]
    assert bad == [f"{path}: annotations of one id, the first counts: 1 (1)",
                   f"{path}: questions without a true answer, left out: 2 (2, 3)",
                   f"{path}: questions of one id, the first counts: 1 (1)",
                   f"{path}: annotations without a question: 7 (4, 5, 6, 7, 8, ...)"]


def test_textvqa_vizwiz_and_gqa(tmp_path):
    asked, bad = questions("textvqa", [write(tmp_path / "text.json", dict(data=[
        dict(question_id=34602, image_id="0054c91397f2fe05", question="what is it?", answers=["no"] * 10)]))])
    assert (asked, bad) == ([Question("34602", "0054c91397f2fe05.jpg", "what is it?", ["no"] * 10)], [])
    path = write(tmp_path / "viz.json", [
        dict(image="VizWiz_val_00000000.jpg", question="Ok?", answer_type="other", answerable=1,
             answers=[dict(answer="no", answer_confidence="yes")] * 10), dict(image="b.jpg", question="Ok?")])
    asked, bad = questions("vizwiz", [path], SUFFIX["vizwiz"])
    assert asked == [Question("VizWiz_val_00000000.jpg", "VizWiz_val_00000000.jpg", "Ok? Answer the question "
                           "using a single word or phrase. Reply unanswerable if information is not present "
                           "in the image.", ["no"] * 10, ("other",))]
    assert bad == [f"{path}: questions without a true answer, left out: 1 (b.jpg)"]
    assert score("vizwiz", asked, {"VizWiz_val_00000000.jpg": "No."})[0] == dict(overall=100, other=100)
    path = write(tmp_path / "gqa.json", {
        "07": dict(imageId="42", question="Is it?", answer="yes", types=dict(structural="verify")),
        "08": dict(imageId="n7", question="Who?", answer="boy", types=dict(structural="query")),
        "09": dict(imageId="n7", question="Who?", answer="man", isBalanced=False)})
    asked, bad = questions("gqa", [path])
    assert [(q.id, q.image, q.answers) for q in asked] == [("07", "42.jpg", ["yes"]),
                                                           ("08", "n7.jpg", ["boy"])]
    assert bad == [f"{path}: questions outside the balanced set, which are not scored: 1 (09)"]
    assert score("gqa", asked, {"07": "no", "08": "Boy"})[0] == {
        "overall": 50, "binary": 0, "structural: verify": 0, "open": 100, "structural: query": 100}


def test_chartqa_has_a_mean_of_each_file(tmp_path):
    paths = [write(tmp_path / f"test_{name}.json", [dict(imgname="1.png", query="How much?", label=label)])
             for name, label in (("human", "10"), ("augmented", "1,000"))]
    asked, bad = questions("chartqa", paths)
    assert bad == [] and [q.id for q in asked] == ["test_human/0", "test_augmented/0"]
    assert score("chartqa", asked, {"test_human/0": "11", "test_augmented/0": "1001"})[0] == {
        "overall": 50, "test_human": 0, "test_augmented": 100}


def test_pope_of_each_file_and_their_mean(tmp_path):
    paths = [write(tmp_path / f"coco_pope_{name}.json", "".join(json.dumps(dict(
        question_id=i, image="a.jpg", text="Is there a cat in the image?", label=label)) + "\n"
        for i, label in enumerate(("yes", "no"), 1))) for name in ("random", "popular", "adversarial")]
    asked, bad = questions("pope", paths)
    assert bad == [] and [q.id for q in asked][::2] == ["random/1", "popular/1", "adversarial/1"]
    found, bad = score("pope", asked, {"random/1": "Yes", "random/2": "No, there is not.",
                                       "popular/1": "Yes, a cat", "popular/2": "It is nowhere",
                                       "adversarial/1": "No", "adversarial/2": "no"})
    table = {name: [found[f"{name}: {figure}"] for figure in pope(["yes"], ["yes"])]
             for name in ("random", "popular", "adversarial", "mean")}
    assert bad == [] and table == dict(
        random=[100, 100, 100, 100, 50], popular=[50, 50, 100, pytest.approx(200 / 3), 100],
        adversarial=[50, 0, 0, 0, 0], mean=pytest.approx([200 / 3, 50, 200 / 3, 500 / 9, 50]))
    few, bad = score("pope", asked[:2], {"random/1": "yes"})             # no answer: no yes, and not right
    assert [few[f"random: {name}"] for name in ("accuracy", "yes-ratio")] == [50, 50]
    assert bad == ["questions without an answer, scored as wrong: 1 (random/2)"]


def test_a_question_without_an_answer_is_wrong_and_an_answer_to_none_left_out():
    asked = [Question(str(i), "a.jpg", "Who?", of_ten(5, "the", "dog")) for i in range(8)]
    found, bad = score("vqav2", asked, {"0": "dog", "1": "the", "x": "dog", "y": "cat"})
    assert found == {"overall": 25}                       # "" would be right: it is what "the" is made
    assert bad == ["questions without an answer, scored as wrong: 6 (2, 3, 4, 5, 6, ...)",
                   "answers to no question, left out: 2 (x, y)"]


def test_answers_are_read_and_a_second_answer_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question_id": 1, "answer": "a"}\n\n'
                 '{"question_id": "07", "answer": "é"}\r\n{"question_id": 1, "answer": "b"}\n')
    assert read_answers(path) == ({"1": "a", "07": "é"}, [
        f"{path}: answers to one question, the first counts: 1 (1)"])


@pytest.mark.parametrize("lines, message", [
    ('{"question_id": 1, "ans\n{"question_id": 2, "answer": "b"}', "a.jsonl:1: not readable as JSON"),
    ('{"question_id": 1, "answer": "a"}\n{"question_id": 2, "ans', "a.jsonl:2: not readable as JSON"),
    ("[1]\n", r'a.jsonl:1: expected an object with "question_id", .* found \[1\]'),
    ('{"question_id": 1}', 'a.jsonl:1: "answer" is null, expected a text'),
    ('{"question_id": 1, "answer": 2}', 'a.jsonl:1: "answer" is 2, expected a text'),
    ('{"question_id": true, "answer": ""}',
     r'a.jsonl:1: expected an object with "question_id", a whole number or a text, found .*True')])
def test_a_line_that_is_no_answer_is_an_error(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_answers(write(tmp_path / "a.jsonl", lines))


@pytest.mark.parametrize("kind, content, message", [
    ("vqav2", [], r"not of vqav2 .*, expected \{questions"),
    ("textvqa", dict(data=[dict(question_id=1, image_id="a", question=None, answers=["x"])]),
     'x.json: 1: "question" is null, expected a text'),
    ("textvqa", dict(data=[]), "x.json: no question with a true answer"),
    ("vizwiz", dict(image="a"), "not of vizwiz"), ("gqa", [1], r"not of gqa .*expected \{id"),
    ("chartqa", [dict(imgname="a", query="b", label=1)], 'x/0: "answer" is 1, expected a text'),
    ("chartqa", [dict(imgname="a", query="b")], r"chartqa \(KeyError\('label'\)\), expected \[\{imgname"),
    ("pope", dict(question_id=1, image="a", text="b", label="Yes"), "x.json:1: a label 'Yes', not yes or no"),
    ("pope", "{", "x.json:1: not readable as JSON"), ("gqa", "{", "x.json: not readable as JSON")])
def test_a_file_of_another_form_is_an_error_of_one_line(tmp_path, kind, content, message):
    write(tmp_path / "y.json", dict(annotations=[]))
    with pytest.raises(UserError, match=message) as error:
        beside = [tmp_path / "y.json"] if kind == "vqav2" else []
        questions(kind, [write(tmp_path / "x.json", content), *beside])
    assert "\n" not in str(error.value)


def test_shots_stand_before_the_question_and_depend_on_the_key_alone():
    asked = [Question(str(i), "a.jpg", f"What {i}?", ["fig", f"pear {i}", f"pear {i}", "fig", "x"][i % 2:])
             for i in range(6)]
    three = answers.shots(asked, 3, "seed 0, 17")
    assert three == answers.shots(asked, 3, "seed 0, 17") and answers.shots(asked, 0, "") == ""
    assert len({answers.shots(asked, 3, f"{key}") for key in range(20)}) > 10
    assert not any("Q: " + asked[0].question in answers.shots(asked[:2], 1, str(key), asked[0])
                   for key in range(9))
    every = answers.shots(asked[:2], 2, "") + question_prompt("Which?")
    one, other = "Q: What 0? A: fig ", "Q: What 1? A: pear 1 "    # the most common, the first in a tie
    assert every in (one + other + "Q: Which? A: ", other + one + "Q: Which? A: ")
    with pytest.raises(UserError, match="7 examples, expected 0 to 6"):
        answers.shots(asked, 7, "")
