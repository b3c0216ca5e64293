"""Draw docs/architecture.svg, Figure 1 of the paper, and docs/modules.svg, Figures 2 to 5.

    python scripts/architecture.py

The files are plain SVG with real letters, and they load nothing. Their colours follow the reader's
light or dark mode. They have their own background, for viewers that know no modes. Names, numbers
and positions are those of model.py's b16. tests/test_docs.py checks them.
"""
import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import MODELS, ModelConfig

# Okabe and Ito's colours, which colour-blind readers can tell apart. Each is a pair, for light and
# for dark mode, of a line and a fill.
COLOURS = {
    "st": (("#0072B2", "#E3F1FA"), ("#56B4E9", "#0C2D44")),         # spatio-temporal branch, x
    "t": (("#B86E00", "#FDF1DA"), ("#E69F00", "#3B2A07")),          # temporal branch, y
    "back": (("#007A5A", "#DFF4EC"), ("#2FC79A", "#0A3329")),       # from y back to x
    "plain": (("#57606A", "#F3F5F7"), ("#9DA7B3", "#22272E")),
}
INK = (("#1F2328", "#57606A"), ("#E6EDF3", "#A9B4C0"))              # text, lesser text
PAPER = (("#FFFFFF", "#D0D7DE"), ("#161B22", "#3D444D"))            # background, frames

WIDTH = 720                 # on a phone, half of it: the smallest letters have 7.5 pixels
MARGIN = 20
SMALL, NAME = 15, 16        # sizes of letters

elements = []               # what is drawn, in order

# ----- Pieces ---------------------------------------------------------------

def style(mode):
    """The colours of one mode: 0 is light, 1 is dark."""
    ink, small = INK[mode]
    paper, frame = PAPER[mode]
    rules = [
        f".paper {{ fill: {paper}; stroke: {frame}; }}",
        f".panel {{ fill: none; stroke: {frame}; }}",
        f"text {{ fill: {ink}; }}",
        f".small {{ fill: {small}; }}",
    ]
    for name, modes in COLOURS.items():
        stroke, fill = modes[mode]
        rules += [
            f".box.{name} {{ stroke: {stroke}; fill: {fill}; }}",
            f".line.{name} {{ stroke: {stroke}; }}",
            f".tip.{name}, .full.{name}, text.{name} {{ fill: {stroke}; }}",
        ]
    return "\n    ".join(rules)


def text(x, y, words, kind="", size=SMALL, anchor="middle", room=None):
    """One line of text at x, with its base line at y. room: the pixels that it may take.

    AssertionError if the words do not fit, even for a wide font.
    """
    letter = 0.602 if "code" in kind or "shape" in kind else 0.56
    width = len(words) * size * letter
    assert room is None or width <= room, f"{words!r} takes about {width:.0f} pixels, has {room}"
    elements.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" font-size="{size}" '
                    f'text-anchor="{anchor}">{escape(words)}</text>')


def heading(x, y, name, title, size, title_size):
    """A name of model.py and its title in one line. The title begins where the name ends."""
    elements.append(f'<text class="code" x="{x:g}" y="{y:g}" font-size="{size}">{name}'
                    f'<tspan class="title" dx="10" font-size="{title_size}">{title}</tspan></text>')


def rectangle(x, y, w, h, kind, radius=0, more=""):
    """A rectangle with its upper left corner at (x, y)."""
    elements.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" '
                    f'rx="{radius}"{more}/>')


def box(x, y, w, h, name="", notes=(), colour="plain", kind="", name_kind="code", size=NAME):
    """A module around the point (x, y): its name in model.py, with lines of notes below."""
    rectangle(x - w / 2, y - h / 2, w, h, f"box {colour} {kind}".strip(), radius=6)
    lines = [(note, "small", SMALL) for note in notes]
    if name:
        lines.insert(0, (name, name_kind, size))
    first = y + 5 - 18 * (len(lines) - 1) / 2
    for i, (words, words_kind, words_size) in enumerate(lines):
        text(x, first + 18 * i, words, words_kind, words_size, room=w - 4)


def sign(a, b):
    """-1, 0 or 1: the direction from a to b."""
    return (b > a) - (b < a)


def line(points, colour="plain", tip=True):
    """A line through points, with rounded corners and an arrow tip at its end."""
    path = f"M{points[0][0]:g} {points[0][1]:g}"
    for (ax, ay), (bx, by), (cx, cy) in zip(points, points[1:], points[2:]):
        before = abs(bx - ax) + abs(by - ay)
        after = abs(cx - bx) + abs(cy - by)
        r = min(7, before / 2, after / 2)
        path += f" L{bx - r * sign(ax, bx):g} {by - r * sign(ay, by):g}"
        path += f" Q{bx:g} {by:g} {bx + r * sign(bx, cx):g} {by + r * sign(by, cy):g}"
    (x0, y0), (x1, y1) = points[-2:]
    dx, dy = sign(x0, x1), sign(y0, y1)
    assert dx == 0 or dy == 0, "the last piece of a line is neither horizontal nor vertical"
    shorter = 6 if tip else 0
    path += f" L{x1 - shorter * dx:g} {y1 - shorter * dy:g}"
    elements.append(f'<path class="line {colour}" d="{path}"/>')
    if tip:
        x, y = x1 - 9 * dx, y1 - 9 * dy
        elements.append(f'<path class="tip {colour}" d="M{x1:g} {y1:g} '
                        f'L{x - 4.5 * dy:g} {y - 4.5 * dx:g} '
                        f'L{x + 4.5 * dy:g} {y + 4.5 * dx:g} Z"/>')


def circle(x, y, words, colour):
    """An operation: "+", or a factor."""
    elements.append(f'<circle class="box {colour}" cx="{x:g}" cy="{y:g}" r="12"/>')
    text(x, y + 5.5, words, "strong", NAME)


def dot(x, y, colour, radius=3.2):
    elements.append(f'<circle class="full {colour}" cx="{x:g}" cy="{y:g}" r="{radius}"/>')


def grid(x, y, cell, strengths, colour):
    """A map of 5 x 5 places with its upper left corner at (x, y).

    strengths: {(row, column): 0 to 1} of the places that are not empty
    """
    for row in range(5):
        for column in range(5):
            corner = x + column * cell, y + row * cell
            rectangle(*corner, cell, cell, "panel")
            if (row, column) in strengths:
                opacity = f' opacity="{strengths[row, column]}"'
                rectangle(*corner, cell, cell, f"full {colour}", more=opacity)


def chain(left, y, gap, parts, colour):
    """Boxes (name, width, note) in a row, with an arrow after each. Returns where the last ends."""
    for name, width, note in parts:
        box_colour = "plain" if name.startswith("bn") else colour
        box(left + width / 2, y, width, 48, name, [note], box_colour)
        line([(left + width, y), (left + width + gap, y)], colour)
        left += width + gap
    return left


def begin(top, height, name, title, where, question):
    """The frame of one module. What follows is measured from its corner, until end()."""
    width = WIDTH - 2 * MARGIN
    elements.append(f'<g id="{name}" transform="translate({MARGIN} {top})">')
    rectangle(0, 0, width, height, "panel", radius=10)
    heading(18, 32, name, title, 20, NAME)
    text(width - 18, 32, where, "small", SMALL, "end", room=160)
    text(18, 58, question, "small it", NAME, "start", room=width - 36)


def end():
    elements.append("</g>")

# ----- Figure 1: the whole model --------------------------------------------

def overview(c):
    """The two branches, and below them where each module of this ModelConfig stands."""
    elements.append('<g id="STDFormer">')
    heading(MARGIN, 44, "STDFormer", "two branches, layer by layer", 24, 18)
    text(WIDTH - MARGIN, 44, "3.1, Fig. 1", "small", SMALL, "end")
    branches(top=66)
    layers(c, top=410)
    letters(c, top=580)
    end()


def branches(top):
    rectangle(172, top, 436, 306, "panel", radius=10)
    text(186, top + 25, "layer i = 0 ... L-1", "strong", 15, "start")
    st, t = top + 104, top + 236                        # heights of the branches
    middle = (st + t) / 2

    for k in range(3):                                  # a video in which something moves
        rectangle(26 + 36 * k, top + 64, 33, 33, "box plain", radius=3)
        dot(35 + 44 * k, top + 87 - 6 * k, "plain", radius=5)
    text(79, top + 30, "video", "strong", 15)
    text(79, top + 51, "(B, 3, F, S, S)", "shape", SMALL, room=140)
    line([(79, top + 103), (79, middle - 44)])
    box(79, middle, 124, 88, "stem", ["Conv3d,", "+ class token,", "+ positions"])
    line([(141, middle), (156, middle)], tip=False)
    line([(156, middle), (156, st), (224, st)], "st")
    line([(156, middle), (156, t), (366, t)], "t")
    dot(156, middle, "plain")

    text(186, st - 44, "spatio-temporal branch:", "st", SMALL, "start", room=194)
    text(384, st - 44, "x (B, T, 1+N, D)", "shape st", SMALL, "start", room=150)
    text(186, t + 50, "temporal branch:", "t", SMALL, "start", room=140)
    text(324, t + 50, "y (B, T, H, W, D)", "shape t", SMALL, "start", room=160)
    text(186, t - 10, "memory: previous y", "small", SMALL, "start", room=180)

    box(276, st, 104, 54, colour="st")
    text(276, st - 5, "Block", "code", NAME)
    text(252, st + 16, "or", "small", SMALL)
    text(285, st + 16, "PTM", "code", NAME)
    line([(328, st), (350, st)], "st")
    box(384, st, 68, 40, "SMEM", colour="st", kind="dashed")
    text(384, st + 36, "optional", "small", SMALL)
    line([(418, st), (556, st)], "st")
    line([(438, st), (438, t - 27)], "st")
    dot(438, st, "st")
    text(430, middle + 12, "query: patches of x", "small", SMALL, "end", room=170)

    box(420, t, 108, 54, "CTM", ["over time"], colour="t")
    line([(474, t), (486, t)], "t")
    box(520, t, 68, 40, "SMEM", colour="t")
    line([(554, t), (622, t)], "t")
    dot(568, t, "t")
    line([(568, t), (568, middle + 22)], "back")
    box(568, middle, 72, 44, "STDM", colour="back")
    line([(568, middle - 22), (568, st + 12)], "back")
    circle(568, st, "+", "st")
    line([(580, st), (622, st)], "st")

    text(628, st - 2, "x of the", "st", SMALL, "start")
    text(628, st + 16, "next layer", "st", SMALL, "start", room=90)
    box(661, t, 78, 92)
    text(661, t - 22, "the last y,", "small", SMALL)
    text(661, t - 3, "averaged", "small", SMALL)
    text(661, t + 18, "ln_post", "code", SMALL)
    text(661, t + 37, "head", "code", SMALL)
    line([(661, t + 46), (661, t + 64)])
    text(661, t + 82, "logits", "", SMALL)


def layers(c, top):
    """A table of which layer has which module."""
    left, cell = 112, 48
    every = range(c.depth)
    rows = (("blocks", every, "st"), ("ctm", every, "t"), ("smem_t", c.smem_t_layers, "t"),
            ("stdm", c.stdm_layers, "back"))
    text(MARGIN, top, "b16, layer i", "strong", SMALL, "start", room=105)
    for i in every:
        text(left + cell * (i + 0.5), top, str(i), "small", SMALL)
    for row, (name, present, colour) in enumerate(rows):
        y = top + 12 + 30 * row
        text(MARGIN, y + 17, name, "code", SMALL, "start")
        for i in every:
            module = {"ctm": "CTM", "smem_t": "SMEM", "stdm": "STDM"}.get(name)
            if name == "blocks":
                module = "PTM" if i in c.ptm_layers else "Block"
            kind = f"box {colour}" if i in present else "panel"
            rectangle(left + cell * i + 2, y, cell - 4, 25, kind, radius=4)
            if i in present:
                text(left + cell * (i + 0.5), y + 17, module, "code cell", 13, room=cell - 4)


def letters(c, top):
    side = c.image_size // c.patch_size
    meanings = (
        ("B", "clips"), ("F", f"{c.num_frames} frames"),
        ("T", f"{c.num_frames // c.stem_stride} token frames"), ("S", f"{c.image_size} pixels"),
        ("D", f"{c.dim} channels"), ("L", f"{c.depth} layers"),
        ("N", f"{side * side} = H W"), ("H, W", f"{side}, {side} patches"),
    )
    for k, (letter, words) in enumerate(meanings):
        x, y = MARGIN + 168 * (k % 4), top + 24 * (k // 4)
        indent = 46 if k % 4 == 3 else 20
        text(x, y, letter, "shape", SMALL, "start")
        text(x + indent, y, words, "small", SMALL, "start", room=168 - indent)

# ----- Figures 2 to 5: the four modules -------------------------------------

def ptm(top):
    height = 298
    begin(top, height, "PTM", "parallel transformer module", "3.2, Fig. 2, Eq. 1",
          "What is where in this frame, and what changes from frame to frame?")
    main, rows = 96, (146, 200, 254)
    text(18, main - 9, "x", "shape st", NAME, "start")
    line([(18, main), (222, main)], "st")
    dot(34, main, "st")
    line([(34, main), (34, 172), (52, 172)], "st")
    steps = ["BatchNorm", "1x1x1, to D/1.5", "3x1x1, depthwise", "1x1x1, to D"]
    box(128, 172, 152, 104, "DPE", steps, "st")
    line([(204, 172), (234, 172), (234, main + 12)], "st")
    circle(234, main, "+", "st")
    line([(246, main), (590, main)], "st")
    text(420, main - 9, "identity", "small")
    dot(264, main, "st")
    for row in rows:
        left = 366 if row == rows[2] else 288
        line([(264, main), (264, row), (left, row)], "st")
    for row in rows[:2]:
        box(310, row, 44, 30, "LN", name_kind="", size=SMALL)
        line([(332, row), (366, row)], "st")
    box(436, rows[0], 140, 46, "Attention", ["within a frame"], "st")
    box(436, rows[1], 140, 46, "MLP", ["token by token"], "st")
    box(436, rows[2], 140, 46, "PTMConv", ["3x3 on (T, H W)"], "st")
    line([(506, rows[0]), (602, rows[0]), (602, main + 12)], "st")
    for row, factor in zip(rows[1:], ("α", "β")):
        line([(506, row), (548, row)], "st")
        circle(560, row, factor, "st")
        line([(572, row), (602, row), (602, main + 12)], "st")
    for row, name in zip(rows, ("y1", "y2", "y3")):
        text(526, row - 7, name, "small it", 15)
    circle(602, main, "+", "st")
    line([(614, main), (660, main)], "st")
    text(18, 258, "The class token takes no", "small", SMALL, "start", room=240)
    text(18, 277, "part in DPE and PTMConv.", "small", SMALL, "start", room=240)
    end()
    return top + height


def ctm(top):
    height = 272
    begin(top, height, "CTM", "cross transformer module", "3.3, Fig. 3",
          "What happened over time, at this place of the picture?")
    main, low = 98, 178
    text(18, main - 9, "x, query", "st", NAME, "start")
    line([(18, main), (450, main)], "st")
    dot(150, main, "st")
    line([(150, main), (150, 138), (208, 138)], "st")
    box(230, 138, 44, 30, "LN", name_kind="", size=SMALL)
    line([(252, 138), (292, 138)], "st")
    text(270, 131, "q", "small it", 15)
    text(18, low - 9, "y, memory", "t", NAME, "start")
    line([(18, low), (138, low)], "t")
    dot(34, low, "t")
    line([(34, low), (34, 232), (56, 232)], "t")
    box(90, 232, 68, 46, "CPE", ["3x3x3"], "t")
    line([(124, 232), (150, 232), (150, low + 12)], "t")
    circle(150, low, "+", "t")
    line([(162, low), (208, low)], "t")
    box(230, low, 44, 30, "LN", name_kind="", size=SMALL)
    line([(252, low), (292, low)], "t")
    text(270, low - 7, "k, v", "small it", 15)
    box(366, 158, 148, 84, "cross_attention", ["T x T, at each", "of the N places"], "t", size=15)
    line([(440, 158), (462, 158), (462, main + 12)], "t")
    circle(462, main, "+", "t")
    line([(474, main), (598, main)], "t")
    dot(490, main, "t")
    line([(490, main), (490, 148), (510, 148)], "t")
    box(548, 148, 76, 46, "MLP", ["after LN"], "t")
    line([(586, 148), (610, 148), (610, main + 12)], "t")
    circle(610, main, "+", "t")
    line([(622, main), (660, main)], "t")
    text(208, 230, "Our reading: the residual connection is on the query,", "small",
         SMALL, "start", room=450)
    text(208, 249, "so that CLIP's features go past the attention.", "small",
         SMALL, "start", room=450)
    end()
    return top + height


def stdm(top):
    height = 258
    begin(top, height, "STDM", "spatio-temporal diffusion module", "3.4, Fig. 4",
          "What y knows spreads to its surroundings and into x.")
    row = 112
    parts = (("conv_s", 88, "1x3x3"), ("bn_s", 72, "ReLU"), ("conv_t", 88, "3x1x1"),
             ("bn_t", 72, "ReLU"), ("pointwise", 100, "1x1x1"))
    text(18, row - 10, "y", "shape t", NAME, "start")
    line([(18, row), (42, row)], "back")
    left = chain(42, row, 24, parts, "back") + 12
    circle(left, row, "+", "st")
    line([(left, 78), (left, row - 12)], "st")
    text(left + 4, 72, "patches of x", "st", SMALL, room=110)
    line([(left + 12, row), (660, row)], "st")

    around = {(r, column): 0.45 for r in (1, 2, 3) for column in (1, 2, 3)}
    here = {(2, 2): 1}
    spread = (("one place", ({}, here, {})),
              ("1x3x3: around it", ({}, {**around, **here}, {})),
              ("3x1x1: before and after", (around, {**around, **here}, around)))
    for group, (caption, frames) in enumerate(spread):
        left = 30 + 220 * group
        for k, strengths in enumerate(frames):
            text(left + 56 * k + 25, 162, ("t-1", "t", "t+1")[k], "small", SMALL)
            grid(left + 56 * k, 168, 10, strengths, "back")
        text(left + 81, 241, caption, "small", SMALL, room=216)
    end()
    return top + height


def smem(top):
    height = 278
    begin(top, height, "SMEM", "salient motion excitation module", "3.5, Fig. 5",
          "Which place of the next frame resembles this place?")
    row, above = 122, 82
    parts = (("conv_in", 98, "3x3, to D/8"), ("correlation", 124, "N x N"),
             ("stages", 104, "3 x, at H/2"), ("conv_out", 106, "3x3, resized"))
    text(18, row - 10, "y", "shape t", NAME, "start")
    line([(18, row), (50, row)], "t")
    dot(34, row, "t")
    left = chain(50, row, 24, parts, "t") + 12
    line([(34, row), (34, above), (left, above), (left, row - 12)], "t")
    circle(left, row, "+", "t")
    line([(left + 12, row), (660, row)], "t")

    resembling = {(1, 3): 1, (1, 2): 0.4, (0, 3): 0.3, (2, 3): 0.35, (1, 4): 0.3, (0, 2): 0.15,
                  (2, 2): 0.25, (2, 4): 0.12, (3, 1): 0.12, (4, 0): 0.08}
    grid(50, 162, 17, {(3, 1): 1}, "t")
    grid(234, 162, 17, resembling, "t")
    line([(145, 204), (226, 204)], "t")
    text(92, 266, "place i of frame t", "small", SMALL)
    text(276, 266, "all places of frame t+1", "small", SMALL, room=200)
    notes = ("Each place is multiplied with all N", "places of the next frame. Products",
             "are large if the vectors are alike,", "and also if they are long.")
    for k, words in enumerate(notes):
        text(380, 180 + 20 * k, words, "small", SMALL, "start", room=296)
    end()
    return top + height

# ----- The file -------------------------------------------------------------

TITLES = {"architecture": "STD-Former: two branches, layer by layer",
          "modules": "The inside of PTM, CTM, STDM and SMEM, with the names of model.py"}
HEAD = '''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}"
     role="img" aria-labelledby="title">
  <title id="title">{title}</title>
  <style>
    text {{ font-family: Helvetica, Arial, sans-serif; }}
    .code, .shape {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
    .code, .strong {{ font-weight: 600; }}
    .title {{ font-family: Helvetica, Arial, sans-serif; font-weight: 400; }}
    .it {{ font-style: italic; }}
    .paper, .panel {{ stroke-width: 1; }}
    .box {{ stroke-width: 1.5; }}
    .line {{ fill: none; stroke-width: 1.8; }}
    .dashed {{ stroke-dasharray: 5 4; }}
    {light}
    @media (prefers-color-scheme: dark) {{
    {dark}
    }}
  </style>
  <rect class="paper" x="0.5" y="0.5" width="{right}" height="{bottom}" rx="12"/>
'''


def draw(name):
    """One figure, as the text of an SVG file: "architecture" or "modules"."""
    elements.clear()
    if name == "architecture":
        overview(ModelConfig(**MODELS["b16"]))
        bottom = 616
    else:
        bottom = 8
        for module in (ptm, ctm, stdm, smem):
            bottom = module(bottom + 12)
    height = bottom + MARGIN
    head = HEAD.format(w=WIDTH, h=height, right=WIDTH - 1, bottom=height - 1, title=TITLES[name],
                       light=style(0), dark=style(1))
    return head + "\n".join("  " + element for element in elements) + "\n</svg>\n"


if __name__ == "__main__":
    for name in TITLES:
        (ROOT / "docs" / f"{name}.svg").write_text(draw(name), encoding="utf-8")
