"""Toy birds: ten made-up species at night, in CUB's layout. train.py draws them at first use.

    python prepare/toy_birds.py TARGET  # a copy elsewhere: 600 training and 200 test images

Each part has a hue of its own, so that a small ViT can learn it from 600 images. Each part has
three looks, which differ in shade; five parts differ in shape or pattern, too. A look belongs to
three or four species, and two species differ in five parts or more: no single part gives a species
away.
"""
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from prepare import layout

FOLDER = "toy_birds_v5"  # below --data-root; another drawing gets another number


def colours(*names):
    return np.array([ImageColor.getrgb(name) for name in names])


LOOKS = {  # of each part: names, which SHAPES uses, and colours
    "beak": {"cone": "#f47c18", "needle": "#c36313", "hook": "#ffbb3e"},
    "eye": {"cream": "#f8f8f4", "grey": "#c6c6c3", "white": "#ffffff"},
    "crown": {"crest": "#d62830", "cap": "#ab2026", "tufts": "#ff515b"},
    "breast": {"spotted": "#f0ce3c", "plain": "#c0a430", "barred": "#ffff6a"},
    "wing": {"bars": "#3e68c4", "spots": "#31539c", "quills": "#6da1ff"},
    "belly": {"violet": "#9254c8", "plum": "#7443a0", "lilac": "#d688ff"},
    "tail": {"banded": "#24a08c", "forked": "#1c8070", "tipped": "#4ce7ce"},
    "leg": {"green": "#6eaa1e", "olive": "#588818", "lime": "#a9f445"},
}
SPECIES = {  # a digit for each part, in the order of LOOKS: its first, second or third look
    "Amber_Lark": "21202212",
    "Birch_Finch": "20110020",
    "Cinder_Jay": "01021110",
    "Dune_Wren": "00000221",
    "Elder_Thrush": "02222002",
    "Fern_Tanager": "12002010",
    "Gorse_Bunting": "12211221",
    "Heath_Shrike": "10112101",
    "Iris_Warbler": "21121201",
    "Juniper_Tit": "12020122",
}
SIDE = 128  # pixels of an image
ZOOM = 3  # images are drawn so many times as large, then reduced
LENGTH = (0.70, 0.97)  # the longer side of a bird over the side of the image
TILT = 60  # degrees, either way
ANGLES = {"head": (-35, 25), "tail": (-45, 80), "wing": (-15, 100), "leg": (-20, 20)}  # degrees
STRETCH = (0.7, 1.2)  # of tail and legs: so the pose moves the body about in its box
MAX_LEAVES = 13  # behind a bird
OCCLUDED = 0.35  # share of birds with two leaves in front
LIGHT = 0.12  # the brightness varies by so much, either way

# Night: the training view fills its corners with black. In a pale sky only training images would
# have black patches, and the class would be read from test images much worse.
PUPIL, SHADOW, WOOD = colours("#201e26", "#2c2a2e", "#342c24")
SKY = colours("#0a0c12", "#0e0e10", "#080c0e", "#0e0c12")
LEAVES = colours("#1e2c1a", "#28301c", "#2e2818", "#2c2216", "#182822", "#322e20")

# A bird looks right, and y points down. Its body is 2 long, with its centre at (0, 0).
JOINTS = {"body": (0, 0), "head": (0.62, -0.28), "wing": (0.42, -0.12)}
JOINTS |= {"tail": (-0.72, 0.02), "leg": (-0.03, 0.46)}
KEYPOINTS = {  # of each part: the joint with which it turns, and the point
    "beak": ("head", (1.6, -0.6)),
    "eye": ("head", (1.14, -0.58)),
    "crown": ("head", (0.98, -0.94)),
    "breast": ("body", (0.68, 0.1)),
    "wing": ("wing", (-0.18, -0.1)),
    "belly": ("body", (-0.16, 0.38)),
    "tail": ("tail", (-1.12, 0.02)),
    "leg": ("leg", (0, 0.88)),
}
# The shapes of a bird from back to front. A row: joint, colour, the look that has it ("-" for all
# birds), kind, then the numbers of one shape or of several. bar: x0 y0 x1 y1 width.
# oval: x y radius_x radius_y degrees. area: x y of each corner.
SHAPES = """
leg  leg         -       bar  -.22 .4 -.16 .84 .2 | -.16 .8 -.26 1.16 .16
leg  leg         -       bar  -.26 1.14 0 1.18 .09 | -.26 1.14 -.08 1.28 .09
leg  leg         -       bar  -.26 1.14 -.44 1.2 .09
leg  leg         -       bar  .16 .4 .22 .84 .2 | .22 .8 .12 1.16 .16
leg  leg         -       bar  .12 1.14 .38 1.18 .09 | .12 1.14 .3 1.28 .09 | .12 1.14 -.06 1.2 .09
tail tail        banded  area -.6 -.2  -1.6 -.24  -1.68 .02  -1.6 .28  -.6 .24
tail dark-tail   banded  bar  -.88 -.19 -.88 .23 .12 | -1.14 -.19 -1.14 .23 .12
tail dark-tail   banded  bar  -1.4 -.19 -1.4 .23 .12
tail tail        forked  area -.6 -.2  -1.65 -.46  -1.25 .02  -1.65 .5  -.6 .24
tail tail        tipped  area -.6 -.2  -1.5 -.42  -1.62 .02  -1.5 .46  -.6 .24
tail dark-tail   tipped  area -1.2 -.35  -1.5 -.42  -1.62 .02  -1.5 .46  -1.2 .39
head face        -       area .1 -.42  .75 -.9  1.25 -.4  .98 .25  .4 .3
body back        -       oval 0 0 1 .6 8
body belly       -       oval -.12 .28 .54 .3 6
body breast      -       oval .68 .1 .34 .44 -18
body dark-breast spotted oval .51 -.02 .06 .07 0 | .71 -.14 .06 .07 0 | .87 .02 .06 .07 0
body dark-breast spotted oval .67 .1 .06 .07 0 | .49 .22 .06 .07 0 | .81 .26 .06 .07 0
body dark-breast spotted oval .63 .37 .06 .07 0
body dark-breast barred  bar  .44 -.14 .92 -.06 .09 | .4 .06 .96 .14 .09 | .42 .26 .94 .34 .09
wing wing        -       area .46 -.14 .3 -.38 -.1 -.46 -.5 -.3 -.8 .08 -.45 .16 -.1 .22 .3 .12
wing faint-wing  bars    bar  .16 -.36 .06 .16 .1 | -.14 -.36 -.24 .16 .1
wing faint-wing  spots   oval .24 -.16 .08 .07 0 | .02 -.28 .08 .07 0 | .02 -.02 .08 .07 0
wing faint-wing  spots   oval -.22 -.16 .08 .07 0 | -.3 .05 .08 .07 0 | -.48 -.06 .08 .07 0
wing dark-wing   quills  bar  .1 -.28 -.55 -.11 .07 | .1 -.11 -.6 -.025 .07 | .1 .06 -.6 .06 .07
head face        -       oval 1 -.62 .46 .44 0
head beak        cone    area 1.36 -.84  1.9 -.56  1.36 -.4
head beak        needle  area 1.38 -.7  2.2 -.56  1.38 -.48
head beak        hook    area 1.34 -.84  1.72 -.78  1.86 -.58  1.8 -.32  1.66 -.52  1.36 -.42
head crown       crest   area .56 -.7 .2 -1.2 1.08 -1.09 1.28 -1 1.42 -.8 1.05 -.78
head crown       cap     area .56 -.7 .66 -.98 1.08 -1.09 1.28 -1 1.42 -.8 1.05 -.78
head crown     tufts area .56 -.7 .7 -1.34 .9 -1.14 1.08 -1.38 1.08 -1.09 1.28 -1 1.42 -.8 1.05 -.78
head eye         -       oval 1.14 -.58 .19 .19 0
head pupil       -       oval 1.15 -.58 .09 .09 0
"""


# ---- 1. Outlines, as arrays (n, 2) ---------------------------------------------------------------
def rotate(points, centre, degrees):
    angle = math.radians(degrees)
    cos = math.cos(angle)
    sin = math.sin(angle)
    return (points - np.array(centre)) @ ((cos, sin), (-sin, cos)) + centre


def oval(x, y, radius_x, radius_y, degrees, pointed=False):
    angle = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    cos = np.cos(angle)
    sin = np.sin(angle)
    if pointed:
        sin = sin * np.abs(sin)
    points = np.stack((x + radius_x * cos, y + radius_y * sin), axis=1)
    return rotate(points, (x, y), degrees)


def bar(x0, y0, x1, y1, width):
    across = np.array((y0 - y1, x1 - x0)) * width / 2 / math.hypot(x1 - x0, y1 - y0)
    start = (x0, y0)
    end = (x1, y1)
    return np.array((start + across, end + across, end - across, start - across))


def area(*numbers):
    return np.reshape(numbers, (-1, 2))


# ---- 2. One bird ---------------------------------------------------------------------------------
def draw_bird(species, rng):
    """A bird in a random pose: shapes, (outline (n, 2), colour) each, and key points (8, 2)."""
    looks, paint = [], {"pupil": PUPIL}
    for part, digit in zip(LOOKS, SPECIES[species]):
        look = list(LOOKS[part])[int(digit)]
        looks.append(look)
        paint[part] = colours(LOOKS[part][look])[0] * rng.uniform(0.92, 1.06)
        paint[f"dark-{part}"] = 0.75 * paint[part]
        paint[f"faint-{part}"] = 0.5 * paint[part] + 0.5 * SHADOW
    # A faint shade of a part lies between the parts, so that it is no concept of its own.
    paint["face"] = 0.45 * paint["crown"] + 0.55 * SHADOW
    paint["back"] = 0.45 * paint["wing"] + 0.55 * SHADOW
    angle = {joint: rng.uniform(*ANGLES[joint]) for joint in ANGLES}
    stretch = {"tail": (rng.uniform(*STRETCH), 1), "leg": (1, rng.uniform(*STRETCH))}

    def pose(joint, points):
        centre = JOINTS[joint]
        points = (points - np.array(centre)) * stretch.get(joint, 1) + centre
        return rotate(points, centre, angle.get(joint, 0))

    outline_of = {"oval": oval, "bar": bar, "area": area}
    shapes = []
    for row in SHAPES.strip().splitlines():
        joint, colour, look, kind, numbers = row.split(maxsplit=4)
        if look == "-" or look in looks:
            for shape in numbers.split("|"):
                outline = outline_of[kind](*np.array(shape.split(), float))
                shapes.append((pose(joint, outline), paint[colour]))
    keypoints = [pose(joint, [point]) for joint, point in KEYPOINTS.values()]
    return shapes, np.concatenate(keypoints)


# ---- 3. One image --------------------------------------------------------------------------------
def random_leaf(rng, x, y, side):
    """A dim leaf or twig with its centre at x, y: outline, colour."""
    degrees = rng.uniform(0, 360)
    length = side * rng.uniform(0.1, 0.22)
    shade = rng.uniform(0.7, 1.1)
    if rng.random() < 0.3:
        twig = bar(x - 2 * length, y, x + 2 * length, y, length / 8)
        return rotate(twig, (x, y), degrees), WOOD * shade
    colour = LEAVES[rng.integers(len(LEAVES))] * shade
    leaf = oval(x, y, length / 2, length / 6, degrees, pointed=True)
    return leaf, colour


def fill(draw, outline, colour, rim=0):
    """Fill one shape, with a darker rim of that width."""
    corners = outline.ravel().tolist()
    draw.polygon(corners, fill=tuple(colour.astype(int).tolist()))
    if rim:
        dark = (0.75 * colour).astype(int)
        draw.line(corners + corners[:2], fill=tuple(dark.tolist()), width=rim)


def place_bird(shapes, keypoints, side, rng):
    """Turn, mirror, scale and shift a bird into an image: outlines, key points, box."""
    tilt = rng.uniform(-TILT, TILT)
    mirror = (rng.choice((-1, 1)), 1)
    outlines = [rotate(outline, (0, 0), tilt) * mirror for outline, _ in shapes]
    corners = np.concatenate(outlines)
    low, high = corners.min(axis=0), corners.max(axis=0)
    size = high - low
    scale = side * rng.uniform(*LENGTH) / size.max()
    shift = rng.uniform(0, 1, 2) * (side - scale * size) - scale * low
    outlines = [outline * scale + shift for outline in outlines]
    keypoints = rotate(keypoints, (0, 0), tilt) * mirror * scale + shift
    return outlines, keypoints, np.concatenate((low * scale + shift, size * scale))


def draw_image(species, rng):
    """One bird: image (PIL), box (x, y, width, height), key points (8, 3) of x, y, visible."""
    side = SIDE * ZOOM
    shapes, keypoints = draw_bird(species, rng)
    outlines, keypoints, box = place_bird(shapes, keypoints, side, rng)

    sky = SKY[rng.integers(len(SKY), size=(4, 4))] * rng.uniform(0.95, 1.05, (4, 4, 1))
    image = Image.fromarray(sky.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(MAX_LEAVES + 1)):
        fill(draw, *random_leaf(rng, *rng.uniform(0, side, 2), side))
    if rng.random() < 0.7:  # a perch, between the first toes of both feet
        x, y = (outlines[2][0] + outlines[7][0]) / 2
        fill(draw, bar(x - side, y, x + side, y, side * 0.04), WOOD)
    for outline, (_, colour) in zip(outlines, shapes):
        fill(draw, outline, colour, rim=1)

    covered = Image.new("L", image.size)
    if rng.random() < OCCLUDED:
        for part in rng.integers(len(keypoints), size=2):
            x, y = keypoints[part] + rng.normal(0, side / 30, 2)
            outline, colour = random_leaf(rng, x, y, side)
            fill(draw, outline, colour, rim=1)
            ImageDraw.Draw(covered).polygon(outline.ravel().tolist(), fill=1)
    visible = []
    for x, y in keypoints.astype(int).tolist():
        around = covered.crop((x - 6, y - 6, x + 6, y + 6))
        visible.append(np.asarray(around).mean() < 0.5)

    light = rng.uniform(1 - LIGHT, 1 + LIGHT) * rng.uniform(0.95, 1.05, 3)  # brightness and tint
    slope = np.linspace(*rng.uniform(0.9, 1.1, 2), SIDE)[:, None, None]  # from top to bottom
    pixels = light * slope * np.asarray(image.reduce(ZOOM))
    pixels = pixels + rng.normal(0, 3, pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image, box / ZOOM, np.column_stack((keypoints / ZOOM, visible))


# ---- 4. All images -------------------------------------------------------------------------------
def draw(target, num_train=60, num_test=20):
    """Draw so many images of each species into a new folder."""
    classes = [f"{number:03d}.{name}" for number, name in enumerate(SPECIES, start=1)]
    images = []
    with layout.new_folder(target) as folder:
        for label, species in enumerate(SPECIES):
            (folder / "images" / classes[label]).mkdir(parents=True)
            for k in range(num_train + num_test):
                rng = np.random.default_rng((0, label + 1, k))
                image, box, keypoints = draw_image(species, rng)
                file = f"{classes[label]}/{k + 1:04d}.jpg"
                image.save(folder / "images" / file, quality=95)
                points = [(part, *point) for part, point in enumerate(keypoints.round(1))]
                row = dict(file=file, label=label, train=k < num_train)
                images.append(dict(row, box=box.round(1), points=points))
        layout.write_lists(folder, classes, list(LOOKS), images)


def main():
    parser = data.one_line_parser(description="Draw the toy birds.")
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    if args.target.exists():
        raise ValueError(f"{args.target} is there already")
    draw(args.target)
    print(f"{args.target}: 600 training and 200 test images")


if __name__ == "__main__":
    data.run_script(main)
