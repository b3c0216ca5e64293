"""Pictures of what a trained STD-Former sees in one clip, and of what its modules make of it.

    python scripts/visualize.py --ckpt docs/toy48.pt --toy 0            # a clip of the toy
    python scripts/visualize.py --ckpt out/ssv2/best.pt --video clip.webm
    python scripts/visualize.py --toy_classes classes.webp              # the toy's ten classes

    order.png       does the answer depend on time? The same frames reversed, shuffled, repeated
    relevance.png   which patches of which frames speak for the answer
    ctm.png         which frames one position looks at (section 3.3)
    stdm.png        which patches the feedback changes most (section 3.4)
    smem.png        which patches have the largest products (section 3.5)

The pictures show one view, the centre crop. An untrained model can show the same effect as a
trained one, so the last three pictures show both. docs/pictures.md says how to read them.
The model stays as it is: forward hooks keep what flows through it.
"""
import argparse
import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from evaluate import positive, predict, run_command, setup
from model import ModelConfig, STDFormer, load_checkpoint, load_weights
from scripts.toy_data import TOY_CLASSES, TOY_SIZE, TOY_VERSION, toy_clip, toy_render, toy_scene

ORANGE, GREY = "#D55E00", "#999999"
COLUMNS = 8                                             # frames in a row
WIDTH = 8.3                                             # inches: 830 pixels, as GitHub shows

# ----- What flows through the model -----------------------------------------

@torch.no_grad()
def look_inside(model, video):
    """Run a clip through the model and keep what flows through its modules.

    video: normalised, (1, 3, F, S, S). Returns the logits (classes,), and {module name: (inputs,
    output)} for the modules and their parts that the pictures and the lesson use.
    """
    seen, hooks = {}, []

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = inputs, output
        return hook

    for name, module in model.named_modules():
        parent, _, part = name.rpartition(".")
        whole = parent in ("blocks", "ctm", "stdm", "smem_t", "smem_st")
        inner = parent.startswith(("ctm.", "smem")) and part in ("q", "kv", "conv_in")
        if (whole or inner) and not isinstance(module, nn.Identity):
            hooks.append(module.register_forward_hook(keep(name)))
    try:
        return model(video)[0].float(), seen
    finally:
        for hook in hooks:
            hook.remove()

def ctm_attention(seen, layer, heads):
    """The attention weights of a CTM: (N, heads, T, T). Rows are queries and sum to 1.

    Section 3.3, Fig. 3. CTM.cross_attention does not keep its weights, so we compute them again
    from its queries and keys. seen: from look_inside
    """
    _, q = seen[f"ctm.{layer}.q"]                                               # (1, T, H, W, D)
    _, kv = seen[f"ctm.{layer}.kv"]
    k, _ = kv.chunk(2, dim=-1)
    q = q[0].flatten(1, 2).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
    k = k[0].flatten(1, 2).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)          # (N, heads, T, T)

def smem_features(seen, name, smem):
    """What SMEM compares, the output of its first convolution: (T, N, D/8), on SMEM's grid.

    name: of the module, such as "smem_t.1"
    """
    _, f = seen[f"{name}.conv_in"]                                              # (T, D/8, H, W)
    if f.shape[-2:] != smem.grid:
        f = F.interpolate(f, smem.grid, mode="bilinear")
    return f.flatten(2).transpose(1, 2)

def relevance(model, video, steps=16):
    """How much each patch of each token frame speaks for the answer.

    Integrated gradients (Sundararajan et al., 2017) at the stem's convolution. The path begins at a
    static clip, whose frames all are the clip's mean frame, and ends at the clip. We add up the
    gradient of the winner's logit times the change. So a patch that does not change has no
    relevance, and the map sums to the difference of the two logits, more exactly with more steps.

    video: normalised, (1, 3, F, S, S)
    Returns the map (T, H, W), and the logits of the clip and of the static clip.
    """
    with torch.no_grad():
        tokens = model.conv1(video)                                             # (1, D, T, H, W)
        static = model.conv1(video.mean(2, keepdim=True).expand_as(video))
        winner = model(video)[0].argmax()

    def logit(tokens):
        hook = model.conv1.register_forward_hook(lambda module, inputs, output: tokens)
        try:
            return model(video)[0, winner]
        finally:
            hook.remove()

    total = torch.zeros_like(tokens)
    for k in range(steps):
        between = torch.lerp(static, tokens, (k + 0.5) / steps).requires_grad_()
        with torch.enable_grad():
            gradient, = torch.autograd.grad(logit(between), between)
        total += gradient / steps
    with torch.no_grad():
        heat = ((tokens - static) * total).sum(1)[0]
        return heat, logit(tokens).item(), logit(static).item()

def most_moving(video, grid):
    """The patch (row, column) whose pixels change most from frame to frame. video: (3, F, S, S)"""
    change = video.float().diff(dim=1).abs().mean((0, 1))                       # (S, S)
    patch = F.adaptive_avg_pool2d(change[None], grid)[0].argmax().item()
    return divmod(patch, grid[1])

# ----- The clip -------------------------------------------------------------

def toy_object(scene, size=TOY_SIZE):
    """Where the object of a toy scene is: bool (n, size, size). It is painted alone, in white."""
    white = np.ones_like(scene["colors"])
    black = np.zeros_like(scene["texture"])
    alone = dict(scene, colors=white, texture=black, blobs=[], distractors=[])
    return toy_render(alone, size)[..., 0] > 32         # its darkest white is 64

def toy_view(number, num_frames=16, size=48):
    """A validation clip of the toy as evaluate.py reads it, but without the loss of JPEG.

    Returns the video, uint8 (3, F, S, S), how much of each pixel its object covers, float
    (F, S, S), and its class.
    """
    frames, name = toy_clip(0, "validation", number)
    motion, backward = divmod(number % (2 * len(TOY_CLASSES)), 2)
    rng = np.random.default_rng([TOY_VERSION, 0, 1, number])            # as toy_clip draws it
    masks = toy_object(toy_scene(rng, motion, int(rng.integers(18, 31))))
    if backward:
        masks = masks[::-1]
    indices = data.sample_indices(len(frames), num_frames)
    frames = torch.from_numpy(frames[indices]).permute(0, 3, 1, 2)              # (F, 3, 64, 64)
    masks = torch.from_numpy(masks[indices]).float()[:, None]                   # (F, 1, 64, 64)
    video = data.eval_views(frames, num_frames, size)[0]
    masks = data.eval_views(masks, num_frames, size)[0, 0]
    return video, masks, name

@dataclass
class Case:
    """One clip and one model: what the pictures share."""
    models: dict                # "trained", and "untrained" with random weights: STDFormers
    checkpoint: dict
    device: torch.device
    video: torch.Tensor         # uint8 (3, F, S, S)
    masks: torch.Tensor         # where the object is, (F, S, S), or None if nobody knows
    title: str
    position: tuple             # (row, column) of the patch grid
    steps: int                  # of relevance

    def __post_init__(self):
        statistics = self.checkpoint["mean"], self.checkpoint["std"]
        self.input = data.normalize(self.video[None].to(self.device), *statistics)
        self.inside = {}
        for name, model in self.models.items():
            _, self.inside[name] = look_inside(model, self.input)
        self.config = self.models["trained"].config
        # The frame in the middle of each token frame, to draw beside what happens there.
        self.token_frames = self.video[:, ::self.config.stem_stride]            # (3, T, S, S)
        self.token_masks = None
        if self.masks is not None:
            self.token_masks = self.masks[::self.config.stem_stride]            # (T, S, S)

    def ask(self, video):
        """The most likely class of a clip, and its probability. video: uint8 (3, F, S, S)"""
        p = predict(self.models["trained"], video[None], self.device, "fp32",
                    self.checkpoint["mean"], self.checkpoint["std"])[0]
        name = textwrap.shorten(self.checkpoint["classes"][p.argmax()], 70, placeholder=" ...")
        return name, p.max().item()

# ----- Drawing --------------------------------------------------------------

def new_figure(height, title):
    from matplotlib.figure import Figure                # optional: only pictures need it
    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=100)
    figure.suptitle(title, x=0.01, ha="left")
    return figure

def spread(n):
    """The numbers below n, or every second, third, ... so that there are at most COLUMNS."""
    return list(range(0, n, math.ceil(n / COLUMNS)))

def bare(axis):
    """An axis without ticks and frame."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)

def frames_in_row(axes, video, numbers, masks=None, title="{}"):
    """Draw the frames with these numbers on a row of axes, and outline the object.

    video: uint8 (3, F, S, S)    masks: (F, S, S) or None    title: format of a number
    """
    for axis, i in zip(axes, numbers):
        axis.imshow(video[:, i].permute(1, 2, 0).numpy(), interpolation="nearest")
        if masks is not None:                           # smoothed, or single pixels get outlines
            mask = F.avg_pool2d(masks[i][None], 3, 1, 1, count_include_pad=False)[0]
            axis.contour(mask.numpy(), [0.5], colors="white", linewidths=1.5)
        axis.set_title(title.format(i))
        bare(axis)

def maps_in_row(axes, maps, numbers, label, **style):
    """Draw the maps (T, H, W) of these token frames on a row of axes. Returns the last image."""
    for axis, t in zip(axes, numbers):
        image = axis.imshow(maps[t], **style)
        bare(axis)
    axes[0].set_ylabel(label)
    return image

def time_arrow(axes, y=-0.12):
    """An arrow below a row of axes, from the first to the last."""
    arrow = axes[-1].annotate("time", xy=(1, y), xycoords=axes[-1].transAxes, xytext=(0, y),
                              textcoords=axes[0].transAxes, va="center", annotation_clip=False,
                              color=GREY, arrowprops=dict(arrowstyle="->", color=GREY))
    arrow.set_in_layout(False)                          # it belongs to two axes

def add_box(axis, position, patch):
    """Outline a patch of a frame. patch: its size in pixels"""
    row, column = position
    xs = patch * (column + np.array([0, 1, 1, 0, 0])) - 0.5
    ys = patch * (row + np.array([0, 0, 1, 1, 0])) - 0.5
    axis.plot(xs, ys, color="white", lw=4)
    axis.plot(xs, ys, color=ORANGE, lw=2)

# ----- The pictures ---------------------------------------------------------

def draw_order(case):
    """The same frames in four orders, each with its answer.

    A model that reads time changes its answer. Reversed frames should show the opposite class, if
    there is one. Shuffled frames and a repeated one should make it unsure.
    """
    n = case.video.shape[1]
    drawn = spread(n)
    orders = {
        "as it is": list(range(n)),
        "reversed": list(range(n))[::-1],
        "shuffled": np.random.default_rng(0).permutation(n).tolist(),
        "one frame": [drawn[len(drawn) // 2]] * n,
    }
    figure = new_figure(7.2, f"Does the answer depend on time? {case.title}")
    for part, (name, order) in zip(figure.subfigures(len(orders), 1), orders.items()):
        answer, probability = case.ask(case.video[:, order])
        part.suptitle(f"{name}: {answer}, {100 * probability:.0f} %", x=0.01, ha="left")
        axes = part.subplots(1, len(drawn), squeeze=False)[0]
        shown = [frame for frame in order if frame in drawn]            # the same in each order
        frames_in_row(axes, case.video, shown, case.masks, "frame {}")
        time_arrow(axes)
    return figure

def draw_relevance(case):
    """Which patches of which frames speak for the answer, and which against it. See relevance().

    A strong colour does not mean that the model sees an object there. It means that the logit would
    differ if this patch stood still.
    """
    heat, own, static = relevance(case.models["trained"], case.input, case.steps)
    print(f"relevance: all patches sum to {heat.sum():.2f}; the logit is {own:.2f}, that of the "
          f"static clip {static:.2f}, the difference {own - static:.2f}")
    heat = heat.cpu()
    limit = heat.abs().flatten().quantile(0.99).item() + 1e-9
    chosen = spread(len(heat))
    edge = case.video.shape[-1] - 0.5
    answer, _ = case.ask(case.video)
    figure = new_figure(2.6, f'What speaks for "{answer}"?')
    axes = figure.subplots(2, len(chosen), squeeze=False)
    frames_in_row(axes[0], case.token_frames, chosen, case.token_masks)
    grey = case.token_frames.float().mean(0).numpy()                            # (T, S, S)
    maps_in_row(axes[1], grey, chosen, "relevance", cmap="gray", vmin=0, vmax=255)
    for axis, t in zip(axes[1], chosen):
        image = axis.imshow(heat[t].numpy(), cmap="coolwarm", vmin=-limit, vmax=limit,
                            alpha=(heat[t].abs() / limit).clamp(max=1).numpy(),
                            extent=(-0.5, edge, edge, -0.5))
        axis.set_xlabel(f"sum {heat[t].sum():.1f}")
    axes[0, 0].set_ylabel("token\nframe")
    figure.colorbar(image, ax=axes, extend="both", label="against (-) or for (+)")
    return figure

def draw_ctm(case):
    """How much attention each frame gets at one position: mean over layers, heads and queries.

    Section 3.3, Fig. 3. Weights tell which frame is looked at, not what is taken from it, nor
    whether the answer needs it (Jain and Wallace, 2019).
    """
    row, column = case.position
    index = row * case.models["trained"].grid[1] + column
    frames = case.token_frames.shape[1]
    chosen = spread(frames)
    figure = new_figure(4.2, "CTM: which frames does the boxed position look at? "
                        f"(row {row}, column {column})")
    axes = figure.subplot_mosaic([chosen, ["bars"] * len(chosen)], height_ratios=(1, 1.8))
    top = [axes[t] for t in chosen]
    frames_in_row(top, case.token_frames, chosen, case.token_masks, "")
    for axis in top:
        add_box(axis, case.position, case.config.patch_size)
    bars = axes["bars"]
    for name, color, shift in (("trained", ORANGE, -0.18), ("untrained", GREY, 0.18)):
        received = torch.zeros(frames)
        for i in range(case.config.depth):
            weights = ctm_attention(case.inside[name], i, case.config.heads)    # (N, heads, T, T)
            received += weights[index].mean((0, 1)).cpu() / case.config.depth
        bars.bar(np.arange(len(chosen)) + shift, 100 * received[chosen].numpy(), 0.34, color=color,
                 label=name)
    bars.axhline(100 / frames, color="black", ls="--", lw=1, label="equal shares")
    bars.set(xticks=range(len(chosen)), xticklabels=chosen, xlim=(-0.5, len(chosen) - 0.5),
             xlabel="token frame that is looked at", ylabel="attention, %")
    bars.spines[["top", "right"]].set_visible(False)
    bars.legend(frameon=False, ncols=3)
    return figure

def draw_stdm(case):
    """How much STDM changes each patch of x, relative to the mean over the clip.

    Section 3.4, Fig. 4. It says where and how much is fed back, not whether the answer needs it.
    """
    layers = case.config.stdm_layers
    layers = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    maps = {}
    for name, i in [("trained", i) for i in layers] + [("untrained", layers[0])]:
        _, added = case.inside[name][f"stdm.{i}"]                               # (1, T, H, W, D)
        (x, _), _ = case.inside[name][f"ctm.{i}"]       # CTM's query is the x that it is added to
        change = (added.norm(dim=-1) / x.norm(dim=-1))[0]                       # (T, H, W)
        maps[f"{name}\nlayer {i}"] = (change / change.mean()).cpu().numpy()
    limit = max(change.max() for change in maps.values())
    chosen = spread(case.token_frames.shape[1])

    figure = new_figure(1.02 * len(maps) + 1.4, "STDM: which patches of x does it change most?")
    axes = figure.subplots(len(maps) + 1, len(chosen), squeeze=False)
    frames_in_row(axes[0], case.token_frames, chosen, case.token_masks)
    axes[0, 0].set_ylabel("token\nframe")
    for row, (label, change) in zip(axes[1:], maps.items()):
        image = maps_in_row(row, change, chosen, label, cmap="viridis", vmin=0, vmax=limit)
    figure.colorbar(image, ax=axes[1:], label="change / mean of the row", aspect=30)
    return figure

def draw_smem(case):
    """For each patch of a frame: for how many patches of the frame before is its product largest?

    Section 3.5, Fig. 5. If products told where a patch went, each patch would have its own winner.
    But a product is also large if a vector is long, and then one patch wins for many.
    """
    names = [f"smem_t.{i}" for i in case.config.smem_t_layers]
    names += [f"smem_st.{i}" for i in case.config.smem_st_layers]
    maps = {}
    for name, model in case.models.items():
        smem = model.get_submodule(names[0])
        f = smem_features(case.inside[name], names[0], smem)                    # (T, N, D/8)
        winners = smem.correlation(f[None])[0].argmax(-1)                       # (T-1, N)
        counts = F.one_hot(winners, f.shape[1]).sum(1)                          # (T-1, N)
        maps[name] = counts.unflatten(1, smem.grid).cpu().numpy()
    patches = f.shape[1]
    chosen = spread(len(counts))
    figure = new_figure(3.7, f"SMEM: how many of the {patches} patches of the frame before match "
                        "best here?")
    axes = figure.subplots(3, len(chosen), squeeze=False)
    next_frames = [t + 1 for t in chosen]
    frames_in_row(axes[0], case.token_frames, next_frames, case.token_masks)
    axes[0, 0].set_ylabel("next token\nframe")
    for row, (name, counts) in zip(axes[1:], maps.items()):
        image = maps_in_row(row, counts, chosen, name, cmap="viridis", vmin=0, vmax=patches)
    figure.colorbar(image, ax=axes[1:], label="patches")
    return figure

PICTURES = {"order": draw_order, "relevance": draw_relevance, "ctm": draw_ctm, "stdm": draw_stdm,
            "smem": draw_smem}

def draw_toy_classes(path, n=20):
    """The toy's ten classes as an animation, sharper than the model sees them.

    The upper row has five motions. The lower row has the same clips reversed, which are the other
    five classes. path: FILE.webp
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image
    clips, masks = [], []
    for motion, seed in enumerate((6, 1, 4, 4, 2)):     # whose objects are easy to see
        scene = toy_scene(np.random.default_rng([seed, motion]), motion, n)
        clips.append(torch.from_numpy(toy_render(scene, 128)).permute(3, 0, 1, 2))
        masks.append(torch.from_numpy(toy_object(scene, 128)).float())
    sheets = []
    for t in range(n):
        figure = new_figure(5, "")
        axes = figure.subplots(2, len(TOY_CLASSES))
        for row, shown, start, end in ((0, t, 0, 1), (1, n - 1 - t, 1, 0)):
            for axis, clip, mask, names in zip(axes[row], clips, masks, TOY_CLASSES):
                frames_in_row([axis], clip, [shown], mask, "")
                axis.set_xlabel("\n".join(textwrap.wrap(names[row], 18)), labelpad=18)
                axis.annotate("", xy=(end, -0.08), xytext=(start, -0.08),
                              xycoords="axes fraction", arrowprops=dict(arrowstyle="->"))
                axis.plot(shown / (n - 1), -0.08, "o", color=ORANGE, clip_on=False,
                          transform=axis.transAxes)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        sheets.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    sheets[0].save(path, save_all=True, append_images=sheets[1:], loop=0, quality=45, method=4,
                   duration=[120] * (n - 1) + [700])

# ----- The command ----------------------------------------------------------

def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--ckpt", help="checkpoint of train.py: best.pt or last.pt")
    add("--video", metavar="PATH", help="a video, or a folder of frames")
    add("--toy", type=int, metavar="NUMBER", help="instead of --video: a validation clip of the "
        "toy, counted from 0, with its object outlined")
    add("--out", default="pictures", metavar="DIR", help="folder for the pictures")
    add("--only", nargs="+", choices=PICTURES, default=list(PICTURES), metavar="NAME",
        help=f"some of {', '.join(PICTURES)}; relevance takes the most time")
    add("--position", nargs=2, type=int, metavar=("ROW", "COLUMN"), help="patch that ctm shows, "
        "counted from 0 (default: the one that changes most)")
    add("--steps", type=positive, default=16, help="of relevance; increase them if the sum and the "
        "difference that are printed are far apart")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--toy_classes", metavar="FILE.webp", help="only draw the toy's ten classes; this needs no "
        "checkpoint")
    args = p.parse_args(argv)
    if not args.toy_classes and (not args.ckpt or (args.video is None) == (args.toy is None)):
        p.error("expected --ckpt, and either --video PATH or --toy NUMBER")
    if args.toy is not None and args.toy < 0:
        p.error(f"--toy is {args.toy}, expected 0 or more")
    return args

def make_case(args, Model=STDFormer):
    """Load the model and the clip that the flags name."""
    device, _, _ = setup(args.device)
    checkpoint = load_checkpoint(args.ckpt)
    config = ModelConfig(**checkpoint["model_config"])
    torch.manual_seed(0)
    untrained = Model(config)
    models = {"trained": Model(config), "untrained": untrained}
    load_weights(models["trained"], checkpoint["model"], args.ckpt)
    for model in models.values():
        model.to(device).eval()
    masks = None
    if args.toy is not None:
        video, masks, name = toy_view(args.toy, config.num_frames, config.image_size)
        title = f"Toy clip {args.toy}, {name}"
    else:
        path = Path(args.video).absolute()
        video = data.eval_views(data.read_clip(path, config.num_frames), config.num_frames,
                                config.image_size)[0]
        title = path.name
    grid = models["trained"].grid
    position = tuple(args.position or most_moving(video, grid))
    if position[0] not in range(grid[0]) or position[1] not in range(grid[1]):
        raise ValueError(f"--position is {position[0]} {position[1]}, expected a row from 0 to "
                         f"{grid[0] - 1} and a column from 0 to {grid[1] - 1}")
    return Case(models, checkpoint, device, video, masks, title, position, args.steps)

def main(argv=None, Model=STDFormer):
    args = get_args(argv)
    try:
        import matplotlib
    except ImportError as e:
        raise ValueError("the pictures need matplotlib: pip install matplotlib") from e
    if args.toy_classes:
        draw_toy_classes(args.toy_classes)
        print(args.toy_classes)
        return
    case = make_case(args, Model)
    answer, probability = case.ask(case.video)
    print(f"{case.title}: {answer}, {100 * probability:.0f} %")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name in args.only:
        if name == "stdm" and not case.config.stdm_layers:
            print("stdm: left out, this model has no STDM")
        elif name == "smem" and not case.config.smem_t_layers + case.config.smem_st_layers:
            print("smem: left out, this model has no SMEM")
        else:
            path = Path(args.out, f"{name}.png")
            with matplotlib.rc_context({"font.size": 12, "axes.titlesize": 11}):
                PICTURES[name](case).savefig(path)
            print(path)

if __name__ == "__main__":
    run_command(main)
