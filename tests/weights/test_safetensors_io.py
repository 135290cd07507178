"""pretrained/safetensors_io.py: what lies in a safetensors file's place is named, and what is written can be read."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import load_mask_embedding
from common.cli import UserError
from inference.parts import EMOJI
from pretrained.safetensors_io import Tensors, write_tensors


@pytest.mark.parametrize("name", ["a.safetensors", "a.sft", "A.SAFETENSORS"])
def test_safetensors_are_known_by_their_names(name, tmp_path):
    save_file({"a": torch.arange(6.0)}, tmp_path / name)
    assert Tensors([tmp_path / name]).read("a").tolist() == [0, 1, 2, 3, 4, 5]
    assert load_mask_embedding(tmp_path / name).shape == (6,)
    assert checkpoint.shards(tmp_path) == [tmp_path / name]
    with pytest.raises(UserError, match="a safetensors file has no tokenizer"):
        checkpoint.load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("name, content, message", [
    ("a.gguf", b"GGUF\3\0\0\0", "is GGUF, quantised weights, which are not read here"),
    ("a.safetensors", b"GGUF\3\0\0\0", "is GGUF, quantised weights"),
    ("a.ckpt", b"PK\3\4" + bytes(60), "is a pickle, which can run code; convert it"),
    ("a.safetensors", b"PK\3\4" + bytes(60), "is a pickle"),
    ("a.bin", b"\x80\2\x8a\n" + bytes(60), "is a pickle"),
    ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    ("a.safetensors", b"<!DOCTYPE html><html>", "is a web page, not the file"),
    ("a.ckpt", b"12345678", "expected .safetensors; a .ckpt may be a pickle"),
    ("a.safetensors", b"", "not a whole safetensors file")])
def test_what_is_something_else_is_named_as_what_it_is(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load_mmdit(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_a_file_that_may_not_be_read_is_not_said_to_be_missing(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(UserError, match="a.safetensors: can't be read .Is a directory"):
        Tensors([tmp_path / "a.safetensors"])
    with pytest.raises(UserError, match="b.safetensors: can't be read .No such file"):
        Tensors([tmp_path / "b.safetensors"])

    def refused(*args, **more):                                  # root, who runs the tests, may read anything
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(UserError, match="b.safetensors: can't be read .Permission denied"):
        Tensors([tmp_path / "b.safetensors"])


def test_weights_beyond_the_range_are_refused_when_they_are_written(tmp_path):
    good, bad = {"a": torch.ones(3)}, {"a": torch.ones(3), "b": torch.tensor([0.0, 7e4])}
    write_tensors(tmp_path / "a.safetensors", good, torch.float16)
    with pytest.raises(UserError, match="b is not finite in F16 .BF16 has F32's range.; nothing was written"):
        write_tensors(tmp_path / "a.safetensors", bad, torch.float16)
    assert load_file(tmp_path / "a.safetensors").keys() == {"a"} and len(list(tmp_path.iterdir())) == 1
    write_tensors(tmp_path / "a.safetensors", bad, torch.bfloat16)
    with pytest.raises(UserError, match="a is not finite in F32"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.tensor([float("nan")])}, torch.float32)


def test_damaged_headers_are_read_as_the_whole_file_or_refused_in_one_line(tiny, tmp_path):
    """Any bit of the header flipped, or the file cut anywhere; its numbers have no checksum."""
    folder, chance = shutil.copytree(tiny, tmp_path / "tiny"), random.Random(0)
    file, whole = folder / "model.safetensors", (tiny / "model.safetensors").read_bytes()
    header, counts = int.from_bytes(whole[:8], "little") + 8, dict(whole=0, refused=0)
    true = checkpoint.load_mmdit(tiny).state_dict()
    for n in range(100):
        at = chance.randrange(8 if n % 10 == 0 else header)
        damaged = whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1:]
        file.unlink()                                            # tensors of the last round are mapped to it
        file.write_bytes(whole[:chance.randrange(len(whole))] if n % 4 == 3 else damaged)
        try:
            found = checkpoint.load_mmdit(folder).state_dict()
            checkpoint.load_embedding(folder)
            assert found.keys() == true.keys() and all(torch.equal(found[name], true[name]) for name in true)
            counts["whole"] += 1
        except UserError as error:
            assert str(folder) in str(error) and len(str(error).splitlines()) == 1
            counts["refused"] += 1
    assert counts["refused"] > 80


def test_the_shipped_tokenizer_knows_its_texts():
    tokenizer = checkpoint.load_tokenizer(EMOJI)
    assert 2000 < len(tokenizer.seen) < tokenizer.vocab_size and "Brazil" in tokenizer.capitals
