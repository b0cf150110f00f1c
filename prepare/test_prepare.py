"""Tests of the scripts in prepare/: what they write reads back through data.py as it should."""
import importlib.util
import itertools
import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate
import model as ivpt
import train
from prepare import gleason, layout, partimagenet, pascal_part, toy_birds, toy_vit

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
FIRST_CORE = "slide001_core003"


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def write_release(folder):
    """Small files as the three sources have them, all in one folder: they do not meet."""
    write_partimagenet(folder)
    write_gleason(folder)
    if importlib.util.find_spec("scipy"):
        write_pascal_part(folder)
    return folder


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


def test_the_toy_vit_learns_species_and_pixels(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy_birds, "ZOOM", 1)
    toy_birds.draw(tmp_path / "birds", num_train=8, num_test=1)
    dataset = data.Images(tmp_path / "birds", "train", "train", 56)
    backbone = toy_vit.new_backbone(56).requires_grad_(False)
    assert not backbone.training and backbone.grid == (7, 7)
    assert toy_vit.new_backbone().image_size == 112
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    errors, mse_loss = [], F.mse_loss

    def watched(drawn, pixels):
        errors.append(mse_loss(drawn, pixels))
        return errors[-1]

    monkeypatch.setattr(F, "mse_loss", watched)
    toy_vit.pretrain(backbone, dataset, 4, torch.device("cpu"), amp=False, workers=1)
    unmoved = {name for name, p in backbone.named_parameters() if torch.equal(p, before[name])}
    assert unmoved == {"mask_token"}
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    assert dataset.epoch == 3  # every epoch has views of its own
    assert len(errors) == 4 * 5 and sum(errors[-5:]) < 0.8 * sum(errors[:5])
    lines = capsys.readouterr().out.splitlines()  # also where no terminal shows a progress bar
    assert len(lines) == 4 and "epoch 4 of 4: loss" in lines[3]


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


# ---- weights in other people's names -------------------------------------------------------------
FAMILIES = {"plain": {}, "registers": dict(registers=4), "swiglu": dict(swiglu=96),
            "swiglu_registers": dict(swiglu=96, registers=4)}


def small_vit(**family):
    """All of its weights are random, so none can stand in for another."""
    torch.manual_seed(0)
    vit = ivpt.VisionTransformer(width=128, depth=3, patch_size=14, pos_grid=5, **family)
    for p in vit.parameters():
        nn.init.normal_(p, std=0.1)
    return vit.eval()


def in_a_checkpoint(state):
    """Of a teacher and a student with heads, as DINO's and DINOv2's training writes it."""
    teacher = {"backbone." + name: x for name, x in state.items()}
    student = {"module." + name: torch.zeros_like(x) for name, x in teacher.items()}
    heads = {"dino_head.mlp.0.weight": torch.zeros(3), "ibot_head.norm.weight": torch.zeros(3)}
    return {"student": student, "teacher": teacher | heads, "args": Namespace(lr=1), "epoch": 3}


def in_chunks(state):
    """Blocks 0 and 1 in chunk 0, block 2 in chunk 1, all inside two wrappers."""
    chunks = {"blocks.0.": "blocks.0.0.", "blocks.1.": "blocks.0.1.", "blocks.2.": "blocks.1.2."}
    chunked = {}
    for name, x in state.items():
        chunked["module.model." + chunks.get(name[:9], name[:9]) + name[9:]] = x
    return {"state_dict": chunked, "optimizer": {"state": {0: torch.ones(2)}}}


def in_timms_names(state):
    state = {name.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): x
             for name, x in state.items() if name != "mask_token"}
    if "register_tokens" in state:
        cls, grid = state["pos_embed"].split([1, 25], dim=1)
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"], state["pos_embed"] = state["cls_token"] + cls, grid
    return state | {"head.weight": torch.zeros(10, 128), "fc_norm.weight": torch.zeros(128)}


def in_hugging_faces_names(state):
    outside = {"patch_embed.proj": "patch_embeddings.projection",
               "pos_embed": "position_embeddings"}
    inside = {"attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1",
              "ls2.gamma": "layer_scale2.lambda1", "mlp.w12": "mlp.weights_in",
              "mlp.w3": "mlp.weights_out"}
    renamed = {"classifier.weight": torch.zeros(10, 256)}
    for name, x in state.items():
        if name.startswith("norm."):
            renamed["dinov2.layer" + name] = x
        elif not name.startswith("blocks."):
            for metas, theirs in outside.items():
                name = name.replace(metas, theirs)
            renamed["dinov2.embeddings." + name] = x
        else:
            name = name.replace("blocks.", "dinov2.encoder.layer.")
            for metas, theirs in inside.items():
                name = name.replace(metas, theirs)
            if "attn.qkv" in name:
                for part, third in zip(("query", "key", "value"), x.chunk(3)):
                    renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = third
            else:
                renamed[name] = x
    return renamed


def without_scales(state):
    """DINO v1 and timm's supervised ViTs."""
    return {name: x for name, x in state.items() if ".ls" not in name and name != "mask_token"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bring", [in_a_checkpoint, in_chunks, in_timms_names,
                                   in_hugging_faces_names, without_scales])
def test_weights_from_elsewhere_give_the_same_tokens(bring, family, tmp_path):
    backbone = small_vit(**FAMILIES[family])
    nn.init.zeros_(backbone.mask_token)
    if bring is without_scales:
        for block in backbone.blocks:
            nn.init.ones_(block.ls1.gamma)
            nn.init.ones_(block.ls2.gamma)
    torch.save(bring(backbone.half().state_dict()), tmp_path / "vit.pth")
    loaded, expected = ivpt.load_backbone(tmp_path / "vit.pth"), backbone.float()
    if bring is in_timms_names and backbone.registers:  # cls and its position are one
        images = torch.randn(2, 3, 70, 70)
        torch.testing.assert_close(loaded(images), expected(images), atol=0.01, rtol=0)
    else:
        for name, x in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], x), name


def test_safetensors_are_read_where_the_package_is(tmp_path, monkeypatch):
    path, state = tmp_path / "vit.safetensors", small_vit().state_dict()
    path.write_bytes(b"{}")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(ValueError, match="^weights .*vit.*pip install safetensors"):
            ivpt.load_backbone(path)
    safetensors = pytest.importorskip("safetensors.torch")
    with pytest.raises(ValueError, match="^weights .*vit.safetensors: damaged"):
        ivpt.load_backbone(path)
    safetensors.save_file(state, path)
    for name, x in ivpt.load_backbone(path).state_dict().items():
        assert torch.equal(x, state[name]), name


STATE = small_vit().state_dict()
DINOV3 = {name: x for name, x in STATE.items() if name not in ("pos_embed", "mask_token")}
HUGGING_FACES = in_hugging_faces_names(STATE)


@pytest.mark.parametrize("content, words", [
    ({}, "not a ViT's"),
    ([1], "not a ViT's"),
    ({"fc.weight": torch.ones(3), 0: torch.ones(3)}, "not a ViT's"),
    (DINOV3, "DINOv3 is not supported"),  # rotary positions instead of learned ones
    (in_hugging_faces_names(DINOV3), "DINOv3 is not supported"),
    (without_scales(STATE) | {"storage_tokens": torch.ones(1, 4, 128)}, "DINOv3 is not supported"),
    ({name: x for name, x in HUGGING_FACES.items() if ".key." not in name},
     "size mismatch for blocks.0.attn.qkv.weight"),
    (without_scales(STATE) | {"blocks.0.attn.q_norm.weight": torch.ones(3)}, "q_norm"),
    (without_scales(STATE) | {"blocks.0.ls1.gamma": torch.ones(128)}, "blocks.0.ls2.gamma"),
])
def test_weights_that_do_not_fit_are_named_in_one_line(content, words, tmp_path):
    torch.save(content, tmp_path / "vit.pth")
    with pytest.raises(ValueError) as caught:
        ivpt.load_backbone(tmp_path / "vit.pth", 70)
    message = str(caught.value)
    assert words in message and "vit.pth" in message and "\n" not in message


# ---- PartImageNet --------------------------------------------------------------------------------
def rectangle(x, y, width, height, backwards=False):
    corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    if backwards:
        corners.reverse()
    return [value for corner in corners for value in corner]


def write_partimagenet(folder):
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
    source = write_partimagenet(tmp_path / "release")
    run(monkeypatch, partimagenet, source, tmp_path / "new", *["--copy"] * copy)
    out = capsys.readouterr().out
    assert "new: 2 classes, 3 parts" in out
    assert "6 training images, 12 key points" in out and "4 test images, 8 key points" in out
    assert "no part" in out and "skipped" not in out
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


def test_partimagenet_with_its_oddities(tmp_path, monkeypatch, capsys):
    """Polygons of one or two points, a run-length code, a crowd, an image without parts."""
    source = write_partimagenet(tmp_path / "release")

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
    assert "3 images show no part" in out and "skipped annotations of crowds: 1" in out
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
    (lambda f: change_test_json(f, lambda c: c["categories"].pop(0)), "other parts than train"),
    (rename_class, "n03_1.JPEG: train has no image of this class"),
])
def test_partimagenet_another_release_is_one_line(tmp_path, monkeypatch, damage, words):
    source = write_partimagenet(tmp_path / "release")
    damage(source)
    with pytest.raises((ValueError, OSError)) as caught:
        run(monkeypatch, partimagenet, source, tmp_path / "new")
    message = str(caught.value)
    assert words in message and str(source) in message and "\n" not in message
    assert not (tmp_path / "new").exists()


# ---- PASCAL-Part ---------------------------------------------------------------------------------
def records(**columns):
    """MATLAB's structs: a (1, n) array of records, from a list of n values for each field."""
    result = np.empty((1, len(next(iter(columns.values())))), [(name, object) for name in columns])
    for name, values in columns.items():
        for i, value in enumerate(values):
            result[0, i][name] = value
    return result


def mask(*boxes):
    """(30, 40), 1 in each box of x, y, width, height."""
    pixels = np.zeros((30, 40), np.uint8)
    for x, y, width, height in boxes:
        pixels[y:y + height, x:x + width] = 1
    return pixels


def write_pascal_image(folder, name, objects):
    """objects: rows of class, mask, and a list of the names and masks of its parts."""
    savemat = pytest.importorskip("scipy.io").savemat
    parts = []
    for _, _, rows in objects:
        if rows:
            names, masks = zip(*rows)
            parts.append(records(part_name=names, mask=masks))
        else:
            parts.append(np.zeros((0, 0)))
    if objects:
        classes, masks, _ = zip(*objects)
        structs = records(**{"class": classes, "mask": masks, "parts": parts})
    else:
        structs = np.zeros((0, 0))
    path = folder / f"Annotations_Part/{name}.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, dict(anno=dict(imname=name, objects=structs)))
    path = folder / f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(path)


def write_pascal_lists(folder, train, val):
    lists = folder / "VOCdevkit/VOC2010/ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(train) + "\n")
    (lists / "val.txt").write_text("\n".join(val) + "\n")


def write_pascal_part(folder):
    """Cats behind a smaller dog, a boat, a bird for testing only, and an empty image."""
    head = [("head", mask((4, 6, 2, 4)))]
    cat = ("cat", mask((4, 6, 10, 8), (20, 9, 3, 1)), head + [
        ("wheel_1", mask((8, 8, 1, 1))), ("wheel_1", mask((10, 8, 3, 1))),  # one name twice
        ("tail", mask())])                                                  # an empty mask
    dog = ("dog", mask((0, 0, 5, 5)), head)
    boat = ("boat", mask((0, 0, 40, 30)), [])
    bird = ("bird", mask((1, 2, 3, 4)), [])
    winged = ("bird", mask((1, 2, 3, 4)), [("lwing", mask((1, 2, 1, 1), (3, 2, 1, 3)))])
    for name, objects in dict(a1=[dog, cat], a2=[boat, cat], a3=[], b1=[cat], b2=[bird],
                              b3=[winged]).items():
        write_pascal_image(folder, name, objects)
    write_pascal_lists(folder, ("a1", "a2", "a3"), ("b1", "b2", "b3"))
    return folder


def test_pascal_part_becomes_a_cub_folder(tmp_path, monkeypatch, capsys):
    source = write_pascal_part(tmp_path / "release")
    run(monkeypatch, pascal_part, source, tmp_path / "new")
    out = capsys.readouterr().out
    for line in ("new: 2 classes, 3 parts", "1 training images, 2 key points",
                 "3 test images, 3 key points", "no training image of bird",
                 "1 images show no part", "skipped images without an object: 1",
                 "skipped images of boat, a class without parts: 1"):
        assert f"{line}\n" in out
    cats = data.Images(tmp_path / "new", "train", "box", 32)
    assert cats.classes == ["bird", "cat"] and cats.parts == ["head", "lwing", "wheel_1"]
    assert cats.labels.tolist() == [1] and cats.boxes.tolist() == [[4, 6, 19, 8]]
    # The head fills 4..6 x 6..10. The wheel's four pixels have centres 8.5, 10.5, 11.5, 12.5.
    assert cats.keypoints[0].tolist() == [[5, 8, 1], [0, 0, 0], [43 / 4, 8.5, 1]]
    assert cats.files[0].samefile(source / "VOCdevkit/VOC2010/JPEGImages/a1.jpg")
    test = data.Images(tmp_path / "new", "test", "box", 32)
    assert test.labels.tolist() == [1, 0, 0] and not test.keypoints[1].any()
    wing = torch.tensor([(1.5 + 3 * 3.5) / 4, (2.5 + 2.5 + 3.5 + 4.5) / 4, 1])
    assert torch.equal(test.keypoints[2, 1], wing)
    assert test.boxes[2].tolist() == [1, 2, 3, 4]

    run(monkeypatch, pascal_part, source, tmp_path / "all", "--all-classes", "--copy")
    images = data.Images(tmp_path / "all", "train", "box", 32)
    assert [images.classes[label] for label in images.labels] == ["cat", "boat"]
    assert images.boxes[1].tolist() == [0, 0, 40, 30] and not images.keypoints[1].any()
    assert not images.files[0].samefile(source / "VOCdevkit/VOC2010/JPEGImages/a1.jpg")


@pytest.mark.skipif(not (SHARED / "pascal_part").is_dir(), reason="no PASCAL-Part at hand")
def test_pascal_part_on_real_files(tmp_path, monkeypatch, capsys):
    scipy_io = pytest.importorskip("scipy.io")
    source = tmp_path / "release"
    names = sorted(path.stem for path in (SHARED / "pascal_part").glob("*.mat"))
    write_pascal_lists(source, names[::2], names[1::2])
    for name in names:
        for suffix, place in (("mat", "Annotations_Part"), ("jpg", "VOCdevkit/VOC2010/JPEGImages")):
            (source / place).mkdir(exist_ok=True)
            shutil.copy(SHARED / f"pascal_part/{name}.{suffix}", source / place)
    run(monkeypatch, pascal_part, source, tmp_path / "new")
    out = capsys.readouterr().out
    assert "8 training images, 80 key points" in out and "8 test images, 110 key points" in out
    assert "skipped images of boat, a class without parts: 1" in out

    found = {}  # name -> class, box, key points by their names
    for split in ("train", "test"):
        images = data.Images(tmp_path / "new", split, "box", 32)
        for file, label, box, points in zip(images.files, images.labels, images.boxes,
                                            images.keypoints):
            seen = {images.parts[m]: points[m, :2].tolist() for m in range(len(points))
                    if points[m, 2] > 0}
            found[file.stem] = images.classes[label], box.tolist(), seen
    assert len(found) == len(names) - 2  # the boat and the table

    # By hand, from the masks opened as pictures:
    kind, box, points = found["2008_001978"]
    assert (kind, box) == ("bird", [268, 172, 20, 23])
    assert points == {"torso": pytest.approx((277.273, 182.539), abs=1e-3)}
    kind, box, points = found["2010_002065"]
    assert (kind, box) == ("aeroplane", [10, 63, 484, 176]) and len(points) == 12
    assert points["lwing"] == pytest.approx((263.855, 218.306), abs=1e-3)
    assert points["rwing"] == pytest.approx((226.343, 139.206), abs=1e-3)
    assert points["wheel_5"] == pytest.approx((443.816, 188.032), abs=1e-3)
    assert points["tail"] == [30.5, 190.5]  # its mask is one pixel: column 30, row 190
    kind, box, points = found["2010_003057"]
    assert (kind, box) == ("bus", [169, 106, 279, 267])  # the bus, not the four cars

    # All of them once more: scipy's other reading, PIL's box, means along the two axes.
    for name, (kind, box, points) in found.items():
        path = source / f"Annotations_Part/{name}.mat"
        objects = scipy_io.loadmat(path, simplify_cells=True)["anno"]["objects"]
        objects = objects if isinstance(objects, list) else [objects]
        objects.sort(key=lambda one: one["mask"].sum(dtype=int))
        left, top, right, bottom = Image.fromarray(objects[-1]["mask"]).getbbox()
        assert kind == objects[-1]["class"]
        assert box == [left, top, right - left, bottom - top]
        parts = objects[-1]["parts"]
        parts = parts if isinstance(parts, list) else [parts]
        assert set(points) == {part["part_name"] for part in parts}
        for part in parts:
            shares = part["mask"] / part["mask"].sum()
            x = shares.sum(0) @ (np.arange(shares.shape[1]) + 0.5)
            y = shares.sum(1) @ (np.arange(shares.shape[0]) + 0.5)
            assert points[part["part_name"]] == pytest.approx((x, y), abs=1e-3)


MAT = "Annotations_Part/b1.mat"
VOC = "VOCdevkit/VOC2010"


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / MAT).unlink(), "b1.mat is missing; expected PASCAL"),
    (lambda f: (f / MAT).write_bytes(b""), "b1.mat: no annotation of"),
    (lambda f: (f / MAT).write_bytes((f / MAT).read_bytes()[:200]), "b1.mat: no annotation of"),
    (lambda f: (f / MAT).write_text("train.txt\n" * 99), "b1.mat: no annotation of"),
    (lambda f: (f / VOC / "JPEGImages/a3.jpg").unlink(), "a3.jpg is missing; expected PASCAL"),
    (lambda f: (f / VOC / "ImageSets/Main/val.txt").unlink(), "val.txt is missing; expected"),
    (lambda f: Image.new("RGB", (20, 15)).save(f / VOC / "JPEGImages/a1.jpg"),
     "a1.jpg has (20, 15) pixels, its mask (40, 30)"),
])
def test_pascal_part_another_release_is_one_line(tmp_path, monkeypatch, damage, words):
    source = write_pascal_part(tmp_path / "release")
    damage(source)
    with pytest.raises((ValueError, OSError)) as caught:
        run(monkeypatch, pascal_part, source, tmp_path / "new")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_pascal_part_says_how_to_get_scipy(tmp_path, monkeypatch):
    monkeypatch.setattr(pascal_part, "loadmat", None)
    with pytest.raises(ValueError, match="pip install scipy"):
        run(monkeypatch, pascal_part, tmp_path, tmp_path / "new")


# ---- Gleason-2019 --------------------------------------------------------------------------------
def write_core(folder, name, colour, *maps):
    """An image of one colour, and its maps by the first, the second, ... pathologist."""
    (folder / "Train_imgs").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", maps[0].shape[::-1], colour).save(folder / f"Train_imgs/{name}.jpg")
    for number, grades in enumerate(maps, start=1):
        path = folder / f"Maps{number}_T/{name}_classimg_nonconvex.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(grades).save(path)


def write_gleason(folder):
    """Five cores of 512 x 768: the left half and the right half have a grade each."""
    for number, (left, right) in enumerate([(1, 3), (4, 3), (5, 0), (6, 6), (3, 4)]):
        grades = np.full((512, 768), left, np.uint8)
        grades[:, 384:] = right
        wrong = np.full_like(grades, 5)
        write_core(folder, f"slide001_core{number + 3:03d}", (40 * number, 0, 0), grades, wrong,
                   grades)
    return folder


def test_gleason_takes_the_majority_and_a_tie_is_no_tissue():
    pixels = {(3, 3, 4): 3, (4, 3): 0, (0, 0, 4): 0, (4, 4, 3, 3, 5): 0, (5,): 5, (1, 0): 0,
              (3, 4, 4, 3, 4): 4, (1, 5, 5, 1, 1, 5): 0, (0, 1, 1, 3): 1, (1, 3, 4, 5): 0}
    for votes, winner in pixels.items():
        maps = [np.full((2, 3), vote, np.uint8) for vote in votes]
        assert (gleason.majority(maps) == winner).all(), votes


@pytest.mark.parametrize("areas, name", [
    ({3: 100}, "grade3"), ({0: 50, 4: 50}, "grade4"),
    ({0: 51, 4: 49}, "empty"), ({0: 100}, "empty"),
    ({1: 50, 3: 25, 4: 25}, "benign"), ({1: 49, 3: 26, 4: 25}, "mixed"), ({3: 50, 5: 50}, "mixed"),
    ({0: 40, 5: 30, 1: 20, 3: 10}, "grade5"), ({0: 40, 5: 29, 1: 21, 3: 10}, "mixed"),
])
def test_gleason_labels_a_tile_by_half_of_its_tissue(areas, name):
    values = np.repeat(list(areas), list(areas.values())).astype(np.uint8)
    assert gleason.tile_class(np.random.default_rng(0).permutation(values).reshape(4, 25)) == name


def test_gleason_becomes_a_cub_folder(tmp_path, monkeypatch, capsys):
    source = write_gleason(tmp_path / "release")
    write_core(source, "slide009_core001", "blue", np.zeros((9, 9), np.uint8))
    (source / "Train_imgs/slide009_core001.jpg").unlink()
    Image.new("RGB", (9, 9)).save(source / "Train_imgs/slide000_core001.jpg")
    (source / "Train_imgs").rename(source / "Train Imgs")  # its other name
    run(monkeypatch, gleason, source, tmp_path / "new", "--tile", 256)
    out = capsys.readouterr().out.splitlines()
    # A core has 5 x 3 tiles: 2 x 3 in its left half, 3 across, 2 x 3 in its right half. Those
    # across are mixed, but all benign in the fourth core, and half tissue of grade 5 in the third.
    assert out[0].endswith("new: 4 classes, 0 parts")
    assert out[1:] == ["36 training images, 0 key points", "24 test images, 0 key points",
                       "no test image of grade5",
                       "skipped cores without a map: 1", "skipped cores without an image: 1",
                       "skipped mixed tiles: 9", "skipped empty tiles: 6", "benign: 21 tiles",
                       "grade3: 18 tiles", "grade4: 12 tiles", "grade5: 9 tiles"]
    test = data.Images(tmp_path / "new", "test", "test", 32)
    assert test.classes == ["benign", "grade3", "grade4", "grade5"] and not test.parts
    assert test.boxes.isinf().any(1).all()
    names = {file.name: test.classes[label] for file, label in zip(test.files, test.labels)}
    assert {name[:16] for name in names} == {FIRST_CORE, "slide001_core007"}  # the 1st, the 5th
    assert names[f"{FIRST_CORE}_y0256_x0128.jpg"] == "benign"
    assert names["slide001_core007_y0000_x0512.jpg"] == "grade4"
    training = data.Images(tmp_path / "new", "train", "test", 32)
    for file in training.files:  # a tile is a piece of its core
        core = int(file.name[13:16]) - 3
        image = Image.open(file)
        assert image.size == (256, 256) and abs(image.getpixel((9, 9))[0] - 40 * core) < 5


@pytest.mark.skipif(not (SHARED / "gleason_fields").is_dir(), reason="no prostate at hand")
def test_gleason_on_real_fields(tmp_path, monkeypatch, capsys):
    """Three fields of another source, whose values are not grades: only the counting is tested."""
    source = tmp_path / "release"
    masks = {}
    for number in (10, 100, 105):
        image = SHARED / f"gleason_fields/img/test{number}.jpg"
        masks[f"core{number:03d}"] = Image.open(SHARED / f"gleason_fields/mask/test{number}.png")
        write_core(source, f"core{number:03d}", 0, np.asarray(masks[f"core{number:03d}"]))
        shutil.copy(image, source / f"Train_imgs/core{number:03d}.jpg")
    run(monkeypatch, gleason, source, tmp_path / "new", "--tile", 300)
    found = {}
    for split in ("train", "test"):
        images = data.Images(tmp_path / "new", split, "test", 32)
        for file, label in zip(images.files, images.labels):
            found[file.stem] = images.classes[label], split
    expected = {}
    for name, mask_image in masks.items():
        for y, x in itertools.product(range(0, 902, 150), repeat=2):
            counts = mask_image.crop((x, y, x + 300, y + 300)).histogram()
            tissue = counts[1] + counts[3] + counts[4]
            winners = [grade for grade in (1, 3, 4) if 2 * counts[grade] >= tissue]
            if tissue >= 45000 and len(winners) == 1:
                kind = {1: "benign", 3: "grade3", 4: "grade4"}[winners[0]]
                split = "test" if name == "core010" else "train"
                expected[f"{name}_y{y:04d}_x{x:04d}"] = kind, split
    assert found == expected and len({kind for kind, _ in found.values()}) == 2
    tile = np.asarray(Image.open(tmp_path / "new/images" / next(
        (tmp_path / "new/images").glob("*/core100_y0150_x0300.jpg")))).astype(float)
    field = Image.open(SHARED / "gleason_fields/img/test100.jpg").crop((300, 150, 600, 450))
    assert np.abs(tile - np.asarray(field)).mean() < 3  # JPEG once more


FIRST_MAP = f"Maps1_T/{FIRST_CORE}_classimg_nonconvex.png"


@pytest.mark.parametrize("damage, words", [
    (lambda f: shutil.rmtree(f / "Train_imgs"), "Train_imgs is missing; expected Gleason-2019"),
    (lambda f: [shutil.rmtree(maps) for maps in f.glob("Maps*")], "no core with a map; expected"),
    (lambda f: Image.new("L", (768, 512), 2).save(f / FIRST_MAP), "value 2, expected 0, 1, 3"),
    (lambda f: Image.new("L", (767, 512)).save(f / FIRST_MAP), "(512, 767) pixels, its core (512"),
    (lambda f: (f / FIRST_MAP).write_bytes(b"PNG"), "not a readable image"),
])
def test_gleason_another_release_is_one_line(tmp_path, monkeypatch, damage, words):
    source = write_gleason(tmp_path / "release")
    damage(source)
    with pytest.raises((ValueError, OSError)) as caught:
        run(monkeypatch, gleason, source, tmp_path / "new")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("tile, words", [(1024, "try a smaller --tile"), (1, "expected 2 or more")])
def test_gleason_tile_that_does_not_fit(tmp_path, monkeypatch, tile, words):
    source = write_gleason(tmp_path / "release")
    with pytest.raises(ValueError, match=words):
        run(monkeypatch, gleason, source, tmp_path / "new", "--tile", tile)


# ---- all three -----------------------------------------------------------------------------------
@pytest.mark.parametrize("failing", [[], ["link"], ["link", "symlink"]])
def test_an_image_is_linked_where_the_disk_allows_it_else_copied(tmp_path, monkeypatch, failing):
    def refuse(source, target):
        raise OSError("not on this disk")

    for name in failing:
        monkeypatch.setattr(layout.os, name, refuse)
    (tmp_path / "image").write_bytes(b"pixels")
    monkeypatch.chdir(tmp_path)  # a relative path is linked as well
    layout.place_image(Path("image"), tmp_path / "new/image", copy=False)
    placed = tmp_path / "new/image"
    assert placed.read_bytes() == b"pixels"
    assert placed.is_symlink() == (failing == ["link"])
    assert placed.samefile(tmp_path / "image") == (len(failing) < 2)
    with pytest.raises(ValueError, match="another image has this name"):
        layout.place_image(tmp_path / "image", placed, copy=True)


@pytest.mark.parametrize("script, write, options", [
    (partimagenet, write_partimagenet, []),
    (pascal_part, write_pascal_part, []),
    (gleason, write_gleason, ["--tile", 512]),
], ids=("partimagenet", "pascal_part", "gleason"))
def test_converted_data_trains_evaluates_and_draws(tmp_path, monkeypatch, capsys, script, write,
                                                   options):
    run(monkeypatch, script, write(tmp_path / "release"), tmp_path / "new", *options)
    with pytest.raises(SystemExit) as caught:  # the same command once more
        data.run_script(script.main)
    assert caught.value.code == 2
    message = f"error: {tmp_path / 'new'} is there already; remove it to convert again\n"
    assert capsys.readouterr().err.endswith(message)

    torch.manual_seed(0)
    backbone = ivpt.VisionTransformer(width=64, depth=5, patch_size=14, pos_grid=4, image_size=56)
    torch.save(backbone.state_dict(), tmp_path / "vit.pth")
    run(monkeypatch, train, "--data", tmp_path / "new", "--out", tmp_path / "run", "--epochs", 1,
        "--weights", tmp_path / "vit.pth", "--image-size", 56, "--batch-size", 1, "--start",
        "noise", "--workers", 0, "--device", "cpu", "--no-amp")  # black images have no foreground
    run(monkeypatch, evaluate, "--ckpt", tmp_path / "run/last.pt", "--workers", 0, "--visualize",
        tmp_path / "pictures")
    assert (tmp_path / "pictures/index.html").is_file()
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    has_parts = script is not gleason
    assert (metrics["layers"][2]["consistency"] is not None) == has_parts
