"""IVPT: Interpretable Visual Prompt Tuning on a compact DINOv2 vision transformer (arXiv 2503.06084, ICLR 2026).

    python -c "import model; print(model.load_backbone('vits14', 518))"       # downloads Meta's weights (Apache-2.0)
    python train.py                                                          # trains the model below on drawn birds

Read it top to bottom, as an image meets it: the frozen ViT (patches -> tokens -> blocks), then the concept layer
(which patch belongs to which concept), the fusion of many fine concepts into few coarse prompts, and IVPT, which
puts a concept layer before each of the last four blocks and one at the output. The methods that it is compared with
follow, on the same ViT: VPT-Deep, ProtoPNet and Huang et al. Letters in shapes, in every file:

    B images   T tokens   N = h*w patches   D width   K prototypes of a layer, the background last
    G coarse concepts = prototypes of the last layer without its background   C classes   M parts   S image side
"""
import hashlib
import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from kernels import prototype_attention

# width, depth, patch, grid of the position embedding, SwiGLU hidden width (0: a 4x GELU MLP); heads are width / 64
ARCHITECTURES = {
    "vits14": dict(width=384, depth=12, patch_size=14, pos_grid=37),
    "vitb14": dict(width=768, depth=12, patch_size=14, pos_grid=37),
    "vitl14": dict(width=1024, depth=24, patch_size=14, pos_grid=37),
    "vitg14": dict(width=1536, depth=40, patch_size=14, pos_grid=37, swiglu=4096),
}
ARCHITECTURES |= {f"{name}_reg4": dict(kind, registers=4) for name, kind in ARCHITECTURES.items()}
ARCHITECTURES["toy"] = dict(width=128, depth=6, patch_size=8, pos_grid=14)  # no file: train.pretrain makes up for it
SMOOTHING = 1e-6  # a <- (a + 1e-6) / sum_k (a + 1e-6): logs stay finite. Prompted layers smooth after pooling, the head before


# ---------------------------------------------------------------- the vision transformer
# Attribute names are those of Meta's released state dicts, so that load_state_dict(strict=True) holds.

def wide(x):
    """At least fp32: what is summed, compared or put into an exponent must not be rounded to 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.heads = width // 64
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def heads_of(self, x):
        B, T, D = x.shape
        return self.qkv(x).view(B, T, 3, self.heads, 64).permute(2, 0, 3, 1, 4)  # q, k, v: each (B, heads, T, 64)

    def look(self, x, prompts):
        """For VPT-Deep's maps alone: attention of prompts (B, G, D) to the tokens x (B, T, D), mean over heads -> (B, G, T)."""
        q, k = self.heads_of(prompts)[0], self.heads_of(torch.cat([x, prompts], dim=1))[1]
        with torch.autocast(x.device.type, enabled=False):
            return (wide(q) @ wide(k).transpose(2, 3) * 0.125).softmax(-1).mean(1)[:, :, :x.shape[1]]  # 0.125 = 64 ** -0.5

    def forward(self, x, prompts=None):
        """x (B, T, D) attends to itself and to the prompts (B, G, D), of which only keys and values are needed."""
        q, k, v = self.heads_of(x)
        if prompts is not None:
            _, more_k, more_v = self.heads_of(prompts)
            k, v = torch.cat([k, more_k], dim=2), torch.cat([v, more_v], dim=2)  # (B, heads, T + G, 64)
        if x.device.type == "cpu" and q.dtype == torch.bfloat16:  # there two matmuls take half the fused call's time
            y = (q * 0.125 @ k.transpose(2, 3)).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """The feed-forward of vitg14: a gate and a value from one projection (Shazeer 2020, arXiv 2002.05202)."""

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
    """x + ls1(attention(norm1(x))), then x + ls2(mlp(norm2(x))).

    Prompts are tokens appended for this block and dropped after it. What the block would make of them is never read, so
    it is not computed: they are attended to, no more.
    """

    def __init__(self, width, swiglu=0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, swiglu) if swiglu else Mlp(width)
        self.ls2 = LayerScale(width)

    def forward(self, x, prompts=None):
        x = x + self.ls1(self.attn(self.norm1(x), None if prompts is None else self.norm1(prompts)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, width, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, 3, H, W) -> (B, N, D), row-major patches


def patch_grid(image_size, patch_size):
    """image_size: a side or (height, width) in pixels -> patches (h, w). Raises ValueError where they do not fit."""
    H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
    if H % patch_size or W % patch_size or min(H, W) < patch_size:
        below = max(1, H // patch_size) * patch_size
        raise ValueError(f"image size {H} x {W}: expected sides divisible by the patch of {patch_size} pixels; "
                         f"take --image-size {below} or {below + patch_size}")
    return H // patch_size, W // patch_size


class VisionTransformer(nn.Module):
    """DINOv2's ViT (Oquab et al. 2023, arXiv 2304.07193; registers: Darcet et al. 2023, arXiv 2309.16588).

    image_size: side in pixels or (height, width); what IVPT sizes its spatial biases for. The ViT itself takes any
    image whose sides the patch divides. Raises ValueError for other sizes.
    """

    def __init__(self, width, depth, patch_size, pos_grid, registers=0, swiglu=0, image_size=None):
        super().__init__()
        if width % 64:
            raise ValueError(f"backbone width {width}: expected a multiple of 64, as every head is 64 wide")
        self.width, self.patch_size, self.pos_grid, self.registers = width, patch_size, pos_grid, registers
        self.image_size = image_size or pos_grid * patch_size
        self.grid = patch_grid(self.image_size, patch_size)  # (h, w)
        self.patch_embed = PatchEmbed(width, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + pos_grid ** 2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # pretraining's; kept so that Meta's files load strictly
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.blocks = nn.ModuleList(Block(width, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.prefix = 1 + registers  # tokens before the patches
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and name != "mask_token":
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def positions(self, h, w):
        """Position embedding of cls and an h x w grid: (1, 1 + h*w, D). The first spatial axis is the height."""
        side, D = self.pos_grid, self.width
        if (h, w) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().view(1, side, side, D).permute(0, 3, 1, 2)  # (1, D, side, side)
        if self.registers:
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        else:  # Meta's models without registers scale by (h + 0.1) / side, which shifts the sampling points a little
            grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2).to(self.pos_embed)], dim=1)

    def embed(self, images):
        """images (B, 3, H, W) -> tokens (B, prefix + N, D): cls, registers (which have no position), patches."""
        B = len(images)
        h, w = patch_grid(images.shape[2:], self.patch_size)
        tokens = torch.cat([self.cls_token.expand(B, -1, -1), self.patch_embed(images)], dim=1) + self.positions(h, w)
        if self.registers:
            tokens = torch.cat([tokens[:, :1], self.register_tokens.expand(B, -1, -1), tokens[:, 1:]], dim=1)
        return tokens

    def forward(self, images):
        """images (B, 3, H, W) -> normalised tokens (B, prefix + N, D)."""
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


# ---------------------------------------------------------------- weights
URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{folder}/dinov2_{name}_pretrain.pth"


def weights_url(name):
    """Where Meta keeps a named backbone; None for "toy" and for files."""
    name = str(name).removeprefix("dinov2_")
    return URL.format(folder=name.removesuffix("_reg4"), name=name) if name in ARCHITECTURES and name != "toy" else None


def weights_file(url):
    """Where a downloaded backbone lies: torch.hub's cache."""
    return Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])


def load_backbone(name_or_path, image_size=None):
    """A VisionTransformer with its weights, in fp32 and eval mode. "toy" has none: a new one, for training.

    name_or_path: a name of ARCHITECTURES ("vitb14_reg4", also with a "dinov2_" before it), downloaded once into
    torch.hub's cache; or a file holding a state dict in those names, whose architecture is read off its shapes.
    image_size: pixels a side, or (height, width); default: that of the position embedding, 518 for DINOv2.
    Raises ValueError or FileNotFoundError, one line, where the file is missing, is no such state dict or does not fit.
    """
    if str(name_or_path) == "toy":
        return VisionTransformer(**ARCHITECTURES["toy"], image_size=image_size)
    if not (url := weights_url(name_or_path)):
        if not Path(name_or_path).is_file():
            raise FileNotFoundError(f"--weights {name_or_path}: no such file, and not one of {', '.join(ARCHITECTURES)}")
        return _from_state_dict(read_torch_file(name_or_path, "--weights"), name_or_path, image_size)
    if image_size:
        patch_grid(image_size, 14)  # a wrong size is said before 350 MB are fetched
    file = weights_file(url)
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file))
            read_torch_file(file, "weights")  # torch.hub keeps what a cut connection or a login page left
        except (OSError, ValueError) as error:
            if file.is_file():
                file.unlink()
            raise OSError(f"weights {name_or_path}: could not fetch {url} ({error}); without a network put that file into "
                          f"{file.parent}, or name a local one by --weights") from None
    return _from_state_dict(read_torch_file(file, "--weights"), file, image_size)


def read_torch_file(path, what):
    """torch.load without code execution; every way a file can be broken becomes one line naming it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch wonders at a pickle's version before it refuses it
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise type(error)(f"{what} {path}: {error.strerror}") from None
    except Exception as error:  # a damaged file can raise anything from struct.error to AssertionError
        kind = "empty" if not Path(path).stat().st_size else "truncated, or not a torch file of tensors"
        raise ValueError(f"{what} {path}: {kind} ({type(error).__name__}); fetch or write it again") from None


def _architecture(state, path):
    """Everything about a DINOv2-style ViT can be read off its state dict."""
    try:
        state.keys()
        D, _, patch, _ = state["patch_embed.proj.weight"].shape
        positions = state["pos_embed"].shape[1] - 1
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        swiglu = state["blocks.0.mlp.w3.weight"].shape[1] if "blocks.0.mlp.w3.weight" in state else 0
        if min(patch, positions) < 1:
            raise ValueError("no patches or no positions")
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"weights {path}: not a ViT state dict in DINOv2's names ({type(error).__name__}: {error})") from None
    return dict(width=D, depth=depth, patch_size=patch, pos_grid=round(positions ** 0.5), registers=registers, swiglu=swiglu)


def _from_state_dict(state, path, image_size):
    backbone = VisionTransformer(**_architecture(state, path), image_size=image_size)
    _check_shapes(backbone.state_dict(), state, f"weights {path}")
    backbone.load_state_dict({key: value.float() for key, value in state.items()}, strict=True)  # fp16 files too
    return backbone.eval()


def _check_shapes(ours, theirs, what):
    """One line naming the first key that is missing, unknown or of another shape."""
    for key in [*ours, *theirs]:
        mine = tuple(ours[key].shape) if key in ours else "no such key"
        found = tuple(getattr(theirs[key], "shape", ["no tensor"])) if key in theirs else "no such key"
        if mine != found:
            raise ValueError(f"{what}: {key}: found {found}, expected {mine}; take the file this model was made for")


# ---------------------------------------------------------------- the concept layer and the fusion

class ConceptLayer(nn.Module):
    """K class-agnostic prototypes q_k claim N patches e; the maths once more, the kernel and the gradients: kernels.py.

    Concept region discovery: a_k = softmax over k of the logits -|e - q_k|^2, with a bias b_k for every position.
    Intra-region aggregation: p_k = sum(a_k e) / sum(a_k) over the patches where a_k is the largest of all a.
    """

    def __init__(self, K, width, N, bias_after_softmax, scaled, spatial_bias, regions):
        super().__init__()
        self.bias_after_softmax, self.scaled, self.regions = bias_after_softmax, scaled, regions
        self.prototypes = nn.Parameter(0.05 * torch.randn(K, width))
        self.bias = nn.Parameter(torch.zeros(K, N), requires_grad=spatial_bias)  # ablation --no-bias: it stays zero

    def prepared(self, patches):
        """Patches (..., D) as the prototypes meet them: as they come, or all at the length sqrt(D) (--distance scaled)."""
        return F.normalize(wide(patches), dim=-1) * patches.shape[-1] ** 0.5 if self.scaled else patches

    def forward(self, patches, smoothing=0.0, detach_maps=False):
        """patches (B, N, D) -> attention (B, K, N), pooled (B, K, D), mass (B, K), the summed attention of each region."""
        patches, prototypes = self.prepared(patches), self.prototypes
        if self.scaled:  # D^-1/4 on both divides |e - q|^2 by sqrt(D), as in attention: soft shares, not 0 or 1
            patches, prototypes = patches * patches.shape[-1] ** -0.25, prototypes * patches.shape[-1] ** -0.25
        attention, pooled, mass = prototype_attention(patches, prototypes, self.bias, self.bias_after_softmax,
                                                      smoothing=smoothing, detach_maps=detach_maps)
        if not self.regions:  # ablation --no-regions: global attention, every patch counts by its share of the concept
            mass = attention.sum(2)
            pooled = (attention / mass[..., None].clamp_min(1e-30)).to(patches.dtype) @ patches
        return attention, pooled, mass


class Fusion(nn.Module):
    """Fine-to-coarse fusion: K - 1 region features, grouped into G, become G prompts. Without grouping G is K - 1."""

    def __init__(self, width, G, mlp, grouped):
        super().__init__()
        self.G = G
        self.grouping = nn.Linear(width, G) if grouped else None
        self.norm = nn.LayerNorm((G, width))
        linear = nn.Linear(width, width)  # footnote: the text has an MLP here, the released program one Linear
        self.head = nn.Sequential(linear, nn.GELU(), nn.Linear(width, width)) if mlp else linear

    def forward(self, pooled, mass):
        """pooled (B, K-1, D), mass (B, K-1), no gradient -> prompts (B, G, D), groups (B, K-1, G) with rows of sum 1."""
        if self.grouping is None:  # ablation --no-fusion: every fine concept prompts by itself
            return self.head(self.norm(pooled)), None
        logits = wide(self.grouping(pooled))  # (B, K-1, G)
        # footnote: the released program samples Gumbel noise in evaluation too; here evaluation is deterministic
        groups = F.gumbel_softmax(logits, tau=1.0) if self.training else logits.softmax(-1)
        groups = torch.where(mass[..., None] > 0, groups, 1 / self.G)  # an empty region belongs to all alike
        weights = groups.detach().transpose(1, 2)  # (B, G, K-1); sg: the grouping learns from the fused maps alone
        with torch.autocast(pooled.device.type, enabled=False):
            coarse = weights @ wide(pooled) / weights.sum(-1, keepdim=True).clamp_min(1e-30)  # (B, G, D); 0 / 0 would be nan
        return self.head(self.norm(coarse)), groups


# ---------------------------------------------------------------- IVPT

class Output(NamedTuple):  # as IVPT fills it; the methods compared with it say in their docstrings what differs
    logits: torch.Tensor          # (B, C), the mean of the concepts' class scores
    concept_logits: torch.Tensor  # (B, G, C), every coarse concept's class scores; None where it has none (VPT-Deep)
    attention: list               # per concept layer (B, K_l, h, w), smoothed, sums to 1 over K_l, background last
    groups: list                  # per prompted layer (B, K_l - 1, G)
    fused: list                   # per prompted layer (B, G + 1, h, w), background last
    features: torch.Tensor        # (B, G + 1, D), normalised region features of the last layer


def tune_backbone(backbone, tune):
    """Of a backbone "none" is trained (paper), its "tokens" (cls, registers, positions; released), or "all". ValueError for
    anything else."""
    if tune not in ("none", "tokens", "all"):
        raise ValueError(f"tune {tune!r}: expected none, tokens or all")
    tokens = ("cls_token", "register_tokens", "pos_embed")
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad = name != "mask_token" and (tune == "all" or (tune == "tokens" and name in tokens))


def new_prompts(blocks, count, backbone):
    """Free prompts (blocks, count, D), started as in VPT: uniform, with the variance that Xavier gives a patch embedding."""
    bound = math.sqrt(6 / (3 * backbone.patch_size ** 2 + backbone.width))
    return nn.Parameter(torch.empty(blocks, count, backbone.width).uniform_(-bound, bound))


class IVPT(nn.Module):
    """Interpretable visual prompt tuning of a VisionTransformer.

    prototypes: prototypes of each concept layer, background included; all but the last layer prompt the last
        len(prototypes) - 1 blocks.
    bias_after_softmax: a = max(softmax + bias, 0) as in the paper's text; False: softmax(logit + bias), as released.
    fusion_mlp: fusion head with an MLP (paper) or one Linear (released).
    tune: what of the backbone is trained: "none" (paper), "tokens" (cls, registers, positions; released), "all".
    scaled: patches are brought to the length sqrt(D), and squared distances divided by sqrt(D) (ours, not the paper's).
    spatial_bias, regions, cross_layer, fusion: False takes that idea away, for the ablation. Without cross-layer prototypes
        the last concept layer stands alone, and nothing is prompted.
    free_prompts: learnable prompts in each block that no concept prompts; 10 of them and cross_layer=False are VPT-Deep with prototypes.
    Raises ValueError where the prototypes do not fit the backbone. The backbone is used, not copied.

    Who learns from what; every stop-gradient (sg) below is meant:
        prototypes and biases of prompted layers   the six losses on maps: what they pool for the prompts is under sg
        grouping                                   region consistency alone, through the fused maps; prompts use sg(groups)
        fusion norm and head                       classification and orthogonality, through the prompts
        prototypes and bias of the last layer      all but region consistency, whose target they are
        free prompts                               classification and orthogonality
    """

    def __init__(self, backbone, num_classes, prototypes=(17, 14, 11, 8, 5), bias_after_softmax=True, fusion_mlp=True,
                 tune="none", scaled=False, spatial_bias=True, regions=True, cross_layer=True, fusion=True, free_prompts=0):
        super().__init__()
        prototypes = tuple(prototypes) if cross_layer else tuple(prototypes)[-1:]
        prompted = len(prototypes) - 1
        if (cross_layer and prompted < 1) or min(prototypes) < 2 or prompted > len(backbone.blocks):
            raise ValueError(f"prototypes {prototypes}: expected 2 to {len(backbone.blocks) + 1} numbers, each at "
                             "least 2 (one concept and the background)")
        if min(backbone.grid) < 3:
            raise ValueError(f"image size {backbone.image_size}: {backbone.grid} patches, expected at least 3 a side")
        self.backbone, self.grid = backbone, backbone.grid
        self.num_classes, self.prototypes = num_classes, prototypes  # counts; the vectors are ConceptLayer's
        D, G, N = backbone.width, prototypes[-1] - 1, self.grid[0] * self.grid[1]
        tune_backbone(backbone, tune)
        self.tune = tune
        self.concepts = nn.ModuleList(ConceptLayer(K, D, N, bias_after_softmax, scaled, spatial_bias, regions) for K in prototypes)
        self.fusions = nn.ModuleList(Fusion(D, G if fusion else K - 1, fusion_mlp, fusion) for K in prototypes[:-1])
        free = len(backbone.blocks) - len(self.fusions)
        self.free_prompts = new_prompts(free, free_prompts, backbone) if free_prompts else None
        self.norm = nn.LayerNorm((G + 1, D))
        self.classifier = nn.Linear(D, num_classes, bias=False)  # one for all concepts
        for module in [*self.fusions.modules(), self.classifier]:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images, backbone_graph=True):
        """images (B, 3, H, W) of the backbone's image_size -> Output.

        backbone_graph=False keeps no graph of the backbone: gradients of the maps still reach every prototype and bias,
        for the maps see the patches through a stop-gradient. The equivariance loss needs no more, and pays a plain forward.
        """
        h, w = self.grid
        if patch_grid(images.shape[2:], self.backbone.patch_size) != (h, w):
            raise ValueError(f"images of {tuple(images.shape[2:])}: expected patches of {self.backbone.patch_size} on a grid of "
                             f"{(h, w)}, which this model's spatial biases were made for")
        graph = torch.is_grad_enabled() and backbone_graph
        free = len(self.backbone.blocks) - len(self.fusions)  # blocks that no concept prompts
        learns = self.tune != "none" or self.free_prompts is not None  # frozen and unprompted, these blocks need no graph
        with torch.set_grad_enabled(graph and learns):
            tokens = self.backbone.embed(images)
            for l, block in enumerate(self.backbone.blocks[:free]):
                tokens = block(tokens, None if self.free_prompts is None else self.free_prompts[l].expand(len(images), -1, -1))

        attention, groups, fused = [], [], []
        for concept, fusion, block in zip(self.concepts, self.fusions, self.backbone.blocks[free:]):
            patches = self.backbone.norm(tokens[:, self.backbone.prefix:]).detach()  # e = LN(sg(x_l)), (B, N, D)
            a, pooled, mass = concept(patches)
            prompts, group = fusion(pooled[:, :-1].detach(), mass[:, :-1].detach())  # sg: a prompt does not move its own regions
            with torch.set_grad_enabled(graph):
                tokens = block(tokens, prompts)
            smoothed = (a + SMOOTHING) / (a + SMOOTHING).sum(1, keepdim=True)  # (B, K, N)
            attention.append(smoothed.unflatten(2, (h, w)))
            if group is None:
                continue
            groups.append(group)
            with torch.autocast(a.device.type, enabled=False):  # shares that sum to 1 must not be rounded to bf16
                coarse = torch.cat([group.transpose(1, 2) @ a[:, :-1], a[:, -1:]], dim=1)  # (B, G + 1, N), before smoothing
                coarse = coarse / coarse.sum(1, keepdim=True).clamp_min(1e-30)  # the clamp after the bias may leave no share
                fused.append(coarse.unflatten(2, (h, w)))

        with torch.set_grad_enabled(graph):
            x = self.backbone.norm(tokens[:, self.backbone.prefix:])  # with gradient: what the classes are read from
        a, pooled, _ = self.concepts[-1](x, smoothing=SMOOTHING, detach_maps=True)  # maps of sg(x), features of x
        attention.append(a.unflatten(2, (h, w)))
        features = self.norm(pooled)  # (B, G + 1, D), jointly over concepts and width
        concept_logits = wide(self.classifier(features[:, :-1]))  # (B, G, C)
        return Output(concept_logits.mean(1), concept_logits, attention, groups, fused, features)


# ---------------------------------------------------------------- the methods that IVPT is compared with

class VPTDeep(nn.Module):
    """VPT-Deep (Jia et al. 2022, arXiv 2203.12119): free prompts in every block, a linear head on the cls token.

    Nothing ties a prompt to a region. What can be looked at is where it looks itself: its attention to the patches, mean
    over the heads, in the last five blocks. A patch is a prompt's if it gets more than an even share, 1 / (T + G), of its
    attention; that even share stands for the background in Output.attention, which does not sum to 1 here.
    """

    def __init__(self, backbone, num_classes, prompts=10, tune="none"):
        super().__init__()
        tune_backbone(backbone, tune)
        self.backbone, self.grid, self.num_classes = backbone, backbone.grid, num_classes
        self.prompts = new_prompts(len(backbone.blocks), prompts, backbone)
        self.prototypes = (prompts + 1,) * min(5, len(backbone.blocks))  # of the layers that are looked at
        self.classifier = nn.Linear(backbone.width, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images):
        """images (B, 3, H, W) -> Output, its features the cls token (B, 1, D); while training its attention is empty."""
        tokens, attention, blocks = self.backbone.embed(images), [], self.backbone.blocks
        for l, (block, prompts) in enumerate(zip(blocks, self.prompts)):
            prompts = prompts.expand(len(images), -1, -1)  # (B, G, D)
            if not self.training and l >= len(blocks) - len(self.prototypes):
                a = block.attn.look(block.norm1(tokens), block.norm1(prompts))[:, :, self.backbone.prefix:]  # (B, G, N)
                even = torch.full_like(a[:, :1], 1 / (tokens.shape[1] + prompts.shape[1]))
                attention.append(torch.cat([a, even], dim=1).unflatten(2, self.grid))
            tokens = block(tokens, prompts)
        cls = self.backbone.norm(tokens[:, :1])  # (B, 1, D)
        return Output(wide(self.classifier(cls[:, 0])), None, attention, [], [], cls)


class ProtoPNet(nn.Module):
    """ProtoPNet (Chen et al. 2019, arXiv 1806.10574) on the patches of a frozen ViT; m prototypes of every class.

    An add-on layer maps patches to z in [0, 1]^d. The similarity of a patch and a prototype at squared distance d2 is
    log((d2 + 1) / (d2 + 1e-4)); the largest one in the image is the prototype's score; a last layer without bias, 1 to its
    own class and -1/2 to others, turns scores into logits. First add-on layer and prototypes learn; then prototypes are
    projected onto training patches (project), and the last layer alone learns (last_only). Footnote: the original trains
    the backbone, too, and starts its add-on layers otherwise.

    aligned: Huang et al. 2023 (arXiv 2212.05946) on top of it, without projection and last stage. Scores count for their
    own class alone, by learnt weights that are positive and sum to m (score aggregation); train.alignment pulls z towards
    the spatial structure of an early block (shallow-deep feature alignment). Footnote: theirs aligns the last map of a
    backbone that is trained, where ours, frozen, can only have z aligned; its distances are cosines, and it has an
    orthogonality loss.

    As in Huang et al., the maps shown and scored are those of the prototypes of the image's own class, so concept j is
    another one in every class; there is no background, and Output.attention has similarities, not shares. What the
    mean of Output.concept_logits lacks to the logits comes from the prototypes of other classes.
    """

    def __init__(self, backbone, num_classes, per_class=10, width=128, tune="none", aligned=False):
        super().__init__()
        tune_backbone(backbone, tune)
        self.backbone, self.grid, self.tune, self.aligned, self.last_only = backbone, backbone.grid, tune, aligned, False
        self.num_classes, self.prototypes = num_classes, (per_class + 1,)  # counts, as in IVPT: read() appends a background
        self.add_on = nn.Sequential(nn.Linear(backbone.width, width), nn.ReLU(), nn.Linear(width, width), nn.Sigmoid())
        self.vectors = nn.Parameter(torch.rand(num_classes * per_class, width))  # (C m, d), the prototypes
        own = torch.eye(num_classes).repeat_interleave(per_class, 1)  # (C, C m), 1 where a prototype is of the class
        self.register_buffer("own", own, persistent=False)
        self.last = nn.Parameter(torch.zeros(num_classes, per_class) if aligned else 1.5 * own - 0.5)

    def compare(self, images):
        """images (B, 3, H, W) -> z (B, N, d), shallow (B, N, D) of an early block, squared distances d2 (B, N, C m)."""
        prefix = self.backbone.prefix
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.tune != "none" and not self.last_only):
            tokens = self.backbone.embed(images)
            for l, block in enumerate(self.backbone.blocks):
                tokens = block(tokens)
                if l == len(self.backbone.blocks) // 4:
                    shallow = tokens[:, prefix:].detach()
            patches = self.backbone.norm(tokens[:, prefix:])
        z = wide(self.add_on(patches))
        with torch.autocast(z.device.type, enabled=False):
            d2 = z.square().sum(2, keepdim=True) - 2 * z @ self.vectors.T + self.vectors.square().sum(1)
        return z, shallow, d2.clamp_min(0)  # rounding can leave it below

    def class_weights(self):
        """(C, C m): what a prototype's score adds to a class's logit."""
        if self.aligned:
            return self.own * ((self.prototypes[0] - 1) * self.last.softmax(1)).flatten()
        return self.last if self.last_only else self.last.detach()

    def read(self, d2, labels=None):
        """Squared distances d2 (B, N, C m) -> Output, with the maps of the prototypes of labels (B); None: of the predictions."""
        B, C, m = len(d2), self.num_classes, self.prototypes[0] - 1
        similarity = ((d2 + 1) / (d2 + 1e-4)).log().transpose(1, 2)  # (B, C m, N)
        scores = similarity.amax(2)  # (B, C m)
        scores, weights = scores.detach() if self.last_only else scores, self.class_weights()
        with torch.autocast(d2.device.type, enabled=False):  # classes differ by less than bf16 tells apart at such logits
            logits = scores @ weights.T
        labels, each = logits.argmax(1) if labels is None else labels, torch.arange(B, device=d2.device)
        maps = similarity.unflatten(1, (C, m))[each, labels]  # (B, m, N)
        maps = torch.cat([maps, torch.zeros_like(maps[:, :1])], dim=1)  # similarities are above 0: no patch is background
        own = weights.unflatten(1, (C, m))[:, labels].permute(1, 2, 0)  # (B, m, C), the weights of those prototypes
        concept_logits = m * scores.unflatten(1, (C, m))[each, labels][..., None] * own
        return Output(logits, concept_logits, [maps.unflatten(2, self.grid)], [], [], self.vectors.expand(B, -1, -1))

    def forward(self, images, labels=None):
        return self.read(self.compare(images)[2], labels)

    @torch.no_grad()
    def project(self, dataset):
        """Every prototype becomes the nearest patch of its class's training images: one can look at it from then on."""
        C, m, device = self.num_classes, self.prototypes[0] - 1, self.vectors.device
        best, found = torch.full((C, m), math.inf, device=device), self.vectors.unflatten(0, (C, m)).clone()
        for images, labels, *_ in DataLoader(dataset, 16):
            z, _, d2 = self.compare(images.to(device))
            for patches, distances, c in zip(z, d2.unflatten(2, (C, m)), labels.tolist()):
                nearest, patch = distances[:, c].min(0)  # (m)
                closer = nearest < best[c]
                best[c], found[c] = torch.where(closer, nearest, best[c]), torch.where(closer[:, None], patches[patch], found[c])
        self.vectors.copy_(found.flatten(0, 1))


# ---------------------------------------------------------------- where the prototypes start

@torch.no_grad()
def start_prototypes(model, dataset, seed, images=512, patches=100):
    """Prototypes as k-means centres of patches of the unprompted ViT, layer by layer (train.py --start kmeans).

    The first principal component of the patches tells birds from backgrounds; foreground is the end of it that keeps to
    the middle of the images, as in the paper's background loss. It is cut into K - 1 clusters; the mean of the rest is the
    background prototype. dataset: training images in the test view; no label, box or key point is read.
    """
    backbone, device = model.backbone, model.classifier.weight.device
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(dataset), generator=generator)[:images].tolist()
    samples, rims, free = [[] for _ in model.concepts], [], len(backbone.blocks) - len(model.fusions)
    y, x = (torch.linspace(-1, 1, side) for side in model.grid)
    rim = (y[:, None] ** 2 + x ** 2).flatten()  # (N), squared distance from the middle, as in background_presence
    for batch, *_ in DataLoader(dataset, 16, sampler=chosen):
        tokens = backbone.embed(batch.to(device))
        kept = torch.randperm(len(rim), generator=generator)[:patches]
        rims.append(rim[kept].repeat(len(batch)))
        for block in backbone.blocks[:free]:
            tokens = block(tokens)
        for sample, concept, block in zip(samples, model.concepts, [*backbone.blocks[free:], nn.Identity()]):
            sample.append(concept.prepared(backbone.norm(tokens[:, backbone.prefix:])[:, kept]).float())
            tokens = block(tokens)
    rims = torch.cat(rims).to(device)
    for concept, sample in zip(model.concepts, samples):
        e = torch.cat(sample).flatten(0, 1)  # (n, D)
        foreground = foreground_of(e, rims, generator)
        if foreground.sum() < len(concept.prototypes):
            raise ValueError(f"--start kmeans: {foreground.sum()} foreground patches in {len(chosen)} training images, expected many "
                             f"more than the {len(concept.prototypes) - 1} concepts; give more images, or take --start noise")
        centres = kmeans(e[foreground], len(concept.prototypes) - 1, generator)
        concept.prototypes.copy_(torch.cat([centres, e[~foreground].mean(0, keepdim=True)]))


def foreground_of(e, rims, generator):
    """Patches e (n, D), their squared distance from the middle (n) -> bool (n): the upmost of three clusters along the
    first principal component. Of two, the upper one would hold what lies between bird and background, too. Nothing outside
    the inscribed circle is foreground: some ViTs keep a feature of its own in the four corners, which is no bird's."""
    centred = e - e.mean(0)
    component = centred @ torch.linalg.eigh(centred.T @ centred)[1][:, -1:]  # (n, 1); eigenvalues ascend
    component = component * -torch.sign((component[:, 0] * (rims - rims.mean())).sum())  # its sign is arbitrary: high is the middle
    low, middle, high = kmeans(component, 3, generator).flatten().sort().values
    return (component[:, 0] > (middle + high) / 2) & (rims <= 1)


def kmeans(e, K, generator, restarts=5, iterations=30):
    """Patches e (n, D) -> the best centres (K, D) of some restarts, each begun by k-means++ (Arthur, Vassilvitskii 2007)."""
    best, found = math.inf, None
    for _ in range(restarts):
        centres, nearest = e[:0], e.new_full((len(e),), 1.0)
        for _ in range(K):
            nearest = nearest + (nearest.sum() == 0)  # fewer different patches than centres: any will do
            pick = torch.multinomial(nearest.cpu(), 1, generator=generator).to(e.device)
            centres = torch.cat([centres, e[pick]])
            nearest = torch.cdist(e, centres).amin(1).square()
        for _ in range(iterations):
            owner = torch.cdist(e, centres).argmin(1)
            sums = torch.zeros_like(centres).index_add_(0, owner, e)
            sizes = torch.bincount(owner, minlength=K)[:, None]
            centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        if (spread := torch.cdist(e, centres).amin(1).square().sum().item()) < best:
            best, found = spread, centres
    return found


# ---------------------------------------------------------------- from options or a checkpoint to a model

def build(options, num_classes, backbone=None):
    """The model that a run's options describe (train.Options as a dict); backbone: one already loaded."""
    backbone = backbone or load_backbone(options["weights"], options["image_size"])
    method = options["method"]
    if method == "vpt-deep":
        return VPTDeep(backbone, num_classes, tune=options["tune"])
    if method in ("protopnet", "huang"):
        return ProtoPNet(backbone, num_classes, tune=options["tune"], aligned=method == "huang")
    return IVPT(backbone, num_classes, tuple(options["prototypes"]), bias_after_softmax=options["bias"] == "after",
                fusion_mlp=options["fusion"] == "mlp", tune=options["tune"], scaled=dict(euclidean=False, scaled=True)[options["distance"]],
                spatial_bias=not options["no_bias"], regions=not options["no_regions"],
                cross_layer=not options["no_cross_layer"] and method == "ivpt", fusion=not options["no_fusion"],
                free_prompts=10 if method == "vpt-deep-proto" else 0)


def trained_state(model):
    """What training changes, and so all that a checkpoint needs beside the backbone's own file."""
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


def fingerprint(model):
    """SHA-256 over the frozen parameters: a checkpoint refuses to run on another backbone than its own."""
    digest = hashlib.sha256()
    for name, p in sorted(model.backbone.named_parameters()):
        if not p.requires_grad:
            digest.update(name.encode() + p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save(path, content):
    """A checkpoint or a text, written beside, flushed to the disk, moved into place: a killed save leaves the last as it was."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # on a full disk torch's zip writer fails, too, and in words of its own
        temporary.unlink(missing_ok=True)
        kept = "the one before it stands" if path.is_file() else "there was none before it"
        raise OSError(f"{path}: could not be written ({error.__context__ or error}); {kept}; make room and try again") from None


# What a checkpoint must hold, by type; train.py wants more of one that it resumes.
FIELDS = dict(options=dict, classes=list, model=dict, fingerprint=str)
OPTIONS = dict(data=str, data_root=str | None, weights=str, image_size=int, method=str, seed=int, amp=bool)


def read_checkpoint(path, **more):
    """A run's last.pt -> its dict. more: further fields that it must hold, and their types.

    Raises ValueError or OSError, one line, for a file that is damaged or not ours.
    """
    checkpoint = read_torch_file(path, "checkpoint")
    if wrong := misfit(checkpoint, FIELDS | more) or misfit(checkpoint["options"], OPTIONS):
        raise ValueError(f"checkpoint {path}: not written by train.py ({wrong} is missing or of another type); expected a run's "
                         "last.pt")
    return checkpoint


def misfit(content, kinds):
    """The first field that a dict lacks or has in another type; None if all are as they should."""
    content = content if isinstance(content, dict) else {}
    return next((key for key, kind in kinds.items() if not isinstance(content.get(key, ...), kind)), None)


def load_checkpoint(path, weights=None, fetch=lambda name: None):
    """A run's last.pt -> (model in eval mode, checkpoint dict). weights: where the backbone lies, if it has moved; fetch:
    what downloads a named one (otherwise torch.hub does).

    Raises ValueError or FileNotFoundError, one line, for a file that is missing, truncated, not ours, or whose frozen
    backbone is another one.
    """
    checkpoint = read_checkpoint(path)
    options = dict(checkpoint["options"], **({"weights": weights} if weights else {}))
    fetch(options["weights"])
    try:
        model = build(options, len(checkpoint["classes"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {path}: its options do not tell {error}; written by another version of this program, "
                         "train again") from None
    restore(model, checkpoint, path)
    return model.eval(), checkpoint


def restore(model, checkpoint, path):
    """Put a checkpoint's parameters into a model that was built from the same options."""
    _check_shapes(trained_state(model), checkpoint["model"], f"checkpoint {path}")
    if fingerprint(model) != checkpoint["fingerprint"]:
        raise ValueError(f"checkpoint {path}: trained on another frozen backbone; name its file by --weights")
    model.load_state_dict(checkpoint["model"], strict=False)
