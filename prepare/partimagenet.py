"""PartImageNet (He et al., ECCV 2022, arXiv 2112.00933), converted to CUB's layout.

    python prepare/partimagenet.py SOURCE TARGET         # link the images, or copy them
    python prepare/partimagenet.py SOURCE TARGET --copy  # copy the images
    python train.py --data TARGET

PartImageNet_Seg.zip (3.1 GB) is at https://huggingface.co/datasets/turkeyju/PartImageNet. SOURCE is
the folder in it that holds these two:

    SOURCE/annotations/train/train.json, SOURCE/annotations/test/test.json   # in COCO's format
    SOURCE/images/train/n01440764_10029.JPEG, SOURCE/images/test/n01440764_10194.JPEG

The release has 158 classes and about 24,000 images. All are ImageNet's, under its terms: research
and education without commerce. We found no licence of the annotations. The split val is not used.

A class is a synset of ImageNet. The key point of a part is the centroid of all that the image has
of it; it may lie beside a bent part. The box encloses the boxes of the parts; without parts it is
the whole image. Tested on small files in this format, not yet on the release itself.
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from prepare import layout

RELEASE = "PartImageNet_Seg.zip of huggingface.co/datasets/turkeyju/PartImageNet, unpacked"


def polygon_moments(polygon):
    """Area, area * centroid x, area * centroid y of a polygon [x0, y0, x1, y1, ...]: shoelace."""
    x, y = np.array(polygon, float).reshape(-1, 2).T
    next_x = np.roll(x, -1)
    next_y = np.roll(y, -1)
    cross = x * next_y - next_x * y
    area = cross.sum() / 2  # negative where the polygon is drawn the other way round
    moment_x = ((x + next_x) * cross).sum() / 6
    moment_y = ((y + next_y) * cross).sum() / 6
    return np.array((area, moment_x, moment_y)) * np.sign(area)


def annotation_moments(annotation):
    """The sum over its polygons. Some have only one or two points: then those of the box."""
    moments = np.zeros(3)
    if isinstance(annotation["segmentation"], list):
        for polygon in annotation["segmentation"]:
            moments += polygon_moments(polygon)
    if moments[0] < 1e-3:
        x, y, width, height = annotation["bbox"]
        centre = (x + width / 2, y + height / 2)
        moments = width * height * np.array((1, *centre))
    return moments


def convert_image(image, annotations, part_of):
    """Name, class, box and key points of one image, from its rows in COCO's format."""
    moments = np.zeros((len(part_of), 3))
    corners = []
    for annotation in annotations:
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
    name = image["file_name"].replace("\\", "/").split("/")[-1]
    class_name = name.split("_")[0]
    return dict(name=name, class_name=class_name, box=box, points=points)


def convert_annotations(content):
    """What a JSON in COCO's format holds: names of the parts, images, number of crowds."""
    parts = [category["name"] for category in content["categories"]]
    part_of = {category["id"]: part for part, category in enumerate(content["categories"])}
    annotations = {image["id"]: [] for image in content["images"]}
    num_crowds = 0
    for annotation in content["annotations"]:
        if annotation.get("iscrowd"):
            num_crowds += 1
        else:
            annotations[annotation["image_id"]].append(annotation)
    images = []
    for image in content["images"]:
        images.append(convert_image(image, annotations[image["id"]], part_of))
    return parts, images, num_crowds


def read_split(source, split):
    """convert_annotations of one split, with the file of each image."""
    path = source / "annotations" / split / f"{split}.json"
    layout.require(path, RELEASE)
    try:
        content = json.loads(path.read_bytes())
        parts, images, num_crowds = convert_annotations(content)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: not the annotations of {RELEASE} ({error!r})") from None
    for image in images:
        path = source / "images" / split / image["name"]
        image["source"] = layout.require(path, RELEASE).resolve()
        image["file"] = f"{image['class_name']}/{image['name']}"
        image["train"] = split == "train"
    return parts, images, num_crowds


def main():
    args = layout.converter_parser("PartImageNet", RELEASE).parse_args()
    parts, train_images, train_crowds = read_split(args.source, "train")
    test_parts, test_images, test_crowds = read_split(args.source, "test")
    classes = {image["class_name"] for image in train_images}
    unknown = sorted({image["class_name"] for image in test_images} - classes)
    if unknown or parts != test_parts:
        differ = f"test has other classes {unknown[:1]} or parts than train"
        raise ValueError(f"{args.source}: {differ}; expected {RELEASE}")
    skipped = {"annotations of crowds": train_crowds + test_crowds}
    layout.convert(args, parts, train_images + test_images, skipped)


if __name__ == "__main__":
    data.run_script(main)
