"""The small ViT of the drawn birds, which has no file of weights (train.py --weights toy).

It is pretrained on the birds themselves: cls learns the species, and every patch the mean colour
around it. Without the colours, patches would tell the species instead of the part that they show.
None of this is in the paper: DINOv2 comes pretrained.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from model import VisionTransformer

ARCHITECTURE = dict(width=128, depth=6, patch_size=8, pos_grid=14)


def new_backbone(image_size=None):
    """The ViT with random weights, in eval mode. image_size: default 112."""
    return VisionTransformer(**ARCHITECTURE, image_size=image_size).eval()


def pretrain(backbone, dataset, epochs, device, amp, workers, batch_size=16):
    """Trains all of a VisionTransformer in place, and freezes it. Every process does the same.

    dataset: data.Images in the training view; its seed decides order and augmentation;
    the heads start from torch's global generator.
    amp: bf16 autocast; workers: loader processes.
    """
    D, patch = backbone.width, backbone.patch_size
    class_head = nn.Linear(D, len(dataset.classes)).to(device)
    colour_head = nn.Linear(D, 3).to(device)
    heads = [*class_head.parameters(), *colour_head.parameters()]
    backbone.requires_grad_(True)
    optimizer = torch.optim.Adam([dict(params=backbone.parameters(), lr=1e-3),
                                  dict(params=heads, lr=3e-3)], fused=True)
    batch_size = min(batch_size, len(dataset))
    num_steps = epochs * (len(dataset) // batch_size)

    def warm_up_then_decay(step):
        return min(1, step / 40) * (1 - step / num_steps)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_decay)
    order = torch.Generator().manual_seed(dataset.seed)
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True,
                        num_workers=workers, generator=order)
    for epoch in tqdm(range(epochs), "pretraining the toy ViT", disable=None, leave=False):
        dataset.epoch = epoch
        losses = []
        for images, labels, _, _ in loader:
            images, labels = images.to(device), labels.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                tokens = backbone(images)  # (B, prefix + N, D)
                logits = class_head(tokens[:, 0])
                guesses = colour_head(tokens[:, backbone.prefix:])  # (B, N, 3)
            colours = F.avg_pool2d(images, 3 * patch, stride=patch, padding=patch,
                                   count_include_pad=False)  # (B, 3, h, w), of 3 x 3 patches
            loss = F.cross_entropy(logits.float(), labels)
            loss = loss + F.mse_loss(guesses.float(), colours.flatten(2).transpose(1, 2))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(backbone.parameters(), 2.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        data.say_once(f"pretraining the toy ViT, epoch {epoch + 1} of {epochs}: loss {mean:.3f}")
    backbone.requires_grad_(False).eval()
