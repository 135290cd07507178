"""The prompts of text-to-image benchmarks, the files that their scorers read, and the scores read
back.

    geneval   evaluation_metadata.jsonl        00000/metadata.jsonl, 00000/samples/00000.png    2310.11513
    t2i       color_val.txt shape_val.txt ...  color/samples/PROMPT_000000.png                  2307.06350
    dpg       a folder of NAME.txt             NAME.png, four drawings in one                   2403.05135
    mjhq      meta_data.json                   CATEGORY/ID.png, as mjhq30k_imgs                 2402.17245
    coco      captions_val2014.json            000000000042.png, the image's number             1405.0312
    lines     a prompt a line                  00000.png
    emoji     train, tone or style             00000.png, the captions of that split of the emoji set

(The last column: arXiv.)  The k-th drawing of the i-th prompt is made with seed + 1000 i + k,
whatever else is drawn.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from common import seeding
from common.cli import UserError, require
from common.files import read_json, read_json_lines, read_text
from dataset import emoji
from dataset.sources import text
from metrics import captions

EACH = dict(geneval=4, t2i=10, dpg=4)                 # drawings of a prompt, as published; else one
COCO = 30_000                                                    # captions, of as many images
GENEVAL = dict(single_object="single object", two_object="two objects", counting="counting",
               colors="colors", position="position", color_attr="color attribution")
# where T2I-CompBench's scorers leave results in a category's folder; the first one found counts
T2I = ["annotation_3_in_1/vqa_result.json", "annotation_blip/vqa_result.json",
       "labels/annotation_obj_detection_2d/vqa_result.json",
       "labels/annotation_obj_detection_3d/vqa_result.json", "annotation_num/vqa_result.json",
       "annotation_clip/vqa_result.json"]
D_DIT = "D-DiT from SD3 (2B), published"
SCRATCH = "D-DiT end-to-end (1.1B), published"
SD3 = "SD3, published"
PUBLISHED = dict(
    geneval={D_DIT: {"overall": 0.65}, SCRATCH: {"overall": 0.39}},
    coco={D_DIT: {"FID": 9.4, "CLIP": 31.2}, SCRATCH: {"FID": 18.1},
          SD3: {"FID": 10.2, "CLIP": 30.9}},
    mjhq={D_DIT: {"overall": 15.16}, SD3: {"overall": 16.45}},
    vqav2={f"{D_DIT}, 0-shot": {"overall": 55.0}, f"{D_DIT}, 32-shot": {"overall": 60.3},
           f"{SCRATCH}, 0-shot": {"overall": 54.3}, f"{SCRATCH}, 32-shot": {"overall": 58.7}},
    pope={f"{D_DIT}, Table 5": {"accuracy": 82.5}},
    t2i={D_DIT: {"color": 0.8001, "shape": 0.5703, "texture": 0.6856},
         SD3: {"color": 0.7993, "shape": 0.5816, "texture": 0.7389}})


@dataclass
class Asked:
    """Prompts with their seeds, the file of each, and what goes with them."""
    jobs: list[tuple[str, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    each: int = 1                                                # drawings that a file shows
    files: dict[str, str] = field(default_factory=dict)          # other files that a scorer reads
    categories: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    real: dict[str, str] = field(default_factory=dict)           # the real image of each name
    bad: list[str] = field(default_factory=list)                 # what is left out

    def add(self, prompt: str, seed: int, name: str) -> None:
        self.jobs.append((prompt, seed))
        self.names.append(name)


def geneval(paths: list[str], n: int, seed: int) -> Asked:
    asked = Asked()
    for i, (where, record) in enumerate(read_json_lines(Path(paths[0]))):
        require((isinstance(record, dict) and "tag" in record,
                 f"{where}: expected an object with tag and prompt"))
        prompt = text(record.get("prompt"), where, "prompt")
        for k in range(n):
            asked.add(prompt, seed + 1000 * i + k, f"{i:05}/samples/{k:05}.png")
        asked.files[f"{i:05}/metadata.jsonl"] = json.dumps(record) + "\n"
    return asked


def t2i(paths: list[str], n: int, seed: int) -> Asked:
    """Number the drawings of each category; what follows a tab is not part of the prompt.  A slash,
    which no file name can have, becomes a space."""
    asked = Asked()
    prompts = 0
    for path in paths:
        category = Path(path).stem.removesuffix("_val")
        for number, prompt in enumerate(read_prompts(path)):
            prompt = prompt.split("\t")[0].strip()
            stem = prompt.replace("/", " ")
            require((len(stem.encode()) < 245,
                     f"{path}: {prompt[:40]!r} has {len(stem.encode())} bytes, "
                     f"which no file's name can have"))
            for k in range(n):
                name = f"{category}/samples/{stem}_{number * n + k:06}.png"
                asked.add(prompt, seed + 1000 * prompts + k, name)
            prompts += 1
    return asked


def dpg(paths: list[str], n: int, seed: int) -> Asked:
    asked = Asked(each=n)
    for i, file in enumerate(sorted(Path(paths[0]).glob("*.txt"))):
        asked.add(" ".join(read_text(file).split()), seed + 1000 * i, f"{file.stem}.png")
    return asked


def mjhq(paths: list[str], n: int, seed: int) -> Asked:
    asked = Asked()
    path = paths[0]
    entries = read_json(Path(path))
    require((isinstance(entries, dict)
             and all(isinstance(entry, dict) for entry in entries.values()),
             f"{path}: expected an object of {{id: {{category, prompt}}}}"))
    for i, (key, entry) in enumerate(entries.items()):
        where = f"{path}: {key}"
        category = text(entry.get("category"), where, "category")
        stem = f"{category}/{key}"
        require((bool(re.fullmatch(r"[^/\\\0.][^/\\\0]*/[^/\\\0.][^/\\\0]*", stem)),
                 f"{where}: {stem[:60]!r} can't be a category and a file's name"))
        if entry.get("prompt"):
            asked.add(text(entry["prompt"], where, "prompt"), seed + 1000 * i, f"{stem}.png")
            asked.categories[category].append(f"{stem}.png")
            asked.real[f"{stem}.png"] = f"{stem}.jpg"
        else:
            asked.bad.append(f"{where}: no prompt")
    return asked


def coco(paths: list[str], n: int, seed: int) -> Asked:
    """Ask for the first caption of each of 30,000 images, always the same ones: their ids
    decide."""
    references, names, bad = captions.read_captions(Path(paths[0]))
    asked = Asked(bad=bad)
    chosen = sorted(references, key=lambda image_id: seeding.fraction(f"coco {image_id}"))[:COCO]
    require((all(isinstance(image_id, int) for image_id in chosen),
             f"{paths[0]}: expected numbers as ids of images, found {chosen[:2]}"))
    for image_id in sorted(chosen):
        caption = " ".join(references[image_id][0].split())
        if not caption:
            bad.append(f"{paths[0]}: picture {image_id} has a blank caption")
            continue
        name = f"{image_id:012}.png"
        asked.add(caption, seed + 1000 * image_id, name)
        asked.real[name] = names[image_id]
    return asked


def read_prompts(path: str) -> list[str]:
    prompts = [line.strip() for line in read_text(Path(path)).splitlines()]
    return [prompt for prompt in prompts if prompt]


def lines(paths: list[str], n: int, seed: int) -> Asked:
    return numbered([prompt for path in paths for prompt in read_prompts(path)], n, seed)


def numbered(prompts: list[str], n: int, seed: int) -> Asked:
    asked = Asked()
    for i, prompt in enumerate(prompts):
        for k in range(n):
            asked.add(prompt, seed + 1000 * i + k, f"{i * n + k:05}.png")
    return asked


def emoji_captions(paths: list[str], n: int, seed: int) -> Asked:
    splits = [emoji.split_named(path) for path in paths]
    records, _ = emoji.load(pixels=8)
    return numbered([record["caption"] for record in records if record["split"] in splits], n, seed)


READ = dict(geneval=geneval, t2i=t2i, dpg=dpg, mjhq=mjhq, coco=coco, lines=lines,
            emoji=emoji_captions)


def read(benchmark: str, paths: list[str], n: int | None = None, seed: int = 0,
         limit: int | None = None) -> Asked:
    """Read what to draw for a benchmark: n drawings (as published) of each of the first `limit`
    prompts.

    Raises UserError for files that are not as that benchmark's are."""
    n = n or EACH.get(benchmark, 1)
    require((benchmark in ("t2i", "lines", "emoji") or len(paths) == 1,
             f"{benchmark}: {len(paths)} files of prompts, expected one"),
            (n == 1 or benchmark not in ("coco", "mjhq"),
             f"--n {n}: {benchmark} is scored with one drawing each"))
    asked = READ[benchmark](paths, n, seed)
    require((bool(asked.jobs), f"{' '.join(paths)}: holds no prompt"))
    if limit is not None:
        count = limit * n // asked.each
        asked.jobs = asked.jobs[:count]
        asked.names = asked.names[:count]
        asked.files = dict(list(asked.files.items())[:limit])    # GenEval's: one of each prompt
    return asked


# -------------------------------------------------------------------------------- scores, read back

def geneval_scores(path: Path) -> tuple[dict[str, float], list[str]]:
    """Read the results.jsonl of GenEval's evaluate_images.py.

    Return the share of right images of each task and, "overall", the mean over tasks; and a line
    for each missing task.  Raises UserError."""
    right = defaultdict(list)
    for where, record in read_json_lines(path):
        require((isinstance(record, dict) and isinstance(record.get("correct"), bool)
                 and "tag" in record,
                 f"{where}: expected a line of evaluate_images.py, with tag and correct"))
        right[record["tag"]].append(record["correct"])
    scores, bad = {}, []
    for tag, task in GENEVAL.items():
        if tag in right:
            scores[task] = sum(right[tag]) / len(right[tag])
        else:
            bad.append(f"{path}: no picture of {task}")
    require((bool(scores), f"{path}: holds no result"))
    scores["overall"] = sum(scores.values()) / len(scores)
    return scores, bad


def t2i_scores(folder: Path) -> tuple[dict[str, float], list[str]]:
    """Read the mean score of each category, a subfolder, from a folder that T2I-CompBench's scorers
    were run on, and a line for each category that was not scored in full.  Raises UserError."""
    scores, bad = {}, []
    for samples in sorted(folder.glob("*/samples")):
        category = samples.parent
        results = [category / name for name in T2I if (category / name).exists()]
        if not results:
            bad.append(f"{category}: no scorer has left its vqa_result.json there")
            continue
        try:
            answers = [float(entry["answer"]) for entry in read_json(results[0])]
            scores[category.name] = sum(answers) / len(answers)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{results[0]}: expected a list of answers, a number each ({error!r})")
        drawn = len(list(samples.glob("*.png")))
        if len(answers) != drawn:
            bad.append(f"{results[0]}: {len(answers)} answers, {drawn} drawings")
    require((bool(scores),
             f"{folder}: no CATEGORY/samples with the results of T2I-CompBench's scorers beside"))
    return scores, bad


def dpg_scores(path: Path) -> tuple[dict[str, float], list[str]]:
    """Read the results.txt of compute_dpg_bench.py, a line for each image and a summary at the end.

    Return the percentage of each broad category and "overall", and a line if the summary is
    missing.  Raises UserError."""
    means, scores = {}, {}
    content = read_text(path)
    for line in content.splitlines():
        if match := re.fullmatch(r"(.+?\.\w+)(?:, [\d.]+)*, ([\d.]+)", line):
            means[match[1]] = float(match[2])
        elif match := re.fullmatch(r"\t(\w+): ([\d.]+)", line):
            scores[match[1]] = float(match[2])
    require((bool(means),
             f"{path}: expected a line a picture, as compute_dpg_bench.py writes them"))
    scores["overall"] = 100 * sum(means.values()) / len(means)
    if "DPG-Bench score: " in content:
        return scores, []
    return scores, [f"{path}: ends without a summary; the scorer was stopped"]


SCORES = dict(geneval=geneval_scores, t2i=t2i_scores, dpg=dpg_scores)
