"""Visual prompt tuning: learnable tokens in a frozen ViT (Jia et al. 2022, arXiv 2203.12119).

    python train.py --method vpt-deep          # a linear head on the cls token
    python train.py --method vpt-deep-proto    # IVPT's prototypes on the last patches
    python train.py --method e2vpt             # more keys and values, fewer prompts: 2307.13770
    python train.py --method gated-vpt         # the same prompts in all blocks, gated: 2306.05067

Letters in shapes are those of model.py; here G is the number of prompts of a block, J that of all
tokens that a block attends to.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from model import IVPT, Output, to_float32, tune_backbone


# ---------------------------------------------------------------- what the methods share

def new_prompts(num_blocks, num_prompts, backbone):
    """Prompts (blocks, G, D), uniform, with the variance that Xavier gives a patch embedding."""
    fan_in = 3 * backbone.patch_size ** 2
    bound = math.sqrt(6 / (fan_in + backbone.width))
    prompts = torch.empty(num_blocks, num_prompts, backbone.width)
    return nn.Parameter(prompts.uniform_(-bound, bound))


def run_block(block, x, q, k, v):
    """What a block makes of x (B, T, D), by the queries of x and keys and values of J tokens."""
    x = x + block.ls1(block.attn.attend(q, k, v))
    return x + block.ls2(block.mlp(block.norm2(x)))


def attention_weights(q, k):
    """softmax(q k^T / 8) in fp32, of q (..., T, 64), k (..., J, 64): (..., T, J)."""
    with torch.autocast(q.device.type, enabled=False):
        logits = to_float32(q) @ to_float32(k).transpose(-1, -2)
        return (logits / 8).softmax(-1)  # 8 = sqrt(64)


def prompt_maps(weights, backbone):
    """Attention (B, K, J) to all tokens, the ViT's own first -> its maps (B, K + 1, h, w).

    The last map, the background, is an even share of the attention, 1 / J.
    """
    J = weights.shape[2]
    first = backbone.prefix
    end = first + math.prod(backbone.grid)
    patches = weights[:, :, first:end]
    even = torch.full_like(patches[:, :1], 1 / J)
    return torch.cat([patches, even], dim=1).unflatten(2, backbone.grid)


# ---------------------------------------------------------------- VPT-Deep

class VPTDeep(nn.Module):
    """VPT-Deep: every block l has prompts P_l of its own; a linear head reads the cls token.

        [x_l, _] = block_l([x_{l-1}, P_l])         logits = head(norm(cls of x_L))

    These are the paper's equations 7 and 8. Nothing ties a prompt to a region. We show where a
    prompt looks: its attention to the patches, mean over the heads, in the last five blocks. A
    patch belongs to the prompt that gives it most attention, if that is more than an even share.

    The paper searches rate and weight decay with SGD; we train with Adam, as IVPT. The head's rate
    is a tenth of IVPT's, as the cls token is long.
    """

    rates = dict(lr=1e-3, lr_prototypes=1e-3)
    class_specific = False

    def __init__(self, backbone, num_classes, num_prompts=10, tune="none"):
        super().__init__()
        tune_backbone(backbone, tune)
        self.backbone = backbone
        self.tune = tune
        self.grid = backbone.grid
        num_blocks = len(backbone.blocks)
        self.num_shown = min(5, num_blocks)
        self.prompts = new_prompts(num_blocks, num_prompts, backbone)
        self.classifier = nn.Linear(backbone.width, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    @property
    def prototypes(self):
        """Of each block that is shown: the number of prompts, and one for the background."""
        num_prompts = self.prompts.shape[1]
        return (num_prompts + 1,) * self.num_shown

    def heads_of(self, l, x):
        """Queries, keys, values of block l for x (B, T + G, D), the tokens before the prompts."""
        block = self.backbone.blocks[l]
        return block.attn.heads_of(block.norm1(x))

    def forward(self, images):
        return self.read(images, self.prompts)

    def read(self, images, prompts):
        """images (B, 3, H, W), prompts of each block (G, D) or (B, G, D) -> Output.

        Its features are the cls token (B, 1, D). It has no concept_logits, groups or fused maps.
        Its attention (B, G + 1, h, w) does not sum to 1, and is empty while training.
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
            tokens = run_block(block, tokens, q[:, :, :T], k, v)  # prompts end here
        return self.output(tokens, attention)

    def output(self, tokens, attention):
        cls = self.backbone.norm(tokens[:, :1])  # (B, 1, D)
        logits = to_float32(self.classifier(cls[:, 0]))
        return Output(logits, None, attention, [], [], cls)

    def losses(self, images, labels):
        """Cross entropy alone: nothing shapes a map."""
        logits = self(images).logits
        return {"classification": F.cross_entropy(logits, labels)}, logits

    def parameter_groups(self, args):
        backbone_rate = args.lr_backbone if self.tune == "all" else args.lr_prototypes
        return [
            dict(params=self.classifier.parameters(), lr=args.lr),
            dict(params=[self.prompts], lr=args.lr_prototypes),
            dict(params=self.backbone.parameters(), lr=backbone_rate),  # frozen unless tuned
        ]


# ---------------------------------------------------------------- VPT-Deep with prototypes

class VPTDeepPrototypes(IVPT):
    """VPT-Deep with prototypes, the strongest baseline of IVPT's paper.

    Every block has free prompts, and IVPT's last concept layer reads what comes out. No concept
    makes a prompt. Prompts learn from classification and orthogonality alone, since maps see the
    patches through a stop-gradient. They learn at --lr-fusion, as what makes prompts in IVPT.

    What differs from IVPT's last layer was found on cached patches of the unprompted ViT. Map
    losses weigh a fifth, as there they are averaged over five layers. Total variation is left out:
    the background took 95 % of the patches. Without entropy, validation accuracy rose from 69.5 to
    76.6 (three seeds). With prototypes from N(0, 0.05^2) it was 68.4. Nothing is fused.
    """

    rates = dict(lr=1e-2, lr_prototypes=2e-4, lr_fusion=1e-3)
    loss_weights = dict(classification=1.0, presence=0.2, background_presence=0.2,
                        equivariance=0.2, orthogonality=1.0)

    def __init__(self, backbone, num_classes, num_prompts=10, **arguments):
        super().__init__(backbone, num_classes, **dict(arguments, cross_layer=False))
        self.free_prompts = new_prompts(len(backbone.blocks), num_prompts, backbone)
        nn.init.normal_(self.concepts[0].prototypes, std=0.01)

    def unprompted(self, images):
        """images -> tokens (B, T, D) after the last block; prompts are dropped after each block."""
        tokens = self.backbone.embed(images)
        for block, prompts in zip(self.backbone.blocks, self.free_prompts):
            tokens = block(tokens, prompts.expand(len(images), -1, -1))
        return tokens

    def parameter_groups(self, args):
        concept = self.concepts[0]
        backbone_rate = args.lr_backbone if self.tune == "all" else args.lr_prototypes
        return [
            dict(params=[*self.classifier.parameters(), *self.norm.parameters()], lr=args.lr),
            dict(params=[self.free_prompts], lr=args.lr_fusion),
            dict(params=[concept.prototypes], lr=args.lr_prototypes),
            dict(params=[concept.bias], lr=args.lr_bias),
            dict(params=self.backbone.parameters(), lr=backbone_rate),  # frozen unless tuned
        ]


# ---------------------------------------------------------------- E2VPT

class E2VPT(VPTDeep):
    """E2VPT (Han et al. 2023): VPT-Deep with prompts among keys and values, and fewer prompts.

        attention of a head = softmax(q [k, R]^T / 8) [v, R]       R: five vectors of that head

    Every block has its R. Keys and values share it, as in the authors' runs for CUB. The prompts
    are pruned after a first stage. A mask multiplies them: a factor for each token, and one for
    each of its 16 segments, the same in all blocks. The importance of a factor f, at f = 1, is
    E |dL/df|, the mean over the training images. The least important tokens go, and the least
    important segments of each. Prompts and R are rewound to their first values and trained again.

    The authors search how much goes, 10 to 90 %; here it is one token in five and four segments
    in sixteen. Their stages have 100 epochs each, our first has four, or half of a short run. Our
    head and the fall of the rates go on, theirs start anew. Their program differs from their paper:
    it averages dL/df with its sign, a segment is every 16th channel, a token that goes stays as 0.
    """

    rates = dict(lr=1e-3, lr_prototypes=1e-3)
    num_segments = 16
    pruned_tokens, pruned_segments = 1, 4

    def __init__(self, backbone, num_classes, num_prompts=5, tune="none"):
        super().__init__(backbone, num_classes, num_prompts, tune)
        num_blocks = len(backbone.blocks)
        heads = backbone.width // 64
        key_values = torch.empty(num_blocks, heads, 5, 64)
        bound = math.sqrt(6 / (5 * 64))  # Kaiming's
        self.key_values = nn.Parameter(key_values.uniform_(-bound, bound))  # R
        self.register_buffer("mask", torch.ones(num_prompts, self.num_segments))
        self.register_buffer("first_prompts", self.prompts.detach().clone())
        self.register_buffer("first_key_values", self.key_values.detach().clone())

    @property
    def prototypes(self):
        num_kept = int(self.mask.any(1).sum())
        return (num_kept + 1,) * self.num_shown

    def heads_of(self, l, x):
        q, k, v = super().heads_of(l, x)
        R = self.key_values[l].to(k.dtype)
        R = R.expand(len(x), -1, -1, -1)  # (B, heads, 5, 64)
        k = torch.cat([k, R], dim=2)
        v = torch.cat([v, R], dim=2)
        return q, k, v

    def forward(self, images):
        kept = self.mask.any(1)
        prompts = self.masked(self.mask)[:, :, kept]
        return self.read(images, prompts)

    def masked(self, mask):
        """The prompts of all blocks times a mask (G, 16) or (B, G, 16): (blocks, 1 or B, G, D)."""
        channels = self.backbone.width // self.num_segments
        return self.prompts[:, None] * mask.repeat_interleave(channels, dim=-1)

    def after_epoch(self, epoch, epochs, dataset):
        if epoch + 1 == min(4, epochs // 2):
            self.prune(*self.importance(dataset))

    def importance(self, dataset):
        """Of the prompts (G) and their segments (G, 16), summed over the images of the dataset."""
        device = self.mask.device
        segments = torch.zeros_like(self.mask)
        tokens = torch.zeros_like(self.mask[:, 0])
        for images, labels, *_ in DataLoader(dataset, 16):
            B = len(images)
            masks = self.mask.new_ones(B, *self.mask.shape)  # (B, G, 16)
            masks.requires_grad_()
            logits = self.read(images.to(device), self.masked(masks)).logits
            loss = F.cross_entropy(logits, labels.to(device), reduction="sum")
            gradient, = torch.autograd.grad(loss, masks)  # of every image by its own mask
            segments += gradient.abs().sum(0)
            # A token's factor multiplies all its segments: its derivative is the sum of theirs.
            tokens += gradient.sum(2).abs().sum(0)
        return tokens, segments

    @torch.no_grad()
    def prune(self, tokens, segments):
        """Sets the mask by the importance of prompts (G) and segments (G, 16), and rewinds."""
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

        [x_l, Z_l] = block_l([x_{l-1}, P_{l-1}]; t_l),   attention = softmax(q k^T / (8 t_l))
        P_l = g_l Z_l + (1 - g_l) P_{l-1}                g_l = sigmoid(gate_l)

    P_0 is learnt, and so are a gate and a temperature t_l for every block. Gates start at -5, so
    that prompts reach all blocks almost as they are; a gate opens where a block should change
    them. t_l starts at 1, stays in 0.01 to 10, and holds for all tokens of the block, as in the
    authors' program. After the last block nobody reads prompts, so it has no gate.

    We show where prompts look in the last five blocks that have a gate: what they take in of it is
    the gate times their attention. The head reads the cls token, as theirs does with MoCo v3.

    They take 100 prompts for CUB, we take ten, as for VPT-Deep. Gates have ten times the rate of
    the head: they have far to go.
    """

    rates = dict(lr=1e-3, lr_prototypes=1e-3)

    def __init__(self, backbone, num_classes, num_prompts=10, tune="none"):
        super().__init__(backbone, num_classes, num_prompts, tune)
        num_blocks = len(backbone.blocks)
        self.num_shown = min(5, num_blocks - 1)
        self.prompts = new_prompts(1, num_prompts, backbone)  # P_0
        self.gates = nn.Parameter(torch.full((num_blocks - 1,), -5.0))
        self.temperatures = nn.Parameter(torch.ones(num_blocks))

    def forward(self, images):
        """images (B, 3, H, W) -> Output, as VPT-Deep's."""
        first_shown = len(self.gates) - self.num_shown
        attention = []
        tokens = self.backbone.embed(images)
        B, T, _ = tokens.shape
        prompts = self.prompts.expand(B, -1, -1)
        for l, block in enumerate(self.backbone.blocks):
            x = torch.cat([tokens, prompts], dim=1)
            q, k, v = self.heads_of(l, x)
            x = run_block(block, x, q, k, v)
            tokens = x[:, :T]
            if l == len(self.gates):  # the last block
                break
            gate = self.gates[l].sigmoid()
            prompts = gate * x[:, T:] + (1 - gate) * prompts
            if not self.training and l >= first_shown:
                weights = attention_weights(q[:, :, T:], k).mean(1)  # (B, G, J)
                attention.append(prompt_maps(gate * weights, self.backbone))
        return self.output(tokens, attention)

    def heads_of(self, l, x):
        q, k, v = super().heads_of(l, x)
        return q / self.temperatures[l].clamp(0.01, 10), k, v

    def parameter_groups(self, args):
        gates = dict(params=[self.gates], lr=10 * args.lr)
        temperatures = dict(params=[self.temperatures], lr=args.lr)
        return [*super().parameter_groups(args), gates, temperatures]
