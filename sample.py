"""Draw pictures from text, and text from pictures.

    python sample.py --prompt "red apple, noto style" --out apple.png       # text -> picture
    python sample.py --image apple.png                                      # picture -> caption
    python sample.py --image apple.png --question "What kind of thing is this?"
    python sample.py --image apple.png --text "red [MASK], [MASK] style"    # fills the masks, changes nothing else

Without --checkpoint the weights in assets/emoji are used; they were trained by train.py.  The same seed gives
the same result.  --trajectory FILE.gif shows the picture forming, or the text being unmasked.

Shapes: B batch, L tokens, P pixels a side.
"""

import itertools
import math
import sys
import textwrap
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


class Sampler:
    """A checkpoint of the end-to-end variant with the four things it can do."""

    def __init__(self, path: str | Path = DEFAULT, device: str = "cpu", dtype: torch.dtype = torch.float32):
        config = checkpoint.read_config(path)
        self.device, self.dtype = torch.device(device), dtype
        self.tokenizer = checkpoint.load_tokenizer(path)
        self.mmdit = checkpoint.load_mmdit(path, dtype).to(device)
        self.embedding = checkpoint.load_embedding(path, dtype).to(device)
        self.vae = checkpoint.load_vae(path)
        self.pixels, self.length = config.get("pixels"), config["mmdit"].text_length
        if not isinstance(self.pixels, int) or self.pixels < 1:
            raise UserError(f"{path}: config.json says \"pixels\": {self.pixels!r}, expected the side of a picture")
        if self.tokenizer.vocab_size != config["mmdit"].vocab_size:
            raise UserError(f"{path}: tokenizer.json has {self.tokenizer.vocab_size} tokens, "
                            f"config.json {config['mmdit'].vocab_size}")

    @torch.inference_mode()
    def draw(self, prompts: list[str], negative: str = "", steps: int = 28, guidance: float = 4.0, seed: int = 0,
             shift: float = 1.0, trajectory: list | None = None) -> Tensor:
        """One picture for each prompt: (B, 3, P, P) in [-1, 1], on the CPU."""
        encode = lambda texts: self.embedding(torch.stack(
            [self.tokenizer.encode(text, self.length) for text in texts]).to(self.device))
        text, null = encode(prompts), encode([negative] * len(prompts))          # (B, L, E)
        generator = torch.Generator().manual_seed(seed)
        shape = (len(prompts), self.vae.channels, self.pixels // self.vae.factor, self.pixels // self.vae.factor)
        noise = torch.randn(shape, generator=generator).to(self.device)          # the walk stays in float32
        condition = text if guidance == 1 else torch.cat([text, null])           # (B or 2B, L, E)
        velocity = lambda x, t: self.mmdit(x.to(self.dtype), condition, t, need="velocity")[0].float()
        if guidance != 1:
            velocity = flow.guide(velocity, guidance)
        latents = flow.euler(velocity, noise, flow.sigmas(steps, shift), trajectory)
        return self.vae.decode(latents).float().clamp(-1, 1).cpu()

    @torch.inference_mode()
    def fill(self, images: Tensor, ids: Tensor, steps: int = 128, temperature: float = 0.0, seed: int = 0,
             order: str = "confidence", trajectory: list | None = None) -> Tensor:
        """Replace every [MASK] of ids (B, L) given images (B, 3, P, P); everything else stays.

        order: "random", the paper's walk, or "confidence", the surest token first.
        """
        latents = self.vae.encode(images.to(self.device, self.dtype))
        sampler = dict(random=mask_diffusion.sample, confidence=mask_diffusion.sample_confident)[order]
        return sampler(self.logits(latents), ids.to(self.device), self.tokenizer.mask_id, steps,
                       torch.Generator().manual_seed(seed), temperature, trajectory).cpu()

    def logits(self, latents: Tensor):
        """The text half of the model as a function of ids (B, L) alone, for clean latents."""
        clean = torch.zeros(1, device=self.device)
        return lambda ids: self.mmdit(latents, self.embedding(ids), clean, need="logits")[1]

    def write(self, images: Tensor, question: str | list[str] | None = None, max_tokens: int | None = None,
              **how) -> list[str]:
        """A caption for each picture (B, 3, P, P); with a question (or one for each), its answer."""
        questions = question if isinstance(question, list) else [question] * len(images)
        ids = torch.stack([self.canvas(q, max_tokens) for q in questions])       # (B, L)
        starts = [0 if q is None else len(self.tokenizer.pieces(data.question_prompt(q))) for q in questions]
        return [self.tokenizer.decode(row[start:]) for row, start in zip(self.fill(images, ids, **how), starts)]

    def canvas(self, question: str | None = None, max_tokens: int | None = None) -> Tensor:
        """What a caption or an answer is written on, (L,): the prompt, [MASK]s, and padding past max_tokens."""
        prompt = [] if question is None else self.tokenizer.pieces(data.question_prompt(question))
        room = self.length - len(prompt)
        if room < 1:
            raise UserError(f"the question has {len(prompt)} tokens and leaves no room for an answer: "
                            f"this model reads {self.length}")
        masks = room if max_tokens is None else min(room, max_tokens)
        return torch.tensor(prompt + [self.tokenizer.mask_id] * masks + [self.tokenizer.pad_id] * (room - masks))

    @torch.inference_mode()
    def infill(self, image: Tensor, text: str, trajectory: list | None = None, **how) -> str:
        """Fill the [MASK]s of a text about one picture (3, P, P).

        A [MASK] stands for one to three tokens (it takes the space before it along, as GPT-2's tokens do).  All
        ways to cut up to two masks into tokens are filled as one batch, and the one that the model finds most
        likely is kept: the bound of `mask_diffusion.loss`, averaged over 64 levels of masking.
        """
        parts = [self.tokenizer.pieces(part) for part in text.replace(" [MASK]", "[MASK]").split("[MASK]")]
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
        filled = self.fill(image.expand(len(rows), -1, -1, -1), torch.stack(rows), trajectory=trajectory, **how)
        latents = self.vae.encode(image.to(self.device, self.dtype)).expand(64, -1, -1, -1)
        bounds = [mask_diffusion.loss(self.logits(latents), row.expand(64, -1).to(self.device),
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
    """(B, 3, P, P) -> one picture, as square as B allows."""
    tiles = [enlarge(data.to_picture(image)) for image in images]
    columns = math.ceil(math.sqrt(len(tiles)))
    side, gap = tiles[0].width, 8 if len(tiles) > 1 else 0
    page = Image.new("RGB", (columns * (side + gap) - gap, math.ceil(len(tiles) / columns) * (side + gap) - gap), "white")
    for i, tile in enumerate(tiles):
        page.paste(tile, (i % columns * (side + gap), i // columns * (side + gap)))
    return page


def page(sampler: Sampler, prompts: list[str], captions: list[str], images: Tensor, seed: int = 0) -> Image.Image:
    """Two columns: prompts with what is drawn for them, and images (B, 3, P, P) with the caption that is written,
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
    add("--guidance", type=float, default=4.0, help="classifier-free guidance (4); 1: none")
    add("--shift", type=float, default=1.0, help="shift of the noise levels (1: none; the paper's 512-pixel model: 3)")
    add("--temperature", type=float, default=0.0, help="of text; 0 takes the likeliest token (0), 1 samples the model")
    add("--order", choices=["confidence", "random"], default="confidence", help="of unmasking: the surest token first; "
        "or random, which with --temperature 1 is the paper's sampler")
    add("--max-tokens", type=int, help="longest caption or answer, in tokens")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("sample.png"), help="where the picture goes (sample.png)")
    add("--trajectory", type=Path, help="a .gif of the picture forming, or of the text being unmasked")
    add("--checkpoint", type=Path, default=DEFAULT, help="a checkpoint folder (the shipped emoji weights)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
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
    for name, low in (("n", 1), ("steps", 1), ("max_tokens", 1), ("temperature", 0), ("guidance", 0)):
        value = getattr(args, name)
        if value is not None and not low <= value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    if not 0 < args.shift < float("inf"):
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
    sampler = Sampler(args.checkpoint, device, getattr(torch, args.dtype))
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
            write_picture(args.trajectory, *[grid(sampler.vae.decode(state)) for state in states])
        return

    pixels = data.to_tensor(data.fit_picture(image, sampler.pixels))
    steps = args.steps or (128 if args.question is None else 32)
    how = dict(steps=steps, temperature=args.temperature, order=args.order, seed=args.seed, trajectory=states)
    if args.text is not None:
        print(sampler.infill(pixels, args.text, **how))
    else:
        if args.max_tokens is not None and args.max_tokens > sampler.length:
            raise UserError(f"--max-tokens {args.max_tokens}: this model writes at most {sampler.length} tokens")
        print(sampler.write(pixels[None], args.question, args.max_tokens, **how)[0])
    if states:
        write_picture(args.trajectory, *[text_frame(sampler.tokenizer, ids[0], int(step[0]), steps)
                                         for step, ids in states])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
