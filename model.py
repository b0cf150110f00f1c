"""IVPT: interpretable visual prompt tuning of a DINOv2 vision transformer (arXiv 2503.06084).

    python -c "import model; print(model.load_backbone('vits14', 518))"   # downloads Meta's weights
    python train.py                                     # trains the model below on drawn birds

Read it top to bottom, as an image meets it. The frozen ViT turns patches into tokens. The concept
layer decides which patch belongs to which concept. The fusion merges fine concepts into coarse
prompts. IVPT puts both before each of the last four blocks, and a concept layer at the output.
Letters in shapes, the same in every file:

    B images   T tokens   N = h*w patches   D width   K prototypes of a layer, background last
    G coarse concepts = K of the last layer - 1   C classes   M parts   S image side in pixels
"""
import argparse
import hashlib
import math
import os
import pickle
import re
import struct
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from kernels import prototype_attention

# pos_grid: side of the position embedding's grid; swiglu: hidden width (0: an MLP of 4x width).
ARCHITECTURES = {
    "vits14": dict(width=384, depth=12, patch_size=14, pos_grid=37),
    "vitb14": dict(width=768, depth=12, patch_size=14, pos_grid=37),
    "vitl14": dict(width=1024, depth=24, patch_size=14, pos_grid=37),
    "vitg14": dict(width=1536, depth=40, patch_size=14, pos_grid=37, swiglu=4096),
}
for name, vit in list(ARCHITECTURES.items()):
    ARCHITECTURES[f"{name}_reg4"] = dict(vit, registers=4)
ARCHITECTURES["toy"] = dict(width=128, depth=6, patch_size=8, pos_grid=14)  # train.py pretrains it

PROTOTYPES = (17, 14, 11, 8, 5)  # of each concept layer, as in the paper
AUTO = ("auto",)  # in their place, until count_prototypes has seen the data
SMOOTHING = 1e-6  # a <- (a + 1e-6) / sum_k (a + 1e-6), so that logarithms stay finite


def to_float32(x):
    """At least fp32, for what is summed, compared or put into an exponent. fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------- the vision transformer
# Attribute names are those of Meta's state dicts, so that load_state_dict(strict=True) holds.

class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.heads = width // 64
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def heads_of(self, x):
        """x (B, T, D) -> q, k, v, each (B, heads, T, 64)."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, 64)
        return qkv.permute(2, 0, 3, 1, 4)

    def forward(self, x, prompts=None):
        """x (B, T, D) attends to itself and to the prompts (B, G, D)."""
        q, k, v = self.heads_of(x)
        if prompts is not None:  # nobody reads what becomes of them, so they need no queries
            _, prompt_k, prompt_v = self.heads_of(prompts)
            k = torch.cat([k, prompt_k], dim=2)  # (B, heads, T + G, 64)
            v = torch.cat([v, prompt_v], dim=2)
        return self.attend(q, k, v)

    def attend(self, q, k, v):
        """Queries (B, heads, T, 64) read the values of J tokens by their keys -> (B, T, D)."""
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # there the fused call is slower
            y = (q * 0.125 @ k.transpose(2, 3)).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """The feed-forward of vitg14: a gate and a value (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Prompts (B, G, D) are tokens of this block alone: the others attend to them, no more."""

    def __init__(self, width, swiglu=0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, swiglu) if swiglu else Mlp(width)
        self.ls2 = LayerScale(width)

    def forward(self, x, prompts=None):
        if prompts is not None:
            prompts = self.norm1(prompts)
        x = x + self.ls1(self.attn(self.norm1(x), prompts))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, width, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, N, D), row-major patches


def patch_grid(image_size, patch_size):
    """A side or (height, width) in pixels -> patches (h, w). ValueError if they do not fit."""
    H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
    if H % patch_size or W % patch_size or min(H, W) < patch_size:
        raise ValueError(f"image size {H} x {W}: expected sides divisible by the patch of "
                         f"{patch_size} pixels; change --image-size")
    return H // patch_size, W // patch_size


class VisionTransformer(nn.Module):
    """DINOv2's ViT (Oquab et al., arXiv 2304.07193; registers: Darcet et al., arXiv 2309.16588).

    image_size: side in pixels or (height, width), for which IVPT sizes its spatial biases. The ViT
    itself takes any image whose sides the patch divides. Raises ValueError for other sizes.
    """

    def __init__(self, width, depth, patch_size, pos_grid, registers=0, swiglu=0, image_size=None):
        super().__init__()
        self.width, self.patch_size = width, patch_size
        self.pos_grid, self.registers = pos_grid, registers
        self.prefix = 1 + registers  # tokens before the patches
        self.image_size = image_size or pos_grid * patch_size
        self.grid = patch_grid(self.image_size, patch_size)  # (h, w)
        self.has_file = False  # load_backbone sets it; checkpoints hold a backbone without a file

        self.patch_embed = PatchEmbed(width, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + pos_grid ** 2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # unused, but Meta's files hold it
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.blocks = nn.ModuleList(Block(width, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and name != "mask_token":
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def positions(self, h, w):
        """Position embedding of cls and an h x w grid, (1, 1 + h*w, D). First axis: height."""
        side = self.pos_grid
        if (h, w) == (side, side):
            return self.pos_embed
        cls, grid = self.pos_embed.split([1, side ** 2], dim=1)
        grid = grid.float().view(1, side, side, self.width).permute(0, 3, 1, 2)
        if self.registers:
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        else:  # Meta's models without registers add 0.1, which shifts the sampling points
            scale = (h + 0.1) / side, (w + 0.1) / side
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        patches = grid.flatten(2).transpose(1, 2).to(cls)
        return torch.cat([cls, patches], dim=1)

    def embed(self, images):
        """images (B, 3, H, W) -> tokens (B, prefix + N, D): cls, registers, patches."""
        B = len(images)
        h, w = patch_grid(images.shape[2:], self.patch_size)
        cls = self.cls_token.expand(B, -1, -1)
        tokens = torch.cat([cls, self.patch_embed(images)], dim=1)
        tokens = tokens + self.positions(h, w)
        if self.registers:  # they have no position
            registers = self.register_tokens.expand(B, -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        return tokens

    def forward(self, images):
        """images (B, 3, H, W) -> normalised tokens (B, prefix + N, D)."""
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


# ---------------------------------------------------------------- weights
URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{folder}/dinov2_{name}_pretrain.pth"
# What torch.load raises for a file that is cut short, altered or of another kind.
DAMAGE = (pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError, ValueError,
          LookupError, AssertionError)
# Regular expressions for parts of the names in other files, and what Meta calls them.
META_NAMES = {
    "reg_token$": "register_tokens",  # timm
    "patch_embeddings.projection": "patch_embed.proj",  # from here on Hugging Face
    "position_embeddings": "pos_embed",
    "embeddings[.]": "",
    "encoder.layer.": "blocks.",
    "attention.attention.": "attn.",
    "attention.output.dense": "attn.proj",
    "layer_scale(.).lambda1": r"ls\1.gamma",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "layernorm": "norm",  # up to here
    r"blocks\.\d+\.(?=\d)": "blocks.",  # Meta's training: blocks in chunks
    r"^((module|model|backbone|teacher|dinov2|dinov2_with_registers)\.)+": "",  # wrappers
}
# A ViT without heads. storage_tokens are DINOv3's.
META_PARTS = {"cls_token", "mask_token", "register_tokens", "storage_tokens", "pos_embed",
              "patch_embed", "blocks", "norm"}
ABSENT = torch.empty(0, 0)  # stands for a weight that a file lacks


def load_backbone(name_or_path, image_size=None):
    """A VisionTransformer with its weights, in fp32 and eval mode. "toy" is new, to be trained.

    name_or_path: a name of ARCHITECTURES or torch.hub ("dinov2_vits14_reg"), downloaded once into
        torch.hub's cache, or a file: a state dict or training checkpoint of DINOv2, DINO v1, timm
        or Hugging Face's Dinov2, whose architecture is read off its shapes (heads: D / 64).
    image_size: see VisionTransformer; default: that of the position embedding, 518 for DINOv2.
    Raises ValueError or OSError, one line, where there is no such file or it does not fit.
    """
    name = backbone_name(name_or_path)
    path = Path(name_or_path).expanduser()
    if name == "toy":
        return VisionTransformer(**ARCHITECTURES["toy"], image_size=image_size)
    if name in ARCHITECTURES:
        patch_grid(image_size or 518, 14)  # a wrong size is said before 350 MB are fetched
        state = download_weights(name)
    elif path.is_file():
        state = read_file(path, "weights")
    else:
        names = ", ".join(ARCHITECTURES)
        raise FileNotFoundError(f"--weights {path}: no such file, and not one of {names}")
    state = meta_names(state, path)
    with torch.device("meta"):  # without memory of its own: it takes over the file's tensors
        backbone = VisionTransformer(**read_architecture(state), image_size=image_size)
    load_state(backbone, state, f"weights {path}", assign=True)
    backbone.has_file = True
    return backbone.float().eval()


def backbone_name(name):
    """A key of ARCHITECTURES for torch.hub's names, too: "dinov2_vits14_reg" has four registers."""
    return re.sub("_reg$", "_reg4", str(name).removeprefix("dinov2_"))


def download_weights(name):
    """Meta's state dict of a named backbone (Apache-2.0), from torch.hub's cache or the network."""
    url = URL.format(folder=name.removesuffix("_reg4"), name=name)
    file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    try:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file))
        return read_file(file, "weights")
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, ValueError):  # half a file, or a login page: the next try fetches it
            file.unlink(missing_ok=True)
        raise OSError(f"weights {name}: could not fetch {url} ({error}); try again, "
                      f"put it at {file}, or name a local file by --weights") from None


def read_file(path, what):
    """Tensors and plain values, never code. Raises ValueError, OSError or MemoryError, one line."""
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        return read_safetensors(path, what)
    # Training checkpoints hold their options, often as a Namespace.
    with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except DAMAGE as error:
            if "allocate" in str(error):  # torch says so by a RuntimeError
                raise MemoryError(f"{what} {path}: too little memory to read it") from None
            raise ValueError(f"{what} {path}: damaged, or not a torch file of tensors "
                             f"({type(error).__name__}); fetch or write it again") from None


def read_safetensors(path, what):
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ValueError(f"{what} {path}: the package safetensors is missing; "
                         "pip install safetensors, or take a .pth file") from None
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{what} {path}: damaged ({error}); fetch it again") from None


def meta_names(content, path):
    """What a file of weights holds -> the state dict of its ViT in Meta's names, without heads."""
    if not isinstance(content, dict):
        content = {}
    for part in ("model", "state_dict", "teacher", "student"):  # of a training checkpoint
        if isinstance(content.get(part), dict):
            content = content[part]
    state = {}
    for key, x in content.items():
        name = str(key)
        for pattern, meta_name in META_NAMES.items():
            name = re.sub(pattern, meta_name, name)
        if name.split(".")[0] in META_PARTS:
            state[name] = x
    needed = {"cls_token", "pos_embed", "patch_embed.proj.weight"}
    if not needed <= state.keys() or "storage_tokens" in state:
        raise ValueError(f"weights {path}: not a ViT's state dict with learned positions; "
                         "take one of DINOv2's (DINOv3 is not supported)")

    for query in [name for name in state if ".attn.query." in name]:
        qkv = [query.replace("query", part) for part in ("query", "key", "value")]
        qkv = [state.pop(name) for name in qkv if name in state]
        state[query.replace("query", "qkv")] = torch.cat(qkv)
    fc1 = state.get("blocks.0.mlp.fc1.weight", ABSENT)
    fc2 = state.get("blocks.0.mlp.fc2.weight", ABSENT)
    if len(fc1) == 2 * fc2.shape[1]:  # timm's name of a SwiGLU
        state = {name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): x
                 for name, x in state.items()}
    _, num_positions, width = state["pos_embed"].shape
    if math.isqrt(num_positions) ** 2 == num_positions:  # timm adds that of cls to cls_token
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    state.setdefault("mask_token", torch.zeros(1, width))
    if "blocks.0.ls1.gamma" not in state:  # DINO v1 and supervised ViTs: nothing is scaled
        for name in [name for name in state if re.search(r"norm[12]\.weight", name)]:
            state[name.replace("norm", "ls").replace("weight", "gamma")] = torch.ones(width)
    return state


def read_architecture(state):
    """The arguments of VisionTransformer, read off the shapes of a state dict in Meta's names."""
    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    return dict(
        width=width,
        depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        patch_size=patch_size,
        pos_grid=math.isqrt(state["pos_embed"].shape[1]),  # cls makes one more than its square
        registers=state.get("register_tokens", ABSENT).shape[1],
        swiglu=state.get("blocks.0.mlp.w3.weight", ABSENT).shape[1])


def load_state(module, state, what, assign=False):
    """load_state_dict, strict; its error becomes one line, which names the keys that do not fit."""
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{what}: {line[:300]}; take the file that fits") from None


# ---------------------------------------------------------------- the concept layer and the fusion

class ConceptLayer(nn.Module):
    """K class-agnostic prototypes q_k claim N patches e. The maths and its gradients: kernels.py.

    Concept region discovery: a_k = softmax over k of -|e - q_k|^2, with a bias b_k for each patch.
    Intra-region aggregation: p_k = sum(a_k e) / sum(a_k) over the patches where a_k is largest.

    distance: "euclidean" (paper), or "relative" (ours): prototypes meet patches relative to the
        object in their image, see prepare, and |e - q_k|^2 is divided by 2 sqrt(D), so shares are
        softer. What is averaged are the patches themselves, by sg(a_k).
    The other arguments are those of IVPT.
    """

    def __init__(self, K, width, grid, bias_after_softmax=True, distance="euclidean",
                 spatial_bias=True, regions=True):
        super().__init__()
        self.grid, self.distance = grid, distance
        self.bias_after_softmax, self.regions = bias_after_softmax, regions
        self.prototypes = nn.Parameter(0.05 * torch.randn(K, width))
        self.bias = nn.Parameter(torch.zeros(K, math.prod(grid)), requires_grad=spatial_bias)
        if distance == "relative":  # mean directions of objects and of all else: sample_regions
            self.register_buffer("means", torch.zeros(2, width))

    def directions(self, patches):
        """Patches (B, N, D), each averaged with its neighbours and brought to length sqrt(D)."""
        maps = to_float32(patches).transpose(1, 2).unflatten(2, self.grid)  # (B, D, h, w)
        maps = F.pad(maps, (1, 1, 1, 1), mode="replicate")
        maps = F.avg_pool2d(maps, 3, stride=1)
        return to_length(maps.flatten(2).transpose(1, 2))

    def prepare(self, patches):
        """Patches (B, N, D) as the prototypes meet them.

        relative: directions less their mean over the object, so species and light go, parts stay.
        An image's object is the set of patches nearer the mean of objects than that of all else.
        """
        if self.distance == "euclidean":
            return patches
        e = self.directions(patches.detach())
        is_object = torch.cdist(e, self.means).argmin(2) == 0  # (B, N)
        object_mean, _ = weighted_mean(is_object[:, None].to(e), e)  # (B, 1, D)
        return to_length(e - object_mean)

    def forward(self, patches, smoothing=0.0, detach_maps=False):
        """patches (B, N, D) -> attention a (B, K, N), pooled p (B, K, D), mass (B, K), p's divisor.

        smoothing comes before pooling; detach_maps lets patches learn from pooled, not from maps.
        """
        e, prototypes = self.prepare(patches), self.prototypes
        if self.distance == "relative":
            factor = (4 * patches.shape[-1]) ** -0.25  # on both sides, so it divides |e - q|^2
            e, prototypes = e * factor, prototypes * factor
        attention, pooled, mass = prototype_attention(
            e, prototypes, self.bias, self.bias_after_softmax,
            smoothing=smoothing, detach_maps=detach_maps)
        if self.distance == "euclidean" and self.regions:
            return attention, pooled, mass
        weights = attention  # every patch counts by its share of the concept
        if self.distance == "relative":
            weights = weights.detach()
        if self.regions:
            weights = weights * (attention == attention.amax(1, keepdim=True))
        return attention, *weighted_mean(weights, patches)


def weighted_mean(weights, patches):
    """weights (B, K, N), patches (B, N, D) -> means (B, K, D), sums of the weights (B, K)."""
    mass = weights.sum(2)
    weights = weights / mass[..., None].clamp_min(1e-30)
    return weights.to(patches.dtype) @ patches, mass


def to_length(x):
    """Vectors (..., D) at the length sqrt(D)."""
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5


class Fusion(nn.Module):
    """Fine-to-coarse fusion: K - 1 region features, grouped into G concepts, become G prompts.

    grouped=False, for the ablation: every fine concept prompts by itself, so G is K - 1.
    """

    def __init__(self, width, G, mlp, grouped=True):
        super().__init__()
        self.grouping = nn.Linear(width, G) if grouped else None
        self.norm = nn.LayerNorm((G, width))
        self.head = nn.Linear(width, width)  # one Linear as released; the text has an MLP
        if mlp:
            self.head = nn.Sequential(self.head, nn.GELU(), nn.Linear(width, width))

    def forward(self, pooled, mass):
        """pooled (B, K-1, D), mass (B, K-1) -> prompts (B, G, D), S (B, K-1, G), rows of sum 1."""
        if self.grouping is None:
            return self.head(self.norm(pooled)), None
        logits = to_float32(self.grouping(pooled))
        if self.training:
            S = F.gumbel_softmax(logits, tau=1.0)
        else:  # the released program samples here, too; we keep evaluation deterministic
            S = logits.softmax(-1)
        empty = mass[..., None] == 0  # such a region belongs to all groups alike
        S = torch.where(empty, 1 / S.shape[2], S)
        weights = S.detach().transpose(1, 2)  # sg: grouping learns from the fused maps alone
        with torch.autocast(pooled.device.type, enabled=False):
            sums = weights @ to_float32(pooled)  # (B, G, D)
            coarse = sums / weights.sum(-1, keepdim=True).clamp_min(1e-30)  # 0 / 0 would be nan
        return self.head(self.norm(coarse)), S


def fuse_maps(a, S):
    """Raw shares a (B, K, N), grouping S (B, K-1, G) -> fused map (B, G+1, N) of sum 1.

    Like the authors' program, we fuse before we smooth. The background stays as it is.
    """
    with torch.autocast(a.device.type, enabled=False):  # shares must not be rounded to bf16
        concepts = S.transpose(1, 2) @ a[:, :-1]
        fused = torch.cat([concepts, a[:, -1:]], dim=1)
        return fused / fused.sum(1, keepdim=True).clamp_min(1e-30)  # the bias may leave no share


class ConceptClassifier(nn.Module):
    """Class scores of concepts z (B, G, D) -> (B, G, C), each by weights of its own (ours)."""

    def __init__(self, G, width, num_classes):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(G, width, num_classes))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, z):
        return torch.einsum("bgd,gdc->bgc", z, self.weight)


# ---------------------------------------------------------------- IVPT

class Output(NamedTuple):  # as IVPT fills it; the docstring of a baseline says what differs
    logits: torch.Tensor          # (B, C), the mean of the concepts' class scores
    concept_logits: torch.Tensor  # (B, G, C), class scores of every concept that votes
    attention: list               # per concept layer (B, K_l, h, w), smoothed, sums to 1 over K_l
    groups: list                  # per prompted layer (B, K_l - 1, G)
    fused: list                   # per prompted layer (B, G + 1, h, w), background last
    features: torch.Tensor        # (B, G + 1, D), normalised region features of the last layer


def tune_backbone(backbone, tune):
    """What of a backbone is trained: "none" (paper), its "tokens" (released) or "all"."""
    tokens = ("cls_token", "register_tokens", "pos_embed")
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad = tune == "all" or (tune == "tokens" and name in tokens)
    backbone.mask_token.requires_grad = False


class IVPT(nn.Module):
    """Interpretable visual prompt tuning of a VisionTransformer, which is used, not copied.

    prototypes: how many each concept layer has, the background counted. The last layer reads the
        output. Each of the others prompts one block: these are the backbone's last blocks.
    bias_after_softmax: a = max(softmax + bias, 0) as in the text; False: softmax(logit + bias).
    fusion_mlp: fusion head with an MLP (paper) or one Linear (released).
    tune: see tune_backbone; distance: see ConceptLayer.
    votes: which concepts score the classes. "coarse" (paper): those of the last layer, by shared
        weights. "all" (ours): those of all layers, each by weights of its own.
    spatial_bias, regions, cross_layer, fusion: False takes that idea away, for the ablation.
        Without cross_layer the last concept layer stands alone and nothing is prompted.
    Raises ValueError where prototypes and backbone do not fit.

    Who learns from what; every stop-gradient (sg) in forward is meant:
        prototypes, biases of prompted layers   the six losses on maps; what they pool is sg
        grouping                                region consistency alone, through the fused maps
        fusion norm and head                    classification and orthogonality, through prompts
        prototypes, bias of the last layer      all but region consistency, whose target they are
    Ours: with distance "relative" no prototype learns from classes, as regions pool with sg shares;
    with votes "all" prompts learn from the votes of all layers behind them.
    """

    class_specific = False  # all classes share the prototypes

    def __init__(self, backbone, num_classes, prototypes=PROTOTYPES,
                 bias_after_softmax=True, fusion_mlp=True, tune="none", distance="euclidean",
                 votes="coarse", spatial_bias=True, regions=True, cross_layer=True, fusion=True):
        super().__init__()
        depth = len(backbone.blocks)
        if not 2 <= len(prototypes) <= depth + 1 or min(prototypes) < 2:
            raise ValueError(f"prototypes {prototypes}: expected 2 to {depth + 1} numbers, "
                             "each at least 2 (one concept and the background)")
        if min(backbone.grid) < 3:
            raise ValueError(f"image size {backbone.image_size}: {backbone.grid} patches, "
                             "expected at least 3 a side")
        if not cross_layer:
            prototypes = prototypes[-1:]
        self.backbone, self.grid = backbone, backbone.grid  # grid: (h, w)
        self.tune = tune
        self.prototypes = tuple(prototypes)  # how many; they themselves are in concepts
        tune_backbone(backbone, tune)

        D = backbone.width
        G = self.prototypes[-1] - 1
        self.concepts = nn.ModuleList(
            ConceptLayer(K, D, self.grid, bias_after_softmax, distance, spatial_bias, regions)
            for K in self.prototypes)
        self.fusions = nn.ModuleList(
            Fusion(D, G if fusion else K - 1, fusion_mlp, grouped=fusion)
            for K in self.prototypes[:-1])
        self.num_unprompted = depth - len(self.fusions)  # blocks before the first concept layer
        self.norm = nn.LayerNorm((G + 1, D))
        self.votes = nn.ModuleList()  # of the prompted layers
        if votes == "all":
            for K in self.prototypes[:-1]:
                norm = nn.LayerNorm((K - 1, D), elementwise_affine=False)
                self.votes.append(nn.Sequential(norm, ConceptClassifier(K - 1, D, num_classes)))
            self.classifier = ConceptClassifier(G, D, num_classes)
        else:
            self.classifier = nn.Linear(D, num_classes, bias=False)  # shared by the concepts
        for module in self.fusions.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)

    def unprompted(self, images):
        """images -> tokens (B, T, D) before the first concept layer; frozen, they need no graph."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.tune != "none"):
            tokens = self.backbone.embed(images)
            for block in self.backbone.blocks[:self.num_unprompted]:
                tokens = block(tokens)
        return tokens

    def normed_patches(self, tokens):
        """Tokens (B, T, D) -> patches (B, N, D) after the backbone's own final norm."""
        return self.backbone.norm(tokens[:, self.backbone.prefix:])

    def forward(self, images, backbone_graph=True):
        """images (B, 3, H, W) of the backbone's image_size -> Output.

        backbone_graph=False keeps no graph of the backbone, for the equivariance loss: its maps
        see patches through sg, so prototypes and biases still get their whole gradient.
        """
        graph = torch.is_grad_enabled() and backbone_graph
        with torch.set_grad_enabled(graph):
            tokens = self.unprompted(images)

        attention, groups, fused, scores = [], [], [], []
        for l, fusion in enumerate(self.fusions):
            with torch.set_grad_enabled(graph and len(self.votes) > 0):  # without votes e is sg
                e = self.normed_patches(tokens)  # e = LN(x_l), (B, N, D)
            a, pooled, mass = self.concepts[l](e, detach_maps=True)  # (B, K, N), (B, K, D), (B, K)
            if self.votes:
                scores.append(self.votes[l](pooled[:, :-1]))  # (B, K - 1, C)
            pooled, mass = pooled.detach(), mass.detach()  # sg: a prompt does not move its regions
            prompts, S = fusion(pooled[:, :-1], mass[:, :-1])  # of all but the background
            with torch.set_grad_enabled(graph):
                tokens = self.backbone.blocks[self.num_unprompted + l](tokens, prompts)
            smoothed = (a + SMOOTHING) / (a + SMOOTHING).sum(1, keepdim=True)
            attention.append(smoothed.unflatten(2, self.grid))
            if S is not None:
                groups.append(S)
                fused.append(fuse_maps(a, S).unflatten(2, self.grid))

        with torch.set_grad_enabled(graph):
            x = self.normed_patches(tokens)  # with gradient: the classes are read from it
        a, pooled, _ = self.concepts[-1](x, smoothing=SMOOTHING, detach_maps=True)  # maps of sg(x)
        attention.append(a.unflatten(2, self.grid))
        features = self.norm(pooled)  # (B, G + 1, D), jointly over concepts and width
        scores.append(self.classifier(features[:, :-1]))  # (B, G, C)
        concept_logits = to_float32(torch.cat(scores, dim=1))
        logits = concept_logits.mean(1)
        return Output(logits, concept_logits, attention, groups, fused, features)


# ---------------------------------------------------------------- where the prototypes start

@torch.no_grad()
def start_prototypes(model, dataset, seed):
    """Prototypes become k-means centres of the unprompted ViT's patches (train.py --start kmeans).

    Each layer's foreground patches form K - 1 clusters; the mean of the background patches is the
    background prototype. dataset: training images in the test view; no annotation is read.
    """
    samples = sample_regions(model, dataset, seed)
    for concept, (e, foreground, background) in zip(model.concepts, samples):
        generator = torch.Generator().manual_seed(seed)
        centres = kmeans(e[foreground], len(concept.prototypes) - 1, generator)
        concept.prototypes.copy_(torch.cat([centres, e[background].mean(0, keepdim=True)]))


@torch.no_grad()
def count_prototypes(model, dataset, seed):
    """train.py --prototypes auto: of every layer the largest number that its patches support.

    Either half of the images gives K clusters of foreground patches, up to 16. K counts if both
    agree: each cluster of the first shares with one of the second more than half of the patches
    in either (Jaccard index; Hennig 2007 calls a cluster below 0.5 dissolved).
    """
    numbers = []
    for e, foreground, _ in sample_regions(model, dataset, seed):
        generator = torch.Generator().manual_seed(seed)
        e = e[foreground]
        half = len(e) // 2
        largest = 1
        for K in range(2, 17):
            members = []  # of the clusters of each half, (n, K)
            for images in (e[:half], e[half:]):
                owner = torch.cdist(e, kmeans(images, K, generator)).argmin(1)
                members.append(F.one_hot(owner, K).float())
            first, second = members
            shared = first.T @ second  # (K, K), numbers of patches
            either = first.sum(0)[:, None] + second.sum(0) - shared
            if (shared / either).amax(1).min() > 0.5:
                largest = K
        numbers.append(largest + 1)  # and the background
    return tuple(numbers)


def sample_regions(model, dataset, seed):
    """Training patches of every concept layer, a list of e (n, D), foreground (n), background (n).

    e are the patches as the prototypes meet them; relative ones need the means, so these are set
    first, by the directions of the same patches. Raises ValueError where nothing is foreground.
    """
    directions, radius2 = sample_patches(model, dataset, seed, ConceptLayer.directions)
    regions = []
    for concept, e in zip(model.concepts, directions):
        foreground, background = find_foreground(e, radius2, torch.Generator().manual_seed(seed))
        if foreground.sum() < 2:
            raise ValueError("--start kmeans: found no foreground in the training images; give "
                             "more images, or take --recipe paper")
        if concept.distance == "relative":
            concept.means[0] = e[foreground].mean(0)
            concept.means[1] = e[~foreground].mean(0)
        regions.append((foreground, background))
    patches, _ = sample_patches(model, dataset, seed, ConceptLayer.prepare)
    return [(e, *masks) for e, masks in zip(patches, regions)]


def sample_patches(model, dataset, seed, prepare):
    """50 patches of each of 1,000 images -> (n, D) for every concept layer, and radius2 (n).

    prepare(concept, patches): what is sampled. radius2 is a patch's squared distance from the
    middle of its image: 1 at an edge, 2 in a corner.
    """
    generator = torch.Generator().manual_seed(seed)
    device = model.classifier.weight.device
    y, x = (torch.linspace(-1, 1, side) for side in model.grid)
    grid_radius2 = (y[:, None] ** 2 + x ** 2).flatten()  # (N)
    chosen = torch.randperm(len(dataset), generator=generator)[:1000].tolist()
    blocks = [*model.backbone.blocks[model.num_unprompted:], nn.Identity()]
    samples, radius2 = [[] for _ in model.concepts], []
    for images, *_ in DataLoader(dataset, 16, sampler=chosen):
        kept = torch.randperm(len(grid_radius2), generator=generator)[:50]
        radius2.append(grid_radius2[kept].repeat(len(images)))
        tokens = model.unprompted(images.to(device))
        for concept, sample, block in zip(model.concepts, samples, blocks):
            e = prepare(concept, model.normed_patches(tokens))[:, kept]
            sample.append(e.float().flatten(0, 1))
            tokens = block(tokens)
    return [torch.cat(sample) for sample in samples], torch.cat(radius2).to(device)


def find_foreground(e, radius2, generator):
    """Patches e (n, D), their radius2 (n) -> bool (n) twice: which are foreground, and background.

    A principal component tells object from background: of the first three, the one that follows
    radius2 most, since objects keep to the middle. We cut it into three clusters: the first is
    foreground, the last background, and what lies between is neither. Corners are never
    foreground: some ViTs treat them specially.
    """
    centred = e - e.mean(0)
    eigenvectors = torch.linalg.eigh(centred.T @ centred).eigenvectors  # eigenvalues ascend
    components = centred @ eigenvectors[:, -3:]  # (n, 3), of arbitrary sign
    outwards = (radius2 - radius2.mean()) @ F.normalize(components, dim=0)  # (3,), correlations
    best = outwards.abs().argmax()
    component = components[:, best:best + 1] * -torch.sign(outwards[best])  # the middle is high
    low, middle, high = kmeans(component, 3, generator).flatten().sort().values
    corner = radius2 > 1
    foreground = (component[:, 0] > (middle + high) / 2) & ~corner
    background = (component[:, 0] < (low + middle) / 2) | corner
    return foreground, background


def kmeans(e, K, generator):
    """Patches e (n, D) -> centres (K, D), the best of five starts.

    A start is k-means++ (Arthur, Vassilvitskii 2007): a patch becomes a centre with a probability
    that grows with its squared distance d2 from the nearest centre before it.
    """
    starts = []
    for _ in range(5):
        centres, d2 = e[:0], e.new_ones(len(e))
        for _ in range(K):
            if d2.sum() == 0:  # fewer different patches than centres
                d2 = torch.ones_like(d2)
            pick = torch.multinomial(d2.cpu(), 1, generator=generator).to(e.device)
            centres = torch.cat([centres, e[pick]])
            d2 = torch.cdist(e, centres).amin(1).square()
        for _ in range(30):
            owner = torch.cdist(e, centres).argmin(1)
            sums = torch.zeros_like(centres).index_add_(0, owner, e)
            sizes = torch.bincount(owner, minlength=K)[:, None]
            centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        spread = torch.cdist(e, centres).amin(1).square().sum().item()
        starts.append((spread, centres))
    return min(starts, key=lambda start: start[0])[1]


# ---------------------------------------------------------------- options, checkpoints

def ivpt_arguments(options):
    """Options of train.py, as a dict -> keyword arguments of IVPT."""
    prototypes = options["prototypes"]
    if prototypes == AUTO:
        prototypes = PROTOTYPES
    return dict(
        prototypes=prototypes,
        bias_after_softmax=options["bias"] == "after",
        fusion_mlp=options["fusion"] == "mlp",
        tune=options["tune"],
        distance=options["distance"],
        votes=options["votes"],
        spatial_bias=not options["no_bias"],
        regions=not options["no_regions"],
        cross_layer=not options["no_cross_layer"],
        fusion=not options["no_fusion"])


def build(options, num_classes, backbone=None):
    """The model that a run's options describe (a dict); backbone: one that is loaded already."""
    if backbone is None:
        backbone = load_backbone(options["weights"], options["image_size"])
    if options["method"] != "ivpt":
        from baselines import build_baseline
        return build_baseline(options, num_classes, backbone)
    return IVPT(backbone, num_classes, **ivpt_arguments(options))


def trained_state(model):
    """What a checkpoint holds: all but the frozen part of a backbone that has a file."""
    state = {}
    for name, x in model.state_dict(keep_vars=True).items():
        frozen = name.startswith("backbone.") and not x.requires_grad
        if not (frozen and model.backbone.has_file):
            state[name] = x.detach().cpu()
    return state


def fingerprint(model):
    """SHA-256 of the frozen backbone, that is, of its parameters that no checkpoint holds."""
    digest = hashlib.sha256()
    held = trained_state(model)
    for name, parameter in sorted(model.backbone.named_parameters()):
        if "backbone." + name not in held:
            values = parameter.detach().cpu().numpy()
            digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()


def save(path, content):
    """Write a text or a torch object beside path, then move it there: path is always whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    if isinstance(content, str):
        temporary.write_text(content, encoding="utf-8")
    else:
        torch.save(content, temporary)
    os.replace(temporary, path)


def read_checkpoint(path):
    """A run's last.pt -> its dict. Raises ValueError or OSError, one line, if it is none."""
    checkpoint = read_file(path, "checkpoint")
    fields = {"options", "classes", "model", "fingerprint"}
    if not isinstance(checkpoint, dict) or not fields <= checkpoint.keys():
        raise ValueError(f"checkpoint {path}: not written by train.py; name a run's last.pt")
    return checkpoint


def restore(model, checkpoint, path):
    """Put a checkpoint's parameters into a model that was built from the same options."""
    if fingerprint(model) != checkpoint["fingerprint"]:
        raise ValueError(f"checkpoint {path}: trained on another frozen backbone than this one; "
                         "name its file by --weights")
    held = trained_state(model)
    frozen = {name: x for name, x in model.state_dict().items() if name not in held}
    load_state(model, frozen | checkpoint["model"], f"checkpoint {path}")


def load_checkpoint(path, weights=None):
    """A run's last.pt -> (model in eval mode, checkpoint dict).

    weights: the backbone's file, if it has moved. Raises ValueError or OSError, one line.
    """
    checkpoint = read_checkpoint(path)
    options = dict(checkpoint["options"])
    if weights:
        options["weights"] = weights
    model = build(options, len(checkpoint["classes"]))
    restore(model, checkpoint, path)
    return model.eval(), checkpoint
