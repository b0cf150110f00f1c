"""Visual prompt tuning: learnable tokens in a frozen ViT (Jia et al. 2022, arXiv 2203.12119).

    python train.py --method vpt-deep          # a linear head on the cls token
    python train.py --method vpt-deep-proto    # IVPT's prototypes on the last patches

Letters in shapes are those of model.py; here G is the number of prompts of a block.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import IVPT, Output, to_float32, tune_backbone


def new_prompts(num_blocks, num_prompts, backbone):
    """Prompts (blocks, G, D), uniform, with the variance that Xavier gives a patch embedding."""
    fan_in = 3 * backbone.patch_size ** 2
    bound = math.sqrt(6 / (fan_in + backbone.width))
    prompts = torch.empty(num_blocks, num_prompts, backbone.width)
    return nn.Parameter(prompts.uniform_(-bound, bound))


# ---------------------------------------------------------------- VPT-Deep

class VPTDeep(nn.Module):
    """VPT-Deep: every block l has prompts P_l of its own; a linear head reads the cls token.

        [x_l, _] = block_l([x_{l-1}, P_l])         logits = head(norm(cls of x_L))

    These are the paper's equations 7 and 8. Nothing ties a prompt to a region. We show where a
    prompt looks: its attention to the patches, mean over the heads, in the last five blocks. A
    patch belongs to the prompt that gives it most attention, if that is more than an even share,
    1 / (T + G). The even share stands for the background.

    The paper searches rate and weight decay with SGD; we train with Adam, as IVPT. At the rate of
    the head, 1e-2, prompts learnt nothing for four epochs, so they learn at that of tuned tokens.
    """

    rates = dict(lr=1e-2, lr_prototypes=2e-4)
    class_specific = False

    def __init__(self, backbone, num_classes, num_prompts=10, tune="none"):
        super().__init__()
        tune_backbone(backbone, tune)
        num_blocks = len(backbone.blocks)
        self.backbone = backbone
        self.tune = tune
        self.grid = backbone.grid
        self.prototypes = (num_prompts + 1,) * min(5, num_blocks)  # of the blocks shown
        self.prompts = new_prompts(num_blocks, num_prompts, backbone)
        self.classifier = nn.Linear(backbone.width, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images):
        """images (B, 3, H, W) -> Output.

        Its features are the cls token (B, 1, D). It has no concept_logits, groups or fused maps.
        Its attention (B, G + 1, h, w) does not sum to 1, and is empty while training.
        """
        blocks = self.backbone.blocks
        first_shown = len(blocks) - len(self.prototypes)
        attention = []
        tokens = self.backbone.embed(images)
        for l, block in enumerate(blocks):
            prompts = self.prompts[l].expand(len(images), -1, -1)  # (B, G, D)
            if not self.training and l >= first_shown:
                attention.append(self.prompt_attention(block, tokens, prompts))
            tokens = block(tokens, prompts)
        cls = self.backbone.norm(tokens[:, :1])  # (B, 1, D)
        logits = to_float32(self.classifier(cls[:, 0]))
        return Output(logits, None, attention, [], [], cls)

    def prompt_attention(self, block, tokens, prompts):
        """Where the prompts (B, G, D) of a block look: (B, G + 1, h, w), the last an even share."""
        T, G = tokens.shape[1], prompts.shape[1]
        everything = torch.cat([block.norm1(tokens), block.norm1(prompts)], dim=1)
        q, k, _ = block.attn.heads_of(everything)  # (B, heads, T + G, 64)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = to_float32(q[:, :, T:]) @ to_float32(k).transpose(2, 3) / 8  # 8 = sqrt(64)
            a = logits.softmax(-1).mean(1)  # (B, G, T + G)
        a = a[:, :, self.backbone.prefix:T]
        even = torch.full_like(a[:, :1], 1 / (T + G))
        return torch.cat([a, even], dim=1).unflatten(2, self.grid)

    def losses(self, images, labels):
        """Cross entropy alone: VPT-Deep has no map to shape."""
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
    makes a prompt. The losses are IVPT's (train.ivpt_losses); region consistency is 0, as nothing
    is fused. Prompts learn from classification and orthogonality alone, since maps see the patches
    through a stop-gradient.
    """

    rates = dict(lr=1e-2, lr_prototypes=2e-4)

    def __init__(self, backbone, num_classes, num_prompts=10, **arguments):
        super().__init__(backbone, num_classes, **dict(arguments, cross_layer=False))
        self.free_prompts = new_prompts(len(backbone.blocks), num_prompts, backbone)

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
            dict(params=[concept.prototypes, self.free_prompts], lr=args.lr_prototypes),
            dict(params=[concept.bias], lr=args.lr_bias),
            dict(params=self.backbone.parameters(), lr=backbone_rate),  # frozen unless tuned
        ]
