"""Compare metrics/captions.py with the package pycocoevalcap: its scorers and, if java runs, its
tokenizer.

    pip install --no-deps --target peers pycocoevalcap==1.2     # 100 MB; the project does not need it
    PYTHONPATH=peers python -m experiments.compare_captions           # with the project's python, ten seconds

The program makes up 200 sets of one to six captions and a candidate, some of them empty, of one
word, of a hundred words, or of one repeated word.  Both programs score the same words, and the
package's scores are written to tests/fixtures/captions.json, which the tests read.  Then both
tokenize 1,000 made-up captions full of special cases, and 3,000 sentences of the standard library's
docstrings.
"""

import ast
import json
import random
import re
import shutil
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from statistics import mean

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from common import cli
from common.cli import ROOT
from metrics import captions

FIXTURE = ROOT / "tests" / "fixtures" / "captions.json"
CODE = re.compile(r"[=_\\`|]|>>")             # marks of code in a docstring
# the parts of a sentence: each is a list of phrases, separated by semicolons
PARTS = [
    """a man;two women;a group of people;a brown dog;several cows;an old red bus;a little girl in a dress;
    a black and white cat;three giraffes;a surfer;a plate of food;the train;a young boy;some zebras;a vase""",
    """standing;sitting down;riding a wave;looking at the camera;next to a tree;holding a tennis racket;
    walking;parked;eating;playing with a ball;waiting;being shown;laying down;on display;running""",
    """on a city street;in a field of grass;at the beach;in front of a building;on top of a table;
    by the water;in a kitchen;under an umbrella;near a fence;on a couch;in the snow;at night;in a park"""]
AWKWARD = [
    """A man's dog;The dogs' owner;It's a cat that;There's a bus that;"Stop" sign;A 'no parking' sign;A
    b&w photo of a boat;A black-and-white photo;Mr. Smith;Two T-shirts;The St. Louis Cardinals;A woman
    (left);A man w/ a hat;An R&B singer;1 of 3 cats;2 dogs;The U.S. flag;A T.V.;A 1950's car;A '57
    Chevy;Someone who can't swim;A rock 'n' roll band;A man/woman;A photo: a clock;Jack-o-lanterns;A
    McDonald's sign;Three 7-Eleven cups;An “old” clock;The café’s door;A cat...;O'Hare airport;A sign that
    reads "50% off!";A 3-D image;Cat no. 5""",
    """isn't moving;doesn't want to eat;that's been parked;, which is red,;- very close
    -;sitting;sleeping;[sic] standing;with a $5.00 bill;that cannot fly;they're watching;at 3:30 p.m.;from
    1,000 feet;, e.g. a bird,;who'd rather sleep;it'll be gone;that will be 10 ft. tall;about 5'10"
    tall;etc.;and/or eating;& waiting;reading 'Main St.';reading "Broadway";reading "1st Ave.";#23 on it;5
    lbs. of fish;gonna jump;wearing a size L.;of approx. 20 people;from Washington D.C.;by the ocean...
    waiting;in mid-air;half-eaten;looking up!;-- and a car""",
    """on a street.;on the grass;in the snow .;at the beach!;in Dr. Lee's office.;at 10am.;in the '90s.;on
    Elm St.;at the men's room.;in N.Y.C.;with a frisbee.The sky is blue.;at sea. It is cloudy.;by
    www.example.com.;outside (it seems).;in the kitchen/bathroom.;in black & white.;why?;!!!;on a t-ball
    field;at 6 a.m.;with his dad's bat.;near an 18-wheeler.;on a bed, in a room, at home.;in the U.S.A.
    today;in July, 2012.;on 5/12/2011.;with a 12" pizza.;on I-95.;at O'Brien's.;don't you think?;i'm
    sure.;up close :);with a "cute" cat."""]


def phrases(part: str) -> list[str]:
    """Return the phrases of a part, without the line breaks of this file."""
    return [" ".join(phrase.split()) for phrase in part.split(";")]


def sentence(draw: random.Random, parts: list[str]) -> str:
    return " ".join(draw.choice(phrases(part)) for part in parts)


# ------------------------------------------------------------------------------------------ scores

def candidate(draw: random.Random, kind: int, references: list[list[str]]) -> list[str]:
    """Return a candidate of one of ten kinds: words kept, lost, doubled, changed or moved, or
    nonsense."""
    words = list(draw.choice(references))
    other = sentence(draw, PARTS).split()
    at = draw.randrange(len(words) + 1)
    kinds = [
        words,
        words[:at],
        words[:at] + words[at - 1:],
        words[:at] + other[:3] + words[at + 3:],
        draw.sample(words, len(words)),
        other,
        words + other + words,
        words[:1] * draw.randint(1, 12),
        draw.choices(other + words, k=100),
        [] if draw.random() < 0.5 else other[1:2],
    ]
    return kinds[kind]


@dataclass
class Sets:
    """Made-up captions, as lists of words, by the number of the image."""
    references: dict[int, list[list[str]]]
    candidates: dict[int, list[str]]


def make_sets() -> Sets:
    draw = random.Random(0)
    sets = Sets({}, {})
    for i in range(200):
        subjects = [sentence(draw, PARTS).split() for _ in range(3)]
        references = []
        for _ in range(1 + i % 6):
            beginning = draw.choice(subjects)[:draw.randint(2, 20)]
            references.append(beginning + sentence(draw, PARTS[2:]).split())
        sets.candidates[i] = candidate(draw, i % 10, references)
        sets.references[i] = list(references)
        if i % 29 == 0:
            sets.references[i].append(references[0][:1])         # of one word
        if i % 31 == 0:
            sets.references[i].append([])
    return sets


@dataclass
class Scores:
    """BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D."""
    corpus: list[float]
    images: list[list[float]]           # of each image


def published_scores(sets: Sets) -> Scores:
    """Return pycocoevalcap's scores."""
    references = {i: [" ".join(words) for words in each] for i, each in sets.references.items()}
    candidates = {i: [" ".join(words)] for i, words in sets.candidates.items()}
    bleu, image_bleus = Bleu(4).compute_score(references, candidates, verbose=0)
    rouge, image_rouges = Rouge().compute_score(references, candidates)
    cider, image_ciders = Cider().compute_score(references, candidates)
    rows = zip(*image_bleus, image_rouges, image_ciders)
    return Scores([float(x) for x in (*bleu, rouge, cider)], [list(map(float, row)) for row in rows])


def our_scores(sets: Sets) -> Scores:
    rouges = captions.rouge_l(sets.references, sets.candidates)
    ciders = captions.cider_d(sets.references, sets.candidates)
    images = []
    for i in sets.references:
        bleu = captions.bleu({i: sets.references[i]}, {i: sets.candidates[i]})
        images.append([*bleu, rouges[i], ciders[i]])
    bleu = captions.bleu(sets.references, sets.candidates)
    return Scores([*bleu, mean(rouges.values()), mean(ciders.values())], images)


def largest_difference(ours: list[float], published: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, published, strict=True))


def write_fixture(sets: Sets, published: Scores) -> None:
    """Write the sets and the published scores, which the tests compare with."""
    content = dict(references=list(sets.references.values()),
                   candidates=list(sets.candidates.values()),
                   corpus=[round(x, 9) for x in published.corpus],
                   each=[[round(x, 9) for x in row] for row in published.images])
    text = json.dumps(content).replace("], [[", "],\n[[")
    FIXTURE.write_text(text + "\n")
    print(f"{FIXTURE}: {FIXTURE.stat().st_size:,} bytes")


# ----------------------------------------------------------------------------------------- words

def is_plain(text: str) -> bool:
    """Return True for a sentence of usual length, without code."""
    return 4 < len(text.split()) < 30 and text.isascii() and not CODE.search(text)


def docstrings(count: int) -> list[str]:
    """Return sentences of the standard library's docstrings."""
    sentences = set()
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                sentences.update(re.split(r"(?<=[.!?]) (?=[A-Z])", text))
    plain = sorted(filter(is_plain, sentences))
    return random.Random(0).sample(plain, min(count, len(plain)))


def compare_words(title: str, texts: list[str]) -> float:
    """Print how many texts have the same words in both programs, and the usual differences; return
    the share."""
    published = PTBTokenizer().tokenize({i: [dict(caption=text)] for i, text in enumerate(texts)})
    differences = Counter()
    equal = 0
    for i, text in enumerate(texts):
        theirs = published[i][0].split()
        ours = captions.tokens(text)
        equal += ours == theirs
        for tag, a, b, c, d in SequenceMatcher(None, theirs, ours, False).get_opcodes():
            if tag != "equal":
                differences[f"{' '.join(theirs[a:b])} -> {' '.join(ours[c:d])}"] += 1
    share = equal / len(texts)
    usual = "; ".join(f"{change} ({n})" for change, n in differences.most_common(25))
    print(f"{title}: {equal:,} of {len(texts):,} are the same words, {share:.1%}")
    print("    theirs -> ours:", usual)
    return share


def main() -> None:
    cli.Parser(__doc__).parse_args()
    sets = make_sets()
    scores = {}
    for name, score in (("theirs", published_scores), ("ours", our_scores)):
        started = time.time()
        scores[name] = score(sets)
        corpus = [f"{x:.6f}" for x in scores[name].corpus]
        print(f"{name} {time.time() - started:.2f} s", corpus)
    ours, published = scores["ours"], scores["theirs"]
    of_corpus = largest_difference(ours.corpus, published.corpus)
    of_image = max(map(largest_difference, ours.images, published.images))
    print(f"figures of the corpus {of_corpus:.1e} apart at most, of an image {of_image:.1e}")
    assert max(of_corpus, of_image) < 1e-6
    write_fixture(sets, published)
    if shutil.which("java"):
        draw = random.Random(1)
        share = compare_words("captions", [sentence(draw, AWKWARD) for _ in range(1000)])
        compare_words("docstrings", docstrings(3000))
        assert share > 0.98, share


if __name__ == "__main__":
    cli.run(main)
