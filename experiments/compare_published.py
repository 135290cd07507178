"""Compare drawing and captioning with D-DiT's published class and loops, and drawing with
diffusers' pipeline of SD3, in turns in one process.

    git clone https://github.com/zijieli-Jlee/Dual-Diffusion PUBLISHED
    python -m venv peers && peers/bin/pip install diffusers==0.42.1 transformers==5.23.0 torch safetensors
    peers/bin/python -m experiments.compare_published PUBLISHED
    peers/bin/python -m experiments.compare_published PUBLISHED --size full --device cuda --dtype bfloat16

--size full: the sizes of SD3-medium and T5-XXL.  --size third: a third of their depths and widths,
so that each part takes its real share of the work, as does the text head with a ninth of the
vocabulary.  The random weights are the same on all sides, and so are the drawn latents; in float32
that is checked.  A text has 128 tokens; the batch is 1, as in the published loop of reading.  The
program prints the times of each job, and then the same as JSON.

"cached": --image-cache once.  The order `threshold` is not compared: how many evaluations it needs
depends on the text, and random weights are never certain.  --dtype is that of ours and of
diffusers; the published loops choose their own, float16 on a GPU and float32 on a CPU.  This is not
part of the test run, since it needs packages that the project does not need.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import types
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple
from unittest.mock import MagicMock

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline)
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

import checkpoint
from common import cli
from common.devices import choose_device
from experiments.turns import compare, count_texts, machine, time_in_turns
from inference import text_to_image
from inference.compiled import compile_blocks
from inference.image_to_text import ReadConfig, fill
from inference.parts import Parts
from pretrained.vae import Pixels
from training.models import Models

# depth and heads of the transformer (a head has size 64), vocabulary, and T5
SIZES = {
    "third": (8, 8, 3568, dict(d_model=1344, d_ff=3392, num_layers=8, num_heads=21)),
    "full": (24, 24, 32100, dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64)),
}
LENGTH = 128                                        # tokens of a text
GUIDANCE = 7.0


def import_published(folder: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """Import the published model and pipeline.  The pipeline uses torchvision to read image files
    only; a stand-in saves its installation."""
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.functional"]
    if not importlib.util.find_spec("torchvision"):
        sys.modules.update(dict.fromkeys(names, MagicMock()))
    sys.path.insert(0, str(folder))
    from sd3_modules import dual_diff_pipeline, sd3_model
    return sd3_model, dual_diff_pipeline


def make_published(folder: Path, size: str, device: torch.device) -> tuple:
    """Return the published pipeline and text sampler, with random weights."""
    model_module, pipeline_module = import_published(folder)
    depth, heads, vocabulary, t5 = SIZES[size]
    torch.manual_seed(0)
    with device:
        transformer = model_module.SD3JointModelFlexible(
            vocabulary, num_layers=depth, num_attention_heads=heads,
            joint_attention_dim=t5["d_model"], caption_projection_dim=64 * heads,
            pos_embed_max_size=192)
        text_encoder = T5EncoderModel(T5Config(vocab_size=vocabulary, d_kv=64,
                                               feed_forward_proj="gated-gelu", **t5))
    for name, parameter in transformer.named_parameters():
        if parameter.ndim > 1 and "pos_embed" not in name:
            nn.init.normal_(parameter, std=0.02)
    # the published loops use CUDA's autocast, to float16, which does nothing on a CPU
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    for module in (transformer, text_encoder):
        module.to(device, dtype).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = pipeline_module.DualDiffSD3Pipeline(transformer, scheduler, None, text_encoder, None)
    sampler = pipeline_module.ConditionalMaskedDiffusionSampler(vocabulary - 1, text_encoder,
                                                                transformer)
    return pipeline, sampler


def make_diffusers(transformer: nn.Module, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """Return diffusers' pipeline of SD3 with the weights of the published transformer.

    It has no text head, and its last block stops after the text's keys and values.  Its pooled
    embedding, which D-DiT leaves out, is zero."""
    c = transformer.config
    device = transformer.device
    with device:
        model = SD3Transformer2DModel(
            sample_size=c.sample_size, in_channels=c.in_channels, num_layers=c.num_layers,
            num_attention_heads=c.num_attention_heads, joint_attention_dim=c.joint_attention_dim,
            caption_projection_dim=c.caption_projection_dim, pooled_projection_dim=2048,
            out_channels=c.out_channels, pos_embed_max_size=c.pos_embed_max_size)
    theirs = transformer.state_dict()
    last_norm = f"transformer_blocks.{c.num_layers - 1}.norm1_context.linear."
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("time_text_embed.text_embedder"):
            tensors[name] = torch.zeros_like(tensor)
        elif name.startswith(last_norm):                     # shift, scale, ... -> scale, shift
            shift, scale = theirs[name].chunk(6)[:2]
            tensors[name] = torch.cat([scale, shift])
        elif name.startswith(("norm_out", "proj_out")):
            tensors[name] = theirs[f"image_{name}"]
        else:
            tensors[name] = theirs[name]
    model.load_state_dict(tensors)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(model.to(device, dtype).eval(), scheduler, *[None] * 7)


def make_ours(pipeline, pixels: int, dtype: torch.dtype) -> tuple[Parts, nn.Module]:
    """Load the published weights into our classes; return them as parts, and our T5."""
    device = pipeline.transformer.device
    with tempfile.TemporaryDirectory() as folder:
        pipeline.transformer.save_pretrained(f"{folder}/transformer")
        pipeline.text_encoder.save_pretrained(f"{folder}/text_encoder")
        vocabulary = pipeline.text_encoder.config.vocab_size
        mmdit = checkpoint.load_mmdit(folder, dtype, vocabulary)
        t5 = checkpoint.load_t5(folder, dtype)
        for module in (mmdit, t5):          # its tensors are mapped to files that are about to go
            copies = {}
            for name, tensor in module.state_dict().items():
                copies[name] = tensor.to(device, copy=True)
            module.load_state_dict(copies, assign=True)
            module.to(device)                                # what is not in the state, too
    tokenizer = SimpleNamespace(mask_id=vocabulary - 1, end_id=-1, pad_id=-1,  # texts never end
                                encode=partial(prompt_ids, mask_id=vocabulary - 1))
    models = Models(nn.ModuleDict(dict(mmdit=mmdit)).eval(), tokenizer, t5, Pixels())
    return Parts.of(models, pixels // 8, LENGTH, dtype), t5


def prompt_ids(text: str, length: int, mask_id: int) -> Tensor:
    """Return made-up ids (L,) of a text."""
    generator = torch.Generator().manual_seed(len(text))
    return torch.randint(0, mask_id, (length,), generator=generator)


class Sides(NamedTuple):
    """Models with the same weights."""
    pipeline: object                    # the published one
    sampler: object                     # of texts, the published one
    diffusers: StableDiffusion3Pipeline
    parts: Parts                        # ours
    t5: nn.Module                       # ours


def compare_drawing(sides: Sides, steps: int, rounds: int) -> dict[str, list[float]]:
    """Time drawings of one prompt with guidance, and print how much the sides differ.

    In float32, check that they draw the same."""
    pipeline, diffusers, parts = sides.pipeline, sides.diffusers, sides.parts
    device = parts.device
    noise = text_to_image.draw_noise(parts, [0])
    pooled = torch.zeros(1, 2048, device=device, dtype=diffusers.transformer.dtype)
    drawn = {}
    for peer in (pipeline, diffusers):
        peer.set_progress_bar_config(disable=True)

    def states() -> tuple[Tensor, Tensor]:
        ids = [parts.tokenizer.encode(text, LENGTH) for text in ("a prompt", "")]
        return pipeline.text_encoder(torch.stack(ids).to(device))[0].split(1)

    def published() -> None:
        prompt, negative = states()
        drawn["published"] = pipeline.text_to_image_sampling_loop(
            None, num_inference_steps=steps, guidance_scale=GUIDANCE, latents=noise,
            prompt_embeds=prompt, negative_prompt_embeds=negative, output_type="latent")

    def draw_with_diffusers() -> None:
        prompt, negative = (text.to(pooled.dtype) for text in states())
        drawn["diffusers"] = diffusers(
            num_inference_steps=steps, guidance_scale=GUIDANCE, latents=noise,
            height=8 * parts.height, width=8 * parts.width, prompt_embeds=prompt,
            negative_prompt_embeds=negative, pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=pooled, output_type="latent").images

    def ours() -> None:
        drawn["ours"] = text_to_image.draw(parts, ["a prompt"], steps=steps, guidance=GUIDANCE)
    jobs = dict(published=published, diffusers=draw_with_diffusers, ours=ours)
    time_in_turns(jobs, 1, device)                               # to warm up
    times = time_in_turns(jobs, rounds, device)
    for name in ("published", "diffusers"):
        difference = (drawn[name].float().cpu().clamp(-1, 1) - drawn["ours"]).square().mean().sqrt()
        print(f"root mean square of {name} - ours: {difference:.1e}", file=sys.stderr)
        assert parts.dtype != torch.float32 or difference < 1e-3, difference
    return times


def compare_captioning(sides: Sides, steps: int, rounds: int) -> dict[str, list[float]]:
    """Time captions of one image, in random order at temperature 1, as published.

    Both loops skip steps that reveal nothing.  The published one also ends with an evaluation in
    case a [MASK] is left."""
    sampler, parts = sides.sampler, sides.parts
    device = parts.device
    latents = text_to_image.draw_noise(parts, [1])
    blank = torch.full((1, LENGTH), parts.tokenizer.mask_id)

    def published() -> None:
        torch.manual_seed(0)
        no_prompt = torch.zeros(1, LENGTH, dtype=torch.long)
        sampler.register_condition(latents.to(sampler.model.dtype), no_prompt, no_prompt.bool())
        sampler.sample(LENGTH, steps, device=device)

    def ours(image_cache: str) -> Callable[[], object]:
        config = ReadConfig(steps=steps, order="random", temperature=1.0, image_cache=image_cache)
        return lambda: fill(parts, latents, blank, config)
    jobs = dict(published=published, ours=ours("off"), cached=ours("once"))
    for name, job in jobs.items():                               # this also warms up
        with count_texts(sampler.text_encoder if name == "published" else sides.t5) as counts:
            job()
        print(f"{name}: {len(counts)} evaluations", file=sys.stderr)
    return time_in_turns(jobs, rounds, device)


def measure(job: str, pixels: int, sides: Sides, args: argparse.Namespace) -> None:
    """Do a job; print the median time of each side with its share of the peers' times, and all
    times as JSON."""
    parts = sides.parts
    parts.height = parts.width = pixels // 8                 # of the latents, which are not decoded
    compare_job = compare_captioning if job == "captioning" else compare_drawing
    times = compare_job(sides, args.steps, args.rounds)
    for name, seconds in times.items():
        line = f"{job}, {pixels} pixels, {name}: {statistics.median(seconds):.3f} s"
        for peer in ("published", "diffusers"):
            if peer in times and peer != name:
                line += f"; / {peer} {compare(seconds, times[peer])}"
        print(line)
    about = dict(job=job, pixels=pixels, size=args.size, dtype=args.dtype, steps=args.steps)
    print(json.dumps(about | machine(parts.device) | dict(seconds=times)), flush=True)


def compile_all(sides: Sides) -> None:
    """Compile the blocks of all transformers."""
    compile_blocks(sides.parts.mmdit)
    for peer in (sides.pipeline, sides.diffusers):
        for block in peer.transformer.transformer_blocks:
            block.compile(dynamic=False)


@torch.no_grad()
def main() -> None:
    parser = cli.Parser(__doc__)
    count = cli.number(int, 1)
    parser.add_argument("published", type=Path, help="a clone of the published repository")
    parser.add_argument("--size", choices=list(SIZES), default="third")
    parser.add_argument("--pixels", type=count, nargs="+", default=[512],
                        help="sides of the drawings (512)")
    parser.add_argument("--steps", type=cli.number(int, 2), default=16, help="of all (16)")
    parser.add_argument("--rounds", type=count, default=5, help="(5)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true",
                        help="also draw with the blocks of all sides compiled")
    args = parser.parse_args()
    device, dtype = torch.device(choose_device(args.device)), getattr(torch, args.dtype)
    pipeline, sampler = make_published(args.published.resolve(), args.size, device)
    diffusers = make_diffusers(pipeline.transformer, dtype)
    parts, t5 = make_ours(pipeline, args.pixels[0], dtype)
    sides = Sides(pipeline, sampler, diffusers, parts, t5)

    first, *others = args.pixels
    measure("drawing", first, sides, args)
    measure("captioning", first, sides, args)
    for pixels in others:
        measure("drawing", pixels, sides, args)
    if args.compile:
        compile_all(sides)
        for pixels in args.pixels:
            measure("compiled drawing", pixels, sides, args)


if __name__ == "__main__":
    cli.run(main)
