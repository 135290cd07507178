"""Write text about images (captions, answers, filled masks), and score how likely a text is.

    texts = write(parts, latents, [None] * len(latents))                   # a caption for each
    texts = write(parts, latents, ["Is this food?"] * len(latents))        # an answer
    text = infill(parts, latents[:1], "red [MASK], [MASK] style")
    nats, error = score(parts, latents[:1], ids)                           # -log p(text | image)

Shapes: B batch, L tokens, V vocabulary, C latent channels, h and w latent height and width.
"""

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

import mask_diffusion
from common.cli import UserError, option, require
from common.progress import Progress
from dataset.sources import question_prompt
from inference.parts import Parts
from mask_diffusion import SampleConfig
from model import MMDiT

STEPS = dict(text=128, answer=32)
States = list[tuple[Tensor, Tensor]]            # (step (B,), ids (B, L)) of mask_diffusion.walk
MAX_MASK_TOKENS = 3     # infill tries one to three tokens for a [MASK]


@dataclass
class ReadConfig:
    """Settings of writing text; each is a flag of sample.py.  None: the checkpoint's default."""
    steps: int | None = option(None, "of --order random and confidence (128; to answer 32)", low=1,
                               high=10**5)
    temperature: float | None = option(None, "0: the likeliest token; 1: sampled (0; published 1)",
                                       low=0, group="reading, with --image or --text")
    order: str | None = option(None, "order of revealing [MASK]s (threshold; published random)",
                               choices=mask_diffusion.ORDERS)
    level: float | None = option(None, "threshold: a probability (0.99); eb: an entropy (0.05)",
                                 low=1e-9)
    image_cache: str | None = option(None, "once: fast; off: exact (once; published off)",
                                     choices=["once", "off"])
    text_guidance: float = option(1.0, "guide away from what is likely without the image; "
                                  "1: none", low=0.001, high=1000)
    max_tokens: int | None = option(None, "of a caption or an answer; may be more than --length",
                                    low=1, high=10**5, tasks="caption answer questions chat")
    length_at: float | None = option(None, "before the first step, end the text at the first "
                                     "[MASK] with this probability of the end token", low=0, high=1,
                                     tasks="caption answer questions chat")

    def __post_init__(self):
        if self.order:
            SampleConfig(order=self.order, level=self.level)     # raises ValueError


def check_steps(parts: Parts, config: ReadConfig) -> None:
    """Raise UserError for a number of steps in an order that does not use it."""
    order = parts.complete(config).order
    using = " or ".join(name for name, row in mask_diffusion.ORDERS.items() if row.uses_steps)
    require((config.steps is None or mask_diffusion.ORDERS[order].uses_steps,
             f"steps {config.steps} changes nothing with order {order}; leave it out, or choose "
             f"order {using}"))


def with_steps(config: ReadConfig, question: str | None) -> ReadConfig:
    """Return the config; if steps is None, with the default steps of a text or of an answer."""
    if config.steps is not None:
        return config
    return replace(config, steps=STEPS["text" if question is None else "answer"])


# ------------------------------------------------------------------------------------- the network

class ImageCache:
    """The keys and values of a batch of images, computed once, together with the first texts.

    Using them with later texts is an approximation, because the image's stream sees the text."""

    def __init__(self, mmdit: MMDiT, latents: Tensor):
        self.mmdit, self.latents = mmdit, latents
        self.blocks = self.rows = None

    def logits(self, text: Tensor, rows: Tensor, at: Tensor) -> Tensor:
        """Return the logits (n, V) at positions `at` of text (R, L, E).

        rows (R,): the rows of the batch that are in `text`, ascending.  A row that is absent is
        finished, and is removed from the cache."""
        if self.blocks is None:
            clean = torch.zeros(1, device=text.device)
            logits, self.blocks = self.mmdit.read_and_cache(self.latents[rows], text, clean, at)
            self.rows = rows
            return logits
        if len(rows) < len(self.rows):
            kept = torch.searchsorted(self.rows, rows)
            self.blocks = [block.rows(kept) for block in self.blocks]
            self.rows = rows
        return self.mmdit.read_cached(text, self.blocks, at)


class Reader:
    """The model with fixed clean latents (B, C, h, w), or without an image.

    It is a function (ids, at) -> logits, as mask_diffusion.py needs it."""

    def __init__(self, parts: Parts, latents: Tensor | None, image_cache: str = "off",
                 guidance: float = 1.0):
        self.parts, self.latents, self.guidance = parts, latents, guidance
        self.cache = None
        if image_cache == "once" and latents is not None:
            self.cache = ImageCache(parts.mmdit, latents)

    def __call__(self, ids: Tensor, at: Tensor) -> Tensor:
        """Return the logits (n, V) at positions `at` (n,) of ids (B, L)."""
        L = ids.shape[1]
        rows, row_of = torch.unique_consecutive(at // L, return_inverse=True)
        at = row_of * L + at % L                                 # numbered within these rows
        text = self.parts.text(ids[rows])                                         # (R, L, E)
        if self.guidance == 1:
            return self.logits(text, rows, at)
        # the pass without the image is first: the blocks keep the attention of the last pass
        clean = torch.zeros(1, device=text.device)
        _, null = self.parts.mmdit(None, text, clean, need="logits", at=at)
        mask_id = self.parts.tokenizer.mask_id
        return mask_diffusion.guide(self.logits(text, rows, at), null, self.guidance, mask_id)

    def logits(self, text: Tensor, rows: Tensor, at: Tensor) -> Tensor:
        if self.cache:
            return self.cache.logits(text, rows, at)
        latents = self.latents
        if latents is not None:
            latents = latents[rows]
        clean = torch.zeros(1, device=text.device)
        _, logits = self.parts.mmdit(latents, text, clean, need="logits", at=at)
        return logits


@torch.no_grad()
def encode(parts: Parts, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Encode images (B, 3, H, W) in [-1, 1] to clean latents (B, C, h, w), the posterior's means.

    dtype: parts.dtype unless given."""
    parts.hold("vae")
    latents = [parts.vae.encode(batch.to(parts.device)) for batch in images.split(16)]
    return torch.cat(latents).to(dtype or parts.dtype)


# ----------------------------------------------------------------------------------------- writing

@torch.no_grad()
def fill(parts: Parts, latents: Tensor | None, ids: Tensor, config: ReadConfig = ReadConfig(),
         seeds: Sequence[int] | None = None, states: States | None = None) -> Tensor:
    """Replace every [MASK] of ids (B, L) given clean latents (B, C, h, w), or no image.

    Text after the first end token becomes padding.  seeds: one for each row, by default 0; a row
    with the same seed has the same text in any batch, up to the rounding of bfloat16.  states: a
    list to which the states of `mask_diffusion.walk` are appended.  Raises UserError for a level
    that the order can't have."""
    config = with_steps(parts.complete(config), None)
    tokenizer = parts.tokenizer
    try:
        sampler = SampleConfig(config.steps, config.temperature, config.order, config.level,
                               end_id=tokenizer.end_id, pad_id=tokenizer.pad_id,
                               length_at=config.length_at)
    except ValueError as error:
        raise UserError(str(error))
    parts.hold("text", "mmdit")
    reader = Reader(parts, latents, config.image_cache, config.text_guidance)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or [0] * len(ids)]
    most_masks = int((ids == tokenizer.mask_id).sum(1).max())    # each evaluation reveals one or more
    progress = Progress("reading, evaluations", most_masks, silent=parts.silent)
    walk = mask_diffusion.walk(reader, ids.to(parts.device), tokenizer.mask_id, sampler, generators)
    for evaluations, (step, ids) in enumerate(walk):
        if states is not None:
            states.append((step, ids))
        progress.update(evaluations)
    return ids.cpu()


def prompt_ids(parts: Parts, question: str | None) -> list[int]:
    """Return the tokens of a question before its answer; [] for a caption."""
    return [] if question is None else parts.tokenizer.pieces(question_prompt(question))


def canvas(parts: Parts, question: str | None = None, max_tokens: int | None = None,
           before: Sequence[int] = ()) -> Tensor:
    """Return the ids (L,) that a caption or an answer is written on.

    They are the question, the tokens that were written `before`, at most max_tokens [MASK]s, and
    padding.  Raises UserError if the question leaves no room."""
    tokenizer = parts.tokenizer
    given = [*prompt_ids(parts, question), *before]
    length = parts.length if question is None else parts.answer_length
    room = length - len(given)
    require((room > 0, f"the question has {len(given)} tokens and leaves no room for an answer: "
             f"this model reads {length} tokens; ask a shorter one"))
    masks = room if max_tokens is None else min(room, max_tokens)
    padding = [tokenizer.pad_id] * (room - masks)
    return torch.tensor(given + [tokenizer.mask_id] * masks + padding)


def write(parts: Parts, latents: Tensor, questions: Sequence[str | None],
          config: ReadConfig = ReadConfig(), seeds: Sequence[int] | None = None,
          states: States | None = None) -> list[str]:
    """Write an answer, or a caption, about each of the images with latents (B, C, h, w).

    questions: one for each image; all None for captions.  seeds: as in `fill`.  states: as in
    `fill`, but only of the first block, if max_tokens is above the model's length."""
    config = with_steps(config, questions[0])
    seeds = seeds or [0] * len(questions)
    canvases = [canvas(parts, question, config.max_tokens) for question in questions]
    filled = fill(parts, latents, torch.stack(canvases), config, seeds, states)   # (B, L)
    texts = []
    for i, question in enumerate(questions):
        start = len(prompt_ids(parts, question))
        ids = filled[i, start:].tolist()
        if config.max_tokens:
            ids = go_on(parts, latents[i:i + 1], question, ids, config, seeds[i])
        texts.append(parts.tokenizer.decode(ids))
    return texts


def go_on(parts: Parts, latents: Tensor, question: str | None, text: list[int],
          config: ReadConfig, seed: int) -> list[int]:
    """Continue a text that has no end token yet, block by block, up to config.max_tokens.

    Each block sees the question and the end of the text so far, up to half of the room."""
    ends = {parts.tokenizer.end_id, parts.tokenizer.pad_id}
    room = len(canvas(parts, question)) - len(prompt_ids(parts, question))
    while len(text) < config.max_tokens and ends.isdisjoint(text):
        before = text[len(text) - room // 2:]
        ids = canvas(parts, question, config.max_tokens - len(text), before)
        is_new = ids == parts.tokenizer.mask_id
        [filled] = fill(parts, latents, ids[None], config, [seed])
        text = text + filled[is_new].tolist()
    return text


# -------------------------------------------------------------------------------- filling in masks

def cuts(parts: Parts, text: str) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Tokenize a text in all ways that give each [MASK] 1 to 3 tokens.

    Return the ids (n, L), and for each row the number of tokens of each [MASK].  More than two
    [MASK]s get one token each.  The space before a [MASK] belongs to it, as in GPT-2's tokens.
    Raises UserError for a text that is too long."""
    tokenizer = parts.tokenizer
    first, *others = text.replace(" [MASK]", "[MASK]").split("[MASK]")
    pieces_after = [tokenizer.continuation(other) for other in others]
    widest = MAX_MASK_TOKENS if len(others) <= 2 else 1
    rows, cut_widths, lengths = [], [], []
    for widths in itertools.product(range(1, widest + 1), repeat=len(others)):
        ids = tokenizer.pieces(first)
        for width, piece in zip(widths, pieces_after):
            ids = ids + [tokenizer.mask_id] * width + piece
        lengths.append(len(ids))
        if len(ids) < parts.length:
            rows.append(tokenizer.fit(ids, parts.length))
            cut_widths.append(widths)
    require((rows, f"text has {lengths[0]} tokens, expected at most {parts.length - 1}; cut it"))
    return torch.stack(rows), cut_widths


def insert_words(parts: Parts, text: str, words: list[Tensor]) -> str:
    """Replace the [MASK]s of a text by words, given as ids (n,); the rest is unchanged."""
    filled, *others = text.split("[MASK]")
    for ids, other in zip(words, others, strict=True):
        word = parts.tokenizer.behind(ids)
        if filled[-1:] in ("", " "):
            word = word.lstrip(" ")
        filled += word + other
    return filled


@torch.no_grad()
def infill(parts: Parts, latents: Tensor | None, text: str, config: ReadConfig = ReadConfig(),
           seed: int = 0, states: States | None = None) -> str:
    """Fill the [MASK]s of a text about the image with latents (1, C, h, w), or without an image.

    All ways to cut the masks into tokens are filled as one batch, and the likeliest is kept.
    states: a list to which the states of this likeliest row are appended."""
    rows, widths = cuts(parts, parts.tokenizer.lowered(text))                     # (n, L)
    batch_states = []
    seeds = [seed] * len(rows)
    filled = fill(parts, repeat(latents, len(rows)), rows, config, seeds, batch_states)
    best = 0
    if len(filled) > 1:
        nats = [score(parts, latents, row)[0] for row in filled]
        best = nats.index(min(nats))
    if states is not None:
        for step, ids in batch_states:
            states.append((step[best:best + 1], ids[best:best + 1]))
    is_word = rows[best] == parts.tokenizer.mask_id
    words = filled[best][is_word].split(widths[best])
    return insert_words(parts, text, words)


def repeat(latents: Tensor | None, count: int) -> Tensor | None:
    """Return copies of one image, (1, C, h, w) -> (count, C, h, w), as a view."""
    if latents is None:
        return None
    return latents.expand(count, -1, -1, -1)


# ----------------------------------------------------------------------------------------- scoring

class Likelihood(NamedTuple):
    """How probable a text is, given an image."""
    text: str
    share: float                # its probability among the texts that are compared
    nats: float                 # a bound of -log p(text | image)
    error: float                # the bound's standard error, from the random masks


@torch.no_grad()
def score(parts: Parts, latents: Tensor | None, ids: Tensor, given: int = 0,
          copies: int | None = None) -> tuple[float, float]:
    """Estimate an upper bound of -log p(text | image) in nats; return it and its standard error.

    latents: (1, C, h, w) or None.  ids: (L,), padding included; the first `given` tokens are not
    scored.  copies: how many numbers of masks are tried, by default 64, or 16 for models that read
    T5.  Texts of the same length get the same random numbers, so that their scores can be compared.
    The image is never cached."""
    parts.hold("text", "mmdit")
    copies = copies or (64 if parts.has_embedding else 16)
    reader = Reader(parts, repeat(latents, copies))
    ids = ids.to(parts.device)
    frozen = torch.arange(len(ids)) < given
    generator = torch.Generator().manual_seed(0)
    mask_id = parts.tokenizer.mask_id
    return mask_diffusion.likelihood(reader, ids, mask_id, frozen, copies, generator)


def rows_to_rank(parts: Parts, texts: list[str], question: str | None) -> list[Tensor]:
    """Return the ids (L,) of the question with each text.  Raises UserError if one is too long."""
    length = len(canvas(parts, question))
    rows = []
    for text in texts:
        ids = prompt_ids(parts, question) + parts.tokenizer.pieces(text)
        require((len(ids) < length, f"{text[:40]!r}: {len(ids)} tokens, the question's included, "
                 f"expected at most {length - 1}; cut it"))
        rows.append(parts.tokenizer.fit(ids, length))
    return rows


def rank(parts: Parts, latents: Tensor | None, texts: list[str],
         question: str | None = None) -> list[Likelihood]:
    """Score captions of the image with latents (1, C, h, w), or answers to a question about it.

    The likeliest text comes first.  Raises UserError for a text that is too long."""
    prompt = prompt_ids(parts, question)
    rows = rows_to_rank(parts, texts, question)
    scores = [score(parts, latents, row, len(prompt)) for row in rows]
    log_p = torch.tensor([-nats for nats, _ in scores], dtype=torch.float64)
    ranking = []
    for text, share, (nats, error) in zip(texts, log_p.softmax(0).tolist(), scores):
        ranking.append(Likelihood(text, share, nats, error))
    return sorted(ranking, key=lambda row: row.nats)
