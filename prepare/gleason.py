"""Gleason-2019 (Nir et al., Medical Image Analysis 2018), cut into tiles in CUB's layout.

    python prepare/gleason.py SOURCE TARGET             # tiles of 512 x 512 pixels
    python prepare/gleason.py SOURCE TARGET --tile 256  # smaller ones
    python train.py --data TARGET

The data is at https://gleason2019.grand-challenge.org, for those with an account there. We could
verify neither its licence nor its size: read the challenge's rules. Unpack it into one folder:

    SOURCE/Train_imgs/slide001_core003.jpg                       # a core; or "Train Imgs/"
    SOURCE/Maps1_T/slide001_core003_classimg_nonconvex.png       # by the first pathologist
    SOURCE/Maps2_T/ to Maps6_T/                                  # by others; each has some cores

A map says for each pixel 0 (background or unlabelled), 1 or 6 (benign), or 3, 4, 5 (the Gleason
grade). Of all maps of a core the most frequent value counts, and 0 where two are equally frequent.
Tissue is what then has a grade, benign included; the image's colours play no role.

Tiles overlap by half. A tile that is less than half tissue is empty. Its class is the grade that
covers at least half of its tissue; without such a grade it is mixed. Empty and mixed tiles are left
out. Every fourth core is for testing. The file names do not say which cores are of one patient, so
a patient may be in both splits. Tiles are new files (--copy has no effect) without boxes or parts.

A core of 5120 x 5120 with six maps takes 4 s, and 1.4 GB of memory. Tried on small files in this
format and on fields of another source, not on the release itself.
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
    """-> a dict from a core's image to its maps, all paths, and a Counter of what lacks either."""
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
    """A pathologist's map of a core -> its grades (H, W) uint8. shape: (H, W) of the core."""
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
    """Grades (H, W) of several pathologists -> the most frequent one at each pixel, at a tie 0."""
    winner = np.zeros_like(maps[0])
    most_votes = np.sum([grades == 0 for grades in maps], axis=0, dtype=np.uint8)
    for grade in CLASSES:
        votes = np.sum([grades == grade for grades in maps], axis=0, dtype=np.uint8)
        winner[votes == most_votes] = 0
        winner[votes > most_votes] = grade
        most_votes = np.maximum(most_votes, votes)
    return winner


def tile_class(grades):
    """Grades (tile, tile) -> the name of the tile's class, or "empty" or "mixed"."""
    areas = np.bincount(grades.ravel(), minlength=6)
    tissue = grades.size - areas[0]
    if tissue < grades.size / 2:
        return "empty"
    leading = np.flatnonzero(areas[1:] >= tissue / 2) + 1
    if len(leading) != 1:  # two grades may cover a half each
        return "mixed"
    return CLASSES[leading[0]]


def cut_core(path, map_paths, tile, folder):
    """Save the tiles of a core. -> their files and classes, and a Counter of those left out."""
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
            tiles.append(dict(file=file, class_name=class_name))
    return tiles, skipped


def main():
    parser = layout.converter_parser("Gleason-2019", RELEASE)
    parser.add_argument("--tile", type=int, default=512, help="side of a tile, pixels of the core")
    args = parser.parse_args()
    if args.tile < 2:
        raise ValueError(f"--tile {args.tile}: expected 2 or more")
    cores, skipped = find_cores(args.source)
    rows = []
    with layout.new_folder(args.target) as folder:
        cores_and_maps = tqdm(cores.items(), desc="cores", disable=None)
        for number, (path, map_paths) in enumerate(cores_and_maps):
            tiles, left_out = cut_core(path, map_paths, args.tile, folder / "images")
            skipped += left_out
            for tile in tiles:
                rows.append(dict(tile, train=number % 4 != 0, box=None, points=[]))
        if len({row["train"] for row in rows}) < 2:
            raise ValueError(f"{args.source}: its {len(cores)} cores have no tile for training or "
                             "none for testing; try a smaller --tile")
        layout.write_and_check(folder, [], rows)
    layout.print_summary(args.target, [], rows, skipped)
    for class_name, count in Counter(row["class_name"] for row in rows).items():
        print(f"{class_name}: {count} tiles")


if __name__ == "__main__":
    data.run_script(main)
