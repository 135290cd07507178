"""metrics/answers.py: each rule of each benchmark's score by hand, and small files of each kind."""

import json

import pytest

from common.cli import UserError
from dataset.questions import SUFFIX, Question
from dataset.sources import question_prompt
from experiments.compare_answers import round_like_python2
from helpers import assert_lines
from metrics import answers
from metrics.answers import normal, pope, questions, read_answers, relaxed, score, yes_or_no

FORMS = {
    "a mark that stands beside a space once is removed everywhere": [
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
    "lower case, one space": [("YES", "yes"), ("New  York ", "new york"), ("Éclair", "éclair")],
    "number words are digits": [
        ("none", "0"), ("Zero", "0"), ("one", "1"), ("two dogs", "2 dogs"), ("three/four", "3 4"),
        ("five-six", "5 6"), ("seven eight nine", "7 8 9"), ("ten.", "10"), ("eleven", "eleven"),
        ("twenty-two", "twenty 2"), ("ones", "ones"), ("no one", "no 1")],
    "articles go": [
        ("the cat", "cat"), ("THE END", "end"), ("an apple a day", "apple day"), ("a", ""),
        ("a/c", "c"), ("a.m.", "am"), ("a. m.", "m"), ("another", "another"), ("x-the-y", "x y")],
    "contractions get their apostrophe": [
        ("dont", "don't"), ("Dont.", "don't"), ("don't", "don't"), ("cant/wont", "can't won't"),
        ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("5 oclock", "5 o'clock"),
        ("theyre here", "they're here"), ("twas", "'twas"), ("yall", "y'all"),
        ("y'alld've", "y'all'd've"), ("'ows'at", "'ow's'at"), ("hes", "he's"), ("maam", "ma'am")],
    "these get none, or lose theirs": [
        ("couldntve", "couldntve"), ("Im", "im"), ("ive", "ive"), ("its", "its"), ("shes", "shes"),
        ("lets", "lets"), ("let's", "let's"), ("somebody'd", "somebodyd"),
        ("somebodyd", "somebodyd")]}


@pytest.mark.parametrize("answer, form", [pair for pairs in FORMS.values() for pair in pairs])
def test_vqa_normal_form(answer, form):
    assert normal(answer) == form


def of_ten(times, answer="cat", others="dog"):
    return [answer] * times + [others] * (10 - times)


@pytest.mark.parametrize("times, accuracy", [
    (0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
def test_accuracy_follows_how_many_of_ten_annotators_agree(times, accuracy):
    for rule in (answers.vqa, answers.textvqa, answers.vizwiz):
        # 1e-12: tenths have no exact float64
        assert rule("cat", of_ten(times)) == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize("answer, annotators, accuracy", [
    ("Yes", of_ten(9, "yes", "no"), 1),
    ("Yes", of_ten(10, "yes"), 0),                        # all agree: compared letter by letter
    ("2 dogs", of_ten(10, "two dogs"), 0), ("2 dogs", of_ten(4, "two dogs", "two"), 1),
    (" yes\n", of_ten(10, "yes"), 1), ("two\tdogs", of_ten(10, "two\ndogs"), 1),
    ("Yes", of_ten(5, "yes", "yes "), 0),                 # whitespace makes no difference
    ("yes", of_ten(5, "yes", "Yes."), 1),                 # normalised, so all ten agree
    ("", of_ten(4, "the", "dog"), 1)])
def test_vqa_normalises_only_where_annotators_differ(answer, annotators, accuracy):
    assert answers.vqa(answer, annotators) == accuracy


@pytest.mark.parametrize("answer, annotators, accuracies", [     # by VQA, TextVQA, VizWiz
    ("Yes.", ["yes"] * 10, (0, 1, 1)), ("Yes", ["Yes"] * 10, (1, 1, 0)),
    ("yes", ["Yes"] * 10, (0, 1, 0)), ("bc", of_ten(5, "b,c"), (0, 1, 0)),
    ("b c", of_ten(5, "b,c"), (1, 0, 0)), ("john 's", of_ten(5, "John's"), (0, 1, 0)),
    ("1000 t shirts", of_ten(5, "1,000 t-shirts"), (0, 1, 0))])
def test_textvqa_and_vizwiz_normalise_differently(answer, annotators, accuracies):
    rules = (answers.vqa, answers.textvqa, answers.vizwiz)
    assert tuple(rule(answer, annotators) for rule in rules) == accuracies


@pytest.mark.parametrize("answer, right", [
    ("Red", 1), (" red. ", 1), ("reds", 0), ("red car", 0), ("", 0)])
def test_gqa_wants_the_exact_word(answer, right):
    assert answers.exact(answer, ["red"]) == right


@pytest.mark.parametrize("answer, true, right", [
    ("95", "100", 1), ("105", "100", 1), ("94.9", "100", 0), ("-95", "-100", 1), ("95", "-100", 0),
    ("1,234", "1234", 1), ("1200", "1,234", 1), ("10%", "10%", 1), ("10.4 %", "10%", 1),
    ("0.1", "10%", 1), ("10", "10%", 0), ("0.0", "0", 1), ("0.01", "0", 0), ("Yes", " yes", 1),
    ("2015", "2015 to 2016", 0), ("nan", "NaN", 1), ("5", "five", 0), ("", "5", 0),
    ("[1, 2]", "[1, 2]", 1)])
def test_chartqa_takes_numbers_within_five_percent(answer, true, right):
    assert relaxed(answer, [true]) == right


@pytest.mark.parametrize("answer, taken", [
    ("yes", "yes"), ("no", "no"), ("No", "no"), ("No, there is none.", "no"),
    ("There is not.", "no"), ("Yes. There is no cat.", "yes"), ("No.", "no"), ("no,", "no"),
    ("There is no cat", "no"), ("NO", "yes"), ("Not there", "yes"), ("no!", "yes"),
    ("nope", "yes"), ("no\nand", "yes"), ("", "yes"), (".no", "yes"), ("maybe", "yes")])
def test_pope_reads_yes_unless_the_answer_says_no(answer, taken):
    assert yes_or_no(answer) == taken


def test_pope_figures_of_a_table_of_ten():
    table = [("yes", "yes")] * 3 + [("no", "yes")] + [("yes", "no")] * 2 + [("no", "no")] * 4
    figures = pope(*map(list, zip(*table)))
    assert figures == pytest.approx({"accuracy": 70, "precision": 60, "recall": 75,
                                     "F1": 200 / 3, "yes-ratio": 50})
    assert set(pope(["no", ""], ["yes", "no"]).values()) == {0}    # "" counts as a wrong no


# ------------------------------------------------------------------------------------ the files

def write(path, content):
    lines = content if isinstance(content, str) else json.dumps(content)
    path.write_text(lines, encoding="utf-8")
    return str(path)


def annotation(key, given, kind="other", question="what"):
    """Return one annotation of VQA's file; `given` are the ten annotators' answers."""
    records = [dict(answer=answer, answer_id=i, raw_answer="x") for i, answer in enumerate(given)]
    return dict(question_id=key, question_type=question, answer_type=kind, answers=records)


def vqa_files(folder, keys, annotations, **more):
    records = [dict(question_id=key, image_id=42, question=f"What {key}? ") for key in keys]
    content = dict(data_subtype="val2014", questions=records)
    write(folder / "v2_mscoco_val2014_annotations.json", dict(annotations=annotations) | more)
    return write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", content)


def test_vqa_has_a_mean_of_each_answer_and_question_type(tmp_path):
    path = vqa_files(tmp_path, [1, 2, 3, 4], [
        annotation(1, of_ten(9, "yes", "no"), "yes/no", "is the"),
        annotation(3, of_ten(2), "other", "what"),
        annotation(2, of_ten(1, "two", "3"), "number", "how many"),
        annotation(4, of_ten(3), "other", "how many")])
    loaded, bad = questions("vqav2", [path])
    assert bad == []
    assert loaded[0] == Question("1", "COCO_val2014_000000000042.jpg", "What 1?",
                                of_ten(9, "yes", "no"), ("yes/no", "question type: is the"))
    scores, bad = score("vqav2", loaded, {"1": "Yes", "2": "2", "3": "a cat", "4": "cat."})
    assert bad == []
    assert scores == pytest.approx({
        "overall": 70, "yes/no": 100, "number": 30, "other": 75, "question type: is the": 100,
        "question type: how many": 60, "question type: what": 60})


def test_scores_round_to_two_decimals_with_halves_up():
    assert round_like_python2(dict(third=100 / 3, half=0.125, down=12.344999)) == dict(
        third=33.33, half=0.13, down=12.34)


def test_okvqa_uses_stemmed_answers_and_names_its_types(tmp_path):
    path = vqa_files(tmp_path, [7], [annotation(7, ["surf"] * 10, "other", "four")],
                     question_types={"four": "Sports and Recreation"})
    loaded, _ = questions("okvqa", [path, tmp_path / "v2_mscoco_val2014_annotations.json"])
    assert score("okvqa", loaded, {"7": "surf"})[0] == {
        "overall": 100, "other": 100, "question type: Sports and Recreation": 100}


def test_vqa_records_that_do_not_match_are_counted_and_named(tmp_path):
    keys = (1, 1, *range(4, 11))
    path = vqa_files(tmp_path, [1, 2, 1, 3], [annotation(key, ["a"] * 10) for key in keys])
    loaded, bad = questions("vqav2", [path])
    assert [q.id for q in loaded] == ["1"]
    assert_lines(bad, (path, "annotations of one id", "1 (1)"),
                 (path, "without a true answer", "2 (2, 3)"),
                 (path, "questions of one id", "1 (1)"),
                 (path, "annotations without a question", "7 (4, 5, 6, 7, 8, ...)"))


def test_textvqa_questions_are_read(tmp_path):
    record = dict(question_id=34602, image_id="0054c91397f2fe05", question="what is it?",
                  answers=["no"] * 10)
    loaded, bad = questions("textvqa", [write(tmp_path / "text.json", dict(data=[record]))])
    assert loaded == [Question("34602", "0054c91397f2fe05.jpg", "what is it?", ["no"] * 10)]
    assert bad == []


def test_vizwiz_questions_are_read_and_scored(tmp_path):
    name = "VizWiz_val_00000000.jpg"
    path = write(tmp_path / "viz.json", [
        dict(image=name, question="Ok?", answer_type="other", answerable=1,
             answers=[dict(answer="no", answer_confidence="yes")] * 10),
        dict(image="b.jpg", question="Ok?")])
    loaded, bad = questions("vizwiz", [path], SUFFIX["vizwiz"])
    prompt = ("Ok? Answer the question using a single word or phrase. "
              "Reply unanswerable if information is not present in the image.")
    assert loaded == [Question(name, name, prompt, ["no"] * 10, ("other",))]
    assert_lines(bad, (path, "without a true answer", "1 (b.jpg)"))
    assert score("vizwiz", loaded, {name: "No."})[0] == dict(overall=100, other=100)


def test_gqa_questions_are_read_and_scored(tmp_path):
    path = write(tmp_path / "gqa.json", {
        "07": dict(imageId="42", question="Is it?", answer="yes", types=dict(structural="verify")),
        "08": dict(imageId="n7", question="Who?", answer="boy", types=dict(structural="query")),
        "09": dict(imageId="n7", question="Who?", answer="man", isBalanced=False)})
    loaded, bad = questions("gqa", [path])
    assert [(q.id, q.image, q.answers) for q in loaded] == [
        ("07", "42.jpg", ["yes"]), ("08", "n7.jpg", ["boy"])]
    assert_lines(bad, (path, "balanced", "1 (09)"))
    assert score("gqa", loaded, {"07": "no", "08": "Boy"})[0] == {
        "overall": 50, "binary": 0, "structural: verify": 0, "open": 100, "structural: query": 100}


def test_chartqa_has_a_mean_of_each_file(tmp_path):
    paths = []
    for name, label in (("human", "10"), ("augmented", "1,000")):
        record = dict(imgname="1.png", query="How much?", label=label)
        paths.append(write(tmp_path / f"test_{name}.json", [record]))
    loaded, bad = questions("chartqa", paths)
    assert bad == [] and [q.id for q in loaded] == ["test_human/0", "test_augmented/0"]
    assert score("chartqa", loaded, {"test_human/0": "11", "test_augmented/0": "1001"})[0] == {
        "overall": 50, "test_human": 0, "test_augmented": 100}


@pytest.fixture
def pope_questions(tmp_path):
    """Write POPE's three files, each with a yes and a no; return the questions read from them."""
    paths = []
    for name in ("random", "popular", "adversarial"):
        lines = []
        for i, label in enumerate(("yes", "no"), 1):
            question = "Is there a cat in the image?"
            lines.append(json.dumps(dict(question_id=i, image="a.jpg", text=question, label=label)))
        paths.append(write(tmp_path / f"coco_pope_{name}.json", "\n".join(lines) + "\n"))
    return questions("pope", paths)


def test_pope_has_figures_of_each_file_and_their_mean(pope_questions):
    loaded, bad = pope_questions
    assert bad == [] and [q.id for q in loaded][::2] == ["random/1", "popular/1", "adversarial/1"]
    scores, bad = score("pope", loaded, {
        "random/1": "Yes", "random/2": "No, there is not.", "popular/1": "Yes, a cat",
        "popular/2": "It is nowhere", "adversarial/1": "No", "adversarial/2": "no"})
    table = {}
    for name in ("random", "popular", "adversarial", "mean"):
        table[name] = [scores[f"{name}: {figure}"] for figure in pope(["yes"], ["yes"])]
    assert bad == []
    assert table == dict(
        random=[100, 100, 100, 100, 50], popular=[50, 50, 100, pytest.approx(200 / 3), 100],
        adversarial=[50, 0, 0, 0, 0], mean=pytest.approx([200 / 3, 50, 200 / 3, 500 / 9, 50]))


def test_a_pope_question_without_an_answer_is_wrong_and_no_yes(pope_questions):
    scores, bad = score("pope", pope_questions[0][:2], {"random/1": "yes"})
    assert [scores[f"random: {name}"] for name in ("accuracy", "yes-ratio")] == [50, 50]
    assert_lines(bad, ("without an answer", "1 (random/2)"))


def test_unanswered_questions_are_wrong_and_stray_answers_ignored():
    # "the" normalises to "", so a missing answer taken as "" would be right
    loaded = [Question(str(i), "a.jpg", "Who?", of_ten(5, "the", "dog")) for i in range(8)]
    scores, bad = score("vqav2", loaded, {"0": "dog", "1": "the", "x": "dog", "y": "cat"})
    assert scores == {"overall": 25}
    assert_lines(bad, ("without an answer", "6 (2, 3, 4, 5, 6, ...)"),
                 ("to no question", "2 (x, y)"))


def test_answers_are_read_and_a_second_answer_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question_id": 1, "answer": "a"}\n\n'
                 '{"question_id": "07", "answer": "é"}\r\n{"question_id": 1, "answer": "b"}\n')
    by_id, bad = read_answers(path)
    assert by_id == {"1": "a", "07": "é"}
    assert_lines(bad, (path, "1 (1)"))


@pytest.mark.parametrize("lines, message", [
    ('{"question_id": 1, "ans\n{"question_id": 2, "answer": "b"}', "a.jsonl:1: .*JSON"),
    ('{"question_id": 1, "answer": "a"}\n{"question_id": 2, "ans', "a.jsonl:2: .*JSON"),
    ("[1]\n", r'a.jsonl:1: .*"question_id".* \[1\]'),
    ('{"question_id": 1}', 'a.jsonl:1: "answer" is null'),
    ('{"question_id": 1, "answer": 2}', 'a.jsonl:1: "answer" is 2'),
    ('{"question_id": true, "answer": ""}', 'a.jsonl:1: .*"question_id".* True')])
def test_a_line_that_is_no_answer_is_refused(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_answers(write(tmp_path / "a.jsonl", lines))


@pytest.mark.parametrize("kind, content, message", [
    ("vqav2", [], r"x.json.* vqav2 .*\{questions"),
    ("textvqa", dict(data=[dict(question_id=1, image_id="a", question=None, answers=["x"])]),
     'x.json: 1: "question" is null'),
    ("textvqa", dict(data=[]), "x.json: .*true answer"),
    ("vizwiz", dict(image="a"), "x.json: .* vizwiz"), ("gqa", [1], r"x.json: .* gqa .*\{id"),
    ("chartqa", [dict(imgname="a", query="b", label=1)], 'x/0: "answer" is 1'),
    ("chartqa", [dict(imgname="a", query="b")], r"x.json: .* chartqa .*'label'.* \[\{imgname"),
    ("pope", dict(question_id=1, image="a", text="b", label="Yes"), "x.json:1: .*label 'Yes'"),
    ("pope", "{", "x.json:1: .*JSON"), ("gqa", "{", "x.json: .*JSON")])
def test_a_file_of_another_benchmark_is_refused_in_one_line(tmp_path, kind, content, message):
    paths = [write(tmp_path / "x.json", content)]
    if kind == "vqav2":
        paths.append(write(tmp_path / "annotations.json", dict(annotations=[])))
    with pytest.raises(UserError, match=message) as error:
        questions(kind, paths)
    assert "\n" not in str(error.value)


@pytest.fixture
def examples():
    """Return six questions; in those with even numbers, two answers are equally common."""
    loaded = []
    for i in range(6):
        given = ["fig", f"pear {i}", f"pear {i}", "fig", "x"][i % 2:]
        loaded.append(Question(str(i), "a.jpg", f"What {i}?", given))
    return loaded


def test_shots_depend_on_the_key_only(examples):
    assert answers.shots(examples, 3, "seed 0, 17") == answers.shots(examples, 3, "seed 0, 17")
    # 120 orders of 3 of 6: ten or fewer of 20 keys differ with odds below 1 in 10**9
    assert len({answers.shots(examples, 3, f"{key}") for key in range(20)}) > 10


def test_shots_never_include_the_question_itself(examples):
    for key in range(9):
        assert examples[0].question not in answers.shots(examples[:2], 1, str(key), examples[0])


def test_shots_hold_questions_with_their_most_common_answer(examples):
    text = answers.shots(examples[:2], 2, "") + question_prompt("Which?")
    first = "Q: What 0? A: fig "                             # the first answer of a tie
    second = "Q: What 1? A: pear 1 "
    assert text in (f"{first}{second}Q: Which? A: ", f"{second}{first}Q: Which? A: ")
    assert answers.shots(examples, 0, "") == ""


def test_more_shots_than_examples_are_refused(examples):
    with pytest.raises(UserError, match="7 .*6"):
        answers.shots(examples, 7, "")
