"""Parts: cluster once, then vote. Ours, not the paper's; how it was found: docs/tuned.md.

    python train.py --method parts
    python train.py --data FOLDER --image-size 224 --method parts

Concepts are k-means clusters of the frozen ViT's patches. They are found before the first step and
never trained: no prompt, no loss on maps. Each concept of all layers then votes for the classes, by
weights of its own, and the mean decides. Letters in shapes are those of model.py; V is the number
of all concepts that vote, the sum of K - 1 over the layers.
"""
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
    is whitened: over the training images a concept's features have mean 0 and covariance I. So a
    vote can follow what varies little.
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
        maps = to_float32(patches).transpose(1, 2).unflatten(2, self.grid)  # (B, D, h, w)
        maps = F.pad(maps, (1, 1, 1, 1), mode="replicate")
        maps = F.avg_pool2d(maps, 3, stride=1)
        return to_length(maps.flatten(2).transpose(1, 2))

    def relative(self, patches):
        """Their directions less the mean over the image's object, at that length again.

        The object is the set of patches nearer to the mean of objects than to that of all else.
        """
        e = self.directions(patches)
        is_object = torch.cdist(e, self.means).argmin(2, keepdim=True) == 0  # (B, N, 1)
        size = is_object.sum(1, keepdim=True).clamp(min=1)
        object_mean = (is_object * e).sum(1, keepdim=True) / size  # (B, 1, D)
        return to_length(e - object_mean)

    def forward(self, patches):
        """patches (B, N, D) -> attention (B, K, N), features of the concepts (B, K - 1, D).

        An empty region's feature is 0.
        """
        with torch.autocast(patches.device.type, enabled=False):
            patches = to_float32(patches)
            distances = torch.cdist(self.relative(patches), self.prototypes).square()  # (B, N, K)
            logits = -distances / (2 * patches.shape[2] ** 0.5)
            a = logits.softmax(2).transpose(1, 2)
            region = torch.where(a == a.amax(1, keepdim=True), a, 0)[:, :-1]
            mass = region.sum(2, keepdim=True)  # (B, K - 1, 1)
            return a, region @ patches / mass.clamp_min(1e-30)

    def vote(self, features):
        """features (B, K - 1, D) -> the same whitened, and class scores (B, K - 1, C)."""
        with torch.autocast(features.device.type, enabled=False):
            centred = features - self.feature_mean
            z = torch.einsum("bkd,kde->bke", centred, self.whitening)
            return z, torch.einsum("bkd,kdc->bkc", z, self.votes)


def to_length(x):
    """Vectors (..., D) at the length sqrt(D)."""
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5


class Parts(Method):
    """Clusters at the five places where IVPT has a concept layer; all their concepts vote.

    prototypes: how many each layer has, the background counted.
    Output: concept_logits (B, V, C), of the concepts of all layers; attention without smoothing;
    groups the same for every image: a fine concept belongs to the coarse one with which it shares
    most patches of the training images; nothing fused; features (B, G, D), the last layer's.
    """

    accepts = ("prototypes",)
    rates = dict(lr=1e-2, epochs=8)
    decay = 0.5  # of the votes
    shrinkage = 0.1  # of a covariance, towards its mean variance times I

    def __init__(self, backbone, num_classes, prototypes=PROTOTYPES):
        super().__init__(backbone)
        most = len(backbone.blocks) + 1
        if not 1 <= len(prototypes) <= most or min(prototypes) < 2:
            raise ValueError(f"prototypes {prototypes}: expected 1 to {most} numbers, "
                             "each at least 2 (one concept and the background)")
        self.prototypes = tuple(prototypes)
        self.layers = nn.ModuleList(
            Clusters(K, backbone.width, backbone.grid, num_classes) for K in self.prototypes)
        self.num_coarse = self.prototypes[-1] - 1  # G
        num_fine = sum(self.prototypes[:-1]) - len(self.prototypes[:-1])
        self.register_buffer("parents", torch.zeros(num_fine, dtype=torch.long))  # below G

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
        groups = F.one_hot(self.parents, self.num_coarse).float().expand(len(images), -1, -1)
        groups = [*groups.split([K - 1 for K in self.prototypes[:-1]], dim=1)]
        return Output(concept_logits.mean(1), concept_logits, attention, groups, [], z)

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
        for layer, regions in zip(self.layers, self.sample_regions(dataset, args.seed)):
            K = len(layer.prototypes)
            layer.prototypes.copy_(cluster_prototypes(*regions, K, args.seed))

        num_layers = len(self.layers)
        sums = [0.0] * num_layers  # of features, (K - 1, D)
        products = [0.0] * num_layers  # of pairs of their entries, (K - 1, D, D)
        shared = [0.0] * num_layers  # numbers of patches, (K, G + 1)
        for images, *_ in DataLoader(dataset, 16):
            images = images.to(self.parents.device)
            owners = []  # (B, N, K) one-hot, of every layer
            for l, e in enumerate(self.backbone.last_patches(images, num_layers)):
                a, features = self.layers[l](e)
                features = features.double()
                sums[l] += features.sum(0)
                products[l] += torch.einsum("bkd,bke->kde", features, features)
                owners.append(F.one_hot(a.argmax(1), a.shape[1]).float())
            for l, owner in enumerate(owners):
                shared[l] += torch.einsum("bnk,bng->kg", owner, owners[-1])

        for l, layer in enumerate(self.layers):
            mean = sums[l] / len(dataset)
            covariance = products[l] / len(dataset) - mean[:, :, None] * mean[:, None]
            layer.feature_mean.copy_(mean)
            layer.whitening.copy_(whitening_of(covariance, self.shrinkage))
        if num_layers > 1:
            parents = [counts[:-1, :-1].argmax(1) for counts in shared[:-1]]
            self.parents.copy_(torch.cat(parents))

    def sample_regions(self, dataset, seed):
        """Objects are found in directions. Their means make patches relative: a second sample."""
        num_layers = len(self.layers)
        directions, radius2 = sample_patches(
            self.backbone, num_layers, dataset, seed,
            lambda l, patches: self.layers[l].directions(patches))
        masks = [find_foreground(e, radius2, seed) for e in directions]
        for layer, e, (foreground, _) in zip(self.layers, directions, masks):
            layer.means[0] = e[foreground].mean(0)
            layer.means[1] = e[~foreground].mean(0)
        relative, _ = sample_patches(
            self.backbone, num_layers, dataset, seed,
            lambda l, patches: self.layers[l].relative(patches))
        return [(e, *mask) for e, mask in zip(relative, masks)]


def whitening_of(covariance, shrinkage):
    """Covariances (K - 1, D, D) -> W (K - 1, D, D): vectors of that covariance, times W, have I."""
    variance = covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(covariance.shape[1]).to(covariance)
    shrunk = (1 - shrinkage) * covariance + shrinkage * variance * identity
    values, vectors = torch.linalg.eigh(shrunk)
    W = vectors / values.clamp_min(1e-8).sqrt()[:, None]
    return torch.where(variance > 0, W, 0)  # a concept that won no patch has no vote
