"""Draw docs/architecture.svg: Figures 1 to 5 of the paper in one, with the names of model.py in its boxes.

    python scripts/architecture.py

Plain SVG text, real letters, nothing loaded from outside. Colours follow the reader's light or dark mode; a background of its own
keeps it legible where they cannot. Numbers and positions are read from model.py's b16, so the figure cannot disagree with the code;
tests/test_docs.py checks the names and that the file is what this script draws.
"""
import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import MODELS, ModelConfig                   # noqa: E402 (the repository is no package)

# Okabe and Ito's colours, told apart by colour-blind readers too: (stroke, fill) in light and in dark mode.
COLOURS = {
    "st": (("#0072B2", "#E3F1FA"), ("#56B4E9", "#0C2D44")),             # spatio-temporal branch, x
    "t": (("#B86E00", "#FDF1DA"), ("#E69F00", "#3B2A07")),              # temporal branch, y
    "back": (("#007A5A", "#DFF4EC"), ("#2FC79A", "#0A3329")),           # from y back to x
    "plain": (("#57606A", "#F3F5F7"), ("#9DA7B3", "#22272E")),
}
INK = ("#1F2328", "#E6EDF3"), ("#57606A", "#A9B4C0")                    # text, lesser text: light, dark
PAPER = ("#FFFFFF", "#161B22"), ("#D0D7DE", "#3D444D")                  # background, frames

WIDTH, HEIGHT = 1100, 1242
svg = []                                                # what is drawn, in order


def style(mode):
    """The colours of one mode, 0 light or 1 dark."""
    rules = [f".paper {{ fill: {PAPER[0][mode]}; stroke: {PAPER[1][mode]}; }}", f".panel {{ fill: none; stroke: {PAPER[1][mode]}; }}",
             f"text {{ fill: {INK[0][mode]}; }}", f".small {{ fill: {INK[1][mode]}; }}"]
    for name, modes in COLOURS.items():
        stroke, fill = modes[mode]
        rules += [f".box.{name} {{ stroke: {stroke}; fill: {fill}; }}", f".line.{name} {{ stroke: {stroke}; }}",
                  f".tip.{name} {{ fill: {stroke}; }}", f".full.{name} {{ fill: {stroke}; }}", f"text.{name} {{ fill: {stroke}; }}"]
    return "\n    ".join(rules)


def text(x, y, words, kind="", size=13, anchor="middle", room=None):
    """One line of text around (x, y), y its base line. room: the pixels it may take even in a wide font."""
    width = len(words) * size * (0.602 if "code" in kind or "shape" in kind else 0.56)
    assert room is None or width <= room, f"{words!r} takes about {width:.0f} pixels, has {room}"
    svg.append(f'<text class="{kind}" x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>')


def box(x, y, w, h, name="", notes=(), colour="plain", kind="", code=True, size=14):
    """A module, centred on (x, y): its name in model.py, and lines of notes below."""
    svg.append(f'<rect class="box {colour} {kind}" x="{x - w / 2:g}" y="{y - h / 2:g}" width="{w}" height="{h}" rx="6"/>')
    lines = ([(name, "code" if code else "strong", size)] if name else []) + [(note, "small", 12) for note in notes]
    pitch = 17
    for i, (words, kind, size) in enumerate(lines):
        text(x, round(y + 4.5 + (i - (len(lines) - 1) / 2) * pitch, 1), words, kind, size, room=w - 6)


def line(points, colour="plain", tip=True, kind=""):
    """A line through points, with rounded corners and an arrow tip at its end."""
    (x0, y0), (x1, y1) = points[-2:]
    dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
    assert dx == 0 or dy == 0
    path = f"M{points[0][0]:g} {points[0][1]:g}"
    for (ax, ay), (bx, by), (cx, cy) in zip(points, points[1:], points[2:]):
        r = min(7, (abs(bx - ax) + abs(by - ay)) / 2, (abs(cx - bx) + abs(cy - by)) / 2)
        ux, uy = (bx > ax) - (bx < ax), (by > ay) - (by < ay)
        vx, vy = (cx > bx) - (cx < bx), (cy > by) - (cy < by)
        path += f" L{bx - r * ux:g} {by - r * uy:g} Q{bx:g} {by:g} {bx + r * vx:g} {by + r * vy:g}"
    back = 6 if tip else 0
    svg.append(f'<path class="line {colour} {kind}" d="{path} L{x1 - back * dx:g} {y1 - back * dy:g}"/>')
    if tip:
        svg.append(f'<path class="tip {colour}" d="M{x1:g} {y1:g} L{x1 - 9 * dx - 4.5 * dy:g} {y1 - 9 * dy - 4.5 * dx:g} '
                   f'L{x1 - 9 * dx + 4.5 * dy:g} {y1 - 9 * dy + 4.5 * dx:g} Z"/>')


def plus(x, y, colour="plain", sign="+"):
    svg.append(f'<circle class="box {colour}" cx="{x}" cy="{y}" r="11"/>')
    text(x, y + 5, sign, "strong", 15)


def dot(x, y, colour):
    svg.append(f'<circle class="full {colour}" cx="{x}" cy="{y}" r="3.2"/>')


def grid(x, y, cell, strength, colour):
    """A small map of places with its upper left corner at (x, y); strength(row, column) in 0 ... 1."""
    for row in range(5):
        for column in range(5):
            svg.append(f'<rect class="panel" x="{x + column * cell}" y="{y + row * cell}" width="{cell}" height="{cell}"/>')
            if strength(row, column):
                svg.append(f'<rect class="full {colour}" x="{x + column * cell}" y="{y + row * cell}" width="{cell}" height="{cell}" '
                           f'opacity="{strength(row, column):g}"/>')


def panel(x, y, w, h, name, title, where, question):
    """The frame of one module; what is drawn until end() is measured from its corner."""
    svg.append(f'<g id="{name}" transform="translate({x} {y})">')
    svg.append(f'<rect class="panel" x="0" y="0" width="{w}" height="{h}" rx="10"/>')
    text(18, 30, name, "code", 18, "start")
    text(34 + 11 * len(name), 30, title, "", 15, "start", room=w - 200)
    text(w - 18, 30, where, "small", 13, "end", room=200)
    text(18, 54, question, "small it", 14, "start", room=w - 36)


def end():
    svg.append("</g>")


# ----------------------------------------------------------------------------------------------------
# Figure 1: the whole model
# ----------------------------------------------------------------------------------------------------


def overview(c):
    svg.append('<g id="STDFormer">')
    text(28, 46, "STDFormer", "code", 22, "start")
    text(164, 46, "two branches, layer by layer (section 3.1, Fig. 1)", "", 16, "start", room=500)
    for x, colour, words in (672, "st", "spatio-temporal branch, x"), (672, "t", "temporal branch, y"), (905, "back", "from y back to x"):
        y = 58 if colour == "t" else 34
        line([(x, y), (x + 34, y)], colour)
        text(x + 44, y + 5, words, "", 13, "start", room=185)
    line([(905, 58), (939, 58)], "plain", tip=False, kind="dashed")
    text(949, 63, "not by default", "", 13, "start", room=130)

    ST, T = 176, 352                                    # the heights of the two branches
    middle = (ST + T) // 2
    svg.append('<rect class="panel" x="326" y="92" width="592" height="328" rx="10"/>')
    text(342, 117, "layer i = 0 ... L-1", "strong", 14, "start")

    for k in range(3):                                  # the video: frames in which something moves
        y = middle - 63 + 42 * k
        svg.append(f'<rect class="box plain" x="56" y="{y}" width="56" height="38" rx="3"/>')
        svg.append(f'<circle class="full plain" cx="{68 + 15 * k}" cy="{y + 25 - 6 * k}" r="6"/>')
    text(84, middle + 82, "video", "strong", 14)
    text(84, middle + 101, "(B, 3, F, S, S)", "shape", 13, room=130)
    line([(120, middle), (160, middle)])
    box(216, middle, 112, 96, "stem", ["Conv3d", "+ class token", "+ positions"])
    line([(272, middle), (302, middle)], tip=False)
    line([(302, middle), (302, ST), (482, ST)], "st")
    line([(302, middle), (302, T), (644, T)], "t")
    dot(302, middle, "plain")
    text(340, ST - 12, "x (B, T, 1+N, D)", "shape st", 13, "start", room=135)
    text(340, T + 22, "y (B, T, H, W, D)", "shape t", 13, "start", room=160)
    text(340, T - 12, "memory: the y of the layer before", "small", 13, "start", room=255)

    box(536, ST, 108, 56, colour="st")
    text(536, ST - 6, "Block", "code", 15)
    svg.append(f'<text x="536" y="{ST + 16}" font-size="15" text-anchor="middle"><tspan class="small" font-size="13">or </tspan>'
               '<tspan class="code">PTM</tspan></text>')
    line([(590, ST), (614, ST)], "st")
    box(648, ST, 68, 42, "SMEM", colour="st", kind="dashed")
    line([(682, ST), (859, ST)], "st")
    line([(704, ST), (704, T - 28)], "st")
    dot(704, ST, "st")
    text(694, middle + 5, "query: patches of x", "small", 13, "end", room=160)
    box(704, T, 120, 56, "CTM", ["over time"], colour="t", size=15)
    line([(764, T), (786, T)], "t")
    box(822, T, 72, 42, "SMEM", colour="t")
    text(822, T + 38, "at one layer", "small", 12, room=92)
    line([(858, T), (940, T)], "t")
    dot(870, T, "t")
    line([(870, T), (870, middle + 24)], "back")
    box(870, middle, 76, 48, "STDM", colour="back", size=15)
    line([(870, middle - 24), (870, ST + 11)], "back")
    plus(870, ST, "st")
    line([(881, ST), (936, ST)], "st")
    text(944, ST + 5, "x of the next layer", "st", 13, "start", room=140)
    text(944, ST + 25, "the last x is unused", "small", 12, "start", room=150)
    box(1006, T, 132, 98, "", colour="plain")
    text(1006, T - 27, "the last y", "small", 12, room=125)
    text(1006, T - 10, "mean over T, H, W", "small", 12, room=125)
    text(1006, T + 12, "ln_post", "code", 14)
    text(1006, T + 34, "head", "code", 14)
    line([(1006, T + 49), (1006, T + 72)])
    text(1006, T + 91, "logits (B, classes)", "shape", 12, room=145)

    # where the modules stand: columns are layers
    left, top, cell = 150, 478, 41
    text(28, top - 14, "b16, by layer i", "strong", 14, "start", room=120)
    rows = (("blocks", range(c.depth), "st", ""), ("ctm", range(c.depth), "t", "CTM"), ("smem_t", c.smem_layers, "t", "SMEM"), ("stdm", c.stdm_layers, "back", "STDM"))
    for i in range(c.depth):
        text(left + i * cell + cell / 2, top - 14, str(i), "small", 12)
    for r, (name, layers, colour, module) in enumerate(rows):
        y = top + 29 * r
        text(28, y + 15, name, "code", 14, "start")
        for i in range(c.depth):
            label = module or ("PTM" if i in c.ptm_layers else "Block")
            svg.append(f'<rect class="{f"box {colour}" if i in layers else "panel"}" x="{left + i * cell + 2}" y="{y - 2}" width="{cell - 4}" height="23" rx="4"/>')
            if i in layers:
                text(left + i * cell + cell / 2, y + 14, label, "code", 11, room=cell - 4)
    T_, side = c.num_frames // c.stem_stride, c.image_size // c.patch_size
    right = left + c.depth * cell + 28
    letters = (("B", "clips"), ("F", f"{c.num_frames} frames"), ("T", f"{T_} token frames"), ("S", f"{c.image_size} pixels"),
               ("H, W", f"{side}, {side} patches"), ("N", f"{side * side} = H W"), ("D", f"{c.dim} channels"), ("L", f"{c.depth} layers"))
    for k, (letter, words) in enumerate(letters):
        x, y = right + 205 * (k // 4), top + 15 + 29 * (k % 4)
        text(x, y, letter, "shape", 14, "start")
        text(x + 46, y, words, "small", 13, "start", room=150)
    end()


# ----------------------------------------------------------------------------------------------------
# Figures 2 to 5: the four modules
# ----------------------------------------------------------------------------------------------------


def ptm(x, y, w, h):
    panel(x, y, w, h, "PTM", "parallel transformer module", "3.2, Fig. 2, Eq. 1", "What stands where, and what changes beside it in time?")
    top, rows = 104, (152, 206, 260)
    text(18, top - 10, "x", "shape st", 14, "start")
    line([(18, top), (123, top)], "st")
    dot(34, top, "st")
    line([(34, top), (34, 156), (52, 156)], "st")
    box(84, 156, 64, 44, "DPE", ["3x1x1"], colour="st", size=13)
    line([(116, 156), (134, 156), (134, top + 11)], "st")
    plus(134, top, "st")
    line([(145, top), (461, top)], "st")
    text(310, top - 10, "identity", "small", 12)
    dot(166, top, "st")
    for k, row in enumerate(rows):
        line([(166, top), (166, row), (254 if k == 2 else 184, row)], "st")
    for row in rows[:2]:
        box(202, row, 36, 28, "LN", code=False, size=12)
        line([(220, row), (254, row)], "st")
    box(310, rows[0], 112, 44, "Attention", ["within a frame"], colour="st", size=13)
    box(310, rows[1], 112, 44, "MLP", ["token by token"], colour="st", size=13)
    box(310, rows[2], 112, 44, "PTMConv", ["3x3 on (T, H W)"], colour="st", size=13)
    for row, name, sign in zip(rows, ("y1", "y2", "y3"), ("", "α", "β")):
        text(383, row - 7, name, "small it", 13)
        if sign:
            line([(366, row), (406, row)], "st")
            line([(428, row), (472, row), (472, top + 11)], "st", tip=False)
            plus(417, row, "st", sign)
        else:
            line([(366, row), (472, row), (472, top + 11)], "st")
    plus(472, top, "st")
    line([(483, top), (508, top)], "st")
    for k, words in enumerate(("The class token", "takes no part in", "DPE and PTMConv.")):
        text(18, 236 + 17 * k, words, "small", 12, "start", room=140)
    end()


def ctm(x, y, w, h):
    panel(x, y, w, h, "CTM", "cross transformer module", "3.3, Fig. 3", "At this place of the picture: what happened over time?")
    top, low = 104, 206
    text(18, top - 10, "x, query", "st", 13, "start")
    line([(18, top), (357, top)], "st")
    dot(98, top, "st")
    line([(98, top), (98, 152), (150, 152)], "st")
    box(172, 152, 44, 28, "LN", code=False, size=12)
    line([(194, 152), (226, 152)], "st")
    text(208, 145, "q", "small it", 13)
    text(18, low - 10, "y, memory", "t", 13, "start")
    line([(18, low), (123, low)], "t")
    dot(34, low, "t")
    line([(34, low), (34, 256), (52, 256)], "t")
    box(84, 256, 64, 44, "CPE", ["3x3x3"], colour="t", size=13)
    line([(116, 256), (134, 256), (134, low + 11)], "t")
    plus(134, low, "t")
    line([(145, low), (226, low)], "t")
    box(172, low, 44, 28, "LN", code=False, size=12)
    text(210, low - 7, "k, v", "small it", 13)
    box(290, 179, 128, 94, "", colour="t")
    text(290, 163, "cross_attention", "code", 13, room=126)
    text(290, 184, "T x T, at each of", "small", 12, room=122)
    text(290, 201, "the N places", "small", 12, room=122)
    line([(354, 179), (368, 179), (368, top + 11)], "t")
    plus(368, top, "t")
    line([(379, top), (471, top)], "t")
    dot(390, top, "t")
    line([(390, top), (390, 152), (400, 152)], "t", tip=False)
    box(432, 152, 64, 44, "MLP", ["after LN"], colour="t", size=13)
    line([(464, 152), (482, 152), (482, top + 11)], "t")
    plus(482, top, "t")
    line([(493, top), (510, top)], "t")
    text(172, 260, "Our reading: the residual is on the query, so", "small", 12, "start", room=330)
    text(172, 277, "that CLIP's features need not pass the attention.", "small", 12, "start", room=330)
    end()


def chain(left, row, gap, parts, colour):
    """Boxes in a row, each (name, width, note) with an arrow behind it; returns where the last arrow ends."""
    for name, width, note in parts:
        box(left + width // 2, row, width, 46, name, [note], colour="plain" if name.startswith("bn") else colour, size=13)
        line([(left + width, row), (left + width + gap, row)], colour)
        left += width + gap
    return left


def stdm(x, y, w, h):
    panel(x, y, w, h, "STDM", "spatio-temporal diffusion module", "3.4, Fig. 4", "What should the places and frames around know of this one?")
    row = 116
    text(18, row - 12, "y", "shape t", 14, "start")
    line([(18, row), (38, row)], "back")
    parts = ("conv_s", 74, "1x3x3"), ("bn_s", 62, "ReLU"), ("conv_t", 74, "3x1x1"), ("bn_t", 62, "ReLU"), ("pointwise", 82, "1x1x1")
    left = chain(38, row, 16, parts, "back")
    plus(left + 11, row, "st")
    line([(left + 11, 76), (left + 11, row - 11)], "st")
    text(left + 4, 86, "patches of x", "st", 13, "end")
    line([(left + 22, row), (left + 38, row)], "st")
    text(18, 170, "Who hears of one place:", "small", 12, "start")
    for g, (caption, reach, frames) in enumerate((("it alone", 0, (1,)), ("1x3x3: those around it", 1, (1,)), ("3x1x1: before and after too", 1, (0, 1, 2)))):
        for k, frame in enumerate(("t-1", "t", "t+1")):
            corner = 22 + 166 * g + 48 * k
            text(corner + 20, 192, frame, "small", 11)
            grid(corner, 198, 8, lambda r, c: (1 if (r, c, k) == (2, 2, 1) else 0.45) * (k in frames and max(abs(r - 2), abs(c - 2)) <= reach), "back")
        text(22 + 166 * g + 68, 256, caption, "small", 12, room=190)
    text(18, 284, "Both convolutions act on each channel by itself; pointwise mixes them.", "small", 12, "start", room=480)
    end()


def smem(x, y, w, h):
    panel(x, y, w, h, "SMEM", "salient motion excitation module", "3.5, Fig. 5", "Where did each place of this frame go in the next one?")
    row, top = 124, 80
    text(16, row - 12, "y", "shape t", 14, "start")
    line([(18, row), (42, row)], "t")
    dot(30, row, "t")
    line([(30, row), (30, top), (483, top), (483, row - 11)], "t")
    left = chain(42, row, 17, (("conv_in", 78, "3x3, D/8"), ("correlation", 108, "N x N"), ("stages", 84, "3 x, at H/2"), ("conv_out", 92, "3x3, resized")), "t")
    plus(left + 11, row, "t")
    line([(left + 22, row), (left + 38, row)], "t")
    heat = {(1, 3): 1, (1, 2): 0.4, (0, 3): 0.3, (2, 3): 0.35, (1, 4): 0.3, (0, 2): 0.15, (2, 2): 0.25, (2, 4): 0.12, (3, 1): 0.12, (4, 0): 0.08}
    grid(44, 176, 16, lambda r, c: float((r, c) == (3, 1)), "t")
    grid(200, 176, 16, lambda r, c: heat.get((r, c), 0), "t")
    line([(130, 216), (194, 216)], "t")
    text(84, 278, "place i, frame t", "small", 12)
    text(240, 278, "all places, frame t+1", "small", 12)
    for k, words in enumerate(("N products at each place:", "a map with N channels.", "A peak, seen from i, would", "be motion. T-1 such maps;", "the last one is repeated.")):
        text(326, 188 + 18 * k, words, "small", 12, "start", room=185)
    end()


def draw():
    """The figure, as the text of an SVG file."""
    svg.clear()
    c = ModelConfig(**MODELS["b16"])
    overview(c)
    w, h, left, right, top = 518, 300, 24, 558, 614
    ptm(left, top, w, h)
    ctm(right, top, w, h)
    stdm(left, top + h + 16, w, h)
    smem(right, top + h + 16, w, h)
    head = f'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-labelledby="title">
  <title id="title">The architecture of STD-Former, with the names of model.py</title>
  <style>
    text {{ font-family: Helvetica, Arial, sans-serif; }}
    .code, .shape {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
    .code, .strong {{ font-weight: 600; }}
    .it {{ font-style: italic; }}
    .paper, .panel {{ stroke-width: 1; }}
    .box {{ stroke-width: 1.5; }}
    .line {{ fill: none; stroke-width: 1.8; }}
    .dashed {{ stroke-dasharray: 5 4; }}
    {style(0)}
    @media (prefers-color-scheme: dark) {{
    {style(1)}
    }}
  </style>
  <rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="12"/>
'''
    return head + "\n".join("  " + s for s in svg) + "\n</svg>\n"


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.svg").write_text(draw(), encoding="utf-8")
