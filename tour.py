"""Dual diffusion in one file: one network learns to draw captions and to describe drawings.

    python tour.py              # 1.5 to 3 minutes on two cores; writes tour.png

Both directions are diffusion.  Training destroys a part of the data and asks the network to restore
it; drawing and reading start with nothing left and restore step by step.  Noise destroys images,
[MASK] replaces words.  Each has its time: t = 0 is data, t = 1 is pure noise or only [MASK]s.

The method is "Dual Diffusion for Unified Image Generation and Understanding" (arXiv 2501.00289).
"Full code" says where this repository does more; docs/exercises.md has changes to try here.
Shapes: B batch, N = 16 image patches, L = 6 words, D = 96 network width, S = 16 pixels.
"""

import argparse
import math
import random
from time import perf_counter

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw

# ------------------------------------------------------------------------------------ 1. the world
# An image shows one object or two.  Their places and sizes are random: a caption has many images,
# and the network must learn a distribution, not one answer.  Full code: data.py and dataset/.

SIZE, PATCH = 16, 4                 # S, pixels along a side of an image; along a side of a patch
COLOURS = ["red", "green", "blue", "orange", "purple", "cyan"]
SHAPES = {"disc": 3.14, "square": 3.24, "triangle": 1.8}         # area / radius^2
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
HELD_OUT = {("blue", "triangle"), ("green", "disc")}    # never together in training
RGB = torch.tensor([ImageColor.getrgb(name) for name in [*COLOURS, "white"]]) / 127.5 - 1
# One word is one token; [END] fills captions up.  [MASK] is no word: it is never the answer.
WORDS = ["[END]", "left", "of", "above", *COLOURS, *SHAPES]
END, MASK = 0, len(WORDS)
LENGTH = 6                          # L, words in "red disc left of blue square"


def pairs_in(caption):
    """Return the (colour, shape) of each object in a caption, a list of one or two."""
    objects = caption.replace(" left of ", ",").replace(" above ", ",").split(",")
    return [tuple(words.split()) for words in objects]


def pixels_of(shape, x, y, radius):
    """Return which pixels a shape around (x, y) covers, (S, S) bool."""
    pixels = torch.arange(SIZE) + 0.5
    dx, dy = pixels - x, pixels[:, None] - y
    if shape == "disc":
        return dx ** 2 + dy ** 2 <= radius ** 2
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) <= 0.9 * radius
    return (dy <= 0.63 * radius) & (2 * dx.abs() <= dy + 1.27 * radius)


def paint(caption, rng):
    """Return a random image (3, S, S) in [-1, 1] with this caption, on white."""
    image = torch.ones(3, SIZE, SIZE)
    pairs = pairs_in(caption)
    for i, (colour, shape) in enumerate(pairs):
        x, y = rng.uniform(6, 10), rng.uniform(6, 10)
        radius = rng.uniform(4, 5.5)
        if len(pairs) == 2:
            x = rng.uniform(3.5, 4.5) + 8 * i     # one in each half
            radius *= 0.7
        if "above" in caption:
            x, y = y, x
        image[:, pixels_of(shape, x, y, radius)] = RGB[COLOURS.index(colour)][:, None]
    return image


def make_data(count, seed, held_out):
    """Return images (count, 3, S, S) and captions, all with a pair of HELD_OUT, or all without."""
    rng = random.Random(seed)
    captions = []
    while len(captions) < count:
        first, second = rng.sample(PAIRS, 2)
        relation = rng.choice(["", "left of", "above"])
        words = [*first, relation, *second] if relation else first
        caption = " ".join(words)
        has_held_out = not HELD_OUT.isdisjoint(pairs_in(caption))
        # two objects have two colours, so that counting pixels can tell them apart
        if has_held_out == held_out and first[0] != second[0]:
            captions.append(caption)
    return torch.stack([paint(caption, rng) for caption in captions]), captions


def encode(captions):
    """Return the token ids of captions, (B, L)."""
    rows = [[WORDS.index(word) for word in caption.split()] for caption in captions]
    return torch.tensor([row + [END] * (LENGTH - len(row)) for row in rows])


def decode(ids):
    """Return the captions of token ids (B, L), with "_" for [MASK]."""
    names = WORDS + ["_"]
    texts = [" ".join(names[i] for i in row) for row in ids.tolist()]
    return [text.split(" [END]")[0] for text in texts]


# ---------------------------------------------------------------------------------- 2. the network
# The MMDiT of Stable Diffusion 3 has two streams with weights of their own, one for patches and one
# for words.  They meet in the attention of every block, where patches and words all see each other.
# The noise level t of the image enters both streams as shifts, scales and gates (adaLN, DiT).  The
# share of masked words is no input: the network can count the [MASK]s.
# Full code: model.py at any size; pretrained/ has T5 and the autoencoder of published weights.

WIDTH, HEADS, DEPTH = 96, 4, 3      # D, attention heads, blocks
layer_norm = nn.LayerNorm(WIDTH, elementwise_affine=False)        # has no weights


class Stream(nn.Module):            # the weights of one stream in one block
    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp_in = nn.Linear(WIDTH, 4 * WIDTH)
        self.mlp_out = nn.Linear(4 * WIDTH, WIDTH)
        # shifts, scales and gates start at zero, so each block begins as the identity
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def before_attention(self, x, time):
        """x (B, N or L, D), time (B, D) -> q, k and v (B, N or L, 3 D), and the modulation."""
        modulation = self.modulation(time).unsqueeze(1).chunk(6, dim=-1)          # 6 x (B, 1, D)
        shift, scale = modulation[:2]
        return self.qkv(layer_norm(x) * (1 + scale) + shift), modulation

    def after_attention(self, x, attended, modulation):
        gate, mlp_shift, mlp_scale, mlp_gate = modulation[2:]
        x = x + gate * self.out(attended)
        hidden = self.mlp_in(layer_norm(x) * (1 + mlp_scale) + mlp_shift)
        return x + mlp_gate * self.mlp_out(F.gelu(hidden))


def block(img_stream, txt_stream, img, txt, time):
    """Joint attention, then an MLP each: img (B, N, D), txt (B, L, D), time (B, D) -> img, txt."""
    img_qkv, img_modulation = img_stream.before_attention(img, time)
    txt_qkv, txt_modulation = txt_stream.before_attention(txt, time)
    qkv = torch.cat([img_qkv, txt_qkv], dim=1)                                    # (B, N + L, 3 D)
    qkv = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv                                                # (B, heads, N + L, D / heads) each
    # no causal mask: a masked word is predicted from the words on both of its sides
    scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH / HEADS)
    N = img.shape[1]
    attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)                # (B, N + L, D)
    img = img_stream.after_attention(img, attended[:, :N], img_modulation)
    txt = txt_stream.after_attention(txt, attended[:, N:], txt_modulation)
    return img, txt


class MMDiT(nn.Module):
    def __init__(self):
        super().__init__()
        patches = (SIZE // PATCH) ** 2                                            # N
        values = 3 * PATCH ** 2                                                   # of a patch
        self.img_in = nn.Linear(values, WIDTH)
        self.img_position = nn.Parameter(0.02 * torch.randn(patches, WIDTH))
        self.txt_in = nn.Embedding(len(WORDS) + 1, WIDTH)
        self.txt_position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.time_in = nn.Linear(2 * 32, WIDTH)
        self.img_streams = nn.ModuleList(Stream() for _ in range(DEPTH))
        self.txt_streams = nn.ModuleList(Stream() for _ in range(DEPTH))
        self.img_out = nn.Linear(WIDTH, values)
        self.txt_out = nn.Linear(WIDTH, len(WORDS))

    def forward(self, images, ids, t):
        """images (B, 3, S, S) at noise levels t (B,), 0 for clean ones; ids (B, L)
        -> the velocity (B, 3, S, S) of the images, and logits (B, L, words)"""
        # waves of many frequencies: from t itself, a linear layer can't tell near times apart
        frequencies = 1000 * torch.exp(-math.log(10000) * torch.arange(32) / 32)
        angles = t[:, None] * frequencies                                         # (B, 32)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        time = F.silu(self.time_in(waves))                                        # (B, D)
        patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)           # (B, N, values)
        img = self.img_in(patches) + self.img_position
        txt = self.txt_in(ids) + self.txt_position
        for img_stream, txt_stream in zip(self.img_streams, self.txt_streams):
            img, txt = block(img_stream, txt_stream, img, txt, time)
        patches = self.img_out(layer_norm(img)).transpose(1, 2)                   # (B, values, N)
        clean = F.fold(patches, SIZE, PATCH, stride=PATCH)
        # An image is simpler than noise, so the network predicts the image x, which gives the
        # velocity (x_t - x) / t (JiT, arXiv 2511.13720).  At t = 0 it is infinite, but not used.
        velocity = (images - clean) / t[:, None, None, None]
        return velocity, self.txt_out(layer_norm(txt))


# ---------------------------------------------------------------------- 3. drawing: rectified flow
#     x_t = (1 - t) x + t noise              velocity v = dx_t/dt = noise - x
# A straight line leads from an image x to noise.  At a point x_t on it, the network's image gives
# a velocity.  Lines of many images pass through the same x_t, and the squared error is least at
# their mean velocity.  Following it from t = 1 to t = 0 turns noise into new images.
# Full code: flow.py has other times and solvers; inference/text_to_image.py edits images.

DROPPED = 0.1       # share of captions emptied in training, to learn v_empty of `draw`
GUIDANCE = 3.0


def image_loss(model, images, ids):
    """L_image = |v(x_t, t, caption) - (noise - x)|^2: the image is noised, the caption clean."""
    B = len(images)
    # Few times are near 0 or 1, where there is little to decide, and more above 1/2 than below.
    # Under 0.05, the last step of `draw`, the division by t would let small errors weigh too much.
    t = torch.sigmoid(torch.randn(B, 1, 1, 1) + 0.7).clamp(min=0.05)
    noise = torch.randn_like(images)
    x_t = (1 - t) * images + t * noise
    ids = torch.where(torch.rand(B, 1) < DROPPED, END, ids)
    velocity, _ = model(x_t, ids, t.flatten())
    return (velocity - (noise - images)).square().mean()


@torch.no_grad()
def draw(model, captions, seed, steps=20):
    """Return the images (B, 3, S, S) before the first step and after each one."""
    ids = encode(captions)
    torch.manual_seed(seed)
    x = torch.randn(len(ids), 3, SIZE, SIZE)
    states = [x]
    for step in range(steps):
        t = torch.full((len(ids),), 1 - step / steps)
        # Guidance goes from the velocity for an empty caption to that for the caption, and twice
        # that distance further: drawings fit their captions better, and vary less.
        v_empty, _ = model(x, torch.full_like(ids, END), t)
        v_caption, _ = model(x, ids, t)
        v = v_empty + GUIDANCE * (v_caption - v_empty)
        x = x - v / steps           # Euler's method: dx/dt = v, and t falls by 1 / steps
        states.append(x)
    return states


# -------------------------------------------------------------------- 4. reading: masked diffusion
#     L_text = 1/t * sum over masked words of -log p(word | image, visible words),   t ~ U(0, 1]
# Each word is masked with probability t.  The network sees the clean image and the other words, and
# predicts the masked ones.  Why 1/t?  Then a word has the same mean weight at every t, and L_text
# is, on average, the -log p of revealing the words one by one in random order: an upper bound of
# -log p(caption | image) (MDLM, arXiv 2406.07524).
# Why two passes?  In use, the image is clean when a caption is read, and the caption is clean when
# an image is drawn.  So L_text has a clean image, noise level 0, and L_image a clean caption.
# Full code: mask_diffusion.py; inference/image_to_text.py also answers questions.

def text_loss(model, images, ids):
    """L_text per word: the caption is masked, the image clean."""
    B = len(images)
    t = torch.rand(B, 1).clamp(min=1e-3)                          # the weight is at most 1000
    masked = torch.rand(ids.shape) < t                                            # (B, L)
    _, logits = model(images, torch.where(masked, MASK, ids), torch.zeros(B))
    errors = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")       # (B, L)
    return (errors * masked / t).mean()


@torch.no_grad()
def read(model, images):
    """Return the ids (B, L) before the first step and after each one."""
    ids = torch.full((len(images), LENGTH), MASK)
    states = [ids]
    for step in range(LENGTH):
        _, logits = model(images, ids, torch.zeros(len(images)))
        probability, word = logits.softmax(-1).max(-1)                            # (B, L)
        probability[ids != MASK] = -1                             # a revealed word stays
        # one word a step, the surest: words that are revealed together can't see each other
        surest = probability.argmax(1, keepdim=True)                              # (B, 1)
        ids = ids.scatter(1, surest, word.gather(1, surest))
        states.append(ids)
    return states


# ------------------------------------------------------------------------------------- 5. training
# Full code: train.py has this loop with FSDP2 on many GPUs; training/muon.py has the optimizer.

STEPS = 1700
IMAGES = 8000                       # to train on
IMAGE_BATCH, TEXT_BATCH = 64, 32    # reading is easier to learn than drawing
TEXT_WEIGHT = 0.5                   # lambda in L = L_image + lambda L_text
LEARNING_RATE = 3e-3


@torch.no_grad()
def muon_step(matrices, momenta, lr):
    """Update by U V' in place of the running mean gradient U S V': small directions count as much as
    large ones, which halves the number of steps here (Muon, Keller Jordan, 2024)."""
    for p, momentum in zip(matrices, momenta):
        momentum.lerp_(p.grad, 0.05)
        x = p.grad.lerp(momentum, 0.95)
        if len(p) > p.shape[1]:     # x x' is smaller for wide matrices; p.T is a view
            x, p = x.T, p.T
        x = x / (x.norm() + 1e-7)
        for _ in range(5):          # s -> 3.4 s - 4.8 s^3 + 2 s^5 brings each s of S close to 1
            product = x @ x.T
            x = 3.4445 * x + (-4.775 * product + 2.0315 * product @ product) @ x
        p.sub_(x, alpha=0.2 * max(p.shape) ** 0.5 * lr)           # as large as AdamW's steps


def train(images, captions, steps):
    model = MMDiT()
    ids = encode(captions)
    # Muon for the matrices of attention and MLPs, AdamW for all other weights
    matrices = [p for name, p in model.named_parameters()
                if "stream" in name and "modulation" not in name and p.ndim == 2]
    others = list(set(model.parameters()) - set(matrices))
    momenta = [torch.zeros_like(p) for p in matrices]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.99))
    started = perf_counter()
    for step in range(1, steps + 1):
        i = torch.randint(len(images), (IMAGE_BATCH,))
        j = torch.randint(len(images), (TEXT_BATCH,))
        loss_image = image_loss(model, images[i], ids[i])
        loss_text = text_loss(model, images[j], ids[j])
        loss = loss_image + TEXT_WEIGHT * loss_text
        model.zero_grad()
        loss.backward()
        # rise over 50 steps, stay, and fall to zero over the last 40 %
        lr = LEARNING_RATE * min(1, step / 50, 2.5 * (1 - step / steps))
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        muon_step(matrices, momenta, lr)
        if step % 100 == 0 or step == steps:
            speed = step / (perf_counter() - started)
            print(f"step {step}/{steps}: image loss {loss_image:.3f}, text loss {loss_text:.3f}; "
                  f"{speed:.1f} steps/s, {(steps - step) / speed:.0f} s left", flush=True)
    return model


# ------------------------------------------------------------------------------ 6. counting pixels
# Does a drawing show what its caption says?  Full code: metrics/ has FID, CLIP and more.

def find_things(image):
    """Return colour, shape, x and y of each thing in an image (3, S, S)."""
    nearest = (image - RGB[:, :, None, None]).square().sum(1).argmin(0)           # (S, S)
    things = []
    for i, colour in enumerate(COLOURS):
        mask = nearest == i
        # connected parts: each pixel has a number, and takes the largest around it, again and again
        numbers = torch.arange(1.0, SIZE ** 2 + 1).view(1, SIZE, SIZE) * mask
        for _ in range(2 * SIZE):
            numbers = F.max_pool2d(numbers, 3, stride=1, padding=1) * mask
        for number in numbers[numbers > 0].unique():
            part = numbers[0] == number
            if part.sum() > 5:      # not a speck
                y, x = (part.nonzero() + 0.5).mean(0).tolist()
                overlap = {}        # with each shape of the same middle and area
                for shape, area in SHAPES.items():
                    ideal = pixels_of(shape, x, y, math.sqrt(part.sum() / area))
                    overlap[shape] = (ideal & part).sum() / (ideal | part).sum()
                things.append((colour, max(overlap, key=overlap.get), x, y))
    return things


def check(image, caption):
    """Return which properties of a drawing match its caption.  `places` and `shapes` can match only
    if the number does."""
    pairs = pairs_in(caption)
    axis = 3 if "above" in caption else 2                         # y or x of a thing
    things = sorted(find_things(image), key=lambda thing: thing[axis])
    colours = [thing[0] for thing in things]
    wanted = [pair[0] for pair in pairs]
    places = colours == wanted
    if places and len(pairs) == 2:
        places = things[1][axis] - things[0][axis] > SIZE / 4
    shapes = sorted(thing[:2] for thing in things) == sorted(pairs)
    return dict(colours=set(colours) == set(wanted), number=len(things) == len(pairs),
                places=places, shapes=shapes)


def measure(model, images, captions):
    """Return the share of captions read word for word, and of drawings that pass each check."""
    answers = decode(read(model, images)[-1])
    drawings = draw(model, captions, seed=0)[-1]
    rows = []
    for answer, drawing, caption in zip(answers, drawings, captions):
        rows.append(dict(read=answer == caption, **check(drawing, caption)))
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


# ------------------------------------------------------------------------------------ 7. the sheet

def make_sheet(rows):
    """Return an image of rows, each with a title, images (8, 3, S, S) and texts below them."""
    sheet = Image.new("RGB", (900, 170 * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (title, images, texts) in enumerate(rows):
        top = 170 * row + 4
        pen.text((4, top), title, fill="black", font_size=13)
        strip = torch.cat(list(F.pad(images, (0, 1), value=1)), dim=2)            # (3, S, 8 S + 8)
        pixels = (strip.clamp(-1, 1) + 1) * 127.5
        tiles = Image.fromarray(pixels.byte().permute(1, 2, 0).numpy())
        sheet.paste(tiles.resize((896, 106), Image.Resampling.NEAREST), (0, top + 20))
        for column, text in enumerate(texts):
            text = text.replace(" left", "\nleft").replace(" above", "\nabove")
            pen.text((4 + 112 * column, top + 130), text, fill="black")
    return sheet


def main():
    parser = argparse.ArgumentParser(description="Train on coloured shapes; write tour.png.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training ({STEPS})")
    args = parser.parse_args()
    print("Expect losses of 0.5 and 1.5 at step 100, 0.2 and 0.2 at 500, 0.12 and 0.01 at 1700.")
    torch.manual_seed(0)
    model = train(*make_data(IMAGES, seed=0, held_out=False), args.steps)
    rows = []
    for title, held_out in (("known pairs", False), ("pairs never seen in training", True)):
        shares = measure(model, *make_data(200, seed=1, held_out=held_out))
        title += "; of 200: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        print(title)
        images, captions = make_data(8, seed=2, held_out=held_out)
        rows.append((f"Drawn, {title}", draw(model, captions, seed=1)[-1], captions))
        rows.append(("Read, from new images", images, decode(read(model, images)[-1])))
    captions = ["red disc left of blue square"] * 8
    states = torch.stack(draw(model, captions, seed=2))           # (21, 8, 3, S, S)
    rows.append(("One caption, drawn eight times", states[-1], captions))
    shown = [0, 5, 8, 11, 14, 16, 18, 20]
    rows.append(("An image forming", states[shown, 0], [f"t = {1 - i / 20:.2f}" for i in shown]))
    texts = decode(torch.cat(read(model, images[:1])))            # seven, of an unseen pair
    rows.append(("A caption being unmasked", images[:1].repeat(8, 1, 1, 1), texts))
    make_sheet(rows).save("tour.png")


if __name__ == "__main__":
    main()
