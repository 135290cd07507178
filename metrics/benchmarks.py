"""Read the prompts of text-to-image benchmarks, write the files that their scorers read, and read
the scorers' results.

    name      files of prompts              files that are written                        arXiv
    geneval   evaluation_metadata.jsonl     00000/metadata.jsonl, 00000/samples/00000.png 2310.11513
    t2i       color_val.txt shape_val.txt   color/samples/PROMPT_000000.png               2307.06350
    dpg       a folder of NAME.txt          NAME.png, four drawings in one                2403.05135
    mjhq      meta_data.json                CATEGORY/ID.png, as mjhq30k_imgs              2402.17245
    coco      captions_val2014.json         000000000042.png, the image's number          1405.0312
    lines     a prompt a line               00000.png
    emoji     train, tone or style          00000.png, the captions of a split of the emoji

The k-th drawing of the i-th prompt always uses the seed `seed` + 1000 i + k.
"""

import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

from common import seeding
from common.cli import UserError, is_text, require
from common.files import (read_json, read_json_lines, read_lines, read_text, text_lines,
                          visible)
from dataset import emoji
from dataset.sources import text
from metrics import captions

PER_PROMPT = dict(geneval=4, t2i=10, dpg=4)           # drawings per prompt, as published; else one
COCO = 30_000                                                    # images, with one caption each
GENEVAL = dict(single_object="single object", two_object="two objects", counting="counting",
               colors="colors", position="position", color_attr="color attribution")
# the result files of T2I-CompBench's scorers in a category's folder; the first one found is used
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


class Benchmark:
    """The prompts, seeds and file names of a benchmark's drawings, and the other files it needs."""

    def __init__(self, n: int, seed: int):
        self.n = n                                      # drawings per prompt
        self.seed = seed
        self.per_file = 1                               # drawings that one file shows
        self.jobs = []                                  # (prompt, seed) for each file
        self.names = []                                 # file names, in the order of `jobs`
        self.files = {}                                 # content of files that a scorer reads
        self.categories = defaultdict(list)             # category -> names of its files
        self.real = {}                                  # name of a file -> its real image's
        self.left_out = []                              # a line for each prompt left out

    def add(self, prompt: str, number: int, names: list[str], where: str | Path) -> bool:
        """Add the files of the prompt with this number.  Return False for a blank one, left out.

        where: the place of the prompt, for messages."""
        if not prompt.strip():
            self.left_out.append(f"{where}: a blank prompt")
            return False
        self.names += names
        for k in range(len(names)):
            self.jobs.append((prompt, self.seed + 1000 * number + k))
        return True


def read_geneval(benchmark: Benchmark, paths: list[str]) -> None:
    for i, (where, record) in enumerate(read_json_lines(Path(paths[0]))):
        require((isinstance(record, dict) and "tag" in record,
                 f"{where}: expected an object with tag and prompt"))
        prompt = text(record.get("prompt"), where, "prompt")
        names = [f"{i:05}/samples/{k:05}.png" for k in range(benchmark.n)]
        if benchmark.add(prompt, i, names, where):
            benchmark.files[f"{i:05}/metadata.jsonl"] = json.dumps(record) + "\n"


def read_t2i(benchmark: Benchmark, paths: list[str]) -> None:
    """Read a file for each category.  A line's prompt ends at a tab.  Drawings are numbered in each
    category, and in file names a slash of the prompt becomes a space."""
    n = benchmark.n
    for path in paths:
        category = Path(path).stem.removesuffix("_val")
        for i, (where, line) in enumerate(read_lines(Path(path))):
            prompt = line.split("\t")[0].strip()
            stem = prompt.replace("/", " ")
            size = len(stem.encode())
            require((size < 245, f"{path}: {prompt[:40]!r} has {size} bytes, expected fewer than "
                     f"245 for a file's name"))
            numbers = range(i * n, i * n + n)
            names = [f"{category}/samples/{stem}_{number:06}.png" for number in numbers]
            benchmark.add(prompt, len(benchmark.jobs) // n, names, where)


def read_dpg(benchmark: Benchmark, paths: list[str]) -> None:
    benchmark.per_file = benchmark.n
    for i, file in enumerate(visible(Path(paths[0]), "*.txt")):
        prompt = " ".join(read_text(file).split())
        benchmark.add(prompt, i, [f"{file.stem}.png"], file)


def read_mjhq(benchmark: Benchmark, paths: list[str]) -> None:
    path = paths[0]
    entries = read_json(Path(path))
    is_mjhq = isinstance(entries, dict) and all(isinstance(x, dict) for x in entries.values())
    require((is_mjhq, f"{path}: expected an object of {{id: {{category, prompt}}}}"))
    for i, (key, entry) in enumerate(entries.items()):
        where = f"{path}: {key}"
        category = text(entry.get("category"), where, "category")
        stem = f"{category}/{key}"
        is_path = re.fullmatch(r"[^/\\\0.][^/\\\0]*/[^/\\\0.][^/\\\0]*", stem)
        require((is_path, f"{where}: {stem[:60]!r} can't be a category and a file's name"))
        name = f"{stem}.png"
        if benchmark.add(text(entry.get("prompt") or "", where, "prompt"), i, [name], where):
            benchmark.categories[category].append(name)
            benchmark.real[name] = f"{stem}.jpg"


def read_coco(benchmark: Benchmark, paths: list[str]) -> None:
    """Read the first caption of each of 30,000 images; hashes of the image ids decide which."""
    path = paths[0]
    references, names, benchmark.left_out = captions.read_captions(Path(path))
    chosen = sorted(references, key=lambda image_id: seeding.fraction(f"coco {image_id}"))[:COCO]
    fits = all(isinstance(image_id, int) and 0 <= image_id < 10**12 for image_id in chosen)
    require((fits, f"{path}: expected numbers of up to 12 digits as ids of images, found "
             f"{sorted(chosen, key=str)[:2]}"))
    for image_id in sorted(chosen):
        caption = " ".join(references[image_id][0].split())
        name = f"{image_id:012}.png"
        if benchmark.add(caption, image_id, [name], f"{path}: image {image_id}"):
            benchmark.real[name] = names[image_id]


def read_plain(benchmark: Benchmark, paths: list[str]) -> None:
    prompts = []
    for path in paths:
        prompts += text_lines(read_text(Path(path)))
    add_numbered(benchmark, prompts)


def read_emoji(benchmark: Benchmark, paths: list[str]) -> None:
    splits = [emoji.split_named(path) for path in paths]
    records, _ = emoji.load(pixels=8)
    shown = emoji.of_split(records, *splits)
    add_numbered(benchmark, [records[i]["caption"] for i in shown])


def add_numbered(benchmark: Benchmark, prompts: list[str]) -> None:
    """Add prompts; their files are named by the drawing's number."""
    n = benchmark.n
    for i, prompt in enumerate(prompts):
        names = [f"{number:05}.png" for number in range(i * n, i * n + n)]
        benchmark.add(prompt, i, names, f"prompt {i}")


READ = dict(geneval=read_geneval, t2i=read_t2i, dpg=read_dpg, mjhq=read_mjhq, coco=read_coco,
            lines=read_plain, emoji=read_emoji)


def read(name: str, paths: list[str], n: int | None = None, seed: int = 0,
         limit: int | None = None) -> Benchmark:
    """Read a benchmark's prompts, and plan n drawings of each of the first `limit` prompts.

    n: by default as published.  Raises UserError for files of another form."""
    n = n or PER_PROMPT.get(name, 1)
    require((name in ("t2i", "lines", "emoji") or len(paths) == 1,
             f"{name}: {len(paths)} files of prompts, expected one"),
            (n == 1 or name not in ("coco", "mjhq"),
             f"--n {n}: {name} is scored with one drawing each"))
    benchmark = Benchmark(n, seed)
    READ[name](benchmark, paths)
    twice = [name for name, count in Counter(benchmark.names).items() if count > 1]
    unfit = [name for name in benchmark.names if "\0" in name or not is_text(name)]
    require((not unfit, f"{' '.join(paths)}: {ascii(unfit)[:60]}: no possible names of files"),
            (benchmark.jobs,
             f"{' '.join(paths)}: holds no prompt; {''.join(benchmark.left_out[:1])}"),
            (not twice, f"{' '.join(paths)}: two prompts would be drawn as {''.join(twice[:1])}"))
    if limit is not None:
        count = limit * n // benchmark.per_file
        benchmark.jobs = benchmark.jobs[:count]
        benchmark.names = benchmark.names[:count]
        first_files = list(benchmark.files.items())[:limit]      # GenEval has one per prompt
        benchmark.files = dict(first_files)
    return benchmark


# ------------------------------------------------------------------------------ results of scorers

def geneval_scores(path: Path) -> tuple[dict[str, float], list[str]]:
    """Read the results.jsonl of GenEval's evaluate_images.py.

    Return the share of correct images for each task and, as "overall", the mean over tasks; and a
    line for each missing task.  Raises UserError."""
    correct = defaultdict(list)
    for where, record in read_json_lines(path):
        is_result = isinstance(record, dict) and isinstance(record.get("correct"), bool)
        require((is_result and isinstance(record.get("tag"), str),
                 f"{where}: expected a line of evaluate_images.py, with tag and correct"))
        correct[record["tag"]].append(record["correct"])
    scores, left_out = {}, []
    for tag, task in GENEVAL.items():
        if tag in correct:
            scores[task] = sum(correct[tag]) / len(correct[tag])
        else:
            left_out.append(f"{path}: no image of {task}")
    left_out += [f"{path}: {len(correct[tag])} images of {tag!r}, which is no task"
                 for tag in correct.keys() - GENEVAL.keys()]
    require((scores, f"{path}: holds no result"))
    scores["overall"] = sum(scores.values()) / len(scores)
    return scores, left_out


def t2i_scores(folder: Path) -> tuple[dict[str, float], list[str]]:
    """Read the results that T2I-CompBench's scorers left in a folder of drawings.

    Return the mean score of each category, which is a subfolder, and a line for each category that
    was not scored completely.  Raises UserError."""
    scores, left_out = {}, []
    for samples in visible(folder, "*/samples"):
        category = samples.parent
        results = [category / name for name in T2I if (category / name).exists()]
        if not results:
            left_out.append(f"{category}: no scorer has left its vqa_result.json there")
            continue
        try:
            answers = [float(entry["answer"]) for entry in read_json(results[0])]
            if not all(map(math.isfinite, answers)):
                raise ValueError("not finite")
            scores[category.name] = sum(answers) / len(answers)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{results[0]}: expected a list of answers, a number each ({error!r})")
        drawn = len(visible(samples, "*.png"))
        if len(answers) != drawn:
            left_out.append(f"{results[0]}: {len(answers)} answers, {drawn} drawings")
    require((scores,
             f"{folder}: no CATEGORY/samples with the results of T2I-CompBench's scorers beside"))
    return scores, left_out


def dpg_scores(path: Path) -> tuple[dict[str, float], list[str]]:
    """Read the results.txt of compute_dpg_bench.py: a line per image and a summary at the end.

    Return the scores of the broad categories and "overall" in percent, and a line if the summary is
    missing.  Raises UserError."""
    means, scores = {}, {}
    lines = read_lines(path)
    left_out = []
    if not any("DPG-Bench score: " in line for _, line in lines):
        left_out = [f"{path}: ends without a summary; the scorer was stopped"]
    for where, line in lines:
        match = re.fullmatch(r"(?:(.+?\.\w+), (?:.*, )?|\t(\w+): )(.*)", line)
        if not match:
            continue
        image, category, score = match.groups()
        require((re.fullmatch(r"\d+(\.\d*)?(e-\d+)?", score),
                 f"{where}: expected a score at its end, found {line[-60:]!r}"))
        if category:
            scores[category] = float(score)
        elif image in means:
            left_out.append(f"{where}: {image} is there twice")
        else:
            means[image] = float(score)
    require((means,
             f"{path}: expected a line an image, as compute_dpg_bench.py writes them"))
    scores["overall"] = 100 * sum(means.values()) / len(means)
    return scores, left_out


SCORES = dict(geneval=geneval_scores, t2i=t2i_scores, dpg=dpg_scores)
