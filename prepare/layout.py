"""CUB's layout, as the scripts of this folder write it and data.py reads it.

A converter reads its release into a list of images, each a dict. Then convert() does the rest.

    source      path of the image
    file        where it goes, below TARGET/images/
    class_name  name of its class
    train       True for training, False for testing
    box         x, y, width, height in pixels, or None for the whole image
    points      rows of part, x, y, visible; parts are numbered from 0, x and y are in pixels
"""
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data


def converter_parser(name, release):
    """A parser with SOURCE and TARGET. release: what SOURCE holds."""
    parser = data.one_line_parser(description=f"Convert {name} to CUB's layout.")
    parser.add_argument("source", type=Path, help=f"a folder with {release}")
    parser.add_argument("target", type=unused_path, help="a new folder")
    return parser


def unused_path(target):
    if os.path.exists(target):
        raise FileExistsError(f"{target} is there already; remove it to convert again")
    return Path(target)


def require(path, release):
    """Return path. Raises OSError where the release lacks this file or folder."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; expected {release}")
    return path


def convert(args, parts, images, skipped):
    """Write args.target and print what it holds. skipped: a dict, what is left out -> how often."""
    with new_folder(args.target) as folder:
        for image in tqdm(images, desc="images", disable=None):
            place_image(image["source"], folder / "images" / image["file"], args.copy)
        write_and_check(folder, parts, images)
    print_summary(args.target, parts, images, skipped)


@contextlib.contextmanager
def new_folder(target):
    """Yield an empty folder that becomes `target` at the end: target is whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as parent:
        folder = Path(parent) / target.name
        folder.mkdir()
        yield folder
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, and its folder serves
                raise


def place_image(source, target, copy):
    """A hard link where the disk allows it, else a symbolic link, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # a copy would write through a link, into the release
        raise ValueError(f"{source}: another image has this name")
    if not copy:
        for link in (os.link, os.symlink):
            try:
                return link(source.resolve(), target)
            except OSError:
                pass
    shutil.copyfile(source, target)


def write_and_check(folder, parts, images):
    """Number the classes, write the lists and read them back."""
    classes = sorted({image["class_name"] for image in images})
    label_of = {name: label for label, name in enumerate(classes)}
    for image in images:
        image["label"] = label_of[image["class_name"]]
    write_lists(folder, classes, parts, images)
    check(folder, images)


def write_lists(folder, classes, parts, images):
    """Write the lists that data.read_cub reads. image["label"]: the number of its class, from 0."""
    files, labels, splits, boxes, points = [], [], [], [], []
    for image_id, image in enumerate(images, start=1):
        files.append((image_id, image["file"]))
        labels.append((image_id, image["label"] + 1))
        splits.append((image_id, int(image["train"])))
        if image["box"] is not None:
            boxes.append((image_id, *image["box"]))
        for part, x, y, visible in image["points"]:
            points.append((image_id, part + 1, x, y, visible))
    write_rows(folder / "images.txt", files)
    write_rows(folder / "image_class_labels.txt", labels)
    write_rows(folder / "train_test_split.txt", splits)
    write_rows(folder / "bounding_boxes.txt", boxes)
    write_rows(folder / "classes.txt", enumerate(classes, start=1))
    if parts:
        (folder / "parts").mkdir()
        write_rows(folder / "parts/parts.txt", enumerate(parts, start=1))
        write_rows(folder / "parts/part_locs.txt", points)


def write_rows(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            print(*row, file=file)


def check(folder, images):
    """Raise ValueError where data.py finds other labels or not as many visible key points."""
    for split in ("train", "test"):
        written = [image for image in images if image["train"] == (split == "train")]
        labels = [image["label"] for image in written]
        num_visible = sum(point[3] for image in written for point in image["points"])
        found = data.Images(folder, split, "box", 224)
        if found.labels.tolist() != labels or found.keypoints[..., 2].sum() != num_visible:
            raise ValueError(f"{folder}: what was written does not read back")
        found[0]  # opens an image


def print_summary(target, parts, images, skipped):
    classes = {image["class_name"] for image in images}
    print(f"{target}: {len(classes)} classes, {len(parts)} parts")
    for split, train in (("training", True), ("test", False)):
        chosen = [image for image in images if image["train"] == train]
        num_points = sum(len(image["points"]) for image in chosen)
        print(f"{len(chosen)} {split} images, {num_points} key points")
        lacking = sorted(classes - {image["class_name"] for image in chosen})
        if lacking:
            print(f"no {split} image of {', '.join(lacking)}")
    if parts:
        num_bare = sum(not image["points"] for image in images)
        print(f"{num_bare} images show no part")
    for what, count in skipped.items():
        if count:
            print(f"skipped {what}: {count}")
