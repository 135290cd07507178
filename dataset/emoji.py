"""The emoji set: 7,572 images that come with the repository.

It has every emoji of Unicode 16 in the styles of Google (Noto) and Twitter (Twemoji).  Each image
has one caption, and questions with answers from Unicode's metadata.

    python data.py build-emoji      # assets/emoji.tar.gz from two npm packages (needs npm, 136 MB)

Shapes: n images, P pixels a side.
"""

import gzip
import hashlib
import io
import itertools
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from common.cli import UserError, require
from common.files import parse_json, replacing
from common.seeding import fraction
from dataset.images import fit_image, image_pixels, read_image
from dataset.sources import Source, described, text, texts_in
from dataset.webdataset import Tar

TAR = Path(__file__).parents[1] / "assets" / "emoji.tar.gz"
STYLES = {"noto": "google", "twemoji": "twitter"}       # word in captions: name in npm packages
TONES = {"": "none", "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium",
         "1F3FE": "medium-dark", "1F3FF": "dark"}
SPLITS = ["train", "tone", "style"]
FIELDS = ["key", "caption", "name", "emoji", "kind", "group", "tone", "style", "split"]
FIELD_QUESTIONS = {             # phrasings of the question that a field answers
    "name": ["What is this?", "What is this called?", "What does the picture show?"],
    "kind": ["What kind of thing is this?", "What category is it in?"],
    "group": ["Which group does it belong to?", "What group is it in?"],
    "tone": ["What is the skin tone?", "Which skin tone does it have?"],
    "style": ["Which style is it drawn in?", "What style is this?"],
}
YES_NO = ["Is this {}?", "Does this show {}?", "Can you see {} here?"]
NOUNS = {                       # a kind -> its noun in yes/no questions
    "smileys & emotion": "a smiley", "people & body": "a person or a body part",
    "animals & nature": "an animal or a plant", "food & drink": "food or drink",
    "travel & places": "a place or a vehicle", "activities": "an activity", "objects": "an object",
    "symbols": "a symbol", "flags": "a flag", "component": "a skin tone swatch",
}
# Everyday nouns, each with two regexes on "kind/group/name".  The first matches emoji for which the
# noun is true; the second, emoji for which this is unclear, so that no question uses the noun.
# Similar nouns are neighbours.
SORTS = [
    ("a person", r"/person(?! symbol| fantasy)[^/]*/(?!(men|women|wrestlers|sleep|bath|horse r))",
     r"^(people|smileys|component)|snow|statue|doll|mens$|children|pedestrian|baby|wheelchair"
     r"|joker"),
    ("a man", r"/person[^/]*/(deaf |older |pregnant )?man\b(?! and)",
     r"^(people & body/(?!person[^/]*/.*\bwoman\b)|smileys|component)|snow|doll|mens$|joker"
     r"|pedestrian"),
    ("a woman", r"/person[^/]*/(deaf |older |pregnant )?woman\b(?! and)",
     r"^(people & body/(?!person[^/]*/.*\bman\b)|smileys|component)|doll|womens$|statue"
     r"|pedestrian"),
    ("a child", r"/person/(boy|girl|child|baby)$",
     r"/(family|person symbol|person fantasy|hand|body)|^(smileys|component)|child|baby|student"
     r"|doll|breast"),
    ("a hand", r"^people & body/hand(?! prop)",
     r"^people|hand|glove|hamsa|^component|palm|smileys"),
    ("a face", r"^smileys & emotion/(face (?!costume)|cat face|monkey face)(?!.*skull)",
     r"^(people|smileys|animals|component)|face|doll|mask|jack|moyai|nose|moon|coin|medal"),
    ("an animal",
     r"/animal (?!.*(feather|wing$|print|nose|coral|shell|microbe|web|dragon|phoenix))",
     r"/animal|monkey|cat |horse|fish|shrimp|bear|mouse|carp|mer(man|maid|person)|poultry|meat"
     r"|zodiac"),
    ("a bird", r"/animal bird/(?!feather|wing$|phoenix)", r"/animal bird|poultry|egg|nest|dragon"),
    ("a bug", r"/animal bug/(?!microbe|spider web|snail|worm)", r"/animal bug|cricket|scorp"),
    ("a plant", r"/plant (?!.*(nest|rosette|mushroom|fallen|bouquet))",
     r"/plant|/food (fruit|vegetable)|tree|flower|pine|coral|wood|rice|garden|beach|island"),
    ("a flower", r"/plant flower/(?!rosette)", r"/plant|flower|lotus|fleur"),
    ("a fruit", r"/food fruit/(?!olive|tomato|coconut)", r"/food (fruit|vegetable)|cake|drink"),
    ("a vegetable", r"/food vegetable/(?!avocado|brown|chestnut|peanuts|beans|ginger|garlic)",
     r"/food (fruit|vegetable)|salad|potato|fries|/plant|curry|bento|pot of|taco"),
    ("food", r"/food ", r"^food|/plant|/animal (marine|bird)|fish|egg|rice|pig|cow"),
    ("a drink", r"/drink/(?!ice cube|teapot|baby bottle|pouring|bottle with)",
     r"/(drink|dishware|food (fruit|sweet))/|water|droplet|pot of|bowl|bottle"),
    ("clothing",
     r"/clothing/.*(shoe|boots?|hat|coat|jeans|dress|shorts|socks|scarf|gloves|necktie|kimono|sari"
     r"|briefs|bikini|swimsuit|sandal|billed cap|vest|clothes|t-shirt)s?$",
     r"^(people|smileys)|/clothing|shirt|uniform|glove|mask|skate|boot|thread|snow"),
    ("a tool", r"/tool/(axe|carpentry saw|clamp|hammer.*|pick|screwdriver|shovel|wrench)$",
     r"^(people|objects)|/dishware|pole|magic|paddle"),
    ("a musical instrument", r"/musical instrument/",
     r"^people|/(music|sound)|bell|horn|chime|keyboard"),
    ("a clock", r"/clock face|/alarm clock|/mantelpiece clock", r"/time|watch|clock|compass"),
    ("a vehicle",
     r"/transport (ground/(ambulance|articulated|auto|bus$|delivery|fire|minibus|motorcycle"
     r"|oncoming|pickup|police car$|racing|recreational|taxi|tractor|trolleybus)"
     r"|air/(helicopter|airplane|small|rocket)"
     r"|water/(canoe|ferry|motor|passenger|sailboat|ship|speed))",
     r"^people|/transport|sled|trolley|wheel|car"),
    ("a building",
     r"/place (building/(bank|.*castle|.*post|classical|convenience|department|derelict|factory"
     r"|hospital|hotel|house|hut|love|office|school)|religious/(?!kaaba))",
     r"/place|/household|station|room"),
    ("a flag", r"^flags/", r"flag|streamer|sash"),
    ("an arrow", r"/arrow/", r"^symbols|arrow|chart|pointing"),
    ("a heart", r"/heart/(?!love letter)", r"heart|love|card|^symbols"),
]


# ------------------------------------------------------------------ records from Unicode's metadata

def plain_name(name: str) -> str:
    """Return Unicode's name in lower case, in everyday words."""
    if name.endswith(" Flag"):
        return "flag of " + name.removesuffix(" Flag")
    name = re.sub("( symbol)?( sign)?$", "", name.lower())
    name = re.sub("^(man|woman|person): ", r"\1 with ", name)           # "man: beard"
    name = re.sub("(.*): (.*), ", r"\1 of \2 and ", name)               # "family: man, girl, boy"
    return name.replace(":", "")


def unique_names(entries: list[dict]) -> list[str]:
    """Return the plain name of each emoji; for emoji that share one, the package's short name."""
    names = [plain_name(entry["name"]) for entry in entries]
    counts = Counter(names)
    for i, name in enumerate(names):
        if counts[name] > 1:
            names[i] = entries[i]["short_name"].replace("_", " ")
    return names


def caption_of(name: str, tone: str, style: str) -> str:
    """Return a caption, for example "waving hand, dark skin tone, noto style"."""
    if tone == "none":
        return f"{name}, {style} style"
    plural = "s" if " and " in tone else ""
    return f"{name}, {tone} skin tone{plural}, {style} style"


def image_key(file: str, style: str) -> str:
    return f"{Path(file).stem}-{style}"


def split_of(record: dict) -> str:
    """Return the split of a record: "style" for 5 % of the emoji, in one of their styles; "tone"
    for 10 % of the other images with a skin tone; else "train".

    Hashes decide, so splits never change."""
    held_style = "twemoji"
    if fraction("which style of " + record["emoji"]) >= 0.5:
        held_style = "noto"
    if record["style"] == held_style and fraction("style of " + record["emoji"]) < 0.05:
        return "style"
    if record["tone"] != "none" and fraction("tone of " + record["key"]) < 0.10:
        return "tone"
    return "train"


def describe(entries: list[dict]) -> list[dict]:
    """Return a record for each image: its key, metadata, caption and split."""
    records = []
    for entry, name in zip(entries, unique_names(entries)):
        variants = {"": entry} | entry.get("skin_variations", {})
        for tone_codes, variant in variants.items():
            tones = dict.fromkeys(map(TONES.get, tone_codes.split("-")))    # for one or two people
            tone = " and ".join(tones)
            for style, package in STYLES.items():
                if not variant[f"has_img_{package}"]:
                    continue
                record = dict(key=image_key(variant["image"], style), style=style,
                              emoji=entry["unified"], name=name, tone=tone,
                              kind=entry["category"].lower(),
                              group=entry["subcategory"].replace("-", " "),
                              caption=caption_of(name, tone, style))
                record["split"] = split_of(record)
                records.append(record)
    return records


# --------------------------------------------------------------------------------- building the tar

def fetch_packages(folder: str) -> tuple[list[dict], dict[str, bytes]]:
    """Return the metadata entries of the npm packages, and the image files' bytes by `image_key`.

    Raises UserError if npm is missing or fails."""
    require((shutil.which("npm"),
             "npm was not found: install Node.js, or use the committed assets/emoji.tar.gz"))
    images = {}
    for style, package in STYLES.items():
        name = f"emoji-datasource-{package}"
        print(f"fetching {name}; encoding both takes a few minutes", flush=True)
        command = ["npm", "pack", "--loglevel", "error", f"{name}@16.0.0"]
        status = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode
        require((status == 0, f"npm pack {name} failed: is the npm registry within reach?"))
        with tarfile.open(f"{folder}/{name}-16.0.0.tgz") as tar:
            entries = json.load(tar.extractfile("package/emoji.json"))     # the same in both
            for member in tar:
                if member.name.startswith(f"package/img/{package}/64/"):
                    images[image_key(member.name, style)] = tar.extractfile(member).read()
    return entries, images


def build(out: Path = TAR) -> None:
    """Write the emoji tar from the npm packages, with the same bytes each time.

    The order of the samples is random but fixed: they are sorted by the hash of their key."""
    with tempfile.TemporaryDirectory() as folder:
        entries, images = fetch_packages(folder)
    records = describe(entries)
    records.sort(key=lambda record: hashlib.sha256(record["key"].encode()).digest())
    with replacing(out) as temporary, open(temporary, "wb") as file, \
            gzip.GzipFile("", "wb", 9, file, mtime=0) as packed, \
            tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            webp = io.BytesIO()
            image = read_image(images[record["key"]])
            image.save(webp, "WEBP", lossless=True, quality=75, method=4)
            add_file(tar, f"{record['key']}.webp", webp.getvalue())
            content = json.dumps(record, ensure_ascii=False, indent=1)
            add_file(tar, f"{record['key']}.json", content.encode())
    print(f"{out}: {len(records):,} images, {out.stat().st_size / 2**20:.1f} MiB")


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


# ---------------------------------------------------------------------------------------- questions

def article(name: str) -> str:
    """Return a name with its article: "a taco", "an ox", "the flag of Chad"; none for plurals."""
    if re.search(r"^(people|men|women|two) |(?<![suia])s$", name):
        return name
    if name.startswith("flag of"):
        return f"the {name}"
    if name[0] in "aeio":
        return f"an {name}"
    return f"a {name}"


@cache
def match_sorts(description: str) -> tuple[list[int], list[int]]:
    """Return the rows of SORTS that are true for a "kind/group/name", and those that are false."""
    true, false = [], []
    for row, (_, where_true, where_unclear) in enumerate(SORTS):
        if re.search(where_true, description):
            true.append(row)
        elif not re.search(where_unclear, description):
            false.append(row)
    return true, false


def rivals(names: list[str]) -> dict[str, list[str]]:
    """Return for each name in a group the other names that are certainly wrong for its emoji.

    Two names may both be right if one contains all words of the other (singer, man singer), or if
    only one tells the gender (bicyclist, man biking): these pairs are left out.  Words are compared
    by their first three letters."""
    words = {name: {word[:3] for word in re.findall(r"\w+", name.lower())} for name in names}
    gendered = {name: bool(re.search(r"\b(wo)?m[ae]n\b", name)) for name in names}
    others = defaultdict(list)
    for name, other in itertools.permutations(names, 2):
        nested = words[name] <= words[other] or words[other] <= words[name]
        if not nested and gendered[name] == gendered[other]:
            others[name].append(other)
    return others


def add_questions(records: list[dict]) -> None:
    """Add "questions" to each record, dicts with "type", "question" and "answer".

    Every answer follows from the record's name, kind, group, tone and style."""
    groups = defaultdict(set)
    for record in records:
        groups[record["group"]].add(record["name"])
    others = {group: rivals(sorted(names)) for group, names in groups.items()}
    for record in records:
        wrong_names = others[record["group"]][record["name"]]
        record["questions"] = [*field_questions(record), *yes_no_questions(record, wrong_names)]


def field_questions(record: dict) -> Iterator[dict]:
    for field, phrasings in FIELD_QUESTIONS.items():
        for question in phrasings:
            yield dict(type=field, question=question, answer=record[field])


def yes_no_questions(record: dict, wrong_names: list[str]) -> Iterator[dict]:
    """Yield yes/no questions, equally many with each answer and in the same phrasings, so that a
    model that always answers yes scores one half."""
    for n, (field, *nouns) in enumerate(contrasts(record, wrong_names)):
        phrasings = YES_NO
        if field != "name":
            phrasings = [pick(f"way {n}", record, YES_NO)]
        for phrasing in phrasings:
            for noun, answer in zip(nouns, ("yes", "no")):
                question = phrasing.format(noun)
                yield dict(type=f"yes/no {field}", question=question, answer=answer)


def contrasts(record: dict, wrong_names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (type of question, a noun that is true for the image, one that is false)."""
    kind, name = record["kind"], record["name"]
    wrong_kind = pick("not", record, [other for other in NOUNS if other != kind])
    yield "kind", NOUNS[kind], NOUNS[wrong_kind]
    if wrong_names:
        yield "name", article(name), article(pick("other", record, wrong_names))
    true, false = match_sorts(f"{kind}/{record['group']}/{name}")
    if not false:
        return
    for row in true:
        noun = SORTS[row][0]
        similar = min(false, key=lambda other: abs(other - row))         # for example man, woman
        yield "sort", noun, SORTS[similar][0]
        yield "sort", noun, SORTS[pick(f"no {noun}", record, false)][0]


def pick(purpose: str, record: dict, choices: list):
    """Return one of the choices; a hash of the purpose and the record's key decides which."""
    return choices[int(fraction(f"{purpose} {record['key']}") * len(choices))]


# ------------------------------------------------------------------------------------------ reading

def load(path: Path | Tar = TAR, pixels: int = 64) -> tuple[list[dict], Tensor]:
    """Read the emoji tar: all records, with questions, and the images (n, 3, P, P) uint8.

    Raises UserError for a tar of other content."""
    tar = path
    if isinstance(path, Path):
        tar = Tar(str(path))
    records, images = [], []
    for key, files in tar:
        where = f"{tar.path}: {key}"
        require(({"webp", "json"} <= files.keys(), f"{where}: expected a webp and a json"))
        record = parse_json(files["json"], where)
        described(record, where)                                 # checks that it is an object
        record = {name: text(record.get(name), where, name) for name in FIELDS}
        require((record["kind"] in NOUNS and record["name"],
                 f"{where}: expected a name, and a kind of the emoji set"))
        records.append(record)
        image = read_image(files["webp"], where)
        images.append(image_pixels(fit_image(image, pixels)))
    add_questions(records)
    return records, torch.stack(images)


def split_named(name: str) -> str:
    """Return a split's name without the prefix "emoji:".  Raises UserError for an unknown split."""
    split = name.removeprefix("emoji:")
    require((split in SPLITS, f"{name}: the emoji set has the splits {', '.join(SPLITS)}"))
    return split


def of_split(records: list[dict], *splits: str) -> list[int]:
    """Return the indices of the records of these splits, in the tar's order, which is random."""
    return [i for i, record in enumerate(records) if record["split"] in splits]


def texts(records: list[dict]) -> list[str]:
    """Return every text of the emoji set; questions and answers apart, as they are tokenized."""
    result = [record["caption"] for record in records]
    for record in records:
        result += texts_in(dict(questions=record["questions"]))
    return result


def is_emoji(source) -> bool:
    """Return True for a source of one tar, if its first sample has the emoji set's fields."""
    if len(source.tars) > 1:
        return False
    _, files = source.tars[0][0]
    try:
        return set(FIELDS) <= parse_json(files["json"], "").keys()
    except (UserError, KeyError, AttributeError):
        return False                            # reading this sample will report the error


class Emoji(Source):
    """The emoji set as a source of `data.Mix`; only its split "train" is trained on.

    An epoch has each emoji once in each style, in a skin tone that is drawn anew each epoch: a
    farmer in six skin tones is as frequent as a red apple.  With `each` it has each image once."""

    def __init__(self, tar: Tar, pixels: int, each: bool = False):
        self.name = tar.path
        self.records, self.images = load(tar, pixels)
        self.every = of_split(self.records, "train")
        require((self.every, f"{tar.path}: no sample of this tar is in the split \"train\""))
        self.held = of_split(self.records, "tone", "style")
        groups = defaultdict(list)
        for i in self.every:
            record = self.records[i]
            group = record["emoji"], record["style"]
            if each:
                group = i
            groups[group].append(i)
        self.groups = list(groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    def choose(self, row: int, chance: float) -> int:
        """Return the index of the image at a row of an epoch; chance in [0, 1) picks the tone."""
        group = self.groups[row]
        return group[int(chance * len(group))]

    def __getitem__(self, i: int) -> dict:
        record = self.records[i]
        return dict(key=record["key"], image=self.images[i].clone(), captions=[record["caption"]],
                    questions=record["questions"])

    def texts(self) -> list[str]:
        return texts(self.records)
