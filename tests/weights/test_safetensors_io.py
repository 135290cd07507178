"""pretrained/safetensors_io.py: errors name the wrong file, and written files can be read."""

import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import load_mask_embedding
from common.cli import UserError
from pretrained.safetensors_io import Tensors, write_tensors


@pytest.mark.parametrize("name", ["a.safetensors", "a.sft", "A.SAFETENSORS"])
def test_safetensors_are_known_by_their_suffix(name, tmp_path):
    save_file({"a": torch.arange(6.0)}, tmp_path / name)
    assert Tensors([tmp_path / name]).read("a").tolist() == [0, 1, 2, 3, 4, 5]
    assert load_mask_embedding(tmp_path / name).shape == (6,)
    assert checkpoint.shards(tmp_path) == [tmp_path / name]
    with pytest.raises(UserError, match=f"{name}: .*no tokenizer"):
        checkpoint.load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("name, content, kind", [
    ("a.gguf", b"GGUF\3\0\0\0", "GGUF"), ("a.safetensors", b"GGUF\3\0\0\0", "GGUF"),
    ("a.ckpt", b"PK\3\4" + bytes(60), "is a pickle"),
    ("a.safetensors", b"PK\3\4" + bytes(60), "is a pickle"),
    ("a.bin", b"\x80\2\x8a\n" + bytes(60), "is a pickle"),
    ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ("a.safetensors", b"<!DOCTYPE html><html>", "web page"),
    ("a.ckpt", b"12345678", ".safetensors.*pickle"), ("a.safetensors", b"", "not a whole")])
def test_other_file_is_refused_with_its_kind(name, content, kind, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/{name}: .*{kind}") as error:
        checkpoint.load_mmdit(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reason", ["Is a directory", "No such file", "Permission denied"])
def test_unreadable_file_is_refused_with_the_reason(reason, tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    if reason == "Is a directory":
        file.mkdir()
    if reason == "Permission denied":  # tests may run as root, who can read any file

        def refuse(*args, **settings):
            raise PermissionError(13, reason)
        monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=f"a.safetensors: .*{reason}"):
        Tensors([file])


@pytest.mark.parametrize("name, load", [("a.safetensors", checkpoint.load_mmdit),
                                        ("a.pth", load_mask_embedding)])
def test_a_pipe_is_refused_and_not_waited_for(name, load, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: "):
        load(tmp_path / name)


@pytest.mark.parametrize("value, dtype, name", [(7e4, torch.float16, "F16"),
                                                (float("nan"), torch.float32, "F32")])
def test_non_finite_tensor_is_not_written(value, dtype, name, tmp_path):
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"a": torch.ones(3)}, dtype)
    tensors = {"a": torch.ones(3), "b": torch.tensor([0.0, value])}
    with pytest.raises(UserError, match=f"a.safetensors: b .*{name}"):
        write_tensors(file, tensors, dtype)
    assert load_file(file).keys() == {"a"} and list(tmp_path.iterdir()) == [file]


def test_large_values_are_written_in_bfloat16(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"a": torch.tensor([0.0, 65536.0])}, torch.bfloat16)
    tensor = load_file(tmp_path / "a.safetensors")["a"]
    assert tensor.dtype == torch.bfloat16 and tensor.tolist() == [0, 65536]


def test_damaged_file_is_read_whole_or_refused_in_one_line(tiny, tmp_path):
    """Flip any bit of the header, or cut the file anywhere; the tensors have no checksum."""
    folder, chance = shutil.copytree(tiny, tmp_path / "tiny"), random.Random(0)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    expected = checkpoint.load_mmdit(tiny).state_dict()
    refused = 0
    for round in range(100):
        at = chance.randrange(8 if round % 10 == 0 else header)
        flipped = content[at] ^ 1 << chance.randrange(8)
        file.unlink()                                            # tensors are still mapped to it
        if round % 4 == 3:
            file.write_bytes(content[:chance.randrange(len(content))])
        else:
            file.write_bytes(content[:at] + bytes([flipped]) + content[at + 1:])
        try:
            state = checkpoint.load_mmdit(folder).state_dict()
            checkpoint.load_embedding(folder)
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], expected[name]) for name in expected)
        except UserError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 80
