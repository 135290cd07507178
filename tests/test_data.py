"""data.py: pictures, the tar reader, the order of an epoch."""

import tarfile

import pytest
import torch
from PIL import Image

import data
import emoji
from cli import UserError

def test_a_tar_is_read_sample_by_sample_and_a_cut_one_is_refused(tmp_path):
    with tarfile.open(emoji.TAR) as tar:
        names = [tar.next().name for _ in range(4)]
    first, second = list(zip(range(2), data.read_tar(emoji.TAR)))
    assert [first[1]["__key__"], second[1]["__key__"]] == [names[0].split(".")[0], names[2].split(".")[0]]
    assert set(first[1]) == {"__key__", "webp", "json"}
    whole = emoji.TAR.read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="cut.tar.gz: not a whole tar file"):
        list(data.read_tar(tmp_path / "cut.tar.gz"))
    with pytest.raises(UserError, match="no such tar"):
        list(data.read_tar(tmp_path / "none.tar"))


def test_an_epoch_is_a_permutation_and_differs_from_the_next_one():
    groups = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(40)]
    epochs = [[i for step in range(5)
               for i in data.shuffled("run", groups, range(40 * epoch + 8 * step, 40 * epoch + 8 * step + 8))]
              for epoch in range(40)]
    places = [[i // 3 for i in epoch] for epoch in epochs]
    assert all(sorted(epoch) == list(range(40)) for epoch in places)
    assert len({tuple(epoch) for epoch in places}) == 40
    assert len({epoch[0] for epoch in places}) > 15          # of 40: 25 are expected, 15 or fewer once in 1e6
    members = [epoch[epoch_places.index(7)] % 3 for epoch, epoch_places in zip(epochs, places)]
    assert set(members) == {0, 1, 2}                         # one of a group, drawn anew: missed once in 4e6
    assert data.shuffled("another", groups, range(40)) != epochs[0]
    for world in (1, 4):                                     # however the rows are dealt out
        dealt = [data.shuffled("run", groups, range(rank, 40, world)) for rank in range(world)]
        assert [i for row in zip(*dealt) for i in row] == epochs[0]


def test_any_picture_is_read_transparent_parts_white(tmp_path):
    picture = Image.new("RGBA", (60, 40), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 30, 40))
    picture.save(tmp_path / "a.png")
    rgb = data.read_picture(tmp_path / "a.png")
    assert rgb.getpixel((5, 5)) == (0, 0, 255) and rgb.getpixel((55, 5)) == (255, 255, 255)
    square = data.fit_picture(rgb, 20)
    assert square.size == (20, 20) and square.getpixel((2, 10)) == (0, 0, 255)
    Image.new("P", (9, 70)).save(tmp_path / "b.gif")
    assert data.to_tensor(data.fit_picture(data.read_picture(tmp_path / "b.gif"), 8)).shape == (3, 8, 8)
    image = torch.rand(3, 8, 8) * 2 - 1
    assert (data.to_tensor(data.to_picture(image)) - image).abs().max() < 1 / 127
    (tmp_path / "c.png").write_text("not a picture")
    with pytest.raises(UserError, match="c.png: not a picture"):
        data.read_picture(tmp_path / "c.png")
    with pytest.raises(UserError, match="no such picture"):
        data.read_picture(tmp_path / "d.png")
