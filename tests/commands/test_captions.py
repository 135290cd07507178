"""metrics/captions.py: words and figures by hand, figures of pycocoevalcap, and what is wrong in a line."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest

from common.cli import UserError
from metrics import captions
from metrics.captions import bleu, cider_d, rouge_l, tokens

PEERS = json.loads((Path(__file__).parents[1] / "fixtures" / "captions.json").read_text())
WORDS = [                                # each is what Stanford's tokenizer and the package's list leave
    ("A man riding a wave on top of a surfboard.", "a man riding a wave on top of a surfboard"),
    ("Two dogs , a cat .  .", "two dogs a cat"),
    ("I don't, can't and won't.", "i do n't ca n't and wo n't"),
    ("he'll say they've seen it's Ann's", "he 'll say they 've seen it 's ann 's"),
    ("I'm sure we'd you're", "i 'm sure we 'd you 're"),
    ("you shouldn't've", "you should n't 've"),
    ("the dogs' ball, James's", "the dogs ball james 's"),
    ("gonna gotta wanna lemme gimme cannot", "gon na got ta wan na lem me gim me can not"),
    ("'Tis 'twas dunno wannabe", "'t is 't was dunno wannabe"),
    ("five o'clock at O'Brien's, ma'am", "five o'clock at o'brien 's ma'am"),
    ("y'all get 'em 'til it's rock 'n' roll", "y' all get 'em 'til it 's rock 'n' roll"),
    ("rock'n'roll, mac 'n cheese", "rock 'n' roll mac 'n cheese"),
    ("the '90s, a '57 Chevy, the 1950's", "the '90s a '57 chevy the 1950 's"),
    ('a "stop" sign, \'no parking\'', "a stop sign no parking"),
    ("“curly” ‘quotes’ don’t", "curly quotes do n't"),
    ("``a'' `b'", "a b"),
    ("left (right) [mid] {low}", "left -lrb- right -rrb- -lsb- mid -rsb- -lcb- low -rcb-"),
    ("black-and-white, two-story T-shirt", "black-and-white two-story t-shirt"),
    ("well - known -- a---b – c — d-", "well known a b c d"),
    ("1,000.50 at 3:30, 2.5-inch, .5 of 10.", "1,000.50 at 3:30 2.5-inch .5 of 10"),
    ("50% of $5, £3 and 50¢", "50 % of $ 5 # 3 and 50 cents"),
    ("1/2 a pie, ½ a cake on 12/25/2014", "1/2 a pie 1/2 a cake on 12/25/2014"),
    ("10am, 12:30pm, the 23rd, 4x4", "10am 12:30 pm the 23rd 4x4"),
    ("-5 degrees, 5-10 people", "-5 degrees 5-10 people"),
    ("5'10\" tall, a 12\" pizza", "5 10 tall a 12 pizza"),
    ("Mr. Smith and Dr. Lee, St. Louis", "mr. smith and dr. lee st. louis"),
    ("the U.S. flag at 5 p.m. on T.V.", "the u.s. flag at 5 p.m. on t.v."),
    ("Washington D.C., etc.", "washington d.c. etc."),
    ("5 in. by 5 in. and 10 lbs. of it", "5 in by 5 in and 10 lbs of it"),
    ("no. 5 and No.5, but no. Yes", "no. 5 and no. 5 but no yes"),
    ("bus #24, a #dog @home", "bus # 24 a #dog @home"),
    ("R&B, AT&T, a b&w cat & dog", "r&b at&t a b & w cat & dog"),
    ("a man/woman w/ and/or w/o it", "a man/woman w / and/or w/o it"),
    ("wow! really? what?! oh!!", "wow really what ?! oh !!"),
    ("wait... what... and…so", "wait what and so"),
    ("on a bench.She smiles.", "on a bench.she smiles"),
    ("a cat., a dog", "a cat. a dog"),
    ("size L. on it; the letter B.", "size l. on it the letter b"),
    ("see www.example.com/a?b=c, or me@example.com.", "see www.example.com/a?b=c or me@example.com"),
    ("a <unk> and <b>bold</b> :) <3", "a <unk> and <b> bold </b> :-rrb- < 3"),
    ("salt &amp; pepper, &quot;hot&quot;", "salt & pepper hot"),
    ("café naïve 25° I ♥ NY 😀", "café naïve 25 ° i ♥ ny"),
    ("under_score *star* **bold**", "under_score * star * ** bold **"),
    ("  \t ", ""),
    ("...!", "")]


def one(reference, candidate):
    """The two dicts of one picture with one reference."""
    return {1: [reference.split()]}, {1: candidate.split()}


@pytest.mark.parametrize("text, words", WORDS)
def test_a_caption_comes_apart_into_the_words_of_the_reference_tokenizer(text, words):
    assert tokens(text) == words.split()


def test_figures_are_those_of_pycocoevalcap_on_200_sets_of_captions():
    # the words have no signs in them, so that `score` has the same
    references = {i: [" ".join(words) for words in some] for i, some in enumerate(PEERS["references"])}
    written = {i: " ".join(words) for i, words in enumerate(PEERS["candidates"])}
    scores, bad = captions.score(references, written)
    assert list(scores.values()) == pytest.approx(PEERS["corpus"], abs=1e-6) and not bad
    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"]
    references, candidates = dict(enumerate(PEERS["references"])), dict(enumerate(PEERS["candidates"]))
    rouge, cider = rouge_l(references, candidates), cider_d(references, candidates)
    for i, theirs in enumerate(PEERS["each"]):
        ours = [*bleu({i: references[i]}, {i: candidates[i]}), rouge[i], cider[i]]
        assert ours == pytest.approx(theirs, abs=1e-6), i


def test_the_fixture_has_captions_without_words_of_one_word_and_of_a_hundred():
    lengths = {len(words) for words in PEERS["candidates"]}
    assert {0, 1, 100} <= lengths and {len(some) for some in PEERS["references"]} >= {1, 2, 3, 4, 5, 6}
    assert any([] in some for some in PEERS["references"])


def test_a_word_counts_as_often_as_in_one_reference_at_most():
    # the example of the BLEU paper: "the" is twice in the first reference, of seven words
    references = {1: ["the cat is on the mat".split(), "there is a cat on the mat".split()]}
    assert bleu(references, {1: ["the"] * 7})[0] == pytest.approx(2 / 7)


def test_a_short_candidate_is_penalised_by_its_length():
    found = bleu(*one("a cat sat on the mat", "a cat sat"))         # BP = exp(1 - 6 / 3), p = 1, 1, 1, 0 / 0
    assert found == pytest.approx([math.exp(-1)] * 3 + [math.exp(-1) * 1e-6 ** 0.25])
    assert bleu(*one("a cat sat on the mat", "a cat sat on the mat")) == pytest.approx([1] * 4)


@pytest.mark.parametrize("lengths, penalty", [((4, 6), 1), ((7, 2), math.exp(1 - 7 / 5)), ((7, 3), 1)])
def test_the_reference_closest_in_length_counts_and_of_two_the_shorter(lengths, penalty):
    references = {1: [["a"] * length for length in lengths]}
    clipped = min(5, max(lengths)) / 5
    assert bleu(references, {1: ["a"] * 5})[0] == pytest.approx(penalty * clipped)


def test_bleu_of_a_corpus_pools_the_counts_of_its_pictures():
    references, candidates = {1: [["a"]], 2: [["x", "y", "z"]]}, {1: ["a"], 2: ["b", "c", "d"]}
    assert bleu(references, candidates)[0] == pytest.approx(1 / 4)


def test_bleu_2_is_the_geometric_mean_of_two_precisions():
    # "a b" of "a b", "b c", "c d" is in the reference, and three of four words
    assert bleu(*one("a b d e", "a b c d"))[:2] == pytest.approx([3 / 4, math.sqrt(3 / 4 * 1 / 3)])


def test_rouge_l_follows_the_longest_common_subsequence():
    assert rouge_l(*one("police killed the gunman", "police kill the gunman"))[1] == pytest.approx(3 / 4)
    assert rouge_l(*one("police killed the gunman", "the gunman kill police"))[1] == pytest.approx(2 / 4)
    assert rouge_l(*one("a b", "c d"))[1] == 0


def test_rouge_l_takes_the_best_precision_and_the_best_recall_of_any_reference():
    references = {1: ["a x x x x x x x".split(), "a b y y y y".split()]}           # LCS 1 and 2, of 8 and 6
    P, R = 2 / 4, 2 / 6
    assert rouge_l(references, {1: "a b c d".split()})[1] == pytest.approx(2.44 * P * R / (R + 1.44 * P))
    references = {1: ["a x".split(), "a b y y y y".split()]}                       # R is of the first: 1 / 2
    assert rouge_l(references, {1: "a b c d".split()})[1] == pytest.approx(0.5)


def test_the_common_subsequence_is_as_long_as_the_longest_of_all_that_can_be_listed():
    draw = random.Random(0)
    for _ in range(50):
        a, b = ([draw.choice("abc") for _ in range(draw.randint(0, 7))] for _ in range(2))
        parts = [{part for n in range(len(x) + 1) for part in itertools.combinations(x, n)} for x in (a, b)]
        assert captions.common(a, b) == max(map(len, parts[0] & parts[1]))


def test_a_caption_that_is_its_only_reference_has_a_cider_d_of_10():
    references = {1: ["a cat sat down".split()], 2: ["two dogs run in a park".split()], 3: ["x y z".split()]}
    found = cider_d(references, {name: some[0] for name, some in references.items()})
    assert found[1] == pytest.approx(10) and found[2] == pytest.approx(10)
    assert found[3] == pytest.approx(7.5)                       # three words have no 4-gram: 3 of 4 cosines


def test_cider_d_of_two_words_of_four_by_hand():
    # every idf is log 2 and cancels; cosines 2 / sqrt(2 * 4), 1 / sqrt(1 * 3), 0, 0; one bigram against three
    references = {1: ["a b c d".split()], 2: ["w x y z".split()]}
    found = cider_d(references, {1: "a b".split(), 2: "a b c d".split()})
    assert found[1] == pytest.approx(10 / 4 * (1 / math.sqrt(2) + 1 / math.sqrt(3)) * math.exp(-4 / 72))
    assert found[2] == 0


def test_cider_d_counts_a_word_as_often_as_the_reference_does():
    references = {1: ["a b c d".split()], 2: ["w x y z".split()]}
    found = cider_d(references, {1: "a a a a".split(), 2: "w".split()})
    assert found[1] == pytest.approx(10 / 4 * 1 / (4 * 2))      # min(4, 1) * 1 / (|(4)| |(1, 1, 1, 1)|)


def test_cider_d_weighs_words_by_how_few_pictures_have_them():
    # "a" is in all of four pictures: idf 0; "b" in two, though three times: log 2; the others in one: log 4
    references = {1: [["a", "b"], ["a", "b"]], 2: [["a", "b"]], 3: [["a", "c"]], 4: [["a", "d"]]}
    found = cider_d(references, {1: ["a"], 2: ["b", "d"], 3: ["c"], 4: ["d"]})    # of four k-grams words alone
    assert found[1] == 0
    assert found[2] == pytest.approx(10 / 4 * math.log(2) / math.hypot(math.log(2), math.log(4)))
    assert found[3] == found[4] == pytest.approx(10 / 4 * math.exp(-1 / 72))


def test_cider_d_is_the_mean_over_the_references():
    references = {1: ["a b c d".split(), "e f g h".split()], 2: ["w x y z".split()]}
    assert cider_d(references, {1: "a b c d".split(), 2: []})[1] == pytest.approx(5)


def test_a_single_picture_has_a_cider_d_of_nothing():
    assert cider_d(*one("a cat sat down", "a cat sat down")) == {1: 0}


def test_a_blank_caption_scores_nothing_and_pictures_without_a_pair_are_named():
    references = {1: ["A cat sits there."], 2: ["Two dogs run around."], "x": ["A red bus."]}
    scores, bad = captions.score(references, {1: "a cat sits there", 2: " ", 5: "b"})
    assert bad == ["picture 'x': no caption was written", "picture 5: no reference to compare with"]
    assert scores["CIDEr-D"] == pytest.approx(5) and scores["ROUGE-L"] == 0.5         # 10 and 1, and nothing
    assert scores["BLEU-4"] == pytest.approx(math.exp(1 - 8 / 4))
    blank, _ = captions.score(references, {1: " ", 2: " "})
    assert max(blank.values()) < 1e-6


def test_captions_of_other_pictures_are_one_clear_mistake():
    with pytest.raises(UserError, match=r"none of 1 written .* 2 pictures .* are \['42'\] and \[42, 43\]"):
        captions.score({42: ["a cat"], 43: ["a dog"]}, {"42": "a cat"})


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_cocos_captions_are_read_and_what_is_odd_is_named(tmp_path):
    path = write(tmp_path / "c.json", {
        "info": {}, "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"},
                               {"id": 1, "file_name": "again.jpg"}, {"id": "x", "file_name": "x.jpg"}],
        "annotations": [dict(image_id=image, id=number, caption=caption) for image, number, caption in (
            (1, 7, "A cat."), (1, 8, "B."), ("x", 7, "C"), ("x", 9, "D"), (3, 10, "E"))]})
    references, names, bad = captions.read_captions(path)
    assert references == {1: ["A cat.", "B."], "x": ["D"]}
    assert names == {1: "1.jpg", 2: "2.jpg", "x": "x.jpg"}
    assert bad == [f"{path}: images[2]: picture 1 is listed twice",
                   f"{path}: annotations[2]: caption 7 is there twice",
                   f"{path}: annotations[4]: of picture 3, which is not listed",
                   f"{path}: picture 2, 2.jpg, has no caption"]


def test_the_captions_of_an_image_are_in_the_order_of_their_ids(tmp_path):
    captions_ = [dict(image_id=1, id=number, caption=str(number)) for number in (30, 4, 100)]
    path = write(tmp_path / "c.json", {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": captions_})
    assert captions.read_captions(path)[0] == {1: ["4", "30", "100"]}


@pytest.mark.parametrize("content, message", [
    ("{", "c.json: not readable as JSON"),
    ([], r"c.json: expected COCO's captions, with images and annotations, found \[\]"),
    ({"images": []}, "c.json: expected COCO's captions, with images and annotations, found"),
    ({"images": [1], "annotations": []}, r'images\[0\]: expected an object with "id", .* found 1'),
    ({"images": [{"id": True}], "annotations": []}, 'expected an object with "id", a whole number or a text'),
    ({"images": [{"id": 1}], "annotations": []}, r'images\[0\]: "file_name" is null, expected a text'),
    ({"images": [], "annotations": [{"id": 1}]}, r'annotations\[0\]: expected an object with "image_id"'),
    ({"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": 5}]}, '"caption" is 5, expected a t'),
    ({"images": [{"id": 1, "file_name": "a"}], "annotations": []}, "no caption of a picture; .*e 1, a, has")])
def test_a_file_that_is_no_captions_file_is_one_clear_mistake(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        captions.read_captions(write(tmp_path / "c.json", content))


@pytest.mark.parametrize("join", [json.dumps, lambda rows: "\n\n".join(map(json.dumps, rows)) + "\n"])
def test_results_are_a_list_or_an_object_a_line(tmp_path, join):
    rows = [{"image_id": 1, "caption": "a cat"}, {"image_id": "x", "caption": ""},
            {"image_id": 1, "caption": "a dog"}]
    written, bad = captions.read_results(write(tmp_path / "r.json", join(rows)))
    assert written == {1: "a cat", "x": ""}
    assert len(bad) == 1 and "picture 1 has a caption already" in bad[0]


@pytest.mark.parametrize("content, message", [
    ("", "expected captions, objects with image_id and caption, found none"),
    ("[]", "found none"),
    ("[1", "r.json: not readable as JSON"),
    ('{"image_id": 1, "caption": "a"}\nno', "r.json:2: not readable as JSON"),
    ('{"image_id": 1, "caption": null}', 'r.json:1: "caption" is null, expected a text'),
    ([{"image_id": 1.5, "caption": "a"}], r'\[0\]: expected an object with "image_id", a whole number or'),
    ([{"id": 1, "caption": "a"}], 'expected an object with "image_id"')])
def test_a_file_that_is_no_results_file_is_one_clear_mistake(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        captions.read_results(write(tmp_path / "r.json", content))
