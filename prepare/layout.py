"""CUB's layout, as the scripts of this folder write it and data.py reads it."""
import contextlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data


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
    """Read a written folder through data.py, and print what it holds."""
    for split in ("train", "test"):
        expected = [image for image in images if image["train"] == (split == "train")]
        num_points = sum(point[3] for image in expected for point in image["points"])
        found = data.Images(folder, split, "box", data.FRAME)
        if len(found) != len(expected) or found.keypoints[..., 2].sum() != num_points:
            raise ValueError(f"{folder}: what was written does not read back")
        print(f"{split}: {len(found)} images, {num_points} key points")
