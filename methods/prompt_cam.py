"""Prompt-CAM: every class has a prompt, and its attention shows the class's traits.

    python train.py --method prompt-cam    # Chowdhury et al., CVPR 2025, arXiv 2501.09333

Letters in shapes are those of model.py; J is the number of keys of a block.
Equations count blocks and prompts as in vpt.py.
"""
import torch
from torch.utils.data import DataLoader

from methods.vpt import (
    VPTDeep, attention_weights, finish_block, new_prompts, prompt_maps, run_blocks)
from model import Output, to_float32


class PromptCAM(VPTDeep):
    """Prompt-CAM-Deep: VPT-Deep whose last block has one prompt per class, which yields its score.

        [x_l, _] = block_l([x_{l-1}, P_{l-1}])     before the last block, l < L
        [_, Z] = block_L([x_{L-1}, P])             logit of class c = w . norm(z_c) + b

    P has C prompts, one for each class; the vector w and b are shared. So z_c must find in the
    image what tells c from other classes. The prompts P_{l-1} belong to no class.

    The maps are the attention of the class's prompt in the last block, one map for each head. A
    patch belongs to the head that gives it most, if that is more than an even share. The MLP mixes
    what the heads read before it is scored, so heads have no votes: there are no concept_logits.

    Theirs trains for 130 epochs by SGD with warm-up and a cosine schedule; we take Adam and our
    schedule. All their prompts start as noise, from which P learns nothing in our few epochs. So P
    starts as noise around the mean cls token before the last block, which can read images already.
    P has the rate of w. Every block of theirs has C prompts, our first L - 1 have ten: many random
    prompts make the cls tokens of all images alike.
    """

    rates = dict(lr=1e-2, lr_prototypes=1e-3)
    class_specific = True

    def __init__(self, backbone, num_classes, num_prompts=10):
        super().__init__(backbone, 1, num_prompts)  # one score for each class prompt
        num_blocks = len(backbone.blocks)
        self.prompts = new_prompts(num_blocks - 1, num_prompts, backbone)
        self.class_prompts = new_prompts(1, num_classes, backbone)  # P

    @torch.no_grad()
    def start(self, dataset, args):
        """Adds to P the mean cls token that enters the last block."""
        total = torch.zeros_like(self.class_prompts[0, 0])  # (D)
        for images, *_ in DataLoader(dataset, 16):
            tokens = run_blocks(images.to(total.device), self.backbone, self.prompts)
            total += tokens[:, 0].sum(0)
        self.class_prompts += total / len(dataset)

    @property
    def prototypes(self):
        """The number of channels of the map that is shown: the heads and the background."""
        return (self.backbone.blocks[-1].attn.heads + 1,)

    def forward(self, images, labels=None):
        """images (B, 3, S, S), labels (B) of the prompts to show (None: predictions) -> Output.

        Its features are Z, normalised (B, C, D). It has no concept_logits, groups or fused maps.
        Its map (B, heads + 1, h, w) does not sum to 1; while training there is none.
        """
        tokens = run_blocks(images, self.backbone, self.prompts)
        last = self.backbone.blocks[-1]
        B, T, _ = tokens.shape
        prompts = self.class_prompts.expand(B, -1, -1)  # (B, C, D)
        x = torch.cat([tokens, prompts], dim=1)
        q, k, v = self.heads_of(-1, x)
        q = q[:, :, T:]  # (B, heads, C, 64): the other tokens are not used after this block
        z = self.backbone.norm(finish_block(last, prompts, q, k, v))
        logits = to_float32(self.classifier(z))[..., 0]  # (B, C)
        attention = []
        if not self.training:
            if labels is None:
                labels = logits.argmax(1)
            attention.append(self.class_maps(q, k, labels))
        return Output(logits, None, attention, [], [], z)

    def class_maps(self, q, k, labels):
        """Where the prompts of the labels (B) look with each head, (B, heads + 1, h, w)."""
        images = torch.arange(len(labels), device=q.device)
        q = q[images, :, labels]  # (B, heads, 64): of every image one prompt
        weights = attention_weights(q[:, :, None], k)  # (B, heads, 1, J)
        return prompt_maps(weights[:, :, 0], self.backbone)

    def parameter_groups(self, args):
        class_prompts = dict(params=[self.class_prompts], lr=args.lr)
        return [*super().parameter_groups(args), class_prompts]
