"""The specification of model.py: oracles in fp64, gradient stops, weights, checkpoints."""
import fnmatch
from fractions import Fraction

import pytest
import torch
import torch.nn as nn

import model as ivpt

# ---------------------------------------------------------------- the vision transformer, in fp64
FAMILIES = {"plain": {}, "registers": dict(registers=4), "swiglu": dict(swiglu=96),
            "swiglu_registers": dict(swiglu=96, registers=4)}


def tiny_backbone(image_size=70, depth=5, seed=0, **family):
    """A ViT of 2 heads whose every parameter is random, so that no term of the forward can hide."""
    torch.manual_seed(seed)
    backbone = ivpt.VisionTransformer(
        width=128, depth=depth, patch_size=14, pos_grid=5, image_size=image_size, **family)
    for name, p in backbone.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(p, mean, 0.2 if p.dim() < 2 else 0.08)
    return backbone.eval()


def cubic(t, a):
    """Keys' cubic convolution kernel."""
    near = (a + 2) * t ** 3 - (a + 3) * t ** 2 + 1
    far = a * t ** 3 - 5 * a * t ** 2 + 8 * a * t - 4 * a
    return torch.where(t <= 1, near, torch.where(t < 2, far, 0.0))


def bicubic_matrix(old, new, antialias):
    """Resampling weights (new, old). Antialiased: a = -0.5, stretched when shrinking, renormalised
    at the edges. Otherwise a = -0.75 at scale (new + 0.1) / old, edges repeated."""
    row, column = torch.arange(new).double()[:, None] + 0.5, torch.arange(-3, old + 3) + 0.5
    if antialias:
        W = cubic((column[3:-3] - row * old / new).abs() / max(old / new, 1.0), -0.5)
        return W / W.sum(1, keepdim=True)
    W = cubic((column - row * old / (new + 0.1)).abs(), -0.75)
    inside = torch.arange(-3, old + 3).clamp(0, old - 1)
    return torch.zeros(new, old).double().index_add_(1, inside, W)


def oracle_positions(state, h, w):
    cls, grid = state["pos_embed"].split([1, state["pos_embed"].shape[1] - 1], 1)
    side = round(grid.shape[1] ** 0.5)
    grid = grid.view(side, side, -1)
    if (h, w) != (side, side):
        rows, columns = (bicubic_matrix(side, n, "register_tokens" in state) for n in (h, w))
        grid = torch.einsum("yi,xj,ijd->yxd", rows, columns, grid)
    return torch.cat([cls, grid.reshape(1, h * w, -1)], 1)


def part_of(state, prefix):
    """The entries of a state dict below a prefix, in fp64."""
    return {k.removeprefix(prefix): v.double() for k, v in state.items() if k.startswith(prefix)}


def oracle_norm(x, state, name, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / scale * state[name + ".weight"].flatten() + state[name + ".bias"].flatten()


def oracle_linear(x, state, name):
    return x @ state[name + ".weight"].T + state[name + ".bias"]


def oracle_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2 ** 0.5))


def oracle_block(x, state, i):
    """One pre-norm block from the state dict alone, heads one by one."""
    s, heads = part_of(state, f"blocks.{i}."), []
    qkv = oracle_linear(oracle_norm(x, s, "norm1"), s, "attn.qkv")
    for q, k, v in zip(*(part.split(64, -1) for part in qkv.chunk(3, -1))):
        heads.append((q @ k.transpose(1, 2) / 8).softmax(-1) @ v)
    x = x + s["ls1.gamma"] * oracle_linear(torch.cat(heads, -1), s, "attn.proj")
    y = oracle_norm(x, s, "norm2")
    if "mlp.w12.weight" in s:
        gate, value = oracle_linear(y, s, "mlp.w12").chunk(2, -1)
        y = oracle_linear(gate * gate.sigmoid() * value, s, "mlp.w3")
    else:
        y = oracle_linear(oracle_gelu(oracle_linear(y, s, "mlp.fc1")), s, "mlp.fc2")
    return x + s["ls2.gamma"] * y


def oracle_embed(images, state, patch=14):
    """images -> tokens (B, T, D), h, w; patch by patch, row by row."""
    s, tokens = part_of(state, ""), []
    (B, _, H, W), weight = images.shape, s["patch_embed.proj.weight"].flatten(1)
    for y in range(0, H, patch):
        for x in range(0, W, patch):
            tile = images[:, :, y:y + patch, x:x + patch].double().flatten(1)
            tokens.append(tile @ weight.T + s["patch_embed.proj.bias"])
    tokens = torch.cat([s["cls_token"].expand(B, -1, -1), torch.stack(tokens, 1)], 1)
    tokens = tokens + oracle_positions(s, H // patch, W // patch)
    registers = s.get("register_tokens", tokens[:1, :0]).expand(B, -1, -1)
    return torch.cat([tokens[:, :1], registers, tokens[:, 1:]], 1), H // patch, W // patch


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(70, 70), (98, 98), (42, 42), (56, 112), (112, 28)], ids=str)
def test_vit_equals_an_independent_forward(family, size):
    """The grid itself, larger, smaller and rectangular: both interpolations. fp32 against fp64."""
    backbone = tiny_backbone(depth=2, **FAMILIES[family])
    images, state = torch.randn(2, 3, *size), backbone.state_dict()
    expected, _, _ = oracle_embed(images, state)
    for i in range(2):
        expected = oracle_block(expected, state, i)
    expected = oracle_norm(expected, part_of(state, ""), "norm")
    with torch.no_grad():
        torch.testing.assert_close(backbone(images).double(), expected, atol=2e-4, rtol=1e-4)


# ---------------------------------------------------------------- weights

@pytest.mark.parametrize("name", [name for name in ivpt.ARCHITECTURES if name != "toy"])
def test_state_dict_names_and_shapes_are_metas(name):
    D, depth = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "g": (1536, 40)}[name[3]]
    linear = {"attn.qkv": (3 * D, D), "attn.proj": (D, D)}
    if name[3] == "g":
        linear |= {"mlp.w12": (8192, 1536), "mlp.w3": (1536, 4096)}
    else:
        linear |= {"mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
    expected = {"cls_token": (1, 1, D), "pos_embed": (1, 1370, D), "mask_token": (1, D),
                "patch_embed.proj.weight": (D, 3, 14, 14), "patch_embed.proj.bias": (D,),
                "norm.weight": (D,), "norm.bias": (D,)}
    if name.endswith("_reg4"):
        expected["register_tokens"] = (1, 4, D)
    vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
    for block in [f"blocks.{i}." for i in range(depth)]:
        expected |= {block + key + ".weight": shape for key, shape in linear.items()}
        expected |= {block + key + ".bias": shape[:1] for key, shape in linear.items()}
        expected |= {block + key: (D,) for key in vectors}
    with torch.device("meta"):
        backbone = ivpt.VisionTransformer(**ivpt.ARCHITECTURES[name], image_size=224)
    assert {k: tuple(v.shape) for k, v in backbone.state_dict().items()} == expected
    assert backbone.blocks[0].attn.heads == D // 64


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loading_keeps_every_value_and_gives_fp32(family, dtype, tmp_path, monkeypatch):
    """The architecture is read off the file; tensors are assigned to a module without memory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    state = tiny_backbone(depth=3, **FAMILIES[family]).state_dict()
    state = {name: value.to(dtype) for name, value in state.items()}
    torch.save(state, tmp_path / "vit.pth")
    loaded = ivpt.load_backbone("~/vit.pth", 70)
    assert not loaded.training and loaded.state_dict().keys() == state.keys()
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float()), name


def one_line(kind, *words):
    """The error of this kind is one line that holds these words."""
    return pytest.raises(kind, match=r"\A[^\n]*" + "[^\n]*".join(words) + r"[^\n]*\Z")


BROKEN = {  # what is said, and what was done to the state dict
    "blocks.1.ls2.gamma": lambda state: state.pop("blocks.1.ls2.gamma"),
    "fc1.bias.*.3.": lambda state: state.update({"blocks.1.mlp.fc1.bias": torch.ones(3)}),
    "head.weight": lambda state: state.update({"head.weight": torch.zeros(2, 2)}),
    "epoch": lambda state: state.update(epoch=3),
    "not a ViT's": lambda state: state.pop("pos_embed"),
    "not a torch file of tensors": lambda state: state.update(code=Fraction(1, 2)),
}


@pytest.mark.parametrize("says", BROKEN)
def test_weights_that_do_not_fit_are_named_in_one_line(says, tmp_path):
    state = tiny_backbone(depth=2).state_dict()
    BROKEN[says](state)
    torch.save(state, tmp_path / "vit.pth")
    with one_line(ValueError, "vit.pth", says):
        ivpt.load_backbone(tmp_path / "vit.pth", 70)


def test_a_named_backbone_is_downloaded_once_and_a_damaged_one_removed(tmp_path, monkeypatch):
    """Served from a file:// address, into an empty cache of torch.hub."""
    name, meta = "dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth", "https://dl.fbaipublicfiles.com"
    assert ivpt.URL.format(folder="vitb14", name="vitb14_reg4") == f"{meta}/dinov2/{name}"
    source, cached = tmp_path / "vit.pth", tmp_path / "hub" / "checkpoints" / "vit.pth"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(ivpt, "URL", source.as_uri())
    with one_line(OSError, "could not fetch", "--weights"):
        ivpt.load_backbone("vits14", 70)
    for content in (b"", b"<html>log in</html>", b"PK\3\4 cut off"):
        source.write_bytes(content)
        with one_line(OSError, "could not fetch", str(cached), "--weights"):
            ivpt.load_backbone("dinov2_vits14", 70)
        assert not cached.exists()
        with one_line(ValueError, "vit.pth", "not a torch file of tensors"):
            ivpt.load_backbone(source, 70)
    torch.save(tiny_backbone().state_dict(), source)
    ivpt.load_backbone("vits14", 70)
    source.unlink()
    assert ivpt.load_backbone("vits14", 70).grid == (5, 5) and cached.exists()


def test_what_cannot_be_built_is_refused():
    with one_line(FileNotFoundError, "vitx14", "vitb14_reg4"):
        ivpt.load_backbone("vitx14", 224)
    for size in (225, 10, (224, 100)):
        with one_line(ValueError, "divisible by the patch of 14"):
            ivpt.load_backbone("vits14", size)
    with one_line(ValueError, "at least 3 a side"):
        ivpt.IVPT(tiny_backbone(image_size=28), 3)
    for prototypes in [(5,), (17, 14, 11, 8, 1), (9,) * 9]:
        with one_line(ValueError, "prototypes"):
            ivpt.IVPT(tiny_backbone(), 3, prototypes)


# ---------------------------------------------------------------- IVPT, in fp64
RECIPES = {"paper": dict(bias_after_softmax=True, fusion_mlp=True, tune="none"),
           "released": dict(bias_after_softmax=False, fusion_mlp=False, tune="tokens")}
PROTOTYPES = (7, 6, 5, 4, 4)  # the last: G = 3 concepts and the background


def tiny_ivpt(recipe="paper", family="registers", classes=6, **ablation):
    backbone = tiny_backbone(**FAMILIES[family])
    model = ivpt.IVPT(backbone, classes, PROTOTYPES, **RECIPES[recipe], **ablation)
    for name, p in model.named_parameters():
        if not name.startswith("backbone."):
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            nn.init.normal_(p, mean, 0.2 if "prototypes" in name else 0.1)
    return model.eval()


def oracle_regions(e, q, b, after, smooth_first):
    """Section 3 for one image, patch by patch: e (N, D), q (K, D), b (K, N) -> the raw a, the
    smoothed a (K, N), p (K, D), mass (K)."""
    a, p, mass = torch.zeros_like(b), torch.zeros_like(q), torch.zeros_like(q[:, 0])
    for n in range(len(e)):
        logits = -(e[n] - q).square().sum(1)
        if after:
            a[:, n] = (logits.softmax(0) + b[:, n]).clamp(min=0)
        else:
            a[:, n] = (logits + b[:, n]).softmax(0)
    smooth = (a + 1e-6) / (a + 1e-6).sum(0)
    pooling = smooth if smooth_first else a
    for n in range(len(e)):
        k = pooling[:, n].argmax()
        p[k] += pooling[k, n] * e[n]
        mass[k] += pooling[k, n]
    return a, smooth, p / mass.clamp(min=1e-300)[:, None], mass


def oracle_fusion(p, mass, state, name):
    """p (B, K-1, D), mass (B, K-1) -> prompts (B, G, D), S (B, K-1, G)."""
    S = oracle_linear(p, state, name + ".grouping").softmax(-1)
    S[mass == 0] = 1 / S.shape[2]
    coarse = torch.einsum("bkg,bkd->bgd", S, p) / S.sum(1)[..., None]
    y = oracle_norm(coarse.flatten(1), state, name + ".norm", 1e-5).view_as(coarse)
    if name + ".head.weight" in state:
        return oracle_linear(y, state, name + ".head"), S
    y = oracle_gelu(oracle_linear(y, state, name + ".head.0"))
    return oracle_linear(y, state, name + ".head.2"), S


def oracle_ivpt(model, images):
    """Evaluation of IVPT from its parameters alone."""
    P, after = part_of(model.state_dict(), ""), model.concepts[0].bias_after_softmax
    vit, L = part_of(P, "backbone."), len(PROTOTYPES)
    first, attention, groups, fused = len(model.backbone.blocks) - L + 1, [], [], []
    tokens, h, w = oracle_embed(images, vit)
    T = tokens.shape[1]
    for i in range(first):
        tokens = oracle_block(tokens, vit, i)
    for l in range(L):
        e = oracle_norm(tokens[:, T - h * w:], vit, "norm")
        q, b = P[f"concepts.{l}.prototypes"], P[f"concepts.{l}.bias"]
        found = [oracle_regions(x, q, b, after, smooth_first=l == L - 1) for x in e]
        a, smooth, p, mass = (torch.stack(part) for part in zip(*found))
        attention.append(smooth.unflatten(2, (h, w)))
        if l < L - 1:
            prompts, S = oracle_fusion(p[:, :-1], mass[:, :-1], P, f"fusions.{l}")
            tokens = oracle_block(torch.cat([tokens, prompts], 1), vit, first + l)[:, :T]
            concepts = torch.einsum("bkg,bkn->bgn", S, a[:, :-1])  # of raw shares
            maps = torch.cat([concepts, a[:, -1:]], 1)
            groups.append(S)
            fused.append((maps / maps.sum(1, keepdim=True)).unflatten(2, (h, w)))
    z = oracle_norm(p.flatten(1), P, "norm", 1e-5).view_as(p)
    concept_logits = z[:, :-1] @ P["classifier.weight"].T
    return ivpt.Output(concept_logits.mean(1), concept_logits, attention, groups, fused, z)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ivpt_equals_the_equations(recipe, family):
    """In fp64, which tells fused maps of raw shares from those of smoothed ones: 1e-6 apart."""
    model, images = tiny_ivpt(recipe, family).double(), torch.randn(2, 3, 70, 70).double()
    out, expected = model(images), oracle_ivpt(model, images)
    assert [A.shape[1] for A in out.attention] == list(PROTOTYPES)
    for found, wanted in zip(out, expected):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-7)


def test_maps_sum_to_one_and_empty_regions_and_groups_are_harmless():
    model = tiny_ivpt()
    with torch.no_grad():
        model.concepts[1].prototypes[2] += 100.0  # nobody is near: an empty region
        model.fusions[0].grouping.bias[0] = -200.0  # nobody joins: its share underflows to 0
        for amp in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                out = model(torch.randn(3, 3, 70, 70))
            for A in [*out.attention, *out.fused]:  # in bf16 the sum would be off by 4e-3
                torch.testing.assert_close(A.sum(1), torch.ones(3, 5, 5), atol=1e-5, rtol=0)
                assert A.min() >= 0
            assert torch.equal(out.groups[1][:, 2], torch.full((3, 3), 1 / 3))
            assert (out.groups[0].sum(1)[:, 0] == 0).any() and out.logits.isfinite().all()
    with one_line(ValueError, "bias: found", "expected"):
        model(torch.randn(1, 3, 98, 70))


def test_evaluation_is_deterministic_and_training_samples_the_grouping():
    model, images = tiny_ivpt(), torch.randn(2, 3, 70, 70)
    with torch.no_grad():
        assert torch.equal(model(images).logits, model(images).logits)
        model.train()
        first, second = model(images), model(images)
        assert not torch.equal(first.groups[0], second.groups[0])
        assert torch.equal(first.attention[0], second.attention[0])  # it sees no prompt
        fusion, pooled = model.fusions[0], torch.randn(2, 6, 128)
        torch.manual_seed(0)
        _, S = fusion(pooled, torch.ones(2, 6))
        torch.manual_seed(0)
        logits = fusion.grouping(pooled)
        gumbel = -torch.empty_like(logits).exponential_().log()
        torch.testing.assert_close(S, (logits + gumbel).softmax(-1))  # tau = 1, soft


def named(model, *patterns):
    names = [name for name, _ in model.named_parameters()]
    return {name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)}


def reached(model, scalar):
    """Names of the parameters that a scalar's gradient reaches."""
    model.zero_grad(set_to_none=True)
    scalar.backward(retain_graph=True)
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_who_learns_from_what():
    """The stop-gradients of section 3, one by one."""
    model, images = tiny_ivpt().train(), torch.randn(2, 3, 70, 70)
    out = model(images)
    for l, A in enumerate(out.attention):  # maps see the patches through sg
        assert reached(model, A.square().sum()) == named(model, f"concepts.{l}.*")
    for l, A in enumerate(out.fused):  # grouping learns from the fused maps alone
        learners = named(model, f"concepts.{l}.*", f"fusions.{l}.grouping.*")
        assert reached(model, A.square().sum()) == learners
    head = named(model, "fusions.*.norm.*", "fusions.*.head.*", "concepts.4.*", "norm.*")
    assert reached(model, out.features.pow(4).sum()) == head
    assert reached(model, out.logits.square().sum()) == head | {"classifier.weight"}
    model = tiny_ivpt("released")
    tokens = {"backbone.cls_token", "backbone.register_tokens", "backbone.pos_embed"}
    assert {n for n in reached(model, model(images).logits.sum()) if "backbone" in n} == tokens
    gradients = []  # without the backbone's graph, maps teach prototypes and biases all the same
    for graph in (True, False):
        maps = model(images, backbone_graph=graph).attention
        loss = sum(A.square().sum() for A in maps)
        assert reached(model, loss) == named(model, "concepts.*")
        gradients.append([p.grad for p in model.concepts.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_an_ablation_takes_one_idea_away():
    images, e = torch.randn(1, 3, 70, 70), torch.randn(2, 9, 64)
    model = tiny_ivpt(fusion=False)
    out, counts = model(images), [fusion.norm.normalized_shape[0] for fusion in model.fusions]
    assert counts == [K - 1 for K in PROTOTYPES[:-1]]  # every fine concept is a prompt
    assert len(out.attention) == 5 and out.groups == out.fused == []
    model = tiny_ivpt(cross_layer=False)
    patches = model.backbone(images)[:, 5:]  # nothing is prompted
    a, _, _ = model.concepts[0](patches, smoothing=1e-6)
    torch.testing.assert_close([A.flatten(2) for A in model(images).attention], [a])
    model = ivpt.IVPT(tiny_backbone(), 3, spatial_bias=False)
    assert not any(c.bias.requires_grad or c.bias.any() for c in model.concepts)
    a, pooled, _ = ivpt.ConceptLayer(3, 64, 9, regions=False)(e)
    shares = a / a.sum(2, keepdim=True)
    torch.testing.assert_close(pooled, torch.einsum("bkn,bnd->bkd", shares, e))


def test_the_scaled_layer_divides_squared_distances_by_sqrt_d():
    layer, patches = ivpt.ConceptLayer(3, 64, 9, scaled=True), torch.randn(2, 9, 64) * 30
    e = patches / patches.square().mean(-1, keepdim=True).sqrt()
    logits = -(e[:, None] - layer.prototypes[:, None]).square().sum(-1) / 8
    torch.testing.assert_close(layer(patches)[0], logits.softmax(1))


# ---------------------------------------------------------------- where the prototypes start

def test_kmeans_finds_planted_clusters_and_serves_fewer_patches_than_centres():
    generator = torch.Generator().manual_seed(0)
    planted = 10 * torch.eye(6)[:5]
    e = planted.repeat(40, 1) + 0.1 * torch.randn(200, 6, generator=generator)
    for patches, K in ((e, 5), (planted, 16)):
        centres = ivpt.kmeans(patches, K, generator)
        assert len(centres) == K and torch.cdist(planted, centres).amin(1).max() < 0.1


def test_foreground_is_what_keeps_to_the_middle_of_the_images():
    generator = torch.Generator().manual_seed(0)
    rims = 2 * torch.rand(400, generator=generator)
    bird, corner = rims < 0.6, rims > 1.9  # corners that look like birds
    for sign in (8, -8):
        e = torch.randn(400, 8, generator=generator)
        e[:, 2] += sign * (bird | corner)
        assert torch.equal(ivpt.find_foreground(e, rims, generator), bird)


def test_prototypes_start_as_centres_of_the_patches_they_will_meet(monkeypatch):
    images, starts = torch.randn(24, 3, 70, 70, generator=torch.Generator().manual_seed(0)), []
    images[:, :, 14:56, 14:56] += 3.0
    dataset = [(image, "no label is read") for image in images]
    for _ in range(2):
        model = tiny_ivpt(scaled=True)
        ivpt.start_prototypes(model, dataset, seed=1)
        starts.append([concept.prototypes.detach().clone() for concept in model.concepts])
    assert all(torch.equal(a, b) for a, b in zip(*starts))
    model.concepts[0].bias.data.zero_()
    won = model(images).attention[0].argmax(1)  # (24, 5, 5)
    assert (won[:, 1:4, 1:4].flatten().bincount(minlength=7)[:6] > 0).all()
    assert (won[:, 0, 0] == 6).all()
    monkeypatch.setattr(ivpt, "find_foreground", lambda e, rims, generator: rims < 0)
    with one_line(ValueError, "0 foreground patches for 6 concepts", "--start noise"):
        ivpt.start_prototypes(model, dataset, seed=1)


# ---------------------------------------------------------------- checkpoints

def save_model(path, weights, **changes):
    """A model of these weights as train.py builds it, and its checkpoint with some changes."""
    options = dict(method="ivpt", weights=str(weights), image_size=56, prototypes=PROTOTYPES,
                   tune="none", bias="after", fusion="mlp", distance="euclidean", no_bias=False,
                   no_regions=False, no_cross_layer=False, no_fusion=False)
    model = ivpt.build(options, 3).eval()
    content = dict(options=options, classes=["a", "b", "c"], epoch=1,
                   model=ivpt.trained_state(model), fingerprint=ivpt.fingerprint(model))
    ivpt.save(path, content | changes)
    return model


def test_a_checkpoint_gives_the_model_back(tmp_path):
    vit, last, images = tmp_path / "vit.pth", tmp_path / "last.pt", torch.randn(2, 3, 56, 56)
    torch.save(tiny_backbone().state_dict(), vit)
    for weights in ("toy", vit):  # the toy has no file, so all of it is held
        model = save_model(last, weights)
        loaded, checkpoint = ivpt.load_checkpoint(last)
        assert checkpoint["epoch"] == 1 and not loaded.training
        assert torch.equal(loaded(images).logits, model(images).logits)
        assert ("backbone.cls_token" in checkpoint["model"]) == (weights == "toy")
    vit.rename(tmp_path / "moved.pth")
    ivpt.load_checkpoint(last, tmp_path / "moved.pth")
    torch.save(tiny_backbone(seed=1).state_dict(), vit)
    with one_line(ValueError, "last.pt", "another frozen backbone", "--weights"):
        ivpt.load_checkpoint(last)


@pytest.mark.parametrize("says, changes", [
    ("not written by train.py", None), ("Missing key", dict(model={})),
    ("not a torch file of tensors", dict(epoch=Fraction(1, 2)))])  # no code is run
def test_other_files_than_checkpoints_are_named_in_one_line(says, changes, tmp_path):
    torch.save({"model": {}}, tmp_path / "last.pt")
    if changes:
        save_model(tmp_path / "last.pt", "toy", **changes)
    with one_line(ValueError, "last.pt", says):
        ivpt.load_checkpoint(tmp_path / "last.pt")


def test_a_save_that_is_cut_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path, replace = tmp_path / "last.pt", ivpt.os.replace
    for epoch, step, found in ((1, replace, 1), (2, lambda *paths: None, 1), (3, replace, 3)):
        monkeypatch.setattr(ivpt.os, "replace", step)  # the second is killed before it
        ivpt.save(path, {"epoch": epoch})
        assert torch.load(path, weights_only=True) == {"epoch": found}
