"""Parts: cluster once, then vote. Ours, not the paper's; how it was found: docs/tuned.md.

    python train.py --method parts
    python train.py --data FOLDER --image-size 224 --method parts

Concepts are k-means clusters of the frozen ViT's patches. They are found before the first step and
never trained: no prompt, no loss on maps. Each concept of all layers then votes for the classes, by
weights of its own, and the mean decides. Letters in shapes are those of model.py; V is the number
of all concepts that vote, the sum of K - 1 over the layers.
"""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from model import (
    PROTOTYPES, Method, Output, cluster_prototypes, find_foreground, sample_patches, to_float32)


class Clusters(nn.Module):
    """The K prototypes of a layer, the background last, and the votes of its K - 1 concepts.

    Prototypes meet patches relative to the object in their image. What all patches of an object
    have in common, such as species and light, is gone; what is left tells its parts. The shares:

        a_k = softmax over k of -|e - q_k|^2 / (2 sqrt(D))       e = relative(patches)

    A concept's feature is the mean of the patches themselves over its region, weighted by a_k. It
    is whitened by the training images: its mean is subtracted, and directions of small variance are
    scaled up, so that a vote can follow them.
    """

    def __init__(self, K, width, grid, num_classes):
        super().__init__()
        self.grid = grid
        self.register_buffer("prototypes", torch.zeros(K, width))
        self.register_buffer("means", torch.zeros(2, width))  # directions: of objects, of all else
        self.register_buffer("feature_mean", torch.zeros(K - 1, width))
        self.register_buffer("whitening", torch.zeros(K - 1, width, width))
        self.votes = nn.Parameter(torch.zeros(K - 1, width, num_classes))

    def directions(self, patches):
        """Patches (B, N, D), each averaged with its neighbours and brought to length sqrt(D)."""
        maps = to_float32(patches).transpose(1, 2)  # (B, D, N)
        maps = maps.unflatten(2, self.grid)  # (B, D, h, w)
        maps = F.pad(maps, (1, 1, 1, 1), mode="replicate")
        maps = F.avg_pool2d(maps, 3, stride=1)
        return to_length(maps.flatten(2).transpose(1, 2))

    def relative(self, patches):
        """Their directions less the mean over the image's object, at that length again.

        The object is the set of patches nearer to the mean of objects than to that of all else. If
        it is empty, nothing is subtracted.
        """
        e = self.directions(patches)
        nearest = torch.cdist(e, self.means).argmin(2, keepdim=True)
        is_object = (nearest == 0).float()  # (B, N, 1)
        size = is_object.sum(1, keepdim=True)
        object_sum = (is_object * e).sum(1, keepdim=True)
        object_mean = object_sum / size.clamp(min=1)  # (B, 1, D)
        return to_length(e - object_mean)

    def forward(self, patches):
        """patches (B, N, D) -> attention (B, K, N), features of the concepts (B, K - 1, D).

        An empty region's feature is 0, here and where the whitening is measured. So the vote of a
        concept that is absent is a constant.
        """
        D = patches.shape[2]
        with torch.autocast(patches.device.type, enabled=False):
            patches = to_float32(patches)
            e = self.relative(patches)
            distances = torch.cdist(e, self.prototypes).square()  # (B, N, K)
            logits = -distances / (2 * D ** 0.5)
            a = logits.softmax(2).transpose(1, 2)
            K = a.shape[1]
            won = F.one_hot(a.argmax(1), K).mT  # by the first of the largest
            region = won * a
            region = region[:, :-1]  # of the concepts
            mass = region.sum(2, keepdim=True)  # (B, K - 1, 1)
            features = region @ patches / mass.clamp_min(1e-30)
        return a, features

    def vote(self, features):
        """features (B, K - 1, D) -> the same whitened, and class scores (B, K - 1, C)."""
        with torch.autocast(features.device.type, enabled=False):
            centred = features - self.feature_mean
            z = torch.einsum("bkd,kde->bke", centred, self.whitening)
            scores = torch.einsum("bkd,kdc->bkc", z, self.votes)
        return z, scores

    def whiten(self, mean, second_moment, shrinkage):
        """Sets the whitening from the mean (K - 1, D) and the second moment (K - 1, D, D) of the
        features. shrinkage: of the covariance, towards its mean variance times I."""
        self.feature_mean.copy_(mean)
        identity = torch.eye(mean.shape[1]).to(mean)
        for k, centre in enumerate(mean):
            squares = torch.outer(centre, centre)
            covariance = second_moment[k] - squares
            variance = covariance.diagonal().mean()
            if variance < 1e-8:  # a concept without patches has no vote
                self.whitening[k] = 0
                continue
            shrunk = (1 - shrinkage) * covariance
            shrunk += shrinkage * variance * identity
            values, vectors = torch.linalg.eigh(shrunk)
            self.whitening[k] = vectors / values.clamp_min(1e-8).sqrt()


def to_length(x):
    """Vectors (..., D) at the length sqrt(D)."""
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5


class Parts(Method):
    """Clusters where IVPT has concept layers; the concepts of all of them vote.

    prototypes: how many each layer has, the background counted.
    Output: concept_logits (B, V, C), of the concepts of all layers; attention without smoothing;
    groups the same for every image: a fine concept belongs to the coarse one with which it shares
    most patches of the training images; nothing fused; features (B, G, D), the last layer's.
    """

    accepts = ("prototypes",)
    rates = dict(lr=1e-2, epochs=8)
    augmented = False  # turned and shifted training views cost 3 points of accuracy
    decay = 0.5  # of the votes
    shrinkage = 0.1  # of a covariance, towards its mean variance times I

    def __init__(self, backbone, num_classes, prototypes=PROTOTYPES):
        super().__init__(backbone)
        most = len(backbone.blocks) + 1
        if not 1 <= len(prototypes) <= most or min(prototypes) < 2:
            raise ValueError(f"prototypes {prototypes}: expected 1 to {most} numbers, "
                             "each at least 2 (one concept and the background)")
        if min(backbone.grid) < 3:
            raise ValueError(f"image size {backbone.image_size}: {backbone.grid} patches, "
                             "expected at least 3 a side")
        self.prototypes = tuple(prototypes)
        D = backbone.width
        self.layers = nn.ModuleList(
            Clusters(K, D, self.grid, num_classes) for K in self.prototypes)
        # Of every fine concept, layer by layer, the coarse one to which it belongs: below G.
        num_fine = [K - 1 for K in self.prototypes[:-1]]
        parents = torch.zeros(sum(num_fine), dtype=torch.long)
        self.register_buffer("parents", parents)

    def forward(self, images, labels=None):
        """images (B, 3, S, S) -> Output: one forward of the frozen ViT, and the votes."""
        attention, scores = [], []
        patches = self.backbone.last_patches(images, len(self.layers))
        for layer, e in zip(self.layers, patches):
            a, features = layer(e)
            z, votes = layer.vote(features)
            attention.append(a.unflatten(2, self.grid))
            scores.append(votes)
        concept_logits = torch.cat(scores, dim=1)  # (B, V, C)
        logits = concept_logits.mean(1)
        groups = self.groups(len(images))
        return Output(logits, concept_logits, attention, groups, [], z)

    def groups(self, B):
        """For each layer but the last (B, K - 1, G): one-hot, the same for every image."""
        G = self.prototypes[-1] - 1
        one_hot = F.one_hot(self.parents, G).float()
        num_fine = [K - 1 for K in self.prototypes[:-1]]
        layers = one_hot.split(num_fine) if num_fine else ()
        return [groups.expand(B, -1, -1) for groups in layers]

    def losses(self, images, labels, theta):
        """Cross entropy alone."""
        logits = self(images).logits
        loss = F.cross_entropy(logits, labels)
        return {"classification": loss, "loss": loss}, logits

    def parameter_groups(self, args):
        votes = [layer.votes for layer in self.layers]
        return [dict(params=votes, lr=args.lr, weight_decay=self.decay)]

    # ---- before the first step
    @torch.no_grad()
    def start(self, dataset, args):
        """The clusters; then whitening and groups, by one pass over the training images."""
        samples = self.sample_regions(dataset, args.seed)
        for layer, regions in zip(self.layers, samples):
            K = len(layer.prototypes)
            layer.prototypes.copy_(cluster_prototypes(*regions, K, args.seed))

        totals = [dict(features=0.0, products=0.0, shared=0.0) for _ in self.layers]
        for images, *_ in DataLoader(dataset, 16):
            images = images.to(self.parents.device)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
                patches = self.backbone.last_patches(images, len(self.layers))
            owners = []  # (B, N, K), one-hot: whose each patch is
            for layer, e, total in zip(self.layers, patches, totals):
                a, features = layer(e)
                features = features.double()
                products = torch.einsum("bkd,bke->kde", features, features)
                total["features"] += features.sum(0)
                total["products"] += products
                K = a.shape[1]
                owner = F.one_hot(a.argmax(1), K)
                owners.append(owner.float())
            for owner, total in zip(owners, totals):
                shared = torch.einsum("bnk,bng->kg", owner, owners[-1])
                total["shared"] += shared  # (K, G + 1), numbers of patches

        n = len(dataset)
        parents = []
        for layer, total in zip(self.layers, totals):
            mean = total["features"] / n
            layer.whiten(mean, total["products"] / n, self.shrinkage)
            parents.append(total["shared"][:-1, :-1].argmax(1))
        self.parents.copy_(torch.cat(parents)[:len(self.parents)])  # the last layer has none

    def sample_regions(self, dataset, seed):
        """Objects are found in directions. Their means, which this sets, make the same patches
        relative, in a second pass."""
        def directions(l, patches):
            return self.layers[l].directions(patches)

        def relative(l, patches):
            return self.layers[l].relative(patches)

        sample = functools.partial(
            sample_patches, self.backbone, len(self.layers), dataset, seed)
        layers, radius2 = sample(directions)
        masks = []
        for layer, e in zip(self.layers, layers):
            foreground, background = find_foreground(e, radius2, seed)
            layer.means[0] = e[foreground].mean(0)
            layer.means[1] = e[~foreground].mean(0)
            masks.append((foreground, background))
        del layers, e  # large
        layers, _ = sample(relative)
        return [(e, *mask) for e, mask in zip(layers, masks)]
