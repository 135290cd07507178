"""The emoji set: 7,572 pictures that come with the repository, every emoji of Unicode 16 in the
styles of Google (Noto) and Twitter (Twemoji), with one caption each and questions that Unicode's
metadata answers.

    python data.py build-emoji      # assets/emoji.tar.gz from two npm packages (needs npm, 140 MB)

Shapes: n pictures, P pixels a side.
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

import numpy as np
import torch
from torch import Tensor

from common.cli import UserError, require
from common.files import parse_json, replacing
from common.progress import Progress
from common.seeding import fraction
from dataset.images import fit_picture, read_picture
from dataset.questions import question_prompt
from dataset.sources import Source, Tars, described, text
from dataset.webdataset import Tar

TAR = Path(__file__).parents[1] / "assets" / "emoji.tar.gz"
STYLES = {"noto": "google", "twemoji": "twitter"}       # our word in captions: the npm package's
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark",
         "1F3FF": "dark"}
NOUNS = {                       # a kind of thing, and how a yes/no question names it
    "smileys & emotion": "a smiley", "people & body": "a person or a body part",
    "animals & nature": "an animal or a plant", "food & drink": "food or drink",
    "travel & places": "a place or a vehicle", "activities": "an activity", "objects": "an object",
    "symbols": "a symbol", "flags": "a flag", "component": "a skin tone swatch",
}
ASKED = {                       # what is asked about each image, in these words
    "name": ["What is this?", "What is this called?", "What does the picture show?"],
    "kind": ["What kind of thing is this?", "What category is it in?"],
    "group": ["Which group does it belong to?", "What group is it in?"],
    "tone": ["What is the skin tone?", "Which skin tone does it have?"],
    "style": ["Which style is it drawn in?", "What style is this?"],
}
YES_NO = ["Is this {}?", "Does this show {}?", "Can you see {} here?"]
SPLITS = ["train", "tone", "style"]
FIELDS = ["key", "caption", "name", "emoji", "kind", "group", "tone", "style", "split"]
# What a person might call it: a noun, and two patterns of "kind/group/name": where it is true, and
# where nobody could say (there it is never asked).  Nouns close to each other stand together.
SORTS = [
    ("a person", r"/person(?! symbol| fantasy)[^/]*/(?!(men|women|wrestlers|sleep|bath|horse r))",
     r"^(people|smileys|component)|snow|statue|doll|mens$|children|pedestrian|baby|wheelchair|joker"),
    ("a man", r"/person[^/]*/(deaf |older |pregnant )?man\b(?! and)",
     r"^(people & body/(?!person[^/]*/.*\bwoman\b)|smileys|component)|snow|doll|mens$|joker|pedestrian"),
    ("a woman", r"/person[^/]*/(deaf |older |pregnant )?woman\b(?! and)",
     r"^(people & body/(?!person[^/]*/.*\bman\b)|smileys|component)|doll|womens$|statue|pedestrian"),
    ("a child", r"/person/(boy|girl|child|baby)$",
     r"/(family|person symbol|person fantasy|hand|body)|^(smileys|component)|child|baby|student|doll|breast"),
    ("a hand", r"^people & body/hand(?! prop)", r"^people|hand|glove|hamsa|^component|palm|smileys"),
    ("a face", r"^smileys & emotion/(face (?!costume)|cat face|monkey face)(?!.*skull)",
     r"^(people|smileys|animals|component)|face|doll|mask|jack|moyai|nose|moon|coin|medal"),
    ("an animal", r"/animal (?!.*(feather|wing$|print|nose|coral|shell|microbe|web|dragon|phoenix))",
     r"/animal|monkey|cat |horse|fish|shrimp|bear|mouse|carp|mer(man|maid|person)|poultry|meat|zodiac"),
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
    ("clothing", r"/clothing/.*(shoe|boots?|hat|coat|jeans|dress|shorts|socks|scarf|gloves|necktie|kimono"
     r"|sari|briefs|bikini|swimsuit|sandal|billed cap|vest|clothes|t-shirt)s?$",
     r"^(people|smileys)|/clothing|shirt|uniform|glove|mask|skate|boot|thread|snow"),
    ("a tool", r"/tool/(axe|carpentry saw|clamp|hammer.*|pick|screwdriver|shovel|wrench)$",
     r"^(people|objects)|/dishware|pole|magic|paddle"),
    ("a musical instrument", r"/musical instrument/", r"^people|/(music|sound)|bell|horn|chime|keyboard"),
    ("a clock", r"/clock face|/alarm clock|/mantelpiece clock", r"/time|watch|clock|compass"),
    ("a vehicle", r"/transport (ground/(ambulance|articulated|auto|bus$|delivery|fire|minibus|motorcycle"
     r"|oncoming|pickup|police car$|racing|recreational|taxi|tractor|trolleybus)"
     r"|air/(helicopter|airplane|small|rocket)|water/(canoe|ferry|motor|passenger|sailboat|ship|speed))",
     r"^people|/transport|sled|trolley|wheel|car"),
    ("a building", r"/place (building/(bank|.*castle|.*post|classical|convenience|department|derelict|factory"
     r"|hospital|hotel|house|hut|love|office|school)|religious/(?!kaaba))",
     r"/place|/household|station|room"),
    ("a flag", r"^flags/", r"flag|streamer|sash"),
    ("an arrow", r"/arrow/", r"^symbols|arrow|chart|pointing"),
    ("a heart", r"/heart/(?!love letter)", r"heart|love|card|^symbols"),
]


def plain_name(name: str) -> str:
    """Return Unicode's name in lower case without colons, "X Flag" as "flag of X"."""
    if name.endswith(" Flag"):
        return "flag of " + name.removesuffix(" Flag")
    name = name.lower()
    head, _, tail = name.partition(": ")
    if tail and head in ("family", "kiss", "couple with heart"):
        return f"{head} of {' and '.join(tail.rsplit(', ', 1))}"
    if tail and head in ("man", "woman", "person"):
        return f"{head} with {tail}"
    return name.replace(":", "")


def short_names(entries: list[dict]) -> dict[str, str]:
    """Return a short, natural and unique name for every base emoji, by its codepoints.

    It is the plain name without "sign" and "symbol" at its end. Where two emoji would share it, it
    is the plain name, and else the data set's own short name."""
    choices = {}
    for entry in entries:
        plain = plain_name(entry["name"])
        choices[entry["unified"]] = [plain.removesuffix(" sign").removesuffix(" symbol"), plain]
    counts = Counter(name for names in choices.values() for name in set(names))
    result = {}
    for entry in entries:
        spare = entry["short_name"].replace("_", " ").replace("-", " ")
        unique = [name for name in choices[entry["unified"]] if counts[name] == 1]
        result[entry["unified"]] = [*unique, spare][0]
    return result


def split_of(record: dict) -> str:
    held_style = "noto" if fraction("which style of " + record["emoji"]) >= 0.5 else "twemoji"
    if record["style"] == held_style and fraction("style of " + record["emoji"]) < 0.05:
        return "style"
    if record["tone"] != "none" and fraction("tone of " + record["key"]) < 0.10:
        return "tone"
    return "train"


def describe(entries: list[dict]) -> list[dict]:
    """Return one record for each image: key, image file, style, caption, metadata, split."""
    names = short_names(entries)
    records = []
    for entry in entries:
        name = names[entry["unified"]]
        variants = {"": entry} | entry.get("skin_variations", {})
        for tone_code, variant in variants.items():
            tones = dict.fromkeys(TONES[code] for code in tone_code.split("-") if code)
            tone = " and ".join(tones)
            caption = f"{name}, {tone} skin tone" if tones else name
            if len(tones) > 1:
                caption += "s"
            for style, package in STYLES.items():
                if variant[f"has_img_{package}"]:
                    record = dict(
                        key=f"{Path(variant['image']).stem}-{style}", image=variant["image"],
                        style=style, emoji=entry["unified"], name=name, tone=tone or "none",
                        kind=entry["category"].lower(),
                        group=entry["subcategory"].replace("-", " "),
                        caption=f"{caption}, {style} style")
                    record["split"] = split_of(record)
                    records.append(record)
    return records


def article(name: str) -> str:
    """A name as it stands in a question: "a taco", "an ox", "the flag of Chad", and what is many as
    it is."""
    if re.search(r"^(people|men|women|two) |(?<![suia])s$", name):
        return name
    return ("the " if name.startswith("flag of") else "an " if name[0] in "aeio" else "a ") + name


@cache
def sorts(kind: str, group: str, name: str) -> tuple[list[str], list[str]]:
    """The nouns of SORTS that are true of such an emoji, and those that are false, in the table's
    order."""
    text, true, false = f"{kind}/{group}/{name}", [], []
    for noun, yes, unclear in SORTS:
        if re.search(yes, text):
            true.append(noun)
        elif not re.search(unclear, text):
            false.append(noun)
    return true, false


def rivals(names: list[str]) -> dict[str, list[str]]:
    """Return for each name of a group the others that nobody would give to the same emoji.

    Two names may both be right when one has all words of the other (singer, man singer; words are
    compared by three letters) or says less about who it is (bicyclist, man biking): such pairs are
    left out."""
    words = {name: {word[:3] for word in re.findall(r"\w+", name.lower())} for name in names}
    gendered = [name for name in names if re.search(r"\b(wo)?m[ae]n\b", name)]
    others = defaultdict(list)
    for name, other in itertools.permutations(names, 2):
        nested = words[name] <= words[other] or words[other] <= words[name]
        if not nested and (name in gendered) == (other in gendered):
            others[name].append(other)
    return others


def ask(records: list[dict]) -> None:
    """Give each record its "questions": dicts of type, question and answer, several phrasings of
    each.

    Every answer follows from the record's name, kind, group, tone and style. As many questions
    about an image are answered yes as no, in the same phrasings, so that always-yes scores a
    half."""
    groups = defaultdict(set)
    for record in records:
        groups[record["kind"], record["group"]].add(record["name"])
    others = {group: rivals(sorted(names)) for group, names in groups.items()}
    nouns = [noun for noun, _, _ in SORTS]
    for record in records:
        def pick(purpose: str, choices: list[str]) -> str:
            return choices[int(fraction(f"{purpose} {record['key']}") * len(choices))]

        kind, group, name = record["kind"], record["group"], record["name"]
        questions = []
        for field, ways in ASKED.items():
            questions += [dict(type=field, question=way, answer=record[field]) for way in ways]
        other_kind = pick("not", [other for other in NOUNS if other != kind])
        pairs = [("kind", NOUNS[kind], NOUNS[other_kind])]
        if near := others[kind, group][name]:
            pairs.append(("name", article(name), article(pick("other", near))))
        true, false = sorts(kind, group, name)
        # a true noun is asked against one that is near in the table (man, woman), and against any
        for noun in true if false else []:
            near = min(false, key=lambda other: abs(nouns.index(other) - nouns.index(noun)))
            pairs += [("sort", noun, near), ("sort", noun, pick(f"no {noun}", false))]
        for n, (field, right, wrong) in enumerate(pairs):
            for way in YES_NO if field == "name" else [pick(f"way {n}", YES_NO)]:
                for thing, answer in ((right, "yes"), (wrong, "no")):
                    question = way.format(thing)
                    questions.append(dict(type=f"yes/no {field}", question=question, answer=answer))
        record["questions"] = questions


def fetch_packages(folder: str) -> tuple[list[dict], dict[tuple[str, str], bytes]]:
    """Return the entries of the two npm packages and, by style and file name, their images."""
    require((shutil.which("npm"),
             "npm was not found: install Node.js, or use the committed assets/emoji.tar.gz"))
    images = {}
    for style, package in STYLES.items():
        name = f"emoji-datasource-{package}"
        print(f"fetching {name}", flush=True)
        command = ["npm", "pack", "--loglevel", "error", f"{name}@16.0.0"]
        status = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode
        require((status == 0, f"npm pack {name} failed: is the npm registry within reach?"))
        with tarfile.open(f"{folder}/{name}-16.0.0.tgz") as tar:
            entries = json.load(tar.extractfile("package/emoji.json"))
            for member in tar:
                if member.name.startswith(f"package/img/{package}/64/"):
                    images[style, Path(member.name).name] = tar.extractfile(member).read()
    return entries, images


def build(out: Path = TAR) -> None:
    """Write the emoji tar, bit for bit the same each time, from the two npm packages."""
    with tempfile.TemporaryDirectory() as folder:
        entries, images = fetch_packages(folder)
    records = sorted(describe(entries), key=lambda r: hashlib.sha256(r["key"].encode()).digest())
    counts = Counter(r["split"] for r in records)
    progress = Progress("images", len(records))
    with replacing(out) as temporary, open(temporary, "wb") as file, \
            gzip.GzipFile("", "wb", 9, file, mtime=0) as packed, \
            tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for n, record in enumerate(records):
            image = read_picture(images[record["style"], record.pop("image")])
            webp = io.BytesIO()
            image.save(webp, "WEBP", lossless=True, quality=75, method=4)
            text = json.dumps(record, ensure_ascii=False, indent=1).encode()
            for extension, content in (("webp", webp.getvalue()), ("json", text)):
                member = tarfile.TarInfo(f"{record['key']}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            progress.update(n)
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, splits {dict(counts)}")


def load(path: Path | Tar = TAR, pixels: int = 64) -> tuple[list[dict], Tensor]:
    """Return every record of the emoji tar, with questions, and the images as uint8 (n, 3, P,
    P)."""
    records, images = [], []
    tar = path if isinstance(path, Tar) else Tar(str(path))
    for key, files in tar:
        where = f"{tar.path}: {key}"
        require(({"webp", "json"} <= files.keys(), f"{where}: expected a webp and a json"))
        record = parse_json(files["json"], where)
        described(record, where)                                 # checks that it is an object
        records.append({name: text(record.get(name), where, name) for name in FIELDS})
        images.append(np.array(fit_picture(read_picture(files["webp"], where), pixels)))
    ask(records)
    return records, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def split_named(name: str) -> str:
    """"tone" of "tone" or "emoji:tone".  Raises UserError."""
    split = name.removeprefix("emoji:")
    require((split in SPLITS, f"{name}: the emoji set has the splits {', '.join(SPLITS)}"))
    return split


def of_split(records: list[dict], *splits: str) -> list[int]:
    """Return the places of the records of some splits, in the tar's order, which is random."""
    return [i for i, record in enumerate(records) if record["split"] in splits]


def texts(records: list[dict]) -> list[str]:
    """Every text of the emoji set, in the pieces in which it is tokenized."""
    result = [record["caption"] for record in records]
    for record in records:
        for pair in record["questions"]:
            result += [question_prompt(pair["question"]), pair["answer"]]
    return result


def is_emoji(source) -> bool:
    """Tell the emoji tar by its first sample."""
    if not isinstance(source, Tars) or len(source.tars) > 1:
        return False
    _, files = source.tars[0][0]
    try:
        return set(FIELDS) <= parse_json(files["json"], "").keys()
    except (UserError, KeyError, AttributeError):
        return False                                             # the first read says what is wrong


class Emoji(Source):
    """The set as a source (data.Mix).

    An epoch takes each emoji in each style once, its skin tone drawn anew, so that it shows a red
    apple as often as a farmer, who comes in six skin tones; with `each` it takes each image
    once."""

    def __init__(self, tar: Tar, pixels: int, each: bool = False):
        self.name = tar.path
        self.records, self.pictures = load(tar, pixels)
        self.every = of_split(self.records, "train")
        require((self.every, f"{tar.path}: no sample of this tar is in the split \"train\""))
        self.held = of_split(self.records, "tone", "style")
        groups = defaultdict(list)
        for i in self.every:
            record = self.records[i]
            groups[i if each else (record["emoji"], record["style"])].append(i)
        self.groups = list(groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    def choose(self, place: int, chance: float) -> int:
        group = self.groups[place]
        return group[int(chance * len(group))]

    def __getitem__(self, i: int) -> dict:
        record = self.records[i]
        return dict(key=record["key"], picture=self.pictures[i], captions=[record["caption"]],
                    questions=record["questions"])

    def texts(self) -> list[str]:
        return texts(self.records)
