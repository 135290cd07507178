"""Print hashes of samples of every kind of source, to compare the data code of two commits.

    python -m experiments.data_hashes                # a minute; at both commits, then diff

For each kind, data.Mix gives 2,000 samples, at positions 0 to 1,999 of both losses.  The sources
are made from the emoji set in a temporary folder, and are always the same.  To test an older
commit, copy this file there.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import tempfile
from pathlib import Path

import data
from common import cli

EMOJI = Path("assets/emoji.tar.gz").resolve()
VAE = Path("tests/fixtures/sd3.safetensors").resolve()
TAR_CONTENT = 300        # images in the folder, the tar and the lists


def write_sources() -> dict[str, str]:
    """Write one source of each kind into the working directory, and return the path of each."""
    for folder in ("photos", "listed"):
        Path(folder).mkdir()
    captions, records = [], []
    with tarfile.open(EMOJI) as emoji, tarfile.open("shard.tar", "w") as shard:
        for member in emoji:
            content = emoji.extractfile(member).read()
            stem, suffix = f"{len(captions):04}", Path(member.name).suffix
            if suffix == ".json":
                record = json.loads(content)
                captions.append(record["caption"])
                records.append(record)
                Path(f"photos/{stem}.txt").write_text(record["caption"] + "\nanother caption\n")
                content = json.dumps(record | {"re_caption": f"again {record['caption']}"}).encode()
            else:
                Path(f"photos/{stem}.webp").write_bytes(content)
                Path(f"listed/{stem}.webp").write_bytes(content)
            info = tarfile.TarInfo(f"{stem}{suffix}")
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
            if len(captions) == TAR_CONTENT:
                break
    files = [f"{i:04}.webp" for i in range(TAR_CONTENT)]
    Path("listed/metadata.jsonl").write_text("".join(
        json.dumps(dict(file_name=file, text=text)) + "\n" for file, text in zip(files, captions)))
    Path("captions.json").write_text(json.dumps([
        dict(image_path=file, height=64, width=64, caption=text, re_caption=f"again {text}")
        for file, text in zip(files, captions)]))
    Path("llava.json").write_text(json.dumps([
        dict(id=i, image=file, conversations=[
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": text},
            {"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "No."}])
        for i, (file, text) in enumerate(zip(files, captions))]))
    for i in range(TAR_CONTENT):
        Path(f"listed/COCO_train2014_{i:012}.jpg").symlink_to(Path(f"listed/{files[i]}").resolve())
    questions = [dict(question_id=i, image_id=i, question="What is it?") for i in range(TAR_CONTENT)]
    annotations = [dict(question_id=i, answers=[dict(answer=text), dict(answer="no"), dict(answer=text)])
                   for i, text in enumerate(captions)]
    Path("v2_OpenEnded_mscoco_train2014_questions.json").write_text(
        json.dumps(dict(data_subtype="train2014", questions=questions)))
    Path("v2_mscoco_train2014_annotations.json").write_text(json.dumps(dict(annotations=annotations)))
    Path("book.txt").write_text("\n".join(captions * 40))
    with contextlib.redirect_stdout(io.StringIO()):
        data.main(["pack", "book.txt", "tokens.safetensors"])
        data.main(["latents", "photos", "latents", "--vae", str(VAE), "--pixels", "32", "--device", "cpu"])
    return {"folder": "photos", "metadata.jsonl": "listed", "tar": "shard.tar", "list": "captions.json@listed",
            "LLaVA": "llava.json@listed", "VQAv2": "v2_OpenEnded_mscoco_train2014_questions.json@listed",
            "latents": "latents", "tokens": "tokens.safetensors", "emoji": str(EMOJI),
            "emoji, each": f"{EMOJI}@each"}


def describe(value) -> str:
    """Return a sample's value as text; tensors as a hash of their bytes."""
    if hasattr(value, "numpy"):
        value = value.float().contiguous().numpy().tobytes()
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, dict):
        return str({name: describe(value[name]) for name in sorted(value)})
    return str(value)


def hash_samples(specs: list[str], name: str) -> str:
    """Hash samples 0 to 1,999 of a mixture, without the folder's name."""
    mix = data.Mix(specs, 32, "key", length=16)
    digest = hashlib.sha256()
    for start in range(0, 2000, 100):
        for sample in mix.take(range(start, start + 100), name):
            digest.update(describe(sample).replace(os.getcwd(), "").encode())
    return digest.hexdigest()[:16]


def main() -> None:
    cli.Parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sources = write_sources()
        for kind, path in sources.items():
            for name in ("text",) if kind in ("LLaVA", "VQAv2", "tokens") else ("image", "text"):
                print(f"{kind:16}{name:8}{hash_samples([path], name)}", flush=True)
        for specs in (["photos:2", "shard.tar:0.5", "listed"], [f"{EMOJI}@each", "captions.json@listed:3"]):
            print(f"{' '.join(specs).replace(str(EMOJI), 'emoji'):40}{hash_samples(specs, 'image')}")


if __name__ == "__main__":
    main()
