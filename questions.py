"""Pictures with questions: LLaVA-1.5, VQAv2, OK-VQA, GQA, TextVQA and VizWiz in their published files.

    PATH[@PICTURES]                                                PICTURES: the folder its pictures lie in
    llava_v1_5_mix665k.json@pictures                               those without a picture are left out
    v2_OpenEnded_mscoco_train2014_questions.json@train2014         VQAv2; its annotations stand beside
    OpenEnded_mscoco_train2014_questions.json@train2014            OK-VQA, likewise
    train_balanced_questions.json@images                           GQA
    TextVQA_0.5.1_train.json@train_images                          TextVQA
    train.json@train                                               VizWiz

Each question stands in the paper's prompt format (`data.question_prompt`), a short-answer one with the suffix
of the published code before " A: ".
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Iterator

import numpy as np

import sources
from cli import UserError

SHORT_ANSWER = "Answer the question using a single word or phrase."
UNANSWERABLE = "Reply unanswerable if information is not present in the image."


class Questions:
    """Entries of a picture and its questions, as a source.

    They are kept as one block of bytes: of 665,000 conversations a list of dicts would take gigabytes, and
    processes that read ahead would each get a copy as they touch it."""

    def __init__(self, name: str, entries: list[dict], folder: Path):
        self.name, self.folder = name, folder
        lines = [json.dumps(entry, ensure_ascii=False).encode() for entry in entries]
        self.ends = np.cumsum([0] + [len(line) for line in lines])
        self.block = np.frombuffer(b"".join(lines), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> dict:
        entry = json.loads(self.block[self.ends[i]:self.ends[i + 1]].tobytes())
        file = self.folder / entry["image"]
        return dict(key=str(file), picture=sources.read_bytes(file), captions=[],
                    questions=entry["questions"])


def asked(image: str, question: str, answers: list[str], also: str = "") -> dict:
    """A short-answer question: its answer is the one that most people gave, the first of them in a tie."""
    question = " ".join(filter(None, (question.strip(), SHORT_ANSWER, also)))
    (answer, _), = Counter(answers).most_common(1)
    return dict(image=image, questions=[dict(question=question, answer=answer)])


def read_llava(content: list[dict]) -> Iterator[dict]:
    """LLaVA's turns, human and gpt by turns, as pairs of question and answer: the trainer draws one."""
    for entry in content:
        turns = [(turn["from"], " ".join(turn["value"].replace("<image>", "").split("\n")).strip())
                 for turn in entry["conversations"]]
        pairs = [dict(question=said, answer=answer) for (who, said), (then, answer) in zip(turns, turns[1:])
                 if (who, then) == ("human", "gpt")]
        if entry.get("image") and pairs:
            yield dict(image=entry["image"], questions=pairs)


def annotations_of(path: Path) -> Path:
    """By their published names, beside VQAv2's or OK-VQA's file of questions."""
    return path.with_name(path.name.replace("OpenEnded_", "").replace("_questions", "_annotations"))


def coco_picture(content: dict, path: Path, number: int) -> str:
    """The file's name of a picture that such a file asks about."""
    subset = content.get("data_subtype") or re.search(r"(train|val|test)\d+", path.name)[0]
    return f"COCO_{subset}_{number:012d}.jpg"


def read_vqa(content: dict, path: Path) -> Iterator[dict]:
    """VQAv2 and OK-VQA: the questions file, and its annotations."""
    answers = {a["question_id"]: [given["answer"] for given in a["answers"]]
               for a in sources.read_json(annotations_of(path))["annotations"]}
    for q in content["questions"]:
        yield asked(coco_picture(content, path, q["image_id"]), q["question"], answers[q["question_id"]])


def read_gqa(content: dict) -> Iterator[dict]:
    for q in content.values():
        yield asked(f"{q['imageId']}.jpg", q["question"], [q["answer"]])


def read_textvqa(content: dict) -> Iterator[dict]:
    for q in content["data"]:
        yield asked(f"{q['image_id']}.jpg", q["question"], q["answers"])


def read_vizwiz(content: list[dict]) -> Iterator[dict]:
    for q in content:
        yield asked(q["image"], q["question"], [given["answer"] for given in q["answers"]], UNANSWERABLE)


def of_json(place: str):
    """The source that a JSON file is, PATH[@PICTURES], told by its keys: questions, or a list of captions."""
    name, _, folder = place.partition("@")
    path, content = Path(name), sources.read_json(Path(name))
    first = content[0] if isinstance(content, list) and content else content
    keys = set(first) if isinstance(first, dict) else set()
    inner = next(iter(content.values()), None) if isinstance(content, dict) else None
    kinds = (("image_path" in keys, None), ("conversations" in keys, lambda: read_llava(content)),
             ({"image", "question"} <= keys, lambda: read_vizwiz(content)),
             ("questions" in keys, lambda: read_vqa(content, path)),
             ("data" in keys, lambda: read_textvqa(content)),
             (isinstance(inner, dict) and "imageId" in inner, lambda: read_gqa(content)))
    found = [read for fits, read in kinds if fits]
    if not found:
        raise UserError(f"{path}: expected a list of pictures with captions, or one of the published forms "
                        f"of questions, found the keys {', '.join(sorted(keys)[:6]) or 'of nothing'}")
    if found[0] is None:
        return sources.Listed(path, content, Path(folder) if folder else path.parent)
    try:
        entries = list(found[0]())
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{path}: an entry lacks {error}, so these are no questions with answers")
    if not entries:
        raise UserError(f"{path}: no question about a picture in it")
    for entry in entries:
        where = f"{path}: {sources.text(entry['image'], str(path), 'image')}"
        for name, said in [item for asked in entry["questions"] for item in asked.items()]:
            sources.text(said, where, name)
    return Questions(place, entries, Path(folder) if folder else path.parent)
