"""See what the model sees: pictures of one clip and of what each module of a trained STD-Former does with it.

    python scripts/visualize.py --ckpt out/toy/best.pt --clip 6001 --out pictures       # a clip of the data set trained on
    python scripts/visualize.py --ckpt out/ssv2/best.pt --video clip.webm               # any video, or a folder of frames
    python scripts/visualize.py --ckpt out/toy/best.pt --clip 6001 --only ctm --place 2 3
    python scripts/visualize.py --toy_classes classes.webp                              # the toy's ten classes side by side

    frames.png      the frames that the model is given, their times, the five most likely classes
    order.png       the same clip reversed, shuffled and standing still: does the answer depend on time?
    relevance.png   which places of which frames speak for the answer
    ctm.png         which frame attends to which, per layer and head                                   (section 3.3)
    smem.png        where each place went in the next frame, and what SMEM makes of it                 (section 3.5)
    stdm.png        how much is fed back to which place, per layer                                     (section 3.4)
    ptm.png         sizes of the three terms of Eq. 1                                                  (section 3.2)
    clip.webp       animation: clip, motion and relevance

The pictures show one view, the centre crop. What the model does not have is left out, with a line that says so. Nothing
is added to the model: forward hooks read what flows through it. ctm, smem, stdm and ptm are plots and need matplotlib.
"""
import argparse
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from evaluate import build_trained, load_checkpoint, pick_device
from model import PTM, STDFormer

PICTURES = ("frames", "order", "relevance", "ctm", "smem", "stdm", "ptm", "clip")
PLOTS = ("ctm", "smem", "stdm", "ptm")
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"         # Okabe and Ito's, which colour-blind readers can tell apart
PALE_BLUE, INK = "#CFE3F1", "#222222"
COLUMNS = 8                                             # frames beside each other in a picture

# ----------------------------------------------------------------------------------------------------
# The clip and the model
# ----------------------------------------------------------------------------------------------------


def read_frames(path, num_frames, size):
    """One centre view of a clip, as evaluate.py --video takes it: uint8 (3, F, S, S), frame numbers (F,), their seconds or None.

    Seconds are the video file's own time stamps; a folder of frames has none. Raises ClipError as data.read_clip does.
    """
    indices = []

    def choose(n):
        indices[:] = data.eval_indices(n, num_frames)
        return np.array(indices)

    view = data.eval_views(data.read_clip(path, choose), num_frames, size)[0]
    seconds = None
    if Path(path).is_file():
        reader = data.import_decord().VideoReader(str(path), num_threads=1)
        seconds = reader.get_frame_timestamp(indices)[:, 0]                     # (F, start and end)
    return view, indices, seconds


def find_clip(clip, dataset, root):
    """Path and class text (None where unknown) of a clip id, looked for in validation, training and test split.

    Raises ValueError where no split has it, FileNotFoundError as data.VideoDataset does.
    """
    data.read_classes(dataset, root, quiet=True)        # says what is missing where the folder is none
    known = []
    for split in ("validation", "train", "test"):
        try:
            found = data.VideoDataset(dataset, root, split)
        except FileNotFoundError:
            continue
        ids = [i.decode() for i in found.ids]
        known += ids[:3]
        if clip in ids:
            label = int(found.labels[ids.index(clip)])
            return found.path(ids.index(clip)), found.classes[label] if label >= 0 else None
    raise ValueError(f"--clip {clip}: {root} has no clip of that id; it has {', '.join(known)} ... (--video takes a path)")


@torch.no_grad()
def look_inside(model, video):
    """Run a clip through the model and keep what flows through its modules. Returns (logits (classes,), seen).

    video: normalised, (1, 3, F, S, S). seen: {module name: (inputs, output)} for the modules and those of their parts that the
    pictures need. Hooks are taken off again, so the model stays as it was.
    """
    seen, hooks = {}, []
    for name, module in model.named_modules():
        parent, _, part = name.rpartition(".")
        whole = parent in ("blocks", "ctm", "stdm", "smem_t", "smem_st") and not isinstance(module, nn.Identity)
        if whole or parent.count(".") == 1 and part in ("attn", "mlp", "conv", "q", "kv", "conv_in"):
            hooks.append(module.register_forward_hook(lambda m, inputs, output, name=name: seen.__setitem__(name, (inputs, output))))
    try:
        return model(video)[0].float(), seen
    finally:
        for hook in hooks:
            hook.remove()


def present(model, name):
    """Layers in which the model has the module, of its list `name`."""
    return [i for i, module in enumerate(getattr(model, name)) if not isinstance(module, nn.Identity)]


def most_moving(video, grid):
    """The place (row, column) whose pixels change most from frame to frame. video: (3, F, S, S)."""
    change = video.float().diff(dim=1).abs().mean((0, 1))                       # (S, S)
    place = F.adaptive_avg_pool2d(change[None], grid)[0].flatten().argmax().item()
    return divmod(place, grid[1])


# ----------------------------------------------------------------------------------------------------
# What is computed from the inside
# ----------------------------------------------------------------------------------------------------


def ctm_attention(seen, layer, heads):
    """CTM's attention weights, from the queries and keys that its own projections gave: (N, heads, T, T), rows are queries, sum 1.

    Section 3.3, Fig. 3, and CTM.cross_attention, which does not keep them.
    """
    q, (k, _) = seen[f"ctm.{layer}.q"][1], seen[f"ctm.{layer}.kv"][1].chunk(2, dim=-1)             # (1, T, H, W, D)
    q, k = (z[0].flatten(1, 2).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for z in (q, k))      # (N, heads, T, D/heads)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


def smem_features(seen, name, smem):
    """What SMEM correlates, the output of its first convolution: (T, N, D/8) on SMEM's own grid."""
    f = seen[f"{name}.conv_in"][1]
    if f.shape[-2:] != smem.grid:
        f = F.interpolate(f, smem.grid, mode="bilinear")
    return f.flatten(2).transpose(1, 2)


def motion_field(f, grid):
    """Where each place goes from a frame to the next, read from SMEM's features: (T-1, H, W, 2) steps (down, right), and where to trust it.

    SMEM correlates each place of frame t with all places of frame t+1; softmax over such a row and the mean of the places, less the place
    itself, would be a displacement. On the toy that points to the right side in half of the cases, that is, nowhere: a standing background is
    alike in all frames, and places with large features draw all arrows to themselves. So the rows are cleaned as in block matching:
      - each place's mean over time is taken off first: only what changes is followed;
      - normalised cross-correlation: products, averaged over the 3 x 3 places around, over the lengths of both sides;
      - places more than a sixth of the picture away do not count, and a row that prefers none of them gives no motion.
    trust, bool (T-1, H, W): the place differs from its mean (by a third or more of the clip's largest difference), and its best match
    is above 0.5. So 91 % of the arrows on the toy's moving thing point to the right side (tiny model at 48 pixels), but 99 % of an untrained
    model's do: they show what there is in the features to be correlated, not what training made of it. Nothing trains them to follow
    things, they reach back and forth in time (stem, CTM), and their places are whole patches. A hint, not optical flow.
    f: (T, N, C) with N = H * W.
    """
    (H, W), reach = grid, max(1, grid[0] // 6)
    change = (f - f.mean(0)).unflatten(1, grid)                                 # (T, H, W, C)
    here, there = change[:-1], F.pad(change[1:], (0, 0) + (reach,) * 4)
    inside = F.pad(torch.ones(H, W, device=f.device), (reach,) * 4).bool()

    def block(z):
        return F.avg_pool2d(z, 3, 1, 1)

    steps = [(down, right) for down in range(-reach, reach + 1) for right in range(-reach, reach + 1)]
    likeness = []
    for down, right in steps:
        rows, columns = slice(reach + down, reach + down + H), slice(reach + right, reach + right + W)
        moved = there[:, rows, columns]
        match = block((here * moved).sum(-1)) / (block((here ** 2).sum(-1)) * block((moved ** 2).sum(-1))).sqrt().clamp(min=1e-9)
        likeness.append(match.masked_fill(~inside[rows, columns], -torch.inf))
    likeness = torch.stack(likeness, dim=-1)                                    # (T-1, H, W, steps), -1 ... 1
    possible = likeness > -torch.inf
    weight = (10 * likeness).softmax(-1) - possible / possible.sum(-1, keepdim=True)               # 10: a tenth of likeness decides
    size = change.norm(dim=-1)[:-1]
    return weight @ torch.tensor(steps, device=f.device, dtype=f.dtype), (size > size.max() / 3) & (likeness.amax(-1) > 0.5)


def relevance(model, video, steps=16):
    """How much each place of each token frame speaks for the answer: (T, H, W), and the logits of the clip and of its still version.

    Integrated gradients (Sundararajan et al., 2017) at the stem's output: on the way from a clip that stands still (all frames are their
    mean) to the clip, the gradient of the winning class's logit times the change, summed over the channels. So the map sums to
    logit(clip) - logit(still clip), up to `steps`, and a place that does not change has none. (Grad-CAM, Selvaraju et al., 2017, on the
    last y was tried first: there the frames have been mixed so much that it showed the toy's moving thing no better than chance.)
    It explains this model's number, not the world: a place can matter because the model compares it with another.
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
        return ((tokens - still) * total).sum(1)[0], logit(tokens).item(), logit(still).item()


@dataclass
class Case:
    """One clip and all that the pictures of it share."""
    model: STDFormer
    classes: list
    video: torch.Tensor         # uint8 (3, F, S, S), one view
    indices: list               # the frames' numbers in the clip (F,)
    seconds: object             # their times (F,), or None
    title: str
    ask: object                 # uint8 (3, F, S, S) -> class probabilities
    probability: torch.Tensor   # (classes,)
    seen: dict                  # look_inside's
    place: tuple                # (row, column), or None: the mean over places
    relevance: tuple = None     # relevance()'s
    motion: tuple = None        # motion_field()'s

    def token_frame(self, t):
        """The input frame in the middle of token frame t: uint8 (3, S, S)."""
        return self.video[:, t * self.model.config.stem_stride]

    def token_index(self, t):
        """Its number in the clip."""
        return self.indices[t * self.model.config.stem_stride]


# ----------------------------------------------------------------------------------------------------
# Drawing with Pillow
# ----------------------------------------------------------------------------------------------------


def font(size=13):
    """Pillow's own font, at a size in pixels."""
    return ImageFont.load_default(size)


def wrap(text, width, size, lines=2):
    """Break a text into at most `lines` lines of `width` pixels; what is too long ends in an ellipsis."""
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


def to_image(frame, size):
    """uint8 (3, S, S) -> a square Pillow image; small frames keep their visible pixels."""
    image = Image.fromarray(frame.permute(1, 2, 0).cpu().numpy())
    return image.resize((size, size), Image.Resampling.NEAREST if frame.shape[-1] <= size else Image.Resampling.LANCZOS)


def with_heat(image, heat, limit):
    """A frame in grey with a signed map (H, W) over it: orange where it is positive, blue where negative, full at +-limit."""
    h = (heat / limit).clamp(-1, 1).cpu().numpy()
    grey = image.convert("L").convert("RGB")
    for values, colour in (h, ORANGE), (-h, BLUE):
        mask = Image.fromarray((values.clip(0, 1) * 230).astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
        grey.paste(Image.new("RGB", image.size, colour), mask=mask)
    return grey


def with_arrows(image, field, trust):
    """A frame with a motion field over it: an arrow from each place that is trusted. field: (H, W, 2) steps, trust: (H, W)."""
    image = image.copy()
    draw, cell = ImageDraw.Draw(image), image.width / trust.shape[1]
    thick = max(1, image.width // 96)
    for r, c in trust.nonzero().tolist():
        down, right = (field[r, c] * cell).tolist()
        length = (down ** 2 + right ** 2) ** 0.5
        if length < cell / 5:
            continue
        x, y = (c + 0.5) * cell, (r + 0.5) * cell
        u, v, head = right / length, down / length, min(length * 0.6, cell * 0.4)
        for colour, width in ("black", 2 * thick + 2), ("#F0E442", 2 * thick - 1):                 # Okabe and Ito's yellow, on a black rim
            rim = (width - 2 * thick + 1) / 2
            draw.line((x, y, x + right - u * head, y + down - v * head), colour, width)
            draw.polygon([(x + right + u * rim * 1.5, y + down + v * rim * 1.5)] +
                         [(x + right - u * (head + rim) + s * v * (head / 2 + rim), y + down - v * (head + rim) - s * u * (head / 2 + rim))
                          for s in (1, -1)], colour)
    return image


def draw_top(draw, box, probability, classes, before=None, rows=5):
    """The most likely classes in a box (x, y, width): text over a bar, percent beside it; with `before`, its change in points."""
    x, y, width = box
    full = width - 90                                                           # length of a bar of 100 %
    top = probability.topk(min(rows, len(classes)))
    for k, (p, i) in enumerate(zip(*(t.tolist() for t in top))):
        row, left = y + 33 * k, x + 48
        draw.rectangle((left, row, left + max(1, p * full), row + 29), fill=PALE_BLUE)
        draw.text((left - 5, row + 15), f"{100 * p:.0f} %", INK, font(), anchor="rm")
        lines = wrap(classes[i], full - 10, 12)
        draw.multiline_text((left + 5, row + 14), "\n".join(lines), INK, font(12), anchor="lm", spacing=1)
        if before is not None and abs(p - before[i].item()) >= 0.005:
            change = 100 * (p - before[i].item())
            draw.text((x + width - 2, row + 15), f"{change:+.0f}", ORANGE if change < 0 else GREEN, font(12), anchor="rm")


def columns_of(T):
    """The token frames that a picture shows: all, or eight spread evenly."""
    return np.linspace(0, T - 1, min(T, COLUMNS)).round().astype(int).tolist()


def strip(video, size=96, captions=None):
    """Frames in rows of eight: (3, F, S, S) -> a Pillow image; captions stand below each."""
    n, text = video.shape[1], 18 if captions else 0
    sheet = Image.new("RGB", (min(n, COLUMNS) * (size + 3), -(-n // COLUMNS) * (size + text + 3)), "white")
    draw = ImageDraw.Draw(sheet)
    for t in range(n):
        x, y = t % COLUMNS * (size + 3), t // COLUMNS * (size + text + 3)
        sheet.paste(to_image(video[:, t], size), (x, y))
        if captions:
            draw.text((x + size / 2, y + size + text / 2), captions[t], INK, font(12), anchor="mm")
    return sheet


def titled(title, body, subtitle=""):
    """A picture under a title line and a smaller line of explanation, on white."""
    top = 52 if subtitle else 34
    sheet = Image.new("RGB", (body.width + 20, body.height + top + 10), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 17), title, INK, font(16), anchor="lm")
    draw.text((10, 39), subtitle, "#555555", font(12), anchor="lm")
    sheet.paste(body, (10, top))
    return sheet


def draw_frames(out, c):
    """frames.png: what the model is given and what it answers.

    Section 3.1, sparse sampling: one frame from each of F equal segments, so a long clip is seen in wide steps. The times are the
    frames' numbers in the clip (from 0) and, for video files, seconds. Percentages are of this one view; evaluate.py averages three.
    """
    captions = [f"{i}" if c.seconds is None else f"{i}: {s:.2f} s" for i, s in zip(c.indices, c.seconds if c.seconds is not None else c.indices)]
    frames = strip(c.video, captions=captions)
    body = Image.new("RGB", (frames.width + 350, max(frames.height, 165)), "white")
    body.paste(frames, (0, 0))
    draw_top(ImageDraw.Draw(body), (frames.width + 5, 0, 345), c.probability, c.classes)
    titled(f"What the model is given: {c.title}", body,
           f"{len(c.indices)} frames of {c.video.shape[-1]} x {c.video.shape[-1]}, with their numbers in the clip"
           + (" and times" if c.seconds is not None else "") + "; right: the most likely classes").save(out)


def draw_order(out, c):
    """order.png: the same frames reversed, shuffled and standing still, each with its answer.

    A model that reads time changes its answer: reversed, to the opposite class where there is one (left to right, right to left); shuffled
    or still, to something unsure. One that recognises things keeps it. No figure of the paper's; the test follows "arrow of time"
    (Wei et al., 2018). One clip proves little: train.py --control has the accuracy of the whole set. Still: the middle frame.
    """
    n = c.video.shape[1]
    orders = [("as it is", list(range(n))), ("reversed", list(range(n))[::-1]),
              ("shuffled", np.random.default_rng(0).permutation(n).tolist()), ("still, its middle frame", [n // 2] * n)]
    size = 64 if n > COLUMNS else 96
    rows = -(-n // COLUMNS) * (size + 3)
    block = max(rows, 165) + 30
    width = COLUMNS * (size + 3)
    body = Image.new("RGB", (width + 370, block * len(orders) - 10), "white")
    draw = ImageDraw.Draw(body)
    for k, (name, order) in enumerate(orders):
        y, video = k * block, c.video[:, order]
        probability = c.probability if k == 0 else c.ask(video)
        draw.text((0, y + 9), name, INK, font(14), anchor="lm")
        body.paste(strip(video, size), (0, y + 20))
        draw_top(draw, (width + 10, y + 20, 360), probability, c.classes, before=None if k == 0 else c.probability)
    titled(f"Does the answer depend on time? {c.title}", body,
           "the same clip with its frames in another order; at the far right, the change in points against the first row").save(out)


def draw_relevance(out, c):
    """relevance.png: which places of which frames speak for (orange) and against (blue) the answer.

    See `relevance` for what is computed. Bars: the same, summed over each frame. Each token sees `stem kernel` input frames
    (drawn: the one in their middle). Strong colours do not say that the model sees an object there,
    only that the number would be another one had this place stood still.
    """
    heat, own, still = c.relevance
    size, T = 96, len(heat)
    limit = heat.abs().flatten().quantile(0.99).clamp(min=1e-9)
    chosen = columns_of(T)
    body = Image.new("RGB", (len(chosen) * (size + 3) + 70, 2 * size + 94), "white")
    draw = ImageDraw.Draw(body)
    per_frame = heat.sum((1, 2)).cpu()
    scale, top, base = per_frame.abs().max().clamp(min=1e-9), 20, 2 * size + 74
    draw.line((0, base, len(chosen) * (size + 3), base), GREY)
    for k, t in enumerate(chosen):
        x, image = k * (size + 3), to_image(c.token_frame(t), size)
        draw.text((x + size / 2, 9), f"frame {c.token_index(t)}", INK, font(12), anchor="mm")
        body.paste(image, (x, top))
        body.paste(with_heat(image, heat[t], limit), (x, top + size + 3))
        bar = float(per_frame[t] / scale) * 42
        draw.rectangle((x + 25, min(base, base - bar), x + size - 25, max(base, base - bar)), fill=ORANGE if bar > 0 else BLUE)
        draw.text((x + size / 2, base + (10 if bar > 0 else -9)), f"{per_frame[t]:+.2g}", INK, font(12), anchor="mm")
    x, top = len(chosen) * (size + 3) + 8, top + size + 3
    for k in range(size):                               # the legend of the colours
        value = 1 - 2 * k / (size - 1)
        tone = np.array(ImageColor.getrgb(ORANGE if value > 0 else BLUE))
        draw.line((x, top + k, x + 12, top + k), tuple((128 + (tone - 128) * abs(value) * 0.9).astype(int)))
    for text, y in (f"{limit:+.2g}", top + 6), ("0", top + size // 2), (f"{-limit:+.2g}", top + size - 6):
        draw.text((x + 17, y), text, INK, font(12), anchor="lm")
    draw.text((x, base), "sum", INK, font(12), anchor="lm")
    titled(f"What speaks for \"{c.classes[int(c.probability.argmax())]}\" (orange) and against it (blue)", body,
           f"integrated gradients; its logit is {own:.2f}, that of the clip standing still {still:.2f}, difference {own - still:.2f}; "
           f"all places sum to {heat.sum():.2f}").save(out)


def draw_clip(out, c):
    """clip.webp: the clip as the model samples it, beside it SMEM's motion field (where there is one) and the relevance, in a loop.

    The two panels change with the token frames, once in `stem stride` input frames. See motion_field and relevance for what they show.
    """
    heat = c.relevance[0] if c.relevance else None
    size, panels = 224, 1 + (c.motion is not None) + (heat is not None)
    limit = heat.abs().flatten().quantile(0.99).clamp(min=1e-9) if heat is not None else 1
    frames, answer = [], f"{100 * c.probability.max():.0f} %  {c.classes[int(c.probability.argmax())]}"
    for f in range(c.video.shape[1]):
        sheet = Image.new("RGB", (panels * (size + 8) + 8, size + 62), "white")
        draw, t, image = ImageDraw.Draw(sheet), f // c.model.config.stem_stride, to_image(c.video[:, f], size)
        shown = [("clip", image)]
        if c.motion is not None:
            field, trust = c.motion
            shown.append(("motion (SMEM)", with_arrows(image, field[t], trust[t]) if t < len(field) else image))
        if heat is not None:
            shown.append(("speaks for it: orange", with_heat(image, heat[t], limit)))
        for k, (name, picture) in enumerate(shown):
            x = 8 + k * (size + 8)
            sheet.paste(picture, (x, 26))
            draw.text((x, 13), name, INK, font(13), anchor="lm")
        draw.text((8, size + 44), wrap(answer, sheet.width - 16, 14, lines=1)[0], INK, font(14), anchor="lm")
        frames.append(sheet)
    frames[0].save(out, save_all=True, append_images=frames[1:], duration=[200] * (len(frames) - 1) + [800], loop=0, quality=80, method=4)


def draw_toy_classes(out, size=140, n=20):
    """The toy's ten classes as one animation: above five motions, below the same clips run backwards, which are the other five classes.

    Each clip is drawn as data.py draws them, at a higher resolution. out: a .webp (small) or .gif.
    """
    if Path(out).suffix not in (".webp", ".gif"):
        raise ValueError(f"--toy_classes {out}: expected a name that ends in .webp or .gif")
    clips = [data.toy_render(data.toy_scene(np.random.default_rng([1, motion]), motion, n), size) for motion in range(len(data.TOY_CLASSES))]
    frames = []
    for t in range(n):
        sheet = Image.new("RGB", (len(clips) * (size + 10) + 10, 2 * (size + 44) + 6), "white")
        draw = ImageDraw.Draw(sheet)
        for k, (clip, texts) in enumerate(zip(clips, data.TOY_CLASSES)):
            for row, (frame, text) in enumerate(zip((clip[t], clip[n - 1 - t]), texts)):
                x, y = 10 + k * (size + 10), 8 + row * (size + 44)
                sheet.paste(Image.fromarray(frame), (x, y))
                draw.multiline_text((x, y + size + 4), "\n".join(wrap(text, size, 13)), INK, font(13), spacing=2)
        frames.append(sheet)
    frames[0].save(out, save_all=True, append_images=frames[1:], duration=[120] * (n - 1) + [700], loop=0, quality=45, method=4)


# ----------------------------------------------------------------------------------------------------
# Drawing with matplotlib
# ----------------------------------------------------------------------------------------------------


def new_figure(width, height, title):
    from matplotlib.figure import Figure                # optional: only plots need it
    figure = Figure(figsize=(width, height), layout="constrained", dpi=100)
    figure.suptitle(title, fontsize=11.5, x=0.01, ha="left", color=INK)
    return figure


def bare(axis):
    """An axis for a picture: no ticks, no frame."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def draw_ctm(out, c):
    """ctm.png: which frame looks at which, one T x T map per layer and head, and per layer the mean weight by time difference.

    Section 3.3, Fig. 3. Each row of a map is a frame that asks (query, from the ST-branch); each column one that it looks at (memory). A
    row sums to 1. A diagonal: each frame looks at itself; one beside it: at its neighbour before or after; stripes down: all look at the
    same frames. On the right, thin lines are heads, dashes the weight if it looked at all alike. Averaged over all places, or at --place.
    Weights tell where it looks, not what it takes from there, nor that the answer needs it (Jain and Wallace, 2019).
    """
    L, heads = c.model.config.depth, c.model.config.heads
    maps = []                                           # per layer (heads, T, T)
    for i in range(L):
        a = ctm_attention(c.seen, i, heads)
        maps.append((a.mean(0) if c.place is None else a[c.place[0] * c.model.grid[1] + c.place[1]]).cpu().numpy())
    T = maps[0].shape[-1]
    limit = max(m.max() for m in maps)
    where = "mean over all places" if c.place is None else f"at place ({c.place[0]}, {c.place[1]})"
    figure = new_figure(max(6, 1.25 * heads + 3.6), max(3, 1.3 * L + 0.9), f"CTM: which frame looks at which, {where}")
    axes = figure.subplots(L, heads + 1, squeeze=False, gridspec_kw=dict(width_ratios=[1] * heads + [1.7]))
    for i in range(L):
        for h in range(heads):
            axis = axes[i, h]
            shown = axis.imshow(maps[i][h], cmap="Blues", vmin=0, vmax=limit)
            axis.set(xticks=[0, T - 1], yticks=[0, T - 1])
            axis.tick_params(labelsize=8, length=2)
            axis.tick_params(labelbottom=i == L - 1, labelleft=h == 0)
            if i == 0:
                axis.set_title(f"head {h}", fontsize=9)
        axes[i, 0].set_ylabel(f"layer {i}\nquery frame" if i == 0 else f"layer {i}", fontsize=9)
        axis, apart = axes[i, heads], np.arange(1 - T, T)
        lines = np.array([[m.diagonal(d).mean() for d in apart] for m in maps[i]])       # diagonal d: memory - query = d
        axis.plot(apart, lines.T, color=BLUE, lw=0.7, alpha=0.5)
        axis.plot(apart, lines.mean(0), color=BLUE, lw=2)
        axis.axhline(1 / T, color=ORANGE, ls="--", lw=1)
        axis.axvline(0, color=GREY, lw=0.7, zorder=0)
        axis.set_ylim(0, lines.max() * 1.1)
        axis.tick_params(labelsize=8, length=2, labelbottom=i == L - 1)
        axis.yaxis.tick_right()
        if i == 0:
            axis.set_title("by time difference", fontsize=9)
    axes[L - 1, heads].set_xlabel("memory frame - query frame", fontsize=9)
    axes[L - 1, 0].set_xlabel("memory frame", fontsize=9)
    bar = figure.colorbar(shown, ax=axes, location="right", shrink=min(1, 2.4 / L), pad=0.02)
    bar.set_label("attention weight", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.savefig(out)


def draw_smem(out, c):
    """smem.png: for each SMEM, the motion that its features hold, the correlation row of one place, and what it adds.

    Section 3.5, Fig. 5. Arrows: see motion_field; none where the features do not tell. Second row: SMEM's own correlation, as it is, of
    the boxed place (--place, else the one whose pixels change most) with all places of the next frame; bright is
    alike, each map has its own range. Places with large features are bright in all of them, whatever moves.
    Third row: length of the vector that SMEM adds, relative to the one it is added to. It says where SMEM acts, not what it says there.
    With fusion "add" no two places are compared (sum of a plus sum of b), so there are no arrows.
    """
    names = [f"{branch}.{i}" for branch in ("smem_st", "smem_t") for i in present(c.model, branch)]
    T = len(c.seen[names[0]][1][0])
    chosen = columns_of(T - 1)
    figure = new_figure(max(4.8, 1.17 * len(chosen) + 1.2), 3.75 * len(names) + 0.45, "SMEM: where does each place go in the next frame? Arrows only where its features tell")
    axes = figure.subplots(3 * len(names), len(chosen), squeeze=False)
    for n, name in enumerate(names):
        smem, (inputs, output) = c.model.get_submodule(name), c.seen[name]
        f, (H, W) = smem_features(c.seen, name, smem), smem.grid
        field, trust = motion_field(f, smem.grid)
        rows = smem.correlation(f[None])[0].unflatten(-1, smem.grid).cpu().numpy()                            # (T-1, N, H, W)
        added = ((output - inputs[0]).norm(dim=-1) / inputs[0].norm(dim=-1))[0].cpu().numpy()               # (T, H, W)
        for k, t in enumerate(chosen):
            image = to_image(c.token_frame(t), 192)
            top, middle, bottom = axes[3 * n:3 * n + 3, k]
            top.imshow(image if smem.fusion == "add" else with_arrows(image, field[t], trust[t]), extent=(-0.5, W - 0.5, H - 0.5, -0.5))
            r, q = c.place or most_moving(torch.stack([c.token_frame(t), c.token_frame(t + 1)], dim=1), smem.grid)
            middle.imshow(rows[t, r * W + q], cmap="viridis")
            for axis, (colour, width) in product((top, middle), (("white", 2.6), (ORANGE, 1.4))):
                axis.plot([q - 0.5, q + 0.5, q + 0.5, q - 0.5, q - 0.5], [r - 0.5, r - 0.5, r + 0.5, r + 0.5, r - 0.5], color=colour, lw=width)
            shown = bottom.imshow(added[t], cmap="viridis", vmin=0, vmax=added.max())
            top.set_title(f"frame {c.token_index(t)} to {c.token_index(t + 1)}", fontsize=9)
            for axis in top, middle, bottom:
                bare(axis)
        branch, layer = name.split(".")
        label = f"layer {layer}, {'T' if branch == 'smem_t' else 'ST'}-branch"
        for axis, text in zip(axes[3 * n:3 * n + 3, 0], (f"{label}\nmotion", "correlation\nof the box", "size of what\nis added")):
            axis.set_ylabel(text, fontsize=9)
        bar = figure.colorbar(shown, ax=axes[3 * n + 2], shrink=0.9, pad=0.01)
        bar.set_label("of the input", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    figure.savefig(out)


def draw_stdm(out, c):
    """stdm.png: how much the T-branch feeds back to each place of the ST-branch, per layer.

    Section 3.4, Fig. 4. Length of STDM's output at a place over the length of x there: 0.1 changes x by a tenth. One scale for
    all layers. It says where and how much comes back, not whether the answer needs it.
    """
    layers = present(c.model, "stdm")
    share = {i: (c.seen[f"stdm.{i}"][1].norm(dim=-1) / c.seen[f"ctm.{i}"][0][0].norm(dim=-1))[0].cpu().numpy() for i in layers}    # CTM's query is x
    chosen, limit = columns_of(len(share[layers[0]])), max(s.max() for s in share.values())
    figure = new_figure(max(4.8, 1.17 * len(chosen) + 1.2), 1.2 * (len(layers) + 1) + 0.6, "STDM: how much is fed back to which place")
    axes = figure.subplots(len(layers) + 1, len(chosen), squeeze=False)
    for k, t in enumerate(chosen):
        axes[0, k].imshow(to_image(c.token_frame(t), 192))
        axes[0, k].set_title(f"frame {c.token_index(t)}", fontsize=9)
        for row, i in enumerate(layers, 1):
            shown = axes[row, k].imshow(share[i][t], cmap="viridis", vmin=0, vmax=limit)
            axes[row, 0].set_ylabel(f"layer {i}", fontsize=9)
    for axis in axes.flat:
        bare(axis)
    bar = figure.colorbar(shown, ax=axes[1:], shrink=min(1, 2.4 / len(layers)), pad=0.01)
    bar.set_label("length of what is added,\nrelative to x", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.savefig(out)


def draw_ptm(out, c):
    """ptm.png: lengths of what each layer of the ST-branch adds to x, mean over patch tokens: attention, FFN and, in PTM, convolution.

    Section 3.2, Eq. 1: y = y1 + alpha y2 + beta y3, with the learned alpha and beta. Plain blocks have no third term and stand there to
    compare. The line is the length of x as it comes into the layer. Long does not mean important: the terms may point the same way or cancel.
    """
    names, sizes, length = [], {"attention": [], "FFN": [], "convolution": []}, []
    for i, block in enumerate(c.model.blocks):
        x = c.seen[f"blocks.{i}"][0][0]
        y1, y2 = (c.seen[f"blocks.{i}.{part}"][1].reshape(x.shape)[:, :, 1:] for part in ("attn", "mlp"))
        if isinstance(block, PTM):
            alpha, beta = (torch.as_tensor(weight).item() for weight in (block.alpha, block.beta))
            terms = (y1, alpha * y2, beta * c.seen[f"blocks.{i}.conv"][1])
            names.append(f"layer {i}\nPTM\nalpha {alpha:.2f}" + (f"\nbeta {beta:.2f}" if block.conv_at == "residual" else ""))
        else:
            terms = (y1, y2)
            names.append(f"layer {i}\nblock")
        for values, z in zip(sizes.values(), (*terms, None)):
            values.append(z.norm(dim=-1).mean().item() if z is not None else 0)
        length.append(x[:, :, 1:].norm(dim=-1).mean().item())
    labels = dict(zip(sizes, ("attention, y1", "FFN, alpha y2", "convolution, beta y3")))
    figure = new_figure(max(6, 0.95 * len(names) + 1.5), 3.9, "PTM: sizes of the three terms of Eq. 1")
    axis = figure.subplots()
    for k, (name, colour) in enumerate(zip(sizes, (BLUE, ORANGE, GREEN))):
        axis.bar(np.arange(len(names)) + 0.25 * (k - 1), sizes[name], 0.23, color=colour, label=labels[name])
    axis.plot(range(len(names)), length, color=INK, marker="o", ms=4, lw=1, ls=":", label="x, as it comes in")
    axis.set_xticks(range(len(names)), names, fontsize=9)
    axis.set_ylabel("mean length over patch tokens", fontsize=9)
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.savefig(out)


# ----------------------------------------------------------------------------------------------------
# All together
# ----------------------------------------------------------------------------------------------------


def missing(name, model):
    """Why a picture cannot be drawn of this model, or None."""
    if name == "smem" and not present(model, "smem_t") + present(model, "smem_st"):
        return "this model has no SMEM"
    if name == "stdm" and not present(model, "stdm"):
        return "this model has no STDM"
    if name == "ptm" and not model.config.ptm_layers:
        return "this model has no PTM"
    if name in ("ctm", "relevance") and model.config.num_frames == model.config.stem_stride:
        return "the model has a single token frame, so nothing happens over time"
    return None


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", help="checkpoint of train.py, best.pt or last.pt")
    p.add_argument("--video", metavar="PATH", help="a video file or a folder of frames")
    p.add_argument("--clip", metavar="ID", help="a clip of the data set, instead of --video; its class is then shown too")
    p.add_argument("--dataset", choices=data.DATASETS, help="layout of the data set for --clip (default: the one trained on)")
    p.add_argument("--data_root", help="its folder, where it is not the one trained from")
    p.add_argument("--out", default="pictures", metavar="DIR", help="folder for the pictures; files of the same names are overwritten (default: %(default)s)")
    p.add_argument("--only", nargs="+", choices=PICTURES, default=PICTURES, metavar="NAME", help=f"draw these only: {', '.join(PICTURES)}; relevance takes the most time")
    p.add_argument("--place", nargs=2, type=int, metavar=("ROW", "COLUMN"), help="a place of the patch grid, from 0: CTM's attention and SMEM's row there "
                   "(default: CTM's mean over all places, SMEM's row of the place that changes most in each step)")
    p.add_argument("--steps", type=int, default=16, help="steps of the relevance's integral; more when its sum and the difference of the logits, "
                   "both on the picture, are far apart (default: %(default)s)")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto takes the first that is there")
    p.add_argument("--toy_classes", metavar="FILE", help="write one animation of the toy's ten classes, .webp or .gif, and stop; needs no checkpoint")
    args = p.parse_args(argv)
    if args.toy_classes:
        draw_toy_classes(args.toy_classes)
        print(f"{args.toy_classes}: the toy's ten classes; the lower row is the upper one run backwards")
        return
    if not args.ckpt or (args.video is None) == (args.clip is None):
        p.error("expected --ckpt, and either --video PATH or --clip ID (or --toy_classes FILE alone)")
    if args.steps < 1:
        p.error(f"--steps: got {args.steps}, expected at least 1")

    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.ckpt)
    model = build_trained(checkpoint, args.ckpt)
    model.to(device).eval()
    c, classes, trained = model.config, checkpoint["classes"], checkpoint["args"]
    if args.place and not all(0 <= i < n for i, n in zip(args.place, model.grid)):
        p.error(f"--place: got {args.place[0]} {args.place[1]}, expected a row from 0 to {model.grid[0] - 1} and a column from 0 to {model.grid[1] - 1}")

    path, label = args.video, None
    if args.clip:
        name = args.dataset or trained["dataset"]
        root = args.data_root or (trained["data_root"] if name == trained["dataset"] else f"datasets/{name}")
        path, label = find_clip(args.clip, name, root)
    video, indices, seconds = read_frames(path, c.num_frames, c.image_size)

    def normalized(video):
        return data.normalize(video[None].to(device), checkpoint["mean"], checkpoint["std"])

    @torch.no_grad()
    def ask(video):
        return model(normalized(video))[0].float().softmax(-1).cpu()

    logits, seen = look_inside(model, normalized(video))
    moving = most_moving(video, model.grid)
    case = Case(model, classes, video, indices, seconds, f"clip {args.clip}" + (f", \"{label}\"" if label else "") if args.clip else Path(path).name,
                ask, logits.softmax(-1).cpu(), seen, tuple(args.place) if args.place else None)
    winner = int(case.probability.argmax())
    print(f"{case.title}: {100 * case.probability[winner]:.1f} % {classes[winner]}; most movement at --place {moving[0]} {moving[1]} of {model.grid[0]} x {model.grid[1]}")

    wanted = [name for name in PICTURES if name in args.only]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        plots = [name for name in wanted if name in PLOTS]
        if plots:
            print(f"{', '.join(plots)}: left out, they are drawn with matplotlib (pip install matplotlib)")
        wanted = [name for name in wanted if name not in PLOTS]
    for name in list(wanted):
        reason = missing(name, model)
        if reason:
            print(f"{name}: left out, {reason}")
            wanted.remove(name)
    smem = [f"{branch}.{i}" for branch in ("smem_t", "smem_st") for i in present(model, branch)]
    if "clip" in wanted and smem and c.smem_fusion != "add":
        module = model.get_submodule(smem[0])
        case.motion = motion_field(smem_features(seen, smem[0], module), module.grid)
    if {"clip", "relevance"} & set(wanted) and not missing("relevance", model):
        case.relevance = relevance(model, normalized(video), args.steps)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    draw = dict(frames=draw_frames, order=draw_order, relevance=draw_relevance, ctm=draw_ctm, smem=draw_smem, stdm=draw_stdm, ptm=draw_ptm, clip=draw_clip)
    for name in wanted:
        file = out / (name + (".webp" if name == "clip" else ".png"))
        draw[name](file, case)
        print(file)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, data.ClipError) as e:
        sys.exit(f"visualize.py: {data.reason(e)}")
