"""CUB's layout, as the scripts of this folder write it and data.py reads it."""
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
    """A parser with the options of every converter. release: what SOURCE is, for messages."""
    parser = data.one_line_parser(description=f"Convert {name} to CUB's layout.")
    parser.add_argument("source", type=Path, help=f"a folder with {release}")
    parser.add_argument("target", type=absent, help="a new folder")
    parser.add_argument("--copy", action="store_true", help="copy the images, do not link them")
    return parser


def absent(target):
    if os.path.exists(target):
        raise FileExistsError(f"{target} is there already; remove it to convert again")
    return Path(target)


def require(path, release):
    """Raises OSError where a file or folder of the release is missing."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; expected {release}")
    return path


def convert(args, parts, images, skipped):
    """Place all images into the new folder args.target, and describe them there.

    images: as write_lists has them, and also class_name, and source, the path of the file.
    skipped: a dict from what was left out to how often.
    """
    with new_folder(args.target) as folder:
        for image in tqdm(images, desc="images", disable=None):
            place_image(image["source"], folder / "images" / image["file"], args.copy)
        write_and_check(folder, parts, images)
    print_summary(args.target, parts, images, skipped)


def place_image(source, target, copy):
    """A hard link where the disk allows it, else a symbolic link, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # writing through a link would change the source
        raise ValueError(f"{source}: another image has this name")
    if not copy:
        for link in (os.link, os.symlink):
            try:
                return link(source, target)
            except OSError:
                pass
    shutil.copyfile(source, target)


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


@contextlib.contextmanager
def new_folder(target):
    """Yield an empty folder that becomes `target` at the end: target is whole or absent."""
    target = Path(target)
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


def write_and_check(folder, parts, images):
    """Number the classes, write the lists and read them back."""
    classes = sorted({image["class_name"] for image in images})
    label_of = {name: label for label, name in enumerate(classes)}
    for image in images:
        image["label"] = label_of[image["class_name"]]
    write_lists(folder, classes, parts, images)
    check(folder, images)


def write_lists(folder, classes, parts, images):
    """Write the lists of CUB's layout. Their ids count from 1.

    images: one dict for each image. file: its path below images/. label. train: for training or
    not. box: x, y, width, height, or None. points: rows of part, x, y, visible, for its parts.
    """
    names, labels, splits, boxes, points = [], [], [], [], []
    for image_id, image in enumerate(images, start=1):
        names.append((image_id, image["file"]))
        labels.append((image_id, image["label"] + 1))
        splits.append((image_id, int(image["train"])))
        if image["box"] is not None:
            boxes.append((image_id, *image["box"]))
        for part, x, y, visible in image["points"]:
            points.append((image_id, part + 1, x, y, visible))
    write_rows(folder / "images.txt", names)
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
            fields = [str(field) for field in row]
            file.write(" ".join(fields) + "\n")


def check(folder, images):
    """Read a written folder through data.py. Raises ValueError where it is not what was meant."""
    for split in ("train", "test"):
        expected = [image for image in images if image["train"] == (split == "train")]
        num_points = sum(point[3] for image in expected for point in image["points"])
        found = data.Images(folder, split, "box", data.FRAME)
        same_labels = found.labels.tolist() == [image["label"] for image in expected]
        if not same_labels or found.keypoints[..., 2].sum() != num_points:
            raise ValueError(f"{folder}: what was written does not read back")
        found[0]  # opens an image
