"""Compare metrics/captions.py with words and scores by hand and by pycocoevalcap."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest

from common.cli import UserError
from helpers import assert_lines
from metrics import captions
from metrics.captions import bleu, cider_d, rouge_l, tokens

PEERS = json.loads((Path(__file__).parents[1] / "fixtures" / "captions.json").read_text())
# (text, words as Stanford's tokenizer and pycocoevalcap's list of punctuation give them)
WORDS = [
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
    ("see www.example.com/a?b=c, or me@example.com.",
     "see www.example.com/a?b=c or me@example.com"),
    ("a <unk> and <b>bold</b> :) <3", "a <unk> and <b> bold </b> :-rrb- < 3"),
    ("salt &amp; pepper, &quot;hot&quot;", "salt & pepper hot"),
    ("café naïve 25° I ♥ NY 😀", "café naïve 25 ° i ♥ ny"),
    ("under_score *star* **bold**", "under_score * star * ** bold **"),
    ("  \t ", ""),
    ("...!", "")]


def one(reference, candidate):
    """Return the references and candidates of one image with one reference."""
    return {1: [reference.split()]}, {1: candidate.split()}


@pytest.mark.parametrize("text, words", WORDS)
def test_words_equal_the_stanford_tokenizers(text, words):
    assert tokens(text) == words.split()


def test_corpus_scores_equal_pycocoevalcaps_on_200_sets_of_captions():
    # no word holds punctuation, so the tokenizer of `score` changes nothing
    references = {}
    for i, texts in enumerate(PEERS["references"]):
        references[i] = [" ".join(words) for words in texts]
    candidates = {i: " ".join(words) for i, words in enumerate(PEERS["candidates"])}
    scores, bad = captions.score(references, candidates)
    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"]
    assert list(scores.values()) == pytest.approx(PEERS["corpus"], abs=1e-6)   # stored digits
    assert not bad


def test_image_scores_equal_pycocoevalcaps_on_200_sets_of_captions():
    references = dict(enumerate(PEERS["references"]))
    candidates = dict(enumerate(PEERS["candidates"]))
    rouge = rouge_l(references, candidates)
    cider = cider_d(references, candidates)
    for i, expected in enumerate(PEERS["each"]):
        scores = [*bleu({i: references[i]}, {i: candidates[i]}), rouge[i], cider[i]]
        assert scores == pytest.approx(expected, abs=1e-6), i                  # stored digits


def test_the_fixture_has_empty_one_word_and_long_captions():
    assert {0, 1, 100} <= {len(words) for words in PEERS["candidates"]}
    assert {1, 2, 3, 4, 5, 6} <= {len(texts) for texts in PEERS["references"]}
    assert any([] in texts for texts in PEERS["references"])


def test_bleu_clips_a_word_to_its_count_in_one_reference():
    # the example of the BLEU paper: "the" is twice in the first reference; the candidate has 7
    references = {1: ["the cat is on the mat".split(), "there is a cat on the mat".split()]}
    assert bleu(references, {1: ["the"] * 7})[0] == pytest.approx(2 / 7)


def test_bleu_penalises_a_short_candidate():
    scores = bleu(*one("a cat sat on the mat", "a cat sat"))
    penalty = math.exp(1 - 6 / 3)
    # three words have no 4-gram: pycocoevalcap takes (0 + 1e-15) / (0 + 1e-9)
    assert scores == pytest.approx([penalty] * 3 + [penalty * 1e-6 ** 0.25])
    assert bleu(*one("a cat sat on the mat", "a cat sat on the mat")) == pytest.approx([1] * 4)


@pytest.mark.parametrize("lengths, penalty", [
    ((4, 6), 1), ((7, 2), math.exp(1 - 7 / 5)), ((7, 3), 1)])
def test_bleu_takes_the_closest_reference_length_and_the_shorter_of_two(lengths, penalty):
    references = {1: [["a"] * length for length in lengths]}
    clipped = min(5, max(lengths)) / 5
    assert bleu(references, {1: ["a"] * 5})[0] == pytest.approx(penalty * clipped)


def test_bleu_pools_the_counts_of_all_images():
    references = {1: [["a"]], 2: [["x", "y", "z"]]}
    candidates = {1: ["a"], 2: ["b", "c", "d"]}
    assert bleu(references, candidates)[0] == pytest.approx(1 / 4)


def test_bleu_2_is_the_geometric_mean_of_two_precisions():
    # the reference has one of the bigrams "a b", "b c", "c d", and three of the four words
    assert bleu(*one("a b d e", "a b c d"))[:2] == pytest.approx([3 / 4, math.sqrt(3 / 4 * 1 / 3)])


def test_rouge_l_of_the_papers_examples():
    reference = "police killed the gunman"
    assert rouge_l(*one(reference, "police kill the gunman"))[1] == pytest.approx(3 / 4)
    assert rouge_l(*one(reference, "the gunman kill police"))[1] == pytest.approx(2 / 4)
    assert rouge_l(*one("a b", "c d"))[1] == 0


def test_rouge_l_takes_the_best_precision_and_recall_of_any_reference():
    candidates = {1: "a b c d".split()}
    references = {1: ["a x x x x x x x".split(), "a b y y y y".split()]}   # LCS 1 of 8 and 2 of 6
    P = 2 / 4
    R = 2 / 6
    assert rouge_l(references, candidates)[1] == pytest.approx(2.44 * P * R / (R + 1.44 * P))
    references = {1: ["a x".split(), "a b y y y y".split()]}               # R = 1 / 2, of the first
    assert rouge_l(references, candidates)[1] == pytest.approx(0.5)


def subsequences(words):
    """Return all subsequences of a list of words."""
    lengths = range(len(words) + 1)
    return {part for n in lengths for part in itertools.combinations(words, n)}


def test_common_is_the_longest_common_subsequence_by_enumeration():
    draw = random.Random(0)
    for _ in range(50):
        a = [draw.choice("abc") for _ in range(draw.randint(0, 7))]
        b = [draw.choice("abc") for _ in range(draw.randint(0, 7))]
        assert captions.longest_common(a, b) == max(map(len, subsequences(a) & subsequences(b)))


def test_a_caption_equal_to_its_only_reference_has_cider_d_10():
    references = {1: ["a cat sat down".split()], 2: ["two dogs run in a park".split()],
                  3: ["x y z".split()]}
    scores = cider_d(references, {name: texts[0] for name, texts in references.items()})
    # three words have no 4-gram: 3 of 4 cosines are 1
    assert scores == pytest.approx({1: 10, 2: 10, 3: 7.5})


def test_cider_d_of_two_words_against_four_by_hand():
    # every idf is log 2 and cancels; the lengths are one and three bigrams
    references = {1: ["a b c d".split()], 2: ["w x y z".split()]}
    scores = cider_d(references, {1: "a b".split(), 2: "a b c d".split()})
    cosines = 2 / math.sqrt(2 * 4) + 1 / math.sqrt(1 * 3)
    assert scores[1] == pytest.approx(10 / 4 * cosines * math.exp(-4 / 72))
    assert scores[2] == 0


def test_cider_d_clips_a_repeated_word_to_the_references_count():
    references = {1: ["a b c d".split()], 2: ["w x y z".split()]}
    scores = cider_d(references, {1: "a a a a".split(), 2: "w".split()})
    # min(4, 1) * 1 / (|(4)| |(1, 1, 1, 1)|)
    assert scores[1] == pytest.approx(10 / 4 * 1 / (4 * 2))


def test_cider_d_weighs_words_by_how_few_images_have_them():
    # idf of "a", in all four images: 0; of "b", in two, though three times: log 2; others: log 4
    references = {1: [["a", "b"], ["a", "b"]], 2: [["a", "b"]], 3: [["a", "c"]], 4: [["a", "d"]]}
    scores = cider_d(references, {1: ["a"], 2: ["b", "d"], 3: ["c"], 4: ["d"]})
    assert scores[1] == 0
    assert scores[2] == pytest.approx(10 / 4 * math.log(2) / math.hypot(math.log(2), math.log(4)))
    assert scores[3] == scores[4] == pytest.approx(10 / 4 * math.exp(-1 / 72))


def test_cider_d_is_the_mean_over_the_references():
    references = {1: ["a b c d".split(), "e f g h".split()], 2: ["w x y z".split()]}
    assert cider_d(references, {1: "a b c d".split(), 2: []})[1] == pytest.approx(5)


def test_cider_d_of_a_single_image_is_zero():
    assert cider_d(*one("a cat sat down", "a cat sat down")) == {1: 0}


def test_a_blank_caption_scores_zero():
    references = {1: ["A cat sits there."], 2: ["Two dogs run around."]}
    scores, _ = captions.score(references, {1: "a cat sits there", 2: " "})
    # the means of 10 and 0, and of 1 and 0
    assert scores["CIDEr-D"] == pytest.approx(5) and scores["ROUGE-L"] == 0.5
    assert scores["BLEU-4"] == pytest.approx(math.exp(1 - 8 / 4))
    blank, _ = captions.score(references, {1: " ", 2: " "})
    assert max(blank.values()) < 1e-6                   # pycocoevalcap's 1e-15 in place of 0 / 0


def test_images_without_a_pair_are_named_and_left_out():
    references = {1: ["A cat sits there."], 2: ["Two dogs run around."], "x": ["A red bus."]}
    written = {1: "a cat sits there", 2: " ", 5: "b"}
    scores, bad = captions.score(references, written)
    assert_lines(bad, ("'x'", "no caption"), ("5", "no reference"))
    del references["x"], written[5]
    assert (scores, []) == captions.score(references, written)


def test_captions_of_other_images_are_refused():
    with pytest.raises(UserError, match=r"none of 1 .* 2 .*\['42'\] and \[42, 43\]"):
        captions.score({42: ["a cat"], 43: ["a dog"]}, {"42": "a cat"})


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_coco_captions_are_read_and_odd_records_named(tmp_path):
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"},
              {"id": 1, "file_name": "again.jpg"}, {"id": "x", "file_name": "x.jpg"}]
    annotations = [dict(image_id=1, id=7, caption="A cat."), dict(image_id=1, id=8, caption="B."),
                   dict(image_id="x", id=7, caption="C"), dict(image_id="x", id=9, caption="D"),
                   dict(image_id=3, id=10, caption="E")]
    path = write(tmp_path / "c.json", dict(info={}, images=images, annotations=annotations))
    references, names, bad = captions.read_captions(path)
    assert references == {1: ["A cat.", "B."], "x": ["D"]}
    assert names == {1: "1.jpg", 2: "2.jpg", "x": "x.jpg"}
    assert_lines(bad, (f"{path}: images[2]", " 1 ", "twice"),
                 (f"{path}: annotations[2]", " 7 ", "twice"), (f"{path}: annotations[4]", " 3"),
                 (str(path), " 2, 2.jpg", "no caption"))


def test_captions_of_an_image_are_in_the_order_of_their_ids(tmp_path):
    annotations = [dict(image_id=1, id=n, caption=str(n)) for n in (30, 4, 100)]
    content = dict(images=[dict(id=1, file_name="1.jpg")], annotations=annotations)
    assert captions.read_captions(write(tmp_path / "c.json", content))[0] == {1: ["4", "30", "100"]}


@pytest.mark.parametrize("content, message", [
    ("{", "c.json: .*JSON"),
    ([], r"c.json: .*images and annotations.* \[\]"),
    ({"images": []}, "c.json: .*images and annotations"),
    ({"images": [1], "annotations": []}, r'images\[0\]: .*"id".* 1'),
    ({"images": [{"id": True}], "annotations": []}, r'images\[0\]: .*"id".*True'),
    ({"images": [{"id": 1}], "annotations": []}, r'images\[0\]: "file_name" is null'),
    ({"images": [], "annotations": [{"id": 1}]}, r'annotations\[0\]: .*"image_id"'),
    ({"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": 5}]},
     r'annotations\[0\]: "caption" is 5'),
    ({"images": [{"id": 1, "file_name": "a"}], "annotations": []}, "c.json: .*no caption.* 1, a,")])
def test_a_file_that_is_no_captions_file_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        captions.read_captions(write(tmp_path / "c.json", content))


@pytest.mark.parametrize("join", [
    json.dumps, lambda rows: "\n\n".join(map(json.dumps, rows)) + "\n"])
def test_results_are_a_list_or_one_object_a_line(tmp_path, join):
    rows = [{"image_id": 1, "caption": "a cat"}, {"image_id": "x", "caption": ""},
            {"image_id": 1, "caption": "a dog"}]
    captions_by_id, bad = captions.read_results(write(tmp_path / "r.json", join(rows)))
    assert captions_by_id == {1: "a cat", "x": ""}
    assert_lines(bad, ("r.json", " 1 ", "already"))


@pytest.mark.parametrize("content, message", [
    ("", "r.json: .*image_id and caption.* none"),
    ("[]", "r.json: .*image_id and caption.* none"),
    ("[1", "r.json: .*JSON"),
    ('{"image_id": 1, "caption": "a"}\nno', "r.json:2: .*JSON"),
    ('{"image_id": 1, "caption": null}', 'r.json:1: "caption" is null'),
    ([{"image_id": 1.5, "caption": "a"}], r'\[0\]: .*"image_id".*1\.5'),
    ([{"id": 1, "caption": "a"}], r'\[0\]: .*"image_id"')])
def test_a_file_that_is_no_results_file_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        captions.read_results(write(tmp_path / "r.json", content))
