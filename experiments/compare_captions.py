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
from difflib import SequenceMatcher
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from common import cli
from metrics import captions

FIXTURE = Path(__file__).parents[1] / "tests" / "fixtures" / "captions.json"
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


def sentence(draw: random.Random, parts: list[str]) -> str:
    return " ".join(draw.choice([" ".join(one.split()) for one in part.split(";")]) for part in parts)


def candidate(draw: random.Random, kind: int, references: list[list[str]]) -> list[str]:
    """Return a candidate of one of ten kinds: words kept, lost, doubled, changed or moved, or
    nonsense."""
    words = list(draw.choice(references))
    other = sentence(draw, PARTS).split()
    at = draw.randrange(len(words) + 1)
    return [words, words[:at], words[:at] + words[at - 1:], words[:at] + other[:3] + words[at + 3:],
            draw.sample(words, len(words)), other, words + other + words, words[:1] * draw.randint(1, 12),
            draw.choices(other + words, k=100), [] if draw.random() < 0.5 else other[1:2]][kind]


def make_sets() -> dict[str, dict]:
    draw, references, candidates = random.Random(0), {}, {}
    for i in range(200):
        about = [sentence(draw, PARTS).split() for _ in range(3)]
        some = [draw.choice(about)[:draw.randint(2, 20)] + sentence(draw, PARTS[2:]).split()
                for _ in range(1 + i % 6)]
        references[i] = some + [some[0][:1]] * (i % 29 == 0) + [[]] * (i % 31 == 0)
        candidates[i] = candidate(draw, i % 10, some)
    return dict(references=references, candidates=candidates)


def by_theirs(references: dict, candidates: dict) -> tuple[list[float], list[list[float]]]:
    """Return pycocoevalcap's six scores of the corpus, and those of each image."""
    golden = {i: [" ".join(words) for words in some] for i, some in references.items()}
    said = {i: [" ".join(words)] for i, words in candidates.items()}
    bleu, bleus = Bleu(4).compute_score(golden, said, verbose=0)
    rouge, rouges = Rouge().compute_score(golden, said)
    cider, ciders = Cider().compute_score(golden, said)
    return [float(x) for x in (*bleu, rouge, cider)], [list(map(float, row))
                                                       for row in zip(*bleus, rouges, ciders)]


def by_ours(references: dict, candidates: dict) -> tuple[list[float], list[list[float]]]:
    rouge, cider = (f(references, candidates) for f in (captions.rouge_l, captions.cider_d))
    each = [[*captions.bleu({i: references[i]}, {i: candidates[i]}), rouge[i], cider[i]] for i in references]
    return [*captions.bleu(references, candidates),
            *(sum(values.values()) / len(values) for values in (rouge, cider))], each


def docstrings(count: int) -> list[str]:
    found = set()
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                found.update(re.split(r"(?<=[.!?]) (?=[A-Z])", text))
    found = {one for one in found
             if 4 < len(one.split()) < 30 and one.isascii() and not re.search(r"[=_\\`|]|>>", one)}
    return random.Random(0).sample(sorted(found), min(count, len(found)))


def compare_words(what: str, texts: list[str]) -> float:
    theirs = PTBTokenizer().tokenize({i: [dict(caption=text)] for i, text in enumerate(texts)})
    kinds, equal = Counter(), 0
    for i, text in enumerate(texts):
        a, b = theirs[i][0].split(), captions.tokens(text)
        equal += a == b
        for tag, a0, a1, b0, b1 in SequenceMatcher(None, a, b, False).get_opcodes():
            if tag != "equal":
                kinds[f"{' '.join(a[a0:a1])} -> {' '.join(b[b0:b1])}"] += 1
    print(f"{what}: {equal:,} of {len(texts):,} are the same words, {100 * equal / len(texts):.1f}%")
    print("    theirs -> ours:", "; ".join(f"{kind} ({n})" for kind, n in kinds.most_common(25)))
    return equal / len(texts)


def main() -> None:
    cli.Parser(__doc__).parse_args()
    sets, found = make_sets(), {}
    for name, way in (("theirs", by_theirs), ("ours", by_ours)):
        started = time.time()
        found[name] = way(**sets)
        print(f"{name} {time.time() - started:.2f} s", [f"{x:.6f}" for x in found[name][0]])
    (theirs, each), (ours, mine) = found["theirs"], found["ours"]
    apart = [max(abs(a - b) for a, b in zip(x, y)) for x, y in zip([theirs, *each], [ours, *mine])]
    print(f"figures of the corpus {apart[0]:.1e} apart at most, of an image {max(apart[1:]):.1e}")
    assert max(apart) < 1e-6
    rounded = dict(corpus=[round(x, 9) for x in theirs], each=[[round(x, 9) for x in row] for row in each])
    text = json.dumps({name: list(rows.values()) for name, rows in sets.items()} | rounded)
    FIXTURE.write_text(text.replace("], [[", "],\n[[") + "\n")
    print(f"{FIXTURE}: {FIXTURE.stat().st_size:,} bytes")
    if shutil.which("java"):
        draw = random.Random(1)
        share = compare_words("captions", [sentence(draw, AWKWARD) for _ in range(1000)])
        compare_words("docstrings", docstrings(3000))
        assert share > 0.98, share


if __name__ == "__main__":
    cli.run(main)
