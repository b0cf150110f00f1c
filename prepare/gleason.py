"""Gleason-2019 (Nir et al., Medical Image Analysis 2018), cut into tiles in CUB's layout.

    python prepare/gleason.py SOURCE TARGET             # tiles of 512 x 512 pixels
    python prepare/gleason.py SOURCE TARGET --tile 256  # smaller ones
    python train.py --data TARGET

The data is at https://gleason2019.grand-challenge.org, for those with an account there. We could
verify neither its licence nor its size: read the challenge's rules. Unpack it into one folder:

    SOURCE/Train_imgs/slide001_core003.jpg                       # a core; or "Train Imgs/"
    SOURCE/Maps1_T/slide001_core003_classimg_nonconvex.png       # by the first pathologist
    SOURCE/Maps2_T/ to Maps6_T/                                  # by others; each has some cores

A map gives each pixel 0 (background or unlabelled), 1 (benign), or its Gleason grade 3, 4, 5. Some
have 6, which Foucart et al. (SIPAIM 2021) call a mistake for 1. They also list maps with outlines
that were not closed; we do not mend those. A pixel gets the most frequent value of its core's maps,
and 0 at a tie. Tissue is every pixel that then is not 0; the image's colours play no role.

Tiles overlap by half. A tile that is less than half tissue is empty. The class of any other is the
grade that covers at least half of its tissue. Where none does, or two do, the tile is mixed. Empty
and mixed tiles are left out. No tile has a box or parts.

The test images of the release have no maps, so every fourth core is for testing. The file names do
not say which cores are of one patient: a patient may be in both splits.

A core of 5120 x 5120 pixels with six maps takes 4 s, 1.4 GB of memory, up to 60 MB of disk. Tried
on small files in this format and on fields of another source, not on the release itself.
"""
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from prepare import layout

RELEASE = "Gleason-2019, unpacked: Train_imgs/*.jpg and Maps1_T/ to Maps6_T/"
MAP_SUFFIX = "_classimg_nonconvex.png"
CLASSES = {1: "benign", 3: "grade3", 4: "grade4", 5: "grade5"}


def find_cores(source):
    """A dict from each core's image to its maps, all paths, and a Counter of what is skipped."""
    folder = source / "Train_imgs"
    if not folder.exists() and (source / "Train Imgs").exists():
        folder = source / "Train Imgs"
    images = sorted(layout.require(folder, RELEASE).glob("*.jpg"))
    maps_of = {}
    for path in sorted(source.glob(f"Maps[1-6]_T/*{MAP_SUFFIX}")):
        name = path.name.removesuffix(MAP_SUFFIX)
        maps_of.setdefault(name, []).append(path)
    cores = {path: maps_of.pop(path.stem) for path in images if path.stem in maps_of}
    if not cores:
        raise FileNotFoundError(f"{source}: no core with a map; expected {RELEASE}")
    skipped = Counter()
    skipped["cores without a map"] = len(images) - len(cores)
    skipped["cores without an image"] = len(maps_of)
    return cores, skipped


def read_map(path, shape):
    """The grades (H, W) uint8 of a map; benign is 1. shape: (H, W) of its core."""
    values = np.asarray(data.read_image(path).getchannel(0))
    if values.shape != shape:
        raise ValueError(f"{path} has {values.shape} pixels, its core {shape}")
    grades = np.where(values == 6, 1, values)
    unknown = ~np.isin(grades, (0, *CLASSES))
    if unknown.any():
        found = values[unknown][0]
        raise ValueError(f"{path}: value {found}, expected 0, 1, 3, 4, 5 or 6 as in {RELEASE}")
    return grades


def majority(maps):
    """The most frequent grade at each pixel of the maps, arrays (H, W). It is 0 at a tie."""
    winner = np.zeros_like(maps[0])
    most_votes = np.sum([grades == 0 for grades in maps], axis=0, dtype=np.uint8)
    for grade in CLASSES:
        votes = np.sum([grades == grade for grades in maps], axis=0, dtype=np.uint8)
        winner[votes == most_votes] = 0
        winner[votes > most_votes] = grade
        most_votes = np.maximum(most_votes, votes)
    return winner


def tile_class(grades):
    """The name of a tile's class, or "empty" or "mixed", from its grades (tile, tile)."""
    areas = np.bincount(grades.ravel(), minlength=6)
    tissue = grades.size - areas[0]
    if tissue < grades.size / 2:
        return "empty"
    leading = [grade for grade in CLASSES if areas[grade] >= tissue / 2]
    if len(leading) != 1:
        return "mixed"
    return CLASSES[leading[0]]


def cut_core(path, map_paths, tile, folder):
    """Save the tiles of a core. Returns their files and classes, and a Counter of the others."""
    core = data.read_image(path)
    shape = core.height, core.width
    grades = majority([read_map(map_path, shape) for map_path in map_paths])
    tiles = []
    skipped = Counter()
    for y in range(0, core.height - tile + 1, tile // 2):
        for x in range(0, core.width - tile + 1, tile // 2):
            class_name = tile_class(grades[y:y + tile, x:x + tile])
            if class_name in ("empty", "mixed"):
                skipped[f"{class_name} tiles"] += 1
                continue
            (folder / class_name).mkdir(parents=True, exist_ok=True)
            file = f"{class_name}/{path.stem}_y{y:04d}_x{x:04d}.jpg"
            picture = core.crop((x, y, x + tile, y + tile))
            picture.save(folder / file, quality=95)
            tiles.append((file, class_name))
    return tiles, skipped


def main():
    parser = layout.converter_parser("Gleason-2019", RELEASE)
    parser.add_argument("--tile", type=int, default=512, help="side of a tile in pixels")
    args = parser.parse_args()
    if args.tile < 2:
        raise ValueError(f"--tile {args.tile}: expected 2 or more")
    cores, skipped = find_cores(args.source)
    images = []
    with layout.new_folder(args.target) as folder:
        cores_and_maps = tqdm(cores.items(), desc="cores", disable=None)
        for number, (path, map_paths) in enumerate(cores_and_maps):
            tiles, left_out = cut_core(path, map_paths, args.tile, folder / "images")
            skipped += left_out
            train = number % 4 != 0
            for file, name in tiles:
                row = dict(file=file, class_name=name, train=train, box=None, points=[])
                images.append(row)
        if len({image["train"] for image in images}) < 2:
            raise ValueError(f"{args.source}: its {len(cores)} cores have no tile for training or "
                             "none for testing; try a smaller --tile")
        layout.write_and_check(folder, [], images)
    layout.print_summary(args.target, [], images, skipped)
    for class_name, count in Counter(image["class_name"] for image in images).items():
        print(f"{class_name}: {count} tiles")


if __name__ == "__main__":
    data.run_script(main)
