"""Text from pictures: captions, answers, words filled in, and how likely a text is.

Shapes: B batch, L tokens, V vocabulary, C latent channels, h and w latent height and width, H and W pixels.
"""

import itertools
from typing import Callable, Sequence

import torch
from torch import Tensor

import mask_diffusion
from common.cli import require
from common.progress import Progress
from dataset.questions import question_prompt
from inference.parts import Parts
from mask_diffusion import ReadConfig
from model import BlockCache

STEPS = dict(text=128, answer=32)
MAX_MASK_TOKENS = 3      # a [MASK] of --text stands for one to three tokens


def watched(parts: Parts, logits_at, evaluations: int, what: str):
    """Return the function, which then tells how far it is, unless parts.silent."""
    progress = Progress(f"{what}, evaluations", evaluations, silent=parts.silent)

    def call(*args):
        result = logits_at(*args)
        progress.update(progress.done + 1)
        return result
    return call


class LastStates:
    """Text states, remembered until another text is asked for: with guidance two readers see the same one."""

    def __init__(self, text: Callable[[Tensor], Tensor]):
        self.text, self.ids, self.states = text, None, None

    def __call__(self, ids: Tensor) -> Tensor:
        if self.ids is None or not torch.equal(ids, self.ids):
            self.ids, self.states = ids, self.text(ids)
        return self.states


class Reader:
    """The text half of the model beside clean latents (B, C, h, w), or none, for mask_diffusion.py.

    image_cache "once": the image's keys and values are computed at the first call and reused.  That
    is an approximation, because the image's stream sees the text.  "off" is exact, and so is a text
    without an image.  text: in place of parts.text."""

    def __init__(self, parts: Parts, latents: Tensor | None, image_cache: str = "off", text=None):
        self.parts, self.latents = parts, latents
        self.caches = image_cache == "once"
        self.cache = self.cached_rows = None
        self.text = text or parts.text

    def __call__(self, ids: Tensor, at: Tensor) -> Tensor:
        """ids (B, L) and positions at (n,) of B x L -> logits (n, V).  Rows without a position are left out."""
        L = ids.shape[1]
        rows, row_of = torch.unique_consecutive(at // L, return_inverse=True)
        at = row_of * L + at % L                                                  # in the rows that are left
        text = self.text(ids[rows])
        if self.cache is not None:
            return self.parts.mmdit.read_cached(text, self.image_of(rows), at)
        clean = torch.zeros(1, device=self.parts.device)
        if self.latents is None:
            return self.parts.mmdit(None, text, clean, need="logits", at=at)[1]
        if not self.caches:
            return self.parts.mmdit(self.latents[rows], text, clean, need="logits", at=at)[1]
        logits, self.cache = self.parts.mmdit.read_and_cache(self.latents[rows], text, clean, at)
        self.cached_rows = rows
        return logits

    def image_of(self, rows: Tensor) -> list[BlockCache]:
        """Return the cache of these rows; the others are done, and are dropped."""
        if len(rows) < len(self.cached_rows):
            left = torch.searchsorted(self.cached_rows, rows)
            self.cache = [block.rows(left) for block in self.cache]
            self.cached_rows = rows
        return self.cache


@torch.no_grad()
def encode(parts: Parts, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Clean latents (B, C, h, w), the posterior's means, of images (B, 3, H, W), 16 at a time.

    dtype: parts.dtype unless given."""
    parts.hold("vae")
    latents = [parts.vae.encode(some.to(parts.device)) for some in images.split(16)]
    return torch.cat(latents).to(dtype or parts.dtype)


@torch.no_grad()
def fill(parts: Parts, latents: Tensor | None, ids: Tensor, steps: int = STEPS["text"],
         temperature: float | None = None, seed: int | list[int] = 0, order: str | None = None,
         trajectory: list | None = None, image_cache: str | None = None, guidance: float = 1.0,
         asked: list | None = None, level: float | None = None, length_at: float | None = None) -> Tensor:
    """Replace every [MASK] of ids (B, L) given clean latents (B, C, h, w), or no picture; all else stays.

    order, level, length_at: of `mask_diffusion.ReadConfig`.  What is behind an end is padding at once.
    seed: of every row, whose text is the same in any batch; or one for each.  image_cache: of `Reader`.
    guidance: of `mask_diffusion.guide`, away from what is written without a picture.  asked:
    gets, of each evaluation, how many states the trajectory had, the tokens (m,), and their logits (m, V)."""
    default = parts.defaults
    tokenizer = parts.tokenizer
    order = order or default["order"]
    temperature = default["temperature"] if temperature is None else temperature
    config = ReadConfig(steps, temperature, order, level, tokenizer.end_id, tokenizer.pad_id, length_at)
    parts.hold("text", "mmdit")
    image_cache = image_cache or default["image_cache"]
    text = LastStates(parts.text) if guidance != 1 else parts.text
    logits_at = Reader(parts, latents, image_cache, text)
    if guidance != 1:
        blind = Reader(parts, None, image_cache, text)
        logits_at = mask_diffusion.guide(logits_at, blind, guidance, tokenizer.mask_id)
    if asked is not None:
        plain, trajectory = logits_at, [] if trajectory is None else trajectory

        def logits_at(ids: Tensor, at: Tensor) -> Tensor:
            asked.append((len(trajectory), at, plain(ids, at)))
            return asked[-1][2]
    seeds = seed if isinstance(seed, list) else [seed] * len(ids)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    evaluations = min(steps, int((ids == tokenizer.mask_id).sum(1).max()))
    if length_at is not None:
        evaluations += 1
    states = mask_diffusion.walk(watched(parts, logits_at, evaluations, "reading"), ids.to(parts.device),
                                 tokenizer.mask_id, config, generators)
    for state in states:
        if trajectory is not None:
            trajectory.append(state)
    return state[1].cpu()


def write(parts: Parts, latents: Tensor, question: str | list[str] | None = None,
          max_tokens: int | None = None, seed: int | list[int] = 0, **how) -> list[str]:
    """A caption for each picture, of latents (B, C, h, w); with a question (or one for each), its answer.

    `how` goes to `fill`.  max_tokens above what the model reads at once: a text without an end goes on in
    further blocks, of which each reads the question and as many of the tokens before it as half of what is
    left has room for."""
    questions = question if isinstance(question, list) else [question] * len(latents)
    ids = torch.stack([canvas(parts, q, max_tokens) for q in questions])          # (B, L)
    starts = [len(prompt_ids(parts, q)) for q in questions]
    filled = fill(parts, latents, ids, seed=seed, **how)
    texts = [row[start:].tolist() for row, start in zip(filled, starts)]
    for i, text in enumerate(texts) if max_tokens else []:
        while len(text) < max_tokens and not {parts.tokenizer.end_id, parts.tokenizer.pad_id} & set(text):
            before = text[-max(1, (ids.shape[1] - starts[i]) // 2):]
            more = canvas(parts, questions[i], max_tokens - len(text), before)[None]
            own = seed[i] if isinstance(seed, list) else seed
            filled = fill(parts, latents[i:i + 1], more, seed=own, **how)
            text += filled[0, starts[i] + len(before):].tolist()
    return [parts.tokenizer.decode(text) for text in texts]


def compared(parts: Parts, images: Tensor, captions: list[str], **how) -> list[tuple[Tensor, list[str]]]:
    """Cells of `grids.page`: images (B, 3, H, W) with the caption that is written, above the true one."""
    said = write(parts, encode(parts, images), **how)
    return [(image, [f"read: {text}", f"true: {true}"]) for image, text, true in zip(images, said, captions)]


def prompt_ids(parts: Parts, question: str | None) -> list[int]:
    """The tokens that an answer stands behind; none of a caption."""
    return [] if question is None else parts.tokenizer.pieces(question_prompt(question))


def canvas(parts: Parts, question: str | None = None, max_tokens: int | None = None,
           before: Sequence[int] = ()) -> Tensor:
    """Return the ids (L,) that a caption or an answer is written on: the question, what was written `before`,
    [MASK]s, and padding past max_tokens."""
    tokenizer, given = parts.tokenizer, [*prompt_ids(parts, question), *before]
    length = parts.length if question is None else parts.answer_length
    room = length - len(given)
    require((room > 0, f"the question has {len(given)} tokens and leaves no room for an answer: this model "
             f"reads {length}"))
    masks = room if max_tokens is None else min(room, max_tokens)
    return torch.tensor(given + [tokenizer.mask_id] * masks + [tokenizer.pad_id] * (room - masks))


def cuts(parts: Parts, text: str) -> tuple[Tensor, list[tuple[int, ...]]]:
    """A text with up to two [MASK]s in all ways that give each 1 to 3 tokens, (n, L), and those numbers; more
    get one each.

    A [MASK] takes the space before it along, as GPT-2's tokens do.  Raises UserError for too long a text."""
    first, *others = text.replace(" [MASK]", "[MASK]").split("[MASK]")
    pieces = [parts.tokenizer.pieces(first)] + [parts.tokenizer.continuation(other) for other in others]
    masks, rows, widths = len(others), [], []
    for cut in itertools.product(range(1, 1 + (MAX_MASK_TOKENS if masks <= 2 else 1)), repeat=masks):
        ids = list(pieces[0])
        for width, piece in zip(cut, pieces[1:]):
            ids += [parts.tokenizer.mask_id] * width + piece
        if len(ids) < parts.length:
            rows.append(parts.tokenizer.fit(ids, parts.length))
            widths.append(cut)
    count, most = sum(map(len, pieces)) + masks, parts.length - 1
    require((count <= most, f"--text has {count} tokens, expected at most {most}"))
    return torch.stack(rows), widths


def written(parts: Parts, text: str, words: list[Tensor]) -> str:
    """A text with words, as ids (n,), in the place of its [MASK]s.  What was given stays as it was written,
    also where the tokenizer has no piece for it."""
    said, *others = text.split("[MASK]")
    for ids, other in zip(words, others, strict=True):
        word = parts.tokenizer.behind(ids)
        said += (word.lstrip(" ") if said[-1:] in ("", " ") else word) + other
    return said


@torch.no_grad()
def infill(parts: Parts, latents: Tensor | None, text: str, seed: int = 0, trajectory: list | None = None,
           **how) -> str:
    """Fill the [MASK]s of a text about one picture, of latents (1, C, h, w), or about none.

    All ways to cut the masks into tokens are filled as one batch, and the likeliest is kept (`score`)."""
    rows, widths = cuts(parts, parts.tokenizer.lowered(text))                     # (n, L)
    several = None if latents is None else latents.expand(len(rows), -1, -1, -1)
    filled = fill(parts, several, rows, seed=seed, trajectory=trajectory, **how)
    bound = lambda row: score(parts, latents, row)[0]
    best = min(range(len(filled)), key=lambda i: bound(filled[i])) if len(filled) > 1 else 0
    if trajectory is not None:
        trajectory[:] = [(step[best:best + 1], ids[best:best + 1]) for step, ids in trajectory]
    words = filled[best][rows[best] == parts.tokenizer.mask_id].split(widths[best])
    return written(parts, text, words)


@torch.no_grad()
def score(parts: Parts, latents: Tensor | None, ids: Tensor, given: int = 0,
          levels: int | None = None) -> tuple[float, float]:
    """The bound of -log p(text | picture) in nats, and its standard error: `mask_diffusion.likelihood` of ids
    (L,), all but the first `given`, padding included, from 64 levels of masking (16 for large models).

    Always the same draws, so that texts compare; the image is never left as it was."""
    parts.hold("text", "mmdit")
    levels = levels or (64 if parts.own else 16)
    several = None if latents is None else latents.expand(levels, -1, -1, -1)
    return mask_diffusion.likelihood(Reader(parts, several), ids.to(parts.device), parts.tokenizer.mask_id,
                                     torch.arange(len(ids)) < given, levels, torch.Generator().manual_seed(0))


def ranked(parts: Parts, latents: Tensor | None, question: str | None,
           answers: list[str]) -> list[tuple[str, float, float, float]]:
    """The answers to a question, or captions, the likeliest first: (answer, its share of all of these, bound
    of -log p in nats, standard error).  Raises UserError for one that is too long."""
    asked, rows = prompt_ids(parts, question), []
    length = parts.length if question is None else parts.answer_length
    for answer in answers:
        ids = asked + parts.tokenizer.pieces(answer)
        require((len(ids) < length, f"{answer!r}: {len(ids)} tokens{' with the question' if asked else ''}, "
                 f"expected at most {length - 1}"))
        rows.append(parts.tokenizer.fit(ids, length))
    found = [score(parts, latents, row, len(asked)) for row in rows]
    share = torch.tensor([-nats for nats, _ in found], dtype=torch.float64).softmax(0).tolist()
    return sorted(((answer, part, nats, error) for answer, part, (nats, error) in zip(answers, share, found)),
                  key=lambda row: row[2])
