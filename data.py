"""Images for IVPT (ICLR 2026, arXiv 2503.06084): CUB-200-2011, toy birds, PartImageNet, any folder of classes.

    python data.py --data toy --sheet birds.png         # draw the toy birds, and a sheet of them
    python data.py --data cub --data-root DIR           # find CUB-200-2011, or download, verify and unpack it (1.1 GB)
    python data.py --data partimagenet --data-root DIR  # find PartImageNet, unpacked by you: see read_parts
    python data.py --data FOLDER                        # anything in CUB's layout, or FOLDER/train/CLASS/IMAGE and
                                                        # FOLDER/test/CLASS/IMAGE: see read_classes
"""
import argparse
import contextlib
import gzip
import hashlib
import http.client
import json
import math
import mmap
import os
import shutil
import sys
import tarfile
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

IMAGENET_MEAN, IMAGENET_STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
FRAME = 224                     # side of the frame in which the metrics place key points, whatever the image size
CACHE_BYTES = 3 << 29           # 1.5 GiB: the training images of full CUB are kept in memory at 224 px, not at 518
LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt", "classes.txt")
PART_LISTS = ("parts/parts.txt", "parts/part_locs.txt")
CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"
PARTS_URL = "https://huggingface.co/datasets/turkeyju/PartImageNet"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
CLASS_FOLDERS = "FOLDER/train/CLASS/IMAGE with FOLDER/test/CLASS/IMAGE (or val for test)"
WHOLE = (0, 0, np.inf, np.inf)  # the box of an image of which none is known


# ---- 1. Finding, fetching, unpacking ---------------------------------------------------------------------------------
def find(data, data_root=None):
    """-> the folder of `data`: "toy" is drawn at first use, "cub" downloaded, verified, unpacked, "partimagenet" only
    found. `data_root` (default ~/.cache/ivpt) is where it lies or will lie; or the CUB or PartImageNet folder itself.
    Any other `data` is a folder of yours, below `data_root` where that is given."""
    root = Path(data_root or "~/.cache/ivpt").expanduser()
    if data == "toy":                                       # other settings, another folder (another shape: another v)
        settings = TOY, TOY_SPECIES, TOY_LOOKS, *(colours.tolist() for colours in (PUPIL, CREAM, WOOD, SKY, LEAVES))
        folder = root / f"toy-v2-{zlib.crc32(repr(settings).encode()):08x}"
        return folder if not missing(folder, parts=True) else build(folder, draw_toy)
    if data == "partimagenet":
        if folder := next((place for place in (root, root / "PartImageNet") if part_json(place, "train")), None):
            return folder
        raise FileNotFoundError(f"--data partimagenet: {root}/PartImageNet/annotations/train/train.json is missing; not"
                                f" downloaded: fetch PartImageNet_Seg.zip from {PARTS_URL} and unpack it in {root}")
    if data != "cub":
        folder = Path(data_root or "").expanduser() / Path(data).expanduser()
        if not layout(folder):
            found = "has no train/ in it" if folder.is_dir() else "is no folder"
            raise ValueError(f"--data {data}: {folder} {found}; expected toy, cub, partimagenet, or {CLASS_FOLDERS}")
        return folder
    itself = any((root / name).exists() for name in (*LISTS, "images"))     # even half of one: nothing goes into it
    folder = root if itself else root / "CUB_200_2011"
    archive = root / "CUB_200_2011.tgz"
    lack = missing(folder, parts=archive.is_file())
    if not lack:
        return folder
    if folder.is_dir() and not archive.is_file():           # perhaps somebody's own subset: leave it alone
        raise FileNotFoundError(f"{folder}: {lack} is missing, half unpacked? Put {archive.name} into {root} to have "
                                "the folder mended, or remove the folder to have everything downloaded")
    download(CUB_URL, archive, md5=CUB_MD5)
    return build(folder, lambda temp: unpack(archive, temp, "CUB_200_2011/"))


def missing(folder, parts=False):
    """What a folder in CUB's layout lacks first, or "": one of the lists, or an image that images.txt names. parts: that
    it has no key points counts, too, and not only that parts.txt has none beside it."""
    wanted = LISTS + PART_LISTS if parts or (folder / PART_LISTS[0]).is_file() else LISTS
    lists = [name for name in wanted if not (folder / name).is_file()]
    images = () if lists else (f"images/{name}" for _, name in read_list(folder / "images.txt", 2))
    return lists[0] if lists else next((name for name in images if not os.path.isfile(f"{folder}/{name}")), "")


@contextlib.contextmanager
def locked(path):
    """One process at a time. The kernel takes the lock back from a killed process: none is ever stale."""
    import fcntl                                            # POSIX; elsewhere a data set already there can be read
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(f".{path.name}.lock"), "w")
    except OSError as error:
        raise OSError(f"{path.parent}: cannot write there ({error.strerror}); choose another --data-root (weights: "
                      "TORCH_HOME)") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(folder, fill):
    """fill(temp) makes the contents, which the first of many processes moves to `folder`, whole or not at all.
    A half folder is mended: files that it lacks, or has in another size, are put in; nothing else is touched."""
    temp = folder.with_name(f".{folder.name}.new")
    with locked(folder):
        if not missing(folder, parts=True):                 # another process was first
            return folder
        shutil.rmtree(temp, ignore_errors=True)             # what a killed process left
        try:
            temp.mkdir()
            fill(temp)
            if lack := missing(temp, parts=True):
                raise ValueError(f"{folder}: its source is not in CUB's layout, {lack} is missing")
            for file in (f for f in temp.rglob("*") if folder.exists() and f.is_file()):
                target = folder / file.relative_to(temp)
                if not target.is_file() or target.stat().st_size != file.stat().st_size:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, target)
            if not folder.exists():
                temp.rename(folder)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    return folder


def need_space(folder, size):
    if (free := shutil.disk_usage(folder).free) < size:
        raise ValueError(f"{folder}: {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB needed; make room, or choose another "
                         "--data-root (weights: TORCH_HOME)")


def unpack(archive, folder, prefix):
    """Plain files and folders only, `prefix` taken off their names: links, devices and ways out are refused."""
    def safe(member, path):
        if not (member.isfile() or member.isdir()):
            raise tarfile.SpecialFileError(member)
        return tarfile.data_filter(member.replace(name=member.name.removeprefix(prefix), deep=False), path)

    need_space(folder, 1.1 * archive.stat().st_size)        # JPEG files hardly shrink in an archive
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter=safe)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{archive}: not a sound archive ({error}); remove it to have it downloaded again") from None


def download(url, path, size=None, md5=None, load=None, attempts=4, pause=1.0):
    """Fetches `url` to `path` by way of path.part, which any later call resumes; checks size and MD5 where given, and
    that load(file), if any, raises no ValueError. A file that is there already is checked and kept. ValueError or
    OSError say what to put where by hand."""
    part = path.with_name(path.name + ".part")
    with locked(path):
        if path.is_file():
            if reason := flaw(path, size, md5, load):
                raise ValueError(f"{path}: {reason}; remove it to have it downloaded again")
            return path
        for attempt in range(attempts):
            try:
                fetch(url, part)
                if not (reason := flaw(part, size, md5, load)):
                    break
                code = 416                                  # a bad file is no better than a bad range: start afresh
            except (OSError, http.client.HTTPException) as error:
                reason, code = error, getattr(error, "code", 0)
            if code == 416:
                part.unlink(missing_ok=True)
            if attempt + 1 == attempts or code in (401, 403, 404, 410):
                raise OSError(f"{url}: {reason}; without internet, fetch it elsewhere and put it at {path}")
            time.sleep(pause * 2 ** attempt)
        os.replace(part, path)
        part.with_suffix(".etag").unlink(missing_ok=True)
    return path


def fetch(url, part):
    """Appends to `part` what it lacks, or begins again where the server ignores Range or has another file by now."""
    have, tag = part.stat().st_size if part.is_file() else 0, part.with_suffix(".etag")
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and tag.is_file():
        headers["If-Range"] = tag.read_text()
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as reply:
        have = have if reply.status == 206 else 0
        if (etag := reply.headers.get("ETag", "W/"))[:2] != "W/":           # a weak one does not tell bytes
            tag.write_text(etag)
        total = have + int(reply.headers.get("Content-Length") or 0)
        need_space(part.parent, total - have)
        with open(part, "ab" if have else "wb") as file, tqdm(
                desc=part.stem, total=total or None, initial=have, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            while block := reply.read(1 << 18):
                bar.update(file.write(block))
    if part.stat().st_size < total:
        raise ConnectionError(f"cut off after {part.stat().st_size} of {total} bytes")


def flaw(path, size, md5, load):
    """Why a file is not the one expected, or ""."""
    with open(path, "rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf\xfe\xff\0 \t\r\n")[:1] == b"<":                         # after any byte order mark
            return "a web page instead of the file (a proxy or a login?)"
        if size not in (None, path.stat().st_size):
            return f"{path.stat().st_size} bytes, expected {size}"
        file.seek(0)
        if md5 and (found := hashlib.file_digest(file, "md5").hexdigest()) != md5:
            return f"MD5 {found}, expected {md5}"
    if load:
        try:
            load(path)
        except ValueError as error:
            return str(error)
    return ""


# ---- 2. The toy birds ------------------------------------------------------------------------------------------------
# Ten made-up species in mist. Each part has a hue of its own, by which a ViT that saw 600 birds can tell it from others;
# its three looks differ in tone, pattern and shape. A digit picks the look, in the order of TOY_LOOKS. Each look belongs
# to three or four species, and any two species differ in five parts or more: no single part gives a species away.
TOY_SPECIES = {"Amber_Lark": "21202212", "Birch_Finch": "20110020", "Cinder_Jay": "01021110", "Dune_Wren": "00000221",
               "Elder_Thrush": "02222002", "Fern_Tanager": "12002010", "Gorse_Bunting": "12211221",
               "Heath_Shrike": "10112101", "Iris_Warbler": "21121201", "Juniper_Tit": "12020122"}
TOY_LOOKS = {"beak": ((244, 124, 24), (195, 99, 19), (255, 187, 62)),           # cone, needle, hook
             "eye": ((248, 248, 244), (198, 198, 195), (255, 255, 255)),        # the ring round the pupil
             "crown": ((214, 40, 48), (171, 32, 38), (255, 81, 91)),            # pointed crest, smooth cap, two tufts
             "breast": ((240, 206, 60), (192, 164, 48), (255, 255, 106)),       # spotted, plain, barred
             "wing": ((62, 104, 196), (49, 83, 156), (109, 161, 255)),          # pale bars, pale spots, dark quills
             "belly": ((146, 84, 200), (116, 67, 160), (214, 136, 255)),
             "tail": ((36, 160, 140), (28, 128, 112), (76, 231, 206)),          # banded, forked, dark-tipped
             "leg": ((110, 170, 30), (88, 136, 24), (169, 244, 69))}
TOY = dict(seed=0, train=60, test=20,                       # images of a species
           side=128, zoom=3,                                # pixels; supersampling
           length=(0.70, 0.97), tilt=60,                    # longer side of bird over image; degrees, either way
           head=(-35, 25), tail=(-45, 80), wing=(-15, 100), leg=(-20, 20),     # degrees in the joints, upwards positive
           stretch=(0.7, 1.2),                              # of tail and legs: pose moves the body about in its box
           clutter=14, occluded=0.35, light=0.12)           # leaves behind, at most; share with some in front; gain
PUPIL, CREAM, WOOD = np.array((32, 30, 38)), np.array((226, 220, 214)), np.array((204, 197, 186))
SKY = np.array([(212, 218, 222), (218, 220, 216), (208, 214, 214), (218, 214, 210)])
LEAVES = np.array([(190, 206, 176), (204, 212, 180), (214, 204, 172), (206, 190, 170), (184, 200, 190), (222, 212, 184)])


def rotate(points, centre, degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return (np.asarray(points, float) - centre) @ ((c, s), (-s, c)) + centre


def oval(x, y, rx, ry, degrees=0.0, pointed=0):
    """The outline of an ellipse, or of a leaf, as (36, 2) points."""
    angle = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    sin = np.sin(angle) * np.abs(np.sin(angle)) ** pointed
    return rotate(np.stack((x + rx * np.cos(angle), y + ry * sin), 1), (x, y), degrees)


def bar(x0, y0, x1, y1, width):
    """A straight band between two points, as a quadrangle."""
    across = np.array((y0 - y1, x1 - x0)) * width / 2 / math.hypot(x1 - x0, y1 - y0)
    return np.array(((x0, y0) + across, (x1, y1) + across, (x1, y1) - across, (x0, y0) - across))


def bird(code, rng):
    """-> one bird's shapes [(points (n, 2), colour)] from back to front, and its key points (8, 2).
    It looks right, y points down, its body is 2 long and on the origin; head, tail, wing and legs turn in joints."""
    look = dict(zip(TOY_LOOKS, map(int, code)))
    colour = {part: np.array(TOY_LOOKS[part][k]) * rng.uniform(0.92, 1.06) for part, k in look.items()}
    dark = {part: 0.75 * paint for part, paint in colour.items()}           # of patterns
    # What lies between the parts is a pale shade of one of them, and so no concept of its own.
    face, back = (0.45 * colour[part] + 0.55 * CREAM for part in ("crown", "wing"))
    joints = {"head": (.62, -.28), "tail": (-.72, .02), "wing": (.42, -.12), "leg": (-.03, .46), "body": (0, 0)}
    angle = {part: rng.uniform(*TOY[part]) for part in ("head", "tail", "wing", "leg")}
    stretch = {"tail": (rng.uniform(*TOY["stretch"]), 1), "leg": (1, rng.uniform(*TOY["stretch"]))}
    shapes = []

    def move(part, points):
        points = (np.asarray(points, float) - joints[part]) * stretch.get(part, 1) + joints[part]
        return rotate(points, joints[part], angle.get(part, 0))

    def add(part, paint, *outlines):
        shapes.extend((move(part, points), paint) for points in outlines)

    for x in (-.22, .16):
        add("leg", colour["leg"], bar(x, .4, x + .06, .84, .2), bar(x + .06, .8, x - .04, 1.16, .16), *(
            bar(x - .04, 1.14, x + a, 1.14 + b, .09) for a, b in ((.22, .04), (.14, .14), (-.22, .06))))
    end, spread, notch = ((-1.95, .24, -2.03), (-2, .46, -1.5), (-1.8, .42, -1.95))[look["tail"]]
    add("tail", colour["tail"], ((-.6, -.2), (end, -spread), (notch, .02), (end, spread + .04), (-.6, .24)))
    add("tail", dark["tail"], *([bar(x, -.19, x, .23, .14) for x in (-1.04, -1.36, -1.68)], (),
                        [((-1.5, -.35), (end, -spread), (notch, .02), (end, spread + .04), (-1.5, .39))])[look["tail"]])
    add("head", face, ((.1, -.42), (.75, -.9), (1.25, -.4), (.98, .25), (.4, .3)))                          # the neck
    add("body", back, oval(0, 0, 1, .6, 8))
    add("body", colour["belly"], oval(-.14, .27, .74, .3, 6))
    add("body", colour["breast"], oval(.68, .1, .34, .44, -18))
    add("body", dark["breast"], *([oval(.68 + x, .1 + y, .06, .07) for x, y in (
        (-.17, -.12), (.03, -.24), (.19, -.08), (-.01, 0), (-.19, .12), (.13, .16), (-.05, .27))], (),
        [bar(.68 - x, y, .68 + x, y + .08, .09) for x, y in ((.24, -.14), (.28, .06), (.26, .26))])[look["breast"]])
    add("wing", colour["wing"], ((.46, -.14), (.3, -.38), (-.1, -.46), (-.6, -.28), (-1.15, .1), (-.55, .16),
                                 (-.1, .22), (.3, .12)))
    pale = 0.5 * colour["wing"] + 0.5 * CREAM
    add("wing", (pale, pale, dark["wing"])[look["wing"]], *([bar(x, -.36, x - .1, .16, .1) for x in (.16, -.14)], [
        oval(x, y, .08, .07) for x, y in ((.24, -.16), (.02, -.28), (.02, -.02), (-.22, -.16), (-.3, .05), (-.5, -.1))],
        [bar(.1, y, -.75, y / 2 + .03, .07) for y in (-.28, -.11, .06)])[look["wing"]])
    add("head", face, oval(1, -.62, .46, .44))
    add("head", colour["beak"], (((1.36, -.84), (1.9, -.56), (1.36, -.4)), ((1.38, -.7), (2.2, -.56), (1.38, -.48)), (
        (1.34, -.84), (1.72, -.78), (1.86, -.58), (1.8, -.32), (1.66, -.52), (1.36, -.42)))[look["beak"]])
    crest = (((.2, -1.2),), ((.66, -.98),), ((.7, -1.34), (.9, -1.14), (1.08, -1.38)))[look["crown"]]
    add("head", colour["crown"], ((.56, -.7), *crest, (1.08, -1.09), (1.28, -1), (1.42, -.8), (1.05, -.78)))
    add("head", colour["eye"], oval(1.14, -.58, .19, .19))
    add("head", PUPIL, oval(1.15, -.58, .09, .09))
    return shapes, np.concatenate([move(*spot) for spot in (
        ("head", [(1.6, -.6), (1.14, -.58), (.98, -.94)]), ("body", [(.68, .1)]), ("wing", [(-.18, -.1)]),
        ("body", [(-.16, .38)]), ("tail", [(-1.35, .02)]), ("leg", [(0, .88)]))])


def greenery(rng, side, near=None):
    """A twig or a leaf anywhere, or close to the point `near`; pale, so that the mist is one background: (points, colour)."""
    x, y = rng.uniform(0, side, 2) if near is None else near + rng.normal(0, side / 30, 2)
    degrees, length, shade = rng.uniform(0, 360), side * rng.uniform(0.1, 0.22), rng.uniform(0.7, 1.1)
    if rng.random() < 0.3:
        return rotate(bar(x - 2 * length, y, x + 2 * length, y, length / 8), (x, y), degrees), WOOD * shade
    return oval(x, y, length / 2, length / 6, degrees, pointed=1), LEAVES[rng.integers(len(LEAVES))] * shade


def paint(draw, points, colour, rim=0):
    """One filled shape, with a darker rim of that width."""
    flat = points.ravel().tolist()
    draw.polygon(flat, fill=tuple(colour.astype(int).tolist()))
    if rim:
        draw.line(flat + flat[:2], fill=tuple((colour * 0.75).astype(int).tolist()), width=rim)


def toy_image(code, rng):
    """-> image (PIL), box (x, y, w, h) and keypoints (8, 3) of one bird of the species `code`."""
    zoom, side, (shapes, points) = TOY["zoom"], TOY["side"] * TOY["zoom"], bird(code, rng)
    tilt, mirror = rng.uniform(-TOY["tilt"], TOY["tilt"]), rng.choice((-1, 1))
    points, *outlines = (rotate(p, (0, 0), tilt) * (mirror, 1) for p in (points, *(outline for outline, _ in shapes)))
    low, high = (f(np.concatenate(outlines), 0) for f in (np.min, np.max))
    scale = side * rng.uniform(*TOY["length"]) / (high - low).max()
    shift = rng.uniform(0, 1, 2) * (side - scale * (high - low)) - scale * low
    points, *outlines = (p * scale + shift for p in (points, *outlines))
    box = np.concatenate((low * scale + shift, (high - low) * scale)) / zoom

    sky = SKY[rng.integers(len(SKY), size=(4, 4))] * rng.uniform(0.95, 1.05, (4, 4, 1))
    image = Image.fromarray(sky.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    draw, cover = ImageDraw.Draw(image), Image.new("L", image.size)
    for _ in range(rng.integers(TOY["clutter"])):
        paint(draw, *greenery(rng, side))
    if rng.random() < 0.7:                                  # a perch between the first toes of both feet
        x, y = (outlines[2][0] + outlines[7][0]) / 2
        paint(draw, bar(x - side, y, x + side, y, side * 0.04), WOOD)
    for (_, colour), outline in zip(shapes, outlines):
        paint(draw, outline, colour, rim=1)
    for part in rng.integers(len(points), size=2) if rng.random() < TOY["occluded"] else ():
        outline, colour = greenery(rng, side, near=points[part])
        paint(draw, outline, colour, rim=1)
        ImageDraw.Draw(cover).polygon(outline.ravel().tolist(), fill=1)
    seen = [np.asarray(cover.crop((x - 6, y - 6, x + 6, y + 6))).mean() < 0.5 for x, y in points.astype(int).tolist()]

    light = rng.uniform(1 - TOY["light"], 1 + TOY["light"]) * rng.uniform(0.95, 1.05, 3)                 # gain and tint
    light = light * np.linspace(*rng.uniform(0.9, 1.1, 2), TOY["side"])[:, None, None] * np.asarray(image.reduce(zoom))
    image = Image.fromarray((light + rng.normal(0, 3, light.shape)).clip(0, 255).astype(np.uint8))
    return image, box, np.column_stack((points / zoom, seen))


def draw_toy(folder):
    """Draws all birds into `folder`, in CUB's layout. A bird depends on the seed, its species and its number alone."""
    (folder / "parts").mkdir()
    lists = {name: [] for name in (*LISTS, "parts/part_locs.txt")}
    for c, (name, code) in enumerate(TOY_SPECIES.items(), 1):
        name = f"{c:03d}.{name}"
        (folder / "images" / name).mkdir(parents=True)
        lists["classes.txt"].append((c, name))
        for k in range(TOY["train"] + TOY["test"]):
            image, box, points = toy_image(code, np.random.default_rng((TOY["seed"], c, k)))
            file, key = f"{name}/{k + 1:04d}.jpg", len(lists["images.txt"]) + 1
            image.save(folder / "images" / file, quality=95)
            for table, row in zip(LISTS, ((file,), (c,), (int(k < TOY["train"]),), box.round(1))):
                lists[table].append((key, *row))
            lists["parts/part_locs.txt"] += [(key, m, *point.round(1)) for m, point in enumerate(points, 1)]
    lists["parts/parts.txt"] = enumerate(TOY_LOOKS, 1)
    for name, rows in lists.items():
        (folder / name).write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))


# ---- 3. Images: reading, resizing, normalising -----------------------------------------------------------------------
def read_image(path, upright=False):
    """-> an RGB PIL image of any file that Pillow reads; 16 bit scaled, transparency on white. upright: EXIF rotation
    applied, as viewers do. Without it pixels lie as stored, which is what annotations refer to."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file) if upright else file
            if image.mode[0] in "IF":                       # 16 bit or float: convert() would clip it at 255
                values = np.asarray(image)                  # floats end at 1 (2: overshoot of a resize), 255 or 65535
                scale = 1 / 256 if image.mode[0] == "I" or values.max() > 256 else 255 if values.max() <= 2 else 1
                image = Image.fromarray((scale * values).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:                              # Pillow's plugins raise a dozen kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a readable image ({reason}); expected a JPEG, PNG or the like") from None


def short_side(width, height, size):
    """The size of an image whose short side becomes `size`; the long one is rounded down, as in torchvision."""
    return max(size, size * width // height), max(size, size * height // width)


def resize_short(image, size):
    return image.resize(short_side(*image.size, size), Image.Resampling.BILINEAR)


def centre_crop(image, size):
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def test_points(points, size, S):
    """Points (M, 2) of an image of that size, width and height -> where its test view, S x S, shows them."""
    short = np.array(short_side(*size, S))
    return points * short / size - np.round((short - S) / 2)


def to_tensor(image):
    """PIL image -> (3, H, W) float32, as the pretrained ViTs expect it."""
    return normalize(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())


def normalize(image):
    """(..., 3, H, W) uint8 in 0..255 or float in 0..1 -> float with ImageNet's mean at 0 and deviation 1."""
    scale, image = (1, image) if image.is_floating_point() else (255, image.float())
    return image.sub(scale * IMAGENET_MEAN.to(image)).div_(scale * IMAGENET_STD.to(image))


def denormalize(image):
    """The way back, for pictures: (..., 3, H, W) normalised float -> uint8."""
    image = image.float()
    return (image * IMAGENET_STD.to(image) + IMAGENET_MEAN.to(image)).mul(255).round().clamp(0, 255).to(torch.uint8)


# ---- 4. The data set -------------------------------------------------------------------------------------------------
def read_list(path, columns):
    """Rows of that many fields; the last one keeps its spaces, as in "left wing"."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise FileNotFoundError(f"{path}: {reason}; a CUB folder holds {', '.join(LISTS)} and images/") from None
    rows = [line.split(maxsplit=columns - 1) for line in lines if line.strip()]
    if row := next((row for row in rows if len(row) != columns), None):
        raise ValueError(f"{path}: {len(row)} fields in {' '.join(row)[:60]!r}, not {columns}; unpack it again")
    return rows


def augmentation(width, height, size, rng):
    """A random 3x3 matrix from an image of width x height, its short side `size`, to its size x size training view.
    Flip, rotation up to +-90 degrees, shift up to 0.2 of the sides and scale 0.8 to 1.2 about the centre, random crop:
    one matrix, so that pixels are interpolated once and key points go the same way."""
    flip, angle, scale = rng.choice((-1, 1)), rng.uniform(-math.pi / 2, math.pi / 2), rng.uniform(0.8, 1.2)
    shift = rng.uniform(-0.2, 0.2, 2) * (width, height)
    corner = rng.integers(0, (width - size + 1, height - size + 1))
    cos, sin, centre = scale * math.cos(angle), scale * math.sin(angle), np.array((width / 2, height / 2))
    matrix = np.eye(3)
    matrix[:2, :2] = ((flip * cos, -sin), (flip * sin, cos))
    matrix[:2, 2] = centre + shift - corner - matrix[:2, :2] @ centre
    return matrix


def layout(folder):
    """The function that reads such a folder, seen from what it holds; None where there is none."""
    if part_json(folder, "train"):
        return read_parts
    if any((folder / name).exists() for name in LISTS):
        return read_cub
    return read_classes if (folder / "train").is_dir() else None


# Every reader: folder, training images or test? -> names of the C classes and of the M parts, boxes (n, 4) x, y, w, h
# and keypoints (n, M, 3) x, y, visible, both in pixels of the image, n files, n labels. It opens no image.


def read_cub(folder, train):
    """CUB-200-2011 (Wah et al. 2011), any subset of it, and whatever else has its layout."""
    if lack := missing(folder):
        raise FileNotFoundError(f"{folder}: {lack} is missing; unpack the data set again, or correct --data-root")
    images, classes_of, splits, boxes, classes = (
        {row[0]: row[1:] for row in read_list(folder / name, n)} for name, n in zip(LISTS, (2, 2, 2, 5, 2)))
    parts, points = folder / "parts" / "parts.txt", folder / "parts" / "part_locs.txt"
    parts = dict(read_list(parts, 2)) if parts.is_file() else {}
    label, part = ({key: k for k, key in enumerate(ids)} for ids in (classes, parts))
    try:
        keys = [key for key in images if (int(splits[key][0]) == 1) == train]
        labels = [label[classes_of[key][0]] for key in keys]
        rows = np.array([[float(value) for value in boxes[key]] for key in keys])                               # (n, 4)
        position, values = {key: i for i, key in enumerate(keys)}, np.zeros((len(keys), len(parts), 3))
        for key, m, x, y, visible in read_list(points, 5) if parts else ():
            if key in position:
                values[position[key], part[m]] = float(x), float(y), float(visible)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder}: its lists do not fit together or hold no number at {error}; "
                         "unpack the data set again") from None
    if not keys:
        raise ValueError(f"{folder}/train_test_split.txt: no image for {'training' if train else 'testing'}")
    for name, table in (("bounding_boxes.txt", rows), ("parts/part_locs.txt", values)):
        if not (np.abs(table) <= 1e5).all():                # nan is not, either
            raise ValueError(f"{folder / name}: holds nan or a number beyond 1e5; unpack the data set again")
    files = [folder / "images" / images[key][0] for key in keys]
    return [name for name, in classes.values()], list(parts.values()), rows, values, files, labels


def part_json(folder, split):
    """The annotations of a split of PartImageNet, in the place of its Seg or of its OOD release; None if in neither."""
    places = folder / "annotations" / split / f"{split}.json", folder / f"{split}.json"
    return next((path for path in places if path.is_file()), None)


def read_parts(folder, train):
    """PartImageNet (He et al., ECCV 2022, arXiv 2112.00933; github.com/TACJu/PartImageNet), or what has its layout.

    PartImageNet_Seg.zip (3.1 GB, at PARTS_URL) holds annotations/train/train.json, images/train/SYNSET_NUMBER.JPEG, the
    same for test and, not used here, val: 158 classes. The OOD release has train.json, train/SYNSET/*.JPEG and so on,
    but no class in two splits: it needs a train.json and a test.json that divide its training images instead.
    Not yet run on either: written after programs that read them, and tested on small files made in their format.

    Classes are ImageNet's synsets, the file names up to "_". A key point is the centroid of all that an image has of a
    part; it may lie beside a bent one. The box encloses the parts' own.
    """
    split = "train" if train else "test"
    known, path = part_json(folder, "train"), part_json(folder, split)
    if not path:
        raise FileNotFoundError(f"{folder}: test.json is missing, though {known} is there; unpack the release again")
    content, names = read_coco(path)
    synsets = [name.split("_")[0] for name in names]
    classes = sorted({name.split("_")[0] for name in (names if train else read_coco(known)[1])})
    if strangers := sorted(set(synsets) - set(classes)):
        raise ValueError(f"{path}: {len(strangers)} of its classes, {strangers[0]} the first, are not in {known}; in"
                         f" the OOD release splits share no class, take PartImageNet_Seg.zip from {PARTS_URL}")
    nested = path.parent == folder                          # the OOD release
    files = [folder / split / synset / name if nested else folder / "images" / split / name
             for synset, name in zip(synsets, names)]
    if lack := next((file for file in files if not os.path.isfile(file)), None):
        raise FileNotFoundError(f"{lack} is missing, which {path} names; unpack the release again")
    label = {name: c for c, name in enumerate(classes)}
    return classes, *part_points(path, content), files, [label[synset] for synset in synsets]


def read_coco(path):
    """-> what a JSON in COCO's format holds, and the plain file names of its images."""
    try:
        content = json.loads(path.read_bytes())
        names = [image["file_name"].replace("\\", "/").split("/")[-1] for image in content["images"]]
        if odd := next((name for name in names if "_" not in name), "" if names else "no image"):
            raise ValueError(f"{odd}, expected SYNSET_NUMBER.JPEG")
        return content, names
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not PartImageNet's annotations in COCO's format ({error}); unpack the release anew, "
                         "or, if the folder holds other data, move this file away") from None


def part_points(path, content):
    """-> names of the M parts, boxes (n, 4), keypoints (n, M, 3) of the n images of a JSON in COCO's format."""
    try:
        position, part = ({row["id"]: i for i, row in enumerate(content[key])} for key in ("images", "categories"))
        table = np.array([(position[a["image_id"]], part[a["category_id"]], *moments(a), *a["bbox"])
                          for a in content["annotations"] if not a.get("iscrowd")], float).reshape(-1, 9)
        names = [category["name"] for category in content["categories"]]
        if len(set(names)) < len(names):
            names = [f"{category['supercategory']} {category['name']}" for category in content["categories"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: an annotation does not fit at {error}; unpack the release again") from None
    if not np.isfinite(table).all() or (np.abs(table[:, 5:]) > 1e5).any():
        raise ValueError(f"{path}: holds nan or a number beyond 1e5; unpack the release again")
    n, (i, m) = len(content["images"]), table[:, :2].astype(int).T
    sums, low, high = np.zeros((n, len(names), 3)), np.full((n, 2), np.inf), np.full((n, 2), -np.inf)
    np.add.at(sums, (i, m), table[:, 2:5])
    np.minimum.at(low, i, table[:, 5:7])
    np.maximum.at(high, i, table[:, 5:7] + table[:, 7:])
    area = sums[..., :1]
    keypoints = np.concatenate((sums[..., 1:] / np.where(area > 0, area, 1), area > 0), 2)                  # (n, M, 3)
    return names, np.where(high[:, :1] > low[:, :1], np.hstack((low, high - low)), WHOLE), keypoints


def moments(annotation):
    """-> area, area x, area y of what the polygons of a COCO annotation enclose, by the shoelace formula. Where that is
    nothing, those of its bbox: the release has polygons of one or two points. So are those of RLE, which it has not."""
    sums, polygons = np.zeros(3), annotation["segmentation"]
    for polygon in polygons if isinstance(polygons, list) else ():
        x, y = np.array(polygon + polygon[:2], float).reshape(-1, 2).T                                      # closed
        cross = x[:-1] * y[1:] - x[1:] * y[:-1]             # the sign of its sum: which way round the polygon is drawn
        turn = np.array((cross.sum() / 2, (x[:-1] + x[1:]) @ cross / 6, (y[:-1] + y[1:]) @ cross / 6))
        sums += turn * np.sign(turn[0])
    if sums[0] < 1e-3:
        x, y, w, h = annotation["bbox"]
        sums = w * h * np.array((1, x + w / 2, y + h / 2))
    return sums


def read_classes(folder, train):
    """Any images, in a folder for each class: train/CLASS/IMAGE, and test/CLASS/IMAGE, or val/ where there is no test/.
    Classes are the folders of train/, by name; test/ may lack some. No parts and no boxes."""
    names = ("train",) if train else ("test", "val")
    split = next((folder / name for name in names if (folder / name).is_dir()), None)
    if not split:
        raise FileNotFoundError(f"{folder}: no test/ and no val/ beside its train/; expected {CLASS_FOLDERS}")
    classes, found = (sorted(entry.name for entry in os.scandir(place) if entry.is_dir() and entry.name[0] != ".")
                      for place in (folder / "train", split))
    if strangers := sorted(set(found) - set(classes)):
        raise ValueError(f"{split / strangers[0]}: no such class in {folder}/train; add it there, or remove the folder")
    files, labels = [], []
    for name in found:
        images = [image for image in sorted(os.listdir(split / name)) if image.lower().endswith(SUFFIXES)]
        images = [split / name / image for image in images if image[0] != "."]
        if not images:
            raise ValueError(f"{split / name}: holds no image, expected {', '.join(SUFFIXES)}; add some, or remove it")
        files.extend(images)
        labels.extend(len(images) * [classes.index(name)])
    if not files:
        raise ValueError(f"{split}: no folder in it; expected {CLASS_FOLDERS}")
    return classes, [], np.tile(WHOLE, (len(files), 1)), np.zeros((len(files), 0, 3)), files, labels


class Images(torch.utils.data.Dataset):
    """Images of a folder in any layout that layout() knows.

    view "train": short side resized, augmented, random crop.   "test": short side resized, centre crop.
    view "box": cropped to the bounding box and squashed, as the part metrics want it (Huang et al. 2023). Its corners
    are trunc(x), trunc(y), trunc(x + w), trunc(y + h), black beyond the image; the original program truncates x, y, w, h
    and the key points as it reads them and clips at the image: the same for CUB's whole numbers and boxes within it.
    Item: image (3, S, S) normalised float32, label, keypoints (M, 3) of x, y, visible, index. Key points are in pixels
    of the view, and of the metrics' 224 x 224 frame in "box". The augmentation is a function of (seed, epoch, index).
    """

    def __init__(self, folder, split, view, image_size, seed=0):
        if split not in ("train", "test") or view not in ("train", "test", "box"):
            raise ValueError(f"Images: split {split!r}, view {view!r}; expected train or test, and train, test or box")
        self.folder, self.view, self.image_size, self.seed = Path(folder), view, image_size, seed
        self.epoch = 0                                      # set it before the epoch's workers start
        reader = layout(self.folder) or read_cub            # which says what is missing
        self.classes, self.parts, boxes, keypoints, self.files, labels = reader(self.folder, split == "train")
        self.labels = torch.tensor(labels, dtype=torch.long)                                                    # (n,)
        self.boxes, self.keypoints = torch.from_numpy(boxes).float(), torch.from_numpy(keypoints).float()   # (n, M, 3)
        self.corners = np.trunc(np.hstack((boxes[:, :2], boxes[:, :2] + boxes[:, 2:])))      # (n, 4) x, y, x + w, y + h
        self._reserve()

    def _reserve(self):
        """Memory for the decoded training images, where they fit: 2.0 instead of 3.5 ms an image (CUB shrunk to a short
        side of 256, at 224 px, one core of an AMD EPYC); at 518 px it would be 7.6 instead of 8.2. The first worker to
        need an image decodes it; the pages are shared, so that the workers of later epochs, forked from this process,
        find it."""
        n, slot, self.cache = len(self.files), 6 * self.image_size ** 2, None         # untouched pages take no memory
        if self.view == "train" and 0.7 * n * slot <= CACHE_BYTES:            # images are 1.4 times as long as high
            self.cache = np.frombuffer(mmap.mmap(-1, n * slot), np.uint8).reshape(n, slot)
            self.sizes = np.frombuffer(mmap.mmap(-1, n * 16), np.int32).reshape(n, 4)     # original and stored w, h

    def __getstate__(self):                                 # workers that are spawned, not forked, read for themselves
        return {**self.__dict__, "cache": None}

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        index = range(len(self))[index]                     # IndexError where there is none
        return self.item(index, self._stored(index) if self.view == "train" else self.read(index))

    def read(self, index):
        """The image: as it is stored where a box refers to that, else the way up that a viewer shows it."""
        return read_image(self.files[index], upright=bool(self.boxes[index].isinf().any()))

    def item(self, index, image):
        """The item of an image that is decoded already: evaluate.py has two views of each."""
        points = self.keypoints[index].double().numpy()                                                        # (M, 3)
        image, points[:, :2] = getattr(self, f"_{self.view}_view")(index, image, points[:, :2])
        if self.view != "box":
            points[:, 2] *= ((points[:, :2] >= 0) & (points[:, :2] < self.image_size)).all(1)
        return to_tensor(image), int(self.labels[index]), torch.from_numpy(points).float(), index

    def _train_view(self, index, stored, points):
        S, (image, original) = self.image_size, stored
        size = np.array(short_side(*original, S))
        matrix = augmentation(*size, S, np.random.default_rng((self.seed, self.epoch, index)))
        inverse = np.linalg.inv(matrix @ np.diag((*size / image.size, 1)))
        image = image.transform((S, S), Image.Transform.AFFINE, inverse[:2].ravel(), Image.Resampling.BILINEAR)
        return image, points * size / original @ matrix[:2, :2].T + matrix[:2, 2]

    def _test_view(self, index, image, points):
        S = self.image_size
        return centre_crop(resize_short(image, S), S), test_points(points, image.size, S)

    def _box_view(self, index, image, points):
        S, (low, high) = self.image_size, self.corners[index].reshape(2, 2)
        high = np.where(np.isinf(high), image.size, np.maximum(high, low + 1))  # never empty; black beyond the image
        image = image.crop((*low.tolist(), *high.tolist())).resize((S, S), Image.Resampling.BILINEAR)
        return image, np.trunc(FRAME * (points - low) / (high - low))

    def _stored(self, index):
        """A training image before its augmentation, not larger than it needs to be, and its original size."""
        if self.cache is not None and self.sizes[index, 0]:
            W, H, w, h = self.sizes[index].tolist()
            return Image.frombuffer("RGB", (w, h), self.cache[index, :3 * w * h], "raw", "RGB", 0, 1), (W, H)
        image = self.read(index)
        original = image.size
        if min(original) > self.image_size:                 # smaller ones are enlarged by the augmentation's matrix
            image = resize_short(image, self.image_size)
        if self.cache is not None and (count := 3 * image.width * image.height) <= self.cache.shape[1]:
            self.cache[index, :count] = np.asarray(image).ravel()
            self.sizes[index] = *original, *image.size      # last: it marks the slot as filled
        return image, original


# ---- 5. The affine view of the equivariance loss ---------------------------------------------------------------------
def sample_affine(generator=None):
    """-> theta (2, 3), a random similarity T of the square [-1, 1]^2 that moves p to theta[:, :2] p + theta[:, 2]:
    rotation up to +-90 degrees, shift up to 0.11 of the side, scale 0.8 to 1.4."""
    turn, grow, x, y = (torch.rand(4, generator=generator).double() * 2 - 1).tolist()
    cos, sin = ((1.1 + 0.3 * grow) * f(turn * math.pi / 2) for f in (math.cos, math.sin))
    return torch.tensor(((cos, -sin, 0.22 * x), (sin, cos, 0.22 * y)))                  # the side of the square is 2


def unwarp(maps, theta):
    """T^-1 on maps (B, K, h, w): what lies at T(p) comes back to p. Bilinear, zeros from outside."""
    grid = F.affine_grid(theta.to(maps).expand(len(maps), 2, 3), maps.shape, align_corners=False)         # (B, h, w, 2)
    return F.grid_sample(maps, grid, align_corners=False)


def warp(images, theta):
    """T on images (B, C, H, W): what lies at p goes to T(p), hence sampled at T^-1. Bilinear, zeros from outside."""
    linear = torch.linalg.inv(theta[:, :2].double())
    return unwarp(images, torch.cat((linear, -linear @ theta[:, 2:].double()), 1))


def refuse(message):
    """In place of argparse's error(): one line, without the usage."""
    raise ValueError(f"{message}; --help lists the options")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="toy", help="toy, cub, partimagenet or a folder")
    parser.add_argument("--data-root", help="where it lies, or shall lie (default ~/.cache/ivpt)")
    parser.add_argument("--sheet", metavar="FILE", help="write a picture: three test images of each of ten classes")
    parser.error = refuse
    args = parser.parse_args()
    folder = find(args.data, args.data_root)
    train, test = (Images(folder, split, "test", 128) for split in ("train", "test"))
    parts = ", ".join(test.parts) or "none"
    print(f"{folder}: {len(train)} + {len(test)} images, {len(test.classes)} classes, parts: {parts}")
    if args.sheet:
        from torchvision.utils import save_image            # slow to import, and needed here alone
        rows = [(test.labels == c).nonzero()[:3, 0].tolist() for c in test.labels.unique()[:10]]
        images = torch.stack([denormalize(test[i][0]) for column in zip(*rows) for i in column])
        save_image(images / 255, args.sheet, nrow=len(rows))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
