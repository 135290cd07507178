"""What the benchmarks of text to image ask for, the files that their scorers read, and the scores read back.

    geneval   evaluation_metadata.jsonl        00000/metadata.jsonl, 00000/samples/00000.png    2310.11513
    t2i       color_val.txt shape_val.txt ...  color/samples/PROMPT_000000.png                  2307.06350
    dpg       a folder of NAME.txt             NAME.png, four drawings in one                   2403.05135
    mjhq      meta_data.json                   CATEGORY/ID.png, as mjhq30k_imgs                 2402.17245
    coco      captions_val2014.json            000000000042.png, the picture's number           1405.0312
    lines     a prompt a line                  00000.png
    emoji     train, tone or style             00000.png, the captions of that split of the emoji set

(The last column: arXiv.)  The k-th drawing of the i-th prompt is made with seed + 1000 i + k, whatever else
is drawn.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import data
import emoji
from cli import UserError, require
from files import read_json, read_json_lines, read_text
from metrics import captions
from sources import text

EACH = dict(geneval=4, t2i=10, dpg=4)                            # drawings of a prompt, as published; or one
COCO = 30_000                                                    # captions, of as many pictures
GENEVAL = dict(single_object="single object", two_object="two objects", counting="counting",
               colors="colors", position="position", color_attr="color attribution")
# where T2I-CompBench's four scorers leave theirs, in a category's folder; the first that is there counts
T2I = ["annotation_3_in_1/vqa_result.json", "annotation_blip/vqa_result.json",
       "labels/annotation_obj_detection_2d/vqa_result.json",
       "labels/annotation_obj_detection_3d/vqa_result.json", "annotation_num/vqa_result.json",
       "annotation_clip/vqa_result.json"]
D_DIT, SCRATCH = "D-DiT from SD3 (2B), published", "D-DiT end-to-end (1.1B), published"
SD3 = "SD3, published"
PUBLISHED = dict(
    geneval={D_DIT: {"overall": 0.65}, SCRATCH: {"overall": 0.39}},
    coco={D_DIT: {"FID": 9.4, "CLIP": 31.2}, SCRATCH: {"FID": 18.1}, SD3: {"FID": 10.2, "CLIP": 30.9}},
    mjhq={D_DIT: {"overall": 15.16}, SD3: {"overall": 16.45}},
    vqav2={f"{D_DIT}, 0-shot": {"overall": 55.0}, f"{D_DIT}, 32-shot": {"overall": 60.3},
           f"{SCRATCH}, 0-shot": {"overall": 54.3}, f"{SCRATCH}, 32-shot": {"overall": 58.7}},
    pope={f"{D_DIT}, Table 5": {"accuracy": 82.5}},
    t2i={D_DIT: {"color": 0.8001, "shape": 0.5703, "texture": 0.6856},
         SD3: {"color": 0.7993, "shape": 0.5816, "texture": 0.7389}})


@dataclass
class Asked:
    """Prompts with their seeds, the file of each, how many drawings a file shows, other files that a scorer
    reads, by name, the files of each category, if there are any, the real picture that a file's prompt is of,
    and what had to be left out."""
    jobs: list[tuple[str, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    each: int = 1
    files: dict[str, str] = field(default_factory=dict)
    categories: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    real: dict[str, str] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def add(self, prompt: str, seed: int, name: str, category: str | None = None, real: str = "") -> None:
        self.jobs.append((prompt, seed))
        self.names.append(name)
        if category is not None:
            self.categories[category].append(name)
        if real:
            self.real[name] = real


def plain(name: str, where: str) -> str:
    """A name from a file, if it is one of a file and no path.  Raises UserError."""
    require((bool(re.fullmatch(r"[^/\\\0.][^/\\\0]*", name)),
             f"{where}: {name[:60]!r} can't be a file's name"))
    return name


def geneval(paths: list[str], n: int, seed: int) -> Asked:
    asked = Asked()
    for i, (where, record) in enumerate(read_json_lines(Path(paths[0]))):
        require((isinstance(record, dict) and isinstance(record.get("tag"), str),
                 f"{where}: expected an object with tag and prompt"))
        prompt = text(record.get("prompt"), where, "prompt")
        for k in range(n):
            asked.add(prompt, seed + 1000 * i + k, f"{i:05}/samples/{k:05}.png", record["tag"])
        asked.files[f"{i:05}/metadata.jsonl"] = json.dumps(record) + "\n"
    return asked


def t2i(paths: list[str], n: int, seed: int) -> Asked:
    """A category's prompts are numbered on; what follows a tab is not the prompt's.  A slash, which no file's
    name can have, is written as a space."""
    asked, prompts = Asked(), 0
    for path in paths:
        category, number = Path(path).stem.removesuffix("_val"), 0
        for line in filter(str.strip, read_text(Path(path)).splitlines()):
            prompt = line.split("\t")[0].strip()
            for k in range(n):
                name = f"{prompt.replace('/', ' ')}_{number:06}.png"
                require((len(name.encode()) < 256, f"{path}: a prompt of {len(prompt.encode())} bytes, which "
                         f"no file's name can have: {prompt[:40]!r}"))
                asked.add(prompt, seed + 1000 * prompts + k, f"{category}/samples/{name}", category)
                number += 1
            prompts += 1
    return asked


def dpg(paths: list[str], n: int, seed: int) -> Asked:
    asked, folder = Asked(each=n), Path(paths[0])
    for i, file in enumerate(sorted(folder.glob("*.txt"))):
        asked.add(" ".join(read_text(file).split()), seed + 1000 * i, f"{file.stem}.png")
    require((bool(asked.jobs), f"{folder}: expected a folder of .txt files, a prompt each, found none"))
    return asked


def mjhq(paths: list[str], n: int, seed: int) -> Asked:
    asked, path = Asked(), Path(paths[0])
    found = read_json(path)
    require((isinstance(found, dict), f"{path}: expected an object of {{id: {{category, prompt}}}}"))
    for i, (name, entry) in enumerate(found.items()):
        where = f"{path}: {name}"
        require((isinstance(entry, dict), f"{where}: expected an object with category and prompt"))
        category = plain(text(entry.get("category"), where, "category"), where)
        if not (prompt := entry.get("prompt")):
            asked.bad.append(f"{where}: no prompt")
            continue
        stem = f"{category}/{plain(name, where)}"
        asked.add(text(prompt, where, "prompt"), seed + 1000 * i, f"{stem}.png", category, f"{stem}.jpg")
    return asked


def coco(paths: list[str], n: int, seed: int) -> Asked:
    """Ask for the first caption of each of 30,000 images, always the same ones: their ids decide."""
    path = Path(paths[0])
    references, names, bad = captions.read_captions(path)
    asked = Asked(bad=bad)
    chosen = sorted(references, key=lambda image_id: data.fraction(f"coco {image_id}"))[:COCO]
    require((all(isinstance(image_id, int) for image_id in chosen),
             f"{path}: expected numbers as ids of images, found {chosen[:2]}"))
    for image_id in sorted(chosen):
        if caption := " ".join(references[image_id][0].split()):
            asked.add(caption, seed + 1000 * image_id, f"{image_id:012}.png",
                      real=plain(names[image_id], str(path)))
        else:
            bad.append(f"{path}: picture {image_id} has a blank caption")
    return asked


def lines(paths: list[str], n: int, seed: int) -> Asked:
    every = [line.strip() for path in paths for line in read_text(Path(path)).splitlines()]
    return counted([line for line in every if line], n, seed)


def counted(prompts: list[str], n: int, seed: int) -> Asked:
    asked = Asked()
    for i, prompt in enumerate(prompts):
        for k in range(n):
            asked.add(prompt, seed + 1000 * i + k, f"{i * n + k:05}.png")
    return asked


def of_emoji(paths: list[str], n: int, seed: int) -> Asked:
    splits = [emoji.split_named(path) for path in paths]
    return counted([r["caption"] for r in emoji.load(pixels=8)[0] if r["split"] in splits], n, seed)


READ = dict(geneval=geneval, t2i=t2i, dpg=dpg, mjhq=mjhq, coco=coco, lines=lines, emoji=of_emoji)


def read(bench: str, paths: list[str], n: int | None = None, seed: int = 0,
         limit: int | None = None) -> Asked:
    """What to draw for a benchmark, n drawings of a prompt (as published), of the first `limit` prompts.

    Raises UserError for files that are not as that benchmark's are."""
    n = n or EACH.get(bench, 1)
    require((bench in ("t2i", "lines", "emoji") or len(paths) == 1,
             f"{bench}: {len(paths)} files of prompts, expected one"),
            (n == 1 or bench not in ("coco", "mjhq"), f"--n {n}: {bench} is scored with one drawing each"),
            (n <= 1000, f"{n} drawings of a prompt, expected at most 1000"))
    asked = READ[bench](paths, n, seed)
    require((bool(asked.jobs), f"{' '.join(paths)}: holds no prompt"))
    if limit is not None:
        most = limit * (1 if bench == "dpg" else n)
        kept = set(asked.names[:most])
        asked.jobs, asked.names = asked.jobs[:most], asked.names[:most]
        folders = {name.split("/")[0] for name in kept}
        asked.files = {name: found for name, found in asked.files.items() if name.split("/")[0] in folders}
        asked.categories = {name: [file for file in files if file in kept]
                            for name, files in asked.categories.items()}
    return asked


# -------------------------------------------------------------------------------------- scores, read back

def geneval_scores(path: Path) -> tuple[dict[str, float], list[str]]:
    """({task: share of pictures that are right, "overall": mean over tasks}, what is missing), of the
    results.jsonl that GenEval's evaluate_images.py writes.  Raises UserError."""
    right = defaultdict(list)
    for where, record in read_json_lines(path):
        require((isinstance(record, dict) and isinstance(record.get("correct"), bool) and "tag" in record,
                 f"{where}: expected a line of evaluate_images.py, with tag and correct"))
        right[record["tag"]].append(record["correct"])
    require((bool(right), f"{path}: holds no result"))
    scores = {GENEVAL.get(tag, tag): sum(right[tag]) / len(right[tag]) for tag in [*GENEVAL, *right]
              if tag in right}
    bad = [f"{path}: no picture of {GENEVAL[tag]}" for tag in GENEVAL if tag not in right]
    return scores | {"overall": sum(scores.values()) / len(scores)}, bad


def t2i_scores(folder: Path) -> tuple[dict[str, float], list[str]]:
    """({category: mean score}, categories without one) of a folder of drawings that T2I-CompBench's scorers
    were run on, a category a subfolder.  Raises UserError."""
    scores, bad = {}, []
    for samples in sorted(folder.glob("*/samples")):
        category = samples.parent
        results = [category / name for name in T2I if (category / name).exists()]
        if not results:
            bad.append(f"{category}: no scorer has left its vqa_result.json there")
            continue
        try:
            answers = [float(entry["answer"]) for entry in read_json(results[0])]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{results[0]}: expected a list of answers, a number each ({error!r})")
        drawn = sum(file.suffix == ".png" for file in samples.iterdir())
        if not answers:
            bad.append(f"{results[0]}: holds no answer")
            continue
        if len(answers) != drawn:
            bad.append(f"{results[0]}: {len(answers)} answers, {drawn} drawings")
        scores[category.name] = sum(answers) / len(answers)
    require((bool(scores), f"{folder}: expected CATEGORY/samples and, beside them, what T2I-CompBench's "
             f"scorers write, found none; {len(bad)} categories without"))
    return scores, bad


def dpg_scores(path: Path) -> tuple[dict[str, float], list[str]]:
    """({broad category: percent, "overall": percent}, pictures that the scorer left out) of the results.txt
    of compute_dpg_bench.py: a line a picture, and its summary at the end.  Raises UserError."""
    means, scores, found = {}, {}, read_text(path)
    for line in found.splitlines():
        if match := re.fullmatch(r"(.+?\.\w+)((?:, [\d.]+)+)", line):
            means[match[1]] = float(match[2].split(", ")[-1])
        elif match := re.fullmatch(r"\t(\w+): ([\d.]+)", line):
            scores[match[1]] = float(match[2])
    require((bool(means), f"{path}: expected a line a picture, as compute_dpg_bench.py writes them"))
    scores["overall"] = 100 * sum(means.values()) / len(means)
    stated = re.search(r"DPG-Bench score: ([\d.]+)", found)
    bad = [] if stated else [f"{path}: ends without a summary; the scorer was stopped"]
    if stated and abs(float(stated[1]) - scores["overall"]) > 0.01:
        bad.append(f"{path}: its summary says {stated[1]}, its lines make {scores['overall']:.4f}")
    return scores, bad


SCORES = dict(geneval=geneval_scores, t2i=t2i_scores, dpg=dpg_scores)
