"""See what a trained STD-Former sees: pictures of one clip, and of what each module does with it.

    python scripts/visualize.py --ckpt out/toy/best.pt --clip 6001      # a clip of the data set
    python scripts/visualize.py --ckpt out/ssv2/best.pt --video clip.webm       # or any video
    python scripts/visualize.py --ckpt out/toy/best.pt --clip 6001 --only ctm --place 2 3
    python scripts/visualize.py --toy_classes classes.webp              # the toy's ten classes

    frames.png      the frames that the model is given, and the five most likely classes
    order.png       the same frames reversed, shuffled and repeated: does the answer need time?
    relevance.png   which places of which frames speak for the answer
    ctm.png         which frame attends to which (section 3.3)
    smem.png        where each place went in the next frame, and what SMEM makes of it (section 3.5)
    stdm.png        how much is fed back to which place (section 3.4)
    ptm.png         sizes of the three terms of Eq. 1 (section 3.2)
    clip.webp       animation: the clip, its motion and its relevance

The pictures show one view, the centre crop. If the model lacks a module, its picture is left out,
and a line says so. The model is not changed: forward hooks read what flows through it. The plots
ctm, smem, stdm and ptm need matplotlib.
"""
import argparse
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
from evaluate import pick_device, predict
from model import PTM, ModelConfig, STDFormer, load_checkpoint
from scripts.guards import run_program
from scripts.output import top_classes
from scripts.toy_data import TOY_CLASSES, toy_render, toy_scene

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, YELLOW = "#0072B2", "#D55E00", "#009E73", "#F0E442"
PALE_BLUE, GREY, DARK_GREY, INK = "#CFE3F1", "#BBBBBB", "#555555", "#222222"

# Pictures are about as wide as GitHub shows them, and a phone shows them at half their size.
SMALL, MEDIUM, LARGE = 15, 17, 19                       # letters, in pixels
POINTS = 11                                             # letters of plots: 15 pixels
COLUMNS, CELL, GAP = 8, 91, 3                           # frames in a row, and their pixels
WIDTH = COLUMNS * (CELL + GAP) - GAP
MARGIN = 10
MOST = 4                                                # layers or heads in a plot
PLOT_COLUMNS = 5                                        # frames in a plot

# ----- The clip and the model -----------------------------------------------

def find_in_dataset(clip, dataset, root, clip_root=None):
    """Path and class (None if unknown) of the clip with this id, in any split of a data set.

    ValueError if no split has it, FileNotFoundError if there is no split at all.
    """
    known, missing = [], None
    for split in ("validation", "train", "test"):
        try:
            found = data.VideoDataset(dataset, root, split, clip_root=clip_root)
        except FileNotFoundError as e:
            missing = missing or e
            continue
        ids = found.ids.tolist()
        known += ids[:3]
        if clip in ids:
            index = ids.index(clip)
            label = found.labels[index]
            return found.path(index), found.classes[label] if label >= 0 else None
    if not known:
        raise missing
    raise ValueError(f"--clip is {clip}, expected one of {root}, such as {', '.join(known)}; "
                     "--video takes a path")


def read_frames(path, num_frames, size):
    """One centre view of a clip, as evaluate.py takes it.

    Returns the video, uint8 (3, F, S, S), the numbers of its frames in the clip, and their times in
    seconds. A folder of frames has no times: None. Raises ValueError as data.read_clip does.
    """
    indices = []

    def choose(n):
        indices.extend(data.sample_indices(n, num_frames).tolist())
        return np.array(indices)

    video = data.eval_views(data.read_clip(path, choose), num_frames, size)[0]
    if Path(path).is_dir():
        return video, indices, None
    import decord                                       # only needed for video files
    times = decord.VideoReader(str(path), num_threads=1).get_frame_timestamp(indices)
    return video, indices, times[:, 0]                  # each frame has a start and an end


@torch.no_grad()
def look_inside(model, video):
    """Run a clip through the model and keep what flows through its modules.

    video: normalised, (1, 3, F, S, S). Returns the logits (classes,), and {module name: (inputs,
    output)} for the modules and the parts that the pictures need. The hooks are removed again.
    """
    seen, hooks = {}, []

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = inputs, output
        return hook

    for name, module in model.named_modules():
        parent, _, part = name.rpartition(".")
        whole = parent in ("blocks", "ctm", "stdm", "smem_t", "smem_st")
        inner = parent.count(".") == 1 and part in ("attn", "mlp", "conv", "q", "kv", "conv_in")
        if (whole or inner) and not isinstance(module, nn.Identity):
            hooks.append(module.register_forward_hook(keep(name)))
    try:
        return model(video)[0].float(), seen
    finally:
        for hook in hooks:
            hook.remove()


def smem_names(model):
    """Names of the model's SMEMs, such as "smem_t.1"."""
    names = [f"smem_t.{i}" for i in model.config.smem_t_layers]
    return names + [f"smem_st.{i}" for i in model.config.smem_st_layers]


def most_moving(video, grid):
    """The place (row, column) whose pixels change most from frame to frame. (3, F, S, S)"""
    change = video.float().diff(dim=1).abs().mean((0, 1))                       # (S, S)
    place = F.adaptive_avg_pool2d(change[None], grid)[0].argmax().item()
    return divmod(place, grid[1])

# ----- What is computed from the inside -------------------------------------

def ctm_attention(seen, layer, heads):
    """The attention weights of a CTM: (N, heads, T, T). Rows are queries and sum to 1.

    Section 3.3, Fig. 3. CTM.cross_attention does not keep its weights, so we compute them again
    from the queries and keys that its own projections gave.
    """
    def split_heads(z):                                 # (1, T, H, W, D) -> (N, heads, T, D/heads)
        return z[0].flatten(1, 2).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)

    k, _ = seen[f"ctm.{layer}.kv"][1].chunk(2, dim=-1)
    q, k = split_heads(seen[f"ctm.{layer}.q"][1]), split_heads(k)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


def smem_features(seen, name, smem):
    """What SMEM correlates, the output of its first convolution: (T, N, D/8), on SMEM's grid."""
    f = seen[f"{name}.conv_in"][1]                                              # (T, D/8, H, W)
    if f.shape[-2:] != smem.grid:
        f = F.interpolate(f, smem.grid, mode="bilinear")
    return f.flatten(2).transpose(1, 2)


def motion_field(f, grid):
    """Where each place goes from one frame to the next, read from SMEM's features.

    SMEM correlates each place of frame t with all places of frame t+1. The products alone do not
    show motion: a standing background resembles itself in all frames, and a place with large
    features resembles everything. So this cleans them as block matching does:
      - It subtracts the mean over time of each place. Only what changes is followed.
      - It divides the products, summed over 3 x 3 places, by the lengths of both sides.
      - It looks no farther than a sixth of the picture. The step is the mean of all steps, weighted
        by a softmax, less what equal weights would give.
    A place is trusted if it differs from its mean by a third or more of the largest difference in
    the clip, and its best match is above 0.5. The result is a hint, not optical flow. It shows what
    the features hold, which an untrained model's may hold as well.

    f: (T, N, C) with N = H * W
    Returns steps (down, right), (T-1, H, W, 2), and which to trust, bool (T-1, H, W).
    """
    (H, W), reach = grid, max(1, grid[0] // 6)
    change = (f - f.mean(0)).unflatten(1, grid)                                 # (T, H, W, C)
    here = change[:-1]
    there = F.pad(change[1:], (0, 0, reach, reach, reach, reach))
    inside = F.pad(torch.ones(H, W, device=f.device), (reach, reach, reach, reach)).bool()

    def block(z):
        return F.avg_pool2d(z, 3, 1, 1)

    steps, match, possible = [], [], []
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            rows = slice(reach + down, reach + down + H)
            columns = slice(reach + right, reach + right + W)
            moved = there[:, rows, columns]                                     # (T-1, H, W, C)
            products = block((here * moved).sum(-1))
            lengths = (block((here ** 2).sum(-1)) * block((moved ** 2).sum(-1))).sqrt()
            steps.append((down, right))
            match.append(products / lengths.clamp(min=1e-9))                    # from -1 to 1
            possible.append(inside[rows, columns])
    possible = torch.stack(possible, dim=-1)                                    # (H, W, steps)
    match = torch.stack(match, dim=-1).masked_fill(~possible, -torch.inf)

    equal = possible / possible.sum(-1, keepdim=True)
    weights = (10 * match).softmax(-1) - equal          # 10: a tenth of likeness decides
    field = weights @ torch.tensor(steps, device=f.device, dtype=f.dtype)
    size = here.norm(dim=-1)
    return field, (size > size.max() / 3) & (match.amax(-1) > 0.5)


def relevance(model, video, steps=16):
    """How much each place of each token frame speaks for the answer.

    Integrated gradients (Sundararajan et al., 2017) at the stem's convolution. On the way from a
    clip that stands still (all frames are their mean) to the clip, we add up the gradient of the
    winning class's logit times the change. So a place that does not change has no relevance, and
    the map sums to the difference of the two logits, more exactly with more steps. It explains this
    model's number, not the world: a place can matter because it is compared with another.

    video: normalised, (1, 3, F, S, S)
    Returns the map (T, H, W), and the logits of the clip and of the still clip.
    """
    with torch.no_grad():
        tokens = model.conv1(video)                                             # (1, D, T, H, W)
        still = model.conv1(video.mean(2, keepdim=True).expand_as(video))
        winner = model(video)[0].argmax()

    def logit(tokens):
        hook = model.conv1.register_forward_hook(lambda module, inputs, output: tokens)
        try:
            return model(video)[0, winner]
        finally:
            hook.remove()

    total = torch.zeros_like(tokens)
    for k in range(steps):
        between = torch.lerp(still, tokens, (k + 0.5) / steps).requires_grad_()
        total += torch.autograd.grad(logit(between), between)[0] / steps
    with torch.no_grad():
        heat = ((tokens - still) * total).sum(1)[0]
        return heat, logit(tokens).item(), logit(still).item()


@dataclass
class Case:
    """One clip, and everything that its pictures share."""
    model: STDFormer
    classes: list
    statistics: tuple           # mean and std of normalisation
    device: torch.device
    title: str
    video: torch.Tensor         # uint8 (3, F, S, S), one view
    indices: list               # numbers of the frames in the clip (F,)
    seconds: object             # their times (F,), or None
    place: tuple                # (row, column), or None: the mean over places
    probability: torch.Tensor = None        # the answer (classes,)
    seen: dict = None                       # what look_inside returns
    relevance: tuple = None                 # what relevance() returns
    motion: tuple = None                    # what motion_field() returns

    def normalized(self):
        return data.normalize(self.video[None].to(self.device), *self.statistics)

    def ask(self, video):
        """Class probabilities (classes,) of a view, uint8 (3, F, S, S)."""
        return predict(self.model, video[None], self.device, "fp32", *self.statistics)[0]

    @property
    def answer(self):
        return self.classes[int(self.probability.argmax())]

    def token_frame(self, t):
        """The input frame in the middle of token frame t: uint8 (3, S, S)."""
        return self.video[:, t * self.model.config.stem_stride]

    def token_index(self, t):
        """The number in the clip of that frame."""
        return self.indices[t * self.model.config.stem_stride]

# ----- Drawing with Pillow --------------------------------------------------

def font(size=SMALL):
    """Pillow's own font, at a size in pixels."""
    return ImageFont.load_default(size)


def wrap(text, width, size, lines=2):
    """Break a text into at most `lines` lines of `width` pixels. "..." ends a text too long."""
    out, measure = [""], font(size).getlength
    for word in text.split():
        longer = f"{out[-1]} {word}".strip()
        if measure(longer) <= width or not out[-1]:
            out[-1] = longer
        else:
            out.append(word)
    if len(out) > lines:
        out = out[:lines]
        while measure(out[-1] + " ...") > width and " " in out[-1]:
            out[-1] = out[-1].rsplit(" ", 1)[0]
        out[-1] += " ..."
    return out


def spread(n, most):
    """The numbers below n, or `most` of them at even distances."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist()


def to_image(frame, size=CELL):
    """uint8 (3, S, S) -> a square Pillow image. Small frames keep their visible pixels."""
    image = Image.fromarray(frame.permute(1, 2, 0).cpu().numpy())
    small = frame.shape[-1] <= size
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return image.resize((size, size), method)


def with_heat(image, heat, limit):
    """A grey frame under a map (H, W): orange if positive, blue if negative, full at +-limit."""
    strength = (heat / limit).clamp(-1, 1).cpu().numpy()
    result = image.convert("L").convert("RGB")
    for values, colour in (strength, ORANGE), (-strength, BLUE):
        mask = Image.fromarray((values.clip(0, 1) * 230).astype(np.uint8))
        mask = mask.resize(image.size, Image.Resampling.NEAREST)
        result.paste(Image.new("RGB", image.size, colour), mask=mask)
    return result


def with_arrows(image, field, trust):
    """A frame with an arrow from each trusted place. field: (H, W, 2) steps, trust: (H, W)."""
    image = image.copy()
    draw, cell = ImageDraw.Draw(image), image.width / trust.shape[1]
    for row, column in trust.nonzero().tolist():
        start = np.array([column + 0.5, row + 0.5]) * cell
        step = field[row, column].flip(0).cpu().numpy() * cell                  # right, down
        if np.linalg.norm(step) >= cell / 5:
            draw_arrow(draw, start, step, cell * 0.4, width=max(2, image.width / 60))
    return image


def draw_arrow(draw, start, step, largest_head, width):
    """A yellow arrow with a black rim. start, step: (x, y)."""
    length = np.linalg.norm(step)
    along = step / length
    across = np.array([-along[1], along[0]])
    head = min(0.6 * length, largest_head)
    tip, neck = start + step, start + step - head * along
    for colour, rim in ("black", 1.5), (YELLOW, 0):
        draw.line((*start, *neck), colour, round(width + 2 * rim))
        side = across * (head / 2 + rim)
        back = neck - rim * along
        corners = (tip + 1.5 * rim * along, back + side, back - side)
        draw.polygon([tuple(corner) for corner in corners], colour)


def draw_top(draw, y, probability, classes, rows):
    """The most likely classes, from y on downwards: percent, and the name over a bar."""
    left = 60
    for k, (name, p) in enumerate(top_classes(probability, classes, rows)):
        row = y + 27 * k
        draw.rectangle((left, row, left + 1 + p * (WIDTH - left - 2), row + 24), fill=PALE_BLUE)
        draw.text((left - 7, row + 12), f"{100 * p:.0f} %", INK, font(), anchor="rm")
        name, = wrap(name, WIDTH - left - 10, SMALL, lines=1)
        draw.text((left + 6, row + 12), name, INK, font(), anchor="lm")


def strip(video, captions=()):
    """Frames in rows of eight, (3, F, S, S) -> a Pillow image. captions stand below them."""
    n = video.shape[1]
    pitch = CELL + GAP + (22 if captions else 0)
    rows = (n + COLUMNS - 1) // COLUMNS
    sheet = Image.new("RGB", (WIDTH, rows * pitch), "white")
    draw = ImageDraw.Draw(sheet)
    for t in range(n):
        x, y = t % COLUMNS * (CELL + GAP), t // COLUMNS * pitch
        sheet.paste(to_image(video[:, t]), (x, y))
        if captions:
            draw.text((x + CELL / 2, y + CELL + 11), captions[t], INK, font(), anchor="mm")
    return sheet


def save_titled(out, title, subtitle, body):
    """Write a picture below its title and a smaller line of explanation, on white."""
    lines = [(line, LARGE, INK) for line in wrap(title, WIDTH, LARGE)]
    lines += [(line, SMALL, DARK_GREY) for line in wrap(subtitle, WIDTH, SMALL, lines=3)]
    top = 12 + 24 * len(lines)
    sheet = Image.new("RGB", (WIDTH + 2 * MARGIN, top + body.height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (line, size, colour) in enumerate(lines):
        draw.text((MARGIN, 18 + 24 * k), line, colour, font(size), anchor="lm")
    sheet.paste(body, (MARGIN, top))
    sheet.save(out)


def save_animation(out, sheets, milliseconds, pause, quality):
    """Write pictures as an animation that repeats, with a pause at its end."""
    durations = [milliseconds] * (len(sheets) - 1) + [pause]
    sheets[0].save(out, save_all=True, append_images=sheets[1:], duration=durations, loop=0,
                   quality=quality, method=4)


def draw_frames(out, case):
    """frames.png: what the model is given and what it answers.

    Section 3.1: one frame from each of F equal segments, so a long clip is seen in wide steps.
    Percentages are of this one view. evaluate.py averages over three.
    """
    if case.seconds is None:
        captions, numbers = [str(i) for i in case.indices], "numbers in the clip"
    else:
        captions, numbers = [f"{second:.2f} s" for second in case.seconds], "times in the clip"
    frames = strip(case.video, captions)
    rows = min(5, len(case.classes))
    body = Image.new("RGB", (WIDTH, frames.height + 8 + 27 * rows), "white")
    body.paste(frames, (0, 0))
    draw_top(ImageDraw.Draw(body), frames.height + 8, case.probability, case.classes, rows)
    size = case.video.shape[-1]
    save_titled(out, f"What the model is given: {case.title}",
                f"{len(case.indices)} frames of {size} x {size} with their {numbers}, and the "
                "most likely classes", body)


def draw_order(out, case):
    """order.png: the same frames in other orders, each with its answer.

    A model that reads time changes its answer. Reversed frames should show the opposite class, if
    there is one. Shuffled frames and a repeated one should make it unsure. A model that recognises
    things keeps its answer. One clip proves little: train.py --control tests a whole data set.
    """
    n = case.video.shape[1]
    shuffled = np.random.default_rng(0).permutation(n).tolist()
    orders = (("as it is", list(range(n))), ("reversed", list(range(n))[::-1]),
              ("shuffled", shuffled), ("its middle frame, repeated", [n // 2] * n))
    rows = min(3, len(case.classes))
    height = 26 + CELL + GAP + 4 + 27 * rows + 14
    body = Image.new("RGB", (WIDTH, height * len(orders) - 14), "white")
    draw = ImageDraw.Draw(body)
    for k, (name, order) in enumerate(orders):
        y, video = k * height, case.video[:, order]
        draw.text((0, y + 12), name, INK, font(MEDIUM), anchor="lm")
        body.paste(strip(video[:, spread(n, COLUMNS)]), (0, y + 26))
        draw_top(draw, y + 26 + CELL + GAP + 4, case.ask(video), case.classes, rows)
    drawn = "" if n <= COLUMNS else f"; {COLUMNS} of its {n} frames are drawn"
    save_titled(out, f"Does the answer depend on time? {case.title}",
                f"The same clip with its frames in another order{drawn}", body)


def draw_relevance(out, case):
    """relevance.png: which places of which frames speak for the answer, and which against it.

    See relevance() for what is computed. A token frame sees several input frames; the one in their
    middle is drawn. A strong colour does not mean that the model sees an object there. It means
    that the logit would differ if this place stood still.
    """
    heat, own, still = case.relevance
    limit = heat.abs().flatten().quantile(0.99).clamp(min=1e-9)
    per_frame = heat.sum((1, 2)).cpu()
    largest = per_frame.abs().max().clamp(min=1e-9)
    first, second = 22, 22 + CELL + GAP                 # heights of the two rows of frames
    base = second + CELL + 62                           # and of the zero line of the bars
    body = Image.new("RGB", (WIDTH, base + 24), "white")
    draw = ImageDraw.Draw(body)
    draw.line((0, base, WIDTH, base), GREY)
    for k, t in enumerate(spread(len(heat), COLUMNS)):
        x, image = k * (CELL + GAP), to_image(case.token_frame(t))
        middle = x + CELL / 2
        draw.text((middle, 10), f"frame {case.token_index(t)}", INK, font(), anchor="mm")
        body.paste(image, (x, first))
        body.paste(with_heat(image, heat[t], limit), (x, second))
        bar = 42 * float(per_frame[t] / largest)
        colour = ORANGE if bar > 0 else BLUE
        draw.rectangle((x + 22, base - max(bar, 0), x + CELL - 22, base - min(bar, 0)), colour)
        below = 12 if bar > 0 else -12
        draw.text((middle, base + below), f"{per_frame[t]:+.2f}", INK, font(), anchor="mm")
    subtitle = (f"Orange speaks for it, blue against it; full colour: {limit:.2g}. Bars: the sum "
                f"over a frame. All places sum to {heat.sum():.2f}. The logit is {own:.2f}, that "
                f"of the clip standing still {still:.2f}, their difference {own - still:.2f}.")
    save_titled(out, f"What speaks for \"{case.answer}\"?", subtitle, body)


def draw_clip(out, case):
    """clip.webp: the clip as the model samples it, its motion in SMEM, and its relevance.

    Motion and relevance change from token frame to token frame. Without SMEM there is no motion.
    See motion_field() and relevance() for what they show.
    """
    size, sheets = 245, []
    answer = f"{100 * case.probability.max():.0f} %  {case.answer}"
    heat = case.relevance[0]
    limit = heat.abs().flatten().quantile(0.99).clamp(min=1e-9)
    for f in range(case.video.shape[1]):
        t, image = f // case.model.config.stem_stride, to_image(case.video[:, f], size)
        panels = [("the clip", image)]
        if case.motion:
            field, trust = case.motion
            arrows = with_arrows(image, field[t], trust[t]) if t < len(field) else image
            panels.append(("motion in SMEM", arrows))
        panels.append(("what speaks for it", with_heat(image, heat[t], limit)))
        width = MARGIN + len(panels) * (size + MARGIN)
        sheet = Image.new("RGB", (width, size + 74), "white")
        draw = ImageDraw.Draw(sheet)
        for k, (name, picture) in enumerate(panels):
            x = MARGIN + k * (size + MARGIN)
            draw.text((x, 18), name, INK, font(MEDIUM), anchor="lm")
            sheet.paste(picture, (x, 34))
        line, = wrap(answer, width - 2 * MARGIN, MEDIUM, lines=1)
        draw.text((MARGIN, size + 54), line, INK, font(MEDIUM), anchor="lm")
        sheets.append(sheet)
    save_animation(out, sheets, 200, 800, quality=80)


def draw_toy_classes(out, size=145, n=20):
    """The toy's ten classes as one animation, larger and sharper than the model sees them.

    The upper row has five motions. The lower row has the same clips run backwards, which are the
    other five classes. out: a .webp (small) or .gif.
    """
    if Path(out).suffix not in (".webp", ".gif"):
        raise ValueError(f"--toy_classes is {out}, expected a name that ends in .webp or .gif")
    clips = []
    for motion, seed in enumerate((6, 1, 4, 4, 2)):     # whose objects are easy to see
        scene = toy_scene(np.random.default_rng([seed, motion]), motion, n)
        clips.append(toy_render(scene, size))
    sheets, pitch = [], size + 72
    for t in range(n):
        width = MARGIN + len(clips) * (size + MARGIN)
        sheet = Image.new("RGB", (width, 8 + 2 * pitch), "white")
        draw = ImageDraw.Draw(sheet)
        for k, (clip, names) in enumerate(zip(clips, TOY_CLASSES)):
            for row, frame in enumerate((clip[t], clip[n - 1 - t])):
                x, y = MARGIN + k * (size + MARGIN), 8 + row * pitch
                sheet.paste(Image.fromarray(frame), (x, y))
                name = "\n".join(wrap(names[row], size, MEDIUM, lines=3))
                draw.multiline_text((x, y + size + 4), name, INK, font(MEDIUM), spacing=3)
        sheets.append(sheet)
    save_animation(out, sheets, 120, 700, quality=45)

# ----- Drawing with matplotlib ----------------------------------------------

def new_figure(height, title):
    from matplotlib.figure import Figure                # optional: only plots need it
    figure = Figure(figsize=(7.7, height), layout="constrained", dpi=100)
    figure.suptitle(title, fontsize=POINTS + 2.5, x=0.01, ha="left", color=INK)
    return figure


def bare(axis):
    """An axis for a picture: no ticks, no frame."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def add_box(axis, row, column):
    """Mark one place of a map."""
    xs = np.array([-0.5, 0.5, 0.5, -0.5, -0.5]) + column
    ys = np.array([-0.5, -0.5, 0.5, 0.5, -0.5]) + row
    axis.plot(xs, ys, color="white", lw=3.4)
    axis.plot(xs, ys, color=ORANGE, lw=2)


def draw_ctm(out, case):
    """ctm.png: which frame attends to which, one T x T map per layer and head.

    Section 3.3, Fig. 3. Each row of a map is a frame that asks (query, from the ST-branch). Each
    column is a frame that it attends to (memory). A row sums to 1. A diagonal means that each frame
    attends to itself, an upright stripe that all frames attend to the same one. The maps are means
    over all places, or of --place. Large models show some of their layers and heads.
    Weights tell which frame is attended to, not what is taken from it, nor whether the answer needs
    it (Jain and Wallace, 2019).
    """
    config = case.model.config
    layers, heads = spread(config.depth, MOST), spread(config.heads, MOST)
    maps = []
    for i in layers:
        weights = ctm_attention(case.seen, i, config.heads)                     # (N, heads, T, T)
        if case.place:
            row, column = case.place
            weights = weights[row * case.model.grid[1] + column]
        else:
            weights = weights.mean(0)
        maps.append(weights.cpu().numpy())
    where = f"at place {case.place}" if case.place else "mean over all places"
    T, limit = maps[0].shape[-1], max(weights.max() for weights in maps)

    figure = new_figure(1.5 * len(layers) + 1.0, f"CTM: which frame attends to which, {where}")
    axes = figure.subplots(len(layers), len(heads), squeeze=False)
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            axis = axes[row, column]
            shown = axis.imshow(maps[row][head], cmap="Blues", vmin=0, vmax=limit)
            axis.set(xticks=[0, T - 1], yticks=[0, T - 1])
            axis.tick_params(length=2, labelbottom=row == len(layers) - 1, labelleft=column == 0)
            if row == 0:
                axis.set_title(f"head {head}")
        axes[row, 0].set_ylabel(f"layer {layer}")
    figure.supxlabel("token frame that it attends to", fontsize=POINTS)
    figure.supylabel("token frame that asks", fontsize=POINTS)
    figure.colorbar(shown, ax=axes, shrink=0.6, pad=0.02, label="attention weight")
    figure.savefig(out)


def draw_smem(out, case):
    """smem.png: for each SMEM, the motion in its features, one correlation, and what it adds.

    Section 3.5, Fig. 5. First row: arrows from motion_field(), if its features tell. Second row:
    SMEM's own correlation of the boxed place with all places of the next frame. The box is --place,
    or else the place whose pixels change most. Yellow is a large product, and each map has its own
    range. Places with large features are yellow in all of them, whatever moves. Third row: the
    length of the vector that SMEM adds, relative to the one that it is added to. It says where SMEM
    acts, not what it says there. The fusion "add" compares no two places, so there are no arrows.
    """
    names = smem_names(case.model)
    T = len(case.seen[names[0]][1][0])
    chosen = spread(T - 1, PLOT_COLUMNS)
    figure = new_figure(4.6 * len(names) + 0.3, "SMEM: where does each place go in the next frame?")
    axes = figure.subplots(3 * len(names), len(chosen), squeeze=False)
    for n, name in enumerate(names):
        rows = axes[3 * n:3 * n + 3]
        shown = draw_one_smem(rows, chosen, name, case)
        branch, layer = name.split(".")
        branch = "T" if branch == "smem_t" else "ST"
        rows[0, 0].set_ylabel(f"layer {layer}, {branch}\nmotion")
        rows[1, 0].set_ylabel("correlation\nof the box")
        rows[2, 0].set_ylabel("size of what\nis added")
        figure.colorbar(shown, ax=rows[2], pad=0.01, label="of the input")
    figure.savefig(out)


def draw_one_smem(rows, chosen, name, case):
    """The three rows of one SMEM. rows: axes (3, frames). Returns the last image of the third."""
    smem, (inputs, output) = case.model.get_submodule(name), case.seen[name]
    f, (H, W) = smem_features(case.seen, name, smem), smem.grid
    field, trust = motion_field(f, smem.grid)
    correlation = smem.correlation(f[None])[0].unflatten(-1, smem.grid).cpu().numpy()
    added = (output - inputs[0]).norm(dim=-1) / inputs[0].norm(dim=-1)
    added = added[0].cpu().numpy()                                              # (T, H, W)
    for (top, middle, bottom), t in zip(rows.T, chosen):
        image = to_image(case.token_frame(t), 240)
        if smem.fusion != "add":
            image = with_arrows(image, field[t], trust[t])
        pair = torch.stack([case.token_frame(t), case.token_frame(t + 1)], dim=1)
        row, column = case.place or most_moving(pair, smem.grid)
        top.imshow(image, extent=(-0.5, W - 0.5, H - 0.5, -0.5))
        middle.imshow(correlation[t, row * W + column], cmap="viridis")
        shown = bottom.imshow(added[t], cmap="viridis", vmin=0, vmax=added[chosen].max())
        add_box(top, row, column)
        add_box(middle, row, column)
        top.set_title(f"{case.token_index(t)} to {case.token_index(t + 1)}")
        for axis in (top, middle, bottom):
            bare(axis)
    rows[0, 0].set_title(f"frame {rows[0, 0].get_title()}")
    return shown


def draw_stdm(out, case):
    """stdm.png: how much the T-branch feeds back to each place of the ST-branch.

    Section 3.4, Fig. 4. The length of STDM's output at a place, relative to the length of x there:
    0.1 changes x by a tenth. All layers share one scale. Large models show some of their layers.
    It says where and how much is fed back, not whether the answer needs it.
    """
    present = case.model.config.stdm_layers
    layers = [present[k] for k in spread(len(present), MOST)]
    shares = {}
    for i in layers:
        fed_back, x = case.seen[f"stdm.{i}"][1], case.seen[f"ctm.{i}"][0][0]    # CTM's query is x
        shares[i] = (fed_back.norm(dim=-1) / x.norm(dim=-1))[0].cpu().numpy()   # (T, H, W)
    chosen = spread(len(shares[layers[0]]), PLOT_COLUMNS)
    limit = max(share[chosen].max() for share in shares.values())

    height = 1.27 * (len(layers) + 1) + 0.7
    figure = new_figure(height, "STDM: how much is fed back to which place?")
    axes = figure.subplots(len(layers) + 1, len(chosen), squeeze=False)
    for k, t in enumerate(chosen):
        axes[0, k].imshow(to_image(case.token_frame(t), 240))
        axes[0, k].set_title(f"frame {case.token_index(t)}")
        for row, i in enumerate(layers, start=1):
            shown = axes[row, k].imshow(shares[i][t], cmap="viridis", vmin=0, vmax=limit)
            axes[row, 0].set_ylabel(f"layer {i}")
    for axis in axes.flat:
        bare(axis)
    figure.colorbar(shown, ax=axes[1:], pad=0.01, label="length, relative to x")
    figure.savefig(out)


def draw_ptm(out, case):
    """ptm.png: lengths of what each layer of the ST-branch adds to x, mean over patch tokens.

    Section 3.2, Eq. 1: y1 + alpha y2 + beta y3, with the learned alpha and beta. A plain Block has
    no third term and is drawn to compare. The line is the length of x as it enters the layer. Long
    does not mean important: the terms may point the same way, or cancel.
    """
    lengths, alphas, betas = [], [], []                 # lengths: y1, y2, y3 and x of each layer
    for i, block in enumerate(case.model.blocks):
        x = case.seen[f"blocks.{i}"][0][0]
        y1 = case.seen[f"blocks.{i}.attn"][1].reshape(x.shape)[:, :, 1:]
        y2 = case.seen[f"blocks.{i}.mlp"][1][:, :, 1:]
        y3 = torch.zeros_like(y1)
        if isinstance(block, PTM):
            alpha, beta = torch.as_tensor(block.alpha).item(), torch.as_tensor(block.beta).item()
            y2, y3 = alpha * y2, beta * case.seen[f"blocks.{i}.conv"][1]
            alphas.append(f"{alpha:.2f}")
            betas.append(f"{beta:.2f}")
        terms = (y1, y2, y3, x[:, :, 1:])
        lengths.append([term.norm(dim=-1).mean().item() for term in terms])
    y1, y2, y3, x = np.array(lengths).T
    layers = np.arange(len(lengths))

    figure = new_figure(4.4, "PTM: sizes of the three terms of Eq. 1")
    axis = figure.subplots()
    axis.bar(layers - 0.25, y1, 0.23, color=BLUE, label="y1, attention")
    axis.bar(layers, y2, 0.23, color=ORANGE, label="α y2, FFN")
    axis.bar(layers + 0.25, y3, 0.23, color=GREEN, label="β y3, convolution")
    axis.plot(layers, x, color=INK, marker="o", ms=5, lw=1.2, ls=":", label="x, as it enters")
    axis.set_xticks(layers)
    weights = f"PTM's α: {' '.join(alphas)}\nPTM's β: {' '.join(betas)}"
    axis.set(xlabel=f"layer\n{weights}", ylabel="mean length over patches")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(out)

# ----- The command ----------------------------------------------------------

PICTURES = {"frames": draw_frames, "order": draw_order, "relevance": draw_relevance,
            "ctm": draw_ctm, "smem": draw_smem, "stdm": draw_stdm, "ptm": draw_ptm,
            "clip": draw_clip}
PLOTS = ("ctm", "smem", "stdm", "ptm")


def choose_pictures(names, config):
    """Those of these pictures that can be drawn. A line on the screen for the others."""
    plots = [] if find_spec("matplotlib") else [name for name in names if name in PLOTS]
    if plots:
        print(f"{', '.join(plots)}: left out, they need matplotlib (pip install matplotlib)")
    layers = dict(smem=config.smem_t_layers + config.smem_st_layers, stdm=config.stdm_layers,
                  ptm=config.ptm_layers)
    chosen = []
    for name in names:
        if name in layers and not layers[name]:
            print(f"{name}: left out, this model has no {name.upper()}")
        elif name not in plots:
            chosen.append(name)
    return chosen


def draw_picture(name, out, case):
    """Draw one of PICTURES into the folder `out`. Returns its path."""
    path = Path(out, "clip.webp" if name == "clip" else f"{name}.png")
    if name not in PLOTS:
        PICTURES[name](path, case)
        return path
    import matplotlib                                   # optional: only plots need it
    with matplotlib.rc_context({"font.size": POINTS, "axes.titlesize": POINTS}):
        PICTURES[name](path, case)
    return path


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", help="checkpoint of train.py: best.pt or last.pt")
    p.add_argument("--video", metavar="PATH", help="a video file or a folder of frames")
    p.add_argument("--clip", metavar="ID", help="a clip of the data set, instead of --video")
    p.add_argument("--dataset", choices=data.LAYOUTS, help="of --clip, if not that of training")
    p.add_argument("--data_root", help="folder of the data set, if it has moved")
    p.add_argument("--clip_root", help="folder around the clips, if not DATA_ROOT")
    p.add_argument("--out", default="pictures", metavar="DIR", help="folder for the pictures")
    p.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES), metavar="NAME",
                   help=f"some of {', '.join(PICTURES)}; relevance takes the most time")
    p.add_argument("--place", nargs=2, type=int, metavar=("ROW", "COLUMN"),
                   help="place of the patch grid that ctm and smem show, counted from 0")
    p.add_argument("--steps", type=int, default=16, help="of relevance; take more if its sum and "
                   "the difference of the logits, both in the picture, differ much")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    p.add_argument("--toy_classes", metavar="FILE", help="write an animation of the toy's classes, "
                   ".webp or .gif, and stop; needs no checkpoint")
    args = p.parse_args(argv)
    if args.toy_classes:
        return args
    if not args.ckpt or (args.video is None) == (args.clip is None):
        p.error("expected --ckpt, and either --video PATH or --clip ID")
    if args.steps < 1:
        p.error(f"--steps is {args.steps}, expected 1 or more")
    return args


def find_path(args, trained):
    """Path and title of the clip that the flags ask for. trained: the flags of training."""
    if args.video:
        path = Path(os.path.abspath(args.video))
        path = data.find_clip(path.parent, path.name)
        return path, path.name
    dataset = args.dataset or trained["dataset"]
    root, clip_root = args.data_root, args.clip_root
    if dataset == trained["dataset"]:
        clip_root = clip_root or (None if root else trained["clip_root"])
        root = root or trained["data_root"]
    path, name = find_in_dataset(args.clip, dataset, root or f"datasets/{dataset}", clip_root)
    return path, f"clip {args.clip}, \"{name}\"" if name else f"clip {args.clip}"


def main(argv=None):
    args = get_args(argv)
    if args.toy_classes:
        draw_toy_classes(args.toy_classes)
        print(f"{args.toy_classes}: the lower row is the upper one run backwards")
        return

    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.ckpt)
    config = ModelConfig(**checkpoint["model_config"])
    model = STDFormer(config)
    model.load_state_dict(checkpoint["model"])
    model.to(device).eval()
    (rows, columns), place = model.grid, args.place
    if place and not (0 <= place[0] < rows and 0 <= place[1] < columns):
        raise ValueError(f"--place is {place[0]} {place[1]}, expected a row from 0 to {rows - 1} "
                         f"and a column from 0 to {columns - 1}")

    path, title = find_path(args, checkpoint["args"])
    video, indices, seconds = read_frames(path, config.num_frames, config.image_size)
    case = Case(model, checkpoint["classes"], (checkpoint["mean"], checkpoint["std"]), device,
                title, video, indices, seconds, tuple(place) if place else None)
    logits, case.seen = look_inside(model, case.normalized())
    case.probability = logits.softmax(-1).cpu()
    row, column = most_moving(video, model.grid)
    print(f"{title}: {100 * case.probability.max():.1f} % {case.answer}; most movement at "
          f"--place {row} {column} of {rows} x {columns}")

    names = choose_pictures([name for name in PICTURES if name in args.only], config)
    smems = smem_names(model)
    if "clip" in names and smems and config.smem_fusion != "add":
        smem = model.get_submodule(smems[0])
        case.motion = motion_field(smem_features(case.seen, smems[0], smem), smem.grid)
    if "clip" in names or "relevance" in names:
        case.relevance = relevance(model, case.normalized(), args.steps)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name in names:
        print(draw_picture(name, args.out, case))


if __name__ == "__main__":
    run_program(main)
