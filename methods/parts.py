"""Parts: cluster once, then vote. Ours, not the paper's; how it was found: docs/ours.md.

    python train.py --method parts
    python train.py --data FOLDER --image-size 224 --method parts

Concepts are k-means clusters of the frozen ViT's patches. They are found before the first step and
never trained: no prompt, no loss on maps. Each concept of all layers then votes for the classes, by
weights of its own, and the mean decides. Letters in shapes are those of model.py; V is the number
of features that vote: the sum of K - 1 over the layers, and one more with cls.
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

    Prototypes are compared with patches relative to the object in their image. The mean of all its
    patches, with much of species and light, is subtracted; what is left tells its parts. The
    share of concept k in a patch, with a temperature that grows with the length of e:

        a_k = softmax over k of -|e - q_k|^2 / (2 sqrt(D))       e = relative(patches)

    A concept's region are the patches in which its share is largest, and its feature is the mean of
    the patches themselves over the region, weighted by a_k.
    """

    def __init__(self, K, width, grid):
        super().__init__()
        self.grid = grid
        self.register_buffer("prototypes", torch.zeros(K, width))
        self.register_buffer("means", torch.zeros(2, width))  # of directions: objects, all else

    def directions(self, patches):
        """Patches (B, N, D), each averaged with its neighbours and brought to length sqrt(D)."""
        maps = to_float32(patches).transpose(1, 2)  # (B, D, N)
        maps = maps.unflatten(2, self.grid)  # (B, D, h, w)
        maps = F.pad(maps, (1, 1, 1, 1), mode="replicate")
        maps = F.avg_pool2d(maps, 3, stride=1)
        return to_length(maps.flatten(2).transpose(1, 2))

    def relative(self, patches):
        """Patches (B, N, D) -> their directions less the mean over the image's object, at length
        sqrt(D). The object are the patches nearer to the mean of objects than to that of all else.
        Where there are none, nothing is subtracted.
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

        An empty region's feature is 0, here and where the whitening is measured. So the class
        scores of a concept that is absent are constants.
        """
        D = patches.shape[2]
        with torch.autocast(patches.device.type, enabled=False):
            patches = to_float32(patches)
            e = self.relative(patches)
            distances = torch.cdist(e, self.prototypes).square()  # (B, N, K)
            logits = -distances / (2 * D ** 0.5)
            a = logits.softmax(2).transpose(1, 2)
            K = a.shape[1]
            owner = a.argmax(1)  # the first of the largest
            won = F.one_hot(owner, K).mT
            weights = won * a
            weights = weights[:, :-1]  # without the background
            mass = weights.sum(2, keepdim=True)  # (B, K - 1, 1)
            features = weights @ patches / mass.clamp_min(1e-30)
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
            centred = features - self.mean
            z = torch.einsum("bvd,vde->bve", centred, self.whitening)
            scores = torch.einsum("bvd,vdc->bvc", z, self.weight)
        return z, scores

    def whiten(self, mean, covariance, shrinkage):
        """Sets the whitening from the mean (V, D) and the covariance (V, D, D) of the features.
        shrinkage: of the covariance, towards its mean variance times I."""
        self.mean.copy_(mean)
        identity = torch.eye(mean.shape[1]).to(mean)
        for v, measured in enumerate(covariance):
            variance = measured.diagonal().mean()
            if variance < 1e-8:  # constant, as where a concept never wins a patch: no vote
                self.whitening[v] = 0
                continue
            shrunk = (1 - shrinkage) * measured
            shrunk += shrinkage * variance * identity
            values, vectors = torch.linalg.eigh(shrunk)
            self.whitening[v] = vectors / values.clamp_min(1e-8).sqrt()


def to_length(x):
    """Vectors (..., D) at the length sqrt(D)."""
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5


def within_classes(sums, products, counts):
    """Features f of n images: sums (C, V, D) and numbers of images (C) of the classes, products
    (V, D, D), the sum of f f^T over all -> the mean of all (V, D), and the covariance within
    classes (V, D, D). If n is below twice the number of classes that have images, they count as
    one: an image alone does not vary."""
    n = counts.sum()
    if n < 2 * (counts > 0).sum():
        sums, counts = sums.sum(0, keepdim=True), n[None]
    sizes = counts.clamp(min=1)
    centres = sums / sizes[:, None, None]
    of_centres = torch.einsum("cvd,cve->vde", sums, centres)
    covariance = (products - of_centres) / n
    return sums.sum(0) / n, covariance


class Parts(Method):
    """Clusters where IVPT has concept layers; the concepts of all of them vote.

    prototypes: how many each layer has, the background counted.
    Output: concept_logits (B, V, C), of the concepts of all layers; attention without smoothing;
    groups the same for every image: a fine concept belongs to the coarse one with which it shares
    most patches of the training images; nothing fused; features (B, G, D), those of the last layer,
    whitened.
    """

    accepts = ("prototypes",)
    rates = dict(lr=1e-2, epochs=8)
    augmented = False  # turned and shifted training views cost 3 points of accuracy
    decay = 0.5  # of the weights of votes, as in AdamW
    shrinkage = 0.1  # see Votes.whiten
    cls_votes = False  # whether the cls token has a vote, too

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
        num_concepts = sum(K - 1 for K in self.prototypes)
        V = num_concepts + self.cls_votes
        self.votes = Votes(V, D, num_classes)
        # Of every fine concept, layer after layer, the coarse one to which it belongs, 0 to G - 1.
        num_fine = sum(K - 1 for K in self.prototypes[:-1])
        self.register_buffer("parents", torch.zeros(num_fine, dtype=torch.long))

    def read(self, images):
        """images -> attention (B, K, N) of each layer, the features (B, V, D) that vote, after a
        LayerNorm without weights. That of a concept which is absent stays 0."""
        tokens = self.backbone.last_tokens(images, len(self.layers))
        attention, features = [], []
        for layer, t in zip(self.layers, tokens):
            patches = t[:, self.backbone.prefix:]
            a, f = layer(patches)
            attention.append(a)
            features.append(f)
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
        one_hot = F.one_hot(self.parents, self.prototypes[-1] - 1).float()
        num_fine = [K - 1 for K in self.prototypes[:-1]]
        return [layer.expand(B, -1, -1) for layer in one_hot.split(num_fine)]

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

        # As in within_classes; and patches that a concept shares with each of the last layer's.
        sums, products, counts = 0.0, 0.0, 0.0
        shared = [0.0 for _ in self.prototypes[:-1]]
        num_classes = self.votes.weight.shape[2]
        for images, labels, *_ in DataLoader(dataset, 16):
            images = images.to(self.parents.device)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
                attention, features = self.read(images)
            features = features.double()
            is_class = F.one_hot(labels, num_classes)
            is_class = is_class.to(features)  # (B, C)
            sums += torch.einsum("bc,bvd->cvd", is_class, features)
            products += torch.einsum("bvd,bve->vde", features, features)
            counts += is_class.sum(0)
            owners = []  # (B, N, K), one-hot: whose each patch is
            for a in attention:
                K = a.shape[1]
                owner = F.one_hot(a.argmax(1), K)
                owners.append(owner.float())
            for l, owner in enumerate(owners[:-1]):
                shared[l] += torch.einsum("bnk,bng->kg", owner, owners[-1])

        mean, covariance = within_classes(sums, products, counts)
        self.votes.whiten(mean, covariance, self.shrinkage)
        if self.cls_votes:  # longer, as if it stood for the concepts of a layer
            self.votes.whitening[-1] *= len(mean) / len(self.layers)
        parents = [self.parents[:0]]
        for patches in shared:
            of_concepts = patches[:-1, :-1]
            parents.append(of_concepts.argmax(1))
        self.parents.copy_(torch.cat(parents))

    def sample_regions(self, dataset, seed):
        """As in Method; sets the two means of each layer. Objects are found in directions, in a
        first pass; their means make the same patches relative, in a second."""
        sample = functools.partial(sample_patches, self.backbone, dataset, seed)
        layers, radius2 = sample([layer.directions for layer in self.layers])
        masks = []
        for layer, e in zip(self.layers, layers):
            foreground, background = find_foreground(e, radius2, seed)
            layer.means[0] = e[foreground].mean(0)
            layer.means[1] = e[~foreground].mean(0)
            masks.append((foreground, background))
        del layers, e  # large: not both samples at once
        layers, _ = sample([layer.relative for layer in self.layers])
        return [(e, *mask) for e, mask in zip(layers, masks)]


class PartsAndCls(Parts):
    """Parts with a further vote, of the cls token, which no region explains.

    Its class scores are the last of concept_logits (B, V, C). explore/explain.py shows its vote
    apart from the concepts'; explore/cls_vote.py says how much of the margin it makes in all, and
    how accurate the others are without it.
    """

    cls_votes = True
