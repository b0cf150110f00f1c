"""PASCAL-Part (Chen et al., CVPR 2014, arXiv 1406.2031), converted to CUB's layout.

    python prepare/pascal_part.py SOURCE TARGET         # link the images, or copy them
    python prepare/pascal_part.py SOURCE TARGET --copy  # copy the images
    python train.py --data TARGET

It needs scipy (pip install scipy). SOURCE is a folder in which two archives were unpacked:
http://roozbehm.info/pascal-parts/trainval.tar.gz, and VOC 2010 (1.3 GB) from
http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar.

    SOURCE/Annotations_Part/2008_000002.mat                     # 10,103 of them
    SOURCE/VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg
    SOURCE/VOCdevkit/VOC2010/ImageSets/Main/train.txt, val.txt  # val.txt is for testing

We found no licence for the annotations. The images come from Flickr; the page of VOC has the terms.
We did not see the first archive's size. Tried on eighteen images of the release, not on all.

An image has the class, the box and the key points of its largest object. A key point is the
centroid of a part's mask; it may lie beside a bent part. Names of parts stay as they are: lwing and
rwing are two parts, the heads of cats and dogs are one. Numbers (wheel_1) mean no fixed place, and
a part that few images show (window_9) makes consistency easier to reach.

Classes without parts are left out, since no concept could be consistent there: in the release boat,
chair, sofa and table. --all-classes keeps them.
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


def read_objects(path):
    """The objects of an annotation, an array of records: class, mask, parts."""
    layout.require(path, RELEASE)
    try:
        return loadmat(path)["anno"]["objects"][0, 0].ravel()
    except (MatReadError, zlib.error, OSError, LookupError, TypeError, ValueError,
            NotImplementedError) as error:  # all that loadmat raises for a damaged file
        raise ValueError(f"{path}: no annotation of PASCAL-Part ({error!r})") from None


def centroid(mask):
    """x, y in pixels. Pixel 0 reaches from 0 to 1."""
    y, x = np.nonzero(mask)
    return x.mean() + 0.5, y.mean() + 0.5


def bounding_box(mask):
    """x, y, width, height."""
    y, x = np.nonzero(mask)
    return x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1


def part_centroids(parts):
    """Records of part_name and mask -> a dict of the centroids. Some masks are empty."""
    masks = {}
    for part in parts.ravel():
        name = part["part_name"].item()
        masks[name] = masks.get(name, False) | (part["mask"] > 0)
    return {name: centroid(mask) for name, mask in masks.items() if mask.any()}


def read_image(source, name, train):
    """What is known of one image, by its largest object. None where it has no object."""
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
    return dict(source=file.resolve(), file=f"{class_name}/{name}.jpg", train=train,
                class_name=class_name, box=bounding_box(largest["mask"]),
                centroids=part_centroids(largest["parts"]))


def main():
    parser = layout.converter_parser("PASCAL-Part", RELEASE)
    parser.add_argument("--all-classes", action="store_true",
                        help="keep the classes without parts, too")
    args = parser.parse_args()
    if loadmat is None:
        raise ValueError("PASCAL-Part's annotations are read by scipy: pip install scipy")

    train_of = {}
    for split in ("train", "val"):
        path = args.source / "VOCdevkit/VOC2010/ImageSets/Main" / f"{split}.txt"
        names = layout.require(path, RELEASE).read_text().split()
        train_of.update(dict.fromkeys(names, split == "train"))
    images = []
    skipped = Counter()
    for name, train in tqdm(train_of.items(), desc="annotations", disable=None):
        image = read_image(args.source, name, train)
        if image is None:
            skipped["images without an object"] += 1
        else:
            images.append(image)

    classes = {image["class_name"] for image in images}
    with_parts = {image["class_name"] for image in images if image["centroids"]}
    if not args.all_classes:
        for name in sorted(classes - with_parts):
            kept = [image for image in images if image["class_name"] != name]
            skipped[f"images of {name}, a class without parts"] = len(images) - len(kept)
            images = kept
    parts = sorted({name for image in images for name in image["centroids"]})
    part_of = {name: part for part, name in enumerate(parts)}
    for image in images:
        image["points"] = []
        for name, (x, y) in image["centroids"].items():
            image["points"].append((part_of[name], x, y, 1))
    layout.convert(args, parts, images, skipped)


if __name__ == "__main__":
    data.run_script(main)
