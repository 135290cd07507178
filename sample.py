"""Draw pictures from text, and text from pictures.

    python sample.py --prompt "red apple, noto style" --out apple.png       # text -> picture
    python sample.py --image apple.png                                      # picture -> caption
    python sample.py --image apple.png --question "What kind of thing is this?"
    python sample.py --image apple.png --text "red [MASK], [MASK] style"    # fills the masks, changes nothing else

Without --checkpoint the weights in assets/emoji are used; they were trained by train.py.  With it, any layout that
checkpoint.py reads, D-DiT's releases and SD3 among them:

    python sample.py --checkpoint dual_diff_sd3_512_base --prompt "a red fox" --height 512 --width 768

The same seed gives the same result.  --trajectory FILE.gif shows the picture forming, or the text being unmasked.

Shapes: B batch, L tokens, E width of text states, H and W height and width in pixels.
"""

import itertools
import math
import sys
import textwrap
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import checkpoint
import data
import flow
import mask_diffusion
from data import UserError

DEFAULT = Path(__file__).parent / "assets" / "emoji"
MAX_MASK_TOKENS = 3      # a [MASK] of --text stands for one to three tokens


def watched(function, total: int, what: str, large: bool):
    """The function, and for a large model a line on stderr every five seconds of how far it is."""
    if not large:
        return function
    state = dict(calls=0, said=time.time(), started=time.time())

    def call(*args):
        result = function(*args)
        state["calls"] += 1
        if time.time() - state["said"] > 5:
            rate = state["calls"] / (time.time() - state["started"])
            print(f"{what}: {state['calls']}/{total} evaluations, {rate:.2f}/s, "
                  f"{max(0, total - state['calls']) / rate:.0f} s left", file=sys.stderr, flush=True)
            state["said"] = time.time()
        return result
    return call


class Sampler:
    """A checkpoint of any layout with the four things it can do.

    The parts that a checkpoint lacks are named: vae, t5, tokenizer (paths of any layout), mask_embedding (the
    aligned [MASK] vector).  keep: all parts stay in memory once loaded; otherwise, which is the default for the
    published weights, only those that the moment needs, so that a drawing takes the memory of its largest part.
    height, width: of pictures, in pixels.  length: positions of a text.
    """

    def __init__(self, path: str | Path = DEFAULT, device: str = "cpu", dtype: torch.dtype | None = None, *,
                 vae: Path | None = None, t5: Path | None = None, tokenizer: Path | None = None,
                 mask_embedding: Path | None = None, height: int | None = None, width: int | None = None,
                 length: int | None = None, keep: bool | None = None):
        self.kind, sizes = checkpoint.read_sizes(path)
        own = sizes.text_length > 0                                              # the end-to-end variant's embedding
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float32 if self.kind == "ours" else torch.bfloat16)
        self.keep = self.kind == "ours" if keep is None else keep
        self.tokenizer = checkpoint.load_tokenizer(tokenizer or path)
        self.length = length or sizes.text_length or 256
        self.answer_length = length or sizes.text_length or 128
        if own and self.length > sizes.text_length:
            raise UserError(f"{path}: texts of {self.length} tokens, its embedding has {sizes.text_length} positions")
        # how each family of weights is sampled unless told otherwise; the published ones as published
        self.defaults = dict(guidance=4.0, shift=1.0, temperature=0.0, order="confidence") if own else dict(
            guidance=7.0, shift=3.0, temperature=1.0, order="random")
        if self.kind != "SD3" and self.tokenizer.vocab_size != sizes.vocab_size:
            raise UserError(f"{path}: the tokenizer has {self.tokenizer.vocab_size} tokens, "
                            f"the model's text head {sizes.vocab_size}")

        def load_text():
            if own:
                return checkpoint.load_embedding(path, self.dtype)
            encoder = checkpoint.load_t5(t5 or path, self.dtype)
            if encoder.config.width != sizes.text_width:
                raise UserError(f"{t5 or path}: T5 gives {encoder.config.width} numbers a token, "
                                f"the transformer reads {sizes.text_width}")
            if vector is not None:
                encoder.set_embedding(self.tokenizer.mask_id, vector)
            return encoder

        def load_vae():       # float32: it is one percent of the whole
            autoencoder = checkpoint.load_vae(vae or path)
            if autoencoder.channels != sizes.channels:
                raise UserError(f"{vae or path}: latents of {autoencoder.channels} channels, "
                                f"the transformer has {sizes.channels}")
            return autoencoder
        if mask_embedding is not None and own:
            raise UserError("--mask-embedding is a row of T5's table; this checkpoint has an embedding of its own")
        vector = None if mask_embedding is None else checkpoint.load_mask_embedding(mask_embedding)
        if vector is not None and len(vector) != sizes.text_width:
            raise UserError(f"{mask_embedding}: a [MASK] embedding of {len(vector)} numbers, "
                            f"this T5 has {sizes.text_width}")
        for part, given in [] if own else [("vae", vae), ("t5", t5)]:             # before minutes of loading
            try:
                checkpoint.find(given or path, part)
            except UserError as error:
                raise UserError(f"{error}; name the right one with --{part}")
        self.loaders = dict(text=load_text, mmdit=lambda: checkpoint.load_mmdit(path, self.dtype), vae=load_vae)
        self.parts = {}
        pixels = checkpoint.read_config(path).get("pixels") if self.kind == "ours" else 512
        self.height, self.width = height or pixels, width or pixels
        self.factor = 1 if sizes.channels == 3 else 8                            # pixels per latent, along a side
        unit = sizes.patch * self.factor
        for name, side in (("height", self.height), ("width", self.width)):
            if not isinstance(side, int) or side < 1 or side % unit or side > unit * sizes.position_size:
                raise UserError(f"{path}: a picture's {name} of {side!r}, expected a multiple of {unit} up to "
                                f"{unit * sizes.position_size}")
        if self.keep:
            self.hold("text", "mmdit", "vae")

    def hold(self, *names: str) -> None:
        """Have these parts in memory; unless all are kept, free the others first."""
        for other in [] if self.keep else set(self.parts) - set(names):
            del self.parts[other]
        for name in names:
            if name not in self.parts:
                part = self.loaders[name]()
                self.parts[name] = part.to(self.device) if isinstance(part, torch.nn.Module) else part

    def __getattr__(self, name: str):
        """self.text, self.mmdit, self.vae: the parts that are held."""
        if name in ("text", "mmdit", "vae") and name in self.__dict__.get("parts", {}):
            return self.parts[name]
        raise AttributeError(name)

    @torch.inference_mode()
    def draw(self, prompts: list[str], negative: str = "", steps: int = 28, guidance: float | None = None,
             seed: int = 0, shift: float | None = None, trajectory: list | None = None) -> Tensor:
        """One picture for each prompt: (B, 3, H, W) in [-1, 1], on the CPU.

        trajectory, when given, is filled with the predicted clean picture of every step, (B, 3, H, W) each.
        """
        guidance = self.defaults["guidance"] if guidance is None else guidance
        shift = self.defaults["shift"] if shift is None else shift
        self.hold("text")
        encode = lambda texts: self.text(torch.stack(
            [self.tokenizer.encode(text, self.length) for text in texts]).to(self.device))
        text, null = encode(prompts), encode([negative]).expand(len(prompts), -1, -1)   # (B, L, E)
        self.hold("mmdit")
        generator = torch.Generator().manual_seed(seed)
        shape = (len(prompts), self.mmdit.config.channels, self.height // self.factor, self.width // self.factor)
        noise = torch.randn(shape, generator=generator).to(self.device)          # the walk stays in float32
        condition = text if guidance == 1 else torch.cat([text, null])           # (B or 2B, L, E)
        velocity = lambda x, t: self.mmdit(x, condition, t, need="velocity")[0].float()
        if guidance != 1:
            velocity = flow.guide(velocity, guidance)
        velocity = watched(velocity, steps, "drawing", not self.keep)
        latents = flow.euler(velocity, noise, flow.sigmas(steps, shift), trajectory)
        self.hold("vae")
        if trajectory is not None:
            trajectory[:] = [self.vae.decode(state).float().cpu() for state in trajectory]
        return self.vae.decode(latents).float().clamp(-1, 1).cpu()

    def latents(self, images: Tensor, seed: int | None = None) -> Tensor:
        """Clean latents of images (B, 3, H, W): the posterior's mean, or with a seed a draw from it."""
        self.hold("vae")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        z = self.vae.encode(images.to(self.device), generator).to(self.dtype)
        self.hold("text", "mmdit")
        return z

    @torch.inference_mode()
    def fill(self, images: Tensor | None, ids: Tensor, steps: int = 128, temperature: float | None = None,
             seed: int = 0, order: str | None = None, posterior: str = "mean", trajectory: list | None = None,
             latents: Tensor | None = None) -> Tensor:
        """Replace every [MASK] of ids (B, L) given images (B, 3, H, W), or their latents; everything else stays.

        order: "random", the paper's walk, or "confidence", the surest token first.  posterior: what the
        autoencoder gives, "mean" or a "draw" as in the published code.
        """
        if self.kind == "SD3":
            raise UserError("this checkpoint is SD3's, which has no text head: it draws (--prompt) and reads nothing")
        if latents is None:
            latents = self.latents(images, seed if posterior == "draw" else None)
        sampler = dict(random=mask_diffusion.sample, confidence=mask_diffusion.sample_confident)[
            self.defaults["order"] if order is None else order]
        temperature = self.defaults["temperature"] if temperature is None else temperature
        calls = min(steps, int((ids == self.tokenizer.mask_id).sum(1).max()))
        logits = watched(self.logits(latents), calls, "reading", not self.keep)
        return sampler(logits, ids.to(self.device), self.tokenizer.mask_id, steps,
                       torch.Generator().manual_seed(seed), temperature, trajectory).cpu()

    def logits(self, latents: Tensor):
        """The text half of the model as a function of ids (B, L) alone, for clean latents."""
        clean = torch.zeros(1, device=self.device)
        return lambda ids: self.mmdit(latents, self.text(ids), clean, need="logits")[1]

    def write(self, images: Tensor, question: str | list[str] | None = None, max_tokens: int | None = None,
              **how) -> list[str]:
        """A caption for each picture (B, 3, H, W); with a question (or one for each), its answer."""
        questions = question if isinstance(question, list) else [question] * len(images)
        ids = torch.stack([self.canvas(q, max_tokens) for q in questions])       # (B, L)
        starts = [0 if q is None else len(self.tokenizer.pieces(data.question_prompt(q))) for q in questions]
        return [self.tokenizer.decode(row[start:]) for row, start in zip(self.fill(images, ids, **how), starts)]

    def canvas(self, question: str | None = None, max_tokens: int | None = None) -> Tensor:
        """What a caption or an answer is written on, (L,): the prompt, [MASK]s, and padding past max_tokens."""
        prompt = [] if question is None else self.tokenizer.pieces(data.question_prompt(question))
        room = (self.length if question is None else self.answer_length) - len(prompt)
        if room < 1:
            raise UserError(f"the question has {len(prompt)} tokens and leaves no room for an answer: "
                            f"this model reads {self.answer_length}")
        masks = room if max_tokens is None else min(room, max_tokens)
        return torch.tensor(prompt + [self.tokenizer.mask_id] * masks + [self.tokenizer.pad_id] * (room - masks))

    @torch.inference_mode()
    def infill(self, image: Tensor, text: str, trajectory: list | None = None, posterior: str = "mean", seed: int = 0,
               **how) -> str:
        """Fill the [MASK]s of a text about one picture (3, H, W).

        A [MASK] stands for one to three tokens (it takes the space before it along, as GPT-2's tokens do).  All
        ways to cut up to two masks into tokens are filled as one batch, and the one that the model finds most
        likely is kept: the bound of `mask_diffusion.loss`, averaged over 64 levels of masking (16 for large models).
        """
        first, *others = text.replace(" [MASK]", "[MASK]").split("[MASK]")
        parts = [self.tokenizer.pieces(first)] + [self.tokenizer.continuation(part) for part in others]
        masks = len(parts) - 1
        widths = range(1, 1 + (MAX_MASK_TOKENS if masks <= 2 else 1))
        rows = []
        for cut in itertools.product(widths, repeat=masks):
            ids = list(parts[0])
            for width, part in zip(cut, parts[1:]):
                ids += [self.tokenizer.mask_id] * width + part
            if len(ids) < self.length:
                rows.append(self.tokenizer.fit(ids, self.length))
        if not rows:
            raise UserError(f"--text has {sum(map(len, parts)) + masks} tokens, expected at most {self.length - 1}")
        latents = self.latents(image[None], seed if posterior == "draw" else None)
        filled = self.fill(None, torch.stack(rows), latents=latents.expand(len(rows), -1, -1, -1), seed=seed,
                           trajectory=trajectory, **how)
        levels = 64 if self.keep else 16
        latents = latents.expand(levels, -1, -1, -1)
        bounds = [mask_diffusion.loss(self.logits(latents), row.expand(levels, -1).to(self.device),
                                      self.tokenizer.mask_id, generator=torch.Generator().manual_seed(0))
                  for row in filled] if len(filled) > 1 else [0]
        best = min(range(len(filled)), key=lambda i: float(bounds[i]))
        if trajectory is not None:
            trajectory[:] = [(step[best:best + 1], ids[best:best + 1]) for step, ids in trajectory]
        return self.tokenizer.decode(filled[best])


# -------------------------------------------------------------------------------------------- what a person sees

def enlarge(picture: Image.Image, least: int = 256) -> Image.Image:
    """Small pictures shown at a whole multiple of their size, at least 256 pixels wide."""
    times = max(1, math.ceil(least / picture.width))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.BICUBIC)


def grid(images: Tensor) -> Image.Image:
    """(B, 3, H, W) -> one picture, as square as B allows."""
    tiles = [enlarge(data.to_picture(image)) for image in images]
    columns = math.ceil(math.sqrt(len(tiles)))
    (width, height), gap = tiles[0].size, 8 if len(tiles) > 1 else 0
    rows = math.ceil(len(tiles) / columns)
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, tile in enumerate(tiles):
        page.paste(tile, (i % columns * (width + gap), i // columns * (height + gap)))
    return page


def page(sampler: Sampler, prompts: list[str], captions: list[str], images: Tensor, seed: int = 0) -> Image.Image:
    """Two columns: prompts with what is drawn for them, and images (B, 3, H, W) with the caption that is written,
    above the true one."""
    rows = max(len(prompts), len(captions))
    sheet = Image.new("RGB", (1000, rows * 104), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    left = [(image, [f"drawn: {text}"]) for image, text in zip(sampler.draw(prompts, seed=seed), prompts)]
    right = [(image, [f"read: {said}", f"true: {text}"])
             for image, said, text in zip(images, sampler.write(images, seed=seed), captions)]
    for column, cells in enumerate((left, right)):
        for row, (image, lines) in enumerate(cells):
            x, y = column * 500, row * 104
            sheet.paste(enlarge(data.to_picture(image), 96).resize((96, 96)), (x + 4, y + 4))
            wrapped = [part for line in lines for part in textwrap.wrap(line, 52)]
            for i, line in enumerate(wrapped):
                pen.text((x + 110, y + 52 - 9 * len(wrapped) + 18 * i), line, fill="black", font=font)
    return sheet


def text_frame(tokenizer: data.Tokenizer, ids: Tensor, step: int, steps: int) -> Image.Image:
    """One state of a text being unmasked, as in the paper's Figure 2: [MASK]s grey, words black, ends blue."""
    page, x, y = Image.new("RGB", (640, 200), "white"), 12, 40
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(18)
    pen.text((12, 10), f"t = {1 - step / steps:.2f}", fill=(120, 120, 120), font=font)
    for i in map(int, ids):
        word, colour = tokenizer.bpe.decode([i]), "black"
        if i == tokenizer.mask_id:
            word, colour = " [MASK]", (190, 190, 190)
        elif i == tokenizer.end_id:
            word, colour = " <end>", (120, 150, 220)
        width = pen.textlength(word, font=font)
        if x + width > 628:
            x, y = 12, y + 28
        pen.text((x, y), word, fill=colour, font=font)
        x += width
    return page


def write_picture(path: Path, *frames: Image.Image) -> None:
    """One picture, or several as an animation that rests on the last."""
    motion = dict(save_all=True, append_images=frames[1:], loop=0, duration=[120] * (len(frames) - 1) + [2000])
    try:
        frames[0].save(path, **(motion if len(frames) > 1 else {}))
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})")


def parse(argv: list[str] | None = None):
    parser = data.Parser(__doc__)
    add = parser.add_argument
    add("--prompt", help="draw this")
    add("--negative-prompt", default="", help="guide away from this instead of from the empty prompt")
    add("--image", type=Path, help="caption this picture, or answer about it, or complete --text about it")
    add("--question", help="with --image: what to answer")
    add("--text", help="with --image: a text whose [MASK]s to fill")
    add("--n", type=int, default=1, help="pictures drawn, as one grid (1)")
    add("--steps", type=int, help="steps of the walk: 28 to draw, 128 for a text, 32 for an answer")
    add("--guidance", type=float, help="classifier-free guidance; 1: none (4; published weights: 7)")
    add("--shift", type=float, help="shift of the noise levels; 1: none (1; published weights: 3)")
    add("--temperature", type=float, help="of text; 0 takes the likeliest token, 1 samples (0; published weights: 1)")
    add("--order", choices=["confidence", "random"], help="of unmasking: the surest token first; or random, which "
        "with --temperature 1 is the paper's sampler (confidence; published weights: random)")
    add("--posterior", choices=["mean", "draw"], default="mean", help="what the autoencoder makes of --image (mean)")
    add("--max-tokens", type=int, help="longest caption or answer, in tokens")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("sample.png"), help="where the picture goes (sample.png)")
    add("--trajectory", type=Path, help="a .gif of the picture forming, or of the text being unmasked")
    add("--checkpoint", type=Path, default=DEFAULT, help="a checkpoint folder (the shipped emoji weights)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--dtype", choices=["float32", "bfloat16"], help="of transformer and T5 (float32; published weights: bfloat16)")
    add("--height", type=int, help="of the picture, in pixels (as trained; published weights: 512)")
    add("--width", type=int, help="of the picture, in pixels")
    add("--length", type=int, help="tokens of a text (as trained; published weights: 256, with --question 128)")
    add("--vae", type=Path, help="where the autoencoder is, if not in --checkpoint")
    add("--t5", type=Path, help="where T5 is, if not in --checkpoint")
    add("--tokenizer", type=Path, help="where T5's tokenizer.json is, if not in --checkpoint")
    add("--mask-embedding", type=Path, help="the aligned [MASK] embedding, a .pth or .safetensors of one vector")
    args = parser.parse_args(argv)
    if (args.prompt is None) == (args.image is None):
        parser.error("give --prompt TEXT to draw, or --image FILE to read a picture, and not both")
    if args.image is None and (args.question is not None or args.text is not None):
        parser.error("--question and --text need --image")
    if args.question is not None and args.text is not None:
        parser.error("give --question or --text, not both")
    for name in ("prompt", "question", "text"):
        if getattr(args, name) is not None and not getattr(args, name).strip():
            parser.error(f"--{name} is empty; write what to {dict(prompt='draw', question='ask', text='fill')[name]}")
    if args.text is not None and "[MASK]" not in args.text:
        parser.error("--text holds no [MASK]; write [MASK] where words are missing")
    for name, low in (("n", 1), ("steps", 1), ("max_tokens", 1), ("temperature", 0), ("guidance", 0), ("height", 1),
                      ("width", 1), ("length", 2)):
        value = getattr(args, name)
        if value is not None and not low <= value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    if args.shift is not None and not 0 < args.shift < float("inf"):
        parser.error(f"--shift must be above 0, got {args.shift}")
    for path in filter(None, (args.out if args.prompt else None, args.trajectory)):
        if not path.parent.is_dir():
            parser.error(f"{path}: the folder {path.parent} does not exist")
        if path == args.trajectory and path.suffix != ".gif":
            parser.error(f"--trajectory {path}: expected a name that ends in .gif")
        if path == args.out and Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
            parser.error(f"--out {path}: expected a picture's name, such as {path.stem}.png")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    image = None if args.image is None else data.read_picture(args.image)        # a bad file, before a slow load
    sampler = Sampler(args.checkpoint, device, args.dtype and getattr(torch, args.dtype), vae=args.vae, t5=args.t5,
                      tokenizer=args.tokenizer, mask_embedding=args.mask_embedding, height=args.height,
                      width=args.width, length=args.length)
    states = [] if args.trajectory else None

    if args.prompt is not None:
        for flag, text in (("--prompt", args.prompt), ("--negative-prompt", args.negative_prompt)):
            count = len(sampler.tokenizer.pieces(text))
            if count > sampler.length - 1:
                raise UserError(f"{flag} has {count} tokens, this model reads {sampler.length - 1}; shorten it")
        drawn = sampler.draw([args.prompt] * args.n, args.negative_prompt, args.steps or 28, args.guidance, args.seed,
                             args.shift, states)
        write_picture(args.out, grid(drawn))
        print(args.out)
        if states:
            write_picture(args.trajectory, *map(grid, states))
        return

    pixels = data.to_tensor(data.fit_picture(image, sampler.height, sampler.width))
    steps = args.steps or (128 if args.question is None else 32)
    how = dict(steps=steps, temperature=args.temperature, order=args.order, seed=args.seed,
               posterior=args.posterior, trajectory=states)
    if args.text is not None:
        print(sampler.infill(pixels, args.text, **how))
    else:
        if args.max_tokens is not None and args.max_tokens > sampler.length:
            raise UserError(f"--max-tokens {args.max_tokens}: this model writes at most {sampler.length} tokens")
        print(sampler.write(pixels[None], args.question, args.max_tokens, **how)[0])
    if states:
        steps = steps if (args.order or sampler.defaults["order"]) == "random" else int(states[-1][0][0])
        write_picture(args.trajectory, *[text_frame(sampler.tokenizer, ids[0], int(step[0]), steps)
                                         for step, ids in states])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written")
