"""PASCAL-Part (Chen et al., CVPR 2014, arXiv 1406.2031), converted to CUB's layout.

    pip install scipy
    python prepare/pascal_part.py SOURCE TARGET         # --copy: no links to the images
    python train.py --data TARGET

Unpack two archives into the folder SOURCE: the annotations (about 80 MB) from
http://roozbehm.info/pascal-parts/trainval.tar.gz, and the images of VOC 2010 (1.3 GB) from
http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar.

    SOURCE/Annotations_Part/2008_000002.mat                     # 10,103 of them
    SOURCE/VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg
    SOURCE/VOCdevkit/VOC2010/ImageSets/Main/train.txt, val.txt  # val.txt is for testing

We found no licence for the annotations. The images come from Flickr; the page of VOC has the terms.
Tried on eighteen images of the release, not on all.

Class, box and key points of an image are those of its object with the largest mask. A key point is
the centroid of a part's mask; it may lie outside a bent part. Some masks are a single pixel.

Parts keep their names: lwing and rwing are two parts, the heads of cats and dogs are one. Numbered
parts (wheel_1) have no fixed place. Rare parts (window_9) make consistency easier to reach: a few
hits of any one part are enough.

Classes without parts are left out, since no concept could be consistent there. In the release these
are boat, chair, sofa and table. --all-classes keeps them.
"""
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

try:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError
except ModuleNotFoundError:
    loadmat = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from prepare import layout

RELEASE = "PASCAL-Part's trainval.tar.gz and VOC 2010, unpacked"


def read_split(source, split):
    """The names of the images of a split."""
    path = source / "VOCdevkit/VOC2010/ImageSets/Main" / f"{split}.txt"
    return layout.require(path, RELEASE).read_text().split()


def convert_image(source, name, train):
    """Describe an image by its largest object, with centroids for points. None without object."""
    file = layout.require(source / "VOCdevkit/VOC2010/JPEGImages" / f"{name}.jpg", RELEASE)
    objects = read_objects(source / "Annotations_Part" / f"{name}.mat")
    areas = [np.count_nonzero(record["mask"]) for record in objects]
    if not any(areas):
        return None
    largest = objects[np.argmax(areas)]
    height, width = largest["mask"].shape
    with Image.open(file) as image:
        if image.size != (width, height):
            raise ValueError(f"{file} has {image.size} pixels, its mask {(width, height)}; "
                             f"expected {RELEASE}")
    class_name = largest["class"].item()
    return dict(source=file, file=f"{class_name}/{name}.jpg", class_name=class_name, train=train,
                box=bounding_box(largest["mask"]), centroids=part_centroids(largest["parts"]))


def read_objects(path):
    """The objects of an annotation, an array of records: class, mask, parts."""
    layout.require(path, RELEASE)
    try:
        return loadmat(path)["anno"]["objects"][0, 0].ravel()
    except (LookupError, MatReadError, NotImplementedError, OSError, TypeError, ValueError,
            zlib.error) as error:  # what loadmat raises for a damaged file
        raise ValueError(f"{path}: no annotation of PASCAL-Part ({error!r})") from None


def bounding_box(mask):
    """x, y, width, height."""
    y, x = np.nonzero(mask)
    return x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1


def part_centroids(parts):
    """A dict from the name of a part to x, y, from records of part_name and mask."""
    masks = {}
    for part in parts.ravel():
        name = part["part_name"].item()
        mask = part["mask"] > 0
        if name in masks:
            mask = mask | masks[name]
        masks[name] = mask
    return {name: centroid(mask) for name, mask in masks.items() if mask.any()}


def centroid(mask):
    """x, y in pixels. Pixel 0 reaches from 0 to 1."""
    y, x = np.nonzero(mask)
    return x.mean() + 0.5, y.mean() + 0.5


def leave_out_classes(images, skipped):
    """The images of those classes that have parts. Counts the others in `skipped`."""
    classes_with_parts = {image["class_name"] for image in images if image["centroids"]}
    kept = []
    for image in images:
        if image["class_name"] in classes_with_parts:
            kept.append(image)
        else:
            skipped[f"images of {image['class_name']}, a class without parts"] += 1
    return kept


def main():
    parser = layout.converter_parser("PASCAL-Part", RELEASE)
    parser.add_argument("--copy", action="store_true", help="copy the images, do not link them")
    parser.add_argument("--all-classes", action="store_true", help="keep classes without parts")
    args = parser.parse_args()
    if loadmat is None:
        raise ValueError("PASCAL-Part's annotations are read by scipy: pip install scipy")

    train_of = dict.fromkeys(read_split(args.source, "train"), True)
    train_of.update(dict.fromkeys(read_split(args.source, "val"), False))
    images = []
    skipped = Counter()
    for name, train in tqdm(train_of.items(), desc="annotations", disable=None):
        image = convert_image(args.source, name, train)
        if image is None:
            skipped["images without an object"] += 1
        else:
            images.append(image)
    if not args.all_classes:
        images = leave_out_classes(images, skipped)

    parts = sorted({name for image in images for name in image["centroids"]})
    for image in images:
        image["points"] = []
        for name, (x, y) in image["centroids"].items():
            image["points"].append((parts.index(name), x, y, 1))
    layout.convert(args, parts, images, skipped)


if __name__ == "__main__":
    data.run_script(main)
