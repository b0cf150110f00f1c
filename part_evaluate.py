import copy
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import model as ivpt


# ---- evaluate.py: the metrics on hand-computed cases -------------------------------------------
@pytest.mark.parametrize("h, w", [(14, 14), (16, 16), (37, 37), (9, 14), (224, 224), (1, 1)])
def test_evaluate_peaks_are_the_first_maxima_of_the_upsampled_maps(h, w):
    generator = torch.Generator().manual_seed(h * 1000 + w)
    noise = torch.randn(2, 4, h, w, generator=generator)
    flat = torch.full_like(noise, 0.3)  # all values tie: the first pixel is the peak
    for maps in (noise, noise.mul(40).softmax(1), (noise > 1).float(), -noise.exp(), flat):
        full = F.interpolate(maps.double(), size=(224, 224), mode="bicubic").float()
        first = full.flatten(2).argmax(2)
        assert torch.equal(evaluate.find_peaks(maps), torch.stack((first % 224, first // 224), 2))
    assert not evaluate.find_peaks(flat).any()


def test_evaluate_region_has_inclusive_ends_and_stops_at_the_frame():
    def hit(x, y, point, visible=1, **options):
        maps = torch.zeros(1, 1, 224, 224)
        maps[0, 0, y, x] = 1
        point = torch.tensor([[[*point, visible]]]).float()
        return evaluate.part_hits(maps, point, **options).item()

    assert hit(100, 50, (136, 50)) and hit(100, 50, (64, 86)) and hit(100, 50, (136, 14))
    assert not hit(100, 50, (137, 50)) and not hit(100, 50, (100, 87))
    assert hit(220, 100, (224, 100)) and not hit(220, 100, (225, 100))  # 225 is outside the frame
    assert hit(3, 3, (0, 0)) and not hit(3, 3, (-1, 3)) and not hit(100, 50, (100, 50), visible=0)
    assert hit(100, 50, (110, 50), half_size=10) and not hit(100, 50, (111, 50), half_size=10)


def test_evaluate_four_fifths_of_the_images_that_show_a_part_are_consistent():
    def hits(*rows):  # one prototype; a string of parts for each image, x hit, . not
        return torch.tensor([[[c == "x" for c in row]] for row in rows])

    labels, seen = [0] * 5, torch.ones(5, 2)
    assert evaluate.consistency(hits("x.", "x.", "x.", "x.", ".."), seen, labels) == 100  # 4 of 5
    assert evaluate.consistency(hits("x.", "x.", "x.", ".x", ".x"), seen, labels) == 0    # 3 of 5
    seen[4, 0] = 0
    assert evaluate.consistency(hits("x.", "x.", "x.", "..", ".."), seen, labels) == 0    # 3 of 4
    assert evaluate.consistency(hits("x.", "x.", "x.", "x.", ".."), seen, labels) == 100  # 4 of 4
    for n in (35, 145, 1000):  # four fifths exactly, and one image less
        many = hits(*["x"] * (n * 4 // 5), *["."] * (n // 5))
        assert evaluate.consistency(many, torch.ones(n, 1), [0] * n) == 100
        assert evaluate.consistency(many[1:], torch.ones(n - 1, 1), [0] * (n - 1)) == 0


def test_evaluate_metrics_equal_a_loop_over_images():
    """The definition, one image at a time. Labels may be a list; a class may have no image."""
    generator = torch.Generator().manual_seed(3)
    n, K, M = 60, 3, 5
    labels = torch.randint(9, (n,), generator=generator).mul(2).tolist()
    seen = torch.rand(n, M, generator=generator) < 0.6
    hits, noisy = ((torch.rand(n, K, M, generator=generator) < 0.85) & seen[:, None] for _ in "ab")
    consistent, stable = [], []
    for c in set(labels):
        images = [i for i in range(n) if labels[i] == c]
        for k in range(K):
            shares = [np.mean([hits[i, k, m].item() for i in images if seen[i, m]])
                      for m in range(M) if any(seen[i, m] for i in images)]
            consistent.append(max(shares) >= 0.8)
            stable.append(np.mean([torch.equal(hits[i, k], noisy[i, k]) for i in images]))
    assert evaluate.consistency(hits, seen, labels) == pytest.approx(100 * np.mean(consistent))
    assert evaluate.stability(hits, noisy, labels) == pytest.approx(100 * np.mean(stable))
    assert 0 < np.mean(consistent) < 1 and 0 < np.mean(stable) < 1
    with pytest.raises(ValueError, match="no images"):
        evaluate.consistency(hits[:0], seen[:0], [])


# ---- evaluate.py: a data set and a model small enough to reason about --------------------------
EVALUATE_CLASSES = [f"{c + 1:03}.Bird_{c}" for c in range(8)]


def evaluate_folder(root, size=(64, 64), boxes=None, visible=None, parts=("mark", "tail")):
    """CUB's layout, 8 black images with a white square around the key point "mark"."""
    spots = [(8, 8), (56, 8), (8, 56), (56, 56), (32, 32), (20, 44), (44, 20), (12, 40)]
    lists = {name: [] for name in ("images", "image_class_labels", "train_test_split",
                                   "bounding_boxes", "parts/part_locs")}
    (root / "images").mkdir(parents=True)
    (root / "parts").mkdir()
    for i, (x, y) in enumerate(spots, 1):
        picture = np.zeros((size[1], size[0], 3), np.uint8)
        picture[max(0, y - 4):y + 4, max(0, x - 4):x + 4] = 255
        Image.fromarray(picture).save(root / "images" / f"{i}.png")
        box = boxes[i - 1] if boxes else (0, 0, *size)
        seen = visible[i - 1] if visible else 1
        lists["images"].append(f"{i} {i}.png")
        lists["image_class_labels"].append(f"{i} {1 if i < 5 else 3}")
        lists["train_test_split"].append(f"{i} 0")
        lists["bounding_boxes"].append("{} {} {} {} {}".format(i, *box))
        lists["parts/part_locs"] += [f"{i} 1 {x} {y} {seen}", f"{i} 2 {(x + 40) % 64} {y} {seen}"]
    lists["classes"] = [f"{c} {name}" for c, name in enumerate(EVALUATE_CLASSES, 1)]
    lists["parts/parts"] = [f"{m} {part}" for m, part in enumerate(parts, 1)]
    for name, lines in lists.items():
        if parts or not name.startswith("parts"):
            (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


class EvaluateConv(torch.nn.Module):
    """Five layers of fixed random maps: any mix-up of views, layers or axes gives other numbers."""
    grid, prototypes, num_classes, class_specific = (7, 7), (6, 5, 4, 3, 4), 8, False

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.conv = torch.nn.Conv2d(3, sum(self.prototypes) + 8, 8, 8)
        self.amp = []

    def forward(self, images):
        self.amp.append(torch.is_autocast_enabled("cpu"))
        *maps, logits = self.conv(images).float().mul(3).split((*self.prototypes, 8), 1)
        return ivpt.Output(logits.amax((2, 3)), None, [a.softmax(1) for a in maps], [], [], None)


@torch.no_grad()
def test_evaluate_equals_the_protocol_written_out(tmp_path):
    """One image at a time: which view, which maps and which noise every number is made from."""
    rng, n, S, seed, model = np.random.default_rng(0), 8, 56, 3, EvaluateConv()
    boxes = [(*rng.integers(0, 20, 2), *rng.integers(25, 44, 2)) for _ in range(n)]
    folder = evaluate_folder(tmp_path / "cub", (90, 64), boxes, [1] * 6 + [0, 1])
    classes = "".join(f"{i} {min(i, 7)}\n" for i in range(1, 9))
    (folder / "image_class_labels.txt").write_text(classes)
    for file in folder.glob("images/*.png"):
        noise = Image.fromarray(rng.integers(0, 256, (8, 11, 3), np.uint8))
        noise.resize((90, 64)).save(file)
    test, box = data.Images(folder, "test", "test", S), data.Images(folder, "test", "box", S)
    metrics = evaluate.evaluate(model, folder, S, batch_size=5, seed=seed)
    right, outputs, patches = 0, [], [torch.zeros(K, 2) for K in model.prototypes]
    for i, (x, y, w, h) in enumerate(boxes):
        noise = 0.2 * np.random.default_rng((seed, i)).standard_normal((3, S, S), np.float32)
        noisy = box[i][0] + torch.from_numpy(noise).clamp(-0.25, 0.25)
        outputs.append((model(box[i][0][None]).attention, model(noisy[None]).attention))
        output = model(test[i][0][None])
        right += int(output.logits.argmax()) == test[i][1]
        for l, maps in enumerate(output.attention):
            region = maps[0].argmax(0)
            for row, column in np.ndindex(7, 7):  # 90 x 64 becomes 78 x 56, seen from column 11 on
                u, v = (8 * column + 4 + 11) * 90 / 78, (8 * row + 4) * 64 / 56
                patches[l][region[row, column], int(x <= u <= x + w and y <= v <= y + h)] += 1
    keypoints, labels = torch.stack([box[i][2] for i in range(n)]), test.labels
    visible = keypoints[:, :, 2] > 0
    for l, layer in enumerate(metrics["layers"]):
        clean, noisy = (torch.cat([views[v][l] for views in outputs])[:, :-1] for v in (0, 1))
        random, draws = [], np.random.default_rng((seed, l))
        for _ in range(10):
            peaks = torch.from_numpy(draws.integers(0, 224, (n, clean.shape[1], 2)))
            drawn = evaluate.hits_of(peaks, keypoints)
            random.append(evaluate.consistency(drawn, visible, labels))
        hits, peaks = evaluate.part_hits(clean, keypoints), evaluate.find_peaks(clean).double()
        fixed = evaluate.part_hits(clean.mean(0).expand_as(clean), keypoints)
        whole, won = patches[l].sum(0), patches[l][:-1].sum(0)
        expected = dict(
            consistency=evaluate.consistency(hits, visible, labels),
            random_location=np.mean(random),
            stability=evaluate.stability(hits, evaluate.part_hits(noisy, keypoints), labels),
            constant_location=evaluate.consistency(fixed, visible, labels),
            peak_spread=peaks.var(0, correction=0).sum(1).sqrt().mean(),
            foreground_outside=100 * won[0] / whole[0], foreground_inside=100 * won[1] / whole[1])
        expected = {key: float(value) for key, value in expected.items()}
        assert {key: layer[key] for key in expected} == pytest.approx(expected)
        assert layer["wins"] == patches[l].sum(1).int().tolist()
        assert layer["winning"] == 100 * (patches[l][:-1].sum(1) > 0).float().mean()
        for row, best in zip(100 * hits.sum(0) / visible.sum(0), layer["parts_hit"]):
            named = {part: float(x) for part, x in zip(("mark", "tail"), row) if x}
            assert dict(best) == pytest.approx(named)
    assert metrics["accuracy"] == 100 * right / n and not any(model.amp)
    for key in ("stability", "random_location", "consistency", "constant_location", "peak_spread"):
        assert len({layer[key] for layer in metrics["layers"]}) > 1, key  # or nothing would be seen
    assert metrics["headline"]["layer"] == 2


def test_evaluate_nothing_but_the_seed_changes_the_numbers(tmp_path, monkeypatch):
    folder, model = evaluate_folder(tmp_path / "cub"), EvaluateConv()
    first, *others = (json.dumps(evaluate.evaluate(model, folder, 56, **options)) for options in (
        {}, dict(batch_size=3), dict(batch_size=1, workers=2), dict(seed=1)))
    assert others[0] == others[1] == first != others[2]
    monkeypatch.setattr(evaluate.dist, "is_initialized", lambda: True)  # one process plays two
    monkeypatch.setattr(evaluate.dist, "get_world_size", lambda: 2)
    found = [None, None]
    for rank in (1, 0):
        def all_gather_object(shares, mine):
            found[rank] = copy.deepcopy(mine)
            shares[:] = [copy.deepcopy(share or mine) for share in found]

        monkeypatch.setattr(evaluate.dist, "get_rank", lambda: rank)
        monkeypatch.setattr(evaluate.dist, "all_gather_object", all_gather_object)
        together = evaluate.evaluate(model, folder, 56, batch_size=3)
    assert json.dumps(together) == first
    shares = [totals["keypoints"].flatten(1).any(1).sum().item() for totals, *_ in found]
    assert shares == [4, 4]  # each process saw half of the images
    evaluate.evaluate(model, folder, 56, amp=True)
    assert model.amp[-3:] == [True] * 3 and not model.amp[-4]


@pytest.mark.parametrize("options", [dict(parts=()), dict(visible=[0] * 8)])
def test_evaluate_without_key_points(tmp_path, options):
    metrics = evaluate.evaluate(EvaluateConv(), evaluate_folder(tmp_path / "cub", **options), 56)
    missing = {key for key, value in metrics["layers"][0].items() if value is None}
    assert missing == {"consistency", "stability", "constant_location", "over_constant",
                       "random_location", "parts_hit", "foreground_outside"}  # all is in the box
    assert metrics["headline"] == dict(layer=2, consistency=None, stability=None)
    assert "no key points" in metrics["unavailable"] and "no key points" in evaluate.table(metrics)


def test_evaluate_prototypes_of_a_class_are_controlled_within_it(tmp_path):
    """Each class looks at a place of its own: constant within the class, not over all images."""
    class Specific(EvaluateConv):
        prototypes, class_specific = (2,), True

        def forward(self, images, labels):
            maps = torch.zeros(len(images), 2, 7, 7)
            maps[labels == 0, 0, 1, 1] = maps[labels == 2, 0, 5, 5] = 1.0
            return ivpt.Output(torch.zeros(len(images), 8), None, [maps], [], [], None)

    layer = evaluate.evaluate(Specific(), evaluate_folder(tmp_path / "cub"), 56)["layers"][0]
    assert layer["peak_spread"] == 0 and layer["constant_location"] == layer["consistency"]
    assert layer["parts_hit"] is None  # concept 1 is another one in every class


def test_evaluate_command_line(tmp_path, monkeypatch, capsys):
    folder, model = evaluate_folder(tmp_path / "data" / "CUB_200_2011"), EvaluateConv()
    options = dict(data="cub", data_root=str(tmp_path / "data"), image_size=56, amp=False, seed=3)
    run = dict(options=options, classes=list(EVALUATE_CLASSES))
    monkeypatch.setattr(evaluate, "load_run", lambda *_: (model, run))
    command, file = ["--ckpt", str(tmp_path / "last.pt")], tmp_path / "metrics.json"
    evaluate.main(command)
    assert re.search(r"accuracy \d+.\d % on 8 images\nlayer .* 3\*", capsys.readouterr().out)
    first = file.read_text()
    file.unlink()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(evaluate, "table", lambda metrics: 1 / 0)  # printing fails, the numbers stay
        evaluate.main([*command, "--batch-size", "3"])
    assert file.read_text() == first
    (folder / "train_test_split.txt").write_text("".join(f"{i} 1\n" for i in range(1, 9)))
    command += ["--split", "val"]
    evaluate.main(command)  # every fourth training image
    protocol = json.loads((tmp_path / "metrics_val.json").read_text())["protocol"]
    assert protocol["images"] == 2 and protocol["split"] == "val"
    torch.nn.init.constant_(model.conv.bias, math.nan)
    with pytest.raises(ValueError, match="not finite"):
        evaluate.main(command)
    run["classes"].pop()
    with pytest.raises(ValueError, match="found 8 classes, expected the 7 of training"):
        evaluate.main(command)
    assert file.read_text() == first
