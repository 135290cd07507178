"""The emoji set: 7,572 pictures that come with the repository, every emoji of Unicode 16 in the styles of
Google (Noto) and Twitter (Twemoji), with one caption each and questions that Unicode's metadata answers.

    python emoji.py                 # rebuild assets/emoji.tar.gz from two npm packages (needs npm, 140 MB)

Shapes: n pictures, P pixels a side.
"""

import cli
cli.interruptible(__name__)

import gzip
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cli import UserError, require
from files import parse_json
from data import fraction, question_prompt
from pictures import fit_picture, read_picture
from sources import Tars, text
from tars import Tar

TAR = Path(__file__).parent / "assets" / "emoji.tar.gz"
STYLES = {"noto": "google", "twemoji": "twitter"}       # our word in captions: the npm package's and folder's
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark",
         "1F3FF": "dark"}
NOUNS = {                                               # a kind of thing, and how a yes/no question names it
    "smileys & emotion": "a smiley", "people & body": "a person or a body part",
    "animals & nature": "an animal or a plant", "food & drink": "food or drink",
    "travel & places": "a place or a vehicle", "activities": "an activity", "objects": "an object",
    "symbols": "a symbol", "flags": "a flag", "component": "a skin tone swatch",
}
ASKED = {                                               # what is asked about each picture, in these words
    "name": ["What is this?", "What is this called?", "What does the picture show?"],
    "kind": ["What kind of thing is this?", "What category is it in?"],
    "group": ["Which group does it belong to?", "What group is it in?"],
    "tone": ["What is the skin tone?", "Which skin tone does it have?"],
    "style": ["Which style is it drawn in?", "What style is this?"],
}
YES_NO = ["Is this {}?", "Does this show {}?", "Can you see {} here?"]
SPLITS = ["train", "tone", "style"]
FIELDS = ["key", "caption", "name", "emoji", "kind", "group", "tone", "style", "split"]
# What a person might call it: a noun, and two patterns of "kind/group/name", where it is true and where
# nobody could say (there it is never asked).  Nouns that are close to each other stand together.
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


def short_names(entries: list[dict]) -> dict[str, str]:
    """A short, natural and unique name for every base emoji, by its codepoints.

    Unicode's name in lower case, "sign" and "symbol" at its end and colons taken out, "X flag" as "flag of
    X".  Where two emoji would share a name, the data set's own short name is used."""
    def plain(name: str) -> str:
        if name.endswith(" Flag"):
            return "flag of " + name.removesuffix(" Flag")
        head, colon, tail = name.lower().partition(": ")
        *first, last = tail.split(", ")
        if colon and head in ("family", "kiss", "couple with heart"):
            return f"{head} of {', '.join(first)} and {last}"
        gendered = colon and head in ("man", "woman", "person")
        return f"{head} with {tail}" if gendered else name.lower().replace(":", "")

    short = {e["unified"]: plain(e["name"]).removesuffix(" sign").removesuffix(" symbol") for e in entries}
    taken = Counter(list(short.values()) + [plain(e["name"]) for e in entries
                                            if short[e["unified"]] != plain(e["name"])])
    names = {e["unified"]: short[e["unified"]] if taken[short[e["unified"]]] == 1 else plain(e["name"])
             for e in entries}
    taken = Counter(names.values())
    return {e["unified"]: names[e["unified"]] if taken[names[e["unified"]]] == 1
            else e["short_name"].replace("_", " ").replace("-", " ") for e in entries}


def describe(entries: list[dict]) -> list[dict]:
    """One record a picture: key, image file, style, caption, metadata, questions with answers, split."""
    names = short_names(entries)
    records = []
    for entry in entries:
        variants = {"": entry} | entry.get("skin_variations", {})
        for tone_code, variant in variants.items():
            tones = list(dict.fromkeys(TONES[code] for code in tone_code.split("-") if code))
            tone = " and ".join(tones) or "none"
            words = [names[entry["unified"]]] + [f"{tone} skin tone{'s' * (len(tones) > 1)}"] * bool(tones)
            for style, package in STYLES.items():
                if not variant[f"has_img_{package}"]:
                    continue
                records.append(dict(
                    key=f"{Path(variant['image']).stem}-{style}", image=variant["image"], style=style,
                    emoji=entry["unified"], name=names[entry["unified"]], tone=tone,
                    kind=entry["category"].lower(), group=entry["subcategory"].replace("-", " "),
                    caption=", ".join(words + [f"{style} style"])))
    for record in records:
        held_style = sorted(STYLES)[fraction("which style of " + record["emoji"]) < 0.5]
        styled = fraction("style of " + record["emoji"]) < 0.05 and record["style"] == held_style
        toned = record["tone"] != "none" and fraction("tone of " + record["key"]) < 0.10
        record["split"] = "style" if styled else "tone" if toned else "train"
    return records


def article(name: str) -> str:
    """A name as it stands in a question: "a taco", "an ox", "the flag of Chad", and what is many as it is."""
    if re.search(r"^(people|men|women|two) |(?<![suia])s$", name):
        return name
    return ("the " if name.startswith("flag of") else "an " if name[0] in "aeio" else "a ") + name


@cache
def sorts(kind: str, group: str, name: str) -> tuple[list[str], list[str]]:
    """The nouns of SORTS that are true of such an emoji, and those that are false, in the table's order."""
    text, true, false = f"{kind}/{group}/{name}", [], []
    for noun, yes, unclear in SORTS:
        if re.search(yes, text):
            true.append(noun)
        elif not re.search(unclear, text):
            false.append(noun)
    return true, false


def rivals(names: list[str]) -> dict[str, list[str]]:
    """For each name of a group the others that nobody would give to the same emoji.

    Two names may both be right when one has all words of the other (singer, man singer; words are compared by
    three letters) or says less about who it is (bicyclist, man biking): such pairs are left out."""
    words = {name: {word[:3] for word in re.findall(r"\w+", name.lower())} for name in names}
    gendered = {name: bool(re.search(r"\b(wo)?m[ae]n\b", name)) for name in names}
    return {mine: [name for name in names if gendered[name] == gendered[mine]
                   and not words[name] <= words[mine] and not words[mine] <= words[name]] for mine in names}


def ask(records: list[dict]) -> None:
    """Give each record its "questions": dicts of type, question and answer, several phrasings of each.

    Every answer follows from the record's name, kind, group, tone and style.  Of each picture as many
    questions are answered yes as no, in the same phrasings, so that always-yes scores a half."""
    groups = defaultdict(set)
    for record in records:
        groups[record["kind"], record["group"]].add(record["name"])
    others = {group: rivals(sorted(names)) for group, names in groups.items()}
    for record in records:
        chance = lambda what: fraction(f"{what} {record['key']}")
        pick = lambda what, choices: choices[int(chance(what) * len(choices))]
        questions = [dict(type=kind, question=question, answer=record[kind])
                     for kind, ways in ASKED.items() for question in ways]
        true, false = sorts(record["kind"], record["group"], record["name"])
        wrong = pick("not", [kind for kind in NOUNS if kind != record["kind"]])
        pairs = [("kind", NOUNS[record["kind"]], NOUNS[wrong])]
        if near := others[record["kind"], record["group"]][record["name"]]:
            pairs += [("name", article(record["name"]), article(pick("other", near)))]
        nouns = [noun for noun, _, _ in SORTS]
        for noun in true if false else []:      # against one that is near in the table (man, woman), and any
            near = min(false, key=lambda n: abs(nouns.index(n) - nouns.index(noun)))
            pairs += [("sort", noun, near), ("sort", noun, pick(f"no {noun}", false))]
        for n, (about, right, wrong) in enumerate(pairs):
            ways = YES_NO if about == "name" else [pick(f"way {n}", YES_NO)]
            questions += [dict(type=f"yes/no {about}", question=way.format(thing), answer=answer)
                          for way in ways for thing, answer in ((right, "yes"), (wrong, "no"))]
        record["questions"] = questions


def build(out: Path = TAR) -> None:
    """Write the emoji tar, bit for bit the same each time, from the two npm packages (`npm pack`)."""
    with tempfile.TemporaryDirectory() as folder:
        packages = {style: f"emoji-datasource-{package}@16.0.0" for style, package in STYLES.items()}
        print("fetching " + " and ".join(packages.values()), flush=True)
        try:
            subprocess.run(["npm", "pack", "--silent", *packages.values()], cwd=folder, check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        except FileNotFoundError:
            raise UserError("npm was not found: install Node.js, or use the committed assets/emoji.tar.gz")
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"npm pack failed ({reason}): is the npm registry within reach?")
        pictures, entries = {}, []
        for style, package in STYLES.items():
            wanted = f"package/img/{package}/64/"
            with tarfile.open(Path(folder) / f"emoji-datasource-{package}-16.0.0.tgz") as tar:
                for member in tar:
                    if member.name.startswith(wanted):
                        pictures[style, member.name.removeprefix(wanted)] = tar.extractfile(member).read()
                    elif member.name == "package/emoji.json":
                        entries = json.load(tar.extractfile(member))
    records = sorted(describe(entries), key=lambda r: hashlib.sha256(r["key"].encode()).digest())
    if len({r["caption"] for r in records}) != len(records):
        raise RuntimeError("two pictures share a caption")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    with open(temporary, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed, \
            tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for n, record in enumerate(records, 1):
            picture = io.BytesIO()
            image = record.pop("image")
            read_picture(pictures[record["style"], image]).save(picture, "WEBP", lossless=True, quality=75,
                                                                method=4)
            text = json.dumps(record, ensure_ascii=False, indent=1).encode()
            for extension, content in (("webp", picture.getvalue()), ("json", text)):
                member = tarfile.TarInfo(f"{record['key']}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            if n % 500 == 0 or n == len(records):
                print(f"\r{n}/{len(records)} pictures", end="", flush=True)
    temporary.replace(out)
    counts = Counter(r["split"] for r in records)
    print(f"\n{out}: {out.stat().st_size / 2**20:.1f} MiB, splits {dict(counts)}")


def load(path: Path | Tar = TAR, pixels: int = 64) -> tuple[list[dict], Tensor]:
    """Every record of the emoji tar, with questions, and the pictures as uint8 (n, 3, P, P)."""
    records, pictures = [], []
    tar = path if isinstance(path, Tar) else Tar(str(path))
    for key, files in tar:
        where = f"{tar.path}: {key}"
        require(({"webp", "json"} <= files.keys(), f"{where}: expected a webp and a json, found "
                 f"{', '.join(files)}"))
        record = parse_json(files["json"], f"{where}.json")
        require((isinstance(record, dict), f"{where}.json: expected an object with {', '.join(FIELDS)}"))
        records.append({name: text(record.get(name), f"{where}.json", name) for name in FIELDS})
        pictures.append(np.array(fit_picture(read_picture(files["webp"], f"{where}.webp"), pixels)))
    ask(records)
    return records, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def split_named(name: str) -> str:
    """"tone" of "tone" or "emoji:tone".  Raises UserError."""
    split = name.removeprefix("emoji:")
    require((split in SPLITS, f"{name}: the emoji set has the splits {', '.join(SPLITS)}"))
    return split


def of_split(records: list[dict], split: str) -> list[int]:
    """The places of a split's records, in the tar's order, which is random."""
    return [i for i, record in enumerate(records) if record["split"] == split]


def fair(records: list[dict]) -> list[list[int]]:
    """The pictures to learn from, one group for each emoji and style: its skin tones, or a single picture.

    An epoch that takes one of each group shows a red apple as often as a farmer, who comes in six skin tones.
    """
    groups = defaultdict(list)
    for i, record in enumerate(records):
        if record["split"] == "train":
            groups[record["emoji"], record["style"]].append(i)
    return list(groups.values())


def texts(records: list[dict]) -> list[str]:
    """Every text of the emoji set, in the pieces in which it is tokenized."""
    return [r["caption"] for r in records] + [text for r in records for q in r["questions"]
                                              for text in (question_prompt(q["question"]), q["answer"])]


def is_emoji(source) -> bool:
    """Whether a source is such a tar, told by its first sample."""
    if not isinstance(source, Tars) or len(source.tars) != 1:
        return False
    try:
        return set(FIELDS) <= set(json.loads(source.tars[0][0][1].get("json", "{}")))
    except (UserError, ValueError, TypeError, RecursionError):
        return False                                             # said when it is read as what it is then


class Emoji:
    """The set as a source (data.Mix): a place is an emoji in a style, its skin tone drawn anew each epoch; or
    each picture is one."""

    def __init__(self, tar: Tar, pixels: int, each: bool = False):
        self.name, (self.records, self.pictures) = tar.path, load(tar, pixels)
        self.groups = [[i] for i in of_split(self.records, "train")] if each else fair(self.records)
        self.every = sorted(i for group in self.groups for i in group)
        self.held = [i for i, record in enumerate(self.records) if record["split"] != "train"]
        if not self.groups:
            raise UserError(f"{tar.path}: no sample of this tar is in the split \"train\"")

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


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", type=Path, default=TAR)
    build(parser.parse_args().out)


if __name__ == "__main__":
    cli.run(main)
