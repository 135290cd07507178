"""Compare drawing and captioning with D-DiT's published class and loops, in turns in one process.

    git clone https://github.com/zijieli-Jlee/Dual-Diffusion PUBLISHED
    python -m venv peers && peers/bin/pip install diffusers==0.42.1 transformers==5.23.0 torch safetensors
    peers/bin/python -m experiments.compare_published PUBLISHED

Transformer and T5 have a third of the real depths and widths, so that each takes its real share of
the work, as does the text head with a ninth of the vocabulary.  Their random weights are the same
on both sides, and so are the drawn latents, which is checked.  The image has 1024 tokens (512
pixels), the text 128; the batch is 1, as in the published loop of reading.

"cached": --image-cache once.  The order `threshold` is not compared: how many evaluations it needs
depends on the text, and random weights are never certain.  This is not part of the test run, since
it needs packages that the project does not need.
"""

import statistics
import sys
import tempfile
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Callable
from unittest.mock import MagicMock

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

import checkpoint
from common import cli
from common.files import write_json
from experiments.turns import compare, time_in_turns
from inference import text_to_image
from inference.image_to_text import ReadConfig, fill
from inference.parts import Parts
from pretrained.vae import Pixels
from training.models import Models

DEPTH, HEADS, VOCABULARY = 8, 8, 3568               # of 24, 24 and 32100; a head has size 64
T5 = dict(vocab_size=VOCABULARY, d_model=1344, d_kv=64, d_ff=3392, num_layers=8, num_heads=21,
          feed_forward_proj="gated-gelu")           # of 4096, 64, 10240, 24 and 64
SIDE, LENGTH = 64, 128                              # latents along a side, tokens
MASK = VOCABULARY - 1
GUIDANCE = 7.0


def import_published(folder: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """Import the published model and pipeline.  The pipeline uses torchvision to read image files
    only; a stand-in saves its installation."""
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.functional"]
    sys.modules.update(dict.fromkeys(names, MagicMock()))
    sys.path.insert(0, str(folder))
    from sd3_modules import dual_diff_pipeline, sd3_model
    return sd3_model, dual_diff_pipeline


def make_published(folder: Path) -> tuple:
    """Return the published pipeline and text sampler, with random weights."""
    model_module, pipeline_module = import_published(folder)
    torch.manual_seed(0)
    transformer = model_module.SD3JointModelFlexible(
        VOCABULARY, num_layers=DEPTH, num_attention_heads=HEADS, joint_attention_dim=T5["d_model"],
        caption_projection_dim=64 * HEADS, pos_embed_max_size=192).eval()
    for name, parameter in transformer.named_parameters():
        if parameter.ndim > 1 and "pos_embed" not in name:
            nn.init.normal_(parameter, std=0.02)
    text_encoder = T5EncoderModel(T5Config(**T5)).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = pipeline_module.DualDiffSD3Pipeline(transformer, scheduler, None, text_encoder, None)
    pipeline.set_progress_bar_config(disable=True)
    sampler = pipeline_module.ConditionalMaskedDiffusionSampler(MASK, text_encoder, transformer)
    return pipeline, sampler


def make_ours(pipeline) -> tuple[Parts, nn.Module]:
    """Load the published weights into our classes; return them as parts, and our T5."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline.transformer.save_pretrained(f"{folder}/transformer")
        pipeline.text_encoder.save_pretrained(f"{folder}/text_encoder")
        mmdit, t5 = checkpoint.load_mmdit(folder), checkpoint.load_t5(folder)
        for module in (mmdit, t5):          # its tensors are mapped to files that are about to go
            copies = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            module.load_state_dict(copies, assign=True)
    tokenizer = SimpleNamespace(mask_id=MASK, end_id=-1, pad_id=-1,       # a text never ends
                                encode=lambda text, length: prompt_ids(text))
    models = Models(nn.ModuleDict(dict(mmdit=mmdit)).eval(), tokenizer, t5, Pixels())
    return Parts.of(models, SIDE, LENGTH), t5


def prompt_ids(text: str) -> Tensor:
    """Return made-up ids (L,) of a text."""
    generator = torch.Generator().manual_seed(len(text))
    return torch.randint(0, MASK, (LENGTH,), generator=generator)


def compare_drawing(pipeline, parts: Parts, steps: int, rounds: int) -> dict[str, list[float]]:
    """Time drawings of one prompt with guidance, and check that both sides draw the same."""
    noise = text_to_image.draw_noise(parts, [0])
    drawn = {}

    def published() -> None:
        ids = torch.stack([prompt_ids("a prompt"), prompt_ids("")])
        prompt, negative = pipeline.text_encoder(ids)[0].split(1)
        drawn["published"] = pipeline.text_to_image_sampling_loop(
            None, num_inference_steps=steps, guidance_scale=GUIDANCE, latents=noise,
            prompt_embeds=prompt, negative_prompt_embeds=negative, output_type="latent")

    def ours() -> None:
        drawn["ours"] = text_to_image.draw(parts, ["a prompt"], steps=steps, guidance=GUIDANCE)
    jobs = dict(published=published, ours=ours)
    time_in_turns(jobs, 1)                                       # to warm up
    times = time_in_turns(jobs, rounds)
    difference = (drawn["published"].clamp(-1, 1) - drawn["ours"]).abs().max()
    print(f"drawings differ by at most {difference:.1e}", file=sys.stderr)
    assert difference < 1e-2, difference
    return times


def compare_captioning(sampler, parts: Parts, t5: nn.Module, steps: int, rounds: int
                       ) -> dict[str, list[float]]:
    """Time captions of one image, in random order at temperature 1, as published.

    Both loops skip steps that reveal nothing.  The published one also ends with an evaluation in
    case a [MASK] is left."""
    latents = text_to_image.draw_noise(parts, [1])
    blank = torch.full((1, LENGTH), MASK)

    def published() -> None:
        torch.manual_seed(0)
        no_prompt = torch.zeros(1, LENGTH, dtype=torch.long)
        sampler.register_condition(latents, no_prompt, no_prompt.bool())
        sampler.sample(LENGTH, steps, device="cpu")

    def ours(image_cache: str) -> Callable[[], object]:
        config = ReadConfig(steps=steps, order="random", temperature=1.0, image_cache=image_cache)
        return lambda: fill(parts, latents, blank, config)
    jobs = dict(published=published, ours=ours("off"), cached=ours("once"))
    for name, job in jobs.items():                               # this also warms up
        evaluations = count_calls(job, [sampler.text_encoder, t5])
        print(f"{name}: {evaluations} evaluations", file=sys.stderr)
    return time_in_turns(jobs, rounds)


def count_calls(job: Callable[[], object], text_encoders: list[nn.Module]) -> int:
    """Return how often a job encodes a text: once in each evaluation of the transformer."""
    calls = []
    hooks = [encoder.register_forward_pre_hook(lambda *args: calls.append(1))
             for encoder in text_encoders]
    job()
    for hook in hooks:
        hook.remove()
    return len(calls)


@torch.no_grad()
def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("published", type=Path, help="a clone of the published repository")
    parser.add_argument("--steps", type=cli.number(int, 2), default=16, help="of both (16)")
    parser.add_argument("--rounds", type=cli.number(int, 1), default=5, help="(5)")
    parser.add_argument("--json", type=Path, help="also write the seconds here")
    args = parser.parse_args()
    pipeline, sampler = make_published(args.published.resolve())
    parts, t5 = make_ours(pipeline)
    results = dict(drawing=compare_drawing(pipeline, parts, args.steps, args.rounds),
                   captioning=compare_captioning(sampler, parts, t5, args.steps, args.rounds))
    for title, times in results.items():
        for name, seconds in times.items():
            print(f"{title}, {name}: {statistics.median(seconds):.2f} s; / published "
                  f"{compare(seconds, times['published'])}, {args.rounds} rounds")
    if args.json:
        write_json(args.json, dict(steps=args.steps, seconds=results))


if __name__ == "__main__":
    cli.run(main)
