"""IVPT: interpretable visual prompt tuning of a DINOv2 vision transformer (arXiv 2503.06084).

    python -c "import model; print(model.load_backbone('vits14', 518))"   # downloads Meta's weights
    python train.py                                     # trains the model below on drawn birds

Read it top to bottom, as an image meets it. The frozen ViT turns patches into tokens. The concept
layer decides which patch belongs to which concept. The fusion merges fine concepts into coarse
prompts. IVPT puts both before each of the last four blocks, and a concept layer at the output.
Letters in shapes, the same in every file:

    B images   T tokens   N = h*w patches   D width   K prototypes of a layer, background last
    G coarse concepts = K of the last layer - 1   C classes   M parts   S image side in pixels;
    in the fusion S is the paper's soft grouping of K - 1 concepts into G

sg(x), the stop-gradient, is x.detach(): the value of x, through which no gradient flows back.
"""
import argparse
import math
import re
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
ARCHITECTURES |= {f"{name}_reg4": dict(vit, registers=4) for name, vit in ARCHITECTURES.items()}

PROTOTYPES = (17, 14, 11, 8, 5)  # of each concept layer, as in the paper
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
        if prompts is not None:  # prompts are keys and values; their own queries are dropped
            _, prompt_k, prompt_v = self.heads_of(prompts)
            k = torch.cat([k, prompt_k], dim=2)  # (B, heads, T + G, 64)
            v = torch.cat([v, prompt_v], dim=2)
        return self.attend(q, k, v)

    def attend(self, q, k, v):
        """Queries (B, heads, T, 64) read the values of other tokens by their keys -> (B, T, D)."""
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # there the fused call is slower
            scale = q.shape[-1] ** -0.5
            y = (q * scale @ k.transpose(2, 3)).softmax(-1) @ v
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
    """Prompts (B, G, D) are tokens of this block alone: the others attend to them."""

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
    """A side or (height, width) in pixels -> patches (h, w)."""
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

    def normed_patches(self, tokens):
        """Tokens (B, T, D) of any block -> its patches (B, N, D) after the ViT's last norm."""
        return self.norm(tokens[:, self.prefix:])

    def last_tokens(self, images, num_layers):
        """images -> normed tokens (B, T, D) before each of the last num_layers - 1 blocks, and
        after the last block: where the concept layers of IVPT stand, if nothing prompts."""
        layers = []
        tokens = self.embed(images)
        first = len(self.blocks) - num_layers + 1
        for i, block in enumerate(self.blocks):
            if i >= first:
                layers.append(self.norm(tokens))
            tokens = block(tokens)
        return [*layers, self.norm(tokens)]

    def last_patches(self, images, num_layers):
        """The patches among last_tokens, (B, N, D) each."""
        return [tokens[:, self.prefix:] for tokens in self.last_tokens(images, num_layers)]


# ---------------------------------------------------------------- the concept layer and the fusion

class ConceptLayer(nn.Module):
    """K class-agnostic prototypes q_k claim N patches e. The maths and its gradients: kernels.py.

    Concept region discovery, with a spatial bias b_k for each patch:
        a_k = max(softmax_k(-|e - q_k|^2) + b_k, 0)        bias_after_softmax, the paper's text
        a_k = softmax_k(-|e - q_k|^2 + b_k)                as released
    Intra-region aggregation: p_k = sum(a_k e) / sum(a_k) over the patches where a_k is largest.
    The arguments are explained at IVPT.
    """

    def __init__(self, K, width, num_patches, bias_after_softmax=True, no_bias=False,
                 no_regions=False):
        super().__init__()
        self.bias_after_softmax, self.no_regions = bias_after_softmax, no_regions
        self.prototypes = nn.Parameter(0.05 * torch.randn(K, width))
        self.bias = nn.Parameter(torch.zeros(K, num_patches), requires_grad=not no_bias)

    def forward(self, patches, smoothing=0.0):
        """patches (B, N, D) -> attention a (B, K, N), pooled p (B, K, D), mass (B, K), p's divisor.

        smoothing: what is added to every share before pooling. The maps see sg(patches), so only
        pooled moves the patches.
        """
        attention, pooled, mass = prototype_attention(
            patches, self.prototypes, self.bias, self.bias_after_softmax,
            smoothing=smoothing, detach_maps=True)
        if self.no_regions:  # every patch counts by its share of the concept
            mass = attention.sum(2)
            weights = attention / mass[..., None].clamp_min(1e-30)
            pooled = weights.to(patches.dtype) @ patches
        return attention, pooled, mass


def smooth(a):
    """Shares a (B, K, N), made positive: they sum to 1 over K again."""
    return (a + SMOOTHING) / (a + SMOOTHING).sum(1, keepdim=True)


class Fusion(nn.Module):
    """Fine-to-coarse fusion: K - 1 region features, grouped into G concepts, become G prompts.

        g_j = sum_k S_kj p_k / sum_k S_kj,   S = softmax over j of (W p_k + Gumbel noise)
        prompt_j = head(norm(g))_j

    no_fusion, for the ablation: every fine concept prompts by itself, so G is K - 1.
    """

    def __init__(self, width, G, fusion_mlp=True, no_fusion=False):
        super().__init__()
        self.grouping = None if no_fusion else nn.Linear(width, G)
        self.norm = nn.LayerNorm((G, width))
        self.head = nn.Linear(width, width)  # one Linear as released; the text has an MLP
        if fusion_mlp:
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

    Like the authors' program we fuse raw shares; fused maps are never smoothed. The background's
    share stays as it is.
    """
    with torch.autocast(a.device.type, enabled=False):  # shares must not be rounded to bf16
        concepts = S.transpose(1, 2) @ a[:, :-1]
        fused = torch.cat([concepts, a[:, -1:]], dim=1)
        return fused / fused.sum(1, keepdim=True).clamp_min(1e-30)  # the bias may leave no share


# ---------------------------------------------------------------- what every method is

class Output(NamedTuple):  # as IVPT fills it; the docstrings in methods/ say what differs
    logits: torch.Tensor          # (B, C), the mean of the concepts' class scores
    concept_logits: torch.Tensor  # (B, G, C), class scores of every concept that votes
    attention: list               # per concept layer (B, K_l, h, w), smoothed, sums to 1 over K_l
    groups: list                  # per prompted layer (B, K_l - 1, G)
    fused: list                   # per prompted layer (B, G + 1, h, w), background last
    features: torch.Tensor        # (B, G + 1, D), normalised region features of the last layer


class Method(nn.Module):
    """What train.py, evaluate.py and explore/ ask of a method. IVPT is one; methods/ has others.

    prototypes, a tuple that a method sets: K of each map in Output.attention in eval mode, the
    background counted. What must survive --resume is a parameter or a buffer, made in __init__.
    """

    rates = {}              # options with another default than train.py's
    accepts = ()            # which of IVPT's options it takes; typing another one is an error
    class_specific = False  # every class has prototypes of its own
    has_stages = False      # after_epoch changes weights; then --resume must not change --epochs
    augmented = True        # it learns from the training view; else from the test view

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)  # used, not copied
        self.grid = backbone.grid  # (h, w)

    def forward(self, images, labels=None):
        """images (B, 3, S, S) -> Output. What a method has not is None, or [].

        labels (B): the classes whose prototypes to show, where each class has its own; None: those
        of the predicted classes.
        """
        raise NotImplementedError

    def losses(self, images, labels, theta):
        """One training step: a dict of scalars with "loss", their sum; and logits (B, C).

        theta (2, 3): an affine map, for losses that compare two views. See train.ivpt_losses.
        """
        raise NotImplementedError

    def parameter_groups(self, args):
        """Adam's groups: what is trained, and its rate for batches of 16. args: train.Options."""
        raise NotImplementedError

    def start(self, dataset, args):
        """Called once before the first step. dataset: the training images in the test view."""

    def before_epoch(self, epoch, epochs):
        """Called before each of the epochs, numbered from 0."""

    def after_epoch(self, epoch, epochs, dataset):
        """Called after each of them. dataset: as in start."""

    def sample_regions(self, dataset, seed):
        """Where prototypes are clusters: for every layer patches e (n, D) of the dataset's images
        as the prototypes meet them, and bool (n) twice: in the foreground, in the background."""
        raise ValueError(f"{type(self).__name__}: its prototypes are not clusters of patches")


def tune_backbone(backbone, tune):
    """What of a frozen backbone is trained: "none" (paper), its "tokens" (released) or "all"."""
    tokens = ("cls_token", "register_tokens", "pos_embed")
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad = tune == "all" or (tune == "tokens" and name in tokens)
    backbone.mask_token.requires_grad = False


# ---------------------------------------------------------------- IVPT

class IVPT(Method):
    """Interpretable visual prompt tuning of a VisionTransformer.

        z = norm(p of the last layer),   logits = mean over the concepts j of W_c z_j

    prototypes: how many each concept layer has, the background counted. The last layer reads the
        output. Each of the others prompts one block: these are the backbone's last blocks.
    bias_after_softmax: a = max(softmax + bias, 0) as in the text; False: softmax(logit + bias).
    fusion_mlp: fusion head with an MLP (paper) or one Linear (released).
    tune: see tune_backbone.
    no_bias, no_regions, no_cross_layer, no_fusion: take an idea away, for the paper's ablation.
        With no_cross_layer the last concept layer stands alone and nothing is prompted.
    Raises ValueError where prototypes and backbone do not fit.

    Who learns from what; every stop-gradient in forward is meant:
        prototypes, biases of prompted layers   the six losses on maps; what they pool is sg
        grouping                                region consistency alone, through the fused maps
        fusion norm and head                    classification and orthogonality, through prompts
        prototypes, bias of the last layer      all but region consistency, whose target they are
        norm of the region features             classification and orthogonality
        class head                              classification alone
        tuned tokens or backbone                classification and orthogonality
    The six on maps: region consistency, total variation, presence, background presence, entropy,
    equivariance. losses() is train.ivpt_losses: train.py assigns it.
    """

    arguments = ("prototypes", "bias_after_softmax", "fusion_mlp", "tune",
                 "no_bias", "no_regions", "no_cross_layer", "no_fusion")
    accepts = (*arguments, "recipe", "start", "lr_prototypes", "lr_fusion", "lr_bias",
               "lr_backbone")

    def __init__(self, backbone, num_classes, prototypes=PROTOTYPES, bias_after_softmax=True,
                 fusion_mlp=True, tune="none", no_bias=False, no_regions=False,
                 no_cross_layer=False, no_fusion=False):
        super().__init__(backbone)
        depth = len(backbone.blocks)
        if not 1 <= len(prototypes) <= depth + 1 or min(prototypes) < 2:
            raise ValueError(f"prototypes {prototypes}: expected 1 to {depth + 1} numbers, "
                             "each at least 2 (one concept and the background)")
        if min(backbone.grid) < 3:
            raise ValueError(f"image size {backbone.image_size}: {backbone.grid} patches, "
                             "expected at least 3 a side")
        if no_cross_layer:
            prototypes = prototypes[-1:]
        self.prototypes = tuple(prototypes)  # how many; they themselves are in concepts
        self.tune = tune
        tune_backbone(backbone, tune)

        D, N = backbone.width, math.prod(backbone.grid)
        G = self.prototypes[-1] - 1
        self.concepts = nn.ModuleList(
            ConceptLayer(K, D, N, bias_after_softmax, no_bias, no_regions)
            for K in self.prototypes)
        self.fusions = nn.ModuleList(
            Fusion(D, K - 1 if no_fusion else G, fusion_mlp, no_fusion)
            for K in self.prototypes[:-1])
        self.num_unprompted = depth - len(self.fusions)  # blocks before the first concept layer
        self.norm = nn.LayerNorm((G + 1, D))
        self.classifier = nn.Linear(D, num_classes, bias=False)  # shared by the concepts
        for module in self.fusions.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)

    def unprompted(self, images):
        """images -> tokens (B, T, D) before the first concept layer."""
        tokens = self.backbone.embed(images)
        for block in self.backbone.blocks[:self.num_unprompted]:
            tokens = block(tokens)
        return tokens

    def forward(self, images, labels=None, maps_only=False):
        """images (B, 3, S, S) of the backbone's image_size -> Output.

        maps_only: of the output the maps alone will be used, so no graph of the blocks is kept.
        """
        tokens = self.unprompted(images)
        attention, groups, fused = [], [], []
        prompted_blocks = self.backbone.blocks[self.num_unprompted:]
        for concept, fusion, block in zip(self.concepts, self.fusions, prompted_blocks):
            e = self.backbone.normed_patches(tokens).detach()  # sg: maps move no earlier prompt
            a, pooled, mass = concept(e)  # (B, K, N), (B, K, D), (B, K)
            pooled, mass = pooled.detach(), mass.detach()  # sg: a prompt does not move its regions
            prompts, S = fusion(pooled[:, :-1], mass[:, :-1])  # (B, G, D), (B, K-1, G)
            tokens = block(tokens, prompts)
            attention.append(smooth(a).unflatten(2, self.grid))  # raw a is pooled and fused
            if S is not None:  # None under no_fusion
                groups.append(S)
                fused.append(fuse_maps(a, S).unflatten(2, self.grid))

        x = self.backbone.normed_patches(tokens)  # with gradient: the classes are read from it
        if maps_only:
            x = x.detach()
        a, pooled, _ = self.concepts[-1](x, SMOOTHING)  # this layer alone pools smoothed shares
        attention.append(a.unflatten(2, self.grid))
        features = self.norm(pooled)  # (B, G + 1, D), jointly over concepts and width
        concept_logits = to_float32(self.classifier(features[:, :-1]))  # (B, G, C)
        return Output(concept_logits.mean(1), concept_logits, attention, groups, fused, features)

    def parameter_groups(self, args):
        fusions = [*self.fusions.named_parameters()]
        prompt_heads = [p for name, p in fusions if ".head." in name]
        groupings = [p for name, p in fusions if ".head." not in name]  # and the norms beside them
        tuned = [p for p in self.backbone.parameters() if p.requires_grad]
        tuned_rate = args.lr_backbone if self.tune == "all" else args.lr_prototypes
        return [
            dict(params=[*self.norm.parameters(), *groupings], lr=args.lr),
            dict(params=prompt_heads, lr=args.lr_fusion),
            dict(params=[*self.classifier.parameters()], lr=args.lr),
            dict(params=[concept.prototypes for concept in self.concepts], lr=args.lr_prototypes),
            dict(params=[concept.bias for concept in self.concepts], lr=args.lr_bias),
            dict(params=tuned, lr=tuned_rate)]

    @torch.no_grad()
    def start(self, dataset, args):
        """--start clusters. The paper leaves open where prototypes start; the released program
        draws noise, as __init__ does."""
        if args.start == "noise":
            return
        for concept, regions in zip(self.concepts, self.sample_regions(dataset, args.seed)):
            K = len(concept.prototypes)
            concept.prototypes.copy_(cluster_prototypes(*regions, K, args.seed))

    def sample_regions(self, dataset, seed):
        unchanged = [nn.Identity() for _ in self.concepts]
        layers, radius2 = sample_patches(self.backbone, dataset, seed, unchanged)
        return [(e, *find_foreground(e, radius2, seed)) for e in layers]


# ---------------------------------------------------------------- where the prototypes start
# Objects are found in the patches of the unprompted ViT; no label, box or key point is read.
MAX_IMAGES, MAX_PATCHES = 1000, 200_000  # so all of 1,000 images of 14 x 14 patches
NUM_STARTS = 20  # of k-means


@torch.no_grad()
def sample_patches(backbone, dataset, seed, transforms):
    """Patches of up to 1,000 images -> (n, D) for each concept layer, and their radius2 (n).

    transforms: for each layer a function of patches (B, N, D), what its prototypes meet instead.
    radius2 is a patch's squared distance from the middle of its image: 1 at an edge, 2 in a corner.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(dataset), generator=generator)[:MAX_IMAGES].tolist()
    per_image = max(1, MAX_PATCHES // len(chosen))
    y, x = (torch.linspace(-1, 1, side) for side in backbone.grid)
    grid_radius2 = (y[:, None] ** 2 + x ** 2).flatten()  # (N)
    device = backbone.cls_token.device
    samples, radius2 = [[] for _ in transforms], []
    for images, *_ in DataLoader(dataset, 16, sampler=chosen):
        kept = torch.randperm(len(grid_radius2), generator=generator)[:per_image]
        radius2.append(grid_radius2[kept].repeat(len(images)))
        patches = backbone.last_patches(images.to(device), len(transforms))
        for sample, transform, e in zip(samples, transforms, patches):
            sample.append(transform(e)[:, kept].float().flatten(0, 1))
    return [torch.cat(sample) for sample in samples], torch.cat(radius2).to(device)


def find_foreground(e, radius2, seed):
    """Patches e (n, D), their radius2 (n) -> bool (n) twice: which are foreground, and background.

    A principal component tells object from background: of the first three, the one that follows
    radius2 most, since objects keep to the middle. It is cut into three clusters: the inner one is
    foreground, the outer one background, and what lies between is neither. Patches outside the
    circle within the image count as background: some ViTs treat corners specially.
    """
    centred = e - e.mean(0)
    eigenvectors = torch.linalg.eigh(centred.T @ centred).eigenvectors  # eigenvalues ascend
    components = centred @ eigenvectors[:, -3:]  # (n, 3), of arbitrary sign
    outwards = (radius2 - radius2.mean()) @ F.normalize(components, dim=0)  # (3,), as correlations
    best = outwards.abs().argmax()
    component = components[:, best:best + 1] * -torch.sign(outwards[best])  # the middle is high
    low, middle, high = kmeans(component, 3, seed, starts=5).flatten().sort().values
    corner = radius2 > 1
    foreground = (component[:, 0] > (middle + high) / 2) & ~corner
    background = (component[:, 0] < (low + middle) / 2) | corner
    if foreground.sum() < 2:
        raise ValueError("no foreground found in the training images, so prototypes cannot start "
                         "in its clusters; give more images, or take --method ivpt --start noise")
    return foreground, background


def cluster_prototypes(e, foreground, background, K, seed):
    """A layer's entry of sample_regions -> K - 1 centres of the foreground and the background's
    mean, (K, D)."""
    centres = kmeans(e[foreground], K - 1, seed, NUM_STARTS)
    return torch.cat([centres, e[background].mean(0, keepdim=True)])


def kmeans(e, K, seed, starts=NUM_STARTS):
    """Patches e (n, D) -> centres (K, D): the best of several starts on 10,000 of the patches,
    refined on all of them."""
    generator = torch.Generator().manual_seed(seed)
    some = e[torch.randperm(len(e), generator=generator)[:10_000].to(e.device)]
    best, least_spread = None, math.inf
    for _ in range(starts):
        centres = move_to_means(some, distant_patches(some, K, generator))
        spread = squared_distances(some, centres).amin(1).sum().item()
        if spread < least_spread:
            best, least_spread = centres, spread
    return move_to_means(e, best)


def distant_patches(e, K, generator):
    """k-means++ (Arthur, Vassilvitskii 2007): a patch becomes a centre with a probability that
    grows with its squared distance from the nearest centre before it."""
    centres = e[:0]
    nearest = e.new_ones(len(e))
    for _ in range(K):
        if nearest.sum() == 0:  # fewer different patches than centres
            nearest = torch.ones_like(nearest)
        pick = torch.multinomial(nearest.cpu(), 1, generator=generator).to(e.device)
        centres = torch.cat([centres, e[pick]])
        nearest = squared_distances(e, centres).amin(1)
    return centres


def move_to_means(e, centres):
    """Thirty times: a patch belongs to the nearest centre, a centre moves to its patches' mean."""
    for _ in range(30):
        logits = e @ (2 * centres.T) - centres.square().sum(1)  # as in kernels.py
        members = F.one_hot(logits.argmax(1), len(centres)).to(e)  # (n, K)
        sizes = members.sum(0)[:, None]
        means = members.T @ e / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
    return centres


def squared_distances(e, centres):
    """e (n, D), centres (K, D) -> (n, K). Less exact than torch.cdist, and several times faster."""
    products = e @ (2 * centres.T)
    squares = e.square().sum(1, keepdim=True) + centres.square().sum(1)
    return (squares - products).clamp_min(0)


# ---------------------------------------------------------------- weights
URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{folder}/dinov2_{name}_pretrain.pth"
METAS_PARTS = {"cls_token", "pos_embed", "mask_token", "register_tokens", "patch_embed", "blocks",
               "norm"}
ABSENT = torch.empty(0, 0)  # stands for a weight that a file lacks
OTHER_HEADS = {1152, 1280, 1408, 1664}  # widths of SoViT, ViT-H, EVA's g, ViT-bigG: heads of 72 up


def load_backbone(name_or_path, image_size=None):
    """A VisionTransformer with its weights, in fp32 and eval mode.

    name_or_path: a name of ARCHITECTURES or torch.hub ("dinov2_vits14_reg"), downloaded once into
        torch.hub's cache; or a file, whose architecture is read off its shapes (heads: D / 64);
        or "toy", a small new ViT, which train.py pretrains.
    image_size: see VisionTransformer; default: that of the position embedding, 518 for DINOv2.
    Raises ValueError or OSError, one line, where there is no such file or it does not fit.
    """
    name = backbone_name(name_or_path)
    path = Path(name_or_path).expanduser()
    if name == "toy":
        from prepare.toy_vit import new_backbone
        return new_backbone(image_size)
    if name in ARCHITECTURES:
        state = download_weights(name)
    elif path.is_file():
        state = read_file(path, "weights")
    else:
        names = ", ".join(["toy", *ARCHITECTURES])
        raise FileNotFoundError(f"--weights {path}: no such file, and not one of {names}")
    if not in_metas_names(state):
        from prepare.weights import to_metas_names
        state = to_metas_names(state, path)
    return assemble_backbone(state, image_size, f"weights {path}").float().eval()


def in_metas_names(state):
    """Whether a file holds a ViT as Meta writes it: no other source has these parts alone."""
    if not isinstance(state, dict):
        return False
    parts = {str(name).split(".")[0] for name in state}
    return parts | {"register_tokens"} == METAS_PARTS and "blocks.0.ls1.gamma" in state


def backbone_name(name):
    """A key of ARCHITECTURES for torch.hub's names, too: "dinov2_vits14_reg" has four registers."""
    return re.sub("_reg$", "_reg4", str(name).removeprefix("dinov2_"))


def download_weights(name):
    """Meta's state dict of a named backbone (Apache-2.0), from torch.hub's cache or the network."""
    url = URL.format(folder=name.removesuffix("_reg4"), name=name)
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, a login page instead of the file, a full disk
        file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f"weights {name}: could not fetch or read {url} ({reason}); remove {file} if "
                      "it is there and try again, or name a local file by --weights") from None


def read_file(path, what):
    """Tensors and plain values, never code. Raises ValueError or OSError, one line."""
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        from prepare.weights import read_safetensors
        return read_safetensors(path, what)
    # Training checkpoints hold their options, often as a Namespace.
    with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file makes torch raise any of ten kinds
            reason = f"{type(error).__name__} {error}".split("\n")[0][:100]
            raise ValueError(f"{what} {path}: damaged, or not a torch file of tensors "
                             f"({reason}); fetch or write it again") from None


def assemble_backbone(state, image_size, source):
    """The VisionTransformer of a state dict in Meta's names. source: where it is from, for errors.

    It is built without memory of its own and takes over the tensors of the state dict.
    """
    architecture = read_architecture(state)
    if architecture["width"] in OTHER_HEADS or architecture["width"] % 64:
        raise ValueError(f"{source}: a ViT of width {architecture['width']} has heads of another "
                         "width than 64; take a ViT-S, B, L or DINOv2's giant")
    with torch.device("meta"):
        backbone = VisionTransformer(**architecture, image_size=image_size)
    load_state(backbone, state, source, assign=True)
    return backbone


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


def load_state(module, state, source, assign):
    """load_state_dict, strict; its error becomes one line, which names the keys that do not fit."""
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{source}: {line[:300]}; take the file that fits") from None


# ---------------------------------------------------------------- from options, from a checkpoint

def find_method(name):
    """The class of --method NAME."""
    if name == "ivpt":
        return IVPT
    from methods import METHODS
    if name not in METHODS:
        raise ValueError(f"--method {name}: expected ivpt, {', '.join(METHODS)}")
    return METHODS[name]


def build(options, num_classes, backbone):
    """The model that a run's options describe (a dict), on a backbone."""
    method = find_method(options["method"])
    arguments = {name: options[name] for name in IVPT.arguments if name in method.accepts}
    return method(backbone, num_classes, **arguments)


class StoredOptions(dict):
    """The options in a checkpoint. One that an older version of this program lacked is one line."""

    def __missing__(self, name):
        raise ValueError(f"checkpoint {self.path}: has no option {name}, so another version of "
                         "this program wrote it; train again, or take the commit that wrote it")


def load_checkpoint(path):
    """A run's last.pt -> (model in eval mode, checkpoint dict). It needs no other file.

    Raises ValueError or OSError, one line, where train.py did not write it.
    """
    checkpoint = read_file(path, "checkpoint")
    fields = {"options", "classes", "model"}
    if not isinstance(checkpoint, dict) or not fields <= checkpoint.keys():
        raise ValueError(f"checkpoint {path}: not written by train.py; name a run's last.pt")
    options = checkpoint["options"] = StoredOptions(checkpoint["options"])
    options.path = path
    state = checkpoint["model"]
    prefix = "backbone."
    vit = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    if "patch_embed.proj.weight" not in vit:  # older versions left a frozen backbone out
        raise ValueError(f"checkpoint {path}: holds no whole model; train again, or take the "
                         "commit that wrote it")
    backbone = assemble_backbone(vit, options["image_size"], f"checkpoint {path}")
    model = build(options, len(checkpoint["classes"]), backbone)
    load_state(model, state, f"checkpoint {path}", assign=False)
    return model.eval(), checkpoint
