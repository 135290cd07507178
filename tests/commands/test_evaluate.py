"""evaluate.py: a benchmark's images, by any number of processes; scores; the emoji set."""

import argparse
import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from common.cli import UserError
from dataset.images import read_image, text_fields
from helpers import ROOT, Forked, kill_when, to_the_end
from inference.parts import Parts
from metrics import benchmarks, comparisons, emojis, fid, tables


class Means(torch.nn.Module):
    """A network with 16 features: the mean of each colour in each image quarter, and the sums."""

    def forward(self, x):
        cells = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)                # (B, 12)
        return torch.cat([cells, cells.view(len(x), 3, 4).sum(1)], 1)


@pytest.fixture
def small_network(monkeypatch):
    """Replace Inception with random weights by `Means`."""
    monkeypatch.setattr(comparisons.inception, "untrained", Means)


def run(*args):
    evaluate.main(list(map(str, args)))


def write_noise(path, seed, size=(32, 32)):
    """Write an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def files(folder):
    """Return the content of each file in a folder by name, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def read_json(path):
    return json.loads(path.read_text())


def row_of(table, name):
    """Return the cells of the row of a printed table that begins with this name."""
    for line in table.splitlines():
        first, *cells = [cell.strip() for cell in line.split("|")[1:-1]] or [""]
        if first == name:
            return cells
    raise AssertionError(f"no row {name} in {table}")


# ------------------------------------------------------------------------------------------ images

def test_a_killed_draw_resumed_by_two_processes_writes_the_files_of_one(tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"red apple number {i}" for i in range(36)))
    flags = ["draw", "lines", prompts, "--checkpoint", tiny, "--steps", 12]
    run(*flags, tmp_path / "one", "--batch", 7)

    resumed = tmp_path / "resumed"
    flags = [*flags, resumed, "--batch", 3]
    killed = Forked(1, *flags, program="evaluate")
    kill_when(killed, lambda: len(list(resumed.glob("*.png"))) >= 9)
    before = {path: path.stat().st_mtime_ns for path in resumed.glob("*.png")}
    assert 9 <= len(before) < 36
    output, _ = to_the_end(Forked(2, *flags, program="evaluate"))
    [line] = [line for line in output.splitlines() if str(resumed) in line]     # of one process
    assert "36" in line and str(len(before)) in line
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files(resumed) == files(tmp_path / "one")
    settings = read_json(tmp_path / "resumed.json")["settings"]
    assert settings == read_json(tmp_path / "one.json")["settings"]
    assert settings["checkpoint"] == Parts(tiny).digest()


def test_a_sample_does_not_depend_on_what_else_is_drawn(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("a cat\na dog\n\na red bus\n")
    flags = ["--checkpoint", tiny, "--steps", 2, "--seed", 5]
    two = tmp_path / "two"
    run("draw", "lines", tmp_path / "a.txt", two, "--n", 2, *flags)
    run("draw", "lines", tmp_path / "a.txt", tmp_path / "one", "--limit", 2, *flags)
    of_two = files(two)
    of_one = files(tmp_path / "one")
    assert len(of_two) == 6 and len(of_one) == 2
    assert of_one["00000.png"] == of_two["00000.png"]
    assert of_one["00001.png"] == of_two["00002.png"]
    seeds = [text_fields(two / name)["seed"] for name in of_two]
    assert seeds == ["5", "6", "1005", "1006", "2005", "2006"]
    with pytest.raises(UserError, match="00000.png: .*steps '2'.*'3'"):
        run("draw", "lines", tmp_path / "a.txt", two, "--n", 2, *flags, "--steps", 3)


def test_geneval_images_have_its_layout(tiny, tmp_path):
    entries = [dict(tag="single_object", include=[{"class": "bench"}], prompt="a photo of a bench"),
               dict(tag="colors", include=[], prompt="a photo of a red apple")]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
    out = tmp_path / "out"
    run("draw", "geneval", tmp_path / "m.jsonl", out, "--checkpoint", tiny, "--steps", 1)
    names = []
    for i in (0, 1):
        assert read_json(out / f"0000{i}/metadata.jsonl") == entries[i]
        names += [f"0000{i}/metadata.jsonl", *(f"0000{i}/samples/0000{k}.png" for k in range(4))]
    assert list(files(out)) == names


def test_geneval_results_are_scored_with_the_settings_of_the_images(tmp_path, capsys):
    results = [dict(tag="single_object", prompt="p", correct=i < 3) for i in range(4)]
    results += [dict(tag="colors", prompt="p", correct=right) for right in (False, True)]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, results)))
    (tmp_path / "out.json").write_text(json.dumps(dict(made_by="draw", settings=dict(checkpoint="digest"))))
    run("score", "geneval", tmp_path / "results.jsonl", "--drawings", tmp_path / "out",
        "--json", tmp_path / "s.json")
    output = capsys.readouterr().out
    assert row_of(output, "these drawings") == ["0.7500", "0.5000", "0.6250"]
    assert "| 0.6500 |" in output                                       # D-DiT, as published
    assert "counting" in output and "left out: 4" in output
    saved = read_json(tmp_path / "s.json")
    assert saved["scores"]["these drawings"] == {"single object": 0.75, "colors": 0.5,
                                                 "overall": 0.625}
    assert saved["note"]["settings"]["checkpoint"] == "digest"
    assert saved["command"].startswith("python evaluate.py score geneval ")


def test_t2i_compbench_has_its_layout_and_its_results_are_scored(tiny, tmp_path, capsys):
    (tmp_path / "color_val.txt").write_text("a red cup\tand more\na blue/green cup\n")
    (tmp_path / "shape_val.txt").write_text("a round box\n")
    out = tmp_path / "out"
    run("draw", "t2i", tmp_path / "color_val.txt", tmp_path / "shape_val.txt", out,
        "--checkpoint", tiny, "--steps", 1, "--n", 2)
    assert list(files(out)) == [
        "color/samples/a blue green cup_000002.png", "color/samples/a blue green cup_000003.png",
        "color/samples/a red cup_000000.png", "color/samples/a red cup_000001.png",
        "shape/samples/a round box_000000.png", "shape/samples/a round box_000001.png"]
    answers = [dict(question_id=i, answer=answer) for i, answer in enumerate(["0.5", "0.25", "1"])]
    (out / "color/annotation_blip").mkdir()
    (out / "color/annotation_blip/vqa_result.json").write_text(json.dumps(answers))
    run("score", "t2i", out)
    output = capsys.readouterr().out
    assert row_of(output, "these drawings")[0] == "0.5833"
    assert "| 0.8001 | 0.5703 | 0.6856 |" in output                     # D-DiT, as published
    assert f"{out}/shape: " in output and "vqa_result.json" in output
    assert "3 answers, 4 drawings" in output and "steps 1" in output


def test_dpg_bench_images_are_grids_of_four(tiny, tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name in ("12", "partiprompts3"):
        (prompts / f"{name}.txt").write_text(f"a long\nstory {name}")
    out = tmp_path / "out"
    flags = ["--checkpoint", tiny, "--steps", 1]
    run("draw", "dpg", prompts, out, *flags)
    run("draw", "dpg", prompts, tmp_path / "one", *flags, "--n", 1)
    assert list(files(out)) == ["12.png", "partiprompts3.png"]
    grid = np.array(read_image(out / "partiprompts3.png"))
    single = np.array(read_image(tmp_path / "one/partiprompts3.png"))
    assert grid.shape == (32, 32, 3) and np.array_equal(grid[:16, :16], single)
    assert text_fields(out / "12.png")["seed"] == "0 1 2 3"
    assert len({grid[y:y + 16, x:x + 16].tobytes() for y in (0, 16) for x in (0, 16)}) == 4


DPG_RESULTS = """out/12.png, 1.0, 0.5, 0.5, 1.0, 0.75
out/partiprompts3.png, 0.5, 0.5, 0.5, 0.5, 0.5
Model: out
L1 category scores:
\tentity: 80.5
\tglobal: 60
L2 category scores:
\tentity - whole: 80.5
DPG-Bench score: 62.5"""


def test_dpg_bench_results_are_scored(tmp_path, capsys):
    (tmp_path / "r.txt").write_text(DPG_RESULTS)
    run("score", "dpg", tmp_path / "r.txt")
    output = capsys.readouterr().out
    assert "|  | entity | global | overall |" in output and "left out" not in output
    assert row_of(output, "these drawings") == ["80.5", "60.0", "62.5"]


def test_dpg_bench_results_of_a_stopped_scorer_are_named(tmp_path, capsys):
    (tmp_path / "r.txt").write_text("\n".join(DPG_RESULTS.splitlines()[:2]))
    run("score", "dpg", tmp_path / "r.txt")
    assert "stopped" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ scores

CATEGORIES = dict(cats=range(0, 18, 3), dogs=range(1, 18, 3), none=range(2, 18, 3))


@pytest.fixture
def mjhq(tmp_path, small_network, capsys):
    """Score three categories, one of them never drawn; return the printed and the saved scores.

    One drawing is cut off, and one real image is missing."""
    meta = {}
    for category, numbers in CATEGORIES.items():
        meta |= {f"id{i}": dict(category=category, prompt=f"p{i}") for i in numbers}
    meta["id18"] = dict(category="cats", prompt="")
    (tmp_path / "meta_data.json").write_text(json.dumps(meta))
    for i, (name, entry) in enumerate(meta.items()):
        write_noise(tmp_path / "real" / entry["category"] / f"{name}.jpg", i, (48, 32))
        if entry["category"] != "none":
            write_noise(tmp_path / "drawn" / entry["category"] / f"{name}.png", 100 + i)
    cut = tmp_path / "drawn/cats/id3.png"
    cut.write_bytes(cut.read_bytes()[:300])
    (tmp_path / "real/dogs/id4.jpg").unlink()
    run("mjhq", tmp_path / "drawn", tmp_path / "real", tmp_path / "meta_data.json",
        "--inception", "random", "--json", tmp_path / "s.json")
    return capsys.readouterr().out, read_json(tmp_path / "s.json")


def statistics_of(paths):
    listing = [functools.partial(read_image, path) for path in paths]
    return fid.statistics(fid.features(Means(), listing)[0])


@pytest.mark.parametrize("category", ["cats", "dogs"])
def test_mjhq_has_a_score_of_each_category(category, mjhq, tmp_path):
    output, saved = mjhq
    numbers = CATEGORIES[category]
    drawn = statistics_of(tmp_path / f"drawn/{category}/id{i}.png" for i in numbers if i != 3)
    real = statistics_of(tmp_path / f"real/{category}/id{i}.jpg" for i in numbers if i != 4)
    scores = saved["scores"]["these drawings"]
    assert scores[category] == pytest.approx(fid.frechet(drawn, real))   # float32 features
    assert set(scores) == {"overall", "cats", "dogs"}
    assert "| 15.16 |" in output                                        # D-DiT, as published


def test_mjhq_images_and_categories_left_out_are_named(mjhq):
    output, saved = mjhq
    lines = saved["left_out"]
    for part in ("none: 0 drawn", "drawn/cats/id3.png: ", "id18: ", "real/dogs/id4.jpg: ",
                 "drawn/none/id2.png: "):
        assert sum(part in line for line in lines) == 1, part
    assert len(lines) == 10 and "left out: 10" in output


@pytest.fixture
def coco_captions(tmp_path, monkeypatch):
    """Write COCO captions of eight images; the benchmark takes six of them."""
    monkeypatch.setattr(benchmarks, "COCO", 6)
    images = [dict(id=i, file_name=f"COCO_val2014_{i:012}.jpg") for i in range(8)]
    captions = [dict(id=30 - i, image_id=i, caption=f" a  cat {i}") for i in range(8)]
    captions += [dict(id=100 + i, image_id=i, caption="a later one") for i in range(8)]
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(dict(images=images, annotations=captions)))
    return file


def test_coco_prompts_are_the_first_captions_of_chosen_images(coco_captions):
    benchmark = benchmarks.read("coco", [str(coco_captions)])
    assert len(benchmark.jobs) == 6
    assert benchmark.jobs == benchmarks.read("coco", [str(coco_captions)]).jobs
    for (prompt, seed), name in zip(benchmark.jobs, benchmark.names):
        number = int(name[:12])
        assert prompt == f"a cat {number}" and seed == 1000 * number


def test_coco_images_are_cut_to_the_samples_shape(coco_captions, tmp_path, small_network, capsys):
    benchmark = benchmarks.read("coco", [str(coco_captions)])
    (tmp_path / "val").mkdir()
    for i, name in enumerate(benchmark.names):
        write_noise(tmp_path / "drawn" / name, i)
        wide = np.full((32, 96, 3), 255, np.uint8)            # the white sides are cut off
        wide[:, 32:64] = np.array(read_image(tmp_path / "drawn" / name))
        Image.fromarray(wide).save(tmp_path / "val" / benchmark.real[name], "PNG")
    run("coco", tmp_path / "drawn", tmp_path / "val", coco_captions, "--inception", "random",
        "--json", tmp_path / "s.json")
    scores = read_json(tmp_path / "s.json")["scores"]["these drawings"]
    assert scores["FID"] < 1e-9                               # float64: the images are equal
    output = capsys.readouterr().out
    assert "| 9.40 | 31.20 |" in output                       # D-DiT, as published
    assert "random weights" in output


@pytest.fixture
def two_folders(tmp_path, small_network):
    """Write two folders of six images; the second has a seventh that is cut off."""
    for i in range(6):
        write_noise(tmp_path / "a" / f"{i}.png", i)
        write_noise(tmp_path / "b" / f"{i}.png", 50 + i)
    (tmp_path / "b" / "bad.png").write_bytes(b"\x89PNG")


def fid_scores(folder, other):
    """Return the scores of folder/a against another source."""
    run("fid", folder / "a", other, "--inception", "random", "--json", folder / "s.json")
    [scores] = read_json(folder / "s.json")["scores"].values()
    return scores


def test_fid_of_a_folder_equals_fid_of_its_statistics(two_folders, tmp_path, capsys):
    run("statistics", tmp_path / "b", tmp_path / "b.npz", "--inception", "random", "--features")
    assert "bad.png" in capsys.readouterr().out
    scores = fid_scores(tmp_path, tmp_path / "b")
    assert scores["FID"] > 0 and "KID x 1000" in scores
    assert scores == pytest.approx(fid_scores(tmp_path, tmp_path / "b.npz"))      # float64


def test_statistics_need_a_name_that_fid_reads(tmp_path, run_program):
    code, error = run_program(evaluate.main, ["statistics", "nowhere", tmp_path / "b.stats", "--inception", "random"])
    assert code == 2 and ".npz" in error


def test_drawings_do_not_overwrite_their_prompts(tmp_path):
    captions = tmp_path / "mjhq.json"
    captions.write_text(json.dumps({"a": dict(category="b", prompt="c")}))
    with pytest.raises(UserError, match="mjhq.json: .*another folder"):
        run("draw", "mjhq", captions, tmp_path / "mjhq")
    assert "prompt" in captions.read_text()


def test_settings_of_zero_are_printed_and_left_out_questions_are_counted(capsys):
    note = dict(settings=dict(temperature=0.0, seed=None, suffix=""), left_out=["a", "b"])
    args = argparse.Namespace(command="clip", command_line="x", json=None)
    tables.tell(args, {"a": {"b": 1.0}}, [], note)
    output = capsys.readouterr().out
    assert "settings: temperature 0.0\n" in output and "left_out" not in output


def test_statistics_without_features_give_no_kid(two_folders, tmp_path):
    run("statistics", tmp_path / "b", tmp_path / "b.npz", "--inception", "random")
    scores = fid_scores(tmp_path, tmp_path / "b.npz")
    assert "FID" in scores and "KID x 1000" not in scores


@pytest.mark.parametrize("source, message", [
    ("emoji:nose", "emoji:nose: .*train, tone, style"), ("nowhere", "nowhere")])
def test_fid_of_a_source_that_does_not_exist_is_refused(source, message, two_folders, tmp_path):
    with pytest.raises(UserError, match=message):
        fid_scores(tmp_path, source)


@pytest.mark.parametrize("benchmark, name, content, parts", [
    ("geneval", "m.jsonl", '{"prompt": "a"}', ["m.jsonl:1: ", "tag and prompt"]),
    ("geneval", "m.jsonl", '{"tag": "colors", "prompt": null}',
     ["m.jsonl:1: ", '"prompt" is null']),
    ("geneval", "m.jsonl", "", ["m.jsonl: ", "no prompt"]),
    ("mjhq", "m.json", '{"../x": {"category": "a", "prompt": "b"}}', ["m.json: ", "'a/../x'"]),
    ("mjhq", "m.json", "[]", ["m.json: ", "{id: {category, prompt}}"]),
    ("coco", "c.json", '{"images": []}', ["c.json: ", "images and annotations"]),
    ("t2i", "color_val.txt", "x" * 300, ["color_val.txt", "name"]),
    ("lines", "a.txt", "\n\n", ["a.txt: ", "no prompt"]),
    ("emoji", "nose", None, ["nose: ", "tone"])])
def test_prompts_of_another_form_are_refused_in_one_line(benchmark, name, content, parts, tmp_path,
                                                         run_program):
    source = name
    if content is not None:
        source = tmp_path / name
        source.write_text(content)
    status, error = run_program(evaluate.main, ["draw", benchmark, source, tmp_path / "out"])
    assert status == 1 and len(error.splitlines()) == 1
    for part in parts:
        assert part in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("benchmark", ["coco", "mjhq"])
def test_benchmarks_of_one_sample_a_prompt_refuse_more(benchmark, tmp_path, run_program):
    (tmp_path / "x.json").write_text("{}")
    flags = ["draw", benchmark, tmp_path / "x.json", tmp_path / "out", "--n", 2]
    status, error = run_program(evaluate.main, flags)
    assert status == 1 and "--n 2: " in error and benchmark in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("benchmark, content", [
    ("geneval", '{"tag": "colors", "correct": 1}'), ("dpg", "x"), ("geneval", "")])
def test_results_that_no_scorer_wrote_are_refused_in_one_line(benchmark, content, tmp_path,
                                                              run_program):
    (tmp_path / "r").write_text(content)
    status, error = run_program(evaluate.main, ["score", benchmark, tmp_path / "r"])
    assert status == 1 and len(error.splitlines()) == 1 and str(tmp_path / "r") in error


# --------------------------------------------------------------------------------------- the emoji

@pytest.fixture
def emoji_records(emoji_set, monkeypatch):
    """Let evaluate.py see only the first 400 emoji, with some of each split; return the records."""
    records, images = emoji_set
    monkeypatch.setattr(evaluate.emoji, "load", lambda *args: (records[:400], images[:400]))
    return records[:400]


@pytest.fixture
def read_settings(monkeypatch):
    """Collect (config, seeds) of each batch that is read with seeds; "read back" uses none."""
    calls = []
    write = emojis.write

    def record(parts, latents, questions, *settings):
        if settings:
            calls.append(settings)
        return write(parts, latents, questions, *settings)
    monkeypatch.setattr(emojis, "write", record)
    return calls


EMOJI = ["emoji", "--splits", "tone", "--limit", 2, "--steps", 2]


def test_the_emoji_set_needs_square_images_and_a_text_head(tmp_path):
    with pytest.raises(UserError, match="square images, not 96x64"):
        run(*EMOJI, "--width", 96)
    fixtures = ROOT / "tests" / "fixtures"
    with pytest.raises(UserError, match="SD3's, which has no text head"):
        run(*EMOJI, "--checkpoint", fixtures / "sd3.safetensors", "--t5", fixtures / "release",
            "--tokenizer", fixtures / "release", "--height", 16, "--width", 16)


def test_the_emoji_set_is_measured_in_three_tables(emoji_records, read_settings, tmp_path, capsys):
    run(*EMOJI, "--prompts", 2, "--seeds", 0, 1, "--json", tmp_path / "r.json")
    output = capsys.readouterr().out
    assert row_of(output, "drawing, %") == ["emoji", "people", "exact", "read back"]
    assert row_of(output, "reading, %")[:3] == ["caption", "name", "kind"]
    assert row_of(output, "POPE, %")[0] == "accuracy" and row_of(output, "tone")
    saved = read_json(tmp_path / "r.json")
    runs = saved["results"]["tone"]
    assert len(runs) == 2
    for scores in runs:
        assert all(0 <= value <= 100 for value in scores.values())
    assert len(read_settings) == 2        # captions and answers: greedy, so once for both seeds
    assert saved["settings"]["steps"] == "2" and saved["settings"]["reading"]["steps"] == 2


def test_random_reading_of_the_emoji_set_runs_for_each_seed(emoji_records, read_settings, capsys):
    run(*EMOJI, "--prompts", 0, "--seeds", 3, 4, "--order", "confidence", "--temperature", 1,
        "--image-cache", "off")
    seeds = [seed for _, seeds in read_settings for seed in seeds]
    assert len(seeds) > 8 and len(set(seeds)) == len(seeds)      # one for each text
    for config, _ in read_settings:
        assert (config.order, config.temperature, config.image_cache) == ("confidence", 1, "off")
    assert "drawing" not in capsys.readouterr().out


def test_the_emoji_page_draws_and_reads_the_splits_it_names(emoji_records, tmp_path, monkeypatch):
    cells = []
    for name in ("rows", "page"):
        layout = getattr(emojis.grids, name)

        def collect(*groups, layout=layout):
            for group in groups:
                cells.extend(group)
            return layout(*groups)
        monkeypatch.setattr(emojis.grids, name, collect)
    run("emoji", "--page", tmp_path / "page.png", "--steps", 1)
    by_caption = {record["caption"]: record for record in emoji_records}
    drawn = [by_caption[caption] for _, caption in cells[:28]]
    assert [record["split"] for record in drawn] == ["train"] * 21 + ["tone"] * 7
    assert all(record["kind"] != "people & body" for record in drawn[:14])
    captions = [lines for _, lines in cells[28:]]
    assert len(captions) == 10 and all(line.startswith("read: ") for line, _ in captions)
    read = {by_caption[line.removeprefix("true: ")]["split"] for _, line in captions}
    assert read == {"tone", "style"}
    assert Image.open(tmp_path / "page.png").width == 1000


def test_the_clip_score_of_a_folder_names_images_without_a_caption(tiny, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a cat\na dog\na red bus\n")
    out = tmp_path / "out"
    run("draw", "lines", tmp_path / "a.txt", out, "--checkpoint", tiny, "--steps", 1)
    write_noise(out / "other.png", 0)
    fixture = ROOT / "tests/fixtures/clip"
    run("clip", out, "--clip", fixture, "--json", tmp_path / "s.json")
    saved = read_json(tmp_path / "s.json")
    [scores] = saved["scores"].values()
    [line] = saved["left_out"]
    assert line.startswith("other.png: ") and "pairs: 3" in capsys.readouterr().out
    pairs = [(path.name, path, text_fields(path)["prompt"]) for path in sorted(out.glob("0*.png"))]
    model = comparisons.clip.load(fixture)
    tokenizer = comparisons.clip.load_tokenizer(fixture)
    cosines, _ = comparisons.clip.score(pairs, model, tokenizer, "cpu")
    assert set(scores) == {"CLIP", "its standard error"}
    assert scores["CLIP"] == pytest.approx(np.mean(cosines))            # float32 cosines
