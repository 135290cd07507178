"""Images with questions: LLaVA-1.5, and the published files of seven benchmarks.

    PATH[@IMAGES]                                             IMAGES: the folder of its images
    llava_v1_5_mix665k.json@images                            entries without an image are left out
    v2_OpenEnded_mscoco_train2014_questions.json@train2014    VQAv2; annotations in the same folder
    OpenEnded_mscoco_train2014_questions.json@train2014       OK-VQA, likewise
    train_balanced_questions.json@images                      GQA
    TextVQA_0.5.1_train.json@train_images                     TextVQA
    train.json@train                                          VizWiz

READ has one reader per format.  Training (`open_json`) takes the most common answer to a question,
and adds the suffix of the published code after the question; `sources.question_prompt` gives the
paper's prompt format.  Scoring (metrics/answers.py) takes all answers, and also reads ChartQA and
POPE.
"""

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np

from common import files
from common.cli import UserError, require
from dataset import sources

# {a problem: the ids of the questions that a reader skips because of it}
Issues = dict[str, list[str]]


# ---------------------------------------------------------------------------- published formats

@dataclass
class Question:
    """A question about an image, from a benchmark's file."""
    id: str | int | None
    image: str                          # file name
    question: str
    answers: list[str]                  # all annotators' answers, or the true one; [] in a test set
    types: tuple[str, ...] = ()         # groups that get a mean score of their own
    balanced: bool = True               # GQA scores only its balanced set

    def common_answer(self) -> str:
        """Return the most frequent answer; the first of them in a tie."""
        return Counter(self.answers).most_common(1)[0][0]

    def with_suffix(self, suffix: str) -> str:
        return f"{self.question.strip()} {suffix}".strip()


def annotations_of(path: Path) -> Path:
    """Return where the annotations of VQAv2's or OK-VQA's questions stand under their published
    name; for other files, the path itself."""
    name = path.name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    return path.with_name(name)


def read_vqa(content: dict, path: Path, issues: Issues, annotations: Path | None = None
             ) -> Iterator[Question]:
    """Yield the questions of VQAv2 or OK-VQA.

    annotations: the file of answers; by default the one with the published name, in the folder of
    the questions."""
    annotated = files.read_json(annotations or annotations_of(path))
    type_names = annotated.get("question_types", {})             # OK-VQA's types are numbers
    notes = {}
    for note in annotated["annotations"]:
        key = str(note["question_id"])
        if key in notes:
            issues["annotations of one id, the first counts"].append(key)
        notes.setdefault(key, note)
    named = re.search(r"(train|val|test)\d+", path.name)
    subset = content.get("data_subtype") or named and named[0]
    require((subset, f"{path}: expected \"data_subtype\", or train2014 or the like in the file's name: "
             f"the names of the images depend on it"))
    question_ids = set()
    for entry in content["questions"]:
        key = str(entry["question_id"])
        question_ids.add(key)
        note = notes.get(key, {})
        answers = [each["answer"] for each in note.get("answers", [])]
        kind = note.get("question_type")
        types = note.get("answer_type"), f"question type: {type_names.get(kind, kind)}"
        image = f"COCO_{subset}_{entry['image_id']:012d}.jpg"
        yield Question(entry["question_id"], image, entry["question"], answers, types)
    issues["annotations without a question"] += [key for key in notes if key not in question_ids]


def read_textvqa(content: dict, path: Path, issues: Issues) -> Iterator[Question]:
    for entry in content["data"]:
        image = f"{entry['image_id']}.jpg"
        yield Question(entry.get("question_id"), image, entry["question"], entry.get("answers", []))


def read_vizwiz(content: list[dict], path: Path, issues: Issues) -> Iterator[Question]:
    for entry in content:
        answers = [each["answer"] for each in entry.get("answers", [])]
        types = (entry.get("answer_type"),)
        yield Question(entry["image"], entry["image"], entry["question"], answers, types)


def read_gqa(content: dict, path: Path, issues: Issues) -> Iterator[Question]:
    for key, entry in content.items():
        question = Question(key, f"{entry['imageId']}.jpg", entry["question"], [])
        question.balanced = entry.get("isBalanced", True)
        if "answer" in entry:
            question.answers = [entry["answer"]]
        if kind := entry.get("types", {}).get("structural"):
            question.types = "open" if kind == "query" else "binary", f"structural: {kind}"
        yield question


def read_chartqa(content: list[dict], path: Path, issues: Issues) -> Iterator[Question]:
    for i, entry in enumerate(content):
        key = f"{path.stem}/{i}"
        yield Question(key, entry["imgname"], entry["query"], [entry["label"]], (path.stem,))


def read_pope(content: Iterable[tuple], path: Path, issues: Issues) -> Iterator[Question]:
    subset = path.stem.split("_")[-1]
    for where, entry in content:
        label = entry["label"]
        require((label in ("yes", "no"), f"{where}: a label {ascii(label)[:60]}, not yes or no"))
        key = f"{subset}/{entry['question_id']}"
        yield Question(key, entry["image"], entry["text"], [label], (subset,))


@dataclass
class Format:
    """A published format.  read: (content, path, issues) -> questions.  form: the content's form,
    for error messages."""
    read: Callable[..., Iterator[Question]]
    form: str
    load: Callable[[Path], object] = files.read_json


VQA = Format(read_vqa, "{questions: [{question_id, image_id, question}]}, and beside it "
                       "{annotations: [{question_id, question_type, answer_type, answers: "
                       "[{answer}]}]}")
READ = dict(vqav2=VQA, okvqa=VQA,
            textvqa=Format(read_textvqa,
                           "{data: [{question_id, image_id, question, answers: [text]}]}"),
            vizwiz=Format(read_vizwiz, "[{image, question, answers: [{answer}], answer_type}]"),
            gqa=Format(read_gqa, "{id: {imageId, question, answer}}"),
            chartqa=Format(read_chartqa, "[{imgname, query, label}]"),
            pope=Format(read_pope, "lines {question_id, image, text, label}",
                        files.read_json_lines))

# the text that training adds after a question
SUFFIX = dict.fromkeys(READ, "Answer the question using a single word or phrase.")
SUFFIX["vizwiz"] += " Reply unanswerable if information is not present in the image."


# ------------------------------------------------------------------------------------- training

class Questions(sources.Source):
    """A source of images with questions, one entry per image.

    The entries are kept as one block of bytes: as a list of dicts, 665,000 conversations would take
    gigabytes, and each process that reads ahead would copy the entries that it touches."""

    def __init__(self, name: str, entries: list[dict], folder: Path):
        self.name = name
        self.folder = folder
        lines = [json.dumps(entry, ensure_ascii=False).encode() for entry in entries]
        self.ends = np.cumsum([0, *map(len, lines)])
        self.block = b"".join(lines)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> dict:
        begin, end = self.ends[index:index + 2]
        entry = json.loads(self.block[begin:end])
        file = files.inside(self.folder, entry["image"])
        return dict(key=str(file), image=files.read_bytes(file), captions=[],
                    questions=entry["questions"])


def read_llava(content: list[dict]) -> Iterator[dict]:
    """Yield LLaVA's conversations as pairs of question and answer; training draws one of them."""
    for entry in content:
        pairs, question = [], None
        for turn in entry["conversations"]:
            text = turn["value"].replace("<image>", "").replace("\n", " ").strip()
            if turn["from"] == "gpt" and question is not None:
                pairs.append(dict(question=question, answer=text))
            question = text if turn["from"] == "human" else None
        if entry.get("image") and pairs:
            yield dict(image=entry["image"], questions=pairs)


def read_short_answers(kind: str, content, path: Path) -> Iterator[dict]:
    """Yield a benchmark's questions with their most common answer.

    Raises UserError for a question without an answer."""
    for q in READ[kind].read(content, path, defaultdict(list)):
        require((q.answers, f"{path}: question {q.id} has no answer, expected one to train on"))
        pair = dict(question=q.with_suffix(SUFFIX[kind]), answer=q.common_answer())
        yield dict(image=q.image, questions=[pair])


# the keys, of the file or of its first entry, that identify a format
KEYS = dict(captions={"image_path"}, llava={"conversations"}, vizwiz={"image", "question"},
            vqav2={"questions"}, textvqa={"data"}, gqa={"imageId"})


def recognise(content, path: Path) -> str:
    """Return the format of a file's content, a key of KEYS.  Raises UserError."""
    levels = [content]
    if isinstance(content, dict):
        levels += list(content.values())[:1]
    elif isinstance(content, list):
        levels += content[:1]
    keys = set().union(*(level for level in levels if isinstance(level, dict)))
    for kind, needed in KEYS.items():
        if needed <= keys:
            return kind
    raise UserError(f"{path}: expected a list of images with captions, or a published form of "
                    f"questions, found the keys {', '.join(sorted(keys)[:6]) or '(none)'}")


def open_json(location: sources.Location) -> Questions | sources.Listed:
    """Open a JSON file as a source: questions, or a list of captions.  Raises UserError."""
    path = location.path
    folder = Path(location.option or path.parent)
    content = files.read_json(path)
    kind = recognise(content, path)
    if kind == "captions":
        return sources.Listed(path, content, folder)
    read = read_llava(content) if kind == "llava" else read_short_answers(kind, content, path)
    entries = []
    try:
        for entry in read:
            image = sources.text(entry["image"], str(path), "image")
            sources.described(entry, f"{path}: {image}")
            entries.append(entry)
    except KeyError as error:
        raise UserError(f"{path}: an entry lacks {error}, so these are no questions with answers")
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{path}: an entry has a value of the wrong type ({error}), so these are no "
                        f"questions with answers")
    require((entries, f"{path}: no question about an image in it"))
    return Questions(location.name, entries, folder)
