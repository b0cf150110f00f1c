"""Visual prompt tuning: learnable tokens in a frozen ViT (Jia et al. 2022, arXiv 2203.12119).

    python train.py --method vpt-deep          # a linear head on the cls token
    python train.py --method vpt-deep-proto    # IVPT's prototypes on the last patches
    python train.py --method e2vpt             # more keys and values, fewer prompts: 2307.13770
    python train.py --method gated-vpt         # the same prompts in all blocks, gated: 2306.05067

Letters in shapes are those of model.py. Here G is the number of prompts of a block, J that of its
keys: tokens, prompts and, in E2VPT, R. Equations count blocks from 1 to L as
the papers do, code from 0: block_l is blocks[l - 1], and P_{l-1}, which it gets, is prompts[l - 1].
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from model import IVPT, PROTOTYPES, Method, Output, to_float32


# ---------------------------------------------------------------- what the methods share

def new_prompts(num_blocks, num_prompts, backbone):
    """Prompts (blocks, G, D), uniform within Xavier's bound of a patch embedding."""
    fan_in = 3 * backbone.patch_size ** 2
    bound = math.sqrt(6 / (fan_in + backbone.width))
    prompts = torch.empty(num_blocks, num_prompts, backbone.width)
    return nn.Parameter(prompts.uniform_(-bound, bound))


def run_blocks(images, backbone, prompts):
    """images (B, 3, S, S), prompts (n, G, D) -> tokens (B, T, D) after the first n blocks.

    Every block attends to prompts of its own, which are dropped after it.
    """
    B = len(images)
    tokens = backbone.embed(images)
    for block, own_prompts in zip(backbone.blocks, prompts):
        tokens = block(tokens, own_prompts.expand(B, -1, -1))
    return tokens


def finish_block(block, x, q, k, v):
    """The rest of a block, for tokens x (B, T, D) with queries q; k and v have J rows."""
    x = x + block.ls1(block.attn.attend(q, k, v))
    return x + block.ls2(block.mlp(block.norm2(x)))


def attention_weights(q, k):
    """softmax(q k^T / 8) in fp32, of q (..., T, 64), k (..., J, 64): (..., T, J)."""
    with torch.autocast(q.device.type, enabled=False):
        logits = to_float32(q) @ to_float32(k).transpose(-1, -2)
        return (logits / 8).softmax(-1)  # 8 = sqrt(64)


def prompt_maps(weights, backbone):
    """Attention of prompts or heads to all keys (B, G, J) -> to the patches (B, G + 1, h, w).

    The last map stands for the background: it is everywhere an even share of attention, 1 / J.
    """
    J = weights.shape[2]
    first = backbone.prefix
    end = first + math.prod(backbone.grid)
    patches = weights[:, :, first:end]
    even = torch.full_like(patches[:, :1], 1 / J)
    return torch.cat([patches, even], dim=1).unflatten(2, backbone.grid)


# ---------------------------------------------------------------- VPT-Deep

class VPTDeep(Method):
    """VPT-Deep: every block has prompts of its own; a linear head reads the cls token.

        [x_l, _] = block_l([x_{l-1}, P_{l-1}])         logits = head(norm(cls of x_L))

    These are the paper's equations 7 and 8; our x_l holds cls and patches. Nothing ties a prompt to
    a region. We show where a prompt looks: its attention to the patches, mean over the heads. A
    patch belongs to the prompt that gives it most attention, if that is more than an even share.
    Like IVPT we show five layers: the last five blocks.

    The paper searches rate, weight decay and number of prompts, with SGD. We take ten prompts, and
    Adam as for IVPT. The head's rate is a tenth of IVPT's: it reads the cls token as the ViT's norm
    leaves it, which can be several times as long as IVPT's features.
    """

    rates = dict(lr=1e-3, lr_prototypes=5e-3)
    accepts = ("lr_prototypes",)  # the rate of the prompts

    def __init__(self, backbone, num_classes, num_prompts=10):
        super().__init__(backbone)
        num_blocks = len(backbone.blocks)
        self.num_shown = min(5, num_blocks)
        self.prompts = new_prompts(num_blocks, num_prompts, backbone)
        self.classifier = nn.Linear(backbone.width, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    @property
    def prototypes(self):
        """The number of channels of each map that is shown: the prompts and the background."""
        num_prompts = self.prompts.shape[1]
        return (num_prompts + 1,) * self.num_shown

    def forward(self, images, labels=None):
        """images (B, 3, S, S) -> Output; labels change nothing, as no prompt belongs to a class."""
        return self.read(images, self.prompts)

    def read(self, images, prompts):
        """images (B, 3, S, S), for each block prompts (G, D) or (B, G, D) -> Output.

        Its features are the cls token (B, 1, D). It has no concept_logits, groups or fused maps.
        Its maps (B, G + 1, h, w) do not sum to 1; while training there are none.
        """
        blocks = self.backbone.blocks
        first_shown = len(blocks) - self.num_shown
        attention = []
        tokens = self.backbone.embed(images)
        B, T, _ = tokens.shape
        for l, block in enumerate(blocks):
            own_prompts = prompts[l].expand(B, -1, -1)  # (B, G, D)
            x = torch.cat([tokens, own_prompts], dim=1)
            q, k, v = self.heads_of(l, x)  # (B, heads, T + G, 64)
            if not self.training and l >= first_shown:
                weights = attention_weights(q[:, :, T:], k).mean(1)  # (B, G, J)
                attention.append(prompt_maps(weights, self.backbone))
            tokens = finish_block(block, tokens, q[:, :, :T], k, v)  # without prompts
        return self.output(tokens, attention)

    def heads_of(self, l, x):
        """Queries, keys and values of blocks[l] for x (B, T + G, D): tokens, then prompts."""
        block = self.backbone.blocks[l]
        return block.attn.heads_of(block.norm1(x))

    def output(self, tokens, attention):
        """Tokens (B, T, D) after the last block, maps -> Output."""
        cls = self.backbone.norm(tokens[:, :1])  # (B, 1, D)
        logits = to_float32(self.classifier(cls[:, 0]))
        return Output(logits, None, attention, [], [], cls)

    def losses(self, images, labels, theta):
        """Cross entropy alone: no loss shapes a map."""
        logits = self(images).logits
        loss = F.cross_entropy(logits, labels)
        return dict(classification=loss, loss=loss), logits

    def parameter_groups(self, args):
        return [
            dict(params=[*self.classifier.parameters()], lr=args.lr),
            dict(params=[self.prompts], lr=args.lr_prototypes)]


# ---------------------------------------------------------------- VPT-Deep with prototypes

class VPTDeepPrototypes(IVPT):
    """VPT-Deep with prototypes: VPT-Deep's prompts, and IVPT's last concept layer on the patches.

    It is the strongest baseline of IVPT's paper. Here prompts are free: no concept makes them.
    Classification and orthogonality alone train them, since maps see the patches through a
    stop-gradient. Their rate is --lr-fusion, that of IVPT's fusion heads, which make its prompts.

    Of IVPT's losses it has those in loss_weights. A map loss weighs a fifth, since IVPT takes its
    mean over five layers. Total variation is left out: with it the background took nearly all
    patches. Without entropy, and with prototypes that start at N(0, 0.01^2) instead of
    N(0, 0.05^2), it classifies better. There are no fused maps, so no region consistency.
    """

    rates = dict(lr=1e-2, lr_prototypes=2e-4, lr_fusion=3e-4)
    accepts = ("bias_after_softmax", "no_bias", "no_regions", "lr_prototypes", "lr_fusion",
               "lr_bias")
    loss_weights = dict(classification=1.0, presence=0.2, background_presence=0.2,
                        equivariance=0.2, orthogonality=1.0)

    def __init__(self, backbone, num_classes, num_prompts=10, **arguments):
        super().__init__(backbone, num_classes, PROTOTYPES[-1:], **arguments)  # one layer
        self.free_prompts = new_prompts(len(backbone.blocks), num_prompts, backbone)
        nn.init.normal_(self.concepts[0].prototypes, std=0.01)

    sample_regions = Method.sample_regions  # prototypes start as noise: there are no clusters

    def start(self, dataset, args):
        """Nothing: prototypes are noise already."""

    def unprompted(self, images):
        """images -> tokens (B, T, D) before the concept layer, prompted by free prompts alone."""
        return run_blocks(images, self.backbone, self.free_prompts)

    def losses(self, images, labels, theta):
        """IVPT's losses that have a weight."""
        all_losses, logits = super().losses(images, labels, theta)
        losses = {}
        for name, weight in self.loss_weights.items():
            losses[name] = weight * all_losses[name]
        losses["loss"] = sum(losses.values())
        return losses, logits

    def parameter_groups(self, args):
        concept = self.concepts[0]
        head = [*self.classifier.parameters(), *self.norm.parameters()]
        return [
            dict(params=head, lr=args.lr),
            dict(params=[self.free_prompts], lr=args.lr_fusion),
            dict(params=[concept.prototypes], lr=args.lr_prototypes),
            dict(params=[concept.bias], lr=args.lr_bias)]


# ---------------------------------------------------------------- E2VPT

class E2VPT(VPTDeep):
    """E2VPT (Han et al. 2023): VPT-Deep with more keys and values, and with fewer prompts.

        attention of a head = softmax(q [k, R]^T / 8) [v, R]       R: five vectors of that head

    Every block has an R, which serves as keys and as values, as in their program. After a first
    stage prompts are pruned: a mask multiplies them, a factor for each token and one for each of
    its 16 segments, the same in all blocks. The importance of a factor f, at f = 1, is E |dL/df|
    over the training images. The least important token is pruned, and the four least important
    segments of every other token. Prompts and R are rewound to their first values and trained
    again.

    The authors search how many are pruned, 10 to 90 %. Their stages have 100 epochs each. Our first
    has four, or half of a run below eight; a run of one epoch prunes nothing. Then our head, Adam's
    moments and the schedule of the rates continue; theirs start anew. Their program differs from
    their paper, which we follow: it trains the factors and averages dL/df with its sign, a segment
    is every 16th channel, and a pruned token stays as 0.
    """

    has_stages = True
    num_segments = 16
    pruned_tokens, pruned_segments = 1, 4

    def __init__(self, backbone, num_classes, num_prompts=5):
        super().__init__(backbone, num_classes, num_prompts)
        num_blocks = len(backbone.blocks)
        heads = backbone.width // 64
        key_values = torch.empty(num_blocks, heads, 5, 64)
        bound = math.sqrt(6 / (5 * 64))  # Kaiming's, as theirs
        self.key_values = nn.Parameter(key_values.uniform_(-bound, bound))  # R
        self.register_buffer("mask", torch.ones(num_prompts, self.num_segments))
        self.register_buffer("first_prompts", self.prompts.detach().clone())
        self.register_buffer("first_key_values", self.key_values.detach().clone())

    @property
    def prototypes(self):
        num_kept = int(self.mask.any(1).sum())
        return (num_kept + 1,) * self.num_shown

    def forward(self, images, labels=None):
        """images (B, 3, S, S) -> Output, as VPT-Deep's; G is the number of tokens that are kept."""
        prompts = self.masked_prompts(self.mask)
        return self.read(images, prompts[:, :, self.mask.any(1)])

    def masked_prompts(self, mask):
        """The prompts of all blocks times a mask (G, 16) or (B, G, 16): (blocks, 1 or B, G, D)."""
        channels = self.backbone.width // self.num_segments
        return self.prompts[:, None] * mask.repeat_interleave(channels, dim=-1)

    def heads_of(self, l, x):
        """As VPT-Deep's, with R after the keys and after the values."""
        q, k, v = super().heads_of(l, x)
        R = self.key_values[l].to(k.dtype)
        R = R.expand(len(x), -1, -1, -1)  # (B, heads, 5, 64)
        k = torch.cat([k, R], dim=2)
        v = torch.cat([v, R], dim=2)
        return q, k, v

    def after_epoch(self, epoch, epochs, dataset):
        if epoch + 1 == min(4, epochs // 2):
            self.prune(*self.importance(dataset))

    def importance(self, dataset):
        """Of the prompts (G) and their segments (G, 16): the sum of |dL/df| over the dataset."""
        device = self.mask.device
        segments = torch.zeros_like(self.mask)
        tokens = torch.zeros_like(self.mask[:, 0])
        for images, labels, *_ in DataLoader(dataset, 16):
            masks = torch.ones_like(self.mask).repeat(len(images), 1, 1)  # (B, G, 16)
            masks.requires_grad_()
            prompts = self.masked_prompts(masks)
            logits = self.read(images.to(device), prompts).logits
            loss = F.cross_entropy(logits, labels.to(device), reduction="sum")
            gradient = torch.autograd.grad(loss, masks)[0]
            segments += gradient.abs().sum(0)
            # A token's factor multiplies all its segments: its derivative is the sum of theirs.
            tokens += gradient.sum(2).abs().sum(0)
        return tokens, segments

    @torch.no_grad()
    def prune(self, tokens, segments):
        """Sets the mask by the importance of prompts (G) and of segments (G, 16); rewinds."""
        least_segments = segments.argsort(dim=1)[:, :self.pruned_segments]
        least_tokens = tokens.argsort()[:self.pruned_tokens]
        self.mask.fill_(1)
        self.mask.scatter_(1, least_segments, 0)
        self.mask[least_tokens] = 0
        self.prompts.copy_(self.first_prompts)
        self.key_values.copy_(self.first_key_values)

    def parameter_groups(self, args):
        key_values = dict(params=[self.key_values], lr=args.lr_prototypes)
        return [*super().parameter_groups(args), key_values]


# ---------------------------------------------------------------- gated prompt tuning

class GatedVPT(VPTDeep):
    """Gated prompt tuning (Yoo et al., ICML 2023): the same prompts go through all blocks.

        [x_l, Z_l] = block_l([x_{l-1}, P_{l-1}])       its attention: softmax(q k^T / (8 t_l)) v
        P_l = g_l Z_l + (1 - g_l) P_{l-1}              g_l = sigmoid(gate_l)

    P_0 is learnt, and so are the gate and the temperature t_l of every block. Gates start at -5,
    so prompts reach all blocks almost as they are; a gate opens where a block should change them.
    t_l starts at 1, is clamped to [0.01, 10] where it is used, and holds for all tokens of the
    block, as in the authors' program. The last block has no gate, as its prompts are not used.

    A map is the gate times the attention: what a prompt takes in from a patch. Where a gate stays
    closed, all is background. We show the last five blocks that have a gate. The head reads the cls
    token, as theirs does with MoCo v3; with MAE theirs reads the mean of all other tokens.

    They take 100 prompts for CUB, with dropout, and train by SGD with a cosine schedule. We take
    ten, no dropout, and Adam, as for VPT-Deep. Temperatures have the rate of the head, gates ten
    times that: they start far from where they open.
    """

    def __init__(self, backbone, num_classes, num_prompts=10):
        super().__init__(backbone, num_classes, num_prompts)
        num_blocks = len(backbone.blocks)
        self.num_shown = min(5, num_blocks - 1)
        self.prompts = new_prompts(1, num_prompts, backbone)  # P_0
        self.gates = nn.Parameter(torch.full((num_blocks - 1,), -5.0))
        self.temperatures = nn.Parameter(torch.ones(num_blocks))

    def forward(self, images, labels=None):
        """images (B, 3, S, S) -> Output, as VPT-Deep's."""
        first_shown = len(self.gates) - self.num_shown
        attention = []
        tokens = self.backbone.embed(images)
        B, T, _ = tokens.shape
        prompts = self.prompts.expand(B, -1, -1)
        for l, block in enumerate(self.backbone.blocks):
            x = torch.cat([tokens, prompts], dim=1)
            q, k, v = self.heads_of(l, x)
            q = q / self.temperatures[l].clamp(0.01, 10)
            x = finish_block(block, x, q, k, v)  # (B, T + G, D)
            tokens = x[:, :T]
            if l == len(self.gates):  # the last block
                break
            gate = self.gates[l].sigmoid()
            Z = x[:, T:]
            prompts = gate * Z + (1 - gate) * prompts
            if not self.training and l >= first_shown:
                weights = attention_weights(q[:, :, T:], k).mean(1)  # (B, G, J)
                attention.append(prompt_maps(gate * weights, self.backbone))
        return self.output(tokens, attention)

    def parameter_groups(self, args):
        gates = dict(params=[self.gates], lr=10 * args.lr)
        temperatures = dict(params=[self.temperatures], lr=args.lr)
        return [*super().parameter_groups(args), gates, temperatures]
