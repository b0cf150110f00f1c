"""Prompt-CAM: every class has a prompt, and its attention shows the class's traits.

    python train.py --method prompt-cam    # Chowdhury et al., CVPR 2025, arXiv 2501.09333

Letters in shapes are those of model.py; J is the number of all tokens that a block attends to.
"""
import torch

from baselines.vpt import VPTDeep, attention_weights, prompt_maps, run_block
from model import Output, to_float32


class PromptCAM(VPTDeep):
    """Prompt-CAM-Deep: VPT-Deep with a prompt for each class, which scores that class.

        [x_l, _] = block_l([x_{l-1}, P_l])     before the last block, l < L
        [_, Z] = block_L([x_{L-1}, P_L])       logit of class c = w . norm(z_c) + b

    Every P_l has C prompts. Those of the last block belong to the classes, one to each; the vector
    w and b are shared. So z_c must find in the image what tells c from other classes.

    The maps are the attention of the class's prompt in the last block, one a head. A patch belongs
    to the head that gives it most, if that is more than an even share. The heads' outputs pass an
    MLP before they score, so heads have no votes: there are no concept_logits.

    Theirs trains for 130 epochs by SGD with warm-up and a cosine; we take Adam and our schedule.
    """

    rates = dict(lr=1e-2, lr_prototypes=1e-3)
    class_specific = True

    def __init__(self, backbone, num_classes, tune="none"):
        super().__init__(backbone, 1, num_classes, tune)  # one score for each of C prompts

    @property
    def prototypes(self):
        return (self.backbone.blocks[-1].attn.heads + 1,)

    def forward(self, images, labels=None):
        """images (B, 3, H, W), labels (B) of the prompts to show (None: predictions') -> Output.

        Its features are the prompts' outputs (B, C, D). It has no concept_logits, groups or fused
        maps. Its attention (B, heads + 1, h, w) does not sum to 1, and is empty while training.
        """
        *blocks, last = self.backbone.blocks
        tokens = self.backbone.embed(images)
        B, T, _ = tokens.shape
        for block, prompts in zip(blocks, self.prompts):
            tokens = block(tokens, prompts.expand(B, -1, -1))
        prompts = self.prompts[-1].expand(B, -1, -1)  # (B, C, D)
        x = torch.cat([tokens, prompts], dim=1)
        q, k, v = last.attn.heads_of(last.norm1(x))
        q = q[:, :, T:]  # (B, heads, C, 64): what becomes of the other tokens is not read
        z = self.backbone.norm(run_block(last, prompts, q, k, v))
        logits = to_float32(self.classifier(z))[..., 0]  # (B, C)
        attention = []
        if not self.training:
            if labels is None:
                labels = logits.argmax(1)
            each = torch.arange(B, device=q.device)
            shown = q[each, :, labels]  # (B, heads, 64)
            weights = attention_weights(shown[:, :, None], k)  # (B, heads, 1, J)
            attention.append(prompt_maps(weights[:, :, 0], self.backbone))
        return Output(logits, None, attention, [], [], z)
