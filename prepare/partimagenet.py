"""PartImageNet (He et al., ECCV 2022, arXiv 2112.00933), converted to CUB's layout.

    python prepare/partimagenet.py SOURCE TARGET         # the images are linked, if possible
    python prepare/partimagenet.py SOURCE TARGET --copy  # the images are copied
    python train.py --data TARGET

Unpack PartImageNet_Seg.zip (3.1 GB, https://huggingface.co/datasets/turkeyju/PartImageNet). SOURCE
is the folder PartImageNet in it. The script reads these files:

    SOURCE/annotations/train/train.json, SOURCE/annotations/test/test.json   # in COCO's format
    SOURCE/images/train/n01440764_10029.JPEG, SOURCE/images/test/n01440764_10194.JPEG

It does not use the split val. PartImageNet_OOD.zip does not fit: its splits share no class.

With val the release has 158 classes, 40 parts and about 24,000 images. They come from ImageNet,
whose terms allow research and education without commerce. The annotations came without a licence,
as far as we found. Tested on small files in this format, not yet on the release itself.

An image's class is its synset in ImageNet. A key point is the centroid of all pieces of a part. It
may lie outside the part: beside a bent tail, or between the four feet of a quadruped, which are one
part. The box encloses all parts. An image without parts has no box.
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from prepare import layout

RELEASE = "PartImageNet_Seg.zip of huggingface.co/datasets/turkeyju/PartImageNet, unpacked"


def read_split(source, split):
    """The names of the parts, and the images of a split as layout.py describes them."""
    path = layout.require(source / "annotations" / split / f"{split}.json", RELEASE)
    try:
        content = json.loads(path.read_bytes())
        parts, images = convert_annotations(content)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: not the annotations of {RELEASE} ({error!r})") from None
    for image in images:
        file = source / "images" / split / image["name"]
        image["source"] = layout.require(file, RELEASE)
        image["file"] = f"{image['class_name']}/{image['name']}"
        image["train"] = split == "train"
    return parts, images


def convert_annotations(content):
    """The names of the parts and the images, from what a JSON in COCO's format holds."""
    parts = [category["name"] for category in content["categories"]]
    part_of = {category["id"]: part for part, category in enumerate(content["categories"])}
    annotations_of = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        annotations_of[annotation["image_id"]].append(annotation)
    images = []
    for image in content["images"]:
        name = image["file_name"].replace("\\", "/").split("/")[-1]
        row = convert_image(annotations_of[image["id"]], part_of)
        images.append(dict(row, name=name, class_name=name.split("_")[0]))
    return parts, images


def convert_image(annotations, part_of):
    """Box and key points of an image. A crowd is a mask over many objects: it is only counted."""
    moments = np.zeros((len(part_of), 3))
    corners = []
    num_crowds = 0
    for annotation in annotations:
        if annotation.get("iscrowd"):
            num_crowds += 1
            continue
        part = part_of[annotation["category_id"]]
        moments[part] += annotation_moments(annotation)
        x, y, width, height = annotation["bbox"]
        corners.append((x, y, x + width, y + height))
    points = []
    for part, (area, moment_x, moment_y) in enumerate(moments):
        if area > 0:
            points.append((part, moment_x / area, moment_y / area, 1))
    box = None
    if corners:
        x0, y0 = np.min(corners, axis=0)[:2]
        x1, y1 = np.max(corners, axis=0)[2:]
        box = (x0, y0, x1 - x0, y1 - y0)
    return dict(box=box, points=points, num_crowds=num_crowds)


def annotation_moments(annotation):
    """The sum over its polygons. If they enclose nothing (one or two points), its box counts."""
    moments = np.zeros(3)
    if isinstance(annotation["segmentation"], list):  # else a run-length code
        for polygon in annotation["segmentation"]:
            moments += polygon_moments(polygon)
    if moments[0] < 1e-3:  # square pixels
        x, y, width, height = annotation["bbox"]
        moments = width * height * np.array((1, x + width / 2, y + height / 2))
    return moments


def polygon_moments(polygon):
    """Area, area * centroid x, area * centroid y of [x0, y0, x1, y1, ...] (shoelace formula)."""
    x, y = np.array(polygon, float).reshape(-1, 2).T
    next_x = np.roll(x, -1)
    next_y = np.roll(y, -1)
    cross = x * next_y - next_x * y
    area = cross.sum() / 2  # negative where the polygon is drawn the other way round
    moment_x = ((x + next_x) * cross).sum() / 6
    moment_y = ((y + next_y) * cross).sum() / 6
    return np.array((area, moment_x, moment_y)) * np.sign(area)


def main():
    parser = layout.converter_parser("PartImageNet", RELEASE)
    parser.add_argument("--copy", action="store_true", help="copy the images, do not link them")
    args = parser.parse_args()
    parts, train_images = read_split(args.source, "train")
    test_parts, test_images = read_split(args.source, "test")
    if parts != test_parts:
        raise ValueError(f"{args.source}: test has other parts than train; expected {RELEASE}")
    train_classes = {image["class_name"] for image in train_images}
    for image in test_images:
        if image["class_name"] not in train_classes:
            raise ValueError(f"{image['source']}: train has no image of this class; "
                             f"expected {RELEASE}")
    images = train_images + test_images
    skipped = {"annotations of crowds": sum(image["num_crowds"] for image in images)}
    layout.convert(args, parts, images, skipped)


if __name__ == "__main__":
    data.run_script(main)
