"""What the gallery and the explanation of an image show, on small inputs."""
import colorsys
import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate
import model as ivpt
import train
from explore import bench, diagnose, explain, gallery
from prepare import toy_birds


class FakeImages(torch.utils.data.Dataset):
    """Grey images of two classes whose names need care in HTML; part 2 lies left of part 1."""
    classes, parts, folder = ["001.Black_<b>bird", "002.Tit"], ["beak & eye", "tail"], Path("birds")

    def __init__(self, n=12):
        self.labels = torch.arange(n) % 2

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = data.normalize(torch.full((3, 56, 56), 200, dtype=torch.uint8))
        points = torch.tensor([[40., 20., 1.], [10., 20., 1.]])
        return image, int(self.labels[index]), points, index


class FakeModel(torch.nn.Module):
    """In the first layer concept k wins the rows of patches 2 k and 2 k + 1. All images get the
    same class."""
    grid, prototypes, num_classes, class_specific, grouped = (8, 8), (4, 3), 2, False, True

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images, labels=None):
        generator = torch.Generator().manual_seed(0)
        B = len(images)
        attention = []
        for K in self.prototypes:
            maps = torch.rand(B, K, 8, 8, generator=generator)
            for k in range(K):
                maps[:, k, 2 * k:2 * k + 2] += 2
            attention.append((maps / maps.sum(1, keepdim=True)).float())
        groups = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]).expand(B, 3, 2)  # join 0, 1, 1
        votes = torch.tensor([[3.0, 1.0], [0.5, 1.5]]).expand(B, 2, 2) * self.weight
        logits = votes.mean(1)
        if self.class_specific:
            logits = logits + torch.tensor([0.25, 0.0])  # what prototypes of other classes add
        return ivpt.Output(logits, votes, attention, [groups] if self.grouped else [], [], None)


def concept_layers():
    """Metrics of FakeModel's layers; concept 2 of each hits two parts about as often."""
    layers = []
    for K in FakeModel.prototypes:
        layer = dict.fromkeys((name for name, _ in evaluate.ROWS), 7)
        layer |= dict(prototypes=K, wins=[10] * K, peak_spreads=[31.0] * (K - 1))
        layer["parts_hit"] = [[["beak & eye", 87.4], ["tail", 3.0]]] * (K - 1)
        layer["parts_hit"][1] = [["tail", 50.0], ["beak & eye", 48.0]]
        layers.append(layer)
    return layers


def hue(colour):
    return colorsys.rgb_to_hls(*(value / 255 for value in colour))[0]


def test_a_fine_concept_is_a_shade_of_its_coarse_concept():
    parents = [[0, 2, 2, 1], [1, 1, 0]]
    *fine, coarse = gallery.concept_colours((5, 4, 4), parents)
    assert len({round(hue(colour), 2) for colour in coarse}) == 3
    for colours, layer in zip(fine, parents):
        for colour, parent in zip(colours, layer):
            difference = abs(hue(colour) - hue(coarse[parent]))
            assert min(difference, 1 - difference) < 0.02  # of rounding to bytes
        assert len(set(colours)) == len(colours)
    alone = gallery.concept_colours((5, 5), [])  # nothing is grouped: a hue for every concept
    assert alone[0] == alone[1] and len({round(hue(colour), 2) for colour in alone[0]}) == 4


def test_regions_are_upsampled_before_the_argmax():
    maps = torch.eye(4).view(2, 2, 4).permute(2, 0, 1)  # a quarter each, background below right
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    picture = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    painted = gallery.paint_regions(picture, maps, colours)
    for (y, x), colour in (((8, 8), colours[0]), ((8, 56), colours[1]), ((56, 8), colours[2]),
                           ((56, 56), (255, 255, 255))):
        expected = 0.4 * 100 + 0.6 * torch.tensor(colour)
        assert (painted[:, y, x] - expected).abs().max() <= 1
    maps = torch.tensor([[[2.0, 0.4], [0.4, 0.4]], [[0.0, 1.0], [1.0, 1.0]]])
    winners = gallery.paint_regions(picture, maps, colours[:1])[1] == 40  # red; the rest is white
    rows = winners.sum(1)[winners.any(1)].tolist()
    assert len(set(rows)) > 5  # no square of 32 x 32: a smooth border


def test_the_gallery_keeps_the_nine_strongest_claims():
    n, generator = 40, torch.Generator().manual_seed(1)
    model = FakeModel()
    attention = [torch.randn(n, K, 8, 8, generator=generator).softmax(1) for K in (4, 3)]
    attention[0][5:, 2] = 0  # the third concept wins in five images at most
    groups = torch.rand(n, 3, 2, generator=generator).softmax(2)
    pages = gallery.Gallery(model, FakeImages(n))
    for part in torch.arange(n).split(7):
        maps = [a[part] for a in attention]
        output = ivpt.Output(torch.randn(len(part), 2), None, maps, [groups[part]], [], None)
        pages.add(output, part)
    for l, maps in enumerate(attention):
        for k in range(maps.shape[1] - 1):
            won = maps.argmax(1) == k
            strength = (maps[:, k] * won).sum((1, 2))
            order = strength.sort(descending=True, stable=True)[1][:9]
            order = [i for i in order.tolist() if won[i].any()]
            assert [index for _, index, _ in pages.claims[l][k]] == order
            for _, index, margin in pages.claims[l][k]:
                assert torch.equal(margin > 0, won[index])
            if l == 0:  # images where a concept wins nothing do not count
                torch.testing.assert_close(pages.groups[0][k], groups[won.any(2).any(1), k].sum(0))
    assert len(pages.claims[0][2]) <= 5 and len(pages.examples) == 24


@pytest.mark.parametrize("grouped", [True, False])
def test_the_pages(tmp_path, grouped):
    model, images = FakeModel(), FakeImages()
    model.grouped = grouped
    pages = gallery.Gallery(model, images)
    for batch, _, _, indices in torch.utils.data.DataLoader(images, 5):
        pages.add(evaluate.forward(model, batch), indices)
    metrics = dict(accuracy=50.0, layers=concept_layers(), headline=dict(layer=0),
                   unavailable=None, protocol=dict(images=12))
    log = tmp_path / "log.jsonl"
    log.write_text('{"loss": 3.5}\n{"loss": 2.5, "bad": NaN}\n{"lo')  # the end was cut off
    pages.write(tmp_path / "a", metrics, log)
    page = (tmp_path / "a" / "index.html").read_text()
    links = re.findall(r"src='([^']+)'", page)
    assert len(set(links)) == 12 + 3 + 2  # images, fine and coarse concepts
    assert all((tmp_path / "a" / link).is_file() for link in links)
    assert "Black &lt;b&gt;bird" in page and "<b>bird" not in page
    assert "title='From left to right: tail, beak &amp; eye'" in page
    assert "beak &amp; eye 87 %" in page and "31 px" in page and "accuracy 50.0 %" in page
    chips = re.findall(r"title='([^']+)'>(\d)</i><span> ([^<]+)</span>", page)
    names = ["beak &amp; eye", "tail and beak &amp; eye", "beak &amp; eye"]
    once = [(name, str(k), name) for l in (3, 2) for k, name in enumerate(names[:l], start=1)]
    assert chips[:10] == once + once  # in the legend, on the cards
    assert len(chips) == (15 if grouped else 10)  # and in the hierarchy
    assert "2.5 to 3.5, 2 epochs" in page and "bad" not in page
    assert ("90 %" in page and "80 %" in page) == grouped and ("no hierarchy" in page) != grouped
    assert "http" not in page and "<script" not in page  # one folder, to be looked at offline


def test_concepts_are_named_by_the_parts_they_hit_most():
    hits = [[["back", 60.0], ["nape", 53.0], ["tail", 9.0]], [["beak", 60.0], ["tail", 57.0]], []]
    layer = dict(prototypes=4, parts_hit=hits)
    assert gallery.concept_names(layer) == ["back", "beak and tail", ""]
    assert gallery.concept_names(dict(prototypes=4, parts_hit=None)) == ["", "", ""]


def test_votes_sum_to_the_margin_of_the_logits():
    model, image = FakeModel(), FakeImages()[0][0]
    found = explain.explain(model, image, FakeImages.classes)
    assert list(found.classes) == FakeImages.classes
    assert sum(found.classes.values()) == pytest.approx(100, abs=1e-3)
    first, second = found.colours[-1]
    assert found.votes == [("concept 1", 1.0, first), ("concept 2", -0.5, second)]  # over G = 2
    model.class_specific = True
    votes = explain.explain(model, image, FakeImages.classes).votes
    name, vote, _ = votes[2]
    assert name == "prototypes of other classes" and vote == pytest.approx(0.25)
    lines = explain.describe(found)
    assert lines[0] == " 62.2 %  001.Black_<b>bird" and "in all +0.50" in lines[2]
    assert lines[3:] == [" +1.00  concept 1", " -0.50  concept 2"]
    sheet = explain.draw(torch.zeros(3, 56, 56, dtype=torch.uint8), found)
    shown = {colour for _, colour in sheet.getcolors(10 ** 6)}
    assert set(found.colours[-1]) <= shown  # a vote has the colour of its concept's regions
    assert hue(found.colours[0][1]) == pytest.approx(hue(found.colours[1][1]), abs=0.02)


@pytest.mark.parametrize("votes", ["coarse", "all"])
def test_votes_of_all_layers_sum_to_the_margin(votes):
    torch.manual_seed(0)
    model = ivpt.IVPT(ivpt.load_backbone("toy", 56), 3, votes=votes).eval()
    image = torch.randn(3, 56, 56)
    sizes = [K - 1 for K in model.prototypes]
    names = [[f"part {l}.{k}" for k in range(K)] for l, K in enumerate(sizes)]
    found = explain.explain(model, image, ["a", "b", "c"], names=names)
    with torch.no_grad():
        output = model(image[None])
    logits, classes = output.logits[0].sort(descending=True)
    scores = output.concept_logits[0][:, classes]
    expected = (scores[:, 0] - scores[:, 1]) / len(scores)
    total = sum(vote for _, vote, _ in found.votes)
    assert total == pytest.approx((logits[0] - logits[1]).item(), abs=1e-5)
    if votes == "coarse":
        concepts, order = [(4, k) for k in range(4)], range(4)
    else:
        concepts = [(l, k) for l, K in enumerate(sizes) for k in range(K)]
        order = expected.abs().argsort(descending=True)[:10]
        assert found.votes[10][0] == "all other concepts (40)" and len(found.votes) == 11
    for (name, vote, colour), i in zip(found.votes, order):
        l, k = concepts[i]
        layer = "" if votes == "coarse" else f"layer {l + 1}, "
        assert name == f"{layer}concept {k + 1}, part {l}.{k}"
        assert vote == pytest.approx(expected[i].item(), abs=1e-5)
        assert colour == found.colours[l][k]
    assert len(explain.describe(found)) == 3 + 1 + len(found.votes)


def test_the_scripts(tmp_path, monkeypatch, capsys):
    """Pictures go into the run's folder, never beside the image; --strip draws a row an image."""
    options = dict(image_size=56, amp=False, data="birds", data_root=None, seed=0)
    run = dict(options=options, classes=FakeImages.classes)
    monkeypatch.setattr(evaluate, "load_run", lambda *_: (FakeModel(), run))
    monkeypatch.setattr(evaluate, "load_images", lambda *_: FakeImages())
    birds = tmp_path / "birds"
    birds.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (80, 60), "grey").save(birds / name)
    (birds / "more").mkdir()
    (birds / "b.png").rename(birds / "more" / "b.png")
    (birds / "notes.txt").write_text("no image")
    ckpt = ["--ckpt", str(tmp_path / "run" / "last.pt")]
    explain.main([*ckpt, str(birds), str(birds / "a.png")])
    drawn = sorted(file.name for file in (tmp_path / "run" / "explained").iterdir())
    assert drawn == ["1_a.png", "2_b.png", "3_a.png"] and len(list(birds.rglob("*"))) == 4
    assert "-0.50  concept 2\n" in capsys.readouterr().out
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(dict(layers=concept_layers())))
    evaluate.main([*ckpt, "--image", str(birds / "more")])
    assert "-0.50  concept 2, tail and beak & eye\n" in capsys.readouterr().out
    gallery.main([*ckpt, "--strip", str(tmp_path / "strip.jpg"), "--images", "3", "7"])
    assert Image.open(tmp_path / "strip.jpg").size == (3 * 61 + 5, 2 * 61 + 5)
    with pytest.raises(ValueError, match="expected numbers from 0 to 11"):
        gallery.main([*ckpt, "--strip", str(tmp_path / "strip.jpg"), "--images", "12"])


def test_bench_prints_a_table(monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(bench, "WARM_UP", 0)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    options = ["--image-size", "56", "--batch-size", "2", "--device", "cpu", "--no-amp"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *options])
    bench.main()
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.count("|") == row.count("|") and "| toy |" in row


def test_bench_counts_memory_on_every_system(monkeypatch):
    linux = bench.peak_gib(torch.device("cpu"))
    monkeypatch.setattr(sys, "platform", "darwin")  # its unit is a byte, not a KiB
    assert 0.05 < linux < 50
    assert bench.peak_gib(torch.device("cpu")) == pytest.approx(linux / 1024, rel=0.2)
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows
    assert math.isnan(bench.peak_gib(torch.device("cpu")))


def test_diagnose_prints_a_line_for_each_layer(tmp_path, monkeypatch, capsys):
    toy_birds.draw(tmp_path / "birds", num_train=1, num_test=1)
    args = train.parse(["--data", str(tmp_path / "birds"), "--weights", "toy", "--image-size", "56",
                        "--distance", "relative", "--device", "cpu"])
    torch.manual_seed(args.seed)  # as in train.py
    model = ivpt.build(asdict(args), num_classes=10)
    ckpt = tmp_path / "last.pt"
    ivpt.save(ckpt, dict(options=asdict(args), classes=list(toy_birds.SPECIES), epoch=1,
                         model=ivpt.trained_state(model), fingerprint=ivpt.fingerprint(model)))
    monkeypatch.setattr(sys, "argv", ["diagnose.py", "--ckpt", str(ckpt), "--images", "3"])
    diagnose.main()
    header, *layers = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in layers] == ["1", "2", "3", "4", "5"]
    for line in layers:
        assert float(line[1]) == pytest.approx(128 ** 0.5, abs=0.1)  # relative: length sqrt(D)
        assert float(line[3]) == 0  # prototypes have not moved yet
