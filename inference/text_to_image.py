"""Pictures from text: drawn from noise, or from another picture, of which a part may stay as it is.

    drawn = draw(parts, ["red apple, noto style"])                         # (1, 3, H, W)
    edit = Edit(latents, strength=0.6)                                     # from that picture at t = 0.6
    edit = Edit(latents, mask=mask)                                        # only where the mask is True

Shapes: B batch, L tokens, E width of text states, C latent channels, h and w latent height and width, H and W
height and width in pixels.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Callable, Iterator

import torch
from torch import Tensor

import flow
from inference.image_to_text import encode, score, watched
from inference.parts import Parts
from model import T_FLOOR

STEPS = 28


@dataclass
class Edit:
    """A picture to begin with: clean latents (1, C, h, w); the noise level, strength, that it is brought to:
    0 gives it back, 1 draws anew; and a mask (1, 1, h, w), True where it is drawn, all else stays."""
    latents: Tensor
    strength: float = 1.0
    mask: Tensor | None = None


@dataclass
class Seen:
    """A record of a walk, filled in while it is drawn.

    states: (t, x_t (B, 3, H, W), the clean image predicted there) of every step and the end; None leaves them
    out.  rows: evaluations of the network, over all images.  watch: a context that is entered with the network
    (viz/attention.py); watched: its result; times: those of the evaluations."""
    watch: Callable | None = None
    watched: object = None
    times: list[float] = field(default_factory=list)
    states: list | None = field(default_factory=list)
    rows: int = 0


def levels(parts: Parts, steps: int, shift: float | None = None, solver: str = "euler",
           strength: float = 1.0) -> Tensor:
    """The noise levels of a walk of `steps` evaluations, of which Heun's takes two a step, from strength on.
    A network that predicts the clean picture is not asked below the level to which it learnt it in earnest."""
    shift = parts.defaults["shift"] if shift is None else shift
    least = T_FLOOR["train"] if parts.sizes.predicts == "data" else 1e-3
    whole = flow.sigmas(-(-steps // flow.SOLVERS[solver].evaluations), shift, least)
    return whole if strength == 1 else torch.cat([torch.tensor([strength]), whole[whole < strength]])


def graphed(function: Callable) -> Callable:
    """function(*tensors), on a GPU captured as a CUDA graph for each shape of its tensors, and replayed: what
    launching its kernels one by one costs is paid once."""
    graphs = {}

    def call(*given: Tensor) -> Tensor:
        key = tuple(x.shape for x in given)
        if key not in graphs:
            held, side = [x.clone() for x in given], torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):                        # what is made at a first call is made here
                for _ in range(3):
                    function(*held)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = function(*held)
            graphs[key] = graph, held, result
        graph, held, result = graphs[key]
        for mine, x in zip(held, given):
            mine.copy_(x)
        graph.replay()
        return result.clone()
    return call


def compiled(parts: Parts) -> None:
    """Each block compiled for the shapes that it meets; what is drawn then differs in rounding."""
    torch._dynamo.config.recompile_limit = 64                    # the last block, guided or not
    for block in parts.mmdit.blocks:
        block.compile(dynamic=False)


def prepared(parts: Parts, fast: bool) -> Callable:
    """The network as it is loaded now, (x, text, t) -> velocity in float32.  fast: `compiled`, and on a GPU
    `graphed`: a graph is of these very weights, and of no use when they are loaded again."""
    velocity = lambda x, text, t: parts.mmdit(x, text, t, need="velocity")[0].float()
    if fast:
        compiled(parts)
    return graphed(velocity) if fast and parts.device.type == "cuda" else velocity


def walked(velocity: flow.Velocity, noise: Tensor, sigmas: Tensor, solver: str, edit: Edit | None,
           states: list | None) -> Tensor:
    """The end of flow.walk from noise (B, C, h, w), or from the picture to edit, of which the part that is
    not drawn follows its own straight line to that noise; `states` gets all that the walk yields."""
    start, pin = noise, None
    if edit:
        known = lambda t: (1 - t) * edit.latents.to(noise) + t * noise
        start = known(sigmas[0].to(noise)) if edit.strength < 1 else noise
        if edit.mask is not None:
            pin = lambda x, t: torch.where(edit.mask.to(x.device), x, known(t))
    for state in flow.walk(velocity, start, sigmas, solver, pin):
        if states is not None:
            states.append(state)
    return state[1]


def encoded(parts: Parts, texts: list[str]) -> dict[str, Tensor]:
    """The states (1, L, E) of each text, one at a time, so that they are the same in any company."""
    parts.hold("text")
    ids = lambda text: parts.tokenizer.encode(text, parts.length)[None].to(parts.device)
    return {text: parts.text(ids(text)) for text in dict.fromkeys(texts)}


@torch.no_grad()
def drawings(parts: Parts, prompts: list[str], negative: str = "", steps: int = STEPS,
             guidance: float | None = None, seed: int | list[int] = 0, shift: float | None = None, *,
             solver: str = "euler", interval: tuple[float, float] = (0.0, 1.0), edit: Edit | None = None,
             batch: int | None = None, fast: bool = False, seen: Seen | None = None) -> Iterator[Tensor]:
    """A picture for each prompt, one after the other, (3, H, W) in [-1, 1] on the CPU.

    seed: of the first, and the next has the next; or one for each.  A prompt and a seed give the same
    picture in any batch (of 16; large models 4), at any place in it.  steps, solver: of `levels`;
    guidance, interval: of `flow.guide`.  fast: of `prepared`; the last batch is filled up then, so that
    all have one shape.  Where the parts don't fit in memory together, 16 batches are drawn before they are
    decoded."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    guidance = parts.defaults["guidance"] if guidance is None else guidance
    sigmas = levels(parts, steps, shift, solver, edit.strength if edit else 1.0)
    shape = parts.sizes.channels, parts.height // parts.factor, parts.width // parts.factor
    jobs = list(zip(prompts, seed if isinstance(seed, list) else range(seed, seed + len(prompts))))
    size, walks, network = min(batch or (16 if parts.own else 4), len(jobs)), [], None
    keeps = seen is not None and seen.states is not None
    velocity = watched(parts, lambda *given: network(*given),
                       flow.evaluations(sigmas, solver) * -(-len(jobs) // size), "drawing")

    def drawn(few: list[tuple[str, int]], states: dict[str, Tensor]) -> Tensor:
        full = few + few[-1:] * (size - len(few)) * fast
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for _, n in full]
        text = torch.cat([states[text] for text, _ in full] + [states[negative]] * len(full))  # (2B, L, E)

        def asked(x: Tensor, t: Tensor) -> Tensor:               # of B rows or of 2B
            if seen:
                seen.rows += len(x) * len(few) // len(full)
                seen.times += [float(t)] if seen.watch else []
            return velocity(x, text[:len(x)], t)
        guided = asked if guidance == 1 else flow.guide(asked, guidance, interval)
        walks.append([] if keeps else None)
        start = torch.stack(noise).to(parts.device)                               # (B, C, h, w)
        return walked(guided, start, sigmas, solver, edit, walks[-1])[:len(few)]

    once = size if parts.keep else 16 * size
    decode = lambda z: parts.vae.decode(z[None])[0].float().cpu()                 # (3, H, W)
    for some in (jobs[at:at + once] for at in range(0, len(jobs), once)):
        states = encoded(parts, [prompt for prompt, _ in some] + [negative])
        parts.hold("mmdit")
        network = network or prepared(parts, fast)
        with seen.watch(parts.mmdit) if seen and seen.watch else nullcontext() as found:
            clean = [drawn(some[at:at + size], states) for at in range(0, len(some), size)]
        if found is not None:
            seen.watched = found
        network = network if parts.keep else None
        parts.hold("vae")
        yield from (decode(z).clamp(-1, 1) for z in torch.cat(clean))
    if keeps:
        all_of = lambda xs: torch.stack([decode(z) for z in torch.cat(xs)[:len(jobs)]])
        seen.states = [(float(ts[0]), all_of(xs), all_of(found)) for ts, xs, found in
                       (zip(*step) for step in zip(*walks))]


def draw(parts: Parts, prompts: list[str], *args, **how) -> Tensor:
    """`drawings` as one tensor, (B, 3, H, W)."""
    return torch.stack(list(drawings(parts, prompts, *args, **how)))


@torch.no_grad()
def likeliest(parts: Parts, pictures: list[Tensor], prompt: str) -> list[tuple[float, Tensor]]:
    """Pictures (3, H, W) by the bound of -log p(prompt | picture), in nats, the least first."""
    ids = parts.tokenizer.encode(prompt, parts.length)
    latents = encode(parts, torch.stack(pictures))
    found = [(score(parts, latents[i:i + 1], ids)[0], picture) for i, picture in enumerate(pictures)]
    return sorted(found, key=lambda pair: pair[0])
