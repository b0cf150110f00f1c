"""Tests of the scripts in prepare/: what they write reads back through data.py as it should."""
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model as ivpt
from prepare import layout, partimagenet, toy_birds, toy_vit


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


# ---- the toy birds -------------------------------------------------------------------------------
def test_no_part_gives_a_species_away():
    codes = np.array([[int(digit) for digit in code] for code in toy_birds.SPECIES.values()])
    assert codes.shape == (10, len(toy_birds.LOOKS)) == (10, 8)
    for column in codes.T:
        assert np.bincount(column, minlength=3).min() >= 3  # each look: three species or more
    pairs = itertools.combinations(codes, 2)
    assert min((first != second).sum() for first, second in pairs) >= 5


def test_toy_is_drawn_once_in_cubs_layout_and_the_same_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy_birds, "ZOOM", 1)  # nine times as fast
    real_draw = toy_birds.draw
    monkeypatch.setattr(toy_birds, "draw", lambda target: real_draw(target, 3, 2))
    first = data.find("toy", tmp_path)
    run(monkeypatch, toy_birds, tmp_path / "second")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 50 + 7
    for file in files:
        assert (first / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    for split, count in (("train", 3), ("test", 2)):
        birds = data.Images(first, split, "test", 128)
        assert birds.parts == list(toy_birds.LOOKS)
        assert birds.labels.bincount().tolist() == [count] * 10
        x, y, w, h = birds.boxes.T[..., None]
        u, v, visible = birds.keypoints.unbind(-1)
        assert ((u > x) & (u < x + w) & (v > y) & (v < y + h)).all()  # parts lie in the box
        assert (birds.boxes[:, :2] >= 0).all()  # and the box in the image
        assert (birds.boxes[:, :2] + birds.boxes[:, 2:] <= 128.1).all()
        assert 0.8 < visible.mean() < 1  # leaves hide some
    monkeypatch.setattr(toy_birds, "draw", lambda target: pytest.fail("drawn twice"))
    assert data.find("toy", tmp_path) == first
    with pytest.raises(ValueError, match="second is there already"):
        run(monkeypatch, toy_birds, tmp_path / "second")


def test_toy_key_points_lie_on_their_parts(monkeypatch):
    monkeypatch.setattr(toy_birds, "OCCLUDED", 0)
    monkeypatch.setattr(toy_birds, "LIGHT", 0)
    for label, (species, code) in enumerate(toy_birds.SPECIES.items()):
        image, _, keypoints = toy_birds.draw_image(species, np.random.default_rng((label, 1)))
        pixels = np.asarray(image).astype(float)
        for looks, digit, (x, y, visible) in zip(toy_birds.LOOKS.values(), code, keypoints):
            rows = slice(max(0, round(y) - 5), round(y) + 5)
            columns = slice(max(0, round(x) - 5), round(x) + 5)
            colour = toy_birds.colours(list(looks.values())[int(digit)])
            difference = np.abs(pixels[rows, columns].reshape(-1, 3) - colour).max(axis=1)
            assert visible and difference.min() < 60  # tint, slope and shade


def test_toy_place_alone_is_not_enough(monkeypatch):
    """In the box's frame no fixed spot is within the metric's 36 pixels of a part too often."""
    monkeypatch.setattr(toy_birds, "ZOOM", 1)
    frames = []
    for i, species in zip(range(300), itertools.cycle(toy_birds.SPECIES)):
        _, box, keypoints = toy_birds.draw_image(species, np.random.default_rng((5, i)))
        frames.append(224 * (keypoints[:, :2] - box[:2]) / box[2:])
    frames = np.stack(frames)  # (300, 8 parts, 2)
    assert frames.min() >= 0 and frames.max() <= 224
    beak, crown, tail, leg = frames[:, [0, 2, 6, 7]].transpose(1, 2, 0)
    (x, y), (u, v) = beak - tail, leg - crown
    assert 0.4 < (x * v > y * u).mean() < 0.6  # as many look left; 3.5 deviations of a coin
    axis = np.arange(8, 224, 16)
    spots = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 1, 1, 2)
    hits = (np.abs(frames - spots) <= 36).all(axis=-1).mean(axis=1)  # (196 spots, 8 parts)
    assert hits.max() < 0.85 and np.median(hits.max(axis=0)) < 0.5


def test_the_toy_vit_learns_species_and_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_birds, "ZOOM", 1)
    toy_birds.draw(tmp_path / "birds", num_train=8, num_test=1)
    dataset = data.Images(tmp_path / "birds", "train", "train", 56)
    backbone = ivpt.load_backbone("toy", 56)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    errors, mse_loss = [], F.mse_loss

    def watched(drawn, pixels):
        errors.append(mse_loss(drawn, pixels))
        return errors[-1]

    monkeypatch.setattr(F, "mse_loss", watched)
    toy_vit.pretrain(backbone, dataset, 6, torch.device("cpu"), amp=False)
    unmoved = {name for name, p in backbone.named_parameters() if torch.equal(p, before[name])}
    assert unmoved == {"mask_token"}
    assert len(errors) == 6 * 5 and sum(errors[-5:]) < 0.8 * sum(errors[:5])


def test_a_failing_script_leaves_nothing_and_a_second_one_takes_the_folder_of_the_first(tmp_path):
    with pytest.raises(RuntimeError):
        with layout.new_folder(tmp_path / "new") as folder:
            (folder / "half").write_text("")
            raise RuntimeError
    assert not list(tmp_path.iterdir())
    with layout.new_folder(tmp_path / "new") as second:
        with layout.new_folder(tmp_path / "new") as first:
            (first / "file").write_text("first")
        (second / "file").write_text("second")
    assert (tmp_path / "new/file").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


# ---- PartImageNet --------------------------------------------------------------------------------
def rectangle(x, y, width, height, backwards=False):
    corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    if backwards:
        corners.reverse()
    return [value for corner in corners for value in corner]


def write_release(folder):
    """Two synsets; each image has a head of two pieces and a body bent as an L, but no tail."""
    names = ((9, "Bird Tail"), (7, "Bird Head"), (5, "Bird Body"))
    categories = [dict(id=key, name=name) for key, name in names]
    pieces = [rectangle(20, 4, 4, 5), rectangle(25, 4, 4, 2, backwards=True)]
    body = [8, 18, 28, 18, 28, 22, 14, 22, 14, 34, 8, 34]
    for split, count in (("train", 3), ("test", 2)):
        images, annotations = [], []
        for i, synset in itertools.product(range(count), ("n02", "n01")):
            key = 40 - len(images)
            file = folder / "images" / split / f"{synset}_{i}{split}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (60, 48)).save(file)
            images.append(dict(id=key, file_name=file.name))
            head = dict(category_id=7, segmentation=pieces, bbox=[20, 4, 9, 5])
            torso = dict(category_id=5, segmentation=[body], bbox=[8, 18, 20, 16])
            annotations += [dict(part, image_id=key) for part in (head, torso)]
        path = folder / "annotations" / split / f"{split}.json"
        path.parent.mkdir(parents=True)
        content = dict(images=images, annotations=annotations, categories=categories)
        path.write_text(json.dumps(content))
    return folder


def change_test_json(folder, change):
    path = folder / "annotations/test/test.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("copy", [False, True])
def test_partimagenet_becomes_a_cub_folder(tmp_path, monkeypatch, capsys, copy):
    source = write_release(tmp_path / "release")
    run(monkeypatch, partimagenet, source, tmp_path / "new", *["--copy"] * copy)
    out = capsys.readouterr().out
    assert "train: 6 images, 12 key points" in out and "new: 2 classes, 3 parts" in out
    test = data.Images(tmp_path / "new", "test", "box", 32)
    assert test.classes == ["n01", "n02"] and test.labels.tolist() == [1, 0, 1, 0]
    assert test.parts == ["Bird Tail", "Bird Head", "Bird Body"]
    assert test.files[0].samefile(source / "images/test/n02_0test.JPEG") != copy
    # Head: 20 pixels around (22, 6.5), 8 around (27, 5).
    # Body: 80 pixels around (18, 20), 72 around (11, 28).
    head = [(20 * 22 + 8 * 27) / 28, (20 * 6.5 + 8 * 5) / 28, 1]
    body = [(80 * 18 + 72 * 11) / 152, (80 * 20 + 72 * 28) / 152, 1]
    for keypoints, box in zip(test.keypoints, test.boxes):
        assert torch.allclose(keypoints, torch.tensor([[0, 0, 0], head, body]))
        assert box.tolist() == [8, 4, 21, 30]
    with pytest.raises(FileExistsError, match="new is there already"):
        run(monkeypatch, partimagenet, source, tmp_path / "new")


def test_partimagenet_with_its_oddities(tmp_path, monkeypatch, capsys):
    """Polygons of one or two points, a run-length code, a crowd, an image without parts."""
    source = write_release(tmp_path / "release")

    def change(content):
        key = content["images"][0]["id"]
        content["images"][0]["file_name"] = r"n02\n02_0test.JPEG"  # a path of Windows
        points, code = [[1.0, 2.0], [3.0, 4.0, 5.0, 6.0]], dict(counts="0", size=[48, 60])
        content["annotations"] = [
            dict(image_id=key, category_id=9, segmentation=points, bbox=[2, 4, 10, 6]),
            dict(image_id=key, category_id=7, segmentation=code, bbox=[20, 20, 4, 6]),
            dict(image_id=key, category_id=5, segmentation=[], bbox=[0, 0, 60, 48], iscrowd=1),
        ]

    change_test_json(source, change)
    run(monkeypatch, partimagenet, source, tmp_path / "new")
    out = capsys.readouterr().out
    assert "3 images have no part" in out and "1 annotations of crowds" in out
    test = data.Images(tmp_path / "new", "test", "box", 32)
    assert test.keypoints[0].tolist() == [[7, 7, 1], [22, 23, 1], [0, 0, 0]]
    assert test.boxes[0].tolist() == [2, 4, 22, 22]
    assert test.boxes[1].isinf().any() and not test.keypoints[1].any()


def rename_class(folder):
    (folder / "images/test/n01_0test.JPEG").rename(folder / "images/test/n03_1.JPEG")
    change_test_json(folder, lambda content: content["images"][1].update(file_name="n03_1.JPEG"))


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "annotations/test/test.json").unlink(), "test.json is missing; expected"),
    (lambda f: (f / "annotations/test/test.json").write_text("{"), "test.json: not the"),
    (lambda f: (f / "images/test/n01_0test.JPEG").unlink(), "0test.JPEG is missing"),
    (lambda f: change_test_json(f, lambda c: c["annotations"][0].update(image_id=9)), "Error(9)"),
    (lambda f: change_test_json(f, lambda c: c["categories"].pop(0)), "or parts than train"),
    (rename_class, "other classes ['n03']"),
])
def test_partimagenet_another_release_is_one_line(tmp_path, monkeypatch, damage, words):
    source = write_release(tmp_path / "release")
    damage(source)
    with pytest.raises((ValueError, OSError)) as caught:
        run(monkeypatch, partimagenet, source, tmp_path / "new")
    message = str(caught.value)
    assert words in message and str(source) in message and "\n" not in message
    assert not (tmp_path / "new").exists()
