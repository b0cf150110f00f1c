"""The specification of IVPT: model.py, kernels.py, data.py, train.py and evaluate.py.

    python -m pytest                       # all tests; what needs a GPU or real data is skipped
    python -m pytest test_ivpt.py -k vit   # the tests of one thing

An oracle is the paper's formula or a released program's protocol, written out once more, patch by
patch, image by image or step by step. The code must agree with it.

    what is specified                               its oracle          -k
    the ViT and its names                           oracle_block        vit, names
    weights                                         what was saved      backbone, weights, loading
    checkpoints, damaged files                      what was saved      checkpoint, file
    region discovery, spatial bias, pooling         oracle_regions      kernels_reference
    grouping, coarse features, prompts, fused maps  oracle_fusion       fusion
    the whole forward; ablations                    oracle_ivpt         equations, maps, ablation
    who learns from what                            the table at IVPT   gradient_stops
    foreground, k-means, where prototypes start     definitions         foreground, kmeans, start
    the backward, Triton                            the formula, fp64   kernels
    eight losses, each and together                 sums and loops      losses, kl, cosines, step
    folders, views, key points, affine map          Pillow, loops       data, real
    peaks, hits, consistency, stability             a loop over images  evaluate
    the protocol, the controls                      written out         protocol
    recipes, options, rates                         tables              recipes, option, rates
    presets, cores                                  tables              default, core
    the loop: views, clipping, Adam, halved rates   oracle_run          written_out, clipped, loop
    pretraining, --resume, a kill                   two runs compared   pretraining, run, kill
    several processes                               one process         processes
    what is typed                                   README.md           documented, tilde, reader
    errors in one line                              their words         one_line, said
"""
import ast
import copy
import fnmatch
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from fractions import Fraction
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # on more threads sums are rounded in another order

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as T

import data
import evaluate
import kernels
import model as ivpt
import train

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"  # 40 real classes of CUB and a real ViT-Tiny
torch.set_num_threads(1)  # torch may have been imported before
NUM_STARTS = ivpt.NUM_STARTS
ivpt.NUM_STARTS = 2  # else the start takes most of a small run


def one_line(kind, *words):
    """The error of this kind is one line that holds these words (regular expressions)."""
    return pytest.raises(kind, match=r"\A[^\n]*" + "[^\n]*".join(words) + r"[^\n]*\Z")


# Processes start from a Python that has imported PyTorch, which takes seconds, and nothing of ours.
PROCESSES = get_context("forkserver" if os.name == "posix" else "spawn")
PROCESSES.set_forkserver_preload(["torch", "torch.distributed", "torchvision.transforms.v2"])
CHILD = """import os, sys
for fd, file in enumerate((stdout, stderr), start=1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), fd)
os.chdir(cwd)
os.environ.clear()
os.environ.update(environment)
sys.path[:] = [cwd, *elsewhere]
sys.argv = ["script", *words]
exec(code, {"__name__": "__main__"})
"""


class Script:
    """Runs code in a process of its own, with these words as its command line."""

    def __init__(self, code, *words, cwd=ROOT, **environment):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        ours = {ROOT, *ROOT.glob("*/")}
        known = dict(
            code=code, words=[*map(str, words)], cwd=str(cwd), environment=os.environ | environment,
            elsewhere=[path for path in sys.path if path and Path(path) not in ours],
            stdout=str(self.files[0]), stderr=str(self.files[1]))
        self.process = PROCESSES.Process(target=exec, args=(CHILD, known), daemon=True)
        self.process.start()

    def end(self, exit_code=0):
        """Waits for it; its exit code must be this one -> what it wrote to stdout and stderr."""
        self.process.join(240)
        self.process.kill()
        self.process.join()
        stdout, stderr = (file.read_text() if file.exists() else "" for file in self.files)
        assert self.process.exitcode == exit_code, stderr[-3000:]
        return stdout, stderr


def torchrun(code, *words):
    """Runs code in two processes on the CPU, with the environment that torchrun gives them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])  # a free one
    together = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                    CUDA_VISIBLE_DEVICES="")
    both = [Script(code, *words, RANK=rank, LOCAL_RANK=rank, **together) for rank in "01"]
    ended = wait([script.process.sentinel for script in both], timeout=240)
    for script in sorted(both, key=lambda script: script.process.sentinel not in ended):
        script.end()  # first the one that ended first: if it failed, the other waits in vain


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def write_cub(folder, sizes=((90, 60), (60, 90), (130, 100), (40, 40)), num_test=1, num_classes=2):
    """A folder in CUB's layout: coloured noise, random boxes and key points of two parts. Ids are
    neither contiguous nor in order. The last images are for testing."""
    rng = np.random.default_rng(0)
    images, labels, splits, boxes, points = [], [], [], [], []
    for i, (width, height) in enumerate(sizes):
        key = 17 - 3 * i
        label = i % num_classes
        name = f"{label:03d}.Class {label}/image {i}.png"
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (8, 11, 3), np.uint8))
        noise.resize((width, height)).save(folder / "images" / name)
        images.append(f"{key} {name}")
        labels.append(f"{key} {5 * label + 3}")
        splits.append(f"{key} {int(i < len(sizes) - num_test)}")
        x, y, w, h = rng.uniform((0, 0, 0.3, 0.3), (0.4, 0.4, 0.8, 0.8)).round(2)
        boxes.append(f"{key} {x * width} {y * height} {w * width} {h * height}")
        for part in (9, 2):
            u, v = x + w * rng.uniform(), y + h * rng.uniform()
            points.append(f"{key} {part} {u * width} {v * height} {int(rng.uniform() < 0.8)}")
    write(folder / "images.txt", *images)
    write(folder / "image_class_labels.txt", *labels)
    write(folder / "train_test_split.txt", *splits)
    write(folder / "bounding_boxes.txt", *boxes)
    write(folder / "classes.txt", *(f"{5 * c + 3} {c:03d}.Class {c}" for c in range(num_classes)))
    write(folder / "parts/parts.txt", "2 beak", "9 left wing")
    write(folder / "parts/part_locs.txt", *points)
    return folder


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
    row = torch.arange(new).double()[:, None] + 0.5
    if antialias:
        distance = (torch.arange(old) + 0.5 - row * old / new).abs()
        W = cubic(distance / max(old / new, 1.0), -0.5)
        return W / W.sum(1, keepdim=True)
    column = torch.arange(-3, old + 3)
    W = cubic((column + 0.5 - row * old / (new + 0.1)).abs(), -0.75)
    return torch.zeros(new, old).double().index_add_(1, column.clamp(0, old - 1), W)


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


def test_vit_attention_in_bf16_is_that_in_fp32():
    """On a CPU it is written out, scale included. Queries are large, so that the scale matters."""
    backbone = tiny_backbone(depth=1)
    x, prompts, attn = 3 * torch.randn(2, 26, 128), torch.randn(2, 3, 128), backbone.blocks[0].attn
    with torch.no_grad():
        expected = attn(x, prompts)
        with torch.autocast("cpu", torch.bfloat16):
            found = attn(x, prompts).float()
    assert (found - expected).norm() < 0.02 * expected.norm()


# ---------------------------------------------------------------- weights

@pytest.mark.parametrize("name", ("vits14", "vitb14_reg4", "vitl14_reg4", "vitg14"))
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


def test_weights_that_do_not_fit_are_named_in_one_line(tmp_path):
    path, state = tmp_path / "vit.pth", tiny_backbone(depth=2).state_dict()
    for content, says in ((state | {"blocks.1.mlp.fc1.bias": torch.ones(3)}, "fc1.bias.*.3."),
                          (state | {"blocks.0.attn.q_norm.weight": torch.ones(3)}, "q_norm"),
                          (state | {"code": Fraction(1, 2)}, "not a torch file of tensors"),
                          (of_width(1280), "width 1280 has heads of another width than 64"),
                          (of_width(96), "width 96 has heads of another width than 64")):
        torch.save(content, path)
        with one_line(ValueError, "vit.pth", says):
            ivpt.load_backbone(path, 70)


def of_width(width):
    return ivpt.VisionTransformer(width=width, depth=1, patch_size=14, pos_grid=5).state_dict()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_at_any_length_is_named_damaged(zipped, tmp_path):
    path, state = tmp_path / "vit.pth", tiny_backbone(depth=1).state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in {*range(40), *range(40, len(whole), len(whole) // 60)}:
        path.write_bytes(whole[:length])
        with one_line(ValueError, "vit.pth: damaged"):
            ivpt.read_file(path, "weights")


def test_a_named_backbone_is_downloaded_once(tmp_path, monkeypatch):
    """Served from a file:// address, into an empty cache of torch.hub."""
    name, meta = "dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth", "https://dl.fbaipublicfiles.com"
    assert ivpt.URL.format(folder="vitb14", name="vitb14_reg4") == f"{meta}/dinov2/{name}"
    source, cached = tmp_path / "vit.pth", tmp_path / "hub" / "checkpoints" / "vit.pth"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(ivpt, "URL", source.as_uri())
    for content in (None, b"", b"<html>log in</html>", b"PK\3\4 cut off"):
        if content is not None:
            source.write_bytes(content)
        with one_line(OSError, "could not fetch or read", f"remove {cached}", "--weights"):
            ivpt.load_backbone("dinov2_vits14", 70)
        cached.unlink(missing_ok=True)
    torch.save(tiny_backbone(registers=4).state_dict(), source)
    ivpt.load_backbone("vits14_reg4", 70)
    source.unlink()
    for name in ("vits14_reg4", "dinov2_vits14_reg"):
        assert ivpt.load_backbone(name, 70).grid == (5, 5)
    monkeypatch.setattr(torch, "load", functools.partial(fail, MemoryError()))
    with pytest.raises(MemoryError):  # that is not the file's fault
        ivpt.read_file(cached, "weights")


def fail(error, *_, **__):
    raise error


# ---------------------------------------------------------------- IVPT, in fp64
RECIPES = {"paper": dict(bias_after_softmax=True, fusion_mlp=True, tune="none"),
           "released": dict(bias_after_softmax=False, fusion_mlp=False, tune="tokens")}
PROTOTYPES = (7, 6, 5, 4, 4)  # the last: G = 3 concepts and the background
THETA = torch.tensor([[0.8, -0.6, 0.1], [0.6, 0.8, 0.0]])  # an affine map


def tiny_ivpt(recipe="paper", family="registers", classes=6, **ablation):
    backbone = tiny_backbone(**FAMILIES[family])
    model = ivpt.IVPT(backbone, classes, PROTOTYPES, **RECIPES[recipe], **ablation)
    for name, p in model.named_parameters():
        if not name.startswith("backbone."):
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            nn.init.normal_(p, mean, 0.2 if "prototypes" in name else 0.1)
    return model.eval()


def oracle_regions(e, q, b, after, smooth_first, eps=1e-6):
    """The concept layer for one image, patch by patch: e (N, D), q (K, D), b (K, N) -> the raw a,
    the smoothed a (K, N), p (K, D), mass (K)."""
    a, p, mass = torch.zeros_like(b), torch.zeros_like(q), torch.zeros_like(q[:, 0])
    for n in range(len(e)):
        logits = -(e[n] - q).square().sum(1)
        if after:
            a[:, n] = (logits.softmax(0) + b[:, n]).clamp(min=0)
        else:
            a[:, n] = (logits + b[:, n]).softmax(0)
    smooth = (a + eps) / (a + eps).sum(0)
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
def test_ivpt_and_its_fusion_equal_the_equations(recipe, family):
    """In fp64, which tells fused maps of raw shares from those of smoothed ones: 1e-6 apart."""
    model, images = tiny_ivpt(recipe, family).double(), torch.randn(2, 3, 70, 70).double()
    out, expected = model(images), oracle_ivpt(model, images)
    assert [A.shape[1] for A in out.attention] == list(PROTOTYPES)
    for name, wanted in expected._asdict().items():
        torch.testing.assert_close(getattr(out, name), wanted, atol=1e-9, rtol=1e-7,
                                   msg=lambda text: f"{name}: {text}")


def test_maps_sum_to_one_and_empty_regions_and_groups_are_harmless():
    model = tiny_ivpt()
    with torch.no_grad():
        model.concepts[1].prototypes[2] += 100.0  # nobody is near: an empty region
        model.fusions[0].grouping.bias[0] = -200.0  # nobody joins: its share underflows to 0
        for amp in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                out = model(torch.randn(3, 3, 70, 70))
            for A in [*out.attention, *out.fused]:
                torch.testing.assert_close(A.sum(1), torch.ones(3, 5, 5), atol=1e-5, rtol=0)
                assert A.min() >= 0
            assert torch.equal(out.groups[1][:, 2], torch.full((3, 3), 1 / 3))
            assert (out.groups[0].sum(1)[:, 0] == 0).any() and out.logits.isfinite().all()


def test_fusion_samples_the_grouping_in_training_alone():
    model, images = tiny_ivpt(), torch.randn(2, 3, 70, 70)
    with torch.no_grad():
        assert torch.equal(model(images).logits, model(images).logits)
        model.train()
        assert not torch.equal(model(images).groups[0], model(images).groups[0])
        fusion, pooled = model.fusions[0], torch.randn(2, 6, 128)
        torch.manual_seed(0)
        _, S = fusion(pooled, torch.ones(2, 6))
        torch.manual_seed(0)
        logits = fusion.grouping(pooled)
        gumbel = -torch.empty_like(logits).exponential_().log()
        torch.testing.assert_close(S, (logits + gumbel).softmax(-1))  # tau = 1, soft


def test_autocast_rounds_no_sum_of_the_fusion_and_no_cosine():
    model, pooled, Z = tiny_ivpt(), torch.randn(2, 6, 128), 1 + torch.randn(2, 4, 128)
    fusion, a, coarse = model.fusions[0], torch.rand(2, 7, 25), []
    fusion.norm.register_forward_pre_hook(lambda _, inputs: coarse.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        _, S = fusion(pooled, torch.ones(2, 6))
        fused, loss = ivpt.fuse_maps(a, S), train.orthogonality(Z)
    means = torch.einsum("bkg,bkd->bgd", S, pooled) / S.sum(1)[..., None]
    for found, expected in ((coarse[0], means), (fused, ivpt.fuse_maps(a, S)),
                            (loss, train.orthogonality(Z))):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_an_ablation_takes_one_idea_away():
    images, e = torch.randn(1, 3, 70, 70), torch.randn(2, 9, 64)
    model = tiny_ivpt(no_fusion=True)
    out, counts = model(images), [fusion.norm.normalized_shape[0] for fusion in model.fusions]
    assert counts == [K - 1 for K in PROTOTYPES[:-1]]  # every fine concept is a prompt
    assert len(out.attention) == 5 and out.groups == out.fused == []
    model = tiny_ivpt(no_cross_layer=True)
    patches = model.backbone(images)[:, 5:]  # nothing is prompted
    a, _, _ = model.concepts[0](patches, 1e-6)
    torch.testing.assert_close([A.flatten(2) for A in model(images).attention], [a])
    model = ivpt.IVPT(tiny_backbone(), 3, no_bias=True)
    assert not any(c.bias.requires_grad or c.bias.any() for c in model.concepts)
    a, pooled, _ = ivpt.ConceptLayer(3, 64, 9, no_regions=True)(e)
    shares = a / a.sum(2, keepdim=True)
    torch.testing.assert_close(pooled, torch.einsum("bkn,bnd->bkd", shares, e))


def test_ivpt_starts_from_noise_of_these_deviations():
    model = ivpt.IVPT(tiny_backbone(), 6)
    deviations = {"concepts.*.prototypes": 0.05, "concepts.*.bias": 0, "fusions.*.weight": 0.02,
                  "fusions.*.bias": 0, "*norm.weight": 1, "*norm.bias": 0, "classifier.*": 0.02}
    for name, p in model.named_parameters():
        if name.startswith("backbone."):
            continue
        expected, = {d for pattern, d in deviations.items() if fnmatch.fnmatch(name, pattern)
                     and ("norm" in pattern) == ("norm" in name)}
        assert p.square().mean().sqrt().item() == pytest.approx(expected, rel=0.15), name


# ---------------------------------------------------------------- where the prototypes start

def test_kmeans_finds_planted_clusters_and_serves_fewer_patches_than_centres():
    generator = torch.Generator().manual_seed(0)
    planted = 10 * torch.eye(6)[:5]
    e = planted.repeat(40, 1) + 0.1 * torch.randn(200, 6, generator=generator)
    for patches, K in ((e, 5), (planted, 16)):
        centres = ivpt.kmeans(patches, K, seed=0)
        assert len(centres) == K and torch.cdist(planted, centres).amin(1).max() < 0.1
    assert NUM_STARTS == 20
    planted12 = 10 * torch.eye(12)  # one start alone misses some of so many
    e = planted12.repeat(40, 1) + torch.randn(480, 12, generator=generator)
    for starts, finds_all in ((1, False), (20, True)):
        found = [torch.cdist(planted12, ivpt.kmeans(e, 12, seed, starts)).amin(1).max() < 2
                 for seed in range(4)]
        assert all(found) == finds_all
    many = planted.repeat(5000, 1) + torch.randn(25000, 6, generator=generator)
    means = many.view(5000, 5, 6).mean(0)  # of all patches, not of the 10,000 that starts see
    assert torch.cdist(means, ivpt.kmeans(many, 5, seed=0)).amin(1).max() < 1e-3
    mixed = torch.randn(300, 2, generator=generator)  # no clusters: it takes many moves to the end
    centres = ivpt.kmeans(mixed, 4, seed=0)
    nearest = torch.cdist(mixed, centres).argmin(1)
    ends = torch.stack([mixed[nearest == k].mean(0) for k in range(4)])
    torch.testing.assert_close(ends, centres)


def test_foreground_is_what_keeps_to_the_middle_of_the_images():
    generator = torch.Generator().manual_seed(0)
    radius2 = 2 * torch.rand(400, generator=generator)
    bird, corner = radius2 < 0.6, radius2 > 1.9  # corners that look like birds
    for sign in (8, -8):
        e = torch.randn(400, 8, generator=generator)
        e[:, 2] += sign * (bird | corner)
        foreground, background = ivpt.find_foreground(e, radius2, seed=0)
        assert torch.equal(foreground, bird)
        assert background[corner].all() and not background[bird].any()
        e[:, 5] += 20 * torch.randn(400, generator=generator).sign()  # the first component, but
        assert torch.equal(ivpt.find_foreground(e, radius2, seed=0)[0], bird)  # it has no middle
    with one_line(ValueError, "no foreground", "--start noise"):
        ivpt.find_foreground(e, torch.full((400,), 2.0), seed=0)  # nothing but corners


def test_prototypes_start_as_centres_of_foreground_patches_and_the_mean_of_the_background():
    images = torch.randn(16, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    images[:, :, 14:56, 14:56] += 3.0
    dataset = [(image, "no label is read") for image in images]
    model, args = tiny_ivpt(), Namespace(start="noise", seed=1)
    noise = [concept.prototypes.detach().clone() for concept in model.concepts]
    model.start(dataset, args)
    assert all(torch.equal(c.prototypes, old) for c, old in zip(model.concepts, noise))
    args.start = "clusters"
    model.start(dataset, args)
    tokens, backbone, axis = model.unprompted(images), model.backbone, torch.linspace(-1, 1, 5)
    radius2 = (axis[:, None] ** 2 + axis ** 2).flatten().repeat(16)
    for concept, block in zip(model.concepts, [*backbone.blocks[1:], None]):
        e = backbone.norm(tokens[:, 5:]).flatten(0, 1)  # nothing is prompted
        foreground, background = ivpt.find_foreground(e, radius2, seed=1)
        assert foreground.view(16, 5, 5)[:, 2, 2].all() and background.view(16, 5, 5)[:, 0, 0].all()
        *centres, last = concept.prototypes
        torch.testing.assert_close(last, e[background].mean(0))
        inner, centres = e[foreground], torch.stack(centres)
        nearest = torch.cdist(inner, centres).argmin(1)
        for k, centre in enumerate(centres):
            torch.testing.assert_close(inner[nearest == k].mean(0), centre, atol=1e-4, rtol=1e-4)
        tokens = block(tokens) if block else None


# ---------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("tune", ["none", "tokens"])
def test_a_checkpoint_holds_the_whole_model_and_needs_no_other_file(tune, tmp_path):
    vit, last, images = tmp_path / "vit.pth", tmp_path / "last.pt", torch.randn(2, 3, 56, 56)
    torch.save(tiny_backbone(registers=4).state_dict(), vit)
    options = asdict(train.parse(["--weights", str(vit), "--tune", tune, "--no-fusion-mlp"]))
    options |= dict(image_size=56, prototypes=PROTOTYPES)
    model = ivpt.build(options, 3, ivpt.load_backbone(vit, 56)).eval()
    data.save(last, dict(options=options, classes=["a", "b", "c"], epoch=1,
                         model=model.state_dict()))
    vit.unlink()
    loaded, checkpoint = ivpt.load_checkpoint(last)
    assert checkpoint["epoch"] == 1 and not loaded.training
    assert torch.equal(loaded(images).logits, model(images).logits)
    learners = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert learners[0] == learners[1] and ("backbone.cls_token" in learners[0]) == (tune != "none")
    older = {name: value for name, value in options.items() if name != "fusion_mlp"}
    frozen_left_out = {n: x for n, x in model.state_dict().items() if "backbone" not in n}
    missing = {n: x for n, x in model.state_dict().items() if n != "classifier.weight"}
    checkpoint["options"] = options
    for content, says in (({"model": {}}, "not written by train.py"), ([1], "not written by"),
                          (checkpoint | dict(options=older), "no option fusion_mlp"),
                          (checkpoint | dict(model=frozen_left_out), "no whole model"),
                          (checkpoint | dict(model=missing), "Missing key.*classifier.weight")):
        data.save(last, content)
        with one_line(ValueError, "checkpoint", says):
            ivpt.load_checkpoint(last)


def test_weights_that_a_method_shares_are_shared_again_when_it_is_loaded(tmp_path, monkeypatch):
    class Tied(ivpt.IVPT):
        def __init__(self, *inputs, **options):
            super().__init__(*inputs, **options)
            self.twin = nn.Linear(128, 3, bias=False)
            self.twin.weight = self.classifier.weight

    monkeypatch.setattr(ivpt, "find_method", lambda name: Tied)
    options = asdict(train.parse(["--weights", "toy"])) | dict(image_size=70)
    model = ivpt.build(options, 3, tiny_backbone())
    data.save(tmp_path / "last.pt", dict(options=options, classes=["a", "b", "c"],
                                         model=model.state_dict()))
    loaded, _ = ivpt.load_checkpoint(tmp_path / "last.pt")
    assert loaded.twin.weight is loaded.classifier.weight
    assert torch.equal(loaded.twin.weight, model.twin.weight)


# ---------------------------------------------------------------- kernels: the reference alone
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton cannot be imported here")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SUBSETS = [needed for needed in itertools.product((False, True), repeat=3) if any(needed)]
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes that a program may have, by chip


def kernel_problem(B, N, D, K, dtype=torch.float32, seed=0, device="cpu"):
    """Inputs x, prototypes, bias and the gradients of the three outputs."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    inputs = draw(B, N, D), 0.3 * draw(K, D), 0.3 * draw(K, N)
    grads = draw(B, K, N), draw(B, K, D), draw(B, K)
    return [t.to(device, dtype) for t in inputs], [t.to(device) for t in grads]


def with_gradients(function, inputs, grads, dtype, *args, **options):
    """Outputs of function and gradients of the inputs, computed in dtype."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    outputs = function(*inputs, *args, **options)
    grads = [g.to(o.dtype) for g, o in zip(grads, outputs)]
    return [o.detach() for o in outputs], torch.autograd.grad(outputs, inputs, grads)


@pytest.mark.parametrize("after", (True, False))
@pytest.mark.parametrize("smoothing", (0.0, 1e-2))
def test_kernels_reference_follows_the_definition_patch_by_patch(after, smoothing):
    (x, q, bias), _ = kernel_problem(2, 6, 4, 3, torch.float64)
    found = kernels.prototype_attention_reference(x, q, bias, after, smoothing=smoothing)
    for image in range(2):
        raw, smooth, pooled, mass = oracle_regions(
            x[image], q, bias, after, smooth_first=smoothing > 0, eps=smoothing)
        attention = smooth if smoothing else raw
        for output, expected in zip(found, (attention, pooled, mass)):
            torch.testing.assert_close(output[image], expected)


@pytest.mark.parametrize("after", (True, False))
@pytest.mark.parametrize("smoothing", (0.0, 1e-3))
def test_kernels_reference_passes_gradcheck(after, smoothing):
    inputs = [t.requires_grad_() for t in kernel_problem(1, 5, 4, 3, torch.float64)[0]]
    assert torch.autograd.gradcheck(
        lambda *x: kernels.prototype_attention_reference(*x, after, smoothing=smoothing), inputs)


def test_kernels_empty_regions_pool_to_zero_and_ties_go_to_the_first():
    x = torch.randn(1, 5, 8)
    q = x[0, :1].repeat(3, 1)  # three equal prototypes: every patch is a tie
    attention, pooled, mass = kernels.prototype_attention(x, q, torch.zeros(3, 5))
    torch.testing.assert_close(attention, torch.full((1, 3, 5), 1 / 3))
    torch.testing.assert_close(mass, torch.tensor([[5 / 3, 0, 0]]))
    torch.testing.assert_close(pooled[0, 0], x[0].mean(0))
    assert (pooled[0, 1:] == 0).all()
    outputs = kernels.prototype_attention(x, q, torch.full((3, 5), -2.0))  # the clamp empties all
    assert all((o == 0).all() for o in outputs)


def test_kernels_low_precision_and_autocast_still_give_fp32_maps():
    (x, q, bias), _ = kernel_problem(2, 33, 64, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kernels.prototype_attention(x.bfloat16(), q, bias)
    expected = kernels.prototype_attention_reference(x.bfloat16().float(), q, bias)
    assert [o.dtype for o in found] == [torch.float32, torch.bfloat16, torch.float32]
    assert all(torch.equal(f, e.to(f.dtype)) for f, e in zip(found, expected))
    with one_line(ValueError, "expected"):  # a kernel would read past its end
        kernels.prototype_attention(x, q, bias[:, :1])


# ---------------------------------------------------------------- kernels: the op on a CPU

@pytest.mark.parametrize("needed", SUBSETS)
def test_kernels_op_gives_the_gradients_asked_for_and_only_those(needed):
    inputs, grads = kernel_problem(2, 9, 12, 5, torch.float64)
    for after, smoothing, detach in itertools.product((True, False), (0.0, 1e-6), (True, False)):
        _, expected = with_gradients(kernels.prototype_attention_reference, inputs, grads,
                                     torch.float64, after, smoothing=smoothing, detach_maps=detach)
        asked = [t.clone().requires_grad_(n) for t, n in zip(inputs, needed)]
        outputs = kernels._op(*asked, after, smoothing, detach)
        torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs)])
        for tensor, gradient, wanted in zip(asked, expected, needed):
            assert (tensor.grad is not None) == wanted
            if wanted:
                torch.testing.assert_close(tensor.grad, gradient)


def test_kernels_op_passes_opcheck():
    inputs = [t.requires_grad_() for t in kernel_problem(2, 9, 12, 5)[0]]
    ops = torch.ops.ivpt
    checks = torch.library.opcheck(ops.prototype_attention.default, (*inputs, True, 1e-6, False))
    assert len(checks) >= 4 and set(checks.values()) == {"SUCCESS"}
    given = [t.detach() for t in (*inputs, *kernels._op(*inputs, True, 0.0, False))]
    checks = torch.library.opcheck(ops.prototype_attention_backward.default, (
        torch.ones_like(given[3]), None, None, *given, True, 0.0, False, [True, False, True]),
        test_utils=("test_schema", "test_faketensor"))  # it has no gradient of its own
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", (kernels._op, kernels._backward_op))
def test_kernels_ops_are_declared_by_their_annotations(op):
    """torch 2.11 takes no other declaration; without one no script starts there."""
    schema = torch.library.infer_schema(op._abstract_fn, mutates_args=())
    assert schema.split(" -> ")[1] == "(Tensor, Tensor, Tensor)"


def test_kernels_op_compiles_fullgraph():
    def function(x, q, b):
        return kernels._op(x, q, b, True, 0.0, False)

    compiled = torch.compile(function, fullgraph=True)
    inputs, grads = kernel_problem(2, 9, 12, 5)
    torch.testing.assert_close(*(with_gradients(f, inputs, grads, torch.float32)
                                 for f in (compiled, function)))


# ---------------------------------------------------------------- kernels in Triton's interpreter

def interpreter_cases():
    """Odd shapes; placement of the bias, smoothing and wanted gradients run along."""
    shapes = itertools.product((2, 5, 17, 33), (1, 7, 70, 130))
    for i, (K, N) in enumerate(shapes):
        yield dict(B=1 if N > 50 else 3, N=N, D=(32, 192, 100, 72)[(i + i // 4) % 4], K=K,
                   after=i % 2 == 0, smoothing=(0.0, 1e-6)[i // 2 % 2], detach=i % 3 == 2,
                   needed=SUBSETS[i % 7], seed=i, repeat=i % 5 == 0,
                   unused={2: 0, 3: 1, 5: 2}.get(i))
    for i, kind in enumerate(("transposed", "empty", "huge", "ties")):
        yield dict(B=2, N=70, D=72, K=5, after=i % 2 == 0, smoothing=0.0, detach=False,
                   needed=(True, True, True), seed=i, kind=kind)
    yield dict(B=2, N=70, D=32, K=5, after=True, smoothing=0.0, detach=True,
               needed=(False, True, False), seed=0, kind="far from zero")


def special_problem(kind, inputs, grads):
    x, q, bias = inputs
    if kind == "transposed":
        return [t.mT.contiguous().mT for t in inputs], [t.mT.contiguous().mT for t in grads]
    if kind == "empty":
        bias = bias - torch.tensor([0, 5, 5, 0, 5.0])[:, None]
    if kind == "huge":
        x, q = 300 * x, 300 * q
    if kind == "ties":
        q, bias = q[:1].repeat(5, 1), 0 * bias
    if kind == "far from zero":  # dq is the difference of two large sums: both must round dl2 alike
        x, q = ((16 + t.mul(2).round() / 16).half() for t in (x, q))
        grads = grads[0], 0 * grads[1].half(), 0 * grads[2]
    return (x, q, bias), grads


def too_wrong(found, plain, exact):
    """Whether an error is more than twice PyTorch's in the same precision. Sixteen roundings of the
    largest value, at least 1, are granted where PyTorch happens to be exact."""
    error = (found.double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max()
    rounding = torch.finfo(torch.float32).eps * exact.abs().max().clamp(min=1)
    return bool(error > allowed + 16 * rounding)


def run_interpreted(B, N, D, K, after, smoothing, detach, needed, seed, kind="plain", repeat=False,
                    unused=None):
    """What is wrong with this case, a list. unused: an output that has no gradient."""
    inputs, grads = special_problem(kind, *kernel_problem(B, N, D, K, seed=seed))

    def run(forward, backward):
        outputs = forward(*inputs, after, smoothing)
        options = (after, smoothing, detach, list(needed))
        given = [None if i == unused else g for i, g in enumerate(grads)]
        return *outputs, *backward(*given, *inputs, *outputs, *options)

    def reference(*args):
        return kernels.prototype_attention_reference(*args[:4], smoothing=args[4])

    found, wrong = run(kernels.launch_forward, kernels.launch_backward), []
    if repeat:
        again = run(kernels.launch_forward, kernels.launch_backward)
        wrong += [] if all(map(torch.equal, found, again)) else ["repeat"]
    plain = run(reference, kernels.backward_reference)
    inputs = [t.double() for t in inputs]
    grads = [t.double() for t in grads]
    exact = run(reference, kernels.backward_reference)
    for i, triple in enumerate(zip(found, plain, exact)):
        if kind == "ties" and i > 0:  # the winner is a matter of rounding: masses agree in sum only
            triple = [t.sum(1) for t in triple] if i == 2 else []
        if kind == "far from zero":  # in fp16
            if i == 4 and (found[4] - exact[4]).norm() > 1e-3 * exact[4].norm():
                wrong.append(i)
        elif triple and triple[2].numel() and too_wrong(*triple):
            wrong.append(i)
    unwanted = [g.numel() for g, wanted in zip(found[3:], needed) if not wanted]
    return wrong + (["unwanted"] if sum(unwanted) else [])


INTERPRET = """import json, test_ivpt
for case in test_ivpt.interpreter_cases():
    print(json.dumps([case, test_ivpt.run_interpreted(**case)]))
"""


@pytest.fixture(scope="module", autouse=True)
def interpreter(request):
    """The interpreted cases in a Python of their own, since TRITON_INTERPRET must be set before
    triton is imported. It starts with the first test of this file and uses a second core."""
    wanted = [item for item in request.session.items if "interpreted" in item.name]
    if kernels.triton is None or not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", INTERPRET], cwd=ROOT, text=True,
                               env=os.environ | dict(TRITON_INTERPRET="1"),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    yield process
    process.kill()


@needs_triton
def test_kernels_interpreted_are_as_exact_as_pytorch_and_repeat(interpreter):
    stdout, stderr = interpreter.communicate(timeout=240)
    if "only 0-dimensional arrays can be converted" in stderr:
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    assert interpreter.returncode == 0, stderr[-3000:]
    results = [json.loads(line) for line in stdout.splitlines()]
    assert len(results) == 21 and not [r for r in results if r[1]]


# ---------------------------------------------------------------- kernels compiled for real chips

def compile_for(target):
    """Forward, and backward with and without what a prompted layer leaves out: facts of each."""
    chip, dtype, N, D, K = target
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    x = torch.empty(32, N, D, dtype=dtype, device="meta")
    q, bias = x[0, :K], torch.empty(K, N, device="meta")
    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    facts = []
    todo = [(kernels._forward_kernel, kernels.FORWARD, ()),
            (kernels._backward_kernel, kernels.BACKWARD, ()),
            (kernels._backward_kernel, kernels.BACKWARD, ("dP_ptr", "dx_ptr"))]
    if chip == 100 or dtype == torch.float32:  # it only adds: once for each dtype
        todo.append((kernels._pool_kernel, kernels.FORWARD, ()))
    for kernel, sizes, left_out in todo:
        constants = kernels._prepare(x, q, bias, sizes)[2]
        warps = constants.pop("num_warps")
        constants |= dict(BIAS_AFTER_SOFTMAX=True, SMOOTHING=0.0, DETACH=False)
        constants |= dict.fromkeys(left_out)
        constants |= dict(ROWS=16, COLUMNS=256)
        constants = {n: constants[n] for n in kernel.arg_names if n in constants}
        signature, aligned = {}, {}
        for i, name in enumerate(kernel.arg_names):
            signature[name] = "*fp32" if name.endswith("_ptr") else "i32"
            if name in ("x_ptr", "q_ptr", "pooled_ptr", "dP_ptr", "dx_ptr"):
                signature[name] = names[dtype]
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                aligned[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        done = kernels.triton.compile(source, target=GPUTarget("cuda", chip, 32),
                                      options=dict(num_warps=warps))
        ptx = done.asm["ptx"]
        cores = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)
        offsets = Counter(re.findall(r"tt\.addptr [^\n]*: !tt\.ptr<\w+>, (i\d+)", done.asm["ttir"]))
        facts.append(dict(
            kernel=kernel.fn.__name__, offsets=offsets,
            shared=done.metadata.shared, tensor_cores=len(cores),
            atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)), **resource_usage(done.asm["cubin"])))
    return target, facts


def resource_usage(cubin):
    """Bytes of stack and of local memory, where this Triton brings cuobjdump."""
    tool = Path(kernels.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(STACK|LOCAL):(\d+)", text)}


@needs_triton
def test_kernels_compile_for_every_chip():
    """Within its shared memory, without spills, 16 bit on tensor cores and fp32 not (that would be
    TF32), nothing by atomics, and an image's place is a 64-bit offset: a batch can pass 2^31."""
    targets = [(chip, torch.bfloat16, 1369, 768, 17) for chip in SHARED_MEMORY]
    targets += [(90, torch.float32, 1369, 1024, 17), (100, torch.float16, 196, 192, 5)]
    with ProcessPoolExecutor(2, PROCESSES) as pool:
        results = list(pool.map(compile_for, targets))
    for target, facts in results:
        chip, dtype, *_ = target
        for fact in facts:
            assert 0 < fact["shared"] <= SHARED_MEMORY[chip], (target, fact)
            assert fact["atomics"] == 0 and fact["offsets"].keys() == {"i64"}, (target, fact)
            has_dots = dtype != torch.float32 and fact["kernel"] != "_pool_kernel"
            assert (fact["tensor_cores"] > 0) == has_dots, (target, fact)
            assert fact.get("LOCAL", 0) == 0, (target, fact)
            spare = 0 if chip == 90 and dtype != torch.float32 else 48  # parked outside the loops
            assert fact.get("STACK", 0) <= spare, (target, fact)
    if "STACK" not in fact:
        pytest.skip("all but spills: this Triton has no cuobjdump")


# ---------------------------------------------------------------- kernels on a GPU

@needs_gpu
@pytest.mark.parametrize("shape", ((32, 1369, 768, 17), (8, 1369, 1024, 17), (16, 196, 192, 5),
                                   (3, 257, 100, 33), (2, 196, 1536, 64)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_kernels_gpu_is_as_exact_as_pytorch_and_repeats(shape, dtype):
    from explore.bench import two_reads
    (x, q, bias), grads = kernel_problem(*shape, device="cuda")
    inputs = x.to(dtype), q.to(dtype), bias
    exact = with_gradients(kernels.prototype_attention_reference, inputs, grads, torch.float64)

    def run(function):
        own = [t.clone().requires_grad_() for t in inputs]
        outputs = function(*own)
        given = [g.to(o.dtype) for g, o in zip(grads, outputs)]
        return *outputs, *torch.autograd.grad(outputs, own, given)

    found, again, rival = map(run, (kernels.prototype_attention,) * 2 + (two_reads,))
    assert all(map(torch.equal, found, again))
    for f, r, e in zip(found, rival, itertools.chain(*exact)):
        rounding = torch.finfo(dtype).eps * e.norm()
        assert (f.double() - e).norm() <= 2 * (r.double() - e).norm() + rounding


@needs_gpu
def test_kernels_gpu_compiles_and_follows_autocast():
    inputs, grads = kernel_problem(2, 196, 192, 17, device="cuda")
    compiled = torch.compile(kernels.prototype_attention, fullgraph=True)
    torch.testing.assert_close(*(with_gradients(f, inputs, grads, torch.float32)
                                 for f in (compiled, kernels.prototype_attention)))
    with torch.autocast("cuda", torch.bfloat16):
        found = kernels.prototype_attention(*inputs)
    expected = kernels.prototype_attention(inputs[0].bfloat16(), *inputs[1:])
    assert all(map(torch.equal, found, expected))


@needs_gpu
def test_kernels_gpu_peak_memory_is_outputs_and_partial_sums():
    inputs = kernel_problem(32, 1369, 768, 17, torch.bfloat16, device="cuda")[0]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kernels.prototype_attention(*inputs)
    assert torch.cuda.max_memory_allocated() - before <= 0.5 * inputs[0].nbytes


# ---------------------------------------------------------------- data: the layouts

def write_classes(folder):
    for place in ("train/zebra 1", "train/ant", "val/zebra 1"):
        (folder / place).mkdir(parents=True)
        for name in ("0.jpg", "1.PNG"):
            Image.new("RGB", (40, 30)).save(folder / place / name)
    return folder


def squash(image, box, S):
    squashed = image.crop(box).resize((S, S), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(squashed)).permute(2, 0, 1)


def test_data_reads_any_subset_in_cubs_layout(tmp_path):
    folder = write_cub(tmp_path)
    write(folder / "bounding_boxes.txt", *(f"{key} 10.5 8.25 20.7 16.9" for key in (11, 14, 17)))
    write(folder / "parts/part_locs.txt", "8 9 11.5 9.25 0", "8 2 11.5 2.25 1")
    turned, photo = Image.Exif(), folder / "images/000.Class 0/image 0.png"
    turned[0x0112] = 6  # by 90 degrees
    Image.open(photo).save(photo, exif=turned)
    dataset = data.Images(folder, "train", "train", 32)
    assert dataset.read(0).size == (90, 60)  # as stored, since boxes and points refer to it
    assert dataset.classes == ["000.Class 0", "001.Class 1"]
    assert dataset.labels.tolist() == [0, 1, 0] and dataset.parts == ["beak", "left wing"]
    assert [file.name for file in dataset.files] == ["image 0.png", "image 1.png", "image 2.png"]
    assert dataset.boxes.numpy() == pytest.approx(np.tile((10.5, 8.25, 20.7, 16.9), (3, 1)))
    test = data.Images(folder, "test", "box", 32)
    assert test.labels.tolist() == [1]
    assert test.keypoints.tolist() == [[[11.5, 2.25, 1], [11.5, 9.25, 0]]]
    for name in ("classes.txt", "bounding_boxes.txt", "parts/part_locs.txt", "parts/parts.txt"):
        (folder / name).unlink()  # these are optional
    test = data.Images(folder, "test", "box", 32)
    assert test.classes == dataset.classes and test.parts == [] and test[0][2].shape == (0, 3)
    whole = squash(data.read_image(test.files[0]), (0, 0, 40, 40), 32)
    assert torch.equal(data.denormalize(test[0][0]), whole)


def test_data_reads_a_folder_of_classes(tmp_path, monkeypatch, capsys):
    folder, turned = write_classes(tmp_path), Image.Exif()
    write(folder / "test/unknown/0.jpg")  # test/ has no folder of a class: val/ is taken
    for name in ("classes.txt", "images.txt", "train.json"):  # do not make it a CUB folder
        write(folder / name, "stray")
    turned[0x0112] = 6  # by 90 degrees
    Image.new("RGB", (50, 20)).save(folder / "val/zebra 1/photo.jpeg", exif=turned)
    training, test = (data.Images(folder, split, "test", 32) for split in ("train", "test"))
    assert training.classes == test.classes == ["ant", "zebra 1"] and test.parts == []
    assert training.labels.tolist() == [0, 0, 1, 1] and test.labels.tolist() == [1, 1, 1]
    assert test.read(2).size == (20, 50)  # upright: no annotation refers to pixels as stored
    assert data.read_image(test.files[2]).size == (50, 20)
    monkeypatch.setattr(sys, "argv", ["data.py", "--data", str(folder)])
    data.main()
    out = capsys.readouterr().out
    assert f"{folder}\ntrain: 4 images of 2 classes, 0 with a box" in out and "skipped" not in out


def test_data_counts_and_names_once_what_it_skips_in_a_folder_of_classes(tmp_path, capsys):
    folder = write_classes(tmp_path)
    ant = folder / "train/ant"
    for name in ("3.heic", "4.jpg ", "._0.jpg", ".ipynb_checkpoints/0.jpg", "../@eaDir/0.jpg",
                 "../loose.jpg", "../gnu/notes"):
        write(ant / name)
    (ant / "5.jpg").symlink_to("nowhere.jpg")
    (ant / "more").mkdir()
    (ant / "1.PNG").rename(ant / "more/1.JFIF")  # is read, as Pillow can
    for split, count in (("train", 4), ("test", 2)):
        dataset = data.Images(folder, split, "test", 32)
        assert dataset.classes == ["ant", "zebra 1"] and len(dataset) == count
    assert capsys.readouterr().out == (
        f"{folder}/train: skipped 1 in no class folder, 3 hidden, 1 with suffix '.heic', 1 with "
        "suffix '.jpg ', 1 broken link, 1 with suffix '', 1 class without images ('gnu')\n")


def test_data_names_that_are_not_utf_8_reach_the_end_of_a_run(tmp_path, monkeypatch):
    """Names of files stay bytes; names of classes can be printed and saved."""
    name = os.fsdecode(b"v\xf6gel")
    classes = write_classes(tmp_path / "classes")
    (classes / "train/ant/0.jpg").rename(classes / "train/ant" / f"{name}.jpg")
    (classes / "train/ant").rename(classes / "train" / name)
    cub = write_cub(tmp_path / "cub")
    (cub / "images/000.Class 0").rename(cub / "images" / name)
    for file in ("images.txt", "classes.txt"):
        text = (cub / file).read_text().replace("000.Class 0", name)
        (cub / file).write_text("\ufeff" + text, errors="surrogateescape")  # a mark of Windows
    for folder in (classes, cub):
        dataset = data.Images(folder, "train", "test", 28)
        assert "v?gel" in dataset.classes and dataset[0][0].shape == (3, 28, 28)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8"))
    data.run_script(lambda: print(name, flush=True))
    assert written.getvalue() == b"v\\udcf6gel\n"


def test_data_every_picture_counts_once_with_the_label_of_its_own_folder(tmp_path, capsys):
    folder = write_classes(tmp_path / "data")
    train_folder, elsewhere = folder / "train", tmp_path / "elsewhere"
    (train_folder / "ant/again").symlink_to("../ant")       # to itself
    (train_folder / "ant/all").symlink_to("../../train")    # to all classes
    (train_folder / "ant/zebra").symlink_to("../zebra 1")   # to another class, walked later
    (train_folder / "ant/z.jpg").symlink_to("../zebra 1/0.jpg")
    (train_folder / "zebra 1/more").symlink_to(elsewhere)   # twice to what lies elsewhere
    (train_folder / "zebra 1/more again").symlink_to(elsewhere)
    (elsewhere / "deep").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(elsewhere / "deep/2.png")
    (train_folder / "ant/linked.png").symlink_to(elsewhere / "deep/2.png")  # of another class: kept
    dataset = data.Images(folder, "train", "test", 32)
    names = [(dataset.classes[label], file.name)
             for label, file in zip(dataset.labels, dataset.files)]
    assert names == [("ant", "0.jpg"), ("ant", "1.PNG"), ("ant", "linked.png"),
                     ("zebra 1", "0.jpg"), ("zebra 1", "1.PNG"), ("zebra 1", "2.png")]
    out = capsys.readouterr().out
    assert "4 link to a folder that is counted anyway" in out
    assert "1 link to an image of this folder" in out


def test_data_names_of_classes_that_look_equal(tmp_path):
    folder = write_classes(tmp_path)
    (folder / "train/ant").rename(folder / "train/Z\u00fcrich")  # composed
    (folder / "val/Zu\u0308rich").mkdir()  # decomposed, as on macOS
    (folder / "val/zebra 1/0.jpg").rename(folder / "val/Zu\u0308rich/0.jpg")
    test = data.Images(folder, "test", "test", 32)
    assert test.classes == ["Z\u00fcrich", "zebra 1"] and test.labels.tolist() == [0, 1]
    (folder / "val/zebra 1").rename(folder / "val/Zebra 1")
    with one_line(ValueError, "val/Zebra 1: there is no such class in train/, but .* zebra 1"):
        data.Images(folder, "test", "test", 32)


def test_data_validation_takes_every_fourth_image_of_each_class(tmp_path):
    """Also where classes take turns in the list, as here."""
    folder = write_cub(tmp_path, sizes=[(40, 40)] * 27, num_classes=3, num_test=1)
    every, fit, val = (data.Images(folder, split, "test", 32) for split in ("train", "fit", "val"))
    assert val.labels.bincount().tolist() == [2, 2, 2] and fit.labels.bincount()[2] == 6
    expected = [file for c in range(3)
                for file in [f for f, l in zip(every.files, every.labels) if l == c][3::4]]
    assert sorted(val.files) == sorted(expected)
    assert sorted(val.files + fit.files) == sorted(every.files)
    few = write_cub(tmp_path / "few", sizes=[(40, 40)] * 7, num_classes=2, num_test=1)
    with one_line(ValueError, "no image for split 'val'; a class needs four training images"):
        data.Images(few, "val", "test", 32)


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "images.txt").unlink(), "images.txt"),
    (lambda f: (f / "images/001.Class 1/image 1.png").unlink(), "image 1.png is missing"),
    (lambda f: write(f / "bounding_boxes.txt", "17 1 2 3"), "bounding_boxes.txt: expected 5"),
    (lambda f: write(f / "bounding_boxes.txt", "17 1 2 3 nan"), "4 finite numbers in 17 1 2 3 nan"),
    (lambda f: write(f / "parts/part_locs.txt", "17 2 1 inf 1"), "3 finite numbers in 17 2 1 inf"),
    (lambda f: write(f / "parts/part_locs.txt", "17 2 1 two 1"), "3 finite numbers in 17 2 1 two"),
    (lambda f: write(f / "image_class_labels.txt", "17 4", "14 3", "11 3", "8 3"), "'4'"),
    (lambda f: write(f / "train_test_split.txt", "17 0", "14 0", "11 0", "8 0"), "no image for"),
    (lambda f: write(f / "train_test_split.txt", "17 1", "14 1", "11 0", "8 2"), "together at '2'"),
    (lambda f: [shutil.rmtree(f), write_classes(f), write(f / "val/gnu/0.jpg")], "val/gnu"),
    (lambda f: [shutil.rmtree(f), write(f / "train/gnu/0.jpg")], "no class has images in train/"),
])
def test_data_a_damaged_folder_is_one_line(tmp_path, damage, words):
    folder = write_cub(tmp_path / "CUB_200_2011")
    damage(folder)
    with one_line((ValueError, OSError), words) as caught:
        data.Images(folder, "train", "train", 28)
    assert str(folder) in str(caught.value)


def test_data_find_takes_cub_where_it_is_and_downloads_it_where_not(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "CUB_200_2011.tgz", "w:gz") as archive:
        archive.add(write_cub(tmp_path / "source"), "CUB_200_2011")
    monkeypatch.setattr(data, "CUB_URL", "http://127.0.0.1:9/CUB_200_2011.tgz")
    with one_line(OSError, "127.0.0.1:9", "put it into"):  # another MD5
        data.find("cub", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CUB_200_2011.tgz", "source"]
    md5 = hashlib.md5((tmp_path / "CUB_200_2011.tgz").read_bytes()).hexdigest()
    monkeypatch.setattr(data, "CUB_MD5", md5)
    with monkeypatch.context() as patch, one_line(FileNotFoundError, "before torchrun"):
        patch.setenv("WORLD_SIZE", "2")
        data.find("cub", tmp_path)
    write(tmp_path / "images.txt", "a stray file")
    folder = data.find("cub", tmp_path)
    assert folder == tmp_path / "CUB_200_2011" == data.find("cub", folder)
    assert not (tmp_path / "CUB_unpacking").exists()
    (folder / "train_test_split.txt").unlink()  # an archive that was unpacked in half
    with one_line(FileNotFoundError, f"{folder} lacks train_test_split.txt; remove it"):
        data.find("cub", tmp_path)
    with one_line(FileNotFoundError, "--data cap: no such folder"):
        data.find("cap", tmp_path)


# ---------------------------------------------------------------- data: from a file to a tensor

def test_data_train_view_is_the_recipe_and_a_function_of_seed_epoch_and_index(tmp_path):
    dataset = data.Images(write_cub(tmp_path), "train", "train", 32)
    resize, flip, affine, crop = dataset.augment.transforms
    assert resize.size == [32] and flip.p == 0.5 and crop.size == (32, 32)
    assert (affine.degrees, affine.translate, affine.scale) == ([-90, 90], (0.2, 0.2), (0.8, 1.2))
    for part in (resize, affine):
        assert v2.InterpolationMode(part.interpolation) == v2.InterpolationMode.BILINEAR
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
    folder = write_cub(tmp_path, ((9, 9), (90, 60)))
    write(folder / "parts/part_locs.txt", "14 2 30 20 1", "14 9 14 20 1")
    dataset = data.Images(folder, "test", "test", 30)
    image, label, keypoints, index = dataset[0]
    pixels = T.pil_to_tensor(T.center_crop(T.resize(Image.open(dataset.files[0]), 30), 30))
    expected = T.normalize(pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)
    assert torch.equal(data.denormalize(image), pixels)
    assert (label, index) == (1, 0)
    assert keypoints.tolist() == [[7, 10, 1], [-1, 10, 0]]  # resized to 45 x 30, 8 columns cut off


@pytest.mark.parametrize("box, corners", [
    ("10.5 8.25 20.7 16.9", (10, 8, 31, 25)), ("12 13 0 0", (12, 13, 13, 14)),  # never empty
    ("-7.5 -3 30 20", (-7, -3, 22, 17)), ("30.2 35 80 80.9", (30, 35, 110, 115)),  # black outside
])
def test_data_box_view_follows_the_metric(tmp_path, box, corners):
    folder = write_cub(tmp_path)
    write(folder / "bounding_boxes.txt", f"8 {box}")
    write(folder / "parts/part_locs.txt", "8 9 11.5 9.25 0", "8 2 11.5 2.25 1")
    dataset = data.Images(folder, "test", "box", 48)
    image, _, keypoints, _ = dataset[0]
    assert torch.equal(data.denormalize(image), squash(dataset.read(0), corners, 48))
    x0, y0, x1, y1 = corners
    for y, visible, found in zip((2.25, 9.25), (1, 0), keypoints.tolist()):
        u = math.trunc(224 * (11.5 - x0) / (x1 - x0))
        assert found == [u, math.trunc(224 * (y - y0) / (y1 - y0)), visible]


def test_data_toy_without_prepare_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prepare", None)
    with pytest.raises(FileNotFoundError, match="^--data toy: .*; it needs the folder prepare/$"):
        data.find("toy", tmp_path)


@pytest.mark.parametrize("mode", ["L", "CMYK", "LA", "P", "I;16", "I"])
def test_data_every_kind_of_image_becomes_rgb(tmp_path, mode):
    ramp = np.linspace(0, 255, 40).astype(np.uint8)[None].repeat(30, 0)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(ramp.astype(np.int32))  # 32 bits that hold 0 to 255
    else:
        image = Image.fromarray(ramp).convert(mode)
    image.save(tmp_path / "x.tif")
    read = data.read_image(tmp_path / "x.tif")
    assert read.mode == "RGB" and read.size == (40, 30)
    assert np.abs(np.asarray(read).astype(int) - ramp[..., None]).max() <= 1
    Image.new("RGBA", (4, 6), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert data.read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


TURNED = "0112 0003 00000001 0006 0000"  # an entry of EXIF: orientation 6


@pytest.mark.parametrize("block, size", [
    (f"00000008 0001 {TURNED} 00000000", (5, 9)),
    (f"00000008 0002 {TURNED} 011a 000a 00000001 00000026 00000000 ffffffff 00000000", (5, 9)),
    ("ffff", (9, 5))])
def test_data_a_broken_exif_block_beside_sound_pixels(tmp_path, block, size):
    """Orientation 6 alone, beside a resolution of -1 / 0, and a block that ends too early."""
    exif = b"Exif\0\0MM\0*" + bytes.fromhex(block)
    Image.new("RGB", (9, 5)).save(tmp_path / "x.jpg", exif=exif)
    assert data.read_image(tmp_path / "x.jpg", upright=True).size == size


@pytest.mark.parametrize("value", range(9))
def test_data_each_orientation_is_undone(tmp_path, value):
    stored, exif = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40), Image.Exif()
    exif[0x0112] = value
    stored.save(tmp_path / "x.png", exif=exif)
    read = data.read_image(tmp_path / "x.png", upright=True)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "x.png"))
    assert np.array_equal(read, upright.convert("RGB"))


def test_data_the_transparent_value_of_16_bits_is_white(tmp_path):
    grey = Image.fromarray(np.array([[1000, 1001, 60000]], np.uint16))
    grey.save(tmp_path / "x.png", transparency=1000)
    assert np.asarray(data.read_image(tmp_path / "x.png"))[0, :, 0].tolist() == [255, 3, 234]


@pytest.mark.parametrize("error", [struct.error("short"), AttributeError("none"), TypeError("no")])
def test_data_whatever_a_file_raises_is_one_line(tmp_path, error, monkeypatch):
    Image.new("RGB", (4, 6)).save(tmp_path / "x.png")
    monkeypatch.setattr(PngImageFile, "load", functools.partial(fail, error))
    with one_line(ValueError, f"{tmp_path}/x.png: not a readable image"):
        data.read_image(tmp_path / "x.png")


def test_data_all_images_are_opened_and_the_damaged_ones_named(tmp_path, monkeypatch, capsys):
    folder = write_cub(tmp_path)
    first, last = (data.Images(folder, split, "test", 28).files[0] for split in ("train", "test"))
    for file in (first, last):
        file.write_bytes(file.read_bytes()[:60])
    monkeypatch.setattr(sys, "argv", ["data.py", "--data", str(folder)])
    with one_line(ValueError, f"{folder}: 2 damaged images"):
        data.main()
    found = capsys.readouterr()
    named = [line.split(": not")[0] for line in found.err.splitlines() if ": not" in line]
    assert named == [str(first), str(last)]
    with one_line(ValueError, str(first), f"python data.py --data {folder} names all"):
        data.Images(folder, "train", "test", 28)[0]


@pytest.mark.parametrize("content", ["text", dict(x=torch.zeros(3))])
def test_data_a_full_disk_leaves_what_was_there(tmp_path, content, monkeypatch):
    data.save(tmp_path / "last.pt", "before")

    def fail(*arguments, **_):
        (tmp_path / "last.pt.part").write_bytes(b"half")
        raise OSError(28, "No space left on device") if content == "text" else RuntimeError("a\nb")

    monkeypatch.setattr(Path, "write_text", fail)
    monkeypatch.setattr(torch, "save", fail)
    with one_line(OSError, f"{tmp_path}/last.pt: could not be written", "disk full?"):
        data.save(tmp_path / "last.pt", content)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert (tmp_path / "last.pt").read_text() == "before"


@pytest.mark.parametrize("values, words", [
    (np.array([[0.5, np.nan]], np.float32), "float32 from nan to nan; expected 8 or 16 bits"),
    (np.array([[-1, 9]], np.int32), "int32 from -1 to 9"),
    (np.array([[0, 1 << 16]], np.int32), "int32 from 0 to 65536")])
def test_data_pixels_of_unknown_scale_are_refused(tmp_path, values, words):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with one_line(ValueError, "x.tif", words):
        data.read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("error", [MemoryError, AttributeError, TypeError])
def test_data_a_fault_of_ours_is_not_blamed_on_the_image(tmp_path, error, monkeypatch):
    Image.new("RGB", (4, 6)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "convert", functools.partial(fail, error))
    with pytest.raises(error):
        data.read_image(tmp_path / "x.png")


@pytest.mark.parametrize("workers, content", [(1, b"\x89PNG"), (0, b"<html>")])
def test_data_an_unreadable_image_is_one_line(tmp_path, workers, content, capsys, monkeypatch):
    utils = torch.utils.data._utils
    monkeypatch.setattr(utils, "MP_STATUS_CHECK_INTERVAL", 1, raising=False)  # else 5 s
    dataset = data.Images(write_cub(tmp_path), "test", "test", 28)
    dataset.files[0].write_bytes(content)
    with pytest.raises(SystemExit) as end:
        data.run_script(lambda: list(DataLoader(dataset, num_workers=workers)))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"error: {dataset.files[0]}: not a readable image")


NO_MEMORY = "error: .*--shm-size=8g or --workers 0\n"


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("no memory.\nmore"), 2, "error: no memory. Try a smaller --batch-size"),
    (FileNotFoundError(2, "No such file", "/torch_7"), 2, "error: .* No such file: '/torch_7'\n"),
    (OSError(28, "No space left on device"), 2, r"error: \[Errno 28\] No space left on device\n"),
    (OSError(30, "Read-only file system"), 2, NO_MEMORY),  # no semaphore
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to "
                  "write to file </torch_7_0>: No space left on device (28)\n"), 2, NO_MEMORY),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_7_0>"), 2, NO_MEMORY),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), 2, NO_MEMORY),
])
def test_data_run_script_says_a_failure_in_one_line(error, code, words, capsys):
    with pytest.raises(SystemExit) as end:
        data.run_script(functools.partial(fail, error))
    text = capsys.readouterr().err
    assert end.value.code == code and re.match(words, text) and text.count("\n") == 1
    with pytest.raises(RuntimeError, match="shapes"):  # a fault of ours keeps its traceback
        data.run_script(functools.partial(fail, RuntimeError("shapes")))


def test_data_a_notebook_has_an_output_of_its_own(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # without reconfigure
    assert data.run_script(lambda: 7) == 7


def test_data_python_3_11_is_asked_for_at_the_door(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 9))
    monkeypatch.delitem(sys.modules, "data")
    for script in (data, train, evaluate):
        with pytest.raises(SystemExit) as end:
            runpy.run_path(script.__file__)
        error = capsys.readouterr().err
        assert end.value.code == 2 and "needs Python 3.11" in error and error.count("\n") == 1


# ---------------------------------------------------------------- data: the affine view

def test_data_affine_is_seeded_and_in_range():
    generators = [torch.Generator().manual_seed(seed) for seed in [*range(2000), 7]]
    thetas = torch.stack([data.sample_affine(generator) for generator in generators])
    assert torch.equal(thetas[7], thetas[-1])
    scales = torch.linalg.det(thetas[:, :, :2]).sqrt()
    angles = torch.rad2deg(torch.atan2(thetas[:, 1, 0], thetas[:, 0, 0]))
    draws = torch.stack([scales - 1.1, angles, thetas[:, 0, 2], thetas[:, 1, 2]])
    for values, bound in zip(draws, (0.3, 90, 0.22, 0.22)):
        assert 0.98 * bound < values.max() <= 1.0001 * bound
        assert -1.0001 * bound <= values.min() < -0.98 * bound
    assert (draws.corrcoef() - torch.eye(4)).abs().max() < 0.1  # each by a draw of its own


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


# ---------------------------------------------------------------- real data

@pytest.mark.skipif(not SHARED.is_dir(), reason="needs 40 real CUB classes and a real ViT-Tiny")
def test_real_features_know_birds():
    """The pretrained ViT reads right: neighbours of cls agree far above chance (1 in 40)."""
    backbone = ivpt.load_backbone(SHARED / "weights" / "vit_tiny_patch16_224.pth", 224)
    features, labels = [], []
    for split, step, count in (("fit", 20, 920), ("test", 50, 1090)):
        dataset = data.Images(SHARED / "data" / "CUB_200_2011", split, "test", 224)
        assert (len(dataset), len(dataset.classes), len(dataset.parts)) == (count, 40, 15)
        images = torch.stack([dataset[i][0] for i in range(0, len(dataset), step)])
        with torch.no_grad():
            features.append(F.normalize(backbone(images)[:, 0], dim=1))
        labels.append(dataset.labels[::step])
    nearest = labels[0][(features[1] @ features[0].T).argmax(1)]
    assert (nearest == labels[1]).float().mean() > 0.4
    visible = dataset.keypoints[..., 2] > 0
    place = (dataset.keypoints[..., :2] - dataset.boxes[:, None, :2]) / dataset.boxes[:, None, 2:]
    assert ((place > -0.05) & (place < 1.05)).all(2)[visible].float().mean() > 0.99


# ---------------------------------------------------------------- the losses, written out

def random_maps(K=4, B=3, h=6, w=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, K, h, w, generator=generator, dtype=torch.float64).softmax(1)


def pool3(A):
    """3 x 3 average, stride 1, no padding, window by window."""
    rows = []
    for y in range(A.shape[-2] - 2):
        row = [A[..., y:y + 3, x:x + 3].mean((-1, -2)) for x in range(A.shape[-1] - 2)]
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def cosine(a, b):
    return (a * b).sum() / (a.norm() * b.norm())


def test_losses_of_one_map():
    A = random_maps()
    B, K, h, w = A.shape
    dy = sum((A[:, :, y + 1] - A[:, :, y]).abs().sum() for y in range(h - 1))
    dx = sum((A[..., x + 1] - A[..., x]).abs().sum() for x in range(w - 1))
    torch.testing.assert_close(train.total_variation(A), (dy + dx) / (B * h * w))
    pooled = pool3(A)  # (B, K, 4, 3)
    best = [max(pooled[b, k].max() for b in range(B)) for k in range(K - 1)]
    torch.testing.assert_close(train.presence(A), 1 - sum(best) / (K - 1))
    torch.testing.assert_close(train.entropy(A), -(A * A.log()).sum() / (B * h * w))
    total = 0
    for background in pooled[:, -1]:
        places = [background[i, j] * ((2 * i / 3 - 1) ** 2 + (j - 1) ** 2) / 2
                  for i in range(4) for j in range(3)]
        total += F.binary_cross_entropy(max(places), torch.ones_like(A[0, 0, 0, 0]))
    torch.testing.assert_close(train.background_presence(A), total / B)


def test_region_consistency_is_kl_and_moves_the_fused_map_only():
    final, fused = random_maps(seed=1).requires_grad_(), random_maps(seed=2).requires_grad_()
    loss = train.region_consistency(final, fused)
    expected = (final * (final / fused).log()).sum() / (3 * 6 * 5)  # B h w patches
    torch.testing.assert_close(loss, expected, atol=1e-8, rtol=1e-8)  # eps 1e-10
    loss.backward()
    assert final.grad is None and fused.grad.abs().sum() > 0


def test_equivariance_and_orthogonality_compare_by_cosines():
    A, back, Z = random_maps(seed=1), random_maps(seed=2), random_maps(w=2, h=4)[..., 0]
    same = sum(cosine(A[b, k], back[b, k]) for b in range(3) for k in range(3))  # no background
    torch.testing.assert_close(train.equivariance(A, back), 1 - same / 9)
    expected = sum((cosine(z[i], z[j]) - float(i == j)) ** 2 / 48
                   for z in Z for i in range(4) for j in range(4))
    torch.testing.assert_close(train.orthogonality(Z).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_ivpt_losses_are_the_table(recipe):
    """Eight terms of weight 1: maps averaged over five layers, L_con over the prompted four."""
    model, images, labels = tiny_ivpt(recipe), torch.randn(3, 3, 70, 70), torch.tensor([0, 4, 2])
    with torch.no_grad():
        losses, logits = train.ivpt_losses(model, images, labels, THETA)
        out, view = model(images), model(data.warp(images, THETA))
    A, back = out.attention, [data.unwarp(maps, THETA) for maps in view.attention]
    expected = {
        "classification": F.cross_entropy(out.concept_logits.mean(1), labels),
        "region_consistency": sum(train.region_consistency(A[4], f) for f in out.fused) / 4,
        "total_variation": sum(train.total_variation(maps) for maps in A) / 5,
        "presence": sum(train.presence(maps) for maps in A) / 5,
        "background_presence": sum(train.background_presence(maps) for maps in A) / 5,
        "entropy": sum(train.entropy(maps) for maps in A) / 5,
        "equivariance": sum(train.equivariance(a, b) for a, b in zip(A, back)) / 5,
        "orthogonality": train.orthogonality(out.features),
    }
    expected["loss"] = sum(expected.values())
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=lambda text: f"{name}: {text}")
    torch.testing.assert_close(logits, out.logits)


def one_step(recipe, device, amp, monkeypatch):
    """A step from one state, without noise in the grouping -> losses; raw maps of the warped and of
    the given images, layer by layer, with their gradients; the gradient of all parameters."""
    maps, attend, model = [], kernels.prototype_attention, tiny_ivpt(recipe).to(device)

    def watched(*inputs, **options):
        outputs = attend(*inputs, **options)
        outputs[0].retain_grad()
        maps.append(outputs[0])
        return outputs

    monkeypatch.setattr(ivpt, "prototype_attention", watched)
    images, labels = torch.randn(3, 3, 70, 70), torch.tensor([0, 4, 2])
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        losses, _ = model.losses(images.to(device), labels.to(device), THETA)
    losses["loss"].backward()
    gradient = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return losses, maps, torch.cat(gradient).cpu()


@needs_gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_on_a_gpu_is_that_on_a_cpu(recipe, monkeypatch):
    losses, _, gradient = one_step(recipe, "cpu", False, monkeypatch)
    found, _, found_gradient = one_step(recipe, "cuda", False, monkeypatch)
    for name, loss in losses.items():
        assert found[name].item() == pytest.approx(loss.item(), 1e-3, 1e-3), name
    assert (found_gradient - gradient).norm() < 6e-3 * gradient.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_in_bf16_is_that_in_fp32_where_regions_are_the_same(recipe, device, monkeypatch):
    """A rounding can move a patch to another region, and one such patch can change the gradient of
    a parameter by half. So gradients are compared at the patches whose owner is the same."""
    losses, maps, _ = one_step(recipe, "cpu", False, monkeypatch)
    found, found_maps, _ = one_step(recipe, device, True, monkeypatch)
    for name, loss in losses.items():
        smallest = 0.005 if name == "orthogonality" else 0.05
        assert found[name].item() == pytest.approx(loss.item(), 0.05, smallest), name
    assert len(maps) == len(found_maps) == 10
    for a, b in zip(maps[5:], found_maps[5:]):  # of the images as they are
        same = a.argmax(1) == b.cpu().argmax(1)
        assert same.float().mean() > 0.9 and (a - b.cpu()).abs().max() < 0.05
        expected, gradient = a.grad.mT[same], b.grad.cpu().mT[same]
        assert (gradient - expected).norm() < 0.15 * expected.norm()


@needs_gpu
def test_a_step_never_waits_for_the_gpu():
    """Not even for the affine map, which comes from the CPU."""
    model = tiny_ivpt("paper").cuda().train()
    images, labels = torch.randn(2, 3, 70, 70, device="cuda"), torch.tensor([0, 4], device="cuda")
    try:
        for mode in ("default", "error"):  # the first step sets up what lasts
            torch.cuda.set_sync_debug_mode(mode)
            losses, _ = train.ivpt_losses(model, images, labels, data.sample_affine())
            losses["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def named(model, *patterns):
    names = [name for name, _ in model.named_parameters()]
    return {name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)}


def reached(model, loss):
    """Names of the parameters that a loss reaches."""
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_gradient_stops():
    """Which parameters each loss reaches: the stop-gradients of the method, one by one."""
    model, released = tiny_ivpt("paper").train(), tiny_ivpt("released").train()
    images, labels = torch.randn(2, 3, 70, 70), torch.tensor([0, 1])
    losses, _ = train.ivpt_losses(model, images, labels, THETA)
    fusion = named(model, "fusions.*.norm.*", "fusions.*.head.*")
    head = named(model, "concepts.4.*", "norm.*", "classifier.*")
    for term in ("total_variation", "presence", "background_presence", "entropy", "equivariance"):
        found = reached(model, losses[term])
        assert named(model, "concepts.*.prototypes") <= found <= named(model, "concepts.*"), term
    # The grouping learns from L_con alone; the final map is its target and does not move.
    learners = named(model, "concepts.[0-3].*", "fusions.*.grouping.*")
    assert reached(model, losses["region_consistency"]) == learners
    # Classes reach the fusion heads through the prompts, but no grouping and no prompted prototype.
    assert reached(model, losses["classification"]) == fusion | head
    assert reached(model, losses["orthogonality"]) == fusion | head - {"classifier.weight"}
    # The released recipe tunes tokens: classes reach them, losses on maps do not.
    losses, _ = train.ivpt_losses(released, images, labels, THETA)
    tokens = {"backbone.cls_token", "backbone.register_tokens", "backbone.pos_embed"}
    assert tokens <= reached(released, losses["classification"])
    assert not tokens & reached(released, losses["entropy"])


def test_a_view_of_which_the_maps_alone_are_used_keeps_no_graph_of_the_blocks(monkeypatch):
    """As on a GPU, where maps and pooled features are outputs of one op."""
    def op(x, q, b, bias_after_softmax, smoothing=0.0, detach_maps=False):
        return kernels._op(x, q, b, bias_after_softmax, smoothing, detach_maps)

    monkeypatch.setattr(ivpt, "prototype_attention", op)
    model, images = tiny_ivpt("released"), torch.randn(2, 3, 70, 70)
    gradients = []
    for maps_only in (False, True):
        model.zero_grad()
        maps = model(images, maps_only=maps_only).attention
        sum(A.square().sum() for A in maps).backward()
        gradients.append([p.grad.clone() for p in model.concepts.parameters()])
        assert (model.backbone.cls_token.grad is None) == maps_only  # else zeros, at a price
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    seen, warp, forward = [], data.warp, ivpt.IVPT.forward
    monkeypatch.setattr(data, "warp", lambda images, theta: warp(images, theta) + 100)

    def watched(self, images, **options):
        seen.append((images.mean().item() > 50, options))
        return forward(self, images, **options)

    monkeypatch.setattr(ivpt.IVPT, "forward", watched)
    train.ivpt_losses(model, images, torch.tensor([0, 1]), torch.eye(2, 3))
    assert seen == [(True, dict(maps_only=True)), (False, {})]


# ---------------------------------------------------------------- evaluation: the metrics

@pytest.mark.parametrize("h, w", [(14, 14), (16, 16), (37, 37), (9, 14), (224, 224), (1, 1)])
def test_evaluate_peaks_are_the_first_maxima_of_the_upsampled_maps(h, w):
    noise = torch.randn(2, 4, h, w, generator=torch.Generator().manual_seed(h * 1000 + w))
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


# ---------------------------------------------------------------- evaluation: the protocol

class RandomMaps(nn.Module):
    """Five layers of fixed random maps: any mix-up of views, layers or axes gives other numbers."""
    grid, prototypes, num_classes, class_specific = (7, 7), (6, 5, 4, 3, 4), 3, False

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(3, sum(self.prototypes) + self.num_classes, 8, 8)
        self.conv.bias.data[2] = -9.0  # concept 3 of the first layer wins nothing
        self.amp = []

    def forward(self, images):
        self.amp.append(torch.is_autocast_enabled("cpu"))
        sizes = (*self.prototypes, self.num_classes)
        *maps, logits = self.conv(images).float().mul(3).split(sizes, 1)
        return ivpt.Output(logits.amax((2, 3)), None, [a.softmax(1) for a in maps], [], [], None)


@pytest.fixture(scope="module")
def eight_birds(tmp_path_factory):
    """Eight images of three classes, all for testing; four parts."""
    folder = tmp_path_factory.mktemp("eight_birds") / "CUB_200_2011"
    write_cub(folder, [(90, 64)] * 8, num_test=8, num_classes=3)
    rng, points = np.random.default_rng(1), folder / "parts/part_locs.txt"
    more = [f"{17 - 3 * i} {part} {x * 90} {y * 64} 1" for i in range(8) for part in (3, 4)
            for x, y in rng.uniform(0.2, 0.8, (1, 2))]
    write(points, points.read_text().strip(), *more)
    write(folder / "parts/parts.txt", "2 beak", "9 left wing", "3 tail", "4 leg")
    return folder


@torch.no_grad()
def test_evaluate_equals_the_protocol_written_out(eight_birds):
    """One image at a time: which view, which maps and which noise every number is made from."""
    n, S, seed, model = 8, 56, 3, RandomMaps()
    test, box = (data.Images(eight_birds, "test", view, S) for view in ("test", "box"))
    metrics = evaluate.evaluate(model, eight_birds, S, batch_size=5, seed=seed)
    right, outputs, patches = 0, [], [torch.zeros(K, 2) for K in model.prototypes]
    for i, (x, y, w, h) in enumerate(test.boxes.tolist()):
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
        expected = dict(  # what the metrics themselves are, other tests say
            consistency=evaluate.consistency(hits, visible, labels),
            random_location=np.mean(random),
            stability=evaluate.stability(hits, evaluate.part_hits(noisy, keypoints), labels),
            constant_location=evaluate.consistency(fixed, visible, labels),
            over_constant=(evaluate.consistency(hits, visible, labels)
                           - evaluate.consistency(fixed, visible, labels)),
            distinctiveness=evaluate.distinctiveness(evaluate.find_peaks(clean)),
            comprehensiveness=evaluate.comprehensiveness(hits, visible),
            peak_spread=peaks.var(0, correction=0).sum(1).sqrt().mean(),
            foreground_outside=100 * won[0] / whole[0], foreground_inside=100 * won[1] / whole[1])
        expected = {key: float(value) for key, value in expected.items()}
        assert {key: layer[key] for key in expected} == pytest.approx(expected)
        assert layer["wins"] == patches[l].sum(1).int().tolist()
        assert layer["winning"] == pytest.approx(100 * (1 - 1 / 5 if l == 0 else 1))
        assert layer["foreground"] == pytest.approx(float(100 * won.sum() / whole.sum()))
        spreads = peaks.var(0, correction=0).sum(1).sqrt()
        assert layer["peak_spreads"] == pytest.approx(spreads.tolist())
        for concept, best in zip(hits.sum(0), layer["parts_hit"], strict=True):
            order = sorted(range(4), key=lambda part: (-concept[part], visible[:, part].sum()))
            names = [test.parts[part] for part in order[:3] if concept[part]]
            assert [name for name, _ in best] == names
            shares = 100 * concept / visible.sum(0)
            assert [share for _, share in best] == pytest.approx(shares[order[:len(best)]].tolist())
    assert max(len(best) for layer in metrics["layers"] for best in layer["parts_hit"]) == 3
    assert metrics["accuracy"] == 100 * right / n and not any(model.amp)
    for key in expected.keys() - {"foreground_outside", "foreground_inside"}:
        assert len({layer[key] for layer in metrics["layers"]}) > 1, key  # or nothing would be seen
    third = metrics["layers"][2]
    assert metrics["headline"] == dict(layer=2, consistency=third["consistency"],
                                       stability=third["stability"])


def test_evaluate_distinct_concepts_look_at_different_spots():
    def score(*spots):
        return evaluate.distinctiveness(torch.tensor([spots]))

    assert score((0, 0), (0, 0)) == 0 and score((0, 0), (72, 0)) == 100 == score((0, 0), (200, 200))
    assert score((0, 0), (36, 0)) == pytest.approx(100 * (1 - 1 / 3))  # half of each is shared
    assert score((0, 0), (0, 0), (200, 0)) == pytest.approx(100 * 2 / 3)  # one pair of three
    assert score((5, 5)) is None


def test_evaluate_comprehensive_concepts_hit_every_visible_part():
    visible = torch.tensor([[1, 1, 0], [1, 1, 1]])
    hits = torch.zeros(2, 4, 3, dtype=torch.bool)
    hits[0, 0, 0] = hits[0, 1, 0] = hits[1, 3, 2] = hits[1, 2, 1] = True  # three of five parts
    assert evaluate.comprehensiveness(hits, visible) == pytest.approx(60)


def test_evaluate_nothing_but_the_seed_changes_the_numbers(eight_birds):
    model = RandomMaps()
    options = ({}, dict(batch_size=3), dict(batch_size=1, workers=2), dict(seed=1))
    first, *others = (evaluate.evaluate(model, eight_birds, 56, **more) for more in options)
    assert others[0] == others[1] == first and others[2]["layers"] != first["layers"]
    evaluate.evaluate(model, eight_birds, 56, amp=True)
    assert model.amp[-3:] == [True] * 3 and not model.amp[-4]


def test_evaluate_without_key_points(eight_birds, tmp_path):
    folder = shutil.copytree(eight_birds, tmp_path / "cub")
    for name in ("parts/part_locs.txt", "parts/parts.txt"):  # no part is visible; there is no part
        (folder / name).unlink()
        metrics = evaluate.evaluate(RandomMaps(), folder, 56)
        missing = {key for key, value in metrics["layers"][0].items() if value is None}
        assert missing == {"consistency", "stability", "constant_location", "over_constant",
                           "comprehensiveness",
                           "random_location", "parts_hit"}
        assert metrics["headline"] == dict(layer=2, consistency=None, stability=None)
        assert "no key points" in metrics["unavailable"] in evaluate.table(metrics)


def test_evaluate_prototypes_of_a_class_are_controlled_within_it(eight_birds):
    """Each class looks at a place of its own: constant within the class, not over all images."""
    class Specific(RandomMaps):
        prototypes, class_specific = (2,), True

        def forward(self, images, labels):
            maps = torch.zeros(len(images), 2, 7, 7)
            maps[labels == 0, 0, 1, 1] = maps[labels > 0, 0, 5, 5] = 1.0
            return ivpt.Output(torch.zeros(len(images), 3), None, [maps], [], [], None)

    layer = evaluate.evaluate(Specific(), eight_birds, 56)["layers"][0]
    assert layer["peak_spread"] == 0 and layer["constant_location"] == layer["consistency"]
    assert layer["parts_hit"] is None  # concept 1 is another one in every class


def test_evaluate_command_line(tmp_path, monkeypatch, capsys):
    model = RandomMaps()
    folder = write_cub(tmp_path / "CUB_200_2011", [(90, 64)] * 8, num_test=8, num_classes=2)
    options = dict(data="cub", data_root=str(tmp_path), image_size=56, amp=False, seed=3)
    run = dict(options=options, classes=data.Images(folder, "test", "test", 56).classes)
    monkeypatch.setattr(evaluate, "load_run", lambda *_: (model, run))
    command, file = ["--ckpt", str(tmp_path / "last.pt")], tmp_path / "metrics.json"
    evaluate.main(command)
    assert re.search(r"accuracy \d+.\d % on 8 images\nlayer .* 3\*", capsys.readouterr().out)
    split = folder / "train_test_split.txt"
    split.write_text(split.read_text().replace(" 0\n", " 1\n"))
    evaluate.main([*command, "--split", "val"])  # every fourth training image
    protocol = json.loads((tmp_path / "metrics_val.json").read_text())["protocol"]
    assert protocol["images"] == 2 and json.loads(file.read_text())["protocol"]["images"] == 8
    for channel in (0, 21, 22):  # of the first map, of the last, of the logits
        bias = model.conv.bias[channel].item()
        model.conv.bias.data[channel] = math.nan
        with one_line(ValueError, "not finite"):
            evaluate.main([*command, "--split", "val"])
        model.conv.bias.data[channel] = bias
    run["classes"].pop()
    with one_line(ValueError, "its 2 classes are not the 1 of training"):
        evaluate.main([*command, "--split", "val"])


def test_evaluate_every_option_has_its_effect(eight_birds, tmp_path, monkeypatch):
    """Options that are not typed come from the run."""
    seen, signature = [], inspect.signature(evaluate.evaluate)

    def watched(*inputs):
        seen.append(signature.bind(*inputs).arguments)
        return dict(accuracy=1.0)

    monkeypatch.setattr(evaluate, "evaluate", watched)
    monkeypatch.setattr(evaluate, "table", str)
    for amp in (False, True):
        options = dict(data="cub", data_root=str(eight_birds), image_size=56, amp=amp, seed=3)
        classes = data.Images(eight_birds, "test", "test", 56).classes
        run = dict(options=options, classes=classes)
        monkeypatch.setattr(evaluate, "load_run", lambda *_: (RandomMaps(), run))
        evaluate.main(["--ckpt", str(tmp_path / "last.pt")])
        typed = ["--amp", "--no-amp"][amp], "--seed", "7", "--batch-size", "5", "--workers", "2"
        other = shutil.copytree(eight_birds, tmp_path / f"cub {amp}")
        evaluate.main(["--ckpt", str(tmp_path / "last.pt"), *typed, "--data", str(other)])
        assert len(seen) == (4 if amp else 2)
        for found, folder, *values in zip(seen[-2:], (eight_birds, other), (3, 7), (32, 5), (0, 2),
                                          (amp, not amp), strict=True):
            assert found["folder"] == folder and found["split"] == "test"
            names = ("seed", "batch_size", "workers", "amp")
            assert [found[name] for name in names] == values
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in (["--visualize", "x"], ["--image", "x"]):
        with one_line(ValueError, "one process draws"):
            evaluate.main(["--ckpt", str(tmp_path / "last.pt"), *words])


# ---------------------------------------------------------------- training: options, rates, order
TINY_RUN = ["--data", "cub", "--weights", "toy", "--tune", "all", "--image-size", "56",
            "--workers", "0", "--no-amp", "--device", "cpu", "--epochs", "2", "--pretrain", "0",
            "--prototypes", "6", "5", "4"]


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """48 images for training and 12 for testing, as a --data-root. Three steps an epoch."""
    root = tmp_path_factory.mktemp("birds")
    write_cub(root / "CUB_200_2011", [(64, 60)] * 60, num_test=12, num_classes=6)
    return root


def tiny_run(root, out, *more):
    return train.parse([*TINY_RUN, "--data-root", str(root), "--out", str(out), *map(str, more)])


@pytest.mark.parametrize("name", ["cub", "a/pets"])
@pytest.mark.parametrize("recipe, after, mlp, tune, start, lr_bias", [
    ("paper", True, True, "none", "clusters", 2e-5),
    ("released", False, False, "tokens", "noise", 2e-4)])
def test_recipes(name, recipe, after, mlp, tune, start, lr_bias):
    args = train.parse(["--data", name, "--recipe", recipe])
    assert (args.weights, args.image_size, args.epochs) == ("vitb14_reg4", 518, 25)
    assert (args.batch_size, args.prototypes) == (16, (17, 14, 11, 8, 5))
    assert (args.lr, args.lr_fusion, args.lr_prototypes) == (1e-2, 1e-2, 2e-4)
    assert (args.lr_bias, args.lr_backbone, args.start) == (lr_bias, 2e-4, start)
    model = ivpt.build(asdict(args), 10, tiny_backbone())
    assert all(concept.bias_after_softmax == after for concept in model.concepts)
    assert isinstance(model.fusions[0].head, nn.Sequential) == mlp and model.tune == tune


def test_the_paper_is_the_default_of_all_data_and_the_toy_has_a_preset():
    for words in ([], ["--data", "cub"], ["--data", "a/pets"]):
        args = train.parse(words)
        assert (args.method, args.recipe, args.start) == ("ivpt", "paper", "clusters")
        assert args.out == "runs/" + (words[1].split("/")[-1] if words else "toy")
    args = train.parse([])
    assert (args.weights, args.image_size, args.pretrain, args.epochs) == ("toy", 112, 12, 9)


def test_an_option_is_typed_or_from_recipe_method_preset_or_default_and_says_so(monkeypatch):
    class Other(ivpt.Method):
        rates, accepts = dict(lr=3e-3, epochs=7, lr_bias=1.0), ("prototypes", "lr_bias")

    find = ivpt.find_method
    monkeypatch.setattr(ivpt, "find_method", lambda name: Other if name == "x" else find(name))
    args = train.parse(["--lr-bias", "1e-4", "--no-bias-after-softmax", "--recipe", "released"])
    assert (args.lr_bias, args.bias_after_softmax, args.tune) == (1e-4, False, "tokens")
    assert args.sources["lr_bias"] == args.sources["bias_after_softmax"] == "typed"
    assert args.sources["tune"] == "recipe released" and args.sources["epochs"] == "weights toy"
    assert train.parse([]).sources["tune"] == "default recipe"
    assert args.sources["lr"] == "default" and args.sources["device"] == "machine"
    args = train.parse(["--method", "x", "--prototypes", "3", "2"])
    assert (args.lr, args.epochs, args.image_size, args.prototypes) == (3e-3, 7, 112, (3, 2))
    assert (args.lr_bias, args.tune, args.no_bias, args.out) == (1.0, None, None, "runs/toy_x")
    assert args.sources["lr"] == "method x" and args.sources["tune"] == "not used"
    table = [line.split() for line in train.table_of(args).splitlines()]
    assert ["lr", "0.003", "method", "x"] in table and ["seed", "42", "default"] in table
    assert not [line for line in table if line[0] in ("tune", "sources")]
    values = dict(recipe=["paper"], start=["noise"], tune=["none"], lr_fusion=["1"],
                  lr_backbone=["1"], lr_prototypes=["1"])
    for word in {*ivpt.IVPT.accepts} - {*Other.accepts}:
        typed = ["--" + word.replace("_", "-"), *values.get(word, [])]
        with one_line(ValueError, typed[0], "--method x does not take it"):
            train.parse(["--method", "x", *typed])
    with one_line(ValueError, "--pretrain", "vits14 is pretrained"):
        train.parse(["--weights", "vits14", "--pretrain", "3"])


@pytest.mark.parametrize("idea", ["bias", "regions", "cross_layer", "fusion"])
def test_an_ablation_takes_one_idea_away_and_trains(idea, birds, tmp_path):
    args = train.parse([*TINY_RUN, "--out", str(tmp_path), "--no-" + idea.replace("_", "-")])
    model = ivpt.build(asdict(args), 6, tiny_backbone()).train()
    optimizer, _ = train.make_optimizer(model, args)
    losses, _ = model.losses(torch.randn(2, 3, 70, 70), torch.tensor([0, 1]), data.sample_affine())
    losses["loss"].backward()
    before = model.classifier.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.classifier.weight, before)
    assert all(torch.is_tensor(value) and value.isfinite() for value in losses.values())
    assert len(model.fusions) == (0 if idea == "cross_layer" else 2)
    assert model.concepts[0].bias.requires_grad == (idea != "bias")


def test_a_cpu_leaves_a_core_to_each_loader_process(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(data, "CPU_MAX", tmp_path / "none")
    assert train.parse(["--device", "cuda"]).workers == 8
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for workers in ("0", "3", "9"):
        train.use_cores(train.parse(["--device", "cpu", "--workers", workers]))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the user's word
    train.use_cores(train.parse(["--device", "cpu"]))
    assert used == [8, 5, 1]
    for limit, cores in (("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(limit + "\n")
        monkeypatch.setattr(data, "CPU_MAX", tmp_path / "cpu.max")
        assert data.num_cores() == cores


def test_rates_of_other_batches_and_of_the_released_recipe(birds, tmp_path):
    """Twice those of batch 16 for batch 64; tuned tokens have the prototypes' rate."""
    args = tiny_run(birds, tmp_path, "--batch-size", 64, "--tune", "tokens",
                    "--lr-prototypes", 3e-4, "--lr-backbone", 7e-4)
    model = ivpt.build(asdict(args), 10, tiny_backbone(registers=4))
    optimizer, _ = train.make_optimizer(model, args)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    learners = {name: p for name, p in model.named_parameters() if id(p) in rates}
    tokens = named(model, "backbone.*") & learners.keys()
    assert tokens == {"backbone.cls_token", "backbone.register_tokens", "backbone.pos_embed"}
    for name in tokens | named(model, "concepts.*.prototypes"):
        assert rates[id(learners[name])] == 6e-4, name
    assert rates[id(model.classifier.weight)] == 2e-2


def test_every_image_has_its_turn_however_many_processes_share_a_batch(birds, tmp_path):
    args = tiny_run(birds, tmp_path)
    alone = train.epoch_batches(80, args, 3)
    shared = [train.epoch_batches(80, args, 3, rank, world=2) for rank in range(2)]
    for step in range(5):
        assert sorted(shared[0][step] + shared[1][step]) == sorted(alone[step])
    assert sorted(sum(alone, [])) == list(range(80))
    assert alone != train.epoch_batches(80, args, 4)
    assert alone != train.epoch_batches(80, tiny_run(birds, tmp_path, "--seed", 7), 3)


@pytest.mark.parametrize("arguments, says", [
    (["--data", "birds"], "birds: no such folder"), (["--resume"], "last.pt is not there"),
    (["--lr", "nan"], "--lr nan: expected"),
    (["--device", "gpu"], "invalid choice"), (["--method", "vpt"], "expected ivpt, .*vpt-deep"),
    (["--prototype", "3"], "--help")])
def test_bad_options_are_one_line(arguments, says, birds, tmp_path):
    with one_line((ValueError, OSError), says):
        train.train(tiny_run(birds, tmp_path / "run", *arguments))


# ---------------------------------------------------------------- training: runs

def log_of(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").open()]
    for line in lines:
        del line["seconds"]
    return lines


def assert_same_run(a, b):
    first, second = (torch.load(run / "last.pt", weights_only=True) for run in (a, b))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    assert first["scheduler"] == second["scheduler"]
    assert log_of(a) == log_of(b)
    assert (a / "metrics.json").read_bytes() == (b / "metrics.json").read_bytes()


@pytest.fixture(scope="module")
def uncut(birds, tmp_path_factory):
    """The folder of a run of two epochs."""
    out = tmp_path_factory.mktemp("runs") / "uncut"
    train.train(tiny_run(birds, out))
    return out


def test_a_run_leaves_its_files_and_resumes_bit_for_bit(birds, uncut, tmp_path, capsys):
    """1 + 1 epochs equal 2: parameters, log and metrics."""
    run = tmp_path / "a run"
    train.train(tiny_run(birds, run, "--epochs", 1))
    with one_line(ValueError, "holds a run", "--resume", "--overwrite"):
        train.train(tiny_run(birds, run))
    with one_line(ValueError, "seed 42, now 7"):
        train.parse(["--resume", "--out", str(run), "--seed", "7"])
    fewer = shutil.copytree(birds, tmp_path / "birds")
    split = fewer / "CUB_200_2011" / "train_test_split.txt"
    split.write_text(split.read_text().replace(" 1\n", " 0\n", 1))
    resume = ["--resume", "--out", str(run), "--epochs", "2"]
    with one_line(ValueError, "images 48, now 47"):
        train.train(train.parse([*resume, "--data-root", str(fewer)]))
    names = fewer / "CUB_200_2011" / "classes.txt"
    names.write_text(names.read_text().replace("Class 3", "Gull"))
    with one_line(ValueError, "classes .*, now .*Gull"):
        train.train(train.parse([*resume, "--data-root", str(fewer)]))
    metrics = train.train(train.parse([*resume, "--data-root", str(birds)]))
    assert_same_run(uncut, run)
    next_command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert evaluate.parse(next_command[2:]).ckpt == str(run / "last.pt")  # quoted
    assert metrics == json.loads((uncut / "metrics.json").read_text())
    assert json.loads((uncut / "config.json").read_text())["epochs"] == 2
    assert {"epoch", "classification", "loss", "train_accuracy", "lr"} <= set(log_of(uncut)[0])


DISTINCT_RATES = {  # the first pattern that fits decides
    "backbone.*": ("--lr-backbone", 7e-4), "concepts.*.bias": ("--lr-bias", 5e-5),
    "concepts.*": ("--lr-prototypes", 3e-4), "fusions.*.head.*": ("--lr-fusion", 2e-3),
    "*": ("--lr", 1e-2)}


def pattern_of(name):
    return next(p for p in DISTINCT_RATES if fnmatch.fnmatch(name, p))


def oracle_run(args, root):
    """Clipping, Adam and halved rates written out; views, batches, start and losses are the code's,
    which other tests specify. -> state dicts before and after, and the mean loss of each epoch."""
    views = [data.Images(root / "CUB_200_2011", "train", view, 56, args.seed)
             for view in ("train", "test")]
    torch.manual_seed(args.seed)
    backbone = ivpt.load_backbone("toy", 56)
    torch.manual_seed(args.seed)
    model = ivpt.build(asdict(args), 6, backbone).train()
    model.start(views[1], args)
    before = copy.deepcopy(model.state_dict())
    learners = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments, step, mean_losses = {name: (0.0, 0.0) for name in learners}, 0, []
    for epoch in range(args.epochs):
        views[0].epoch, epoch_losses = epoch, []
        halved = (args.batch_size / 16) ** 0.5 * 0.5 ** (epoch // 4)
        for batch in train.epoch_batches(48, args, epoch):
            images, labels, *_ = zip(*(views[0][i] for i in batch))
            losses, _ = model.losses(torch.stack(images), torch.tensor(labels), THETA)
            epoch_losses.append(losses["loss"].item())
            found = torch.autograd.grad(losses["loss"], learners.values(), allow_unused=True)
            norm = sum(g.square().sum() for g in found if g is not None).sqrt()
            assert norm > 2  # so clipping is seen
            step += 1
            for (name, p), g in zip(learners.items(), found):
                if g is not None:
                    g = g * min(1, 2 / norm)
                    m, v = moments[name]
                    m, v = moments[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g ** 2
                    m_hat, v_hat = m / (1 - 0.9 ** step), v / (1 - 0.999 ** step)
                    _, rate = DISTINCT_RATES[pattern_of(name)]
                    p.data -= rate * halved * m_hat / (v_hat.sqrt() + 1e-8)
        mean_losses.append(np.mean(epoch_losses))
    return before, model.state_dict(), mean_losses


def test_a_run_is_the_loop_written_out(birds, tmp_path, monkeypatch):
    """Ten steps in five epochs, every rate another; the grouping's noise and the map are fixed."""
    noise_seeds, affine_seeds = [], []

    def without_noise(logits, tau):
        noise_seeds.append(torch.initial_seed())  # in training alone
        return logits.softmax(-1)

    def fixed_affine():
        affine_seeds.append(torch.initial_seed())
        return THETA

    monkeypatch.setattr(F, "gumbel_softmax", without_noise)
    monkeypatch.setattr(data, "sample_affine", fixed_affine)
    rates = itertools.chain(*DISTINCT_RATES.values())
    args = tiny_run(birds, tmp_path, "--epochs", 5, "--batch-size", 24, "--seed", 3, *rates)
    train.train(args)
    assert len(noise_seeds) == 10 * 2 * 2 and len(set(noise_seeds)) == 5  # two views, two fusions
    assert len(affine_seeds) == 10 and len(set(affine_seeds)) == 5  # a seed for every epoch
    before, expected, losses = oracle_run(args, birds)
    found = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    errors = {}  # a parameter alone may have no gradient but rounding errors
    for pattern in DISTINCT_RATES:
        names = [name for name in expected if pattern_of(name) == pattern]
        moved = sum((expected[name] - before[name]).square().sum() for name in names)
        wrong = sum((expected[name] - found[name]).square().sum() for name in names)
        errors[pattern] = (wrong / moved).sqrt().item()
    assert max(errors.values()) < 0.005, errors  # more if a rounding moved a patch
    log = log_of(tmp_path)
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-3)
    rate = 1e-2 * 1.5 ** 0.5
    assert [line["lr"] for line in log] == pytest.approx([rate] * 4 + [rate / 2])


def test_a_run_with_pretraining_learns_and_another_seed_is_another_model(tmp_path, capsys):
    """As README's first command. The frozen ViT is the one that pretraining made."""
    from prepare import toy_birds, toy_vit
    toy_birds.draw(tmp_path / "birds", num_train=4, num_test=1)
    words = [*TINY_RUN, "--data", str(tmp_path / "birds"), "--pretrain", "2", "--tune", "none",
             "--batch-size", "10"]
    args = train.parse([*words, "--seed", "43", "--epochs", "3", "--out", str(tmp_path / "run")])
    train.train(args)
    told = re.findall(r"pretraining the toy ViT, epoch . of 2: loss (.*)", capsys.readouterr().out)
    assert float(told[1]) < 0.95 * float(told[0])
    first, *_, last = log_of(tmp_path / "run")
    assert last["loss"] < first["loss"] - 0.2
    assert last["classification"] < math.log(10) - 0.05  # chance, for ten classes
    torch.manual_seed(43)
    backbone = ivpt.load_backbone("toy", 56)
    images = data.Images(tmp_path / "birds", "train", "train", 56, 43)
    toy_vit.pretrain(backbone, images, 2, torch.device("cpu"), amp=False, workers=0)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    for name, value in backbone.state_dict().items():
        assert torch.equal(state[f"backbone.{name}"], value), name
    args.pretrain, models = 0, []
    for args.seed in (42, 42, 43):
        models.append(train.new_model(args, images, torch.device("cpu")))
    for name, value in models[0].named_parameters():
        same = [torch.equal(value, model.get_parameter(name)) for model in models[1:]]
        assert same == [True, value.std() == 0], name  # else it is random


def test_workers_and_compile_reach_the_loop(birds, tmp_path, monkeypatch):
    compiled, loaders, evaluated, loader = [], [], [], train.DataLoader

    def fake_compile(function):
        def run(*inputs):
            compiled.append(function.__self__)
            return function(*inputs)
        return run

    def watched(*inputs, num_workers, **options):
        loaders.append(num_workers)
        return loader(*inputs, num_workers=0, **options)

    monkeypatch.setattr(torch, "compile", fake_compile)
    monkeypatch.setattr(train, "DataLoader", watched)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **options: evaluated.append(options) or {})
    monkeypatch.setattr(evaluate, "table", str)
    words = ["--epochs", 1, "--start", "noise", "--overwrite"]
    train.train(tiny_run(birds, tmp_path, *words, "--workers", 3, "--amp", "--seed", 5))
    assert loaders == [3] and not compiled
    del evaluated[0]["recipe"]
    assert evaluated == [dict(workers=3, amp=True, seed=5, split="test")]
    train.train(tiny_run(birds, tmp_path, *words, "--compile"))
    assert loaders == [3, 0] and len(compiled) == 3 and isinstance(compiled[0], ivpt.IVPT)


needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs locks, fork and SIGKILL")
CLAIMS = """import sys, time
from pathlib import Path
import data
lock = data.claim(Path(sys.argv[1]))
Path(sys.argv[1], "claimed").touch()
time.sleep(60)
"""


@needs_posix
def test_a_run_in_a_folder_in_which_another_process_trains_is_refused(birds, uncut, tmp_path):
    run = shutil.copytree(uncut, tmp_path / "run")
    other = Script(CLAIMS, run)
    while not (run / "claimed").exists():
        assert other.process.is_alive()
        time.sleep(0.01)
    for start in ("--resume", "--overwrite"):
        with one_line(ValueError, f"{run}: another process trains in this folder"):
            train.train(tiny_run(birds, run, start))
    other.process.kill()
    other.end(exit_code=-signal.SIGKILL)
    data.claim(run)
    assert (run / "last.pt").read_bytes() == (uncut / "last.pt").read_bytes()


def test_a_checkpoint_alone_is_a_run(birds, uncut, tmp_path):
    """What is missing beside it is made anew."""
    (tmp_path / "last.pt").write_bytes((uncut / "last.pt").read_bytes())
    train.train(train.parse(["--resume", "--out", str(tmp_path), "--epochs", "3"]))
    assert [line["epoch"] for line in log_of(tmp_path)] == [3]
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 3


KILLED = """import os, signal, sys
import torch
import data, train
train.ivpt.NUM_STARTS = 2
affine, replace, calls = data.sample_affine, os.replace, []
where = ""
def killed_in_a_step():
    calls.append(0)
    if len(calls) == 5 and where == "step":  # the second step of the second epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return affine()
def killed_while_saving(source, target):
    if calls and where == "save" and str(target).endswith("last.pt"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
data.sample_affine, os.replace = killed_in_a_step, killed_while_saving
for where, more in (("step", []), ("save", ["--resume"])):  # both in the second epoch
    if os.fork() == 0:
        train.train(train.parse(sys.argv[1:] + more))
    _, status = os.wait()
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    out = sys.argv[sys.argv.index("--out") + 1]
    assert torch.load(out + "/last.pt", weights_only=True)["epoch"] == 1
"""


@needs_posix
def test_a_kill_at_any_moment_costs_no_more_than_the_epoch(birds, uncut, tmp_path):
    Script(KILLED, *TINY_RUN, "--data-root", birds, "--out", tmp_path).end()
    train.train(tiny_run(birds, tmp_path, "--resume"))
    assert_same_run(uncut, tmp_path)


def test_overwrite_forgets_the_old_run_at_once(birds, uncut, tmp_path, monkeypatch):
    run = shutil.copytree(uncut, tmp_path / "run")
    monkeypatch.setattr(data, "sample_affine", functools.partial(fail, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny_run(birds, run, "--overwrite"))
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "lock", "log.jsonl"]
    assert log_of(run) == []
    assert train.open_run_folder(tiny_run(birds, run)) == run  # without a checkpoint it is no run


def test_a_bad_step_is_skipped_and_three_stop_the_run(birds, tmp_path, monkeypatch, capsys):
    entropy, calls, bad_calls = train.entropy, [], {2, 8, 14}  # every other step

    def sometimes_bad(A):  # three maps a step
        calls.append(0)
        return entropy(A) * (math.nan if len(calls) in bad_calls else 1)

    monkeypatch.setattr(train, "entropy", sometimes_bad)
    train.train(tiny_run(birds, tmp_path))
    assert all(math.isfinite(value) for line in log_of(tmp_path) for value in line.values())
    before = (tmp_path / "last.pt").read_bytes()
    assert capsys.readouterr().err.count("no step taken") == 3
    bad_calls.update(range(19, 100))
    with one_line(ValueError, "three non-finite gradients", "--no-amp"):
        train.train(train.parse(["--resume", "--out", str(tmp_path), "--epochs", "3"]))
    assert (tmp_path / "last.pt").read_bytes() == before
    assert capsys.readouterr().err.count("no step taken") == 3


@pytest.mark.parametrize("amp", ["--amp", "--no-amp"])
def test_gradients_are_clipped_and_val_is_every_fourth_image(birds, tmp_path, monkeypatch, amp):
    clip, attend, norms, autocast = nn.utils.clip_grad_norm_, ivpt.Attention.forward, [], []

    def watched_clip(parameters, norm):
        norms.append(norm)
        return clip(parameters, norm)

    def watched_attention(self, *inputs):
        autocast.append(torch.is_autocast_enabled("cpu"))
        return attend(self, *inputs)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched_clip)
    monkeypatch.setattr(ivpt.Attention, "forward", watched_attention)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # nor for evaluate.py
    words = ["--epochs", 1, "--batch-size", 36, "--validate", "--start", "noise", amp]
    protocol = train.train(tiny_run(birds, tmp_path, *words))["protocol"]
    assert norms == [2.0] and set(autocast) == {amp == "--amp"}
    assert protocol["split"] == "val" and protocol["images"] == 12
    assert torch.load(tmp_path / "last.pt", weights_only=True)["images"] == 36
    written = (tmp_path / "metrics_val.json").rename(tmp_path / "then.json").read_bytes()
    evaluate.main(["--ckpt", str(tmp_path / "last.pt")])  # not on the test images, unasked
    assert (tmp_path / "metrics_val.json").read_bytes() == written
    assert not (tmp_path / "metrics.json").exists()


# ---------------------------------------------------------------- as a user sees it

ALONE = """import sys
for name in ("resource", "fcntl", "triton"):  # as on Windows and macOS
    sys.modules[name] = None
import train, evaluate
for words in (["--data", "cub", "--data-root", sys.argv[1], "--out", "cub"],
              ["--data", sys.argv[2], "--batch-size", "2", "--out", "classes"]):
    words += ["--weights", "vit.pth", "--image-size", "56", "--epochs", "1", "--workers", "0"]
    metrics = train.train(train.parse(words))
    evaluate.main(["--ckpt", words[-9] + "/last.pt"])
print({"methods", "prepare", "explore"} & set(sys.modules), flush=True)
import data
sys.argv = ["train.py", "--method", "parts"]
data.run_script(train.main)
"""


def test_the_files_run_without_the_folders(birds, tmp_path):
    """Copied into an empty folder they train and evaluate on CUB and on a folder of classes.
    Neither Triton nor what only POSIX has is needed."""
    for name in ("model", "kernels", "data", "train", "evaluate", "test_ivpt"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    torch.save(tiny_backbone().state_dict(), tmp_path / "vit.pth")
    write_classes(tmp_path / "folder")
    stdout, stderr = Script(ALONE, birds, tmp_path / "folder", cwd=tmp_path).end(exit_code=2)
    assert stdout.count("accuracy ") == 4 and stdout.endswith("\nset()\n")
    for run, consistency in (("cub", float), ("classes", type(None))):
        metrics = json.loads((tmp_path / run / "metrics.json").read_text())
        assert isinstance(metrics["headline"]["consistency"], consistency)
    assert re.fullmatch("error: .*take the whole repository\n", stderr)


FIXED = """import torch, data, train
torch.nn.functional.gumbel_softmax = lambda logits, **_: logits.softmax(-1)
data.sample_affine = lambda: torch.tensor([[0.0, 1, 0], [-1, 0, 0]])
train.presence = lambda A: 0 * A.sum()
torch.nn.utils.clip_grad_norm_ = lambda parameters, norm: torch.ones(())
train.ivpt.NUM_STARTS = 2
"""
TRAIN_AND_EVALUATE = FIXED + """import os, sys
args = train.parse()
rank = int(os.environ["RANK"])
start = train.ivpt.IVPT.start
def start_apart(model, *inputs):
    start(model, *inputs)
    model.classifier.weight.data *= 1 + rank  # all must go on as the first
train.ivpt.IVPT.start = start_apart
train.train(args)
open(args.out + f"/seed{rank}", "w").write(str(torch.initial_seed()))
if rank == 0:
    os.rename(args.out + "/metrics.json", args.out + "/first")
data.start_processes = lambda device: (rank, 2)  # they are joined already
train.evaluate.main(["--ckpt", args.out + "/last.pt"])
"""


def test_two_processes_train_and_evaluate_like_one(birds, tmp_path, monkeypatch):
    """As under torchrun, over gloo. Presence and clipping are left out, affine map and grouping are
    fixed: then the gradient, scale included, equals one process's; and so do the metrics."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    root = shutil.copytree(birds, tmp_path / "birds")
    split = root / "CUB_200_2011" / "train_test_split.txt"
    split.write_text(split.read_text().replace(" 0\n", " 1\n", 1))  # 11 test images: 5 and 6
    words = [*TINY_RUN, "--data-root", root, "--epochs", 1, "--batch-size", 48, "--out"]
    torchrun(TRAIN_AND_EVALUATE, *words, run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module, name in ((F, "gumbel_softmax"), (data, "sample_affine"), (train, "presence"),
                         (nn.utils, "clip_grad_norm_")):
        monkeypatch.setattr(module, name, getattr(module, name))  # puts them back at the end
    exec(FIXED, {})
    train.train(train.parse([str(word) for word in (*words, alone)]))
    states = [torch.load(out / "last.pt", weights_only=True)["optimizer"]["state"]
              for out in (alone, run)]
    assert states[1].keys() == states[0].keys() and states[1]
    for i, state in states[1].items():  # after a single step Adam's first moment is the gradient
        expected = states[0][i]["exp_avg"]
        torch.testing.assert_close(state["exp_avg"], expected, rtol=1e-3,
                                   atol=1e-3 * expected.abs().max().item() + 1e-9)
    assert (run / "seed0").read_text() != (run / "seed1").read_text()  # noise differs
    after_training, together = ((run / name).read_bytes() for name in ("first", "metrics.json"))
    assert json.loads(together)["protocol"]["images"] == 11
    evaluate.main(["--ckpt", str(run / "last.pt")])
    assert (run / "metrics.json").read_bytes() == together == after_training


# ---------------------------------------------------------------- as it is documented and typed

def documented_commands():
    """Those of README.md and of the files' docstrings, as lists of words."""
    commands = {}
    for file in [ROOT / "README.md", *ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        text = file.read_text()
        if file.suffix == ".py":
            text = ast.get_docstring(ast.parse(text)) or ""
        for line in re.findall("^    ((?:python|torchrun) .*)", text, re.MULTILINE):
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                commands[shlex.join(words)] = words
    return commands.values()


SMALLER = ["--overwrite", "--image-size", "56", "--epochs", "1",
           "--workers", "0", "--device", "cpu", "--no-amp"]


@pytest.fixture(scope="module")
def documented(birds, uncut, tmp_path_factory):
    """A folder in which the words of the documented commands are files: FOLDER, bird.jpg, ..."""
    from prepare import test_prepare, toy_birds
    folder = tmp_path_factory.mktemp("documented")
    shutil.copytree(birds, folder / "DIR")
    toy_birds.draw(folder / "DIR" / toy_birds.FOLDER, num_train=2, num_test=1)
    shutil.copytree(folder / "DIR", folder / ".cache" / "ivpt")
    for run in ("cub", "toy"):
        shutil.copytree(uncut, folder / "runs" / run)
    write_classes(folder / "FOLDER")
    write_classes(folder / "TARGET")
    Image.new("RGB", (70, 60)).save(folder / "bird.jpg")
    (folder / "folder_of_images").mkdir()
    shutil.copy(folder / "bird.jpg", folder / "folder_of_images")
    test_prepare.write_release(folder / "SOURCE")
    torch.save(tiny_backbone().state_dict(), folder / "FILE.pth")
    return folder


@pytest.mark.parametrize("words", documented_commands(), ids=" ".join)
def test_a_documented_command_works(words, documented, monkeypatch):
    """On small data. What needs a network, a GPU or torchrun gets its options checked only."""
    from explore import bench, count_prototypes
    from prepare import toy_birds
    monkeypatch.chdir(documented)
    monkeypatch.setenv("HOME", str(documented))
    monkeypatch.setattr(bench, "SHAPES", [(1, 9, 16, 3)])
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "WARM_UP", 0)
    monkeypatch.setattr(count_prototypes, "MOST", 3)
    monkeypatch.setattr(toy_birds.draw, "__defaults__", (1, 1))
    program, file, *options = words
    alone = program == "python"
    if not alone:
        assert file == "--nproc_per_node=4"
        file, *options = options
    if file == "train.py":
        args = train.parse(options)
        if args.resume:
            options = [*options, "--epochs", "3"]
        else:
            train.check_model(args)
            options += SMALLER + (["--pretrain", "0"] if args.weights == "toy" else [])
        assert data.find(args.data, args.data_root).is_dir()
        alone = alone and (args.weights == "toy" or args.weights not in ivpt.ARCHITECTURES)
        alone = alone and args.method in ("ivpt", "parts")  # methods/ has tests of all
    elif file == "evaluate.py":
        evaluate.parse(options)
    elif file in ("-c", "-m"):  # the network, this very program
        assert options[0].startswith(("import model; print(model.load_backbone(", "pytest"))
        return
    elif "TARGET" in options:
        if file == "prepare/pascal_part.py":
            pytest.importorskip("scipy")
        shutil.rmtree("TARGET")
    if alone:
        monkeypatch.setattr(sys, "argv", [file, *options])
        importlib.import_module(file.removesuffix(".py").replace("/", ".")).main()


def test_the_index_above_finds_all_tests():
    table = __doc__.split("its oracle          -k\n")[1].splitlines()
    found = {"test_the_index_above_finds_all_tests"}
    tests = [name for name in globals() if name.startswith("test_")]
    for row in table:
        oracle, words = row[52:72].strip(), row[72:].split(", ")
        assert not oracle.startswith("oracle") or oracle in globals(), row
        for word in words:
            named = {name for name in tests if word in name}
            assert named, word
            found |= named
    assert found == {*tests}


def test_a_reader_that_leaves_loses_nothing(birds, tmp_path, monkeypatch):
    """As in `| head`: every script goes on, and leaves nothing that cannot be flushed."""
    image = birds / "CUB_200_2011/images/000.Class 0/image 0.png"
    for main, written, *options in (
            (lambda _: train.train(tiny_run(birds, tmp_path, "--epochs", 1)), ["metrics.json"]),
            (evaluate.main, ["explained/1_image 0.png"], "--image", str(image)),
            (evaluate.main, ["metrics.json", "pictures/index.html"],
             "--visualize", str(tmp_path / "pictures"))):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w", buffering=1) as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            main(["--ckpt", str(tmp_path / "last.pt"), *options])
        for name in written:
            (tmp_path / name).unlink()  # it is there, and new


def test_a_resumed_run_takes_its_own_options(birds, uncut, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(uncut, "runs/cub")
    then = asdict(tiny_run(birds, "runs/cub")) | dict(resume=True)
    typed = ["--epochs", "9", "--workers", "3", "--prototypes", "6", "5", "4"]
    for words, changed in ((["--out", "runs/cub"], {}), (["--data", "cub", "--seed", "42"], {}),
                           (["--data", "cub", *typed], dict(epochs=9, workers=3))):
        args = asdict(train.parse(["--resume", *words]))
        assert args | dict(sources=0) == then | dict(sources=0) | changed
    assert args["sources"]["epochs"] == "typed" and args["sources"]["lr"] == "default"
    for option, value in (("--lr", "0.1"), ("--fusion-mlp", None), ("--method", "huang"),
                          ("--weights", "vits14")):
        typed = [option] if value is None else [option, value]
        name, now = option[2:].replace("-", "_"), value or "False"
        if value is None:
            typed, now = ["--no-fusion-mlp"], "False"
        with one_line(ValueError, f"trained with {name}", f"now {now}", "give the same"):
            train.parse(["--resume", "--out", "runs/cub", *typed])
    with one_line(ValueError, "--epochs 1", "has finished 2"):
        train.parse(["--resume", "--out", "runs/cub", "--epochs", "1"])


def test_no_default_contradicts_what_was_typed(tmp_path):
    torch.save(tiny_backbone().state_dict(), tmp_path / "vit.pth")
    for name, weights, size in (("cub", tmp_path / "vit.pth", 70), ("cub", "toy", 112),
                                ("toy", tmp_path / "vit.pth", 70), ("cub", "vits14", 518)):
        args = train.parse(["--data", name, "--weights", str(weights)])
        train.check_model(args)
        assert args.image_size == size and args.pretrain == (12 if weights == "toy" else 0)


@pytest.mark.parametrize("options, says", [
    (["--data", "FOLDER"], "--batch-size 16: FOLDER has 4 training images"),
    (["--data", "cub", "--image-size", "100"], "divisible by the patch"),
    (["--data", "cub", "--image-size", "28"], "at least 3 a side"),
    (["--data", "cub", "--prototypes", "4", "1"], "prototypes"),
    (["--data", "cub", "--weights", "nowhere.pth"], "nowhere.pth: no such file, .*vitb14_reg4"),
    (["--data", "toy", "--method", "protopnet", "--image-size", "100"], "divisible")])
def test_what_cannot_work_is_said_before_a_download(options, says, tmp_path, monkeypatch):
    def network(*_, **__):
        raise AssertionError("a download")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ivpt, "download_weights", network)
    monkeypatch.setattr(data, "download_and_extract_archive", network)
    write_classes(tmp_path / "FOLDER")
    with one_line((ValueError, OSError), says):
        train.train(train.parse(options))


def test_a_tilde_is_the_home_folder_after_an_equals_sign_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    args = train.parse(["--data=~/d", "--data-root=~/r", "--out=~/o", "--weights=~/w"])
    assert (args.data, args.data_root, args.out, args.weights) == ("/h/d", "/h/r", "/h/o", "/h/w")
    args = evaluate.parse(["--ckpt=~/last.pt", "--visualize=~/p", "--image", "~/a", "b~"])
    assert [args.ckpt, args.visualize, *args.image] == ["/h/last.pt", "/h/p", "/h/a", "b~"]
