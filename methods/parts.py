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
    """The K prototypes of a layer, the background last.

    Prototypes meet patches relative to the object in their image. What all patches of an object
    have in common, such as species and light, is gone; what is left tells its parts. The shares:

        a_k = softmax over k of -|e - q_k|^2 / (2 sqrt(D))       e = relative(patches)

    A concept's feature is the mean of the patches themselves over its region, weighted by a_k.
    """

    def __init__(self, K, width, grid):
        super().__init__()
        self.grid = grid
        self.register_buffer("prototypes", torch.zeros(K, width))
        self.register_buffer("means", torch.zeros(2, width))  # directions: of objects, of all else

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


class Votes(nn.Module):
    """Every one of V features scores the C classes by weights of its own.

    Features are whitened by the training images: the mean of each is subtracted, and directions in
    which images of a class vary little are scaled up, so that a vote can follow them.
    """

    def __init__(self, V, width, num_classes):
        super().__init__()
        self.register_buffer("mean", torch.zeros(V, width))
        self.register_buffer("whitening", torch.zeros(V, width, width))
        self.weight = nn.Parameter(torch.zeros(V, width, num_classes))

    def forward(self, features):
        """features (B, V, D) -> the same whitened, and class scores (B, V, C)."""
        with torch.autocast(features.device.type, enabled=False):
            z = torch.einsum("bvd,vde->bve", features - self.mean, self.whitening)
            scores = torch.einsum("bvd,vdc->bvc", z, self.weight)
        return z, scores

    def whiten(self, mean, covariance, shrinkage):
        """Sets the whitening from the mean (V, D) and the covariance (V, D, D) of the features.
        shrinkage: of the covariance, towards its mean variance times I."""
        self.mean.copy_(mean)
        identity = torch.eye(mean.shape[1]).to(mean)
        for v, found in enumerate(covariance):
            variance = found.diagonal().mean()
            if variance < 1e-8:  # a concept without patches has no vote
                self.whitening[v] = 0
                continue
            shrunk = (1 - shrinkage) * found + shrinkage * variance * identity
            values, vectors = torch.linalg.eigh(shrunk)
            self.whitening[v] = vectors / values.clamp_min(1e-8).sqrt()


def to_length(x):
    """Vectors (..., D) at the length sqrt(D)."""
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5


def within_classes(sums, squares, counts):
    """Features of n images: their sums for each class (C, V, D), the sum of f f^T (V, D, D), images
    of each class (C) -> their mean (V, D), and the covariance within the classes (V, D, D). With
    less than two images a class it is the covariance of all: one image does not vary."""
    n = counts.sum()
    if n < 2 * (counts > 0).sum():
        sums, counts = sums.sum(0, keepdim=True), n[None]
    centres = sums / counts.clamp(min=1)[:, None, None]
    between = torch.einsum("cvd,cve->vde", sums, centres)
    return sums.sum(0) / n, (squares - between) / n


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
    cls_votes = False

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
        self.layers = nn.ModuleList(Clusters(K, D, self.grid) for K in self.prototypes)
        V = sum(K - 1 for K in self.prototypes)
        self.votes = Votes(V + self.cls_votes, D, num_classes)
        # Of every fine concept, layer by layer, the coarse one to which it belongs: below G.
        num_fine = sum(K - 1 for K in self.prototypes[:-1])
        self.register_buffer("parents", torch.zeros(num_fine, dtype=torch.long))

    def read(self, images):
        """images -> attention (B, K, N) of each layer, the features (B, V, D) that vote: a
        LayerNorm makes them equally long."""
        tokens = self.backbone.last_tokens(images, len(self.layers))
        attention, features = [], []
        for layer, t in zip(self.layers, tokens):
            a, means = layer(t[:, self.backbone.prefix:])
            attention.append(a)
            features.append(means)
        if self.cls_votes:
            cls = tokens[-1][:, :1]
            features.append(to_float32(cls))
        features = torch.cat(features, dim=1)
        return attention, F.layer_norm(features, features.shape[2:])

    def forward(self, images, labels=None):
        """images (B, 3, S, S) -> Output: one forward of the frozen ViT, and the votes."""
        attention, features = self.read(images)
        z, concept_logits = self.votes(features)  # (B, V, D), (B, V, C)
        logits = concept_logits.mean(1)
        maps = [a.unflatten(2, self.grid) for a in attention]
        G = self.prototypes[-1] - 1
        groups = self.groups(len(images))
        first = len(self.parents)  # of the last layer's concepts
        return Output(logits, concept_logits, maps, groups, [], z[:, first:first + G])

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
        return [dict(params=[self.votes.weight], lr=args.lr, weight_decay=self.decay)]

    # ---- before the first step
    @torch.no_grad()
    def start(self, dataset, args):
        """The clusters; then whitening and groups, by one pass over the training images."""
        samples = self.sample_regions(dataset, args.seed)
        for layer, regions in zip(self.layers, samples):
            K = len(layer.prototypes)
            layer.prototypes.copy_(cluster_prototypes(*regions, K, args.seed))

        # Of the features: sums for each class (C, V, D), and of their products (V, D, D).
        sums, squares, counts = 0.0, 0.0, 0  # and numbers of images (C)
        shared = [0.0 for _ in self.layers]  # patches of a concept and one of the last layer
        num_classes = self.votes.weight.shape[2]
        for images, labels, *_ in DataLoader(dataset, 16):
            images = images.to(self.parents.device)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
                attention, features = self.read(images)
            features = features.double()
            is_class = F.one_hot(labels, num_classes).to(features)  # (B, C)
            sums += torch.einsum("bc,bvd->cvd", is_class, features)
            squares += torch.einsum("bvd,bve->vde", features, features)
            counts += is_class.sum(0)
            owners = []  # (B, N, K), one-hot: whose each patch is
            for a in attention:
                owner = F.one_hot(a.argmax(1), a.shape[1])
                owners.append(owner.float())
            for l, owner in enumerate(owners):
                shared[l] += torch.einsum("bnk,bng->kg", owner, owners[-1])

        mean, covariance = within_classes(sums, squares, counts)
        self.votes.whiten(mean, covariance, self.shrinkage)
        if self.cls_votes:
            self.votes.whitening[-1] *= len(self.votes.mean) / len(self.layers)
        parents = [patches[:-1, :-1].argmax(1) for patches in shared[:-1]]
        if parents:
            self.parents.copy_(torch.cat(parents))

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


class PartsAndCls(Parts):
    """Parts with a further vote, of the cls token, which no region explains.

    It is the last of concept_logits (B, V, C), and weighs as much as the concepts of a layer do
    together. explore/explain.py shows it apart from theirs; explore/cls_vote.py says how much of
    all decisions it makes, and how accurate the concepts' votes are without it.
    """

    cls_votes = True
