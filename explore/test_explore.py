"""Tests of the scripts in explore/, on small inputs."""
import colorsys
import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate
import kernels
import model as ivpt
import train
from explore import bench, cls_vote, count_prototypes, diagnose, explain, gallery
from prepare import toy_birds, toy_vit


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
    picture = torch.tensor([40, 100, 160], dtype=torch.uint8)[:, None, None].expand(3, 64, 64)
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
    assert lines[0] == " 62.2 %  001.Black_<b>bird" and "+0.50 in total" in lines[2]
    assert lines[3:] == [" +1.00  concept 1", " -0.50  concept 2"]
    sheet = explain.draw(torch.zeros(3, 56, 56, dtype=torch.uint8), found)
    shown = {colour for _, colour in sheet.getcolors(10 ** 6)}
    assert set(found.colours[-1]) <= shown  # a vote has the colour of its concept's regions
    assert hue(found.colours[0][1]) == pytest.approx(hue(found.colours[1][1]), abs=0.02)


def random_model(method, num_classes):
    """A method on the toy ViT whose parameters and buffers are random."""
    torch.manual_seed(0)
    model = ivpt.find_method(method)(toy_vit.new_backbone(56), num_classes)
    for x in [*model.parameters(), *model.buffers()]:
        if x.is_floating_point():
            torch.nn.init.normal_(x, std=0.1)
        else:  # parents of Parts: coarse concepts
            x.random_(4)
    return model.eval()


@pytest.mark.parametrize("method", ["ivpt", "parts"])
def test_votes_of_one_layer_or_of_all_sum_to_the_margin(method):
    model = random_model(method, 3)
    if method == "ivpt":
        model.concepts[-1].prototypes.data[0] += 100  # this concept wins no patch
    image = torch.randn(3, 56, 56)
    sizes = [K - 1 for K in model.prototypes]
    names = [[f"part {l}.{k}" for k in range(K)] for l, K in enumerate(sizes)]
    found = explain.explain(model, image, ["a", "b", "c"], names=names)
    output = model(image[None])
    logits, classes = output.logits[0].sort(descending=True)
    scores = output.concept_logits[0][:, classes]
    expected = (scores[:, 0] - scores[:, 1]) / len(scores)
    total = sum(vote for _, vote, _ in found.votes)
    assert total == pytest.approx((logits[0] - logits[1]).item(), abs=1e-5)
    if method == "ivpt":  # the last layer votes
        concepts, order = [(4, k) for k in range(4)], range(4)
    else:
        concepts = [(l, k) for l, K in enumerate(sizes) for k in range(K)]
        order = expected.abs().argsort(descending=True)[:10]
        assert found.votes[10][0] == "all other concepts (40)" and len(found.votes) == 11
    for (name, vote, colour), i in zip(found.votes, order):
        l, k = concepts[i]
        layer = "" if method == "ivpt" else f"layer {l + 1}, "
        absent = "" if (output.attention[l][0].argmax(0) == k).any() else ", absent here"
        assert name == f"{layer}concept {k + 1}, part {l}.{k}{absent}"
        assert vote == pytest.approx(expected[i].item(), abs=1e-5)
        assert colour == found.colours[l][k]
    parents = [groups[0].argmax(1).tolist() for groups in output.groups]
    assert found.colours == gallery.concept_colours(model.prototypes, parents)
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
    (birds / ".c.png").write_text("hidden")
    (birds / ".ipynb_checkpoints").mkdir()
    (birds / ".ipynb_checkpoints" / "a.png").write_text("hidden")
    (birds / "folder.png").mkdir()
    ckpt = ["--ckpt", str(tmp_path / "run" / "last.pt")]
    explain.main([*ckpt, str(birds), str(birds / "a.png")])
    drawn = sorted(file.name for file in (tmp_path / "run" / "explained").iterdir())
    assert drawn == ["1_a.png", "2_b.png", "3_a.png"] and len(list(birds.rglob("*"))) == 8
    assert "-0.50  concept 2\n" in capsys.readouterr().out
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(dict(layers=concept_layers())))
    evaluate.main([*ckpt, "--image", str(birds / "more")])
    assert "-0.50  concept 2, tail and beak & eye\n" in capsys.readouterr().out
    (birds / "bad.png").write_text("damaged")
    with pytest.raises(ValueError, match=r"\A1 of 3 images: [^\n]*bad.png: not a readable[^\n]*\Z"):
        explain.main([*ckpt, str(birds)])
    drawn = sorted(file.name for file in (tmp_path / "run" / "explained").iterdir())
    assert drawn[3:] == ["4_b.png", "5_a.png", "6_b.png"]  # no drawing was replaced
    with pytest.raises(ValueError, match="bad.png: not a readable"):
        explain.main([*ckpt, str(birds / "bad.png"), "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
    gallery.main([*ckpt, "--strip", str(tmp_path / "strip.jpg"), "--images", "3", "7"])
    assert Image.open(tmp_path / "strip.jpg").size == (3 * 61 + 5, 2 * 61 + 5)
    with pytest.raises(ValueError, match="expected numbers from 0 to 11"):
        gallery.main([*ckpt, "--strip", str(tmp_path / "strip.jpg"), "--images", "12"])


# ---- scripts on a run --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """A folder with an image of each species for training and one for testing, and a ViT."""
    folder = tmp_path_factory.mktemp("birds")
    toy_birds.draw(folder / "birds", num_train=1, num_test=1)
    torch.manual_seed(0)
    torch.save(toy_vit.new_backbone(56).state_dict(), folder / "vit.pth")
    return folder


def options_of(birds, *words):
    return ["--data", str(birds / "birds"), "--weights", str(birds / "vit.pth"), "--device", "cpu",
            "--image-size", "56", "--batch-size", "2", "--no-amp", "--workers", "0", *words]


def new_run(birds, folder, *words):
    """-> the model before its first step, as train.py makes it, and the path of its checkpoint."""
    args = train.parse(options_of(birds, *words))
    images = data.Images(birds / "birds", "train", "test", 56)
    model = train.new_model(args, images, torch.device("cpu"))
    model.start(images, args)
    path = folder / "last.pt"
    data.save(path, dict(options=vars(args), classes=images.classes, model=model.state_dict()))
    return model.eval(), path


@pytest.mark.parametrize("method", ["ivpt", "parts", "vpt-deep", "protopnet"])
def test_methods_are_drawn_and_explained(method, birds, tmp_path, capsys):
    model, ckpt = new_run(birds, tmp_path, "--method", method)
    gallery.main(["--ckpt", str(ckpt), "--strip", str(tmp_path / "strip.jpg"), "--images", "1"])
    assert Image.open(tmp_path / "strip.jpg").size == (61 * (1 + len(model.prototypes)) + 5, 66)
    image = next((birds / "birds").rglob("*.jpg"))
    explain.main(["--ckpt", str(ckpt), "--out", str(tmp_path), str(image)])
    assert (tmp_path / f"1_{image.stem}.png").is_file()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if " %  " in line]) == 5  # the likeliest classes
    has_votes = any("votes for the first class" in line for line in lines)
    assert has_votes != any("no votes" in line for line in lines)
    assert has_votes == (method != "vpt-deep")


def test_how_much_the_vote_of_cls_decides(birds, tmp_path, capsys):
    model, ckpt = new_run(birds, tmp_path, "--method", "parts-cls", "--no-amp")
    nn.init.normal_(model.votes.weight)
    data.save(ckpt, torch.load(ckpt) | dict(model=model.state_dict()))
    cls_vote.main(["--ckpt", str(ckpt)])
    found = [float(number) for number in re.findall(r"([\d.-]+) %", capsys.readouterr().out)]
    images = data.Images(birds / "birds", "test", "test", 56)
    right, right_without, margins, shares = 0, 0, 0.0, 0.0
    for image, label, *_ in images:
        with torch.no_grad():
            votes = model(image[None]).concept_logits[0]  # (51, C)
        right += votes.sum(0).argmax() == label
        right_without += votes[:50].sum(0).argmax() == label
        first, second = votes.sum(0).argsort(descending=True)[:2]
        margins += votes[:, first].sum() - votes[:, second].sum()
        shares += votes[50, first] - votes[50, second]
    n = len(images)
    expected = [100 * right / n, 100 * right_without / n, 100 * shares / margins]
    assert found == pytest.approx([float(x) for x in expected], abs=0.06)
    explain.main(["--ckpt", str(ckpt), "--out", str(tmp_path), str(images.files[0])])
    assert len(re.findall("the cls token, which no region", capsys.readouterr().out)) == 1
    for method in ("parts", "vpt-deep"):
        _, ckpt = new_run(birds, tmp_path, "--method", method)
        with pytest.raises(ValueError, match=r"\A[^\n]*no vote of cls; expected [^\n]*\Z"):
            cls_vote.main(["--ckpt", str(ckpt)])


@pytest.mark.parametrize("start", ["noise", "clusters"])
def test_diagnose_measures_each_layer(start, birds, tmp_path, capsys):
    model, ckpt = new_run(birds, tmp_path, "--start", start)
    with torch.no_grad():
        for concept in model.concepts:
            concept.prototypes[:, 0] += 2
            concept.bias[0] = 0.1
            concept.bias[-1, -1] = -0.5
    data.save(ckpt, torch.load(ckpt) | dict(model=model.state_dict()))
    diagnose.main(["--ckpt", str(ckpt), "--images", "3"])
    _, *lines = capsys.readouterr().out.splitlines()
    test = data.Images(birds / "birds", "test", "test", 56)
    images = torch.stack([test[i][0] for i in (0, 4, 9)])
    with torch.no_grad():
        attention = model(images).attention
        patches = model.backbone.last_patches(images, 5)
    for l, (line, A) in enumerate(zip(lines, attention, strict=True)):
        layer, patch, prototype, moved, gap, concepts, bias_std, bias_max = line.split()
        assert int(layer) == l + 1
        assert float(patch) == pytest.approx(patches[l].norm(dim=2).mean().item(), rel=1e-3)
        lengths = model.concepts[l].prototypes.norm(dim=1)
        assert float(prototype) == pytest.approx(lengths.mean().item(), rel=1e-3)
        assert moved == ("-" if start == "clusters" else "2")
        shares = A.log().flatten(2).sort(dim=1).values  # (3, K, N)
        median = (shares[:, -1] - shares[:, -2]).median().item()
        assert float(gap) == pytest.approx(median, rel=1e-3)
        winners = [set(winner.flatten().tolist()) - {A.shape[1] - 1} for winner in A.argmax(1)]
        expected = sum(map(len, winners)) / 3
        assert float(concepts) == pytest.approx(expected, rel=1e-3)
        assert float(bias_std) == pytest.approx(model.concepts[l].bias.std().item(), rel=1e-3)
        assert float(bias_max) == 0.5


def test_diagnose_of_other_methods(birds, tmp_path, capsys):
    """Parts have clusters without a bias; what has no clusters is refused in one line."""
    _, ckpt = new_run(birds, tmp_path, "--method", "parts")
    diagnose.main(["--ckpt", str(ckpt)])
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    for line in lines:
        _, patch, _, *rest = line.split()
        assert float(patch) == pytest.approx(128 ** 0.5, abs=0.1)  # relative: length sqrt(D)
        assert [rest[i] for i in (0, 3, 4)] == ["-", "-", "-"]
    _, ckpt = new_run(birds, tmp_path, "--method", "protopnet")
    with pytest.raises(ValueError, match=r"\AProtoPNet: its prototypes are not clusters.*\Z"):
        diagnose.main(["--ckpt", str(ckpt)])


# ---- the number of prototypes ------------------------------------------------------------------
def planted(owners, noise=1):
    """Patches (n, 8) around the corners that own them."""
    generator = torch.Generator().manual_seed(0)
    return 10 * torch.eye(8)[owners] + noise * torch.randn(len(owners), 8, generator=generator)


def test_clusters_count_if_both_halves_of_the_images_have_them():
    generator = torch.Generator().manual_seed(0)
    five = torch.randint(5, (200,), generator=generator)
    assert count_prototypes.count_clusters(planted(torch.cat([five, five])), seed=0) == 5
    wide = planted(torch.cat([five, five]), noise=3.5)  # Jaccard index 0.83 at worst
    assert count_prototypes.count_clusters(wide, seed=0) == 5
    four = torch.randint(4, (200,), generator=generator)
    assert count_prototypes.count_clusters(planted(torch.cat([five, four])), seed=0) < 5
    one = torch.randn(400, 8, generator=generator)
    assert count_prototypes.count_clusters(one, seed=0) < 4


@pytest.mark.parametrize("words, num_layers", [
    (["--weights", "toy", "--pretrain", "2"], 5),
    (["--method", "parts", "--weights", "toy", "--pretrain", "0"], 5),
    (["--no-cross-layer"], 1),
    (["--validate"], 5),
])
def test_the_counts_are_printed_as_an_option(words, num_layers, birds, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(count_prototypes, "count_clusters", lambda e, seed: len(e) % 7 + 1)
    monkeypatch.setattr(toy_vit, "pretrain", lambda *call: calls.append(call))
    words = options_of(birds, *words)
    count_prototypes.main(words)
    line = capsys.readouterr().out
    args = train.parse(words)
    assert line.count("\n") == 1 and len(calls) == (args.pretrain > 0)
    if calls:
        backbone, dataset, epochs, *_ = calls[0]
        assert dataset.view == "train" and epochs == 2

    torch.manual_seed(args.seed)  # as in train.py
    model = ivpt.build(vars(args), 10, ivpt.load_backbone(args.weights, 56))
    dataset = data.Images(birds / "birds", "fit" if args.validate else "train", "test", 56)
    samples = model.sample_regions(dataset, args.seed)
    expected = tuple(len(e[foreground]) % 7 + 2 for e, foreground, _ in samples)
    assert len(expected) == num_layers
    assert train.parse([*words, *line.split()]).prototypes == expected


def test_methods_without_clusters_have_no_count(birds):
    with pytest.raises(ValueError, match=r"\AVPTDeep: its prototypes are not clusters.*\Z"):
        count_prototypes.main(options_of(birds, "--method", "vpt-deep"))


# ---- the benchmarks ----------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["ivpt", "e2vpt"])
def test_bench_prints_the_row_of_a_step(method, birds, monkeypatch, capsys):
    def pretend(run, device):
        run()
        calls.append(run.__name__)
        if len(calls) <= 2:  # warm-up
            return 100.0
        return 3.0 if run.__name__ == "forward" else 12.0

    calls = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(bench, "WARM_UP", 1)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "seconds", pretend)
    bench.main(options_of(birds, "--method", method))
    header, _, row = capsys.readouterr().out.splitlines()
    row = dict(zip(re.findall(r"\w+", header), row.strip("| ").split(" | "), strict=True))
    assert calls == 2 * ["forward", "step"]
    assert row["method"] == method and row["dtype"] == "fp32" and row["batch_size"] == "2"
    assert float(row["forward_ms"]) == 1500 and float(row["step_ms"]) == 6000  # of two images
    assert float(row["ratio"]) == 4 and float(row["peak_gib_above_model"]) >= 0


def test_a_step_is_a_training_step(birds):
    args = train.parse(options_of(birds))
    model = ivpt.build(vars(args), bench.NUM_CLASSES, bench.random_backbone(args)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bench.make_step(model, torch.randn(2, 3, 56, 56), args)()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name


def test_a_named_backbone_is_not_downloaded(monkeypatch):
    monkeypatch.setattr(ivpt, "download_weights", lambda name: pytest.fail(name))
    args = train.parse(["--weights", "dinov2_vits14_reg", "--image-size", "56"])
    assert bench.random_backbone(args).registers == 4


def test_time_and_memory_are_measured(monkeypatch):
    device = torch.device("cpu")
    assert 0.02 <= bench.seconds(lambda: time.sleep(0.02), device) < 0.2
    linux = bench.peak_gib(device)
    monkeypatch.setattr(sys, "platform", "darwin")  # its unit is a byte, not a KiB
    assert 0.05 < linux < 50
    assert bench.peak_gib(device) == pytest.approx(linux / 1024, rel=0.2)
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows
    assert math.isnan(bench.peak_gib(device))


@pytest.mark.parametrize("form", [bench.two_reads, bench.product])
def test_the_kernels_rivals_compute_the_same(form):
    generator = torch.Generator().manual_seed(0)
    x, prototypes, bias = (torch.randn(shape, generator=generator)
                           for shape in ((2, 9, 16), (3, 16), (3, 9)))
    inputs = x, 0.3 * prototypes, 0.3 * bias
    expected = kernels.prototype_attention_reference(*inputs)
    for found, tensor in zip(form(*inputs), expected, strict=True):
        torch.testing.assert_close(found, tensor, atol=1e-5, rtol=1e-4)
    leaves = [t.requires_grad_() for t in inputs]
    outputs = kernels.prototype_attention_reference(*leaves)
    (sum(output.square().sum() for output in outputs) / 2).backward()
    for found, leaf in zip(bench.call(form, inputs, backward=True), leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad, atol=1e-4, rtol=1e-4)


def test_bench_prints_a_line_for_each_form_of_the_kernel(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "SHAPES", ((32, 50, 24, 3), (8, 9, 16, 2)))
    monkeypatch.setattr(bench, "ROUNDS", 1)
    bench.main(["--kernel"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("CPU") and len(lines) == 1 + 2 * (1 + 3 * 2)
    assert lines[1].startswith("B 1, N 50, D 24, K 3, torch.float32; a copy")
    assert [line.split()[:2] for line in lines[2:8]] == [
        [form, kind] for form in ("ours", "two_reads", "product") for kind in ("fwd", "fwd+bwd")]
    assert all(float(line.split()[2]) > 0 for line in lines[2:8])
    with pytest.raises(ValueError, match="expected no other option"):
        bench.main(["--kernel", "--amp"])
