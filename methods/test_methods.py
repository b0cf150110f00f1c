"""The specification of the other methods: the defining property of each, and what trains what.

    python -m pytest methods
"""
import itertools
import json
import math
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import evaluate
import model as ivpt
import train
from explore import explain, gallery
from methods import METHODS, parts, protopnet
from prepare import toy_birds
from test_ivpt import reached, torchrun

RATES = SimpleNamespace(lr=1.0, lr_prototypes=2.0, lr_bias=3.0, lr_fusion=5.0)
THETA = torch.eye(2, 3)


def options_of(method, **changes):
    options = dict(method=method, image_size=40, prototypes=(6, 5, 4), bias_after_softmax=True,
                   no_bias=False, no_regions=False)
    return options | changes


def tiny(method, classes=3, **changes):
    """A model of the method on a small ViT with registers, every parameter random."""
    torch.manual_seed(0)
    backbone = ivpt.VisionTransformer(
        width=128, depth=5, patch_size=8, pos_grid=5, registers=4, image_size=40)
    model = ivpt.build(options_of(method, **changes), classes, backbone)
    for name, p in model.named_parameters():
        if name != "vectors":
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            nn.init.normal_(p, mean, 0.1)
    return model.eval()


def reached_modules(model, scalar):
    """The modules and parameters of a model that a scalar's gradient reaches."""
    return {name.split(".")[0] for name in reached(model, scalar)}


# ---------------------------------------------------------------- VPT-Deep

def test_vpt_deep_is_the_vit_with_ten_more_tokens_in_every_block():
    """Prompts as full tokens that are thrown away after their block; and where they look."""
    model, images = tiny("vpt-deep"), torch.randn(2, 3, 40, 40)
    backbone = model.backbone
    with torch.no_grad():
        out, tokens = model(images), backbone.embed(images)
        T = tokens.shape[1]
        assert len(out.attention) == 5 and model.prototypes == (11,) * 5
        for block, prompts, a in zip(backbone.blocks, model.prompts, out.attention):
            x = torch.cat([tokens, prompts.expand(2, -1, -1)], 1)
            q, k, _ = block.attn.heads_of(block.norm1(x))
            weights = torch.einsum("bhqd,bhkd->bhqk", q / 8, k).softmax(-1).mean(1)
            looks = weights[:, T:, 5:T].unflatten(2, (5, 5))  # rows of prompts, columns of patches
            torch.testing.assert_close(a[:, :-1], looks, atol=1e-6, rtol=1e-4)
            assert (a[:, -1] == 1 / (T + 10)).all()  # the even share
            tokens = block(x)[:, :T]
        logits = model.classifier(backbone.norm(tokens[:, 0]))
    torch.testing.assert_close(out.logits, logits, atol=1e-4, rtol=1e-4)
    assert model.train()(images).attention == []


def test_vpt_deep_with_prototypes_is_a_concept_layer_on_prompted_patches():
    model, images = tiny("vpt-deep-proto"), torch.randn(2, 3, 40, 40)
    assert model.free_prompts.shape == (5, 10, 128) and model.prototypes == (5,)
    tokens = model.backbone.embed(images)
    for block, prompts in zip(model.backbone.blocks, model.free_prompts):
        tokens = block(tokens, prompts.expand(2, -1, -1))
    patches = model.backbone.norm(tokens[:, 5:])
    a, pooled, _ = model.concepts[0](patches, ivpt.SMOOTHING)
    out = model(images)
    assert out.groups == out.fused == []
    torch.testing.assert_close(out.attention[0].flatten(2), a)
    torch.testing.assert_close(out.logits, model.classifier(model.norm(pooled)[:, :-1]).mean(1))
    assert reached_modules(model, out.attention[0].square().sum()) == {"concepts"}
    learners = {"free_prompts", "concepts", "norm", "classifier"}
    assert reached_modules(model, F.cross_entropy(out.logits, torch.tensor([0, 1]))) == learners


def test_vpt_deep_with_prototypes_learns_by_five_of_the_losses_of_ivpt():
    model, images = tiny("vpt-deep-proto"), torch.randn(2, 3, 40, 40)
    labels = torch.tensor([0, 1])
    losses, _ = model.losses(images, labels, THETA)
    full, _ = train.ivpt_losses(model, images, labels, THETA)
    weights = dict(classification=1, presence=0.2, background_presence=0.2, equivariance=0.2,
                   orthogonality=1)
    assert losses.keys() == {*weights, "loss"}
    for name, weight in weights.items():
        torch.testing.assert_close(losses[name], weight * full[name])


def test_vpt_deep_with_prototypes_has_one_concept_layer_whose_options_it_takes():
    """They change what they say, and no cluster starts it."""
    images = torch.randn(2, 3, 40, 40)
    plain = tiny("vpt-deep-proto")
    assert len(plain.concepts) == 1 and len(plain.fusions) == 0
    inside = tiny("vpt-deep-proto", bias_after_softmax=False)
    everywhere = tiny("vpt-deep-proto", no_regions=True)
    same_maps, other_maps = everywhere(images), inside(images)
    assert torch.equal(same_maps.attention[0], plain(images).attention[0])
    assert not torch.allclose(same_maps.logits, plain(images).logits)
    assert not torch.allclose(other_maps.attention[0], plain(images).attention[0])
    assert plain.concepts[0].bias.requires_grad
    assert not tiny("vpt-deep-proto", no_bias=True).concepts[0].bias.requires_grad
    before = plain.concepts[0].prototypes.clone()
    plain.start([(image, 0) for image in images], SimpleNamespace(start=None, seed=0))
    assert torch.equal(plain.concepts[0].prototypes, before)
    with pytest.raises(ValueError, match="not clusters"):
        plain.sample_regions([(image, 0) for image in images], 0)
    fresh = ivpt.build(options_of("vpt-deep-proto"), 3, plain.backbone)
    assert fresh.concepts[0].prototypes.std().item() == pytest.approx(0.01, rel=0.1)


# ---------------------------------------------------------------- E2VPT

def test_e2vpt_attends_to_five_more_vectors_of_every_head():
    model, images = tiny("e2vpt"), torch.randn(2, 3, 40, 40)
    backbone = model.backbone
    assert model.key_values.shape == (5, 2, 5, 64) and model.prototypes == (6,) * 5
    with torch.no_grad():
        out, tokens = model(images), backbone.embed(images)
        T = tokens.shape[1]
        for l, block in enumerate(backbone.blocks):
            x = torch.cat([tokens, model.prompts[l].expand(2, -1, -1)], 1)
            q, k, v = block.attn.heads_of(block.norm1(x))
            read, looks = [], []
            for head, R in enumerate(model.key_values[l]):
                keys = torch.cat([k[:, head], R.expand(2, -1, -1)], 1)
                values = torch.cat([v[:, head], R.expand(2, -1, -1)], 1)
                weights = (q[:, head] @ keys.mT / 8).softmax(-1)
                read.append(weights @ values)
                looks.append(weights[:, T:, 5:T])
            a = out.attention[l]
            mean = torch.stack(looks).mean(0).unflatten(2, (5, 5))
            torch.testing.assert_close(a[:, :-1], mean, atol=1e-6, rtol=1e-4)
            assert (a[:, -1] == 1 / (T + 5 + 5)).all()
            x = x + block.ls1(block.attn.proj(torch.cat(read, 2)))
            tokens = (x + block.ls2(block.mlp(block.norm2(x))))[:, :T]
        logits = model.classifier(backbone.norm(tokens[:, 0]))
    torch.testing.assert_close(out.logits, logits, atol=1e-4, rtol=1e-4)


def test_e2vpt_importance_is_the_mean_derivative_by_the_factors_of_a_mask():
    """dL/df of each image by itself, from a difference of two losses in float64."""
    model, images = tiny("e2vpt").double(), torch.randn(3, 3, 40, 40).double()
    labels, prompts, step = [0, 2, 1], model.prompts.detach().clone(), 1e-5
    tokens, segments = model.importance([*zip(images, labels)])

    def loss(image, label, token, channels, factor):
        model.prompts.data.copy_(prompts)
        model.prompts.data[:, token, channels] *= factor
        with torch.no_grad():
            return F.cross_entropy(model(image[None]).logits, torch.tensor([label]))

    for token, channels, found in [(1, slice(None), tokens[1]), (4, slice(16, 24), segments[4, 2])]:
        expected = 0
        for image, label in zip(images, labels):
            more, less = (loss(image, label, token, channels, 1 + d) for d in (step, -step))
            expected += (more - less).abs().item() / (2 * step)
        assert found.item() == pytest.approx(expected, rel=1e-4)


def test_e2vpt_prunes_once_rewinds_and_keeps_its_mask(tmp_path):
    model, images = tiny("e2vpt"), torch.randn(2, 3, 40, 40)
    dataset, pruned_after = [(images[0], 0), (images[1], 2)], {}
    for epochs in (1, 2, 3, 7, 16, 25):
        for epoch in range(epochs):
            model.mask.fill_(1)
            model.after_epoch(epoch, epochs, dataset)
            if not model.mask.all():
                pruned_after[epochs] = pruned_after.get(epochs, []) + [epoch + 1]
    assert pruned_after == {2: [1], 3: [1], 7: [3], 16: [4], 25: [4]}

    tokens = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    model.prune(tokens, torch.arange(16.0).roll(2).expand(5, -1))  # least: segments 2, 3, 4, 5
    assert model.mask.sum(1).tolist() == [12, 0, 12, 12, 12]
    assert (model.mask[0] == 0).nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert torch.equal(model.prompts, model.first_prompts)
    assert torch.equal(model.key_values, model.first_key_values)
    out = model(images)
    assert model.prototypes == (5,) * 5 and out.attention[0].shape == (2, 5, 5, 5)
    model.prompts.data[:, 1] += 1  # what was pruned has no part in it
    model.prompts.data[:, :, 16:48] += 1
    torch.testing.assert_close(model(images).logits, out.logits)
    model.prompts.data[:, 0, 15] += 1
    assert not torch.allclose(model(images).logits, out.logits)

    data.save(tmp_path / "last.pt", dict(
        options=options_of("e2vpt"), classes=["a", "b", "c"], model=model.state_dict()))
    loaded, _ = ivpt.load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(loaded.mask, model.mask) and loaded.prototypes == (5,) * 5
    assert torch.equal(loaded.first_prompts, model.first_prompts)


# ---------------------------------------------------------------- gated prompt tuning

def test_gates_mix_prompts_with_what_a_block_makes_of_them_and_temperatures_divide_logits():
    model, images = tiny("gated-vpt"), torch.randn(2, 3, 40, 40)
    backbone = model.backbone
    assert model.prompts.shape == (1, 10, 128) and model.prototypes == (11,) * 4
    model.gates.data = torch.tensor([-5.0, 0.0, 2.0, -1.0])
    model.temperatures.data = torch.tensor([1.0, 0.5, 2.0, 99.0, 1e-3])
    gates = [1 / (1 + math.exp(5)), 0.5, 1 / (1 + math.exp(-2)), 1 / (1 + math.e)]
    with torch.no_grad():
        out, tokens = model(images), backbone.embed(images)
        T, prompts = tokens.shape[1], model.prompts.expand(2, -1, -1)
        for l, t in enumerate([1.0, 0.5, 2.0, 10.0, 0.01]):  # these two are clamped
            block = backbone.blocks[l]
            x = torch.cat([tokens, prompts], 1)
            q, k, v = block.attn.heads_of(block.norm1(x))
            weights = (q @ k.mT / (8 * t)).softmax(-1)
            x = x + block.ls1(block.attn.proj((weights @ v).transpose(1, 2).flatten(2)))
            x = x + block.ls2(block.mlp(block.norm2(x)))
            tokens = x[:, :T]
            if l < 4:
                prompts = gates[l] * x[:, T:] + (1 - gates[l]) * prompts
                looks = gates[l] * weights.mean(1)[:, T:, 5:T].unflatten(2, (5, 5))
                a = out.attention[l]
                torch.testing.assert_close(a[:, :-1], looks, atol=1e-6, rtol=1e-4)
                assert (a[:, -1] == 1 / (T + 10)).all()
        logits = model.classifier(backbone.norm(tokens[:, 0]))
    torch.testing.assert_close(out.logits, logits, atol=1e-4, rtol=1e-4)


def test_gates_start_almost_closed_and_temperatures_at_one():
    model = ivpt.build(options_of("gated-vpt"), 3, ivpt.load_backbone("toy", 40))
    assert model.gates.tolist() == [-5.0] * 5 and model.temperatures.tolist() == [1.0] * 6


# ---------------------------------------------------------------- Prompt-CAM

def test_prompt_cam_scores_every_class_by_its_own_prompt():
    """Prompts as full tokens; the class's prompt looks at patches with each head of its own."""
    model, images = tiny("prompt-cam", classes=4), torch.randn(2, 3, 40, 40)
    backbone, labels = model.backbone, torch.tensor([3, 1])
    assert model.prompts.shape == (4, 10, 128) and model.class_prompts.shape == (1, 4, 128)
    assert model.classifier.weight.shape == (1, 128)
    with torch.no_grad():
        out, tokens = model(images, labels), backbone.embed(images)
        T = tokens.shape[1]
        for block, prompts in zip(backbone.blocks, [*model.prompts, *model.class_prompts]):
            before = torch.cat([tokens, prompts.expand(2, -1, -1)], 1)
            after = block(before)
            tokens = after[:, :T]
        scores = model.classifier(backbone.norm(after[:, T:]))[..., 0]
        torch.testing.assert_close(out.logits, scores, atol=1e-4, rtol=1e-4)
        q, k, _ = block.attn.heads_of(block.norm1(before))
        weights = (q @ k.mT / 8).softmax(-1)  # of the last block, (B, heads, T + C, T + C)
        shown, = out.attention
        for b, label in enumerate(labels):
            looks = weights[b, :, T + label, 5:T].unflatten(1, (5, 5))
            torch.testing.assert_close(shown[b, :-1], looks, atol=1e-6, rtol=1e-4)
            assert (shown[b, -1] == 1 / (T + 4)).all()
        predicted = model(images, out.logits.argmax(1)).attention[0]
        assert torch.equal(model(images).attention[0], predicted)
    assert model.prototypes == (3,) and model.class_specific and out.concept_logits is None
    assert model.train()(images).attention == []


def test_class_prompts_that_change_places_change_the_scores_and_start_around_the_mean_cls_token():
    model, images = tiny("prompt-cam", classes=4), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        logits = model(images).logits
        model.class_prompts.copy_(model.class_prompts[:, [2, 1, 0, 3]])
        torch.testing.assert_close(model(images).logits, logits[:, [2, 1, 0, 3]])
        before, tokens = model.class_prompts.clone(), model.backbone.embed(images)
        for block, prompts in zip(model.backbone.blocks, model.prompts):
            tokens = block(tokens, prompts.expand(2, -1, -1))
        model.start([(images[0], 0), (images[1], 3)], None)
        moved = model.class_prompts - before
        torch.testing.assert_close(moved, tokens[:, 0].mean(0).expand(1, 4, -1))


@pytest.mark.parametrize("method", ["vpt-deep", "e2vpt", "gated-vpt", "prompt-cam"])
def test_prompts_are_drawn_and_explained_without_votes(method):
    model, images = tiny(method), torch.randn(2, 3, 40, 40)
    explanation = explain.explain(model, images[0], ["a", "b", "c"])
    assert explanation.votes == [] and sum(explanation.classes.values()) == pytest.approx(100)
    assert explain.describe(explanation)[-1].startswith("no votes")
    picture = torch.zeros(3, 40, 40, dtype=torch.uint8)
    width = 45 * (1 + len(model.prototypes)) + 5
    assert explain.draw(picture, explanation).width == max(480, width)
    dataset = [(image, i, torch.zeros(0, 3), i) for i, image in enumerate(images)]
    shown = gallery.Gallery(model, dataset, chosen=[0, 1])
    with torch.no_grad():
        shown.add(model(images), torch.tensor([0, 1]))
    assert shown.strip([0, 1]).width == width


# ---------------------------------------------------------------- ProtoPNet and its family

FAMILY = ["protopnet", "huang", "tesnet", "protopool"]


def patches_of(model, images):
    """e (B, N, D): after the last block and norm, without cls and registers."""
    return model.backbone(images)[:, 5:]


def class_weights(model):
    """What a prototype or slot adds to a class, as defined: (C, C, m), to class, of class."""
    own = torch.eye(3)[:, :, None].expand(3, 3, 10)
    if isinstance(model, METHODS["huang"]):
        return own * 10 * model.last.softmax(1)  # positive, of sum m, for the own class alone
    if isinstance(model, METHODS["protopool"]):
        return own
    return own - 0.5 * (1 - own)


def classify(model, cosines, labels):
    """The method's own way from cosines (B, N, P) to an Output."""
    if isinstance(model, METHODS["protopool"]):
        return model.classify_slots(cosines, model.assignment(), labels)
    return model.classify(cosines, model.class_weights(), labels)


@pytest.mark.parametrize("method", FAMILY)
def test_prototypes_score_by_hand_and_their_votes_sum_to_the_logits(method):
    torch.manual_seed(0)
    model, images = tiny(method), torch.randn(2, 3, 40, 40)
    if method != "huang":
        model.last.data = class_weights(model).flatten(1).clone()
    labels = torch.tensor([2, 0])
    e = patches_of(model, images)
    out, W = model(images, labels), class_weights(model)
    for b, label in enumerate(labels):
        z = model.add_on(e[b])  # (N, d)
        similarity = F.cosine_similarity(model.vectors[:, None], z, dim=2)  # (P, N)
        similarity = model.log_scale.exp() * similarity
        if method == "protopool":  # focal; a slot takes one prototype
            similarity = similarity - similarity.mean(1, keepdim=True)
            similarity = similarity[model.slots.argmax(2).flatten()]
        similarity = similarity.unflatten(0, (3, 10))  # (C, m, N)
        scores = similarity.amax(2)
        close = dict(atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.logits[b], (W * scores).sum((1, 2)), **close)
        shown = out.attention[0][b]
        torch.testing.assert_close(shown[:10].flatten(1), similarity[label], **close)
        assert (shown[10] == 0).all()  # the background
        votes = out.concept_logits[b].mean(0)  # of the prototypes shown
        others = (W * scores)[:, torch.arange(3) != label].sum((1, 2))
        torch.testing.assert_close(votes + others, out.logits[b], **close)
    predicted = model(images, out.logits.argmax(1)).attention[0]
    assert torch.equal(model(images).attention[0], predicted)
    z = model.add_on(e)
    cosines = protopnet.compare(z, model.vectors)
    expected = classify(model, cosines, labels)
    with torch.autocast("cpu", torch.bfloat16):  # bf16 would round classes together
        assert torch.equal(protopnet.compare(z, model.vectors), cosines)
        found = classify(model, cosines, labels)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.attention[0], expected.attention[0])


def test_the_losses_of_the_family_written_out():
    torch.manual_seed(0)
    distance = torch.rand(2, 6, 5)  # B, N, P
    own = torch.tensor([[True, True, False, False, False], [False, False, False, True, True]])
    nearest = distance.amin(1)
    inside = nearest[0, :2].min() + nearest[1, 3:].min()
    outside = nearest[0, 2:].min() + nearest[1, :3].min()
    torch.testing.assert_close(protopnet.cluster(distance, own), inside / 2)
    torch.testing.assert_close(protopnet.separation(distance, own), -outside / 2)
    z, shallow, peaks = torch.rand(2, 6, 5), torch.rand(2, 6, 7), torch.tensor([[0, 3], [5, 5]])
    total = 0
    for b in range(2):
        for peak in peaks[b]:
            deep = F.cosine_similarity(z[b, peak], z[b], dim=1)
            early = F.cosine_similarity(shallow[b, peak], shallow[b], dim=1)
            total += F.relu((deep - early).abs() - 0.1).sum().item()
    found = protopnet.alignment(z, shallow, peaks).item()
    assert found == pytest.approx(total / (2 * 2 * 6), rel=1e-4)


def test_the_weights_of_the_family_s_losses():
    images, labels = torch.randn(2, 3, 40, 40), torch.tensor([1, 2])
    close = dict(atol=0, rtol=1e-4)
    for method, offset, slope in (
            ("protopnet", 2, 2), ("tesnet", 0, 1), ("huang", 0, 1), ("protopool", 2, 2)):
        model = tiny(method)
        losses, logits = model.losses(images, labels, THETA)
        z = model.add_on(patches_of(model, images))
        owned = model.own.bool()  # (C, P)
        if method == "protopool":
            owned = protopnet.owned_by_slots(model.assignment())
        own, others = 0, 0  # means of the largest cosines
        for cosines, label in zip(protopnet.compare(z, model.vectors), labels):
            own += cosines[:, owned[label]].max() / 2
            others += cosines[:, ~owned[label]].max() / 2
        torch.testing.assert_close(losses["cluster"], 0.2 * (offset - slope * own), **close)
        separation = -0.08 * (offset - slope * others)
        torch.testing.assert_close(losses["separation"], separation, **close)
        bases = F.normalize(model.vectors, dim=1)[:30].view(3, 10, 128)
        if method in ("tesnet", "huang"):
            expected = 1e-4 * protopnet.orthonormality(bases)
            torch.testing.assert_close(losses["orthonormality"], expected, **close)
        if method == "tesnet":
            expected = 1e-7 * protopnet.subspace_separation(bases)
            torch.testing.assert_close(losses["subspaces"], expected, **close)
        if method == "huang":
            tokens = model.backbone.embed(images)
            for block in model.backbone.blocks[:2]:  # a quarter of five blocks, and one
                tokens = block(tokens)
            maps = model(images, labels).attention[0][:, :10]
            expected = 0.3 * protopnet.alignment(z, tokens[:, 5:], maps.flatten(2).argmax(2))
            torch.testing.assert_close(losses["alignment"], expected, **close)
        if method == "protopool":
            expected = protopnet.slot_similarity(model.assignment())
            torch.testing.assert_close(losses["slots"], expected, **close)
    for method in ("protopnet", "tesnet", "protopool"):
        model = tiny(method)
        model.before_epoch(1, 2)
        losses, _ = model.losses(images, labels, THETA)
        wrong = [model.last[c, k].abs() for c in range(3) for k in range(30) if k // 10 != c]
        torch.testing.assert_close(losses["last_layer"], 1e-4 * sum(wrong))


def test_tesnet_has_orthonormal_bases_of_subspaces_that_part():
    torch.manual_seed(0)
    bases = F.normalize(torch.randn(3, 2, 5), dim=2)  # C, m, d
    orthonormal, distances = 0, 0
    for c in range(3):
        orthonormal += (bases[c] @ bases[c].T - torch.eye(2)).abs().sum()
        for k in range(c):
            difference = bases[c].T @ bases[c] - bases[k].T @ bases[k]
            distances += difference.norm() / 2 ** 0.5
    torch.testing.assert_close(protopnet.orthonormality(bases), orthonormal)
    torch.testing.assert_close(protopnet.subspace_separation(bases), -distances)
    backbone = ivpt.VisionTransformer(128, 2, 8, 5, image_size=40)
    model = METHODS["tesnet"](backbone, 3)
    own = F.normalize(model.vectors, dim=1).view(3, 10, 128)
    assert protopnet.orthonormality(own) < 1e-3  # at the start
    tilted = own + 0.3 * own.roll(1, 1)
    tilted = F.normalize(tilted, dim=2)
    assert protopnet.orthonormality(tilted) > 1
    same = own[:1].expand(3, -1, -1)
    assert protopnet.subspace_separation(own) < protopnet.subspace_separation(same) - 1


def test_slots_of_protopool_become_one_hot_and_share_the_pool():
    model = tiny("protopool").train()
    assert model.vectors.shape == (202, 128) and model.slots.shape == (3, 10, 202)
    model.slots.data.mul_(0.2)  # the deviation at the start of training
    largest = []  # share of every slot, mean
    for epoch in range(8):
        model.before_epoch(epoch, 16)
        q = model.assignment()
        torch.testing.assert_close(q.sum(2), torch.ones(3, 10))
        largest.append(q.amax(2).mean().item())
        if epoch < 4:  # stage 1
            assert model.sharpness == pytest.approx(500 * (epoch + 1) ** 0.5)
    assert largest[0] < largest[3] < 1 and largest[4:] == [1] * 4
    assert torch.equal(q.argmax(2), model.slots.argmax(2))  # no noise in the last stage
    model.stage = 1
    assert not torch.equal(model.assignment(), model.assignment())
    model.eval()
    assert torch.equal(model.assignment(), q)


def test_a_class_owns_what_its_slots_take_most_of_and_its_slots_part():
    q = torch.zeros(3, 10, 202)
    q[:, :, 7] = 1.0  # all slots of all classes
    assert protopnet.owned_by_slots(q).nonzero().tolist() == [[0, 7], [1, 7], [2, 7]]
    q = torch.full((1, 2, 5), 0.1)
    q[0, 0, 3], q[0, 1, 1] = 0.6, 0.6
    assert protopnet.owned_by_slots(q).nonzero()[:, 1].tolist() == [1, 3]
    q = torch.eye(202)[:30].view(3, 10, 202)  # every slot another one
    assert protopnet.slot_similarity(q).item() == pytest.approx(0)
    q[:, 1] = q[:, 0]  # two of ten are the same, in each class
    assert protopnet.slot_similarity(q).item() == pytest.approx(0.2)


@pytest.mark.parametrize("method", ["protopnet", "tesnet", "protopool"])
def test_projection_puts_every_prototype_on_a_patch_of_its_class_before_the_last_stage(method):
    model = tiny(method)
    images = torch.randn(9, 3, 40, 40)
    dataset = [(image, i % 2) for i, image in enumerate(images)]  # class 2 has no image
    before, stages = model.vectors.detach().clone(), []
    if method == "protopool":
        model.slots.data.mul_(1e-3)  # while they are trained, noise decides
    first = 3 if method == "protopool" else 7  # epochs of stage 1
    for epoch in range(12):
        model.train().before_epoch(epoch, 12)
        stages.append(model.stage)
        model.after_epoch(epoch, 12, dataset)
        assert torch.equal(model.vectors, before) == (epoch + 1 < first), epoch
    assert stages == [1] * first + [2] * (12 - first)
    assert [model.first_stage(epochs) for epochs in (1, 2, 3)] == (
        [1, 1, 1] if method == "protopool" else [1, 1, 2])
    owned = model.own.bool()  # (C, P)
    if method == "protopool":
        owned = protopnet.owned_by_slots(model.assignment())
    patches = [model.add_on(patches_of(model, images[c::2])).flatten(0, 1) for c in (0, 1)]
    for j in owned[:2].any(0).nonzero().flatten():
        allowed = torch.cat([patches[c] for c in (0, 1) if owned[c, j]])
        nearest = F.cosine_similarity(before[j], allowed, dim=1).argmax()
        torch.testing.assert_close(model.vectors[j], allowed[nearest], atol=1e-4, rtol=1e-4)
    assert (model.sources[~owned[:2].any(0)] == 0).all()
    model.add_on.weight.data.mul_(torch.rand(128))  # the patch stays the same when A is trained
    z = model.add_on(patches_of(model, images))
    expected = protopnet.compare(z, model.add_on(model.sources))
    torch.testing.assert_close(model.cosines(images), expected)
    model.after_epoch(11, 12, dataset)
    torch.testing.assert_close(model.vectors, model.add_on(model.sources))
    model.stage = 1  # as in a loaded model
    torch.testing.assert_close(model.cosines(images), expected)


# ---------------------------------------------------------------- parts

def birds_in_the_middle(n=24, generator=torch.Generator().manual_seed(0)):
    """Images (3, 40, 40) with a bright square of three stripes, and labels, as a dataset."""
    images = torch.randn(n, 3, 40, 40, generator=generator)
    for stripe, top in enumerate((8, 16, 24)):
        images[:, stripe, top:top + 8, 8:32] += 4.0
    return [(image, i % 3) for i, image in enumerate(images)]


def started_parts(method="parts", **changes):
    torch.manual_seed(0)
    backbone = ivpt.load_backbone("toy", 40)
    model = METHODS[method](backbone, 3, prototypes=(4, 3, 3))
    for name, value in changes.items():
        setattr(model, name, value)
    dataset = birds_in_the_middle()
    model.start(dataset, SimpleNamespace(seed=0, amp=False))
    return model.eval(), dataset


def test_parts_shares_and_features_patch_by_patch():
    torch.manual_seed(0)
    layer, patches = parts.Clusters(3, 64, (3, 4)), torch.randn(2, 12, 64)
    layer.prototypes.normal_()
    layer.means.copy_(layer.directions(patches).mean(0)[[0, -1]])  # so both win some patches
    for e, a, features in zip(patches, *layer(patches)):
        smooth = torch.empty(12, 64)
        for row, column in itertools.product(range(3), range(4)):
            around = []  # nine patches, those of the rim repeated
            for y, x in itertools.product((-1, 0, 1), (-1, 0, 1)):
                y, x = min(max(row + y, 0), 2), min(max(column + x, 0), 3)
                around.append(e[4 * y + x])
            smooth[4 * row + column] = torch.stack(around).mean(0)
        smooth = 8 * smooth / smooth.norm(dim=1, keepdim=True)  # 8 = sqrt(64)
        to_object, to_rest = ((smooth - mean).norm(dim=1) for mean in layer.means)
        assert 0 < (to_object < to_rest).sum() < 12
        differs = smooth - smooth[to_object < to_rest].mean(0)
        differs = 8 * differs / differs.norm(dim=1, keepdim=True)
        d2 = (differs[None] - layer.prototypes[:, None]).square().sum(2)
        expected = (-d2 / 16).softmax(0)  # 2 sqrt(D)
        torch.testing.assert_close(a, expected, atol=1e-5, rtol=1e-4)
        for k in range(2):  # the background has no feature
            won = expected.argmax(0) == k
            region = (expected[k, won, None] * e[won]).sum(0) / expected[k, won].sum()
            torch.testing.assert_close(features[k], region.nan_to_num(), atol=1e-5, rtol=1e-4)


def test_parts_are_clusters_of_the_object_and_whiten_what_they_pool():
    model, dataset = started_parts(shrinkage=0.0)
    images = torch.stack([image for image, _ in dataset])
    layers = model.backbone.last_patches(images, 3)
    (e, foreground, background), *_ = model.sample_regions(dataset, 0)
    first = model.layers[0]
    directions = first.directions(layers[0]).flatten(0, 1)
    assert len(directions) == len(e)  # all patches, in an order of the sample's own
    to_object, to_rest = first.means
    y, x = torch.meshgrid(torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 5), indexing="ij")
    radius2 = (y ** 2 + x ** 2).flatten().repeat(len(images))
    masks = ivpt.find_foreground(directions, radius2, 0)
    close = dict(atol=0.1, rtol=0.1)
    torch.testing.assert_close(to_object, directions[masks[0]].mean(0), **close)
    torch.testing.assert_close(to_rest, directions[~masks[0]].mean(0), **close)
    centres = first.prototypes
    nearest = torch.cdist(e[foreground], centres[:-1]).argmin(1)
    for k in range(3):
        mean = e[foreground][nearest == k].mean(0)
        torch.testing.assert_close(centres[k], mean, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(centres[-1], e[background].mean(0), atol=1e-4, rtol=1e-4)
    features = torch.cat([layer(patches)[1] for layer, patches in zip(model.layers, layers)], 1)
    deviation = features.std(2, correction=0, keepdim=True) + 1e-9  # 0 of an empty region
    features = (features - features.mean(2, keepdim=True)) / deviation
    torch.testing.assert_close(model.read(images)[1], features, atol=1e-3, rtol=0)
    z, _ = model.votes(features)  # (24, V, D)
    assert z.mean(0).abs().max() < 1e-3 * z.abs().max()
    spread = torch.linalg.svdvals(less_class_means(z).transpose(0, 1)).square() / 24
    assert (spread[:, :18] - 1).abs().max() < 0.1  # of 21 directions in a width of 128


def less_class_means(z):
    """z of started_parts' images, the mean of each of the three classes subtracted."""
    return torch.stack([z[i] - z[i % 3::3].mean(0) for i in range(len(z))])


def test_parts_shrink_a_covariance_before_they_whiten():
    votes = parts.Votes(3, 5, 2)
    x = (torch.randn(3, 50, 5) @ torch.randn(3, 5, 5)).transpose(0, 1)
    x[:, 2] = 0.0  # a concept that wins no patch
    covariances = torch.stack([torch.cov(x[:, k].T, correction=0) for k in range(3)])
    votes.whiten(x.mean(0), covariances, 0.25)
    assert torch.equal(votes.mean, x.mean(0)) and not votes.whitening[2].any()
    for k, covariance in enumerate(covariances[:2]):
        shrunk = 0.75 * covariance + 0.25 * covariance.diagonal().mean() * torch.eye(5)
        W = votes.whitening[k]
        torch.testing.assert_close(W.T @ shrunk @ W, torch.eye(5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("labels, within", [
    ([0, 0, 0, 2, 2, 2], True), ([0, 1, 2, 3, 4, 5], False)])
def test_the_covariance_within_classes(labels, within):
    x, labels = torch.randn(6, 2, 4).double(), torch.tensor(labels)
    counts = torch.bincount(labels, minlength=7).double()  # some classes have no image
    sums = torch.zeros(7, 2, 4).double().index_add_(0, labels, x)
    squares = torch.einsum("nvd,nve->vde", x, x)
    mean, covariance = parts.within_classes(sums, squares, counts)
    torch.testing.assert_close(mean, x.mean(0))
    if within:
        x = x - torch.stack([x[labels == label].mean(0) for label in labels])
    for v in range(2):
        torch.testing.assert_close(covariance[v], torch.cov(x[:, v].T, correction=0))


def test_parts_vote_by_weights_of_their_own_and_nothing_else_is_trained():
    model, dataset = started_parts()
    images, labels = torch.stack([image for image, _ in dataset[:6]]), torch.arange(6) % 3
    nn.init.normal_(model.votes.weight)
    with torch.no_grad():
        out = model(images)
    assert out.concept_logits.shape == (6, 3 + 2 + 2, 3) and out.fused == []
    torch.testing.assert_close(out.logits, out.concept_logits.mean(1))
    for g in range(2):  # the last layer's come last
        score = out.features[:, g] @ model.votes.weight[5 + g]
        torch.testing.assert_close(out.concept_logits[:, 5 + g], score, atol=1e-4, rtol=1e-4)
    owners = [maps.argmax(1) for maps in model(torch.stack([x for x, _ in dataset])).attention]
    for l, groups in enumerate(out.groups):
        assert groups.shape == (6, model.prototypes[l] - 1, 2)
        for k, group in enumerate(groups[0]):
            shared = [((owners[l] == k) & (owners[2] == g)).sum().item() for g in range(2)]
            assert group.sum() == 1 and shared[group.argmax()] == max(shared)
    fixed = {n: x.clone() for n, x in model.state_dict().items() if n != "votes.weight"}
    optimizer, _ = train.make_optimizer(model, SimpleNamespace(lr=0.1, batch_size=16))
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    first = None
    for _ in range(5):
        losses, _ = model.train().losses(images, labels, THETA)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        first = first or losses["loss"].item()
    assert losses["loss"] < 0.7 * first
    for name, value in fixed.items():
        assert torch.equal(model.state_dict()[name], value), name
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = model.eval()(images)
    assert all(maps.dtype == torch.float32 for maps in rounded.attention)


def test_a_vote_of_cls_beside_those_of_the_parts():
    model, dataset = started_parts("parts-cls", shrinkage=0.0)
    images = torch.stack([image for image, _ in dataset])
    nn.init.normal_(model.votes.weight)
    out = model(images)
    assert out.concept_logits.shape == (24, 7 + 1, 3)
    torch.testing.assert_close(out.logits, out.concept_logits.mean(1))
    cls = model.backbone(images)[:, 0]
    cls = (cls - cls.mean(1, keepdim=True)) / cls.std(1, correction=0, keepdim=True)
    z = (cls - cls.mean(0)) @ model.votes.whitening[-1]
    spread = torch.linalg.svdvals(less_class_means(z)).square() / 24
    assert (spread[:18] - (8 / 3) ** 2).abs().max() < 0.05  # eight votes, three layers
    score = z @ model.votes.weight[-1]
    torch.testing.assert_close(out.concept_logits[:, -1], score, atol=0.2, rtol=0)  # of 80
    for g in range(2):
        score = out.features[:, g] @ model.votes.weight[5 + g]
        torch.testing.assert_close(out.concept_logits[:, 5 + g], score, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method, view", [("parts", "test"), ("vpt-deep", "train")])
def test_votes_are_learnt_from_the_test_view(method, view, birds, tmp_path, monkeypatch):
    seen = []

    def losses(model, images, labels, theta):
        seen.extend(images)
        logits = model(images).logits
        return {"loss": F.cross_entropy(logits, labels)}, logits

    monkeypatch.setattr(METHODS[method], "losses", losses)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: {})
    monkeypatch.setattr(evaluate, "table", str)
    words = ["--data", str(birds), "--method", method, *SMALL, *FEW.get(method, [])]
    train.train(train.parse([*words, "--epochs", "1", "--out", str(tmp_path)]))
    images = data.Images(birds, "train", view, 40, seed=42)
    order = sum(train.epoch_batches(len(images), SimpleNamespace(seed=42, batch_size=16), 0), [])
    assert torch.equal(torch.stack(seen), torch.stack([images[i][0] for i in order]))


# ---------------------------------------------------------------- all

def test_each_loss_reaches_what_its_paper_trains():
    images, labels = torch.randn(2, 3, 40, 40), torch.tensor([0, 1])
    layers = {"add_on", "vectors"}
    scores = layers | {"log_scale"}
    first_stage = dict(classification=scores, cluster=layers, separation=layers)
    bases = {"vectors"}
    expected = {
        "vpt-deep": {"classification": {"prompts", "classifier"}},
        "e2vpt": {"classification": {"prompts", "classifier", "key_values"}},
        "gated-vpt": {"classification": {"prompts", "classifier", "gates", "temperatures"}},
        "prompt-cam": {"classification": {"prompts", "class_prompts", "classifier"}},
        "protopnet": first_stage,
        "huang": first_stage | dict(
            classification=scores | {"last"}, orthonormality=bases, alignment={"add_on"}),
        "tesnet": first_stage | dict(orthonormality=bases, subspaces=bases),
        "protopool": first_stage | dict(classification=scores | {"slots"}, slots={"slots"}),
    }
    for method, learners in expected.items():
        model = tiny(method).train()
        losses, logits = model.losses(images, labels, THETA)
        del losses["loss"]
        found = {name: reached_modules(model, loss) for name, loss in losses.items()}
        assert found == learners, method
        assert torch.equal(losses["classification"], F.cross_entropy(logits, labels))
    for method in ("protopnet", "tesnet", "protopool"):
        model = tiny(method).train()
        model.before_epoch(1, 2)
        losses, _ = model.losses(images, labels, THETA)
        del losses["loss"]
        found = {name: reached_modules(model, loss) for name, loss in losses.items()}
        learners = {"last", "add_on", "log_scale"}
        assert found == {"classification": learners, "last_layer": {"last"}}, method


@pytest.mark.parametrize("method", METHODS)
def test_every_trained_parameter_has_one_rate_and_the_loss_is_a_sum(method):
    model = tiny(method)
    rates = {id(p): [] for p in model.parameters()}
    for group in model.parameter_groups(RATES):
        for p in group["params"]:
            rates[id(p)].append(group["lr"])
    slow = {"prompts", "key_values", "add_on", "vectors", "log_scale", "concepts"}
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        if part == "backbone":  # frozen
            assert not p.requires_grad and rates[id(p)] == [], name
            continue
        elif name == "concepts.0.bias":
            rate = 3.0
        elif part == "slots":
            rate = 0.3 * 2.0
        elif name == "free_prompts":
            rate = 5.0
        elif name == "gates":
            rate = 10.0
        else:
            rate = 2.0 if part in slow else 1.0
        assert p.requires_grad and rates[id(p)] == [rate], name
    losses, logits = model.losses(torch.randn(2, 3, 40, 40), torch.tensor([0, 2]), THETA)
    total = losses.pop("loss")
    assert logits.shape == (2, 3) and total.requires_grad
    torch.testing.assert_close(total, sum(losses.values()))


@pytest.mark.parametrize("method", METHODS)
def test_what_a_class_says_of_its_method_is_true(method):
    cls = METHODS[method]
    assert cls.class_specific == (method in [*FAMILY, "prompt-cam"])
    hooks = cls.before_epoch, cls.after_epoch
    assert cls.has_stages == (hooks != (ivpt.Method.before_epoch, ivpt.Method.after_epoch))
    assert "lr" in cls.rates and cls.rates.keys() <= {f.name for f in fields(train.Options)}


WORDS = {  # how an option of IVPT is typed
    "prototypes": "--prototypes 6 5",
    "bias_after_softmax": "--no-bias-after-softmax",
    "fusion_mlp": "--no-fusion-mlp",
    "tune": "--tune all",
    "no_bias": "--no-bias",
    "no_regions": "--no-regions",
    "no_cross_layer": "--no-cross-layer",
    "no_fusion": "--no-fusion",
    "recipe": "--recipe paper",
    "start": "--start noise",
    "lr_prototypes": "--lr-prototypes 0.5",
    "lr_fusion": "--lr-fusion 0.5",
    "lr_bias": "--lr-bias 0.5",
    "lr_backbone": "--lr-backbone 0.5",
}


@pytest.mark.parametrize("method", METHODS)
def test_an_option_that_a_method_does_not_take_is_refused(method):
    assert WORDS.keys() == set(ivpt.IVPT.accepts)
    for name, words in WORDS.items():
        words = ["--method", method, *words.split()]
        if name in METHODS[method].accepts:
            assert train.parse(words).sources[name] == "typed"
            continue
        option = words[2].replace("--no-bias-", "--bias-").replace("--no-fusion-", "--fusion-")
        with pytest.raises(ValueError, match=f"{option}: .*{method}"):
            train.parse(words)


def test_which_options_of_ivpt_the_methods_take():
    taken = {method: set(cls.accepts) for method, cls in METHODS.items()}
    assert taken.pop("parts") == taken.pop("parts-cls") == {"prototypes"}
    assert taken.pop("vpt-deep-proto") == {
        "bias_after_softmax", "no_bias", "no_regions", "lr_prototypes", "lr_fusion", "lr_bias"}
    assert all(names == {"lr_prototypes"} for names in taken.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_gives_the_method_back(method, tmp_path):
    images, model = torch.randn(2, 3, 40, 40), tiny(method)
    for x in model.buffers():
        if x.is_floating_point() and x is not getattr(model, "own", None):
            x.uniform_(0.5, 1.5)
    data.save(tmp_path / "last.pt", dict(
        options=options_of(method), classes=["a", "b", "c"], model=model.state_dict()))
    loaded, _ = ivpt.load_checkpoint(tmp_path / "last.pt")
    assert type(loaded) is METHODS[method]
    out = loaded(images)
    assert out.logits.any() and torch.equal(out.logits, model(images).logits)
    assert [maps.shape for maps in out.attention] == [(2, K, 5, 5) for K in loaded.prototypes]


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "birds"
    toy_birds.draw(folder, num_train=2, num_test=1)
    return folder


SMALL = ["--weights", "toy", "--pretrain", "0", "--image-size", "40", "--epochs", "2",
         "--workers", "0", "--device", "cpu"]
FEW = dict.fromkeys(["parts", "parts-cls"], ["--prototypes", "4", "3"])  # clusters take time


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_is_evaluated_drawn_and_explained(
        method, birds, tmp_path, monkeypatch, capsys):
    """A run that is cut in its second epoch ends, bit for bit, where the uncut run ends."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = ["--data", str(birds), "--method", method, *SMALL, "--batch-size", "10"]
    options += FEW.get(method, [])
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", lambda *_, **__: {})  # not needed of the uncut run
        patch.setattr(evaluate, "table", str)
        train.train(train.parse([*options, "--out", str(whole)]))
        real = train.epoch_batches
        patch.setattr(train, "epoch_batches",
                      lambda *args: real(*args) if args[2] == 0 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(train.parse([*options, "--out", str(run)]))
    if METHODS[method].has_stages:
        with pytest.raises(ValueError, match="trained with epochs 2, now 3"):
            train.train(train.parse(["--resume", "--out", str(run), "--epochs", "3"]))
    metrics = train.train(train.parse(["--resume", "--out", str(run)]))
    first, second = (torch.load(folder / "last.pt", weights_only=True) for folder in (whole, run))
    for name, value in first["model"].items():
        assert torch.equal(second["model"][name], value), name
    lines = (run / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(math.isfinite(json.loads(line)["loss"]) for line in lines)

    ckpt = ["--ckpt", str(run / "last.pt")]
    evaluate.main([*ckpt, "--visualize", str(tmp_path / "pictures")])
    found = json.loads((run / "metrics.json").read_text())
    assert found["layers"] == metrics["layers"]
    assert found["protocol"]["recipe"]["method"] == method
    assert (tmp_path / "pictures" / "index.html").is_file()
    capsys.readouterr()
    evaluate.main([*ckpt, "--image", str(next(birds.rglob("*.jpg")))])
    without_votes = "no votes" in capsys.readouterr().out
    assert without_votes == (method in ("vpt-deep", "e2vpt", "gated-vpt", "prompt-cam"))
    assert len(list((run / "explained").iterdir())) == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_a_batch_is_the_mean_of_its_halves(method, monkeypatch):
    """So several processes, whose gradients are averaged, train like one; presence left out."""
    monkeypatch.setattr(F, "gumbel_softmax", lambda logits, **_: logits.softmax(-1))
    monkeypatch.setattr(train, "presence", lambda A: 0 * A.sum())
    model, images = tiny(method).train(), torch.randn(4, 3, 40, 40)
    labels, gradients = torch.tensor([0, 1, 2, 1]), []
    for part in (slice(None), slice(2), slice(2, None)):
        model.zero_grad()
        losses, _ = model.losses(images[part], labels[part], THETA)
        losses["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    whole, first, second = gradients
    assert whole.keys() == first.keys() == second.keys()
    for name, expected in whole.items():
        found = (first[name] + second[name]) / 2
        assert (found - expected).norm() <= 1e-3 * expected.norm() + 1e-7, name


TRAIN = """import os, torch, train
args = train.parse()
def keep(model, *_, **__):
    torch.save(model.state_dict(), args.out + "/rank" + os.environ["RANK"])
    return {}
train.evaluate.evaluate, train.evaluate.table = keep, str
train.train(args)
"""


def test_two_processes_agree_on_what_an_epoch_changes(birds, tmp_path):
    """E2VPT prunes its prompts after the first epoch, in every process."""
    words = ["--data", birds, *SMALL, "--batch-size", 20, "--method", "e2vpt", "--no-amp"]
    torchrun(TRAIN, *words, "--out", tmp_path)
    model, checkpoint = ivpt.load_checkpoint(tmp_path / "last.pt")
    assert checkpoint["epoch"] == 2 and not model.mask.all()
    states = [torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in range(2)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
