"""Tests of data.py, to be merged into test_ivpt.py."""
import hashlib
import math
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as T

import data

DATA_CUB40 = Path(__file__).resolve().parent.parent / "shared/data/CUB_200_2011"
DATA_TURN = Image.Exif()
DATA_TURN[0x0112] = 6  # turned by 90 degrees


def data_write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def data_write_cub(folder, sizes=((90, 60), (60, 90), (130, 100), (40, 40))):
    """Ids are neither contiguous nor in order. The last image is for testing."""
    rows = [(17 - 3 * i, f"{i % 2:03d}.Class {i % 2}/image {i}.png") for i in range(len(sizes))]
    for (key, name), (width, height) in zip(rows, sizes):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(key).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    data_write(folder / "images.txt", *(f"{key} {name}" for key, name in rows))
    labels = (f"{key} {5 * (i % 2) + 3}" for i, (key, _) in enumerate(rows))
    data_write(folder / "image_class_labels.txt", *labels)
    splits = (f"{key} {int(key > rows[-1][0])}" for key, _ in rows)
    data_write(folder / "train_test_split.txt", *splits)
    data_write(folder / "bounding_boxes.txt", *(f"{key} 10.5 8.25 20.7 16.9" for key, _ in rows))
    data_write(folder / "classes.txt", "3 000.Class 0", "8 001.Class 1")
    data_write(folder / "parts/parts.txt", "2 beak", "9 left wing")
    points = (f"{key} {part} 11.5 {part}.25 {int(part < key)}" for key, _ in rows for part in (9, 2))
    data_write(folder / "parts/part_locs.txt", *points)
    return folder


def data_write_classes(folder):
    for place in ("train/zebra 1", "train/ant", "val/zebra 1"):
        (folder / place).mkdir(parents=True)
        for name in ("0.jpg", "1.PNG"):
            Image.new("RGB", (40, 30)).save(folder / place / name)
    return folder


def data_squash(image, box, S):
    squashed = image.crop(box).resize((S, S), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(squashed)).permute(2, 0, 1)


def test_data_reads_any_subset_in_cubs_layout(tmp_path):
    folder = data_write_cub(tmp_path)
    train = data.Images(folder, "train", "train", 32)
    assert train.classes == ["000.Class 0", "001.Class 1"] and train.labels.tolist() == [0, 1, 0]
    assert [file.name for file in train.files] == ["image 0.png", "image 1.png", "image 2.png"]
    assert train.boxes.numpy() == pytest.approx(np.tile((10.5, 8.25, 20.7, 16.9), (3, 1)))
    assert train.parts == ["beak", "left wing"]
    test = data.Images(folder, "test", "box", 32)
    assert test.labels.tolist() == [1] and test.keypoints.tolist() == [[[11.5, 2.25, 1], [11.5, 9.25, 0]]]
    for name in ("classes.txt", "bounding_boxes.txt", "parts/part_locs.txt", "parts/parts.txt"):
        (folder / name).unlink()  # these are optional
    test = data.Images(folder, "test", "box", 32)
    assert test.classes == train.classes and test.parts == [] and test[0][2].shape == (0, 3)
    whole = data_squash(data.read_image(test.files[0]), (0, 0, 40, 40), 32)
    assert torch.equal(data.denormalize(test[0][0]), whole)


@pytest.mark.skipif(not DATA_CUB40.is_dir(), reason="the 40 real CUB classes are not here")
def test_data_real_subset():
    names = ("train", "fit", "val", "test")
    train, fit, val, test = (data.Images(DATA_CUB40, name, "box", 64) for name in names)
    assert (len(train), len(fit), len(val), len(test)) == (1200, 900, 300, 1090)
    assert val.files == train.files[3::4] and not set(val.files) & set(fit.files)
    assert len(test.classes) == 40 and len(test.parts) == 15
    inside = (test.keypoints[..., :2] - test.boxes[:, None, :2]) / test.boxes[:, None, 2:]
    inside = inside[test.keypoints[..., 2] > 0]
    assert ((inside > -0.05) & (inside < 1.05)).all(1).float().mean() > 0.99


def test_data_folder_of_classes(tmp_path, monkeypatch, capsys):
    folder = data_write_classes(tmp_path)
    data_write(folder / "test/0.jpg")  # test/ has no class folders, as ImageNet's: val/ is taken
    data_write(folder / "train/ant/notes.txt")
    data_write(folder / "classes.txt")  # does not make it a CUB folder
    Image.new("RGB", (50, 20)).save(folder / "val/zebra 1/photo.jpeg", exif=DATA_TURN)
    train, test = (data.Images(folder, split, "test", 32) for split in ("train", "test"))
    assert train.classes == test.classes == ["ant", "zebra 1"] and test.parts == []
    assert train.labels.tolist() == [0, 0, 1, 1] and test.labels.tolist() == [1, 1, 1]
    assert test.read(2).size == (20, 50)  # upright: no annotation refers to pixels as stored
    monkeypatch.setattr("sys.argv", ["data.py", "--data", folder.name, "--data-root", str(tmp_path.parent)])
    data.main()
    out = capsys.readouterr().out
    assert f"{folder}\ntrain: 4 images of 2 classes, 0 with a box" in out
    assert "train: 1 files skipped, suffix .txt" in out


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "images.txt").unlink(), "images.txt"),
    (lambda f: (f / "images/001.Class 1/image 1.png").unlink(), "image 1.png is missing"),
    (lambda f: data_write(f / "bounding_boxes.txt", "17 1 2 3"), "bounding_boxes.txt: expected 5"),
    (lambda f: data_write(f / "bounding_boxes.txt", "17 1 2 3 x"), "'x'"),
    (lambda f: data_write(f / "image_class_labels.txt", "17 4", "14 3", "11 3", "8 3"), "'4'"),
    (lambda f: data_write(f / "parts/part_locs.txt", "17 99 1 1 1"), "'99'"),
    (lambda f: data_write(f / "train_test_split.txt", "17 0", "14 0", "11 0", "8 0"), "no image for"),
    (lambda f: [shutil.rmtree(f), data_write_classes(f), shutil.rmtree(f / "val")], "val"),
    (lambda f: [shutil.rmtree(f), data_write_classes(f), (f / "val/gnu").mkdir()], "val/gnu"),
])
def test_data_a_damaged_folder_is_one_line(tmp_path, damage, words):
    folder = data_write_cub(tmp_path / "CUB_200_2011")
    damage(folder)
    with pytest.raises((ValueError, OSError)) as caught:
        data.Images(folder, "train", "train", 28)
    message = str(caught.value)
    assert words in message and str(folder) in message and "\n" not in message


def test_data_find_takes_cub_where_it_is_and_downloads_it_where_not(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "CUB_200_2011.tgz", "w:gz") as archive:
        archive.add(data_write_cub(tmp_path / "source"), "CUB_200_2011")
    monkeypatch.setattr(data, "CUB_URL", "http://127.0.0.1:9/CUB_200_2011.tgz")
    with pytest.raises(OSError, match="127.0.0.1:9.* put it into"):  # another MD5
        data.find("cub", tmp_path)
    md5 = hashlib.md5((tmp_path / "CUB_200_2011.tgz").read_bytes()).hexdigest()
    monkeypatch.setattr(data, "CUB_MD5", md5)
    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError, match="before torchrun"):
        patch.setenv("WORLD_SIZE", "2")
        data.find("cub", tmp_path)
    folder = data.find("cub", tmp_path)
    assert folder == tmp_path / "CUB_200_2011" == data.find("cub", folder)
    with pytest.raises(FileNotFoundError, match="--data cap: no such folder"):
        data.find("cap", tmp_path)
    (folder / "train_test_split.txt").unlink()
    with pytest.raises(FileNotFoundError, match="train_test_split.txt"):
        data.Images(folder, "train", "train", 28)


def test_data_toy_without_prepare_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prepare", None)
    with pytest.raises(FileNotFoundError, match="^--data toy: .*; it needs the folder prepare/$"):
        data.find("toy", tmp_path)


def test_data_train_view_is_the_recipe_and_a_function_of_seed_epoch_and_index(tmp_path):
    dataset = data.Images(data_write_cub(tmp_path), "train", "train", 32)
    resize, flip, affine, crop = dataset.augment.transforms
    assert resize.size == [32] and flip.p == 0.5 and crop.size == (32, 32)
    assert (affine.degrees, affine.translate, affine.scale) == ([-90, 90], (0.2, 0.2), (0.8, 1.2))
    views = []
    for seed, epoch, workers in ((3, 5, 0), (3, 5, 2), (3, 6, 0), (4, 5, 0)):
        dataset.seed, dataset.epoch = seed, epoch
        torch.manual_seed(len(views))
        views.append(next(iter(DataLoader(dataset, 3, num_workers=workers)))[0])
    first, workers, *others = views
    assert torch.equal(first, workers)
    assert all((first - other).abs().amax((1, 2, 3)).min() > 0.5 for other in others)
    state = torch.get_rng_state()
    dataset[0]
    assert torch.equal(state, torch.get_rng_state())  # the rest of the run is not disturbed


def test_data_test_view_is_resize_and_centre_crop_and_takes_key_points_along(tmp_path):
    folder = data_write_cub(tmp_path, ((9, 9), (90, 60)))
    data_write(folder / "parts/part_locs.txt", "14 2 30 20 1", "14 9 14 20 1")
    image, label, keypoints, index = data.Images(folder, "test", "test", 30)[0]
    expected = T.center_crop(T.resize(Image.open(folder / "images/001.Class 1/image 1.png"), 30), 30)
    assert torch.equal(data.denormalize(image), T.pil_to_tensor(expected)) and (label, index) == (1, 0)
    assert keypoints.tolist() == [[7, 10, 1], [-1, 10, 0]]  # resized to 45 x 30, 8 columns cut off


@pytest.mark.parametrize("box, corners", [
    ("10.5 8.25 20.7 16.9", (10, 8, 31, 25)), ("12 13 0 0", (12, 13, 13, 14)),  # never empty
    ("-7.5 -3 30 20", (-7, -3, 22, 17)), ("30.2 35 80 80.9", (30, 35, 110, 115)),  # black outside
    ("10.3 0 0.7 1", (10, 0, 11, 1)),
])
def test_data_box_view_follows_the_metric(tmp_path, box, corners):
    folder = data_write_cub(tmp_path)
    data_write(folder / "bounding_boxes.txt", f"8 {box}")
    dataset = data.Images(folder, "test", "box", 48)
    image, _, keypoints, _ = dataset[0]
    assert torch.equal(data.denormalize(image), data_squash(dataset.read(0), corners, 48))
    x0, y0, x1, y1 = corners
    for y, visible, found in zip((2.25, 9.25), (1, 0), keypoints.tolist()):
        u = math.trunc(224 * (11.5 - x0) / (x1 - x0))
        assert found == [u, math.trunc(224 * (y - y0) / (y1 - y0)), visible]


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "LA", "P", "I;16"])
def test_data_every_kind_of_image_becomes_rgb(tmp_path, mode):
    ramp = np.linspace(0, 255, 40).astype(np.uint8)[None].repeat(30, 0)
    image = Image.fromarray(ramp)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "x.tif")
    read = data.read_image(tmp_path / "x.tif")
    assert read.mode == "RGB" and read.size == (40, 30)
    assert np.abs(np.asarray(read).astype(int) - ramp[..., None]).max() <= 1


def test_data_transparency_becomes_white_and_exif_is_applied_when_asked(tmp_path):
    Image.new("RGBA", (4, 6), (9, 9, 9, 0)).save(tmp_path / "x.png", exif=DATA_TURN)
    assert data.read_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)
    assert data.read_image(tmp_path / "x.png").size == (4, 6)
    assert data.read_image(tmp_path / "x.png", upright=True).size == (6, 4)


@pytest.mark.parametrize("workers, content", [(1, b"\x89PNG"), (0, b""), (0, b"<html>"), (0, None)])
def test_data_an_unreadable_image_is_one_line(tmp_path, workers, content, capsys):
    dataset = data.Images(data_write_cub(tmp_path), "test", "test", 28)
    dataset.files[0].unlink()
    if content is not None:
        dataset.files[0].write_bytes(content)
    with pytest.raises(SystemExit) as end:
        data.run_script(lambda: list(DataLoader(dataset, num_workers=workers)))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"error: {dataset.files[0]}: not a readable image")


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("no memory.\nmore"), 2, "error: no memory. Try a smaller --batch-size"),
    (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'"),
])
def test_data_run_script_says_a_failure_in_one_line(error, code, words, capsys):
    with pytest.raises(SystemExit) as end:
        data.run_script(lambda: (_ for _ in ()).throw(error))
    text = capsys.readouterr().err
    assert end.value.code == code and text.startswith(words) and text.count("\n") == 1


def test_data_normalize_and_back():
    pixels = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    expected = T.normalize(pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.allclose(data.normalize(pixels), expected, atol=1e-5)  # fp32 rounding
    assert torch.equal(data.denormalize(data.normalize(pixels)), pixels)


def test_data_affine_is_seeded_and_in_range():
    thetas = torch.stack([data.sample_affine(torch.Generator().manual_seed(s)) for s in range(3000)])
    assert torch.equal(thetas[7], data.sample_affine(torch.Generator().manual_seed(7)))
    scales = torch.linalg.det(thetas[:, :, :2]).sqrt()
    angles = torch.rad2deg(torch.atan2(thetas[:, 1, 0], thetas[:, 0, 0]))
    for values, bound in ((scales - 1.1, 0.3), (angles, 90), (thetas[:, :, 2], 0.22)):
        assert 0.98 * bound < values.max() <= 1.0001 * bound
        assert -1.0001 * bound <= values.min() < -0.98 * bound


def test_data_warp_moves_points_by_theta_and_unwarp_brings_them_back():
    axis = torch.linspace(-1, 1, 97, dtype=torch.float64)[1:] - 1 / 96
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    image = torch.exp(-4 * ((x - 0.2) ** 2 + (y + 0.1) ** 2))[None, None]  # its summit: (0.2, -0.1)
    for seed in range(20):
        theta = data.sample_affine(torch.Generator().manual_seed(seed))
        warped = data.warp(image, theta)
        row, column = divmod(int(warped[0, 0].argmax()), 96)
        summit = torch.tensor((column + 0.5, row + 0.5)) / 48 - 1
        expected = theta[:, :2] @ torch.tensor((0.2, -0.1)) + theta[:, 2]
        assert (summit - expected).abs().max() < 0.75 / 48  # half a pixel, rounded
        inner = data.unwarp(data.warp(torch.ones_like(image), theta), theta) > 0.999
        assert inner.float().mean() > 0.3
        assert (data.unwarp(warped, theta) - image)[inner].abs().max() < 5e-3  # interpolated twice
    right = torch.tensor(((1.0, 0, 0.5), (0, 1.0, 0)))  # a quarter of the side; zeros from outside
    maps = torch.ones(2, 3, 8, 8, requires_grad=True)
    data.unwarp(maps, right).sum().backward()
    assert torch.equal(maps.grad, (torch.arange(8) >= 2).float().expand(2, 3, 8, 8))
